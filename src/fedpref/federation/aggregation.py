"""How clients' adapters become one: factors apart, one factor frozen, or their products.

A LoRA adapter changes a weight by the product B A of its factors, and the mean of factors is not a
factor of the mean product. How far the two are apart, over all weights and as a share of the mean
product's norm, is each round's metric `residual`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor
from torch.nn.functional import pad

from fedpref.errors import UserError
from fedpref.federation.local_training import LocalTraining
from fedpref.federation.verbs import Client, Federation, PerClient, work
from fedpref.numerics import seeds, trees
from fedpref.numerics.trees import Tree
from fedpref.types import Count

PROBES = 8  # random pairs of vectors for each weight, between which products are compared
PROBE = trees.BESIDE
ROW_NORM = math.sqrt(1 / 3)  # of A as LoRA draws it


def pairs(adapter: Tree) -> Iterator[tuple[str, str]]:
    """Yield the names of each weight's factors A and B, in the order of names."""
    for name in sorted(adapter):
        for a, b in ((".lora_A.", ".lora_B."), (".lora_embedding_A", ".lora_embedding_B")):
            if a in name:
                yield name, name.replace(a, b)


def factor(adapter: Tree, letter: Literal["A", "B"]) -> Tree:
    """Return the adapter's A factors or its B factors."""
    return trees.select(adapter, [names["AB".index(letter)] for names in pairs(adapter)])


@lru_cache(maxsize=1)
def signs(count: int, round: int) -> Float[Tensor, " count"]:
    """Return a round's random signs, the same on all clients."""
    return 2.0 * torch.randint(2, (count,), generator=seeds.generator(0, "probe", round=round)) - 1


@dataclass(frozen=True)
class Factors:
    """Average A and B each apart, as federated averaging does with any tensors."""

    means: ClassVar[int] = 1

    name: Literal["factors"] = "factors"
    residual: bool = True
    """Also send 8 numbers per weight, from which the metric `residual` is estimated."""

    def split(self, adapter: Tree) -> tuple[Tree, Tree]:
        """Return the part of an adapter that is trained, and the part that stays as drawn."""
        return adapter, {}

    def received(self, client: Client, adapter: Tree) -> tuple[Tree, Tree]:
        """Return the part of the adapter that the client trains, and the part that stays fixed."""
        return adapter, {}

    def message(self, client: Client, before: Tree, theta: Tree) -> Tree:
        """Return what a client sends to `merge`, after it has trained `before` into `theta`."""
        return {
            **trees.subtract(theta, before),
            **(probed(theta, client.round) if self.residual else {}),
        }

    def merge(
        self, fed: Federation, adapter: Tree, messages: PerClient[Tree]
    ) -> tuple[Tree, Mapping[str, float]]:
        """Return the next adapter, and the round's metrics of aggregation.

        Args:
            fed: The federation.
            adapter: The adapter that clients received.
            messages: What they made by `message`.
        """
        mean = fed.mean(messages)
        merged = trees.add(adapter, trees.select(mean, adapter))
        return merged, _residual(merged, mean, fed.round)

    def mix(self, fed: Federation, theta: PerClient[Tree]) -> PerClient[Tree]:
        """Return each client's adapter mixed with its neighbours'."""
        return fed.mix(theta)[1]

    def shadow(self, theta: Tree, round: int) -> Float[Tensor, " n"]:
        """Return a random linear projection of `theta` [n], the same for all clients in a round.

        Its expected squared norm is theta's, so that distances between clients can be estimated
        from it. Entries with random signs are summed up in groups, 8 for each tensor.
        """
        # by name, because clients may hold their tensors in another order
        flat = torch.cat([theta[name].flatten() for name in sorted(theta)])
        groups = PROBES * len(theta)
        return pad(flat * signs(len(flat), round), (0, -len(flat) % groups)).view(groups, -1).sum(1)


@dataclass(frozen=True)
class FrozenA:
    """Keep A where it was drawn and average B alone (Sun et al. 2024).

    Then the mean of the products is the product of the means.
    """

    means: ClassVar[int] = 1

    name: Literal["frozen-a"] = "frozen-a"

    def split(self, adapter: Tree) -> tuple[Tree, Tree]:
        """Return the factors that are trained, and those that stay as they were drawn."""
        # an embedding's drawn factor is B
        fixed = trees.select(adapter, [a if ".lora_A." in a else b for a, b in pairs(adapter)])
        return {name: tensor for name, tensor in adapter.items() if name not in fixed}, fixed

    def received(self, client: Client, adapter: Tree) -> tuple[Tree, Tree]:
        """Return what the client trains, and what stays fixed."""
        return self.split(adapter)

    def message(self, client: Client, before: Tree, theta: Tree) -> Tree:
        """Return the change of the trained factors."""
        return trees.subtract(theta, before)

    def merge(
        self, fed: Federation, adapter: Tree, messages: PerClient[Tree]
    ) -> tuple[Tree, Mapping[str, float]]:
        """Return the next adapter, and no metrics: the mean is exact."""
        mean = fed.mean(messages)
        return {**adapter, **trees.add(trees.select(adapter, mean), mean)}, {}

    def mix(self, fed: Federation, theta: PerClient[Tree]) -> PerClient[Tree]:
        return Factors().mix(fed, theta)

    def shadow(self, theta: Tree, round: int) -> Float[Tensor, " n"]:
        return Factors().shadow(theta, round)


@dataclass(frozen=True)
class Product:
    """Average the products B A, and return to the adapter's rank by a truncated SVD.

    The decomposition is found by subspace iteration through means alone, so that nobody forms a
    full matrix and a channel may mask what clients send: B_k (A_k Q), then (U' B_k) A_k, of the
    adapter's size together. Without masking, these two messages reveal as much as the
    adapter itself. Clients of smaller rank receive and train the leading directions; then changes
    of products are averaged, so that nobody unlearns the others (between neighbours, products are
    mixed as they are). Ours; FlexLoRA (Bai et al. 2024) decomposes the full mean, of products also
    where ranks differ.
    """

    name: Literal["product"] = "product"
    iterations: Count = 2
    """Subspace iterations a round; each brings the result nearer to the exact decomposition and
    costs one more adapter."""
    ranks: tuple[Count, ...] = ()
    """Ranks of clients' adapters, which clients take in turn; by default all have the shared
    adapter's rank."""
    residual: bool = True
    """Also send 8 numbers per weight, from which the metric `residual` is estimated."""

    @property
    def means(self) -> int:
        """How many means over clients a round has."""
        return 2 * self.iterations

    def split(self, adapter: Tree) -> tuple[Tree, Tree]:
        """Return the whole adapter, and nothing that stays fixed."""
        return adapter, {}

    def check(self, local: LocalTraining, rank: int) -> None:
        """Raise UserError for an adapter rank or local training that do not fit."""
        if max(self.ranks, default=0) > rank:
            raise UserError(
                f"algorithm.aggregate.ranks: {max(self.ranks)} is above task.model.lora_r, the "
                f"shared adapter's {rank}. Raise task.model.lora_r."
            )
        if local.keep_optimizer:
            raise UserError(
                "algorithm.aggregate: product turns the adapter's factors every round, moments "
                "carried over would not fit them. "
                "Set algorithm.local.keep_optimizer to false, or take factors."
            )

    def received(self, client: Client, adapter: Tree) -> tuple[Tree, Tree]:
        # singular values fall, so that the first rows of A and columns of B are the leading
        # directions
        """Return the leading directions of the adapter at the client's rank, and nothing that stays
        fixed.
        """
        rank = self.ranks[client.id % len(self.ranks)] if self.ranks else None
        return {
            name: tensor
            for a, b in pairs(adapter)
            for name, tensor in ((a, adapter[a][:rank]), (b, adapter[b][:, :rank]))
        }, {}

    def message(self, client: Client, before: Tree, theta: Tree) -> Tree:
        """Return factors that stay on the client, of whose products `merge` asks.

        With ranks of clients' own these are the factors of the product's change: who has received
        the leading directions alone says nothing of the others.
        """
        if not self.ranks:
            return theta
        return {
            name: tensor
            for a, b in pairs(theta)
            for name, tensor in (
                (a, torch.cat([theta[a], before[a]])),
                (b, torch.cat([theta[b], -before[b]], 1)),
            )
        }

    def merge(
        self, fed: Federation, adapter: Tree, messages: PerClient[Tree]
    ) -> tuple[Tree, Mapping[str, float]]:
        """Return the next adapter, and the metric `residual`; see `Factors.merge`."""
        right = {
            # the last round's directions are near this round's; nothing is known of an adapter of
            # zeros
            a: _basis(adapter[a].T if adapter[a].any() else torch.eye(*adapter[a].T.shape))
            for a, _ in pairs(adapter)
        }
        # power iterations: each multiplies by the mean and by its transpose, through clients
        for _ in range(self.iterations):
            reached = fed.mean(fed.each(from_right, messages, right))
            if self.ranks:  # messages are changes of what was sent
                reached = trees.add(reached, right_product(adapter, right))
            left = {a: _basis(y) for a, y in reached.items()}
            mean = fed.mean(fed.each(from_left, messages, left, self.residual))
            if self.ranks:
                sent = left_product(adapter, left, self.residual, fed.round)
                mean = trees.add(mean, sent)
            right = {a: _basis(mean[a].T) for a in left}
        merged: dict[str, Tensor] = {}
        for a, b in pairs(adapter):
            u, s, v = torch.linalg.svd(mean[a] @ right[a], full_matrices=False)
            merged[a], merged[b] = _factors(left[a], u, s, v @ right[a].T, rank=len(adapter[a]))
        return merged, _residual(merged, mean, fed.round)

    def mix(self, fed: Federation, theta: PerClient[Tree]) -> PerClient[Tree]:
        """Return the mixed products, at each client's rank.

        What travels is linear in the products, so that mixing them mixes those: each product
        between random matrices, the same on all clients, and of 2 r + 1 columns and twice as many
        rows for the largest rank r. From these the decomposition is found in one pass (Tropp et al.
        2017); it is exact where what is mixed has no higher rank, and takes about three times the
        bytes of the factors.
        """
        _, mixed = fed.mix(fed.each(sketch, theta, self))
        return fed.each(from_sketch, theta, mixed, self)

    def shadow(self, theta: Tree, round: int) -> Float[Tensor, " n"]:
        """Return a random linear projection of the products; see `Factors.shadow`."""
        return torch.cat(list(probed(theta, round).values())) / math.sqrt(PROBES)


Aggregate = Annotated[Factors | FrozenA | Product, Field(discriminator="name")]


@work("product.from_right")
def from_right(client: Client, theta: Tree, right: Tree) -> Tree:
    """Return each product times a basis from the right.

    Args:
        client: Whose factors they are.
        theta: Factors A [r, in] and B [out, r].
        right: By the name of A, a basis [in, k].

    Returns:
        By the name of A, B A Q [out, k].
    """
    return right_product(theta, right)


def right_product(theta: Tree, right: Tree) -> Tree:
    """Return each product times a basis from the right; see `from_right`."""
    return {a: theta[b] @ (theta[a] @ right[a]) for a, b in pairs(theta)}


@work("product.from_left")
def from_left(client: Client, theta: Tree, left: Tree, residual: bool) -> Tree:
    """Return each product times a basis from the left.

    Args:
        client: Whose factors they are.
        theta: Factors A [r, in] and B [out, r].
        left: By the name of A, a basis [out, k].
        residual: Add the probes of each product.

    Returns:
        By the name of A, U' B A [k, in].
    """
    return left_product(theta, left, residual, client.round)


def left_product(theta: Tree, left: Tree, residual: bool, round: int) -> Tree:
    """Return each product times a basis from the left; see `from_left`."""
    return {
        **{a: (left[a].T @ theta[b]) @ theta[a] for a, b in pairs(theta)},
        **(probed(theta, round) if residual else {}),
    }


@work("product.sketch", sends=(), tells=(0,), keeps={0: "sketch"}, reads=("theta",))
def sketch(client: Client, theta: Tree, method: Product) -> Tree:
    """Return each product between random matrices."""
    message: dict[str, Tensor] = {}
    for a, b, right, left in _sketchers(theta, method, client.round):
        message |= {a: theta[b] @ (theta[a] @ right), b: (left @ theta[b]) @ theta[a]}
    return message


@work(
    "product.from_sketch",
    sends=(),
    tells=(0,),
    keeps={0: "theta"},
    reads={"theta": "theta", "mixed": "sketch"},
)
def from_sketch(client: Client, theta: Tree, mixed: Tree, method: Product) -> Tree:
    """Return the factors, at the client's rank, of the product that a mixed sketch stands for."""
    adapter: dict[str, Tensor] = {}
    for a, b, _, left in _sketchers(theta, method, client.round):
        span = _basis(mixed[a])
        # The product is span @ rest. The default driver, gelsy, is not deterministic
        rest = torch.linalg.lstsq(left @ span, mixed[b], driver="gels").solution
        u, s, v = torch.linalg.svd(rest, full_matrices=False)
        adapter[a], adapter[b] = _factors(span, u, s, v, rank=len(theta[a]))
    return adapter


WORKS = (from_right, from_left, sketch, from_sketch)
"""What `Product` runs on clients."""


def _sketchers(
    theta: Tree, method: Product, round: int
) -> Iterator[tuple[str, str, Tensor, Tensor]]:
    """Yield each weight's names, and the random matrices that multiply its product.

    The first multiplies from the right, the second from the left.
    """
    rng = seeds.generator(0, "sketch", round=round)
    for a, b in pairs(theta):
        (rank, inputs), outputs = theta[a].shape, len(theta[b])
        # mixed products may have twice a client's rank
        columns = min(2 * max(rank, *method.ranks, 1) + 1, inputs, outputs)
        rows = min(2 * columns + 1, outputs)
        yield (
            a,
            b,
            torch.randn(inputs, columns, generator=rng),
            torch.randn(rows, outputs, generator=rng),
        )


def _factors(
    span: Float[Tensor, "out k"],
    u: Float[Tensor, "k n"],
    s: Float[Tensor, " n"],
    v: Float[Tensor, "n in"],
    rank: int,
) -> tuple[Float[Tensor, "r in"], Float[Tensor, "out r"]]:
    """Return A and B of a rank whose product comes nearest to span u s v.

    Rows of A have the norm that they are drawn with, spare ones are zero.
    """
    # the truncated decomposition is the nearest product of that rank (Eckart and Young 1936)
    u, s, v = u[:, :rank], s[:rank], v[:rank]
    spare = rank - len(s)
    a, b = pad(ROW_NORM * v, (0, 0, 0, spare)), pad(span @ u * s / ROW_NORM, (0, spare))
    # as they are when they come from a file: sums depend on the order in memory
    return a.contiguous(), b.contiguous()


def _basis(columns: Float[Tensor, "n r"]) -> Float[Tensor, "n r"]:
    """Return an orthonormal basis of what the columns span."""
    basis: Tensor = torch.linalg.qr(columns)[0]
    return basis


def probed(theta: Tree, round: int) -> Tree:
    """Return u' B A v for each weight's product, with normal vectors u and v drawn for the round.

    They are the same on all clients.
    """
    rng = seeds.generator(0, "probe", round=round)
    probes = {}
    for a, b in pairs(theta):
        u, v = (
            torch.randn(PROBES, len(theta[b]), generator=rng),
            torch.randn(theta[a].shape[1], PROBES, generator=rng),
        )
        probes[PROBE + a] = ((u @ theta[b]) * (theta[a] @ v).T).sum(1)
    return probes


def _residual(merged: Tree, mean: Tree, round: int) -> Mapping[str, float]:
    """Return |B A - mean product| / |mean product|, from probes.

    The expected square of u' M v is the squared Frobenius norm of M.
    """
    measured = {name: tensor for name, tensor in mean.items() if name.startswith(PROBE)}
    if not measured:
        return {}
    return {
        "residual": trees.norm(trees.subtract(probed(merged, round), measured))
        / max(trees.norm(measured), 1e-30)
    }
