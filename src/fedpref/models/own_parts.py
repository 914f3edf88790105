"""What a client may have of its own on a shared model.

These are a vocabulary head, a reward head, a bottleneck between the model and both, and a second
adapter. The first three act on the hidden states that come to the vocabulary head, the adapter in
the layers, beside the shared one. Their tensors go by these names in the tree of a client's
parameters, so that a tree without them is the shared model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fedpref.errors import UserError
from fedpref.numerics.trees import Tree, is_down
from fedpref.types import Count, WholeNumber

HEAD, HEAD_DOWN, HEAD_UP = "head.weight", "head.down", "head.up"
# on an answer's last state, or on the mean of its states
REWARD, REWARD_MEAN = "reward.weight", "reward_mean.weight"
REWARDS = frozenset({REWARD, REWARD_MEAN})
DOWN, UP = "bottleneck.down", "bottleneck.up"
OWN_ADAPTER = "own."  # begins the names of a second adapter, which is added to the first
FILE = "own_parts.safetensors"
VOCABULARY_HEAD = frozenset({HEAD, HEAD_DOWN, HEAD_UP})
HEADS = VOCABULARY_HEAD | REWARDS
NAMES = HEADS | {DOWN, UP}


@dataclass(frozen=True)
class Parts:
    """Which parts of the model a client has of its own."""

    head: Literal["full", "low-rank"] | None = "full"
    """A copy of the whole vocabulary head, a low-rank change of it, or null for none."""
    head_rank: Count = 16
    """The rank of a low-rank head, which suits large vocabularies."""
    bottleneck: WholeNumber = 64
    """The width of a residual adapter on the last hidden state; 0 for none."""
    reward: bool = True
    """Whether there is an explicit reward, linear in hidden states of an answer."""
    reward_pooling: Literal["last", "mean"] = "last"
    """Which state of an answer the reward head reads: its last token's, or the mean of all of its
    tokens'. What the paper's head reads is not known."""
    adapter: bool = True
    """Whether there is a second adapter in the layers, shaped as the shared one and added to it."""

    def __bool__(self) -> bool:
        """Return whether there is any."""
        return self.after or self.adapter

    @property
    def after(self) -> bool:
        """Whether a part acts on the hidden states that come to the vocabulary head."""
        return bool(self.head or self.bottleneck or self.reward)

    def init(self, head: Float[Tensor, "V D"], adapter: Tree, rng: torch.Generator) -> Tree:
        """Return fresh parts in float32 on the CPU, which change nothing.

        The head is the backbone's, and what comes last in the other parts is zero.

        Args:
            head: The backbone's vocabulary head [V, D].
            adapter: A fresh adapter, for the own one to be.
            rng: Random numbers.
        """
        vocabulary, width = head.shape
        tree: dict[str, Tensor] = (
            {OWN_ADAPTER + name: tensor for name, tensor in adapter.items()} if self.adapter else {}
        )
        if self.head == "full":
            tree[HEAD] = head.detach().float().cpu().clone()
        elif self.head == "low-rank":
            if self.head_rank > min(vocabulary, width):
                raise UserError(
                    f"algorithm.parts.head_rank: a rank of {self.head_rank} is above the model's "
                    f"width, {min(vocabulary, width)}. Take a smaller one, or head: full."
                )
            tree[HEAD_DOWN] = nn.init.kaiming_uniform_(
                torch.empty(self.head_rank, width), a=math.sqrt(5), generator=rng
            )
            tree[HEAD_UP] = torch.zeros(vocabulary, self.head_rank)
        if self.bottleneck:
            tree[DOWN] = nn.init.kaiming_uniform_(
                torch.empty(self.bottleneck, width), a=math.sqrt(5), generator=rng
            )
            tree[UP] = torch.zeros(width, self.bottleneck)
        if self.reward:
            tree[REWARD if self.reward_pooling == "last" else REWARD_MEAN] = torch.zeros(width)
        return tree


NO_PARTS = Parts(head=None, bottleneck=0, reward=False, adapter=False)


def combined_adapter(adapter: Tree) -> dict[str, Tensor]:
    """Return one adapter of twice the rank for the sum of an adapter and a client's own.

    Without a second adapter it is the adapter itself. Either may be given as copies, along a first
    dimension.
    """
    return {
        name: _beside(tensor, adapter[OWN_ADAPTER + name], -2 if is_down(name) else -1)
        if OWN_ADAPTER + name in adapter
        else tensor
        for name, tensor in adapter.items()
        if not name.startswith(OWN_ADAPTER)
    }


def _beside(first: Tensor, second: Tensor, dim: int) -> Tensor:
    copies = max((one.shape[0] for one in (first, second) if one.dim() == 3), default=None)
    if copies is not None:
        first, second = (one.expand(copies, *one.shape[-2:]) for one in (first, second))
    return torch.cat([first, second], dim)


def after_bottleneck(hidden: Float[Tensor, "n D"], parts: Tree) -> Float[Tensor, "n D"]:
    """Return hidden states after the bottleneck, if there is one: h + U gelu(D h)."""
    if DOWN not in parts:
        return hidden
    return hidden + nn.functional.gelu(hidden @ parts[DOWN].T) @ parts[UP].T


def own_head(
    head: Float[Tensor, "V D"], parts: Tree
) -> tuple[Float[Tensor, "V D"], tuple[Float[Tensor, "r D"], Float[Tensor, "V r"]] | None]:
    """Return the weight of a client's vocabulary head, and its low-rank change if it has one.

    The change is (down, up), which stands for up @ down.
    """
    change = (parts[HEAD_DOWN], parts[HEAD_UP]) if HEAD_UP in parts else None
    return parts.get(HEAD, head), change


def head_weight(head: Float[Tensor, "V D"], parts: Tree) -> Float[Tensor, "V D"]:
    """Return the weight of a client's vocabulary head with its low-rank change in it."""
    weight, change = own_head(head, parts)
    return weight if change is None else weight + change[1] @ change[0]


class OwnHead(nn.Linear):
    """A vocabulary head with a client's own parts, for models of transformers."""

    def __init__(self, head: nn.Linear, parts: Tree) -> None:
        super().__init__(head.in_features, head.out_features, head.bias is not None, device="meta")
        own = {
            name: tensor.to(head.weight.device, head.weight.dtype) for name, tensor in parts.items()
        }
        self.weight = nn.Parameter(head_weight(head.weight.detach(), own), requires_grad=False)
        self.bias = head.bias
        for name in ({DOWN, UP} | REWARDS) & own.keys():
            self.register_buffer(name.replace(".", "_"), own[name])

    def after_bottleneck(self, hidden: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        """Return hidden states after the client's bottleneck, if it has one."""
        return after_bottleneck(
            hidden,
            {
                name: getattr(self, name.replace(".", "_"))
                for name in (DOWN, UP)
                if hasattr(self, name.replace(".", "_"))
            },
        )

    def forward(self, hidden: Float[Tensor, "... D"]) -> Float[Tensor, "... V"]:
        return super().forward(self.after_bottleneck(hidden))

    def reward(self, hidden: Float[Tensor, "... D"]) -> Float[Tensor, "..."]:
        """Return the explicit reward of hidden states.

        Of an answer it is that of its last token's state, or the mean over its tokens', as
        `reward_pooling` was.
        """
        (name,) = [name for name, _ in self.named_buffers() if name.startswith("reward")]
        return self.after_bottleneck(hidden) @ self.get_buffer(name)
