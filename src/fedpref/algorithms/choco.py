"""Decentralised DPO with compressed messages.

Source: Koloskova, Stich and Jaggi 2019, "Decentralized Stochastic Optimization and Gossip
Algorithms with Compressed Communication" (CHOCO-SGD).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from fedpref.federation.algorithm import Algorithm
from fedpref.federation.common import no_moments, own_copy, train_own
from fedpref.federation.consensus import consensus_metrics, projected
from fedpref.federation.local_training import LocalTraining
from fedpref.federation.verbs import Client, Federation, PerClient, work
from fedpref.numerics import trees
from fedpref.numerics.trees import Tree
from fedpref.types import Portion


@dataclass(frozen=True)
class State:
    """Each client's adapter, its public copy, the pull of the neighbours' copies, and moments.

    The pull is how far the neighbours' public copies are from the client's own.
    """

    theta: PerClient[Tree]
    public: PerClient[Tree]
    pull: PerClient[Tree]
    moments: PerClient[Tree]


@work(
    "choco.news",
    sends=(),
    tells=(0,),
    keeps={0: "news"},
    reads=("theta", "public"),
)
def news(client: Client, theta: Tree, public: Tree) -> Tree:
    """Return what is new since the client last told."""
    return trees.subtract(theta, public)


@work(
    "choco.follow",
    sends=(),
    keeps={0: "theta", 1: "public", 2: "pull"},
    reads={
        "theta": "theta",
        "public": "public",
        "pull": "pull",
        "told": "news",
        "sent": "news",
        "mixed": "news",
    },
)
def follow(
    client: Client,
    theta: Tree,
    public: Tree,
    pull: Tree,
    told: Tree,
    sent: Tree,
    mixed: Tree,
    step_size: float,
) -> tuple[Tree, Tree, Tree]:
    """Return the adapter after a step towards the public copies, the public copy, and the pull."""
    public = trees.add(public, sent)
    pull = trees.add(pull, trees.subtract(mixed, told))
    return trees.add(theta, trees.scale(pull, step_size)), public, pull


def gossip(
    fed: Federation,
    theta: PerClient[Tree],
    public: PerClient[Tree],
    pull: PerClient[Tree],
    step_size: float,
) -> tuple[PerClient[Tree], PerClient[Tree], PerClient[Tree]]:
    """Tell the neighbours what is new, and take a step towards their public copies.

    Returns:
        The new adapter, public copy and pull of each client.
    """
    told = fed.each(news, theta, public)
    sent, mixed = fed.mix(told)
    return fed.each(follow, theta, public, pull, told, sent, mixed, step_size)


@dataclass(frozen=True, kw_only=True)
class ChocoDPO(Algorithm[State]):
    """DecDPO whose clients tell their neighbours what is new since they last told, compressed.

    Shared with neighbours: changes of a public copy that lags behind the adapter, compressed as
    `network.compression` says. Private: pairs, optimiser moments, and of the adapter what
    compression leaves out. Averaged: public copies, towards which the adapter takes a step of
    `step_size`; the mean over clients is that of the adapters whatever the compression. Without
    compression and with a step size of one it is DecDPO. The graph must be the same in every
    round, and everybody takes part: neighbours' copies are known by their sum alone.
    """

    name: Literal["choco"] = "choco"
    step_size: Portion = 0.5
    """How far an adapter goes towards its neighbours' public copies; less with more compression."""
    local: LocalTraining = LocalTraining()
    """How a client trains within a round."""

    works = (train_own, news, follow, own_copy, no_moments, projected)
    sends_local_steps = True
    gossips: ClassVar[bool] = True
    needs_fixed_network: ClassVar[bool] = True
    needs_contraction: ClassVar[bool] = True

    def init(self, fed: Federation, start: Tree) -> State:
        theta, public = fed.each(own_copy, start), fed.each(own_copy, start)
        pull = fed.each(own_copy, trees.scale(start, 0.0))
        return State(theta, public, pull, fed.each(no_moments))

    def step(self, fed: Federation, state: State) -> tuple[State, Mapping[str, float]]:
        before, moments, metrics = fed.each(train_own, {}, state.theta, state.moments, self.local)
        theta, public, pull = gossip(fed, before, state.public, state.pull, self.step_size)
        new = State(
            state.theta | theta, state.public | public, state.pull | pull, state.moments | moments
        )
        return new, {**fed.report(metrics), **consensus_metrics(fed, before, theta)}

    def model(self, state: State) -> tuple[PerClient[Tree]]:
        return (state.theta,)
