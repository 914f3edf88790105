"""The local training loop, once: every algorithm's clients train through it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor

from fedpref.errors import UserError
from fedpref.federation.objectives import Objectives
from fedpref.federation.private_steps import PrivateSteps
from fedpref.federation.verbs import Client, WithheldError, in_turn
from fedpref.numerics import seeds, trees
from fedpref.numerics.trees import Tree
from fedpref.tasks.batches import BatchSize, Epochs
from fedpref.types import Count, Fraction, NonNegative, Positive


@dataclass(frozen=True)
class LocalTraining:
    """How a client trains within a round; names are those of transformers' TrainingArguments."""

    steps: Count = 10
    """Optimiser updates in a round."""
    batch_size: Count = 8
    """Examples in a batch."""
    max_tokens_per_batch: Count | None = None
    """Fill batches up to so many tokens, prompts and answers together, in place of a fixed size."""
    gradient_accumulation_steps: Count = 1
    """Batches for each update."""
    optim: Literal["adamw", "sgd"] = "adamw"
    """The optimiser."""
    learning_rate: Positive = 5e-4
    """The highest learning rate of the run."""
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "cosine"
    """How the learning rate falls over the whole run, not the round. Each step has the rate at its
    middle, where transformers' has that at its beginning, so that the first of few is not lost."""
    num_cycles: Positive = 0.5
    """Waves of the cosine, as in transformers: half a wave goes down once."""
    warmup_ratio: Fraction = 0.1
    """The share of the run in which the learning rate rises."""
    weight_decay: NonNegative = 0.0
    """The optimiser's weight decay."""
    adam_beta1: Fraction = 0.9
    """The decay of AdamW's first moment."""
    adam_beta2: Fraction = 0.99
    """The decay of AdamW's second moment; below transformers' 0.999, which remembers a thousand
    steps, because an optimiser that starts afresh each round lives for a few."""
    momentum: Fraction = 0.0
    """The momentum of SGD."""
    max_grad_norm: Positive = 1.0
    """The norm at which gradients are clipped."""
    num_iterations: Count = 1
    """Updates on what was drawn before something new is drawn, as in PPO and GRPO."""
    keep_optimizer: bool = False
    """Carry the optimiser's moments over rounds instead of starting afresh."""
    sampling_strategy: Literal["epochs", "independent"] = "epochs"
    """Batches take every example once before any comes again, over rounds too, or each is drawn by
    itself. Questions of opinions are always drawn by themselves, as published."""
    batch_by: Literal["length", "prompt"] = "length"
    """Batches are of examples of similar length, or of those of the same prompts, of which each
    prompt and each answer is computed once."""

    def __post_init__(self) -> None:
        if self.batch_by == "prompt" and self.sampling_strategy == "independent":
            raise ValueError(
                "local.batch_by: examples of one prompt come together in epochs alone. Set "
                "local.sampling_strategy to epochs"
            )


def rate(settings: LocalTraining, progress: float) -> float:
    """Return the learning rate at a point of the run, 0 at its beginning and 1 at its end."""
    if progress < settings.warmup_ratio:
        return settings.learning_rate * progress / settings.warmup_ratio
    left = (1 - progress) / (1 - settings.warmup_ratio)
    wave = 2 * math.pi * settings.num_cycles * (1 - left)
    shape = {"constant": 1.0, "linear": left, "cosine": 0.5 + 0.5 * math.cos(wave)}
    return settings.learning_rate * shape[settings.lr_scheduler_type]


def halves(settings: LocalTraining, first: int | None) -> tuple[LocalTraining, LocalTraining]:
    """Split a round's steps into two phases.

    Args:
        settings: The whole round's.
        first: Steps of the first phase; None takes a third.

    Raises:
        UserError: The second phase would have no steps.
    """
    steps = max(1, settings.steps // 3) if first is None else first
    if steps >= settings.steps:
        raise UserError(
            f"algorithm.local.steps: {settings.steps} steps leave none for the second phase after "
            f"{steps} of the first. Take more, fewer algorithm.personal_steps, or "
            "algorithm.phases=joint."
        )
    return replace(settings, steps=steps), replace(settings, steps=settings.steps - steps)


def joining(settings: LocalTraining, steps: int) -> LocalTraining:
    """Return the settings of a client that joins after the run: a constant rate, `steps` steps."""
    return replace(
        settings,
        steps=steps,
        lr_scheduler_type="constant",
        warmup_ratio=0.0,
        keep_optimizer=False,
    )


@contextmanager
def seeded_dropout(client: Client) -> Iterator[Callable[[int], None]]:
    """Within it, dropout draws from the client's own stream, whatever else has been drawn.

    Yields:
        A function that begins the stream of a batch, by its number, whichever process computes it.
    """
    generator = seeds.of_device(client.task.device)
    is_cuda = generator.device.type == "cuda"
    with torch.random.fork_rng(devices=[generator.device.index] if is_cuda else []):
        # not torch.manual_seed, which keeps a traceback of every call for devices that are not in
        # use yet
        seed = int(torch.randint(2**62, (), generator=client.rng))
        generator.manual_seed(seed)

        def begin(number: int) -> None:
            generator.manual_seed(seed + number)

        yield begin


MOMENTS = ("step", "exp_avg", "exp_avg_sq", "momentum_buffer")  # what optimisers keep
# begin names among moments: of a client's place in its data, and of what its task keeps
EPOCHS, OF_TASK = "epochs", "task:"


def place(moments: Tree) -> dict[str, Tensor]:
    """Return what of a client's moments no optimiser reads: its place in its data, and what its
    task keeps.
    """
    return {name: tensor for name, tensor in moments.items() if name.startswith((EPOCHS, OF_TASK))}


def moments_of(moments: Tree, names: Iterable[str]) -> Tree:
    """Return the moments of some parameters, and the client's place in its data."""
    return {**trees.select(moments, names, "/"), **place(moments)}


Correction = Callable[[Tree, Tree], None]
"""correction(parameters, gradients) changes the gradients in place."""


def pull_towards(centre: Tree, strength: float, client: Client) -> Correction:
    """Return a correction that adds the gradient of strength/2 |theta - centre|^2.

    Args:
        centre: The tree that parameters are held near; it has all that are trained.
        strength: The factor of the squared distance.
        client: On whose device it is computed.
    """
    goal = trees.to(centre, client.task.device)

    def pull(theta: Tree, gradients: Tree) -> None:
        for name, gradient in gradients.items():
            gradient.add_(theta[name] - goal[name], alpha=strength)

    return pull


def train_locally(
    client: Client,
    start: Tree,
    settings: LocalTraining,
    moments: Tree,
    correct: Correction | None = None,
    *,
    objectives: Objectives | None = None,
    fixed: Tree = MappingProxyType({}),
    rates: Mapping[str, float] = MappingProxyType({}),
    leaves: bool = True,
    feeds: bool = True,
) -> tuple[Tree, Tree, Mapping[str, float]]:
    """Take a round's updates on the client's own data.

    Args:
        client: Whose data is drawn, and whose random numbers.
        start: The parameters to train. Nothing happens to an empty tree.
        settings: Steps, batches, optimiser and schedule.
        moments: What this function returned as moments before; empty to begin afresh, in a new
            order of the client's data.
        correct: Sees every update's gradient before it is clipped and used, and may change it.
        objectives: How several losses are weighed; without it they are averaged.
        fixed: Parameters that the model also has, and that stay.
        rates: Factors of the learning rate, by parameter; all others have 1.
        leaves: Whether anything of the parameters may leave the client.
        feeds: Whether what leaves it later depends on them. If not, private runs train them as
            others do.

    Returns:
        On the CPU: the new parameters; the optimiser's moments, where they are kept, with the
        client's place in its data; metrics, which are means over all batches, and sums of those
        named `num_`. Of fewer distinct examples than the client lets anything leave of, there are
        no metrics, and of private steps there are none but of what has noise.

    Raises:
        WithheldError: Something would leave that is of fewer distinct examples than that.
    """
    if not start:
        return {}, {}, {}
    device = client.task.device
    # in the order of names: the norm of all gradients is a sum, whose last bits depend on it
    start = {name: start[name].detach().to(device) for name in sorted(start)}
    beside = {name: tensor.to(device) for name, tensor in fixed.items()}
    theta = {name: tensor.clone().requires_grad_() for name, tensor in start.items()}
    # `received` stays as it came, for the task's reference at the round's start
    params, received = {**beside, **theta}, {**beside, **start}
    optimiser = _optimiser(settings, theta, moments, rates)
    sums: dict[str, float] = {}
    norms: list[Tensor] = []
    private = client.private if feeds else None
    is_by_prompt = settings.batch_by == "prompt"
    size = BatchSize(settings.batch_size, settings.max_tokens_per_batch, is_by_prompt=is_by_prompt)
    # of batches of another size, places would mean something else
    here = f"{EPOCHS}:{size.examples}:{size.max_tokens}:{settings.batch_by}"
    if settings.sampling_strategy == "epochs":
        known = moments.get(here)
        epochs = Epochs.begin(client.rng) if known is None else Epochs.restore(known)
        size = replace(size, epochs=epochs)
    for name, tensor in moments.items():
        if name.startswith(OF_TASK):
            size.kept[name.removeprefix(OF_TASK)] = tensor
    drawn: list[Any] = []
    accumulated = settings.gradient_accumulation_steps
    with seeded_dropout(client) as begin_batch:

        def learn(step: int, number: int) -> tuple[Mapping[str, float], list[Tensor | None]]:
            """Return a batch's metrics and gradients."""
            begin_batch(step * accumulated + number)
            optimiser.zero_grad()
            losses, metrics = client.task.losses(params, drawn[number])
            if objectives is None or len(losses) == 1:
                (losses.mean() / accumulated).backward()
            else:
                weights = objectives.backward(losses, theta, accumulated)
                names = (f"weights/{name}" for name in client.task.objectives)
                metrics = {**metrics, **dict(zip(names, weights, strict=True))}
            return metrics, [tensor.grad for tensor in theta.values()]

        def learn_all(step: int) -> None:
            """Let parameters have the gradients of a step's batches."""
            if step % settings.num_iterations == 0:
                drawn.clear()
            # with num_iterations, later steps use again what was drawn
            while len(drawn) < accumulated:
                drawn.append(client.task.draw(params, received, client.shard, size, client.rng))
            batches = [partial(learn, step, number) for number in range(accumulated)]
            # what objectives remember from one batch to the next must not be lost, nor what a batch
            # that is used again remembers of the policy that drew it
            is_apart = objectives is None and settings.num_iterations == 1
            learned = client.spread(batches) if is_apart else in_turn(batches)
            total: list[Tensor | None] = [None] * len(theta)
            for metrics, gradients in learned:
                for name, value in metrics.items():
                    sums[name] = sums.get(name, 0.0) + value
                total = [
                    g if t is None else t if g is None else t + g
                    for t, g in zip(total, gradients, strict=True)
                ]
            for tensor, gradient in zip(theta.values(), total, strict=True):
                tensor.grad = gradient

        def learn_privately(step: int, private: PrivateSteps) -> None:
            """Let parameters have a noisy gradient; of a batch nothing else is told."""
            begin_batch(step)
            noisy = private.gradient(client.task, client.shard, params, received, list(theta)).to(
                device
            )
            flat = noisy.mean(0)
            weights: list[float] = []
            if objectives is not None and len(noisy) > 1:
                flat, weights = objectives.combined(noisy, theta)
            parts = flat.split([tensor.numel() for tensor in theta.values()])
            for tensor, part in zip(theta.values(), parts, strict=True):
                tensor.grad = part.view_as(tensor)
            for name, weight in zip(client.task.objectives, weights, strict=False):
                name = f"weights/{name}"
                sums[name] = sums.get(name, 0.0) + weight * accumulated

        for step in range(settings.steps):
            # the schedule runs over the whole run; in the middle of the step, half a step ahead of
            # transformers', whose first of few steps has a rate of zero
            progress = (client.round + (step + 0.5) / settings.steps) / client.rounds
            for group in optimiser.param_groups:
                group["lr"] = group["scale"] * rate(settings, progress)
            if private is None:
                learn_all(step)
            else:
                learn_privately(step, private)
            if correct:
                with torch.no_grad():
                    correct(
                        theta,
                        {
                            name: tensor.grad
                            for name, tensor in theta.items()
                            if tensor.grad is not None
                        },
                    )
            norm = torch.nn.utils.clip_grad_norm_(theta.values(), settings.max_grad_norm)
            norms.append(norm)
            optimiser.step()
            optimiser.zero_grad()
    # not before: a number is waited for, and a GPU would be idle meanwhile
    sums["grad_norm"] = sum(map(float, norms)) * accumulated
    metrics = {
        name: value if name.startswith("num_") else value / (settings.steps * accumulated)
        for name, value in sums.items()
    }
    # whom a private batch has is nobody's to know
    seen = len(size.seen) if private is None else len(client.shard)
    if seen < client.least_examples:
        if leaves:
            raise WithheldError(
                f"an update of {seen} distinct examples does not leave; "
                f"{client.least_examples} are the least here"
            )
        metrics = {}
    kept = {
        **(_moments(optimiser, theta) if settings.keep_optimizer else {}),
        **place(moments),
        **({here: size.epochs.state} if size.epochs else {}),
        **{f"{OF_TASK}{name}": tensor for name, tensor in size.kept.items()},
    }
    return {name: tensor.detach().cpu() for name, tensor in theta.items()}, kept, metrics


def _optimiser(
    settings: LocalTraining, theta: Tree, moments: Tree, rates: Mapping[str, float]
) -> torch.optim.Optimizer:
    scales = sorted({rates.get(name, 1.0) for name in theta})
    groups = [
        {"params": [theta[name] for name in theta if rates.get(name, 1.0) == scale], "scale": scale}
        for scale in scales
    ]
    optimiser: torch.optim.Optimizer
    if settings.optim == "adamw":
        betas = (settings.adam_beta1, settings.adam_beta2)
        optimiser = torch.optim.AdamW(
            groups, settings.learning_rate, betas, weight_decay=settings.weight_decay, fused=True
        )
    else:
        optimiser = torch.optim.SGD(
            groups,
            settings.learning_rate,
            settings.momentum,
            weight_decay=settings.weight_decay,
            foreach=True,
        )
    for address in moments.keys() - place(moments).keys():
        tensor = moments[address]
        key, _, name = address.partition("/")
        # the fused kernel trusts shapes, and what comes from elsewhere may have others
        shape = torch.Size() if key == "step" else theta[name].shape if name in theta else None
        if tensor.shape != shape or tensor.dtype != torch.float32 or key not in MOMENTS:
            raise ValueError(f"{address!r} is no moment of what is trained")
        optimiser.state[theta[name]][key] = (
            # copies, for the optimiser changes them in place
            tensor.to(theta[name].device, copy=True)
        )
    return optimiser


def _moments(optimiser: torch.optim.Optimizer, theta: Tree) -> Tree:
    return {
        f"{key}/{name}": value.detach().cpu()
        for name, tensor in theta.items()
        for key, value in optimiser.state[tensor].items()
        if value is not None
    }
