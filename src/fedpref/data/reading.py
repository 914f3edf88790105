"""A source read whole: clients' rows, what was left out, and what cannot be used."""

from __future__ import annotations

import gc
from array import array
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fedpref.data.parsing import forget_columns
from fedpref.data.partitions import Dirichlet, Natural, Partition, partition
from fedpref.data.placed import Labels, Placed, label, nobodys
from fedpref.data.preferences import SIDES, ClientData, Preference, Row
from fedpref.data.row_store import RowStore
from fedpref.data.source import DataSource
from fedpref.data.sources import Files
from fedpref.data.splits import NONE, Outline, identity, place
from fedpref.data.unusable import Policy, Unusable, counted, summary
from fedpref.errors import UserError

EvaluateOn = Literal["test", "validation"]
NAMES: dict[EvaluateOn, str] = {"test": "held-out", "validation": "validation"}
# columns that elsewhere are part of what a model is asked
UNREAD = frozenset({"system", "system_prompt", "history", "images", "functions", "input"})
TRAIN, TEST, VALIDATION = map(SIDES.index, ("train", "test", "validation"))
LAST_TURNS = 2  # prompts to one question, above which they are perhaps told by too little
LONG = 40  # characters of an answer that nobody gives to two prompts by chance
SHARED = 0.1  # held-out rows with an answer that is trained on, above which it is said


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
    room: int | None = None,
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
        room: Bytes of rows that stay in memory; of more, all lie in a file of TMPDIR. None keeps
            them in memory.

    Raises:
        UserError: There is nothing there, its form is another, or a client is left without rows.
            Single rows that cannot be used are not raised; see `Reading.settled`.
    """
    with _without_looking_for_cycles():
        return _read(source, how, seed, trained, evaluate_on, apart, room)


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


@dataclass
class _Kept:
    """Rows as they are read and kept, and what is known of them without looking again.

    Attributes:
        store: The rows.
        labels: Whose they are, where a column says so.
        client: That column's name; empty elsewhere.
        unusable: Rows that cannot be used.
        nobodys: Rows whose column names nobody.
        unread: Columns that nothing reads, and that elsewhere are what a model is asked.
        prompts: Hashes of all that prompts say, where their questions put them on a side.
        answers: Hashes of both answers of each row that is kept; 0 for a short one and for none.
    """

    store: RowStore
    labels: Labels | None
    client: str
    unusable: list[Unusable] = field(default_factory=list)
    nobodys: list[Unusable] = field(default_factory=list)
    unread: set[str] = field(default_factory=set)
    prompts: array[int] = field(default_factory=lambda: array("q"))
    answers: array[int] = field(default_factory=lambda: array("q"))

    def keep(self, source: DataSource) -> Iterator[Row]:
        """Read a source, and yield the rows that are kept."""
        for row in _rows(source):
            if isinstance(row, Unusable):
                # a traceback holds on to what was read
                self.unusable.append(row.with_traceback(None))
                continue
            noted = row if self.labels is None else self.labels.append(row)
            if isinstance(noted, Unusable):
                self.nobodys.append(noted)
                continue
            columns = noted.columns
            if unread := UNREAD & columns.keys():
                self.unread.update(column for column in unread if columns[column])
            if source.split_by == "question" and noted.side is None:
                self.prompts.append(hash(identity(noted.prompt, "prompt")))
            said = noted.said if isinstance(noted, Preference) else ("", "")
            self.answers.extend(hash(text) if len(text) >= LONG else 0 for text in said)
            self.store.append(noted)
            yield noted

    @property
    def total(self) -> int:
        """How many rows were read."""
        return len(self.store) + len(self.unusable) + len(self.nobodys)


def _read(
    source: DataSource,
    how: Partition,
    seed: int,
    trained: Collection[str],
    evaluate_on: EvaluateOn,
    apart: bool,
    room: int | None,
) -> Reading:
    column = how.column if isinstance(how, Natural | Dirichlet) else ""
    labels = Labels(column) if isinstance(how, Natural | Dirichlet) else None
    kept = _Kept(RowStore(room), labels, column)
    purposes = ("test", "validation") if source.validation_fraction else ("test",)
    outline = Outline.of(kept.keep(source), source.split_by, source.split_seed, purposes)
    if not kept.total:
        only = source.only if isinstance(source, Files) else {}
        which = f" with the values of data.only ({', '.join(only)})" if only else ""
        raise UserError(f"{source.location or source.name}: there are no rows{which}.")
    if kept.nobodys and not kept.store:
        raise nobodys(kept.nobodys[0])
    unusable = kept.unusable + kept.nobodys
    if unusable and not kept.store:
        raise UserError(summary(unusable, kept.total))
    if evaluate_on == "validation" and not source.validation_fraction:
        raise UserError(
            "evaluate_on: validation needs rows that are set aside for it. Set "
            "data.validation_fraction, such as 0.2."
        )
    # who is left out for want of held-out rows is not to be given any
    also = Also()
    told = outline
    if isinstance(how, Natural) and labels is not None:
        if apart:
            told = outline.apart(labels.numbers())
        elif not how.min_test_rows and not trained:
            also = _also(outline, labels, source, how)
    sides = _sides(told, source, also)
    known = np.array(sorted(int(one, 16) for one in trained), dtype=np.uint64)
    is_moved = (sides == TEST) & np.isin(outline.asked, known)
    sides[is_moved] = TRAIN
    numbers = np.flatnonzero(sides != NONE)
    try:
        clients = partition(Placed(kept.store, numbers, sides[numbers], labels), how, seed)
    except UserError as error:
        # a client may lack rows because they cannot be used
        if unusable and source.unusable == "refuse":
            raise UserError(summary(unusable, kept.total)) from None
        if is_moved.any():
            raise UserError(
                f"{error} {is_moved.sum()} rows that would be held out ask what the run has "
                "trained on, so that they can only be trained on."
            ) from None
        raise
    if evaluate_on == "validation":
        clients = tuple(replace(one, test=one.validation, validation=()) for one in clients)
    return Reading(
        clients,
        kept.total,
        int((sides == NONE).sum()),
        int(is_moved.sum()),
        tuple(unusable),
        source.unusable,
        (*_notes(kept, outline), *(() if apart else _shared(kept, sides)), *also.notes),
    )


@dataclass(frozen=True)
class Also:
    """Prompts, by their hashes, that are held out for clients of whom the rule holds out nothing.

    Attributes:
        test: For the test.
        validation: To choose by.
        notes: Whose they are, in sentences.
    """

    test: frozenset[int] = frozenset()
    validation: frozenset[int] = frozenset()
    notes: tuple[str, ...] = ()


def _also(outline: Outline, labels: Labels, source: DataSource, how: Natural) -> Also:
    """Return what else is held out, so that no client of several prompts is without held-out rows.

    Of such a client it is the prompt whose hash is the lowest, which a larger fraction would hold
    out first, but none without which somebody would have no training rows left.
    """
    also = Also()
    clients, names = labels.numbers(), labels.names
    is_wanted = np.bincount(clients, minlength=len(names)) >= how.min_rows
    if how.only:
        only = set(map(label, how.only))
        is_wanted &= np.fromiter((name in only for name in names), bool, len(names))
    wanted: list[EvaluateOn] = ["test", "validation"] if source.validation_fraction else ["test"]
    for purpose in wanted:
        sides = _sides(outline, source, also)
        has = np.zeros(len(names), dtype=bool)
        has[clients[sides == SIDES.index(purpose)]] = True
        # what the source itself trains on is never tested on, but may be set aside
        may_be = (sides == TRAIN) & ((outline.given == NONE) | (purpose == "validation"))
        trained = _prompts(outline, clients, may_be & ~has[clients] & is_wanted[clients])
        poor = {client: asked for client, asked in trained.items() if len(asked) > 1}
        trains = (sides == TRAIN) & is_wanted[clients]
        lacking = _next(outline, labels, trains, poor, purpose) if poor else {}
        if lacking:
            note = (
                f"{len(lacking)} clients have no {NAMES[purpose]} rows by the rule; of each the "
                f"prompt that comes next in it is held out: {', '.join(list(lacking)[:8])}"
                f"{', ...' if len(lacking) > 8 else ''}."
            )
            held = {purpose: frozenset(lacking.values())}
            also = replace(also, **held, notes=(*also.notes, note))
    return also


def _next(
    outline: Outline,
    labels: Labels,
    trains: NDArray[np.bool_],
    poor: Mapping[int, set[int]],
    purpose: EvaluateOn,
) -> dict[str, int]:
    """Return of clients the prompt that comes next in the rule, by the client's name.

    Args:
        outline: Of all rows.
        labels: Whose they are.
        trains: Which rows are trained on.
        poor: The clients, with the prompts that may be taken from them.
        purpose: What they lack.
    """
    clients, names = labels.numbers(), labels.names
    # how many prompts each client trains on, and who trains on those that may go
    numbered = np.column_stack([clients, outline.asked.view(np.int64)])[trains]
    left = np.bincount(np.unique(numbered, axis=0)[:, 0], minlength=len(names))
    may_go = np.array(sorted(set().union(*poor.values())), dtype=np.uint64)
    which = trains & np.isin(outline.asked, may_go)
    places = dict(
        zip(outline.asked[which].tolist(), outline.places[purpose][which].tolist(), strict=True)
    )
    askers: dict[int, set[int]] = {}
    for client, some in _prompts(outline, clients, which).items():
        for asked in some:
            askers.setdefault(asked, set()).add(client)
    found: dict[str, int] = {}
    gone: set[int] = set()
    for client in sorted(poor, key=names.__getitem__):
        for asked in sorted(poor[client], key=lambda asked: (places[asked], asked)):
            if all(left[one] > 1 for one in askers[asked]):
                found[names[client]] = asked
                if asked not in gone:
                    left[list(askers[asked])] -= 1
                    gone.add(asked)
                break
    return found


def _prompts(
    outline: Outline, clients: NDArray[np.int64], which: NDArray[np.bool_]
) -> dict[int, set[int]]:
    """Return the prompts of some rows, by client."""
    found: dict[int, set[int]] = {}
    for client, asked in zip(clients[which].tolist(), outline.asked[which].tolist(), strict=True):
        found.setdefault(client, set()).add(asked)
    return found


def _sides(outline: Outline, source: DataSource, also: Also) -> NDArray[np.int8]:
    """Return rows' sides, as numbers in `SIDES`; NONE for those that are left out."""
    sides = outline.sides(source.test_fraction, also.test)
    if source.validation_fraction:
        # of training rows alone: the test stays as it is, whatever is set aside
        is_low = outline.is_low("validation", source.validation_fraction, also.validation)
        sides[(sides == TRAIN) & is_low] = VALIDATION
    return sides


def by_rule(row: Row, source: DataSource) -> bool:
    """Return whether a row is held out by the rule that all sites share, for either purpose."""
    text, seed = identity(row.prompt, source.split_by), source.split_seed
    return (
        place(text, seed) < source.test_fraction
        or place(text, seed, "validation") < source.validation_fraction
    )


def _notes(kept: _Kept, outline: Outline) -> tuple[str, ...]:
    """Return what should be known of what is read, and of how prompts are told apart."""
    notes = []
    if unread := sorted(kept.unread - {kept.client}):
        notes.append(
            f"Nothing reads the columns {', '.join(unread)}: what of them a model is to see "
            "belongs into the prompt, as messages."
        )
    if kept.prompts:
        prompts = len(np.unique(kept.prompts))
        questions = len(np.unique(outline.asked[outline.given == NONE]))
        if prompts > LAST_TURNS * questions:
            notes.append(
                f"{prompts} prompts end in {questions} different questions, by which they are held "
                "out. data.split_by=prompt tells them apart by all of their turns."
            )
    return tuple(notes)


def _shared(kept: _Kept, sides: NDArray[np.int8]) -> tuple[str, ...]:
    """Return what should be known of answers that stand on both sides of the split."""
    answers = np.array(kept.answers).reshape(-1, 2)
    is_held_out = (sides == TEST) | (sides == VALIDATION)
    is_known = np.isin(answers, answers[sides == TRAIN]) & (answers != 0)
    count = int((is_held_out & is_known.any(1)).sum())
    if count <= SHARED * is_held_out.sum():
        return ()
    return (
        f"{count} of {is_held_out.sum()} held-out rows have an answer that training rows have too, "
        "to another prompt: a model that knows it by heart is tested on what it was trained on, or "
        "on the opposite. A column of sides (data.split_column) can keep an answer on one.",
    )
