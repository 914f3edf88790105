"""Which experiments can keep a promise of privacy, and what each round of them costs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from fedpref.channel.noise import DISTANCE
from fedpref.data import Natural
from fedpref.engines.private_examples import PrivateExamples, ToldExamples
from fedpref.engines.private_figures import PrivateFigures
from fedpref.engines.private_sums import PrivateSums
from fedpref.engines.site_privacy import SitePrivacy
from fedpref.errors import UserError
from fedpref.experiments.run_files import EVALUATION, METRICS, read_rows
from fedpref.federation.aggregation import Factors, Product
from fedpref.federation.algorithm import Algorithm
from fedpref.numerics import seeds
from fedpref.numerics.trees import Tree
from fedpref.privacy import Column, FixedClip, Guarantee, Ledger, Privacy, Secret

if TYPE_CHECKING:
    from fedpref.experiments.experiment import Experiment
    from fedpref.experiments.run_directory import RunDirectory
    from fedpref.tasks import Task

EVALUATIONS = "evaluations.jsonl"  # in FOLDER: a ledger of figures that were told with noise
FOLDER = "privacy"  # in a line's directory: its ledgers, and while it runs its secret
LOCAL = frozenset({"alone", "alone-parts", "reward-head"})  # baselines that share nothing
Reasons = Iterable[tuple[bool, str]]
Promise = PrivateSums | PrivateExamples | ToldExamples


def refuse_unaccounted(spec: Experiment) -> None:
    """Raise UserError where an experiment would share what its promises do not cover."""
    if spec.federation.sampling == "poisson" and spec.of_clients is None:
        raise UserError(
            "federation.sampling: poisson is for runs that are private in clients, for a round may "
            "have no client at all. Take uniform, or set privacy with unit: client."
        )
    promises = spec.promises
    if len(promises) > 1 and (len(promises) > 2 or len({p.is_of_clients for p in promises}) < 2):
        raise UserError(
            "privacy: of several promises one is of clients and one of what a client has, two in "
            "all."
        )
    for promise in promises:
        reasons = _of_clients(spec, promise) if promise.is_of_clients else _of_units(spec, promise)
        for is_so, reason in (*_of_all(spec), *reasons):
            if is_so:
                raise UserError(f"privacy, {reason}.")


def refuse_seen(spec: Experiment) -> None:
    """Raise UserError where sums that nobody sees the parts of cannot be."""
    if spec.secrecy is None:
        return
    reasons = (
        (
            spec.algorithm.gossips,
            f"algorithm: {spec.algorithm.name} has no sum; neighbours tell one another",
        ),
        (
            spec.federation.clip is not None,
            "federation.clip: the coordinator cannot shorten what it does not see. Set privacy, "
            "whose clip is the client's",
        ),
        (
            spec.algorithm.sums_apart,
            f"algorithm: what clients of {spec.algorithm.name} send is summed group by group, and "
            "a group of one client is its own sum. Take feddpo, or ditto and the like for models "
            "of clients' own",
        ),
        (
            spec.federation.concurrency is not None,
            "federation.concurrency: clients whose start is too old add zeros, and the coordinator "
            "knows who they are, so that a sum may be one client's. Leave it out",
        ),
        (
            spec.algorithm.weighs_clients,
            "algorithm.weights: what is multiplied by a client's points is beyond what sums of "
            "integers hold. Set it to federation",
        ),
        (bool(spec.diagnostics), "diagnostics: they tell the coordinator of each client"),
    )
    for is_so, reason in reasons:
        if is_so:
            raise UserError(f"secrecy, {reason}.")


def _of_all(spec: Experiment) -> Reasons:
    published = sorted({*spec.baselines} - LOCAL)
    is_kept, choosing = spec.telling == "each", spec.stop is not None or spec.keep == "best"
    return (
        (
            not is_kept and bool(spec.baselines),
            "metrics: figures of baselines would be told as they are. Leave baselines out",
        ),
        (
            spec.telling == "none" and choosing,
            "metrics: with none there is nothing that stop and keep could choose by. Leave them "
            "out",
        ),
        (
            spec.telling == "private" and not spec.task.compares_by_shares,
            f"metrics: what the task {spec.task.name} compares clients by has no bounds, which "
            "noise needs. Take none",
        ),
        (bool(spec.diagnostics), "diagnostics: they are sums without noise. Leave them out"),
        (
            bool(published),
            f"baselines: {', '.join(published)} would be published without a promise. Take alone, "
            "alone-parts or reward-head, which share nothing",
        ),
    )


def _of_clients(spec: Experiment, promise: Privacy) -> Reasons:
    federation, algorithm, aggregate = spec.federation, spec.algorithm, spec.algorithm.aggregate
    is_part = federation.clients_per_round is not None
    return (
        (
            not algorithm.sums,
            f"algorithm: {algorithm.name} {_sends(algorithm)}, which is not accounted for. Take "
            "feddpo, fedpdpo or another one that shares means of changes alone; or a unit of what "
            "a client has",
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
            algorithm.shares_parts_once,
            "algorithm.share_bottleneck: its beginning is averaged without noise. Set it to false",
        ),
        (
            algorithm.weighs_clients,
            "algorithm.weights: by points a mean tells how many a client has. Set it to federation",
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
            algorithm.sums > 1 and not isinstance(promise.clip, FixedClip),
            f"clip: {algorithm.name} has {algorithm.sums} sums in a round, and a quantile is of "
            "one. Take fixed",
        ),
        (
            promise.against == "coordinator" and spec.secrecy is None,
            "against: the coordinator sees what each client sends. Set secrecy: {name: masks}",
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
        (
            spec.stop is not None or spec.keep == "best",
            "stop and keep: what they choose by is not private. Leave them out",
        ),
    )


def _sends(algorithm: Algorithm[Any]) -> str:
    if algorithm.gossips:
        return "lets clients tell neighbours what they have before it has noise"
    return "shares more, or other, than means of changes of one shape"


def _of_units(spec: Experiment, promise: Privacy) -> Reasons:
    algorithm, task, local = spec.algorithm, spec.task, spec.algorithm.local
    kind = "column" if isinstance(promise.unit, Column) else promise.unit
    known = ", ".join(sorted(task.units))
    why = f"it has {known}" if known else "its losses are not sums over them"
    return (
        (
            kind not in task.units,
            f"unit: the task {task.name} cannot tell one {kind} from another: {why}",
        ),
        (
            not algorithm.sends_local_steps,
            f"algorithm: {algorithm.name} sends more than what comes of private local steps, or "
            "chooses by raw rows",
        ),
        (
            algorithm.weighs_clients,
            "algorithm.weights: by points a mean tells how many a client has. Set it to federation",
        ),
        (
            task.needs_critics,
            "task.estimator: critics are trained on raw rewards and feed the policy. Take rloo or "
            "grpo",
        ),
        (
            local.num_iterations > 1,
            "algorithm.local.num_iterations: each update on what was drawn is a query of its own. "
            "Set it to 1",
        ),
        (
            local.max_tokens_per_batch is not None,
            "algorithm.local.max_tokens_per_batch: how many rows fill it hangs on them. Set "
            "batch_size",
        ),
    )


# ---- of clients


def guarantee_of(
    spec: Experiment, clients: int, dimensions: int = 0, parts: int = 1
) -> Guarantee | None:
    """Return what a round's noisy sum costs; None without privacy of clients.

    Args:
        spec: The experiment.
        clients: How many train.
        dimensions: Of what each sends; 0 where that is not known yet.
        parts: How many add a part of the noise, where sites do.

    Raises:
        UserError: No noise keeps all rounds within the budget; delta is too large for so few.
    """
    if (privacy := spec.of_clients) is None:
        return None
    _refuse_large(privacy, clients, "clients")
    inexact, most = dimensions * DISTANCE, spec.federation.max_participations
    if privacy.against == "coordinator":  # which draws cohorts itself
        rounds = rounds_of_client(spec)
        inexact *= parts
        if privacy.noise_multiplier is not None:
            return Guarantee(privacy.noise_multiplier, 1.0, privacy.delta, inexact, True)
        return Guarantee.of_discrete(float(privacy.epsilon or 0), privacy.delta, rounds, inexact)
    beside = evaluations_of(spec)
    if most is None:
        chance = spec.federation.chance(clients)
        return _guarantee(privacy, chance, spec.rounds, inexact, beside)
    # whether a client is still drawn hangs on whether it was: chance hides nothing of it
    return _guarantee(privacy, 1.0, min(most, spec.rounds), inexact, beside)


def evaluations_of(spec: Experiment) -> Counter[tuple[float, float]]:
    """Return what private evaluations will have cost; nothing where there are none."""
    privacy = spec.of_clients
    if privacy is None or privacy.tells != "private":
        return Counter()
    looks = sum(spec.looks_after(done) for done in range(1, spec.rounds + 1))
    return Counter({(privacy.metrics_noise, 1.0): looks + spec.evaluate_on_start + 1})


def _rounds_seen(spec: Experiment) -> int:
    """Return over how many rounds the cost of a client's sums is counted."""
    promise = spec.of_clients
    by_part = promise is not None and promise.against == "coordinator"
    return rounds_of_client(spec) if by_part else spec.rounds


def rounds_of_client(spec: Experiment) -> int:
    """Return how many rounds a client takes part in at most."""
    return min(spec.rounds, spec.federation.max_participations or spec.rounds)


def _guarantee(
    privacy: Privacy,
    chance: float,
    sums: int,
    inexact: float,
    beside: Mapping[tuple[float, float], int] = MappingProxyType({}),
) -> Guarantee:
    if privacy.noise_multiplier is not None:
        return Guarantee(privacy.noise_multiplier, chance, privacy.delta, inexact)
    return Guarantee.of(float(privacy.epsilon or 0), privacy.delta, chance, sums, inexact, beside)


def _refuse_large(privacy: Privacy, units: int, what: str) -> None:
    if privacy.delta > 1 / units:
        raise UserError(
            f"privacy.delta: {privacy.delta:g} is more than one over the {units} {what}, of "
            "which it would let one be published whole. Take a smaller one."
        )


def private_sums(
    spec: Experiment, task: Task, clients: int, folder: Path, parts: int = 1
) -> PrivateSums | None:
    """Return what keeps a line's sums private; None without privacy of clients.

    Args:
        spec: The line.
        task: At work.
        clients: How many train.
        folder: The line's directory, which has its secret and its ledger.
        parts: How many add a part of the noise, where sites do.
    """
    if spec.of_clients is None:
        return None
    sent = template(spec, task)
    guarantee = guarantee_of(spec, clients, numbers_of(sent), parts)
    if guarantee is None:
        return None
    room, chance = folder / FOLDER, spec.federation.chance(clients)
    secret, evaluations = secret_of(folder), None
    if planned := evaluations_of(spec):
        noise, ledger = spec.of_clients.metrics_noise, Ledger.at(room, EVALUATIONS)
        evaluations = PrivateFigures(secret, ledger, noise, clients, planned.total())
    made = PrivateSums(
        secret,
        Ledger.at(room),
        guarantee,
        spec.of_clients.epsilon,
        spec.of_clients.clip,
        clients * chance,
        sent,
        chance=chance,
        sums=spec.algorithm.sums,
        most=spec.federation.max_participations,
        evaluations=evaluations,
    )
    # of words of 32 bits, in the worst case: all clients' whole length, and noise, in one number
    if spec.secrecy and clients * made.lattice.most + 16 * made.lattice.deviation >= 2**31:
        raise UserError(
            f"secrecy: sums of {clients} clients do not fit into 32 bits with noise of "
            f"{guarantee.noise_multiplier:.3g} clips. Take more noise, or no secrecy."
        )
    return made


def numbers_of(tree: Tree) -> int:
    """Return how many numbers a tree holds."""
    return sum(tensor.numel() for tensor in tree.values())


def template(spec: Experiment, task: Task) -> Tree:
    """Return a tree of the names and shapes that clients send."""
    return spec.algorithm.sent(task.init(seeds.generator(spec.seed, "init")))


# ---- of what a client has


@dataclass(frozen=True)
class Sizes:
    """How much a client has.

    Attributes:
        examples: To train on.
        units: That these are of.
        chance: Of each unit to be in a batch.
    """

    examples: int
    units: int
    chance: float


def sizes_of(spec: Experiment, task: Task, shards: Mapping[int, Any]) -> dict[int, Sizes]:
    """Return how much each client has; none without privacy of what it has."""
    if (promise := spec.of_units) is None:
        return {}
    batch = _batch(spec)
    return {
        i: Sizes(
            len(shard),
            len(set(task.units(shard, promise.unit))),
            task.private_batch(shard, batch)[0],
        )
        for i, shard in shards.items()
        if len(shard)
    }


def _batch(spec: Experiment) -> int:
    local = spec.algorithm.local
    return local.batch_size * local.gradient_accumulation_steps


def guarantees_of(spec: Experiment, task: Task, sizes: Mapping[int, Sizes]) -> dict[int, Guarantee]:
    """Return what a private step of each client costs.

    Each has noise of its own, so that all have the same epsilon if they take part in every round.

    Raises:
        UserError: No noise keeps a client within the budget; delta is too large for one.
    """
    if (promise := spec.of_units) is None:
        return {}
    steps = spec.algorithm.noisy_steps * rounds_of_client(spec)
    inexact = _trained(spec, task) * DISTANCE
    found = {}
    for i, size in sizes.items():
        _refuse_large(promise, size.units, f"units of client {i}")
        found[i] = _guarantee(promise, size.chance, steps, inexact)
    return found


def _trained(spec: Experiment, task: Task) -> int:
    """Return how many numbers have noise in a step, at most."""
    numbers = numbers_of(template(spec, task))
    if spec.algorithm.parts:
        numbers += numbers_of(task.parts(spec.algorithm.parts, seeds.generator(spec.seed, "check")))
    return numbers * len(task.objectives)


def private_examples(
    spec: Experiment, task: Task, shards: Mapping[int, Any], folder: Path
) -> PrivateExamples | None:
    """Return what keeps a line's local steps private; None without a promise of that.

    Args:
        spec: The line.
        task: At work.
        shards: Of the clients that train.
        folder: The line's directory, which has its secret and its ledgers.
    """
    if (promise := spec.of_units) is None:
        return None
    room = folder / FOLDER
    return PrivateExamples(
        secret_of(folder),
        room,
        {i: shard.name for i, shard in shards.items()},
        guarantees_of(spec, task, sizes_of(spec, task, shards)),
        promise.unit,
        promise.norm,
        _batch(spec),
        promise.epsilon,
        spec.algorithm.noisy_steps,
        spec.algorithm.noisy_steps * rounds_of_client(spec),
    )


def site_privacy(
    spec: Experiment,
    task: Task,
    shards: Mapping[str, Any],
    folder: Path,
    limits: Mapping[str, float],
) -> Callable[[Mapping[int, str], int, int, Path], SitePrivacy | None]:
    """Return a function to what a site keeps its clients private by; see `Hosted.privacy`.

    Args:
        spec: The experiment.
        task: At work.
        shards: Of the site's clients, by name.
        folder: The run's at the site.
        limits: Of the site; see `SitePrivacy`.
    """

    def settled(
        names: Mapping[int, str], clients: int, parts: int, root: Path
    ) -> SitePrivacy | None:
        if not spec.promises:
            return None
        late = spec.federation.newcomers
        named = () if isinstance(late, int) else late
        some = {i: shards[name] for i, name in names.items() if name not in named}
        count = clients - spec.federation.num_newcomers
        sums = private_sums(spec, task, count, folder, parts)
        planned = math.inf
        if sums is not None:
            planned = sums.budget or sums.guarantee.epsilon(_rounds_seen(spec))
        examples = private_examples(spec, task, some, folder)
        return SitePrivacy(folder / FOLDER, names, sums, planned, examples, limits, root)

    return settled


def told_examples(spec: Experiment) -> ToldExamples | None:
    """Return what hears of sites' private steps; None without a promise of that."""
    return ToldExamples(spec.of_units.epsilon) if spec.of_units else None


def secret_of(folder: Path) -> Secret:
    """Return a line's secret; a new one where nothing was drawn yet, or nothing is to be any more.

    Raises:
        UserError: It is gone, or is none.
    """
    looks = folder / EVALUATION
    is_over = looks.exists() and any(row.get("final") for row in read_rows(looks))
    return Secret.of(folder / FOLDER, is_over=is_over)


def refuse_lost(promises: Iterable[Promise], folder: RunDirectory, rounds: int) -> None:
    """Raise UserError where ledgers say less than what has been done has cost.

    Args:
        promises: Of a line.
        folder: The line's directory, with the rows of rounds that will be done again too.
        rounds: How many rounds the last checkpoint has.
    """
    rows = folder.read_rows(METRICS)
    told = [*rows, *folder.read_rows(EVALUATION)]
    last = next((row for row in rows if row["round"] == rounds), None)
    if rounds and last is None:
        raise UserError(
            f"{folder.path / METRICS}: the row of round {rounds} is gone, which says how the run "
            "goes on and what it has spent. Put the file back; without it the run cannot go on."
        )
    for promise in promises:
        # what rounds and evaluations have cost stands beside their figures
        known = [row[promise.spends] for row in told if promise.spends in row]
        promise.resume({promise.spends: max(known, default=0.0)})
        if last is not None:
            promise.resume(last)
        if promise.epsilon < max(known, default=math.inf if rounds else 0.0) * (1 - 1e-6):
            raise UserError(
                f"{folder.path / FOLDER}: its ledgers say less than what has been done has cost; "
                "what has been spent is not known. The run cannot go on."
            )
