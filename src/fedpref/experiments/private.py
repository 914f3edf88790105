"""Which experiments can keep a promise of privacy, and what each round of them costs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fedpref.channel.noise import DISTANCE
from fedpref.data import Natural
from fedpref.engines.private_sums import PrivateSums
from fedpref.errors import UserError
from fedpref.federation.aggregation import Factors, Product
from fedpref.numerics import seeds
from fedpref.numerics.trees import Tree
from fedpref.privacy import Guarantee, Ledger, Secret

if TYPE_CHECKING:
    from fedpref.experiments.experiment import Experiment
    from fedpref.tasks import Task

FOLDER = "privacy"  # in a line's directory: its ledger, and while it runs its secret
LOCAL = frozenset({"alone", "alone-parts", "reward-head"})  # baselines that share nothing


def refuse_unaccounted(spec: Experiment) -> None:
    """Raise UserError where an experiment would share what its promise does not cover."""
    federation, algorithm, aggregate = spec.federation, spec.algorithm, spec.algorithm.aggregate
    if spec.privacy is None:
        if federation.sampling == "poisson":
            raise UserError(
                "federation.sampling: poisson is for private runs, for a round may have no "
                "client at all. Take uniform, or set privacy."
            )
        return
    published = sorted({*spec.baselines} - LOCAL)
    is_part = federation.clients_per_round is not None
    reasons = (
        (
            spec.engine != "simulation",
            "engine: private sums over sites are not there yet. Take simulation",
        ),
        (
            not algorithm.sends_one_change,
            f"algorithm: {algorithm.name} sends more, or other, than one sum of changes a round, "
            "which is not accounted for yet. Take feddpo, fedprox, fedopt, ffa-lora, ditto, "
            "fedper, feddpa or fedpdpo",
        ),
        (
            isinstance(aggregate, Product),
            "algorithm.aggregate: products of factors have no bounded norm. Take frozen-a, which "
            "is exact and of half the numbers",
        ),
        (
            isinstance(aggregate, Factors) and aggregate.residual,
            "algorithm.aggregate.residual: the clip does not bound what it sends. Set it to false",
        ),
        (
            getattr(algorithm, "share_bottleneck", False),
            "algorithm.share_bottleneck: its beginning is averaged without noise. Set it to false",
        ),
        (
            federation.weighting != "equal",
            "federation.weighting: by examples a mean tells how many a client has. Set it to equal",
        ),
        (
            is_part and federation.sampling != "poisson",
            "federation.sampling: cohorts of a fixed size cannot usefully be accounted for. Take "
            "poisson, or everybody (clients_per_round: null)",
        ),
        (
            federation.clip is not None,
            "federation.clip: privacy.clip bounds changes. Leave it out",
        ),
        (
            federation.deadline is not None,
            "federation.deadline: whoever is drawn takes part. Leave it out",
        ),
        (
            isinstance(federation.newcomers, int) and federation.newcomers > 0,
            "federation.newcomers: who joins may not hang on how many there are. Name them",
        ),
        (
            not isinstance(spec.partition, Natural)
            or spec.partition.max_clients is not None
            or spec.partition.clients_per_value > 1,
            "partition: whose rows are whose may not hang on others. Take natural, without "
            "max_clients and clients_per_value",
        ),
        (bool(spec.diagnostics), "diagnostics: they are sums without noise. Leave them out"),
        (
            spec.stop is not None or spec.keep == "best",
            "stop and keep: what they choose by is not private. Leave them out",
        ),
        (
            bool(published),
            f"baselines: {', '.join(published)} would be published without a promise. Take alone, "
            "alone-parts or reward-head, which share nothing",
        ),
    )
    for is_so, reason in reasons:
        if is_so:
            raise UserError(f"privacy, {reason}.")


def guarantee_of(spec: Experiment, clients: int, dimensions: int = 0) -> Guarantee | None:
    """Return what a round's noisy sum costs; None without privacy.

    Args:
        spec: The experiment.
        clients: How many train.
        dimensions: Of what each sends; 0 where that is not known yet.

    Raises:
        UserError: No noise keeps all rounds within the budget; delta is too large for so few.
    """
    if (privacy := spec.privacy) is None:
        return None
    if privacy.delta > 1 / clients:
        raise UserError(
            f"privacy.delta: {privacy.delta:g} is more than one over the {clients} clients, of "
            "which it would let one be published whole. Take a smaller one."
        )
    chance, inexact = spec.federation.chance(clients), dimensions * DISTANCE
    if privacy.noise_multiplier is not None:
        return Guarantee(privacy.noise_multiplier, chance, privacy.delta, inexact)
    budget = float(privacy.epsilon or 0)
    return Guarantee.of(budget, privacy.delta, chance, spec.rounds, inexact)


def private_sums(spec: Experiment, task: Task, clients: int, folder: Path) -> PrivateSums | None:
    """Return what keeps a line's sums private; None without privacy.

    Args:
        spec: The line.
        task: At work.
        clients: How many train.
        folder: The line's directory, which has its secret and its ledger.
    """
    if spec.privacy is None:
        return None
    sent = template(spec, task)
    guarantee = guarantee_of(spec, clients, _numbers(sent))
    if guarantee is None:
        return None
    room = folder / FOLDER
    return PrivateSums(
        Secret.of(room),
        Ledger.at(room),
        guarantee,
        spec.privacy.epsilon,
        spec.privacy.clip.norm,
        clients * guarantee.sampling_probability,
        sent,
    )


def _numbers(tree: Tree) -> int:
    return sum(tensor.numel() for tensor in tree.values())


def template(spec: Experiment, task: Task) -> Tree:
    """Return a tree of the names and shapes that clients send."""
    return spec.algorithm.sent(task.init(seeds.generator(spec.seed, "init")))


def in_words(spec: Experiment, task: Task, clients: int) -> str:
    """Return what is promised, and what that costs, in sentences; empty without a promise.

    Args:
        spec: The experiment.
        task: At work.
        clients: How many there are, newcomers among them.
    """
    clients -= spec.federation.num_newcomers
    dimensions = _numbers(template(spec, task)) if spec.privacy else 0
    guarantee = guarantee_of(spec, clients, dimensions)
    if guarantee is None or spec.privacy is None:
        return ""
    epsilon, expected = guarantee.epsilon(spec.rounds), clients * guarantee.sampling_probability
    noise = guarantee.noise_multiplier * dimensions**0.5 / expected
    chance = "everybody in every round"
    if guarantee.sampling_probability < 1:
        chance = f"{expected:.3g} of {clients} clients expected in a round"
    worth = (
        "Little can be learned through that: take aggregate: frozen-a, a small rank, fewer rounds "
        "or more clients."
        if noise > 10 / spec.rounds**0.5
        else ""
    )
    return (
        f"privacy: epsilon {epsilon:.3g} at delta {spec.privacy.delta:g} after {spec.rounds} "
        f"rounds, of one client that is there or not, against who gets the model; noise of "
        f"{guarantee.noise_multiplier:.3g} clips, {chance}. On {dimensions:,} numbers the noise of "
        f"a round's mean is {noise:.3g} times as long as the longest mean can be. {worth}"
    ).strip()
