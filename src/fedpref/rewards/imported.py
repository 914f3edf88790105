"""Rewards by a function that can be imported, and by a finished run of opinions."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Self

from fedpref.errors import UserError
from fedpref.rewards.combine import AdaptiveAlpha, Combine, Mean
from fedpref.rewards.reward import OpenGroups, RewardFunction, RewardSettings, no_groups


@dataclass(frozen=True, kw_only=True)
class Function(RewardSettings):
    """A function of yours with the signature of TRL's reward functions."""

    path: str
    """`module:function` on the Python path."""
    name: Literal["function"] = "function"
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """What the function is called with once, to return the reward function; without them it is the
    reward function."""

    @property
    def code(self) -> str:
        return self.path

    def build(self, open_groups: OpenGroups = no_groups) -> RewardFunction:
        module, _, name = self.path.partition(":")
        try:
            function: Any = getattr(importlib.import_module(module), name)
        except Exception as error:  # whatever a module of one's own does as it is imported
            raise UserError(
                f"reward function {self.path!r} could not be imported: {error}. Expected "
                "module:function on the Python path."
            ) from error
        try:
            made: RewardFunction = function(**self.arguments) if self.arguments else function
        except TypeError as error:
            raise UserError(
                f"reward function {self.path!r}: it does not take the arguments "
                f"{', '.join(self.arguments)}: {error}."
            ) from error
        return made


@dataclass(frozen=True, kw_only=True)
class Groups(RewardSettings):
    """What groups of a finished run of opinions would choose, by the run's predictor."""

    run: str
    """The directory of a finished run of the task `opinion`."""
    name: Literal["groups"] = "groups"
    groups: tuple[str, ...] = ()
    """Whose rewards; by default those of all groups of the run."""
    combine: Combine = Mean()
    """How one reward is made of several groups'."""
    kind: Literal["share", "logit"] = "share"
    """The share of a group that would choose an answer among all to the same prompt, or what the
    shares are a softmax of."""

    compares: ClassVar[bool] = True

    def with_paths(self, renamed: Callable[[str], str]) -> Self:
        return replace(self, run=renamed(self.run))

    @property
    def leans_on_history(self) -> bool:
        return isinstance(self.combine, AdaptiveAlpha)

    def build(self, open_groups: OpenGroups = no_groups) -> RewardFunction:
        return open_groups(self.run, self.groups, self.combine, self.kind)
