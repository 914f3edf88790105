"""What a run comes to, in words and numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fedpref.experiments.free_baselines import FREE_LINES
from fedpref.experiments.promises import promised, spent_of
from fedpref.experiments.rounds import ENDED
from fedpref.experiments.run_directory import CONFIG
from fedpref.experiments.run_files import HELD_OUT
from fedpref.models.named import BUILTIN
from fedpref.numerics.intervals import interval, why_none
from fedpref.numerics.metrics import ACCURACY, COMBINED, Headline
from fedpref.reports.page import sums
from fedpref.reports.paired import Gain
from fedpref.reports.run import Run
from fedpref.reports.tables import bytes_text
from fedpref.rewards.reward import plain

SAMPLES = 12  # answers shown of each run
NOT_TOLD = ", which cannot be told from none"
MEANINGS = {
    "alone": "alone is each client's own model, trained on its own data",
    "feddpo": "feddpo is one shared model, by federated averaging",
    "pooled": "pooled is one model on all data together",
    "words-alone": "words are regressions on word counts and lengths",
    "probe-alone": "probes are regressions on the untrained model's hidden states",
    "words-personal": "personal is the pooled regression with each client's own slopes",
    "length": "length is the longer answer",
    "majority": "majority is the mean of what the other groups answered to the same question, "
    "held-out answers too",
}


def with_interval(
    values: Mapping[str, float], digits: int, sign: str = "", shown: Headline | None = None
) -> str:
    """Return the 95 % interval of a mean over clients, in brackets, or why there is none.

    Args:
        values: A value of each client.
        digits: How many follow the point.
        sign: "+" for differences.
        shown: The metric whose range a mean cannot leave; None for differences.
    """
    low, high = _bounds(values)
    if shown is not None:
        low, high = shown.within(low, high)
    if math.isnan(low):
        return f" ({reason})" if (reason := why_none(1, len(values))) else ""
    return f" [{low:{sign}.{digits}f}, {high:{sign}.{digits}f}]"


def _bounds(values: Mapping[str, float]) -> tuple[float, float]:
    return interval(np.array([list(values.values())]))


def told(run: Run) -> dict[str, Any]:
    """Return what the page says of a run."""
    # the first of each client first
    ranked = sorted(
        (k, client, row) for client, rows in run.samples.items() for k, row in enumerate(rows)
    )
    return {
        "title": run.title,
        "words": sums.words(run) if run.is_summed else words(run),
        "cards": sums.cards(run) if run.is_summed else cards(run),
        "facts": {name: text for name, text in facts(run).items() if text},
        "config": (run.path / CONFIG).read_text(),
        "samples": [
            (client, {**row, "prompt": plain(row["prompt"])}) for _, client, row in ranked[:SAMPLES]
        ],
        "all_samples": len(ranked),
    }


def words(run: Run) -> str:
    """Return a sentence of who took part, what came of it, and who has what of it."""
    values, digits = run.values(), run.shown.digits
    mean, worst, best = (
        _mean(values),
        min(values, key=values.__getitem__),
        max(values, key=values.__getitem__),
    )
    rounds = (
        f"{len(run.line.metrics)} of {run.experiment.rounds} rounds of "
        f"{run.experiment.algorithm.name}"
    )
    joined = len(next(iter(run.newcomers.values()))[1]) if run.newcomers else 0
    said = [
        f"{clients(run.population)} trained {rounds}"
        + (f", of which {len(values):,} were evaluated" if len(values) < run.population else "")
        + (f", {joined} joined afterwards" if joined else "")
    ]
    said[0] += f"; their mean held-out {run.shown.title} is {mean:.{digits}f}"
    if gained := run.gains("alone"):
        gains = f"against training alone that is {_mean(gained):+.{digits}f} points"
        if paired := run.paired.get("alone"):
            said.append(f"{gains}, {_error(paired)}{'' if paired.is_told else NOT_TOLD}")
        else:
            said.append(f"{gains}{with_interval(gained, digits, '+')}{_doubt(gained)}")
        said.append(_counted(gained, run.noise("alone")))
    if better := _better_for_nothing(run, mean):
        said.append(better)
    if values[best] > values[worst]:
        said.append(
            f"the best client is {best} ({values[best]:.{digits}f}), the worst {worst} "
            f"({values[worst]:.{digits}f})"
        )
    return "; ".join(said) + "."


def _better_for_nothing(run: Run, mean: float) -> str:
    """Return which line that costs nothing is ahead of the run's own, and by how much."""
    free = {
        name: _mean(run.values(line))
        for name, line in run.baselines.items()
        if name in FREE_LINES and line.last
    }
    ahead = max(free, key=free.__getitem__, default="")
    if not ahead or free[ahead] <= mean:
        return ""
    return (
        f"{ahead}, which trains no language model, reaches "
        f"{free[ahead]:.{run.shown.digits}f}, more than that"
    )


def _doubt(gained: Mapping[str, float]) -> str:
    """Return what is to be said where a mean gain may be none."""
    low, high = _bounds(gained)
    return "" if low > 0 or high < 0 else NOT_TOLD


def _error(gain: Gain) -> str:
    return f"standard error {gain.error:.1f} over {gain.prompts} prompts"


def _counted(gained: Mapping[str, float], noise: Mapping[str, float]) -> str:
    """Return which clients surely gain and lose, or how many where luck cannot be told."""
    if not noise:
        up, down = (sum(way * value > 0 for value in gained.values()) for way in (1, -1))
        return f"{clients(up)} gain{'s' if up == 1 else ''}, {down} lose{'s' if down == 1 else ''}"
    surely = surely_told(gained, noise)
    texts = [
        f"surely {word}: {_listed(surely[way])}" for word, way in (("better", 1), ("worse", -1))
    ]
    rest = len(gained) - sum(map(len, surely.values()))
    return ", ".join([*texts, *([f"for {rest} it may be luck"] if rest else [])])


def surely_told(gained: Mapping[str, float], noise: Mapping[str, float]) -> dict[int, list[str]]:
    """Return who gains (1) and who loses (-1) by more than two standard errors of its pairs."""
    ranked = sorted(gained, key=lambda name: -abs(gained[name]))
    return {way: [n for n in ranked if way * gained[n] > noise[n]] for way in (1, -1)}


def _listed(names: Sequence[str], most: int = 6) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more if names else "none"


def cards(run: Run) -> list[tuple[str, str, str]]:
    """Return the numbers that come first: a name, a value, a note."""
    values, digits, rounds = run.values(), run.shown.digits, max(1, len(run.line.metrics))
    mean, worst = _mean(values), min(values, key=values.__getitem__)
    up, down, seconds = (
        sum(run.line.column(name)) for name in ("bytes_up", "bytes_down", "seconds")
    )
    trained = [run.clients[name]["train"] for name in run.trained]
    held = sum(run.clients[name]["test"] for name in values)
    tiles = [
        (
            "who took part",
            f"{run.population:,}",
            f"{'client' if run.population == 1 else 'clients'} with {min(trained):,} to "
            f"{max(trained):,} examples to train on, {held:,} held out together"
            + (f" by the {len(values):,} evaluated" if len(values) < run.population else ""),
        ),
        (
            f"held-out {run.shown.caption}",
            f"{mean:.{digits}f}",
            f"mean over clients{with_interval(values, digits, shown=run.shown)}",
        ),
    ]
    if both_rewards := [row[COMBINED] for row in run.line.last.values() if COMBINED in row]:
        value = run.shown.scale * sum(both_rewards) / len(both_rewards)
        tiles.append(("with reward heads", f"{value:.{digits}f}", "ranked by policy and head"))
    gains = {name: gained for name in run.baselines if (gained := run.gains(name))}
    tiles += [
        (
            f"against {name}",
            f"{_mean(some):+.{digits}f}",
            f"points, {_error(run.paired[name])}"
            if name in run.paired
            else f"points{with_interval(some, digits, '+')}",
        )
        for name, some in gains.items()
    ]
    if run.metric == ACCURACY and (known := run.known_accuracies):
        reached = f"{100 * _mean(known):.1f}"
        tiles.append(("by their tastes", reached, "what the tastes themselves rank rightly"))
    for kind, some in run.of_attack.items():
        of_kind = {name: values[name] for name in some}
        note = f"{clients(len(some))}, mean, under an attack"
        tiles.append((kind, f"{_mean(of_kind):.{digits}f}", note))
    tiles.append(("worst client", f"{values[worst]:.{digits}f}", worst))
    if both := run.newcomers.get(run.line.name):
        before, after = both
        note = f"{clients(len(after))}, mean; {_mean(before):.{digits}f} as they came"
        tiles.append(("newcomers", f"{_mean(after):.{digits}f}", note))
    if (alone := gains.get("alone")) and (noise := run.noise("alone")):
        surely = surely_told(alone, noise)
        tiles.append(
            (
                "surely better, surely worse",
                f"{len(surely[1])}, {len(surely[-1])}",
                "clients against alone, beyond two standard errors; for the rest it may be luck",
            )
        )
    if (paired := run.paired.get("alone")) and paired.harmed:
        low, high = (round(100 * bound) for bound in paired.harmed)
        note = "of clients against alone, with the luck of few pairs taken out"
        tiles.append(("worse off", f"{low} to {high} %", note))
    time = f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 60:.0f} min"
    cost = f"in rounds; {bytes_text(up / rounds)} up and {bytes_text(down / rounds)} down in each"
    return [*tiles, ("what it cost", time, cost)]


def facts(run: Run) -> dict[str, str]:
    """Return what ran, on what."""
    spec, here = run.experiment, run.environment
    versions = {"python": here.get("python", ""), **here.get("versions", {})}
    trained = [run.clients[name] for name in (run.clients if run.is_summed else run.trained)]
    train, test = (sum(about[side] for about in trained) for side in ("train", "test"))
    later = len(run.sizes) - len(trained)
    who = f"{len(trained)} that {'are known' if run.is_summed else 'trained'}"
    model = spec.task.model.path
    return {
        "algorithm": f"{spec.algorithm.name}: {_first_line(spec.algorithm)}",
        "task": spec.task.name + (f", loss {spec.task.loss_name}" if spec.task.loss_name else ""),
        "model": f"{model}, the small model that comes with fedpref" if model == BUILTIN else model,
        "data": f"{spec.data.name}: {_first_line(spec.data)}"
        + (f" ({spec.data.location})" if spec.data.location else ""),
        "clients": f"{who}, with {train} training and {test} held-out "
        "examples" + (f"; {later} that did not" if later else ""),
        "rows": _rows(run.data),
        "rounds": _rounds(run),
        "measured": spec.reading,
        "attack": f"{spec.attack.name} by {', '.join(run.of_attack.get('hostile', ()))}"
        if spec.attack
        else "",
        "privacy": _promised(run),
        "seed": str(spec.seed),
        "started": here.get("started", ""),
        "machine": f"{here['platform']}, {here['processors']} processors" if here else "",
        "versions": ", ".join(f"{name} {number}" for name, number in versions.items() if number),
        "commit": ", ".join(f"{name} {commit}" for name, commit in here.get("commits", {}).items()),
        "directory": str(run.path),
    }


def _promised(run: Run) -> str:
    """Return what is promised of privacy and of secrecy, and what is spent; empty without any."""
    spent = spent_of(*run.line.metrics[-1:], *run.line.evaluations[-1:])
    said = []
    if run.experiment.secrecy and (run.path / HELD_OUT).exists():  # of sites
        said.append("the coordinator saw what sites sent as sums alone, under masks")
    elif run.experiment.secrecy:
        said.append("sums of integers, as sites have them under masks; here in one process")
    figures = {
        "each": "this page, and all figures of a run, are the coordinator's and outside it",
        "private": "figures of evaluations are within it, and no others are told",
        "none": "no figures of clients are told",
    }
    if noise := promised(run.experiment, spent):
        said.append(f"{noise}; {figures[run.experiment.telling]}")
    return ". ".join(said)


def _rounds(run: Run) -> str:
    """Return how many rounds there were, why no more, and which round's model stands."""
    last = run.line.evaluations[-1] if run.line.evaluations else {}
    done = len(run.line.metrics)
    said = f"{done} of {run.experiment.rounds}"
    if last.get("final") and done < run.experiment.rounds:
        why = ENDED.get(last.get("ended", ""), "evaluations on validation rows got no better")
        said += f", stopped: {why}"
    if "kept" in last:
        said += f"; the model is that of round {last['kept']}, the best of them"
    return said + ("" if run.done else " (not finished, or not all that it is compared with)")


def _rows(data: Mapping[str, Any]) -> str:
    """Return how many rows were read, and which of them are in no client's data."""
    if not data:
        return ""
    left = [f"{data['left_out']} left out, whose prompt is held out"] if data["left_out"] else []
    left += [f"{count} unusable ({kind})" for kind, count in data["unusable"].items()]
    return ", ".join([f"{data['rows']} read", *left])


def _first_line(kind: Any) -> str:
    return (kind.__doc__ or "").strip().splitlines()[0].rstrip(".")


def clients(count: int) -> str:
    """Return a number of clients in words."""
    return f"{count:,} client{'s' if count != 1 else ''}"


def _mean(values: Mapping[str, float]) -> float:
    return sum(values.values()) / len(values)
