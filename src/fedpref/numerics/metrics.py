"""Figures over clients: what one number per client comes to for the population."""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass

ClientMetrics = Mapping[str, Mapping[str, float]]  # client -> metric -> value
ACCURACY, ALIGNMENT, REWARD = "rewards/accuracies", "alignment", "reward"
IMPLICIT = f"{ACCURACY}_implicit"  # of the policy alone, where clients have reward heads too


@dataclass(frozen=True)
class Headline:
    """What clients are compared by, in words, and how it is written."""

    title: str
    scale: float = 100.0
    digits: int = 1

    @property
    def caption(self) -> str:
        """Its title with its unit."""
        return f"{self.title}, %" if self.scale == 100 else self.title

    def text(self, value: float, sign: str = "") -> str:
        """A value in that unit; nothing where there is none."""
        return "" if math.isnan(value) else f"{self.scale * value:{sign}.{self.digits}f}"


HEADLINES = {ACCURACY: Headline("pair accuracy"), ALIGNMENT: Headline("alignment"), REWARD: Headline("reward", 1.0, 3)}


def headline(metrics: Container[str]) -> str:
    """The metric by which clients are compared, of those that a task measures."""
    return next(metric for metric in HEADLINES if metric in metrics)


def of_objectives(metrics: Iterable[str]) -> list[str]:
    """The metrics of several objectives, and beside rewards of answers what says whether they were worth it."""
    names = list(metrics)
    if REWARD in names:
        found = [name for name in names if name.startswith("rewards/")]
        return found + [
            name for name in ("kl", "completions/mean_length", "completions/ended", "distinct_1", "distinct_2") if name in names
        ]
    return [name for name in names if name.startswith(f"{ACCURACY}/")]


def over_clients(values: Mapping[str, float], counts: Mapping[str, int], *, low_is_good: bool = False) -> dict[str, float]:
    """Mean, mean weighted by held-out examples, worst client, mean of the worst decile (one client at least), gap, CoV, Jain's index.

    The gap is between the best client and the worst; CoV is the standard deviation as a share of the mean. Jain's index
    (sum x)^2 / (N sum x^2) = 1 / (1 + CoV^2) is 1 when all clients fare alike and 1/N when one has everything (Jain et al. 1984). CoV and
    the index are left out where a value is negative; so is `fairness`, 1 / (1 + CoV), which others give (arXiv 2604.04261).
    """
    ranked = sorted(values.values(), reverse=low_is_good)
    worst = ranked[: math.ceil(len(ranked) / 10)]
    squares = sum(value**2 for value in ranked)
    summary = {
        "mean": sum(ranked) / len(ranked),
        "weighted_mean": sum(values[name] * counts[name] for name in values) / sum(counts[name] for name in values),
        "worst": ranked[0],
        "worst_decile": sum(worst) / len(worst),
        "gap": max(ranked) - min(ranked),
    }
    if min(ranked) >= 0:
        summary["jain"] = sum(ranked) ** 2 / (len(ranked) * squares) if squares else 1.0
        summary["cov"] = math.sqrt(max(0.0, 1 / summary["jain"] - 1))
        summary["fairness"] = 1 / (1 + summary["cov"])
    return summary


def standard_error(accuracies: Mapping[str, float], counts: Mapping[str, int]) -> float:
    """The standard error of the mean over clients of accuracies: binomial within clients, which are taken as given.

    Its p are (successes + 1) / (n + 2), as Laplace has them, so that a client with all pairs right is not taken for certain.
    """
    shares = {name: (p * counts[name] + 1) / (counts[name] + 2) for name, p in accuracies.items()}
    return math.sqrt(sum(p * (1 - p) / counts[name] for name, p in shares.items())) / len(accuracies)
