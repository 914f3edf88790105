"""Check and measure fedpref on a GPU, offline, in one command of a few minutes.

    python scripts/gpu_check.py --json gpu.json
    python scripts/gpu_check.py --wheels WHEELS --model SMOLLM2 --json gpu.json
    OMP_NUM_THREADS=1 python scripts/gpu_check.py --small

The machine needs Python, torch, transformers and PEFT; what else fedpref needs may lie as wheels in
a folder, which are unpacked into a temporary one. Checked are: packed log-probabilities and
gradients against plain transformers with PEFT, the demo's run, a federation against the same one on
the processor, greedy answers. Measured are: a local step of DPO, alone and in turns with TRL's,
with its share of what the card's matrix products reach and of the time that the card is busy; the
size of the vocabulary head's chunks; one product for several clients' adapters.

Each piece is timed and guarded: one that fails is shown and counted, the others go on. The exit
code is 1 if a check or a piece failed. `--small` goes the same ways on a processor in tiny sizes.
"""

# ruff: noqa: E402 - packages must be on the path before they are imported

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import zipfile
from pathlib import Path

BEGUN = time.perf_counter()
ROOT = Path(__file__).resolve().parent.parent
SCRATCH = tempfile.TemporaryDirectory(prefix="fedpref-gpu-")
WHEELS = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
WHEELS.add_argument("--wheels", type=Path, help="a folder of wheels that this Python lacks")


def unpacked(folder: Path | None) -> list[str]:
    """Unpack a folder's wheels and return where; a wheel is a zip of what would be installed."""
    if folder is None:
        return []
    site = Path(SCRATCH.name) / "site"
    wheels = sorted(folder.glob("*.whl"))
    if not wheels:
        sys.exit(f"--wheels: there is no wheel in {folder}")
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
    return [str(site)]


sys.path[:0] = [
    *unpacked(WHEELS.parse_known_args()[0].wheels),
    str(ROOT / "src"),
    str(ROOT / "benchmarks"),
]
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
    "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0"),
}

import gc
import json
import math
import statistics
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
from functools import cached_property, partial
from importlib import import_module
from importlib.util import find_spec
from itertools import count
from typing import Any, Literal

import torch
import transformers
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from fedpref import Experiment, run
from fedpref.federation.local_training import LocalTraining, train_locally
from fedpref.federation.verbs import Client
from fedpref.models import head
from fedpref.models.generation import OwnSampling, generate
from fedpref.models.language import LanguageModel
from fedpref.models.model_settings import Model
from fedpref.models.named import BUILTIN, convert, located
from fedpref.models.packed import Row
from fedpref.numerics import seeds
from fedpref.numerics.metrics import ACCURACY
from fedpref.numerics.trees import Tree
from fedpref.tasks import PreferenceTask
from fedpref.tasks.examples import OfflineShard

Figure = float | str | bool
Precision = Literal["float32", "bfloat16"]

NATS, RELATIVE = 1e-3, 1e-3  # float32: of an answer's log-probability, of the whole gradient
TIMES, COSINE = 1.5, 0.99  # bfloat16: of plain bfloat16's own error, of the gradients' angle
ONE_PAIR, APART = 0.02, 0.02  # between devices: of the mean accuracy, in nats of a client's answers
CHUNKS = (2**20, 2**24)  # logits of the vocabulary head at a time
PROMPTS = (
    "How do I keep bread fresh?",
    "Tell me a story.",
    "What is a good name for a small grey cat that sleeps all day?",
    "Why?",
)
SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}
KINDS: dict[str, dict[str, Any]] = {
    "llama": SHAPE,
    "qwen2": SHAPE,
    "gpt2": {"n_embd": 256, "n_layer": 3, "n_head": 4, "n_positions": 1024},
}
LARGE = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
}


# ---- what is asked, what is found


@dataclass
class Report:
    """Lines for people and a flat object of figures for programs."""

    file: Path | None
    figures: dict[str, Figure] = field(default_factory=dict)
    failures: int = 0

    def say(self, text: str, **figures: Figure) -> None:
        """Print a line and keep its figures."""
        print(f"      {text}", flush=True)
        self.figures |= figures

    def check(self, passed: bool, text: str, **figures: Figure) -> None:
        """Print whether something holds, and keep the figures that show it."""
        self.failures += not passed
        print(f"{'ok' if passed else 'FAIL':<5} {text}", flush=True)
        self.figures |= figures

    def write(self) -> None:
        """Write the figures that are known so far."""
        if self.file:
            known = {"failures": self.failures} | {
                name: figure
                for name, figure in self.figures.items()
                if isinstance(figure, str) or math.isfinite(figure)  # JSON has no other numbers
            }
            self.file.write_text(json.dumps(known, indent=1) + "\n")


@dataclass(frozen=True)
class Setting:
    """Where everything is computed, in which sizes, and with whose model."""

    device: torch.device
    small: bool
    model: Path | None

    @property
    def path(self) -> str:
        """The model that the federations train: the given one, or the shipped one."""
        return BUILTIN if self.model is None else str(self.model)

    @property
    def overrides(self) -> list[str]:
        """What a config must say for this device."""
        return ["workers=1", f"task.model.device={self.device}", f"task.model.path={self.path}"]


@dataclass(frozen=True)
class Section:
    """A piece of the whole, and the seconds that it takes at most on a GPU."""

    name: str
    seconds: float
    carry_out: Callable[[], None]


def carried_out(section: Section, report: Report, left: float) -> None:
    """Carry a section out if it fits; if it fails, say how and go on."""
    print(f"\n{section.name}", flush=True)
    key = section.name.replace(" ", "_")
    if section.seconds > left:
        report.say(
            f"skipped: it may take {section.seconds:.0f} s, {max(0, left):.0f} s are left",
            **{f"{key}_skipped": True},
        )
        return
    begun = time.perf_counter()
    try:
        section.carry_out()
    except Exception:
        report.check(False, f"{section.name} has failed:\n{traceback.format_exc()}")
    taken = time.perf_counter() - begun
    report.say(f"{taken:.1f} s", **{f"{key}_section_seconds": taken})
    gc.collect()
    with suppress(RuntimeError):  # of a GPU that has failed for good
        torch.cuda.empty_cache()


# ---- what several sections need


def scratch(name: str) -> Path:
    """Return a new folder of that name, which is gone when the program ends."""
    return Path(tempfile.mkdtemp(dir=SCRATCH.name, prefix=f"{name}-"))


def wait_for(device: torch.device) -> None:
    """Wait until a GPU has done what it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def memory(device: torch.device, *, peak: bool) -> int:
    """Return the bytes that tensors take on a GPU, or took at most; 0 on a processor."""
    if device.type != "cuda":
        return 0
    return torch.cuda.max_memory_allocated(device) if peak else torch.cuda.memory_allocated(device)


def random_model(kind: str, shape: Mapping[str, Any], device: torch.device) -> Path:
    """Save a model of random weights, with the shipped model's tokenizer, and return its folder."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(located(BUILTIN))
    config = transformers.AutoConfig.for_model(
        kind, **{"vocab_size": len(tokenizer), **shape}, bos_token_id=0, eos_token_id=0
    )
    torch.manual_seed(0)
    with device:
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    folder = scratch(kind)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def plain_model(folder: str | Path, dtype: torch.dtype, device: torch.device, adapter: Tree) -> Any:
    """Return transformers' own model under PEFT's own adapter, with attention by plain products."""
    backbone = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager"
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")  # GPT-2's layers
        model = get_peft_model(backbone, lora(), autocast_adapter_dtype=False)
    set_peft_model_state_dict(model, dict(adapter))
    return model.to(device).eval()


def lora() -> Any:
    """Return the adapter's shape, which is fedpref's default."""
    return LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear")


def random_adapter(language: LanguageModel) -> dict[str, Tensor]:
    """Return an adapter that changes the model: neither of its factors is zero."""
    draw = torch.Generator().manual_seed(1)
    return {
        name: 0.02 * torch.randn(tensor.shape, generator=draw)
        for name, tensor in language.init(draw).items()
    }


def some_pairs(number: int) -> Any:
    """Return examples of random tokens with the lengths of hh-rlhf's, as in the benchmarks."""
    return import_module("throughput").pairs(number, 4096)


# ---- the card


def look(setting: Setting, report: Report) -> None:
    """Say what computes, how fast its matrix products are, and that float32 is float32."""
    device = setting.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "a processor"
    report.say(
        f"{name}, torch {torch.__version__}, transformers {transformers.__version__}",
        device=name,
        torch=torch.__version__,
        transformers=transformers.__version__,
    )
    rate = float(import_module("throughput").matrix_rate(device))
    report.say(f"square products: {rate / 1e12:,.1f} TFLOP/s", matrix_flops_per_second=rate)
    a, b = (torch.randn(512, 512, dtype=torch.float64, device=device) for _ in range(2))
    error = float(((a.float() @ b.float()).double() - a @ b).norm() / (a @ b).norm())
    report.check(
        error < 1e-5,
        f"TF32 is off: a float32 product is off by {error:.1e} of its size (below 1e-5)",
        float32_product_error=error,
    )


# ---- is it right


@dataclass(frozen=True)
class Scored:
    """Answers' log-probabilities, and the gradient of preferred less rejected ones, as one row."""

    scores: Tensor
    gradient: Tensor

    def errors(self, exact: Scored) -> tuple[float, float]:
        """Return how far log-probabilities are off in nats, on average, and the gradient."""
        return (
            float((self.scores - exact.scores).abs().mean()),
            float((self.gradient - exact.gradient).norm() / exact.gradient.norm()),
        )

    def cosine(self, exact: Scored) -> float:
        """Return the cosine of the angle between two gradients."""
        return float(torch.cosine_similarity(self.gradient, exact.gradient, dim=0))


def scored(scores: Iterable[Tensor], gradients: Mapping[str, Tensor]) -> Scored:
    """Return both on the processor in float64, gradients in the order of their names."""
    rows = [gradients[name].flatten().cpu().double() for name in sorted(gradients)]
    return Scored(torch.stack(list(scores)).detach().cpu().double(), torch.cat(rows))


def packed_scores(language: LanguageModel, adapter: Tree, rows: Sequence[Row]) -> Scored:
    """Score all rows at once, as fedpref does."""
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in adapter.items()}
    scores = language.log_probabilities(leaves, rows, training=True)
    (scores[::2] - scores[1::2]).sum().backward()
    gradients = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return scored(scores, gradients)


def plain_scores(model: Any, rows: Sequence[Row], device: torch.device) -> Scored:
    """Score one answer at a time, without padding."""
    scores = []
    for prompt, answers in rows:
        for sign, answer in zip((1.0, -1.0), answers, strict=True):
            ids = torch.tensor([[*prompt, *answer]], device=device)
            logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float()
            score = logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None]).sum()
            (sign * score).backward()
            scores.append(score)
    gradients = {
        name.replace(".default", ""): parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return scored(scores, gradients)


def opened(folder: Path, dtype: Precision, device: torch.device) -> tuple[LanguageModel, str]:
    """Return fedpref's model on its device, and how it attends, with what it warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        settings = Model(path=str(folder), dtype=dtype, device=str(device), cuda_graphs=True)
        language = LanguageModel(settings)
        language.move_to(0)
    kernel = language.kernel.__name__ if language.packs else "padded"
    said = [message for one in caught if "attention" in (message := str(one.message))]
    return language, "; ".join([kernel, *said])


def compare_forms(kind: str, setting: Setting, report: Report) -> None:
    """Compare the packed form of a kind of model with the plain one, in both precisions."""
    # wide weights, so that attention is sharp and a wrong mask would show
    folder = random_model(kind, {**KINDS[kind], "initializer_range": 0.1}, setting.device)
    number, longest = (24, 24) if setting.small else (64, 1024)
    rows: list[Row] = [
        (one.prompt[:longest], [answer[:longest] for answer in one.answers])
        for one in some_pairs(number)
    ]
    exact: Scored | None = None
    precisions: tuple[Precision, ...] = ("float32", "bfloat16")
    for dtype in precisions:
        language, attention = opened(folder, dtype, setting.device)
        adapter = random_adapter(language)
        reference = plain_model(folder, getattr(torch, dtype), setting.device, adapter)
        plain = plain_scores(reference, rows, setting.device)
        # a size that comes again is recorded, and then played
        first, *_, packed = [packed_scores(language, adapter, rows) for _ in range(3)]
        key = f"{kind}_{dtype}"
        check_recording(key, language, first, packed, report)
        report.check(
            language.packs,
            f"{kind} {dtype}: rows are packed, attention {attention}",
            **{f"{key}_attention": attention},
        )
        if exact is None:
            exact = plain
            check_float32(key, packed, exact, report)
        else:
            check_bfloat16(key, packed, plain, exact, report)


def check_recording(
    key: str, language: LanguageModel, first: Scored, packed: Scored, report: Report
) -> None:
    """Check that launches were recorded where they are, and say how far what is played is off."""
    if language.graphs is None:
        return
    nats, slope = packed.errors(first)
    report.check(
        language.graphs.works and bool(language.graphs.recordings),
        f"{key.replace('_', ' ')}: launches are recorded; played, answers are {nats:.2g} nats and "
        f"the gradient {slope:.2g} of its size from where they were",
        **{f"{key}_played_nats": nats, f"{key}_played_gradient": slope},
    )


def check_float32(key: str, packed: Scored, exact: Scored, report: Report) -> None:
    """Check the packed form in float32 against the plain one."""
    nats = float((packed.scores - exact.scores).abs().max())
    slope = packed.errors(exact)[1]
    report.check(
        nats <= NATS and slope <= RELATIVE,
        f"{key.replace('_', ' ')}: an answer is off by {nats:.1e} nats at most (up to {NATS:.0e}), "
        f"the gradient by {slope:.1e} of its size (up to {RELATIVE:.0e})",
        **{f"{key}_nats": nats, f"{key}_gradient_error": slope},
    )


def check_bfloat16(key: str, packed: Scored, plain: Scored, exact: Scored, report: Report) -> None:
    """Check the packed form in bfloat16 by the error that plain bfloat16 has itself."""
    (nats, slope), (own_nats, own_slope) = packed.errors(exact), plain.errors(exact)
    cosine, name = packed.cosine(exact), key.replace("_", " ")
    report.check(
        nats <= TIMES * own_nats,
        f"{name}: answers are off by {nats:.2g} nats, {nats / own_nats:.2f} times what plain "
        f"bfloat16 is off (up to {TIMES})",
        **{f"{key}_nats": nats, f"{key}_nats_over_plain": nats / own_nats},
    )
    report.check(
        slope <= TIMES * own_slope or cosine > COSINE,
        f"{name}: the gradient is off by {slope:.2g} of its size, {slope / own_slope:.2f} times "
        f"what plain bfloat16 is off (up to {TIMES}), or has a cosine of {cosine:.4f} "
        f"(above {COSINE})",
        **{
            f"{key}_gradient_error": slope,
            f"{key}_gradient_error_over_plain": slope / own_slope,
            f"{key}_gradient_cosine": cosine,
        },
    )


# ---- federations


Metrics = Mapping[str, Mapping[str, float]]


def outcome(config: str, overrides: Sequence[str]) -> Mapping[str, Metrics]:
    """Run a config, changed, and return each line's metrics of each client."""
    experiment = Experiment.load(ROOT / "configs" / config, overrides)
    return run(experiment, scratch("run") / "run").evaluations


def mean(clients: Metrics, metric: str) -> float:
    """Return a metric's mean over clients."""
    return statistics.mean(row[metric] for row in clients.values())


def few_rows(number: int) -> list[str]:
    """What a config must say so that clients have so many rows, and nothing to be read."""
    return [f"partition.max_rows={number}", "task.samples=0", "task.sample_clients=[]"]


def run_demo(setting: Setting, report: Report) -> None:
    """Run the demo as it is, and check that it ends with numbers."""
    fewer = ["rounds=1", "partition.max_clients=2", *few_rows(8)] if setting.small else []
    begun = time.perf_counter()
    lines = outcome("demo.yaml", [*setting.overrides, *fewer])
    seconds = time.perf_counter() - begun
    values = [
        value for clients in lines.values() for row in clients.values() for value in row.values()
    ]
    accuracies = {line: mean(clients, ACCURACY) for line, clients in lines.items()}
    said = ", ".join(f"{line} {accuracy:.3f}" for line, accuracy in accuracies.items())
    report.check(
        bool(values) and all(map(math.isfinite, values)),
        f"the demo ends after {seconds:.1f} s with {len(values)} finite metrics; accuracy: {said}",
        demo_seconds=seconds,
        **{f"demo_accuracy_{line}": accuracy for line, accuracy in accuracies.items()},
    )


def compare_devices(setting: Setting, report: Report) -> None:
    """Train four clients in float32 on the device and on the processor, and compare what came."""
    sizes = ["rounds=1", *few_rows(8)] if setting.small else ["rounds=3", *few_rows(64)]
    common = ["workers=1", "baselines=[]", "partition.max_clients=4", "task.model.dtype=float32"]
    common.append("algorithm.local.keep_optimizer=true")
    found = [
        next(
            iter(outcome("feddpo.yaml", [*common, *sizes, f"task.model.device={device}"]).values())
        )
        for device in (setting.device, "cpu")
    ]
    accuracies = [mean(clients, ACCURACY) for clients in found]
    apart = abs(accuracies[0] - accuracies[1])
    nats = max(
        abs(found[0][client][metric] - found[1][client][metric]) / 0.1  # the demo's beta
        for client in found[0]
        for metric in ("rewards/chosen", "rewards/rejected")
    )
    report.check(
        apart <= ONE_PAIR and nats <= APART,
        f"FedDPO of {len(found[0])} clients against the processor: accuracy {accuracies[0]:.3f} "
        f"and {accuracies[1]:.3f} (up to {ONE_PAIR} apart), a client's mean log-probability is off "
        f"by {nats:.1e} nats at most (up to {APART})",
        devices_accuracy_apart=apart,
        devices_nats_apart=nats,
    )


def compare_answers(setting: Setting, report: Report) -> None:
    """Compare greedy answers in float32 with those of transformers' own generate."""
    language = LanguageModel(Model(path=setting.path, dtype="float32", device=str(setting.device)))
    language.move_to(0)
    adapter, most = random_adapter(language), 8 if setting.small else 48
    prompts = [language.encode(prompt, " Yes.")[0] for prompt in PROMPTS]
    greedy = OwnSampling(most, transformers.GenerationConfig(do_sample=False))
    begun = time.perf_counter()
    ours = generate(language, adapter, prompts, 1, greedy, torch.Generator())
    seconds = time.perf_counter() - begun
    plain = plain_model(located(setting.path), torch.float32, setting.device, adapter)
    plain.generation_config = transformers.GenerationConfig(
        do_sample=False, max_new_tokens=most, eos_token_id=language.stops, pad_token_id=0
    )
    theirs = [
        plain.generate(
            input_ids=(ids := torch.tensor([prompt], device=setting.device)),
            attention_mask=torch.ones_like(ids),
        )[0, len(prompt) :]
        for prompt in prompts
    ]
    same = sum(
        tuple(answer.tolist()) == tuple(own) for answer, own in zip(theirs, ours, strict=True)
    )
    tokens = sum(map(len, ours))
    report.check(
        same == len(prompts),
        f"greedy answers: {same} of {len(prompts)} are transformers' own, {tokens} tokens in "
        f"{seconds:.2f} s",
        same_answers=float(same),
        generated_tokens_per_second=tokens / seconds,
    )


# ---- how fast


class Bench:
    """A model under fedpref with pairs of random tokens, on which local steps are timed.

    Args:
        name: What figures begin with.
        make: Returns the model's folder; called once, by the first section that needs it.
        setting: Where it is computed.
    """

    def __init__(self, name: str, make: Callable[[], Path], setting: Setting) -> None:
        self.name, self.make, self.setting = name, make, setting
        self.device = setting.device
        self.size = 2 if setting.small else 16
        self.rounds = count()

    @cached_property
    def folder(self) -> Path:
        """The model's folder."""
        return self.make()

    @cached_property
    def task(self) -> Any:
        """The task, its model loaded."""
        task = PreferenceTask(
            model=Model(
                path=str(self.folder), dtype="bfloat16", device=str(self.device), cuda_graphs=True
            )
        ).build()
        task.move_to(0)
        return task

    @cached_property
    def pairs(self) -> Any:
        """All pairs that are trained on, each of which has a prompt of its own."""
        return some_pairs(4 if self.setting.small else 64)

    @cached_property
    def shard(self) -> OfflineShard:
        """All pairs, as a client has them."""
        shard: OfflineShard = self.task.prepare(
            OfflineShard("client", tuple(self.pairs), ()), scratch("cache")
        )
        return shard

    @torch.no_grad()
    def references(self) -> list[list[float]]:
        """Return the backbone's log-probabilities of each pair's answers."""
        score = self.task.language.log_probabilities
        return [score(None, [(one.prompt, one.answers)]).tolist() for one in self.pairs]

    @property
    def steps(self) -> int:
        """Steps that take every pair once."""
        return len(self.pairs) // self.size

    @property
    def tokens(self) -> float:
        """Tokens of a step, each prompt counted once."""
        return float(sum(one.tokens for one in self.pairs) / self.steps)

    @property
    def flops(self) -> float:
        """Operations of a step without attention: frozen weights pass gradients on, adapters have
        their own, and the vocabulary head meets answers alone.
        """
        language = self.task.language
        frozen = sum(
            module.base_layer.weight.numel()
            for module in language.model.modules()
            if hasattr(module, "base_layer")
        )
        adapter = sum(tensor.numel() for tensor in language.init(torch.Generator()).values())
        answers = sum(len(answer) for one in self.pairs for answer in one.answers)
        of_head = 4 * language.head.weight.numel() * answers / self.steps
        return float(self.tokens * (4 * frozen + 6 * adapter) + of_head)

    @cached_property
    def start(self) -> Tree:
        """The adapter as it begins."""
        adapter: Tree = self.task.init(seeds.generator(0, "init"))
        return adapter

    def turn(self) -> float:
        """Train on every pair once, and return the seconds of a step."""
        rng = seeds.generator(0, "train", round=next(self.rounds))
        client = Client(0, self.task, self.shard, rng, 0, 1)
        training = LocalTraining(steps=self.steps, batch_size=self.size)
        wait_for(self.device)
        begun = time.perf_counter()
        train_locally(client, self.start, training, {})
        wait_for(self.device)
        return (time.perf_counter() - begun) / self.steps

    def close(self) -> None:
        """Forget the model."""
        for name in ("task", "shard", "start"):
            self.__dict__.pop(name, None)


@dataclass(frozen=True)
class Timing:
    """Seconds of a step, and bytes that it takes beside what lay there before."""

    seconds: float
    memory: int


def in_turns(lanes: Mapping[str, Callable[[], float]], setting: Setting) -> dict[str, Timing]:
    """Let lanes take turns, and return the median of each; the first turn warms up.

    Args:
        lanes: Each takes a turn and returns the seconds of a step.
        setting: Where they compute.
    """
    seconds: dict[str, list[float]] = {name: [] for name in lanes}
    most = dict.fromkeys(lanes, 0)
    for turn in range(2 if setting.small else 6):
        for name, lane in lanes.items():
            before = memory(setting.device, peak=False)
            if setting.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(setting.device)
            taken = lane()
            most[name] = max(most[name], memory(setting.device, peak=True) - before)
            if turn:
                seconds[name].append(taken)
    return {name: Timing(statistics.median(seconds[name]), most[name]) for name in lanes}


def tell(key: str, title: str, timing: Timing, bench: Bench, report: Report) -> None:
    """Say how fast a step is. Operations are those that fedpref needs, whoever takes the step."""
    rate = float(report.figures.get("matrix_flops_per_second", math.nan))
    figures = {
        "step_seconds": timing.seconds,
        "pairs_per_second": bench.size / timing.seconds,
        "tokens_per_second": bench.tokens / timing.seconds,
        "matrix_share": bench.flops / timing.seconds / rate,
        "step_gb": timing.memory / 1e9,
    }
    report.say(
        f"{title}: {1e3 * timing.seconds:.1f} ms a step of {bench.size} pairs, "
        f"{figures['pairs_per_second']:,.0f} pairs and {figures['tokens_per_second']:,.0f} tokens "
        f"a second, {figures['matrix_share']:.1%} of the matrix rate, {figures['step_gb']:.2f} GB",
        **{f"{key}_{name}": figure for name, figure in figures.items()},
    )


@contextmanager
def chunks_of(size: int) -> Iterator[None]:
    """Compute so many logits at a time, within a `with`."""
    usual: Any = head._logits
    head._logits = lambda _: size  # type: ignore[assignment]
    try:
        yield
    finally:
        head._logits = usual


def time_steps(bench: Bench, report: Report) -> None:
    """Time fedpref's steps, for several sizes of the head's chunks, and see what the card does."""

    def with_chunks(size: int) -> Callable[[], float]:
        def lane() -> float:
            with chunks_of(size):
                return bench.turn()

        return lane

    def unrecorded() -> float:
        recorded, bench.task.language.graphs = bench.task.language.graphs, None
        try:
            return bench.turn()
        finally:
            bench.task.language.graphs = recorded

    lanes = {f"2^{size.bit_length() - 1}": with_chunks(size) for size in CHUNKS}
    timings = in_turns({"usual": bench.turn, "launched": unrecorded, **lanes}, bench.setting)
    tell(bench.name, f"fedpref, {bench.name}", timings["usual"], bench, report)
    tell(f"{bench.name}_launched", "nothing recorded", timings["launched"], bench, report)
    for title in lanes:
        key = f"{bench.name}_chunk_{title.replace('^', '_')}"
        tell(key, f"chunks of {title} logits", timings[title], bench, report)
    look_inside(bench, timings["usual"], report)


def look_inside(bench: Bench, timing: Timing, report: Report) -> None:
    """Say how busy the device is within a step: what is left is time that launches take.

    The profiler slows launches down but not kernels, so that kernels' seconds are compared with
    those of a step without it.
    """
    is_cuda = bench.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if is_cuda else ProfilerActivity.CPU]) as seen:
        bench.turn()
    kernels = [
        (event.time_range.start, event.time_range.end)
        for event in seen.events() or ()
        if event.device_type.name == bench.device.type.upper() and not event.is_user_annotation
    ]
    number, busy = len(kernels) / bench.steps, covered(kernels) / 1e6 / bench.steps
    share = busy / timing.seconds
    report.say(
        f"{number:,.0f} kernels a step keep the device busy for {share:.0%} of it: "
        + ("bound by launches" if share < 0.8 else "not bound by launches"),
        **{f"{bench.name}_busy_share": share, f"{bench.name}_kernels": number},
    )


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Return the length of the union of spans (begin, end)."""
    total, reached = 0.0, -math.inf
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total


def race_with_trl(bench: Bench, report: Report) -> None:
    """Let fedpref and TRL take turns on the same pairs."""
    if find_spec("trl") is None or find_spec("datasets") is None:
        report.say("TRL cannot be imported here, so that there is no ratio")
        return
    theirs, settings = trl_lane(bench)
    report.say(f"TRL {settings}", **{f"{bench.name}_trl_settings": settings})
    timings = in_turns({"fedpref": bench.turn, "trl": theirs}, bench.setting)
    key = f"{bench.name}_race"
    tell(f"{key}_fedpref", f"fedpref, {bench.name}", timings["fedpref"], bench, report)
    tell(f"{key}_trl", f"TRL, {bench.name}", timings["trl"], bench, report)
    ratio = timings["trl"].seconds / timings["fedpref"].seconds
    report.say(
        f"TRL's step takes {ratio:.2f} times as long", **{f"{bench.name}_trl_over_fedpref": ratio}
    )


def trl_lane(bench: Bench) -> tuple[Callable[[], float], str]:
    """Return a turn of TRL's trainer over a bench's pairs, and its settings in words.

    They are the fastest that are installed: bfloat16, fused attention, reference scores known
    beforehand, batches of similar length, neither checkpoints nor logs.
    """
    from datasets import Dataset

    trl: Any = import_module("trl")

    is_cuda = bench.device.type == "cuda"
    has_flash = is_cuda and transformers.utils.is_flash_attn_2_available()
    attention = "flash_attention_2" if has_flash else "sdpa"
    has_liger = is_cuda and find_spec("liger_kernel") is not None
    options: dict[str, Any] = {
        "output_dir": str(scratch("trl")),
        "report_to": [],
        "use_cpu": not is_cuda,
        "bf16": is_cuda,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": bench.size,
        "learning_rate": 5e-4,
        "max_length": None,
        "max_steps": bench.steps,
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "precompute_ref_log_probs": True,
        "padding_free": has_flash,
        "use_liger_kernel": has_liger,
        "train_sampling_strategy": "group_by_length",
        "remove_unused_columns": False,
    }
    known = {one.name for one in fields(trl.DPOConfig)}  # other releases have others
    backbone = transformers.AutoModelForCausalLM.from_pretrained(
        bench.folder, dtype=torch.bfloat16 if is_cuda else None, attn_implementation=attention
    )
    trainer: Any = trl.DPOTrainer(
        model=backbone,
        args=trl.DPOConfig(**{name: options[name] for name in options.keys() & known}),
        train_dataset=Dataset.from_list([{"prompt": "a", "chosen": " b", "rejected": " c"}]),
        processing_class=transformers.AutoTokenizer.from_pretrained(bench.folder),
        peft_config=lora(),
        callbacks=[clock := _clock(bench.device)],
    )
    # tokens and reference scores as they are, which text would not give back
    trainer.train_dataset = Dataset.from_list(
        [
            {
                "prompt_ids": list(one.prompt),
                "chosen_ids": list(one.answers[0]),
                "rejected_ids": list(one.answers[1]),
                "ref_chosen_logps": chosen,
                "ref_rejected_logps": rejected,
                "length": one.tokens,
            }
            for one, (chosen, rejected) in zip(bench.pairs, bench.references(), strict=True)
        ]
    )
    trainer.remove_callback(transformers.PrinterCallback)

    def turn() -> float:
        trainer.train()
        return float(clock.seconds) / bench.steps

    said = [
        attention,
        "padding-free" if getattr(trainer, "padding_free", False) else "padded",
        "with Liger" if has_liger and "use_liger_kernel" in known else "without Liger",
        "reference scores known",
        *(["batches of similar length"] if "train_sampling_strategy" in known else []),
    ]
    return turn, f"{trl.__version__}: {', '.join(said)}"


def _clock(device: torch.device) -> Any:
    """Return a callback of transformers' trainer that times all steps of a call together."""

    class Clock(transformers.TrainerCallback):  # type: ignore[misc]
        seconds = begun = 0.0

        def on_step_begin(self, arguments: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 0:
                wait_for(device)
                self.begun = time.perf_counter()

        def on_step_end(self, arguments: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == arguments.max_steps:
                wait_for(device)
                self.seconds = time.perf_counter() - self.begun

    return Clock()


# ---- several clients in one product


class _Grouped(torch.autograd.Function):
    """x W' + s (x A') B' for c clients with a frozen W in common and A, B of their own."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, down: Tensor, up: Tensor, scaling: float
    ) -> Tensor:
        inner = torch.bmm(x, down.mT)
        ctx.save_for_backward(x, weight, down, up, inner)
        ctx.scaling = scaling
        whole = torch.nn.functional.linear(x, weight)
        return whole.baddbmm_(inner, up.mT, alpha=scaling)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, Tensor, Tensor, None]:
        x, weight, down, up, inner = ctx.saved_tensors
        slope = torch.bmm(upstream, up).mul_(ctx.scaling)
        gradient = (upstream @ weight).baddbmm_(slope, down)
        of_up = torch.bmm(upstream.mT, inner).mul_(ctx.scaling)
        return gradient, None, torch.bmm(slope.mT, x), of_up, None


def group_clients(setting: Setting, report: Report) -> None:
    """Time four clients' adapted layers one after the other against all in one product."""
    clients, width, wide, rank = (4, 96, 256, 8) if setting.small else (4, 576, 1536, 8)
    options: dict[str, Any] = {"device": setting.device, "dtype": torch.bfloat16}
    weight = torch.randn(wide, width, **options) / width**0.5
    down = torch.randn(clients, rank, width, **options) / width**0.5
    up = torch.randn(clients, wide, rank, **options) / rank**0.5
    for rows in (32, 64) if setting.small else (256, 1024, 4096):
        x = torch.randn(clients, rows, width, **options)
        upstream = torch.randn(clients, rows, wide, **options)
        together = [tensor.clone().requires_grad_() for tensor in (x, down, up)]
        apart = [
            [tensor[c : c + 1].clone().requires_grad_() for tensor in (x, down, up)]
            for c in range(clients)
        ]
        parts = upstream.split(1)
        grouped = _seconds(partial(_layers, [together], weight, [upstream]), setting)
        alone = _seconds(partial(_layers, apart, weight, parts), setting)
        expected = _layers(apart, weight, parts)
        (found,) = _layers([together], weight, [upstream])
        error = max(
            float((whole - torch.cat(own)).float().norm() / whole.float().norm())
            for whole, own in zip(found, zip(*expected, strict=True), strict=True)
        )
        report.check(
            error < 0.01,
            f"{clients} clients of {rows} rows, {width} x {wide}, rank {rank}: one after the other "
            f"{1e6 * alone:.0f} us, in one product {1e6 * grouped:.0f} us, "
            f"{alone / grouped:.2f} times as fast (gradients {error:.0e} apart)",
            **{f"grouped_{rows}_rows_speedup": alone / grouped},
        )


def _layers(
    leaves: Sequence[Sequence[Tensor]], weight: Tensor, upstream: Sequence[Tensor]
) -> list[tuple[Tensor, ...]]:
    """Go through a layer forward and backward for one group after the other; return gradients."""
    call: Any = _Grouped.apply
    return [
        torch.autograd.grad(call(x, weight, down, up, 2.0), (x, down, up), slope)
        for (x, down, up), slope in zip(leaves, upstream, strict=True)
    ]


def _seconds(work: Callable[[], Any], setting: Setting) -> float:
    """Return the seconds of one call of many in a row, launches included; the best of five."""
    calls = 3 if setting.small else 50
    best = math.inf
    for _ in range(5):
        wait_for(setting.device)
        begun = time.perf_counter()
        for _ in range(calls):
            work()
        wait_for(setting.device)
        best = min(best, (time.perf_counter() - begun) / calls)
    return best


# ---- all of it


def as_folder(model: Path, report: Report) -> Path | None:
    """Return a folder that transformers reads; one with a GGUF file alone is converted first."""
    files = sorted(model.glob("*.gguf"))
    if not files or any(model.glob("*.safetensors")):
        return model
    folder = scratch("model") / "model"
    try:
        convert(files[0], folder)
    except Exception:
        report.check(False, f"{model} is left out:\n{traceback.format_exc()}")
        return None
    return folder


def sections(setting: Setting, report: Report) -> list[Section]:
    """Return the pieces, in the order of what is most needed."""
    shape = {**SHAPE, "hidden_size": 128, "num_hidden_layers": 2} if setting.small else LARGE
    benches = [Bench("1b", lambda: random_model("llama", shape, setting.device), setting)]
    if setting.model is not None:
        benches.append(Bench("given", lambda: Path(setting.path), setting))
    pieces = [
        Section("card", 10, partial(look, setting, report)),
        *(
            Section(f"{kind} forms", 20, partial(compare_forms, kind, setting, report))
            for kind in KINDS
        ),
        Section("demo", 60, partial(run_demo, setting, report)),
        Section("devices", 60, partial(compare_devices, setting, report)),
        Section("answers", 20, partial(compare_answers, setting, report)),
    ]
    for bench in benches:
        pieces += [
            Section(f"{bench.name} steps", 60, partial(time_steps, bench, report)),
            Section(f"{bench.name} race", 60, partial(raced, bench, report)),
        ]
    return [*pieces, Section("grouped", 15, partial(group_clients, setting, report))]


def raced(bench: Bench, report: Report) -> None:
    """Race on a bench, of which nothing is needed afterwards."""
    try:
        race_with_trl(bench, report)
    finally:
        bench.close()


def main() -> None:
    """Read the command line, carry everything out, and end with 1 if something failed."""
    parser = argparse.ArgumentParser(
        parents=[WHEELS],
        allow_abbrev=False,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", type=Path, help="a folder of a model, to train and time too")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--only", nargs="+", help="pieces whose names begin so, as 'llama' or '1b'")
    parser.add_argument("--small", action="store_true", help="tiny sizes on a processor")
    parser.add_argument(
        "--budget", type=float, default=450, help="seconds; what would not fit is skipped"
    )
    arguments = parser.parse_args()
    if not arguments.small and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --small goes the same ways on a processor")
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    warnings.filterwarnings("ignore", category=FutureWarning)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    device = torch.device("cpu") if arguments.small else torch.device("cuda", 0)
    report = Report(arguments.json)
    model = None if arguments.model is None else as_folder(arguments.model, report)
    for section in sections(Setting(device, arguments.small, model), report):
        if arguments.only and not any(map(section.name.startswith, arguments.only)):
            continue
        left = arguments.budget - (time.perf_counter() - BEGUN)
        carried_out(section, report, left)
        report.write()
    total = time.perf_counter() - BEGUN
    report.say(f"{total:.0f} s in all, {report.failures} failures", seconds=total)
    report.write()
    sys.exit(report.failures > 0)


if __name__ == "__main__":
    main()
