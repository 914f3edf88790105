"""Choices of people that `fedpref collect` has written down, as preferences."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from fedpref.data.parsing import parse
from fedpref.data.preferences import Preference, Side
from fedpref.data.source import DataSource, PathSource
from fedpref.data.unusable import Unusable
from fedpref.errors import UserError
from fedpref.types import WholeNumber

FILE = "choices.sqlite"  # in the folder that people's choices are collected in

SCHEMA = """
create table if not exists items (
    number integer primary key, prompt text not null, side text not null,
    first text not null, second text not null, origins text not null, selected text not null,
    shared integer not null, margin real
);
create table if not exists events (
    number integer primary key autoincrement, address text not null unique, item integer,
    rater text not null, question text not null, outcome text not null, edited text,
    is_left_first integer, time text not null, seconds real, undoes integer
);
create table if not exists settings (name text primary key, value text not null);
"""
"""What was compared, and what people did: a choice, or that an earlier one is undone.

Of an item `first` and `second` are answers, text or messages as JSON, like the prompt; `origins`
says of each where it is from. An event's `outcome` is `first`, `second`, `tie`, `bad` (both are),
`skip`, `first-edited` or `second-edited` (of which `edited` is better than what it was made of), or
`undo`. Rows are added and never changed.
"""

# choices up to a number, without those that were undone up to it
_STANDING = """
select events.number, prompt, side, first, second, origins, selected, rater, question, outcome,
    edited, time
from events join items on items.number = events.item
where events.number <= :until and outcome != 'undo' and events.number not in
    (select undoes from events where undoes is not null and number <= :until)
order by events.number"""


@dataclass(frozen=True, kw_only=True)
class Collected(PathSource):
    """What people chose on the page of `fedpref collect`: the folder that it wrote.

    Columns: rater, objective (the question that was asked), time, selected (`random` or
    `uncertain`), chosen_from, rejected_from, edited. Ties, skips and prompts both of whose answers
    are bad are no preferences. A folder may grow while a run goes on, which keeps to what was there
    when it began.
    """

    name: Literal["collected"] = "collected"
    until: WholeNumber | None = None
    """Read choices up to this number; null takes those that are there when a run begins."""

    def at_its_state(self) -> Collected:
        if self.until is not None:
            return self
        with closing(opened(Path(self.path).expanduser())) as connection:
            return replace(self, until=last(connection))

    def is_later_than(self, other: DataSource) -> bool:
        return (
            isinstance(other, Collected)
            and other.until is not None
            and Path(other.path).expanduser().resolve() == Path(self.path).expanduser().resolve()
            and replace(other, path=self.path, until=self.until) == self
        )

    def read(self) -> Iterator[Preference | Unusable]:
        folder = Path(self.path).expanduser()
        with closing(opened(folder)) as connection:
            until = last(connection) if self.until is None else self.until
            if until > (there := last(connection)):
                raise UserError(
                    f"{folder / FILE}: it ends with number {there}, and data.until is {until}: it "
                    "is another file, or an older one."
                )
            records = preferences(connection, until)
        for number, record in records:
            where = f"{folder / FILE}, choice {number}"
            side: Side = "test" if record.pop("split") == "test" else "train"
            try:
                yield replace(parse(record, where), side=side)
            except Unusable as error:
                yield error
            except UserError as error:  # of one choice, whose form no other has
                yield Unusable("no preference", where, str(error).removeprefix(f"{where}: "))


def opened(folder: Path) -> sqlite3.Connection:
    """Open a folder's choices to be read.

    Raises:
        UserError: There are none.
    """
    file = folder / FILE
    if not file.is_file():
        raise UserError(
            f"{file}: there is no such file. Give the folder that `fedpref collect --output` has "
            "written."
        )
    try:
        # what a killed process left half-written is undone by who may write alone
        mode = "rw" if os.access(file, os.W_OK) else "ro"
        address = f"{file.resolve().as_uri()}?mode={mode}"
        connection = sqlite3.connect(address, uri=True, timeout=30)
        connection.execute(f"select * from ({_STANDING}) limit 0", {"until": 0})
        refuse_damaged(connection)
    except sqlite3.Error as error:
        raise UserError(f"{file}: these are no choices of `fedpref collect`: {error}.") from error
    return connection


def refuse_damaged(connection: sqlite3.Connection) -> None:
    """Raise sqlite3.DatabaseError where a file's pages do not fit together."""
    (said,) = connection.execute("pragma quick_check(1)").fetchone()
    if said != "ok":
        raise sqlite3.DatabaseError(f"the file is damaged ({said}); take a copy from before")


def last(connection: sqlite3.Connection) -> int:
    """Return the number of what happened last, 0 where nothing has."""
    return int(connection.execute("select coalesce(max(number), 0) from events").fetchone()[0])


def preferences(
    connection: sqlite3.Connection, until: int | None = None
) -> list[tuple[int, dict[str, Any]]]:
    """Return the choices that stand and state a preference, as rows, each with its number.

    Args:
        connection: To a file of choices.
        until: Leaves out what was done after the event of this number.
    """
    rows = connection.execute(
        _STANDING, {"until": last(connection) if until is None else until}
    ).fetchall()
    records = ((number, _preference(row)) for number, *row in rows)
    return [(number, record) for number, record in records if record is not None]


def _preference(row: Any) -> dict[str, Any] | None:
    """Return a choice as a row of preferences; None where it states none."""
    prompt, side, first, second, origins, selected, rater, question, outcome, edited, time = row
    answers = {"first": json.loads(first), "second": json.loads(second)}
    sources: Mapping[str, str] = json.loads(origins)
    name, _, is_edited = outcome.partition("-")
    if name not in answers:
        return None
    other = "second" if name == "first" else "first"
    chosen, rejected, worse = answers[name], answers[other], sources[other]
    if is_edited:  # what somebody made of an answer is better than the answer
        chosen, rejected, worse = json.loads(edited), answers[name], sources[name]
    return {
        "prompt": json.loads(prompt),
        "chosen": chosen,
        "rejected": rejected,
        "split": side,
        "rater": rater,
        **({"objective": question} if question else {}),
        "time": time,
        "selected": selected,
        "chosen_from": sources[name],
        "rejected_from": worse,
        "edited": bool(is_edited),
    }
