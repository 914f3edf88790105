"""What is done on a GPU alone, on a processor: recordings, casts and sums of all at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.attention.varlen
from torch import Tensor

from fedpref.models.casting import _Cast
from fedpref.models.graphs import Graphs
from fedpref.models.language import LanguageModel
from fedpref.models.model_settings import Model
from fedpref.models.packed import Layout, Row, sums_at_once
from fedpref.models.variable_length import Places, Size, by_variable_length
from fedpref.numerics.trees import Tree

ROWS: tuple[Row, ...] = (
    ([1, 2, 3], ([4, 5], [6, 7, 8, 9])),
    ([10, 11], ([12], [13, 14, 15])),
    ([16], ([17, 18, 19],)),
)
OTHERS: tuple[Row, ...] = (([21, 22], ([23, 24, 25], [26])), ([27, 28, 29], ([30],)), ([3], ([4],)))


def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor,
    seen: Tensor,
    *longest: int,
    scale: float,
    enable_gqa: bool,
    window_size: tuple[int, int],
) -> Tensor:
    """What PyTorch's kernel computes; what belongs to no sequence is left as no number."""
    mixed = torch.full_like(query, float("nan"))
    bounds = zip(pairwise(starts.tolist()), pairwise(seen.tolist()), strict=True)
    for (a, b), (c, d) in bounds:
        assert b - a <= longest[0]
        assert d - c <= longest[1]
        mask = torch.ones(b - a, d - c, dtype=torch.bool).tril(d - c - (b - a))
        q, k, v = (t.transpose(0, 1)[None] for t in (query[a:b], key[c:d], value[c:d]))
        found = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, mask, scale=scale, enable_gqa=enable_gqa
        )
        mixed = torch.cat([mixed[:a], found[0].transpose(0, 1), mixed[b:]])
    return mixed


class Played:
    """Records by doing the work again, into the same memory, as a GPU's recording does."""

    def __init__(self) -> None:
        self.played = 0

    def __call__(self, work: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        found = work()

        def replay() -> None:
            self.played += 1
            again = work()
            lists = [one if isinstance(one, list) else [one] for one in (found, again)]
            with torch.no_grad():
                for mine, new in zip(*lists, strict=True):
                    if mine is not None:
                        mine.copy_(new)

        return found, replay


def recorded(path: Path, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> LanguageModel:
    """A model in float32 with the attention of variable length, whose launches are recorded."""
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", varlen_attn)
    language = LanguageModel(Model(path=str(path), dtype="float32", device="cpu", **settings))
    language.kernel = by_variable_length
    language.graphs = Graphs("tiny", language.computed, Played())
    return language


def played(language: LanguageModel) -> int:
    """How often a model's recordings were played."""
    assert language.graphs is not None
    assert isinstance(language.graphs.record, Played)
    return language.graphs.record.played


def adapter_of(language: LanguageModel, seed: int = 0) -> Tree:
    """An adapter that changes the model."""
    draw = torch.Generator().manual_seed(seed)
    fresh = language.init(draw)
    return {name: 0.3 * torch.randn(t.shape, generator=draw) for name, t in fresh.items()}


def leaves_of(adapter: Tree) -> dict[str, Tensor]:
    """The adapter as it is trained."""
    return {name: tensor.clone().requires_grad_() for name, tensor in adapter.items()}


def slopes(language: LanguageModel, adapter: Tree, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
    """Scores of a batch, and their gradient, as one row."""
    leaves = leaves_of(adapter)
    scores = language.log_probabilities(leaves, rows, training=True)
    (scores * torch.arange(1.0, len(scores) + 1)).sum().backward()
    return scores.detach(), torch.cat([leaves[n].grad.flatten() for n in sorted(leaves)])  # type: ignore[union-attr]


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2"])
def test_what_is_played_is_what_was_computed(
    architecture: str, models: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    language = recorded(models(architecture), monkeypatch)
    plain = LanguageModel(Model(path=str(models(architecture)), dtype="float32", device="cpu"))
    for seed, rows in enumerate([ROWS, OTHERS, ROWS, OTHERS]):
        adapter = adapter_of(plain, seed)
        before = played(language)
        found, expected = slopes(language, adapter, rows), slopes(plain, adapter, rows)
        assert (played(language) > before) == (seed > 0)  # both batches are of one size
        for mine, own in zip(found, expected, strict=True):
            assert (mine - own).norm() <= 1e-4 * own.norm()


def test_states_that_were_overwritten_are_computed_again_for_their_gradient(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    language = recorded(tiny, monkeypatch)
    plain = LanguageModel(Model(path=str(tiny), dtype="float32", device="cpu"))
    adapters = [leaves_of(adapter_of(plain, seed)) for seed in (0, 1)]
    for _ in range(2):
        language.log_probabilities(adapters[0], ROWS, training=True).sum().backward()
    for leaves in adapters:
        for leaf in leaves.values():
            leaf.grad = None
    before = played(language)
    both = [
        language.log_probabilities(leaves, rows, training=True)
        for leaves, rows in zip(adapters, (ROWS, OTHERS), strict=True)
    ]
    (both[0].sum() + both[1].sum()).backward()
    # two of two, one of them or both once more, and two gradients
    assert played(language) - before in (5, 6)
    for leaves, rows in zip(adapters, (ROWS, OTHERS), strict=True):
        own = leaves_of({name: leaf.detach() for name, leaf in leaves.items()})
        plain.log_probabilities(own, rows, training=True).sum().backward()
        for name, leaf in own.items():
            assert leaf.grad is not None
            torch.testing.assert_close(leaves[name].grad, leaf.grad, rtol=1e-3, atol=1e-4)


def test_rows_without_an_adapter_or_a_gradient_are_recorded_too(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    language = recorded(tiny, monkeypatch)
    plain = LanguageModel(Model(path=str(tiny), dtype="float32", device="cpu"))
    adapter = adapter_of(plain)
    with torch.no_grad():
        for params in (None, adapter):
            expected = plain.log_probabilities(params, ROWS)
            for _ in range(3):
                before = played(language)
                torch.testing.assert_close(language.log_probabilities(params, ROWS), expected)
            assert played(language) == before + 1
    assert language.graphs is not None
    assert len(language.graphs.recordings) == 2


def test_states_that_stand_for_the_trunk_are_an_input(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    placed = {"lora_layers_to_transform": "last-1", "trunk_states": "memory"}
    language = recorded(tiny, monkeypatch, **placed)
    plain = LanguageModel(Model(path=str(tiny), dtype="float32", device="cpu", **placed))  # type: ignore[arg-type]
    assert language.trunk.works
    for seed, rows in enumerate([ROWS, OTHERS, ROWS]):
        adapter = adapter_of(plain, seed)
        leaves, own = leaves_of(adapter), leaves_of(adapter)
        found = language.score(leaves, rows, training=True)[0]
        expected = plain.score(own, rows, training=True)[0]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        for scores in (found, expected):
            scores.sum().backward()
        for name, leaf in own.items():
            torch.testing.assert_close(leaves[name].grad, leaf.grad, rtol=1e-3, atol=1e-4)
    assert played(language) > 0


@pytest.mark.parametrize("wrong", ["states", "gradients"])
def test_a_recording_that_computes_something_else_is_given_up_with_a_word(
    wrong: str, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    language = recorded(tiny, monkeypatch)
    assert language.graphs is not None

    class Wrong(Played):
        def __call__(self, work: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
            found, replay = super().__call__(work)
            if isinstance(found, list) != (wrong == "gradients"):
                return found, replay
            tensors = found if isinstance(found, list) else [found]
            return found, lambda: torch._foreach_mul_(tensors, 2.0)

    language.graphs.record = Wrong()
    adapter = adapter_of(language)
    expected = slopes(language, adapter, ROWS)
    with pytest.warns(UserWarning, match=f"launches are not recorded .{wrong} differ by"):
        found = slopes(language, adapter, ROWS)
    assert not language.graphs.works
    for mine, own in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, own)


def test_dropout_and_copies_for_units_are_not_recorded(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    language = recorded(tiny, monkeypatch, lora_dropout=0.5)
    leaves = leaves_of(adapter_of(language))
    for _ in range(3):
        language.log_probabilities(leaves, ROWS, training=True)
    assert played(language) == 0
    language = recorded(tiny, monkeypatch)
    copies = language.copies(adapter_of(language), 3)
    for _ in range(3):
        language.score(copies, ROWS, units=(1, 1, 1))
    assert played(language) == 0


@pytest.mark.parametrize("rows", [ROWS, OTHERS, ROWS[:1]])
def test_a_row_fits_into_its_rounded_size(rows: Sequence[Row]) -> None:
    layout = Layout.packed(rows, torch.device("cpu"))
    exact = Size.of(layout.parts, layout.ids.numel())
    rounded = exact.rounded(layout.parts)
    assert rounded.tokens > exact.tokens
    places = Places.of(layout.parts, rounded, layout.ids.device)
    starts, seen = (one.tolist() for one in places.starts)
    assert starts[-1] == rounded.tokens  # nothing is left without a number
    assert seen[-1] <= rounded.keys
    assert all(a <= b for one in (starts, seen) for a, b in pairwise(one))
    assert (places.seen[places.own] == torch.arange(rounded.tokens)).all()
    for before, own in layout.parts:
        i = starts.index(own.start)
        assert places.seen[seen[i] : seen[i + 1]].tolist() == [*before, *own]


def test_tensors_cast_at_once_have_the_values_and_slopes_of_each_by_itself() -> None:
    draw = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=draw).requires_grad_() for shape in ((3, 4), (5,))]
    cast: Any = _Cast.apply
    first, second = cast(torch.bfloat16, *tensors)
    for mine, tensor in zip((first, second), tensors, strict=True):
        assert mine.dtype == torch.bfloat16
        assert torch.equal(mine, tensor.to(torch.bfloat16))
    upstream = torch.randn(3, 4, generator=draw).to(torch.bfloat16)
    slopes = torch.autograd.grad(first, tensors, upstream, allow_unused=True)
    assert slopes[1] is None  # the second is not used
    assert slopes[0].dtype == torch.float32
    assert torch.equal(slopes[0], upstream.float())


def test_sums_at_once_are_those_of_each_answer() -> None:
    tokens = torch.randn(9, dtype=torch.float64).requires_grad_()
    counts = (2, 1, 6)
    expected = torch.stack([part.sum() for part in tokens.split(counts)])
    found = sums_at_once(tokens, counts)
    torch.testing.assert_close(found, expected)
    weights = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    slopes = [torch.autograd.grad((sums * weights).sum(), tokens)[0] for sums in (found, expected)]
    torch.testing.assert_close(slopes[0], slopes[1])
