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
        lines = path.read_text().split("\n") if path.exists() else []
        for number, line in enumerate(lines, 1):
            try:
                if line:
                    ledger.entries.append(_FORM.validate_python(json.loads(line)))
            except ValueError as error:
                if number == len(lines):  # without an end of line
                    break
                raise UserError(
                    f"{path}, line {number}: the ledger is damaged, and what has been spent is not "
                    "known. The run cannot go on."
                ) from error
        if lines and lines[-1]:  # what comes next begins a line of its own
            path.write_text("".join(json.dumps(entry) + "\n" for entry in ledger.entries))
        return ledger

    @property
    def charged(self) -> int:
        """How many sums have been charged."""
        return len(self.entries)

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
        here = [one for one in self.entries if (one["round"], one["call"]) == (round, call)]
        for one in here:
            if one["digest"] == digest:
                return one["attempt"]
        entry = Entry(round=round, call=call, attempt=len(here), digest=digest)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write(json.dumps(entry) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise UserError(
                f"{self.path}: what is spent cannot be written down, so that nothing is: {error}"
            ) from error
        self.entries.append(entry)
        return entry["attempt"]
