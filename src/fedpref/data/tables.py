"""Rows out of files and of the Hub: JSON Lines, JSON, CSV, TSV, Parquet, folders, Hub datasets."""

from __future__ import annotations

import csv
import gzip
import json
import re
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from fedpref.data.hub import look_for_hub
from fedpref.errors import UserError, reason

Record = tuple[str, Mapping[str, Any]]  # "file, row 3" and the row
SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
SEPARATORS = {".csv": ",", ".tsv": "\t"}
SHOWN = 4  # files that a warning names
# what says in a file's name to `datasets` of which split it is
SPLIT = re.compile(
    r"(^|[^a-z])(train|training|test|testing|eval|evaluation|valid|validation|val|dev)([^a-z]|$)",
    re.IGNORECASE,
)
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def read_table(path: str, *, split: str = "train", **hub: Any) -> Iterator[Record]:
    """Yield the rows of a file, of a dataset folder or of a Hub dataset, each with where it stands.

    Args:
        path: The file, folder or Hub id.
        split: Which split of a folder or Hub dataset.
        **hub: What else `datasets.load_dataset` is given for these.

    Raises:
        UserError: There is nothing there, it cannot be reached, or it is something else.
    """
    local = Path(path).expanduser()
    if local.is_file():
        yield from read_file(local)
    elif local.is_dir() or (HUB_ID.fullmatch(path) and not _is_file_name(path)):
        yield from _read_dataset(str(local) if local.is_dir() else path, split, hub)
    else:
        raise UserError(
            f"data.path: there is no file or folder {path!r}. Give a {', '.join(SUFFIXES)} file, "
            "a dataset folder or a Hub id."
        )


def _is_file_name(path: str) -> bool:
    """Return whether nobody calls a dataset so, but a file."""
    return path.lower().endswith((*SUFFIXES, ".gz", ".txt", ".xlsx", ".zip"))


def local_table(folder: str, stem: str) -> Path | None:
    """Return the file of a name in a folder, JSON Lines or CSV, maybe gzipped; None without one."""
    for suffix in (".jsonl.gz", ".jsonl", ".csv.gz", ".csv"):
        if (path := Path(folder).expanduser() / f"{stem}{suffix}").is_file():
            return path
    return None


def read_file(path: Path) -> Iterator[Record]:
    """Yield the rows of one local file, each with where it stands; raises UserError."""
    kind = (path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix).lower()
    if kind not in SUFFIXES:
        raise UserError(
            f"{path}: unknown kind of file {path.suffix!r}; expected {', '.join(SUFFIXES)}, or "
            "one of them with .gz."
        )
    if kind == ".parquet":
        import pyarrow.parquet

        number = 0
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                for batch in file.iter_batches():
                    for record in batch.to_pylist():
                        number += 1
                        yield f"{path}, row {number}", record
        # Arrow's own errors are of several kinds, and texts may not be UTF-8
        except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
            raise UserError(f"{path}: not a Parquet file: {reason(error)}") from error
        return
    # a file is read as it is needed: it may be larger than memory
    opened: Any = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(
            path, "rt", encoding="utf-8-sig", newline="" if kind in SEPARATORS else "\n"
        ) as file:
            yield from _read_text(path, kind, file)
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(
            f"{path}: cannot be read as {'gzipped ' if path.suffix == '.gz' else ''}UTF-8 text: "
            f"{error}. Save it as UTF-8."
        ) from error


def _read_text(path: Path, kind: str, file: TextIO) -> Iterator[Record]:
    if kind in SEPARATORS:
        yield from _read_csv(path, kind, file)
    elif kind == ".json":
        text = file.read()
        if (begins := text.lstrip()[:1]) not in ("[", ""):
            raise UserError(
                f"{path}: expected a JSON list of rows, which begins with [, found {begins!r}. One "
                "row a line is a .jsonl file."
            )
        records = _parsed(text, f"{path}")
        for number, record in enumerate(records, 1):
            if not isinstance(record, dict):
                raise UserError(
                    f"{path}, row {number}: expected a JSON object, found {type(record).__name__}."
                )
            yield f"{path}, row {number}", record
    else:
        for number, line in enumerate(file, 1):
            if line.strip():
                record = _parsed(line, f"{path}, line {number}")
                if not isinstance(record, dict):
                    raise UserError(
                        f"{path}, line {number}: expected a JSON object, found "
                        f"{type(record).__name__}."
                    )
                yield f"{path}, line {number}", record


def _read_csv(path: Path, kind: str, file: TextIO) -> Iterator[Record]:
    csv.field_size_limit(1 << 30)  # the default is less than a long conversation
    try:
        # a quote that nothing closes would make one cell of all rows to come
        reader = csv.DictReader(file, delimiter=SEPARATORS[kind], strict=True)
        # `prompt, chosen` means the column chosen
        header = [name.strip() for name in reader.fieldnames or ()]
        if twice := sorted({name for name in header if header.count(name) > 1}):
            raise UserError(f"{path}: the header has the column {twice[0]!r} twice.")
        reader.fieldnames = header
        if kind == ".csv" and len(header) == 1 and (";" in header[0] or "\t" in header[0]):
            between = "semicolons" if ";" in header[0] else "tabs"
            raise UserError(
                f"{path}: its cells seem to be parted by {between}. Save it with commas"
                f"{', or name it .tsv' if between == 'tabs' else ''}."
            )
        for number, record in enumerate(reader, 1):
            if None in record or None in record.values():
                raise UserError(
                    f"{path}, row {number}: more or fewer cells than the header has columns. "
                    f"Quote cells that hold {'commas' if kind == '.csv' else 'tabs'}."
                )
            yield f"{path}, row {number}", record
    except csv.Error as error:
        raise UserError(
            f"{path}: not valid {kind[1:].upper()}: {error}. A cell that is quoted ends with a "
            "quote, and a quote within it is written twice."
        ) from error


def _parsed(text: str, where: str) -> Any:
    try:
        return _DECODER.decode(text)
    # of numbers of thousands of digits, and of lists in lists in lists
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON: {reason(error)}") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object; raises ValueError where it says something twice."""
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} is there twice")
    return made


_DECODER = json.JSONDecoder(object_pairs_hook=_once)  # json.loads makes one for each line


def _own_files(path: str, split: str, given: Mapping[str, Any]) -> list[Path]:
    """Return a local folder's files of a split, where all are read as they stand.

    `datasets` guesses types of columns: `007` would be a number, `NA` nothing, a day a time. Of a
    folder with several kinds of file it takes one, and of one with files that are named after
    splits no others; what it leaves out is warned of.
    """
    import datasets

    if not Path(path).is_dir():
        return []
    found = datasets.load_dataset_builder(path, **given).config.data_files or {}
    named = {name: [Path(file) for file in some] for name, some in found.items()}
    files = named.get(split, [])
    used = {file.resolve() for some in named.values() for file in some}
    unread = [file for file in _tables(Path(path)) if file.resolve() not in used]
    is_named = any(SPLIT.search(str(file.relative_to(path))) for file in _within(used, path))
    card = Path(path) / "README.md"
    if card.is_file() and "configs:" in card.read_text(encoding="utf-8", errors="replace"):
        unread = []  # the folder says itself what is read
    if not given and split == "train" and list(named) == ["train"] and not is_named:
        files, unread = [*files, *unread], []
    if unread:
        shown = ", ".join(str(file.relative_to(path)) for file in unread[:SHOWN])
        warnings.warn(
            f"{path}: {len(unread)} of its files are not read ({shown}"
            f"{', ...' if len(unread) > SHOWN else ''}): others are named after splits, as in "
            f"{next(iter(used)).name if used else 'train.jsonl'}. Name all of them so, or none.",
            stacklevel=2,
        )
    kinds = {"".join(file.suffixes[-2:]).removesuffix(".gz") for file in files}
    are_text = all(kind.endswith((*SEPARATORS, ".jsonl")) for kind in kinds)
    is_ours = are_text or len(kinds) > 1
    return sorted(files) if is_ours and all(file.is_file() for file in files) else []


def _within(files: Iterable[Path], folder: str) -> list[Path]:
    """Return files as they are called from a folder on, those that lie in it."""
    whole = Path(folder).resolve()
    return [Path(folder) / file.relative_to(whole) for file in files if whole in file.parents]


def _has_rows(file: Path) -> bool:
    """Return whether a file may hold rows: of JSON, that it begins as a list."""
    if not file.name.endswith((".json", ".json.gz")):
        return True
    opened: Any = gzip.open if file.suffix == ".gz" else open
    try:
        with opened(file, "rt", encoding="utf-8-sig") as begun:
            return bool(begun.read(64).lstrip().startswith("["))
    except (OSError, ValueError, EOFError, zlib.error):
        return False


def _tables(folder: Path) -> list[Path]:
    """Return the files of rows in a folder, without those that describe a dataset."""
    return sorted(
        file
        for file in folder.rglob("*")
        if file.name.removesuffix(".gz").endswith(SUFFIXES)
        and _has_rows(file)
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    )


def other_splits(path: str, split: str, name: str | None) -> list[str]:
    """Return the splits of a dataset's folder beside one; none of a file or of the Hub."""
    import datasets

    if not Path(path).is_dir():
        return []
    if (Path(path) / "dataset_dict.json").exists():
        try:
            known = json.loads((Path(path) / "dataset_dict.json").read_text())["splits"]
        except (ValueError, KeyError, TypeError):  # said where it is read
            known = []
    elif is_one_dataset(Path(path)):
        known = []
    else:
        try:
            known = datasets.load_dataset_builder(path, name).config.data_files or {}
        except (OSError, ValueError, datasets.exceptions.DatasetsError):  # likewise
            known = []
    return sorted(set(map(str, known)) - {split})


def _advice(path: Path) -> str:
    """Return what to do about a dataset that does not load."""
    if path.is_dir():
        return (
            "Files are told apart by splits in their names (train.jsonl, test.jsonl), and without "
            "any are all of the split 'train'. data.train_split names another; data.path may be "
            "one of the files."
        )
    return (
        "Check the name and the network, log in with `hf auth login` if it is gated, or give a "
        "local file or folder."
    )


def is_one_dataset(path: Path) -> bool:
    """Return whether a folder is one data set of `datasets`, without splits."""
    return (path / "state.json").exists()


def _undecoded(feature: Any) -> Any:
    """Return a feature of `datasets`, or several, whose pictures and sounds are not decoded."""
    if isinstance(feature, dict):
        return {name: _undecoded(part) for name, part in feature.items()}
    if isinstance(feature, list):
        return [_undecoded(part) for part in feature]
    if hasattr(feature, "decode"):
        return replace(feature, decode=False)
    inner = getattr(feature, "feature", None)
    return feature if inner is None else replace(feature, feature=_undecoded(inner))


def _read_dataset(path: str, split: str, hub: Mapping[str, Any]) -> Iterator[Record]:
    import datasets

    look_for_hub(path)
    datasets.disable_progress_bars()
    try:
        if is_one_dataset(Path(path)) or (Path(path) / "dataset_dict.json").exists():
            stored = datasets.load_from_disk(path)
            table = stored[split] if isinstance(stored, dict) else stored
        else:
            given = {name: value for name, value in hub.items() if value is not None}
            if files := _own_files(path, split, given):
                for file in files:
                    yield from read_file(file)
                return
            table = datasets.load_dataset(path, split=split, **given)
    except KeyError as error:
        raise UserError(f"{path}: there is no split {split!r}.") from error
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        kind = (
            "dataset folder"
            if Path(path).is_dir()
            else "Hub dataset (and no file or folder of that name exists)"
        )
        raise UserError(
            f"data.path: {path!r}, split {split!r}, could not be loaded as a {kind}: "
            f"{reason(error)}. {_advice(Path(path))}"
        ) from error
    # a folder may keep a form of arrays that somebody read it in; pictures and sounds stay as bytes
    table = table.with_format(None)
    for name, feature in table.features.items():
        if (kept := _undecoded(feature)) != feature:
            table = table.cast_column(name, kept)
    for number, record in enumerate(table, 1):
        yield f"{path} ({split}), row {number}", record
