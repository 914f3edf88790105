"""What clients measure, keep and write when they are evaluated."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch

from fedpref.engines import Engine
from fedpref.engines.many import MANY
from fedpref.engines.site_masks import PLACES
from fedpref.experiments.experiment import FEWEST, Experiment
from fedpref.experiments.run_directory import (
    OUTCOMES,
    SAMPLES,
    RunDirectory,
    client_folder,
    file_name,
)
from fedpref.federation.verbs import ANYTHING, Client, work
from fedpref.numerics import seeds, trees
from fedpref.numerics.metrics import HEADLINES, low_is_good, over_clients
from fedpref.numerics.tallies import SHARES
from fedpref.numerics.trees import Tree
from fedpref.tasks import Task

Look = Literal["glance", "validate", "conclude", "evaluate"]
"""Some held-out rows; those that are set aside to choose by; all of the test's at the end, of which
each one's outcome is kept; all of them."""


def measured(
    engine: Engine,
    model: Sequence[Any],
    names: Sequence[str],
    clients: Sequence[int],
    purpose: Look = "evaluate",
    few: int | None = None,
    at_start: bool = False,
) -> dict[str, Any]:
    """Return some clients' held-out metrics, and each metric's summary over them.

    Where nobody's own figures are told, there are no rows of clients, and beside summaries, if
    there are any, `bins`: how many clients have a share of 0 to 0.1, and so on.

    Args:
        engine: Whose clients they are.
        model: What they evaluate.
        names: Of all clients.
        clients: Which of them.
        purpose: What for.
        few: How many rows a glance or a validation is at; None for all.
        at_start: Whether nothing has been trained yet.
    """
    if engine.figures == "none":
        return {"clients": {}, "summary": {}}
    engine.begin(engine.round, clients, "evaluate")
    if purpose == "validate":
        values = engine.each(validate, few or 0, *model)
    elif purpose == "glance" and few is not None:
        values = engine.each(glance, few, *model)
    else:
        # what came of each example is kept where nothing else is promised of it
        keeps = purpose == "conclude" and engine.figures != "private"
        values = engine.each(conclude if keeps else evaluate, *model)
    if engine.figures != "each":
        figures = engine.tally(values, "start" if at_start else purpose)
        if engine.private is not None and engine.private.evaluations is not None:
            place = PLACES.index("start" if at_start else purpose)
            figures = engine.private.evaluations.told(figures, engine.round, place)
        figures = {name: one for name, one in figures.items() if not name.startswith("num_")}
        return {
            "clients": {},
            "summary": {name: one.summary() for name, one in figures.items()},
            "bins": {name: list(one.bins) for name, one in figures.items() if name in SHARES},
            # rows of clients would say of how many examples they are
            **({"evaluate_pairs": few} if purpose == "glance" and few is not None else {}),
        }
    rows = {
        names[i]: dict(metrics) for i, metrics in engine.disclose(values, NEEDED, HEADLINES).items()
    }
    counts = {name: int(row["num_examples"]) for name, row in rows.items()}
    columns: dict[str, dict[str, float]] = {}
    for name, row in rows.items():
        for metric, value in row.items():
            if not metric.startswith("num_"):
                columns.setdefault(metric, {})[name] = value
    return {
        "clients": rows,
        "summary": {
            m: over_clients(some, counts, low_is_good=low_is_good(m)) for m, some in columns.items()
        },
    }


def export_models(
    experiment: Experiment,
    engine: Engine,
    model: Sequence[Any],
    task: Task,
    folder: RunDirectory,
    names: Sequence[str],
) -> None:
    """Write the shared model, clients' own, and the answers that are kept to be read."""
    shared = trees.merge(*(part for part in model if isinstance(part, Mapping)))
    if shared:
        task.export(shared, folder.path / "adapter")
    if own := [part for part in model if not isinstance(part, Mapping)]:
        engine.begin(engine.round, engine.having(own), "evaluate")
        engine.each(export, "clients", *model)
    # answers to held-out prompts, and what they are worth, are figures too
    is_told = engine.figures in ("each", "sums")
    asked = [i for i in engine.clients if experiment.task.asks(names[i])] if is_told else []
    if len(asked) > MANY:
        asked = asked[:ANSWERING]
    if asked:
        engine.begin(engine.round, asked, "evaluate")
        engine.each(sample, *model)


@work("evaluation.evaluate", reads={"parts": ANYTHING})
def evaluate(client: Client, *parts: Tree) -> Mapping[str, float]:
    """Return the held-out metrics of the client's model."""
    return client.task.evaluate(trees.merge(*parts), client.shard)


@work("evaluation.conclude", reads={"parts": ANYTHING})
def conclude(client: Client, *parts: Tree) -> Mapping[str, float]:
    """Return the held-out metrics of the client's model and of answers that it gives, and keep what
    came of each example.

    That is written to the client's own folder, from which models are compared pair by pair.
    """
    params = trees.merge(*parts)
    if outcomes := client.task.outcomes(params, client.shard):
        folder = client.folder / OUTCOMES
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{file_name(client.shard.name)}.json"
        file.write_text(json.dumps(outcomes) + "\n")
    return {
        **client.task.evaluate(params, client.shard),
        **client.task.generated(params, client.shard),
    }


@work("evaluation.glance", reads={"parts": ANYTHING})
def glance(client: Client, few: int, *parts: Tree) -> Mapping[str, float]:
    """Return metrics of the client's model on a few held-out examples, the same ones each time.

    They are never so few that a figure is one example's own. A different `few` draws different
    examples: were one set within the other, the difference of two figures would tell of the few
    examples between them.
    """
    return client.task.evaluate(trees.merge(*parts), _thinned(client, client.shard, few))


@work("evaluation.validate", reads={"parts": ANYTHING})
def validate(client: Client, few: int, *parts: Tree) -> Mapping[str, float]:
    """Return metrics of the client's model on rows that are set aside to choose by.

    Args:
        client: Whose rows.
        few: How many of them, as in `glance`; 0 for all.
        *parts: Of the model.
    """
    shard = client.shard.validating()
    shard = _thinned(client, shard, few) if few else shard
    return client.task.evaluate(trees.merge(*parts), shard)


def _thinned(client: Client, shard: Any, few: int) -> Any:
    """Return a shard of any task with a few of its held-out examples, its side `test`.

    Of each objective there is one at least, for all clients have the same figures.
    """
    few = max(few, FEWEST, client.least_evaluated)
    rng = seeds.generator(0, f"glance/{few}/{shard.name}")
    order = torch.randperm(len(shard.test), generator=rng).tolist()
    first = {getattr(shard.test[i], "objective", 0): i for i in reversed(order)}.values()
    rest = [i for i in order if i not in set(first)]
    drawn = sorted([*first, *rest][: max(few, len(first))])
    return replace(shard, test=tuple(shard.test[i] for i in drawn))


@work("evaluation.export", sends=())
def export(client: Client, kind: Literal["clients", "newcomers"], *parts: Tree) -> Tree:
    """Write the client's model to its folder in the run."""
    client.task.export(trees.merge(*parts), client_folder(client.folder, kind, client.shard.name))
    return {}


@work("evaluation.sample", sends=())
def sample(client: Client, *parts: Tree) -> Tree:
    """Write answers to the client's held-out prompts, to be read, if they are asked for."""
    rows = client.task.samples(trees.merge(*parts), client.shard)
    if not rows:
        return {}
    folder = client.folder / SAMPLES
    folder.mkdir(exist_ok=True)
    (folder / f"{file_name(client.shard.name)}.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows)
    )
    return {}


ANSWERING = 12  # clients of many that answer to be read, where none are named
NEEDED = ("num_examples",)  # of every evaluation
WORKS = (evaluate, conclude, glance, validate, export, sample)
"""What an experiment runs on clients beside its algorithm."""
