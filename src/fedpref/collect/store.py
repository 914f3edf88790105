"""Items and choices on disk: each choice before the next item is shown."""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

from fedpref.data.collected import FILE, SCHEMA, preferences, refuse_damaged
from fedpref.data.preferences import Side, Text
from fedpref.errors import UserError
from fedpref.numerics import files

Verdict = Literal["first", "second", "tie", "bad", "skip", "first-edited", "second-edited"]
Selected = Literal["random", "uncertain"]
ROWS = "preferences.jsonl"  # what other tools read, beside the choices


@dataclass(frozen=True, kw_only=True)
class Item:
    """Two answers to a prompt.

    Attributes:
        number: In its folder; 0 before it lies there.
        prompt: Text or messages.
        side: Whether what people choose is trained on.
        first: An answer, text or messages as the prompt is.
        second: The other.
        origins: Where each is from, `first` and `second`.
        selected: How it came to be asked about.
        shared: Whether all raters see it, for their agreement; others are seen by one.
        margin: How sure the model that drew the answers is of which is better, where it says.
    """

    prompt: Text
    first: Text
    second: Text
    origins: Mapping[str, str]
    side: Side = "train"
    selected: Selected = "random"
    shared: bool = False
    margin: float | None = None
    number: int = 0


@dataclass(frozen=True)
class Event:
    """What somebody did with an item.

    Attributes:
        number: In its folder.
        item: The item's number.
        rater: Who.
        question: What was asked, where several questions are.
        outcome: What was chosen.
        is_left_first: Whether the first answer stood left.
        seconds: From the item's being shown.
    """

    number: int
    item: int
    rater: str
    question: str
    outcome: Verdict
    is_left_first: bool
    seconds: float


class Store:
    """A folder of choices, open to be written by one process; its methods may be called by threads.

    Args:
        folder: It is made where it is not there.

    Raises:
        UserError: Another process has it open, or its file is none of ours.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.folder, self._lock = folder, threading.RLock()
        file = folder / FILE
        file.touch(mode=0o600)
        self._db = sqlite3.connect(file, timeout=30, check_same_thread=False, isolation_level=None)
        try:
            file.chmod(0o600)  # nobody else reads it, whatever the folder allows
            # a choice is on the disk when it is answered, whatever dies next
            self._db.execute("pragma synchronous = extra")
            self._db.executescript(SCHEMA)
            refuse_damaged(self._db)
        except (sqlite3.Error, OSError) as error:
            raise UserError(f"{file}: it cannot be written: {error}.") from error

    def close(self) -> None:
        """Write the file of preferences and close the folder."""
        with self._lock:
            self.export()
            self._db.close()

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            self._db.execute("begin immediate")
            try:
                yield self._db
                self._db.commit()
            except BaseException:  # a commit may fail too, as on a full disk
                self._db.rollback()
                raise

    # ---- settings

    def agree(self, settings: Mapping[str, Any]) -> None:
        """Keep what a folder was begun with, or refuse to go on otherwise.

        Raises:
            UserError: It was begun with other settings.
        """
        with self._writing() as db:
            known = {n: json.loads(v) for n, v in db.execute("select name, value from settings")}
            for name, value in settings.items():
                if name in known and known[name] != value:
                    raise UserError(
                        f"{self.folder}: it was begun with {name} {known[name]!r}, and this is "
                        f"{value!r}. Give what it was begun with, or another --output."
                    )
                db.execute(
                    "insert or ignore into settings values (?, ?)", (name, json.dumps(value))
                )

    def kept(self, name: str, missing: Any = None) -> Any:
        """Return a setting of the folder."""
        with self._lock:
            row = self._db.execute("select value from settings where name = ?", (name,)).fetchone()
        return missing if row is None else json.loads(row[0])

    def keep(self, name: str, value: Any) -> None:
        """Keep a setting of the folder, in place of what it was."""
        with self._writing() as db:
            db.execute("insert or replace into settings values (?, ?)", (name, json.dumps(value)))

    # ---- items

    def add(self, items: Sequence[Item]) -> None:
        """Add items, all or none."""
        rows = [
            (
                json.dumps(item.prompt),
                item.side,
                json.dumps(item.first),
                json.dumps(item.second),
                json.dumps(dict(item.origins)),
                item.selected,
                item.shared,
                item.margin,
            )
            for item in items
        ]
        names = "prompt, side, first, second, origins, selected, shared, margin"
        with self._writing() as db:
            db.executemany(f"insert into items ({names}) values (?, ?, ?, ?, ?, ?, ?, ?)", rows)

    def items(self, after: int = 0) -> list[Item]:
        """Return the items that came after one of a number, in the order in which they came."""
        with self._lock:
            rows = self._db.execute(
                "select prompt, first, second, origins, side, selected, shared, margin, number "
                "from items where number > ? order by number",
                (after,),
            ).fetchall()
        return [
            Item(
                prompt=_text(prompt),
                first=_text(first),
                second=_text(second),
                origins=json.loads(origins),
                side=side,
                selected=selected,
                shared=bool(shared),
                margin=margin,
                number=number,
            )
            for prompt, first, second, origins, side, selected, shared, margin, number in rows
        ]

    # ---- choices

    def choose(
        self,
        address: str,
        item: int,
        rater: str,
        question: str,
        outcome: Verdict,
        *,
        is_left_first: bool,
        seconds: float,
        edited: Text | None = None,
    ) -> Event | None:
        """Write a choice down; on return it is on the disk.

        Args:
            address: What tells this choice from all others: one that is sent again is not written
                again.
            item: The item's number.
            rater: Who chooses.
            question: What was asked; empty for the one question.
            outcome: What was chosen.
            is_left_first: Whether the first answer stood left.
            seconds: From the item's being shown.
            edited: What an answer was made into, of the outcomes that say so.

        Returns:
            What was written; None where the rater has answered the question before.
        """
        with self._writing() as db:
            has = db.execute(
                "select 1 from events where address = :address or (item = :item and rater = :rater "
                "and question = :question and outcome != 'undo' and number not in "
                "(select undoes from events where undoes is not null))",
                {"address": address, "item": item, "rater": rater, "question": question},
            ).fetchone()
            if has is not None:
                return None
            number = _insert(
                db,
                address=address,
                item=item,
                rater=rater,
                question=question,
                outcome=outcome,
                edited=None if edited is None else json.dumps(edited),
                is_left_first=is_left_first,
                seconds=seconds,
            )
        return Event(number, item, rater, question, outcome, is_left_first, seconds)

    def undo(self, address: str, rater: str) -> Event | None:
        """Undo a rater's last choice that stands, and return it; None where there is none."""
        with self._writing() as db:
            if db.execute("select 1 from events where address = ?", (address,)).fetchone():
                return None
            standing = [event for event in self.standing() if event.rater == rater]
            if not standing:
                return None
            undone = standing[-1]
            _insert(
                db,
                address=address,
                item=undone.item,
                rater=rater,
                question=undone.question,
                outcome="undo",
                undoes=undone.number,
            )
            return undone

    def standing(self) -> list[Event]:
        """Return all choices that were not undone, in the order in which they were made."""
        with self._lock:
            rows = self._db.execute(
                "select number, item, rater, question, outcome, is_left_first, seconds from events "
                "where outcome != 'undo' and number not in "
                "(select undoes from events where undoes is not null) order by number"
            ).fetchall()
        return [
            Event(number, item, rater, question, outcome, bool(left), seconds)
            for number, item, rater, question, outcome, left, seconds in rows
        ]

    # ---- what comes of it

    def export(self) -> Path:
        """Write all preferences as a file of rows in TRL's form, in place of an older one."""
        with self._lock:
            records = preferences(self._db)
        lines = (json.dumps(record, ensure_ascii=False) + "\n" for _, record in records)
        files.write(self.folder / ROWS, "".join(lines))
        (self.folder / ROWS).chmod(0o600)
        return self.folder / ROWS


def _insert(db: sqlite3.Connection, **values: Any) -> int:
    values["time"] = datetime.now(UTC).isoformat(timespec="seconds")
    marks = ", ".join(f":{name}" for name in values)
    made = db.execute(f"insert into events ({', '.join(values)}) values ({marks})", values)
    return int(made.lastrowid or 0)


def _text(written: str) -> Text:
    value = json.loads(written)
    return value if isinstance(value, str) else tuple(value)


def coin(*what: object) -> float:
    """Return a number between 0 and 1 that hangs on what is said alone."""
    said = "\0".join(map(str, what)).encode()
    return int.from_bytes(blake2b(said, digest_size=8).digest()) / 2**64
