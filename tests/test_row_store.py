"""Rows beyond a limit lie in a file, and clients are the same as with rows in memory."""

from __future__ import annotations

import os
import pickle
import tempfile
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import make_rows, write_rows
from fedpref import UserError
from fedpref.data import (
    IID,
    Builtin,
    BySize,
    ClientData,
    Dirichlet,
    Feedback,
    Files,
    Natural,
    Opinion,
    Preference,
    Prompt,
    Row,
)
from fedpref.data.placed import Placed
from fedpref.data.preferences import Conversation
from fedpref.data.reading import read
from fedpref.data.row_store import RowStore, filtered
from fedpref.numerics import trees
from test_private_sites import parsed, run_to

TOOLS = Conversation(({"role": "user", "content": "Add?"},), {"tools": [{"name": "add"}]})
ROWS: list[Row] = [
    Preference("Hi?", " Yes.", " No.", "rows, line 1", {"client": "a"}, "train"),
    Preference(TOOLS, ({"role": "assistant", "content": "3"},), (), "rows, line 2"),
    Feedback("Ho?", " Ho.", True, "rows, line 3", {"time": 3.5}),
    Opinion("Tea?", ("yes", "no"), (0.75, 0.25), "rows, line 4"),
    Prompt("Write.", "rows, line 5", side="test"),
]


def stored(rows: Sequence[Row], room: int | None) -> RowStore:
    store = RowStore(room)
    for row in rows:
        store.append(row)
    return store


def filed(rows: Sequence[Row]) -> Sequence[Row]:
    """Rows that lie in a file."""
    return stored(rows, 0).some(range(len(rows)))


@pytest.mark.parametrize("room", [None, 10**6, 0, 1000])
def test_rows_come_back_as_they_were(room: int | None) -> None:
    store = stored(ROWS, room)
    assert len(store) == len(ROWS)
    assert [*store] == ROWS
    assert [*store.some([4, 1])] == [ROWS[4], ROWS[1]]
    assert [*store[1:3]] == ROWS[1:3]
    found = store[1].prompt
    assert isinstance(found, Conversation)
    assert found.given == TOOLS.given
    assert store[-1] == ROWS[-1]
    with pytest.raises(IndexError):
        store[5]


def test_beyond_the_limit_all_rows_lie_in_a_file_that_nobody_else_can_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert isinstance(stored(ROWS, 10**6).some([0]), tuple)
    some = filed(ROWS)
    assert not isinstance(some, tuple)
    assert not [*tmp_path.iterdir()]  # it has no name
    assert [*some[1:]] == ROWS[1:]
    assert [*filtered(some, lambda row: isinstance(row, Preference))] == ROWS[:2]
    assert filtered(ROWS, lambda row: isinstance(row, Prompt)) == (ROWS[4],)
    assert pickle.loads(pickle.dumps(some)) == tuple(ROWS)  # where there is no such file


def test_a_full_disk_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: Path("/dev/full").open("w+b"))
    with pytest.raises(UserError, match=r"rows beyond spill_above_mb .* No space left on device"):
        [*filed(ROWS)]


def test_a_folder_that_is_gone_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    with pytest.raises(UserError, match=r"gone: rows beyond spill_above_mb .* No such file"):
        filed(ROWS)


@pytest.mark.parametrize("much", ["columns", "characters"])
def test_all_text_of_a_row_counts(much: str) -> None:
    text = "x" * 9000 if much == "columns" else "\N{CJK UNIFIED IDEOGRAPH-4E2D}" * 4500
    rows = [Preference("Hi?", " Yes.", text, f"row {k}", {"story": text}) for k in range(10)]
    assert isinstance(stored(rows, 300_000).some([0]), tuple)
    assert not isinstance(stored(rows, 100_000).some([0]), tuple)


def test_a_column_that_is_no_text_counts_too() -> None:
    """A vector of each row, or what a program has noted."""
    for column in ([0.5] * 1000, {"seen": tuple(range(1000))}):
        rows = [Prompt("Hi?", f"row {k}", {"more": column}) for k in range(10)]
        assert isinstance(stored(rows, 600_000).some([0]), tuple)
        assert not isinstance(stored(rows, 100_000).some([0]), tuple)


class Told(Preference):
    """A row of a source of one's own."""


def test_rows_of_other_kinds_lie_there_too_unless_no_file_can_hold_them() -> None:
    told = Told("Hi?", " Yes.", " No.", "row 1", {"time": 3.5})
    (found,) = filed([told])
    assert isinstance(found, Told)
    assert found == told
    with pytest.raises(UserError, match=r"^row 2: it holds what no file can hold"):
        filed([Prompt("Hi?", "row 2", {"call": lambda: 0})])


def test_what_is_asked_for_is_read_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    client = ClientData("a", filed(ROWS), filed(ROWS[:1]))
    reads: list[int] = []
    read_at = os.pread

    def counted(file: int, size: int, at: int) -> bytes:
        reads.append(at)
        return read_at(file, size, at)

    monkeypatch.setattr(os, "pread", counted)
    assert (client.size, len(client.train[1:3])) == (6, 2)
    assert not reads
    assert client.train[2] == ROWS[2]
    assert len(reads) == 1
    assert client.rows == (*ROWS, ROWS[0])
    assert client.about() == ClientData("a", tuple(ROWS), tuple(ROWS[:1])).about()
    assert client.about()[0] == 1


def test_forked_processes_read_at_once() -> None:
    rows: list[Row] = [Prompt(f"{k} " * 50, f"row {k}") for k in range(400)]
    some = filed(rows)
    children = []
    for _ in range(3):
        if (child := os.fork()) == 0:
            os._exit(any([*some] != rows for _ in range(5)))
        children.append(child)
    assert [*some] == rows
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]


@pytest.mark.parametrize("apart", [False, True], ids=["together", "apart"])
@pytest.mark.parametrize(
    "how",
    [
        Natural(),
        Natural(clients_per_value=2, max_rows=20, min_test_rows=1),
        IID(clients=3, max_rows=50),
        Dirichlet(column="client", clients=3, alpha=5.0),
        BySize(clients=4),
    ],
    ids=lambda how: f"{how.name}",
)
def test_clients_have_the_same_rows_wherever_these_lie(how: Any, apart: bool) -> None:
    source = Builtin(validation_fraction=0.25)
    known, found = (read(source, how, 3, apart=apart, room=room) for room in (None, 0))
    assert not isinstance(found.clients[0].train, tuple)
    as_tuples = [
        ClientData(one.name, *map(tuple, (one.train, one.test, one.validation)))
        for one in found.clients
    ]
    assert as_tuples == [*known.clients]
    assert replace(found, clients=()) == replace(known, clients=())


class Halves(IID):
    """Takes rows as the list of pairs that they look like."""

    def assign(self, rows: Any, rng: Any) -> Any:
        half = len(rows) // 2
        return {
            "even": rows[:half:2] + rows[half::2],
            "odd": [*rows[1:half:2], *rows[half + 1 :: 2]],
        }


class Few(Natural):
    """Leaves rows out and lets the built-in one do the rest."""

    def assign(self, rows: Any, rng: Any) -> Any:
        return super().assign([pair for k, pair in enumerate(rows) if k % 4], rng)


@pytest.mark.parametrize("how", [Halves(), Few()], ids=["halves", "few"])
def test_a_partition_of_ones_own_has_its_rows_in_memory(how: Any, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", make_rows([40, 40]))
    source = Files(path=str(path))
    found = read(source, how, 0, room=0).clients
    assert len(found) == 2
    assert all(isinstance(one.train, tuple) for one in found)
    assert found == read(source, how, 0).clients


def test_pairs_are_added_to_as_lists_are() -> None:
    pairs: list[Any] = [("train", row) for row in ROWS]
    placed = Placed.of(pairs)
    assert placed[1:] + placed[:1] == [*pairs[1:], pairs[0]]
    assert placed + pairs[:1] == [*pairs, pairs[0]] == pairs + Placed.of(pairs[:1])
    assert Placed.of([]).groups("client") == {}


def test_a_run_ends_with_the_same_bits_wherever_its_rows_lie(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", make_rows([9, 8, 10]))
    data = {"name": "files", "path": str(rows), "test_fraction": 0.3}
    content = deepcopy({**settings, "data": data, "rounds": 1})
    models = []
    for room in (0, 512):
        spec = parsed(content, spill_above_mb=room)
        assert isinstance(spec.read().clients[0].train, tuple) == (room > 0)
        folder = run_to(spec, tmp_path / f"{room}")
        models.append(trees.load(folder.path / "adapter" / "adapter_model.safetensors"))
    assert models[0].keys() == models[1].keys()
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
