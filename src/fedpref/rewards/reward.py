"""The interface of rewards: TRL's signature, and settings that build it."""

from __future__ import annotations

import asyncio
import inspect
import math
import traceback
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar, Protocol, Self, TypeVar

import torch

from fedpref.errors import UserError
from fedpref.rewards.combine import Combine
from fedpref.types import Text

T = TypeVar("T")
IDS = "completion_ids"  # of TRL, tokens of completions


class RewardFunction(Protocol):
    """A function that returns a reward for each completion to the prompt in the same place.

    Prompts and completions are text, or lists of messages. It may be a coroutine's.
    """

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any
    ) -> Sequence[float]: ...


OpenGroups = Callable[[str, tuple[str, ...], Combine, Any], RewardFunction]
"""(run, groups, combine, kind) -> the reward of these groups of a run of opinions."""


def no_groups(run: str, groups: tuple[str, ...], combine: Combine, kind: Any) -> RewardFunction:
    """Raise UserError: nobody has said how a finished run is opened."""
    raise UserError(
        f"the reward of groups of {run}: it is opened by an experiment, as in "
        "Experiment.build_task()."
    )


class RewardSettings(ABC):
    """The settings of a reward, a frozen dataclass; `build` makes the function."""

    name: str
    compares: ClassVar[bool] = False
    """It compares several answers to a prompt."""

    @abstractmethod
    def build(self, open_groups: OpenGroups = no_groups) -> RewardFunction:
        """Load what the reward needs; raises UserError where it cannot be loaded."""

    def with_paths(self, renamed: Callable[[str], str]) -> Self:
        """Return the same reward with `renamed` applied to the models and runs that it reads."""
        return self

    @property
    def code(self) -> str | None:
        """`module:function` of code that it imports, which others must consent to."""
        return None

    @property
    def leans_on_history(self) -> bool:
        """Whether what it says of a batch depends on those before."""
        return False


def refuse_history(setting: str, rewards: Iterable[RewardSettings]) -> None:
    """Raise ValueError where a reward leans on batches before, which workers do not share."""
    if any(reward.leans_on_history for reward in rewards):
        raise ValueError(
            f"{setting}: combine: alpha leans on a history of batches, which workers do not share; "
            "take mean, min or max"
        )


def called(
    reward: RewardFunction,
    what: str,
    prompts: Sequence[Any],
    completions: Sequence[Any],
    columns: Mapping[str, Sequence[Any]],
    tokens: Sequence[Sequence[int]],
) -> list[float]:
    """Return the rewards of completions.

    Args:
        reward: The function.
        what: The setting that it is of, for messages.
        prompts: Of each completion.
        completions: The completions.
        columns: What else is known of each.
        tokens: Of each, which the function is given as `completion_ids` if it takes them.

    Raises:
        UserError: It does not keep to its signature.
    """
    if _takes_ids(reward):
        columns = {**columns, IDS: [list(one) for one in tokens]}
    try:
        given: Any = reward(prompts=prompts, completions=completions, **columns)
        if inspect.isawaitable(given):
            with ThreadPoolExecutor(1) as apart:  # whoever calls may be in a loop of its own
                given = apart.submit(_awaited, given, torch.is_grad_enabled()).result()
    except TypeError as error:
        *_, last = traceback.extract_tb(error.__traceback__)
        raise UserError(
            f"{what}: it was called with prompts, completions and the columns {sorted(columns)}: "
            f"{error} ({last.filename}, line {last.lineno})."
        ) from error
    try:
        if None in (given := list(given)):
            raise ValueError(
                "None is no reward here, where every objective has one of every completion; 0.0 "
                "counts for nothing"
            )
        values = [float(value) for value in given]
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{what}: it should return a number for each completion, and has returned "
            f"{str(given)[:80]}: {error}."
        ) from error
    if len(values) != len(completions) or not all(map(math.isfinite, values)):
        raise UserError(
            f"{what}: expected {len(completions)} numbers, one of each completion, found "
            f"{str(values)[:80]}."
        )
    return values


def _takes_ids(reward: RewardFunction) -> bool:
    try:
        takes = inspect.signature(reward).parameters
    except ValueError:  # of functions that are not Python's
        return False
    return IDS in takes or any(one.kind is one.VAR_KEYWORD for one in takes.values())


def _awaited(value: Awaitable[T], has_gradients: bool) -> T:
    """Return what is awaited; gradients are the caller's thread's to switch off."""

    async def whole() -> T:
        return await value

    with torch.set_grad_enabled(has_gradients):
        return asyncio.run(whole())


def as_given(prompt: Text) -> Any:
    """Return a prompt as reward functions are given it: text, or a list of messages."""
    return prompt if isinstance(prompt, str) else list(prompt)


def answered(prompt: Text, answer: str) -> Any:
    """Return an answer to a prompt as reward functions are given it: text, or a message."""
    return answer if isinstance(prompt, str) else [{"role": "assistant", "content": answer}]


def columns_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Return what stands beside rows, by column; None where a row has nothing of it."""
    names = {name for row in rows for name in row} - {"prompts", "completions", IDS}
    return {name: [row.get(name) for row in rows] for name in sorted(names)}


def plain(text: Text) -> str:
    """Return what a text or conversation says, without roles."""
    if isinstance(text, str):
        return text
    return "\n".join(str(message.get("content") or "") for message in text)
