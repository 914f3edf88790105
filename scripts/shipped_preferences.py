"""Draw the shipped preference pairs: a population of twelve clients with known tastes judges the
answers of requests.jsonl.

Client k compares two answers a, b to one request and chooses a with the Bradley-Terry probability
sigmoid(w_k . (s_a - s_b)): s holds an answer's style on four axes (+1 or -1 each), w_k the client's
taste.

    python scripts/shipped_preferences.py
"""

from __future__ import annotations

import gzip
import json
import random
from itertools import combinations
from math import exp
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / "src/fedpref/data/builtin"
AXES = ("thorough", "warm", "bold", "formal")
TEST_PAIRS = 80
# name: (taste on the four axes, training pairs)
POPULATION = {
    "library": ((1.5, 0.9, -0.6, 0.4), 400),
    "town-hall": ((1.1, 0.6, -0.5, 1.1), 350),
    "youth-club": ((-0.2, 1.5, 0.7, -1.4), 300),
    "bank": ((0.9, 0.5, -0.8, 1.3), 250),
    "repair-shop": ((-0.6, 0.1, 1.2, -1.0), 200),
    "school": ((1.4, 1.2, -0.3, 0.5), 150),
    "taxi-office": ((-1.0, 0.5, 1.0, -0.6), 60),
    "helpline": ((0.8, 1.8, -0.9, -0.2), 40),
    "law-office": ((1.3, 0.2, -1.0, 1.6), 30),
    "bakery": ((0.3, 1.4, 0.6, -0.8), 24),
    "garden-centre": ((0.9, 1.0, 0.5, -0.4), 16),
    "clinic": ((1.2, 1.4, -1.2, 0.6), 12),
}


def main() -> None:
    requests = [json.loads(line) for line in (FOLDER / "requests.jsonl").read_text().splitlines()]
    pairs = {
        split: [
            (r, a, b)
            for r in requests
            if r["split"] == split
            for a, b in combinations(r["answers"], 2)
        ]
        for split in ("train", "test")
    }
    draw = random.Random(20260101)
    rows, tally = [], {}
    for client, (taste, count) in POPULATION.items():
        agreed = 0.0
        for split, size in (("train", count), ("test", TEST_PAIRS)):
            for request, a, b in draw.sample(pairs[split], size):
                logit = sum(w * (a[axis] - b[axis]) for w, axis in zip(taste, AXES, strict=True))
                chosen, rejected = (a, b) if draw.random() < 1 / (1 + exp(-logit)) else (b, a)
                better = a if logit > 0 else b
                agreed += (0.5 if logit == 0 else chosen is better) if split == "test" else 0
                rows.append(
                    {
                        "client": client,
                        "split": split,
                        "prompt": request["prompt"],
                        "chosen": chosen["text"],
                        "rejected": rejected["text"],
                    }
                )
        tally[client] = {
            "taste": dict(zip(AXES, taste, strict=True)),
            "train_pairs": count,
            "test_pairs": TEST_PAIRS,
            "accuracy_of_the_true_taste": round(agreed / TEST_PAIRS, 3),
        }
    text = "".join(json.dumps(row) + "\n" for row in rows)
    with gzip.GzipFile(FOLDER / "preferences.jsonl.gz", "wb", mtime=0) as file:
        file.write(text.encode())
    (FOLDER / "population.json").write_text(json.dumps(tally, indent=1) + "\n")
    print(f"{len(rows)} pairs of {len(POPULATION)} clients")


if __name__ == "__main__":
    main()
