"""The local training loop, once: every algorithm's clients descend through it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from fedpref.errors import UserError
from fedpref.federation import Client, work
from fedpref.objectives import Objectives
from fedpref.tasks.task import BatchSize
from fedpref.trees import Tree


@dataclass(frozen=True)
class Descent:
    """How a client trains within a round; names as in transformers' TrainingArguments where it has them."""

    steps: Annotated[int, Field(ge=1)] = 10  # optimiser updates a round
    batch_size: Annotated[int, Field(ge=1)] = 8  # examples a batch
    max_tokens_per_batch: Annotated[int, Field(ge=1)] | None = None  # batches of so many tokens instead, prompts and answers together
    gradient_accumulation_steps: Annotated[int, Field(ge=1)] = 1  # batches an update
    optim: Literal["adamw", "sgd"] = "adamw"
    learning_rate: Annotated[float, Field(gt=0)] = 5e-4
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "cosine"  # over the whole run, not the round
    num_cycles: Annotated[float, Field(gt=0)] = 0.5  # of the cosine, as in transformers: half a wave goes down once
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.1  # share of the run
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.99
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0  # of sgd
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    num_iterations: Annotated[int, Field(ge=1)] = 1  # updates on what was drawn before something new is
    keep_optimizer: bool = False  # carry the optimiser's moments over rounds instead of starting afresh


def rate(settings: Descent, progress: float) -> float:
    """The learning rate at a point of the run, 0 at its beginning and 1 at its end."""
    if progress < settings.warmup_ratio:
        return settings.learning_rate * progress / settings.warmup_ratio
    left = (1 - progress) / (1 - settings.warmup_ratio)
    shape = {"constant": 1.0, "linear": left, "cosine": 0.5 + 0.5 * math.cos(2 * math.pi * settings.num_cycles * (1 - left))}
    return settings.learning_rate * shape[settings.lr_scheduler_type]


def halves(settings: Descent, first: int | None) -> tuple[Descent, Descent]:
    """A round's steps in two phases, of which the first has so many (None: a third); raises UserError where one would have none."""
    steps = max(1, settings.steps // 3) if first is None else first
    if steps >= settings.steps:
        raise UserError(
            f"algorithm.local.steps: {settings.steps} steps leave none for the second phase after {steps} of the first. "
            "Take more, fewer algorithm.personal_steps, or algorithm.phases=joint."
        )
    return replace(settings, steps=steps), replace(settings, steps=settings.steps - steps)


def joining(settings: Descent, steps: int) -> Descent:
    """The same for a client that comes after the run: so many steps, at a constant rate."""
    return replace(settings, steps=steps, lr_scheduler_type="constant", warmup_ratio=0.0, keep_optimizer=False)


@contextmanager
def seeded_dropout(client: Client) -> Iterator[None]:
    """Let dropout draw from a seed of the client's own stream, whatever else the process has drawn."""
    device = client.task.device
    is_cuda = device.type == "cuda"
    place = torch.cuda.current_device() if is_cuda and device.index is None else device.index
    generator = torch.cuda.default_generators[place] if is_cuda else torch.default_generator
    with torch.random.fork_rng(devices=[place] if is_cuda else []):
        # not torch.manual_seed, which keeps a traceback of every call for devices that are not in use yet
        generator.manual_seed(int(torch.randint(2**62, (), generator=client.rng)))
        yield


Correction = Callable[[Tree, Tree], None]  # correction(parameters, gradients) changes the gradients in place


def descend(
    client: Client,
    start: Tree,
    settings: Descent,
    moments: Tree,
    correct: Correction | None = None,
    *,
    objectives: Objectives | None = None,
    fixed: Tree = MappingProxyType({}),
    rates: Mapping[str, float] = MappingProxyType({}),
) -> tuple[Tree, Tree, Mapping[str, float]]:
    """Take `steps` updates from `start` on the client's own data, beside parameters that stay fixed; nothing happens to an empty tree.

    `rates` multiply the learning rate of the parameters that they name; `correct` sees every update's gradient before it is
    clipped and used; without `objectives` a task's losses are averaged. Returns, on the CPU, the new parameters, the optimiser's moments
    (empty unless `keep_optimizer`; pass them in next time) and metrics: means over all batches, sums of those named `num_`.
    """
    if not start:
        return {}, {}, {}
    device = client.task.device
    start = {name: start[name].detach().to(device) for name in sorted(start)}  # sums over tensors depend on their order
    beside = {name: tensor.to(device) for name, tensor in fixed.items()}
    theta = {name: tensor.clone().requires_grad_() for name, tensor in start.items()}
    params, received = {**beside, **theta}, {**beside, **start}
    optimiser = _optimiser(settings, theta, moments, rates)
    sums: dict[str, float] = {}
    size = BatchSize(settings.batch_size, settings.max_tokens_per_batch)
    batches = settings.steps * settings.gradient_accumulation_steps
    drawn: list[Any] = []
    with seeded_dropout(client):
        for step in range(settings.steps):
            progress = (client.round + (step + 0.5) / settings.steps) / client.rounds
            for group in optimiser.param_groups:
                group["lr"] = group["scale"] * rate(settings, progress)
            if step % settings.num_iterations == 0:
                drawn.clear()
            for number in range(settings.gradient_accumulation_steps):
                if number == len(drawn):
                    drawn.append(client.task.draw(params, received, client.shard, size, client.rng))
                losses, metrics = client.task.losses(params, drawn[number])
                if objectives is None or len(losses) == 1:
                    (losses.mean() / settings.gradient_accumulation_steps).backward()
                else:
                    weights = objectives.backward(losses, theta, settings.gradient_accumulation_steps)
                    metrics = {**metrics, **{f"weights/{name}": w for name, w in zip(client.task.objectives, weights, strict=True)}}
                for name, value in metrics.items():
                    sums[name] = sums.get(name, 0.0) + value
            if correct:
                with torch.no_grad():
                    correct(theta, {name: tensor.grad for name, tensor in theta.items() if tensor.grad is not None})
            norm = torch.nn.utils.clip_grad_norm_(theta.values(), settings.max_grad_norm)
            sums["grad_norm"] = sums.get("grad_norm", 0.0) + float(norm) * settings.gradient_accumulation_steps
            optimiser.step()
            optimiser.zero_grad()
    metrics = {name: value if name.startswith("num_") else value / batches for name, value in sums.items()}
    kept = _moments(optimiser, theta) if settings.keep_optimizer else {}
    return {name: tensor.detach().cpu() for name, tensor in theta.items()}, kept, metrics


@work(sends=())
def personalise(client: Client, shared: Tree, own: Tree, settings: Descent) -> Tree:
    """Train what is the client's own, beside what is shared."""
    return descend(client, own, settings, {}, fixed=shared)[0]


def _optimiser(settings: Descent, theta: Tree, moments: Tree, rates: Mapping[str, float]) -> torch.optim.Optimizer:
    scales = sorted({rates.get(name, 1.0) for name in theta})
    groups = [{"params": [theta[name] for name in theta if rates.get(name, 1.0) == scale], "scale": scale} for scale in scales]
    optimiser: torch.optim.Optimizer
    if settings.optim == "adamw":
        betas = (settings.adam_beta1, settings.adam_beta2)
        optimiser = torch.optim.AdamW(groups, settings.learning_rate, betas, weight_decay=settings.weight_decay, fused=True)
    else:
        optimiser = torch.optim.SGD(groups, settings.learning_rate, settings.momentum, weight_decay=settings.weight_decay, foreach=True)
    for address, tensor in moments.items():
        key, name = address.split("/", 1)
        optimiser.state[theta[name]][key] = tensor.clone() if key == "step" else tensor.to(theta[name].device, copy=True)
    return optimiser


def _moments(optimiser: torch.optim.Optimizer, theta: Tree) -> Tree:
    return {
        f"{key}/{name}": value.detach().cpu()
        for name, tensor in theta.items()
        for key, value in optimiser.state[tensor].items()
        if value is not None
    }
