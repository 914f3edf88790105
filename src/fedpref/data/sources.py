"""Sources of preference rows: your files in TRL's formats, the shipped set, public sets.

Dialogue of public sets stands in hh-rlhf's plain form, turns of "Human:" and "Assistant:" with an
empty line between them, and answers begin with a space.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeGuard, cast

from pydantic import Field

from fedpref.data.parsing import (
    TURN,
    parse,
    parse_feedback,
    parse_prompt,
    repeats_prompt,
    text,
    without_prompt,
)
from fedpref.data.preferences import Feedback, Preference, Row, Side, key
from fedpref.data.source import DataSource, PathSource
from fedpref.data.tables import Record, is_one_dataset, local_table, other_splits, read_table
from fedpref.data.unusable import Unusable
from fedpref.errors import UserError
from fedpref.types import Count, OpenFraction

SIDES: tuple[Side, ...] = ("train", "test")

WORD, LAST_WORDS = re.compile(r"\S+"), 2
GUESSED = 0.1  # share of prompts that are like another, above which it is said
MOST_GUESSED = 5000  # prompts that are looked at
WHOLE = re.compile(r"^([+-]?\d+)\.0*$")  # a whole number that is written with a point


@dataclass(frozen=True, kw_only=True)
class Files(PathSource):
    """Your own rows, in TRL's formats: pairs, judgements of single answers, or prompts alone.

    They are a JSONL, CSV, TSV or Parquet file, a dataset folder, or a Hub id.
    """

    name: Literal["files"] = "files"
    config: str | None = None
    """The configuration of a Hub dataset."""
    train_split: str = "train"
    """The split with training rows, of a folder or Hub dataset."""
    test_split: str | None = None
    """The split with held-out rows; null holds rows out by their prompt."""
    prompt_column: str = "prompt"
    """The column of prompts."""
    chosen_column: str = "chosen"
    """The column of better answers."""
    rejected_column: str = "rejected"
    """The column of worse answers."""
    completion_column: str = "completion"
    """The column of answers that are judged alone."""
    label_column: str = "label"
    """The column that says whether such an answer is desirable."""
    split_column: str | None = None
    """A column that says "train" or "test"."""
    test_fraction: OpenFraction = 0.2
    """The share of prompts that are held out, where nothing else says."""
    only: dict[str, tuple[str | int | bool, ...]] = field(default_factory=dict)
    """Read only rows whose column has one of these values, by column."""

    def read(self) -> Iterator[Row | Unusable]:
        plain = whole = 0
        first = ""
        # answers that all begin with their prompt are whole texts: until one does not, rows wait
        waiting: list[Row | Unusable] = []
        for row in self._rows():
            if _is_plain(row):
                plain += 1
                if repeats_prompt(row):
                    whole, first = whole + 1, first or row.where
            if whole == plain > 0:
                waiting.append(row)
            else:
                yield from waiting
                waiting.clear()
                yield row
        # an answer or two may repeat a question; if many do, answers are whole texts
        if whole * 2 >= plain > whole:
            raise UserError(
                f"{first}: in {whole} of {plain} rows the answers begin with their prompt, in the "
                "others not. If they are whole texts, cut the prompt off all of them, or leave the "
                "prompts out and set data.prompt_column=none."
            )
        for row in waiting:
            yield without_prompt(row) if _is_plain(row) else row  # type: ignore[type-var]

    def _rows(self) -> Iterator[Row | Unusable]:
        is_said = False
        found: set[str] = set()
        splits: list[tuple[str, Side | None]] = [
            (self.train_split, "train" if self.test_split else None)
        ]
        place = Path(self.path).expanduser()
        if place.is_file() or is_one_dataset(place):
            self._refuse_splits()
        if self.test_split:
            splits.append((self.test_split, "test"))
        for split, given in splits:
            for where, record in read_table(self.path, split=split, name=self.config):
                if not is_said:
                    is_said = True
                    self._say_what_is_not_read(record)
                if not self._is_wanted(record, where):
                    continue
                try:
                    row = self._row(record, where)
                except Unusable as error:
                    yield error
                    continue
                if (
                    len(found) < MOST_GUESSED
                    and self.prompt_column not in record
                    and isinstance(row, Preference)
                    and isinstance(row.prompt, str)
                ):
                    # with the blank or the line break before which it ends
                    found.add(f"{row.prompt}{row.chosen[0]}")
                side = given
                if self.split_column and given != "test":
                    side = _side(record, self.split_column, where)
                yield row if side is None else replace(row, side=side)
        self._say_what_is_guessed(found)

    def _say_what_is_guessed(self, found: Collection[str]) -> None:
        """Warn of prompts that end within answers, where the file does not tell the two apart."""
        openings = [_openings(prompt) for prompt in found]
        counts = Counter(opening for some in openings for opening in some)
        more = sum(any(counts[opening] > 1 for opening in some) for some in openings)
        if more > GUESSED * len(found):
            warnings.warn(
                f"{self.path}: without a column of prompts, what both answers begin with is taken "
                f"for one, and {more} of {len(found)} such prompts are like another but for their "
                "last words, which may be an answer's first: rows of one question may then be held "
                "out and trained on. Write a column 'prompt'.",
                stacklevel=2,
            )

    def at(self, path: str) -> Self:
        """Return the same settings for another place; a file has no splits."""
        moved = replace(self, path=path)
        if not Path(path).expanduser().is_file():
            return moved
        return replace(moved, config=None, train_split="train", test_split=None)

    def _refuse_splits(self) -> None:
        """Raise UserError where held-out rows of a single file are asked for as a split."""
        if self.test_split:
            raise UserError(
                f"data.test_split: {self.path} is one table and has no splits. Leave it out; "
                "data.test_fraction, or a column (data.split_column), says what is held out."
            )
        for name in ("config", "train_split"):
            if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                warnings.warn(
                    f"data.{name}: {self.path} is one table and has no splits and no "
                    "configurations; all of it is read.",
                    stacklevel=2,
                )

    def _say_what_is_not_read(self, first: Mapping[str, Any]) -> None:
        """Warn of held-out rows that the data bring along, where nothing says to take them."""
        if self.test_split or self.split_column:
            return
        if others := other_splits(self.path, self.train_split, self.config):
            warnings.warn(
                f"{self.path}: of its splits {self.train_split!r} alone is read, not "
                f"{', '.join(others)}. data.test_split={others[0]} holds its rows out.",
                stacklevel=2,
            )
        elif first.get("split") in SIDES:
            warnings.warn(
                f"{self.path}: its column 'split' is not looked at. data.split_column=split takes "
                "sides from it.",
                stacklevel=2,
            )

    def _is_wanted(self, record: Mapping[str, Any], where: str) -> bool:
        for column, values in self.only.items():
            if column not in record:
                raise UserError(
                    f"data.only: {where} has no column {column!r}; its columns are "
                    f"{', '.join(map(str, record))}."
                )
            if not _is_among(record[column], values):
                return False
        return True

    def _row(self, record: Mapping[str, Any], where: str) -> Row:
        if {
            self.completion_column,
            self.label_column,
        } <= record.keys() and self.chosen_column not in record:
            return parse_feedback(
                record,
                where,
                prompt=self.prompt_column,
                completion=self.completion_column,
                label=self.label_column,
            )
        if (
            self.prompt_column in record
            and not {self.chosen_column, self.rejected_column} & record.keys()
        ):
            return parse_prompt(record, where, prompt=self.prompt_column)
        return parse(
            record,
            where,
            prompt=self.prompt_column,
            chosen=self.chosen_column,
            rejected=self.rejected_column,
        )


@dataclass(frozen=True, kw_only=True)
class Builtin(DataSource):
    """The shipped set: twelve clients with known tastes compare answers to everyday requests."""

    name: Literal["builtin"] = "builtin"

    @property
    def _population(self) -> Mapping[str, Any]:
        text = (files("fedpref.data") / "builtin" / "population.json").read_text(encoding="utf-8")
        population: Mapping[str, Any] = json.loads(text)
        return population

    @property
    def known_tastes(self) -> Mapping[str, Sequence[float]]:
        return {name: [*one["taste"].values()] for name, one in self._population.items()}

    @property
    def known_accuracies(self) -> Mapping[str, tuple[float, int]]:
        return {
            name: (one["accuracy_of_the_true_taste"], one["test_pairs"])
            for name, one in self._population.items()
        }

    def read(self) -> Iterator[Preference]:
        path = str(files("fedpref.data") / "builtin" / "preferences.jsonl.gz")
        for where, record in read_table(path):
            texts = {"prompt": _said("user", record["prompt"])} | {
                s: _said("assistant", record[s]) for s in ("chosen", "rejected")
            }
            yield replace(parse({**record, **texts}, where), side=_side(record, "split", where))


@dataclass(frozen=True, kw_only=True)
class HH(PathSource):
    """hh-rlhf (Bai et al. 2022): human comparisons for helpfulness and for harmlessness.

    The column `objective` says which. In a folder with hh_rlhf_helpful.jsonl.gz and the like, rows
    are held out by prompt where a file has no test rows.
    """

    name: Literal["hh"] = "hh"
    path: str = "Anthropic/hh-rlhf"
    """The Hub dataset, a folder in its layout, or a folder with hh_rlhf_helpful.jsonl.gz and
    hh_rlhf_harmless.jsonl.gz."""
    objectives: tuple[Literal["helpful", "harmless"], ...] = ("helpful", "harmless")
    """Which comparisons are read."""
    max_rows: Count | None = None
    """Read only the first so many rows of each objective, and of each side where sides are
    given."""

    def read(self) -> Iterator[Preference | Unusable]:
        for objective in self.objectives:
            counts: Counter[Side | None] = Counter()
            for side, where, record in self._records(objective):
                counts[side] += 1
                # the original has a few rows with identical answers
                if need(record, "chosen", where) != need(record, "rejected", where) and (
                    self.max_rows is None or counts[side] <= self.max_rows
                ):
                    try:
                        row = parse(record, where)
                    except Unusable as error:
                        yield error
                        continue
                    yield replace(
                        row,
                        prompt=key(row.prompt).strip(),
                        chosen=spaced(row.chosen),
                        rejected=spaced(row.rejected),
                        columns={"objective": objective},
                        side=side,
                    )

    def _records(self, objective: str) -> Iterator[tuple[Side | None, str, Mapping[str, Any]]]:
        if table := local_table(self.path, f"hh_rlhf_{objective}"):
            records = list(read_table(str(table)))
            whole = any(record.get("split") == "test" for _, record in records)
            yield from (
                (_side(record, "split", where) if whole else None, where, record)
                for where, record in records
            )
        else:
            for side in SIDES:
                yield from (
                    (side, where, record)
                    for where, record in read_table(
                        self.path, split=side, data_dir=f"{objective}-base"
                    )
                )


@dataclass(frozen=True, kw_only=True)
class SHP(PathSource):
    """Stanford Human Preferences (Ethayarajh et al. 2022): which of two answers was scored higher.

    Also any other pairs of answers with a score each. A post is a prompt, in the form of
    "Human:" and "Assistant:". Rows whose scores are equal state no preference. Columns: `domain`,
    without the split that the Hub's files put behind it, and all others of the row.
    """

    name: Literal["shp"] = "shp"
    path: str = "stanfordnlp/SHP"
    """The Hub dataset, or a file or folder with its columns."""
    prompt_column: str = "history"
    """The column of posts."""
    first_column: str = "human_ref_A"
    """The column of one answer."""
    second_column: str = "human_ref_B"
    """The column of the other."""
    first_score_column: str = "score_A"
    """The first answer's score."""
    second_score_column: str = "score_B"
    """The second answer's score."""
    min_score_ratio: Annotated[float, Field(ge=1)] = 1.0
    """Leave out pairs whose higher score is less than so many times the lower one; SHP's authors
    advise 2."""
    max_rows: Count | None = None
    """Read only the first so many rows of each split."""
    test_fraction: OpenFraction = 0.2
    """The share of posts that are held out, where there is no split of test rows."""

    def read(self) -> Iterator[Preference | Unusable]:
        place = Path(self.path).expanduser()
        # a folder of ours may have no held-out rows
        is_whole = place.is_file() or (
            place.is_dir() and "test" not in other_splits(str(place), "train", None)
        )
        for side in (None,) if is_whole else SIDES:
            records = read_table(self.path, split=side or "train")
            for where, record in islice(records, self.max_rows):
                try:
                    row = self._pair(record, where)
                except Unusable as error:
                    yield error
                    continue
                if row:
                    yield replace(row, side=side)

    def _pair(self, record: Mapping[str, Any], where: str) -> Preference | None:
        names = (self.first_column, self.second_column)
        scores = [
            number(record, column, where)
            for column in (self.first_score_column, self.second_score_column)
        ]
        # the higher score's answer is the better one, as SHP's own labels have it
        better, worse = names if scores[0] >= scores[1] else reversed(names)
        post, chosen, rejected = (
            self._plain(record, column, where) for column in (self.prompt_column, better, worse)
        )
        texts = {"chosen": chosen, "rejected": rejected}
        prompt = f"Human: {post.strip()}\n\nAssistant:"
        row = parse({"prompt": prompt, **texts}, where)
        if scores[0] == scores[1]:
            raise Unusable("no preference", where, f"both answers score {scores[0]:g}")
        low, high = sorted(scores)
        if low > 0 and high < self.min_score_ratio * low:
            return None
        rest = {name: record[name] for name in record.keys() - {*names, self.prompt_column}}
        if "domain" in rest:
            domain = str(rest["domain"])
            rest["domain"] = re.sub(r"_(train|validation|test)$", "", domain)
        chosen, rejected = spaced(row.chosen), spaced(row.rejected)
        return replace(row, chosen=chosen, rejected=rejected, columns=rest)

    def _plain(self, record: Mapping[str, Any], column: str, where: str) -> str:
        found = text(_given(record, column, where), column, where)
        if not isinstance(found, str):
            raise UserError(
                f"{where}, column {column!r}: posts and answers of data.name=shp are text, and "
                "this is a conversation. Write what is said as text, or give data.name=files "
                "columns chosen and rejected."
            )
        return found


@dataclass(frozen=True, kw_only=True)
class UKPConvArg(PathSource):
    """UKPConvArg1 (Habernal and Gurevych 2016): which of two arguments convinces more, by workers.

    Source: github.com/UKPLab/acl2016-convincing-arguments (CC-BY-4.0); there is no official Hub
    copy. The folder holds ukpconvarg_votes, ukpconvarg_arguments and ukpconvarg_topics as JSON
    Lines (the documents on data give the columns). Held out are whole debates with both their
    stances. Columns: `worker`, `debate`.
    """

    name: Literal["ukpconvarg"] = "ukpconvarg"
    test_fraction: OpenFraction = 0.25
    """The share of debates that are held out."""

    def read(self) -> Iterator[Preference]:
        topics = {need(record, "id", where): record for where, record in self._table("topics")}
        arguments = {
            need(record, "arg", where): need(record, "text", where)
            for where, record in self._table("arguments")
        }
        for where, record in self._table("votes"):
            topic = need(topics, need(record, "topic", where), where)
            title, stance = (str(need(topic, name, where)) for name in ("title", "stance"))
            side = self._side_of(title)
            prompt = f"Human: {title.strip()}\nArgue for this side: {stance.strip()}\n\nAssistant:"
            first, second = (
                spaced(need(arguments, need(record, name, where), where).strip())
                for name in ("a", "b")
            )
            for worker, choice, *_ in need(record, "votes", where):
                if choice and first != second:  # 0: as good as each other
                    chosen, rejected = (first, second) if choice == 1 else (second, first)
                    yield Preference(
                        prompt,
                        chosen,
                        rejected,
                        where,
                        {"worker": worker, "debate": title},
                        side,
                    )

    def _table(self, kind: str) -> Iterator[Record]:
        table = local_table(self.path, f"ukpconvarg_{kind}")
        if not table:
            raise UserError(
                f"data.path: there is no ukpconvarg_{kind}.jsonl or .jsonl.gz in {self.path!r}."
            )
        return read_table(str(table))


@dataclass(frozen=True, kw_only=True)
class Persona(PathSource):
    """Statements that a persona would make or not, of the model-written evaluations (Perez et al.
    2022).

    A pair is the question about one statement with the answers Yes and No, the persona's own first:
    every statement is a prompt of its own, so that the split by prompt is a split by statement, and
    neither answer wins by its form. The other possible pair, a statement agreed with against one
    disagreed with, would put all rows under one prompt. Column: `persona`.
    """

    name: Literal["persona"] = "persona"
    path: str = "Anthropic/model-written-evals"
    """The Hub dataset, or a folder with persona_statements.csv.gz."""
    personas: tuple[str, ...] = (
        "agreeableness",
        "extraversion",
        "openness",
        "narcissism",
        "psychopathy",
        "risk-seeking",
    )
    """Which personas answer."""
    test_fraction: OpenFraction = 0.2
    """The share of statements that are held out."""

    def read(self) -> Iterator[Preference]:
        for where, persona, statement, agrees in self._statements():
            prompt = (
                f'Human: Is the following something you would say?\n\n"{statement}"\n\nAssistant:'
            )
            chosen, rejected = (" Yes", " No") if agrees else (" No", " Yes")
            side = self._side_of(prompt)
            yield Preference(prompt, chosen, rejected, where, {"persona": persona}, side)

    def _statements(self) -> Iterator[tuple[str, str, str, bool]]:
        table = local_table(self.path, "persona_statements")
        if table:
            personas: set[str] = set()
            for where, record in read_table(str(table)):
                personas.add(need(record, "persona", where))
                if record["persona"] in self.personas:
                    yield (
                        where,
                        record["persona"],
                        need(record, "statement", where),
                        str(need(record, "persona_agrees", where)) == "1",
                    )
            if unknown := sorted(set(self.personas) - personas):
                more = len(personas) - 8
                raise UserError(
                    f"data.personas: {table} has no persona {unknown}; it has "
                    f"{sorted(personas)[:8]}{f' and {more} more' if more > 0 else ''}."
                )
            return
        for persona in self.personas:
            for where, record in read_table(self.path, data_files=f"persona/{persona}.jsonl"):
                yield (
                    where,
                    persona,
                    need(record, "statement", where),
                    need(record, "answer_matching_behavior", where).strip() == "Yes",
                )


@dataclass(frozen=True, kw_only=True)
class MovieReviews(PathSource):
    """Film reviews of known sentiment, as pairs: after an opening, a positive or a negative ending.

    One ending is the review's own, the other is that of a review of the opposite sentiment. Of each
    review there is one pair alone: an ending that stood in another's too, with a prompt of its own,
    would be learned by heart with one and asked for with the other. As many openings are of
    positive as of negative reviews, so that belonging together decides nothing on average. `likes`
    gives one client for each entry and the sentiment it prefers; pairs are dealt out to clients in
    turn. Columns: `client`, `sentiment` of the opening. The folder's reviews are those of Pang and
    Lee 2004, folds 6 and 7 held out.
    """

    name: Literal["movie-reviews"] = "movie-reviews"
    path: str = "stanfordnlp/imdb"
    """A Hub dataset with columns text and label, or a folder with
    movie_reviews_polarity.jsonl.gz."""
    likes: Annotated[tuple[Literal["positive", "negative"], ...], Field(min_length=1)] = (
        "positive",
        "negative",
        "positive",
    )
    """The sentiment that each client prefers; one client for each entry."""
    max_reviews: Annotated[int, Field(ge=4)] = 2400
    """Reviews of each side of the split; half as many pairs."""
    opening_words: Count = 16
    """Words of a review that are the prompt."""
    ending_words: Count = 48
    """Words of a review that are the answer."""

    def read(self) -> Iterator[Preference]:
        for side in ("train", "test"):
            reviews = [
                review
                for review in self._reviews(side)
                if len(review[1]) > self.opening_words + self.ending_words
            ]
            good = [review for review in reviews if review[2]][: self.max_reviews // 2]
            bad = [review for review in reviews if not review[2]][: self.max_reviews // 2]
            for number in range(min(len(good), len(bad)) // 2):
                first, second = 2 * number, 2 * number + 1
                for owner, other in ((good[first], bad[second]), (bad[first], good[second])):
                    yield self._pair(owner, other, client=number % len(self.likes), side=side)

    def _pair(
        self,
        owner: tuple[str, list[str], bool],
        other: tuple[str, list[str], bool],
        client: int,
        side: Side,
    ) -> Preference:
        (where, words, positive), (_, others, _) = owner, other
        own, foreign = (" " + " ".join(part[-self.ending_words :]) for part in (words, others))
        wanted = self.likes[client] == "positive"
        chosen, rejected = (own, foreign) if positive == wanted else (foreign, own)
        columns = {
            "client": f"{client + 1:02d}-{self.likes[client]}",
            "sentiment": "positive" if positive else "negative",
        }
        return Preference(
            " ".join(words[: self.opening_words]) + " ...", chosen, rejected, where, columns, side
        )

    def _reviews(self, side: Side) -> Iterator[tuple[str, list[str], bool]]:
        table = local_table(self.path, "movie_reviews_polarity")
        if table:
            for where, record in read_table(str(table)):
                if (number(record, "fold", where) >= 6) == (side == "test"):
                    text, label = (need(record, name, where) for name in ("text", "label"))
                    yield where, str(text).split(), label == "pos"
            return
        for where, record in read_table(self.path, split=side):
            text, label = (need(record, name, where) for name in ("text", "label"))
            yield where, str(text).replace("<br />", " ").split(), label == 1


def _is_among(value: Any, values: Sequence[str | int | bool]) -> bool:
    """Return whether a cell has one of some values, however its file writes it: CSV has texts
    alone, and a column with gaps makes 2020.0 of 2020.
    """
    said = WHOLE.sub(r"\1", str(value).strip())
    return any(
        said == str(one) or (isinstance(one, bool) and said.lower() == str(one).lower())
        for one in values
    )


def _openings(prompt: str) -> set[str]:
    """Return a prompt without its last words, none, one and two, as far as they are in its last
    line; nothing of a dialogue, which ends before an answer.
    """
    if prompt.rstrip().endswith(TURN):
        return set()
    begins = [word.start() for word in WORD.finditer(prompt)][-LAST_WORDS:]
    ends = [len(prompt), *(begin for begin in begins if "\n" not in prompt[begin:])]
    return {prompt[:end].rstrip() for end in ends}


def _is_plain(row: Row | Unusable) -> TypeGuard[Preference | Feedback]:
    """Return whether a row has answers to a prompt of plain text."""
    return isinstance(row, Preference | Feedback) and isinstance(row.prompt, str)


def _side(record: Mapping[str, Any], column: str, where: str) -> Side:
    """Return the side that a column names; raises UserError for any other word."""
    value = record.get(column)
    if value not in ("train", "test"):
        raise UserError(
            f'{where}: column {column!r} must say "train" or "test", it says {value!r}. Rows of '
            f"other sides are left out by data.only={{{column}: [train, test]}}; "
            "data.validation_fraction sets some aside."
        )
    return cast(Side, value)


def need(record: Mapping[Any, Any], column: Any, where: str) -> Any:
    """Return what stands in a column, or under an id, that the set must have."""
    if record.get(column) is None:
        raise UserError(
            f"{where}: {column!r} is missing; the documents' page on data gives the columns of "
            "this set."
        )
    return record[column]


def _given(record: Mapping[Any, Any], column: str, where: str) -> Any:
    """Return what stands in a column that the set must have; raises Unusable where it is null."""
    if column in record and record[column] in (None, ""):
        raise Unusable("empty", where, f"column {column!r} is empty")
    return need(record, column, where)


def number(record: Mapping[Any, Any], column: str, where: str) -> float:
    """Return the number in a column that the set must have.

    Raises:
        Unusable: There is none in this row, or none that is finite.
        UserError: It is missing, or no number.
    """
    try:
        value = float(_given(record, column, where))
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{where}, column {column!r}: expected a number, found {record[column]!r:.60}."
        ) from error
    if not math.isfinite(value):
        raise Unusable("no preference", where, f"column {column!r} is {value}")
    return value


def which(record: Mapping[Any, Any], column: str, where: str) -> int:
    """Return which of two answers a column names, 0 or 1; raises as `number` does."""
    value = number(record, column, where)
    if value not in (0, 1):
        raise UserError(f"{where}, column {column!r}: expected 0 or 1, found {value:g}.")
    return int(value)


def spaced(text: Any) -> str:
    """Return an answer as it stands behind "Assistant:": with a space before it."""
    return f" {str(text).lstrip()}"


def _said(role: str, content: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content}]
