"""The lines that an experiment consists of: its algorithm, and the baselines beside it."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, Literal

from fedpref.algorithms import Alone, AnyAlgorithm, FedDPO, FedPDPO, Pooled
from fedpref.channel.robust import Mean
from fedpref.errors import UserError
from fedpref.experiments.free_baselines import FREE_BASELINES
from fedpref.federation.personal import Personal
from fedpref.models.own_parts import NO_PARTS

if TYPE_CHECKING:
    from fedpref.experiments.experiment import Experiment

Baseline = Literal[
    "alone",
    "feddpo",
    "pooled",
    "alone-parts",
    "feddpo-reward",
    "reward-head",
    "words",
    "probe",
    "length",
    "majority",
]
FEDERATED = ("feddpo", "feddpo-reward")  # baselines in which cohorts take part


def lines(experiment: Experiment, clients: int) -> dict[str, tuple[str, Experiment]]:
    """Return the lines that an experiment consists of: its algorithm's own and its baselines.

    Baselines train with the same local settings. A step of the pooled one accumulates as many
    batches as the cohort has clients, so that all lines take the same number of steps and it sees
    as many pairs. Alone, every client trains in every round.

    Args:
        experiment: Whose lines.
        clients: How many clients there are.

    Returns:
        name -> (subfolder of the run directory, the line as an experiment).
    """
    planned: dict[str, tuple[str, Experiment]] = {experiment.algorithm.name: ("", experiment)}
    federation = experiment.federation
    everybody = replace(
        federation,
        clients_per_round=None,
        sampling="uniform",
        sampling_weights={},
        deadline=None,
        max_participations=None,
        concurrency=None,
        clip=None,
        combine=Mean(),
        compress=None,
        gold=None,
    )
    # who sends nothing can be hostile in what it trains on alone
    attack = experiment.attack if experiment.attack and experiment.attack.is_of_rows else None
    together = replace(federation, concurrency=None)  # who wait for one another
    for name in experiment.baselines:
        algorithm = baseline(experiment, name, clients)
        line_federation = together if name in FEDERATED else everybody
        if algorithm is not None and name != experiment.algorithm.name:
            line = replace(
                experiment,
                algorithm=algorithm,
                federation=line_federation,
                attack=experiment.attack if name in FEDERATED else attack,
                task=experiment.task.without_samples(),  # answers to read are the algorithm's own
                baselines=(),
                privacy=None,  # they share nothing
            )
            planned[name] = (f"baselines/{name}", line)
    return planned


def batches_of_pooled(experiment: Experiment, clients: int) -> int:
    """Return how many batches a step of one model on all data accumulates, so that it sees as many
    pairs as the cohort.

    Args:
        experiment: Whose cohort.
        clients: How many clients there are, newcomers among them.
    """
    federation = experiment.federation
    present = max(1, clients - federation.num_newcomers)
    cohort = min(federation.clients_per_round or present, present)
    return experiment.algorithm.local.gradient_accumulation_steps * cohort


def baseline(experiment: Experiment, name: Baseline, clients: int) -> AnyAlgorithm | None:
    """Return the algorithm of a baseline; None for one that costs nothing.

    Args:
        experiment: Whose baseline.
        name: Its name.
        clients: How many clients there are.

    Raises:
        UserError: It is about parts of a client's own, and the algorithm has none.
    """
    algorithm, local = experiment.algorithm, experiment.algorithm.local
    batches = batches_of_pooled(experiment, clients)
    plain: dict[str, AnyAlgorithm] = {
        "alone": Alone(local=local),
        "feddpo": FedDPO(local=local),
        "pooled": Pooled(local=replace(local, gradient_accumulation_steps=batches)),
    }
    if name in plain or name in FREE_BASELINES:
        return plain.get(name)
    own = algorithm.parts
    if not own:
        raise UserError(
            f"baselines: {name} is about parts of a client's own, of which {algorithm.name} has "
            "none. Leave it out."
        )
    # trained as the algorithm trains its own: where it says nothing, as what is shared
    named = {one.name for one in fields(Personal)} - {"name", "parts", "local"}
    how: dict[str, Any] = {"adapter_rate": 1.0}
    named &= {one.name for one in fields(algorithm)}
    how |= {key: getattr(algorithm, key) for key in named}
    reward = replace(NO_PARTS, reward=True, reward_pooling=own.reward_pooling)
    if name == "alone-parts":
        return Alone(local=local, parts=own, **how)
    if name == "reward-head":
        return Alone(local=local, parts=reward, only_parts=True)
    return FedPDPO(local=local, parts=reward, **how)
