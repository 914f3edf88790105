"""Federated DPO the way a research program does it, to measure ours against: full fine-tuning, and
whole models exchanged.

A stand-in for the program released with "Distributed Direct Preference Optimization"
(github.com/starkjiang/distributed_dpo, MIT), written anew after its settings: every client copies
the global model, takes a few steps of a fresh AdamW on texts that are padded to 64 tokens, and the
server averages all weights. The reference model is asked again for every batch; nothing is computed
once.
"""

from __future__ import annotations

import copy
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from torch import Tensor, nn

from fedpref import Experiment
from fedpref.data import ClientData
from fedpref.engines import Simulation
from fedpref.engines.workers import keep_freed_memory
from fedpref.federation.participation import draw
from fedpref.numerics import seeds

CONFIG = Path(__file__).resolve().parent.parent / "configs/distributed-dpo.yaml"
MAX_LENGTH, BETA, BATCH, DECAY, CLIP = 64, 0.2, 4, 0.01, 1.0
# the program's own; what else it is given a chance with, as ours was
RATE, OTHER_RATES = (
    1e-4,
    (3e-4, 1e-3),
)
TOKENIZER = CONFIG.parent.parent / "src/fedpref/models/builtin"
# rounds between two looks at the program's pooled loss; ours is looked at each round; looks are not
# counted as work
LOOK = 5
CHARACTERS = 300  # the end of a text that is looked at
Texts = Sequence[tuple[str, str]]  # (chosen, rejected)


def small_gpt2(tokenizer: Path, folder: Path, layers: int = 4, width: int = 384) -> Path:
    """A GPT-2 with random weights and an existing tokenizer, as a Hugging Face folder."""
    words = transformers.AutoTokenizer.from_pretrained(tokenizer)
    torch.manual_seed(0)
    shape = {
        "n_layer": layers,
        "n_head": width // 64,
        "n_embd": width,
        "n_positions": 2 * MAX_LENGTH,
    }
    ends = {"bos_token_id": words.eos_token_id, "eos_token_id": words.eos_token_id}
    # dropout slows a short run, and ours has none
    ends |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=len(words), **shape, **ends)
    )
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


@dataclass
class Program:
    """The federation: its global model, the reference, and every client's texts."""

    model: nn.Module
    reference: nn.Module
    tokenizer: Any
    clients: Sequence[Texts]
    rate: float = RATE
    bytes_sent: int = 0
    seconds: float = 0.0  # of the processor

    @staticmethod
    def load(folder: Path, clients: Sequence[Texts], rate: float = RATE) -> Program:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        reference = copy.deepcopy(model).eval().requires_grad_(False)
        return Program(
            model, reference, transformers.AutoTokenizer.from_pretrained(folder), clients, rate
        )

    def log_probabilities(self, model: nn.Module, texts: Sequence[str]) -> Tensor:
        """The sums over all tokens but padding of whole texts."""
        coded = self.tokenizer(
            list(texts),
            padding="max_length",
            truncation=True,
            max_length=MAX_LENGTH,
            return_tensors="pt",
        )
        logits = model(input_ids=coded["input_ids"], attention_mask=coded["attention_mask"]).logits[
            :, :-1
        ]
        found = logits.log_softmax(-1).gather(2, coded["input_ids"][:, 1:, None])[..., 0]
        return (found * coded["attention_mask"][:, 1:]).sum(1)

    def margins(self, model: nn.Module, pairs: Texts) -> Tensor:
        """How much likelier the chosen texts are than the rejected ones."""
        chosen, rejected = zip(*pairs, strict=True)
        return self.log_probabilities(model, chosen) - self.log_probabilities(model, rejected)

    def loss(self, model: nn.Module, pairs: Texts) -> Tensor:
        """Of DPO, the mean over pairs."""
        with torch.no_grad():
            under_reference = self.margins(self.reference, pairs)
        return -nn.functional.logsigmoid(
            BETA * (self.margins(model, pairs) - under_reference)
        ).mean()

    def round(self, cohort: Sequence[int], steps: int, rng: torch.Generator) -> None:
        """Local steps of a cohort, and the mean of its models."""
        begun = time.process_time()
        models = []
        for client in cohort:
            model = copy.deepcopy(self.model).train()
            optimiser = torch.optim.AdamW(model.parameters(), self.rate, weight_decay=DECAY)
            pairs = self.clients[client]
            for _ in range(steps):
                batch = [
                    pairs[i] for i in torch.randint(len(pairs), (BATCH,), generator=rng).tolist()
                ]
                optimiser.zero_grad()
                self.loss(model, batch).backward()
                nn.utils.clip_grad_norm_(model.parameters(), CLIP)
                optimiser.step()
            models.append(model.state_dict())
        size = sum(tensor.nbytes for tensor in self.model.parameters())
        self.bytes_sent += 2 * size * len(cohort)
        self.model.load_state_dict(
            {name: torch.stack([one[name] for one in models]).mean(0) for name in models[0]}
        )
        self.seconds += time.process_time() - begun

    @torch.no_grad()
    def pooled_loss(self, model: nn.Module | None = None) -> float:
        """Of a model, its own by default, over every third of all clients' texts; not counted as
        its work.
        """
        return float(
            -nn.functional.logsigmoid(
                BETA * (self.margins((model or self.model).eval(), self.judged) - self.known)
            ).mean()
        )

    @cached_property
    def judged(self) -> Texts:
        return [pair for texts in self.clients for pair in texts][::3]

    @cached_property
    def known(self) -> Tensor:
        """The judged texts' margins under the reference."""
        with torch.no_grad():
            return self.margins(self.reference, self.judged)


# The embedding alone is trained: it is where a model of random weights learns first which tokens
# are preferred
OURS = (
    "partition={name: natural}",
    "task.truncation_mode=keep_start",
    "task.model.lora_r=32",
    "task.model.lora_alpha=64",
    "task.model.lora_target_modules=[wte]",
    "algorithm.local.learning_rate=5.0e-3",
)


@dataclass(frozen=True)
class Race:
    """What it took to come to a pooled loss: rounds, bytes over all clients, and seconds of the
    processor.
    """

    rounds: int
    bytes: float
    seconds: float
    loss: float


def texts(data: str | None, folder: Path, words: Any, count: int) -> Path:
    """The ends of hh-rlhf's dialogues, or the shipped pairs, as a file for five clients; pairs
    alike within 64 tokens are left out.
    """
    spec = Experiment.load(
        CONFIG, [f"data.path={data}", "data.max_rows=1200"] if data else ["data={name: builtin}"]
    )
    rows, number = [], 0
    for client in spec.clients()[0]:
        own = []
        for row in client.train:
            pair = [
                (str(row.prompt) + str(answer))[-CHARACTERS:]
                for answer in (row.chosen, row.rejected)
            ]
            start, other = (words(text)["input_ids"][: MAX_LENGTH - 8] for text in pair)
            if min(map(len, pair)) > 20 and start != other:
                number += 1
                own.append(
                    {
                        "prompt": f"Dialogue {number}:",
                        "chosen": pair[0],
                        "rejected": pair[1],
                        "client": client.name,
                    }
                )
        rows += own[:count]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "pairs.jsonl"


def race(
    data: str | None, rounds: int, pairs_a_client: int, other_rates: Sequence[float] = OTHER_RATES
) -> tuple[Race, Race, Race]:
    """The program for so many rounds; then, until the pooled loss is no higher, the program at its
    best rate, and ours.

    All losses are the program's own, over whole texts. Ours includes the reference's scores; raises
    RuntimeError if it does not come there.
    """
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        words = transformers.AutoTokenizer.from_pretrained(TOKENIZER)
        model = small_gpt2(TOKENIZER, folder / "model")
        source = (
            f"data={{name: files, path: {texts(data, folder, words, pairs_a_client)}, "
            f"test_fraction: 0.05}}"
        )
        ours = Experiment.load(CONFIG, [source, f"task.model.path={model}", *OURS])
        clients, _ = ours.clients()
        pairs = [
            [(f"{r.prompt}{r.chosen}", f"{r.prompt}{r.rejected}") for r in c.train] for c in clients
        ]
        judge = Program.load(model, pairs)
        theirs = train_program(judge, ours, rounds, -1.0)
        tuned = [
            train_program(Program.load(model, pairs, rate), ours, rounds, theirs.loss)
            for rate in other_rates
        ]
        best = min(
            [theirs, *(found for found in tuned if found.loss <= theirs.loss)],
            key=lambda found: found.seconds,
        )
        return theirs, best, train_ours(ours, clients, judge, theirs.loss, folder)


def train_program(program: Program, spec: Experiment, rounds: int, target: float) -> Race:
    """As many rounds as it takes, at most so many."""
    rng, cohorts = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
    for number in range(1, rounds + 1):
        program.round(
            draw([1.0] * len(program.clients), spec.federation.clients_per_round, cohorts),
            spec.algorithm.local.steps,
            rng,
        )
        if number == rounds or (target > 0 and number % LOOK == 0):
            loss = program.pooled_loss()
            if loss <= target:
                break
    return Race(number, program.bytes_sent, program.seconds, loss)


def train_ours(
    spec: Experiment, clients: Sequence[ClientData], judge: Program, target: float, folder: Path
) -> Race:
    """Federated DPO as the config says, until the judge finds the target's loss; memory is kept as
    `fedpref run` keeps it.
    """
    keep_freed_memory()
    task = spec.build_task()
    shards = [task.encode(client) for client in clients]
    begun, sent = time.process_time(), 0.0
    shards = [task.prepare(shard, folder / "cache") for shard in shards]
    seconds = time.process_time() - begun
    engine = Simulation(task, shards, seed=0, rounds=spec.rounds, weighting="equal")
    method: Any = spec.algorithm
    state, cohorts = (
        method.init(engine, task.init(seeds.generator(0, "init"))),
        torch.Generator().manual_seed(0),
    )
    for number in range(spec.rounds):
        begun = time.process_time()
        engine.begin(number, draw([1.0] * len(shards), spec.federation.clients_per_round, cohorts))
        state, _ = method.step(engine, state)
        seconds += time.process_time() - begun
        sent += engine.traffic.bytes_up + engine.traffic.bytes_down
        task.export(state.adapter, folder / "adapter")
        base = transformers.AutoModelForCausalLM.from_pretrained(spec.task.model.path)
        loss = judge.pooled_loss(PeftModel.from_pretrained(base, folder / "adapter"))
        if loss <= target:
            return Race(number + 1, sent, seconds, loss)
    raise RuntimeError(
        f"after {spec.rounds} rounds the pooled loss is {loss:.4f}, not {target:.4f}"
    )
