"""What has been spent: every noisy sum is written down before anybody may see it."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from pydantic import TypeAdapter
from typing_extensions import TypedDict

from fedpref.errors import UserError
from fedpref.numerics import files
from fedpref.types import WholeNumber

FILE = "ledger.jsonl"


class Entry(TypedDict):
    """One noisy sum."""

    round: WholeNumber
    call: WholeNumber
    attempt: WholeNumber
    digest: Annotated[str, "of the sum before noise, keyed by the secret"]


_FORM = TypeAdapter(Entry)


@dataclass
class Ledger:
    """A run's noisy sums, in a file of JSON Lines that is synced line by line."""

    path: Path
    entries: list[Entry] = field(default_factory=list)

    @staticmethod
    def at(folder: Path) -> Ledger:
        """Return a folder's ledger, with what stands in it.

        A last line that a crash cut short was never acted upon.

        Raises:
            UserError: The file is damaged.
        """
        path = folder / FILE
        ledger = Ledger(path)
        if not path.exists():
            return ledger
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                ledger.entries.append(_FORM.validate_python(json.loads(line)))
            except ValueError as error:
                raise UserError(
                    f"{path}, line {number}: the ledger is damaged, and what has been spent is not "
                    "known. The run cannot go on."
                ) from error
        if len(whole) < len(content):  # what comes next begins a line of its own
            with path.open("r+b") as file:
                file.truncate(len(whole))
                os.fsync(file.fileno())
        return ledger

    def require(self, rounds: int) -> None:
        """Raise UserError where fewer rounds stand here than have been done."""
        known = len({one["round"] for one in self.entries})
        if known < rounds:
            raise UserError(
                f"{self.path}: {known} rounds are written down, and {rounds} have been done; what "
                "has been spent is not known. The run cannot go on."
            )

    @property
    def charged(self) -> int:
        """How many sums have been charged."""
        return len(self.entries)

    def known(self, round: int, call: int, digest: str) -> int | None:
        """Return the attempt of a sum that is written down already; None for another."""
        for one in self.entries:
            if (one["round"], one["call"], one["digest"]) == (round, call, digest):
                return one["attempt"]
        return None

    def charge(self, round: int, call: int, digest: str) -> int:
        """Write a sum down, and return its attempt, which addresses its noise.

        The same sum once more, as a run that was killed does it again, is free and has the same
        noise. Another sum at the same place is charged, and has fresh noise: the same on two values
        would give away their difference.

        Args:
            round: From 0.
            call: The number of the verb within the round.
            digest: Of the sum, before noise.

        Raises:
            UserError: It cannot be written.
        """
        if (attempt := self.known(round, call, digest)) is not None:
            return attempt
        here = [one for one in self.entries if (one["round"], one["call"]) == (round, call)]
        entry = Entry(round=round, call=call, attempt=len(here), digest=digest)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            is_new = not self.path.exists()
            with self.path.open("a") as file:
                file.write(json.dumps(entry) + "\n")
                file.flush()
                os.fsync(file.fileno())
            if is_new:
                files.sync(self.path.parent)
        except OSError as error:
            raise UserError(
                f"{self.path}: what is spent cannot be written down, so that nothing is: {error}"
            ) from error
        self.entries.append(entry)
        return entry["attempt"]
