"""Odd rows, configs, overrides and damaged runs: every mistake is a sentence."""

from __future__ import annotations

import contextlib
import copy
import csv
import gzip
import io
import json
import logging
import os
import resource
import shutil
import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow
import pyarrow.parquet
import transformers
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.configuration import set_hypothesis_home_dir
from hypothesis.internal.conjecture.engine import ConjectureRunner

from correct.shared import (
    BUILTIN,
    QUESTION,
    SMALL,
    TURNS,
    last_frames,
    origin,
    random_model,
    said,
    sentence,
)
from fedpref import config, run
from fedpref.cli import showing, training, using
from fedpref.data import IID, Files, Natural, Opinions
from fedpref.errors import UserError
from fedpref.experiments.experiment import Experiment
from fedpref.experiments.finished import FinishedRun
from fedpref.models.model_settings import Model
from fedpref.tasks import FeedbackTask, PreferenceTask

SECONDS = 5.0  # of one input, or of one command on a damaged run
SECRET = "FEDPREF_BENCHMARK_SECRET"
SECRETS = {SECRET: "s3cret-of-the-environment", "HOME": "/home/of-the-environment"}
ROOM = 4 << 30  # bytes of memory beyond those in use: an input that wants more has leaked


class OvertimeError(BaseException):
    """An input took too long. Not an Exception, so that nobody takes it for one of their own."""


class LeakError(Exception):
    """Something came out that must not, without an exception."""


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[list[str]]:
    """Raise OvertimeError within a `with` that takes longer, again and again.

    What is yielded says where it was then, whatever others make of the error.
    """
    places: list[str] = []

    def over(_: int, frame: Any) -> None:
        if "hypothesis" in frame.f_code.co_filename:  # where it watches the garbage collector
            return
        places.append(last_frames(traceback.extract_stack(frame)))
        raise OvertimeError

    signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds, 0.2)
    try:
        yield places
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)


def leaked(act: Callable[[], object]) -> tuple[str, str] | None:
    """Return what leaves an act other than a UserError, and where it began; None for nothing."""
    # as a terminal takes it: what UTF-8 cannot write is an error
    sink = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    leak: tuple[str, str] | None = None
    places: list[str] = []
    try:
        with limited(SECONDS) as places, contextlib.redirect_stdout(sink):
            act()
    except (UserError, OvertimeError):
        pass
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # also panics of Rust, and exits
        leak = sentence(error), origin(error)
    return (f"more than {SECONDS:g} s", places[0]) if places else leak


@dataclass
class Trials:
    """Inputs tried, and those that leaked."""

    scratch: Path
    keep: Path | None = None
    tried: Counter[str] = field(default_factory=Counter)
    leaks: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)

    def examine(
        self, kind: str, shown: str, acts: Mapping[str, Callable[[], object]], stored: Path
    ) -> None:
        """Try an input by one or more acts; print what leaks, and keep the input."""
        self.tried[kind] += 1
        leaks = {name: leak for name, act in acts.items() if (leak := leaked(act))}
        if not leaks:
            return
        self.leaks[kind] += 1
        name = f"{kind}-{self.tried[kind]:04d}"
        for act, (what, where) in leaks.items():
            place = f" at {where}" if where else ""
            reason = what.split(":")[0] + place if where else what
            self.reasons[f"{kind}, {act}: {reason}"] += 1
            print(f"leak {name} {act}: {what}{place} <- {shown[:120]}", flush=True)
        if self.keep:
            goal = self.keep / name
            if stored.is_dir():
                shutil.copytree(stored, goal, dirs_exist_ok=True)
            else:
                shutil.copy(stored, goal.with_name(name + "".join(stored.suffixes)))

    def generate(
        self, count: int, strategy: st.SearchStrategy[Any], examine: Callable[[Any], None]
    ) -> None:
        """Let hypothesis draw so many inputs; the same ones each time."""

        @settings(
            max_examples=count,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate],
        )
        @given(strategy)
        def trial(drawn: Any) -> None:
            examine(drawn)

        # it would follow each input with five that repeat parts of it
        with mock.patch.object(ConjectureRunner, "generate_mutations_from", create=True):
            trial()


# -- values that do not fit

# what JSON and YAML have no simple value for, as written; each is put in for its marker
DEEP = {f"deep {depth}": "[" * depth + "]" * depth for depth in (50, 900, 3000, 100_000)}
JSON_RAW = DEEP | {
    "huge": "7" * 5000,
    "NaN": "NaN",
    "Infinity": "-Infinity",
    "1e999": "1e999",
    "half": '"\\ud83d"',
    "keys": '{"a": 1, "a": 2}',
    "open": '{"a": ',
}


def marker(name: str) -> str:
    return f"@{name}@"


def with_raw(text: str, raw: Mapping[str, str], quotes: Sequence[str]) -> str:
    """Put raw text in for its markers, with the quotes around them."""
    for name, value in raw.items():
        for quote in quotes:
            text = text.replace(f"{quote}{marker(name)}{quote}", value)
    return text


letters = st.characters()  # lone surrogates too
texts = st.one_of(st.sampled_from(["", " ", "yes", "1.0", "\0", "\u2028", "é"]), st.text(letters))
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([10**40, -1, 0, 2**63, 10**400]),
    st.floats(),
    texts,
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.text(letters, max_size=4), inner, max_size=3),
    ),
    max_leaves=6,
)


def weighted(*choices: tuple[int, st.SearchStrategy[Any]]) -> st.SearchStrategy[Any]:
    """Return a strategy that takes one of several, each so many times as often."""
    repeated = [strategy for times, strategy in choices for _ in range(times)]
    return st.sampled_from(repeated).flatmap(lambda strategy: strategy)  # one_of forgets repeats


rarely = st.sampled_from([False] * 9 + [True])


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Return bytes of which some are gone, flipped or added."""
    how = draw(st.sampled_from(["cut", "flip", "insert", "repeat"]))
    at = draw(st.integers(0, max(0, len(content) - 1)))
    if how == "cut":
        return content[:at]
    if how == "flip":
        changed = bytearray(content)
        for place in draw(st.lists(st.integers(0, max(0, len(content) - 1)), max_size=6)):
            if changed:
                changed[place] ^= 1 << draw(st.integers(0, 7))
        return bytes(changed)
    if how == "insert":
        return content[:at] + draw(st.binary(min_size=1, max_size=8)) + content[at:]
    return content[:at] + content[at // 2 :]


# -- rows


HERE, THERE = [said("assistant", "Here.")], [said("assistant", "There.")]
ASKED = said("user", "Where to on day #?")
DIALOGUE = "\n\nHuman: Day #?\n\nAssistant: b"
# rows as they are in the formats that are read; # is a number
ROWS: tuple[dict[str, Any], ...] = (
    {"prompt": "Where on day #?", "chosen": " Here.", "rejected": " There.", "client": "a"},
    {"prompt": [ASKED], "chosen": HERE, "rejected": THERE, "client": "b", "split": "train"},
    {"chosen": [ASKED, *HERE], "rejected": [ASKED, *THERE], "client": "a", "tools": []},
    {"chosen": DIALOGUE, "rejected": f"{DIALOGUE}c", "client": "a"},
    {"prompt": "Where on day #?", "completion": " Here.", "label": True, "client": "a"},
    {"messages": [ASKED, *HERE], "label": 1},
    {"prompt": "Where on day #?", "client": 3},
    {"question": "Day #?", "options": "['a', 'b']", "selections": "defaultdict(x, {'A': [1, 2]})"},
    {"question": "Day #?", "options": ["a", "b"], "group": "A", "shares": [0.5, 0.5]},
)


def numbered(row: Mapping[str, Any], number: int) -> dict[str, Any]:
    """Return a row with a prompt of its own, of one of two clients."""
    again: dict[str, Any] = json.loads(json.dumps(row).replace("#", str(number)))
    return again | {"client": "ab"[number % 2]} if "client" in row else again


cells = weighted(
    (4, values),
    (3, texts),
    (6, st.sampled_from([marker(name) for name in JSON_RAW])),
    (
        3,
        st.sampled_from(
            ["[" * 300, "[1" + ", 1" * 99, "((1, 2), 3)", "{'A': 1e999}", "[nan, 1]", "1_0", "true"]
        ),
    ),
    (2, st.sampled_from([[QUESTION], HERE, [TURNS[0]], "Where to?", "\n\nHuman: a", "<|end|>"])),
    (
        3,
        st.lists(
            st.fixed_dictionaries(
                {
                    "role": st.one_of(st.sampled_from(["user", "assistant", "human"]), values),
                    "content": st.one_of(texts, values),
                },
                optional={"tool_calls": values},
            ),
            min_size=1,
            max_size=3,
        ),
    ),
)


@st.composite
def odd_rows(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Draw some rows of a known format, of which the last has an odd cell or two."""
    usual = draw(st.sampled_from(ROWS))
    row = numbered(usual, draw(st.integers(0, 12)))
    for _ in range(draw(st.integers(1, 2))):
        column = draw(st.sampled_from([*row, *row, "client", "prompt", "label"]))
        if not draw(rarely):
            row[column] = draw(cells)
        elif column in row:
            row[draw(st.text(letters, max_size=3))] = row.pop(column)
    count = draw(st.sampled_from([0, 12, 12, 12]))
    return [*(numbered(usual, number) for number in range(count)), row]


def as_csv(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Return rows as CSV, whatever is no text as Python writes it."""
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, list(dict.fromkeys(key for row in rows for key in row)))
    writer.writeheader()
    with contextlib.suppress(csv.Error):
        writer.writerows(
            {key: value if value is None else str(value) for key, value in row.items()}
            for row in rows
        )
    return with_raw(out.getvalue(), JSON_RAW, ("",)).encode("utf-8", "surrogatepass")


def as_parquet(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Return rows as Parquet; columns of mixed types as text."""
    out = io.BytesIO()
    names = dict.fromkeys(key for row in rows for key in row)
    columns: dict[str, Any] = {}
    for name in names:
        column = [row.get(name) for row in rows]
        key = name.encode("utf-8", "replace").decode()
        try:
            columns[key] = pyarrow.array(column)
            pyarrow.parquet.write_table(pyarrow.table({key: columns[key]}), io.BytesIO())
        except (pyarrow.ArrowException, OverflowError, UnicodeError):
            columns[key] = pyarrow.array([ascii(value) for value in column])
    pyarrow.parquet.write_table(pyarrow.table(columns), out)
    return out.getvalue()


@st.composite
def tables(draw: st.DrawFn) -> tuple[str, str, bytes]:
    """Draw a file of rows: the task that it is for, the end of its name, and its bytes."""
    kind = draw(st.sampled_from([".jsonl", ".jsonl", ".json", ".csv", ".parquet"]))
    packed = "" if kind == ".parquet" else draw(st.sampled_from(["", "", ".gz"]))
    if draw(rarely):
        return "preference", kind + packed, draw(st.binary(max_size=60))
    rows = draw(odd_rows())
    task = (
        "opinion" if "question" in rows[0] else "feedback" if "label" in rows[0] else "preference"
    )
    if kind == ".csv":
        content = as_csv(rows)
    elif kind == ".parquet":
        content = as_parquet(rows)
    else:
        plain = draw(st.booleans())
        lines = [with_raw(json.dumps(row, ensure_ascii=plain), JSON_RAW, ('"',)) for row in rows]
        text = "\n".join(lines) if kind == ".jsonl" else f"[{','.join(lines)}]"
        content = text.encode("utf-8", "surrogatepass")
    if kind != ".parquet" and draw(rarely):
        encoding = draw(st.sampled_from(["utf-16", "latin-1", "utf-8-sig", "utf-7", "cp500"]))
        content = content.decode("utf-8", "replace").encode(encoding, "replace")
    if draw(rarely):
        content = draw(damaged(content))
    if packed:
        content = gzip.compress(content, 1, mtime=0)
        if draw(rarely):
            content = draw(damaged(content))
    return task, kind + packed, content


def fuzz_rows(trials: Trials, model: Model, count: int) -> None:
    """Read files by `fedpref check`."""
    kinds = (PreferenceTask(model=model), FeedbackTask(model=model))
    tasks = {one.name: (one, one.build()) for one in kinds}

    def check(experiment: Experiment) -> None:
        file = trials.scratch / "rows.yaml"
        file.write_text(config.to_yaml(experiment))
        # loading the model takes longest, and is the same for all
        learner = tasks[experiment.task.name][1]
        with mock.patch.object(Experiment, "build_task", return_value=learner):
            training.check(file)

    def examine(drawn: tuple[tuple[str, str, bytes], Any, dict[str, Any]]) -> None:
        (kind, ending, content), how, options = drawn
        path = trials.scratch / f"rows{ending}"
        path.write_bytes(content)
        survey = kind == "opinion"
        data: Any = Opinions(path=str(path)) if survey else Files(path=str(path), **options)
        task = tasks["preference" if survey else kind][0]
        experiment = Experiment(data=data, partition=how, task=task)
        shown = content.decode("utf-8", "backslashreplace")
        acts = {"check": lambda: check(experiment)}
        trials.examine("rows", f"{ending} {shown[-100:]!a}", acts, path)

    partitions = (IID(clients=1), IID(clients=1), Natural(), Natural(column="group"))
    options = ({}, {}, {"unusable": "skip"}, {"unusable": "skip"}, {"split_column": "split"})
    trials.generate(
        count, st.tuples(tables(), st.sampled_from(partitions), st.sampled_from(options)), examine
    )


# -- configs and overrides


def bomb(levels: int, width: int = 9) -> str:
    """Return YAML whose aliases unfold to width to the power of levels."""
    lines = [f"&b0 [{', '.join(['x'] * width)}]"]
    lines += [f"&b{i} [{', '.join([f'*b{i - 1}'] * width)}]" for i in range(1, levels)]
    return f"[{', '.join(lines)}]"


YAML_RAW = {
    f"yaml {number}": raw
    for number, raw in enumerate(
        (
            "!!python/object/apply:os.getcwd []",
            "!!python/name:os.system",
            "!unknown 3",
            "!!binary aGk=",
            "!!set {a, b}",
            "!!omap [a: 1]",
            "!!timestamp 2001-01-01",
            "2001-01-01",
            "2001-01-01 10:00:00",
            "*missing",
            "&r [*r]",
            "&r {a: *r}",
            "{<<: 3}",
            "${rounds}",
            "${name}",
            "${task.loss}",
            "${task}",
            "${.name}",
            "${...x}",
            "'${'",
            "'${}'",
            "'${a b}'",
            f"${{oc.env:{SECRET}}}",
            f"'a-${{oc.env:{SECRET}}}'",
            "${oc.env:HOME}",
            "${oc.env:NOT_THERE}",
            "'${oc.env:NOT_THERE,3}'",
            "'${oc.select:nothing,${oc.env:HOME}}'",
            "${oc.decode:'[1'}",
            "'${oc.create:{a: 1}}'",
            "${oc.dict.keys:task}",
            "${nothing:3}",
            "'\\${x}'",
            "'\\\\${x}'",
            "'???'",
            ".nan",
            ".inf",
            "1e999",
            "0x1F",
            "1_000",
            "12:30:00",
            "yes",
            "~",
            "7" * 5000,
            '"\\ud83d"',
            '"\\0"',
            '"\\x1b[31m"',
            "[a, b",
            "{a: [",
            "? x",
            "- - -",
            "%",
            "\t3",
            "{1: 2}",
            "{[a]: 2}",
            "{? {a: 1} : 2}",
            *("[" * depth + "]" * depth for depth in (20, 300, 3000)),
            *("{a: " * depth + "1" + "}" * depth for depth in (20, 300)),
            *(bomb(levels) for levels in (3, 5, 9)),
        )
    )
}

# of kinds, right in one place or another
NAMES = (
    *("alone", "pooled", "feddpo", "ditto", "scaffold", "choco", "fedper", "firm", "scalarized"),
    *("dpo", "ipo", "simpo", "kto", "ring", "complete", "star", "erdos-renyi", "topk", "factors"),
    *("iid", "dirichlet", "by-size", "builtin", "hh", "polis", "feedback", "grpo", "flare"),
)

odd = weighted(
    (3, values),
    (3, st.sampled_from([marker(name) for name in YAML_RAW])),
    (2, st.sampled_from([0, 1, -1, 2, 3, 0.5, 1.5, 1e9, 10**30, "auto", "none", [], {}, ["a"]])),
    (2, st.sampled_from(NAMES)),
    (1, st.sampled_from([marker(name) for name, raw in YAML_RAW.items() if "env:" in raw])),
    (1, st.sampled_from([marker(name) for name, raw in YAML_RAW.items() if "\\" in raw])),
)


def nodes(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the paths of all keys."""
    entries = content.items() if isinstance(content, dict) else ()
    for key, value in entries:
        yield (*path, key)
        yield from nodes(value, (*path, key))


def bases(data: Path, survey: Path, model: str) -> list[dict[str, Any]]:
    """Return configs of several kinds, over tiny files and a tiny model."""
    tiny = {"path": model, "dtype": "float32", "lora_r": 2, "lora_target_modules": ["q_proj"]}
    local = {"steps": 3, "batch_size": 2, "learning_rate": 0.01}
    pairs = {"name": "files", "path": str(data)}
    common = {"rounds": 1, "workers": 1, "evaluate_every": 1}
    return [
        {
            "name": "first",
            "data": pairs,
            "partition": {"name": "natural", "column": "client"},
            "task": {"model": tiny, "loss": {"name": "dpo", "beta": 0.1}, "max_length": 64},
            "algorithm": {"name": "fedpdpo", "local": local, "parts": {"head": "low-rank"}},
            "federation": {"clients_per_round": 2, "weighting": "equal"},
            "baselines": ["alone", "pooled"],
            **common,
        },
        {
            "name": "second",
            "data": pairs,
            "partition": {"name": "iid", "clients": 2},
            "task": {"model": tiny, "loss": "ipo", "truncation_mode": "keep_end"},
            "algorithm": {"name": "decdpo", "local": local},
            "network": {"topology": {"name": "ring"}, "link_failure": 0.1},
            "diagnostics": ["disagreement"],
            **common,
        },
        {
            "name": "third",
            "data": pairs,
            "partition": {"name": "natural", "max_clients": 2},
            "task": {
                "name": "dialogue",
                "model": tiny,
                "rewards": {
                    "brief": {"name": "length", "target": 4},
                    "kind": {"name": "pattern", "pattern": "(please|glad)", "most": 2},
                },
                "estimator": {"name": "rloo"},
            },
            "algorithm": {"name": "firm", "solver": {"b": 1.0}, "local": local},
            **common,
        },
        {
            "name": "fourth",
            "data": {"name": "opinions", "path": str(survey), "groups": ["A", "B"]},
            "partition": {"name": "natural", "column": "group"},
            "task": {"name": "opinion", "model": {"path": model}},
            "algorithm": {"name": "pluralllm", "local": local},
            **common,
        },
    ]


def whole_config(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config with all that it leaves out."""
    return config.dump(config.parse(Experiment, dict(content), "a config"))


def put(content: Any, path: Sequence[Any], how: str, value: Any) -> None:
    """Replace, remove, rename or join what stands at a path, where it still stands."""
    for key in path[:-1]:
        content = content.get(key) if isinstance(content, dict) else None
    if not isinstance(content, dict) or path[-1] not in content:
        return
    if how == "replace":
        content[path[-1]] = value
    elif how == "remove":
        del content[path[-1]]
    elif how == "rename":
        key = value if isinstance(value, str) else f"{path[-1]}s"
        content[key] = content.pop(path[-1])
    elif how == "list":
        content[path[-1]] = [content[path[-1]], value]
    else:
        content["unknown" if how == "add" else "name"] = value


@st.composite
def yaml_files(draw: st.DrawFn, contents: Sequence[Any]) -> bytes:
    """Draw a config file that is nearly valid."""
    content = copy.deepcopy(draw(st.sampled_from(contents)))
    for _ in range(draw(st.sampled_from([1, 1, 2]))):
        hows = ("replace", "replace", "replace", "remove", "rename", "list", "add", "name")
        path = draw(st.sampled_from([*nodes(content), *[("name",)] * 4]))
        put(content, path, draw(st.sampled_from(hows)), draw(odd))
    flow = draw(st.sampled_from([None, False, True]))
    text = yaml.safe_dump(content, default_flow_style=flow, allow_unicode=True, sort_keys=False)
    written = with_raw(text, YAML_RAW, ("'", '"')).encode("utf-8", "surrogatepass")
    if draw(rarely):
        written = draw(damaged(written))
    return written


def checked(path: Path, overrides: Sequence[str], scratch: Path) -> None:
    """Do what `fedpref check` does, and look at the experiment's own YAML."""
    experiment = Experiment.load(path, overrides)
    text = config.to_yaml(experiment)
    if shown := [name for name, value in SECRETS.items() if value in text]:
        raise LeakError(f"the value of {shown[0]} stands in the experiment's YAML")
    own = scratch / "own.yaml"
    own.write_text(text, encoding="utf-8")
    try:
        Experiment.load(own)
    except UserError as error:
        raise LeakError(f"the experiment's own YAML is refused: {error}") from error
    location = experiment.data.location
    # a folder of this machine is not to be searched for datasets
    if location is None or not Path(location).expanduser().is_dir():
        training.check(path, list(overrides))


def fuzz_configs(trials: Trials, contents: Sequence[Any], count: int) -> None:
    """Load files as `fedpref check` does."""
    known = [*contents, *map(whole_config, contents)]
    usual = {
        line.strip()
        for base in known
        for flow in (None, False)
        for line in yaml.safe_dump(base, default_flow_style=flow).splitlines()
    }

    def examine(written: bytes) -> None:
        path = trials.scratch / "config.yaml"
        path.write_bytes(written)
        acts = {"check": lambda: checked(path, (), trials.scratch)}
        text = written.decode("utf-8", "backslashreplace")
        lines = [line.strip() for line in text.splitlines() if line.strip() not in usual]
        trials.examine("configs", ascii("; ".join(lines) or text[-100:]), acts, path)

    trials.generate(count, yaml_files(known), examine)


@st.composite
def override_lists(draw: st.DrawFn, known: Sequence[Sequence[str]]) -> tuple[int, list[str]]:
    """Draw the number of a config, of which the keys are known, and settings that override it."""
    number = draw(st.integers(0, len(known) - 1))
    keys = weighted(
        (8, st.sampled_from(known[number])),
        (1, st.sampled_from(["", ".", "a..b", "rounds.", "data[0]", "task.loss.name.x", "${a}"])),
        (1, texts),
    )

    def one() -> str:
        key, value = draw(keys), draw(odd)
        written = value if isinstance(value, str) else json.dumps(value)
        text = f"{key}={with_raw(written, YAML_RAW | JSON_RAW, ('',))}"
        return draw(texts) if draw(rarely) else text

    return number, [one() for _ in range(draw(st.integers(1, 2)))]


def fuzz_overrides(trials: Trials, contents: Sequence[Any], count: int) -> None:
    """Load valid files with overrides as `fedpref check` does."""
    paths = [Path(f"base-{number}.yaml") for number in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_text(yaml.safe_dump(content))

    def examine(drawn: tuple[int, list[str]]) -> None:
        number, overrides = drawn
        given_ = trials.scratch / "overrides.txt"
        given_.write_text("\n".join([paths[number].name, *map(ascii, overrides)]))
        acts = {"check": lambda: checked(paths[number], overrides, trials.scratch)}
        short = [text if len(text) < 90 else f"{text[:60]}...{text[-9:]}" for text in overrides]
        trials.examine("overrides", f"{contents[number]['name']} {short!a}", acts, given_)

    wholes = [[*nodes(content), *nodes(whole_config(content))] for content in contents]
    known = [[".".join(path) for path in some] for some in wholes]
    trials.generate(count, override_lists(known), examine)


# -- damaged runs

OTHER_JSON = ("{}", "[]", "null", "3", '"x"', '{"a": 1}', "[1, 2]", "[[]]", "NaN", "[" * 3000, "\n")


@st.composite
def damages(draw: st.DrawFn, contents: Mapping[str, bytes]) -> tuple[str, str, bytes | None]:
    """Draw a file of a run, what becomes of it in a word, and its bytes; None if it is gone."""
    small = [name for name in contents if not name.endswith("tokenizer.json")]
    read_most = [name for name in small if "/" not in name or name.startswith(("base", "samples"))]
    name = draw(st.sampled_from([*small, *read_most * 2]))
    content = contents[name]
    is_json = name.endswith((".json", ".jsonl", ".yaml"))
    hows = ["gone", "empty", "damaged", "damaged", "other", "binary"]
    how = draw(st.sampled_from(hows + ["value"] * 6 if is_json else hows))
    if how == "gone":
        return name, how, None
    if how == "empty":
        return name, how, b""
    if how == "damaged":
        return name, how, draw(damaged(content))
    if how == "other":
        return name, how, draw(st.sampled_from(OTHER_JSON)).encode()
    if how == "binary":
        return name, how, draw(st.binary(min_size=1, max_size=40))
    if name.endswith(".yaml"):
        entries = [yaml.safe_load(content)]
    else:
        lines = content.decode().splitlines() if name.endswith(".jsonl") else [content.decode()]
        entries = [json.loads(line) for line in lines if line.strip()] or [{}]
    entry = draw(st.sampled_from(entries))
    path = draw(st.sampled_from(list(nodes(entry)) or [("name",)]))
    put(
        entry, path, draw(st.sampled_from(["replace", "replace", "remove", "rename"])), draw(values)
    )
    if name.endswith(".yaml"):
        return name, how, yaml.safe_dump(entries[0]).encode("utf-8", "surrogatepass")
    separator = "\n" if name.endswith(".jsonl") else ""
    return name, how, "".join(json.dumps(one) + separator for one in entries).encode()


def fuzz_runs(trials: Trials, content: Mapping[str, Any], data: Path, count: int) -> None:
    """Damage a file of a finished run and let the commands read the run."""
    whole, path = trials.scratch / "whole", trials.scratch / "run"
    run(config.parse(Experiment, dict(content), "a config"), whole)
    contents = {
        file.relative_to(whole).as_posix(): file.read_bytes()
        for file in sorted(whole.rglob("*"))
        if file.is_file()
    }
    client = next(iter(FinishedRun.at(whole).clients))

    def examine(drawn: tuple[str, str, bytes | None]) -> None:
        name, how, written = drawn
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(whole, path)
        if written is None:
            (path / name).unlink()
        else:
            (path / name).write_bytes(written)
        acts: dict[str, Callable[[], object]] = {
            "report": lambda: showing.report([path]),
            "compare": lambda: showing.compare([whole, path]),
            "resume": lambda: training.resume(path),
        }
        # loading a model takes longest, and reads only these
        if name.startswith("checkpoints/") or name in ("clients.json", "version.json"):
            acts["evaluate"] = lambda: using.evaluate(path, data=str(data), client=client)
        if name.startswith(("clients/", "adapter/")):
            acts["generate"] = lambda: using.generate(
                path, prompt="Where to?", client=client, max_new_tokens=2
            )
        shown = "" if written is None else ascii(written.decode("utf-8", "backslashreplace")[-80:])
        trials.examine("runs", f"{name} {how} {shown}", acts, path)

    trials.generate(count, damages(contents), examine)


def measure_fuzz(match: str, scratch: Path, count: int, keep: Path | None) -> dict[str, float]:
    """Try inputs of four kinds; print what leaks, and a table."""
    logging.disable(logging.CRITICAL)
    set_hypothesis_home_dir(scratch / "hypothesis")
    place = keep.resolve() if keep else scratch
    place.mkdir(parents=True, exist_ok=True)
    os.chdir(place)  # so that inputs do not hold its name, and an empty path is a folder too
    data, survey = Path("pairs.jsonl"), Path("survey.jsonl")
    data.write_text("".join(json.dumps(numbered(ROWS[0], i)) + "\n" for i in range(24)))
    questions = [
        {"question": f"{i}?", "options": ["yes", "no"], "selections": {"A": [1, 2], "B": [2, 1]}}
        for i in range(12)
    ]
    survey.write_text("".join(json.dumps(row) + "\n" for row in questions))
    tokenizer = transformers.AutoTokenizer.from_pretrained(BUILTIN)
    small = SMALL | {"hidden_size": 16, "num_hidden_layers": 1}
    tiny = random_model(Path("tiny"), transformers.LlamaConfig(**small), tokenizer)
    contents = bases(data, survey, tiny)
    personal = contents[0] | {"algorithm": contents[0]["algorithm"] | {"name": "fedper"}}
    del personal["algorithm"]["parts"]
    os.environ.update(SECRETS)
    memory = Path("/proc/self/statm")
    if memory.exists():  # on Linux
        most = int(memory.read_text().split()[0]) * resource.getpagesize() + ROOM
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    for content in contents:  # which are to be right as they are
        (scratch / "usual.yaml").write_text(yaml.safe_dump(content))
        with contextlib.redirect_stdout(io.StringIO()):
            checked(scratch / "usual.yaml", (), scratch)
    trials = Trials(scratch, place if keep else None)
    kinds: dict[str, tuple[float, Callable[[int], None]]] = {
        "rows": (0.4, lambda n: fuzz_rows(trials, Model(path=tiny, dtype="float32"), n)),
        "configs": (0.2, lambda n: fuzz_configs(trials, contents, n)),
        "overrides": (0.18, lambda n: fuzz_overrides(trials, contents, n)),
        "runs": (0.22, lambda n: fuzz_runs(trials, personal, data, n)),
    }
    seconds = {}
    for kind, (share, fuzz) in kinds.items():
        if match in kind:
            begun = time.perf_counter()
            fuzz(round(share * count))
            seconds[kind] = time.perf_counter() - begun
    print("\nleaks by reason")
    for reason, times in trials.reasons.most_common():
        print(f"{times:5}  {reason}")
    print(f"\n{'inputs':12}{'tried':>7}{'leaks':>7}{'seconds':>9}")
    for kind, taken in seconds.items():
        print(f"{kind:12}{trials.tried[kind]:7}{trials.leaks[kind]:7}{taken:9.0f}")
    return {"fuzz_tried": trials.tried.total(), "fuzz_leaks": trials.leaks.total()}
