"""Log-probabilities and gradients of many architectures, against plain transformers and PEFT."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel

from correct.shared import BUILTIN, SMALL, VOCABULARY, origin, random_model, sentence
from fedpref.errors import UserError
from fedpref.models.language import LanguageModel
from fedpref.models.model_settings import Model
from fedpref.numerics import seeds

Row = tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]
WINDOW = 20  # of attention, wherever there is one: shorter than most rows
ORIGINAL = 48  # positions before RoPE is stretched: rows lie on both sides
# Of an answer's log-probability. Rounding in float32 stays below 2e-6 of it here, and below 3e-5
# where a layer rounds its input to few bits (BitNet); the smallest fault that a model was seen to
# have, a neighbour's RoPE, was 3e-4.
TOLERANCE = 5e-5
GRADIENT_TOLERANCE = 1e-3  # of the norm of the whole gradient
ENDS = {"vocab_size": VOCABULARY, "bos_token_id": None, "eos_token_id": 0}


@dataclass(frozen=True)
class Architecture:
    """A model to try."""

    name: str
    kind: str
    """Of the config, in transformers."""
    settings: Mapping[str, Any]
    change: Callable[[Any], None] = lambda model: None
    """Of the weights, before they are saved."""
    in_file: Mapping[str, Any] = field(default_factory=dict)
    """Keys that are added to config.json."""
    targets: tuple[str, ...] | str = "all-linear"
    may_refuse: str = ""
    """Why a refusal is right too."""


def large_logits(model: Any) -> None:
    """Make logits so large that a soft cap bends the largest, which few random tokens show."""
    model.model.embed_tokens.weight.mul_(3.2)
    model.model.norm.weight.zero_()


def architectures() -> Iterator[Architecture]:
    """Yield all models to try, by what in them has broken scoring before."""

    def rope(kind: str, **rest: Any) -> dict[str, Any]:
        return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **rest}}

    stretched = {"original_max_position_embeddings": ORIGINAL}
    heads = {"head_dim": 8}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    local_experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    gemma = {**SMALL, **heads, "query_pre_attn_scalar": 8, "sliding_window": WINDOW}
    delta = {
        **heads,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    }
    llama4 = {
        **SMALL,
        **heads,
        "intermediate_size_mlp": 48,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "attention_chunk_size": WINDOW,
        "no_rope_layers": [1, 0],
    }
    router = "its router is a linear layer that returns several values, which LoRA cannot wrap"
    query_value = ("q_proj", "v_proj")
    # ---- RoPE in its forms
    yield Architecture("llama", "LlamaConfig", SMALL)
    yield Architecture("llama, tied", "LlamaConfig", {**SMALL, "tie_word_embeddings": True})
    llama3 = rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, **stretched)
    yield Architecture("llama, llama3 rope", "LlamaConfig", SMALL | llama3)
    yield Architecture("llama, yarn", "LlamaConfig", SMALL | rope("yarn", factor=4.0, **stretched))
    yield Architecture(
        "llama, dynamic rope",
        "LlamaConfig",
        SMALL | {"max_position_embeddings": ORIGINAL} | rope("dynamic", factor=4.0),
        may_refuse="positions depend on the longest row of the batch",
    )
    factors = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 3.0, 4.0]}
    yield Architecture(
        "phi-3, longrope",
        "Phi3Config",
        SMALL | stretched | rope("longrope", **factors, **stretched),
        may_refuse="positions depend on the longest row of the batch",
    )
    yield Architecture("phi", "PhiConfig", SMALL)
    yield Architecture("stablelm", "StableLmConfig", {**SMALL, "qk_layernorm": True})
    yield Architecture("olmo-2", "Olmo2Config", SMALL)
    yield Architecture("smollm3", "SmolLM3Config", {**SMALL, "no_rope_layers": [1, 0]})
    yield Architecture("qwen3", "Qwen3Config", SMALL | heads)
    yield Architecture(
        "gpt-neox",
        "GPTNeoXConfig",
        {name: value for name, value in SMALL.items() if name != "num_key_value_heads"},
    )
    yield Architecture(
        "gpt-j",
        "GPTJConfig",
        ENDS | {"n_positions": 256, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4},
    )
    # ---- windows, chunks and masks shorter than rows
    yield Architecture("mistral, window", "MistralConfig", {**SMALL, "sliding_window": WINDOW})
    yield Architecture(
        "qwen2, window",
        "Qwen2Config",
        {**SMALL, "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    )
    yield Architecture("starcoder2", "Starcoder2Config", {**SMALL, "sliding_window": WINDOW})
    yield Architecture("gemma-2", "Gemma2Config", gemma)
    yield Architecture("gemma-2, large logits", "Gemma2Config", gemma, change=large_logits)
    yield Architecture(
        "gemma-3",
        "Gemma3TextConfig",
        {**gemma, "layer_types": ["sliding_attention", "full_attention"]},
    )
    yield Architecture(
        "gpt-oss, sinks", "GptOssConfig", SMALL | heads | local_experts | {"sliding_window": WINDOW}
    )
    yield Architecture("llama-4", "Llama4TextConfig", llama4, may_refuse=router)
    yield Architecture("llama-4, q and v", "Llama4TextConfig", llama4, targets=query_value)
    yield Architecture(
        "gpt-neo, local",
        "GPTNeoConfig",
        ENDS
        | {
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": WINDOW,
            "max_position_embeddings": 256,
        },
    )
    yield Architecture("doge, dynamic mask", "DogeConfig", {**SMALL, "keep_window_size": 16})
    # ---- learned positions, ALiBi
    gpt2 = {"n_layer": 2, "n_head": 4, "n_embd": 32, "n_positions": 256}
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.3)
    yield Architecture("gpt-2, dropout", "GPT2Config", ENDS | gpt2 | dropout)
    opt = {"num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 48, "pad_token_id": 1}
    yield Architecture(
        "opt, projections",
        "OPTConfig",
        ENDS | opt | {"hidden_size": 32, "word_embed_proj_dim": 16, "max_position_embeddings": 256},
    )
    bloom = {"hidden_size": 32, "n_layer": 2, "n_head": 4, "pad_token_id": 1}
    yield Architecture("bloom", "BloomConfig", ENDS | bloom)
    falcon = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    yield Architecture("falcon", "FalconConfig", ENDS | falcon | {"alibi": False})
    yield Architecture("falcon, alibi", "FalconConfig", ENDS | falcon | {"alibi": True})
    mpt = {"d_model": 32, "n_heads": 4, "n_layers": 2, "expansion_ratio": 2, "max_seq_len": 256}
    yield Architecture("mpt", "MptConfig", {"vocab_size": VOCABULARY, **mpt})
    # ---- logits that are not the head's alone
    multipliers = {
        "logits_scaling": 0.5,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.7,
        "attention_multiplier": 0.3,
    }
    yield Architecture("granite", "GraniteConfig", SMALL | multipliers)
    yield Architecture("cohere", "CohereConfig", {**SMALL, "logit_scale": 0.5})
    # ---- experts
    yield Architecture("qwen3-moe", "Qwen3MoeConfig", SMALL | heads | experts)
    yield Architecture("mixtral", "MixtralConfig", SMALL | local_experts)
    yield Architecture("phimoe", "PhimoeConfig", SMALL | local_experts, may_refuse=router)
    yield Architecture(
        "phimoe, q and v", "PhimoeConfig", SMALL | local_experts, targets=query_value
    )
    latent = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8}
    groups = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1}
    yield Architecture(
        "deepseek-v3",
        "DeepseekV3Config",
        SMALL
        | latent
        | groups
        | {
            "num_key_value_heads": 4,
            "v_head_dim": 8,
            "moe_intermediate_size": 24,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
        },
    )
    # ---- layers that compute otherwise
    quantized = {
        "quant_method": "bitnet",
        "linear_class": "autobitlinear",
        "quantization_mode": "online",
        "modules_to_not_convert": ["lm_head"],
    }
    yield Architecture(
        "bitnet, autobitlinear",
        "BitNetConfig",
        SMALL,
        in_file={"quantization_config": quantized},
        may_refuse="PEFT has no layer for weights that are quantised in the forward pass",
    )
    mamba = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "pad_token_id": 1}
    yield Architecture(
        "mamba",
        "MambaConfig",
        ENDS | mamba,
        may_refuse="its kernels read the weights of out_proj past PEFT's layer, says PEFT",
    )
    yield Architecture(
        "mamba, in and x", "MambaConfig", ENDS | mamba, targets=("in_proj", "x_proj")
    )
    convolution = {"layer_types": ["conv", "full_attention"], "block_multiple_of": 16}
    yield Architecture("lfm2, hybrid", "Lfm2Config", SMALL | convolution)
    shared = {"shared_expert_intermediate_size": 24}
    yield Architecture("qwen3-next, hybrid", "Qwen3NextConfig", SMALL | experts | delta | shared)
    jamba = {
        "mamba_d_state": 8,
        "mamba_dt_rank": 8,
        "use_mamba_kernels": False,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "num_experts": 2,
    }
    yield Architecture(
        "jamba, hybrid", "JambaConfig", SMALL | jamba, targets=(*query_value, "down_proj")
    )


def rows_to_score() -> list[Row]:
    """Return rows of two answers each, shorter and longer than every window and stretch."""
    draw = torch.Generator().manual_seed(3)

    def some(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(2, VOCABULARY - 96, (count,), generator=draw).tolist())

    lengths = ((6, (4, 7)), (40, (25, 60)), (60, (3, 43)), (1, (2, 30)))
    return [(some(prompt), tuple(map(some, answers))) for prompt, answers in lengths]


def answer_score(model: Any, prompt: Sequence[int], answer: Sequence[int]) -> torch.Tensor:
    """Return an answer's log-probability by transformers, alone and without padding."""
    ids = torch.tensor([[*prompt, *answer]])
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, :-1].float()
    tokens = torch.log_softmax(logits, -1).gather(1, ids[0, 1:, None])
    return tokens[len(prompt) - 1 :].sum()


def plain_scores(model: Any, rows: Sequence[Row]) -> torch.Tensor:
    """Return all answers' log-probabilities, each by a fresh copy: some RoPE remembers lengths."""
    with torch.no_grad():
        return torch.stack(
            [
                answer_score(copy.deepcopy(model), prompt, answer)
                for prompt, answers in rows
                for answer in answers
            ]
        )


def plain_gradient(
    model: Any, rows: Sequence[Row], weights: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Return PEFT's gradient of the weighted sum, by the adapter's names in PEFT's files."""
    total: dict[str, torch.Tensor] = {}
    pairs = [(prompt, answer) for prompt, answers in rows for answer in answers]
    for weight, (prompt, answer) in zip(weights, pairs, strict=True):
        one = copy.deepcopy(model)
        values = {n.replace(".default", ""): p for n, p in one.named_parameters() if ".lora_" in n}
        parts = torch.autograd.grad(
            weight * answer_score(one, prompt, answer), list(values.values()), allow_unused=True
        )
        for name, part in zip(values, parts, strict=True):
            total[name] = total.get(name, 0) + (
                torch.zeros_like(values[name]) if part is None else part
            )
    return total


@dataclass
class Outcome:
    """What came of an architecture: errors in nats, the gradient's relative to its norm."""

    errors: dict[str, float] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    refused: str = ""
    form: str = ""
    relative: float = 0.0
    bfloat16: float = math.nan
    reference_bfloat16: float = math.nan

    def compare(self, name: str, ours: torch.Tensor, theirs: torch.Tensor) -> None:
        """Note the largest difference, and whether it is more than rounding."""
        differences = (ours.detach() - theirs.detach()).abs()
        self.errors[name] = float(differences.max())
        relative = float((differences / theirs.detach().abs().clamp(min=1)).max())
        self.relative = max(self.relative, relative)
        if not relative <= TOLERANCE:  # a nan is no rounding either
            self.wrong.append(name)


def loaded(path: str, targets: tuple[str, ...] | str, dtype: Any) -> LanguageModel:
    """Return fedpref's model."""
    return LanguageModel(Model(path=path, dtype=dtype, lora_r=3, lora_target_modules=targets))


def in_float32(
    architecture: Architecture, path: str, rows: Sequence[Row], folder: Path, outcome: Outcome
) -> torch.Tensor:
    """Compare all that is to hold in float32; return plain transformers' log-probabilities."""
    draw = torch.Generator().manual_seed(1)
    base = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    expected = plain_scores(base, rows)
    model = loaded(path, architecture.targets, "float32")
    outcome.form = "packed" if model.packs else "padded"
    with torch.no_grad():
        found = model.log_probabilities(None, rows)
        outcome.compare("base", found, expected)
        fresh = model.init(seeds.generator(0, "init"))
        outcome.compare("fresh", model.log_probabilities(fresh, rows), found)
    adapter = {name: 0.05 * torch.randn(t.shape, generator=draw) for name, t in fresh.items()}
    weights = torch.randn(len(expected), generator=draw)
    model.export(adapter, folder)
    peft = PeftModel.from_pretrained(base, str(folder), is_trainable=True).eval()
    ours = {name: tensor.requires_grad_() for name, tensor in adapter.items()}
    adapted = model.log_probabilities(ours, rows)
    outcome.compare("adapter", adapted, plain_scores(peft, rows))
    parts = torch.autograd.grad((weights * adapted).sum(), list(ours.values()), allow_unused=True)
    theirs = plain_gradient(peft, rows, weights)
    gradient = torch.cat(
        [
            (torch.zeros_like(ours[name]) if part is None else part).flatten()
            for name, part in zip(ours, parts, strict=True)
        ]
    )
    right = torch.cat([theirs[name].flatten() for name in ours])
    outcome.errors["gradient"] = float((gradient - right).norm() / right.norm())
    if not outcome.errors["gradient"] <= GRADIENT_TOLERANCE:
        outcome.wrong.append("gradient")
    with torch.no_grad():
        for name, params, together in (("alone", None, found), ("alone", adapter, adapted)):
            alone = torch.cat([model.log_probabilities(params, [row]) for row in rows])
            before = outcome.errors.get(name, 0.0)
            outcome.compare(name, alone, together)
            outcome.errors[name] = max(before, outcome.errors[name])
    outcome.wrong = list(dict.fromkeys(outcome.wrong))
    return expected


def tried_architecture(architecture: Architecture, rows: Sequence[Row], scratch: Path) -> Outcome:
    """Build, save and compare a model; whatever goes wrong is part of the outcome."""
    outcome = Outcome()
    tokenizer = transformers.AutoTokenizer.from_pretrained(BUILTIN)
    path = random_model(
        scratch / "model",
        getattr(transformers, architecture.kind)(**architecture.settings),
        tokenizer,
        architecture.change,
    )
    if architecture.in_file:
        file = Path(path) / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | architecture.in_file))
    try:
        expected = in_float32(architecture, path, rows, scratch / "adapter", outcome)
        plain = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
        half = plain_scores(plain, rows)
        outcome.reference_bfloat16 = float((half - expected).abs().max())
        with torch.no_grad():
            found = loaded(path, architecture.targets, "bfloat16").log_probabilities(None, rows)
        outcome.bfloat16 = float((found - half).abs().max())
    except UserError as error:
        outcome.refused = sentence(error).removeprefix("UserError: ")
        if not architecture.may_refuse:
            outcome.wrong.append(f"refused: {outcome.refused}")
    except Exception as error:
        outcome.wrong.append(f"{sentence(error)} at {origin(error)}")
    return outcome


def measure_architectures(match: str, scratch: Path) -> dict[str, float]:
    """Try all models and print a line for each."""
    columns = ("base", "adapter", "fresh", "alone", "gradient")
    print(
        f"{'architecture':24}{'form':8}"
        + "".join(f"{name:>10}" for name in columns)
        + f"{'bf16':>10}{'its own':>10}  result\n"
        f"{'':32}{'largest differences: nats an answer in float32':>40}{'rel.':>10}"
        f"{'nats':>10}{'nats':>10}"
    )
    rows = rows_to_score()
    outcomes = {}
    for number, architecture in enumerate(architectures()):
        if match not in architecture.name:
            continue
        outcome = tried_architecture(architecture, rows, scratch / f"architecture-{number}")
        outcomes[architecture.name] = outcome
        result = (
            f"WRONG: {', '.join(outcome.wrong)}"
            if outcome.wrong
            else f"refused, as it may be ({architecture.may_refuse}): {outcome.refused}"
            if outcome.refused
            else "right"
        )
        values = [outcome.errors.get(name, math.nan) for name in columns]
        halves = (outcome.bfloat16, outcome.reference_bfloat16)
        print(
            f"{architecture.name:24}{outcome.form:8}"
            + "".join(f"{value:10.1e}" for value in values)
            + "".join(f"{value:10.2f}" for value in halves)
            + f"  {result}",
            flush=True,
        )
    compared = [outcome for outcome in outcomes.values() if not outcome.refused]
    errors = [
        outcome.errors[name] for outcome in compared for name in columns[:2] if outcome.errors
    ]
    halves = [outcome.bfloat16 for outcome in compared if not math.isnan(outcome.bfloat16)]
    right = [not outcome.wrong for outcome in outcomes.values()]
    print(
        f"{sum(right)} of {len(right)} right, of these "
        f"{sum(bool(o.refused) and not o.wrong for o in outcomes.values())} by a refusal. "
        "Of an answer's log-probability (of 1 nat at least) these differ by "
        f"{max((o.relative for o in outcomes.values() if not o.wrong), default=0.0):.1e} at most; "
        f"{TOLERANCE:g} is tolerated."
    )
    return {
        "architectures_right": sum(right),
        "architectures_tried": len(right),
        "largest_logprob_error": max(errors, default=math.nan),
        "largest_logprob_error_bf16": max(halves, default=math.nan),
    }
