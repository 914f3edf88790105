"""A GPU's launches, recorded once for each size of a packed row and replayed.

A step of a model of some billion parameters is thousands of launches, each of which takes a
processor longer than the GPU needs for it, so that the GPU waits. A recording (a CUDA graph) is one
launch. It computes with the same memory each time, so rows are filled up to one of few sizes.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fedpref.errors import reason
from fedpref.models.attention import Kernel
from fedpref.models.packed import Layout
from fedpref.models.variable_length import Places, Size, by_variable_length
from fedpref.numerics.trees import Tree

OFTEN = 2  # times that a size comes before it is recorded, which takes as long as some steps
MOST = 64  # recordings, each of which takes some memory of its own
# how far a recording may be from the same row computed as ever, of the size of states and gradients
APART, SLOPES_APART = 0.05, 0.1
# adapter, tokens, attention, states that stand for the trunk -> states
Compute = Callable[[Tree, Layout, Kernel, Tensor | None], Float[Tensor, "1 T D"]]


class Graphs:
    """Recordings of a model's states and of their gradient.

    They share memory: what one has left behind is gone when another is played. A gradient whose
    states have been overwritten is computed from states that are computed again.

    Args:
        name: The model's, for what is said.
        compute: The model.
        record: Records what a function does, and returns what it returned and how to play it.
    """

    def __init__(self, name: str, compute: Compute, record: Record | None = None) -> None:
        self.name, self.compute = name, compute
        self.record = record or Recorder()
        self.met: Counter[Hashable] = Counter()
        self.recordings: dict[Hashable, Recording] = {}
        self.works = True
        """Whether launches can be recorded, as far as is known."""
        self.turn = 0
        """Counts what was played: only the latest states have their memory still."""

    def states(
        self, adapter: Tree, layout: Layout, standing: Tensor | None
    ) -> Float[Tensor, "1 T D"] | None:
        """Return the states of a packed row; None where its size is not recorded.

        Args:
            adapter: In the model's arithmetic.
            layout: The row.
            standing: States that stand for the trunk, if they do.
        """
        if not self.works:
            return None
        size = Size.of(layout.parts, layout.ids.numel()).rounded(layout.parts)
        learns = torch.is_grad_enabled()
        kinds = tuple((n, t.shape, t.requires_grad and learns) for n, t in adapter.items())
        key = (size, kinds, None if standing is None else standing.shape[-1])
        if key not in self.recordings:
            self.met[key] += 1
            if self.met[key] < OFTEN or len(self.recordings) >= MOST:
                return None
            self._record(key, size, adapter, layout, standing)
        if key not in self.recordings:
            return None
        inputs = (*adapter.values(), *([] if standing is None else [standing]))
        states: Tensor = _Replay.apply(self, self.recordings[key], layout, *inputs)  # type: ignore[no-untyped-call]
        return states

    def _record(
        self, key: Hashable, size: Size, adapter: Tree, layout: Layout, standing: Tensor | None
    ) -> None:
        try:
            recording = Recording(self, size, adapter, layout, standing)
            self.turn += 1
            self._try(recording, adapter, layout, standing)
        # whatever a model's own code does that cannot be recorded, or memory that is not there
        except Exception as error:
            self.works = False
            self.recordings.clear()
            warnings.warn(
                f"{self.name}: launches are not recorded ({reason(error)}), which is slower.",
                stacklevel=2,
            )
        else:
            self.recordings[key] = recording

    def _try(
        self, recording: Recording, adapter: Tree, layout: Layout, standing: Tensor | None
    ) -> None:
        """Raise RuntimeError where what is played is not what is computed as ever."""
        leaves = {n: t.detach().requires_grad_(n in recording.leaves) for n, t in adapter.items()}
        learnt = [leaves[name] for name in recording.leaves]
        with torch.set_grad_enabled(bool(learnt)):
            states = self.compute(leaves, layout, by_variable_length, standing)
        end = layout.parts[-1][1].stop  # what fills up a row is nobody's
        with torch.no_grad():
            found = recording.play(adapter, layout, standing)
        _refuse_apart("states differ", [found[:, :end]], [states[:, :end]], APART)
        if learnt:
            # at random: along the states themselves a last norm lets nothing through but rounding
            draw = torch.Generator(states.device).manual_seed(0)
            upstream = torch.randn(
                states.shape, generator=draw, device=states.device, dtype=states.dtype
            )
            upstream[:, end:] = 0
            slopes = torch.autograd.grad(states, learnt, upstream, allow_unused=True)
            pulled = dict(zip(adapter, recording.pull_back(upstream), strict=True))
            mine = [pulled[name] for name in recording.leaves]
            _refuse_apart("gradients differ", mine, slopes, SLOPES_APART)


def _refuse_apart(
    what: str, found: Sequence[Tensor | None], expected: Sequence[Tensor | None], most: float
) -> None:
    rows = [
        torch.cat([one.detach().float().flatten() for one in some if one is not None])
        for some in (found, expected)
    ]
    apart = float((rows[0] - rows[1]).norm() / rows[1].norm())
    if not apart <= most:
        raise RuntimeError(f"{what} by {apart:.2g} of their size")


Record = Callable[[Callable[[], Any]], tuple[Any, Callable[[], None]]]


@dataclass
class Recorder:
    """Records with CUDA graphs that share their memory."""

    pool: Any = field(default_factory=lambda: torch.cuda.graph_pool_handle())

    def __call__(self, work: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        """Return what the work returns, whose memory stays, and a function that does it again."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            found = work()
        return found, graph.replay


class Recording:
    """One size's: memory that is read, and what is played.

    Args:
        graphs: To which it belongs.
        size: Into which rows fit.
        adapter: One, whose tensors' sizes and leaves are recorded.
        layout: A row of this size, to try it.
        standing: States that stand for the trunk, if they do.
    """

    def __init__(
        self, graphs: Graphs, size: Size, adapter: Tree, layout: Layout, standing: Tensor | None
    ) -> None:
        device = layout.ids.device
        self.size = size
        self.ids = torch.zeros(1, size.tokens, dtype=layout.ids.dtype, device=device)
        self.positions = torch.zeros_like(self.ids)
        self.places = Places.of(layout.parts, size, device)
        self.adapter = {n: t.detach().clone() for n, t in adapter.items()}
        learns = torch.is_grad_enabled()
        self.leaves = {n: t for n, t in self.adapter.items() if adapter[n].requires_grad and learns}
        for leaf in self.leaves.values():
            leaf.requires_grad_()
        self.standing = (
            None if standing is None else standing.new_zeros(1, size.tokens, standing.shape[-1])
        )
        whole = Layout(
            self.ids,
            self.positions,
            layout.scored[:0],
            layout.targets[:0],
            layout.last[:0],
            (),
            layout.parts,
        )

        def forward() -> Tensor:
            with torch.set_grad_enabled(bool(self.leaves)):
                self.latest = graphs.compute(
                    self.adapter, whole, lambda _: self.places.attend, self.standing
                )
            return self.latest.detach()

        def backward() -> list[Tensor | None]:
            leaves = list(self.leaves.values())
            return list(torch.autograd.grad(self.latest, leaves, self.upstream, allow_unused=True))

        self.load(list(adapter.values()), layout, standing)
        with _aside(device):
            # libraries make what they need when they are first called, which is not recorded
            self.upstream = torch.zeros_like(forward())
            if self.leaves:
                backward()
        del self.latest  # what it has made would be on another stream than what is recorded
        self.states, self.play_states = graphs.record(forward)
        self.slopes: list[Tensor | None] = []
        self.play_slopes: Callable[[], None] = lambda: None
        if self.leaves:
            self.slopes, self.play_slopes = graphs.record(backward)

    @torch.no_grad()
    def load(self, adapter: Sequence[Tensor], layout: Layout, standing: Tensor | None) -> None:
        """Write a row and an adapter into the memory that is read."""
        tokens = layout.ids.numel()
        for mine, theirs in ((self.ids, layout.ids), (self.positions, layout.positions)):
            mine[:, :tokens] = theirs
            mine[:, tokens:] = 0
        places = Places.of(layout.parts, self.size, self.ids.device)
        for mine, theirs in zip(self.places.tensors, places.tensors, strict=True):
            mine.copy_(theirs)
        if self.adapter:
            torch._foreach_copy_(list(self.adapter.values()), list(adapter))
        if self.standing is not None and standing is not None:
            self.standing[:, :tokens] = standing
            self.standing[:, tokens:] = 0

    def play(
        self, adapter: Tree, layout: Layout, standing: Tensor | None
    ) -> Float[Tensor, "1 T D"]:
        """Return the states of a row."""
        self.load(list(adapter.values()), layout, standing)
        self.play_states()
        states: Tensor = self.states[:, : layout.ids.numel()]
        return states.clone()

    @torch.no_grad()
    def pull_back(self, upstream: Float[Tensor, "1 T D"]) -> list[Tensor | None]:
        """Return the gradient of each tensor of the adapter, from that of the latest states."""
        tokens = upstream.shape[1]
        self.upstream[:, :tokens] = upstream
        self.upstream[:, tokens:] = 0
        self.play_slopes()
        known = [slope for slope in self.slopes if slope is not None]
        own = [torch.empty_like(slope) for slope in known]
        torch._foreach_copy_(own, known)
        left = iter(own)
        slopes = dict(
            zip(
                self.leaves,
                (None if slope is None else next(left) for slope in self.slopes),
                strict=True,
            )
        )
        return [slopes.get(name) for name in self.adapter]


@contextmanager
def _aside(device: torch.device) -> Iterator[None]:
    """Compute on a GPU's other stream, within a `with`, as is asked before recording."""
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream(device).wait_stream(stream)


class _Replay(torch.autograd.Function):
    """A recording as an operation."""

    @staticmethod
    def forward(
        ctx: Any, graphs: Graphs, recording: Recording, layout: Layout, *inputs: Tensor
    ) -> Float[Tensor, "1 T D"]:
        ctx.graphs, ctx.recording, ctx.layout = graphs, recording, layout
        ctx.save_for_backward(*inputs)
        return _played(ctx, inputs)

    @staticmethod
    def backward(ctx: Any, upstream: Float[Tensor, "1 T D"]) -> tuple[Tensor | None, ...]:
        if ctx.turn != ctx.graphs.turn:
            _played(ctx, ctx.saved_tensors)  # what it needs was overwritten since
        ctx.graphs.turn += 1  # a gradient frees the memory of what it was computed from
        slopes = ctx.recording.pull_back(upstream)
        rest = len(ctx.saved_tensors) - len(slopes)
        return (None, None, None, *slopes, *[None] * rest)


def _played(ctx: Any, inputs: Sequence[Tensor]) -> Float[Tensor, "1 T D"]:
    recording: Recording = ctx.recording
    count = len(recording.adapter)
    adapter = dict(zip(recording.adapter, inputs[:count], strict=True))
    states = recording.play(adapter, ctx.layout, inputs[count] if len(inputs) > count else None)
    ctx.graphs.turn += 1
    ctx.turn = ctx.graphs.turn
    return states
