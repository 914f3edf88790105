"""Baselines that cost nothing: what words, length or the untrained model's states say of pairs,
and what others' answers say of a group's opinions.

A method that ranks held-out pairs no better than these has shown nothing by its accuracy.
"""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from fedpref.data import words
from fedpref.experiments.run_directory import CONFIG, OUTCOMES, RunDirectory, file_name
from fedpref.experiments.run_files import EVALUATION, METRICS
from fedpref.numerics.bradley_terry import Differences, margins
from fedpref.numerics.metrics import ACCURACY, ALIGNMENT, over_clients
from fedpref.tasks.alignment import calibration_error

if TYPE_CHECKING:
    from fedpref.tasks.examples import Example, OfflineShard
    from fedpref.tasks.offline import OfflineLearner
    from fedpref.tasks.opinion import OpinionLearner, OpinionShard

KINDS = ("alone", "pooled", "personal")
FREE_BASELINES = {
    "words": tuple(f"words-{kind}" for kind in KINDS),
    "probe": tuple(f"probe-{kind}" for kind in KINDS),
    "length": ("length",),
    "majority": ("majority", "equal-shares"),
}
"""By what `baselines` calls them, the lines that they are."""
FREE_LINES = frozenset(line for lines in FREE_BASELINES.values() for line in lines)
Margins = Mapping[str, Float[Tensor, " m"]]  # of held-out pairs, by client


def free_lines(baselines: Sequence[str]) -> dict[str, str]:
    """Return the lines of baselines that cost nothing, and their folders in a run's directory."""
    return {
        line: f"baselines/{line}" for name in baselines for line in FREE_BASELINES.get(name, ())
    }


def run_free(
    baselines: Sequence[str],
    task: Any,
    shards: Sequence[Any],
    folder: RunDirectory,
    rounds: int,
    measured: Collection[str],
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Write the lines of baselines that cost nothing, and yield each with its evaluation.

    Args:
        baselines: As an experiment has them; all others are left alone.
        task: Of pairs of answers, or of opinions.
        shards: Of the clients that train.
        folder: The run's.
        rounds: Of the other lines, beside whose last these stand.
        measured: Clients whose held-out examples the other lines are measured on.
    """
    whose = [shard for shard in shards if shard.name in measured]
    for name in baselines:
        lines = [RunDirectory(folder.path / sub) for sub in free_lines([name]).values()]
        if all(under.done for under in lines):
            continue
        begun = time.perf_counter()
        of_opinions = name == "majority"
        ranked: list[Any] = (
            [*_by_majority(shards)] if of_opinions else [*_RANKED[name](task, shards)]
        )
        seconds = (time.perf_counter() - begun) / len(lines)
        for under, found in zip(lines, ranked, strict=True):
            line = under.path.name
            if not under.has_begun:
                under.create({CONFIG: (folder.path / CONFIG).read_text()})
            evaluate = _judged if of_opinions else _evaluated
            row = {"round": rounds, "final": True, **evaluate(under, task, whose, found)}
            under.cut_rows_after(0)
            figures = {"round": rounds, "seconds": seconds, "bytes_up": 0, "bytes_down": 0}
            under.append(METRICS, figures)
            under.append(EVALUATION, row)
            under.finish()
            yield line, row


def _evaluated(
    under: RunDirectory, task: OfflineLearner, shards: Sequence[OfflineShard], found: Margins
) -> dict[str, Any]:
    (under.path / OUTCOMES).mkdir(exist_ok=True)
    rows: dict[str, dict[str, float]] = {}
    for shard in shards:
        margin = found[shard.name]
        right = (margin > 0).double() + (margin == 0).double() / 2
        # the longer answer states no probability, a regression does
        states = under.path.name not in FREE_BASELINES["length"]
        stated = torch.sigmoid(margin.double()) if states else torch.zeros(0)
        pairs = task.told(shard, right.tolist(), stated.tolist())
        file = under.path / OUTCOMES / f"{file_name(shard.name)}.json"
        file.write_text(json.dumps(pairs) + "\n")
        rows[shard.name] = {ACCURACY: float(right.mean()), "num_examples": len(shard.test)}
        if states:
            sure = torch.maximum(stated, 1 - stated)
            rows[shard.name]["calibration_error"] = calibration_error(sure, right)
    return _summarised(rows, ACCURACY)


def _judged(
    under: RunDirectory,
    task: OpinionLearner,
    shards: Sequence[OpinionShard],
    found: Mapping[str, Sequence[Tensor]],
) -> dict[str, Any]:
    """Return an evaluation of predicted shares."""
    rows = {shard.name: task.judged(found[shard.name], shard) for shard in shards}
    return _summarised(rows, ALIGNMENT)


def _summarised(rows: dict[str, dict[str, float]], metric: str) -> dict[str, Any]:
    values = {name: row[metric] for name, row in rows.items()}
    counts = {name: int(row["num_examples"]) for name, row in rows.items()}
    return {"clients": rows, "summary": {metric: over_clients(values, counts)}}


# ---- how they rank


def _by_words(task: OfflineLearner, shards: Sequence[OfflineShard]) -> list[Margins]:
    sides = [{shard.name: _texts(task, getattr(shard, side)) for shard in shards} for side in SIDES]
    return _regressed(shards, words.differences(*sides))


def _by_states(task: OfflineLearner, shards: Sequence[OfflineShard]) -> list[Margins]:
    found = task.states([e for shard in shards for e in (*shard.train, *shard.test)])
    return _regressed(
        shards,
        {shard.name: (_apart(found, shard.train), _apart(found, shard.test)) for shard in shards},
    )


def _by_length(task: OfflineLearner, shards: Sequence[OfflineShard]) -> list[Margins]:
    return [
        {
            shard.name: torch.tensor([words.longer(pair) for pair in _texts(task, shard.test)])
            for shard in shards
        }
    ]


def _by_majority(shards: Sequence[OpinionShard]) -> list[dict[str, list[Tensor]]]:
    """Return what is predicted of each question that a group is asked: what others answered to it.

    The first is the mean of the other groups' answers, their held-out ones too, which no predictor
    is given, and equal shares where nobody else was asked; the second is equal shares.
    """
    answers: dict[str, dict[str, Tensor]] = {}
    for shard in shards:
        for question in (*shard.train, *shard.test):
            answers.setdefault(question.digest, {})[shard.name] = torch.tensor(question.shares)
    majority: dict[str, list[Tensor]] = {}
    equal: dict[str, list[Tensor]] = {}
    for shard in shards:
        for question in shard.asked:
            count = len(question.shares)
            even = torch.full((count,), 1 / count)
            others = [x for name, x in answers[question.digest].items() if name != shard.name]
            majority.setdefault(shard.name, []).append(
                torch.stack(others).mean(0) if others else even
            )
            equal.setdefault(shard.name, []).append(even)
    return [majority, equal]


_RANKED = {"words": _by_words, "probe": _by_states, "length": _by_length}
SIDES = ("train", "test")


def _regressed(
    shards: Sequence[OfflineShard], features: Mapping[str, tuple[Tensor, Tensor]]
) -> list[Margins]:
    by_kind = margins(
        {
            shard.name: Differences(
                features[shard.name][0],
                [str(example.prompt) for example in shard.train],
                features[shard.name][1],
            )
            for shard in shards
        }
    )
    return [by_kind[kind] for kind in KINDS]


def _apart(found: Mapping[bytes, Tensor], examples: Sequence[Example]) -> Float[Tensor, "n D"]:
    return torch.stack([found[e.keys[0]] - found[e.keys[1]] for e in examples])


def _texts(task: OfflineLearner, examples: Sequence[Example]) -> list[words.Pair]:
    return [words.Pair(*task.texts(example)) for example in examples]
