"""The frozen trunk: what lies below the first adapter, whose states are computed once."""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fedpref.models.kept import Kept
from fedpref.models.packed import Layout, Row

SUFFIX = "-trunk.sqlite"  # ends the names of files of states
BATCH = 4096  # tokens whose states are computed at a time


class _ReachedError(Exception):
    """The end of the trunk, with the states that have come there."""


# what a call of the model does with the trunk: states stand for it, or end the call; None runs it
_STATES: ContextVar[Tensor | type[_ReachedError] | None] = ContextVar("states", default=None)


class Trunk:
    """Layers below the first that has an adapter.

    Args:
        model: The model with its adapter.
        adapted: Names of the modules that have one.
    """

    def __init__(self, model: nn.Module, adapted: Collection[str]) -> None:
        self.layers = _below(model, adapted)
        self.works = bool(self.layers)
        """Whether states can stand for the layers."""
        for place, layer in enumerate(self.layers):
            layer.forward = _standing(layer.forward, place + 1 == len(self.layers))

    def ends(self, run: Callable[[], Any]) -> Float[Tensor, "R T D"]:
        """Return the states that come to the trunk's end in a call of the model.

        Args:
            run: Calls it; it is broken off there.
        """
        token = _STATES.set(_ReachedError)
        try:
            run()
        except _ReachedError as reached:
            states: Tensor = reached.args[0]
            return states
        finally:
            _STATES.reset(token)
        raise RuntimeError("the model has not come to its trunk's end")

    @property
    def given(self) -> Float[Tensor, "R T D"] | None:
        """The states that stand for the trunk, if they do."""
        states = _STATES.get()
        return states if isinstance(states, Tensor) else None

    @property
    def is_ending(self) -> bool:
        """Whether calls of the model are broken off at the trunk's end."""
        return _STATES.get() is _ReachedError

    @contextmanager
    def standing(self, states: Float[Tensor, "R T D"]) -> Iterator[None]:
        """Let states stand for the trunk in calls of the model, within a `with`."""
        token = _STATES.set(states)
        try:
            yield
        finally:
            _STATES.reset(token)


def _below(model: nn.Module, adapted: Collection[str]) -> list[Any]:
    """Return the layers below the first of `adapted`; none where it is not in a row of layers."""
    row = row_of_layers(model)
    if row is None or not all(name_of.startswith(f"{row[0]}.") for name_of in adapted):
        return []
    name, layers = row
    numbers = [
        int(found[1])
        for name_of in adapted
        if (found := re.match(r"(\d+)\.", name_of.removeprefix(f"{name}.")))
    ]
    return list(layers)[: min(numbers)]


def row_of_layers(model: nn.Module) -> tuple[str, nn.ModuleList] | None:
    """Return the row of a decoder's layers and its name; None where there is none.

    It is the longest of the outermost ones of the part that reads text: towers may lie beside it,
    and experts within it.
    """
    decoder: Any = getattr(model, "get_decoder", lambda: model)()
    within = set(decoder.modules())
    rows = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and module in within
    }
    outer = {
        name: row
        for name, row in rows.items()
        if not any(name.startswith(f"{other}.") for other in rows)
    }
    return max(outer.items(), key=lambda item: len(item[1]), default=None)


def _standing(usual: Callable[..., Any], is_last: bool) -> Callable[..., Any]:
    """Return a layer's forward for which states may stand."""
    size: int | None = None  # of the tuple that it returns; None for a tensor

    def forward(*arguments: Any, **settings: Any) -> Any:
        nonlocal size
        states = _STATES.get()
        if isinstance(states, Tensor):
            return states if size is None else (states, *[None] * (size - 1))
        output = usual(*arguments, **settings)
        size = len(output) if isinstance(output, tuple) else None
        if states is _ReachedError and is_last:
            raise _ReachedError(output if size is None else output[0])
        return output

    return forward


class States:
    """States at the trunk's end by prompt and answer, each computed once.

    Args:
        limit: Bytes above which nothing more is kept.
    """

    def __init__(self, limit: int) -> None:
        self.kept = Kept(limit)

    def of(
        self,
        rows: Sequence[Row],
        layout: Layout,
        dtype: torch.dtype,
        compute: Callable[[Sequence[Row]], tuple[Float[Tensor, "R T D"], Layout]],
    ) -> Float[Tensor, "R T D"]:
        """Return the states of a layout; those that are not kept are computed, and kept.

        Args:
            rows: Prompts with their answers, which the layout is of.
            layout: Where they lie, in either form.
            dtype: Of the states.
            compute: Returns the states of rows, and where they lie.
        """
        keys = keys_of(rows, layout)
        found = {key: _read(value, dtype) for key, value in self.kept.find(set(keys)).items()}
        for some in _batches(_missing(rows, found)):
            states, where = compute(some)
            flat = states.flatten(0, 1)
            new = {
                key: flat[own.start : own.stop].cpu()
                for key, (_, own) in zip(keys_of(some, where), where.parts, strict=True)
            }
            self.kept.add({key: _bytes(value) for key, value in new.items() if key not in found})
            found |= new
        width = next(iter(found.values())).shape[-1]
        whole = torch.zeros(layout.ids.numel(), width, dtype=dtype)
        for key, (_, own) in zip(keys, layout.parts, strict=True):
            whole[own.start : own.stop] = found[key]
        return whole.to(layout.ids.device).view(*layout.ids.shape, width)


def remove_states(folder: Path) -> None:
    """Remove the files of states in a folder."""
    for file in folder.glob(f"*{SUFFIX}*"):
        file.unlink()


def keys_of(rows: Sequence[Row], layout: Layout) -> list[bytes]:
    """Return what tells each part of a layout from all others: its tokens and those before it."""
    # a row for each answer, its prompt before it
    padded = len(layout.parts) == 2 * sum(len(answers) for _, answers in rows)
    keys = []
    for prompt, answers in rows:
        opening = key(prompt, ())
        keys += [] if padded else [opening]
        for answer in answers:
            keys += [opening] * padded + [key(prompt, answer)]
    return keys


def key(prompt: Sequence[int], answer: Sequence[int]) -> bytes:
    """Return a hash of tokens; whether they are scored does not matter to states."""
    text = array("q", [len(prompt), *prompt, *answer]).tobytes()
    return blake2b(text, digest_size=16).digest()


def _missing(rows: Sequence[Row], found: Mapping[bytes, Any]) -> list[Row]:
    """Return rows of what is not found, each part once."""
    missing: dict[tuple[int, ...], dict[tuple[int, ...], None]] = {}
    for prompt, answers in rows:
        for answer in answers:
            if not {key(prompt, ()), key(prompt, answer)} <= found.keys():
                missing.setdefault(tuple(prompt), {})[tuple(answer)] = None
    return [(prompt, list(answers)) for prompt, answers in missing.items()]


def _batches(rows: Sequence[Row]) -> Iterator[list[Row]]:
    batch: list[Row] = []
    tokens = 0
    for row in rows:
        size = len(row[0]) + sum(map(len, row[1]))
        if batch and tokens + size > BATCH:
            yield batch
            batch, tokens = [], 0
        batch.append(row)
        tokens += size
    if batch:
        yield batch


def _bytes(states: Float[Tensor, "t D"]) -> bytes:
    content: bytes = states.contiguous().view(torch.uint8).numpy().tobytes()
    # its width in front, by which it is read
    return states.shape[-1].to_bytes(4, "little") + content


def _read(content: bytes, dtype: torch.dtype) -> Float[Tensor, "t D"]:
    width = int.from_bytes(content[:4], "little")
    return torch.frombuffer(bytearray(content[4:]), dtype=dtype).view(-1, width)
