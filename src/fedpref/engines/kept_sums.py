"""Sums under masks, kept by the coordinator until they are in a checkpoint.

Sites give each sum once: a round that is done again after a stop would be summed over whichever
sites are there then, which they refuse, for of two such sums the difference is somebody's value.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter

from fedpref.errors import UserError
from fedpref.numerics import files, trees
from fedpref.numerics.trees import Tree

FOLDER = "sums"  # in a line's directory, while it runs


@dataclass(frozen=True)
class KeptSum:
    """Of what a sum was asked, and who is in it.

    Attributes:
        plan: By site, clients and their shares of the whole.
        sites: Whose values are in it.
    """

    plan: dict[str, dict[int, float]]
    sites: list[str]


_FORM = TypeAdapter(KeptSum)


class KeptSums:
    """The sums of a line's rounds since the checkpoint before the last.

    Args:
        folder: The line's directory.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder / FOLDER

    def find(self, round: int, call: int) -> tuple[Tree, KeptSum] | None:
        """Return the integers of a sum and whose they are; None where it was never there.

        Raises:
            UserError: The file is damaged.
        """
        about = self._file(round, call)
        if not about.exists():
            return None
        try:
            return trees.load(about.with_suffix(".safetensors")), _FORM.validate_json(
                about.read_bytes()
            )
        except (OSError, ValueError) as error:
            raise UserError(f"{about}: a sum that was kept is damaged: {error}.") from error

    def keep(self, round: int, call: int, total: Tree, kept: KeptSum) -> None:
        """Keep a sum, whole or not at all; raises UserError where it cannot be written."""
        about = self._file(round, call)
        # of one site's clients alone, where cohorts are small
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        trees.save(total, about.with_suffix(".safetensors"), lasting=True)
        files.write(about, json.dumps(asdict(kept)))

    def forget(self, before: int) -> None:
        """Remove the sums of rounds before one."""
        for file in self._folder.glob("round-*"):
            if int(file.name.split("-")[1]) < before:
                file.unlink()

    @staticmethod
    def forget_all(folder: Path) -> None:
        """Remove those of a line that is over."""
        shutil.rmtree(folder / FOLDER, ignore_errors=True)

    def _file(self, round: int, call: int) -> Path:
        return self._folder / f"round-{round:06d}-{call}.json"
