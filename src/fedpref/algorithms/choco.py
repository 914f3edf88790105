"""Decentralised DPO with compressed messages (CHOCO-SGD: Koloskova, Stich and Jaggi 2019)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from fedpref import trees
from fedpref.algorithms.decdpo import measured, train
from fedpref.algorithms.feddpo import no_moments
from fedpref.algorithms.fedsa import begin
from fedpref.federation import Client, Federation, PerClient, work
from fedpref.local import Descent
from fedpref.trees import Tree


@dataclass(frozen=True)
class State:
    """Each client's adapter, its public copy, how far the neighbours' public copies are from it, and its optimiser moments."""

    theta: PerClient[Tree]
    public: PerClient[Tree]
    pull: PerClient[Tree]
    moments: PerClient[Tree]


@work()
def news(client: Client, theta: Tree, public: Tree) -> Tree:
    return trees.subtract(theta, public)


@work()
def follow(
    client: Client, theta: Tree, public: Tree, pull: Tree, told: Tree, sent: Tree, mixed: Tree, step_size: float
) -> tuple[Tree, Tree, Tree]:
    public = trees.add(public, sent)
    pull = trees.add(pull, trees.subtract(mixed, told))
    return trees.add(theta, trees.scale(pull, step_size)), public, pull


def gossip(fed: Federation, theta: PerClient[Tree], public: PerClient[Tree], pull: PerClient[Tree], step_size: float) -> Any:
    """Tell the neighbours what is new, and take a step towards their public copies: the new adapter, public copy and pull."""
    told = fed.each(news, theta, public)
    sent, mixed = fed.mix(told)
    return fed.each(follow, theta, public, pull, told, sent, mixed, step_size)


@dataclass(frozen=True, kw_only=True)
class ChocoDPO:
    """DecDPO whose clients tell their neighbours what is new since they last told, compressed as `network.compression` says.

    Shared with neighbours: compressed changes of a public copy that lags behind the adapter. Private: pairs, optimiser moments, and of
    the adapter what compression leaves out. Averaged: public copies, towards which the adapter takes a step of `step_size`; the mean over
    clients is that of the adapters whatever the compression. Without compression and with a step size of one it is DecDPO. The graph must
    be the same in every round, and everybody takes part: neighbours' copies are known by their sum alone.
    """

    name: Literal["choco"] = "choco"
    step_size: Annotated[float, Field(gt=0, le=1)] = 0.5
    local: Descent = Descent()
    pooled: ClassVar[bool] = False
    gossips: ClassVar[bool] = True
    needs_fixed_network: ClassVar[bool] = True

    def init(self, fed: Federation, start: Tree) -> State:
        nothing = trees.scale(start, 0.0)
        return State(fed.each(begin, start), fed.each(begin, start), fed.each(begin, nothing), fed.each(no_moments))

    def step(self, fed: Federation, state: State) -> tuple[State, Mapping[str, float]]:
        before, moments, metrics = fed.each(train, {}, state.theta, state.moments, self.local)
        theta, public, pull = gossip(fed, before, state.public, state.pull, self.step_size)
        new = State(state.theta | theta, state.public | public, state.pull | pull, state.moments | moments)
        return new, {**fed.report(metrics), **measured(fed, before, theta)}

    def join(self, fed: Federation, state: State, steps: int) -> State:
        return state  # a client that comes later has no neighbour to take an adapter from

    def model(self, state: State) -> tuple[Tree | PerClient[Tree], ...]:
        return (state.theta,)
