"""The predictor of group preferences (GPO, Zhao et al. 2023).

A transformer is shown some of a group's answers and predicts others. A point is an option of a
question: the embedding x of both, and the group's probability y of that option. Points shown, the
context, come with y; points asked for, the targets, without. There are no positions, and every
point attends to the context alone: the order of the context changes nothing, and targets do not see
one another, so that any number of them can be asked for at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import layer_norm, linear, relu, scaled_dot_product_attention, softplus

from fedpref.numerics.trees import Tree
from fedpref.types import Width

LOWEST_STD = 0.05  # where it is bounded
# of the mean variance, and of the mean's square, what is added to each dimension's variance
LEAST_SHARE, TINY = 1e-2, 1e-6


@dataclass(frozen=True)
class Predictor:
    """The transformer's sizes; the defaults are GPO's.

    Parameters are a tree with the names of PyTorch's own modules.
    """

    width: Width = 128
    """The width of the layers."""
    layers: Width = 6
    """How many layers there are."""
    heads: Width = 4
    """Attention heads of each layer."""
    feedforward: Width = 128
    """The width of the feed-forward parts."""
    embedder_layers: Width = 4
    """Linear layers that turn a point into the layers' width."""
    bounded_std: bool = False
    """Predict a standard deviation of at least 0.05, in place of any."""
    normalize: bool = False
    """Take embeddings as they lie among those that are shown: less their mean, over their standard
    deviation, dimension by dimension. Those of language models point in nearly one direction."""

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(
                f"predictor.width {self.width} is no multiple of predictor.heads {self.heads}"
            )

    def shapes(self, inputs: int) -> dict[str, tuple[int, ...]]:
        """Return every parameter's shape, for embeddings of so many dimensions."""
        wide, inner = self.width, self.feedforward
        dense = {
            f"embedder.{i}": (wide, wide if i else inputs + 1) for i in range(self.embedder_layers)
        }
        dense |= {"head.0": (wide, wide), "head.1": (2, wide)}
        norms = []
        for i in range(self.layers):
            at = f"encoder.layers.{i}"
            dense |= {
                f"{at}.self_attn.out_proj": (wide, wide),
                f"{at}.linear1": (inner, wide),
                f"{at}.linear2": (wide, inner),
            }
            norms += [f"{at}.norm1", f"{at}.norm2"]
        sizes: dict[str, tuple[int, ...]] = {}
        for name, shape in dense.items():
            sizes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
        for i in range(self.layers):
            at = f"encoder.layers.{i}.self_attn.in_proj"
            sizes |= {f"{at}_weight": (3 * wide, wide), f"{at}_bias": (3 * wide,)}
        return sizes | {f"{name}.{part}": (wide,) for name in norms for part in ("weight", "bias")}

    def init(self, inputs: int, rng: torch.Generator) -> Tree:
        """Return fresh parameters, drawn from the distributions of PyTorch's modules."""
        shapes = self.shapes(inputs)
        return {name: _drawn(name, shapes, rng) for name in sorted(shapes)}

    def __call__(
        self,
        params: Tree,
        context: Float[Tensor, "B C D"],
        answers: Float[Tensor, "B C"],
        shown: Bool[Tensor, "B C"],
        targets: Float[Tensor, "B T D"],
    ) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
        """Predict targets.

        Args:
            params: The predictor's parameters.
            context: Embeddings of the points that are shown [B, C, D].
            answers: Their probabilities [B, C].
            shown: Which of them there are; others are padding [B, C].
            targets: Embeddings of the points that are asked for [B, T, D].

        Returns:
            Each target's raw mean and standard deviation [B, T].
        """
        count = context.shape[1]
        if self.normalize:
            context, targets = _among(context, shown, targets)
        weight = params["embedder.0.weight"]
        hidden = linear(torch.cat([context, targets], 1), weight[:, :-1], params["embedder.0.bias"])
        hidden = (
            hidden
            + torch.nn.functional.pad(answers, (0, targets.shape[1]))[..., None] * weight[:, -1]
        )
        for i in range(1, self.embedder_layers):
            hidden = linear(
                relu(hidden), params[f"embedder.{i}.weight"], params[f"embedder.{i}.bias"]
            )
        mask = None if bool(shown.all()) else shown[:, None, None, :]
        for i in range(self.layers - 1):
            hidden = self._layer(params, f"encoder.layers.{i}", hidden, hidden[:, :count], mask)
        hidden = self._layer(
            params, f"encoder.layers.{self.layers - 1}", hidden[:, count:], hidden[:, :count], mask
        )
        out = relu(linear(hidden, params["head.0.weight"], params["head.0.bias"]))
        raw, spread = linear(out, params["head.1.weight"], params["head.1.bias"]).unbind(-1)
        return raw, LOWEST_STD + (1 - LOWEST_STD) * softplus(
            spread
        ) if self.bounded_std else spread.exp()

    def _layer(
        self,
        params: Tree,
        at: str,
        x: Float[Tensor, "B P W"],
        context: Float[Tensor, "B C W"],
        mask: Bool[Tensor, "B 1 1 C"] | None,
    ) -> Float[Tensor, "B P W"]:
        """Return the points after attention to the context and a feed-forward layer, each added and
        normed.
        """
        weight, bias = (
            params[f"{at}.self_attn.in_proj_weight"],
            params[f"{at}.self_attn.in_proj_bias"],
        )
        wide = self.width
        query = linear(x, weight[:wide], bias[:wide])
        key, value = linear(context, weight[wide:], bias[wide:]).chunk(2, -1)
        seen = scaled_dot_product_attention(
            self._by_head(query), self._by_head(key), self._by_head(value), attn_mask=mask
        )
        out = linear(
            seen.transpose(1, 2).flatten(2),
            params[f"{at}.self_attn.out_proj.weight"],
            params[f"{at}.self_attn.out_proj.bias"],
        )
        x = layer_norm(x + out, (wide,), params[f"{at}.norm1.weight"], params[f"{at}.norm1.bias"])
        inner = relu(linear(x, params[f"{at}.linear1.weight"], params[f"{at}.linear1.bias"]))
        out = linear(inner, params[f"{at}.linear2.weight"], params[f"{at}.linear2.bias"])
        return layer_norm(
            x + out, (wide,), params[f"{at}.norm2.weight"], params[f"{at}.norm2.bias"]
        )

    def _by_head(self, x: Float[Tensor, "B P W"]) -> Float[Tensor, "B H P W/H"]:
        return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)


def _among(
    context: Float[Tensor, "B C D"], shown: Bool[Tensor, "B C"], targets: Float[Tensor, "B T D"]
) -> tuple[Float[Tensor, "B C D"], Float[Tensor, "B T D"]]:
    """Return embeddings by where they lie among those that are shown, padding as zeros."""
    there = shown[..., None].to(context.dtype)
    count = there.sum(1, keepdim=True).clamp(min=1)
    mean = (context * there).sum(1, keepdim=True) / count
    variance = ((context - mean).square() * there).sum(1, keepdim=True) / count
    # a dimension in which the few that are shown hardly differ says nothing loudly
    least = LEAST_SHARE * variance.mean(-1, keepdim=True)
    rounding = TINY * (mean.square().mean(-1, keepdim=True) + 1)
    scale = (variance + least + rounding).rsqrt()
    return (context - mean) * scale * there, (targets - mean) * scale


def _drawn(name: str, shapes: Mapping[str, tuple[int, ...]], rng: torch.Generator) -> Tensor:
    shape = shapes[name]
    if ".norm" in name:
        return torch.full(shape, float(name.endswith("weight")))
    if name.endswith("in_proj_bias") or name.endswith("out_proj.bias"):
        return torch.zeros(shape)
    inputs = shapes[name.replace("bias", "weight")][1]
    # Xavier's, of all three together
    limit = math.sqrt(6 / sum(shape)) if name.endswith("in_proj_weight") else 1 / math.sqrt(inputs)
    return torch.empty(shape).uniform_(-limit, limit, generator=rng)


def softmax_within(raw: Float[Tensor, " n"], question: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Return the softmax over the entries of the same question [n].

    Args:
        raw: Raw predictions [n].
        question: The number of each entry's question, from 0 [n].
    """
    count = int(question.max()) + 1
    highest = raw.new_full((count,), -math.inf).scatter_reduce(0, question, raw.detach(), "amax")
    odds = (raw - highest[question]).exp()
    return odds / odds.new_zeros(count).index_add(0, question, odds)[question]


def gaussian_loss(
    raw: Float[Tensor, " n"],
    std: Float[Tensor, " n"],
    question: Int[Tensor, " n"],
    y: Float[Tensor, " n"],
) -> Float[Tensor, " n"]:
    """Return -log N(y; softmax of raw means within each question, std^2) of each entry [n].

    Args:
        raw: Raw means [n].
        std: Predicted standard deviations [n].
        question: The number of each entry's question, from 0 [n].
        y: True shares [n].
    """
    return (
        0.5 * ((y - softmax_within(raw, question)) / std).square()
        + std.log()
        + 0.5 * math.log(2 * math.pi)
    )
