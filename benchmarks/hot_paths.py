"""What is done over and over, against its straightforward form, interleaved in one process.

    python benchmarks/hot_paths.py
    python benchmarks/hot_paths.py --quick --json figures.json

Each pair gives the same result, which is checked: pairing judged answers with answers to other
prompts (against a search), drawing a batch (against reading all lengths and ordering all examples),
and a log that is fetched while it grows (against fetching it at each poll; in bytes, nothing is
fetched here).
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from fedpref.sites.submitted import POLL, pause
from fedpref.tasks.batches import POOL, BatchSize, draw_indices
from fedpref.tasks.examples import Example, OfflineShard
from fedpref.tasks.feedback import next_others


def raced(turns: int, **forms: Callable[[], Any]) -> tuple[dict[str, float], list[Any]]:
    """Median seconds of each form, in turns, and what each returned last."""
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    results: dict[str, Any] = {}
    for _ in range(turns):
        for name, form in forms.items():
            begun = time.perf_counter()
            results[name] = form()
            seconds[name].append(time.perf_counter() - begun)
    return {name: statistics.median(taken) for name, taken in seconds.items()}, [*results.values()]


def searched(values: Sequence[Any]) -> list[int | None]:
    """For each value the next other one, by looking at one after another of a copy."""
    others: list[int | None] = []
    for i, value in enumerate(values):
        following = [*range(i + 1, len(values)), *range(i)]
        others.append(next((j for j in following if values[j] != value), None))
    return others


def pairing(rows: int) -> dict[str, float]:
    """Judgements of few prompts, one prompt after another, as files are often sorted."""
    prompts = [f"prompt {i // max(1, rows // 8)}" for i in range(rows)]
    seconds, (ours, theirs) = raced(
        1, ours=lambda: next_others(prompts), search=lambda: searched(prompts)
    )
    assert ours == theirs
    return {
        "pairing_seconds": seconds["ours"],
        "pairing_seconds_search": seconds["search"],
        "pairing_ratio": seconds["search"] / seconds["ours"],
    }


def ordered_draw(lengths: Sequence[int], size: BatchSize, rng: torch.Generator) -> list[int]:
    """The draw of a batch, with the whole order of examples as a list."""
    count = min(size.examples, len(lengths))
    order = torch.randperm(len(lengths), generator=rng).tolist()
    if size.max_tokens is None:
        pool = order[: count * min(POOL, len(lengths) // count)]
        pool.sort(key=lambda i: (lengths[i], i))
        batches = [pool[first : first + count] for first in range(0, len(pool), count)]
    else:
        most = POOL * size.max_tokens
        fitting = sum(total <= most for total in accumulate(lengths[i] for i in order))
        pool = sorted(order[: max(1, fitting)], key=lambda i: (lengths[i], i))
        batches = [[]]
        for i in pool:
            if batches[-1] and sum(lengths[k] for k in batches[-1]) + lengths[i] > size.max_tokens:
                batches.append([])
            batches[-1].append(i)
    position = int(torch.randint(len(pool), (), generator=rng))
    return next(batch for batch in batches if pool[position] in batch)


def draws(rows: int, turns: int) -> dict[str, float]:
    """A batch of a shard, of so many examples and of so many tokens."""
    rng = random.Random(0)
    examples = tuple(
        Example((1,) * rng.randint(5, 60), ((2,) * rng.randint(3, 50), (3,) * rng.randint(3, 50)))
        for _ in range(rows)
    )
    shard = OfflineShard("client", examples, ())
    figures = {}
    for name, size in (("examples", BatchSize(8)), ("tokens", BatchSize(8, 2000))):
        ours, theirs = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
        seconds, batches = raced(
            turns,
            ours=lambda s=size, g=ours: draw_indices(shard.by_objective[0][1], s, g)[0],
            ordered=lambda s=size, g=theirs: ordered_draw([e.tokens for e in shard.train], s, g),
        )
        assert batches[0] == batches[1]
        figures |= {
            f"draw_ms_{name}": 1000 * seconds["ours"],
            f"draw_ms_{name}_ordered": 1000 * seconds["ordered"],
            f"draw_ratio_{name}": seconds["ordered"] / seconds["ours"],
        }
    return figures


def log_bytes(hours: float, grows: float = 500.0) -> dict[str, float]:
    """Bytes fetched in so many hours of a log that grows by `grows` a second, whole each time."""
    fetched, at = 0.0, 0.0
    while at < 3600 * hours:
        fetched += grows * at
        at += pause(int(grows * at))
    polls = int(3600 * hours / POLL)
    always = sum(grows * POLL * poll for poll in range(polls))
    return {"log_mb": fetched / 1e6, "log_ratio": always / fetched}


def main() -> None:
    """Print the figures and write them to a file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer rows, clients and turns")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    quick = arguments.quick
    figures = {
        **pairing(4_000 if quick else 32_000),
        **draws(40_000 if quick else 160_000, 5 if quick else 20),
        **log_bytes(3.0),
    }
    print(json.dumps(figures, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
