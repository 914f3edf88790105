"""Sources of groups' opinions: surveys as shares over options, and votes on statements.

A row is one group's answer to one question; its column `group` names the group, and is what to
partition by.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from fedpref.data.parsing import written_value
from fedpref.data.placed import label
from fedpref.data.preferences import Opinion
from fedpref.data.source import PathSource
from fedpref.data.tables import local_table, read_table
from fedpref.errors import UserError
from fedpref.types import Count, OpenFraction

T = TypeVar("T")
# The countries of GPO's and PluralLLM's experiments, by the names that GlobalOpinionQA gives them,
# and PluralLLM's split of them
TRAINING_COUNTRIES = (
    "Nigeria",
    "Egypt",
    "India (Current national sample)",
    "Germany",
    "United States",
    "Canada",
    "Argentina",
    "Australia",
)
UNSEEN_COUNTRIES = ("China", "Japan", "France", "Spain", "Brazil", "New Zealand")
VOTES = {"1": "agree", "-1": "disagree", "0": "pass"}
SETS: Mapping[str, tuple[str, ...]] = {"pluralllm": TRAINING_COUNTRIES + UNSEEN_COUNTRIES}


@dataclass(frozen=True, kw_only=True)
class Opinions(PathSource):
    """A survey: questions, options, and the shares of each group's people.

    Either a row is a question, and a column holds {group: shares}, as in
    Anthropic/llm_global_opinions, whose columns are Python expressions in text; or a row is a
    question of one group, with the columns `group` and `shares`. Rows without options are left out,
    and shares that are all zero; the others are made to sum to one.
    """

    name: Literal["opinions"] = "opinions"
    path: str = "Anthropic/llm_global_opinions"
    """A file, a dataset folder or a Hub id."""
    groups: Literal["all", "pluralllm"] | tuple[str, ...] = "all"
    """Which groups are read; `pluralllm` are the 14 countries of that paper."""
    question_column: str = "question"
    """The column of questions."""
    options_column: str = "options"
    """The column of options."""
    selections_column: str = "selections"
    """The column of {group: shares}; by_country is also known."""
    group_column: str = "group"
    """The column that names a row's one group, where there is none of selections."""
    shares_column: str = "shares"
    """The column of that group's shares."""
    test_fraction: OpenFraction = 0.2
    """The share of questions that are held out."""

    def read(self) -> Iterator[Opinion]:
        names = SETS.get(self.groups, ()) if isinstance(self.groups, str) else self.groups
        wanted = [_group(name, "data.groups") for name in names]
        seen: Counter[str] = Counter()
        path = local_table(self.path, "globalopinionqa_partial") or self.path
        for where, record in read_table(str(path)):
            for column in (self.question_column, self.options_column):
                if column not in record:
                    raise UserError(
                        f"{where}: no column {column!r}; the row has {sorted(map(str, record))}. "
                        "Set data.question_column and the like."
                    )
            question = str(record[self.question_column] or "").strip()
            options = _evaluated(
                record[self.options_column] or [], list, where, self.options_column
            )
            for group, shares in self._answers(record, where):
                if not question or not options or not any(shares):
                    continue
                seen[group] += 1
                if wanted and group not in wanted:
                    continue
                yield opinion(question, [str(option) for option in options], shares, where, group)
        if not seen:
            raise UserError(
                f"data.path: {path} holds no opinions: no row has a question, options and shares."
            )
        if unknown := sorted(set(wanted) - seen.keys()):
            raise UserError(
                f"data.groups: {path} says nothing of {unknown[:5]}; it has {sorted(seen)[:8]}."
            )

    def _answers(
        self, record: Mapping[str, Any], where: str
    ) -> Iterator[tuple[str, Sequence[float]]]:
        for column in (self.selections_column, "by_country"):
            if column in record:
                for group, shares in _evaluated(record[column], dict, where, column).items():
                    if shares is not None:  # in a table of groups, of one that was not asked
                        yield _group(group, where), _evaluated(shares, list, where, column)
                return
        if self.group_column not in record or self.shares_column not in record:
            raise UserError(
                f"{where}: neither {self.selections_column!r} nor {self.group_column!r} with "
                f"{self.shares_column!r} is a column; the row "
                f"has {sorted(map(str, record))}. Set data.selections_column or "
                "data.group_column and data.shares_column."
            )
        yield (
            _group(record[self.group_column], f"{where}, column {self.group_column!r}"),
            _evaluated(record[self.shares_column], list, where, self.shares_column),
        )


@dataclass(frozen=True, kw_only=True)
class Polis(PathSource):
    """Conversations on Polis: who agrees with, disagrees with, or passes on which statement.

    The exports are at github.com/compdemocracy/openData; the documents on data give the columns.
    Groups are a conversation's opinion groups, as Polis found them. People whom Polis put in no
    group are left out.
    """

    name: Literal["polis"] = "polis"
    conversations: tuple[str, ...] = ()
    """Which conversations are read; by default all."""
    min_votes: Count = 10
    """Statements on which fewer of a group have voted are left out."""
    test_fraction: OpenFraction = 0.2
    """The share of statements that are held out."""

    def read(self) -> Iterator[Opinion]:
        topics = {
            record["conv"]: record["topic"]
            for _, record in self._table("conversations", "conv", "topic")
        }
        if unknown := sorted(set(self.conversations) - topics.keys()):
            raise UserError(
                f"data.conversations: there are no {unknown[:5]}; there are {sorted(topics)[:8]}."
            )
        texts = {
            (record["conv"], record["cid"]): record["text"].strip()
            for _, record in self._table("statements", "conv", "cid", "text")
        }
        counts: dict[tuple[str, str, str], Counter[str]] = defaultdict(Counter)
        where_of: dict[tuple[str, str, str], str] = {}
        for where, record in self._table("votes", "conv", "opinion_group", "votes"):
            if record["conv"] not in topics:
                raise UserError(
                    f"{where}: polis_conversations has no conversation {record['conv']!r}."
                )
            if not record["opinion_group"] or (
                self.conversations and record["conv"] not in self.conversations
            ):
                continue
            for vote in record["votes"].split():
                statement, _, said = vote.partition(":")
                if said not in VOTES:
                    raise UserError(
                        f"{where}, column 'votes': expected statement:vote with a vote of "
                        f"{', '.join(VOTES)}, found {vote!r}."
                    )
                key = (record["conv"], record["opinion_group"], statement)
                counts[key][said] += 1
                where_of.setdefault(key, where)
        for key, votes in sorted(counts.items()):
            text = texts.get((key[0], key[2]))
            if text and votes.total() >= self.min_votes:
                question = f"{topics[key[0]]}: {text}"
                shares = [votes[said] for said in VOTES]
                group = "/".join(key[:2])
                yield opinion(question, tuple(VOTES.values()), shares, where_of[key], group)

    def _table(self, what: str, *columns: str) -> Iterator[tuple[str, Mapping[str, str]]]:
        """Yield the rows of one of the files, with these columns as text."""
        table = local_table(self.path, f"polis_{what}")
        if table is None:
            raise UserError(
                f"data.path: there is no polis_{what} in {self.path!r}. The documents' page on "
                "data gives the three files."
            )
        for where, record in read_table(str(table)):
            if missing := [column for column in columns if column not in record]:
                raise UserError(
                    f"{where}: no column {missing[0]!r}; the row has {sorted(map(str, record))}."
                )
            yield (
                where,
                {
                    column: "" if record[column] is None else str(record[column])
                    for column in columns
                },
            )


def opinion(
    question: str, options: Sequence[str], shares: Sequence[float], where: str, group: str
) -> Opinion:
    """Return one row, with shares made to sum to one.

    Raises:
        UserError: The shares do not fit the options; the message begins with `where`.
    """
    if len(options) != len(shares):
        raise UserError(f"{where}: {len(options)} options, but {len(shares)} shares of {group!r}.")
    if len(options) < 2 or len(set(options)) < len(options):
        raise UserError(
            f"{where}: a question needs at least two options, all different; there are "
            f"{list(options)[:6]}."
        )
    try:
        numbers = [float(share) for share in shares]
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(
            f"{where}: shares of {group!r} are no numbers: {str(list(shares)[:6])[:80]}."
        ) from error
    total = sum(numbers)
    if not math.isfinite(total) or min(numbers) < 0 or not total:
        raise UserError(
            f"{where}: shares of {group!r} must be finite, not negative, and not all zero; they "
            f"are {numbers[:6]}."
        )
    return Opinion(
        question,
        tuple(options),
        tuple(number / total for number in numbers),
        where,
        {"group": group},
    )


def _group(value: Any, where: str) -> str:
    """Return a group's name, in one spelling; raises UserError where there is none."""
    try:
        name = label(value)
    except ValueError as error:
        raise UserError(f"{where}: {error}.") from error
    if name is None:
        raise UserError(f"{where}: the row names no group.")
    return name


def _evaluated(value: Any, kind: type[T], where: str, column: str) -> T:
    """Return a list or mapping, also where it stands as text, in JSON or as a Python expression."""
    if isinstance(value, str):
        text = value.strip()
        if text.startswith("defaultdict(") and "{" in text:
            text = text[text.index("{") : text.rfind("}") + 1]
        value = written_value(text)
    if isinstance(value, tuple) and kind is list:
        value = list(value)
    if not isinstance(value, kind):
        raise UserError(
            f"{where}, column {column!r}: expected a {'list' if kind is list else 'mapping'}, "
            f"found {str(value)[:80]!r}."
        )
    return value
