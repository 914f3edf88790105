"""Lines on equal terms: where a metric was first at a value, and what a figure had cost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from conftest import make_rows, write_rows
from fedpref import Experiment, UserError, config, run
from fedpref.reports.comparison import Terms, compare_all
from fedpref.reports.comparison_tables import notes
from fedpref.reports.equal_terms import Course, at, cost_of, course, parse, seen

ACCURACY = "rewards/accuracies"


def way(kl: list[float], accuracy: list[float]) -> Course:
    evaluations = [
        {
            "round": k + 1,
            "clients": {
                "a": {"kl": one - 1, ACCURACY: two, "num_examples": 9},
                "b": {"kl": one + 1, ACCURACY: two + 0.2, "num_examples": 9},
            },
        }
        for k, (one, two) in enumerate(zip(kl, accuracy, strict=True))
    ]
    rounds = [
        {"round": k + 1, "seconds": 2.0, "bytes_up": 10**6, "bytes_down": 0, "num_pairs": 8}
        for k in range(len(kl))
    ]
    return course(evaluations, rounds)


def test_values_are_those_where_the_mean_was_first_there() -> None:
    found = at("line", way([0, 1, 4, 2], [0.5, 0.6, 0.7, 0.1]), "kl", 2.5, ACCURACY)
    assert found == pytest.approx({"a": 0.65, "b": 0.85}), "half way, the first time"
    assert at("line", way([0, 2, 4], [0.5, 0.6, 0.7]), "kl", 2, ACCURACY)["a"] == 0.6
    after = at("line", way([0, 2, 4], [0.5, 0.6, 0.7]), "pairs", 20, ACCURACY)
    assert after["a"] == pytest.approx(0.65)


def test_a_line_that_was_never_there_is_named() -> None:
    line = way([0, 1], [0.5, 0.6])
    with pytest.raises(UserError, match=r"--at kl=3: mine was never there; .* have 0 to 1"):
        at("mine", line, "kl", 3, ACCURACY)
    with pytest.raises(UserError, match=r"--at reward: mine does not measure it; .*kl"):
        at("mine", line, "reward", 3, ACCURACY)
    for text in ("kl", "kl=", "=2", "kl=two"):
        with pytest.raises(UserError, match="expected NAME=NUMBER"):
            parse(text)


def test_a_figures_cost_is_what_was_spent_when_it_was_first_reached() -> None:
    line = way([0, 0, 0], [0.4, 0.6, 0.5])
    spent = cost_of(line, ACCURACY, 0.6)
    assert spent == pytest.approx({"rounds": 1.5, "seconds": 3.0, "mb": 1.5, "pairs": 12.0})
    begins = cost_of(line, ACCURACY, 0.1)
    assert begins is not None
    assert begins["rounds"] == 1.0, "the first evaluation has it already"
    assert cost_of(line, ACCURACY, 0.9) is None
    assert seen([{"num_pairs": 3}, {"num_pairs": 4}]) == 7


@pytest.mark.long
def test_lines_that_saw_more_are_marked_and_can_be_made_equal(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", make_rows([24, 24, 24]))
    local = settings["algorithm"]["local"]
    paths = []
    for name, steps in (("few", 2), ("many", 4)):
        content = {
            **settings,
            "name": name,
            "data": {**settings["data"], "path": str(rows)},
            "algorithm": {"name": "feddpo", "local": {**local, "steps": steps}},
            "evaluate_every": 1,
        }
        spec = config.parse(Experiment, content, "test")
        paths.append(run(spec, tmp_path / name).path)
    few, many = compare_all(paths)
    # about 4 pairs a step of 3 clients in 3 rounds
    assert (few.seen, many.seen) == pytest.approx((72, 144), rel=0.15)
    assert (few.steps, many.steps) == (6.0, 12.0)
    (said,) = notes([few, many])
    assert f"examples seen {many.seen:.0f} to {few.seen:.0f}, local steps 12 to 6" in said
    terms = Terms(at="pairs=60", to="50")
    equal = compare_all(paths, terms)
    course_of = [
        [json.loads(line) for line in (path / "evaluation.jsonl").open()] for path in paths
    ]
    for row, rounds, path in zip(equal, course_of, paths, strict=True):
        pairs = [json.loads(line)["num_pairs"] for line in (path / "metrics.jsonl").open()]
        sums = [sum(pairs[: k + 1]) for k in range(3)]
        k = next(k for k in range(2) if sums[k] < 60 <= sums[k + 1])
        share = (60 - sums[k]) / (sums[k + 1] - sums[k])
        means = [100 * one["summary"][ACCURACY]["mean"] for one in rounds[k : k + 2]]
        assert row.mean == pytest.approx(means[0] + share * (means[1] - means[0]))
        assert row.cost is not None
        assert row.even is None, "pairs were kept of the end alone"
    assert "pairs=60" in notes(equal, terms)[0]
