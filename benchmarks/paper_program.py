"""Federated DPO the way a research program does it, to measure ours against: full fine-tuning, and whole models exchanged.

A stand-in for the program released with "Distributed Direct Preference Optimization" (github.com/starkjiang/distributed_dpo, MIT), written
anew after its settings: every client copies the global model, takes a few steps of a fresh AdamW on texts that are padded to 64 tokens,
and the server averages all weights. The reference model is asked again for every batch; nothing is computed once.
"""

from __future__ import annotations

import copy
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from fedpref import Experiment, seeds
from fedpref.diagnostics import diagnose
from fedpref.engines import Simulation
from fedpref.participation import draw

CONFIG = Path(__file__).resolve().parent.parent / "configs/distributed-dpo.yaml"
MAX_LENGTH, BETA, BATCH, RATE, DECAY, CLIP = 64, 0.2, 4, 1e-4, 0.01, 1.0
TOKENIZER = CONFIG.parent.parent / "src/fedpref/models/builtin"
LOOK = 4  # rounds between two looks at our pooled loss, which are not counted as work
CHARACTERS = 300  # the end of a text that is looked at
Texts = Sequence[tuple[str, str]]  # (chosen, rejected)


def small_gpt2(tokenizer: Path, folder: Path, layers: int = 4, width: int = 256) -> Path:
    """A GPT-2 with random weights and an existing tokenizer, as a Hugging Face folder."""
    words = transformers.AutoTokenizer.from_pretrained(tokenizer)
    torch.manual_seed(0)
    shape = {"n_layer": layers, "n_head": width // 64, "n_embd": width, "n_positions": 2 * MAX_LENGTH}
    ends = {"bos_token_id": words.eos_token_id, "eos_token_id": words.eos_token_id}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=len(words), **shape, **ends))
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
    bytes_sent: int = 0
    seconds: float = 0.0  # of the processor

    @staticmethod
    def load(folder: Path, clients: Sequence[Texts]) -> Program:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        reference = copy.deepcopy(model).eval().requires_grad_(False)
        return Program(model, reference, transformers.AutoTokenizer.from_pretrained(folder), clients)

    def log_probabilities(self, model: nn.Module, texts: Sequence[str]) -> Tensor:
        """The sums over all tokens but padding of whole texts."""
        coded = self.tokenizer(list(texts), padding="max_length", truncation=True, max_length=MAX_LENGTH, return_tensors="pt")
        logits = model(input_ids=coded["input_ids"], attention_mask=coded["attention_mask"]).logits[:, :-1]
        found = logits.log_softmax(-1).gather(2, coded["input_ids"][:, 1:, None])[..., 0]
        return (found * coded["attention_mask"][:, 1:]).sum(1)

    def loss(self, model: nn.Module, pairs: Texts) -> Tensor:
        """Of DPO, the mean over pairs."""
        chosen, rejected = zip(*pairs, strict=True)
        margin = self.log_probabilities(model, chosen) - self.log_probabilities(model, rejected)
        with torch.no_grad():
            under_reference = self.log_probabilities(self.reference, chosen) - self.log_probabilities(self.reference, rejected)
        return -nn.functional.logsigmoid(BETA * (margin - under_reference)).mean()

    def round(self, cohort: Sequence[int], steps: int, rng: torch.Generator) -> None:
        """Local steps of a cohort, and the mean of its models."""
        begun = time.process_time()
        models = []
        for client in cohort:
            model = copy.deepcopy(self.model).train()
            optimiser = torch.optim.AdamW(model.parameters(), RATE, weight_decay=DECAY)
            pairs = self.clients[client]
            for _ in range(steps):
                batch = [pairs[i] for i in torch.randint(len(pairs), (BATCH,), generator=rng).tolist()]
                optimiser.zero_grad()
                self.loss(model, batch).backward()
                nn.utils.clip_grad_norm_(model.parameters(), CLIP)
                optimiser.step()
            models.append(model.state_dict())
        size = sum(tensor.nbytes for tensor in self.model.parameters())
        self.bytes_sent += 2 * size * len(cohort)
        self.model.load_state_dict({name: torch.stack([one[name] for one in models]).mean(0) for name in models[0]})
        self.seconds += time.process_time() - begun

    @torch.no_grad()
    def pooled_loss(self) -> float:
        """Over all clients' texts; not counted as its work."""
        self.model.eval()
        pairs = [pair for texts in self.clients for pair in texts]
        return sum(float(self.loss(self.model, pairs[i : i + 60])) * len(pairs[i : i + 60]) for i in range(0, len(pairs), 60)) / len(pairs)


# A model of random weights learns first which tokens are preferred, and it does so in the embeddings, which are also its head
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
    """What it took to come to a pooled loss: rounds, bytes over all clients, and seconds of the processor."""

    rounds: int
    bytes: float
    seconds: float
    loss: float


def texts(data: str | None, folder: Path, words: Any, count: int = 128) -> Path:
    """The ends of hh-rlhf's dialogues, or the shipped pairs, as a file for five clients; pairs alike within 64 tokens are left out."""
    spec = Experiment.load(CONFIG, [f"data.path={data}", "data.max_rows=1200"] if data else ["data={name: builtin}"])
    rows, number = [], 0
    for client in spec.clients()[0]:
        own = []
        for row in client.train:
            pair = [(str(row.prompt) + str(answer))[-CHARACTERS:] for answer in (row.chosen, row.rejected)]
            start, other = (words(text)["input_ids"][: MAX_LENGTH - 8] for text in pair)
            if min(map(len, pair)) > 20 and start != other:
                number += 1
                own.append({"prompt": f"Dialogue {number}:", "chosen": pair[0], "rejected": pair[1], "client": client.name})
        rows += own[:count]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "pairs.jsonl"


def race(data: str | None, rounds: int, layers: int, width: int) -> tuple[Race, Race]:
    """The program for so many rounds, then ours until its pooled loss is no higher; ours includes the reference's scores."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        words = transformers.AutoTokenizer.from_pretrained(TOKENIZER)
        model = small_gpt2(TOKENIZER, folder / "model", layers, width)
        source = f"data={{name: files, path: {texts(data, folder, words)}, test_fraction: 0.05}}"
        ours = Experiment.load(CONFIG, [source, f"task.model.path={model}", *OURS])
        clients, _ = ours.clients()
        program = Program.load(model, [[(f"{r.prompt}{r.chosen}", f"{r.prompt}{r.rejected}") for r in c.train] for c in clients])
        rng, cohorts = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
        for _ in range(rounds):
            program.round(draw([1.0] * len(clients), ours.federation.clients_per_round, cohorts), ours.algorithm.local.steps, rng)
        target = program.pooled_loss()

        task = ours.build_task()
        shards = [task.encode(client) for client in clients]
        begun, sent = time.process_time(), 0.0
        shards = [task.prepare(shard, folder / "cache") for shard in shards]
        seconds = time.process_time() - begun
        engine = Simulation(task, shards, seed=0, rounds=ours.rounds, weighting="equal")
        start = task.init(seeds.generator(0, "init"))
        method: Any = ours.algorithm
        state, cohorts, loss = method.init(engine, start), torch.Generator().manual_seed(0), float("inf")
        for number in range(ours.rounds):
            begun = time.process_time()
            engine.begin(number, draw([1.0] * len(shards), ours.federation.clients_per_round, cohorts))
            state, _ = method.step(engine, state)
            seconds += time.process_time() - begun
            sent += engine.traffic.bytes_up + engine.traffic.bytes_down
            if (number + 1) % LOOK:
                continue
            engine.begin(number, engine.clients, "evaluate")
            loss = diagnose(engine, method.model(state), tuple(start), ("pooled-gradient",))["pooled_loss"]
            if loss <= target:
                break
        return Race(rounds, program.bytes_sent, program.seconds, target), Race(number + 1, sent, seconds, loss)
