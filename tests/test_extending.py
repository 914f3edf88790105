"""Parts of one's own, named in a config: what docs/extending.md shows, and what does not fit."""

from __future__ import annotations

import importlib.metadata
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from conftest import ROOT, make_rows, write_rows
from fedpref import Experiment, FinishedRun, UserError, cli, config
from fedpref.cli import shared
from fedpref.engines.messages import RefusedError
from fedpref.federation.verbs import WORK
from fedpref.sites.consent import Consenting, SiteFile
from fedpref.types import _installed

BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", (ROOT / "docs/extending.md").read_text(), re.M | re.S)
Command = Callable[..., tuple[int, str]]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder with the files that the document shows, on the Python path."""
    for language, text in BLOCKS:
        if name := re.match(r"# (\w+\.(?:py|yaml))\n", text):
            assert language in ("python", "yaml")
            (tmp_path / name[1]).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    known = set(sys.modules), set(WORK)
    yield tmp_path
    for module in set(sys.modules) - known[0]:
        if module.startswith("my_") or module in ("bad", "loud"):
            del sys.modules[module]
    for name in set(WORK) - known[1]:
        del WORK[name]


@pytest.fixture
def fedpref(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    monkeypatch.setattr(shared.console, "_width", 200)

    def call(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["fedpref", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        output = capfd.readouterr()
        return int(ended.value.code or 0), output.out + output.err

    return call


@pytest.mark.slow
def test_the_document_runs_from_an_empty_folder(folder: Path, fedpref: Command) -> None:
    lines = "".join(text for language, text in BLOCKS if language == "bash").splitlines()
    assert len(lines) == 5
    for line in lines:
        code, text = fedpref(*shlex.split(line)[1:])
        assert code == 0, f"{line}\n{text}"
    run = FinishedRun.at("runs/mine")
    assert run.experiment.algorithm.name == "server-momentum"
    assert config.read(run.path / "config.yaml")["algorithm"]["name"] == "my_parts:ServerMomentum"
    assert FinishedRun.at("runs/parts").clients.keys() == {"long", "short"}
    code, text = fedpref("list", "my_parts:ServerMomentum")
    assert (code, "How much of the last change is added." in text) == (0, True)
    code, text = fedpref("list", "my_parts:Nothing")
    assert (code, "my_parts" in text, "Nothing" in text) == (2, True, True)


@pytest.mark.long
def test_a_run_of_ones_own_algorithm_is_resumed_and_swept(
    folder: Path, fedpref: Command, settings: dict[str, Any]
) -> None:
    own = {"name": "my_parts:ServerMomentum", "local": settings["algorithm"]["local"]}
    (folder / "tiny.yaml").write_text(yaml.dump({**settings, "algorithm": own, "rounds": 2}))
    code, text = fedpref(
        "sweep",
        "tiny.yaml",
        *("--variant", "feddpo", "--variant", "my_parts:ServerMomentum"),
        *("--variant", "slow: algorithm=my_parts:ServerMomentum algorithm.share=0.1"),
        *("--seeds", 1, "--output", "swept"),
    )
    assert code == 0, text
    shares = [
        FinishedRun.at(f"swept/{variant}/seed-0").experiment.algorithm.share  # type: ignore[attr-defined]
        for variant in ("ServerMomentum", "slow")
    ]
    assert shares == [0.5, 0.1]
    code, text = fedpref("run", "tiny.yaml", "--output", "out")
    assert code == 0
    (folder / "out/done").unlink()
    code, text = fedpref("resume", "out")
    assert code == 0, text


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("class Part: pass", "not derived from fedpref.federation.algorithm.Algorithm"),
        ("Part = 3", "it is no class"),
        ("raise OSError('no such disk')", "cannot be imported (OSError: no such disk)"),
        (
            "from fedpref import Algorithm\nclass Part(Algorithm):\n  name = 'part'",
            "it lacks init, local, model, step",
        ),
        (
            "import my_parts\nclass Part(my_parts.ServerMomentum): pass",
            "it is no frozen dataclass",
        ),
        (
            "import my_parts\nfrom dataclasses import dataclass\nfrom typing import Literal\n"
            "@dataclass(frozen=True, kw_only=True)\nclass Part(my_parts.ServerMomentum):\n"
            "  name: Literal['feddpo'] = 'feddpo'",
            "give it another",
        ),
        (
            "import my_parts\nfrom dataclasses import dataclass\n"
            "@dataclass(frozen=True, kw_only=True)\nclass Part(my_parts.ServerMomentum):\n"
            "  name: str = 'part'\n  odd: 'Nowhere' = 3",
            "its fields cannot be read",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_trained(
    code: str, says: str, folder: Path, fedpref: Command
) -> None:
    (folder / "bad.py").write_text(code + "\n")
    status, text = fedpref("run", "mine.yaml", "algorithm=bad:Part", "--output", "out")
    assert (status, says in text) == (2, True), text
    assert not (folder / "out").exists()


def test_mistakes_in_the_settings_of_ones_own_part_are_named(
    folder: Path, fedpref: Command
) -> None:
    for setting, says in (
        ("algorithm.shares=0.1", "unknown key 'shares'. Did you mean 'share'?"),
        ("algorithm.share=much", "share: input should be a valid number"),
        ("algorithm.local.step=3", "unknown key 'local.step'. Did you mean 'steps'?"),
    ):
        status, text = fedpref("check", "mine.yaml", setting)
        assert (status, says in text) == (2, True), text


def test_an_entry_point_gives_a_part_a_short_name(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    point = importlib.metadata.EntryPoint(
        "momentum", "my_parts:ServerMomentum", "fedpref.algorithms"
    )
    monkeypatch.setattr(
        "fedpref.types.entry_points",
        lambda group: [point] if group == point.group else [],
    )
    _installed.cache_clear()
    try:
        spec = Experiment.load("mine.yaml", ["algorithm=momentum"])
        assert config.dump(spec)["algorithm"]["name"] == "momentum"
        assert config.parse(Experiment, config.dump(spec), "again") == spec
    finally:
        _installed.cache_clear()


@pytest.mark.long
def test_editors_accept_parts_of_ones_own(folder: Path) -> None:
    schema = config.schema(Experiment)
    for file in ("mine.yaml", "parts.yaml", "reward.yaml"):
        jsonschema.validate(yaml.safe_load((folder / file).read_text()), schema)
    wrong = {"algorithm": {"name": "nothing"}}
    assert not jsonschema.Draft202012Validator(schema).is_valid(wrong)


def test_a_site_imports_nothing_that_it_has_not_consented_to(folder: Path) -> None:
    (folder / "loud.py").write_text("open('imported', 'w').close()\n")
    write_rows(folder / "rows.jsonl", make_rows([8]))

    def site(**consent: Any) -> Consenting:
        limits = {"least_examples": 1, "least_batch": 1, "least_evaluated": 1}
        data = {"name": "files", "path": "rows.jsonl"}
        content = {"data": data, "limits": limits, **consent}
        (folder / "site.yaml").write_text(yaml.dump(content))
        return Consenting("clinic", SiteFile.load(folder / "site.yaml"))

    for part in (
        {"algorithm": {"name": "loud:Part"}},
        {"task": {"loss": "loud:Part"}},
        {"data": {"name": "loud:Part"}},
        {"task": {"name": "dialogue", "rewards": {"x": {"name": "loud:Part"}}}},
    ):
        with pytest.raises(RefusedError, match="none of what is consented to"):
            site(algorithms=["feddpo"]).host(part, folder / "cache")
        assert not (folder / "imported").exists()
    mine = config.dump(Experiment.load("mine.yaml", ["baselines=[]"]))
    with pytest.raises(RefusedError, match="none of what is consented to"):
        site(algorithms=["feddpo", "server-momentum"]).host(mine, folder / "cache")
    hosted = site(algorithms=["my_parts:ServerMomentum"]).host(mine, folder / "cache")
    assert hosted.does("server-momentum.train", "train")
    with pytest.raises(UserError):
        config.parse(Experiment, {"algorithm": {"name": "nothing:Part"}}, "mine")
