"""All data in one place: what federation would give up nothing against, if privacy were no matter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from fedpref.aggregation import Factors
from fedpref.algorithms.feddpo import FedDPO, State, no_moments
from fedpref.federation import Federation, PerClient
from fedpref.local import Descent
from fedpref.trees import Tree


@dataclass(frozen=True, kw_only=True)
class Centralised:
    """One adapter trained on the pooled data of all clients, who then evaluate it on their own held-out data.

    Shared: everything. `pooled` makes the experiment hand all training data to the first client, the only one that trains; FedDPO's
    program then averages over one. Across sites this line does not exist.
    """

    name: Literal["centralised"] = "centralised"
    local: Descent = Descent()
    pooled: ClassVar[bool] = True

    def init(self, fed: Federation, start: Tree) -> State:
        return State(start, fed.each(no_moments))

    def step(self, fed: Federation, state: State) -> tuple[State, Mapping[str, float]]:
        return FedDPO(local=self.local, aggregate=Factors(residual=False)).step(fed, state)

    def join(self, fed: Federation, state: State, steps: int) -> State:
        return state  # nothing here is a client's own

    def model(self, state: State) -> tuple[Tree | PerClient[Tree], ...]:
        return (state.adapter,)
