"""The run directory: what a run leaves behind, each file whole or not there."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fedpref import __version__
from fedpref.engines import Engine
from fedpref.errors import UserError, command
from fedpref.experiments.run_files import AGREEMENT, EVALUATION, METRICS, read_rows
from fedpref.experiments.run_lock import RunLock
from fedpref.numerics import files, trees
from fedpref.numerics.trees import Tree

CONFIG, DONE = "config.yaml", "done"
ROWS = "rows.jsonl"  # rows that were given in memory
VERSION = "version.json"  # of the directory's format, and of the fedpref that began it
# 1 had no version.json, kept baselines under references/, and said local and centralised; 2 wrote
# all values of clients in every checkpoint
FORMAT, RESUMABLE = 3, 2
JOINED = "newcomers"  # a folder: models of clients that joined when the run was over
HAS_OWN = "clients have models of their own\n"
# names that are their files' names too: they mean the same on every file system
PLAIN = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}(\.[a-z0-9_-]{1,16})?")
# a folder: answers to a client's held-out prompts, before training and after, a file for each
# client
SAMPLES = "samples"
# a folder: of each held-out example a digest of its prompt and whether the model was right, a file
# for each client
OUTCOMES = "outcomes"
BEST = "best_"  # begins the names of a checkpoint's files of the best state so far


def refuse_run(path: Path) -> None:
    """Raise UserError where something else would be written into a run."""
    if RunDirectory(path).has_begun:
        raise UserError(f"{path} is a run. Give another --output.")


def in_runs(name: str, after: str) -> Path:
    """Return a folder in `runs`, by an experiment's name, which may be anything."""
    return Path("runs") / (re.sub(r"[/\\\0]+", "-", name).lstrip(".") + f"-{after}")


def client_folder(run: Path, kind: str, client: str) -> Path:
    """Return the folder of a client's exported model in a run.

    Args:
        run: The run directory.
        kind: `clients` or `newcomers`.
        client: The client's name.
    """
    return run / kind / file_name(client)


def file_name(client: str) -> str:
    """Return the name of a client's files: a name is a label, and may be anything.

    A short name of small letters and digits stands as it is; of any other, what can be read of it
    stands before a digest.
    """
    if PLAIN.fullmatch(client):
        return client
    read = re.sub(r"[^a-z0-9]+", "-", client.lower()).strip("-")[:32]
    return f"{read}~{hashlib.sha256(client.encode()).hexdigest()[:12]}"


def client_path(run: Path, kind: str, client: str, suffix: str = "") -> Path | None:
    """Return where a client's files are in a run; None where there are none.

    Runs of fedpref 0.1 have them under the quoted name.
    """
    for name in (file_name(client), quote(client, safe=" ")):
        try:
            if name not in (".", "..") and (path := run / kind / f"{name}{suffix}").exists():
                return path
        except OSError:  # longer than a file's name may be
            continue
    return None


def _restored(state: Any, engine: Engine, checkpoint: Path, prefix: str = "") -> Any:
    """Return a checkpoint's state, whose fields' names there begin with a prefix."""
    shared = _shared(state, checkpoint, prefix)
    names = [one.name for one in fields(state) if one.name not in shared]
    private = engine.load(checkpoint, [f"{prefix}{name}" for name in names])
    own = {name: getattr(state, name) | private[f"{prefix}{name}"] for name in names}
    return replace(state, **shared, **own)


def _shared(state: Any, checkpoint: Path, prefix: str = "") -> dict[str, Tree]:
    """Return what is shared of a checkpoint, by field; raises UserError where a file is gone."""
    paths = {one.name: checkpoint / f"{prefix}{one.name}.safetensors" for one in fields(state)}
    for name, file in paths.items():
        if isinstance(getattr(state, name), Mapping) and not file.exists():
            raise UserError(f"{file}: this file of the run's checkpoint is gone.")
    return {name: trees.load(file) for name, file in paths.items() if file.exists()}


class RunDirectory:
    """A run's files: config.yaml, metrics.jsonl, evaluation.jsonl, checkpoints/, adapter/ and
    others.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def refuse_existing(self) -> None:
        """Raise UserError if anything stands where this run is to go."""
        if self.path.exists():
            goes_on = f", continue it with `{command('resume', self.path)}`" * self.has_begun
            raise UserError(
                f"{self.path} exists already. Give another --output{goes_on}, or remove it."
            )

    @property
    def has_begun(self) -> bool:
        """Whether the directory has its first files."""
        return (self.path / CONFIG).exists()

    @property
    def has_results(self) -> bool:
        """Whether anything of it, or of its baselines, was measured or kept."""
        return any(any(self.path.rglob(name)) for name in (METRICS, EVALUATION, "round-*"))

    def create(self, contents: Mapping[str, str]) -> None:
        """Make the directory with its first files, all at once.

        Rows may lie there already, which were given in memory.
        """
        rows = self.path / ROWS
        if not rows.exists() or self.has_begun:
            self.refuse_existing()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        begins = f".{self.path.name}.begins-"
        for left in self.path.parent.iterdir():  # by a start that was killed
            if left.name.startswith(begins) and left.name.removeprefix(begins).isdigit():
                shutil.rmtree(left)
        beside = self.path.with_name(f"{begins}{os.getpid()}")
        beside.mkdir()
        version = {"format": FORMAT, "fedpref": __version__}
        for name, text in {**contents, VERSION: json.dumps(version) + "\n"}.items():
            files.write(beside / name, text)
        if rows.exists():
            rows.replace(beside / ROWS)
            self.path.rmdir()
        try:
            beside.replace(self.path)
        except OSError:  # made meanwhile, where locks do not reach
            shutil.rmtree(beside)
            self.refuse_existing()
            raise

    @property
    def version(self) -> Mapping[str, Any]:
        """The directory's `format`, and the version of the `fedpref` that began it.

        Raises:
            UserError: The file that says it cannot be read.
        """
        file = self.path / VERSION
        if not file.exists():
            return {"format": 1, "fedpref": "0.1.0 or older"}
        try:
            written = json.loads(file.read_text())
            return {"format": int(written["format"]), "fedpref": str(written["fedpref"])}
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(
                f'{file}: expected {{"format": {FORMAT}, "fedpref": "{__version__}"}}. Write the '
                "version that began the run, or begin it anew."
            ) from error

    @property
    def format(self) -> int:
        """The version of the directory's format."""
        return int(self.version["format"])

    def refuse_newer(self) -> None:
        """Raise UserError where a newer fedpref has written the run."""
        if self.format > FORMAT:
            raise UserError(
                f"{self.path}: the run is of format {self.format}, by fedpref "
                f"{self.version['fedpref']}; this fedpref "
                f"{__version__} is older and knows formats up to {FORMAT}. Upgrade it: pip "
                "install -U fedpref."
            )

    def refuse_other_format(self) -> None:
        """Raise UserError where a run that is to go on is not of this format."""
        self.refuse_newer()
        if self.format < RESUMABLE:
            raise UserError(
                f"{self.path}: the run is of format {self.format}, by fedpref "
                f"{self.version['fedpref']}, which is older; it cannot go "
                "on with this one. A finished run can be reported, evaluated and exported; begin "
                "others anew."
            )

    def write(self, name: str, text: str) -> None:
        """Write a small file, whole or not at all; raises UserError where that cannot be."""
        files.write(self.path / name, text)

    def read_rows(self, name: str) -> list[dict[str, Any]]:
        """Return the rows of a JSON Lines file, without a last one that a crash cut short.

        Raises:
            UserError: The file is damaged.
        """
        path = self.path / name
        return read_rows(path) if path.exists() else []

    def append(self, name: str, row: Mapping[str, Any]) -> None:
        """Add a row to a JSON Lines file; raises UserError where that cannot be.

        A last row that a crash cut short goes.
        """
        path = self.path / name
        try:
            with path.open("a+b") as file:
                if end := file.seek(0, os.SEEK_END):
                    file.seek(end - 1)
                    if file.read(1) != b"\n":
                        file.truncate(path.read_bytes().rfind(b"\n") + 1)
                file.write(json.dumps(row).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise files.unwritten(path, error) from error

    def cut_rows_after(self, rounds: int) -> None:
        """Remove the rows of later rounds: a resumed run does them again."""
        for name in (METRICS, EVALUATION, AGREEMENT):
            if (self.path / name).exists():
                kept = [row for row in self.read_rows(name) if row["round"] <= rounds]
                self.write(name, "".join(json.dumps(row) + "\n" for row in kept))

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the run within a `with`; raises UserError while another process writes to it."""
        lock = RunLock(self.path)
        lock.acquire()
        try:
            yield
        finally:
            lock.release()

    @property
    def is_held(self) -> bool:
        """Whether another process writes to this run."""
        return RunLock(self.path).is_held

    # ---- checkpoints

    def checkpoint(self, rounds: int, state: Any, engine: Engine, best: Any = None) -> None:
        """Keep the state after so many rounds: shared trees here, private ones by their clients.

        Checkpoints older than the last one go.

        Args:
            rounds: How many.
            state: The algorithm's.
            engine: Whose clients keep the private values.
            best: The best state so far, which is kept beside it.

        Raises:
            UserError: It cannot be written; the last one is as it was.
        """
        if not is_dataclass(state):
            raise TypeError(f"an algorithm's state must be a dataclass, not {type(state).__name__}")
        folder = self.path / "checkpoints"
        for unfinished in folder.glob(".round-*"):
            shutil.rmtree(unfinished)
        name = f"round-{rounds:06d}"
        beside = folder / f".{name}"
        beside.mkdir(parents=True)
        values = {one.name: getattr(state, one.name) for one in fields(state)}
        if best is not None:
            values |= {f"{BEST}{one.name}": getattr(best, one.name) for one in fields(best)}
        for field, value in values.items():
            if isinstance(value, Mapping):
                trees.save(value, beside / f"{field}.safetensors", lasting=True)
        engine.save(
            {field: value for field, value in values.items() if not isinstance(value, Mapping)},
            beside,
        )
        # the one before stays, so that one is whole whatever happens
        older = self.checkpoints()[:-1]
        beside.replace(folder / name)
        files.sync(folder)
        for path in older:
            shutil.rmtree(path)

    def checkpoints(self) -> list[Path]:
        """Return the folders of checkpoints, oldest first."""
        return sorted((self.path / "checkpoints").glob("round-*"))

    def restore(self, state: Any, engine: Engine) -> tuple[Any, int]:
        """Return the newest checkpoint's state and its number of rounds.

        Args:
            state: A fresh one of the same type, which is returned with 0 where there is no
                checkpoint; what one that was never whole has left then goes.
            engine: Whose clients have kept the private values.
        """
        checkpoints = self.checkpoints()
        if not checkpoints:
            shutil.rmtree(self.path / "checkpoints", ignore_errors=True)
            return state, 0
        rounds = int(checkpoints[-1].name.removeprefix("round-"))
        return _restored(state, engine, checkpoints[-1]), rounds

    def restore_best(self, state: Any, engine: Engine) -> Any:
        """Return the best state that the newest checkpoint was told of; see `restore`."""
        return _restored(state, engine, self.checkpoints()[-1], BEST)

    def restore_shared(self, state: Any) -> Any:
        """Return the state with the newest checkpoint's shared trees; clients' values stay as they
        are.

        Raises:
            UserError: There is no checkpoint.
        """
        checkpoints = self.checkpoints()
        if not checkpoints:
            raise UserError(
                f"{self.path}: the run has no checkpoint. "
                f"`{command('resume', self.path)}` takes it up."
            )
        return replace(state, **_shared(state, checkpoints[-1]))

    # ---- the end

    @property
    def done(self) -> bool:
        """Whether the line of this directory is done."""
        return (self.path / DONE).exists()

    @property
    def has_own(self) -> bool:
        """Whether clients of a finished run have models of their own, here or at their sites."""
        return self.done and (self.path / DONE).read_text() == HAS_OWN

    def finish(self, has_own: bool = False) -> None:
        """Mark the line as done."""
        self.write(DONE, HAS_OWN if has_own else "")
