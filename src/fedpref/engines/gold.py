"""Gold pairs: what the coordinator holds right, and what they teach in a round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedpref.errors import UserError
from fedpref.federation.local_training import LocalTraining, train_locally
from fedpref.federation.verbs import Client, in_turn, work
from fedpref.numerics import seeds, trees
from fedpref.numerics.trees import Tree
from fedpref.tasks.task import Shard, Task


@dataclass(frozen=True)
class Gold:
    """Pairs of the coordinator's own, and how is trained on them: as clients train on theirs."""

    shard: Shard
    local: LocalTraining


@work("gold.learn", sends=())
def learn(client: Client, told: Tree, names: Sequence[str], local: LocalTraining) -> Tree:
    """Return the change that local steps on gold pairs make of what everybody was sent.

    Args:
        client: Whose data are the gold pairs.
        told: What everybody was sent.
        names: Of what is trained; the rest stays.
        local: The steps.
    """
    if missing := sorted(set(names) - told.keys()):
        raise UserError(
            f"federation.gold: {missing[0]} is not among what everybody was sent, so that gold "
            "pairs cannot be learned from as clients do. Leave it out."
        )
    start = trees.select(told, names)
    fixed = {name: tensor for name, tensor in told.items() if name not in start}
    trained, _, _ = train_locally(client, start, local, {}, fixed=fixed)
    return trees.subtract(trained, start)


def learned_here(
    gold: Gold, task: Task, seed: int, place: tuple[int, int, int], told: Tree, names: Sequence[str]
) -> Tree:
    """Return what gold pairs teach, computed in this process.

    Args:
        gold: The pairs.
        task: On its device.
        seed: The root of random draws.
        place: How many clients there are, the round, and all rounds.
        told: What everybody was sent.
        names: Of what is trained.
    """
    number, round, rounds = place
    rng = seeds.generator(seed, "gold", round=round, call=0, client=number)
    client = Client(number, task, gold.shard, rng, round, rounds, spread=in_turn)
    return learn(client, told, list(names), gold.local)


def told_first(args: Sequence[Any]) -> Tree:
    """Return what everybody was sent; of several trees of the same names the first, the adapter."""
    sent = [arg for arg in args if isinstance(arg, Mapping)]
    return trees.merge(*reversed(sent))
