"""Fit the classifier of styles by which the shipped clients' tastes judge new answers.

    python scripts/styles.py

For each of the four styles of the shipped answers, a logistic regression on log counts of words and
pairs of words and on the log length, on the training requests alone; its penalty is chosen by five
folds of requests. Written is `src/fedpref/rewards/builtin/styles.npz`; printed is how often it is
right on the held-out requests' answers.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, GroupKFold

from fedpref.rewards.taste import FILE, STYLES, features, grams

PACKAGE = Path(__file__).resolve().parent.parent / "src/fedpref"
LEAST = 3  # training answers that a word must be in


def main() -> None:
    lines = (PACKAGE / "data/builtin/requests.jsonl").read_text().splitlines()
    requests = [json.loads(line) for line in lines]
    sides = {}
    for side in ("train", "test"):
        some = [(r["id"], a) for r in requests if r["split"] == side for a in r["answers"]]
        sides[side] = ([a for _, a in some], np.array([number for number, _ in some]))
    answers, groups = sides["train"]
    counts = Counter(gram for answer in answers for gram in set(grams(answer["text"])))
    known = sorted(gram for gram, count in counts.items() if count >= LEAST)
    vocabulary = {gram: k for k, gram in enumerate(known)}
    x, held = (
        np.array([features(answer["text"], vocabulary) for answer in sides[side][0]])
        for side in ("train", "test")
    )
    weights, intercepts = [], []
    for style in STYLES:
        penalties = {"C": np.logspace(-2, 2, 9)}
        search = GridSearchCV(LogisticRegression(max_iter=5000), penalties, cv=GroupKFold(5))
        model = search.fit(x, [a[style] for a in answers], groups=groups).best_estimator_
        truth = [answer[style] for answer in sides["test"][0]]
        print(f"{style}: right for {model.score(held, truth):.1%} of {len(truth)} held-out answers")
        weights.append(model.coef_[0])
        intercepts.append(model.intercept_[0])
    np.savez_compressed(
        PACKAGE / "rewards" / FILE,
        grams=np.array(known),
        weights=np.array(weights, np.float16),
        intercepts=np.array(intercepts, np.float32),
    )


if __name__ == "__main__":
    main()
