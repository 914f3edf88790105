"""Rewards by a finished run of opinions: what its groups would choose among answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedpref.experiments.finished import FinishedRun
from fedpref.tasks.group_reward import GroupReward, Kind


def group_rewards(
    run: str | Path, groups: Sequence[str] = (), kind: Kind = "share"
) -> dict[str, GroupReward]:
    """Return rewards of answers by groups of a finished run, each with TRL's signature.

    A group's context is drawn from its own data, which the run's config names, and is that of the
    run's evaluations.

    Args:
        run: The run directory.
        groups: Whose rewards; by default all groups'.
        kind: `share`, of the group that would choose an answer among all to the same prompt, or
            `logit`, what the shares are a softmax of.

    Raises:
        UserError: The run is of another task or not finished, its data has changed, or a name is
            none of its groups.
    """
    return FinishedRun.at(run).group_rewards(groups, kind)
