"""Clients' values in files, of which a checkpoint writes those that have changed.

    checkpoints/round-000007/values.json     which file holds a client's value of a field, its label
    checkpoints/values/FIELD/CLIENT.round-000003.safetensors

A value that is the same as in the checkpoint before is named again, not written again; one without
tensors has no file. Files that neither of the last two checkpoints names are removed.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedpref.engines.values import Kept
from fedpref.errors import UserError
from fedpref.federation.leaving import Audience, Label
from fedpref.numerics import files, trees
from fedpref.numerics.trees import Tree

INDEX, VALUES = "values.json", "values"
# [file, or null for an empty tree; audience; kind]
Entry = list[Any]


class Store:
    """The values of one engine's clients; `folder` is that of all checkpoints."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._entries: dict[tuple[str, int], tuple[weakref.ref[Kept], Entry]] = {}
        self._replaced: set[str] = set()  # files that the last checkpoint no longer names

    def save(self, checkpoint: Path, name: str, values: Mapping[str, Mapping[int, Kept]]) -> None:
        """Write what has changed, and which files belong to a checkpoint.

        Args:
            checkpoint: The folder that is being written.
            name: What the checkpoint is going to be called.
            values: By field and client.

        Raises:
            UserError: Something cannot be written; all that was written before is as it was.
        """
        index: dict[str, dict[int, Entry]] = {}
        made: dict[tuple[str, int], tuple[weakref.ref[Kept], Entry]] = {}
        for field, some in values.items():
            index[field] = {}
            for client, kept in some.items():
                known = self._entries.get((field, client))
                if known is None or known[0]() is not kept:
                    known = weakref.ref(kept), self._written(field, client, kept, name)
                    made[field, client] = known
                index[field][client] = known[1]
        checkpoint.mkdir(parents=True, exist_ok=True)
        files.write(checkpoint / INDEX, json.dumps(index))
        # the checkpoint before the last one goes, and what it alone had
        current = {entry[0] for _, entry in self._entries.values()}
        for file in self._replaced - current:
            (self.folder / VALUES / file).unlink(missing_ok=True)
        before = {self._entries[key][1][0] for key in made if key in self._entries} - {None}
        now = {entry[0] for _, entry in made.values()}
        self._replaced = before - now
        self._entries |= made

    def _written(self, field: str, client: int, kept: Kept, name: str) -> Entry:
        # one that the simulation has spilled reads itself
        tree: Tree = kept.value if isinstance(kept.value, Mapping) else kept.value.read()
        file = None
        if tree:
            (self.folder / VALUES / field).mkdir(parents=True, exist_ok=True)
            file = f"{field}/{client}.{name}.safetensors"
            trees.save(tree, self.folder / VALUES / file, lasting=True)
        return [file, int(kept.label.audience), kept.label.kind]

    def tidy(self) -> None:
        """Remove files that no checkpoint names, as a process leaves them that is killed."""
        checkpoints = list(self.folder.glob("round-*"))
        if not all((checkpoint / INDEX).exists() for checkpoint in checkpoints):
            return  # somebody has taken an index away, and may put it back
        named = set[str]().union(*map(_named, checkpoints))
        for file in (self.folder / VALUES).glob("*/*"):
            if f"{file.parent.name}/{file.name}" not in named:
                file.unlink(missing_ok=True)

    def clients(self, checkpoint: Path) -> set[int]:
        """Return the clients of which a checkpoint holds something."""
        return {int(client) for some in _index(checkpoint).values() for client in some}

    def load(
        self,
        checkpoint: Path,
        fields: Sequence[str],
        clients: Collection[int] | None = None,
        *,
        missing_ok: bool = False,
    ) -> dict[str, dict[int, Kept]]:
        """Return what a checkpoint holds of some fields, by field and client.

        Args:
            checkpoint: Its folder.
            fields: Of the algorithm's state.
            clients: Those that are wanted; None for all.
            missing_ok: Pass over values whose file is gone.

        Raises:
            UserError: A file is damaged, or gone.
        """
        if not (checkpoint / INDEX).exists():
            if not all((checkpoint / field).is_dir() for field in fields):
                raise UserError(f"{checkpoint / INDEX}: this file of the run's checkpoint is gone.")
            return {field: _of_format_2(checkpoint / field) for field in fields}
        index = _index(checkpoint)
        older = (one for one in self.folder.glob("round-*") if one.name < checkpoint.name)
        self._replaced |= set[str]().union(*map(_named, older)) - _named(checkpoint)
        loaded: dict[str, dict[int, Kept]] = {field: {} for field in fields}
        for field in fields:
            for client, entry in index.get(field, {}).items():
                if clients is not None and int(client) not in clients:
                    continue
                file, audience, kind = entry
                if missing_ok and file and not (self.folder / VALUES / file).exists():
                    continue
                tree = trees.load(self.folder / VALUES / file) if file else {}
                kept = Kept(tree, Label(Audience(audience), kind))
                loaded[field][int(client)] = kept
                self._entries[field, int(client)] = weakref.ref(kept), entry
        return loaded


def _of_format_2(folder: Path) -> dict[int, Kept]:
    """Return a field's values as runs of format 2 have them, without labels."""
    return {int(file.stem): Kept(trees.load(file)) for file in folder.glob("*.safetensors")}


def _named(checkpoint: Path) -> set[str]:
    """Return the files that a checkpoint names."""
    entries = (entry for some in _index(checkpoint).values() for entry in some.values())
    return {entry[0] for entry in entries if entry[0]}


def _index(checkpoint: Path) -> dict[str, dict[str, Entry]]:
    """Return which files a checkpoint names; empty where clients keep nothing there."""
    try:
        index: dict[str, dict[str, Entry]] = json.loads((checkpoint / INDEX).read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{checkpoint / INDEX}: this file cannot be read: {error}") from error
    return index
