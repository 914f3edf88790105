"""Several objectives: preferences among them, their gradients, and one update for all."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fedpref.errors import UserError
from fedpref.numerics.trees import Tree
from fedpref.tasks.task import CRITIC

LARGE = 1e100  # of numbers that are added up as they are


@dataclass(frozen=True)
class Objectives:
    """How objectives are weighed: fixed weights, or weights from their gradients' Gram matrix.

    What all objectives share is moved along the weighted sum of their gradients; critics, which are
    one objective's each, along the sum. The Gram matrix is that of the shared parameters, or of
    those that `watched` names: then the gradients of the objectives are computed for these alone,
    and one more for all.

    Attributes:
        weigh: Weights [M], or a function from the Gram matrix [M, M] to weights [M].
        watched: Whether a parameter, by its name, is in the Gram matrix; None for all.
    """

    weigh: Callable[[Float[Tensor, "M M"]], Float[Tensor, " M"]] | Float[Tensor, " M"]
    watched: Callable[[str], bool] | None = None

    def backward(self, losses: Float[Tensor, " M"], theta: Tree, batches: int) -> list[float]:
        """Add the gradients of a batch to the parameters', and return the weights.

        Args:
            losses: Of each objective [M].
            theta: The parameters.
            batches: How many batches an update accumulates.
        """
        critics = [name for name in theta if name.startswith(CRITIC)]
        if isinstance(self.weigh, Tensor):
            weights = self.weigh.to(losses)
            if critics:
                (losses.sum() / batches).backward(
                    retain_graph=True, inputs=[theta[name] for name in critics]
                )
            ((weights * losses).sum() / batches).backward(
                inputs=[theta[name] for name in theta if name not in critics]
            )
            return list(weights.tolist())
        watched = [
            name
            for name in theta
            if name not in critics and (self.watched is None or self.watched(name))
        ]
        rest = [name for name in theta if name not in critics and name not in watched]
        wanted = [theta[name] for name in watched + critics]
        rows = [
            torch.autograd.grad(loss, wanted, retain_graph=True, allow_unused=True)
            for loss in losses
        ]
        shared = torch.stack([_flat(row[: len(watched)], wanted) for row in rows])
        weights = self.weigh(shared @ shared.T).to(losses)
        gradients = dict(
            zip(
                watched,
                (weights @ shared).split([theta[name].numel() for name in watched]),
                strict=True,
            )
        )
        if rest:
            gradients |= zip(
                rest,
                # one more backward pass for all, in place of one for each objective
                torch.autograd.grad((weights * losses).sum(), [theta[name] for name in rest]),
                strict=True,
            )
        for k, name in enumerate(critics, len(watched)):
            # a critic belongs to one objective, whose weight must not slow its learning
            gradients[name] = torch.stack([row[k] for row in rows if row[k] is not None]).sum(0)
        for name, gradient in gradients.items():
            # added to what earlier batches of this update have left
            share = gradient.view_as(theta[name]) / batches
            theta[name].grad = share if (known := theta[name].grad) is None else known + share
        return list(weights.tolist())

    def combined(
        self, gradients: Float[Tensor, "M P"], theta: Tree
    ) -> tuple[Float[Tensor, " P"], list[float]]:
        """Return the weighted sum of objectives' gradients, and the weights.

        Args:
            gradients: Of each objective, all parameters in the order of `theta`.
            theta: The parameters.
        """
        if isinstance(self.weigh, Tensor):
            weights = self.weigh.to(gradients)
        else:
            sizes = [tensor.numel() for tensor in theta.values()]
            seen = [self.watched is None or self.watched(name) for name in theta]
            parts = zip(gradients.split(sizes, 1), seen, strict=True)
            shared = torch.cat([part for part, is_seen in parts if is_seen], 1)
            weights = self.weigh(shared @ shared.T).to(gradients)
        return weights @ gradients, list(weights.tolist())


def jacobian(losses: Float[Tensor, " M"], theta: Tree) -> Float[Tensor, "M P"]:
    """Return each loss's gradient [M, P], all parameters in the order of their names.

    The autograd graph is freed.
    """
    wanted = [theta[name] for name in sorted(theta)]
    last = len(losses) - 1
    rows = [
        torch.autograd.grad(loss, wanted, retain_graph=m < last, allow_unused=True)
        for m, loss in enumerate(losses)
    ]
    return torch.stack([_flat(row, wanted) for row in rows])


def _flat(gradients: Sequence[Tensor | None], like: Sequence[Tensor]) -> Float[Tensor, " P"]:
    return torch.cat(
        [
            (torch.zeros_like(t) if g is None else g).flatten()
            for g, t in zip(gradients, like, strict=False)
        ]
    )


def preferred(
    preference: Sequence[float], objectives: Sequence[str], where: str = "algorithm.preference"
) -> Float[Tensor, " M"]:
    """Return a preference over objectives, brought to a sum of one [M]; equal shares if none.

    Args:
        preference: A number for each objective.
        objectives: Their names.
        where: The key in a config, for messages.

    Raises:
        UserError: The preference does not fit.
    """
    shares = tuple(preference) or (1.0,) * len(objectives)
    if len(shares) != len(objectives):
        raise UserError(
            f"{where}: {len(shares)} numbers for {len(objectives)} objectives "
            f"({', '.join(objectives)})."
        )
    if not all(0 <= share < math.inf for share in shares) or not any(shares):
        raise UserError(
            f"{where}: expected numbers that are not negative and not all zero, found "
            f"{list(shares)}."
        )
    if (top := max(shares)) > LARGE or top < 1 / LARGE:  # whose sum may not be a number
        shares = tuple(share / top for share in shares)
    return torch.tensor(shares, dtype=torch.float64) / sum(shares)


def of_last_layers(names: Collection[str], count: int) -> Callable[[str], bool]:
    """Return a function that tells whether a parameter, by its name, is in one of the last layers.

    A layer is told by the first number in the name.

    Raises:
        UserError: The names have no numbers.
    """
    numbered = {name: int(match[1]) for name in names if (match := re.search(r"\.(\d+)\.", name))}
    if not numbered:
        raise UserError(
            "algorithm.gram_layers: the adapter's parameters have no layer numbers in their "
            "names. Leave it out."
        )
    last = set(sorted(set(numbered.values()))[-count:])
    return lambda name: numbered.get(name) in last
