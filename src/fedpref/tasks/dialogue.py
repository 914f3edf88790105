"""Alignment by rewards: the policy answers prompts, and follows the rewards of its answers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from fedpref.data.preferences import ClientData, Opinion, Text
from fedpref.data.splits import identity
from fedpref.data.unusable import Unusable, kept
from fedpref.errors import UserError
from fedpref.losses.policy import GRPO, PPO, RLOO, Sampled, surrogate
from fedpref.models.generation import OwnSampling, Sampling, generate
from fedpref.models.own_parts import Parts
from fedpref.models.packed import Row as Packed
from fedpref.models.trunk import States
from fedpref.numerics import seeds, trees
from fedpref.numerics.metrics import REWARD
from fedpref.numerics.trees import Tree
from fedpref.privacy import Unit
from fedpref.rewards import Reward
from fedpref.rewards.reward import (
    OpenGroups,
    answered,
    as_given,
    called,
    columns_of,
    no_groups,
    plain,
    refuse_history,
)
from fedpref.rewards.text import distinct
from fedpref.tasks.batches import BatchSize, Examples, chance_of, numbered
from fedpref.tasks.language import LanguageLearner, LanguageTask, Tokens
from fedpref.tasks.task import CRITIC, Apart, ExampleOutcome
from fedpref.types import Count, Name, WholeNumber


@dataclass(frozen=True, kw_only=True)
class DialogueTask(LanguageTask):
    """Prompts, and rewards of the answers that the policy gives; each reward is an objective."""

    # not by a column: a prompt that two have written is there once, under the first one's name
    units: ClassVar[frozenset[str]] = frozenset({"prompt"})
    measures: ClassVar[frozenset[str]] = frozenset(
        {REWARD, "kl", "completions/mean_length", "completions/ended", "distinct_1", "distinct_2"}
    )

    compares_by_shares: ClassVar[bool] = False

    name: Literal["dialogue"] = "dialogue"
    rewards: dict[Name, Reward] = field(default_factory=dict)
    """The reward of each objective, by the objective's name."""
    estimator: Annotated[PPO | RLOO | GRPO, Field(discriminator="name")] = PPO()
    """How rewards become advantages."""
    sampling: Sampling = Sampling()
    """How answers are drawn."""
    num_generations: Count = 4
    """Answers to each prompt of a batch."""
    evaluation_prompts: Count = 64
    """Held-out prompts of each client that are answered in an evaluation."""
    samples: WholeNumber = 4
    """Held-out prompts of each client that are answered before training and after, to be read."""

    def __post_init__(self) -> None:
        if not self.rewards:
            raise ValueError(
                "task.rewards: there are none; give each objective one, as in {polite: {name: "
                "sentiment}}"
            )
        self._check_names()
        refuse_history("task.rewards", self.rewards.values())
        if self.num_generations < 2 and not self.estimator.needs_critic:
            raise ValueError(
                f"task.num_generations: {self.estimator.name} compares answers to one prompt "
                "with one another; take 2 or more"
            )

        if self.num_generations < 2 and any(one.compares for one in self.rewards.values()):
            raise ValueError(
                "task.num_generations: a reward is a share among several answers to one prompt; "
                "take 2 or more"
            )

    @property
    def answers_together(self) -> int:
        """Answers to a held-out prompt: one, unless a reward compares several."""
        return (
            max(2, self.num_generations)
            if any(reward.compares for reward in self.rewards.values())
            else 1
        )

    @property
    def objectives(self) -> tuple[str, ...]:
        return tuple(self.rewards)

    @property
    def measures_examples(self) -> bool:
        return False

    @property
    def needs_critics(self) -> bool:
        return self.estimator.needs_critic

    def check(self, parts: Parts) -> None:
        if parts:
            raise UserError(
                "algorithm.parts: answers are drawn from the model with one adapter, without "
                "parts of a client's own. "
                "Take firm, feddpo or another algorithm without parts for the task 'dialogue'."
            )

    def reward_settings(self) -> Mapping[str, Reward]:
        return self.rewards

    def without_samples(self) -> Self:
        return replace(self, samples=0)

    def evaluating(self, examples: int) -> Self:
        return replace(self, evaluation_prompts=examples)

    def with_models(self, renamed: Callable[[str], str]) -> Self:
        same = super().with_models(renamed)
        rewards: Any = {name: reward.with_paths(renamed) for name, reward in self.rewards.items()}
        return replace(same, rewards=rewards)

    def build(self, open_groups: OpenGroups = no_groups) -> DialogueLearner:
        return DialogueLearner(self, open_groups)


@dataclass(frozen=True)
class Prompted:
    """A prompt: its tokens, its text, and the columns that rewards are given."""

    tokens: Tokens
    text: Text
    columns: Mapping[str, Any]


@dataclass(frozen=True)
class DialogueShard:
    """One client's prompts."""

    name: str
    train: tuple[Prompted, ...]
    test: tuple[Prompted, ...]
    truncated: int = 0
    validation: tuple[Prompted, ...] = ()

    def __len__(self) -> int:
        return len(self.train)

    def validating(self) -> DialogueShard:
        return replace(self, test=self.validation)


@dataclass
class Rollouts:
    """Answers to a batch's prompts, n tokens in all, and their rewards.

    What follows from the policy that drew them is filled in once it is known.
    """

    rows: Sequence[Packed]
    rewards: Float[Tensor, "M A"]
    reference: Float[Tensor, " n"]
    kept: States
    """Of the rows, at the end of the frozen trunk, if there is one."""
    sampled: Sampled | None = None
    advantages: list[Float[Tensor, " n"]] = field(default_factory=list)
    """Of each objective."""
    returns: list[Float[Tensor, " n"] | None] = field(default_factory=list)


class DialogueLearner(LanguageLearner):
    """The task with its model and rewards loaded."""

    settings: DialogueTask

    def __init__(self, settings: DialogueTask, open_groups: OpenGroups) -> None:
        super().__init__(settings)
        # what the untrained model answers, where rewards compare: by client and prompts
        self._untrained: dict[tuple[str, tuple[Tokens, ...]], list[Tokens]] = {}
        self.rewards = {
            name: reward.build(open_groups) for name, reward in settings.rewards.items()
        }
        if settings.sampling.max_completion_length > self.max_length - 8:
            raise UserError(
                f"task.sampling.max_completion_length: {settings.sampling.max_completion_length} "
                "tokens leave no room for a prompt in "
                f"the {self.max_length} of task.max_length."
            )

    @property
    def prepares(self) -> str:
        return ""

    # ---- data

    def encode(self, data: ClientData, unusable: list[Unusable] | None = None) -> DialogueShard:
        """Return a client's prompts, each once; see `Task.encode`."""
        (train, _), (test, _), (validation, _) = sides = [
            self._prompts(rows, unusable) for rows in (data.train, data.test, data.validation)
        ]
        return DialogueShard(data.name, train, test, sum(cut for _, cut in sides), validation)

    def _prompts(
        self, rows: Sequence[Any], unusable: list[Unusable] | None
    ) -> tuple[tuple[Prompted, ...], int]:
        prompted: dict[Tokens, Prompted] = {}
        cut = 0
        room = self.max_length - self.settings.sampling.max_completion_length
        for row in rows:
            if isinstance(row, Opinion):
                raise UserError(
                    f"{row.where}: the row is a group's opinion; the task 'dialogue' needs prompts."
                )
            with kept(unusable):
                whole, _ = self.tokens(row.prompt, (), row.where)
                if len(whole) > room and self.settings.truncation_mode == "refuse":
                    raise Unusable(
                        "too long",
                        row.where,
                        f"the prompt has {len(whole)} tokens, and task.max_length "
                        f"{self.max_length} less the "
                        f"{self.settings.sampling.max_completion_length} of "
                        f"task.sampling.max_completion_length leaves {room}",
                    )
                tokens = self.cut(whole, room) if len(whole) > room else whole
                cut += len(whole) > room and tokens not in prompted
                prompted.setdefault(tokens, Prompted(tokens, row.prompt, row.columns))
        return tuple(prompted.values()), cut

    def prepare(self, shard: DialogueShard, cache: Path) -> DialogueShard:
        return shard

    # ---- learning

    def parts(self, settings: Parts, rng: torch.Generator) -> Tree:
        """Return a critic for each objective, if the estimator has them; they begin at zero.

        A critic is linear in the hidden state.
        """
        self.settings.check(settings)
        width = self.language.model.config.get_text_config().hidden_size
        return {
            f"{CRITIC}{name}": torch.zeros(width + 1)
            for name in self.objectives
            if self.settings.needs_critics
        }

    def draw(
        self, params: Tree, start: Tree, shard: DialogueShard, size: BatchSize, rng: torch.Generator
    ) -> Rollouts:
        """Draw answers to a batch of prompts, by the policy as it is."""
        if size.max_tokens:
            raise UserError(
                "algorithm.local.max_tokens_per_batch: batches of prompts are counted, their "
                "answers' tokens are not known. Set batch_size."
            )
        if size.epochs is None:
            indices = torch.randperm(len(shard.train), generator=rng).tolist()[: size.examples]
        else:
            # batches of prompts differ by one at most, so that their weights hardly do
            known = Examples(tuple(len(one.tokens) for one in shard.train))
            indices, _ = size.epochs.next(known, replace(size, is_by_prompt=False))
        size.note(indices)
        return self._rollouts(params, [shard.train[i] for i in indices], rng)

    def _rollouts(
        self,
        params: Tree,
        prompts: Sequence[Prompted],
        rng: torch.Generator,
    ) -> Rollouts:
        """Return answers to prompts, by the policy as it is, with their rewards."""
        samples = self.settings.num_generations
        answers = generate(
            self.language,
            self._policy(params),
            [prompt.tokens for prompt in prompts],
            samples,
            self.settings.sampling,
            rng,
        )
        rows = [
            (prompt.tokens, answers[k * samples : (k + 1) * samples])
            for k, prompt in enumerate(prompts)
        ]
        asked = [prompt for prompt in prompts for _ in range(samples)]
        rewards = self.judge(asked, answers)
        kept = self.language.passing()
        with torch.no_grad():
            reference = self._tokens(None, rows, kept)[0]
        return Rollouts(rows, rewards.to(self.device), reference, kept)

    def units(self, shard: DialogueShard, unit: Unit) -> list[int]:
        """Return which unit each training prompt belongs to; see `Task.units`."""
        # in whatever spelling
        return numbered([identity(one.text, "prompt") for one in shard.train])

    def private_batch(self, shard: DialogueShard, batch: int) -> tuple[float, list[float]]:
        chance = chance_of(len(shard), batch)
        return chance, [chance * len(shard)] * len(self.objectives)

    def gradients_apart(
        self,
        params: Tree,
        start: Tree,
        shard: DialogueShard,
        units: Sequence[Sequence[int]],
        batch: int,
        wanted: Collection[str],
        draws: seeds.Draws,
    ) -> Iterator[Apart]:
        """Yield units' gradients, one by one; see `Task.gradients_apart`.

        A unit's answers are drawn and rewarded by themselves: beside others' they would be padded,
        and another token drawn now and then. Each prompt's losses are of its own answers.
        """
        samples = self.settings.num_generations
        leaves = {n: t.detach().requires_grad_() for n, t in trees.select(params, wanted).items()}
        for unit in units:
            rng = draws(f"unit/{unit[0]}")
            self.begin_dropout(rng)
            drawn = self._rollouts(params, [shard.train[i] for i in unit], rng)
            # of each prompt's reference log-probabilities, where they end
            ends = [0, *accumulate(sum(map(len, answers)) for _, answers in drawn.rows)]
            total = {n: t.new_zeros(len(self.objectives), *t.shape) for n, t in leaves.items()}
            for k in range(len(unit)):
                one = Rollouts(
                    drawn.rows[k : k + 1],
                    drawn.rewards[:, k * samples : (k + 1) * samples],
                    drawn.reference[ends[k] : ends[k + 1]],
                    drawn.kept,
                )
                losses, _ = self.losses({**params, **leaves}, one)
                for m, loss in enumerate(losses):
                    found = torch.autograd.grad(
                        loss, list(leaves.values()), retain_graph=m + 1 < len(losses)
                    )
                    for name, gradient in zip(leaves, found, strict=True):
                        total[name][m] += gradient
            count = len(self.objectives)
            yield Apart(total, [0] * count, range(count))

    def judge(self, prompts: Sequence[Prompted], answers: Sequence[Tokens]) -> Float[Tensor, "M A"]:
        """Return each objective's rewards of answers' tokens [M, A], on the CPU.

        Raises:
            UserError: A reward function does not keep to its signature.
        """
        asked, texts = [as_given(prompt.text) for prompt in prompts], self.texts(prompts, answers)
        columns = columns_of([prompt.columns for prompt in prompts])
        rewards = [
            called(reward, f"task.rewards.{name}", asked, texts, columns, answers)
            for name, reward in self.rewards.items()
        ]
        return torch.tensor(rewards)

    def texts(self, prompts: Sequence[Prompted], answers: Sequence[Tokens]) -> list[Any]:
        """Return answers as rewards are given them: text, or a message after a conversation."""
        said = self.language.tokenizer.batch_decode(
            [list(answer) for answer in answers], skip_special_tokens=True
        )
        return [answered(prompt.text, text) for prompt, text in zip(prompts, said, strict=True)]

    def losses(
        self, params: Tree, batch: Rollouts
    ) -> tuple[Float[Tensor, " M"], Mapping[str, float]]:
        """Return each objective's surrogate, with its critic's squared error where there is one."""
        estimator = self.settings.estimator
        tokens, hidden = self._tokens(self._policy(params), batch.rows, batch.kept, training=True)
        critics = (
            [params[CRITIC + name] for name in self.objectives] if estimator.needs_critic else []
        )
        states = hidden.detach().float()
        values = [states @ critic[:-1] + critic[-1] for critic in critics]
        if batch.sampled is None:  # this is the policy that drew them
            counts = tuple(len(answer) for _, answers in batch.rows for answer in answers)
            batch.sampled = Sampled(
                tokens.detach(), batch.reference, counts, self.settings.num_generations
            )
            for m, rewards in enumerate(batch.rewards):
                advantages, returns = estimator.advantages(
                    rewards, batch.sampled, values[m].detach() if values else None
                )
                batch.advantages.append(advantages)
                batch.returns.append(returns)
        losses = [
            surrogate(tokens, advantages, batch.sampled, estimator)
            for advantages in batch.advantages
        ]
        metrics = self._metrics(batch.rewards, batch.sampled, tokens)
        if isinstance(estimator, PPO):
            errors = [
                (value - target).square().mean()
                for value, target in zip(values, batch.returns, strict=True)
                if target is not None
            ]
            losses = [
                loss + estimator.vf_coef * error for loss, error in zip(losses, errors, strict=True)
            ]
            metrics["value_error"] = float(torch.stack(errors).detach().mean())
        stacked = torch.stack(losses)
        return stacked, {"loss": float(stacked.detach().mean()), **metrics}

    def _metrics(
        self, rewards: Float[Tensor, "M A"], sampled: Sampled, tokens: Float[Tensor, " n"]
    ) -> dict[str, float]:
        means = rewards.mean(1).tolist()
        ratio = tokens.detach() - sampled.old
        return {
            **{f"rewards/{name}": mean for name, mean in zip(self.objectives, means, strict=True)},
            REWARD: sum(means) / len(means),
            "kl": float(sampled.summed(sampled.old - sampled.reference).mean()),
            "ratio": float(ratio.exp().mean()),
            "completions/mean_length": len(tokens) / len(sampled.counts),
            "num_tokens": float(len(tokens)),
            "num_samples": float(len(sampled.counts)),
        }

    def batches(self, shard: DialogueShard) -> Iterator[tuple[Rollouts, float]]:
        raise UserError(
            "diagnostics: examples of the task 'dialogue' are drawn, they have no losses that "
            "could be summed. Leave it out."
        )

    def outcomes(self, params: Tree, shard: DialogueShard) -> list[ExampleOutcome]:
        """Return nothing: answers are rewarded, not right or wrong."""
        return []

    def generated(self, params: Tree, shard: DialogueShard) -> Mapping[str, float]:
        """Return nothing: an evaluation is of answers already."""
        return {}

    def choices(self, params: Tree, shard: DialogueShard) -> Float[Tensor, " n"]:
        raise UserError("diagnostics: the task 'dialogue' chooses nothing. Leave it out.")

    @torch.no_grad()
    def evaluate(self, params: Tree, shard: DialogueShard) -> Mapping[str, float]:
        """Return means over answers to the first held-out prompts, drawn alike every time.

        There is one answer to each prompt. Where a reward compares answers there are several, and
        as many of the untrained model's beside them, for shares among a policy's own would come to
        the same mean whatever it says. Metrics are rewards; `kl`, the answer's log-ratio to the
        reference; its length in tokens, whether it has an end, and the share of its words and pairs
        of words that it has not said before.
        """
        policy, prompts = self._policy(params), shard.test[: self.settings.evaluation_prompts]
        together = self.settings.answers_together

        def drawn(params: Tree | None) -> list[tuple[int, ...]]:
            return generate(
                self.language,
                params,
                [prompt.tokens for prompt in prompts],
                together,
                self.settings.sampling,
                seeds.generator(0, f"evaluate/{shard.name}"),
            )

        answers = drawn(policy)
        asked = [prompt for prompt in prompts for _ in range(together)]
        texts = self.texts(asked, answers)
        others: list[Tokens] = []
        if together > 1:
            # the same in every evaluation
            key = shard.name, tuple(prompt.tokens for prompt in prompts)
            if key not in self._untrained:
                self._untrained[key] = drawn(None)
            others = self._untrained[key]
        judged = self.judge([*asked, *asked] if others else asked, [*answers, *others])
        rewards = judged[:, : len(texts)].mean(1).tolist()
        rows = [(prompt.tokens, (answer,)) for prompt, answer in zip(asked, answers, strict=True)]
        kept = self.language.passing()
        apart = self._tokens(policy, rows, kept)[0] - self._tokens(None, rows, kept)[0]
        said = [plain(text) for text in texts]
        stops = set(self.language.stops)
        return {
            **{
                f"rewards/{name}": mean for name, mean in zip(self.objectives, rewards, strict=True)
            },
            REWARD: sum(rewards) / len(rewards),
            "kl": float(apart.sum()) / len(answers),
            "completions/mean_length": sum(map(len, answers)) / len(answers),
            "completions/ended": sum(answer[-1] in stops for answer in answers) / len(answers),
            "distinct_1": sum(distinct(text, 1) for text in said) / len(said),
            "distinct_2": sum(distinct(text, 2) for text in said) / len(said),
            "num_examples": float(len(answers)),
        }

    @torch.no_grad()
    def samples(self, params: Tree, shard: DialogueShard) -> list[dict[str, Any]]:
        """Return the first held-out prompts with answers of the backbone and of the policy, and
        rewards.

        Answers are drawn by the model's own generation config, not as they are for training.
        """
        prompts, together = shard.test[: self.settings.samples], self.settings.answers_together
        own = OwnSampling(
            self.settings.sampling.max_completion_length, self.language.model.generation_config
        )
        rows: list[dict[str, Any]] = [{"prompt": prompt.text} for prompt in prompts]
        for name, policy in (("before", None), ("after", self._policy(params))):
            rng = seeds.generator(0, f"samples/{shard.name}")
            answers = generate(
                self.language,
                policy,
                [prompt.tokens for prompt in prompts],
                together,
                own,
                rng,
            )
            asked = [prompt for prompt in prompts for _ in range(together)]
            texts = self.texts(asked, answers)
            judged = (
                list(zip(texts, self.judge(asked, answers).T.tolist(), strict=True))
                if prompts
                else []
            )
            for row, (text, rewards) in zip(rows, judged[::together], strict=True):
                row[name] = {
                    "completion": plain(text),
                    "rewards": dict(zip(self.objectives, rewards, strict=True)),
                }
        return rows

    def _policy(self, params: Tree) -> Tree:
        return {name: tensor for name, tensor in params.items() if not name.startswith(CRITIC)}

    def _tokens(
        self,
        params: Tree | None,
        rows: Sequence[Packed],
        kept: States,
        *,
        training: bool = False,
    ) -> tuple[Tensor, Tensor]:
        temperature = self.settings.sampling.temperature
        return self.language.tokens(
            params, rows, training=training, temperature=temperature, kept=kept
        )

    def export(self, params: Tree, folder: Path) -> None:
        self.language.export(self._policy(params), folder)
