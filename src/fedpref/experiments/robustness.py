"""Which experiments can have robust means, and what hostile clients of a simulated one do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING

from fedpref.channel.robust import Mean, Median, NormBound, TrimmedMean, Trust
from fedpref.data import ClientData, Files
from fedpref.data.parsing import forget_columns
from fedpref.data.preferences import Preference
from fedpref.data.unusable import Unusable
from fedpref.engines.gold import Gold
from fedpref.engines.robust_means import RobustMeans
from fedpref.engines.simulation import Turned
from fedpref.errors import UserError
from fedpref.federation.aggregation import Factors, FrozenA, Product
from fedpref.numerics.trees import Tree
from fedpref.tasks import Task
from fedpref.tasks.preference import PreferenceTask

if TYPE_CHECKING:
    from fedpref.experiments.experiment import Experiment


def robust_means(line: Experiment) -> RobustMeans | None:
    """Return what keeps a line's means robust, or looks at them; None for plain ones."""
    rule = line.federation.combine
    return None if isinstance(rule, Mean) and not looks(line) else RobustMeans(rule)


def looks(line: Experiment) -> bool:
    """Return whether a line's changes are compared with what gold pairs teach."""
    is_mean = line.algorithm.sums > 0 and not line.algorithm.pools_data
    return line.federation.gold is not None and is_mean


def gold_of(experiment: Experiment, task: Task) -> Gold | None:
    """Return the pairs that the coordinator holds right, encoded; None without any.

    Raises:
        UserError: The file cannot be read, or a row of it is no pair or cannot be used.
    """
    if experiment.federation.gold is None:
        return None
    file = Path(experiment.federation.gold)
    known = experiment.federation.gold_digest
    if known and file.is_file() and gold_digest(file) != known:
        raise UserError(
            f"federation.gold: {file} is not what the run began with. Put back that file, or begin "
            "the run anew."
        )
    try:
        rows = list(Files(path=experiment.federation.gold).read())
    except UserError as error:
        raise UserError(f"federation.gold: {error}") from error
    for row in rows:
        if isinstance(row, Unusable):
            raise UserError(f"federation.gold: {row}")
        if not isinstance(row, Preference):
            raise UserError(
                f"federation.gold: {row.where} is no pair. Expected rows with prompt, chosen and "
                "rejected."
            )
    pairs = tuple(row for row in rows if isinstance(row, Preference))
    if not pairs:
        raise UserError("federation.gold: there is no row in the file.")
    forget_columns()
    shard = task.encode(ClientData("gold", pairs, ()))
    return Gold(shard, experiment.algorithm.local)


def gold_digest(file: Path) -> str:
    """Return a hash of the file of gold pairs."""
    return blake2b(file.read_bytes(), digest_size=16).hexdigest()


def attacking(line: Experiment, names: Sequence[str]) -> Turned | None:
    """Return what hostile clients make of what they send; None without any."""
    attack = line.attack
    if attack is None:
        return None
    bad = attack.hostile(names, line.seed, line.federation.joining(list(names), line.seed))

    def turned(values: Mapping[int, Tree], told: Tree) -> Mapping[int, Tree]:
        return attack.sent(values, told, bad)

    return turned


def refuse_robust(spec: Experiment) -> None:
    """Raise UserError where means cannot be robust, or an attack cannot be tried."""
    rule, algorithm, attack = spec.federation.combine, spec.algorithm, spec.attack
    aggregate, name = algorithm.aggregate, spec.federation.combine.name
    is_by_number = isinstance(rule, Median | TrimmedMean)
    has_gold = spec.federation.gold is not None
    is_ruled = has_gold or not isinstance(rule, Mean)
    who = "federation.gold" if isinstance(rule, Mean) else f"federation.combine: {name}"
    is_told = any(promise.against == "coordinator" for promise in spec.promises)
    reasons = (
        (
            is_ruled and spec.secrecy is not None,
            f"{who} looks at each client's message, which nobody sees under masks. There the clip "
            "of privacy is the defence",
        ),
        (
            is_ruled and (is_told or spec.of_clients is not None),
            f"{who} depends on all clients' messages, so that noise would not hide one of them. "
            "With privacy of clients their clip is the defence",
        ),
        (
            is_ruled and algorithm.gossips,
            f"{who}: {algorithm.name} has no mean; neighbours tell one another. Set "
            "network.distrust",
        ),
        (
            is_ruled and not algorithm.gossips and not algorithm.sums,
            f"{who}: {algorithm.name} does not send changes of one shape alone, which rules could "
            "lay beside one another. Take mean",
        ),
        (
            is_ruled and spec.federation.clip is not None,
            f"{who} and federation.clip both bound messages. Leave out one",
        ),
        (
            spec.federation.clip is not None and algorithm.gossips,
            f"federation.clip: {algorithm.name} has no mean; neighbours tell one another. Set "
            "network.distrust",
        ),
        (
            spec.federation.clip is not None and not algorithm.gossips and algorithm.sums != 1,
            f"federation.clip: what clients of {algorithm.name} send for means is not one change "
            "each, which could be shortened by itself. Leave it out",
        ),
        (
            spec.federation.clip is not None and isinstance(aggregate, Product),
            "federation.clip is about lengths of changes, and of products the whole is sent. Take "
            "factors or frozen-a",
        ),
        (
            algorithm.weighs_clients and (is_ruled or spec.federation.clip is not None),
            f"{who if is_ruled else 'federation.clip'}: with algorithm.weights clients' weights "
            "are in what they send, and would be judged with it. Take weights: federation",
        ),
        (
            is_ruled and bool(spec.uplink.stages),
            f"{who} and compressed changes do not go together yet. Leave out federation.compress, "
            "or take another algorithm than fed-ef",
        ),
        (
            isinstance(rule, NormBound) and isinstance(aggregate, Product),
            f"{who} is about lengths of changes, and of products the whole is sent. Take "
            "geometric-median, or factors",
        ),
        (
            isinstance(rule, Trust) and not has_gold,
            f"{who} trusts those who agree with gold pairs. Name their file in federation.gold",
        ),
        (
            has_gold and not isinstance(aggregate, Factors | FrozenA | None),
            "federation.gold is about changes of factors, and of products the whole is sent. Take "
            "factors or frozen-a",
        ),
        (
            has_gold and not algorithm.starts_alike,
            f"federation.gold: clients of {algorithm.name} do not all start from the same "
            "adapter, so that what gold pairs teach is nobody's. Leave it out",
        ),
        (
            has_gold and not isinstance(spec.task, PreferenceTask),
            f"federation.gold: gold pairs are for the task preference, and this one is "
            f"{spec.task.name}. Leave them out",
        ),
        (
            is_by_number and not isinstance(aggregate, Factors | FrozenA | None),
            f"{who} looks at single numbers, which products in turned bases have not in common. "
            "Take factors or frozen-a",
        ),
        (
            is_by_number and spec.federation.weighting != "equal",
            f"{who}: clients weigh alike in it. Set federation.weighting to equal",
        ),
        (
            spec.network.distrust is not None and not algorithm.clips_gossip,
            f"network.distrust: {algorithm.name} keeps sums of what neighbours have told, which "
            "would be put out of step, or has no neighbours. Take decdpo, decpdpo or decdpo-stale",
        ),
        (
            attack is not None and spec.engine != "simulation",
            "attack: hostile clients are for simulated runs; sites are real. Leave it out",
        ),
        (
            attack is not None
            and attack.name == "gauge"
            and algorithm.sums > 0
            and not isinstance(aggregate, Factors),
            "attack: gauge is about factors that are averaged apart. Take algorithm.aggregate: "
            "factors",
        ),
    )
    for is_so, reason in reasons:
        if is_so:
            raise UserError(f"{reason}.")
