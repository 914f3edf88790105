"""What a run computes with and does not train: told when it begins, and again when it goes on."""

from __future__ import annotations

import json
from importlib.metadata import version
from typing import Any

from fedpref.errors import UserError
from fedpref.experiments.run_directory import RunDirectory
from fedpref.experiments.run_files import FROZEN, read_json
from fedpref.numerics import trees
from fedpref.tasks import Task
from fedpref.tasks.group_reward import CombinedReward


def frozen(task: Task) -> dict[str, str]:
    """Return digests of the model below what is trained and of groups' predictors, by their names.

    A model's digest is of its weights as they are computed with and of its config as transformers
    reads it, so that both stand beside it.
    """
    at_work: Any = task
    model = getattr(at_work, "language", None) or getattr(at_work, "encoder", None)
    if model is None:  # a task of somebody's own
        return {}
    dtype = next(model.model.parameters()).dtype
    read_by = f"{model.wanted.type} {dtype}, transformers {version('transformers')}"
    found = {"model": model.fingerprint, "read_by": read_by}
    rewards = {**getattr(at_work, "rewards", {}), "judge": getattr(at_work, "judge", None)}
    for name, reward in rewards.items():
        if isinstance(reward, CombinedReward):
            for group, one in reward.groups.items():
                found[f"rewards/{name}/{group}"] = trees.digest(one.params)
    return found


def refuse_other(folder: RunDirectory, task: Task) -> None:
    """Raise UserError where a run was begun with another model or other groups' predictors.

    Of a model that is read otherwise, on another machine or by another transformers, nothing can be
    told.
    """
    file = folder.path / FROZEN
    if not file.exists():  # of an older run
        return
    began, now = read_json(file), frozen(task)
    untold = {"read_by"} if began.get("read_by") == now.get("read_by") else {"read_by", "model"}
    names = (began.keys() | now.keys()) - untold
    if other := sorted(name for name in names if began.get(name) != now.get(name)):
        raise UserError(
            f"{folder.path}: {', '.join(other)}: this is not what the run began with "
            f"({file.name} says so). Put back what lay there, or begin a new run."
        )


def as_text(task: Task) -> str:
    """Return the file's content, where a run begins."""
    return json.dumps(frozen(task), indent=1) + "\n"
