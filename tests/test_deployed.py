"""A federation with certificates on this machine: a server, three sites, who submits, each a
process of its own. Slow.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from fedpref import Experiment, UserError, config, run
from fedpref.experiments.run_directory import RunDirectory
from fedpref.experiments.run_files import METRICS
from fedpref.numerics import trees

pytest.importorskip("nvflare")

from nvflare.recipe import ProdEnv

from coordinators import Forger, Many
from fedpref.runs.launch import happenings
from fedpref.sites import FUNCTIONS, RUNS, SITE, kits
from fedpref.sites.programs import recipe
from fedpref.sites.submitted import SUBMITTED, admin_of, set_admitted, submitted
from test_contract import ALGORITHMS

pytestmark = pytest.mark.slow
HERE = Path(__file__).resolve().parent
ADMIN, SITES = "admin@example.org", ("clinic", "bank", "school")
CLIENTS = {"clinic": ["client-0"], "bank": ["client-1"], "school": ["client-2"]}
LIMITS = {"least_examples": 1, "least_batch": 1, "least_evaluated": 1}
SHORT = {"steps": 2, "batch_size": 3, "learning_rate": 0.01}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


@dataclass
class Federation:
    kits: dict[str, Path]
    port: int
    folder: Path
    wire: Path  # what came to the server, or went through it

    @property
    def admin(self) -> Path:
        return self.kits[ADMIN]


@pytest.fixture(scope="module")
def content(settings: dict[str, Any]) -> dict[str, Any]:
    patience = {"seconds": 100, "min_sites": 3, "rounds_per_job": 2}
    return {
        **settings,
        "partition": {"name": "natural", "max_clients": 3},
        "rounds": 3,
        "engine": "flare",
        "patience": patience,
    }


@pytest.fixture(scope="module")
def federation(
    content: dict[str, Any], rows_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Federation]:
    folder, port = tmp_path_factory.mktemp("deployed"), free_port()
    made = kits.provision(folder / "federation", "trial", "localhost", port, SITES, ADMIN)
    wire = folder / "wire"
    wire.mkdir()
    allowed = made["localhost"] / "local/resources.json"
    resources = json.loads(allowed.read_text())
    resources["class_allow_list"].append("coordinators.Forger")
    allowed.write_text(json.dumps(resources))
    model = content["task"]["model"]["path"]
    for site in SITES:
        text = {
            "data": content["data"],
            "algorithms": ["fedpdpo", "decdpo"],
            "limits": LIMITS,
            "models": {model: model},
        }
        text["partition"] = {"name": "natural", "only": CLIENTS[site]}
        (made[site] / kits.SITE_FILE).write_text(yaml.safe_dump(text))
    try:
        path = f"{HERE / 'relay'}:{HERE}"
        kits.start(
            made["localhost"],
            {
                RUNS: str(folder / "server"),
                FUNCTIONS: "",
                "PYTHONPATH": path,
                "FEDPREF_TEST_CAPTURE": str(wire),
            },
        )
        for site in SITES:
            kits.start(made[site], {SITE: str(made[site] / kits.SITE_FILE)})
        yield Federation(made, port, folder, wire)
    finally:
        for name in (*SITES, "localhost"):
            kits.stop(made[name])


def here_and_there(content: dict[str, Any], federation: Federation, name: str) -> tuple[Path, Path]:
    """The same experiment run in this process and submitted."""
    spec = config.parse(Experiment, content, "test")
    here = run(
        config.parse(Experiment, {**content, "engine": "simulation"}, "test"),
        federation.folder / f"{name}-here",
    ).path
    for file in federation.wire.iterdir():
        file.unlink()
    there = RunDirectory(federation.folder / name)
    told = list(
        happenings(replace(spec, report_to=("tensorboard",)), there, admin=federation.admin)
    )
    assert list((there.path / "tensorboard").rglob("events.out.*")), (
        "trackers hear of runs that are submitted"
    )
    assert [event.done for event in told if event.kind == "round"] == [1, 2, 3]
    return here, there.path


def captured(federation: Federation, kind: str) -> bytes:
    return b"\n".join(file.read_bytes() for file in federation.wire.glob(f"{kind}-*"))


def pieces(tensor: torch.Tensor) -> list[bytes]:
    """Some runs of 32 bytes of a tensor that are not all alike."""
    content = tensor.flatten().contiguous().view(torch.uint8).numpy().tobytes()
    found = [content[i : i + 32] for i in range(0, len(content) - 31, max(32, len(content) // 50))]
    return [piece for piece in found if len(set(piece)) > 8]


def test_personal_heads_and_texts_stay_at_sites_and_the_run_is_that_of_one_process(
    content: dict[str, Any], federation: Federation, rows_file: Path
) -> None:
    parts = {"head": "low-rank", "head_rank": 2, "bottleneck": 2, "reward": True}
    here, there = here_and_there(
        {**content, "algorithm": {"name": "fedpdpo", "local": SHORT, "parts": parts}},
        federation,
        "personal",
    )
    for file in ("evaluation.jsonl", "adapter/adapter_model.safetensors"):
        assert (here / file).read_bytes() == (there / file).read_bytes(), file
    assert admin_of(RunDirectory(there)) == federation.admin
    seen = captured(federation, "received")
    assert b"lora_A" in seen, (
        "the search finds what is there: shared adapters come to the server as they are"
    )
    name = json.loads((there / SUBMITTED).read_text())["run"]
    kept = [
        file
        for site in SITES
        for file in (federation.kits[site] / "fedpref" / name / "checkpoints").rglob(
            "*.safetensors"
        )
    ]
    assert len(kept) >= 3
    private = [
        piece for file in kept for tensor in trees.load(file).values() for piece in pieces(tensor)
    ]
    assert len(private) > 20
    assert not any(piece in seen for piece in private)
    assert not any(part in seen for part in (b"head.", b"bottleneck.", b"reward."))
    assert not any(
        json.loads(line)["chosen"].encode() in seen for line in rows_file.read_text().splitlines()
    )
    assert not list(there.glob("clients/*"))


def test_who_relays_gossip_cannot_read_it(content: dict[str, Any], federation: Federation) -> None:
    decentralised = {
        **content,
        "algorithm": {"name": "decdpo", "local": SHORT},
        "network": {"topology": "ring"},
    }
    here, there = here_and_there(decentralised, federation, "gossip")
    assert (here / "evaluation.jsonl").read_bytes() == (there / "evaluation.jsonl").read_bytes()
    relayed = captured(federation, "relayed")
    theta = sum(trees.size(trees.load(file)) for file in (here / "checkpoints").rglob("theta/0.*"))
    assert len(relayed) > 3 * 2 * theta, "adapters went through it"
    assert b"lora_A" not in relayed
    mixed = [
        piece
        for file in (here / "checkpoints").rglob("theta/*")
        for t in trees.load(file).values()
        for piece in pieces(t)
    ]
    assert mixed
    assert not any(piece in relayed for piece in mixed)


def test_a_forged_work_name_is_refused(content: dict[str, Any], federation: Federation) -> None:
    answers = federation.folder / "answers.json"
    spec = {
        **config.dump(config.parse(Experiment, content, "test")),
        "algorithm": {"name": "fedpdpo"},
    }
    forged = recipe("forged", Forger(json.dumps(spec), str(answers)), 3, 60.0)
    forged.execute(
        ProdEnv(startup_kit_location=str(federation.admin), username=ADMIN, login_timeout=30.0)
    ).get_result()
    said = json.loads(answers.read_text())
    for site in SITES:
        assert list(said["open"][site]["about"]) == CLIENTS[site], "what is allowed is done"
        assert "'os.system' is no work that is done here" in said["shell"][site]["refused"]
        assert "there is no verb '__init__'" in said["verb"][site]["refused"]
        assert "takes no part in fedprox" in said["unwanted"][site]["refused"]
        assert "a run is called by" in said["place"][site]["refused"]
    assert not list(federation.kits["clinic"].parent.glob("outside"))


def test_a_job_of_another_class_is_refused(content: dict[str, Any], federation: Federation) -> None:
    """Whoever may submit cannot have other programs run."""
    other = recipe("other", Many("/nowhere", "/nowhere"), 3, 60.0)
    ran = other.execute(
        ProdEnv(startup_kit_location=str(federation.admin), username=ADMIN, login_timeout=30.0)
    )
    ran.get_result()
    assert ran.get_status() not in (None, "FINISHED:COMPLETED")
    spec = config.parse(
        Experiment, {**content, "algorithm": {"name": "feddpo", "local": SHORT}}, "test"
    )
    with pytest.raises(UserError, match="takes no part in feddpo"):
        list(submitted(spec, federation.admin, RunDirectory(federation.folder / "unwanted")))


@pytest.mark.parametrize("whose", ["ours", "nobody's", "another federation's"])
def test_who_has_no_certificate_of_the_federation_is_not_let_in(
    whose: str, federation: Federation, tmp_path: Path
) -> None:
    context = ssl.create_default_context(
        cafile=str(federation.kits["clinic"] / "startup/rootCA.pem")
    )
    context.check_hostname = False
    kit = federation.kits["clinic"]
    if whose == "another federation's":
        kit = kits.provision(
            tmp_path / "other", "other", "localhost", federation.port, ["clinic"], ADMIN
        )["clinic"]
    if whose != "nobody's":
        context.load_cert_chain(kit / "startup/client.crt", kit / "startup/client.key")
    is_let_in = True
    with socket.create_connection(("localhost", federation.port), timeout=10) as plain:
        try:
            with context.wrap_socket(plain, server_hostname="localhost") as secured:
                secured.settimeout(5)
                secured.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
                is_let_in = bool(secured.recv(1))
        except TimeoutError:
            pass  # it waits for more
        except (ssl.SSLError, ConnectionError):
            is_let_in = False
    assert is_let_in == (whose == "ours")


def test_a_site_is_added_and_one_is_expelled(
    content: dict[str, Any], federation: Federation
) -> None:
    kit = kits.add(federation.folder / "federation", "library")
    before = {site: (federation.kits[site] / "startup/client.crt").read_bytes() for site in SITES}
    model = content["task"]["model"]["path"]
    text = {
        "data": content["data"],
        "algorithms": ["fedpdpo"],
        "limits": LIMITS,
        "models": {model: model},
    }
    (kit / kits.SITE_FILE).write_text(
        yaml.safe_dump({**text, "partition": {"name": "natural", "only": ["client-3"]}})
    )
    set_admitted("bank", federation.admin, False)
    kits.start(kit, {SITE: str(kit / kits.SITE_FILE)})
    try:
        time.sleep(20)
        changed = {**content, "algorithm": {"name": "fedpdpo", "local": SHORT}, "rounds": 1}
        place = RunDirectory(federation.folder / "changed")
        list(submitted(config.parse(Experiment, changed, "test"), federation.admin, place))
        assert list(json.loads((place.path / "clients.json").read_text())) == [
            "client-0",
            "client-2",
            "client-3",
        ]
        assert before == {
            site: (federation.kits[site] / "startup/client.crt").read_bytes() for site in SITES
        }
        with pytest.raises(UserError, match="two participants have the same name"):
            kits.add(federation.folder / "federation", "library")
    finally:
        kits.stop(kit)
        set_admitted("bank", federation.admin, True)


# ---- simulated sites

ALIKE = [name for name in ALGORITHMS if name not in ("personal",)]


@pytest.fixture(scope="module")
def experiments(settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Every algorithm of the contract, on three clients with dropout."""
    of_objectives = {"objective_column": "kind", "objective_names": ["first", "second"]}
    task = {
        **settings["task"],
        **of_objectives,
        "model": {**settings["task"]["model"], "lora_dropout": 0.1},
    }
    common = {
        **settings,
        "task": task,
        "partition": {"name": "natural", "max_clients": 3},
        "rounds": 2,
        "workers": 1,
    }
    found = {}
    for name in ALIKE:
        spec = config.parse(Experiment, common, name)
        found[name] = {**config.dump(spec), "algorithm": config.dump(ALGORITHMS[name])}
    return found


@pytest.fixture(scope="module")
def ran(experiments: dict[str, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All of them over two simulated sites, in one job."""
    folder = tmp_path_factory.mktemp("simulated")
    (folder / "experiments.json").write_text(json.dumps(experiments))
    program = (
        "import sys; from pathlib import Path; from coordinators import Many; from "
        "fedpref.sites.kits import CLASSES;"
        "from fedpref.sites.programs import recipe; from fedpref.sites.simulated import simulate;"
        "many = recipe('many', Many(sys.argv[1], sys.argv[2]), 2, 100.0, simulated=2);"
        "simulate(many, 2, Path(sys.argv[2], 'workspace'), [*CLASSES, 'coordinators.Many'])"
    )
    environment = {
        **os.environ,
        RUNS: str(folder / "runs"),
        "PYTHONPATH": str(HERE),
        "OMP_NUM_THREADS": "1",
    }
    subprocess.run(
        [sys.executable, "-c", program, str(folder / "experiments.json"), str(folder / "runs")],
        env=environment,
        check=True,
    )
    return folder / "runs"


@pytest.mark.parametrize("name", ALIKE)
def test_every_algorithm_over_simulated_sites_is_the_one_in_process(
    name: str, ran: Path, experiments: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    here, there = (
        run(config.parse(Experiment, experiments[name], name), tmp_path / name).path,
        ran / name,
    )
    assert (here / "evaluation.jsonl").read_bytes() == (there / "evaluation.jsonl").read_bytes()
    rows = [
        [
            {key: row[key] for key in row if not key.startswith("seconds")}
            for row in RunDirectory(path).read_rows(METRICS)
        ]
        for path in (here, there)
    ]
    assert rows[0] == rows[1]
    shared = [file.relative_to(here) for file in (here / "checkpoints").glob("*/*.safetensors")]
    for file in shared:
        first, second = trees.load(here / file), trees.load(there / file)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first), file
    shutil.rmtree(here)
