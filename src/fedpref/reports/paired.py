"""Lines of a run against each other, pair by pair: gains with errors that know shared prompts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedpref.experiments.finished import FinishedRun
from fedpref.experiments.run_directory import OUTCOMES, client_path
from fedpref.experiments.run_files import OUTCOMES as FORM
from fedpref.experiments.run_files import read_json

RESAMPLES = 2000

# of each held-out example: a digest of its prompt, and whether the model was right
Outcomes = Mapping[str, list[tuple[str, float]]]


@dataclass(frozen=True)
class Gain:
    """What a line has over another.

    Attributes:
        mean: Over clients, in points of accuracy.
        error: Its standard error, by a bootstrap over prompts.
        prompts: Held-out prompts.
        clients: Each client's gain, in points.
    """

    mean: float
    error: float
    prompts: int
    clients: Mapping[str, float]

    @property
    def in_errors(self) -> float:
        """The gain in standard errors; 0 where nothing differs."""
        return self.mean / self.error if self.error else 0.0

    @property
    def is_told(self) -> bool:
        """Whether the gain, or the loss, is more than two standard errors."""
        return abs(self.mean) > 2 * self.error


def outcomes(run: Path, line: str) -> Outcomes:
    """Return what came of each held-out example, by client; empty where it was not kept."""
    finished = FinishedRun.at(run)
    folder = finished.lines[line].path
    found = {name: client_path(folder, OUTCOMES, name, ".json") for name in finished.clients}
    return {name: read_json(file, FORM) for name, file in found.items() if file}


def gain(ours: Outcomes, theirs: Outcomes) -> Gain | None:
    """Return what one line has over another on the same examples; None where these differ.

    Clients count alike. Prompts are drawn again, with all pairs and all clients that have them:
    pairs of one prompt share its answers, and are not so many pieces of evidence.
    """
    names = [name for name in ours if name in theirs]
    if not names or any(
        [prompt for prompt, _ in ours[name]] != [prompt for prompt, _ in theirs[name]]
        for name in names
    ):
        return None
    numbers: dict[str, int] = {}
    places, apart = [], []
    for name in names:
        places.append(np.array([numbers.setdefault(p, len(numbers)) for p, _ in ours[name]]))
        apart.append(
            np.array([a - b for (_, a), (_, b) in zip(ours[name], theirs[name], strict=True)])
        )
    rng = np.random.default_rng(0)
    drawn = rng.multinomial(
        len(numbers), np.full(len(numbers), 1 / len(numbers)), size=RESAMPLES
    ).astype(float)
    sums = np.zeros(RESAMPLES)
    for place, difference in zip(places, apart, strict=True):
        weights = drawn[:, place]
        sums += weights @ difference / np.maximum(weights.sum(1), 1)
    each = {name: 100 * float(d.mean()) for name, d in zip(names, apart, strict=True)}
    mean = sum(each.values()) / len(each)
    return Gain(mean, 100 * float(sums.std(ddof=1)) / len(names), len(numbers), each)


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
    main = next(iter(finished.lines))
    said = []
    for other, one in gains(run).items():
        lost = [name for name, value in one.clients.items() if value < 0]
        up = sum(value > 0 for value in one.clients.values())
        said.append(
            f"{main} against {other}: {one.mean:+.1f} points, standard error {one.error:.1f} "
            f"(paired over {one.prompts} prompts); {up} clients gain, {len(lost)} lose"
            + (f": {', '.join(lost)}" if lost else "")
        )
    known = finished.experiment.data.known_accuracies
    here = [known[name] for name in finished.clients if name in known]
    if here and finished.experiment.evaluate_on == "test":
        said.append(
            f"the tastes by which these preferences were drawn agree with "
            f"{100 * sum(here) / len(here):.1f} % of them: more cannot be reached"
        )
    return said
