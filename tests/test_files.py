"""Files that are whole on the disk, or not there."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from fedpref.errors import UserError
from fedpref.numerics import files, trees


def _full(_: int) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("content", ["words", b"bytes"])
def test_a_file_that_is_written_has_its_content(tmp_path: Path, content: str | bytes) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    files.write(path, content)
    assert path.read_text() == (content if isinstance(content, str) else content.decode())
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    monkeypatch.setattr(os, "fsync", _full)
    with pytest.raises(UserError, match=f"{path}: this file cannot be written.*No space left"):
        files.write(path, "new")
    with pytest.raises(UserError, match=f"{path}: this file cannot be written.*No space left"):
        trees.save({"a": torch.ones(3)}, path, lasting=True)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_gone_is_said(tmp_path: Path) -> None:
    path = tmp_path / "gone" / "file"
    with pytest.raises(UserError, match="cannot be written"):
        files.write(path, "new")
    with pytest.raises(UserError, match="cannot be written"):
        trees.save({"a": torch.ones(3)}, path)


def test_where_nothing_can_be_written_is_known_before(tmp_path: Path) -> None:
    files.refuse_unwritable(tmp_path / "new" / "mine.json")
    assert list((tmp_path / "new").iterdir()) == [], "trying leaves nothing"
    with pytest.raises(UserError, match="this is a folder"):
        files.refuse_unwritable(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        files.refuse_unwritable(tmp_path / "file" / "mine.json")


def test_a_file_system_may_be_unable_to_sync_folders_but_not_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", _full)
    files.sync(tmp_path)
    path = tmp_path / "file"
    path.touch()
    with pytest.raises(OSError, match="No space left"):
        files.sync(path)


def test_a_tree_that_is_read_back_otherwise_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tree.safetensors"
    tree = {"a": torch.arange(4.0)}
    trees.save(tree, path, lasting=True)
    assert trees.digest(trees.load(path)) == trees.digest(tree)
    monkeypatch.setattr(trees, "load", lambda _: {"a": torch.zeros(4)})
    with pytest.raises(UserError, match="what was read back is something else"):
        trees.save({"a": torch.ones(4)}, path, lasting=True)
    monkeypatch.undo()
    assert torch.equal(trees.load(path)["a"], tree["a"])
    assert list(tmp_path.iterdir()) == [path]


def test_trees_that_must_be_apart_share_no_name() -> None:
    one, other = {"a": torch.ones(1)}, {"b": torch.ones(1)}
    assert trees.apart(one, other) == {**one, **other}
    with pytest.raises(ValueError, match="two trees have a tensor 'a'"):
        trees.apart(one, other, {"a": torch.zeros(1)})


def test_a_sum_that_is_added_to_is_the_sum_to_the_same_bits() -> None:
    one, other = ({"a": torch.randn(50), "b": torch.randn(3)} for _ in range(2))
    expected = trees.add(one, other)
    total = trees.add_to({name: tensor.clone() for name, tensor in one.items()}, other)
    assert trees.digest(total) == trees.digest(expected)
    with pytest.raises(ValueError, match="'b'"):
        trees.add_to(total, {"a": other["a"]})
