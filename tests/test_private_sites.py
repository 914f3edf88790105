"""Promises of privacy over sites: the same bits as in one process, ledgers and limits of theirs."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from conftest import make_rows, write_rows
from fedpref import Experiment, config
from fedpref.engines.messages import NO_TENSORS, RefusedError, pack, unpack, version
from fedpref.engines.private_examples import ledger_file
from fedpref.engines.requests import run_name
from fedpref.engines.site import Site
from fedpref.engines.site_privacy import SUMS
from fedpref.experiments.clients import SimulatedSite
from fedpref.experiments.rounds import events, new_directory
from fedpref.experiments.run_directory import RunDirectory
from fedpref.numerics import trees
from fedpref.privacy import Ledger, Secret
from fedpref.sites import programs
from fedpref.sites.consent import Limits, consenting

KEY = bytes(range(32))
CLIENTS = {"unit": "client", "noise_multiplier": 1.0, "delta": 0.01}
QUANTILE = {"clip": {"name": "quantile", "start": 0.5, "count_noise": 0.6}}
EXAMPLES = {"unit": "example", "noise_multiplier": 1.5, "delta": 0.02}


class Here:
    """Sites in this process."""

    def __init__(self, folder: Path, hosts: list[Any] | None = None) -> None:
        hosts = hosts or [SimulatedSite(k, 2) for k in range(2)]
        self.all = {
            f"site-{k}": Site(f"site-{k}", host, folder / f"site-{k}", self)
            for k, host in enumerate(hosts)
        }
        self.up: list[bytes] = []

    @property
    def sites(self) -> list[str]:
        return list(self.all)

    def tell(self, site: str, message: bytes) -> None:
        self.all[site].hear(next(name for name in self.all if name != site), message)

    def ask(self, messages: Any, seconds: float) -> dict[str, bytes]:
        found = {site: self.all[site].answer(message) for site, message in messages.items()}
        self.up += found.values()
        return found


@pytest.fixture
def content(settings: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    rows = write_rows(tmp_path / "rows.jsonl", make_rows([14, 12, 13, 12]))
    return deepcopy(
        {
            **settings,
            "data": {"name": "files", "path": str(rows), "test_fraction": 0.3},
            "algorithm": {**settings["algorithm"], "aggregate": {"name": "frozen-a"}},
            "federation": {"weighting": "equal"},
        }
    )


def parsed(content: dict[str, Any], **changes: Any) -> Experiment:
    return config.parse(Experiment, {**content, **changes}, "test")


def run_to(spec: Experiment, folder: Path, transport: Any = None) -> RunDirectory:
    directory = new_directory(spec, folder)
    for _ in events(spec, directory, transport=transport):
        pass
    return directory


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"privacy": CLIENTS}, marks=pytest.mark.slow),
        {
            "privacy": CLIENTS | QUANTILE,
            "federation": {"weighting": "equal", "sampling": "poisson", "clients_per_round": 2},
        },
        pytest.param(
            {"privacy": CLIENTS, "algorithm": {"name": "scaffold"}}, marks=pytest.mark.slow
        ),
        pytest.param({"privacy": EXAMPLES}, marks=pytest.mark.slow),
        {"privacy": [CLIENTS, EXAMPLES]},
    ],
    ids=["clients", "poisson-quantile", "scaffold", "examples", "both"],
)
@pytest.mark.long
def test_sites_and_one_process_agree_to_the_bit(
    changes: dict[str, Any],
    content: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # one secret for all, which nobody has in earnest
    monkeypatch.setattr(Secret, "of", staticmethod(lambda folder, **_: Secret(KEY)))
    if "algorithm" in changes:
        changes = {**changes, "algorithm": {**changes["algorithm"]}}
        changes["algorithm"]["local"] = content["algorithm"]["local"]
    spec = parsed(content, **changes)
    here = run_to(spec, tmp_path / "here")
    there = run_to(spec, tmp_path / "there", Here(tmp_path))
    one, other = (
        trees.load(run.path / "adapter/adapter_model.safetensors") for run in (here, there)
    )
    assert all(torch.equal(one[name], other[name]) for name in one)
    for name in ("epsilon", "epsilon_units", "clip_norm"):
        figures = [
            [row.get(name) for row in run.read_rows("metrics.jsonl")] for run in (here, there)
        ]
        assert figures[0] == figures[1]


@pytest.mark.long
def test_what_sites_send_for_a_sum_is_integers_and_their_own_ledgers_say_so(
    content: dict[str, Any], tmp_path: Path
) -> None:
    transport = Here(tmp_path / "sites")
    run = run_to(parsed(content, privacy=CLIENTS), tmp_path / "run", transport)
    sent = [tensors for _, tensors in map(unpack, transport.up) if tensors]
    assert len(sent) == 6, "two sites in three rounds"
    assert all(t.dtype == torch.int32 for tree in sent for t in tree.values())
    assert Ledger.at(run.path / "privacy").charged == 3
    for number in range(4):
        folder = tmp_path / f"sites/site-{number % 2}/run/privacy"
        assert Ledger.at(folder / SUMS, ledger_file(f"client-{number}")).charged == 3
    # a digest of the rows confirms no guess
    said = [header for header, _ in map(unpack, transport.up) if "about" in header]
    plain = Here(tmp_path / "plain")
    run_to(parsed(content, rounds=1), tmp_path / "other", plain)
    known = [header for header, _ in map(unpack, plain.up) if "about" in header]
    digests = [
        {about["digest"] for header in some for about in header["about"].values()}
        for some in (said, known)
    ]
    assert not digests[0] & digests[1]


def test_a_sum_without_noise_is_not_given_where_noise_is_promised(
    content: dict[str, Any], tmp_path: Path
) -> None:
    site = Site("site-0", SimulatedSite(0, 1), tmp_path, Here(tmp_path / "others"))

    def asked(**header: Any) -> tuple[dict[str, Any], Any]:
        said = version() if header["verb"] == "open" else {}
        return unpack(site.answer(pack({**said, **header}, NO_TENSORS)))

    spec = config.dump(parsed(content, privacy=CLIENTS))
    opening = {"verb": "open", "experiment": spec, "run": "r", "resumes": False, "is_known": True}
    about = asked(**opening, held_out=[])[0]["about"]
    ids = {name: k for k, name in enumerate(about)}
    asked(verb="number", ids=ids, sites={"site-0": list(range(len(ids)))})
    plain = asked(verb="contribute", own={0: "1.0"}, shares={0: 1.0})[0]
    assert "promise is not that of the sum" in plain["refused"]
    odd = asked(verb="contribute", own={}, shares={}, noisy={"round": 0, "call": 1, "norm": -1.0})
    assert "malformed" in odd[0]["refused"]


@pytest.mark.parametrize("level", ["client", "unit"])
@pytest.mark.long
def test_a_sites_own_limit_ends_its_part_over_all_runs(
    level: str, content: dict[str, Any], tmp_path: Path
) -> None:
    promise = CLIENTS if level == "client" else EXAMPLES
    spec = parsed(content, privacy=promise, patience={"min_clients": 1})
    hosts = [Limited(k, {level: 100.0}) for k in range(2)]
    first = run_to(spec, tmp_path / "one", Here(tmp_path / "sites", hosts))
    name = "epsilon" if level == "client" else "epsilon_units"
    spent = first.read_rows("metrics.jsonl")[-1][name]
    # room for one round more than a run has taken, over all runs
    hosts = [Limited(0, {level: 100.0}), Limited(1, {level: spent * 1.35})]
    second = run_to(spec, tmp_path / "two", Here(tmp_path / "sites", hosts))
    taken = [row["clients"] for row in second.read_rows("metrics.jsonl")]
    assert taken[0] == 4
    assert taken[-1] == 2, "the site with a limit has left"


class Limited(SimulatedSite):
    """A simulated site with limits of its own."""

    def __init__(self, number: int, limits: dict[str, float]) -> None:
        super().__init__(number, 2)
        self._limits = limits

    def host(self, experiment: Any, folder: Path, held_out: Any = ()) -> Any:
        from fedpref.experiments.clients import hosted

        spec = config.parse(Experiment, experiment, "the experiment")
        reading = spec.read().settled()
        numbers = range(self._number, len(reading.clients), self._sites)
        mine = {number: reading.clients[number] for number in numbers}
        return hosted(spec, mine, folder, max_epsilon=self._limits)


def test_a_site_asks_for_the_promise_that_its_file_names(
    content: dict[str, Any], tmp_path: Path
) -> None:
    limits = Limits(max_epsilon={"client": 4.0, "unit": 2.0})
    for privacy, message in (
        (None, "it promises no privacy of clients"),
        ({"unit": "client", "epsilon": 8, "delta": 0.01}, "epsilon of 8 is above"),
        ({"unit": "client", "epsilon": 3, "delta": 0.01}, "no privacy of what a client has"),
    ):
        with pytest.raises(RefusedError, match=message):
            limits.refuse(parsed(content, privacy=privacy))
    with pytest.raises(RefusedError, match=r"its delta of 0.5 is above limits.max_delta, 0.01"):
        Limits(max_epsilon={"client": 4.0}).refuse(
            parsed(content, privacy={"unit": "client", "epsilon": 1, "delta": 0.5})
        )
    both = [
        {"unit": "client", "epsilon": 3, "delta": 0.01},
        {"unit": "prompt", "epsilon": 2, "delta": 0.01},
    ]
    local = {"steps": 2, "batch_size": 4}
    algorithm = {"name": "feddpo", "aggregate": {"name": "frozen-a"}, "local": local}
    limits.refuse(parsed(content, privacy=both, algorithm=algorithm))
    file = tmp_path / "site.yaml"
    file.write_text(
        f"data: {{name: files, path: {content['data']['path']}}}\nalgorithms: [feddpo]\n"
        "limits: {max_epsilon: {unit: 2}}\n"
    )
    host, _ = consenting("s", file)
    assert host._file.limits.max_epsilon == {"unit": 2.0}


def test_a_message_that_is_no_change_as_promised_leaves_its_client_out(
    content: dict[str, Any], tmp_path: Path
) -> None:
    class Loud(Here):
        """A site whose integers are longer than any clipped change."""

        def ask(self, messages: Any, seconds: float) -> dict[str, bytes]:
            found = super().ask(messages, seconds)
            header, tensors = unpack(found.get("site-1", pack({})))
            if tensors and all(t.dtype == torch.int32 for t in tensors.values()):
                found["site-1"] = pack(header, {n: t * 100 + 9 for n, t in tensors.items()})
            return found

    spec = parsed(content, privacy=CLIENTS, patience={"min_clients": 1})
    run = run_to(spec, tmp_path / "run", Loud(tmp_path / "sites"))
    assert [row["late"] for row in run.read_rows("metrics.jsonl")] == [2, 2, 2]


@pytest.mark.long
def test_a_coordinator_that_asks_oftener_or_in_another_phase_gets_nothing_more(
    content: dict[str, Any], tmp_path: Path
) -> None:
    class Asking(Here):
        """Sites that are asked by hand, once a run has told them all that they need."""

        def said(self, site: str, tensors: Any = NO_TENSORS, **header: Any) -> dict[str, Any]:
            answer = self.all[site].answer(pack(header, tensors))
            found: dict[str, Any] = unpack(answer)[0]
            return found

    transport = Asking(tmp_path / "sites")
    privacy = {"unit": "example", "epsilon": 6.0, "delta": 0.02}
    spec = parsed(content, privacy=privacy)
    run_to(spec, tmp_path / "run", transport)
    site = transport.all["site-0"]
    theta = site._opened.task.init(torch.Generator())
    algorithm = config.dump(spec)["algorithm"]
    tensors = {f"0/{name}": tensor for name, tensor in theta.items()}
    arguments = [{"tree": 0}, {"own": {"0": "1.0"}}, {"plain": algorithm}]
    moments = {"verb": "each", "work": "common.no_moments", "args": [], "clients": [0]}
    for number, purpose in enumerate(("train", "join", "init")):
        transport.said(
            "site-0", **moments, purpose=purpose, round=0, call=90 + number, name=str(900 + number)
        )
        arguments[1] = {"own": {"0": f"{900 + number}.0"}}
        answer = transport.said(
            "site-0",
            tensors,
            verb="each",
            work="feddpo.train",
            args=arguments,
            clients=[0],
            purpose=purpose,
            round=0,
            call=50 + number,
            name=str(800 + number),
        )
        said = str(answer.get("refused", "")) + str(answer.get("failed", ""))
        assert "it failed" in said, answer
    assert not [name for name in site._values.names()[0] if name.startswith("80")]


def test_who_has_joined_a_run_does_not_train_in_it(content: dict[str, Any], tmp_path: Path) -> None:
    dumped = config.dump(parsed(content, privacy=EXAMPLES))
    site = Here(tmp_path).all["site-0"]
    for resumes in (False, True):  # what was written down holds for who comes back
        asked = {"experiment": dumped, "run": "run", "resumes": resumes, "is_known": True}
        opening = {"verb": "open", "held_out": [], **asked, **version()}
        names = list(unpack(site.answer(pack(opening, NO_TENSORS)))[0]["about"])
        ids = {name: k for k, name in enumerate(names)}
        numbered = {"verb": "number", "ids": ids, "sites": {"site-0": list(ids.values())}}
        assert "refused" not in unpack(site.answer(pack(numbered, NO_TENSORS)))[0]
        privacy = site._privacy
        assert privacy is not None
        if not resumes:
            privacy.refuse_joined("train", [0, 1])
            privacy.refuse_joined("join", [0])
        privacy.refuse_joined("train", [1])
        with pytest.raises(RefusedError, match="does not train in it"):
            privacy.refuse_joined("train", [0, 1])


@pytest.mark.parametrize(
    "name", ["a/checkpoints/round-000001", "a/Checkpoints.1", "privacy", "a/cache", "round-7"]
)
def test_no_run_lies_in_what_a_site_keeps_of_another(name: str) -> None:
    with pytest.raises(ValueError, match="is what a site calls a folder"):
        run_name(name)
    assert run_name("a/baselines/alone") == "a/baselines/alone"


def test_the_secret_is_not_handed_over_with_a_jobs_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, result = tmp_path / "run", tmp_path / "job"
    Secret.of(folder / "privacy")
    (folder / "privacy/ledger.jsonl").write_text("")
    place = SimpleNamespace(get_run_dir=lambda number: str(result))
    context = SimpleNamespace(get_workspace=lambda: place, get_job_id=lambda: "1")
    monkeypatch.setattr(programs, "collab", SimpleNamespace(fl_ctx=context))
    programs._hand_over(RunDirectory(folder))
    assert [file.name for file in result.rglob("*") if file.is_file()] == ["ledger.jsonl"]


# ---- coordinators that lie


def consented(content: dict[str, Any], folder: Path, limits: str = "{}") -> Site:
    """A site with sixty pairs of one client."""
    folder.mkdir(exist_ok=True)
    mine = [{**row, "client": "c"} for row in make_rows([60])]
    rows = write_rows(folder / "mine.jsonl", mine)
    (folder / "site.yaml").write_text(
        f"data: {{name: files, path: {rows}, test_fraction: 0.3}}\n"
        "partition: {name: natural, column: client}\n"
        f"algorithms: [feddpo]\nmodels: {{m: {content['task']['model']['path']}}}\n"
        f"limits: {limits}\n"
    )
    host, where = consenting("s", folder / "site.yaml")
    return Site("s", host, where, None)  # type: ignore[arg-type]


def said(site: Site, tensors: Any = NO_TENSORS, **header: Any) -> Any:
    answer, tree = unpack(site.answer(pack(header, tensors)))
    if "refused" in answer:
        raise RefusedError(answer["refused"])
    return answer, tree


def opened_with(site: Site, content: dict[str, Any], **changes: Any) -> tuple[Experiment, Any]:
    task = {**content["task"], "model": {**content["task"]["model"], "path": "m"}}
    task = {**task, **changes.pop("task", {})}
    data = {"data": {"name": "files", "path": "x"}, "partition": {"name": "natural"}}
    spec = parsed(content, **{**data, "rounds": 200, **changes, "task": task})
    head = {"experiment": config.dump(spec), "run": "r", "resumes": False}
    answer, _ = said(site, **version(), verb="open", is_known=True, held_out=[], **head)
    return spec, answer["about"]


def trained(site: Site, spec: Experiment, round: int, name: str) -> None:
    theta = site._opened.task.init(torch.Generator().manual_seed(0))
    args = [{"tree": 0}, {"own": {0: "1.0"}}, {"plain": config.dump(spec)["algorithm"]}]
    where = {"args": args, "call": 1, "name": name, "clients": [0], "round": round}
    tree = trees.nest({0: theta})
    answer, _ = said(site, tree, verb="each", work="feddpo.train", purpose="train", **where)
    assert not answer["failed"], answer


def begun(site: Site, sites: dict[str, list[int]]) -> None:
    said(site, verb="number", ids={"c": 0}, sites=sites)
    where = {"args": [], "call": 1, "name": "1", "clients": [0], "round": 0}
    said(site, verb="each", work="common.no_moments", purpose="init", **where)


PLAIN = {
    "steps": 1,
    "batch_size": 8,
    "optim": "sgd",
    "learning_rate": 1.0,
    "max_grad_norm": 1e9,
    "lr_scheduler_type": "constant",
    "warmup_ratio": 0.0,
}
FEDDPO = {"name": "feddpo", "aggregate": {"name": "frozen-a"}, "local": PLAIN}


def test_noise_of_another_size_is_another_noise(content: dict[str, Any], tmp_path: Path) -> None:
    site = consented(content, tmp_path / "s", "{max_epsilon: {unit: 30}, max_delta: 0.02}")
    sent = []
    for multiplier in (1.0, 4.0):
        privacy = {**EXAMPLES, "noise_multiplier": multiplier, "metrics": "none"}
        privacy["clip"] = {"name": "fixed", "norm": 0.1}
        spec, _ = opened_with(site, content, algorithm=FEDDPO, privacy=privacy, rounds=1)
        begun(site, {"s": [0]})
        trained(site, spec, 0, "2")
        _, tree = said(site, verb="contribute", own={0: "2.0"}, shares={0: 1.0})
        sent.append(torch.cat([tree[name].flatten().double() for name in sorted(tree)]))
    # of one noise at two sizes the smaller could be taken away
    assert abs(float(torch.corrcoef(torch.stack(sent))[0, 1])) < 0.5
    (ledger,) = tmp_path.rglob(f"{ledger_file('c')}")
    assert len(ledger.read_text().splitlines()) == 2


def test_of_private_rows_their_number_alone_is_told(
    content: dict[str, Any], tmp_path: Path
) -> None:
    site = consented(content, tmp_path / "s")
    short = {"task": {"max_length": 24, "truncation_mode": "keep_start"}, "algorithm": FEDDPO}
    _, about = opened_with(site, content, **short, privacy={**EXAMPLES, "metrics": "none"})
    assert about["c"].keys() == {"train", "test", "truncated", "conversations", "digest"}
    assert (about["c"]["truncated"], about["c"]["conversations"]) == (0, 0)


def test_a_client_is_not_drawn_oftener_than_its_chance_has_it(
    content: dict[str, Any], tmp_path: Path
) -> None:
    site = consented(content, tmp_path / "s", "{max_epsilon: {client: 1.0}}")
    drawn = {"weighting": "equal", "sampling": "poisson", "clients_per_round": 2}
    privacy = {**CLIENTS, "delta": 1e-6, "metrics": "none"}
    local = {"algorithm": {**FEDDPO, "local": {**PLAIN, "batch_size": 32}}}
    spec, _ = opened_with(site, content, **local, privacy=privacy, federation=drawn)
    begun(site, {"s": [0], "x": list(range(1, 10**4))})

    def sent(round: int) -> None:
        trained(site, spec, round, str(2 + round))
        noisy = {"round": round, "call": 2, "norm": 0.5}
        said(site, verb="contribute", own={0: f"{2 + round}.0"}, shares={}, noisy=noisy)

    for round in (0, 1):
        sent(round)
    with pytest.raises(RefusedError, match=r"drawn in 3 of 3 rounds.*fewer clients than is said"):
        sent(2)


def test_clients_are_numbered_once(content: dict[str, Any], tmp_path: Path) -> None:
    site = consented(content, tmp_path / "s", "{max_calls: 2}")
    opened_with(site, content, algorithm={**FEDDPO, "local": {**PLAIN, "batch_size": 16}})
    begun(site, {"s": [0]})
    with pytest.raises(RefusedError, match="have their numbers already"):
        said(site, verb="number", ids={"c": 1}, sites={"s": [1]})


def test_layers_are_no_pattern_of_a_coordinators(content: dict[str, Any], tmp_path: Path) -> None:
    site = consented(content, tmp_path / "s")
    model = {**content["task"]["model"], "path": "m", "lora_target_modules": r"((\w|\.)+)+!"}
    with pytest.raises(RefusedError, match="is a pattern"):
        opened_with(site, content, algorithm=FEDDPO, task={"model": model})
