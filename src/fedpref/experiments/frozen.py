"""What a run computes with and does not train: told when it begins, and again when it goes on."""

from __future__ import annotations

import json
from typing import Any

from fedpref.errors import UserError
from fedpref.experiments.run_directory import RunDirectory
from fedpref.experiments.run_files import FROZEN, read_json
from fedpref.numerics import trees
from fedpref.tasks import Task
from fedpref.tasks.group_reward import CombinedReward


def frozen(task: Task) -> dict[str, str]:
    """Return digests of the model below what is trained and of groups' predictors, by their names.

    A digest is of weights as they are computed with, so that the arithmetic stands beside them.
    """
    at_work: Any = task
    model = getattr(at_work, "language", None) or getattr(at_work, "encoder", None)
    if model is None:  # a task of somebody's own
        return {}
    dtype = next(model.model.parameters()).dtype
    found = {"model": model.fingerprint, "arithmetic": f"{model.wanted.type} {dtype}"}
    rewards = {**getattr(at_work, "rewards", {}), "judge": getattr(at_work, "judge", None)}
    for name, reward in rewards.items():
        if isinstance(reward, CombinedReward):
            for group, one in reward.groups.items():
                found[f"rewards/{name}/{group}"] = trees.digest(one.params)
    return found


def refuse_other(folder: RunDirectory, task: Task) -> None:
    """Raise UserError where a run was begun with another model or other groups' predictors.

    Where the arithmetic is another one, as on another machine, nothing can be told.
    """
    file = folder.path / FROZEN
    if not file.exists():  # of an older run
        return
    began, now = read_json(file), frozen(task)
    if began.get("arithmetic") != now.get("arithmetic"):
        return
    if other := sorted(
        name for name in began.keys() | now.keys() if began.get(name) != now.get(name)
    ):
        raise UserError(
            f"{folder.path}: {', '.join(other)}: this is not what the run began with "
            f"({file.name} says so). Put back what lay there, or begin a new run."
        )


def as_text(task: Task) -> str:
    """Return the file's content, where a run begins."""
    return json.dumps(frozen(task), indent=1) + "\n"
