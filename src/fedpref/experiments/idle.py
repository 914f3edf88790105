"""Settings that an experiment gives and that would do nothing, or something else."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

from fedpref.errors import UserError
from fedpref.experiments.lines import baseline
from fedpref.federation.network import Network
from fedpref.federation.participation import Participation

if TYPE_CHECKING:
    from fedpref.experiments.experiment import Experiment


def refuse_idle(spec: Experiment) -> None:
    """Raise UserError where a setting would touch nothing, or something else.

    Not where a config is read, nor where a run goes on: those of older versions still can.
    """
    algorithm, attack = spec.algorithm, spec.attack
    algorithm.refuse_unused()
    is_alone = algorithm.sends_nothing or algorithm.pools_data
    if attack is not None:
        attack.refuse_unused()
        if is_alone and not attack.is_of_rows:
            raise UserError(
                f"attack: {attack.name} is about what clients send, and those of {algorithm.name} "
                "send nothing. Take an attack of rows, such as flip."
            )
        if algorithm.tells_models and not attack.is_of_rows and attack.name != "alie":
            raise UserError(
                f"attack: {attack.name} is about a change, and neighbours of {algorithm.name} tell "
                "one another models. Take alie, or an attack of rows, such as flip."
            )
    if is_alone and spec.federation.compress is not None:
        raise UserError(
            f"federation.compress: nothing is sent for a mean with {algorithm.name}. Leave it out."
        )


def warn_of_idle(spec: Experiment, clients: int) -> None:
    """Warn of settings that do nothing in an experiment."""
    for said in _idle(spec, clients):
        warnings.warn(said, stacklevel=4)


def _idle(spec: Experiment, clients: int) -> Iterator[str]:
    algorithm, federation, network = spec.algorithm, spec.federation, spec.network
    usual = Network()
    if not algorithm.gossips:
        for name in ("topology", "weights", "link_failure"):
            if getattr(network, name) != getattr(usual, name):
                yield (
                    f"network.{name}: {algorithm.name} has a coordinator and no neighbours; it is "
                    "not used."
                )
    if federation.speed_spread != Participation().speed_spread and not (
        federation.deadline or federation.concurrency
    ):
        yield "federation.speed_spread: nobody is waited for without deadline or concurrency."
    if spec.evaluate_pairs is not None and not (spec.evaluate_every or spec.evaluate_on_start):
        yield "evaluate_pairs: the last evaluation is of all pairs, and there is no other."
    if spec.evaluate_all_at_end and spec.evaluate_clients is None:
        yield "evaluate_all_at_end: all clients are evaluated without evaluate_clients."
    looks = sum(map(spec.looks_after, range(1, spec.rounds + 1)))
    if spec.keep == "best" and looks + spec.evaluate_on_start < 2:
        yield (
            f"keep: best has one evaluation to choose from in {spec.rounds} rounds. Set "
            "evaluate_every to less."
        )
    if spec.stop is not None and looks <= spec.stop.patience:
        yield (
            f"stop.patience: {spec.stop.patience} evaluations without an improvement cannot be in "
            f"the {looks} of {spec.rounds} rounds; nothing is stopped."
        )
    name = algorithm.name
    if name in spec.baselines and baseline(spec, name, clients) != algorithm:
        yield (
            f"baselines: {name} is not run, for the algorithm has its name, with other settings. "
            "Compare them by `fedpref sweep`, as two variants."
        )
