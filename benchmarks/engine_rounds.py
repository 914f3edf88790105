"""Rounds without training: trees of a given size travel from the coordinator to clients and back,
or from clients to their neighbours.

    python benchmarks/engine_rounds.py simulation|flare-simulated|flare|bare CELLS.json

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
from itertools import count
from pathlib import Path
from typing import Any

import torch
from nvflare.collab import collab
from nvflare.recipe import ProdEnv

from fedpref import config
from fedpref.algorithms import decdpo, scaffold
from fedpref.engines import Patience, RemoteEngine, Simulation, Sites
from fedpref.experiments.experiment import Experiment
from fedpref.federation.aggregation import Factors
from fedpref.numerics import topology
from fedpref.numerics.topology import Matrix
from fedpref.sites.kits import CLASSES
from fedpref.sites.programs import Collab, recipe
from fedpref.sites.simulated import simulate

CLASSES_HERE = ["engine_rounds.Rounds", "engine_rounds.Bare", "engine_rounds.BareSite"]
PATIENCE = Patience(seconds=600)


def ring(round: int, active: Sequence[int]) -> Matrix:
    return topology.mixing(topology.SHAPES["ring"](len(active)))


def timed(engine: Any, cell: dict[str, Any]) -> list[float]:
    """Seconds of each round."""
    start = {
        "theta": torch.randn(int(cell["mb"] * 1e6 / 4), generator=torch.Generator().manual_seed(0))
    }
    # works without training: one tells its neighbours a tree, the other sends one
    told, found = engine.each(decdpo.begin, start, Factors()) if cell["gossip"] else None, []
    for round in range(cell["rounds"]):
        engine.begin(round, engine.clients)
        before = time.perf_counter()
        if cell["gossip"]:
            _, told = engine.mix(told)
        else:
            engine.mean(engine.each(scaffold.begin, start))
        found.append(time.perf_counter() - before)
    return found


def all_timed(engine: Callable[[dict[str, Any]], Any], file: Path) -> None:
    """Write the seconds of all cells' rounds; an engine is made for each experiment."""
    content = json.loads(file.read_text())
    content["results"] = []
    for cell in content["cells"]:
        experiment = dict(content["experiment"])
        experiment["algorithm"] = {"name": "decdpo" if cell["gossip"] else "scaffold"}
        content["results"].append(timed(engine(experiment), cell))
    file.write_text(json.dumps(content))


class Rounds:
    """A coordinator's program."""

    def __init__(self, file: str) -> None:
        self.file = file

    @collab.main
    def main(self) -> None:
        numbers = count()

        def engine(experiment: dict[str, Any]) -> RemoteEngine:
            sites = Sites(Collab(), experiment, f"rounds-{next(numbers)}", PATIENCE)
            return RemoteEngine(sites, mixing=ring)

        all_timed(engine, Path(self.file))


class BareSite:
    """What a site is to FLARE alone: it sends back what it was sent, as its clients' update."""

    @collab.publish
    def send_back(self, value: Any) -> Any:
        return value


class Bare:
    """Rounds of federated averaging that FLARE alone carries, the tensors by its own means.

    Each message goes to a site and back, once as a tensor and once as bytes; tensors are averaged.
    """

    def __init__(self, file: str) -> None:
        self.file = file

    @collab.main
    def main(self) -> None:
        content = json.loads(Path(self.file).read_text())
        content["results"] = [self._timed(cell) for cell in content["cells"]]
        Path(self.file).write_text(json.dumps(content))

    @staticmethod
    def _timed(cell: dict[str, Any]) -> dict[str, list[float]]:
        found: dict[str, list[float]] = {"tensor": [], "bytes": []}
        sites = sorted(site.name for site in collab.clients)
        start = torch.randn(int(cell["mb"] * 1e6 / 4), generator=torch.Generator().manual_seed(0))
        packed = start.numpy().tobytes()
        for _ in range(cell["rounds"]):
            for kind, value in (("tensor", start), ("bytes", packed)):
                before = time.perf_counter()
                asked = collab.get_clients(sites)(blocking=False, timeout=600)
                answers = [answer for _, answer in asked.send_back(value)]
                if kind == "tensor":
                    start = torch.stack([torch.as_tensor(a) for a in answers]).mean(0)
                found[kind].append(time.perf_counter() - before)
                if [len(answer) for answer in answers] != [len(value)] * len(sites):
                    raise RuntimeError(f"what came back is of another size: {answers}")
        return found


def main() -> None:
    engine, file = sys.argv[1], Path(sys.argv[2]).resolve()
    content = json.loads(file.read_text())
    experiment = config.parse(Experiment, content["experiment"], "the experiment")
    if engine == "simulation":
        task = experiment.build_task()
        shards = [task.encode(client) for client in experiment.clients()[0]]
        all_timed(
            lambda _: Simulation(task, shards, seed=0, rounds=1000, mixing=ring, workers=2), file
        )
        return

    # by the names under which server and sites find them
    from engine_rounds import Bare, BareSite, Rounds

    job = recipe(
        "rounds",
        Bare(str(file)) if engine == "bare" else Rounds(str(file)),
        content["sites"],
        600.0,
        simulated=content["sites"] if engine == "flare-simulated" else 0,
        site=BareSite() if engine == "bare" else None,
    )
    if engine != "flare-simulated":
        admin = Path(content["admin"])
        with redirect_stdout(io.StringIO()):
            job.execute(
                ProdEnv(startup_kit_location=str(admin), username=admin.name, login_timeout=30.0)
            ).get_result()
    else:
        with tempfile.TemporaryDirectory() as scratch:
            simulate(job, content["sites"], Path(scratch), [*CLASSES, *CLASSES_HERE])


if __name__ == "__main__":
    main()
