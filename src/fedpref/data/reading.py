"""A source read whole: clients' rows, what was left out, and what cannot be used."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from fedpref.data.partitions import Dirichlet, Natural, Partition, named, partition
from fedpref.data.preferences import ClientData, Row, Side
from fedpref.data.source import DataSource
from fedpref.data.splits import digest, held_out, identity, split
from fedpref.data.unusable import Policy, Unusable, counted, summary
from fedpref.errors import UserError

EvaluateOn = Literal["test", "validation"]
LAST_TURNS = 2  # prompts to one question, above which they are perhaps told by too little


@dataclass(frozen=True)
class Reading:
    """What a source holds.

    Attributes:
        clients: Every client's rows.
        rows: How many rows were read.
        left_out: Training rows that are left out because their prompt is held out.
        trained: Rows that would be held out, were their prompts not trained on already.
        unusable: Rows that cannot be used.
        policy: What becomes of these.
        notes: What else should be known, in sentences.
    """

    clients: tuple[ClientData, ...]
    rows: int
    left_out: int = 0
    trained: int = 0
    unusable: tuple[Unusable, ...] = ()
    policy: Policy = "refuse"
    notes: tuple[str, ...] = ()

    def with_more(self, unusable: Sequence[Unusable]) -> Reading:
        """Return the reading with what else cannot be used, as it turned out later."""
        return replace(self, unusable=(*self.unusable, *unusable))

    def settled(self) -> Reading:
        """Return the reading; raises UserError where there are unusable rows and none may be."""
        if self.unusable and self.policy == "refuse":
            raise UserError(summary(self.unusable, self.rows))
        return self

    @property
    def skipped(self) -> str:
        """What was left out because it cannot be used, in words; empty for nothing."""
        counts = counted(self.unusable)
        kinds = ", ".join(f"{count} {kind}" for kind, count in counts.items())
        return f"{len(self.unusable)} of {self.rows} rows cannot be used: {kinds}" * bool(counts)

    @property
    def figures(self) -> dict[str, object]:
        """How many rows there were, were left out, and could not be used, by kind."""
        return {
            "rows": self.rows,
            "left_out": self.left_out,
            "unusable": counted(self.unusable),
        }


def read(
    source: DataSource,
    how: Partition,
    seed: int,
    trained: Collection[str] = (),
    evaluate_on: EvaluateOn = "test",
) -> Reading:
    """Read a source and share its rows out.

    Args:
        source: Where rows come from.
        how: How they come to clients.
        seed: Of the partition.
        trained: Digests of prompts that have been trained on, which are held out for nobody.
        evaluate_on: Which held-out rows clients have: those of the test, or those that are set
            aside from training to choose settings by. The others are left out.

    Raises:
        UserError: There is nothing there, its form is another, or a client is left without rows.
            Single rows that cannot be used are not raised; see `Reading.settled`.
    """
    rows: list[Row] = []
    unusable: list[Unusable] = []
    for row in source.read():
        if isinstance(row, Unusable):
            unusable.append(row)
        else:
            rows.append(row)
    total = len(rows) + len(unusable)
    if isinstance(how, Natural | Dirichlet) and rows:
        rows, lacking = named(rows, how.column)
        unusable += lacking
    if unusable and not rows:
        raise UserError(summary(unusable, total))
    placed, left_out = split(rows, source.test_fraction, source.split_by, source.split_seed)
    placed = _chosen(placed, source, evaluate_on)
    moved = [
        side == "test" and bool(trained) and digest(row.prompt, source.split_by) in trained
        for side, row in placed
    ]
    placed = [
        ("train" if known else side, row) for known, (side, row) in zip(moved, placed, strict=True)
    ]
    try:
        clients = partition(placed, how, seed)
    except UserError as error:
        # a client may lack rows because they cannot be used
        if unusable and source.unusable == "refuse":
            raise UserError(summary(unusable, total)) from None
        if any(moved):
            raise UserError(
                f"{error} {sum(moved)} rows that would be held out ask what the run has trained "
                "on, so that they can only be trained on."
            ) from None
        raise
    return Reading(
        clients,
        total,
        left_out,
        sum(moved),
        tuple(unusable),
        source.unusable,
        _notes(rows, source),
    )


def _chosen(
    placed: Sequence[tuple[Side, Row]], source: DataSource, evaluate_on: EvaluateOn
) -> list[tuple[Side, Row]]:
    """Return rows without those that are held out for the other purpose."""
    if not source.validation_fraction:
        if evaluate_on == "validation":
            raise UserError(
                "evaluate_on: validation needs rows that are set aside for it. Set "
                "data.validation_fraction, such as 0.2."
            )
        return list(placed)
    kept: list[tuple[Side, Row]] = []
    for side, row in placed:
        # of training rows alone: the test stays as it is, whatever is set aside
        validates = side == "train" and held_out(
            identity(row.prompt, source.split_by),
            source.validation_fraction,
            source.split_seed,
            "validation",
        )
        if not validates and (side == "train" or evaluate_on == "test"):
            kept.append((side, row))
        elif validates and evaluate_on == "validation":
            kept.append(("test", row))
    return kept


def _notes(rows: Sequence[Row], source: DataSource) -> tuple[str, ...]:
    """Return what should be known of how prompts are told apart."""
    if source.split_by == "prompt" or all(row.side for row in rows):
        return ()
    prompts, questions = (
        len({identity(row.prompt, by) for row in rows}) for by in ("prompt", "question")
    )
    if prompts <= LAST_TURNS * questions:
        return ()
    return (
        f"{prompts} prompts end in {questions} different questions, by which they are held out. "
        "data.split_by=prompt tells them apart by all of their turns.",
    )
