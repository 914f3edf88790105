"""A source read whole: clients' rows, what was left out, and what cannot be used."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

from fedpref.data.parsing import forget_columns
from fedpref.data.partitions import Dirichlet, Natural, Partition, named, partition
from fedpref.data.preferences import ClientData, Row, Side
from fedpref.data.source import DataSource
from fedpref.data.splits import digest, identity, place, split
from fedpref.data.unusable import Policy, Unusable, counted, summary
from fedpref.errors import UserError

EvaluateOn = Literal["test", "validation"]
Purpose = EvaluateOn  # what rows are held out for
NAMES: dict[Purpose, str] = {"test": "held-out", "validation": "validation"}
# columns that elsewhere are part of what a model is asked
UNREAD = frozenset({"system", "system_prompt", "history", "images", "functions", "input"})
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
    *,
    apart: bool = False,
) -> Reading:
    """Read a source and share its rows out.

    Args:
        source: Where rows come from.
        how: How they come to clients.
        seed: Of the partition.
        trained: Digests of prompts that have been trained on, which are held out for nobody.
        evaluate_on: Which rows are held out as the test's: its own, or those that are set aside
            from training to choose settings by, so that nothing reads the test's.
        apart: Let no client's rows decide which of another's are trained on; then a prompt may be
            held out for one and trained on by another.

    Raises:
        UserError: There is nothing there, its form is another, or a client is left without rows.
            Single rows that cannot be used are not raised; see `Reading.settled`.
    """
    with _without_looking_for_cycles():
        return _read(source, how, seed, trained, evaluate_on, apart)


@contextmanager
def _without_looking_for_cycles() -> Iterator[None]:
    """Let Python not look for garbage in cycles, within a `with`.

    Rows are none, and of a million of them looking takes as long as reading.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        forget_columns()
        if was_enabled:
            gc.enable()


def _rows(source: DataSource) -> Iterator[Row | Unusable]:
    """Yield a source's rows; raises UserError where one is not of the form of a set known here."""
    where = "before any row was read"
    try:
        for row in source.read():
            where = f"after {row.where}"
            yield row
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        if not type(source).__module__.startswith("fedpref."):
            raise
        raise UserError(
            f"{source.location or source.name}, {where}: a row is not in the form of "
            f"{source.name} ({type(error).__name__}: {str(error)[:80]}). The documents' page on "
            "data gives the columns of this set."
        ) from error


def _read(
    source: DataSource,
    how: Partition,
    seed: int,
    trained: Collection[str],
    evaluate_on: EvaluateOn,
    apart: bool,
) -> Reading:
    rows: list[Row] = []
    unusable: list[Unusable] = []
    for row in _rows(source):
        if isinstance(row, Unusable):
            unusable.append(row)
        else:
            rows.append(row)
    total = len(rows) + len(unusable)
    if not total:
        raise UserError(f"{source.location or source.name}: there are no rows.")
    if isinstance(how, Natural | Dirichlet) and rows:
        rows, lacking = named(rows, how.column)
        unusable += lacking
    if unusable and not rows:
        raise UserError(summary(unusable, total))
    if evaluate_on == "validation" and not source.validation_fraction:
        raise UserError(
            "evaluate_on: validation needs rows that are set aside for it. Set "
            "data.validation_fraction, such as 0.2."
        )
    # who is left out for want of held-out rows is not to be given any
    also = Also()
    if apart and isinstance(how, Natural):
        placed: list[tuple[Side, Row]] = []
        left_out = 0
        mine: dict[str, list[Row]] = {}
        for row in rows:
            mine.setdefault(str(row.columns[how.column]), []).append(row)
        for some in mine.values():
            here, lost = _sides(some, source, also)
            placed += here
            left_out += lost
    else:
        if isinstance(how, Natural) and not how.min_test_rows and not trained:
            also = _also(rows, source, how)
        placed, left_out = _sides(rows, source, also)
    moved = [
        side == "test" and bool(trained) and digest(row.prompt, source.split_by) in trained
        for side, row in placed
    ]
    placed = [
        ("train", pair[1]) if known else pair for known, pair in zip(moved, placed, strict=True)
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
    if evaluate_on == "validation":
        clients = tuple(replace(one, test=one.validation, validation=()) for one in clients)
    return Reading(
        clients,
        total,
        left_out,
        sum(moved),
        tuple(unusable),
        source.unusable,
        (*_notes(rows, source, getattr(how, "column", "")), *also.notes),
    )


@dataclass(frozen=True)
class Also:
    """Prompts, by `identity`, that are held out for clients of whom the rule holds out nothing.

    Attributes:
        test: For the test.
        validation: To choose by.
        notes: Whose they are, in sentences.
    """

    test: frozenset[str] = frozenset()
    validation: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()


def _also(rows: Sequence[Row], source: DataSource, how: Natural) -> Also:
    """Return what else is held out, so that no client of several prompts is without held-out rows.

    Of such a client it is the prompt whose hash is the lowest, which a larger fraction would hold
    out first, but none without which somebody would have no training rows left.
    """
    also = Also()
    counts = Counter(str(row.columns[how.column]) for row in rows)

    only = frozenset(map(str, how.only))

    def is_wanted(client: str) -> bool:
        return counts[client] >= how.min_rows and (not only or client in only)

    wanted: list[Purpose] = ["test", "validation"] if source.validation_fraction else ["test"]
    for purpose in wanted:
        placed, _ = _sides(rows, source, also)
        have = {str(row.columns[how.column]) for side, row in placed if side == purpose}
        trained: dict[str, set[str]] = {}
        for side, row in placed:
            client = str(row.columns[how.column])
            # what the source itself trains on is never tested on, but may be set aside
            may_be = row.side is None or purpose == "validation"
            if side == "train" and may_be and client not in have and is_wanted(client):
                trained.setdefault(client, set()).add(identity(row.prompt, source.split_by))
        poor = {client: texts for client, texts in sorted(trained.items()) if len(texts) > 1}
        left: dict[str, set[str]] = {}  # prompts that a client still trains on
        askers: dict[str, set[str]] = {}  # who trains on a prompt
        for side, row in placed if poor else ():
            client = str(row.columns[how.column])
            if side == "train" and is_wanted(client):
                text = identity(row.prompt, source.split_by)
                left.setdefault(client, set()).add(text)
                askers.setdefault(text, set()).add(client)
        lacking: dict[str, str] = {}
        for client, texts in poor.items():
            for text in sorted(texts, key=lambda text: _place(text, source, purpose)):
                if all(len(left[one]) > 1 for one in askers[text]):
                    lacking[client] = text
                    for one in askers[text]:
                        left[one].discard(text)
                    break
        if lacking:
            note = (
                f"{len(lacking)} clients have no {NAMES[purpose]} rows by the rule; of each the "
                f"prompt that comes next in it is held out: {', '.join(list(lacking)[:8])}"
                f"{', ...' if len(lacking) > 8 else ''}."
            )
            held = {purpose: frozenset(lacking.values())}
            also = replace(also, **held, notes=(*also.notes, note))
    return also


def _sides(
    rows: Sequence[Row], source: DataSource, also: Also
) -> tuple[list[tuple[Side, Row]], int]:
    """Return rows with their sides, and how many were left out."""
    by, seed = source.split_by, source.split_seed
    placed, left_out = split(rows, source.test_fraction, by, seed, also.test)
    if not source.validation_fraction:
        return placed, left_out
    # of training rows alone: the test stays as it is, whatever is set aside
    return [
        ("validation" if side == "train" and _validates(row, source, also) else side, row)
        for side, row in placed
    ], left_out


def _validates(row: Row, source: DataSource, also: Also) -> bool:
    text = identity(row.prompt, source.split_by)
    below = _place(text, source, "validation") < source.validation_fraction
    return below or text in also.validation


def _place(text: str, source: DataSource, purpose: Purpose) -> float:
    return place(text, source.split_seed, "" if purpose == "test" else purpose)


def by_rule(row: Row, source: DataSource) -> bool:
    """Return whether a row is held out by the rule that all sites share, for either purpose."""
    text = identity(row.prompt, source.split_by)
    return (
        _place(text, source, "test") < source.test_fraction
        or _place(text, source, "validation") < source.validation_fraction
    )


def _notes(rows: Sequence[Row], source: DataSource, client: str) -> tuple[str, ...]:
    """Return what should be known of what is read, and of how prompts are told apart."""
    said = {
        column
        for row in rows
        for column in UNREAD & row.columns.keys()
        if column != client and row.columns[column]
    }
    unread = (
        f"Nothing reads the columns {', '.join(sorted(said))}: what of them a model is to see "
        "belongs into the prompt, as messages.",
    ) * bool(said)
    return unread + _told_apart(rows, source)


def _told_apart(rows: Sequence[Row], source: DataSource) -> tuple[str, ...]:
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
