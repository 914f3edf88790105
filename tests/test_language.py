"""The language model against plain transformers and PEFT, for several architectures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from peft import PeftModel

from conftest import ARCHITECTURES
from fedpref import seeds
from fedpref.errors import UserError
from fedpref.models.language import LanguageModel, Model, Sequences
from fedpref.trees import Tree

ROWS = [((5, 6, 7), (8, 9)), ((11,), (12, 13, 14, 15)), ((20, 21, 22, 23, 24), (25,))]
TARGETS = {"llama": "all-linear", "qwen2": ("q_proj", "v_proj"), "gpt2": ("c_attn",), "gpt_neox": "all-linear"}


def some_adapter(model: LanguageModel) -> Tree:
    """An adapter that does something: both factors away from zero."""
    draw = torch.Generator().manual_seed(1)
    return {name: 0.3 * torch.randn(t.shape, generator=draw) for name, t in model.init(seeds.generator(0, "init")).items()}


def plain(model: torch.nn.Module, prompt: tuple[int, ...], answer: tuple[int, ...]) -> float:
    """An answer's log-probability by itself: no batch, no padding, every position scored."""
    ids = torch.tensor([[*prompt, *answer]])
    with torch.no_grad():
        tokens = torch.log_softmax(model(ids).logits[0, :-1], -1).gather(1, ids[0, 1:, None])
    return float(tokens[len(prompt) - 1 :].sum())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_batched_log_probabilities_are_those_of_plain_transformers_and_peft(
    architecture: str, models: Callable[[str], Path], tmp_path: Path
) -> None:
    ours = LanguageModel(Model(path=str(models(architecture)), lora_r=3, lora_target_modules=TARGETS[architecture]))
    adapter = some_adapter(ours)
    batch = Sequences.of(ROWS, torch.device("cpu"))

    backbone = transformers.AutoModelForCausalLM.from_pretrained(models(architecture)).eval()
    expected = [plain(backbone, *row) for row in ROWS]
    assert ours.log_probabilities(None, batch).tolist() == pytest.approx(expected, abs=1e-4)

    ours.export(adapter, tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(backbone, tmp_path / "adapter").eval()
    adapted = [plain(loaded, *row) for row in ROWS]
    assert ours.log_probabilities(adapter, batch).tolist() == pytest.approx(adapted, abs=1e-4)
    assert max(abs(a - b) for a, b in zip(adapted, expected, strict=True)) > 0.1


def test_gradients_reach_the_adapter_and_nothing_else(tiny: Path) -> None:
    model = LanguageModel(Model(path=str(tiny)))
    adapter = {name: t.requires_grad_() for name, t in some_adapter(model).items()}
    model.log_probabilities(adapter, Sequences.of(ROWS, torch.device("cpu")), training=True).sum().backward()
    assert all(t.grad is not None and t.grad.abs().max() > 0 for t in adapter.values())
    assert all(p.grad is None for p in model.model.parameters())


def test_a_fresh_adapter_changes_nothing_and_depends_on_its_seed_alone(tiny: Path) -> None:
    model = LanguageModel(Model(path=str(tiny)))
    batch = Sequences.of(ROWS, torch.device("cpu"))
    first = model.init(seeds.generator(0, "init"))
    torch.rand(3)
    again, other = model.init(seeds.generator(0, "init")), model.init(seeds.generator(1, "init"))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    torch.testing.assert_close(model.log_probabilities(first, batch), model.log_probabilities(None, batch))


def test_dropout_acts_in_training_alone(tiny: Path) -> None:
    model = LanguageModel(Model(path=str(tiny), lora_dropout=0.5))
    adapter, batch = some_adapter(model), Sequences.of(ROWS, torch.device("cpu"))
    still = model.log_probabilities(adapter, batch)
    assert torch.equal(still, model.log_probabilities(adapter, batch))
    shaken = [model.log_probabilities(adapter, batch, training=True) for _ in range(2)]
    assert not torch.equal(*shaken)
    assert torch.equal(still, model.log_probabilities(adapter, batch))


def test_a_bfloat16_backbone_trains_a_float32_adapter(tiny: Path) -> None:
    model = LanguageModel(Model(path=str(tiny), dtype="bfloat16"))
    adapter, batch = some_adapter(model), Sequences.of(ROWS, torch.device("cpu"))
    exact = LanguageModel(Model(path=str(tiny)))
    assert {t.dtype for t in model.init(seeds.generator(0, "init")).values()} == {torch.float32}
    assert model.log_probabilities(adapter, batch).tolist() == pytest.approx(exact.log_probabilities(adapter, batch).tolist(), rel=0.1)
    assert model.fingerprint != exact.fingerprint


def test_an_exported_adapter_brings_its_tokenizer_and_keeps_pefts_names(tiny: Path, tmp_path: Path) -> None:
    from peft import AutoPeftModelForCausalLM

    model = LanguageModel(Model(path=str(tiny), lora_r=2, lora_alpha=6, lora_target_modules=("q_proj", "down_proj")))
    adapter = some_adapter(model)
    model.export(adapter, tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert loaded.peft_config["default"].lora_alpha == 6
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "adapter").eos_token == "<|end|>"
    weights = {name.replace(".default", ""): p for name, p in loaded.named_parameters() if "lora" in name}
    assert weights.keys() == adapter.keys()
    assert all(torch.equal(weights[name], adapter[name]) for name in adapter)


def test_text_and_chat_become_the_tokens_of_the_template(tiny: Path) -> None:
    model = LanguageModel(Model(path=str(tiny)))
    read = model.tokenizer.decode
    prompt, answer = model.encode("Human: Hello?\n\nAssistant:", " Good day.")
    assert (read(prompt), read(answer)) == ("Human: Hello?\n\nAssistant:", " Good day.<|end|>")
    turns = [{"role": "user", "content": "Hello?"}]
    chat = model.encode_chat(turns, [{"role": "assistant", "content": "Good day."}])
    assert chat == (prompt, answer)
    assert model.tokenizer.apply_chat_template([*turns, {"role": "assistant", "content": "Good day."}])["input_ids"] == prompt + answer


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
