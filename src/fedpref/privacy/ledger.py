"""What has been spent: every noisy sum is written down before anybody may see it."""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from pydantic import TypeAdapter
from typing_extensions import TypedDict

from fedpref.errors import UserError
from fedpref.numerics import files
from fedpref.types import Count, Portion, Positive, WholeNumber

FILE = "ledger.jsonl"


class Entry(TypedDict):
    """One noisy sum, or those of a client's local steps in one call of its work."""

    round: WholeNumber
    call: WholeNumber
    attempt: WholeNumber
    sums: Count
    noise_multiplier: Positive
    sampling_probability: Portion
    digest: Annotated[str, "of the sums before noise, keyed by the secret"]


_FORM = TypeAdapter(Entry)


@dataclass
class Ledger:
    """A run's noisy sums, in a file of JSON Lines that is synced line by line."""

    path: Path
    entries: list[Entry] = field(default_factory=list)

    @staticmethod
    def at(folder: Path, name: str = FILE) -> Ledger:
        """Return a folder's ledger, with what stands in it.

        A last line that a crash cut short was never acted upon.

        Args:
            folder: Where it lies.
            name: The file's name.

        Raises:
            UserError: The file is damaged.
        """
        path = folder / name
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

    def read_again(self) -> None:
        """Take up what other processes have written down since."""
        self.entries = Ledger.at(self.path.parent, self.path.name).entries

    @property
    def events(self) -> Counter[tuple[float, float]]:
        """How many sums have been charged, by noise multiplier and sampling probability.

        Those that were done again at one place are of one batch, so that each pair is one sum with
        less noise.
        """
        precise: dict[tuple[int, int, float], float] = {}
        counts: dict[tuple[int, int, float], int] = {}
        for one in self.entries:
            place = one["round"], one["call"], one["sampling_probability"]
            precise[place] = precise.get(place, 0.0) + one["noise_multiplier"] ** -2
            counts[place] = max(counts.get(place, 0), one["sums"])
        found: Counter[tuple[float, float]] = Counter()
        for place, total in precise.items():
            found[_noise(total), place[2]] += counts[place]
        return found

    @property
    def charged(self) -> int:
        """How many sums have been charged."""
        return sum(one["sums"] for one in self.entries)

    @property
    def rounds(self) -> list[tuple[float, float]]:
        """What each round has cost: noise multiplier and sampling probability.

        All sums of a round are of one cohort, so that together they are one sum with less noise.
        """
        precise: dict[tuple[int, float], float] = {}  # 1 / z^2, which adds up
        for one in self.entries:
            address = one["round"], one["sampling_probability"]
            added = one["sums"] / one["noise_multiplier"] ** 2
            precise[address] = precise.get(address, 0.0) + added
        return [(_noise(total), chance) for (_, chance), total in sorted(precise.items())]

    @property
    def rounds_so_far(self) -> list[tuple[float, float]]:
        """What the rounds up to the last have cost, those among them in which nothing was sent.

        A chance to be drawn hides something only if rounds without are counted too.
        """
        rounds = self.rounds
        drawn = [kind for kind in rounds if kind[1] < 1]
        if not drawn:  # who is not drawn by chance has paid for what was sent
            return rounds
        missing = 1 + max(one["round"] for one in self.entries)
        missing -= len({one["round"] for one in self.entries})
        return [*rounds, *[min(drawn)] * missing]

    def known(self, round: int, call: int, digest: str, kind: tuple[float, float]) -> int | None:
        """Return the attempt of a sum that is written down already; None for another.

        With other noise, or of a cohort that was drawn by another chance, it is another.
        """
        for one in self.entries:
            said = one["noise_multiplier"], one["sampling_probability"]
            if (one["round"], one["call"], one["digest"], said) == (round, call, digest, kind):
                return one["attempt"]
        return None

    def charge(
        self, round: int, call: int, digest: str, kind: tuple[float, float], sums: int = 1
    ) -> int:
        """Write a sum down, and return its attempt, which addresses its noise.

        The same sum once more, as a run that was killed does it again, is free and has the same
        noise. Another sum at the same place is charged, and has fresh noise: the same on two values
        would give away their difference.

        Args:
            round: From 0.
            call: The number of the verb within the round.
            digest: Of the sum, before noise.
            kind: The noise multiplier and the sampling probability.
            sums: How many sums these are, where they are several.

        Raises:
            UserError: It cannot be written.
        """
        if (attempt := self.known(round, call, digest, kind)) is not None:
            return attempt
        entry = self._entry(round, call, digest, kind, sums)
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

    def with_one(self, round: int, call: int, kind: tuple[float, float]) -> Ledger:
        """Return the ledger as it would be with a sum more, which is written nowhere."""
        return Ledger(self.path, [*self.entries, self._entry(round, call, "", kind, 1)])

    def _entry(
        self, round: int, call: int, digest: str, kind: tuple[float, float], sums: int
    ) -> Entry:
        here = [one for one in self.entries if (one["round"], one["call"]) == (round, call)]
        return Entry(
            round=round,
            call=call,
            attempt=len(here),
            sums=sums,
            noise_multiplier=kind[0],
            sampling_probability=kind[1],
            digest=digest,
        )


def _noise(precise: float) -> float:
    """Return a noise multiplier, of ten digits: what was planned as one sum must cost as one."""
    return float(f"{precise**-0.5:.10g}")
