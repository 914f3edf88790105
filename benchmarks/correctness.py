"""Whether numbers are right and mistakes are sentences: architectures, chat templates, odd inputs.

    python benchmarks/correctness.py
    python benchmarks/correctness.py --quick --json figures.json
    python benchmarks/correctness.py --only architectures --match gemma
    python benchmarks/correctness.py --only fuzz --match runs --keep leaks

Needs hypothesis and, for chat templates, trl. Nothing is fetched; all models are tiny and random.

Architectures: log-probabilities against plain transformers and against PEFT over the exported
folder, one answer at a time without padding, and the adapter's gradient against PEFT's. Right is
also a refusal (UserError) where the table of architectures below gives a reason for one. In
bfloat16 the error of the same arithmetic without fedpref, against float32, stands beside ours.

Templates: the tokens of prompts and answers against those of the text that the template writes,
the same on any day. Right is also a refusal, or a warning that shows the lost text where a template
writes a turn otherwise once it is answered, as long as no message of the prompt is lost.

Fuzz: rows, configs, overrides and damaged run directories, through what the commands `check`,
`report`, `compare`, `resume`, `evaluate` and `generate` call. A leak is an exception other than
UserError, more than five seconds, a value of the environment in an experiment's own YAML, or such
a YAML that is not taken back. `--keep` stores what leaked, to be tried on the command line there:

    cd leaks
    fedpref check configs-0008.yaml
    fedpref check base-3.yaml KEY=VALUE    # the lines of overrides-0056.txt
    fedpref check base-0.yaml data.path=rows-0022.jsonl
    fedpref report runs-0062               # or compare, resume, evaluate, generate
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # BitNet's layer compiles itself

import argparse
import contextlib
import copy
import csv
import gzip
import importlib.util
import io
import json
import logging
import math
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from datetime import datetime
from importlib.resources import files
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow
import pyarrow.parquet
import torch
import transformers
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.configuration import set_hypothesis_home_dir
from hypothesis.internal.conjecture.engine import ConjectureRunner
from peft import PeftModel
from transformers.utils import chat_template_utils

from fedpref import config
from fedpref.cli import showing, training, using
from fedpref.data import IID, Files, Natural, Opinions
from fedpref.errors import UserError
from fedpref.experiments.experiment import Experiment
from fedpref.experiments.finished import FinishedRun
from fedpref.models.language import LanguageModel, Model
from fedpref.numerics import seeds
from fedpref.runs.launch import run
from fedpref.tasks import FeedbackTask, PreferenceTask

PARTS = ("architectures", "templates", "fuzz")
VOCABULARY = 4096  # of the shipped tokenizer
BUILTIN = str(files("fedpref.models") / "builtin")


def random_model(
    folder: Path,
    settings: Any,
    tokenizer: Any,
    change: Callable[[Any], None] = lambda model: None,
    scale: float = 10.0,
) -> str:
    """Save a model with weights large enough for attention and logits to be far from uniform.

    Vectors (biases, norms, sinks) get noise, so that one that is left out is noticed.
    """
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape))
            elif not name.endswith("A_log"):  # of state spaces: logarithms of decay
                parameter.mul_(scale)
        change(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def last_frames(frames: Sequence[traceback.FrameSummary]) -> str:
    """Return where a traceback ends, and the last line of fedpref that led there."""
    others = [f for f in frames if f.filename != __file__ and "hypothesis" not in f.filename]
    ours = [frame for frame in others if "fedpref/" in frame.filename]
    told = [
        f"{'/'.join(Path(frame.filename).parts[-3:])}:{frame.lineno} {frame.name}"
        for frame in [*others[-1:], *ours[-1:]]
    ]
    return " from ".join(dict.fromkeys(told))


def origin(error: BaseException) -> str:
    """Return where an exception was raised."""
    return last_frames(traceback.extract_tb(error.__traceback__))


def sentence(error: BaseException) -> str:
    """Return an exception in a line."""
    text = " ".join(str(error).encode("ascii", "backslashreplace").decode().split())
    return f"{type(error).__name__}: {text[:120]}"


# ---- architectures

Row = tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]
WINDOW = 20  # of attention, wherever there is one: shorter than most rows
ORIGINAL = 48  # positions before RoPE is stretched: rows lie on both sides
# Of an answer's log-probability. Rounding in float32 stays below 2e-6 of it here, and below 3e-5
# where a layer rounds its input to few bits (BitNet); the smallest fault that a model was seen to
# have, a neighbour's RoPE, was 3e-4.
TOLERANCE = 5e-5
GRADIENT_TOLERANCE = 1e-3  # of the norm of the whole gradient
SMALL: dict[str, Any] = {
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "max_position_embeddings": 256,
    "vocab_size": VOCABULARY,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 1,
}
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


# ---- templates

# what a template may mean by the tokenizer's end token: the first of these that it writes
TURN_ENDS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<end_of_turn>",
    "<turn|>",
    "<|return|>",
    "<|end|>",
    "<｜end▁of▁sentence｜>",  # noqa: RUF001, as DeepSeek writes it
    "<|END_OF_TURN_TOKEN|>",
    "<end_of_utterance>",
    "<|eot|>",
)
TAG = re.compile(r"</?[|｜]?[\w▁]+[|｜]?>")  # noqa: RUF001


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


SYSTEM = said("system", "Answer as one would a child.")
TURNS = (said("user", "Why is it dark?"), said("assistant", "It is night."))
QUESTION = said("user", "And when is it light again?")
CONVERSATIONS = {
    "one turn": (QUESTION,),
    "system": (SYSTEM, QUESTION),
    "turns": (*TURNS, QUESTION),
    "system, turns": (SYSTEM, *TURNS, QUESTION),
}
ANSWERS = {
    "plain": ("In the morning.", "When the sun is back."),
    "<": ("<b>Tomorrow</b>, of course.", "<i>Soon</i> it will be."),
    "lines": ("First it dawns.\nThen it is day.\n\nWait.", "Soon.\n\n- at six\n- or at seven"),
}
DATE = next((f.name for f in fields(Model) if "date" in f.name), None)  # the setting, if any


@contextlib.contextmanager
def clock(day: datetime) -> Iterator[None]:
    """Let chat templates take a day for today within a `with`."""
    with mock.patch.object(chat_template_utils, "datetime") as today:
        today.now.return_value = day
        yield


def template_files() -> list[Path]:
    """Return trl's chat templates, without the variants of its own training; none without trl."""
    found = importlib.util.find_spec("trl")
    if found is None or found.origin is None:
        return []
    folder = Path(found.origin).parent / "chat_templates"
    return [f for f in sorted(folder.glob("*.jinja")) if not f.stem.endswith("_training")]


def template_model(template: str, folder: Path) -> str:
    """Save a tiny model whose tokenizer has the template, and the special tokens it writes."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(BUILTIN)
    ends = [token for token in TURN_ENDS if token in template]
    named = {"eos_token": ends[0]} if ends else {}
    if "bos_token" in template:
        named["bos_token"] = "<bos>"
    tokenizer.add_special_tokens(named)
    tokenizer.add_special_tokens(
        {"additional_special_tokens": sorted({*TAG.findall(template)} - {*named.values()})}
    )
    tokenizer.chat_template = template
    small = SMALL | {"hidden_size": 16, "num_hidden_layers": 1, "max_position_embeddings": 2048}
    ends_at = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    return random_model(folder, transformers.LlamaConfig(**small | ends_at), tokenizer)


def common_length(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Return how many entries two sequences begin with in common."""
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


class TemplateTrial:
    """A template at work in fedpref's preference task."""

    def __init__(self, template: str, folder: Path) -> None:
        self.warned = ""  # all that was said so far, for a loss may be told once
        model = Model(path=template_model(template, folder), dtype="float32")
        with self.listening():
            self.learner = PreferenceTask(model=model).build()
        self.tokenizer = self.learner.language.tokenizer
        self.is_dated = "strftime_now" in template
        self.day = datetime(2024, 7, 26)
        if DATE:
            self.day = datetime.fromisoformat(str(getattr(self.learner.settings.model, DATE)))

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Note what is warned of within a `with`."""
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            yield
        self.warned += "".join(f"{one.message}\n" for one in told)

    def rendered(
        self, prompt: Sequence[Mapping[str, str]], answers: Sequence[str]
    ) -> tuple[str, list[str]]:
        """Return what transformers makes of a prompt that is to be answered, and of the wholes."""

        def write(messages: Sequence[Mapping[str, str]], asks: bool) -> str:
            return str(
                self.tokenizer.apply_chat_template(
                    list(messages), tokenize=False, add_generation_prompt=asks
                )
            )

        with clock(self.day):
            return write(prompt, True), [
                write([*prompt, said("assistant", answer)], False) for answer in answers
            ]

    def is_straight(self, prompt: Sequence[Mapping[str, str]], answers: Sequence[str]) -> bool:
        """Return whether transformers writes a conversation whole, and answers after its prompt."""
        try:
            opening, whole = self.rendered(prompt, answers)
        except Exception:  # templates are programs
            return False
        return all(message["content"] in opening for message in prompt) and all(
            text.startswith(opening) and answer in text
            for answer, text in zip(answers, whole, strict=True)
        )

    def encoded(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def decoded(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    def found(self, prompt: Any, answers: Any) -> tuple[list[int], list[tuple[int, ...]]]:
        """Return fedpref's tokens of a prompt and of each answer to it."""
        with self.listening():
            ids, closed = self.learner.tokens(
                prompt, tuple((said("assistant", answer),) for answer in answers), "row 1"
            )
        return list(ids), [tuple(answer) for answer in closed]

    def problem(self, prompt: tuple[dict[str, str], ...], answers: tuple[str, str]) -> str:
        """Return what is wrong with a case, nothing if nothing is; raises UserError if refused."""
        try:
            with clock(datetime(2031, 12, 9)):
                another = self.found(prompt, answers)
            ids, closed = self.found(prompt, answers)
        except UserError:
            raise
        except Exception as error:
            return f"{sentence(error)} at {origin(error)}"
        if (ids, closed) != another:
            return "the tokens depend on the day"
        if self.is_dated and not DATE:  # which day is theirs?
            return ""
        try:
            opening, whole = self.rendered(prompt, answers)
        except Exception as error:  # templates are programs
            return f"transformers refuses it ({sentence(error)}), fedpref does not"
        return self.difference(prompt, answers, ids, closed, opening, whole)

    def difference(
        self,
        prompt: Sequence[Mapping[str, str]],
        answers: Sequence[str],
        ids: list[int],
        closed: Sequence[tuple[int, ...]],
        opening: str,
        whole: Sequence[str],
    ) -> str:
        """Return how fedpref's tokens differ from those of the rendered texts."""
        for content, answer, text in zip(answers, closed, whole, strict=True):
            right = self.encoded(text)
            together = [*ids, *(token if token >= 0 else ~token for token in answer)]
            if together not in (right, [*right, self.tokenizer.eos_token_id]):
                at = common_length(together, right)
                return (
                    f"prompt and answer read {self.decoded(together[at : at + 8])!r} for "
                    f"{self.decoded(right[at : at + 8])!r}"
                )
            # what is context alone is a complement, or of a type of its own
            scored = self.decoded([token for token in answer if type(token) is int and token >= 0])
            if content in text and content not in scored:
                return f"of the answer {content!r} only {scored!r} is scored"
        asked = self.encoded(opening)
        if ids == asked:
            return ""
        common = [common_length(asked, self.encoded(text)) for text in whole]
        if all(text.startswith(opening) for text in whole):
            # a token that holds the end of the prompt and the beginning of an answer, if any
            if len(ids) < min(common) or ids != asked[: len(ids)]:
                return f"the prompt ends with {self.decoded(ids)[-40:]!r}, not {opening[-40:]!r}"
        else:
            lost = [opening[common_length(opening, text) :] for text in whole]
            lost += [self.decoded(asked[length:]) for length in common]
            shapes = {form for text in lost for form in (text, text.strip(), repr(text)[1:-1])}
            if not any(form in self.warned for form in shapes if form):
                return f"{max(lost, key=len)[:60]!r} of the prompt is lost without a warning"
        shown = self.decoded(ids)
        if missing := [m["content"] for m in prompt if m["content"] not in shown]:
            return f"{missing[0]!r} is not in the prompt"
        return ""


def measure_templates(match: str, scratch: Path) -> dict[str, float]:
    """Try all templates and print a line for each."""
    found = [file for file in template_files() if match in file.stem]
    if not found:
        print(f"no template is tried: trl is not installed, or has none with {match!r} in its name")
        return {"templates_right_or_refused": 0, "templates_tried": 0}
    right = 0
    print(
        f"{'template':28}{'right':>7}{'refused':>9}{'needless':>10}{'wrong':>7}  "
        "the first that is not right\n"
        f"{'':28}{'(needless: transformers writes all of it, and answers after the prompt)'}"
    )
    for file in found:
        counts: Counter[str] = Counter()
        first: dict[str, str] = {}  # that is wrong, that is refused
        trial: TemplateTrial | None = None
        for name, prompt in CONVERSATIONS.items():
            for kind, answers in ANSWERS.items():
                try:
                    trial = trial or TemplateTrial(file.read_text(), scratch / file.stem)
                    problem = trial.problem(prompt, answers)
                    how = "wrong" if problem else "right"
                except UserError as error:
                    how, problem = "refused", sentence(error)
                    counts["needless"] += trial is not None and trial.is_straight(prompt, answers)
                except Exception as error:  # as it is loaded
                    how, problem = "wrong", f"{sentence(error)} at {origin(error)}"
                counts[how] += 1
                first.setdefault(how, f"{how}: [{name}; {kind}] {problem}")
        right += not counts["wrong"]
        print(
            f"{file.stem:28}{counts['right']:7}{counts['refused']:9}{counts['needless']:10}"
            f"{counts['wrong']:7}  "
            f"{first.get('wrong') or first.get('refused', '')}",
            flush=True,
        )
    print(f"{right} of {len(found)} right or refused")
    return {"templates_right_or_refused": right, "templates_tried": len(found)}


# ---- fuzz

SECONDS = 5.0  # of one input, or of one command on a damaged run
SECRET = "FEDPREF_BENCHMARK_SECRET"
SECRETS = {SECRET: "s3cret-of-the-environment", "HOME": "/home/of-the-environment"}
ROOM = 4 << 30  # bytes of memory beyond those in use: an input that wants more has leaked


class OvertimeError(BaseException):
    """An input took too long. Not an Exception, so that nobody takes it for one of their own."""


class LeakError(Exception):
    """Something came out that must not, without an exception."""


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[list[str]]:
    """Raise OvertimeError within a `with` that takes longer, again and again.

    What is yielded says where it was then, whatever others make of the error.
    """
    places: list[str] = []

    def over(_: int, frame: Any) -> None:
        if "hypothesis" in frame.f_code.co_filename:  # where it watches the garbage collector
            return
        places.append(last_frames(traceback.extract_stack(frame)))
        raise OvertimeError

    signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds, 0.2)
    try:
        yield places
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)


def leaked(act: Callable[[], object]) -> tuple[str, str] | None:
    """Return what leaves an act other than a UserError, and where it began; None for nothing."""
    # as a terminal takes it: what UTF-8 cannot write is an error
    sink = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    leak: tuple[str, str] | None = None
    places: list[str] = []
    try:
        with limited(SECONDS) as places, contextlib.redirect_stdout(sink):
            act()
    except (UserError, OvertimeError):
        pass
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # also panics of Rust, and exits
        leak = sentence(error), origin(error)
    return (f"more than {SECONDS:g} s", places[0]) if places else leak


@dataclass
class Trials:
    """Inputs tried, and those that leaked."""

    scratch: Path
    keep: Path | None = None
    tried: Counter[str] = field(default_factory=Counter)
    leaks: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)

    def examine(
        self, kind: str, shown: str, acts: Mapping[str, Callable[[], object]], stored: Path
    ) -> None:
        """Try an input by one or more acts; print what leaks, and keep the input."""
        self.tried[kind] += 1
        leaks = {name: leak for name, act in acts.items() if (leak := leaked(act))}
        if not leaks:
            return
        self.leaks[kind] += 1
        name = f"{kind}-{self.tried[kind]:04d}"
        for act, (what, where) in leaks.items():
            place = f" at {where}" if where else ""
            reason = what.split(":")[0] + place if where else what
            self.reasons[f"{kind}, {act}: {reason}"] += 1
            print(f"leak {name} {act}: {what}{place} <- {shown[:120]}", flush=True)
        if self.keep:
            goal = self.keep / name
            if stored.is_dir():
                shutil.copytree(stored, goal, dirs_exist_ok=True)
            else:
                shutil.copy(stored, goal.with_name(name + "".join(stored.suffixes)))

    def generate(
        self, count: int, strategy: st.SearchStrategy[Any], examine: Callable[[Any], None]
    ) -> None:
        """Let hypothesis draw so many inputs; the same ones each time."""

        @settings(
            max_examples=count,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate],
        )
        @given(strategy)
        def trial(drawn: Any) -> None:
            examine(drawn)

        # it would follow each input with five that repeat parts of it
        with mock.patch.object(ConjectureRunner, "generate_mutations_from", create=True):
            trial()


# -- values that do not fit

# what JSON and YAML have no simple value for, as written; each is put in for its marker
DEEP = {f"deep {depth}": "[" * depth + "]" * depth for depth in (50, 900, 3000, 100_000)}
JSON_RAW = DEEP | {
    "huge": "7" * 5000,
    "NaN": "NaN",
    "Infinity": "-Infinity",
    "1e999": "1e999",
    "half": '"\\ud83d"',
    "keys": '{"a": 1, "a": 2}',
    "open": '{"a": ',
}


def marker(name: str) -> str:
    return f"@{name}@"


def with_raw(text: str, raw: Mapping[str, str], quotes: Sequence[str]) -> str:
    """Put raw text in for its markers, with the quotes around them."""
    for name, value in raw.items():
        for quote in quotes:
            text = text.replace(f"{quote}{marker(name)}{quote}", value)
    return text


letters = st.characters()  # lone surrogates too
texts = st.one_of(st.sampled_from(["", " ", "yes", "1.0", "\0", "\u2028", "é"]), st.text(letters))
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([10**40, -1, 0, 2**63, 10**400]),
    st.floats(),
    texts,
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.text(letters, max_size=4), inner, max_size=3),
    ),
    max_leaves=6,
)


def weighted(*choices: tuple[int, st.SearchStrategy[Any]]) -> st.SearchStrategy[Any]:
    """Return a strategy that takes one of several, each so many times as often."""
    repeated = [strategy for times, strategy in choices for _ in range(times)]
    return st.sampled_from(repeated).flatmap(lambda strategy: strategy)  # one_of forgets repeats


rarely = st.sampled_from([False] * 9 + [True])


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Return bytes of which some are gone, flipped or added."""
    how = draw(st.sampled_from(["cut", "flip", "insert", "repeat"]))
    at = draw(st.integers(0, max(0, len(content) - 1)))
    if how == "cut":
        return content[:at]
    if how == "flip":
        changed = bytearray(content)
        for place in draw(st.lists(st.integers(0, max(0, len(content) - 1)), max_size=6)):
            if changed:
                changed[place] ^= 1 << draw(st.integers(0, 7))
        return bytes(changed)
    if how == "insert":
        return content[:at] + draw(st.binary(min_size=1, max_size=8)) + content[at:]
    return content[:at] + content[at // 2 :]


# -- rows


HERE, THERE = [said("assistant", "Here.")], [said("assistant", "There.")]
ASKED = said("user", "Where to on day #?")
DIALOGUE = "\n\nHuman: Day #?\n\nAssistant: b"
# rows as they are in the formats that are read; # is a number
ROWS: tuple[dict[str, Any], ...] = (
    {"prompt": "Where on day #?", "chosen": " Here.", "rejected": " There.", "client": "a"},
    {"prompt": [ASKED], "chosen": HERE, "rejected": THERE, "client": "b", "split": "train"},
    {"chosen": [ASKED, *HERE], "rejected": [ASKED, *THERE], "client": "a", "tools": []},
    {"chosen": DIALOGUE, "rejected": f"{DIALOGUE}c", "client": "a"},
    {"prompt": "Where on day #?", "completion": " Here.", "label": True, "client": "a"},
    {"messages": [ASKED, *HERE], "label": 1},
    {"prompt": "Where on day #?", "client": 3},
    {"question": "Day #?", "options": "['a', 'b']", "selections": "defaultdict(x, {'A': [1, 2]})"},
    {"question": "Day #?", "options": ["a", "b"], "group": "A", "shares": [0.5, 0.5]},
)


def numbered(row: Mapping[str, Any], number: int) -> dict[str, Any]:
    """Return a row with a prompt of its own, of one of two clients."""
    again: dict[str, Any] = json.loads(json.dumps(row).replace("#", str(number)))
    return again | {"client": "ab"[number % 2]} if "client" in row else again


cells = weighted(
    (4, values),
    (3, texts),
    (6, st.sampled_from([marker(name) for name in JSON_RAW])),
    (
        3,
        st.sampled_from(
            ["[" * 300, "[1" + ", 1" * 99, "((1, 2), 3)", "{'A': 1e999}", "[nan, 1]", "1_0", "true"]
        ),
    ),
    (2, st.sampled_from([[QUESTION], HERE, [TURNS[0]], "Where to?", "\n\nHuman: a", "<|end|>"])),
    (
        3,
        st.lists(
            st.fixed_dictionaries(
                {
                    "role": st.one_of(st.sampled_from(["user", "assistant", "human"]), values),
                    "content": st.one_of(texts, values),
                },
                optional={"tool_calls": values},
            ),
            min_size=1,
            max_size=3,
        ),
    ),
)


@st.composite
def odd_rows(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Draw some rows of a known format, of which the last has an odd cell or two."""
    usual = draw(st.sampled_from(ROWS))
    row = numbered(usual, draw(st.integers(0, 12)))
    for _ in range(draw(st.integers(1, 2))):
        column = draw(st.sampled_from([*row, *row, "client", "prompt", "label"]))
        if not draw(rarely):
            row[column] = draw(cells)
        elif column in row:
            row[draw(st.text(letters, max_size=3))] = row.pop(column)
    count = draw(st.sampled_from([0, 12, 12, 12]))
    return [*(numbered(usual, number) for number in range(count)), row]


def as_csv(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Return rows as CSV, whatever is no text as Python writes it."""
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, list(dict.fromkeys(key for row in rows for key in row)))
    writer.writeheader()
    with contextlib.suppress(csv.Error):
        writer.writerows(
            {key: value if value is None else str(value) for key, value in row.items()}
            for row in rows
        )
    return with_raw(out.getvalue(), JSON_RAW, ("",)).encode("utf-8", "surrogatepass")


def as_parquet(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Return rows as Parquet; columns of mixed types as text."""
    out = io.BytesIO()
    names = dict.fromkeys(key for row in rows for key in row)
    columns: dict[str, Any] = {}
    for name in names:
        column = [row.get(name) for row in rows]
        key = name.encode("utf-8", "replace").decode()
        try:
            columns[key] = pyarrow.array(column)
            pyarrow.parquet.write_table(pyarrow.table({key: columns[key]}), io.BytesIO())
        except (pyarrow.ArrowException, OverflowError, UnicodeError):
            columns[key] = pyarrow.array([ascii(value) for value in column])
    pyarrow.parquet.write_table(pyarrow.table(columns), out)
    return out.getvalue()


@st.composite
def tables(draw: st.DrawFn) -> tuple[str, str, bytes]:
    """Draw a file of rows: the task that it is for, the end of its name, and its bytes."""
    kind = draw(st.sampled_from([".jsonl", ".jsonl", ".json", ".csv", ".parquet"]))
    packed = "" if kind == ".parquet" else draw(st.sampled_from(["", "", ".gz"]))
    if draw(rarely):
        return "preference", kind + packed, draw(st.binary(max_size=60))
    rows = draw(odd_rows())
    task = (
        "opinion" if "question" in rows[0] else "feedback" if "label" in rows[0] else "preference"
    )
    if kind == ".csv":
        content = as_csv(rows)
    elif kind == ".parquet":
        content = as_parquet(rows)
    else:
        plain = draw(st.booleans())
        lines = [with_raw(json.dumps(row, ensure_ascii=plain), JSON_RAW, ('"',)) for row in rows]
        text = "\n".join(lines) if kind == ".jsonl" else f"[{','.join(lines)}]"
        content = text.encode("utf-8", "surrogatepass")
    if kind != ".parquet" and draw(rarely):
        encoding = draw(st.sampled_from(["utf-16", "latin-1", "utf-8-sig", "utf-7", "cp500"]))
        content = content.decode("utf-8", "replace").encode(encoding, "replace")
    if draw(rarely):
        content = draw(damaged(content))
    if packed:
        content = gzip.compress(content, 1, mtime=0)
        if draw(rarely):
            content = draw(damaged(content))
    return task, kind + packed, content


def fuzz_rows(trials: Trials, model: Model, count: int) -> None:
    """Read files by `fedpref check`."""
    kinds = (PreferenceTask(model=model), FeedbackTask(model=model))
    tasks = {one.name: (one, one.build()) for one in kinds}

    def check(experiment: Experiment) -> None:
        file = trials.scratch / "rows.yaml"
        file.write_text(config.to_yaml(experiment))
        # loading the model takes longest, and is the same for all
        learner = tasks[experiment.task.name][1]
        with mock.patch.object(Experiment, "build_task", return_value=learner):
            training.check(file)

    def examine(drawn: tuple[tuple[str, str, bytes], Any, dict[str, Any]]) -> None:
        (kind, ending, content), how, options = drawn
        path = trials.scratch / f"rows{ending}"
        path.write_bytes(content)
        survey = kind == "opinion"
        data: Any = Opinions(path=str(path)) if survey else Files(path=str(path), **options)
        task = tasks["preference" if survey else kind][0]
        experiment = Experiment(data=data, partition=how, task=task)
        shown = content.decode("utf-8", "backslashreplace")
        acts = {"check": lambda: check(experiment)}
        trials.examine("rows", f"{ending} {shown[-100:]!a}", acts, path)

    partitions = (IID(clients=1), IID(clients=1), Natural(), Natural(column="group"))
    options = ({}, {}, {"unusable": "skip"}, {"unusable": "skip"}, {"split_column": "split"})
    trials.generate(
        count, st.tuples(tables(), st.sampled_from(partitions), st.sampled_from(options)), examine
    )


# -- configs and overrides


def bomb(levels: int, width: int = 9) -> str:
    """Return YAML whose aliases unfold to width to the power of levels."""
    lines = [f"&b0 [{', '.join(['x'] * width)}]"]
    lines += [f"&b{i} [{', '.join([f'*b{i - 1}'] * width)}]" for i in range(1, levels)]
    return f"[{', '.join(lines)}]"


YAML_RAW = {
    f"yaml {number}": raw
    for number, raw in enumerate(
        (
            "!!python/object/apply:os.getcwd []",
            "!!python/name:os.system",
            "!unknown 3",
            "!!binary aGk=",
            "!!set {a, b}",
            "!!omap [a: 1]",
            "!!timestamp 2001-01-01",
            "2001-01-01",
            "2001-01-01 10:00:00",
            "*missing",
            "&r [*r]",
            "&r {a: *r}",
            "{<<: 3}",
            "${rounds}",
            "${name}",
            "${task.loss}",
            "${task}",
            "${.name}",
            "${...x}",
            "'${'",
            "'${}'",
            "'${a b}'",
            f"${{oc.env:{SECRET}}}",
            f"'a-${{oc.env:{SECRET}}}'",
            "${oc.env:HOME}",
            "${oc.env:NOT_THERE}",
            "'${oc.env:NOT_THERE,3}'",
            "'${oc.select:nothing,${oc.env:HOME}}'",
            "${oc.decode:'[1'}",
            "'${oc.create:{a: 1}}'",
            "${oc.dict.keys:task}",
            "${nothing:3}",
            "'\\${x}'",
            "'\\\\${x}'",
            "'???'",
            ".nan",
            ".inf",
            "1e999",
            "0x1F",
            "1_000",
            "12:30:00",
            "yes",
            "~",
            "7" * 5000,
            '"\\ud83d"',
            '"\\0"',
            '"\\x1b[31m"',
            "[a, b",
            "{a: [",
            "? x",
            "- - -",
            "%",
            "\t3",
            "{1: 2}",
            "{[a]: 2}",
            "{? {a: 1} : 2}",
            *("[" * depth + "]" * depth for depth in (20, 300, 3000)),
            *("{a: " * depth + "1" + "}" * depth for depth in (20, 300)),
            *(bomb(levels) for levels in (3, 5, 9)),
        )
    )
}

# of kinds, right in one place or another
NAMES = (
    *("alone", "pooled", "feddpo", "ditto", "scaffold", "choco", "fedper", "firm", "scalarized"),
    *("dpo", "ipo", "simpo", "kto", "ring", "complete", "star", "erdos-renyi", "topk", "factors"),
    *("iid", "dirichlet", "by-size", "builtin", "hh", "polis", "feedback", "grpo", "flare"),
)

odd = weighted(
    (3, values),
    (3, st.sampled_from([marker(name) for name in YAML_RAW])),
    (2, st.sampled_from([0, 1, -1, 2, 3, 0.5, 1.5, 1e9, 10**30, "auto", "none", [], {}, ["a"]])),
    (2, st.sampled_from(NAMES)),
    (1, st.sampled_from([marker(name) for name, raw in YAML_RAW.items() if "env:" in raw])),
    (1, st.sampled_from([marker(name) for name, raw in YAML_RAW.items() if "\\" in raw])),
)


def nodes(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the paths of all keys."""
    entries = content.items() if isinstance(content, dict) else ()
    for key, value in entries:
        yield (*path, key)
        yield from nodes(value, (*path, key))


def bases(data: Path, survey: Path, model: str) -> list[dict[str, Any]]:
    """Return configs of several kinds, over tiny files and a tiny model."""
    tiny = {"path": model, "dtype": "float32", "lora_r": 2, "lora_target_modules": ["q_proj"]}
    local = {"steps": 3, "batch_size": 2, "learning_rate": 0.01}
    pairs = {"name": "files", "path": str(data)}
    common = {"rounds": 1, "workers": 1, "evaluate_every": 1}
    return [
        {
            "name": "first",
            "data": pairs,
            "partition": {"name": "natural", "column": "client"},
            "task": {"model": tiny, "loss": {"name": "dpo", "beta": 0.1}, "max_length": 64},
            "algorithm": {"name": "fedpdpo", "local": local, "parts": {"head": "low-rank"}},
            "federation": {"clients_per_round": 2, "weighting": "equal"},
            "baselines": ["alone", "pooled"],
            **common,
        },
        {
            "name": "second",
            "data": pairs,
            "partition": {"name": "iid", "clients": 2},
            "task": {"model": tiny, "loss": "ipo", "truncation_mode": "keep_end"},
            "algorithm": {"name": "decdpo", "local": local},
            "network": {"topology": {"name": "ring"}, "link_failure": 0.1},
            "diagnostics": ["disagreement"],
            **common,
        },
        {
            "name": "third",
            "data": pairs,
            "partition": {"name": "natural", "max_clients": 2},
            "task": {
                "name": "dialogue",
                "model": tiny,
                "rewards": {
                    "brief": {"name": "length", "target": 4},
                    "kind": {"name": "pattern", "pattern": "(please|glad)", "most": 2},
                },
                "estimator": {"name": "rloo"},
            },
            "algorithm": {"name": "firm", "solver": {"b": 1.0}, "local": local},
            **common,
        },
        {
            "name": "fourth",
            "data": {"name": "opinions", "path": str(survey), "groups": ["A", "B"]},
            "partition": {"name": "natural", "column": "group"},
            "task": {"name": "opinion", "model": {"path": model}},
            "algorithm": {"name": "pluralllm", "local": local},
            **common,
        },
    ]


def whole_config(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config with all that it leaves out."""
    return config.dump(config.parse(Experiment, dict(content), "a config"))


def put(content: Any, path: Sequence[Any], how: str, value: Any) -> None:
    """Replace, remove, rename or join what stands at a path, where it still stands."""
    for key in path[:-1]:
        content = content.get(key) if isinstance(content, dict) else None
    if not isinstance(content, dict) or path[-1] not in content:
        return
    if how == "replace":
        content[path[-1]] = value
    elif how == "remove":
        del content[path[-1]]
    elif how == "rename":
        key = value if isinstance(value, str) else f"{path[-1]}s"
        content[key] = content.pop(path[-1])
    elif how == "list":
        content[path[-1]] = [content[path[-1]], value]
    else:
        content["unknown" if how == "add" else "name"] = value


@st.composite
def yaml_files(draw: st.DrawFn, contents: Sequence[Any]) -> bytes:
    """Draw a config file that is nearly valid."""
    content = copy.deepcopy(draw(st.sampled_from(contents)))
    for _ in range(draw(st.sampled_from([1, 1, 2]))):
        hows = ("replace", "replace", "replace", "remove", "rename", "list", "add", "name")
        path = draw(st.sampled_from([*nodes(content), *[("name",)] * 4]))
        put(content, path, draw(st.sampled_from(hows)), draw(odd))
    flow = draw(st.sampled_from([None, False, True]))
    text = yaml.safe_dump(content, default_flow_style=flow, allow_unicode=True, sort_keys=False)
    written = with_raw(text, YAML_RAW, ("'", '"')).encode("utf-8", "surrogatepass")
    if draw(rarely):
        written = draw(damaged(written))
    return written


def checked(path: Path, overrides: Sequence[str], scratch: Path) -> None:
    """Do what `fedpref check` does, and look at the experiment's own YAML."""
    experiment = Experiment.load(path, overrides)
    text = config.to_yaml(experiment)
    if shown := [name for name, value in SECRETS.items() if value in text]:
        raise LeakError(f"the value of {shown[0]} stands in the experiment's YAML")
    own = scratch / "own.yaml"
    own.write_text(text, encoding="utf-8")
    try:
        Experiment.load(own)
    except UserError as error:
        raise LeakError(f"the experiment's own YAML is refused: {error}") from error
    location = experiment.data.location
    # a folder of this machine is not to be searched for datasets
    if location is None or not Path(location).expanduser().is_dir():
        training.check(path, list(overrides))


def fuzz_configs(trials: Trials, contents: Sequence[Any], count: int) -> None:
    """Load files as `fedpref check` does."""
    known = [*contents, *map(whole_config, contents)]
    usual = {
        line.strip()
        for base in known
        for flow in (None, False)
        for line in yaml.safe_dump(base, default_flow_style=flow).splitlines()
    }

    def examine(written: bytes) -> None:
        path = trials.scratch / "config.yaml"
        path.write_bytes(written)
        acts = {"check": lambda: checked(path, (), trials.scratch)}
        text = written.decode("utf-8", "backslashreplace")
        lines = [line.strip() for line in text.splitlines() if line.strip() not in usual]
        trials.examine("configs", ascii("; ".join(lines) or text[-100:]), acts, path)

    trials.generate(count, yaml_files(known), examine)


@st.composite
def override_lists(draw: st.DrawFn, known: Sequence[Sequence[str]]) -> tuple[int, list[str]]:
    """Draw the number of a config, of which the keys are known, and settings that override it."""
    number = draw(st.integers(0, len(known) - 1))
    keys = weighted(
        (8, st.sampled_from(known[number])),
        (1, st.sampled_from(["", ".", "a..b", "rounds.", "data[0]", "task.loss.name.x", "${a}"])),
        (1, texts),
    )

    def one() -> str:
        key, value = draw(keys), draw(odd)
        written = value if isinstance(value, str) else json.dumps(value)
        text = f"{key}={with_raw(written, YAML_RAW | JSON_RAW, ('',))}"
        return draw(texts) if draw(rarely) else text

    return number, [one() for _ in range(draw(st.integers(1, 2)))]


def fuzz_overrides(trials: Trials, contents: Sequence[Any], count: int) -> None:
    """Load valid files with overrides as `fedpref check` does."""
    paths = [Path(f"base-{number}.yaml") for number in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_text(yaml.safe_dump(content))

    def examine(drawn: tuple[int, list[str]]) -> None:
        number, overrides = drawn
        given_ = trials.scratch / "overrides.txt"
        given_.write_text("\n".join([paths[number].name, *map(ascii, overrides)]))
        acts = {"check": lambda: checked(paths[number], overrides, trials.scratch)}
        short = [text if len(text) < 90 else f"{text[:60]}...{text[-9:]}" for text in overrides]
        trials.examine("overrides", f"{contents[number]['name']} {short!a}", acts, given_)

    wholes = [[*nodes(content), *nodes(whole_config(content))] for content in contents]
    known = [[".".join(path) for path in some] for some in wholes]
    trials.generate(count, override_lists(known), examine)


# -- damaged runs

OTHER_JSON = ("{}", "[]", "null", "3", '"x"', '{"a": 1}', "[1, 2]", "[[]]", "NaN", "[" * 3000, "\n")


@st.composite
def damages(draw: st.DrawFn, contents: Mapping[str, bytes]) -> tuple[str, str, bytes | None]:
    """Draw a file of a run, what becomes of it in a word, and its bytes; None if it is gone."""
    small = [name for name in contents if not name.endswith("tokenizer.json")]
    read_most = [name for name in small if "/" not in name or name.startswith(("base", "samples"))]
    name = draw(st.sampled_from([*small, *read_most * 2]))
    content = contents[name]
    is_json = name.endswith((".json", ".jsonl", ".yaml"))
    hows = ["gone", "empty", "damaged", "damaged", "other", "binary"]
    how = draw(st.sampled_from(hows + ["value"] * 6 if is_json else hows))
    if how == "gone":
        return name, how, None
    if how == "empty":
        return name, how, b""
    if how == "damaged":
        return name, how, draw(damaged(content))
    if how == "other":
        return name, how, draw(st.sampled_from(OTHER_JSON)).encode()
    if how == "binary":
        return name, how, draw(st.binary(min_size=1, max_size=40))
    if name.endswith(".yaml"):
        entries = [yaml.safe_load(content)]
    else:
        lines = content.decode().splitlines() if name.endswith(".jsonl") else [content.decode()]
        entries = [json.loads(line) for line in lines if line.strip()] or [{}]
    entry = draw(st.sampled_from(entries))
    path = draw(st.sampled_from(list(nodes(entry)) or [("name",)]))
    put(
        entry, path, draw(st.sampled_from(["replace", "replace", "remove", "rename"])), draw(values)
    )
    if name.endswith(".yaml"):
        return name, how, yaml.safe_dump(entries[0]).encode("utf-8", "surrogatepass")
    separator = "\n" if name.endswith(".jsonl") else ""
    return name, how, "".join(json.dumps(one) + separator for one in entries).encode()


def fuzz_runs(trials: Trials, content: Mapping[str, Any], data: Path, count: int) -> None:
    """Damage a file of a finished run and let the commands read the run."""
    whole, path = trials.scratch / "whole", trials.scratch / "run"
    run(config.parse(Experiment, dict(content), "a config"), whole)
    contents = {
        file.relative_to(whole).as_posix(): file.read_bytes()
        for file in sorted(whole.rglob("*"))
        if file.is_file()
    }
    client = next(iter(FinishedRun.at(whole).clients))

    def examine(drawn: tuple[str, str, bytes | None]) -> None:
        name, how, written = drawn
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(whole, path)
        if written is None:
            (path / name).unlink()
        else:
            (path / name).write_bytes(written)
        acts: dict[str, Callable[[], object]] = {
            "report": lambda: showing.report([path]),
            "compare": lambda: showing.compare([whole, path]),
            "resume": lambda: training.resume(path),
        }
        # loading a model takes longest, and reads only these
        if name.startswith("checkpoints/") or name in ("clients.json", "version.json"):
            acts["evaluate"] = lambda: using.evaluate(path, data=str(data), client=client)
        if name.startswith(("clients/", "adapter/")):
            acts["generate"] = lambda: using.generate(
                path, prompt="Where to?", client=client, max_new_tokens=2
            )
        shown = "" if written is None else ascii(written.decode("utf-8", "backslashreplace")[-80:])
        trials.examine("runs", f"{name} {how} {shown}", acts, path)

    trials.generate(count, damages(contents), examine)


def measure_fuzz(match: str, scratch: Path, count: int, keep: Path | None) -> dict[str, float]:
    """Try inputs of four kinds; print what leaks, and a table."""
    logging.disable(logging.CRITICAL)
    set_hypothesis_home_dir(scratch / "hypothesis")
    place = keep.resolve() if keep else scratch
    place.mkdir(parents=True, exist_ok=True)
    os.chdir(place)  # so that inputs do not hold its name, and an empty path is a folder too
    data, survey = Path("pairs.jsonl"), Path("survey.jsonl")
    data.write_text("".join(json.dumps(numbered(ROWS[0], i)) + "\n" for i in range(24)))
    questions = [
        {"question": f"{i}?", "options": ["yes", "no"], "selections": {"A": [1, 2], "B": [2, 1]}}
        for i in range(12)
    ]
    survey.write_text("".join(json.dumps(row) + "\n" for row in questions))
    tokenizer = transformers.AutoTokenizer.from_pretrained(BUILTIN)
    small = SMALL | {"hidden_size": 16, "num_hidden_layers": 1}
    tiny = random_model(Path("tiny"), transformers.LlamaConfig(**small), tokenizer)
    contents = bases(data, survey, tiny)
    personal = contents[0] | {"algorithm": contents[0]["algorithm"] | {"name": "fedper"}}
    del personal["algorithm"]["parts"]
    os.environ.update(SECRETS)
    memory = Path("/proc/self/statm")
    if memory.exists():  # on Linux
        most = int(memory.read_text().split()[0]) * resource.getpagesize() + ROOM
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    for content in contents:  # which are to be right as they are
        (scratch / "usual.yaml").write_text(yaml.safe_dump(content))
        with contextlib.redirect_stdout(io.StringIO()):
            checked(scratch / "usual.yaml", (), scratch)
    trials = Trials(scratch, place if keep else None)
    kinds: dict[str, tuple[float, Callable[[int], None]]] = {
        "rows": (0.4, lambda n: fuzz_rows(trials, Model(path=tiny, dtype="float32"), n)),
        "configs": (0.2, lambda n: fuzz_configs(trials, contents, n)),
        "overrides": (0.18, lambda n: fuzz_overrides(trials, contents, n)),
        "runs": (0.22, lambda n: fuzz_runs(trials, personal, data, n)),
    }
    seconds = {}
    for kind, (share, fuzz) in kinds.items():
        if match in kind:
            begun = time.perf_counter()
            fuzz(round(share * count))
            seconds[kind] = time.perf_counter() - begun
    print("\nleaks by reason")
    for reason, times in trials.reasons.most_common():
        print(f"{times:5}  {reason}")
    print(f"\n{'inputs':12}{'tried':>7}{'leaks':>7}{'seconds':>9}")
    for kind, taken in seconds.items():
        print(f"{kind:12}{trials.tried[kind]:7}{trials.leaks[kind]:7}{taken:9.0f}")
    return {"fuzz_tried": trials.tried.total(), "fuzz_leaks": trials.leaks.total()}


# ---- all parts


def measure(part: str, arguments: argparse.Namespace, scratch: Path) -> dict[str, float]:
    """Measure one part in this process."""
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore")  # of PEFT and of the padded form, which the table shows
    if part == "architectures":
        return measure_architectures(arguments.match, scratch)
    if part == "templates":
        return measure_templates(arguments.match, scratch)
    count = 500 if arguments.quick else 3000
    return measure_fuzz(arguments.match, scratch, count, arguments.keep)


def in_process_of_its_own(part: str, words: Sequence[str]) -> dict[str, float]:
    """Measure one part in a process of its own; print what it prints when it is over."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "figures.json"
        begun = time.perf_counter()
        done = subprocess.run(
            [sys.executable, __file__, *words, "--only", part, "--json", str(file)],
            stdout=subprocess.PIPE,
            text=True,
        )
        seconds = time.perf_counter() - begun
        print(f"\n== {part}, {seconds:.0f} s\n{done.stdout}", flush=True)
        if done.returncode:
            raise SystemExit(f"{part}: the process ended with code {done.returncode}")
        figures: dict[str, float] = json.loads(file.read_text())
        return figures


def main() -> None:
    """Print the tables and write the figures to a file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="500 odd inputs in place of 3,000")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--only", choices=PARTS, help="measure one part")
    parser.add_argument(
        "--match", default="", help="with --only: names, or kinds of input, that hold this text"
    )
    parser.add_argument("--keep", type=Path, help="a folder for the inputs that leak")
    arguments = parser.parse_args()
    goal = arguments.json.resolve() if arguments.json else None  # fuzz works in another folder
    if arguments.only:
        with tempfile.TemporaryDirectory() as folder:
            figures = measure(arguments.only, arguments, Path(folder))
    else:
        words = ["--quick"] * arguments.quick
        words += ["--keep", str(arguments.keep)] if arguments.keep else []
        with ThreadPoolExecutor(2) as pool:
            parts = pool.map(lambda part: in_process_of_its_own(part, words), PARTS[::-1])
            figures = {name: value for part in parts for name, value in part.items()}
    print(json.dumps(figures, indent=1))
    if goal:
        goal.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
