"""Settings: their sentences, tables, schema, former names; runs and files of older versions."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import typer
import yaml

from conftest import ROOT
from fedpref import Experiment, FinishedRun, UserError, cli, config, resume, run
from fedpref.data import IID
from fedpref.experiments.migration import migrated, migrated_text
from fedpref.experiments.run_directory import RunDirectory
from fedpref.losses.preference import IPO
from fedpref.reports.comparison import compare
from fedpref.reports.page import write_report
from fedpref.reports.settings import Kind, markdown, named_kinds
from fedpref.runs.export import export
from fedpref.sites.consent import SiteFile

KINDS = [kind for kinds in named_kinds().values() for kind in kinds]
OLD = """# what the clinics agreed on
name: old
references: [local, centralised]  # to compare with
task:
  estimator: {name: ppo, normalise: false}
algorithm:
  name: scalarised
  preference: [0.7, 0.3]
"""
NEW = """# what the clinics agreed on
name: old
baselines: [alone, pooled]  # to compare with
task:
  estimator: {name: ppo, normalize: false}
algorithm:
  name: scalarized
  preference: [0.7, 0.3]
"""


# ---- sentences and tables


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.title)
def test_every_setting_has_a_sentence(kind: Kind) -> None:
    assert kind.sentence.endswith(".")
    for setting in kind.settings:
        assert setting.sentence.endswith((".", ".)")), f"{kind.title}.{setting.key}"
        assert setting.type != "anything", f"{kind.title}.{setting.key}"


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.title)
def test_settings_cannot_be_changed_once_they_are_made(kind: Kind) -> None:
    keeps_a_history = kind.title == "alpha"
    assert kind.source.__dataclass_params__.frozen != keeps_a_history


@pytest.mark.parametrize(
    "kind",
    [kind for group in ("algorithms", "losses", "estimators") for kind in named_kinds()[group]],
    ids=lambda kind: kind.title,
)
def test_settings_of_methods_are_given_by_name(kind: Kind) -> None:
    with pytest.raises(TypeError, match="positional"):
        kind.source("name")


def test_no_kind_of_settings_is_missing_from_the_tables() -> None:
    kinds = {*config.dataclasses_of(Experiment), *config.dataclasses_of(SiteFile)}
    assert len(kinds) > 50
    assert kinds - {kind.source for kind in KINDS} == set()


def test_a_setting_without_a_sentence_is_seen() -> None:
    @dataclasses.dataclass
    class Mine:
        """Settings."""

        rate: float = 0.1
        steps: int = 1
        """How many."""

    assert [setting.sentence for setting in Kind(Mine, ()).settings] == ["", "How many."]


def test_a_table_says_type_bounds_and_default() -> None:
    text = markdown()
    assert "| `rounds` | whole number ≥ 1 | `10` | How many rounds are trained. |" in text
    assert "| `seed` | whole number ≥ 0 | `0` |" in text
    assert "### feddpo\n" in text


def test_the_page_of_settings_has_todays_defaults() -> None:
    assert markdown() == (ROOT / "docs/settings.md").read_text(), "`make references` writes it"


@pytest.mark.skipif(
    f"typer=={typer.__version__}\n" not in (ROOT / "constraints.txt").read_text(),
    reason="another version of typer writes the page of commands otherwise",
)
@pytest.mark.long
def test_references_are_what_the_code_says() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts/references.py"), "--check"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["losses", "feddpo", "kto"])
def test_list_prints_a_kind_or_one_of_its_names(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["fedpref", "list", name])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    text = capsys.readouterr().out
    assert not ended.value.code
    assert {"losses": "simpo", "feddpo": "aggregate", "kto": "desirable_weight"}[name] in text


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("3\n", "expected keys and values, found '3'"),
        ("[1, 2]\n", "expected keys and values"),
        ("rounds: yes\n", "rounds: value error, a number is wanted, not true or false"),
        ("task: {loss: {name: dpo, beta: .inf}}\n", "task.loss.beta: input should be a finite"),
        ("algorithm: {local: {learning_rate: .nan}}\n", "learning_rate: input should be"),
        ('name: "a\\0b"\n', "name: value error, a name is of letters that can be printed"),
        ("name: ' '\n", "letters that can be printed"),
    ],
)
def test_values_that_are_no_settings_are_a_sentence(text: str, says: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=re.escape(says)) as caught:
        Experiment.load(file)
    assert "is now called" not in str(caught.value)


def test_an_override_of_a_kinds_key_leaves_the_files_short_name(tmp_path: Path) -> None:
    file = tmp_path / "short.yaml"
    file.write_text("algorithm: scaffold\ntask: {loss: ipo}\npartition: iid\n")
    changed = ["algorithm.local.steps=2", "task.loss.beta=0.2", "partition.clients=3"]
    spec = Experiment.load(file, changed)
    assert (spec.algorithm.name, spec.algorithm.local.steps) == ("scaffold", 2)
    assert spec.task.loss == IPO(beta=0.2)  # type: ignore[union-attr]
    assert spec.partition == IID(clients=3)
    assert Experiment.load(file, ["algorithm.name=fedprox"]).algorithm.name == "fedprox"


def test_an_override_that_is_empty_empties(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    rewards = "{a: {name: length}, b: {name: length}}"
    file.write_text(f"task: {{name: dialogue, estimator: {{name: rloo}}, rewards: {rewards}}}\n")
    both = Experiment.load(file, ["task.rewards={c: {name: length}}"])
    assert sorted(both.task.objectives) == ["a", "b", "c"]
    only = Experiment.load(file, ["task.rewards={}", "task.rewards={c: {name: length}}"])
    assert list(only.task.objectives) == ["c"]


def test_the_schema_takes_our_files_and_no_other_key() -> None:
    schema = config.schema(Experiment)
    jsonschema.Draft202012Validator.check_schema(schema)
    judge = jsonschema.Draft202012Validator(schema)
    kept = {
        field.name
        for kind in config.dataclasses_of(Experiment)
        for field in dataclasses.fields(kind)
        if not field.init
    }
    assert kept, "some keep what is no setting"
    parts = schema["$defs"].values()
    assert not kept & {name for part in parts for name in part.get("properties", {})}
    for file in (ROOT / "configs").glob("*.yaml"):
        content = yaml.safe_load(file.read_text())
        if content["data"]["name"] not in ("builtin", "domains"):
            content["data"].setdefault("path", "given-on-the-command-line")
        assert not list(judge.iter_errors(content)), file.name
    for wrong in ({"rouns": 3}, {"rounds": 0}, {"task": {"loss": {"name": "dpo", "bata": 1}}}):
        assert list(judge.iter_errors(wrong)), wrong


# ---- former names


def test_a_former_key_is_an_error_that_names_the_new_one(tmp_path: Path) -> None:
    file = tmp_path / "old.yaml"
    file.write_text(OLD)
    with pytest.raises(UserError) as raised:
        Experiment.load(file)
    text = str(raised.value)
    assert "'references' is now called 'baselines'" in text
    assert "'scalarised' is now called 'scalarized'" in text
    assert f"`fedpref migrate {file}`" in text
    (tmp_path / "new.yaml").write_text("baselines: []")
    with pytest.raises(UserError, match="'references' is now called 'baselines'"):
        Experiment.load(tmp_path / "new.yaml", ["references=[local]"])


def test_migrating_changes_names_and_keeps_all_else() -> None:
    assert migrated_text(OLD) == NEW
    assert migrated_text(NEW) == NEW
    assert migrated(yaml.safe_load(OLD)) == yaml.safe_load(NEW)
    # A word is a former name only where it was one
    other = "name: local\ndata: {name: files, path: centralised}\n"
    assert migrated_text(other) == other
    assert migrated_text("baselines: [&a centralised, *a]") == "baselines: [&a pooled, *a]"
    assert migrated_text("'references': ['local']") == "'baselines': ['alone']"
    assert migrated_text(r'baselines: ["loc\u0061l"]') == "baselines: [alone]"
    with pytest.raises(UserError, match="not valid YAML"):
        migrated_text("a: [1")
    with pytest.raises(UserError, match="not valid YAML"):
        migrated_text("a: &a {b: *a}")
    for text in ("- rounds: 5\n", "5", ""):
        with pytest.raises(UserError, match="a mapping of settings"):
            migrated_text(text)


def test_migrate_writes_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, goal = tmp_path / "old.yaml", tmp_path / "new.yaml"
    file.write_text(OLD)
    for arguments in ([str(file), "--output", str(goal)], [str(file)], [str(file)]):
        monkeypatch.setattr(sys, "argv", ["fedpref", "migrate", *arguments])
        with pytest.raises(SystemExit):
            cli.main()
        assert goal.read_text() == NEW
    assert file.read_text() == NEW
    assert "nothing to change" in capsys.readouterr().out


# ---- runs of other versions


@pytest.fixture(scope="module")
def former(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run as version 0.1.0 left it: format 1, with the names of then."""
    path = tmp_path_factory.mktemp("former") / "run"
    content = {**settings, "rounds": 1, "baselines": ["alone", "pooled"]}
    run(config.parse(Experiment, content, "former"), path)
    (path / "version.json").unlink()
    (path / "baselines").rename(path / "references")
    (path / "references/alone").rename(path / "references/local")
    (path / "references/pooled").rename(path / "references/centralised")
    for file in path.rglob("config.yaml"):
        text = file.read_text().replace("baselines:", "references:")
        file.write_text(text.replace("- alone", "- local").replace("- pooled", "- centralised"))
    assert "references:" in (path / "config.yaml").read_text()
    return path


def test_a_finished_run_of_format_1_is_reported_compared_and_exported(
    former: Path, tmp_path: Path
) -> None:
    finished = FinishedRun.at(former)
    assert set(finished.lines) == {"feddpo", "alone", "pooled"}
    assert set(finished.result().evaluations) == {"feddpo", "alone", "pooled"}
    report = write_report([former], tmp_path / "report.html").read_text()
    assert "pooled" in report
    assert [row.name for row in compare([former])] == ["experiment"]
    assert (export(former, "peft", tmp_path / "out") / "manifest.json").is_file()


def test_what_a_run_does_not_have_is_named(
    former: Path, settings: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="no line 'local'; its lines are feddpo, alone, pooled"):
        FinishedRun.at(former).evaluations("local")
    begun = RunDirectory(tmp_path / "begun")
    begun.create({"config.yaml": config.to_yaml(config.parse(Experiment, settings, "test"))})
    finished = FinishedRun.at(begun.path)
    with pytest.raises(UserError, match="has not begun"):
        finished.clients  # noqa: B018
    with pytest.raises(UserError, match=r"not finished\. `fedpref resume"):
        finished.result()


def test_a_run_of_another_format_does_not_go_on(former: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"format 1, by fedpref 0\.1\.0 or older, which is older"):
        resume(former)
    folder = RunDirectory(tmp_path / "newer")
    folder.create({"config.yaml": ""})
    assert folder.format == 3
    (folder.path / "version.json").write_text(json.dumps({"format": 4, "fedpref": "9.9"}))
    with pytest.raises(UserError, match=r"format 4, by fedpref 9\.9; this fedpref .* is older"):
        FinishedRun.at(folder.path)
    for text in ("", "{}", "[1]", '{"format": "x", "fedpref": "1"}'):
        (folder.path / "version.json").write_text(text)
        with pytest.raises(UserError, match=r"version\.json: expected"):
            FinishedRun.at(folder.path)


VALIDATED = ("data.validation_fraction=0.2", "evaluate_every=1")


@pytest.mark.parametrize(
    ("config_name", "override", "says"),
    [
        (
            "firm",
            "task.rewards.brief.targt=3",
            r"'task.rewards.brief.targt'. Did you mean 't",
        ),
        ("firm", "task.rewards.brief.target=-1", r"task.rewards.brief.target: input should be gr"),
        ("firm", "task.rewards.brief.name=lenght", r"task.rewards.brief.name is 'lenght'"),
        ("feddpo", "stop={metric: foo}", r"stop.metric: .* do not measure 'foo'"),
        ("feddpo", "stop={metric: foo/dpo}", r"stop.metric: .* do not measure 'foo/dpo'"),
        ("feddpo", "federation.newcomers=[bank,bank]", "a name is there twice"),
        ("firm", "algorithm.preference=[.inf,1]", r"algorithm.preference.0: .* finite"),
        ("pluralllm", "algorithm.name=firm", "a predictor of opinions has one loss"),
    ],
)
def test_a_mistake_in_a_named_part_names_it(config_name: str, override: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        Experiment.load(ROOT / f"configs/{config_name}.yaml", [override, *VALIDATED])
