"""An explicit reward beside the implicit one of DPO: a Bradley-Terry likelihood on their sum."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from fedpref.losses.preference import DPO, Hinge
from fedpref.types import NonNegative

PerPair = Float[Tensor, " B"]


@dataclass(frozen=True, kw_only=True)
class Explicit:
    """How a reward head's margin joins DPO's implicit one.

    P(chosen over rejected) = sigmoid(implicit + alpha explicit). The loss is the preference loss of
    that sum plus `gamma` times -log sigmoid(explicit), whose gradient reaches all that trains below
    the head too. FedPDPO's parts are published, this combination is ours. Either way the policy
    learns what `alpha` times the head leaves of the margin, and the whole of it where `alpha` is 0.
    The head is a constant in the sum, and learns from its own term, unless `stop_gradient` is off:
    fitted on the sum too, it would learn what the policy leaves.
    """

    alpha: NonNegative = 0.5
    """The weight of the explicit margin beside the implicit one."""
    gamma: NonNegative = 0.2
    """The weight of a loss of the explicit margin alone."""
    stop_gradient: bool = True
    """Do not pass the joint loss's gradient to the reward head, which then learns from its own term
    alone."""

    def __call__(self, loss: DPO | Hinge, implicit: PerPair, explicit: PerPair) -> PerPair:
        """Return the loss of each pair.

        Args:
            loss: The preference loss.
            implicit: Margins of the implicit reward, chosen less rejected [B].
            explicit: Margins of the explicit reward, likewise [B].
        """
        offset = explicit.detach() if self.stop_gradient else explicit
        return loss.of_margin(implicit + self.alpha * offset) - self.gamma * logsigmoid(explicit)
