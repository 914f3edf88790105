"""Whether training helped, as people judge who do not know which answer is from which model."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from fedpref.collect.drawing import ALIKE
from fedpref.collect.speakers import said
from fedpref.collect.store import Store
from fedpref.errors import printable
from fedpref.experiments.run_files import REVIEWS, read_json
from fedpref.numerics import files
from fedpref.numerics.agreement import krippendorff_alpha
from fedpref.numerics.intervals import share

FIRST, SECOND = "first", "second"  # in the folder of a review: before, and after


def judged(store: Store) -> dict[str, Any]:
    """Return what people's choices come to.

    Returns:
        `preferred` and `judged`: of how many items with a winner the later answer is it, an item
        that several have judged being won by most of them; `low` and `high`, the exact 95 %
        interval of the share; `ties` (equally good, or won as often by either) and `bad` (both are,
        to most); `alike`, prompts to which both models said the same, which were not shown;
        `raters`, the same counts of each; `alpha`, Krippendorff's, over items that several have
        judged; `longer`, how often the winner is the longer answer; `words`, the mean of either.
    """
    items = {item.number: item for item in store.items()}
    votes: dict[int, list[str]] = defaultdict(list)
    by_rater: dict[str, list[str]] = defaultdict(list)
    for event in store.standing():
        if event.outcome != "skip":
            votes[event.item].append(event.outcome)
            by_rater[event.rater].append(event.outcome)
    alike = len(store.kept(ALIKE, ()))
    winners = {number: _most(some) for number, some in votes.items()}
    decided = {number: one for number, one in winners.items() if one in (FIRST, SECOND)}
    preferred = sum(one == SECOND for one in decided.values())
    low, high = share(preferred, len(decided))
    words = {
        number: tuple(
            len(said(text).split()) for text in (items[number].first, items[number].second)
        )
        for number in votes
    }
    longer = [
        (one == SECOND) == (words[number][1] > words[number][0])
        for number, one in decided.items()
        if words[number][0] != words[number][1]
    ]
    alpha = krippendorff_alpha(list(votes.values()))
    return {
        "preferred": preferred,
        "judged": len(decided),
        "low": low,
        "high": high,
        "ties": sum(one == "tie" for one in winners.values()),
        "bad": sum(one == "bad" for one in winners.values()),
        "alike": alike,
        "raters": {
            name: {
                "preferred": some.count(SECOND),
                "judged": some.count(SECOND) + some.count(FIRST),
                "ties": some.count("tie"),
                "bad": some.count("bad"),
            }
            for name, some in sorted(by_rater.items())
        },
        "alpha": None if math.isnan(alpha) else alpha,
        "longer": _mean(longer),
        "words": {
            "before": _mean([before for before, _ in words.values()]),
            "after": _mean([after for _, after in words.values()]),
        },
    }


def _most(votes: Sequence[str]) -> str:
    """Return what most have said; a tie where no single answer is said most."""
    counts = {vote: votes.count(vote) for vote in votes}
    best = [vote for vote, count in counts.items() if count == max(counts.values())]
    return best[0] if len(best) == 1 else "tie"


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def sentence(found: Mapping[str, Any]) -> str:
    """Return the review in words."""
    if not found["judged"]:
        return "nothing was preferred yet"
    ends = f"{100 * found['low']:.0f} to {100 * found['high']:.0f} %"
    return f"preferred in {found['preferred']} of {found['judged']}, {ends}"


def write(run: Path, name: str, folder: str, found: Mapping[str, Any]) -> str:
    """Write a review into its run, beside others, in place of what it was before.

    Args:
        run: The run directory.
        name: Whose model was judged, and beside what.
        folder: Of its choices: another review of this name has another one.
        found: What `judged` returned.

    Returns:
        The name that it has there, with a number where others have the same.
    """
    file = run / REVIEWS
    reviews = read_json(file) if file.exists() else {}
    names = (name if n == 1 else f"{name} ({n})" for n in count(1))
    own = next(one for one in names if reviews.get(one, {}).get("folder", folder) == folder)
    entry = {**found, "folder": folder}
    files.write(file, json.dumps(reviews | {own: entry}, indent=1) + "\n")
    return own


def lines(found: Mapping[str, Any]) -> list[str]:
    """Return what else there is to say of a review."""
    said_of = [
        f"ties {found['ties']}, both bad {found['bad']}, the same answer by both {found['alike']}"
    ]
    if len(found["raters"]) > 1:
        for name, one in found["raters"].items():
            said_of.append(
                f"{printable(name)}: {one['preferred']} of {one['judged']}, ties {one['ties']}"
            )
        if found["alpha"] is not None:
            said_of.append(f"agreement of raters: Krippendorff's alpha {found['alpha']:.2f}")
    if found["longer"] is not None:
        before, after = found["words"]["before"], found["words"]["after"]
        said_of.append(
            f"the longer answer won in {100 * found['longer']:.0f} %; words an answer, before and "
            f"after: {before:.0f}, {after:.0f}"
        )
    return said_of
