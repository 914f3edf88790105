"""A baseline with all data in one place: what federation exists to avoid."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from fedpref.algorithms.feddpo import FedDPO
from fedpref.federation.aggregation import Factors
from fedpref.federation.algorithm import Algorithm
from fedpref.federation.common import AdapterState, no_moments
from fedpref.federation.local_training import LocalTraining
from fedpref.federation.verbs import Federation
from fedpref.numerics.trees import Tree


@dataclass(frozen=True, kw_only=True)
class Pooled(Algorithm[AdapterState]):
    """One adapter trained on all clients' data together.

    Each client evaluates it on its own held-out data. Shared: everything. The experiment hands all
    training data to the first client, the only one that trains, and FedDPO's program averages over
    one. As a baseline, and in `fedpref bench`, its steps accumulate a batch for each client of the
    cohort, so that it sees as many pairs; as an algorithm it does what `local` says. Across sites
    it does not exist.
    """

    name: Literal["pooled"] = "pooled"
    local: LocalTraining = LocalTraining()
    """How the one model is trained within a round."""

    works = FedDPO.works
    pools_data: ClassVar[bool] = True

    def init(self, fed: Federation, start: Tree) -> AdapterState:
        return AdapterState(start, fed.each(no_moments))

    def step(
        self, fed: Federation, state: AdapterState
    ) -> tuple[AdapterState, Mapping[str, float]]:
        return FedDPO(local=self.local, aggregate=Factors(residual=False)).step(fed, state)

    def model(self, state: AdapterState) -> tuple[Tree]:
        return (state.adapter,)
