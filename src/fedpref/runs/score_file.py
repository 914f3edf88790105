"""Files of answers, scored by a run of opinions."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from fedpref import config
from fedpref.data.parsing import text
from fedpref.data.preferences import Text
from fedpref.data.tables import Record, read_table
from fedpref.engines.workers import one_thread
from fedpref.errors import UserError
from fedpref.rewards.combine import Combine, Mean
from fedpref.runs.group_rewards import group_rewards
from fedpref.tasks.group_reward import CombinedReward, Kind


@dataclass(frozen=True)
class _Options:
    combine: Combine = Mean()


def score(run: Path, data: Path, groups: Sequence[str], combine: str, kind: Kind) -> Iterator[str]:
    """Yield a JSON line for each row of a file: prompt, completions, each group's rewards.

    The combined rewards stand beside them.

    Args:
        run: The run directory.
        data: The file.
        groups: Whose rewards; by default all groups'.
        combine: How one reward is made of many, as YAML.
        kind: Shares of a prompt's answers, or logits.

    Raises:
        UserError: A row has no prompt or completions; before anything is scored.
    """
    try:
        content = yaml.safe_load(combine)
    except yaml.YAMLError as error:
        raise UserError(f"--combine {combine!r}: this is no name and no YAML mapping.") from error
    how = config.parse(_Options, {"combine": content}, "--combine").combine
    rows = [_row(record, 1 if kind == "logit" else 2) for record in read_table(str(data))]
    with one_thread():
        reward = CombinedReward(group_rewards(run, groups, kind), how)
        for prompt, completions in rows:
            rewards = reward.of_groups([prompt] * len(completions), completions)
            by_group = dict(zip(reward.groups, rewards.tolist(), strict=True))
            yield json.dumps(
                {
                    "prompt": prompt,
                    "completions": completions,
                    "rewards": by_group,
                    "reward": how(rewards).tolist(),
                }
            )


def _row(record: Record, least: int) -> tuple[Text, list[Text]]:
    where, row = record
    completions = row.get("completions") or [
        row[name] for name in ("chosen", "rejected", "completion") if name in row
    ]
    if not row.get("prompt") or not isinstance(completions, list) or len(completions) < least:
        raise UserError(
            f"{where}: expected prompt, and completions, a list of {least} or more, or chosen "
            "and rejected, each as text or as messages."
        )
    return text(row["prompt"], "prompt", where), [
        text(completion, "completions", where) for completion in completions
    ]
