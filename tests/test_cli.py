"""The command line from end to end, and every mistake of a user's as a sentence with exit code 2
and nothing left behind.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pytest
import typer
from omegaconf import OmegaConf
from rich.console import Console

from conftest import ROOT, make_rows, write_rows
from fedpref import Experiment, FinishedRun, __version__, cli, config
from fedpref.cli import shared
from fedpref.data import hub
from fedpref.experiments.rounds import Event
from fedpref.experiments.run_directory import RunDirectory
from fedpref.reports.progress import show

ROWS = make_rows([12, 10])
Command = Callable[..., tuple[int, str]]


@pytest.fixture
def fedpref(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> Command:
    """Call the command line in an empty directory: (exit code, all that it printed)."""
    workplace = tmp_path / "workplace"
    workplace.mkdir()
    monkeypatch.chdir(workplace)
    monkeypatch.setattr(shared.console, "_width", 200)

    def call(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["fedpref", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        output = capfd.readouterr()
        return int(ended.value.code or 0), output.out + output.err

    return call


@pytest.fixture
def file(settings: dict[str, Any], tmp_path: Path) -> Path:
    OmegaConf.save(OmegaConf.create({**settings, "rounds": 2}), tmp_path / "quick.yaml")
    return tmp_path / "quick.yaml"


@pytest.mark.long
def test_a_run_ends_with_a_table_and_its_directory_and_loads_in_peft(
    fedpref: Command, file: Path, tiny: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    code, text = fedpref("run", file, "rounds=1", "baselines=[alone]", "--output", "out")
    assert code == 0
    for part in ("client-3", "feddpo", "alone", "worst client", "Jain index", "run directory: out"):
        assert part in text
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), "out/adapter")
    code, text = fedpref("resume", "out")
    assert code == 0
    assert "out: the run is finished" in text
    for place in ("out", "out/config.yaml/page.html"):
        code, text = fedpref("report", "out", "--output", place)
        assert code == 2
        assert text.startswith("error: ")


def test_an_interruption_says_how_to_go_on(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def stopped() -> Iterator[Event]:
        yield Event("feddpo", "begin", 0, 2, {}, "")
        raise KeyboardInterrupt

    with pytest.raises(typer.Exit) as ended:
        shared.follow(stopped(), RunDirectory(tmp_path))
    assert ended.value.exit_code == 130
    assert f"`fedpref resume {tmp_path}`" in capfd.readouterr().out.replace("\n", "")


def test_the_time_left_is_that_of_the_last_rounds(capfd: pytest.CaptureFixture[str]) -> None:
    figures = {"seconds": 30.0, "bytes_up": 0.0, "bytes_down": 0.0}
    show((Event("feddpo", "round", done, 50, figures) for done in (1, 48)), shared.console)
    out = capfd.readouterr().out
    terminal = Console(force_terminal=True, width=120, record=True)
    events = [
        Event("feddpo", "round", 1, 1, figures),
        Event("feddpo", "evaluate", 1, 1, {"mean": 0.6, "worst": 0.5}, "pair accuracy"),
    ]
    show(iter(events), terminal)
    assert "held-out 0.600" in terminal.export_text(), "the last evaluation is seen"
    assert "0:24:30 left" in out
    assert "0:01:00 left" in out


def test_runs_without_a_name_of_their_own_go_to_runs(fedpref: Command, file: Path) -> None:
    assert fedpref("run", file, "rounds=1", "name=trial")[0] == 0
    (made,) = Path("runs").iterdir()
    assert made.name.startswith("trial-")


def test_check_shows_clients_and_writes_nothing(fedpref: Command, file: Path) -> None:
    code, text = fedpref("check", file)
    assert code == 0
    assert "4 clients" in text
    assert "is valid" in text
    assert not list(Path.cwd().iterdir())


def test_a_name_that_nearly_is_one_is_told_which(fedpref: Command) -> None:
    code, text = fedpref("list", "aglorithms")
    assert code == 2
    assert "'aglorithms' is neither a kind nor a name; did you mean 'algorithms'?" in text
    code, text = fedpref("list", "qqqqqq")
    assert "is neither a kind nor a name. Kinds are" in text


def test_list_names_everything_that_a_config_can_name(fedpref: Command) -> None:
    code, text = fedpref("list")
    assert code == 0
    for name in (
        "feddpo",
        "pooled",
        "ipo",
        "orpo",
        "preference",
        "ukpconvarg",
        "dirichlet",
        "by-size",
    ):
        assert name in text


def test_the_version_and_the_help_are_there(fedpref: Command) -> None:
    assert __version__ in fedpref("--version")[1]
    assert "resume" in fedpref("--help")[1]


def without(row: dict[str, str], column: str) -> dict[str, str]:
    return {name: value for name, value in row.items() if name != column}


LONG = {**ROWS[0], "prompt": "Human: " + "word " * 200 + "\n\nAssistant:"}
BAD_ROWS = {
    "no column 'rejected'": [*ROWS, without(ROWS[0], "rejected")],
    "which the row does not have": [*ROWS, without(ROWS[0], "client")],
    "column 'chosen': expected text": [*ROWS, {**ROWS[0], "chosen": " "}],
    "identical": [*ROWS, {**ROWS[0], "rejected": ROWS[0]["chosen"]}],
    "task.max_length is 96": [*ROWS, LONG],
}


@pytest.mark.parametrize("message", BAD_ROWS)
def test_a_bad_row_is_named(message: str, fedpref: Command, file: Path, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "bad.jsonl", BAD_ROWS[message])
    code, text = fedpref("run", file, f"data.path={path}")
    assert code == 2
    assert message in text
    assert f"{path}, line {len(ROWS) + 1}" in text
    assert "Traceback" not in text
    assert not list(Path.cwd().iterdir())


def test_a_client_without_held_out_rows_is_named(
    fedpref: Command, file: Path, tmp_path: Path
) -> None:
    path = write_rows(tmp_path / "bad.jsonl", [*ROWS, {**ROWS[0], "client": "hermit"}])
    code, text = fedpref("run", file, f"data.path={path}")
    assert code == 2
    assert "(hermit)" in text
    assert "rows" in text
    assert not list(Path.cwd().iterdir())


def test_an_override_of_a_kind_drops_what_only_the_former_kind_has(
    fedpref: Command, file: Path
) -> None:
    code, text = fedpref("check", file, "partition={name: iid, clients: 3}")
    assert (code, "3 clients" in text) == (0, True)
    spec = Experiment.load(
        file, ["algorithm.name=alone", "partition.name=by-size", "partition.clients=2"]
    )
    assert spec.algorithm.local == Experiment.load(file).algorithm.local
    code, text = fedpref("check", file, "partition.name=iid", "partition.column=x")
    assert (code, "unknown key 'partition.column'" in text) == (2, True)


def test_a_conversation_that_the_template_refuses_is_named(
    fedpref: Command, file: Path, tiny: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny, tmp_path / "strict")
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no such role') }}")
    answers = {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    rows: list[Any] = [
        {"prompt": [{"role": "user", "content": f"Hi {i}?"}], **answers, "client": "a"}
        for i in range(20)
    ]
    path = write_rows(tmp_path / "chat.jsonl", rows)
    code, text = fedpref("run", file, f"data.path={path}", f"task.model.path={folder}")
    assert code == 2
    assert "refuses the conversation: no such role" in text
    assert f"{path}, line" in text
    assert not list(Path.cwd().iterdir())


@pytest.mark.long
def test_an_answer_is_asked_for_as_in_training(
    fedpref: Command, file: Path, tiny: Path, tmp_path: Path
) -> None:
    answers = {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    rows: list[Any] = [
        {"prompt": [{"role": "user", "content": f"Hi {i}?"}], **answers, "client": "a"}
        for i in range(20)
    ]
    chats = write_rows(tmp_path / "chat.jsonl", rows)
    asked = ("Hi?", "--max-new-tokens", "8", "--seed", "3")
    for name, as_in_training, other in (
        ("plain", "--plain", "--chat"),
        ("chat", "--chat", "--plain"),
    ):
        data = () if name == "plain" else (f"data.path={chats}",)
        assert fedpref("run", file, "rounds=1", *data, "--output", name)[0] == 0
        code, text = fedpref("generate", name, *asked)
        assert code == 0, text
        assert text == fedpref("generate", name, *asked, as_in_training)[1]
        assert text != fedpref("generate", name, *asked, other)[1]
    config = Path("plain/adapter/tokenizer_config.json")
    config.write_text(json.dumps({**json.loads(config.read_text()), "chat_template": None}))
    Path("plain/adapter/chat_template.jinja").unlink(missing_ok=True)
    code, text = fedpref("generate", "plain", *asked, "--chat")
    assert code == 2
    assert "no chat template" in text


BAD_CONFIGS = {
    "unknown key 'algorithm.local.learning_rat'. Did you mean 'learning_rate'?": [
        "algorithm.local.learning_rat=0.1"
    ],
    "unknown key 'sneed'. Did you mean 'seed'?": ["sneed=1"],
    "algorithm.name is 'fedpo'": ["algorithm.name=fedpo"],
    "Did you mean 'feddpo'?": ["algorithm.name=fedpo"],
    "rounds: input should be greater than or equal to 1; found 0": ["rounds=0"],
    "task.loss.beta": ["task.loss.beta=-1"],
    "expected key=value": ["rounds"],
    "could not be loaded as a Hub dataset": ["data.path=nobody/nothing-at-all"],
    "could not be loaded as a causal language model": ["task.model.path=nobody/nothing-at-all"],
    "no file or folder": ["data.path=absent.jsonl"],
}


@pytest.mark.parametrize("message", BAD_CONFIGS)
@pytest.mark.parametrize("command", ["run", "check"])
def test_a_bad_setting_is_named(command: str, message: str, fedpref: Command, file: Path) -> None:
    code, text = fedpref(command, file, *BAD_CONFIGS[message])
    assert code == 2
    assert message in text
    assert "Traceback" not in text
    assert not list(Path.cwd().iterdir())


def test_a_bad_file_or_directory_is_named(fedpref: Command, file: Path, tmp_path: Path) -> None:
    assert fedpref("run", "nowhere.yaml") == (
        2,
        "error: nowhere.yaml: there is no such config file.\n",
    )
    (tmp_path / "broken.yaml").write_text("a: [1")
    code, text = fedpref("run", tmp_path / "broken.yaml")
    assert (code, "not valid YAML" in text) == (2, True)
    (tmp_path / "list.yaml").write_text("- 1\n")
    assert fedpref("run", tmp_path / "list.yaml")[0] == 2
    code, text = fedpref("run", file, "--output", tmp_path)
    assert (code, "exists already" in text) == (2, True)
    code, text = fedpref("resume", tmp_path)
    assert (code, "there is no run here" in text) == (2, True)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem
)
def test_every_shipped_config_is_valid_and_says_where_its_data_is_from(path: Path) -> None:
    spec = Experiment.load(
        path,
        [] if "path:" in path.read_text() or spec_needs_no_path(path) else ["data.path=somewhere"],
    )
    assert config.parse(Experiment, config.dump(spec), str(path)) == spec
    assert path.read_text().startswith("# ")


def spec_needs_no_path(path: Path) -> bool:
    return OmegaConf.load(path).data.name != "ukpconvarg"


def test_a_topology_is_shown_with_its_figures(fedpref: Command) -> None:
    code, output = fedpref("topology", "ring", "--clients", "16")
    assert code == 0
    assert "0.9493" in output
    assert "0.09892" in output
    assert output.strip().splitlines()[-1].split() == ["client-15", "▒▒" + 13 * "··" + "▒▒▒▒"]
    code, output = fedpref("topology", "{name: one-peer-exponential}", "--clients", "8")
    assert code == 0
    assert (
        next(line.split()[-1] for line in output.splitlines() if "rounds to halve" in line) == "0"
    )
    for wrong, sentence in (
        ("rin", "Did you mean 'ring'"),
        ("{name: [", "no YAML mapping"),
        ("[" * 2000, "no YAML mapping"),
    ):
        code, output = fedpref("topology", wrong)
        assert code == 2
        assert sentence in output


@pytest.mark.long
def test_a_sweep_ends_with_a_comparison_that_can_be_had_again(
    fedpref: Command, file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "sweep"
    variants = (
        "--variant",
        "feddpo",
        "--variant",
        "own: algorithm.name=fedpdpo algorithm.parts.bottleneck=4",
        "--seeds",
        "1",
    )
    code, output = fedpref("sweep", file, "rounds=1", *variants, "--output", out)
    assert code == 0, output
    assert "comparison.md" in output
    code, output = fedpref(
        "compare", out / "feddpo" / "seed-0", out / "own" / "seed-0", "--markdown"
    )
    assert output == (out / "comparison.md").read_text()
    assert fedpref("compare", tmp_path)[0] == 2
    code, output = fedpref(
        "generate", out / "own" / "seed-0", "Hi?", "--client", "client-1", "--max-new-tokens", "3"
    )
    assert code == 0, output
    for wrong in (("--client", "nobody"), ()):
        code, output = fedpref("generate", out / "own" / "seed-0", "Hi?", *wrong)
        assert code == 2
        assert "client-0" in output


# ---- what comes with the package


def test_a_config_goes_by_its_name_or_by_its_place_in_a_checkout(fedpref: Command) -> None:
    whole = ["partition.max_clients=2", "partition.max_rows=20"]
    for name in ("feddpo", "configs/feddpo.yaml"):
        code, text = fedpref("check", name, *whole)
        assert (code, f"{name} is valid" in text) == (0, True)
    code, text = fedpref("check", "fedpo")
    assert (code, "Did you mean 'feddpo'?" in text, "fedpref init" in text) == (2, True, True)
    code, text = fedpref("list", "configs")
    assert (code, "demo-offline: The demo without any download" in text) == (0, True)
    # a file of one's own comes first
    Path("feddpo").write_text("rounds: nonsense\n")
    code, text = fedpref("check", "feddpo")
    assert (code, "rounds" in text) == (2, True)


@pytest.mark.long
def test_the_demo_is_the_offline_one_where_nothing_can_be_fetched(
    fedpref: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FEDPREF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    small = ["partition.max_clients=2", "partition.max_rows=20", "rounds=1", "baselines=[]"]
    code, text = fedpref("demo", *small, "task.sample_clients=[]", "--output", "out")
    assert code == 0, text
    assert "cannot be fetched by pip" in text
    assert Experiment.load("out/config.yaml").name == "demo-offline"


@pytest.mark.parametrize(
    ("rows", "options", "says"),
    [
        ([{"question": "q", "winner": "w", "loser": "l"}], (), ["chosen_column: winner"]),
        (
            [{"prompt": "q", "a": "good", "b": "bad"}],
            ("--chosen", "a", "--rejected", "b"),
            ["chosen_column: a", "rejected_column: b"],
        ),
        ([{"prompt": "q", "completion": "c", "label": True}], (), ["name: feedback"]),
        (
            [{"problem": "q", "completion": "c", "label": True}],
            ("--prompt", "problem"),
            ["name: feedback", "prompt_column: problem"],
        ),
    ],
)
def test_init_writes_a_config_that_check_accepts(
    rows: list[dict[str, Any]], options: tuple[str, ...], says: list[str], fedpref: Command
) -> None:
    def row(number: int) -> dict[str, Any]:
        return {
            k: f"{v} {number}" if isinstance(v, str) else number % 2 == 0
            for k, v in rows[0].items()
        }

    content = [row(number) | {"who": f"client {number % 2}"} for number in range(60)]
    # two that state nothing or say nothing, one that is too long, one client with a single row
    texts = [key for key in rows[0] if isinstance(rows[0][key], str)]
    content.append(content[0] | dict.fromkeys(texts[1:], ""))
    content.append(content[1] | {texts[0]: "long " * 2000})
    content.append(content[2] | {"who": "client 3"})
    Path("rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in content))
    code, text = fedpref("init", "mine", "--data", "rows.jsonl", "--client", "who", *options)
    assert code == 0, text
    written = Path("mine/experiment.yaml").read_text()
    for part in (*says, "unusable: skip # rows", "truncation_mode: keep_end # 1 rows"):
        assert part in written, written
    code, text = fedpref("check", "mine/experiment.yaml")
    assert (code, "is valid" in text) == (0, True), text
    code, text = fedpref("init", "mine", "--data", "rows.jsonl")
    assert (code, "is there already" in text) == (2, True)
    assert Path("mine/experiment.yaml").read_text() == written


def test_init_takes_short_answers_where_their_column_says_what_it_is(fedpref: Command) -> None:
    rows = "".join(f"q{i},{('Yes', 'No')[i % 2]},{('No', 'Yes')[i % 2]}\n" for i in range(40))
    Path("agrees.csv").write_text("prompt,chosen,rejected\n" + rows)
    assert fedpref("init", "mine", "--data", "agrees.csv")[0] == 0


def test_init_takes_no_vote_for_an_answer(fedpref: Command) -> None:
    votes = ("model_a", "model_b", "tie (bothbad)")
    rows = "".join(f"q{i},good {i},bad {i},{votes[i % 3]}\n" for i in range(40))
    Path("arena.csv").write_text("prompt,response_a,response_b,winner\n" + rows)
    code, text = fedpref("init", "mine", "--data", "arena.csv", "--rejected", "response_b")
    assert (code, "which column holds the chosen answers?" in text) == (2, True), text


def test_init_takes_names_of_any_letters(fedpref: Command) -> None:
    rows = "".join(f"q{i},good {i},bad {i}\n" for i in range(40))
    for folder in ("a 🚀", "a${b}"):
        Path(folder).mkdir()
        Path(folder, "é.csv").write_text("prompt,chosen,rejected\n" + rows)
        code, text = fedpref("init", folder, "--data", f"{folder}/é.csv", "--model", "builtin")
        assert code == 0, text
        assert f"fedpref check '{folder}/experiment.yaml'" in text
        assert fedpref("check", f"{folder}/experiment.yaml")[0] == 0
        assert Experiment.load(f"{folder}/experiment.yaml").name == folder


def test_init_shares_few_rows_out_among_fewer_clients(fedpref: Command) -> None:
    rows = "".join(f"q{i},good {i},bad {i}\n" for i in range(6))
    Path("odd.csv").write_text("a,b,c\n" + rows)
    columns = ("--prompt", "a", "--chosen", "b", "--rejected", "c", "--model", "builtin")
    code, text = fedpref("init", "odd", "--data", "odd.csv", *columns)
    assert code == 0, text
    assert "clients: 4" not in Path("odd/experiment.yaml").read_text()
    assert fedpref("check", "odd/experiment.yaml")[0] == 0


def test_init_cuts_where_all_of_a_clients_rows_are_too_long(fedpref: Command) -> None:
    rows = [{**row, "prompt": f"{row['prompt']} {'and so on ' * 900}"} for row in make_rows([12])]
    write_rows(Path("rows.jsonl"), rows)
    code, output = fedpref("init", "mine", "--data", "rows.jsonl", "--client", "client")
    assert code == 0, output
    assert "truncation_mode: keep_end" in Path("mine/experiment.yaml").read_text()
    write_rows(Path("alike.jsonl"), [{**row, "prompt": "Which?"} for row in make_rows([12])])
    code, output = fedpref("init", "other", "--data", "alike.jsonl")
    assert code == 2
    assert "others to hold out, of another prompt" in " ".join(output.split())


@pytest.mark.long
def test_nothing_else_is_written_into_a_run(fedpref: Command, file: Path) -> None:
    assert fedpref("run", file, "rounds=1", "--output", "mine")[0] == 0
    before = sorted(Path("mine").rglob("*"))
    for command in (
        ("sweep", file, "--variant", "feddpo"),
        ("pareto", "firm"),
        ("bench", "quick"),
        ("collect", "--candidates", file),
    ):
        code, output = fedpref(*command, "--output", "mine")
        assert (code, "mine is a run. Give another --output." in output) == (2, True), output
    assert sorted(Path("mine").rglob("*")) == before


def test_what_is_printed_is_neither_markup_nor_emoji(fedpref: Command) -> None:
    code, output = fedpref("check", "x:fire:y/[bold]none.yaml")
    assert code == 2
    assert "x:fire:y/[bold]none.yaml" in output


def test_init_names_what_is_missing(fedpref: Command) -> None:
    Path("rows.jsonl").write_text('{"prompt": "q", "first": "a", "second": "b"}\n')
    for options, says in (
        ((), "--data is missing"),
        (("--data", "rows.jsonl"), "which column holds the chosen answers? Give --chosen"),
        (("--data", "rows.jsonl", "--client", "who"), "there is no column 'who'"),
        (("--data", "nowhere.jsonl"), "there is no file or folder"),
    ):
        code, text = fedpref("init", "mine", *options)
        assert (code, says in text) == (2, True), text
        assert not Path("mine").exists()
    Path("rows.jsonl").write_text('{"prompt": "q", "chosen": "a", "rejected": "b"}\n')
    code, text = fedpref("init", "mine", "--data", "rows.jsonl", "--algorithm", "fedavg")
    assert (code, "Did you mean 'feddpo'?" in text) == (2, True), text


def test_a_hub_that_cannot_be_reached_is_said_at_once(
    fedpref: Command, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in [name for name in os.environ if "proxy" in name.lower()]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    for place in (huggingface_hub.constants, datasets.config):
        monkeypatch.setattr(place, "HF_HUB_OFFLINE", False)
    hub._is_reached.cache_clear()
    for setting in (["task.model.path=some/model"], ["data.name=files", "data.path=some/rows"]):
        code, text = fedpref("check", "feddpo", *setting)
        assert (code, "error: " in text, "Retrying" in text) == (2, True, False)
    hub._is_reached.cache_clear()
    assert "http://127.0.0.1:9 cannot be reached" in caplog.text
    # which then look into their caches alone, and do not try again for half a minute a file
    assert huggingface_hub.constants.HF_HUB_OFFLINE
    assert datasets.config.HF_HUB_OFFLINE


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("algorithm=fedavg", "Did you mean 'feddpo'?"),
        ("algorithm=", "expected keys and values, or a name; found None"),
        ("algorithm.local.step=3", "Did you mean 'steps'?"),
        ("algorithm.phases=joint", "It belongs to fedpdpo"),
        ("learning_rate=1", "Did you mean 'algorithm.local.learning_rate'"),
    ],
)
def test_what_is_nearly_right_is_suggested(setting: str, says: str, fedpref: Command) -> None:
    code, text = fedpref("check", "feddpo", setting)
    assert (code, says in text) == (2, True), text


def test_a_few_more_mistakes_say_what_to_do(
    fedpref: Command, file: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    semicolons = tmp_path / "semi.csv"
    semicolons.write_text("prompt;chosen;rejected\nq;a;b\n")
    for wrong, says in (
        ("baselines=alone", "expected a list, as in baselines=[alone]"),
        ("task.model.lora_r=100000", "is above the model's width, 32"),
        (f"data.path={semicolons}", "seem to be parted by semicolons"),
    ):
        code, text = fedpref("check", file, wrong)
        assert (code, says in text) == (2, True), text
    for command in ("evaluate", "personalize"):
        code, text = fedpref(command, "run", "--data", semicolons, "rounds=2")
        assert (code, "settings of the rows alone are taken here" in text) == (2, True), text
    graph = {"algorithm": {"name": "feddpo"}, "network": {"topology": "complete"}}
    experiment = config.parse(Experiment, {**settings, **graph}, "x")
    with pytest.warns(UserWarning, match="feddpo has a coordinator and no neighbours"):
        experiment.check_clients({"a": 9, "b": 9})


@pytest.mark.parametrize("setting", ["nonsense=1", "algorithm.name=trimmed"])
def test_what_is_far_from_anything_suggests_nothing(setting: str, fedpref: Command) -> None:
    code, text = fedpref("check", "feddpo", setting)
    assert (code, "Did you mean" in text) == (2, False), text


# ---- sweeps


@pytest.mark.long
def test_a_sweep_is_taken_by_what_takes_runs(fedpref: Command, file: Path) -> None:
    code, text = fedpref(
        *("sweep", file, "rounds=2", "evaluate_every=1", "--seeds", 2, "--output", "swept"),
        *("--grid", "algorithm.local.learning_rate=1e-3,1e-2"),
    )
    assert code == 0, text
    names = sorted(path.name for path in Path("swept").iterdir() if path.is_dir())
    variants = ["learning_rate=1e-2", "learning_rate=1e-3"]
    assert [name for name in names if name != "cache"] == variants
    specs = {name: Experiment.load(f"swept/{name}/seed-1/config.yaml") for name in variants}
    assert {spec.algorithm.local.learning_rate for spec in specs.values()} == {1e-3, 1e-2}
    assert (Path("swept") / "table.tex").read_text().count(r"\\") == 3
    code, compared = fedpref("compare", "swept", "--csv")
    assert (code, len(compared.splitlines())) == (0, 3)
    page = Path("swept/report.html").read_text()
    for part in (*variants, "Variants by seeds", "Who gained, who lost", "lowest to the highest"):
        assert part in page
    code, text = fedpref("figures", "swept", "--to", "drawn")
    assert code == 0, text
    for name in ("held-out", "training", "gains", "clients"):
        assert (Path("drawn") / f"{name}.pdf").read_bytes().startswith(b"%PDF")
        assert "<svg" in (Path("drawn") / f"{name}.svg").read_text()
    assert variants[1] in (Path("drawn") / "clients.svg").read_text()
    for name in ("table.tex", "table.csv"):
        assert (Path("drawn") / name).exists()
    code, text = fedpref("export", "swept", "--output", "exported")
    assert code == 0, text
    assert len(list(Path("exported").glob("*/seed-*/manifest.json"))) == 4
    code, text = fedpref("watch", "swept")
    assert (code, text.count("round 2/2")) == (0, 4)
    # one run is done anew, from the sweep's own file
    shutil.rmtree(Path("swept") / variants[0] / "seed-1")
    code, text = fedpref("resume", "swept")
    assert (code, text.count("begin")) == (0, 0), text
    assert fedpref("compare", "swept", "--csv")[1].split(",s")[0] == compared.split(",s")[0]


@pytest.mark.long
def test_a_variant_is_chosen_on_validation_and_measured_on_the_test(
    fedpref: Command, settings: dict[str, Any], tmp_path: Path
) -> None:
    rows = write_rows(tmp_path / "many.jsonl", make_rows([40, 40]))
    whole = {**settings, "data": {"name": "files", "path": str(rows)}, "rounds": 1}
    OmegaConf.save(OmegaConf.create(whole), "mine.yaml")
    code, text = fedpref(
        *("sweep", "mine.yaml", "--seeds", 1, "--select", "loss", "--output", "swept"),
        *("--grid", "algorithm.local.learning_rate=1e-6,1e-2"),
    )
    assert code == 0, text
    losses = {}
    for rate in ("1e-6", "1e-2"):
        run = FinishedRun.at(f"swept/learning_rate={rate}/seed-0")
        assert run.experiment.evaluate_on == "validation"
        clients = run.last_evaluation["clients"].values()
        losses[rate] = sum(row["loss"] for row in clients) / len(clients)
    best = min(losses, key=losses.__getitem__)
    assert f"by loss on validation prompts: learning_rate={best}" in text
    chosen = FinishedRun.at(f"swept/selected/learning_rate={best}/seed-0").experiment
    assert chosen.evaluate_on == "test"
    assert chosen.algorithm.local.learning_rate == float(best)
    # another is the best once there are more, and what was chosen before stays
    code, text = fedpref(
        *("sweep", "mine.yaml", "--seeds", 1, "--select", "loss", "--output", "swept"),
        *("--grid", "algorithm.local.learning_rate=1e-6,3e-2"),
    )
    assert code == 0, text
    code, text = fedpref("sweep", "mine.yaml", "--select", "luck")
    assert (code, "expected one of rewards/accuracies" in text) == (2, True)


@pytest.mark.long
def test_a_run_alone_is_compared_with_its_own_baselines(fedpref: Command, file: Path) -> None:
    fedpref("run", file, "rounds=1", "baselines=[alone,pooled]", "--output", "out")
    code, text = fedpref("compare", "out", "--csv")
    assert (code, [line.split(",")[0] for line in text.splitlines()]) == (
        0,
        ["name", "feddpo", "alone", "pooled"],
    )
    code, text = fedpref("compare", "out", "--latex")
    assert (code, r"\toprule" in text, "95 \\%" in text) == (0, True, True)
    code, text = fedpref("figures", "out", "--to", "drawn")
    assert code == 0, text
    assert {path.name for path in Path("drawn").iterdir()} >= {"gains.svg", "table.tex"}


@pytest.mark.parametrize("grid", ["rounds", "rounds=1", "=1,2"])
def test_a_grid_that_is_none_is_refused(grid: str, fedpref: Command, file: Path) -> None:
    code, text = fedpref("sweep", file, "--grid", grid)
    assert (code, "expected KEY=VALUE,VALUE" in text) == (2, True), text
