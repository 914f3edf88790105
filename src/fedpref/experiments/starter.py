"""A first config for somebody's own rows, which `check` accepts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import yaml

from fedpref import config
from fedpref.data import tables
from fedpref.data.unusable import Unusable, counted
from fedpref.errors import UserError
from fedpref.experiments.experiment import Experiment, encoded
from fedpref.numerics.files import whole_path

LOOKED_AT = 200  # rows whose columns are looked at
CLIENTS = 4  # among whom rows are shared out where no column says whose they are
FEWEST_CLIENTS = 2
CUT = "rows longer than the model takes keep the end of their prompt. keep_start, or refuse"
VOTES, LABEL = 4, 14  # different votes, and the letters of one, at most
FEW = 1  # held-out rows that a client needs
# what the columns of pairs are also called
ALSO: Mapping[str, tuple[str, ...]] = {
    "prompt": ("instruction", "question", "query", "input", "problem"),
    "chosen": ("preferred", "better", "winner", "chosen_response", "response_chosen"),
    "rejected": ("dispreferred", "worse", "loser", "rejected_response", "response_rejected"),
}
# the rate and the adapter's layers that the shipped clients' validation prompts have chosen; of
# other models, what is usual for LoRA
RATES = {"builtin": 5e-3, "smollm2": 5e-3, "smollm2-q4": 5e-3}
LAYERS = {"smollm2": "last-4", "smollm2-q4": "last-4"}


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a first config is to say.

    Attributes:
        name: Of the experiment.
        data: A file, a dataset folder or a Hub id.
        columns: What the columns `prompt`, `chosen` and `rejected` are called, as far as known.
        client: The column that says whose a row is; None if there is none.
        model: The model's path.
        algorithm: By name; by default fedpdpo, or feddpo for judgements of single answers.
        judged: Rows are such judgements.
    """

    name: str
    data: str
    columns: Mapping[str, str] = field(default_factory=dict)
    client: str | None = None
    model: str = "builtin"
    algorithm: str | None = None
    judged: bool = False


def columns_of(data: str) -> dict[str, list[Any]]:
    """Return the columns of a table, in their order, with what stands in its first rows.

    Raises:
        UserError: There is no row.
    """
    rows = [row for _, row in islice(tables.read_table(data), LOOKED_AT)]
    if not rows:
        raise UserError(f"{data}: there is no row.")
    names = dict.fromkeys(column for row in rows for column in row)
    return {name: [row.get(name) for row in rows] for name in names}


def _is_vote(values: Sequence[Any]) -> bool:
    """Return whether a column says which of two was better, as model_a and tie do."""
    few = set(map(str, values))
    return len(values) > len(few) <= VOTES and max(map(len, few)) <= LABEL


def completed(wanted: Wanted) -> Wanted:
    """Return what is wanted with the columns that a table has.

    Raises:
        UserError: The table has no such column, or none that could be meant.
    """
    known = columns_of(wanted.data)
    for column in filter(None, (*wanted.columns.values(), wanted.client)):
        if column not in known:
            raise UserError(
                f"{wanted.data}: there is no column {column!r}; there are {', '.join(known)}."
            )
    columns = dict(wanted.columns)
    judged = {"completion", "label"} <= set(known) and columns.keys() <= {"prompt"}
    for role, others in ALSO.items():
        if judged and role != "prompt":
            continue
        meant = [name for name in (role, *others) if name in known]
        if role != "prompt":  # a winner may be the better answer, or which it was
            meant = [name for name in meant if name == role or not _is_vote(known[name])]
        # without a prompt, answers begin with it; single prompts are for rewards
        if role not in columns and meant:
            columns[role] = meant[0]
        elif role not in columns and role != "prompt":
            raise UserError(
                f"{wanted.data}: which column holds the {role} answers? Give --{role} with one "
                f"of {', '.join(known)}."
            )
    client = wanted.client or ("client" if "client" in known else None)
    algorithm = wanted.algorithm or ("feddpo" if judged else "fedpdpo")
    return replace(wanted, columns=columns, client=client, algorithm=algorithm, judged=judged)


def starter(wanted: Wanted) -> tuple[str, str]:
    """Return a commented config for somebody's rows, and what was not looked at, if anything.

    The rows are read and laid out for the model, and what cannot be used is left out or cut, as the
    config says.

    Raises:
        UserError: There are no rows that could be used, or a name is none of fedpref's.
    """
    wanted = completed(wanted)
    content, said = _content(wanted), dict[str, str]()
    try:
        unusable, note = _unusable(content, said)
    except UserError as first:
        # somebody's rows may all be too long
        content, said = _content(wanted), {"truncation_mode": CUT}
        content["task"]["truncation_mode"] = "keep_end"
        try:
            unusable, note = _unusable(content, said)
        except UserError:
            if not str(first).startswith("partition:"):  # a row, or a name, is wrong
                raise first from None
            raise UserError(
                f"{wanted.data}: its rows make no client with rows to train on and others to hold "
                f"out, of another prompt: {first}"
            ) from first
    if long := counted(unusable).get("too long"):
        content["task"]["truncation_mode"] = "keep_end"
        said["truncation_mode"] = f"{long} {CUT}"
        unusable, note = _unusable(content, said)
    if unusable:
        counts = ", ".join(f"{count} {kind}" for kind, count in counted(unusable).items())
        said["unusable"] = f"rows that cannot be used are left out ({counts}); refuse stops at them"
    else:
        del content["data"]["unusable"]
    return _text(wanted, content, said), note


def _content(wanted: Wanted) -> dict[str, Any]:
    data = {"name": "files", "path": whole_path(wanted.data)}
    data |= {f"{role}_column": name for role, name in wanted.columns.items() if name != role}
    partition: dict[str, Any] = {"name": "iid", "clients": CLIENTS}
    if wanted.client:
        partition = {"name": "natural", "column": wanted.client}
    model: dict[str, Any] = {"path": whole_path(wanted.model)}
    if wanted.model in LAYERS:
        model["lora_layers_to_transform"] = LAYERS[wanted.model]
    task: dict[str, Any] = {"model": model}
    baselines = ["alone", "pooled", "words", "length"]
    if wanted.judged:
        task, baselines = {"name": "feedback", **task}, ["alone", "pooled"]
    local_steps = {"steps": 5, "batch_size": 4, "learning_rate": RATES.get(wanted.model, 1e-4)}
    return {
        "name": wanted.name,
        "data": {**data, "unusable": "skip"},
        "partition": partition,
        "task": task,
        "algorithm": {"name": wanted.algorithm, "local": local_steps},
        "rounds": 5,
        "baselines": baselines,
    }


def _unusable(content: dict[str, Any], said: dict[str, str]) -> tuple[Sequence[Unusable], str]:
    """Return the rows that cannot be used, and why they were not all looked at, if so.

    Clients that have too few rows for it are left out, if some have enough.
    """
    experiment = config.parse(Experiment, content, "init")
    try:
        task, note = experiment.build_task(), ""
    except UserError as error:
        task, note = None, f"The rows have not been laid out for the model: {error}"
    try:
        reading = encoded(experiment, task)[0] if task else experiment.read()
    except UserError:
        if content["partition"].get("clients", 1) > FEWEST_CLIENTS:  # of so few rows, fewer of them
            content["partition"]["clients"] -= 1
            return _unusable(content, said)
        if content["partition"]["name"] != "natural" or "min_test_rows" in content["partition"]:
            raise
        content["partition"] |= {"min_rows": 4 * FEW, "min_test_rows": FEW}
        said["partition"] = "clients without enough rows of their own are left out"
        return _unusable(content, said)
    return reading.unusable, note


def _text(wanted: Wanted, content: Mapping[str, Any], said: Mapping[str, str]) -> str:
    """Return a config as somebody would write it, with comments."""
    data, task, algorithm = content["data"], content["task"], content["algorithm"]
    whose = (
        said.get("partition") or "the column that says whose a row is"
        if wanted.client
        else "no column says whose a row is: shared out at random. {name: natural, column: ...}"
    )
    lines = [
        f"# {wanted.name}: written by `fedpref init`. `fedpref check` reads it, `fedpref run` "
        "trains.",
        "# All keys: `fedpref list experiment`; of parts: `fedpref list files`, "
        f"`fedpref list {wanted.algorithm}`, ...",
        f"name: {_plain(wanted.name)}",
        "data:",
        *(f"  {key}: {_plain(value)}{_beside(said.get(key))}" for key, value in data.items()),
        f"partition: {_flow(content['partition'])}{_beside(whose)}",
        "task:",
        *([f"  name: {task['name']}"] if "name" in task else []),
        f"  model: {_flow(task['model'])}{_beside('a Hub id, a folder, or `fedpref model`')}",
    ]
    if "truncation_mode" in task:
        lines.append(
            f"  truncation_mode: {task['truncation_mode']}{_beside(said['truncation_mode'])}"
        )
    lines += [
        "algorithm:",
        f"  name: {algorithm['name']}{_beside('`fedpref list algorithms`')}",
        f"  local: {_flow(algorithm['local'])}{_beside('a client in a round')}",
        f"rounds: {content['rounds']}",
        f"baselines: [{', '.join(content['baselines'])}]"
        + _beside("each client by itself, all data in one place, what costs nothing"),
    ]
    return "\n".join(lines) + "\n"


def _plain(value: Any) -> str:
    """Return a value as YAML has it on one line: JSON, without quotes where none are needed."""
    if isinstance(value, str):
        value = value.replace("${", "\\${")  # no key of the config
    text = str(value)
    is_word = text.replace("-", "").replace("_", "").replace(".", "").replace("/", "").isalnum()
    is_plain = is_word and yaml.safe_load(text) == value
    return text if is_plain else json.dumps(value, ensure_ascii=False)


def _flow(content: Mapping[str, Any]) -> str:
    return "{" + ", ".join(f"{key}: {_plain(value)}" for key, value in content.items()) + "}"


def _beside(comment: str | None) -> str:
    return f" # {comment}" if comment else ""
