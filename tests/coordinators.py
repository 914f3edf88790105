"""Programs of coordinators, for tests over FLARE."""

from __future__ import annotations

import json
from pathlib import Path

from nvflare.collab import collab

from fedpref import config
from fedpref.engines.messages import pack, unpack, version
from fedpref.experiments.experiment import Experiment
from fedpref.experiments.rounds import events
from fedpref.experiments.run_directory import RunDirectory
from fedpref.sites.programs import Collab


class Many:
    """Runs several experiments, one after another."""

    def __init__(self, experiments: str, folder: str) -> None:
        self.experiments, self.folder = experiments, folder

    @collab.main
    def main(self) -> None:
        for name, content in json.loads(Path(self.experiments).read_text()).items():
            spec = config.parse(Experiment, content, name)
            for _ in events(spec, RunDirectory(Path(self.folder) / name), transport=Collab()):
                pass


class Forger:
    """Asks sites for what they should not do, and keeps what they say."""

    def __init__(self, experiment: str, answers: str) -> None:
        self.experiment, self.answers = experiment, answers

    @collab.main
    def main(self) -> None:
        transport, said = Collab(), {}
        opening = {
            **version(),
            "verb": "open",
            "experiment": json.loads(self.experiment),
            "run": "forged",
            "resumes": False,
            "is_known": True,
            "held_out": [],
        }
        work = {"args": [], "clients": [0], "purpose": "init", "round": 0, "call": 1, "name": "1"}
        forged = {
            "open": opening,
            "shell": {"verb": "each", "work": "os.system", **work},
            "verb": {"verb": "__init__"},
        }
        forged["unwanted"] = {
            **opening,
            "experiment": {**opening["experiment"], "algorithm": {"name": "fedprox"}},
        }
        forged["place"] = {**opening, "run": "../../outside"}
        for name, header in forged.items():
            found = transport.ask({site: pack(header) for site in transport.sites}, 60.0)
            said[name] = {site: unpack(message)[0] for site, message in found.items()}
        Path(self.answers).write_text(json.dumps(said))
