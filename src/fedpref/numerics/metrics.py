"""Metrics over clients: what one number for each client comes to for the population."""

from __future__ import annotations

import math
import statistics
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass

ClientMetrics = Mapping[str, Mapping[str, float]]  # client -> metric -> value
ACCURACY, ALIGNMENT, REWARD = "rewards/accuracies", "alignment", "reward"
# where clients have reward heads beside the policy: ranked by both together
COMBINED = f"{ACCURACY}_combined"


@dataclass(frozen=True)
class Headline:
    """The metric by which clients are compared, in words, and how it is written."""

    title: str
    scale: float = 100.0
    digits: int = 1

    @property
    def caption(self) -> str:
        """The title with its unit."""
        return f"{self.title}, %" if self.scale == 100 else self.title

    def text(self, value: float, sign: str = "") -> str:
        """Return a value in the metric's unit; empty for nan."""
        return "" if math.isnan(value) else f"{self.scale * value:{sign}.{self.digits}f}"

    def within(self, low: float, high: float) -> tuple[float, float]:
        """Return the ends of an interval, in the metric's unit, moved to what a mean can be.

        A share lies between 0 and 100 %; an interval by normal theory of few clients may not. The
        part that is cut holds no possible mean, so that the rest covers it as often. nan stays.
        """
        return (max(low, 0.0), min(high, 100.0)) if self.scale == 100 else (low, high)


HEADLINES = {
    ACCURACY: Headline("pair accuracy"),
    ALIGNMENT: Headline("alignment"),
    REWARD: Headline("reward", 1.0, 3),
}


LOW_OF_ANSWERS = frozenset({"kl", "perplexity"})
LOW_IS_GOOD = frozenset({"loss", "loss_joint", "error", "calibration_error", "kl", "value_error"})


def low_is_good(metric: str) -> bool:
    """Return whether the smallest value of a metric is the best one."""
    kind, _, name = metric.partition("/")
    return kind in LOW_IS_GOOD or (kind == "generation" and name.split("_")[0] in LOW_OF_ANSWERS)


def headline(metrics: Container[str]) -> str:
    """Return the metric by which clients are compared, of those that a task measures."""
    return next(metric for metric in HEADLINES if metric in metrics)


def of_objectives(metrics: Iterable[str]) -> list[str]:
    """Return the metrics that several objectives are measured by.

    For rewards of answers these include what tells whether the rewards were worth it.
    """
    names = list(metrics)
    if REWARD in names:
        kept = [name for name in names if name.startswith("rewards/")]
        return kept + [
            name
            for name in (
                "kl",
                "completions/mean_length",
                "completions/ended",
                "distinct_1",
                "distinct_2",
            )
            if name in names
        ]
    return [name for name in names if name.startswith(f"{ACCURACY}/")]


def over_clients(
    values: Mapping[str, float], counts: Mapping[str, int], *, low_is_good: bool = False
) -> dict[str, float]:
    """Summarise one value for each client.

    Args:
        values: By client.
        counts: Held-out examples by client, the weights of `weighted_mean`.
        low_is_good: Whether the worst client is the one with the largest value.

    Returns:
        `mean`; `weighted_mean`; `worst`, the worst client; `worst_decile`, the mean of the worst
        tenth, one client at least; `gap`, best less worst; `std`, the standard deviation over
        clients, of which the luck of few examples is a part; and where no value is negative `jain`,
        (sum x)^2 / (N sum x^2), which is 1 when all fare alike and 1/N when one has everything
        (Jain et al. 1984), `cov`, the standard deviation as a share of the mean, here of these very
        clients, by N where `std` has N - 1, and `fairness`, 1 / (1 + cov) (arXiv 2604.04261). All
        are nan where a value is not finite.
    """
    if not all(map(math.isfinite, values.values())):
        names = ("mean", "weighted_mean", "worst", "worst_decile", "gap", "std")
        return dict.fromkeys(names, math.nan)
    ranked = sorted(values.values(), reverse=low_is_good)
    worst = ranked[: math.ceil(len(ranked) / 10)]
    squares = sum(value * value for value in ranked)
    summary = {
        "mean": sum(ranked) / len(ranked),
        "weighted_mean": sum(values[name] * counts[name] for name in values)
        / sum(counts[name] for name in values),
        "worst": ranked[0],
        "worst_decile": sum(worst) / len(worst),
        "gap": max(ranked) - min(ranked),
        "std": statistics.stdev(ranked) if len(ranked) > 1 else 0.0,
    }
    if min(ranked) >= 0:
        summary["jain"] = sum(ranked) * sum(ranked) / (len(ranked) * squares) if squares else 1.0
        summary["cov"] = math.sqrt(max(0.0, 1 / summary["jain"] - 1))
        summary["fairness"] = 1 / (1 + summary["cov"])
    return summary


def standard_error(accuracies: Mapping[str, float], counts: Mapping[str, int]) -> float:
    """Return the standard error of the mean over clients of accuracies.

    It is binomial within clients, which are taken as given. Its p are (successes + 1) / (n + 2), as
    Laplace has them, so that a client with all pairs right is not taken for certain.

    Args:
        accuracies: By client.
        counts: Held-out pairs by client.
    """
    shares = {name: (p * counts[name] + 1) / (counts[name] + 2) for name, p in accuracies.items()}
    return math.sqrt(sum(p * (1 - p) / counts[name] for name, p in shares.items())) / len(
        accuracies
    )
