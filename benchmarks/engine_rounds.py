"""Rounds without training: trees of a given size travel from the coordinator to clients and back,
or from clients to their neighbours.

    python benchmarks/engine_rounds.py simulation|flare-simulated|flare CELLS.json

CELLS.json has the experiment whose clients are taken and the rounds to time; seconds of each round
are written to its `results`. The program is a FLARE job's too, and then needs this folder on the
server's path, and to be among the classes that its kit allows.
"""

from __future__ import annotations

import io
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from nvflare.collab import collab
from nvflare.recipe import ProdEnv

from fedpref import config
from fedpref.algorithms.decdpo import begin
from fedpref.engines import Patience, RemoteEngine, Simulation, Sites
from fedpref.experiments.experiment import Experiment
from fedpref.federation.aggregation import Factors
from fedpref.numerics import topology
from fedpref.numerics.topology import Matrix
from fedpref.sites.kits import CLASSES
from fedpref.sites.programs import Collab, recipe
from fedpref.sites.simulated import simulate

CLASS = "engine_rounds.Rounds"
PATIENCE = Patience(seconds=600)


def ring(round: int, active: Sequence[int]) -> Matrix:
    return topology.mixing(topology.SHAPES["ring"](len(active)))


def timed(engine: Any, cell: dict[str, Any]) -> list[float]:
    """Seconds of each round."""
    start = {
        "theta": torch.randn(int(cell["mb"] * 1e6 / 4), generator=torch.Generator().manual_seed(0))
    }
    told, found = engine.each(begin, start, Factors()), []
    for round in range(cell["rounds"]):
        engine.begin(round, engine.clients)
        before = time.perf_counter()
        if cell["gossip"]:
            _, told = engine.mix(told)
        else:
            start = engine.mean(engine.each(begin, start, Factors()))
        found.append(time.perf_counter() - before)
    return found


def all_timed(engine: Callable[[], Any], file: Path) -> None:
    content = json.loads(file.read_text())
    content["results"] = [timed(engine(), cell) for cell in content["cells"]]
    file.write_text(json.dumps(content))


class Rounds:
    """A coordinator's program."""

    def __init__(self, file: str) -> None:
        self.file = file

    @collab.main
    def main(self) -> None:
        experiment = json.loads(Path(self.file).read_text())["experiment"]
        sites = Sites(Collab(), experiment, "rounds", PATIENCE)
        all_timed(lambda: RemoteEngine(sites, mixing=ring), Path(self.file))


def main() -> None:
    engine, file = sys.argv[1], Path(sys.argv[2]).resolve()
    content = json.loads(file.read_text())
    experiment = config.parse(Experiment, content["experiment"], "the experiment")
    if engine == "simulation":
        task = experiment.build_task()
        shards = [task.encode(client) for client in experiment.clients()[0]]
        all_timed(
            lambda: Simulation(task, shards, seed=0, rounds=1000, mixing=ring, workers=2), file
        )
        return

    from engine_rounds import Rounds  # by the name under which the server finds it

    job = recipe(
        "rounds",
        Rounds(str(file)),
        content["sites"],
        600.0,
        simulated=content["sites"] if engine == "flare-simulated" else 0,
    )
    if engine == "flare":
        admin = Path(content["admin"])
        with redirect_stdout(io.StringIO()):
            job.execute(
                ProdEnv(startup_kit_location=str(admin), username=admin.name, login_timeout=30.0)
            ).get_result()
    else:
        with tempfile.TemporaryDirectory() as scratch:
            simulate(job, content["sites"], Path(scratch), [*CLASSES, CLASS])


if __name__ == "__main__":
    main()
