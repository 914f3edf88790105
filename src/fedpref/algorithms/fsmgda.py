"""FSMGDA (Yang et al. 2023): clients train for each objective apart, the server takes the min-norm combination of the mean changes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from fedpref import trees
from fedpref.algorithms.feddpo import no_moments
from fedpref.algorithms.firm import Preference, critics
from fedpref.algorithms.scalarised import State
from fedpref.federation import Client, Federation, PerClient, work
from fedpref.local import Descent, descend
from fedpref.multiobjective import MinNorm
from fedpref.objectives import Objectives, preferred
from fedpref.tasks.task import CRITIC
from fedpref.trees import Tree


@work()
def train(client: Client, adapter: Tree, own: Tree, moments: Tree, method: FSMGDA) -> tuple[Tree, Tree, Tree, Mapping[str, float]]:
    """A change of the adapter for each objective, under the objective's number."""
    names = client.task.objectives
    messages: dict[str, torch.Tensor] = {}
    kept: dict[str, torch.Tensor] = {}
    critic: dict[str, torch.Tensor] = dict(own)
    sums: dict[str, float] = {}
    for m, name in enumerate(names):
        alone = Objectives(torch.nn.functional.one_hot(torch.tensor(m), len(names)))
        before = {key.removeprefix(f"{m}/"): value for key, value in moments.items() if key.startswith(f"{m}/")}
        theta, after, metrics = descend(client, {**adapter, **own}, method.local, before, objectives=alone)
        messages |= {f"{m}/{key}": value for key, value in trees.subtract(trees.select(theta, adapter), adapter).items()}
        kept |= {f"{m}/{key}": value for key, value in after.items()}
        critic |= {key: value for key, value in theta.items() if key == CRITIC + name}
        for key, value in metrics.items():
            if not key.startswith("weights/"):
                sums[key] = sums.get(key, 0.0) + value / (1 if key.startswith("num_") else len(names))
    return messages, critic, kept, sums


@dataclass(frozen=True, kw_only=True)
class FSMGDA:
    """Every objective has local steps of its own, from the same adapter, and the server weighs what comes of them.

    Shared: the adapter. Private: data, rewards, critics, optimiser moments. Averaged: a change of the adapter for each of M objectives, M
    times the bytes and the local steps of FIRM. Weights solve the min-norm problem of the mean changes, each kept between 0.001 and
    0.999 as the paper's code does with two; a regulariser and a preference (`solver`) are not the paper's. Metrics:
    `weights/0`, `weights/1` and so on, in the order of the task's objectives.
    """

    name: Literal["fsmgda"] = "fsmgda"
    local: Descent = Descent()
    solver: MinNorm = MinNorm(b=0.0)
    preference: Preference = ()
    server_learning_rate: Annotated[float, Field(gt=0)] = 1.0
    pooled: ClassVar[bool] = False
    keeps_critics: ClassVar[bool] = True

    def check_objectives(self, objectives: tuple[str, ...]) -> None:
        """Raise UserError where the preference does not fit the task's objectives."""
        preferred(self.preference, objectives)

    def init(self, fed: Federation, start: Tree) -> State:
        return State(start, fed.each(critics), fed.each(no_moments))

    def step(self, fed: Federation, state: State) -> tuple[State, Mapping[str, float]]:
        messages, own, moments, metrics = fed.each(train, state.adapter, state.critics, state.moments, self)
        mean = fed.mean(messages)
        count = len(mean) // len(state.adapter)
        changes = [{name: mean[f"{m}/{name}"] for name in state.adapter} for m in range(count)]
        flat = torch.stack([torch.cat([change[name].flatten() for name in sorted(change)]) for change in changes])
        weights = self.solver(flat @ flat.T, preferred(self.preference, [str(m) for m in range(count)])).clamp(0.001, 0.999)
        shares: list[float] = (weights / weights.sum()).tolist()
        step = trees.total(trees.scale(change, self.server_learning_rate * share) for change, share in zip(changes, shares, strict=True))
        report = {**fed.report(metrics), **{f"weights/{m}": share for m, share in enumerate(shares)}}
        return State(trees.add(state.adapter, step), state.critics | own, state.moments | moments), report

    def join(self, fed: Federation, state: State, steps: int) -> State:
        return state  # critics foretell rewards of training, they are no part of the model

    def model(self, state: State) -> tuple[Tree | PerClient[Tree], ...]:
        return (state.adapter,)
