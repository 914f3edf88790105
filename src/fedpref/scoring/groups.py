"""A run's predictor of opinions as a reward: what a group would choose among answers, told from what it has chosen before."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from fedpref import trees
from fedpref.data.preferences import Opinion, key
from fedpref.errors import UserError
from fedpref.rewards.combine import Combine, Mean
from fedpref.rundirectory import CLIENTS
from fedpref.running import existing_directory, exported, read_experiment
from fedpref.tasks import OpinionTask
from fedpref.tasks.opinion import FILE, OpinionLearner, Question, asking
from fedpref.trees import Tree

Text = str | Sequence[Mapping[str, str]]
Kind = Literal["share", "logit"]


@dataclass(frozen=True)
class GroupReward:
    """One group's reward, with the signature of TRL's reward functions.

    `share`: the share of the group that would choose this completion among all of the same prompt in the call, between 0 and 1.
    `logit`: what the shares are a softmax of; only differences between completions of one prompt mean anything.
    """

    learner: OpinionLearner
    params: Tree
    context: Sequence[Question]
    group: str
    kind: Kind = "share"
    asks: bool = False  # a prompt as a survey's question and its completions as the options, because the context's are

    @property
    def __name__(self) -> str:  # by which TRL logs it
        return f"reward/{self.group}"

    def __call__(self, prompts: Sequence[Text], completions: Sequence[Text], **_: Any) -> list[float]:
        """A reward for each completion to the prompt in the same place; raises UserError where a share would mean nothing."""
        asked = by_prompt(prompts)
        alone = next((prompt for prompt, places in asked.items() if len(places) < 2), None)
        if (self.kind == "share" or self.asks) and alone is not None:
            ways = "Give more: this run was trained on questions with their options." if self.asks else "Give more, or take logits."
            raise UserError(f"reward: a share is one among completions, and {alone[:60]!r} has only one. {ways}")
        said = [_said(completion) for completion in completions]
        if empty := next((prompt for prompt, places in asked.items() for i in places if not (prompt + said[i]).strip()), None):
            raise UserError(f"reward: there is nothing to score in a prompt and completion that are both empty ({empty!r}).")
        texts = {
            prompt: asking(prompt, [said[i] for i in places]) if self.asks else tuple(prompt + said[i] for i in places)
            for prompt, places in asked.items()
        }
        questions = [Question(self.group, of_prompt, (0.0,) * len(of_prompt)) for of_prompt in texts.values()]
        self.learner.embed(self.context)
        new = self.learner.embed(questions)
        found = self.learner.predict(self.params, self.context, questions, logits=self.kind == "logit")[0]
        self.learner.forget(new)
        rewards = [0.0] * len(said)
        for places, values in zip(asked.values(), found, strict=True):
            for place, value in zip(places, values.tolist(), strict=True):
                rewards[place] = value
        return rewards


@dataclass(frozen=True)
class CombinedReward:
    """Several groups' rewards as one, prompt by prompt, with the same signature."""

    groups: Mapping[str, GroupReward]
    combine: Combine

    @property
    def __name__(self) -> str:
        return f"reward/{self.combine.name}"

    def of_groups(self, prompts: Sequence[Text], completions: Sequence[Text]) -> Float[Tensor, "G n"]:
        """Each group's rewards."""
        return torch.tensor([reward(prompts, completions) for reward in self.groups.values()], dtype=torch.float64)

    def __call__(self, prompts: Sequence[Text], completions: Sequence[Text], **_: Any) -> list[float]:
        rewards, found = self.of_groups(prompts, completions), [0.0] * len(prompts)
        for places in by_prompt(prompts).values():
            for place, value in zip(places, self.combine(rewards[:, places]).tolist(), strict=True):
                found[place] = value
        return found


def group_rewards(run: str | Path, groups: Sequence[str] = (), kind: Kind = "share") -> dict[str, GroupReward]:
    """The rewards of these groups of a finished run, of all its groups if none are named.

    A group's context is drawn from its own data, which the run's config names, and is that of the run's evaluations. Raises UserError if
    the run is of another task or not finished, and for a name that is none of its groups.
    """
    experiment = read_experiment(existing_directory(run))
    if not isinstance(experiment.task, OpinionTask):
        raise UserError(f"{run}: the run's task is {experiment.task.name!r}; rewards come from a predictor of opinions (task: opinion).")
    learner = experiment.task.build()
    learner.place(0)
    clients = {client.name: client for client in experiment.clients()[0]}
    known = {name: entry["digest"] for name, entry in json.loads((Path(run) / CLIENTS).read_text()).items()}
    if changed := sorted(name for name, client in clients.items() if known.get(name) != client.digest):
        raise UserError(f"{run}: the data of {changed[:5]} is not what the run was trained on.")
    shards = {name: learner.encode(client) for name, client in clients.items()}
    if unknown := sorted(set(groups) - shards.keys()):
        raise UserError(f"{run}: {unknown[:5]} are no groups of the run; its groups are {list(shards)[:12]}.")
    loaded: dict[Path, Tree] = {}
    found = {}
    for group in groups or shards:
        folder = exported(run, group)
        params = loaded.setdefault(folder, trees.load(folder / FILE))
        asks = isinstance(clients[group].train[0], Opinion)
        found[group] = GroupReward(learner, params, shards[group].context, group, kind, asks)
    return found


def combined_reward(run: str | Path, groups: Sequence[str] = (), combine: Combine = Mean(), kind: Kind = "share") -> CombinedReward:
    """One reward of these groups of a finished run, of all its groups if none are named; see `group_rewards`."""
    return CombinedReward(group_rewards(run, groups, kind), combine)


def by_prompt(prompts: Sequence[Text]) -> dict[str, list[int]]:
    """The places of each prompt's completions."""
    found: dict[str, list[int]] = defaultdict(list)
    for place, prompt in enumerate(prompts):
        found[_said(prompt)].append(place)
    return found


def _said(text: Text) -> str:
    return text if isinstance(text, str) else key(tuple(text))
