"""Lines of a run against each other, pair by pair: gains with errors that know shared prompts."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedpref.errors import printable
from fedpref.experiments.experiment import Experiment
from fedpref.experiments.finished import FinishedRun
from fedpref.experiments.run_directory import OUTCOMES, client_path
from fedpref.experiments.run_files import OUTCOMES as FORM
from fedpref.experiments.run_files import read_json
from fedpref.numerics.fairness import fairness

SHOWN = 4  # clients that a sentence names
FEWEST = 5  # prompts of a client, below which an error would be far too small

# of each held-out example: a digest of its prompt, and whether the model was right
Outcomes = Mapping[str, list[tuple[str, float]]]


@dataclass(frozen=True)
class Gain:
    """What a line has over another.

    Attributes:
        mean: Over clients, in points of accuracy.
        error: Its standard error, of prompts drawn anew.
        prompts: Held-out prompts.
        clients: Each client's gain, in points.
        errors: The standard errors of these.
    """

    mean: float
    error: float
    prompts: int
    clients: Mapping[str, float]
    errors: Mapping[str, float]

    @property
    def harmed(self) -> tuple[float, float] | None:
        """The 95 % interval of the share of clients that lose, luck taken out; None for a few."""
        found = fairness([*self.clients.values()], [self.errors[name] for name in self.clients])
        return found.harmed if found else None

    @property
    def is_told(self) -> bool:
        """Whether the gain, or the loss, is more than two standard errors."""
        return abs(self.mean) > 2 * self.error > 0


def outcomes(run: Path, line: str) -> Outcomes:
    """Return what came of each held-out example, by client; empty where it was not kept."""
    return {name: [(row[0], row[1]) for row in some] for name, some in _kept(run, line).items()}


def stated(run: Path, line: str) -> dict[str, list[tuple[float, float]]]:
    """Return how sure a line was of each held-out pair, from 0.5 to 1, and whether it was right.

    By client; empty where no probabilities were kept.
    """
    return {
        name: [(max(row[2], 1 - row[2]), row[1]) for row in some]
        for name, some in _kept(run, line).items()
        if all(len(row) > 2 for row in some)
    }


def _kept(run: Path, line: str) -> dict[str, list[Any]]:
    """Return what clients kept of their held-out examples under a line."""
    finished = FinishedRun.at(run)
    folder = finished.lines[line].path
    found = {name: client_path(folder, OUTCOMES, name, ".json") for name in finished.clients}
    return {name: read_json(file, FORM) for name, file in found.items() if file}


def gain(ours: Outcomes, theirs: Outcomes) -> Gain | None:
    """Return what one line has over another on the same examples.

    Clients count alike. The error is that of a bootstrap that draws prompts anew, with all pairs
    and all clients that have them, in its closed form: pairs of one prompt share its answers, and
    are not so many pieces of evidence. (The sandwich estimator with clusters, Liang and Zeger 1986,
    each client's part for the number of its own prompts.)

    Returns:
        The gain; None where the examples differ, or a client has too few prompts for an error.
    """
    names = [name for name in ours if name in theirs]
    if not names or any(
        [prompt for prompt, _ in ours[name]] != [prompt for prompt, _ in theirs[name]]
        for name in names
    ):
        return None
    parts: defaultdict[str, float] = defaultdict(float)  # of each prompt in the mean's error
    each, errors, least = {}, {}, {}
    for name in names:
        found: defaultdict[str, list[float]] = defaultdict(list)
        for (prompt, a), (_, b) in zip(ours[name], theirs[name], strict=True):
            found[prompt].append(a - b)
        if len(found) < FEWEST:
            return None
        mean, own = _by_prompts(found)
        each[name] = 100 * mean
        # as if half a pair more were won and half a pair lost: no gain is certain of few pairs
        least[name] = 1 / math.sqrt(len(ours[name]) * (len(ours[name]) + 1))
        errors[name] = 100 * max(least[name], math.hypot(*own.values()))
        for prompt, part in own.items():
            parts[prompt] += part / len(names)
    error = max(math.hypot(*parts.values()), math.hypot(*least.values()) / len(names))
    return Gain(sum(each.values()) / len(each), 100 * error, len(parts), each, errors)


def _by_prompts(found: Mapping[str, Sequence[float]]) -> tuple[float, dict[str, float]]:
    """Return the mean of values by prompt, and each prompt's part in its standard error."""
    count = sum(map(len, found.values()))
    mean = sum(map(sum, found.values())) / count
    scale = math.sqrt(len(found) / (len(found) - 1)) / count
    return mean, {
        prompt: scale * (sum(values) - len(values) * mean) for prompt, values in found.items()
    }


def errors(found: Outcomes) -> dict[str, float]:
    """Return the standard error of each client's accuracy, in points, of prompts drawn anew.

    It is no smaller than that of as many pairs of prompts of their own, half a pair of each kind
    added, for a client with all pairs right is not certain. Empty where somebody has too few
    prompts for an error.
    """
    known = {}
    for name, pairs in found.items():
        grouped: defaultdict[str, list[float]] = defaultdict(list)
        for prompt, right in pairs:
            grouped[prompt].append(right)
        if len(grouped) < FEWEST:
            return {}
        share = (sum(right for _, right in pairs) + 0.5) / (len(pairs) + 1)
        binomial = math.sqrt(share * (1 - share) / len(pairs))
        known[name] = 100 * max(binomial, math.hypot(*_by_prompts(grouped)[1].values()))
    return known


def gains(run: Path) -> dict[str, Gain]:
    """Return what a run's own line has over each of its baselines, where pairs were kept."""
    finished = FinishedRun.at(run)
    main, *others = finished.lines
    ours = outcomes(run, main)
    found = {other: gain(ours, outcomes(run, other)) for other in others}
    return {other: one for other, one in found.items() if one}


def sentences(run: Path) -> list[str]:
    """Return in words what a run's own line has over its baselines, and who has lost by it."""
    finished = FinishedRun.at(run)
    main, *others = finished.lines
    kept = outcomes(run, main)
    few = [name for name, pairs in kept.items() if len({prompt for prompt, _ in pairs}) < FEWEST]
    said = []
    if few and others:
        said.append(
            f"{main} is not told from its baselines pair by pair: {_some(few)} held out on fewer "
            f"than {FEWEST} prompts, of which nothing has an error"
        )
    for other, one in gains(run).items():
        lost = [printable(name) for name, value in one.clients.items() if value < 0]
        up = sum(value > 0 for value in one.clients.values())
        said.append(
            f"{main} against {other}: {one.mean:+.1f} points, standard error {one.error:.1f} "
            f"(paired over {one.prompts} prompts); {up} clients gain, {len(lost)} lose"
            + (f": {', '.join(lost)}" if lost else "")
            + (f"; luck taken out, {_share(one.harmed)} of clients lose" if one.harmed else "")
        )
    known = known_accuracies(finished.experiment, finished.clients)
    if known:
        said.append(
            "the tastes by which these preferences were drawn rank "
            f"{100 * sum(known.values()) / len(known):.1f} % of them rightly themselves"
        )
    return said


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(map(printable, names[:SHOWN]))
    if len(names) == 1:
        return f"{shown} is"
    return f"{shown} and {len(names) - SHOWN} more are" if len(names) > SHOWN else f"{shown} are"


def _share(bounds: tuple[float, float]) -> str:
    low, high = (round(100 * bound) for bound in bounds)
    return f"{low} %" if low == high else f"{low} to {high} %"


def known_accuracies(
    experiment: Experiment, clients: Mapping[str, Mapping[str, Any]]
) -> dict[str, float]:
    """Return what the tastes reach by which clients' held-out pairs were drawn.

    It is known of all of a client's pairs, not of some; empty unless it is of all these clients.
    """
    if experiment.task.name != "preference" or experiment.evaluate_on != "test":
        return {}
    known = experiment.data.known_accuracies
    if not all(
        name in known and about["test"] == known[name][1] for name, about in clients.items()
    ):
        return {}
    return {name: known[name][0] for name in clients}
