"""Items to be compared: from a file of answers, or drawn ahead while people choose."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from fedpref.collect.speakers import Speaker, said
from fedpref.collect.store import Item, Selected, Store, coin
from fedpref.data import Files
from fedpref.data.parsing import parse, text
from fedpref.data.preferences import Conversation, Preference, Side, Text, key
from fedpref.data.splits import held_out, identity
from fedpref.data.tables import read_table
from fedpref.data.unusable import Unusable
from fedpref.errors import UserError

ANSWERS = "chosen", "rejected"  # columns of a pair
ALIKE = "alike"  # a folder's setting: prompts whose answers leave nothing to choose between
TOGETHER = 2  # prompts that are answered at a time: the first people see soon


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How prompts become items.

    Attributes:
        select: `random`, or `uncertain`: those of whose answers the model is least sure come first.
        random_share: The share of training prompts that are asked about at random all the same.
        test_fraction: The share of prompts that are held out, by the hash by which a run holds out.
        overlap: The share of items that all raters see.
        max_length: Tokens of an answer at most.
        temperature: See `Speaker.answers`.
        seed: Of draws.
        keeps_empty: Whether an answer that says nothing is shown too, as where models are judged.
    """

    select: Selected = "random"
    random_share: float = 0.3
    test_fraction: float = 0.2
    overlap: float = 0.1
    max_length: int = 128
    temperature: float | None = None
    seed: int = 0
    keeps_empty: bool = False

    def item(
        self, prompt: Text, first: Text, second: Text, origins: Sequence[str], margin: float | None
    ) -> Item:
        """Return an item of two answers: which side it is on hangs on the prompt alone."""
        asked = identity(prompt, "question")
        is_test = held_out(asked, self.test_fraction)
        is_random = (
            is_test
            or self.select == "random"
            or coin(self.seed, "selected", asked) < self.random_share
        )
        side: Side = "test" if is_test else "train"
        return Item(
            prompt=prompt,
            first=first,
            second=second,
            origins=dict(zip(("first", "second"), origins, strict=True)),
            side=side,
            selected="random" if is_random else "uncertain",
            shared=coin(self.seed, "shared", asked, key(first), key(second)) < self.overlap,
            margin=margin,
        )


def prompts_of(path: Path) -> list[Text]:
    """Return the prompts of a file, each once, in an order that hangs on the prompts alone.

    Args:
        path: JSON Lines, CSV, TSV or Parquet with a column `prompt`; or a text file of a prompt in
            each line.

    Raises:
        UserError: There are none, or one cannot be used.
    """
    prompts: dict[str, Text] = {}
    if path.suffix == ".txt":
        read: list[Text] = list(filter(None, map(str.strip, _lines(path))))
    else:
        for where, record in read_table(str(path)):
            if not {"prompt", "chosen"} & record.keys():
                raise UserError(
                    f"{where}: no column 'prompt'; the row has {', '.join(map(str, record))}."
                )
            break
        read = [_usable(row) for row in Files(path=str(path)).read()]
    for prompt in read:
        prompts.setdefault(identity(prompt, "prompt"), prompt)
    if not prompts:
        raise UserError(f"{path}: there are no prompts.")
    return [prompts[asked] for asked in sorted(prompts, key=lambda asked: coin("order", asked))]


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: this is no UTF-8 text.") from error


def _usable(row: object) -> Text:
    if isinstance(row, Unusable):
        raise UserError(str(row))
    prompt: Text = row.prompt  # type: ignore[attr-defined]
    return prompt


def candidates_of(path: Path, plan: Plan, known: Iterable[Item] = ()) -> Iterator[Item]:
    """Yield items of a file of answers: every two of a prompt's, each pair once.

    Args:
        path: Rows of `prompt` and `completions`, a list of two or more, or `chosen` and `rejected`.
        plan: How they become items.
        known: Items that are there already.

    Raises:
        UserError: A row is of another form.
    """
    seen = {_pair(item.prompt, item.first, item.second) for item in known}
    for where, row in read_table(str(path)):
        answers = row.get("completions") or [row[name] for name in ANSWERS if name in row]
        if not row.get("prompt") or not isinstance(answers, list) or len(answers) < 2:
            raise UserError(
                f"{where}: expected prompt, and completions, a list of two answers or more, or "
                "chosen and rejected."
            )
        rest = {name: row[name] for name in row if name not in ("completions", *ANSWERS)}
        try:
            said = [text(answer, "completions", where) for answer in answers]
            places = {key(one): i for i, one in reversed([*enumerate(said)])}  # each once
            for i, k in combinations(sorted(places.values()), 2):
                # read as rows to train on are, with the prompt apart
                both = parse({**rest, **dict(zip(ANSWERS, (said[i], said[k]), strict=True))}, where)
                _refuse_unseen(both)
                pair = _pair(both.prompt, both.chosen, both.rejected)
                if pair not in seen:
                    seen.add(pair)
                    origins = (f"{path.name} {i + 1}", f"{path.name} {k + 1}")
                    yield plan.item(both.prompt, both.chosen, both.rejected, origins, None)
        except Unusable as error:
            raise UserError(str(error)) from error


def _refuse_unseen(row: Preference) -> None:
    """Raise UserError where a row has what the page does not show, and people would choose by."""
    if isinstance(row.prompt, Conversation) and "tools" in row.prompt.given:
        raise UserError(f"{row.where}: the prompt has tools, which the page does not show.")
    texts = (row.prompt, row.chosen, row.rejected)
    turns = [turn for one in texts if not isinstance(one, str) for turn in one]
    if any("tool_calls" in turn for turn in turns):
        raise UserError(f"{row.where}: a message calls a tool, which the page does not show.")


class Ahead(threading.Thread):
    """Draws answers in the background, so that the next item is there when it is wanted.

    Args:
        store: Takes the items.
        speakers: One whose two answers are compared, or two.
        prompts: What is answered, in this order; those that the store has items of are left out.
        plan: How they become items.
        wanted: Returns how many items more are wanted.
    """

    def __init__(
        self,
        store: Store,
        speakers: Sequence[Speaker],
        prompts: Sequence[Text],
        plan: Plan,
        wanted: Callable[[], int],
    ) -> None:
        super().__init__(name="answers", daemon=True)
        self._store, self._speakers, self._plan, self._wanted = store, speakers, plan, wanted
        if any(isinstance(prompt, Conversation) and prompt.given for prompt in prompts):
            raise UserError("a prompt has tools, which the page does not show.")
        laid_out = [speakers[0].laid_out(prompt) for prompt in prompts]
        done = {key(item.prompt) for item in store.items()} | {*store.kept(ALIKE, ())}
        self._left = [prompt for prompt in laid_out if key(prompt) not in done]
        self._drawn = len(done)
        self._woken, self._ends = threading.Event(), False
        self.failure = ""  # why no more answers come

    @property
    def left(self) -> int:
        """How many prompts have not been answered yet."""
        return len(self._left)

    def wake(self) -> None:
        """Look again how many items are wanted."""
        self._woken.set()

    def stop(self) -> None:
        """Let nothing more be kept; what is being drawn is lost, and drawn again another time."""
        self._ends = True
        self.wake()

    def end(self) -> None:
        """Stop, and wait until what is being drawn is there."""
        self.stop()
        self.join()

    def run(self) -> None:
        while self._left and not self._ends:
            try:
                if self._wanted() <= 0:
                    self._woken.wait()
                    self._woken.clear()
                    continue
                self._draw(self._left[:TOGETHER])
            except Exception as error:  # the page says so, and what was chosen stays
                self.failure = f"{type(error).__name__}: {error}"
                return
            self._left = self._left[TOGETHER:]

    def _draw(self, prompts: Sequence[Text]) -> None:
        """Answer some prompts twice, and keep the items; what is drawn hangs on their place."""
        plan, place = self._plan, self._drawn
        self._drawn += len(prompts)
        seeds = [int(coin(plan.seed, "answers", place, k) * 2**62) for k in range(2)]
        if len(self._speakers) == 1:
            (one,) = self._speakers
            pairs = one.answers(prompts, 2, plan.max_length, plan.temperature, seeds[0])
            names = [f"{one.name}, seed {seeds[0]}, {nth}" for nth in ("first", "second")]
        else:
            drawn = [
                who.answers(prompts, 1, plan.max_length, plan.temperature, seed)
                for who, seed in zip(self._speakers, seeds, strict=True)
            ]
            pairs = [[*one, *other] for one, other in zip(*drawn, strict=True)]
            names = [
                f"{who.name}, seed {seed}" for who, seed in zip(self._speakers, seeds, strict=True)
            ]
        items, alike = [], []
        for prompt, (first, second) in zip(prompts, pairs, strict=True):
            texts = [said(answer) for answer in (first, second)]
            if texts[0] == texts[1] or not (plan.keeps_empty or all(texts)):
                alike.append(key(prompt))  # nothing to choose between
                continue
            margin = None
            if plan.select == "uncertain":
                margin = self._speakers[0].margin(prompt, first, second)
            items.append(plan.item(prompt, first, second, names, margin))
        if self._ends:
            return
        self._store.add(items)
        if alike:
            self._store.keep(ALIKE, [*self._store.kept(ALIKE, ()), *alike])


def _pair(prompt: Text, first: Text, second: Text) -> tuple[str, frozenset[str]]:
    return key(prompt), frozenset((key(first), key(second)))
