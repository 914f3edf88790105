"""What operators do: certificates, checks, what is kept and forgotten; what coordinators bound."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from conftest import kept_values
from fedpref import Experiment, UserError, cli, config, run
from fedpref.engines import site_folder
from fedpref.engines.coordinator import bounded_by_site
from fedpref.engines.engine import clipped
from fedpref.engines.messages import RefusedError
from fedpref.engines.replies import answered, usable_metrics
from fedpref.engines.site_privacy import JOINED
from fedpref.engines.store import Store
from fedpref.engines.values import Kept
from fedpref.experiments.run_directory import RunDirectory
from fedpref.federation.leaving import Audience, Label
from fedpref.federation.local_training import LocalTraining
from fedpref.numerics import trees
from fedpref.sites.consent import Consenting, Limits, SiteFile

pytest.importorskip("nvflare")

from fedpref.sites import kits, operating
from fedpref.sites.simulated import hand_over

# ---- a federation


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("federation") / "made"
    kits.provision(folder, "trial", "localhost", 18002, ["clinic", "bank"], "a@b.org", 20)
    return folder


def test_certificates_are_renewed_under_the_same_root_or_a_new_one(federation: Path) -> None:
    kit = federation / "clinic"
    ends = operating.certificates(kit)
    assert all(end < datetime.now(UTC) + timedelta(days=21) for end in ends.values())
    assert "ends in 19 days" in operating.expiry(kit)
    read = {
        name: (federation / name / "startup/client.crt").read_bytes() for name in ("clinic", "bank")
    }
    root = (kit / "startup/rootCA.pem").read_bytes()
    assert list(kits.renew(federation, ["clinic"])) == ["clinic"]
    assert (kit / "startup/client.crt").read_bytes() != read["clinic"]
    assert (federation / "bank/startup/client.crt").read_bytes() == read["bank"]
    assert (kit / "startup/rootCA.pem").read_bytes() == root
    assert (kit / kits.SITE_FILE).exists(), "what the site has written stays"
    assert len(kits.renew(federation, [], 900)) == 4
    assert (kit / "startup/rootCA.pem").read_bytes() != root
    assert operating.expiry(kit) == ""
    (kit / "startup/client.crt").rename(kit / "client.crt")
    (kit / "startup/client.crt").write_text("no certificate")
    with pytest.raises(UserError, match="this is no certificate"):
        operating.expiry(kit)
    (kit / "startup/client.crt").unlink()
    with pytest.raises(UserError, match="its own certificate is missing"):
        operating.expiry(kit)
    (kit / "client.crt").rename(kit / "startup/client.crt")
    with pytest.raises(UserError, match="no participant called 'nobody'"):
        kits.renew(federation, ["nobody"])
    assert "fedpref site check" in (kit / kits.README).read_text()


def test_a_name_that_a_federation_has_a_folder_of_is_no_participants(
    federation: Path, tmp_path: Path
) -> None:
    before = (federation / kits.STATE / kits.CERTIFICATES).read_text()
    for name in ("state", "State", "project.yml", "server", "Clinic", "a b", "..", "é", "x" * 99):
        with pytest.raises(UserError, match="Give"):
            kits.add(federation, name)
        with pytest.raises(UserError, match="Give"):
            kits.provision(tmp_path / "new", "trial", "here", 8002, ["clinic", name], "a@b.org")
    assert (federation / kits.STATE / kits.CERTIFICATES).read_text() == before
    with pytest.raises(UserError, match="ports go from 1"):
        kits.provision(tmp_path / "new", "trial", "here", 70000, ["clinic"], "a@b.org")
    assert not (tmp_path / "new").exists()


def test_the_roots_key_outlives_a_crash_between_two_folders(federation: Path) -> None:
    before = federation / f".{kits.STATE}.before"
    (federation / kits.STATE).rename(before)
    kits.renew(federation, ["clinic"])
    assert (federation / kits.STATE / kits.CERTIFICATES).exists()
    assert not before.exists()


def test_a_site_is_looked_at_before_its_first_job(
    federation: Path, rows_file: Path, settings: dict[str, Any]
) -> None:
    kit = federation / "bank"
    found = {one.what: one for one in operating.checked(kit)}
    assert not found["server"].is_well
    assert "cannot be reached" in found["server"].said
    assert not found["data"].is_well
    model = settings["task"]["model"]["path"]
    text = {
        "data": {"name": "files", "path": str(rows_file)},
        "algorithms": ["feddpo"],
        "models": {model: model, "other": "./nowhere"},
    }
    (kit / kits.SITE_FILE).write_text(yaml.safe_dump(text))
    small = {"algorithm": {"name": "feddpo", "local": {"batch_size": 2}}}
    experiment = config.parse(Experiment, {**settings, **small}, "x")
    assert {one.what: one for one in operating.checked(kit)}["data"].said.startswith("bank (")
    found = {one.what: one for one in operating.checked(kit, experiment)}
    assert found["consent"].is_well is False
    assert "limits.least_batch" in found["consent"].said
    assert not found["model other"].is_well
    blank = federation / "a b"
    blank.mkdir()
    shutil.copytree(kit, blank / "bank")
    assert "a space in its path" in next(
        one.said for one in operating.checked(blank / "bank") if one.what == "kit"
    )
    with pytest.raises(UserError, match="begins no job in a folder with a space"):
        kits.start(blank / "bank", {})
    shutil.rmtree(blank)
    result = CliRunner().invoke(cli.app, ["site", "check", str(kit)])
    assert result.exit_code == 2
    assert "wrong server" in result.output
    assert operating.status(kit) == "bank is not running."


def test_a_client_is_forgotten_in_all_runs(tmp_path: Path) -> None:
    for name in ("a", "b/c"):
        place = tmp_path / name
        (place / "checkpoints").mkdir(parents=True)
        (place / operating.CLIENTS).write_text(json.dumps({"clinic": 0, "school": 1}))
        values = {"own": {i: Kept({"x": torch.full((2,), float(i))}) for i in (0, 1)}}
        Store(place / "checkpoints").save(
            place / "checkpoints/round-000001", "round-000001", values
        )
        (place / "clients/school").mkdir(parents=True)
        (place / "cache").mkdir()
        told = {"round": 1, "place": "report", "clients": {"clinic": {"loss": 1.0}, "school": {}}}
        (place / operating.OWN_FIGURES).write_text(json.dumps(told) + "\n" + '{"round": 2, "cli')
    assert operating.forget(tmp_path, "school") == ["a", "b/c"]
    for name in ("a", "b/c"):
        assert list(kept_values(tmp_path / name, 1, "own")) == [0]
        assert not list((tmp_path / name).rglob("values/*/1.*"))
        assert not (tmp_path / name / "clients/school").exists()
        assert not (tmp_path / name / "cache").exists()
        (line,) = (tmp_path / name / operating.OWN_FIGURES).read_text().splitlines()
        assert json.loads(line)["clients"] == {"clinic": {"loss": 1.0}}
    with pytest.raises(UserError, match="nothing is kept here of a client 'school'"):
        operating.forget(tmp_path, "school")
    called = tmp_path / "checkpoints-of-mine"  # a run
    called.mkdir()
    (called / operating.CLIENTS).write_text(json.dumps({"school": 1}))
    within = tmp_path / "a/more"  # a run beneath another one's folder
    within.mkdir()
    (within / operating.CLIENTS).write_text(json.dumps({"school": 1}))
    assert operating.forget(tmp_path, "school") == ["a/more", called.name]


def test_what_a_simulated_site_keeps_is_handed_over_without_secrets(tmp_path: Path) -> None:
    kept = tmp_path / "site/run"
    held = ("privacy/.secret", "checkpoints.1/x", "numbers.json", "sums.json", "cache/x")
    given = ("privacy/ledger.jsonl", "clients/cache/x", "clients/checkpoints-town/x", "samples/a")
    for name in (*held, *given):
        (kept / name).parent.mkdir(parents=True, exist_ok=True)
        (kept / name).touch()
    hand_over(kept, tmp_path / "run")
    there = {str(file.relative_to(tmp_path / "run")) for file in (tmp_path / "run").rglob("*")}
    assert there >= set(given)
    assert not there & set(held)


def test_a_client_is_forgotten_by_the_number_that_it_had_when_values_were_set_aside(
    tmp_path: Path,
) -> None:
    run, values = tmp_path / "run", {"own": {i: Kept({"x": torch.full((2,), 1.0)}) for i in (0, 1)}}
    Store(run / "checkpoints").save(run / "checkpoints/round-000001", "round-000001", values)
    (run / operating.CLIENTS).write_text(json.dumps({"ann": 0, "bob": 1}))
    site_folder.set_aside(run)
    (run / operating.CLIENTS).write_text(json.dumps({"bob": 0}))  # begun anew, without ann
    (run / JOINED).write_text(json.dumps(["ann"]))
    assert operating.forget(tmp_path, "ann") == ["run"]
    left = [file.name for file in run.glob("checkpoints.1/values/own/*")]
    assert left == ["1.round-000001.safetensors"]
    assert json.loads((run / JOINED).read_text()) == []
    assert operating.forget(tmp_path, "bob") == ["run"]
    assert not list(run.glob("checkpoints.1/values/own/*"))


# ---- what a site lets be asked


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"algorithm": {"local": {"steps": 2, "batch_size": 2}}}, "least_batch"),
        ({"algorithm": {"local": {"steps": 1, "batch_size": 4}}}, "least_examples"),
        ({"algorithm": {"local": {"max_tokens_per_batch": 64}}}, "least_batch"),
        ({"algorithm": {"local": {"steps": 1001, "batch_size": 4}}}, "max_steps"),
        ({"task": {"model": {"lora_r": 65}}}, "max_lora_r"),
        (
            {
                "algorithm": {
                    "name": "fedpdpo",
                    "personal_steps": 1,
                    "local": {"steps": 2, "batch_size": 4},
                }
            },
            "updates of 4 examples",
        ),
    ],
)
def test_a_site_consents_to_settings(changed: dict[str, Any], reason: str, tmp_path: Path) -> None:
    file = SiteFile(data=Experiment().data, algorithms=("feddpo", "fedpdpo"))
    host = Consenting("clinic", file)
    host.consent({"algorithm": {"local": {"steps": 2, "batch_size": 4}}})
    with pytest.raises(RefusedError, match=reason):
        host.consent(changed)
    with pytest.raises(RefusedError, match="least_batch"):
        Limits().check([{"any": (LocalTraining(batch_size=1),)}])


def test_adapters_on_embeddings_and_few_examples_are_refused() -> None:
    limits = Limits()
    limits.refuse_ends([])
    for end in ("embeddings", "head"):
        with pytest.raises(RefusedError, match=f"limits.{end}: true"):
            limits.refuse_ends([end])
    limits.refuse_small({"a": {"train": 8, "test": 10}, "evaluates": {"train": 0, "test": 10}})
    for about, reason in (
        ({"train": 7, "test": 10}, "training"),
        ({"train": 8, "test": 9}, "held-out"),
    ):
        with pytest.raises(RefusedError, match=f"fewer {reason} examples"):
            limits.refuse_small({"a": about})


# ---- what a coordinator takes


def test_no_site_has_more_than_its_share() -> None:
    sites = {0: "a", 1: "a", 2: "b", 3: "c"}
    weights = {0: 30.0, 1: 30.0, 2: 2.0, 3: 6.0}
    bounded = bounded_by_site(weights, sites, 0.5)
    total = sum(bounded.values())
    assert (bounded[0] + bounded[1]) / total == pytest.approx(0.5)
    assert bounded[2] == 2.0
    even = bounded_by_site(weights, sites, 0.1)
    assert [even[0] + even[1], even[2], even[3]] == pytest.approx([even[2]] * 3)
    assert bounded_by_site(weights, sites, 1.0) == weights


def test_updates_are_clipped_and_metrics_say_so(settings: dict[str, Any], tmp_path: Path) -> None:
    tree = {"x": torch.tensor([3.0, 4.0]) * 0.25}
    shorter, length = clipped(tree, 0.25, 1.0)
    assert length == pytest.approx(5.0)
    assert trees.norm(shorter) == pytest.approx(0.25)
    assert clipped(tree, 0.25, 6.0)[0] is tree
    beside = {**tree, "probe/x": torch.tensor([100.0])}
    shorter, length = clipped(beside, 0.25, 1.0)
    assert length == pytest.approx(5.0), "a figure beside a value has no length"
    assert shorter["probe/x"] is beside["probe/x"]
    assert trees.norm({"x": shorter["x"]}) == pytest.approx(0.25)
    spec = config.parse(Experiment, {**settings, "federation": {"clip": 1e-3}}, "x")
    rows = RunDirectory(run(spec, tmp_path / "run").path).read_rows("metrics.jsonl")
    assert all(row["clipped"] == 1.0 and row["update_norm_max"] > 1e-3 for row in rows)


def test_metrics_that_cannot_be_are_their_clients_fault() -> None:
    good = {"rewards/accuracies": 0.5, "loss": 0.7, "num_examples": 8.0}
    for bad in (
        {**good, "rewards/accuracies": 7.0},
        {**good, "loss": 1e300},
        {**good, "num_examples": 0.0},
        {"loss": 0.7, "num_examples": 8.0},
        {},
    ):
        usable, unfit = usable_metrics({0: good, 1: bad, 2: good}, ["num_examples"])
        assert (usable, list(unfit)) == ({0: good, 2: good}, [1])
    usable, unfit = usable_metrics({0: good, 1: {**good, "mine": 1.0}, 2: good}, [])
    assert usable[1] == good
    assert not unfit


def test_a_site_speaks_for_its_own_clients() -> None:
    asked = {"clients": [0], "own": {0: "1.0"}, "weights": {0: {0: 1.0, 1: 1.0}}}
    answered("each", {"parts": 2, "failed": {"0": "no"}}, asked)
    for verb, answer in (
        ("each", {"parts": 2, "failed": {"1": "no"}}),
        ("report", {"metrics": {"1": {"loss": 1.0}}}),
        ("exchange", {"sizes": {"0": 1}, "unheard": [2]}),
        ("exchange", {"sizes": {"1": 1}, "unheard": []}),
    ):
        with pytest.raises(RefusedError):
            answered(verb, answer, asked)


# ---- files


def test_a_checkpoint_writes_what_has_changed(tmp_path: Path) -> None:
    store = Store(tmp_path)
    values = {i: Kept({"x": torch.full((3,), float(i))}) for i in range(20)}
    values[20] = Kept({}, Label(Audience.NOBODY, "moments"))

    def saved(number: int) -> dict[Path, int]:
        name = f"round-{number:06d}"
        store.save(tmp_path / name, name, {"own": values})
        return {file: file.stat().st_mtime_ns for file in (tmp_path / "values").glob("*/*")}

    first = saved(1)
    assert len(first) == 20, "what is empty has no file"
    values[3] = Kept({"x": torch.zeros(3)}, Label(Audience.NOBODY, "own"))
    second = saved(2)
    assert len(second.items() - first.items()) == 1
    assert first.keys() <= second.keys(), "the checkpoint before is whole"
    third = saved(3)
    assert len(third) == 20, "and what it alone had goes with the next"
    loaded = Store(tmp_path).load(tmp_path / "round-000003", ["own"])["own"]
    assert loaded[3].label == Label(Audience.NOBODY, "own")
    assert loaded[20].value == {}
    assert loaded[20].label.kind == "moments"
    assert all(torch.equal(loaded[i].value["x"], values[i].value["x"]) for i in range(20))


def test_what_an_older_checkpoint_alone_had_goes_in_the_next_process_too(tmp_path: Path) -> None:
    def saved(store: Store, number: int) -> set[str]:
        name = f"round-{number:06d}"
        store.save(tmp_path / name, name, {"own": values})
        return {file.name for file in (tmp_path / "values").glob("*/*")}

    store = Store(tmp_path)
    values = {i: Kept({"x": torch.full((3,), float(i))}) for i in range(2)}
    saved(store, 1)
    values[0] = Kept({"x": torch.ones(3)})
    saved(store, 2)
    later = Store(tmp_path)
    values = later.load(tmp_path / "round-000002", ["own"])["own"]
    values[1] = Kept({"x": torch.ones(3)})
    assert saved(later, 3) == {
        f"{one}.safetensors" for one in ("0.round-000002", "1.round-000001", "1.round-000003")
    }
    # one that goes back a checkpoint still has all that this one names
    later = Store(tmp_path)
    values = later.load(tmp_path / "round-000002", ["own"])["own"]
    values = dict.fromkeys(values, Kept({"x": torch.zeros(3)}))
    saved(later, 3)
    assert set(Store(tmp_path).load(tmp_path / "round-000002", ["own"])["own"]) == {0, 1}


def test_a_run_is_held_by_one_process_whatever_its_folder_of_temporary_files(
    tmp_path: Path,
) -> None:
    program = (
        "import sys\nfrom pathlib import Path\n"
        "from fedpref.experiments.run_lock import RunLock\n"
        "lock = RunLock(Path(sys.argv[1])); lock.acquire(); print('held'); lock.release()\n"
    )

    def other() -> subprocess.CompletedProcess[str]:
        (tmp_path / "elsewhere").mkdir(exist_ok=True)
        return subprocess.run(
            [sys.executable, "-c", program, str(tmp_path / "run")],
            capture_output=True,
            text=True,
            env={**os.environ, "TMPDIR": str(tmp_path / "elsewhere")},
        )

    folder = RunDirectory(tmp_path / "run")
    with folder.alone():
        assert "another process is at work" in other().stderr
        assert folder.is_held
    assert other().stdout == "held\n"
    assert not folder.is_held
    assert not list(tmp_path.glob(".*")), "no lock is left"


def test_looking_whether_a_run_is_held_needs_no_right_to_write(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    with run.alone():
        lock = tmp_path / ".run.lock"
        assert lock.stat().st_mode & 0o044 == 0o044, "colleagues may look"
        lock.chmod(0o444)
        assert RunDirectory(tmp_path / "run").is_held
    (tmp_path / ".run.lock").touch()  # of a process that was killed
    assert not run.is_held
    with run.alone():
        pass
    assert not list(tmp_path.glob(".*"))


def test_what_a_killed_start_left_is_in_nobodys_way(tmp_path: Path) -> None:
    left = tmp_path / f".run.begins-{os.getpid()}"
    left.mkdir()
    (left / "config.yaml").touch()
    other = tmp_path / ".run.20240101"  # somebody's
    other.mkdir()
    RunDirectory(tmp_path / "run").create({"config.yaml": "rounds: 1\n"})
    assert (tmp_path / "run/config.yaml").read_text() == "rounds: 1\n"
    assert [one.name for one in tmp_path.glob(".run.*")] == [other.name]


def test_a_worker_that_dies_between_rounds_is_a_sentence(settings: dict[str, Any]) -> None:
    from fedpref.engines.workers import Workers

    workers = Workers(2, lambda client, shared, own: client, lambda number: None)
    assert dict(workers.run(None, ((i, None) for i in range(4)))) == {i: i for i in range(4)}
    for process in workers._processes:
        process.kill()
        process.join()
    with pytest.raises(UserError, match="has died, perhaps for want of memory"):
        list(workers.run(None, ((i, None) for i in range(4))))
    workers.close()


def test_what_cannot_be_written_is_said_and_leaves_nothing(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    with pytest.raises(UserError, match="cannot be written"):
        trees.save({"x": torch.ones(1)}, gone / "x.safetensors")
    with pytest.raises(UserError, match="cannot be written"):
        RunDirectory(gone).write("done", "")
    assert not list(tmp_path.iterdir())
