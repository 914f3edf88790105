"""How a client trains what is its own beside what it shares: in two phases, or at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Literal

from fedpref.federation.local_training import LocalTraining, halves, moments_of, train_locally
from fedpref.federation.verbs import Client, work
from fedpref.models.own_parts import DOWN, HEAD, HEADS, OWN_ADAPTER, UP, VOCABULARY_HEAD, Parts
from fedpref.numerics import trees
from fedpref.numerics.trees import Tree
from fedpref.types import Count, Positive


@dataclass(frozen=True, kw_only=True)
class Personal:
    """Settings of algorithms in which clients have parts of their own."""

    name: str = ""
    """The algorithm's name in a config."""
    parts: Parts = Parts()
    """Which parts of the model each client has of its own."""
    phases: Literal["alternate", "joint"] = "alternate"
    """Train the client's own parts first and then what is shared, or everything in every step."""
    personal_steps: Count | None = 1
    """Local steps of the first phase; null takes a third of the round's."""
    freeze: Literal["vocabulary-head", "heads"] = "vocabulary-head"
    """What stays fixed in the second phase: the vocabulary head, or both heads."""
    local: LocalTraining = LocalTraining()
    """How a client trains within a round, both phases together."""
    head_rate: Positive = 0.1
    """The learning rate of a full vocabulary head, as a multiple of the adapter's."""
    bottleneck_rate: Positive = 0.1
    """The learning rate of the bottleneck, as a multiple of the adapter's."""
    adapter_rate: Positive = 0.2
    """The learning rate of the client's own adapter, as a multiple of the shared one's; below one,
    so that what is common is learned by the shared one."""

    def __post_init__(self) -> None:
        if self.phases == "alternate" and isinstance(self.local, LocalTraining):
            halves(self.local, self.personal_steps)

    @property
    def as_personal(self) -> Personal:
        """The settings as work of any such algorithm takes them."""
        return Personal(**{one.name: getattr(self, one.name) for one in fields(Personal)})

    def rates(self, own: Tree) -> Mapping[str, float]:
        """Return factors of the learning rate, by parameter."""
        return {HEAD: self.head_rate, DOWN: self.bottleneck_rate, UP: self.bottleneck_rate} | {
            name: self.adapter_rate for name in own if name.startswith(OWN_ADAPTER)
        }

    def train(
        self, client: Client, received: Tree, fixed: Tree, own: Tree, moments: Tree
    ) -> tuple[Tree, Tree, Tree, Mapping[str, float]]:
        """Take a round's local steps.

        Args:
            client: Who trains.
            received: What is shared and trained.
            fixed: What is shared and stays.
            own: The client's own parts.
            moments: Optimiser moments, where they are kept.

        Returns:
            What became of `received`, of `own` and of `moments`, and metrics.
        """
        rates = self.rates(own)
        if self.phases == "joint" or not own:
            theta, moments, metrics = train_locally(
                client, trees.apart(received, own), self.local, moments, fixed=fixed, rates=rates
            )
            return trees.select(theta, received), trees.select(theta, own), moments, metrics
        first, second = halves(self.local, self.personal_steps)
        # what is shared stays as it came while the own parts fit themselves to it
        own, kept, before = train_locally(
            client,
            own,
            first,
            moments_of(moments, own),
            fixed={**received, **fixed},
            rates=rates,
            leaves=False,
        )
        heads = trees.select(own, HEADS if self.freeze == "heads" else VOCABULARY_HEAD)
        free = trees.apart(
            received, {name: tensor for name, tensor in own.items() if name not in heads}
        )
        moments = {**moments, **kept}
        theta, kept, metrics = train_locally(
            client,
            free,
            second,
            moments_of(moments, free),
            fixed={**fixed, **heads},
            rates=rates,
        )
        # counts of both phases; all other metrics are those of the second, the first's are beside
        # them, if it was of enough examples for any
        sums = {
            name: metrics.get(name, 0.0) + before.get(name, 0.0)
            for name in {**before, **metrics}
            if name.startswith("num_")
        }
        metrics = {
            **metrics,
            **{f"personal/{name}": value for name, value in before.items() if name not in sums},
            **sums,
        }
        return (
            trees.select(theta, received),
            {**heads, **trees.select(theta, own)},
            {**moments, **kept},
            metrics,
        )


@work("personal.begin", sends=(), keeps={0: "own"})
def begin(client: Client, parts: Parts) -> Tree:
    """Return a client's own parts as they begin."""
    return client.task.parts(parts, client.rng) if parts else {}


@work("personal.settle", sends=(), keeps={0: "own"}, reads=("own",))
def settle(
    client: Client, shared: Tree, own: Tree, settings: LocalTraining, method: Personal
) -> Tree:
    """Return the own parts of a client that joins after the run, trained beside what is shared.

    Args:
        client: Who joins.
        shared: What stays fixed.
        own: The client's own parts as they begin.
        settings: The local steps that it may take.
        method: The learning rates of own parts.
    """
    return train_locally(
        client, own, settings, {}, fixed=shared, rates=method.rates(own), leaves=False
    )[0]
