"""FFA-LoRA (Sun et al. 2024, "Improving LoRA in Privacy-preserving Federated Learning"), for DPO."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from fedpref.aggregation import FrozenA
from fedpref.algorithms.feddpo import FedDPO, State
from fedpref.federation import Federation, PerClient
from fedpref.local import Descent
from fedpref.trees import Tree


@dataclass(frozen=True, kw_only=True)
class FFA:
    """FedDPO with the factors A frozen where they were drawn: then the mean of the products is the product of the means.

    Shared: the adapter. Private: pairs, optimiser moments. Averaged: B, half of FedDPO's bytes up.
    """

    name: Literal["ffa-lora"] = "ffa-lora"
    local: Descent = Descent()
    pooled: ClassVar[bool] = False
    adapts: ClassVar[bool] = True

    def init(self, fed: Federation, start: Tree) -> State:
        return self._as_feddpo().init(fed, start)

    def step(self, fed: Federation, state: State) -> tuple[State, Mapping[str, float]]:
        return self._as_feddpo().step(fed, state)

    def join(self, fed: Federation, state: State, steps: int) -> State:
        return state  # nothing here is a client's own

    def model(self, state: State) -> tuple[Tree | PerClient[Tree], ...]:
        return (state.adapter,)

    def _as_feddpo(self) -> FedDPO:
        return FedDPO(local=self.local, aggregate=FrozenA())
