"""What an experiment promises of privacy, and what that costs, in sentences."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fedpref.engines.private_examples import PrivateExamples
from fedpref.engines.private_sums import PrivateSums
from fedpref.experiments.private import (
    Sizes,
    evaluations_of,
    guarantee_of,
    guarantees_of,
    numbers_of,
    rounds_of_client,
    sizes_of,
    template,
)
from fedpref.federation.aggregation import Factors, Product
from fedpref.federation.algorithm import Algorithm
from fedpref.privacy import Privacy
from fedpref.privacy.settings import unit_in_words
from fedpref.tasks.language import LanguageTask

if TYPE_CHECKING:
    from fedpref.experiments.experiment import Experiment
    from fedpref.tasks import Task

JOINING = (
    "privacy: who joins after training fits parts of its own without noise, on which nothing that "
    "is shared depends: these are outside the promise."
)
SPENDS = (PrivateSums.spends, PrivateExamples.spends)  # a round's figures of what has been spent


def spent_of(*rows: Mapping[str, Any]) -> dict[str, float]:
    """Return what has been spent, by the name of its figure: the most that rows of a run say."""
    return {
        name: max(row[name] for row in rows if name in row)
        for name in SPENDS
        if any(name in row for row in rows)
    }


def promised(spec: Experiment, spent: Mapping[str, float]) -> str:
    """Return what was promised of a run and what of it is spent; empty without a promise.

    Args:
        spec: The experiment.
        spent: Epsilon, by the name of its figure.
    """
    said = []
    if (promise := spec.of_clients) and (epsilon := spent.get(PrivateSums.spends)) is not None:
        sampling = "Poisson cohorts" if spec.federation.sampling == "poisson" else "all clients"
        said.append(
            f"epsilon {epsilon:.3g} at delta {promise.delta:g}, of one client that is there or "
            f"not, against {_whom(promise)} (Gaussian noise on sums of clipped changes, "
            f"{sampling})"
        )
    if (promise := spec.of_units) and (epsilon := spent.get(PrivateExamples.spends)) is not None:
        said.append(
            f"epsilon {epsilon:.3g} at delta {promise.delta:g}, of one "
            f"{unit_in_words(promise.unit)} that is there or not, against everybody but that "
            f"client (Gaussian noise on sums of gradients clipped to {promise.norm:g}, "
            "Poisson batches)"
        )
    if not said:
        return ""
    return "; ".join(said) + ", accounted for by privacy loss distributions (dp-accounting)"


def _whom(promise: Privacy) -> str:
    if promise.against == "coordinator":
        return "the coordinator and who gets the model, with noise that sites have added"
    return "who gets the model, with the coordinator trusted"


def in_words_of_sites(spec: Experiment, task: Task, clients: int) -> str:
    """Return what is promised where clients are at sites, which find their own noise.

    Args:
        spec: The experiment.
        task: At work.
        clients: How many there are, newcomers among them.
    """
    said = _clients_in_words(spec, task, clients - spec.federation.num_newcomers)
    if (promise := spec.of_units) is None:
        return said
    how = f"epsilon {promise.epsilon:g}" if promise.epsilon else "epsilon as its noise makes it"
    return (
        f"{said}\nprivacy: {how} at delta {promise.delta:g}, of one "
        f"{unit_in_words(promise.unit)}, against everybody but that client; each site finds the "
        "noise of its clients, and keeps count."
        f"\n{_outside(spec)}"
    ).strip()


def in_words(spec: Experiment, task: Task, shards: Sequence[Any]) -> str:
    """Return what is promised, and what that costs, in sentences; empty without a promise.

    Args:
        spec: The experiment.
        task: At work.
        shards: Of all clients, newcomers among them.
    """
    late = spec.federation.joining([shard.name for shard in shards], spec.seed)
    some = {i: shard for i, shard in enumerate(shards) if i not in late}
    said = (_clients_in_words(spec, task, len(some)), _units_in_words(spec, task, some))
    return "\n".join(filter(None, (*said, _outside(spec))))


def _outside(spec: Experiment) -> str:
    """Return what clients that join learn beside a promise of what a client has."""
    learns = type(spec.algorithm).join is not Algorithm.join
    is_told = spec.of_units is not None and spec.federation.num_newcomers > 0 and learns
    return JOINING if is_told else ""


def _clients_in_words(spec: Experiment, task: Task, clients: int) -> str:
    dimensions = numbers_of(template(spec, task)) if spec.of_clients else 0
    guarantee = guarantee_of(spec, clients, dimensions)
    if guarantee is None or spec.of_clients is None:
        return ""
    evaluations = evaluations_of(spec)
    rounds = Counter({guarantee.kind: rounds_of_client(spec)})
    epsilon = guarantee.spent(rounds + evaluations)
    looks = f" and {evaluations.total()} evaluations" if evaluations else ""
    expected = clients * spec.federation.chance(clients)
    noise = guarantee.noise_multiplier * dimensions**0.5 / expected
    chance = "everybody in every round"
    if expected < clients:
        chance = f"{expected:.3g} of {clients} clients expected in a round"
    return (
        f"privacy: epsilon {epsilon:.3g} at delta {spec.of_clients.delta:g} after {spec.rounds} "
        f"rounds{looks}, of one client that is there or not, against {_whom(spec.of_clients)}; "
        f"noise of {guarantee.noise_multiplier:.3g} clips, {chance}. On {dimensions:,} numbers "
        f"the noise of a round's mean is {noise:.3g} times as long as the longest mean can be. "
        f"{_worth(spec, noise, spec.rounds, 'clients')}"
    ).strip()


def _units_in_words(spec: Experiment, task: Task, shards: Mapping[int, Any]) -> str:
    if (promise := spec.of_units) is None:
        return ""
    sizes = sizes_of(spec, task, shards)
    guarantees = guarantees_of(spec, task, sizes)
    steps = spec.algorithm.noisy_steps * rounds_of_client(spec)
    dimensions = numbers_of(template(spec, task))
    # a mean over the clients has their noise, each its own
    shares = [
        one.noise_multiplier / (one.sampling_probability * sizes[i].units)
        for i, one in guarantees.items()
    ]
    together = dimensions**0.5 * sum(share**2 for share in shares) ** 0.5 / len(shares)
    least, most = min(sizes.values(), key=_examples), max(sizes.values(), key=_examples)
    noises = [one.noise_multiplier for one in guarantees.values()]
    spent = max(one.epsilon(steps) for one in set(guarantees.values()))
    own = dimensions**0.5 * max(shares)
    return (
        f"privacy: epsilon {spent:.3g} at delta {promise.delta:g} after {steps} local steps, of "
        f"one {unit_in_words(promise.unit)} that is there or not, against everybody but that "
        f"client; clients of {least.examples} to {most.examples} examples have noise of "
        f"{min(noises):.3g} to {max(noises):.3g} clips. On {dimensions:,} numbers the noise of a "
        f"step's mean gradient is up to {own:.3g} times as long as the longest mean can be, and "
        f"over all clients together {together:.3g} times. "
        f"{_worth(spec, together, steps, 'rows')}"
    ).strip()


def _examples(size: Sizes) -> int:
    return size.examples


def _worth(spec: Experiment, noise: float, times: int, more: str) -> str:
    """Return what would help where noise drowns what is learned: what is not so already."""
    if noise <= 10 / times**0.5:
        return ""
    helps = []
    if isinstance(spec.algorithm.aggregate, Factors | Product):
        helps.append("aggregate: frozen-a")
    if isinstance(spec.task, LanguageTask) and spec.task.model.lora_r > 1:
        helps.append("a smaller rank")
    if times > 1:
        helps.append("fewer rounds")
    others = f"{', '.join(helps)} or " if helps else ""
    return f"Little can be learned through that: take {others}more {more}."
