"""What a site refuses, what a coordinator leaves out, and what both survive: real processes at the
ends of pipes.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import yaml
from safetensors import safe_open

from conftest import kept_values, write_rows
from fedpref import Experiment, UserError, config, run
from fedpref.channel import Chain, Sender
from fedpref.channel.compression import LowRank, TopK, alike
from fedpref.data.splits import held_out
from fedpref.engines import Patience, RemoteEngine, Sites, coordinator
from fedpref.engines.host import Bounds
from fedpref.engines.messages import FORMAT, HEADER, RefusedError, finite, pack, unpack, version
from fedpref.engines.site import Site
from fedpref.engines.values import Kept, Later, Values
from fedpref.experiments.clients import SimulatedSite
from fedpref.experiments.rounds import events
from fedpref.experiments.run_directory import RunDirectory
from fedpref.experiments.run_files import METRICS
from fedpref.federation.leaving import Audience, Label
from fedpref.federation.local_training import LocalTraining
from fedpref.federation.verbs import Client, work
from fedpref.numerics import trees
from fedpref.numerics.trees import Tree
from fedpref.sites import kits
from fedpref.sites.consent import Consenting, SiteFile, consenting
from fedpref.sites.submitted import LOG, POLL, pause
from process_engine import Processes, process_engine, shares

PURPOSES = ("init", "train", "join", "evaluate")
LIMITS = {"least_examples": 1, "least_batch": 1, "least_evaluated": 1}
LOCAL = LocalTraining(steps=1, batch_size=3, learning_rate=0.01)


@pytest.fixture(scope="module")
def content(settings: dict[str, Any]) -> dict[str, Any]:
    return {**settings, "partition": {"name": "natural", "max_clients": 3}, "rounds": 4}


class Nowhere:
    def tell(self, site: str, message: bytes) -> None:
        raise AssertionError


@work("test_sites.broken")
def broken(client: Client, start: Tree, how: str) -> Tree:
    """What one client sends is not what it should be."""
    if client.id != 1:
        return start
    if how == "nan":
        return {name: torch.full_like(tensor, float("nan")) for name, tensor in start.items()}
    if how == "shape":
        return {name: tensor[:1] for name, tensor in start.items()}
    if how == "names":
        return {f"{name}.x": tensor for name, tensor in start.items()}
    raise ValueError("no")


# ---- messages


def test_messages_come_back_as_they_went() -> None:
    tree = {
        "a": torch.randn(3, 2),
        "b/c": torch.arange(4, dtype=torch.bfloat16),
        "d": torch.tensor(1.0),
    }
    header, found = unpack(pack({"verb": "x", "n": [1]}, trees.nest({7: tree})))
    assert header == {"verb": "x", "n": [1]}
    back = trees.part(found, 7)
    assert back.keys() == tree.keys()
    assert all(
        torch.equal(back[name], tree[name]) and back[name].dtype == tree[name].dtype
        for name in tree
    )
    _, found = unpack(pack({}, trees.nest({1: tree, 2: tree})))  # which share memory
    assert torch.equal(trees.part(found, 1)["a"], trees.part(found, 2)["a"])
    _, found = unpack(pack({}, trees.nest({1: tree, 2: tree})))
    assert torch.equal(trees.part(found, 1)["a"], trees.part(found, 2)["a"]), "which shared memory"


def test_a_message_is_a_file_of_safetensors(tmp_path: Path) -> None:
    tree = {"a": torch.randn(3, 2).T, "b": torch.ones((), dtype=torch.bfloat16), "c": torch.ones(0)}
    (tmp_path / "message").write_bytes(pack({"n": "\u00e4"}, tree))
    with safe_open(tmp_path / "message", "pt") as file:
        assert json.loads(file.metadata()[HEADER]) == {"n": "\u00e4"}
        assert set(file.keys()) == set(tree)
        assert all(torch.equal(file.get_tensor(name), tree[name]) for name in tree)
    theirs = safetensors.torch.save({"a": torch.ones(2, dtype=torch.complex64)}, {HEADER: "{}"})
    with pytest.raises(RefusedError, match="of a type that does not travel"):
        unpack(theirs)


@pytest.mark.parametrize(
    "message", [b"", b"x", b"\x00" * 8 + b"{", pack([1]), pack({})[:-1] + b"]", pack({}) + b"junk"]
)  # type: ignore[arg-type]
def test_bytes_that_are_no_message_are_refused(message: bytes) -> None:
    with pytest.raises(RefusedError, match="not a fedpref message"):
        unpack(message)


def test_numbers_that_are_not_finite_and_messages_that_are_too_long_are_refused() -> None:
    with pytest.raises(RefusedError, match="not finite"):
        finite({"a": torch.tensor([1.0, float("inf")])})
    with pytest.raises(RefusedError, match="above the limit of 100"):
        unpack(pack({}, {"a": torch.zeros(100)}), 100)


OPEN = {"verb": "open", "resumes": False, "is_known": True, "held_out": []}
DIALOGUE = {"name": "dialogue", "estimator": "rloo"}

# ---- a site


@pytest.fixture
def site(content: dict[str, Any], tmp_path: Path) -> Site:
    opened = Site("site-0", SimulatedSite(0, 1), tmp_path, Nowhere())
    about = said(
        opened,
        {**OPEN, "experiment": content, "run": "run"},
    )["about"]
    said(
        opened,
        {
            "verb": "number",
            "ids": {name: i for i, name in enumerate(about)},
            "sites": {"site-0": [0, 1, 2]},
        },
    )
    return opened


def said(site: Site, header: dict[str, Any], tensors: Tree | None = None) -> dict[str, Any]:
    header = {**version(), **header} if header.get("verb") == "open" else header
    answer, _ = unpack(site.answer(pack(header, tensors or {})))
    return answer


def asked(**other: Any) -> dict[str, Any]:
    header = {
        "verb": "each",
        "work": "common.no_moments",
        "args": [],
        "clients": [0],
        "purpose": "init",
        "round": 0,
        "call": 1,
        "name": "1",
    }
    return {**header, **other}


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ({"verb": "eval"}, "no verb 'eval'"),
        ({"verb": "answer"}, "no verb 'answer'"),
        (asked(work="os.system"), "'os.system' is no work that is done here"),
        (asked(round=99), "round 99 is none of the 4"),
        (
            asked(work="evaluation.evaluate", args=[{"own": {"0": "7.0"}}]),
            "client 0 has no value '7.0' here",
        ),
        (asked(args=[{"plain": 3}]), "do not fit"),
        ({"verb": "report", "own": {"0": "7.0"}}, "client 0 has no value"),
        (
            {"verb": "contribute", "own": {"9": "1.0"}, "shares": {"9": 1.0}},
            "client 9 has no value",
        ),
        (
            {**OPEN, "experiment": {}, "run": "../up"},
            "a run is called by",
        ),
        ({"verb": "save", "own": {}, "checkpoint": ".."}, "checkpoint: String should match"),
        (
            {**OPEN, "experiment": {"rouns": 3}, "run": "x"},
            "Did you mean 'rounds'",
        ),
    ],
)
def test_a_site_refuses_what_it_should_not_do(
    header: dict[str, Any], reason: str, site: Site
) -> None:
    assert reason in said(site, header)["refused"]
    assert "parts" in said(site, asked()), "and goes on"


def test_work_that_fails_says_so_and_changes_nothing(site: Site) -> None:
    args = [{"tree": 0}, {"plain": "fail"}]
    answer = said(
        site,
        asked(work="test_sites.broken", clients=[1, 2], args=args),
        trees.nest({0: {"x": torch.ones(1)}}),
    )
    assert answer["failed"] == {"1": "it failed (ValueError); the site's log says more"}, (
        "no text of the error leaves the site"
    )
    assert said(site, {"verb": "names"})["names"] == {"0": [], "1": [], "2": ["1.0"]}
    assert (
        "do not fit"
        in said(site, asked(work="test_sites.broken", args=[{"tree": 0}, {"plain": {"a": 1}}]))[
            "refused"
        ]
    )


# ---- what a site consents to


@pytest.fixture
def site_file(content: dict[str, Any], rows_file: Path, tmp_path: Path) -> Path:
    path = tmp_path / "site.yaml"
    text = {
        "data": {"name": "files", "path": str(rows_file)},
        "algorithms": ["feddpo"],
        "client": "clinic",
        "max_rounds": 4,
        "limits": LIMITS,
    }
    path.write_text(
        yaml.safe_dump(
            {**text, "models": {content["task"]["model"]["path"]: content["task"]["model"]["path"]}}
        )
    )
    return path


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"algorithm": {"name": "fedpdpo"}}, "takes no part in fedpdpo; it does in feddpo"),
        ({"rounds": 5}, "5 rounds are more than the 4"),
        ({"diagnostics": ["disagreement"]}, "no diagnostics"),
        ({"task": {"model": {"path": "evil/model"}}}, "the model 'evil/model' is none of those"),
        ({"task": {"model": {"trust_remote_code": True}}}, "no code that comes with a model"),
        ({"task": {"model": {"gguf_file": "/etc/secret.gguf"}}}, "what a model's name means"),
        ({"task": {"model": {"revision": "refs/pr/9"}}}, "what a model's name means"),
        (
            {"task": {**DIALOGUE, "rewards": {"x": {"name": "classifier", "path": "/etc"}}}},
            "the model ./etc. is none of those",
        ),
        (
            {"task": {**DIALOGUE, "rewards": {"x": {"name": "function", "path": "os:system"}}}},
            "'os:system'",
        ),
        (
            {"task": {"generation": {"judge": {"name": "function", "path": "os:system"}}}},
            "'os:system'",
        ),
        ({"task": {"generation": {"neutral": "/etc/passwd"}}}, "'/etc/passwd' is none of those"),
        (
            {"data": {"name": "builtin", "validation_fraction": 0.2}, "evaluate_every": 1},
            "this site sets none aside",
        ),
    ],
)
def test_a_site_takes_part_in_what_its_file_allows(
    changed: dict[str, Any], reason: str, content: dict[str, Any], site_file: Path, tmp_path: Path
) -> None:
    host, folder = consenting("site", site_file)
    assert folder == tmp_path / "fedpref"
    with pytest.raises((RefusedError, UserError), match=reason):
        host.host({**content, **changed}, tmp_path)


def test_a_site_sets_rows_aside_to_choose_by_as_its_own_file_says(
    content: dict[str, Any], site_file: Path, tmp_path: Path
) -> None:
    text = yaml.safe_load(site_file.read_text())
    text["data"]["validation_fraction"] = 0.3
    site_file.write_text(yaml.safe_dump(text))
    spec = {**content, "data": {"name": "builtin", "validation_fraction": 0.1}, "rounds": 2}
    found = consenting("site", site_file)[0].host(spec, tmp_path / "run")
    (about,) = found.about.values()
    (shard,) = found.shards.values()
    assert about["validation"] == len(shard.validation) > 0.15 * about["train"]
    assert shard.validating().test == shard.validation


def test_a_site_brings_its_own_data_and_no_private_part_leaves_it(
    content: dict[str, Any], site_file: Path, tmp_path: Path
) -> None:
    file = replace(SiteFile.load(site_file), algorithms=("fedpdpo",))
    spec = config.parse(
        Experiment,
        {
            **content,
            "data": {"name": "files", "path": "/etc/passwd"},
            "algorithm": {"name": "fedpdpo"},
        },
        "test",
    )
    found = Consenting("site", file).host(config.dump(spec), tmp_path / "run")
    assert list(found.shards) == list(found.about) == ["clinic"]
    assert found.about["clinic"]["train"] > 0
    for name, leaves in (
        ("base.lora_A.weight", True),
        ("head.weight", False),
        ("bottleneck.down", False),
        ("own.lora_A", False),
    ):
        assert found.gives(name) == leaves
    assert found.does("fedpdpo.train", "train")
    assert not found.does("fedpdpo.train", "evaluate"), "an evaluation trains nothing"
    assert found.does("evaluation.evaluate", "evaluate")
    strange = (
        "clients.prepare",
        "test_sites.broken",
        "diagnostics.pooled",
        "fedprox.train",
        "ditto.train",
    )
    assert not any(found.does(work, purpose) for work in strange for purpose in PURPOSES)
    opened = Site("site", Consenting("site", file), tmp_path, Nowhere())
    said(
        opened,
        {**OPEN, "experiment": config.dump(spec), "run": "run"},
    )
    said(opened, {"verb": "number", "ids": {"clinic": 0}, "sites": {"site": [0]}})
    for name in ("head.weight", "exp_avg/head.weight", "own.lora_A"):
        opened._values.drop(0, "1.0")
        opened._values.put(0, "1.0", Kept({name: torch.ones(1)}))
        answer = said(opened, {"verb": "contribute", "own": {"0": "1.0"}, "shares": {"0": 1.0}})
        assert answer["refused"] == f"{name!r} does not leave this site"
    private = Kept({"base.lora_A.weight": torch.ones(1)}, Label(Audience.NOBODY, "own"))
    opened._values.put(0, "2.0", private)
    answer = said(opened, {"verb": "contribute", "own": {"0": "2.0"}, "shares": {"0": 1.0}})
    assert "is its own" in answer["refused"], "what no work sends stays, whatever its name"
    opened._values.put(0, "3.0", Kept({"text": "Human: secret"}))
    assert (
        "no mapping of names to numbers"
        in said(opened, {"verb": "report", "own": {"0": "3.0"}})["refused"]
    )


def test_consent_to_an_algorithm_is_to_its_own_work(
    content: dict[str, Any], site_file: Path, tmp_path: Path
) -> None:
    file = replace(SiteFile.load(site_file), algorithms=("choco", "feddpo"))
    works = {
        name: Consenting("site", file).host({**content, "algorithm": {"name": name}}, tmp_path).does
        for name in file.algorithms
    }
    assert works["choco"]("choco.follow", "train")
    assert not works["choco"]("fedpdpo.train", "train")
    assert not works["choco"]("feddpo.train", "train"), "this experiment is not feddpo"
    assert works["feddpo"]("feddpo.train", "train")
    assert not works["feddpo"]("choco.follow", "train")


@pytest.mark.parametrize("length", [0, 1, LOG, 10 * LOG, 5_000_000])
def test_a_long_log_is_fetched_less_often(length: int) -> None:
    assert pause(length) >= POLL
    assert length / pause(length) <= LOG / POLL  # bytes a second, however long it is
    assert pause(length) <= 80.0


# ---- several sites


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    started = Processes(
        shares(3),
        tmp_path_factory.mktemp("processes"),
        ["fedpref.experiments.rounds", "test_sites"],
    )
    yield started
    started.stop()


@pytest.mark.parametrize("how", ["nan", "shape", "names", "fail"])
@pytest.mark.long
def test_a_client_that_sends_what_cannot_be_used_is_left_out_of_the_round(
    how: str, processes: Processes, content: dict[str, Any]
) -> None:
    engine = process_engine(processes, content, patience=Patience(seconds=60, min_clients=2))
    start = {"x": torch.ones(4, 2)}
    mean = engine.mean(engine.each(broken, start, how))
    torch.testing.assert_close(mean["x"], torch.ones(4, 2))
    assert engine.active == (0, 2)
    assert list(engine.left_out) == [1]
    engine.begin(1, engine.clients)
    assert engine.active == (0, 1, 2), "and takes part in the next"
    strict = process_engine(processes, content)
    with pytest.raises(UserError, match="client-1 at site-1"):
        strict.mean(strict.each(broken, start, how))


@pytest.mark.parametrize("algorithm", ["decpdpo"])
@pytest.mark.long
def test_a_run_survives_a_site_that_is_killed_and_resumes_with_it(
    algorithm: str, content: dict[str, Any], tmp_path: Path
) -> None:
    whole = {
        **content,
        "algorithm": {"name": algorithm, "local": {"steps": 2, "batch_size": 3}},
        "patience": {"seconds": 60, "min_clients": 2},
    }
    spec, folder = config.parse(Experiment, whole, "test"), RunDirectory(tmp_path / "run")
    first = Processes(shares(3), tmp_path / "sites", ["fedpref.experiments.rounds"])
    try:
        for event in events(spec, folder, transport=first):
            if event.kind == "round" and event.done == 1:
                first.processes["site-1"].kill()
            if event.kind == "round" and event.done == 3:
                break  # the server is killed too
    finally:
        first.stop()
    assert [row["clients"] for row in folder.read_rows(METRICS)] == [3, 2, 2]
    assert [row["late"] for row in folder.read_rows(METRICS)] == [0, 1, 1]
    kept = {
        site: sorted((tmp_path / f"sites/{site}/run/checkpoints").glob("round-*"))
        for site in ("site-0", "site-1")
    }
    assert kept["site-1"][-1].name == "round-000001"
    assert kept["site-0"][-1].name == "round-000003"
    before = kept_values(tmp_path / "sites/site-1/run", 1, "own")
    second = Processes(shares(3), tmp_path / "sites", ["fedpref.experiments.rounds"])
    try:
        for _ in events(spec, folder, transport=second):
            pass
    finally:
        second.stop()
    assert folder.done
    rows = folder.read_rows(METRICS)
    assert [row["round"] for row in rows] == [1, 2, 3, 4]
    assert rows[-1]["clients"] == 3, "it takes part again"
    assert before


def test_a_site_that_has_lost_what_its_clients_keep_is_told(
    content: dict[str, Any], processes: Processes, tmp_path: Path
) -> None:
    whole = {**content, "algorithm": {"name": "fedpdpo", "local": {"steps": 2, "batch_size": 3}}}
    spec, folder = config.parse(Experiment, whole, "test"), RunDirectory(tmp_path / "loses")
    for event in events(spec, folder, transport=processes):
        if event.kind == "round":
            break
    for file in (processes.folder / "site-1").glob("loses/checkpoints/values/*/1.*"):
        file.unlink()
    with pytest.raises(UserError, match="site-1 no longer has what its clients"):
        list(events(spec, folder, transport=processes))


@pytest.mark.long
def test_a_run_over_sites_is_the_run_in_one_process(
    content: dict[str, Any], processes: Processes, tmp_path: Path
) -> None:
    whole = {
        **content,
        "algorithm": {"name": "fedpdpo", "local": {"steps": 2, "batch_size": 3}},
        "baselines": ["alone"],
    }
    spec = config.parse(Experiment, whole, "test")
    for name, transport in (("here", None), ("there", processes)):
        list(events(spec, RunDirectory(tmp_path / name), transport=transport))
    for file in (
        "evaluation.jsonl",
        "clients.json",
        "adapter/adapter_model.safetensors",
        "baselines/alone/evaluation.jsonl",
    ):
        if (tmp_path / "here" / file).exists():
            assert (tmp_path / "here" / file).read_bytes() == (
                tmp_path / "there" / file
            ).read_bytes(), file
    for baseline in ("pooled", "words"):
        with pytest.raises(UserError, match=f"{baseline} needs all data in one place"):
            list(
                events(
                    replace(spec, baselines=(baseline,)),  # type: ignore[arg-type]
                    RunDirectory(tmp_path / baseline),
                    transport=processes,
                )
            )


@pytest.mark.slow
def test_a_run_over_simulated_sites_of_flare_is_the_run_in_one_process(
    content: dict[str, Any], tmp_path: Path
) -> None:
    pytest.importorskip("nvflare")
    whole = {
        **content,
        "algorithm": {"name": "decpdpo", "local": {"steps": 2, "batch_size": 3}},
        "rounds": 2,
    }
    here = run(config.parse(Experiment, whole, "test"), tmp_path / "here").path
    there = run(
        config.parse(Experiment, {**whole, "engine": "flare", "sites": 2}, "test"),
        tmp_path / "there",
    ).path
    assert (here / "evaluation.jsonl").read_bytes() == (there / "evaluation.jsonl").read_bytes()
    rows = [
        [
            {key: row[key] for key in row if not key.startswith("seconds")}
            for row in RunDirectory(path).read_rows(METRICS)
        ]
        for path in (here, there)
    ]
    assert rows[0] == rows[1]


# ---- kits


def test_kits_let_no_job_bring_code_and_each_site_has_its_file(tmp_path: Path) -> None:
    pytest.importorskip("nvflare")
    made = kits.provision(
        tmp_path / "fed", "trial", "localhost", 28911, ["clinic", "bank"], "admin@example.org"
    )
    assert set(made) == {"localhost", "clinic", "bank", "admin@example.org"}
    for site in ("clinic", "bank"):
        assert SiteFile.load(made[site] / "site.yaml").client == site
        rights = json.loads((made[site] / "local/authorization.json").read_text())["permissions"]
        assert all(role["byoc"] == "none" for role in rights.values() if "byoc" in role)
        resources = json.loads((made[site] / "local/resources.json").read_text())
        assert "fedpref.sites.programs.Sited" in resources["class_allow_list"]
        assert resources["class_list_enforcement_mode"] == "enforce"
        assert resources["allow_log_streaming"] is False, "what a site logs stays there"
        assert "LogStreamer" not in str(resources)
        assert (made[site] / "startup/client.crt").exists()
        assert not kits.running(made[site])
    with pytest.raises(UserError, match="there already"):
        kits.provision(
            tmp_path / "fed", "trial", "localhost", 28911, ["clinic"], "admin@example.org"
        )
    with pytest.raises(UserError, match="the same name"):
        kits.provision(
            tmp_path / "other",
            "trial",
            "localhost",
            28911,
            ["clinic", "clinic"],
            "admin@example.org",
        )
    with pytest.raises(UserError, match="no kit"):
        kits.start(tmp_path, {})


# ---- what a coordinator makes of what sites say


class Direct:
    """Sites in this process; what one of them answers may be changed on the way."""

    def __init__(self, folder: Path, count: int = 2) -> None:
        self.all = {
            f"site-{k}": Site(f"site-{k}", SimulatedSite(k, count), folder / f"site-{k}", self)
            for k in range(count)
        }
        self.changed: dict[str, Any] = {}  # verb -> what site-1 answers in place of its header
        self.absent: set[str] = set()

    @property
    def sites(self) -> list[str]:
        return list(self.all)

    def tell(self, site: str, message: bytes) -> None:
        raise AssertionError("no gossip here")

    def ask(self, messages: Any, seconds: float) -> dict[str, bytes]:
        return {
            site: self._answer(site, message)
            for site, message in messages.items()
            if site not in self.absent
        }

    def _answer(self, site: str, message: bytes) -> bytes:
        answer, verb = self.all[site].answer(message), unpack(message)[0]["verb"]
        if site != "site-1" or verb not in self.changed:
            return answer
        return (
            self.changed[verb]
            if isinstance(self.changed[verb], bytes)
            else pack({**version(), **self.changed[verb]})
        )


@work("test_sites.numbered", sends=(0,))
def numbered(client: Client, tree: Tree) -> Tree:
    return {"x": torch.full((2,), float(client.id))}


@work("test_sites.nothing_but_one", sends=(0,))
def nothing_but_one(client: Client, tree: Tree) -> Tree:
    return {"x": torch.full((2,), 3.0)} if client.id == 1 else {}


@work("test_sites.renamed_but_one", sends=(0,))
def renamed_but_one(client: Client, tree: Tree) -> Tree:
    return {"x" if client.id == 1 else "y": torch.full((2,), 3.0)}


@work("test_sites.advance", keeps={1: "own"}, reads=("own",))
def advance(client: Client, own: Tree, how: str) -> tuple[Tree, Tree]:
    """A message, and a private value that counts rounds."""
    message = {"x": torch.full((2,), float(client.id))}
    return ({"y": message["x"]} if how == "names" and client.id == 1 else message), {
        "n": own["n"] + 1
    }


@work("test_sites.fresh", sends=(), keeps={0: "own"})
def fresh(client: Client) -> Tree:
    return {"n": torch.zeros(1)}


@work("test_sites.told")
def told(client: Client) -> dict[str, float]:
    return {"loss": 1.0}


@work("test_sites.uneven")
def uneven(client: Client, how: str) -> Tree:
    """Sums that depend on their order; the last client may have something else to say."""
    rng = torch.Generator().manual_seed(client.id)
    numbers = torch.randn(1000, generator=rng) * 10 ** (client.id % 7)
    return {"y" if how == "names" and client.id == 2 else "x": numbers}


@work("test_sites.typed")
def typed(client: Client, sent: Tree) -> Tree:
    """What was sent; in other numbers by all but the first."""
    return {"x": sent["x"].double() if client.id else sent["x"]}


@work("test_sites.sized")
def sized(client: Client, sent: Tree) -> Tree:
    """What was sent; cut short by all but the first."""
    return {"x": sent["x"][:1] if client.id else sent["x"]}


def test_most_clients_do_not_decide_what_numbers_an_adapter_has(
    content: dict[str, Any], tmp_path: Path
) -> None:
    engine = opened(Direct(tmp_path / "typed"), content)
    sent = {"x": torch.ones(4)}
    mean = engine.mean(engine.each(typed, sent))
    assert mean["x"].dtype == torch.float32
    assert set(engine.left_out) == {1, 2}
    assert "came in torch.float64, and was sent in torch.float32" in engine.left_out[1]
    engine = opened(Direct(tmp_path / "sized"), content)
    short = engine.mean(engine.each(sized, sent))
    with pytest.raises(UserError, match=r"trees differ in 'x': \(4,\) in one and \(1,\)"):
        trees.add(sent, short)


@pytest.mark.parametrize("how", ["alike", "names"])
@pytest.mark.long
def test_a_mean_needs_no_more_room_for_more_clients(
    how: str, content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clients are asked in groups; neither bits nor who is left out depends on these."""
    found = []
    for name, group in (("whole", coordinator.GROUP), ("alone", 1)):
        monkeypatch.setattr(coordinator, "GROUP", group)
        monkeypatch.setattr(coordinator, "FIRST_GROUP", 4 if name == "whole" else 1)
        direct = Direct(tmp_path / name)
        engine = opened(direct, content)
        values = engine.each(uneven, how)
        asked = []
        monkeypatch.setattr(direct, "_answer", _counted(direct, asked))
        mean = engine.mean(values)
        assert max(asked) == (2 if name == "whole" else 1)
        found.append((mean["x"], engine.traffic, engine.left_out, engine.active))
    (x, *rest), (y, *other) = found
    assert torch.equal(x, y)
    assert rest == other
    assert len(rest[1]) == (how == "names")


def _counted(direct: Direct, asked: list[int]) -> Callable[[str, bytes], bytes]:
    answer = direct._answer

    def counted(site: str, message: bytes) -> bytes:
        asked.append(len(unpack(message)[0]["own"]))
        return answer(site, message)

    return counted


@pytest.mark.parametrize(
    ("format", "older"),
    [(None, "the coordinator"), (1, "the coordinator"), (FORMAT + 1, "this side")],
)
def test_a_message_of_another_format_is_refused_with_who_is_older(
    format: int | None, older: str, content: dict[str, Any], tmp_path: Path
) -> None:
    site = Site("site-0", SimulatedSite(0, 1), tmp_path, Nowhere())
    header = {**OPEN, "experiment": content, "run": "r"}
    theirs = {} if format is None else {"format": format, "fedpref": "9.9"}
    answer, _ = unpack(site.answer(pack({**header, **theirs})))
    assert f"{older} is older" in answer["refused"]
    assert answer["format"] == FORMAT, "the answer says its own format, so that both sides know"


@pytest.mark.parametrize(("format", "older"), [(1, "site site-1"), (FORMAT + 1, "this side")])
def test_an_answer_of_another_format_leaves_its_site_out(
    format: int, older: str, content: dict[str, Any], tmp_path: Path
) -> None:
    direct = Direct(tmp_path)
    direct.changed["open"] = pack({"format": format, "fedpref": "9.9", "about": {}})
    assert opened(direct, content).clients == (0, 1)
    with pytest.raises(UserError, match=f"{older} is older"):
        Sites(direct, content, "other", Patience())


QUORUM = Patience(min_clients=1)


def opened(direct: Direct, content: dict[str, Any], run: str = "run", **more: Any) -> RemoteEngine:
    return RemoteEngine(Sites(direct, content, run, QUORUM, **more))


@pytest.mark.parametrize(
    "answer",
    [
        {},
        {"metrics": {}},
        {"metrics": {"1": {"loss": "text"}}},
        {"metrics": {"1": {"loss": float("nan")}}},
        {"metrics": [1]},
        b"junk",
        pack({"metrics": {}})[:-2],
        (9000).to_bytes(8, "little") + b"[" * 9000,
    ],
)
def test_a_site_that_answers_what_is_none_is_left_out_and_ends_nothing(
    answer: Any, content: dict[str, Any], tmp_path: Path
) -> None:
    direct = Direct(tmp_path)
    engine = opened(direct, content)
    direct.changed["report"] = answer
    assert engine.report(engine.each(told)) == {"loss": 1.0}
    assert engine.active == (0, 2)
    assert list(engine.left_out) == [1]


@pytest.mark.parametrize(
    "about",
    [{}, {"about": {"x": {"train": -1}}}, {"about": {"x": {"train": "many"}}}, {"about": 3}],
)
def test_a_site_that_says_of_its_clients_what_cannot_be_takes_no_part(
    about: Any, content: dict[str, Any], tmp_path: Path
) -> None:
    direct = Direct(tmp_path)
    direct.changed["open"] = about
    assert opened(direct, content).clients == (0, 1)
    with pytest.raises(UserError, match="site-1: malformed answer to 'open'"):
        Sites(direct, content, "other", Patience())


def test_who_is_left_out_keeps_the_private_state_from_before(
    content: dict[str, Any], tmp_path: Path
) -> None:
    engine = opened(Direct(tmp_path), content)
    own: Any = engine.each(fresh)
    for round in range(2):
        engine.begin(round, engine.clients)
        message, newer = engine.each(advance, own, "names")
        mean = engine.mean(message)
        own = own | newer
        assert engine.active == (0, 2)
    assert mean["x"].tolist() == pytest.approx(
        [2 * engine._examples[2] / (engine._examples[0] + engine._examples[2])] * 2
    )
    engine.save({"own": own}, tmp_path / "round-000002")
    kept = {
        client: tree["n"].item()
        for site in tmp_path.glob("site-*/run")
        for client, tree in kept_values(site, 2, "own").items()
    }
    assert kept == {0: 2.0, 1: 0.0, 2: 2.0}


@pytest.mark.long
def test_what_a_site_keeps_is_not_begun_anew_in_silence(
    content: dict[str, Any], tmp_path: Path
) -> None:
    direct = Direct(tmp_path)
    engine = opened(direct, content)
    engine.save({"own": engine.each(fresh)}, tmp_path / "a/round-000001")
    direct.absent = {"site-1"}
    about = engine._sites.about
    engine = opened(direct, content, began=about)
    engine.save(engine.load(tmp_path / "a/round-000001", ["own"]), tmp_path / "a/round-000002")
    assert json.loads((tmp_path / "a/round-000002/kept.json").read_text()) == {"own": [0, 1, 2]}, (
        "those of an absent site too"
    )
    direct.absent = set()
    for file in (tmp_path / "site-1").rglob("values/*/1.*"):
        file.unlink()
    last = tmp_path / "a/round-000002"

    def taken_up(patience: Patience) -> tuple[Sites, Any]:
        sites = Sites(direct, content, "run", patience, began=about)
        return sites, RemoteEngine(sites).load(last, ["own"])["own"]

    with pytest.raises(UserError, match="site-1 no longer has"):
        taken_up(Patience())
    sites, own = taken_up(QUORUM)
    assert sorted(own.names) == [0, 2], "where fewer are enough, the others go on"
    assert any("site-1 no longer has" in note for note in sites.notes)
    with pytest.raises(UserError, match="that the coordinator does not know"):
        opened(direct, content, is_known=False)
    assert list((tmp_path / "site-0/run/checkpoints").glob("round-*")), "and nothing is cleared"
    for file in (tmp_path / "site-0").rglob("values/*/0.*"):
        file.write_bytes(b"broken")
    with pytest.raises(UserError, match="site-0 does not take up what its clients keep"):
        taken_up(Patience())


@work("test_sites.begin", sends=(), keeps={0: "own"})
def begin(client: Client) -> Tree:
    """What `fresh` returns, and a note that it was asked for."""
    BEGAN.append(client.id)
    return {"n": torch.zeros(1)}


@work("test_sites.leaky", sends=(), keeps={0: "own"})
def leaky(client: Client) -> Tree:
    """An error whose text holds a row."""
    raise UserError("patient 7 has the flu")


@work("test_sites.long", sends=(0,))
def long(client: Client) -> Tree:
    """A matrix of few numbers, which stand for many; no two clients' are of one shape."""
    return {"x": torch.ones(400 + client.id, 400)}


@work("test_sites.same", sends=(0,))
def same(client: Client, sent: Tree) -> Tree:
    """What was sent."""
    return sent


BEGAN: list[int] = []


@pytest.fixture
def as_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every client be one of many."""
    for module in ("engines.site", "engines.coordinator", "experiments.clients"):
        monkeypatch.setattr(f"fedpref.{module}.MANY", 0)


@pytest.mark.usefixtures("as_many")
def test_what_clients_have_in_the_beginning_is_made_as_their_turn_comes(
    content: dict[str, Any], tmp_path: Path
) -> None:
    BEGAN.clear()
    direct = Direct(tmp_path)
    engine = opened(direct, content)
    own = engine.each(begin)
    engine.begin(0, [0, 1])
    assert not BEGAN
    _, new = engine.each(advance, own, "")
    assert BEGAN == [0, 1]
    own |= new
    engine.save({"own": own}, tmp_path / "a/round-000001")
    assert json.loads((tmp_path / "a/round-000001/kept.json").read_text()) == {"own": [0, 1]}
    assert engine.having([own]) == [0, 1]
    again = opened(direct, content, began=engine._sites.about, resumes=True)
    own = again.each(begin) | again.load(tmp_path / "a/round-000001", ["own"])["own"]
    again.begin(1, again.clients)
    _, own = again.each(advance, own, "")
    again.save({"own": own}, tmp_path / "a/round-000002")
    kept = {
        client: tree["n"].item()
        for site in tmp_path.glob("site-*/run")
        for client, tree in kept_values(site, 2, "own").items()
    }
    assert kept == {0: 2.0, 1: 2.0, 2: 1.0}
    # what is not of the beginning has to be kept
    direct.changed["save"] = {"kept": {"own": []}}
    again.save({"own": own}, tmp_path / "a/round-000003")
    assert any("site-1 does not keep what its clients have" in n for n in again._sites.notes)


@pytest.mark.usefixtures("as_many")
def test_a_value_that_cannot_be_made_leaves_its_client_out_and_says_nothing_of_it(
    content: dict[str, Any], tmp_path: Path
) -> None:
    engine = opened(Direct(tmp_path), content)
    own = engine.each(leaky)
    engine.begin(0, engine.clients)
    with pytest.raises(UserError) as found:
        engine.each(advance, own, "")
    assert "it failed (UserError)" in str(found.value)
    assert "flu" not in str(found.value)


@pytest.mark.usefixtures("as_many")
def test_a_client_of_whom_few_examples_can_be_used_falls_out_as_it_is_drawn(
    content: dict[str, Any], tmp_path: Path
) -> None:
    """Their numbers are not known before."""
    direct = Direct(tmp_path)
    engine = opened(direct, content)
    engine.begin(0, engine.clients)
    for bounds in (Bounds(evaluated=1000), Bounds(examples=1000)):
        for site in direct.all.values():
            site._hosted = replace(site._hosted, bounds=bounds)
        with pytest.raises(UserError, match="fewer than 1000 examples can be used"):
            engine.each(told)
        engine.begin(1, engine.clients)


def test_clients_begin_before_the_first_round(content: dict[str, Any], tmp_path: Path) -> None:
    engine = opened(Direct(tmp_path), content)
    engine.begin(1, engine.clients, "init")
    with pytest.raises(UserError, match="clients begin before the first round"):
        engine.each(fresh)


def test_a_mean_is_nobodys_beyond_its_share_and_not_of_those_who_send_nothing(
    content: dict[str, Any], tmp_path: Path
) -> None:
    direct = Direct(tmp_path)
    sites = Sites(direct, content, "run", replace(QUORUM, max_site_share=0.5))
    engine = RemoteEngine(sites, weighting="equal")
    alone = [i for i in engine.clients if sites.site_of[i] == "site-1"][:1]
    cohort = [*(i for i in engine.clients if sites.site_of[i] == "site-0"), *alone]
    engine.begin(0, cohort)
    mean = engine.mean(engine.each(numbered, {"x": torch.zeros(2)}))
    others = [i for i in cohort if i not in alone]
    assert mean["x"].tolist() == pytest.approx([(sum(others) / len(others) + alone[0]) / 2] * 2)
    # most of a cohort's clients send nothing: what one answers to what was sent is the mean
    engine = opened(Direct(tmp_path / "empty"), content)
    engine.begin(0, engine.clients)
    mean = engine.mean(engine.each(nothing_but_one, {"x": torch.zeros(2)}))
    assert mean["x"].tolist() == [3.0, 3.0]
    assert len(engine.left_out) == len(engine.clients) - 1
    # one who answers under a name that was sent does not outvote those who answer under another
    engine = opened(Direct(tmp_path / "named"), content)
    engine.begin(0, engine.clients)
    assert engine.mean(engine.each(renamed_but_one, {"x": torch.zeros(2)})).keys() == {"y"}
    assert list(engine.left_out) == [1]


def test_a_cohort_of_nobody_has_no_shares(content: dict[str, Any], tmp_path: Path) -> None:
    sites = Sites(Direct(tmp_path), content, "run", replace(QUORUM, max_site_share=0.5))
    engine = RemoteEngine(sites)
    engine.begin(0, ())
    assert engine._shares(()) == {}
    engine.begin(0, engine.clients)
    assert engine.share == pytest.approx(1.0)


def test_a_site_that_is_full_opens_nothing_more(content: dict[str, Any], tmp_path: Path) -> None:
    direct = Direct(tmp_path, 1)
    (site,) = direct.all.values()
    host = site._host.host

    def lends(*asked: Any) -> Any:
        return replace(host(*asked), bounds=Bounds(disk=1000))

    site._host.host = lends  # type: ignore[method-assign]
    (tmp_path / "site-0").mkdir()
    (tmp_path / "site-0/large").write_bytes(bytes(2000))
    with pytest.raises(UserError, match="runs take"):
        opened(direct, content)
    assert not (tmp_path / "site-0/run").exists()


def test_sums_of_many_forms_have_a_bound(content: dict[str, Any], tmp_path: Path) -> None:
    """A few numbers may stand for many, and each form has a sum of its own."""
    direct = Direct(tmp_path)
    sites = Sites(direct, content, "run", replace(QUORUM, max_message_mb=1))
    engine = RemoteEngine(sites, uplink=Chain((LowRank(rank=1).stage(),)))
    for site in direct.all.values():
        site._hosted = replace(site._hosted, uplink=Chain((LowRank(rank=1).stage(),)))
    engine.begin(0, engine.clients)
    assert engine.mean(engine.each(long))["x"].shape == (400, 400)
    assert set(engine.left_out.values()) == {"there is no room for a sum of its form"}
    # whatever a message may weigh, what was sent may come back
    engine.begin(1, engine.clients)
    large = {"x": torch.ones(600, 600)}
    assert engine.mean(engine.each(same, large))["x"].shape == (600, 600)
    assert not engine.left_out


def test_values_that_are_made_later_take_the_room_of_what_they_need() -> None:
    values, made = Values(range(3), 1000), Kept({"n": torch.ones(1)})
    later = Later(lambda client: made, 800)
    values.put_later(range(3), "1", later)
    assert values.get(2, "1") is made
    assert not values.is_kept(2, "1")
    with pytest.raises(RefusedError, match="take more than"):
        values.put_later([0], "2", Later(lambda client: made, 300))
    for client in (0, 1):
        values.drop(client, "1")
    with pytest.raises(RefusedError, match="take more than"):
        values.put_later([0], "2", Later(lambda client: made, 300))
    values.drop(2, "1")
    values.put_later([0], "2", Later(lambda client: made, 900))


def test_a_site_that_comes_later_takes_no_part_and_ends_nothing(
    content: dict[str, Any], tmp_path: Path
) -> None:
    direct = Direct(tmp_path)
    about = opened(direct, content)._sites.about
    began = {name: about[name] for name in list(about)[:2]}
    engine = opened(direct, content, began=began)
    assert engine.clients == (0, 1)
    assert engine._sites.latecomers == list(about)[2:]
    assert engine.report(engine.each(told)) == {"loss": 1.0}


def test_what_nobody_waits_for_is_dropped(content: dict[str, Any], tmp_path: Path) -> None:
    direct = Direct(tmp_path)
    opened(direct, content)
    site = direct.all["site-0"]
    site.hear("stranger", pack({"round": 0, "call": 1}))
    site.hear("site-1", b"junk")
    for call in range(100):
        site.hear("site-1", pack({"round": 0, "call": call}))
    assert len(site._mailbox) == 4


def test_a_message_that_stands_for_a_larger_tree_is_no_neighbours() -> None:
    stage = TopK(fraction=0.5).stage()
    sender = Sender(0, 0, torch.Generator())
    message = stage.encode({"a": torch.randn(4, 2)}, sender)
    assert alike(message, stage.encode({"a": torch.randn(4, 2)}, sender))
    for changed in ({"shape/a": torch.tensor([10**6, 10**3])}, {"values/a": torch.zeros(5)}):
        name = next(iter(changed))
        assert name in message
        assert not alike({**message, **changed}, message)


def test_a_kit_is_stopped_with_all_that_it_runs_and_nothing_else_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kit = tmp_path / "kit"
    for folder in ("startup", "local"):
        (kit / folder).mkdir(parents=True)
    (kit / "startup/sub_start.sh").write_text("sleep 30\n")
    (kit / "local/resources.json").write_text("{}")
    with pytest.raises(UserError, match="no kit"):
        kits.start(tmp_path, {})
    # left by a process whose number somebody else has now
    (kit / "daemon_pid.fl").write_text(str(os.getpid()))
    assert not kits.running(kit)
    kits.stop(kit)
    monkeypatch.chdir(tmp_path)
    kits.start(Path("kit"), {})
    for _ in range(50):
        if kits.running(kit):
            break
        time.sleep(0.1)
    assert kits.running(Path("kit"))
    with pytest.raises(UserError, match="running already"):
        kits.start(kit, {})
    end = kits._end
    # what is killed may take its time to die
    monkeypatch.setattr(kits, "_end", lambda *told: threading.Timer(0.3, end, told).start())
    kits.stop(Path("kit"), seconds=0.2)
    assert not kits.running(kit)


# ---- what is held out anywhere is trained on nowhere


QUESTIONS = [f"Question {i}?" for i in range(24)]


class ThreeSites:
    """Sites a and b with sides of their own, c by the rule; one question in two spellings."""

    def __init__(self, hosts: dict[str, Any]) -> None:
        self.hosts, self.heard = hosts, list[bytes]()
        self.sites, self.absent = tuple(hosts), set[str]()

    def ask(self, messages: Any, seconds: float) -> dict[str, bytes]:
        there = {site: message for site, message in messages.items() if site not in self.absent}
        answers = {site: self.hosts[site].answer(message) for site, message in there.items()}
        self.heard += [*there.values(), *answers.values()]
        return answers


def three_sites(
    tmp_path: Path, content: dict[str, Any], tiny: Path, keyed: bool = True, **settings: Any
) -> Any:
    sides: dict[str, Any] = {
        "a": lambda i: "test" if i % 4 == 0 else "train",
        "b": lambda i: "test" if i % 4 == 1 else "train",
        "c": None,
    }
    hosts: dict[str, Any] = {}
    for name, side in sides.items():
        folder = tmp_path / name
        folder.mkdir()
        rows = [
            {
                "prompt": f" {prompt}  " if name == "b" else prompt,
                "chosen": " yes",
                "rejected": " no",
                **({"split": side(i)} if side else {}),
            }
            for i, prompt in enumerate(QUESTIONS)
        ]
        write_rows(folder / "rows.jsonl", rows)
        (folder / "split.key").write_text("a secret of the sites")
        data = {"name": "files", "path": "rows.jsonl", "test_fraction": 0.3, **settings}
        site = {
            "data": {**data, **({"split_column": "split"} if side else {})},
            "algorithms": ["feddpo"],
            "limits": LIMITS,
            "models": {content["task"]["model"]["path"]: str(tiny)},
            **({"split_key": "split.key"} if keyed else {}),
        }
        (folder / "site.yaml").write_text(yaml.safe_dump(site))
        hosts[name] = Site(name, consenting(name, folder / "site.yaml")[0], folder, Nowhere())
    return ThreeSites(hosts)


def shown(transport: ThreeSites, side: str) -> set[int]:
    """The questions on a side of any site."""
    return {
        i
        for site in transport.hosts.values()
        for shard in site._opened.shards.values()
        for example in getattr(shard, side)
        for i, prompt in enumerate(QUESTIONS)
        if prompt in shard_text(site, example)
    }


@pytest.mark.parametrize("keyed", [True, False])
def test_sites_with_sides_of_their_own_compare_what_is_held_out(
    keyed: bool, content: dict[str, Any], tiny: Path, tmp_path: Path
) -> None:
    ruled = [i for i, prompt in enumerate(QUESTIONS) if held_out(prompt, 0.3)]
    transport = three_sites(tmp_path, content, tiny, keyed)
    sites = Sites(transport, content, "run", Patience())
    trained, tested = (shown(transport, side) for side in ("train", "test"))
    assert tested >= {i for i in range(24) if i % 4 < 2} | set(ruled)
    if keyed:
        assert not trained & tested
        assert trained == set(range(24)) - tested
        assert sites.notes == []
    else:
        assert trained & tested
        assert "sites a, b, c have no split_key" in sites.notes[0]
    assert not any(b"Question" in message for message in transport.heard)


def test_what_is_held_out_when_a_run_begins_stays_so_without_its_site(
    content: dict[str, Any], tiny: Path, tmp_path: Path
) -> None:
    transport = three_sites(tmp_path, content, tiny)
    sites = Sites(transport, content, "run", Patience())
    whole = {name: site._opened.shards for name, site in transport.hosts.items()}
    transport.absent.add("a")
    patience = Patience(min_clients=1)
    settings: dict[str, Any] = {"began": sites.about, "held_out": sites.held_out}
    again = Sites(transport, content, "run", patience, **settings)
    assert again.about == sites.about
    for name in ("b", "c"):
        assert transport.hosts[name]._opened.shards == whole[name]
    # a run that begins cannot know what a site holds out that does not answer
    with pytest.raises(UserError, match="site a: no answer"):
        Sites(transport, content, "other", patience)


def test_what_is_set_aside_by_one_site_is_trained_on_by_none(
    content: dict[str, Any], tiny: Path, tmp_path: Path
) -> None:
    aside = {"validation_fraction": 0.3}
    chosen = {**content, "evaluate_on": "validation", "data": {**content["data"], **aside}}
    transport = three_sites(tmp_path, content, tiny, **aside)
    Sites(transport, chosen, "run", Patience())
    validated = shown(transport, "test")
    trained = shown(transport, "train")
    Sites(transport, content, "other", Patience())
    tested = shown(transport, "test")
    assert tested >= {i for i in range(24) if i % 4 < 2}
    assert validated - tested
    assert not trained & (validated | tested)


def shard_text(site: Site, example: Any) -> str:
    text: str = site._opened.task.language.tokenizer.decode(example.prompt)  # type: ignore[attr-defined]
    return " ".join(text.split())


class Offering:
    """Sites that offer clients, and note who is numbered."""

    def __init__(self, offers: dict[str, dict[str, Any]]) -> None:
        self.offers, self.numbered = offers, dict[str, Any]()

    @property
    def sites(self) -> list[str]:
        return sorted(self.offers)

    def ask(self, messages: Any, seconds: float) -> dict[str, bytes]:
        found = {}
        for site, message in messages.items():
            header, _ = unpack(message)
            said: dict[str, Any] = {}
            if header["verb"] == "split":
                said = {"held_out": [], "is_keyed": False, "has_sides": False}
            if header["verb"] == "open":
                said = {"about": self.offers[site]}
            if header["verb"] == "number":
                self.numbered[site] = header["ids"]
            found[site] = pack(version() | said)
        return found


def offered(digest: str, number: int = 0) -> dict[str, Any]:
    sizes = {"train": 10, "test": 10, "truncated": 0, "conversations": 0}
    return {**sizes, "digest": digest, "number": number}


def test_a_site_does_not_take_anothers_client_by_its_name() -> None:
    honest = {site: {site: offered(site)} for site in ("clinic", "bank")}
    evil: dict[str, Any] = {"clinic": offered("x"), "clinic@clinic": offered("y", 9)}
    asked: Any = Offering({**honest, "evil": evil})
    made = Sites(asked, {}, "r", Patience(min_clients=1))
    assert sorted(made.site_of.values()) == ["bank", "clinic"]
    # in a run that goes on, who had the name has it by its data
    began = {name: offered(name) for name in ("bank", "clinic", "evil")}
    evil = {name: offered("evil" if name == "evil" else "z") for name in began}
    asked = Offering({**honest, "evil": evil})
    made = Sites(asked, {}, "r", Patience(min_clients=1), began=began)
    assert made.site_of == {0: "bank", 1: "clinic", 2: "evil"}
