"""Public sets with people, domains or objectives as clients, in the layouts that they are found in.

Each reads its dataset of the Hub, or a local folder in the same layout. Dialogue stands in
hh-rlhf's plain form, longer conversations as messages.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from fedpref.data.parsing import LABELS, parse
from fedpref.data.preferences import Preference, Row
from fedpref.data.source import DataSource, PathSource
from fedpref.data.sources import HH, SHP, Files, need, number, spaced, which
from fedpref.data.tables import Record, local_table, read_table
from fedpref.data.unusable import Unusable
from fedpref.errors import UserError
from fedpref.types import Count, OpenFraction

Read = Iterator[Preference | Unusable]
NEMO = re.compile(r"\s*<extra_id_1>(User|Assistant)\n")  # between turns of HelpSteer2's prompts


def _asked(text: Any) -> str:
    return f"Human: {str(text).strip()}\n\nAssistant:"


def _pair(
    prompt: str, answers: Sequence[Any], where: str, columns: Mapping[str, Any]
) -> Preference:
    """Return a comparison of two answers, the better one first.

    Raises:
        Unusable: It states no preference.
    """
    chosen, rejected = answers
    row = parse({"prompt": prompt, "chosen": chosen, "rejected": rejected}, where)
    return replace(row, chosen=spaced(chosen), rejected=spaced(rejected), columns=dict(columns))


@dataclass(frozen=True, kw_only=True)
class Sampled(PathSource):
    """A source of which the first rows alone may be read; prompts are held out by their hash."""

    name: str = ""
    max_rows: Count | None = None
    """Read only the first so many rows of the table."""
    test_fraction: OpenFraction = 0.2
    """The share of prompts that are held out."""

    def _records(self, **hub: Any) -> Iterator[Record]:
        return islice(read_table(self.path, **hub), self.max_rows)


@dataclass(frozen=True, kw_only=True)
class Summaries(Sampled):
    """Comparisons of summaries by labellers who are known (Stiennon et al. 2020), modified MIT.

    A post is a prompt. Columns: `client`, the labeller; `confidence`; `policies`, who wrote them.
    """

    name: Literal["summaries"] = "summaries"
    path: str = "openai/summarize_from_feedback"
    """The Hub dataset, or a folder with openai_summary_comparisons.jsonl.gz (prompt, chosen,
    rejected, client)."""

    def read(self) -> Read:
        table = local_table(self.path, "openai_summary_comparisons")
        records = read_table(str(table)) if table else read_table(self.path, name="comparisons")
        for where, record in islice(records, self.max_rows):
            try:
                yield self._row(record, where)
            except Unusable as error:
                yield error

    def _row(self, record: Mapping[str, Any], where: str) -> Preference:
        if "summaries" not in record:
            columns = {"client": need(record, "client", where)}
            columns["confidence"] = record.get("confidence")
            texts = [need(record, side, where) for side in ("chosen", "rejected")]
            return _pair(_asked(need(record, "prompt", where)), texts, where, columns)
        info, two = need(record, "info", where), need(record, "summaries", where)
        better = which(record, "choice", where)
        title, post = info.get("title") or "", info.get("post") or info.get("article") or ""
        columns = {
            "client": need(record, "worker", where),
            "confidence": (record.get("extra") or {}).get("confidence"),
            "policies": [one.get("policy") for one in two],
        }
        prompt = _asked(f"Summarise this post.\n\n{title}\n\n{post}")
        texts = [need(two[k], "text", where) for k in (better, 1 - better)]
        return _pair(prompt, texts, where, columns)


@dataclass(frozen=True, kw_only=True)
class WebGPT(Sampled):
    """Comparisons of answers with sources (Nakano et al. 2021); the better score is preferred.

    Columns: `topic`, the set that the question is from. Equal scores state no preference.
    """

    name: Literal["webgpt"] = "webgpt"
    path: str = "openai/webgpt_comparisons"
    """The Hub dataset, or a file or folder with its columns."""

    def read(self) -> Read:
        for where, record in self._records():
            try:
                yield self._row(record, where)
            except Unusable as error:
                yield error

    def _row(self, record: Mapping[str, Any], where: str) -> Preference:
        question = need(record, "question", where)
        scores = [number(record, f"score_{k}", where) for k in (0, 1)]
        if scores[0] == scores[1]:
            raise Unusable("no preference", where, f"both answers score {scores[0]:g}")
        better = int(scores[1] > scores[0])
        answers = [need(record, f"answer_{k}", where) for k in (0, 1)]
        is_dict = isinstance(question, Mapping)
        text = need(question, "full_text", where) if is_dict else question
        columns = {"topic": question.get("dataset")} if is_dict else {}
        return _pair(_asked(text), [answers[better], answers[1 - better]], where, columns)


@dataclass(frozen=True, kw_only=True)
class SafeRLHF(Sampled):
    """PKU-SafeRLHF (Ji et al. 2024), CC-BY-NC-4.0: which answer helps more, and which is safer.

    Each row is a comparison by each of the objectives; the column `objective` says by which. Much
    of it is offensive.
    """

    name: Literal["safe-rlhf"] = "safe-rlhf"
    path: str = "PKU-Alignment/PKU-SafeRLHF"
    """The Hub dataset, or a file or folder with its columns."""
    objectives: tuple[Literal["helpful", "harmless"], ...] = ("helpful", "harmless")
    """Which comparisons are read."""

    def read(self) -> Read:
        choices = {"helpful": "better_response_id", "harmless": "safer_response_id"}
        for where, record in self._records():
            answers = [need(record, f"response_{k}", where) for k in (0, 1)]
            prompt = _asked(need(record, "prompt", where))
            for objective in self.objectives:
                columns = {"objective": objective}
                try:
                    better = which(record, choices[objective], where)
                    ranked = [answers[better], answers[1 - better]]
                    yield _pair(prompt, ranked, where, columns)
                except Unusable as error:
                    yield error


@dataclass(frozen=True, kw_only=True)
class HelpSteer2(Sampled):
    """HelpSteer2 (Wang et al. 2024), CC-BY-4.0: two answers to a prompt, rated from 0 to 4.

    For each attribute the answer that is rated higher is preferred; equal ratings state no
    preference and are passed over. The column `objective` names the attribute.
    """

    name: Literal["helpsteer2"] = "helpsteer2"
    path: str = "nvidia/HelpSteer2"
    """The Hub dataset, or a file or folder with its columns."""
    objectives: tuple[
        Literal["helpfulness", "correctness", "coherence", "complexity", "verbosity"], ...
    ] = ("helpfulness", "correctness", "coherence")
    """Which attributes."""

    def read(self) -> Read:
        answers: dict[str, list[tuple[str, Mapping[str, Any]]]] = defaultdict(list)
        for where, record in self._records():
            answers[str(need(record, "prompt", where))].append((where, record))
        for said, rated in answers.items():
            prompt = _turns(said)
            # two at a time, as they stand in the table
            for (where, first), (_, second) in zip(rated[::2], rated[1::2], strict=False):
                for objective in self.objectives:
                    try:
                        scores = [number(one, objective, where) for one in (first, second)]
                        if scores[0] == scores[1]:
                            continue
                        two = (first, second) if scores[0] > scores[1] else (second, first)
                        texts = [need(one, "response", where) for one in two]
                        yield _pair(prompt, texts, where, {"objective": objective})
                    except Unusable as error:
                        yield error


def _turns(prompt: str) -> str:
    """Return a prompt of HelpSteer2 as a dialogue; marks of NeMo's stand between its turns."""
    first, *rest = NEMO.split(prompt)
    said = [f"Human: {first.strip()}"]
    for who, text in zip(rest[::2], rest[1::2], strict=True):
        said.append(f"{'Human' if who == 'User' else who}: {text.strip()}")
    return "\n\n".join([*said, "Assistant:"])


@dataclass(frozen=True, kw_only=True)
class Prism(Sampled):
    """PRISM (Kirk et al. 2024), human texts CC-BY-4.0: people of many countries talk with models.

    Of each turn the answer that was chosen is preferred to each of the others; earlier turns are
    the conversation so far. Columns: `user_id`, `conversation_type`, `score` of the chosen answer.
    """

    name: Literal["prism"] = "prism"
    path: str = "HannahRoseKirk/prism-alignment"
    """The Hub dataset (its configuration `utterances`), or a folder in its layout."""

    def read(self) -> Read:
        turns: dict[tuple[str, int], list[tuple[str, Mapping[str, Any]]]] = defaultdict(list)
        is_local = Path(self.path).expanduser().exists()
        for where, record in self._records(**({} if is_local else {"name": "utterances"})):
            try:
                turn = int(number(record, "turn", where))
            except Unusable as error:
                yield error
                continue
            turns[str(need(record, "conversation_id", where)), turn].append((where, record))
        talks: dict[str, list[dict[str, str]]] = defaultdict(list)
        broken: set[str] = set()
        for (talk, _), answers in sorted(turns.items()):
            if talk in broken:
                said_of = "an earlier turn has no one answer chosen, so what follows it is not told"
                yield Unusable("no preference", answers[0][0], said_of)
                continue
            chosen = [record for _, record in answers if _is_chosen(record)]
            asked = {"role": "user", "content": str(need(answers[0][1], "user_prompt", talk))}
            said = talks[talk]
            if len(chosen) != 1:
                where = answers[0][0]
                yield Unusable("no preference", where, f"{len(chosen)} answers are chosen")
                broken.add(talk)
                continue
            best = {"role": "assistant", "content": need(chosen[0], "model_response", talk)}
            for where, record in answers:
                if _is_chosen(record):
                    continue
                worse = {"role": "assistant", "content": need(record, "model_response", where)}
                messages = {"prompt": [*said, asked], "chosen": [best], "rejected": [worse]}
                columns = {
                    "user_id": need(record, "user_id", where),
                    "conversation_type": record.get("conversation_type"),
                    "score": chosen[0].get("score"),
                }
                try:
                    yield replace(parse(messages, where), columns=columns)
                except Unusable as error:
                    yield error
            said += [asked, best]


def _is_chosen(record: Mapping[str, Any]) -> bool:
    # a CSV file says it in words
    return bool(LABELS.get(str(record.get("if_chosen")).strip().lower()))


@dataclass(frozen=True, kw_only=True)
class ChatbotArena(Sampled):
    """Chatbot Arena conversations (Zheng et al. 2023), prompts CC-BY-4.0, answers CC-BY-NC-4.0.

    Which of two models' conversations a person liked better; ties state no preference and are
    passed over. Columns: `judge`, who votes; `language`; `turn`. Some of it is offensive.
    """

    name: Literal["chatbot-arena"] = "chatbot-arena"
    path: str = "lmsys/chatbot_arena_conversations"
    """The Hub dataset, or a file or folder with its columns."""

    def read(self) -> Read:
        for where, record in self._records():
            winner = need(record, "winner", where)
            if winner not in ("model_a", "model_b"):
                continue
            two = [need(record, f"conversation_{side}", where) for side in ("a", "b")]
            better, worse = two if winner == "model_a" else two[::-1]
            columns = {"judge": need(record, "judge", where)}
            columns |= {name: record.get(name) for name in ("language", "turn")}
            try:
                row = parse({"chosen": list(better), "rejected": list(worse)}, where)
                yield replace(row, columns=columns)
            except Unusable as error:
                yield error


@dataclass(frozen=True, kw_only=True)
class HHH(Sampled):
    """HHH alignment (Askell et al. 2021), Apache-2.0: helpful, honest, harmless, and other.

    The column `client` says which.
    """

    name: Literal["hhh"] = "hhh"
    path: str = "HuggingFaceH4/hhh_alignment"
    """The Hub dataset, or a folder with hhh_alignment.jsonl.gz (prompt, chosen, rejected,
    client)."""
    objectives: tuple[Literal["helpful", "honest", "harmless", "other"], ...] = (
        "helpful",
        "honest",
        "harmless",
        "other",
    )
    """Which of them."""

    def read(self) -> Read:
        table = local_table(self.path, "hhh_alignment")
        for objective, where, record in self._of_each(table):
            if "targets" in record:
                labels = list(record["targets"]["labels"])
                choices = list(record["targets"]["choices"])
                if sorted(labels) != [0, 1]:
                    yield Unusable("no preference", where, f"its labels are {labels}")
                    continue
                texts = [choices[labels.index(label)] for label in (1, 0)]
                prompt = need(record, "input", where)
            else:
                texts = [need(record, side, where) for side in ("chosen", "rejected")]
                prompt = need(record, "prompt", where)
            try:
                yield _pair(_asked(prompt), texts, where, {"client": objective})
            except Unusable as error:
                yield error

    def _of_each(self, table: Path | None) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
        if table:
            for where, record in read_table(str(table)):
                if need(record, "client", where) in self.objectives:
                    yield record["client"], where, record
            return
        local = Path(self.path).expanduser().is_dir()
        for objective in self.objectives:
            how = {"data_dir": objective} if local else {"name": objective}
            for where, record in read_table(self.path, split="test", **how):
                yield objective, where, record


Part = Annotated[
    Files | HH | SHP | Summaries | WebGPT | SafeRLHF | HelpSteer2 | Prism | ChatbotArena | HHH,
    Field(discriminator="name"),
]


@dataclass(frozen=True, kw_only=True)
class Domains(DataSource):
    """Several sources together, as domains of one experiment: `partition.column: domain`.

    Each source's rows have the column `domain`, the name that it has here.
    """

    name: Literal["domains"] = "domains"
    sources: dict[str, Part] = field(default_factory=dict)
    """The source of each domain, by the domain's name."""
    max_rows: Count | None = None
    """Take only the first so many rows of each source."""

    def __post_init__(self) -> None:
        if len(self.sources) < 2:
            raise ValueError("data.sources: a domain alone is that source itself; name two or more")

    def with_paths(self, renamed: Any) -> Domains:
        made = {name: source.with_paths(renamed) for name, source in self.sources.items()}
        return replace(self, sources=made)

    def read(self) -> Iterator[Row | Unusable]:
        for domain, source in self.sources.items():
            try:
                for number, row in enumerate(source.read()):
                    # to the end: what is wrong with all of its rows a source says then
                    if self.max_rows is not None and number >= self.max_rows:
                        continue
                    if isinstance(row, Unusable):
                        yield row
                    else:
                        yield replace(row, columns={**row.columns, "domain": domain})
            except UserError as error:
                raise UserError(f"data.sources.{domain}: {error}") from error
