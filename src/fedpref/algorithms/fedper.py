"""Private vocabulary heads on a shared adapter, for DPO.

Sources: Arivazhagan et al. 2019 (FedPer); Collins et al. 2021 (FedRep).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from fedpref.algorithms.fedpdpo import FedPDPO
from fedpref.federation.aggregation import Aggregate, Factors
from fedpref.federation.algorithm import Algorithm
from fedpref.federation.common import PersonalState
from fedpref.federation.local_training import LocalTraining
from fedpref.federation.verbs import Federation, PerClient
from fedpref.models.own_parts import Parts
from fedpref.numerics.trees import Tree
from fedpref.types import Count, Positive


@dataclass(frozen=True, kw_only=True)
class FedPer(Algorithm[PersonalState]):
    """Every client has a vocabulary head of its own: FedPDPO without its other private parts.

    Shared: the adapter. Private: pairs, the head, optimiser moments. Averaged: the LoRA factors.
    With `phases: joint` it is FedPer, with `alternate`, the head first, FedRep.
    """

    name: Literal["fedper"] = "fedper"
    phases: Literal["joint", "alternate"] = "joint"
    """Train head and adapter together, or the head first."""
    head: Literal["full", "low-rank"] = "full"
    """A copy of the whole vocabulary head, or a low-rank change of it."""
    personal_steps: Count | None = None
    """Local steps of the head's phase, where phases alternate; by default a third."""
    local: LocalTraining = LocalTraining()
    """How a client trains within a round."""
    aggregate: Aggregate = Factors()
    """How clients' adapters become one."""
    head_rate: Positive = 0.1
    """The learning rate of a full head, as a multiple of the others'."""

    works = FedPDPO.works
    sums: ClassVar[int] = 1
    sends_local_steps = True

    def __post_init__(self) -> None:
        self._as_fedpdpo()  # which checks the phases

    @property
    def parts(self) -> Parts:
        return Parts(head=self.head, bottleneck=0, reward=False, adapter=False)

    def given(self, join_steps: int) -> tuple[Any, ...]:
        return self._as_fedpdpo().given(join_steps)

    def init(self, fed: Federation, start: Tree) -> PersonalState:
        return self._as_fedpdpo().init(fed, start)

    def step(
        self, fed: Federation, state: PersonalState
    ) -> tuple[PersonalState, Mapping[str, float]]:
        return self._as_fedpdpo().step(fed, state)

    def join(self, fed: Federation, state: PersonalState, steps: int) -> PersonalState:
        return self._as_fedpdpo().join(fed, state, steps)

    def model(self, state: PersonalState) -> tuple[Tree, PerClient[Tree]]:
        return (state.adapter, state.own)

    def _as_fedpdpo(self) -> FedPDPO:
        return FedPDPO(
            parts=self.parts,
            phases=self.phases,
            personal_steps=self.personal_steps,
            local=self.local,
            aggregate=self.aggregate,
            head_rate=self.head_rate,
        )
