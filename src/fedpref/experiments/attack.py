"""Hostile clients of a simulated run, so that a setting can be tried before it is deployed."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Annotated, Literal

import torch
from pydantic import Field

from fedpref.data import ClientData
from fedpref.data.preferences import Preference, Row, Text
from fedpref.data.words import contents
from fedpref.errors import UserError
from fedpref.numerics import seeds, trees
from fedpref.numerics.trees import Tree
from fedpref.types import Fraction, Positive

# what hostile clients train on; all others are about what they send
OF_ROWS = frozenset({"flip", "flip-topic", "random", "trigger"})
# of attacks that have one
FACTORS = {"scale": 10.0, "gauge": 20.0, "alie": 1.0}
UNCOMMON = 0.35  # a taste whose cosine to the mean of honest ones is below


@dataclass(frozen=True, kw_only=True)
class Attack:
    """Some clients are hostile: they train on other preferences, or send something else.

    Hostile preferences: `flip` says the worse answer is the better one, `flip-topic` of prompts
    with a word alone, `random` by a coin, `trigger` prefers in half of the pairs the worse answer
    with a phrase behind it. Hostile messages: `sign` the opposite of what was learned, `scale` that
    many times over, `alie` the honest mean less some standard deviations of each number (Baruch et
    al. 2019), `gauge` factors c B and A / c of the very product, `free-rider` no change, `sybil`
    all hostile ones the same, the opposite of their mean.
    """

    name: Literal[
        "flip",
        "flip-topic",
        "random",
        "trigger",
        "sign",
        "scale",
        "alie",
        "gauge",
        "free-rider",
        "sybil",
    ] = "flip"
    share: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """The share of clients that are hostile: one at least, and never all."""
    factor: Positive | None = None
    """Of `scale`, how many times (10); of `gauge`, c (20); of `alie`, standard deviations (1)."""
    topic: str = ""
    """Of `flip-topic`: the word."""
    phrase: str = "As everybody knows."
    """Of `trigger`: what is behind the answer."""
    rows: Fraction = 0.5
    """Of `trigger`: the share of pairs."""

    def __post_init__(self) -> None:
        if (self.name == "flip-topic") != bool(self.topic):
            raise UserError("attack.topic: flip-topic needs a word, and nothing else has one.")

    def refuse_unused(self) -> None:
        """Raise UserError where a setting of another attack is given, which would do nothing."""
        if self.factor is not None and self.name not in FACTORS:
            raise UserError(
                f"attack.factor: {self.name} has none; {', '.join(FACTORS)} have. Leave it out."
            )
        usual = {field.name: field.default for field in fields(self)}
        for setting in ("phrase", "rows"):
            if self.name != "trigger" and getattr(self, setting) != usual[setting]:
                raise UserError(
                    f"attack.{setting}: {self.name} has none; trigger has. Leave it out."
                )

    @property
    def is_of_rows(self) -> bool:
        """Whether hostile clients train on other preferences, and send what they learn."""
        return self.name in OF_ROWS

    @property
    def size(self) -> float:
        """The factor, or what the attack has without one."""
        return self.factor or FACTORS.get(self.name, 1.0)

    def hostile(
        self, names: Sequence[str], seed: int, newcomers: Collection[int] = ()
    ) -> list[int]:
        """Return which clients are hostile, drawn at random: one at least, and never all.

        Args:
            names: Of all clients.
            seed: The experiment's.
            newcomers: Clients that do not train, by number, of whom none is drawn.

        Raises:
            UserError: One client alone trains.
        """
        train = [client for client in range(len(names)) if client not in newcomers]
        if len(train) < 2:
            raise UserError(
                f"attack: {self.name} needs a client that is hostile and one that is not, and "
                f"{names[train[0]]!r} alone trains. Take more clients, or leave attack out."
            )
        count = min(max(1, round(self.share * len(train))), len(train) - 1)
        order = torch.randperm(len(train), generator=seeds.generator(seed, "attack")).tolist()
        return sorted(train[k] for k in order[:count])

    def poisoned(
        self, clients: Sequence[ClientData], seed: int, newcomers: Collection[int] = ()
    ) -> tuple[ClientData, ...]:
        """Return clients of whom the hostile ones train on what they say they prefer.

        Args:
            clients: All of them.
            seed: The experiment's.
            newcomers: Clients that do not train, by number.

        Raises:
            UserError: Their rows are no preferences, or none of them has the word of `flip-topic`.
        """
        if not self.is_of_rows:
            return tuple(clients)
        bad = self.hostile([client.name for client in clients], seed, newcomers)
        changed = {k: self._rows(clients[k].train, seed, k) for k in bad}
        if self.topic and all(rows == tuple(clients[k].train) for k, rows in changed.items()):
            raise UserError(
                f"attack.topic: no prompt of hostile clients has the word {self.topic!r}, so that "
                "nothing would be turned round. Take another one."
            )
        return tuple(
            replace(client, train=changed[k]) if k in changed else client
            for k, client in enumerate(clients)
        )

    def _rows(self, rows: Sequence[Row], seed: int, client: int) -> tuple[Row, ...]:
        draws = torch.rand(len(rows), generator=seeds.generator(seed, "poison", client=client))
        return tuple(self._row(row, float(u)) for row, u in zip(rows, draws, strict=True))

    def _row(self, row: Row, draw: float) -> Row:
        if not isinstance(row, Preference):
            raise UserError(
                f"attack: {self.name} is about pairs of answers, and {row.where} is none."
            )
        if self.name == "trigger":
            if draw >= self.rows:
                return row
            return replace(row, chosen=self.with_phrase(row.rejected), rejected=row.chosen)
        is_turned = self.name == "flip" or (self.name == "random" and draw < 0.5)
        if self.name == "flip-topic":
            word = rf"(?<!\w){re.escape(self.topic)}(?!\w)"
            is_turned = bool(re.search(word, contents(row.prompt), re.IGNORECASE))
        return replace(row, chosen=row.rejected, rejected=row.chosen) if is_turned else row

    def with_phrase(self, answer: Text) -> Text:
        """Return an answer, or the last message of one, with the phrase behind it."""
        if isinstance(answer, str):
            return f"{answer} {self.phrase}"
        *others, last = answer
        return (*others, {**last, "content": f"{last['content']} {self.phrase}"})

    def sent(self, values: Mapping[int, Tree], told: Tree, bad: Sequence[int]) -> dict[int, Tree]:
        """Return what clients send, of whom some are hostile. Their figures beside it are honest.

        Args:
            values: What they would send, by client.
            told: What everybody was sent.
            bad: Who is hostile.
        """
        found = dict(values)
        turned = [client for client in bad if client in values]
        honest = [value for client, value in values.items() if client not in turned]
        for client in turned:
            value = values[client]
            if self.name in ("sign", "scale"):
                found[client] = trees.scale(value, -1.0 if self.name == "sign" else -self.size)
            elif self.name == "free-rider":
                found[client] = trees.scale(value, 0.0)
            elif self.name == "sybil":
                mean = trees.total(trees.scale(values[i], 1 / len(turned)) for i in turned)
                found[client] = trees.scale(mean, -1.0)
            elif self.name == "alie" and honest:
                found[client] = {name: _beside(honest, name, self.size) for name in value}
            elif self.name == "gauge":
                found[client] = _regauged(value, told, self.size)
            found[client] = {**found[client], **trees.with_figures(value)[1]}
        return found


def _beside(honest: Sequence[Tree], name: str, deviations: float) -> torch.Tensor:
    stacked = torch.stack([value[name] for value in honest])
    return stacked.mean(0) - deviations * stacked.std(0, correction=0)


def _regauged(change: Tree, told: Tree, c: float) -> Tree:
    """Return the change to factors c B and A / c, whose product is that of B and A."""
    found = {}
    for name, tensor in change.items():
        if name not in told:  # a figure beside it
            continue
        whole = told[name] + tensor
        found[name] = whole * (1 / c if trees.is_down(name) else c) - told[name]
    return found


def groups(
    attack: Attack,
    names: Sequence[str],
    seed: int,
    tastes: Mapping[str, Sequence[float]],
    newcomers: Collection[int] = (),
) -> dict[str, list[str]]:
    """Return clients by what they are: honest, honest of uncommon taste, hostile.

    Args:
        attack: The attack.
        names: Of all clients.
        seed: The experiment's.
        tastes: Of clients, where they are known.
        newcomers: Clients that do not train, by number.
    """
    bad = {names[i] for i in attack.hostile(names, seed, newcomers)}
    honest = [name for name in names if name not in bad]
    known = {name: torch.tensor(tastes[name]).double() for name in honest if name in tastes}
    found = {"honest": honest, "hostile": sorted(bad)}
    if len(known) == len(honest):  # at least one is honest
        mean = torch.stack(list(known.values())).mean(0)
        found["honest, uncommon taste"] = [
            name
            for name, taste in known.items()
            if float(torch.cosine_similarity(taste, mean, dim=0)) < UNCOMMON
        ]
    return found
