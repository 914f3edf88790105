"""What a run computes with and does not train, and its settings: told when it begins, and when it
goes on.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fedpref import config
from fedpref.errors import UserError
from fedpref.experiments.experiment import Experiment
from fedpref.experiments.run_directory import RunDirectory
from fedpref.experiments.run_files import FROZEN, read_json
from fedpref.numerics import trees
from fedpref.tasks import Task
from fedpref.tasks.dialogue import DialogueLearner
from fedpref.tasks.group_reward import CombinedReward
from fedpref.tasks.language import LanguageLearner
from fedpref.tasks.online import OnlinePreferenceLearner
from fedpref.tasks.opinion import OpinionLearner

# parts of a config that decide what is learned
DECIDING = (
    *("data", "partition", "task", "algorithm", "federation", "network", "rounds", "seed"),
    *("stop", "keep", "privacy", "secrecy", "attack"),
)
# settings of a task and its model that decide nothing
NOT_DECIDING = (
    *("device", "gradient_checkpointing", "trunk_states", "trunk_limit_mb", "cuda_graphs"),
    *("reference_scores", "samples", "sample_clients", "generation"),
)


# settings by which the same files are other weights
LOADED = ("path", "revision", "gguf_file", "dtype", "load_in_4bit", "load_in_8bit")


# among whom hostile clients of an attack are drawn
HOSTILE, OF_TRAINING = "hostile", "clients that train"


def frozen(task: Task) -> dict[str, str]:
    """Return digests of the model below what is trained and of groups' predictors, by their names.

    A model's digest is of its weights as they are computed with and of its config as transformers
    reads it, so that both stand beside it.
    """
    rewards: dict[str, Any] = {}
    if isinstance(task, OpinionLearner):
        found = of_model(task.encoder)
    elif isinstance(task, LanguageLearner):
        found = of_model(task.language)
    else:  # a task of somebody's own
        return {}
    if isinstance(task, DialogueLearner):
        rewards = dict(task.rewards)
    elif isinstance(task, OnlinePreferenceLearner):
        rewards = {"judge": task.judge}
    for name, reward in rewards.items():
        if isinstance(reward, CombinedReward):
            for group, one in reward.groups.items():
                found[f"rewards/{name}/{group}"] = trees.digest(one.params).hex()
    return found


def of_model(model: Any) -> dict[str, str]:
    """Return the digest of a language model or an encoder, and how it is read."""
    dtype = next(model.model.parameters()).dtype
    read_by = f"{model.wanted.type} {dtype}, transformers {version('transformers')}"
    fingerprint: str = model.fingerprint
    return {"model": fingerprint, "read_by": read_by}


def deciding(experiment: Experiment) -> dict[str, Any]:
    """Return the settings by which figures come out, of each part of a config, as plain data.

    Where files lie is none of them: a run, its data and its models may be moved.
    """
    said = config.dump(
        replace(
            experiment,
            data=experiment.data.with_paths(lambda _: ""),
            task=experiment.task.with_models(lambda _: ""),
        )
    )
    said["federation"]["gold"] = None
    if "path" in said["network"]["topology"]:
        said["network"]["topology"]["path"] = ""
    for free in NOT_DECIDING:
        said["task"].pop(free, None)
        said["task"].get("model", {}).pop(free, None)
    return {name: said[name] for name in DECIDING}


def decided(experiment: Experiment) -> dict[str, str]:
    """Return digests of the settings by which figures come out, of each part of a config."""
    texts = {name: json.dumps(said, sort_keys=True) for name, said in deciding(experiment).items()}
    digests = {
        f"settings/{name}": blake2b(text.encode(), digest_size=16).hexdigest()
        for name, text in texts.items()
    }
    is_drawn = experiment.attack is not None and experiment.federation.num_newcomers > 0
    return {**digests, **({HOSTILE: OF_TRAINING} if is_drawn else {})}


def draws_of_all(run: Path) -> bool:
    """Return whether a run's hostile clients were drawn among all, newcomers too, as once."""
    file = run / FROZEN
    return not file.exists() or HOSTILE not in read_json(file)


def refuse_apart(runs: Iterable[tuple[RunDirectory, Experiment]]) -> None:
    """Raise UserError where runs name one model and were not made with the same one.

    Args:
        runs: Finished ones, with their experiments.
    """
    seen: dict[tuple[str, ...], tuple[str, RunDirectory]] = {}
    for folder, experiment in runs:
        if not (folder.path / FROZEN).exists():  # of an older version
            continue
        told = read_json(folder.path / FROZEN)
        if "model" not in told:
            continue
        model = config.dump(experiment.task).get("model", {})
        named = json.dumps([model.get(name) for name in LOADED])
        digest, other = seen.setdefault((named, told.get("read_by", "")), (told["model"], folder))
        if digest != told["model"]:
            raise UserError(
                f"{folder.path} and {other.path}: {experiment.task.model.path} has changed between "
                "these runs, and what is told of one model is not of the other. Make them anew."
            )


def refuse_other(folder: RunDirectory, now: Mapping[str, str]) -> None:
    """Raise UserError where a run was begun with another model, groups' predictors or settings.

    Of a model that is read otherwise, on another machine or by another transformers, nothing can be
    told.

    Args:
        folder: The run.
        now: What `frozen`, `of_model` or `decided` says; names that are not in it, and those that
            an older fedpref has not written, are not compared.
    """
    file = folder.path / FROZEN
    if not file.exists():  # of an older run
        return
    began = read_json(file)
    if HOSTILE in now and HOSTILE not in began:
        raise UserError(
            f"{folder.path}: it is of an older fedpref, which drew hostile clients otherwise. "
            "Begin a new run."
        )
    untold = {"read_by"} if began.get("read_by") == now.get("read_by") else {"read_by", "model"}
    names = (began.keys() & now.keys()) - untold
    if other := sorted(name for name in names if began[name] != now[name]):
        raise UserError(
            f"{folder.path}: {', '.join(other)}: this is not what the run began with "
            f"({file.name} says so). Put back what lay there, or begin a new run."
        )


def as_text(experiment: Experiment, task: Task) -> str:
    """Return the file's content, where a run begins."""
    return json.dumps({**frozen(task), **decided(experiment)}, indent=1) + "\n"
