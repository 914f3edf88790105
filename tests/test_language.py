"""The language model against plain transformers and PEFT, for several architectures."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.attention.varlen
import transformers
from peft import PeftModel
from torch import Tensor
from transformers.activations import NewGELUActivation

from conftest import ARCHITECTURES
from fedpref.errors import UserError
from fedpref.models import attention, head, trial
from fedpref.models.generation import merged
from fedpref.models.head import token_log_probabilities
from fedpref.models.language import LanguageModel
from fedpref.models.loading import load_model
from fedpref.models.model_settings import Model
from fedpref.models.own_parts import OWN_ADAPTER
from fedpref.models.packed import Row
from fedpref.models.variable_length import by_variable_length
from fedpref.numerics import seeds
from fedpref.numerics.trees import Tree

ROWS: list[Row] = [
    ((5, 6, 7), ((8, 9), (10, 11, 12, 13))),
    ((11,), ((12, 13, 14, 15), (16,))),
    (tuple(range(20, 45)), ((25, 26, 27),)),
]
TARGETS = {
    "llama": "all-linear",
    "qwen2": ("q_proj", "v_proj"),
    "gpt2": ("c_attn",),
    "gpt_neox": "all-linear",
}


def some_adapter(model: LanguageModel, size: float = 0.3) -> Tree:
    """An adapter that does something: both factors away from zero."""
    draw = torch.Generator().manual_seed(1)
    return {
        name: size * torch.randn(t.shape, generator=draw)
        for name, t in model.init(seeds.generator(0, "init")).items()
    }


def exact(path: Path, **settings: object) -> LanguageModel:
    return LanguageModel(Model(path=str(path), dtype="float32", **settings))  # type: ignore[arg-type]


def plain(model: torch.nn.Module, prompt: tuple[int, ...], answer: tuple[int, ...]) -> float:
    """An answer's log-probability by itself: no batch, no padding, every position scored."""
    ids = torch.tensor([[*prompt, *answer]])
    with torch.no_grad():
        tokens = torch.log_softmax(model(ids).logits[0, :-1], -1).gather(1, ids[0, 1:, None])
    return float(tokens[len(prompt) - 1 :].sum())


def all_plain(model: torch.nn.Module) -> list[float]:
    return [
        plain(model, tuple(prompt), tuple(answer)) for prompt, answers in ROWS for answer in answers
    ]


@pytest.mark.parametrize("packs", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_log_probabilities_are_those_of_plain_transformers_and_peft(
    architecture: str, packs: bool, models: Callable[[str], Path], tmp_path: Path
) -> None:
    ours = exact(models(architecture), lora_r=3, lora_target_modules=TARGETS[architecture])
    assert ours.packs
    ours.packs = packs
    adapter = some_adapter(ours)

    backbone = transformers.AutoModelForCausalLM.from_pretrained(models(architecture)).eval()
    expected = all_plain(backbone)
    assert ours.log_probabilities(None, ROWS).tolist() == pytest.approx(expected, abs=1e-4)

    ours.export(adapter, tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(backbone, tmp_path / "adapter").eval()
    adapted = all_plain(loaded)
    assert ours.log_probabilities(adapter, ROWS).tolist() == pytest.approx(adapted, abs=1e-4)
    assert max(abs(a - b) for a, b in zip(adapted, expected, strict=True)) > 0.1


def test_the_activation_of_gpt2_is_one_operation_and_the_same(
    models: Callable[[str], Path],
) -> None:
    modules = [
        module
        for module in exact(models("gpt2")).model.modules()
        if isinstance(module, NewGELUActivation)
    ]
    x = torch.linspace(-6, 6, 500, requires_grad=True)
    assert len(modules) == 2
    for module in modules:
        found, expected = module(x), NewGELUActivation.forward(module, x)
        assert found.grad_fn.name() == "GeluBackward0"
        assert torch.allclose(found, expected, atol=1e-6)


def gradients(model: LanguageModel, adapter: Tree, packs: bool) -> Tree:
    model.packs = packs
    leaves = {name: t.clone().requires_grad_() for name, t in adapter.items()}
    weights = torch.arange(1.0, 6.0)
    (model.log_probabilities(leaves, ROWS, training=True) * weights).sum().backward()
    return {name: t.grad for name, t in leaves.items() if t.grad is not None}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packed_gradients_are_those_of_the_padded_form(
    architecture: str, models: Callable[[str], Path]
) -> None:
    model = exact(models(architecture), lora_target_modules=TARGETS[architecture])
    adapter = some_adapter(model)
    packed, padded = (gradients(model, adapter, packs) for packs in (True, False))
    assert packed.keys() == padded.keys() == adapter.keys()
    for name, expected in padded.items():
        assert (packed[name] - expected).norm() <= 1e-4 * expected.norm(), name


def test_bfloat16_gradients_are_near_the_exact_ones(tiny: Path) -> None:
    reference, half = exact(tiny), LanguageModel(Model(path=str(tiny), dtype="bfloat16"))
    adapter = some_adapter(reference, 0.1)
    expected, found = (
        torch.cat([g.flatten() for g in gradients(m, adapter, True).values()])
        for m in (reference, half)
    )
    assert (found - expected).norm() < 0.05 * expected.norm()
    assert half.fingerprint != reference.fingerprint


def attention_of_variable_length(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor,
    seen: Tensor,
    *longest: int,
    scale: float,
    enable_gqa: bool,
    window_size: object,
) -> Tensor:
    """What PyTorch's kernel for GPUs computes with this window: a segment's last query sees all of
    its keys, the one before all but one.
    """
    assert window_size == (-1, 0)
    assert longest == (int(starts.diff().max()), int(seen.diff().max()))
    rows = []
    for (a, b), (c, d) in zip(pairwise(starts.tolist()), pairwise(seen.tolist()), strict=True):
        mask = torch.ones(b - a, d - c, dtype=torch.bool).tril(d - c - (b - a))
        q, k, v = (t.transpose(0, 1)[None] for t in (query[a:b], key[c:d], value[c:d]))
        rows.append(
            torch.nn.functional.scaled_dot_product_attention(
                q, k, v, mask, scale=scale, enable_gqa=enable_gqa
            )[0].transpose(0, 1)
        )
    return torch.cat(rows)


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@pytest.mark.parametrize("knows_groups", [True, False])
def test_the_segments_given_to_a_kernel_of_variable_length_are_the_packed_form(
    knows_groups: bool,
    architecture: str,
    models: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def of_older_pytorch(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        starts: Tensor,
        seen: Tensor,
        *longest: int,
        scale: float,
        window_size: object,
    ) -> Tensor:
        settings: Any = {"scale": scale, "enable_gqa": True, "window_size": window_size}
        rows = (query, key, value)
        return attention_of_variable_length(*rows, starts, seen, *longest, **settings)

    kernel = attention_of_variable_length if knows_groups else of_older_pytorch
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", kernel)
    model = exact(models(architecture), lora_target_modules=TARGETS[architecture])
    adapter = some_adapter(model)
    expected = gradients(model, adapter, packs=False)
    model.kernel = by_variable_length
    found = gradients(model, adapter, packs=True)
    assert all(
        (found[name] - gradient).norm() <= 1e-4 * gradient.norm()
        for name, gradient in expected.items()
    )


def test_a_kernel_that_fails_gives_way_to_the_next(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        trial,
        "kernels",
        lambda device, dtype: (by_variable_length, attention.by_part),
    )
    model = exact(tiny)  # on a CPU the first of them raises
    assert model.packs
    assert model.kernel is attention.by_part


def test_the_head_is_scored_in_chunks_with_the_gradient_of_a_full_softmax(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(head, "ROWS", 7)
    monkeypatch.setattr(head, "_logits", lambda device: 7 * 40)
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(23, 8, generator=draw).requires_grad_()
    weight, bias = torch.randn(40, 8, generator=draw), torch.randn(40, generator=draw)
    targets = torch.randint(40, (23,), generator=draw)
    upstream = torch.randn(23, generator=draw)
    ours = token_log_probabilities(hidden, weight, bias, targets)
    (gradient,) = torch.autograd.grad(ours, hidden, upstream)
    plainly = -torch.nn.functional.cross_entropy(
        hidden @ weight.T + bias, targets, reduction="none"
    )
    (expected,) = torch.autograd.grad(plainly, hidden, upstream)
    torch.testing.assert_close(ours, plainly)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", ["bloom", "gpt_neo", "granite"])
def test_a_model_that_does_not_fit_the_packed_form_runs_padded_and_says_so(
    architecture: str, models: Callable[[str], Path]
) -> None:
    """Positions by distance, attention that cannot be replaced, logits that are scaled after the
    head.
    """
    with pytest.warns(UserWarning, match="the padded one is used"):
        model = exact(models(architecture), lora_target_modules="all-linear")
    assert not model.packs
    backbone = transformers.AutoModelForCausalLM.from_pretrained(models(architecture)).eval()
    assert model.log_probabilities(None, ROWS).tolist() == pytest.approx(
        all_plain(backbone), abs=1e-4
    )


def test_rows_longer_than_a_window_of_attention_are_padded(models: Callable[[str], Path]) -> None:
    model = exact(models("mistral"))
    assert model.packs
    backbone = transformers.AutoModelForCausalLM.from_pretrained(models("mistral")).eval()
    assert model.log_probabilities(None, ROWS).tolist() == pytest.approx(
        all_plain(backbone), abs=1e-4
    )


def test_an_adapter_on_the_vocabulary_head_is_trained(models: Callable[[str], Path]) -> None:
    with pytest.warns(UserWarning, match="not a plain linear layer"):
        model = exact(models("qwen2"), lora_target_modules=("q_proj", "lm_head"))
    found = gradients(model, some_adapter(model), model.packs)
    assert all(found[name].abs().max() > 0 for name in found if "lm_head" in name)
    assert any("lm_head" in name for name in found)


def test_gradients_reach_the_adapter_and_nothing_else(tiny: Path) -> None:
    model = exact(tiny)
    assert all(
        gradient.abs().max() > 0
        for gradient in gradients(model, some_adapter(model), True).values()
    )
    assert all(p.grad is None for p in model.model.parameters())


def test_a_fresh_adapter_changes_nothing_and_depends_on_its_seed_alone(tiny: Path) -> None:
    model = exact(tiny)
    first = model.init(seeds.generator(0, "init"))
    torch.rand(3)
    again, other = model.init(seeds.generator(0, "init")), model.init(seeds.generator(1, "init"))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    torch.testing.assert_close(
        model.log_probabilities(first, ROWS), model.log_probabilities(None, ROWS)
    )


def test_dropout_acts_in_training_alone(tiny: Path) -> None:
    model = exact(tiny, lora_dropout=0.5)
    adapter = some_adapter(model)
    still = model.log_probabilities(adapter, ROWS)
    assert torch.equal(still, model.log_probabilities(adapter, ROWS))
    shaken = [model.log_probabilities(adapter, ROWS, training=True) for _ in range(2)]
    assert not torch.equal(*shaken)
    assert torch.equal(still, model.log_probabilities(adapter, ROWS))


def test_an_exported_adapter_brings_its_tokenizer_and_keeps_pefts_names(
    tiny: Path, tmp_path: Path
) -> None:
    from peft import AutoPeftModelForCausalLM

    model = LanguageModel(
        Model(path=str(tiny), lora_r=2, lora_alpha=6, lora_target_modules=("q_proj", "down_proj"))
    )
    adapter = some_adapter(model)
    model.export(adapter, tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert loaded.peft_config["default"].lora_alpha == 6
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "adapter").eos_token == "<|end|>"
    weights = {
        name.replace(".default", ""): p for name, p in loaded.named_parameters() if "lora" in name
    }
    assert weights.keys() == adapter.keys()
    assert all(torch.equal(weights[name], adapter[name]) for name in adapter)


def test_text_and_chat_become_the_tokens_of_the_template(tiny: Path) -> None:
    model = LanguageModel(Model(path=str(tiny)))
    read = model.tokenizer.decode
    prompt, answer = model.encode("Human: Hello?\n\nAssistant:", " Good day.")
    assert (read(prompt), read(answer)) == ("Human: Hello?\n\nAssistant:", " Good day.<|end|>")
    turns = [{"role": "user", "content": "Hello?"}]
    chat = model.encode_chat(
        turns,
        [
            [{"role": "assistant", "content": "Good day."}],
            [{"role": "assistant", "content": "No."}],
        ],
    )
    assert chat == (prompt, [answer, model.encode("Human: Hello?\n\nAssistant:", " No.")[1]])
    assert (
        model.tokenizer.apply_chat_template(
            [*turns, {"role": "assistant", "content": "Good day."}]
        )["input_ids"]
        == prompt + answer
    )


def test_a_model_that_cannot_be_loaded_or_adapted_is_a_sentence(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="could not be loaded as a causal language model"):
        LanguageModel(Model(path="nobody/nothing-at-all"))
    with pytest.raises(UserError, match="could not be loaded as a causal language model"):
        LanguageModel(Model(path=str(tmp_path)))
    with pytest.raises(UserError, match="lora_target_modules"):
        LanguageModel(Model(path=str(tiny), lora_target_modules=("no_such_layer",)))
    with pytest.raises(UserError, match=r"model\.device"):
        LanguageModel(Model(path=str(tiny), device="gpu"))
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="no CUDA GPU"):
            LanguageModel(Model(path=str(tiny), device="cuda"))


# ---- what large models need


@pytest.mark.parametrize("placed", [None, "last-1"])
def test_checkpointing_changes_no_gradient_and_keeps_less(
    placed: Any, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [([5, 6, 7], [[8, 9, 10, 11], [12, 13]]), ([14, 15], [[16, 17, 18]])]
    found, kept = [], []
    for checkpointing in (False, True):
        language = LanguageModel(
            Model(
                path=str(tiny),
                lora_r=4,
                dtype="float32",
                lora_layers_to_transform=placed,
                gradient_checkpointing=checkpointing,
            )
        )
        adapter = {
            name: (tensor + 0.05 * torch.randn(tensor.shape, generator=generator)).requires_grad_()
            for generator in [torch.Generator().manual_seed(0)]
            for name, tensor in language.init(torch.Generator().manual_seed(1)).items()
        }
        saved: list[int] = []

        def pack(tensor: torch.Tensor, sizes: list[int] = saved) -> torch.Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            sums, _ = language.score(adapter, rows, training=True)
        sums.square().sum().backward()
        found.append((sums.detach(), {name: p.grad for name, p in adapter.items()}))
        kept.append(sum(saved))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)
    assert all(gradient is not None for gradient in found[1][1].values())
    assert kept[1] < kept[0] / 1.5


def test_the_scale_by_the_root_of_the_rank_is_pefts(tiny: Path, tmp_path: Path) -> None:
    language = LanguageModel(
        Model(path=str(tiny), lora_r=4, lora_alpha=8, dtype="float32", use_rslora=True)
    )
    adapter = {
        name: torch.randn(tensor.shape, generator=torch.Generator().manual_seed(2)) / 10
        for name, tensor in language.init(torch.Generator()).items()
    }
    rows = [([5, 6, 7], [[8, 9, 10, 11]])]
    layer = next(m for m in language.model.modules() if hasattr(m, "lora_A"))
    assert layer.scaling["default"] == 8 / 4**0.5  # type: ignore[index]
    own = {f"{OWN_ADAPTER}{name}": tensor for name, tensor in adapter.items()}
    for params, name in ((adapter, "one"), (adapter | own, "both")):
        language.export(params, tmp_path / name)
        model = load_model(tmp_path / name)
        with torch.no_grad():
            expected, _ = language.score(params, rows)
            logits = model(torch.tensor([[*rows[0][0], *rows[0][1][0]]])).logits.log_softmax(-1)
        places = torch.tensor(rows[0][1][0])
        theirs = logits[0, 2:6].gather(1, places[:, None]).sum()
        torch.testing.assert_close(expected[0].float(), theirs, atol=1e-3, rtol=0)


def test_whole_modules_are_not_trained() -> None:
    with pytest.raises(ValueError, match=r"algorithm\.parts\.head"):
        Model(modules_to_save=("lm_head",))


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_base_is_that_of_transformers(
    bits: int, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("bitsandbytes")
    # their four bits replace the weights by a form that layers of this width do not have
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
    language = LanguageModel(
        Model(path=str(tiny), lora_r=4, dtype="float32", **{f"load_in_{bits}bit": True})
    )
    assert f"in {bits} bits" in language.description
    adapter = {
        name: (torch.randn(tensor.shape, generator=torch.Generator().manual_seed(2)) / 10)
        for name, tensor in language.init(torch.Generator()).items()
    }
    language.export(adapter, tmp_path / "adapter")
    config = transformers.BitsAndBytesConfig(
        load_in_8bit=bits == 8,
        load_in_4bit=bits == 4,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
    )
    base = transformers.AutoModelForCausalLM.from_pretrained(
        tiny, quantization_config=config, device_map={"": "cpu"}, dtype=torch.float32
    )
    theirs = PeftModel.from_pretrained(base, str(tmp_path / "adapter"), is_trainable=True).eval()
    logits = theirs(torch.tensor([[5, 6, 7, 8, 9, 10, 11]])).logits.log_softmax(-1)
    expected = logits[0, 2:6].gather(1, torch.tensor([[8], [9], [10], [11]])).sum()
    expected.backward()
    wanted = {
        name.replace(".default", ""): parameter.grad
        for name, parameter in theirs.named_parameters()
        if parameter.grad is not None
    }
    for tensor in adapter.values():
        tensor.requires_grad_()
    sums, _ = language.score(adapter, [([5, 6, 7], [[8, 9, 10, 11]])], training=True)
    sums.sum().backward()
    torch.testing.assert_close(sums[0], expected, atol=2e-2 if bits == 8 else 1e-4, rtol=0)
    assert wanted.keys() == adapter.keys()
    for name, tensor in adapter.items():
        torch.testing.assert_close(
            tensor.grad, wanted[name], atol=0.1 if bits == 8 else 1e-4, rtol=0.05
        )
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad(), merged(language, {n: t.detach() for n, t in adapter.items()}):
        drawn = language.model(ids).logits
    torch.testing.assert_close(
        drawn.log_softmax(-1), logits[:, :4].detach(), atol=0.1 if bits == 8 else 1e-4, rtol=0
    )
    plain = LanguageModel(Model(path=str(tiny), dtype="float32"))
    assert language.fingerprint != plain.fingerprint


def test_what_cannot_be_quantised_is_said(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="exclude one another"):
        Model(load_in_4bit=True, load_in_8bit=True)
    language = exact(tiny)
    language.export(language.init(torch.Generator()), tmp_path)
    if find_spec("bitsandbytes"):
        with pytest.raises(UserError, match="Merge it first"):
            LanguageModel(Model(path=str(tmp_path), load_in_4bit=True))
    monkeypatch.setattr("fedpref.errors.find_spec", lambda module: None)
    with pytest.raises(UserError, match=r"pip install 'fedpref\[quantized\]'"):
        LanguageModel(Model(path=str(tiny), load_in_8bit=True))
