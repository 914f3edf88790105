"""Private vocabulary heads on a shared adapter: FedPer (Arivazhagan et al. 2019) and FedRep (Collins et al. 2021), for DPO."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from fedpref.aggregation import Aggregate, Factors
from fedpref.algorithms.fedpdpo import FedPDPO, State
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
    personal_steps: Annotated[int, Field(ge=1)] | None = None  # of the head's phase where they alternate; None: a third
    local: Descent = Descent()
    aggregate: Annotated[Aggregate, Field(discriminator="name")] = Factors()
    head_rate: Annotated[float, Field(gt=0)] = 0.1  # of a full head, times the phase's learning rate
    pooled: ClassVar[bool] = False

    def __post_init__(self) -> None:
        self._as_fedpdpo()  # which checks the phases

    @property
    def parts(self) -> Parts:
        return Parts(head=self.head, bottleneck=0, reward=False, adapter=False)

    def init(self, fed: Federation, start: Tree) -> State:
        return self._as_fedpdpo().init(fed, start)

    def step(self, fed: Federation, state: State) -> tuple[State, Mapping[str, float]]:
        return self._as_fedpdpo().step(fed, state)

    def join(self, fed: Federation, state: State, steps: int) -> State:
        return self._as_fedpdpo().join(fed, state, steps)

    def model(self, state: State) -> tuple[Tree | PerClient[Tree], ...]:
        return (state.adapter, state.own)

    def _as_fedpdpo(self) -> FedPDPO:
        same = {name: getattr(self, name) for name in ("phases", "personal_steps", "local", "aggregate", "head_rate")}
        return FedPDPO(parts=self.parts, **same)
