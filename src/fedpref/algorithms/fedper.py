"""Private vocabulary heads on a shared adapter: FedPer (Arivazhagan et al. 2019) and FedRep (Collins et al. 2021), for DPO."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from fedpref import trees
from fedpref.algorithms.feddpo import no_moments
from fedpref.algorithms.fedpdpo import FedPDPO, State, begin, train
from fedpref.federation import Federation, PerClient
from fedpref.local import Descent
from fedpref.models.parts import Parts
from fedpref.trees import Tree


@dataclass(frozen=True, kw_only=True)
class FedPer:
    """Every client has a vocabulary head of its own and nothing else: FedPDPO without reward head and bottleneck.

    Shared: the adapter. Private: pairs, the head, optimiser moments. Averaged: the LoRA factors. `joint` phases are FedPer, `alternate`
    ones, the head first, FedRep.
    """

    name: Literal["fedper"] = "fedper"
    phases: Literal["joint", "alternate"] = "joint"
    head: Literal["full", "low-rank"] = "full"
    personal: Descent = Descent()  # the head's phase where they alternate
    local: Descent = Descent()
    head_rate: Annotated[float, Field(gt=0)] = 0.1  # of a full head, times the phase's learning rate
    pooled: ClassVar[bool] = False

    def init(self, fed: Federation, start: Tree) -> State:
        return State(start, fed.each(begin, Parts(head=self.head, bottleneck=0, reward=False)), fed.each(no_moments))

    def step(self, fed: Federation, state: State) -> tuple[State, Mapping[str, float]]:
        method = FedPDPO(phases=self.phases, personal=self.personal, local=self.local, head_rate=self.head_rate)
        delta, own, moments, metrics = fed.each(train, state.adapter, state.own, state.moments, method)
        return State(trees.add(state.adapter, fed.mean(delta)), state.own | own, state.moments | moments), fed.report(metrics)

    def model(self, state: State) -> tuple[Tree | PerClient[Tree], ...]:
        return (state.adapter, state.own)
