"""FFA-LoRA, for DPO.

Source: Sun et al. 2024, "Improving LoRA in Privacy-preserving Federated Learning".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from fedpref.algorithms.feddpo import FedDPO
from fedpref.federation.aggregation import FrozenA
from fedpref.federation.algorithm import Algorithm
from fedpref.federation.common import AdapterState
from fedpref.federation.local_training import LocalTraining
from fedpref.federation.verbs import Federation
from fedpref.numerics.trees import Tree


@dataclass(frozen=True, kw_only=True)
class FFA(Algorithm[AdapterState]):
    """FedDPO with A frozen where it was drawn.

    The mean of the products is then the product of the means. Shared: the adapter. Private: pairs,
    optimiser moments. Averaged: B, half of FedDPO's bytes up.
    """

    name: Literal["ffa-lora"] = "ffa-lora"
    local: LocalTraining = LocalTraining()
    """How a client trains within a round."""

    works = FedDPO.works
    sums: ClassVar[int] = 1
    sends_local_steps = True
    adapts: ClassVar[bool] = True

    def given(self, join_steps: int) -> tuple[Any, ...]:
        return self._as_feddpo().given(join_steps)

    def sent(self, start: Tree) -> Tree:
        return FrozenA().split(start)[0]

    def init(self, fed: Federation, start: Tree) -> AdapterState:
        return self._as_feddpo().init(fed, start)

    def step(
        self, fed: Federation, state: AdapterState
    ) -> tuple[AdapterState, Mapping[str, float]]:
        return self._as_feddpo().step(fed, state)

    def model(self, state: AdapterState) -> tuple[Tree]:
        return (state.adapter,)

    def _as_feddpo(self) -> FedDPO:
        return FedDPO(local=self.local, aggregate=FrozenA())
