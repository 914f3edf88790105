"""How fast a client trains: the same local DPO steps by TRL, by transformers with PEFT, and by
fedpref, interleaved.

    python benchmarks/throughput.py --json figures.json
    python benchmarks/throughput.py --quick

Every tool runs in a process of its own, on one thread, and takes some steps in turn; figures are
means over the turns of process CPU seconds a step. fedpref, whose batches are each of similar
length and so unlike each other, takes four times as many steps as the others (`--quick`: twice).
All train a LoRA adapter (rank 8, all linear layers, AdamW) on batches of 8 pairs whose lengths are
those of 64 pairs of hh-rlhf under the shipped tokenizer; the tokens are random. TRL has the base
model as its reference, once as it is installed and once with glibc's malloc told to keep freed
memory, as fedpref does, and in the arithmetic that is faster here. Gradient checkpointing is off
everywhere.

`smollm2` is SmolLM2-135M-Instruct, four-bit weights dequantised (`fedpref model smollm2-q4`), on 64
of the shipped pairs. There fedpref also trains an adapter in the last 8 layers alone, with the
states below them kept; TRL is timed with the same layers, and with all of them.

Figures: `ratio_trl_installed`, `ratio_trl_tuned` and `ratio_peft_tuned`, also with `_29m`,
`_qwen2`, `_gpt2` (not with --quick) and `_smollm2` (where it has been fetched),
`ratio_trl_tuned_smollm2_trunk` and `_same_layers`, `pairs_per_cpu_second`, `matmul_share`,
`matmul_share_smollm2`, `trunk_speedup`, `trunk_accuracy_points`, `scores_saved_SET`,
`workers_speedup`, `loop_share`, `memory_64_over_4`, `gradient_error`, `gradient_error_bfloat16`,
`first_step_seconds`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[name] = "1"
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

import torch
from rich.console import Console
from rich.table import Table

from ending import end_with_children
from fedpref import run
from fedpref.data.preferences import key
from fedpref.engines import Simulation
from fedpref.engines.workers import keep_freed_memory, one_thread
from fedpref.experiments.experiment import Experiment
from fedpref.federation.local_training import LocalTraining, train_locally
from fedpref.federation.verbs import Client
from fedpref.models import devices
from fedpref.models.model_settings import Model
from fedpref.models.named import cache, located
from fedpref.numerics import seeds, trees
from fedpref.numerics.metrics import ACCURACY, standard_error
from fedpref.tasks import BatchSize, PreferenceTask
from fedpref.tasks.batches import planned
from fedpref.tasks.examples import Example, OfflineShard

SMOLLM2 = "smollm2"
LAST = 8  # layers of SmolLM2 that have an adapter, where it is not all 30
BUILTIN = Path(__file__).resolve().parent.parent / "src/fedpref/models/builtin"
BATCH = 8
# Tokens of (prompt, chosen, rejected) of 64 random pairs of hh-rlhf's helpful-base and harmless-
# base, of those that fit 512 tokens
LENGTHS = """154 94 80 22 45 30 165 200 50 124 17 37 106 49 21 233 72 95 355 19 49 134 20 32 153
17 178 188 63 118 207 11 18 89 23 88 60 43 45 98 56 65 66 15 10 194 76 138 224 55 60 153 116 26 25
45 74 275 83 200 107 58 87 124 58 193 20 104 149 353 8 16 151 18 7 375 77 67 109 56 56 241 6 23 13
26 5 110 20 19 18 21 50 18 11 178 182 121 82 22 9 158 128 54 54 185 57 20 59 32 187 270 14 60 32
36 23 21 52 66 121 48 11 98 63 71 102 20 79 21 16 13 15 39 101 148 56 135 23 42 37 191 19 169 422
33 8 191 4 4 422 88 39 15 5 16 25 17 129 149 27 46 331 30 60 238 46 48 90 17 6 152 44 81 112 15 7
267 50 116 329 48 26 174 102 41 175 66 35 111 106 103"""
SMALL = {
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 1024,
}
MODELS: dict[str, dict[str, Any] | None] = {
    "shipped": None,
    "29m": {
        "model_type": "llama",
        "hidden_size": 512,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "intermediate_size": 1376,
        "max_position_embeddings": 1024,
        "vocab_size": 8192,
        "tie_word_embeddings": True,
    },
    "qwen2": {
        "model_type": "qwen2",
        **SMALL,
        "num_key_value_heads": 2,
        "intermediate_size": 688,
        "vocab_size": 4096,
    },
    "gpt2": {
        "model_type": "gpt2",
        "n_embd": 256,
        "n_layer": 4,
        "n_head": 4,
        "n_positions": 1024,
        "vocab_size": 4096,
    },
    SMOLLM2: None,
}


def pairs(count: int, vocabulary: int) -> list[Example]:
    numbers = [int(word) for word in LENGTHS.split()]
    lengths = list(zip(numbers[::3], numbers[1::3], numbers[2::3], strict=True))
    draw = random.Random(0)

    def tokens(length: int) -> tuple[int, ...]:
        return tuple(draw.randrange(2, vocabulary) for _ in range(length))

    drawn = [tuple(map(tokens, lengths[i % len(lengths)])) for i in range(count)]
    return [Example(prompt, (chosen, rejected)) for prompt, chosen, rejected in drawn]


def texts(model: Path, count: int) -> list[Example]:
    """Shipped pairs as the model's tokens, of all clients in turn."""
    task = PreferenceTask(model=Model(path=str(model))).build()
    shards = [task.encode(client) for client in Experiment().clients()[0]]
    return [shards[i % len(shards)].train[i // len(shards)] for i in range(count)]


def given(model: Path, count: int) -> list[Example]:
    """The pairs on which a model is raced."""
    return texts(model, count) if is_smollm2(model) else pairs(count, 4096)


def is_smollm2(model: Path) -> bool:
    return "smollm2" in model.name


def make(name: str, folder: Path) -> Path:
    """A model of that name, as a Hugging Face folder."""
    import transformers

    if name == SMOLLM2:
        return Path(located("smollm2-q4"))
    settings = MODELS[name]
    if settings is None:
        return BUILTIN
    kind = settings["model_type"]
    torch.manual_seed(0)
    configuration = transformers.AutoConfig.for_model(
        kind, **{key: value for key, value in settings.items() if key != "model_type"}
    )
    configuration.bos_token_id = configuration.eos_token_id = 0
    transformers.AutoModelForCausalLM.from_config(configuration).save_pretrained(folder / name)
    transformers.AutoTokenizer.from_pretrained(BUILTIN).save_pretrained(folder / name)
    return folder / name


def prepared(task: Any, examples: Sequence[Example]) -> OfflineShard:
    """A client with these pairs, scored under the reference."""
    with tempfile.TemporaryDirectory() as cache:
        shard: OfflineShard = task.prepare(OfflineShard("client", tuple(examples), ()), Path(cache))
    return shard


def built(task: PreferenceTask) -> Any:
    """A task that scores all pairs under the reference before it is timed."""
    return replace(task, reference_scores="ahead").build()


# ---- the tools: each a function that prepares everything and returns one that takes some steps


def fedpref(model: Path, size: int, **settings: Any) -> Callable[[int], None]:
    task = built(PreferenceTask(model=Model(path=str(model), **settings)))
    shard = prepared(task, given(model, 64))
    start = task.init(seeds.generator(0, "init"))
    rounds = iter(range(10_000))

    def steps(count: int) -> None:
        client = Client(0, task, shard, seeds.generator(0, "train", round=next(rounds)), 0, 1)
        train_locally(client, start, LocalTraining(steps=count, batch_size=size), {})

    return steps


def trunk(model: Path, size: int) -> Callable[[int], None]:
    return fedpref(model, size, lora_layers_to_transform=f"last-{LAST}", trunk_states="memory")


def no_trunk(model: Path, size: int) -> Callable[[int], None]:
    return fedpref(model, size, lora_layers_to_transform=f"last-{LAST}", trunk_states="none")


def peft(model: Path, size: int) -> Callable[[int], None]:
    """A careful user's loop: padded batches, all logits, the reference scored once beforehand."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    backbone = AutoModelForCausalLM.from_pretrained(model, dtype=_arithmetic(model))
    policy = get_peft_model(backbone, _lora(LoraConfig))
    collate = DataCollatorForPreference(pad_token_id=0)
    optimiser = torch.optim.AdamW(
        [p for p in policy.parameters() if p.requires_grad], 5e-4, weight_decay=0.0
    )
    rows = _rows(model)
    draw = random.Random(1)
    reference = torch.zeros(2, size)  # what a cache would give costs nothing to look up

    def scores(batch: Any) -> torch.Tensor:
        logits = policy(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
        ).logits[:, :-1]
        tokens = torch.log_softmax(logits, -1).gather(2, batch["input_ids"][:, 1:, None])[..., 0]
        return (tokens * batch["completion_mask"][:, 1:]).sum(1).view(2, -1)

    def steps(count: int) -> None:
        for _ in range(count):
            batch = collate(draw.sample(rows, size))
            chosen, rejected = scores(batch) - reference
            margin = chosen - rejected
            loss = -torch.nn.functional.logsigmoid(0.1 * margin).mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimiser.step()
            optimiser.zero_grad()

    return steps


def trl(model: Path, size: int, tuned: bool = False, **lora: Any) -> Callable[[int], None]:
    import datasets
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging
    from trl import DPOConfig, DPOTrainer

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    dtype = {"dtype": _arithmetic(model)} if tuned else {}
    backbone = AutoModelForCausalLM.from_pretrained(model, **dtype)
    arguments = DPOConfig(
        output_dir=tempfile.mkdtemp(),
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=size,
        learning_rate=5e-4,
        max_length=None,
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        max_steps=1,
    )
    trainer = DPOTrainer(
        model=get_peft_model(backbone, _lora(LoraConfig, **lora)),
        ref_model=AutoModelForCausalLM.from_pretrained(model, **dtype),
        args=arguments,
        train_dataset=datasets.Dataset.from_list(
            [{"prompt": "a", "chosen": " b", "rejected": " c"}]
        ),
        processing_class=AutoTokenizer.from_pretrained(model),
    )
    trainer.train_dataset = datasets.Dataset.from_list(_rows(model))

    def steps(count: int) -> None:
        trainer.args.max_steps = count
        trainer.train()

    return steps


def trl_tuned(model: Path, size: int) -> Callable[[int], None]:
    return trl(model, size, tuned=True)


def trl_same_layers(model: Path, size: int) -> Callable[[int], None]:
    return trl(model, size, tuned=True, layers_to_transform=list(range(30 - LAST, 30)))


def _lora(kind: Any, **settings: Any) -> Any:
    names: Any = "all-linear"
    if settings:  # PEFT takes layers beside names alone
        names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return kind(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=names, **settings)


def _arithmetic(model: Path) -> torch.dtype:
    """What is faster here for a model whose weights are in bfloat16; float32 for others."""
    if not is_smollm2(model):
        return torch.float32
    return devices.arithmetic("auto", torch.device("cpu"))


def _rows(model: Path) -> list[dict[str, list[int]]]:
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return [
        dict(zip(names, map(list, (p.prompt, *p.answers)), strict=True)) for p in given(model, 64)
    ]


PEFT = "transformers + PEFT, malloc tuned"
TOOLS: dict[str, tuple[Callable[[Path, int], Callable[[int], None]], bool]] = {
    "TRL as installed": (trl, False),
    "TRL, malloc tuned": (trl_tuned, True),
    PEFT: (peft, True),
    "fedpref": (fedpref, True),
}
OURS = "fedpref"
SHORT, PLAIN = f"fedpref, last {LAST} layers", f"fedpref, last {LAST} layers, nothing kept"
SAME_LAYERS = f"TRL tuned, last {LAST} layers"
OF_SMOLLM2 = {
    **TOOLS,
    SAME_LAYERS: (trl_same_layers, True),
    SHORT: (trunk, True),
    PLAIN: (no_trunk, True),
}
# who is raced at once: what others keep of SmolLM2's logits takes gigabytes each
HEATS = (
    ("TRL as installed", OURS),
    ("TRL, malloc tuned", OURS, SHORT, PLAIN),
    (SAME_LAYERS, SHORT),
)


def serve(connection: Any, tool: str, model: Path, size: int) -> None:
    torch.set_num_threads(1)
    make_steps, tuned = OF_SMOLLM2[tool]
    if tuned:
        keep_freed_memory()
    steps = make_steps(model, size)
    connection.send("ready")
    while count := connection.recv():
        begun = time.process_time()
        steps(count)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        connection.send((time.process_time() - begun, memory))


def race(
    tools: Sequence[str], model: Path, size: int, warm: int, turns: int, count: int
) -> dict[str, dict[str, float]]:
    """Seconds a step and peak memory of some tools, their turns interleaved; the first turns, which
    warm up, do not count.
    """
    context = multiprocessing.get_context("spawn")
    lanes: dict[str, tuple[Any, Any]] = {}
    for tool in tools:
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(theirs, tool, model, size), daemon=True)
        process.start()
        lanes[tool] = (ours, process)
    for connection, _ in lanes.values():
        assert connection.recv() == "ready"
    seconds: dict[str, list[float]] = {tool: [] for tool in lanes}
    memory = dict.fromkeys(lanes, 0.0)
    for turn in range(-warm, turns):
        for tool, (connection, _) in lanes.items():
            more = 4 if warm else 2  # batches of a short race are few anyway
            wanted = count * (more if tool.startswith("fedpref") else 1)
            connection.send(wanted)
            taken, memory[tool] = connection.recv()
            if turn >= 0:
                seconds[tool].append(taken / wanted)
    for connection, process in lanes.values():
        connection.send(0)
        process.join()
    return {
        tool: {"seconds": statistics.mean(seconds[tool]), "memory": memory[tool]} for tool in lanes
    }


# ---- what only fedpref is asked


def gradient_errors() -> dict[str, float]:
    """Relative errors of one batch's gradient: packed float32 and bfloat16 against the padded
    float32 form.
    """
    found = {}
    scores: dict[bytes, float] = {}
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")
    for dtype in dtypes:
        task = built(PreferenceTask(model=Model(dtype=dtype)))
        shard = prepared(task, pairs(BATCH, 4096))
        task._base_scores |= scores  # the same reference for both
        scores = dict(task._base_scores)
        draw = torch.Generator().manual_seed(0)
        start = {
            name: 0.05 * torch.randn(t.shape, generator=draw)
            for name, t in task.init(seeds.generator(0, "init")).items()
        }
        for packs in (True, False):
            task.language.packs = packs
            if not packs:  # PEFT's own layers
                for layer in task.language.model.modules():
                    layer.__dict__.pop("forward", None)
            leaves = {name: t.clone().requires_grad_() for name, t in start.items()}
            batch = task.draw(leaves, start, shard, BatchSize(BATCH), seeds.generator(0, "train"))
            task.losses(leaves, batch)[0].sum().backward()
            found[dtype, packs] = {name: t.grad for name, t in leaves.items() if t.grad is not None}
    exact = found["float32", False]
    return {
        "gradient_error": trees.norm(trees.subtract(found["float32", True], exact))
        / trees.norm(exact),
        "gradient_error_bfloat16": trees.norm(trees.subtract(found["bfloat16", True], exact))
        / trees.norm(exact),
    }


def federation(clients: int, workers: int, batch: int, rounds: int) -> dict[str, float]:
    """Wall seconds a round of the whole federation, the share of them not spent in the clients'
    steps, and peak memory.
    """
    keep_freed_memory()
    experiment = Experiment()
    task = built(experiment.task)
    shard = prepared(task, pairs(16, 4096))
    algorithm = type(experiment.algorithm)(local=LocalTraining(steps=1, batch_size=batch))
    engine = Simulation(task, [shard] * clients, seed=0, rounds=rounds, workers=workers)
    state = algorithm.init(engine, task.init(seeds.generator(0, "init")))
    spent: list[float] = []
    for round in range(rounds):
        begun = time.perf_counter()
        engine.begin(round, engine.clients)
        state, _ = algorithm.step(engine, state)
        spent.append(time.perf_counter() - begun)
    engine.close()
    own, children = (
        resource.getrusage(who).ru_maxrss * 1024.0
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    return {"seconds": statistics.median(spent[1:] or spent), "memory": max(own, children)}


def loop_share(steps: int) -> float:
    """The part of a round that is neither forward, backward nor optimiser."""
    keep_freed_memory()
    experiment = Experiment()
    task = built(experiment.task)
    shard = prepared(task, pairs(16, 4096))
    inside = 0.0

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **settings: Any) -> Any:
            nonlocal inside
            begun = time.perf_counter()
            try:
                return function(*arguments, **settings)
            finally:
                inside += time.perf_counter() - begun

        return call

    algorithm = type(experiment.algorithm)(local=LocalTraining(steps=steps, batch_size=BATCH))
    engine = Simulation(task, [shard] * 4, seed=0, rounds=2)
    state = algorithm.init(engine, task.init(seeds.generator(0, "init")))
    engine.begin(0, engine.clients)
    state, _ = algorithm.step(engine, state)
    task.losses = timed(task.losses)  # type: ignore[method-assign]
    originals = torch.Tensor.backward, torch.optim.AdamW.step
    torch.Tensor.backward, torch.optim.AdamW.step = timed(originals[0]), timed(originals[1])  # type: ignore[method-assign,assignment]
    engine.begin(1, engine.clients)
    begun = time.perf_counter()
    algorithm.step(engine, state)
    total = time.perf_counter() - begun
    torch.Tensor.backward, torch.optim.AdamW.step = originals  # type: ignore[method-assign]
    return 1 - inside / total


def matrix_rate(
    device: torch.device = torch.device("cpu"), dtype: torch.dtype | None = None
) -> float:
    """What a product of square matrices reaches on the device, in bfloat16 where it is used, in
    FLOP a second.
    """
    gpu, size = device.type == "cuda", 8192 if device.type == "cuda" else 1024
    dtype = dtype or devices.arithmetic("auto", device)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    clock = time.perf_counter if gpu else time.process_time  # as steps are timed
    best = 1e9
    for _ in range(20):
        begun = clock()
        a @ b
        if gpu:
            torch.cuda.synchronize()
        best = min(best, clock() - begun)
    return 2 * size**3 / best


def step_flops(size: int) -> float:
    """Of one step on the shipped model: 4 a frozen weight and token (forward, backward to the
    input), the head at answers alone.
    """
    body = 4 * (4 * 256 * 256 + 3 * 256 * 688)
    lora = 4 * 8 * (4 * 512 + 3 * 944)
    return _flops(pairs(64, 4096), size, body, lora, 256 * 4096)


def smollm2_flops(model: Path, size: int) -> float:
    """The same of SmolLM2, with an adapter in all layers."""
    body = 30 * (2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536)
    lora = 30 * 8 * (2 * 1152 + 2 * 768 + 3 * 2112)
    return _flops(given(model, 64), size, body, lora, 576 * 49152)


def _flops(batch: Sequence[Example], size: int, body: int, lora: int, head: int) -> float:
    tokens = sum(p.tokens for p in batch) / len(batch) * size
    answers = sum(len(answer) for p in batch for answer in p.answers) / len(batch) * size
    return tokens * (4 * body + 6 * lora) + answers * 4 * head


def scores_saved(data: Path) -> dict[str, float]:
    """Answers that were scored when each pair was scored by itself, over those that are."""
    real = Path(__file__).resolve().parent.parent / "configs/ukpconvarg.yaml"
    sources = {"shipped": Experiment()}
    if data.is_dir():
        sources["ukpconvarg"] = Experiment.load(real, [f"data.path={data}"])
    figures = {}
    for name, experiment in sources.items():
        clients = experiment.read().clients
        rows = [row for client in clients for row in (*client.train, *client.test)]
        answers = {
            (key(row.prompt), key(answer)) for row in rows for answer in (row.chosen, row.rejected)
        }
        figures[f"scores_saved_{name}"] = 2 * len(rows) / len(answers)
    return figures


def batches_by_prompt(quick: bool) -> dict[str, float]:
    """How much a batch's gradient varies where its pairs are of the same prompts, over what it does
    where they are of similar length; and how many tokens are computed, likewise.

    Of the client with most pairs, over an epoch of batches, at an adapter away from zero.
    """
    task = built(Experiment().task)
    shard = task.encode(max(Experiment().clients()[0], key=lambda client: len(client.train)))
    shard = replace(shard, train=shard.train[: 80 if quick else None], test=())
    draw = torch.Generator().manual_seed(0)
    start = {
        name: 0.05 * torch.randn(t.shape, generator=draw)
        for name, t in task.init(seeds.generator(0, "init")).items()
    }
    examples, known = shard.by_objective[0]
    variance, tokens = {}, {}
    for name in ("length", "prompt"):
        plan = planned(known, BatchSize(BATCH, is_by_prompt=name == "prompt"), draw)
        gradients, tokens[name] = [], 0
        for indices in plan:
            batch = [examples[i] for i in indices]
            leaves = {key: tensor.clone().requires_grad_() for key, tensor in start.items()}
            task.losses(leaves, task._with_base(batch))[0].sum().backward()
            gradients.append(torch.cat([leaves[key].grad.flatten() for key in sorted(leaves)]))
            prompts = {example.prompt for example in batch}
            answers = {(e.prompt, answer) for e in batch for answer in e.answers}
            tokens[name] += sum(map(len, prompts)) + sum(len(answer) for _, answer in answers)
        whole = torch.stack(gradients)
        variance[name] = float((whole - whole.mean(0)).square().sum(1).mean())
    return {
        "batch_by_prompt_variance": variance["prompt"] / variance["length"],
        "batch_by_prompt_tokens": tokens["prompt"] / tokens["length"],
    }


def trunk_accuracy(quick: bool) -> dict[str, float]:
    """Points of held-out accuracy of FedDPO in the last 8 layers less those of all layers, each at
    its own rate; `quick` with two clients and three steps.
    """
    file = Path(__file__).resolve().parent.parent / "configs/demo.yaml"
    means = {}
    for layers, rate in ((f"last-{LAST}", 2e-3), ("null", 5e-4)):
        overrides = [
            "baselines=[]",
            "algorithm=feddpo",
            *(["rounds=1", "partition.max_clients=2"] if quick else ["rounds=5"]),
            f"algorithm.local.steps={3 if quick else 4}",
            f"algorithm.local.learning_rate={rate}",
            f"task.model.lora_layers_to_transform={layers}",
            "task.samples=0",
            "task.sample_clients=[]",
        ]
        with tempfile.TemporaryDirectory() as place:
            outcome = run(Experiment.load(file, overrides), Path(place) / "run")
        rows = outcome.evaluations["feddpo"]
        means[layers] = statistics.mean(row[ACCURACY] for row in rows.values())
    return {"trunk_accuracy_points": 100 * (means[f"last-{LAST}"] - means["null"])}


def first_step() -> dict[str, float]:
    """Seconds from the command to the first round's row, on a run whose reference scores are
    cached; and of that, imports.
    """
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "quick.yaml"
        file.write_text(
            "rounds: 1\nalgorithm: {name: feddpo, local: {steps: 1}}\npartition: {max_clients: "
            "2, name: natural}"
        )
        command = [sys.executable, "-m", "fedpref"]
        run = Path(place) / "run"
        subprocess.run(
            [*command, "run", str(file), "--output", str(run)], check=True, capture_output=True
        )
        for left in ("metrics.jsonl", "evaluation.jsonl", "done"):
            (run / left).unlink()
        for checkpoint in (run / "checkpoints").iterdir():
            checkpoint.rename(Path(place) / checkpoint.name)
        begun = time.perf_counter()
        process = subprocess.Popen([*command, "resume", str(run)], stdout=subprocess.DEVNULL)
        while not (run / "metrics.jsonl").exists() and process.poll() is None:
            time.sleep(0.005)
        taken = time.perf_counter() - begun
        process.wait()
        modules = "torch, transformers.models.llama.modeling_llama, peft"
        code = (
            f"import time; b = time.perf_counter(); import {modules}; "
            "print(time.perf_counter() - b)"
        )
        imports = subprocess.run(
            [sys.executable, "-c", code], check=True, capture_output=True, text=True
        )
    return {"first_step_seconds": taken, "first_step_import_seconds": float(imports.stdout)}


def together(*calls: tuple[Any, ...]) -> list[Any]:
    """Results of (function, arguments...), each called in a fresh process, so that peak memory is
    its own.
    """
    with ProcessPoolExecutor(len(calls), multiprocessing.get_context("spawn")) as pool:
        return [future.result() for future in [pool.submit(*call) for call in calls]]


def workers_speedup(size: int, rounds: int) -> float:
    """How many times as many rounds two workers do as one in the same time."""
    return federation(8, 1, size, rounds)["seconds"] / federation(8, 2, size, rounds)["seconds"]


def memory(turns: int) -> float:
    """Peak memory with 64 clients over that with 4, after as many steps."""
    few, many = together((federation, 4, 1, 1, 16 * turns), (federation, 64, 1, 1, turns))
    return float(many["memory"] / few["memory"])


def own_figures(quick: bool, data: Path) -> list[Callable[[], dict[str, float]]]:
    """What only fedpref is asked, piece by piece."""
    return [
        lambda: {"memory_64_over_4": memory(1 if quick else 2)},
        lambda: {"workers_speedup": together((workers_speedup, *((2, 2) if quick else (8, 6))))[0]},
        lambda: {"loop_share": together((loop_share, 2 if quick else 8))[0]},
        first_step,
        gradient_errors,
        lambda: scores_saved(data),
        lambda: together((batches_by_prompt, quick))[0],
        *([] if quick else [lambda: together((accuracies,))[0]]),
        *([lambda: together((trunk_accuracy, quick))[0]] if SMOLLM2 in present() else []),
    ]


def accuracies() -> dict[str, float]:
    """Held-out accuracy of the demo's federated line, its steps as they are and in float32,
    and how far apart they are.
    """
    found, errors = [], []
    for dtype in ("auto", "float32"):
        with tempfile.TemporaryDirectory() as place:
            file = Path(__file__).resolve().parent.parent / "configs/feddpo.yaml"
            outcome = run(
                Experiment.load(file, ["baselines=[]", f"task.model.dtype={dtype}"]),
                Path(place) / "run",
            )
        rows = next(iter(outcome.evaluations.values()))
        values = {name: row[ACCURACY] for name, row in rows.items()}
        found.append(sum(values.values()) / len(values))
        errors.append(
            standard_error(values, {name: int(row["num_examples"]) for name, row in rows.items()})
        )
    return {
        "accuracy": found[0],
        "accuracy_float32": found[1],
        "accuracy_apart_in_standard_errors": abs(found[0] - found[1]) / errors[1],
    }


def present() -> list[str]:
    """The models that are here: SmolLM2 has to be fetched."""
    here = (cache() / "models" / "smollm2-q4").is_dir()
    return [name for name in MODELS if name != SMOLLM2 or here]


def ratio(heats: Sequence[Mapping[str, Mapping[str, float]]], slow: str, fast: str) -> float:
    """How many times as long one tool takes as another, in the heat that has both."""
    return next(
        heat[slow]["seconds"] / heat[fast]["seconds"]
        for heat in heats
        if slow in heat and fast in heat
    )


def raced_figures(
    name: str, model: Path, size: int, heats: Sequence[Mapping[str, Mapping[str, float]]]
) -> dict[str, float]:
    """What a race comes to, by name."""
    suffix = "" if name == "shipped" else f"_{name}"
    ours = statistics.mean(heat[OURS]["seconds"] for heat in heats if OURS in heat)
    figures = {
        f"ratio_trl_installed{suffix}": ratio(heats, "TRL as installed", OURS),
        f"ratio_trl_tuned{suffix}": ratio(heats, "TRL, malloc tuned", OURS),
        f"pairs_per_cpu_second{suffix}": size / ours,
    }
    if name == "shipped":
        figures["matmul_share"] = step_flops(size) / ours / matrix_rate()
    if name != SMOLLM2:
        figures[f"ratio_peft_tuned{suffix}"] = ratio(heats, PEFT, OURS)
    if name == SMOLLM2:
        rate = matrix_rate(dtype=devices.arithmetic("auto", torch.device("cpu")))
        figures |= {
            "ratio_trl_tuned_smollm2_trunk": ratio(heats, "TRL, malloc tuned", SHORT),
            "trunk_speedup": ratio(heats, PLAIN, SHORT),
            "matmul_share_smollm2": smollm2_flops(model, size) / ours / rate,
        }
        if any(SAME_LAYERS in heat for heat in heats):
            figures["ratio_trl_tuned_smollm2_same_layers"] = ratio(heats, SAME_LAYERS, SHORT)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="the shipped model and SmolLM2, one cold step of two pairs each, everything at once",
    )
    parser.add_argument(
        "--models", nargs="+", choices=MODELS, help="race on these, and nothing else"
    )
    parser.add_argument(
        "--data",
        type=Path,
        default=Path(__file__).resolve().parent.parent.parent / "shared/data",
        help="the folder of ukpconvarg (docs/data.md)",
    )
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    end_with_children()
    console = Console(width=140)
    figures: dict[str, float] = {}
    size = 2 if arguments.quick else BATCH
    with (
        one_thread(),
        tempfile.TemporaryDirectory() as place,
        ThreadPoolExecutor(2 if arguments.quick else 1) as pool,
    ):
        pieces = [] if arguments.models else own_figures(arguments.quick, arguments.data)
        beside = [pool.submit(piece) for piece in pieces] if arguments.quick else []
        heats_of_smollm2 = HEATS[:2] if arguments.quick else HEATS
        raced = [m for m in present() if not arguments.quick or m in ("shipped", SMOLLM2)]
        for name in arguments.models or raced:
            turns = 1 if arguments.quick else 3
            count = 1 if arguments.quick or name in ("29m", SMOLLM2) else 4
            model = make(name, Path(place))
            heats = [
                race(tools, model, size, 0 if arguments.quick else 1, turns, count)
                for tools in (heats_of_smollm2 if name == SMOLLM2 else (tuple(TOOLS),))
            ]
            for heat in heats:
                console.print(race_table(name, model, size, heat))
            figures |= raced_figures(name, model, size, heats)
        for future in beside or [pool.submit(piece) for piece in pieces]:
            figures |= future.result()
    table = Table(title="figures", title_justify="left")
    table.add_column("name")
    table.add_column("value", justify="right")
    for name, value in figures.items():
        table.add_row(name, f"{value:.4g}")
    console.print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


def race_table(
    name: str, model: Path, size: int, raced: Mapping[str, Mapping[str, float]]
) -> Table:
    lengths = given(model, 64)
    tokens = sum(pair.tokens for pair in lengths) / len(lengths) * size
    table = Table(title=f"{name}: {size} pairs a step", title_justify="left")
    for title in (
        "tool",
        "CPU s a step",
        "pairs a CPU second",
        "tokens a CPU second",
        "peak memory, GB",
        "times as slow",
    ):
        table.add_column(title, justify="left" if title == "tool" else "right")
    for tool, row in raced.items():
        s, memory = row["seconds"], row["memory"] / 1e9
        slower = s / raced[OURS if OURS in raced else SHORT]["seconds"]
        table.add_row(
            tool,
            f"{s:.3f}",
            f"{size / s:.1f}",
            f"{tokens / s:.0f}",
            f"{memory:.2f}",
            f"{slower:.1f}",
        )
    return table


if __name__ == "__main__":
    main()
