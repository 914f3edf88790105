"""Which item a rater sees next, how far they are, and what their keys mean."""

from __future__ import annotations

import statistics
import threading
import time
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from fedpref.collect.drawing import ALIKE, Ahead
from fedpref.collect.speakers import answer_to, said
from fedpref.collect.store import Event, Item, Store, coin
from fedpref.data.preferences import Text

Shown = Literal["left", "right", "tie", "bad", "skip", "left-edited", "right-edited"]
LONGEST_NAME, LONGEST_EDIT = 60, 20_000
LEASE = 600.0  # seconds for which an item on a screen is nobody else's
RECENT = 20  # choices by which the time that is left is judged
LONGEST = 120.0  # seconds of a choice that count: who is away is not choosing


class RefusedError(Exception):
    """What a page asked for cannot be."""


@dataclass(frozen=True)
class Texts:
    """What the page says.

    Attributes:
        title: The page's.
        question: What is asked of two answers, for each question.
        names: Of the questions; one empty name where there is one.
        edits: Whether answers may be edited.
    """

    title: str
    question: Sequence[str]
    names: Sequence[str]
    edits: bool = True


class Sitting:
    """What people do on a page, over a store.

    Args:
        store: Items and choices.
        texts: What is asked.
        seed: Of the order and of the sides on which answers stand.
        limit: Items of a rater at most.
    """

    def __init__(self, store: Store, texts: Texts, seed: int, limit: int | None = None) -> None:
        self.store, self.texts, self.seed, self._limit = store, texts, seed, limit
        self.ahead: Ahead | None = None
        self._lock = threading.RLock()
        self._items = {item.number: item for item in store.items()}
        self._choices: dict[tuple[int, str, str], Event] = {}
        for event in store.standing():
            self._choices[event.item, event.rater, event.question] = event
        # what stands on raters' screens, and since when
        self._shown: dict[str, tuple[int, float]] = {}

    def more_wanted(self, ahead: int) -> int:
        """Return how many items more should lie ahead of raters."""
        with self._lock:
            self._look()
            raters = {rater for _, rater, _ in self._choices} | set(self._shown) or {""}
            fewest = min(len(self._open(rater)) for rater in raters)
            return ahead - fewest

    def _look(self) -> None:
        """See items that have been added."""
        for item in self.store.items(max(self._items, default=0)):
            self._items[item.number] = item

    # ---- what comes next

    def next(self, rater: str) -> dict[str, Any]:
        """Return what a rater sees next.

        That is an item; or that there is none yet, or no more.

        Raises:
            RefusedError: The name cannot be one.
        """
        with self._lock:
            # before the items: what is drawn meanwhile is then not taken for the end
            still = self.ahead.left if self.ahead else 0
            self._look()
            rater = name_of(rater)
            item, question = self._item(rater), 0
            if item is not None:
                self._shown[rater] = item.number, time.monotonic()
                answered = [
                    (item.number, rater, name) in self._choices for name in self.texts.names
                ]
                question = answered.index(False)
            if self.ahead is not None:
                self.ahead.wake()
            found = {"rater": rater, **self._progress(rater)}
            if item is None:
                failure = self.ahead.failure if self.ahead else ""
                waits = still > 0 and not failure
                is_full = self._limit is not None and found["done"] >= self._limit
                return {
                    **found,
                    "waiting": waits and not is_full,
                    "failure": failure,
                    "alike": len(self.store.kept(ALIKE, ())),
                }
            return {**found, "item": self._shown_as(item, rater, question)}

    def _item(self, rater: str) -> Item | None:
        open_items = self._open(rater)
        if not open_items or self._is_full(rater):
            return None
        numbers = {item.number for item in open_items}
        on_screen, _ = self._shown.get(rater, (0, 0.0))
        if on_screen in numbers:  # reloaded, or with a question left
            return self._items[on_screen]
        begun = [item for item in open_items if self._answered(item, rater)]
        if begun:
            return begun[0]
        # of the uncertain ones the least sure first, and those at random in between, in their share
        uncertain = [item for item in open_items if item.selected == "uncertain"]
        rest = [item for item in open_items if item.selected != "uncertain"]
        done = len({number for number, who, _ in self._choices if who == rater})
        share = len(rest) / len(open_items)
        takes_rest = coin(self.seed, "turn", rater, done) < share
        if uncertain and not (rest and takes_rest):
            return min(uncertain, key=lambda item: (abs(item.margin or 0.0), item.number))
        shared = [item for item in rest if item.shared]
        return (shared or rest)[0]

    def _open(self, rater: str) -> list[Item]:
        """Return the items that a rater has not done and nobody else has or sees."""
        questions = len(self.texts.names)
        taken = {number for number, who, _ in self._choices if who != rater}
        taken |= {
            number
            for who, (number, since) in self._shown.items()
            if who != rater and time.monotonic() - since < LEASE
        }
        return [
            item
            for item in self._items.values()
            if self._answered(item, rater) < questions and (item.shared or item.number not in taken)
        ]

    def _answered(self, item: Item, rater: str) -> int:
        """Return how many questions about an item a rater has answered."""
        return sum((item.number, rater, name) in self._choices for name in self.texts.names)

    def _is_full(self, rater: str) -> bool:
        done = {number for number, who, _ in self._choices if who == rater}
        has_begun = any(
            0 < self._answered(self._items[number], rater) < len(self.texts.names)
            for number in done
            if number in self._items
        )
        return self._limit is not None and len(done) >= self._limit and not has_begun

    def _shown_as(self, item: Item, rater: str, question: int) -> dict[str, Any]:
        first_left = self._is_first_left(item, rater)
        left, right = (item.first, item.second) if first_left else (item.second, item.first)
        return {
            "number": item.number,
            "prompt": turns(item.prompt),
            "left": said(left),
            "right": said(right),
            "question": self.texts.question[question],
            "name": self.texts.names[question],
        }

    def _is_first_left(self, item: Item, rater: str) -> bool:
        return coin(self.seed, "left", item.number, rater) < 0.5

    def _progress(self, rater: str) -> dict[str, Any]:
        done = {number for number, who, _ in self._choices if who == rater}
        left = len(self._open(rater)) + (self.ahead.left if self.ahead else 0)
        if self._limit is not None:
            left = min(left, max(0, self._limit - len(done)))
        recent = [event.seconds for event in self._choices.values() if event.rater == rater]
        seconds = statistics.median(recent[-RECENT:]) if recent else None
        each = len(self.texts.names)
        return {
            "done": len(done),
            "total": len(done) + left,
            "seconds_left": seconds and round(seconds * left * each),
            "can_undo": bool(done),
        }

    # ---- what was chosen

    def choose(self, asked: Any) -> dict[str, Any]:
        """Write a choice down and return what comes next.

        Args:
            asked: From the page: `address`, `rater`, `item`, `name` of the question, `shown` (which
                is one of `Shown`), `seconds`, and `edited` where an answer was edited.

        Raises:
            RefusedError: It does not fit; nothing is written.
        """
        rater, address = name_of(asked.get("rater")), address_of(asked.get("address"))
        with self._lock:
            self._look()
            number = asked.get("item")
            item = self._items.get(number) if type(number) is int else None
            name, shown, seconds = asked.get("name"), asked.get("shown"), asked.get("seconds")
            if item is None or name not in self.texts.names or shown not in get_args(Shown):
                raise RefusedError("there is no such item, question or choice")
            if type(seconds) not in (int, float) or not 0 <= seconds < 1e9:
                raise RefusedError("the seconds of a choice are a number")
            side, _, is_edited = str(shown).partition("-")
            first_left = self._is_first_left(item, rater)
            outcome: Any = side
            if side in ("left", "right"):
                outcome = "first" if (side == "left") == first_left else "second"
            edited = None
            if is_edited:
                before = item.first if outcome == "first" else item.second
                edited = self._edited(item, before, asked.get("edited"))
            outcome += "-edited" * bool(is_edited)
            event = self.store.choose(
                address,
                item.number,
                rater,
                str(name),
                outcome,
                is_left_first=first_left,
                seconds=min(float(seconds), LONGEST),
                edited=edited,
            )
            if event is not None:
                self._choices[event.item, event.rater, event.question] = event
            if self._answered(item, rater) == len(self.texts.names):
                self._shown.pop(rater, None)
            return self.next(rater)

    def _edited(self, item: Item, before: Text, text: Any) -> Text:
        """Return what an answer was edited to; raises RefusedError for what cannot be."""
        if not isinstance(before, str) and len(before) > 1:
            raise RefusedError("an answer of several turns cannot be edited as one")
        if not self.texts.edits or not isinstance(text, str) or not text.strip():
            raise RefusedError("an edited answer is a text")
        try:
            text.encode()
        except UnicodeEncodeError as error:  # half a character, which no file holds
            raise RefusedError("an edited answer is a text") from error
        if len(text) > LONGEST_EDIT:
            raise RefusedError(f"an edited answer has {LONGEST_EDIT} characters at most")
        edited = answer_to(item.prompt, text)
        if edited == before:
            raise RefusedError("the edited answer is the answer itself")
        return edited

    def undo(self, asked: Any) -> dict[str, Any]:
        """Undo a rater's last choice, and return its item to be shown again.

        Raises:
            RefusedError: The name cannot be one.
        """
        rater, address = name_of(asked.get("rater")), address_of(asked.get("address"))
        with self._lock:
            undone = self.store.undo(address, rater)
            if undone is not None:
                self._choices.pop((undone.item, rater, undone.question), None)
                self._shown[rater] = undone.item, time.monotonic()
            return self.next(rater)


def name_of(rater: Any) -> str:
    """Return a rater's name as it is written down; raises RefusedError for what is none."""
    name = " ".join(unicodedata.normalize("NFC", rater).split()) if isinstance(rater, str) else ""
    # within words of some scripts, and of joined signs
    visible = name.replace("\u200c", "").replace("\u200d", "")
    if not 0 < len(name) <= LONGEST_NAME or not visible or not visible.isprintable():
        raise RefusedError(f"a name has 1 to {LONGEST_NAME} characters that can be printed")
    return name


def address_of(address: Any) -> str:
    """Return what tells a choice from others; raises RefusedError for what is none."""
    if not isinstance(address, str) or not 8 <= len(address) <= 64 or not address.isascii():
        raise RefusedError("a choice has an address")
    return address


def turns(prompt: Text) -> list[dict[str, str]]:
    """Return a prompt as the page shows it: who says what."""
    if isinstance(prompt, str):
        return [{"role": "", "text": prompt}]
    return [{"role": str(turn["role"]), "text": str(turn.get("content") or "")} for turn in prompt]
