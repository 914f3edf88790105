"""What a model is, against plain transformers and PEFT, one row at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from conftest import TOKENIZER
from fedpref.errors import UserError
from fedpref.models.backbone import merged_adapter, side_by_side
from fedpref.models.encoder import Encoder
from fedpref.models.generation import Sampling, generate
from fedpref.models.language import LanguageModel
from fedpref.models.model_settings import Model
from fedpref.models.packed import Row
from fedpref.numerics import seeds
from fedpref.numerics.trees import Tree, is_down

SMALL = {
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "vocab_size": 4096,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 1,
}
DRAW = torch.Generator().manual_seed(3)


def tokens(count: int) -> tuple[int, ...]:
    return tuple(torch.randint(2, 4000, (count,), generator=DRAW).tolist())


ROWS: list[Row] = [
    (tokens(6), (tokens(4), tokens(7))),
    (tokens(60), (tokens(3), tokens(30))),
    (tokens(2), (tokens(9), tokens(33))),
]


def saved(
    folder: Path, config: Any, change: Callable[[Any], None] = lambda model: None, scale: float = 4
) -> Path:
    """A model with random weights, large enough that logits differ."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(scale)
        change(model)
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder)
    return folder


def opened(path: Path, **settings: Any) -> LanguageModel:
    return LanguageModel(Model(path=str(path), **{"dtype": "float32", "lora_r": 3, **settings}))


def some(model: LanguageModel, size: float = 0.1) -> Tree:
    draw = torch.Generator().manual_seed(1)
    fresh = model.init(seeds.generator(0, "init"))
    return {name: size * torch.randn(t.shape, generator=draw) for name, t in fresh.items()}


def alone(model: Any, rows: Sequence[Row] = ROWS) -> list[float]:
    """Each answer's log-probability by the model's own forward pass, without batch or padding."""
    found = []
    for prompt, answers in rows:
        for answer in answers:
            ids = torch.tensor([[*prompt, *answer]])
            with torch.no_grad():
                logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
            said = torch.log_softmax(logits[0, :-1].float(), -1).gather(1, ids[0, 1:, None])
            found.append(float(said[len(prompt) - 1 :].sum()))
    return found


def plain(path: Path, dtype: torch.dtype = torch.float32) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()


def close(found: Any, expected: Sequence[float], share: float = 1e-4) -> None:
    assert found.tolist() == pytest.approx(list(expected), rel=share, abs=1e-3)


def right(path: Path, tmp_path: Path, **settings: Any) -> LanguageModel:
    """Base, fresh adapter and some adapter are what plain transformers and PEFT say."""
    model = opened(path, **settings)
    base = alone(plain(path))
    close(model.log_probabilities(None, ROWS), base)
    close(model.log_probabilities(model.init(seeds.generator(0, "init")), ROWS), base)
    adapter = some(model)
    model.export(adapter, tmp_path / "exported")
    peft = PeftModel.from_pretrained(plain(path), tmp_path / "exported").eval()
    close(model.log_probabilities(adapter, ROWS), alone(peft))
    for row in ROWS:
        close(model.log_probabilities(adapter, [row]), alone(peft, [row]))
    return model


# ---- an adapter as the model


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("llama"), transformers.LlamaConfig(**SMALL))


def test_an_adapter_folder_is_its_base_with_the_adapter_merged(llama: Path, tmp_path: Path) -> None:
    first = opened(llama, lora_alpha=5, lora_target_modules=("q_proj", "down_proj"))
    trained = some(first)
    first.export(trained, tmp_path / "sft")
    second = opened(tmp_path / "sft", lora_r=2)
    expected = first.log_probabilities(trained, ROWS)
    assert (expected - first.log_probabilities(None, ROWS)).abs().max() > 0.1
    close(second.log_probabilities(None, ROWS), expected.tolist())  # DPO's reference
    adapter = some(second)
    second.export(adapter, tmp_path / "dpo")
    config = json.loads((tmp_path / "dpo/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(llama)
    assert config["r"] == 5  # of both, side by side
    both = alone(PeftModel.from_pretrained(plain(llama), tmp_path / "dpo").eval())
    close(second.log_probabilities(adapter, ROWS), both)
    close(opened(tmp_path / "dpo").log_probabilities(None, ROWS), both)


def test_adapters_side_by_side_add_up_to_both_changes() -> None:
    draw = torch.Generator().manual_seed(0)
    first = {"a.lora_A.w": torch.randn(2, 7, generator=draw), "a.lora_B.w": torch.randn(5, 2)}
    second = {
        "a.lora_A.w": torch.randn(3, 7, generator=draw),
        "a.lora_B.w": torch.randn(5, 3),
        "b.lora_A.w": torch.randn(3, 4, generator=draw),
        "b.lora_B.w": torch.randn(6, 3),
    }
    both = side_by_side(first, second)
    product = both["a.lora_B.w"] @ both["a.lora_A.w"]
    expected = first["a.lora_B.w"] @ first["a.lora_A.w"]
    torch.testing.assert_close(product, expected + second["a.lora_B.w"] @ second["a.lora_A.w"])
    torch.testing.assert_close(
        both["b.lora_B.w"] @ both["b.lora_A.w"], second["b.lora_B.w"] @ second["b.lora_A.w"]
    )
    assert {tensor.shape[0] for name, tensor in both.items() if "_A" in name} == {5}


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"target_modules": ["q_proj"], "use_dora": True}, "which is no factor|DoRA"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "lora_embedding|embeddings"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "no factor"),
        ({"target_modules": ["q_proj"], "init_lora_weights": "pissa"}, "base's own weights"),
        ({"target_modules": ["q_proj"], "layer_replication": [(0, 2), (0, 2)]}, "repeats layers"),
    ],
)
def test_an_adapter_that_no_export_could_hold_is_refused(
    settings: dict[str, Any], what: str, llama: Path, tmp_path: Path
) -> None:
    config = LoraConfig(task_type="CAUSAL_LM", r=2, **settings)
    get_peft_model(plain(llama), config).save_pretrained(tmp_path / "sft")
    with pytest.raises(UserError, match=what) as caught:
        opened(tmp_path / "sft")
    assert "erge it" in str(caught.value)


def test_an_adapter_folder_that_is_not_whole_is_refused(llama: Path, tmp_path: Path) -> None:
    first = opened(llama)
    first.export(some(first), tmp_path / "sft")
    file = tmp_path / "sft/adapter_config.json"
    said = json.loads(file.read_text())
    for change, what in (
        ({"target_modules": ["q_proj"]}, r"holds \d+ tensors that find no layer, such as .*"),
        ({"base_model_name_or_path": None}, "does not say what it stands on"),
        ({"base_model_name_or_path": str(tmp_path / "gone")}, r"gone', on which the adapter in .*"),
    ):
        file.write_text(json.dumps(said | change))
        with pytest.raises(UserError, match=what):
            opened(tmp_path / "sft")
    (tmp_path / "sft/adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match="an adapter's config and none of its weights"):
        opened(tmp_path / "sft")


def test_an_adapter_of_an_adapter_is_refused(llama: Path, tmp_path: Path) -> None:
    first = opened(llama)
    first.export(some(first), tmp_path / "first")
    first.export(some(first), tmp_path / "second")
    config = json.loads((tmp_path / "second/adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "first")
    (tmp_path / "second/adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="is an adapter too"):
        opened(tmp_path / "second")


def test_an_export_names_the_revision_of_its_base(llama: Path, tmp_path: Path) -> None:
    model = opened(llama, revision="v1")
    model.export(some(model), tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["revision"] == "v1"


def test_an_adapter_on_embeddings_beside_a_merged_one_keeps_its_scale(
    llama: Path, tmp_path: Path
) -> None:
    first = opened(llama, lora_target_modules=("q_proj",))
    first.export(some(first), tmp_path / "sft")
    second = opened(tmp_path / "sft", lora_alpha=7, lora_target_modules=("k_proj", "embed_tokens"))
    adapter = some(second)
    second.export(adapter, tmp_path / "both")
    both = PeftModel.from_pretrained(plain(llama), tmp_path / "both").eval()
    close(second.log_probabilities(adapter, ROWS), alone(both))


def test_positions_that_do_not_count_from_zero_are_refused(tmp_path: Path) -> None:
    small = {name: value for name, value in SMALL.items() if name != "num_key_value_heads"}
    config = transformers.RobertaConfig(**small, is_decoder=True)
    with pytest.raises(UserError, match="does not count positions from 0"):
        opened(saved(tmp_path / "roberta", config))


def test_own_parts_beside_an_adapter_are_not_lost(llama: Path, tmp_path: Path) -> None:
    model = opened(llama)
    model.export({**some(model), "reward.weight": torch.ones(32)}, tmp_path / "client")
    with pytest.raises(UserError, match="own parts"):
        opened(tmp_path / "client")


@pytest.mark.parametrize("end", ["embed_tokens", "lm_head"])
def test_a_merged_export_of_a_tied_model_unties_what_has_an_adapter(
    end: str, tmp_path: Path
) -> None:
    path = saved(tmp_path / "tied", transformers.LlamaConfig(**SMALL, tie_word_embeddings=True))
    model = opened(path, lora_target_modules=("q_proj", end))
    adapter = some(model, 0.05)
    model.export(adapter, tmp_path / "adapter")
    merged_adapter(tmp_path / "adapter").save_pretrained(tmp_path / "merged")
    expected = model.log_probabilities(adapter, ROWS).tolist()
    assert alone(plain(tmp_path / "merged")) == pytest.approx(expected, rel=1e-4)


# ---- what a config says


@pytest.mark.parametrize("scale", [4, 8])
def test_a_cap_on_large_logits_is_seen_in_bfloat16(scale: float, tmp_path: Path) -> None:
    def change(model: Any) -> None:
        model.model.embed_tokens.weight.mul_(scale)
        model.model.norm.weight.zero_()

    config = transformers.Gemma2Config(
        **SMALL, head_dim=8, query_pre_attn_scalar=8, sliding_window=200
    )
    path = saved(tmp_path / "gemma", config, change)
    with pytest.warns(UserWarning, match="not those of its head alone"):
        model = opened(path, dtype="bfloat16")
    expected = alone(plain(path, torch.bfloat16))
    close(model.log_probabilities(None, ROWS), expected, 0.01)


def test_a_deep_model_packs_in_bfloat16(tmp_path: Path) -> None:
    """Thirty layers round by more than a misfit of two would differ."""
    config = transformers.LlamaConfig(**{**SMALL, "num_hidden_layers": 30})
    path = saved(tmp_path / "deep", config, scale=8)
    model = opened(path, dtype="bfloat16")
    assert model.packs
    close(model.log_probabilities(None, ROWS), alone(plain(path, torch.bfloat16)), 0.03)


@pytest.mark.long
def test_a_layer_that_quantises_in_its_forward_keeps_it(tmp_path: Path) -> None:
    path = saved(tmp_path / "bitnet", transformers.BitNetConfig(**SMALL))
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "bitnet",
        "linear_class": "autobitlinear",
        "quantization_mode": "online",
        "modules_to_not_convert": ["lm_head"],
    }
    (path / "config.json").write_text(json.dumps(config))
    model = opened(path)
    fresh = model.init(seeds.generator(0, "init"))
    expected = alone(plain(path))
    close(model.log_probabilities(None, ROWS), expected)
    close(model.log_probabilities(fresh, ROWS), expected)


def test_a_hook_on_a_layer_is_not_skipped(llama: Path) -> None:
    model = opened(llama, lora_target_modules=("q_proj",))
    before = model.log_probabilities(some(model), ROWS)
    seen = []
    for name, module in model.model.named_modules():
        if name.endswith("q_proj.base_layer"):
            module.register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(model.log_probabilities(some(model), ROWS), before)
    assert seen


def longrope(original: int = 20) -> Any:
    factors = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 4.0, 5.0]}
    return transformers.Phi3Config(
        **SMALL,
        original_max_position_embeddings=original,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "original_max_position_embeddings": original,
            **factors,
        },
    )


@pytest.mark.parametrize(
    "config",
    [
        longrope(),
        transformers.MistralConfig(**SMALL, sliding_window=20),
        transformers.Qwen2Config(**SMALL, sliding_window=16, use_sliding_window=True),
        transformers.Llama4TextConfig(
            **SMALL,
            head_dim=8,
            intermediate_size_mlp=48,
            num_local_experts=2,
            num_experts_per_tok=1,
            attention_chunk_size=20,
            no_rope_layers=[1, 0],
        ),
        transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=128, vocab_size=4096),
        transformers.CohereConfig(**SMALL, logit_scale=0.25),
        transformers.GraniteConfig(**SMALL, logits_scaling=4.0),
    ],
    ids=["longrope", "window", "window-of-some-layers", "chunks", "gpt2", "scale", "divisor"],
)
@pytest.mark.filterwarnings("ignore:.*the padded one is used")
@pytest.mark.filterwarnings("ignore:.*fan_in_fan_out")
def test_rows_on_both_sides_of_every_length_are_right_and_independent(
    config: Any, tmp_path: Path
) -> None:
    right(saved(tmp_path / "model", config), tmp_path)


def test_routers_have_no_adapter_by_default_and_are_refused_by_name(tmp_path: Path) -> None:
    config = transformers.Llama4TextConfig(
        **SMALL,
        head_dim=8,
        intermediate_size_mlp=48,
        num_local_experts=2,
        num_experts_per_tok=1,
        no_rope_layers=[1, 0],
    )
    path = saved(tmp_path / "llama4", config)
    model = opened(path)
    assert not any("router" in name for name in model.init(seeds.generator(0, "init")))
    with pytest.raises(UserError, match="lora_target_modules: the model does not run"):
        opened(path, lora_target_modules=("q_proj", "router"))


def test_experts_of_a_mixture_have_no_adapter(tmp_path: Path) -> None:
    config = transformers.MixtralConfig(**SMALL, num_local_experts=2, num_experts_per_tok=1)
    path = saved(tmp_path / "mixtral", config)
    model = opened(path)
    names = model.init(seeds.generator(0, "init"))
    assert names
    assert all(".self_attn." in name for name in names)
    # rotated factors are the same change
    draw, (row, *_) = torch.Generator().manual_seed(0), [([3, 4, 5], ([6, 7], [8]))]
    adapter = {name: 0.1 * torch.randn(t.shape, generator=draw) for name, t in names.items()}
    rank = next(t for name, t in adapter.items() if is_down(name)).shape[0]
    turn = torch.linalg.qr(torch.randn(rank, rank, generator=draw))[0]
    turned = {n: turn @ t if is_down(n) else t @ turn.T for n, t in adapter.items()}
    scores = [model.log_probabilities(one, [row]) for one in (adapter, turned)]
    assert torch.allclose(*scores, atol=1e-4)
    with pytest.raises(UserError, match="a mixture's experts or router"):
        opened(path, lora_target_modules=("q_proj", "w1", "w2", "w3"))


@pytest.mark.parametrize("kind", ["mamba", "recurrent_gemma"])
def test_models_that_keep_no_keys_draw_the_likeliest_answers(kind: str, tmp_path: Path) -> None:
    sizes = {name: value for name, value in SMALL.items() if name != "max_position_embeddings"}
    config = transformers.AutoConfig.for_model(kind, **sizes)
    model = opened(saved(tmp_path / kind, config, scale=2))
    with pytest.warns(UserWarning, match="reads the whole text again"):
        assert not model.has_cache
    backbone = model.backbone.model
    prompts = [list(tokens(count)) for count in (3, 9)]
    sampling = Sampling(max_completion_length=6, temperature=1e-4)
    found = generate(model, None, prompts, 2, sampling, torch.Generator().manual_seed(0))
    for k, prompt in enumerate(prompts):
        whole = list(prompt)
        for _ in range(6):
            with torch.no_grad():
                logits = backbone(torch.tensor([whole]), use_cache=False).logits
            whole.append(int(logits[0, -1].argmax()))
        expected = tuple(whole[len(prompt) :])
        assert found[2 * k] == found[2 * k + 1] == expected[: len(found[2 * k])]


def test_what_does_not_read_from_left_to_right_is_refused(tmp_path: Path) -> None:
    sizes = {name: value for name, value in SMALL.items() if name != "num_key_value_heads"}
    path = saved(tmp_path / "bert", transformers.BertConfig(**sizes, is_decoder=False))
    with pytest.raises(UserError, match="does not read from left to right"):
        opened(path)


def test_an_encoder_and_decoder_is_refused_as_that(tmp_path: Path) -> None:
    sizes = {"d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 300}
    transformers.BartForConditionalGeneration(
        transformers.BartConfig(**sizes, encoder_attention_heads=1, decoder_attention_heads=1)
    ).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="with an encoder and writes with a decoder"):
        opened(tmp_path)


def test_a_row_beyond_positions_that_change_with_the_batch_is_refused(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    config = {**SMALL, "max_position_embeddings": 40}
    path = saved(tmp_path / "dynamic", transformers.LlamaConfig(**config, rope_parameters=rope))
    model = opened(path)
    close(model.log_probabilities(None, ROWS[:1]), alone(plain(path), ROWS[:1]))
    with pytest.raises(UserError, match="the model takes 40"):
        model.log_probabilities(None, ROWS)


def test_learned_positions_end_in_a_sentence(tmp_path: Path) -> None:
    config = transformers.GPT2Config(
        n_embd=32, n_layer=1, n_head=2, n_positions=48, vocab_size=4096
    )
    model = opened(saved(tmp_path / "gpt2", config))
    with pytest.raises(UserError, match="the model takes 48"):
        model.log_probabilities(None, ROWS)


def rewritten(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the weights of a folder."""
    (file,) = folder.glob("*.safetensors")
    weights = load_file(file)
    change(weights)
    save_file(weights, file, {"format": "pt"})


def test_a_model_whose_files_lack_a_weight_or_hold_no_number_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "lacking", transformers.LlamaConfig(**SMALL))
    rewritten(path, lambda weights: weights.pop("model.layers.0.self_attn.q_proj.weight"))
    with pytest.raises(UserError, match=r"files lack the weight '.*q_proj.weight', which would be"):
        opened(path)
    path = saved(tmp_path / "broken", transformers.LlamaConfig(**SMALL))
    rewritten(path, lambda weights: weights["model.norm.weight"].fill_(math.nan))
    with pytest.raises(UserError, match=r"'model.norm.weight' hold numbers that are not finite"):
        opened(path)
    with pytest.raises(UserError, match=r"'norm.weight' hold numbers that are not finite"):
        Encoder(path=str(path)).open()
    # one whose head is its embedding lacks nothing
    config = transformers.LlamaConfig(**SMALL, tie_word_embeddings=True)
    opened(saved(tmp_path / "tied", config))


def test_what_a_models_files_hold_beside_it_is_said(tmp_path: Path) -> None:
    path = saved(tmp_path / "long", transformers.LlamaConfig(**{**SMALL, "num_hidden_layers": 3}))
    file = path / "config.json"
    said = json.loads(file.read_text())
    file.write_text(json.dumps(said | {"num_hidden_layers": 2, "layer_types": None}))
    with pytest.warns(UserWarning, match=r"hold \d+ weights for which its config has no place, .*"):
        opened(path)
    for wrong in ({"rms_norm_eps": "1e-5"}, {"num_attention_heads": 0}):
        file.write_text(json.dumps(said | wrong))
        with pytest.raises(UserError, match="could not be loaded as a causal language model"):
            opened(path)


def test_a_path_is_a_path(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(llama.parent))
    opened(Path("~") / llama.name)
    with pytest.raises(UserError, match="there is no folder '~/nothing'"):
        opened(Path("~/nothing"))


def test_an_adapter_folder_that_lacks_a_factor_is_refused(llama: Path, tmp_path: Path) -> None:
    model = opened(llama)
    model.export(some(model), tmp_path / "sft")
    rewritten(tmp_path / "sft", lambda weights: weights.pop(sorted(weights)[0]))
    with pytest.raises(UserError, match="files lack the weight"):
        opened(tmp_path / "sft")


# ---- the tokenizer


def test_a_tokenizer_wider_than_the_embeddings_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "narrow", transformers.LlamaConfig(**{**SMALL, "vocab_size": 4000}))
    with pytest.raises(UserError, match="no embedding of: it has 4000 embeddings"):
        opened(path)


def test_a_token_that_the_model_never_sees_is_refused(llama: Path, tmp_path: Path) -> None:
    plain(llama).save_pretrained(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(TOKENIZER)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    tokenizer.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="<image>"):
        model = opened(tmp_path)
    assert model.encode("A picture:", " none.")[0]
    with pytest.raises(UserError, match="no embedding of the token '<image>'"):
        model.encode("A picture: <image>", " none.")


# ---- the key of reference scores


def test_the_fingerprint_is_of_the_backbone_and_not_of_where_the_adapter_sits(
    llama: Path, tmp_path: Path
) -> None:
    first = opened(llama)
    assert opened(llama, lora_target_modules=("q_proj",), lora_r=7).fingerprint == first.fingerprint
    model = plain(llama)
    with torch.no_grad():
        # two numbers change places in one weight of 1,536 that a sample would pass over
        weight = model.model.layers[1].mlp.up_proj.weight
        weight.view(-1)[[1, 2]] = weight.view(-1)[[1, 2]] + torch.tensor([0.25, 0.5])
    model.save_pretrained(tmp_path / "changed")
    first.tokenizer.save_pretrained(tmp_path / "changed")
    assert opened(tmp_path / "changed").fingerprint != first.fingerprint
    config = transformers.LlamaConfig(
        **SMALL, rope_parameters={"rope_type": "default", "rope_theta": 500.0}
    )
    path = saved(tmp_path / "other", config)
    assert opened(path).fingerprint != first.fingerprint  # the same weights


@pytest.mark.parametrize("tower", [1, 5])
def test_towers_that_no_text_passes_through_have_no_adapter(tower: int, tmp_path: Path) -> None:
    layers = SMALL["num_hidden_layers"]
    text = {**SMALL, "head_dim": 8, "sliding_window": 200}
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": tower,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = transformers.Gemma3Config(text_config=text, vision_config=vision)
    path = saved(tmp_path / "vlm", config)
    projections = ("q_proj", "v_proj")
    for settings, count in (
        ({}, 7 * 2 * layers),
        ({"lora_target_modules": projections}, 2 * 2 * layers),
        ({"lora_layers_to_transform": "last-1"}, 7 * 2),
        ({"lora_layers_to_transform": "last-1", "lora_target_modules": projections}, 2 * 2),
    ):
        model = opened(path, **settings)
        adapter = {name: t.clone().requires_grad_() for name, t in some(model).items()}
        assert len(adapter) == count
        assert not any("vision" in name or "projector" in name for name in adapter)
        model.log_probabilities(adapter, ROWS, training=True).sum().backward()
        assert all(tensor.grad is not None for tensor in adapter.values())
    with pytest.raises(UserError, match=f"last-{layers + 1}.*which has {layers} layers"):
        opened(path, lora_layers_to_transform=f"last-{layers + 1}")
    with pytest.raises(UserError, match="names no layer that a text passes through"):
        opened(path, lora_target_modules=r".*vision.*q_proj")
