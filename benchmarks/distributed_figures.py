"""The pictures of distributed_dpo.py: laws beside theory, and the paper's comparisons with what was
measured here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.ticker import NullFormatter

from distributed_laws import Law
from distributed_models import Outcome

STYLE = {
    "svg.hashsalt": "fedpref",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
}
# picture -> lines, of those in distributed_models.py
COMPARISONS: Mapping[str, Sequence[str]] = {
    "server or graph": ("pooled", "feddpo", "S=3", "ring"),
    "local steps": ("E=1", "feddpo", "E=6"),
    "participation": ("S=1", "S=3", "S=5", "feddpo"),
    "staleness, three clients a round": ("S=3", "S=3, q=2", "S=3, q=5"),
}
GRAPHS = ("path", "ring", "torus", "exponential")


def draw(laws: Sequence[Law], outcomes: Mapping[str, Mapping[str, Outcome]], folder: Path) -> None:
    """Write laws.svg, and a file for each dataset that has every line."""
    folder.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(STYLE):
        if laws:
            draw_laws([law for law in laws if law.curves], folder / "laws.svg")
        for name, lines in outcomes.items():
            if "path" in lines:
                draw_lines(name, lines, folder / f"{name}.svg")


def draw_laws(laws: Sequence[Law], path: Path) -> None:
    """Points where something was measured, a line where theory goes through."""
    figure, places = plt.subplots(1, len(laws), figsize=(4 * len(laws), 3.4), layout="constrained")
    for place, law in zip(places, laws, strict=True):
        for x, measured, expected in law.curves.values():
            order = sorted(range(len(x)), key=lambda i: x[i])
            shown = [i for i in order if min(x[i], measured[i]) > 0]
            place.loglog(
                [x[i] for i in shown], [expected[i] for i in shown], color="0.5", label="theory"
            )
            place.loglog([x[i] for i in shown], [measured[i] for i in shown], "o", label="measured")
            if len(shown) <= 6:
                place.set_xticks([x[i] for i in shown], [f"{x[i]:.3g}" for i in shown])
                place.xaxis.set_minor_formatter(NullFormatter())
        place.set(title=law.name.split(":")[0], xlabel=law.axes[0], ylabel=law.axes[1])
        place.legend(frameon=False)
    save(figure, path)


def draw_lines(name: str, lines: Mapping[str, Outcome], path: Path) -> None:
    """Training loss by round for each comparison, and consensus error by round and by byte."""
    figure, places = plt.subplots(2, 3, figsize=(14, 7.5), layout="constrained")
    for place, (title, wanted) in zip(places.flat, COMPARISONS.items(), strict=False):
        for line in wanted:
            losses = lines[line].curve("loss")
            place.plot(range(1, len(losses) + 1), smoothed(losses), label=line)
        place.set(
            title=title, xlabel="round", ylabel="loss on clients' own batches, mean of 3 rounds"
        )
    for place, over in ((places[1, 1], "round"), (places[1, 2], "bytes a client")):
        for line in GRAPHS:
            errors, sent = lines[line].curve("consensus_error"), lines[line].curve("bytes_up")
            total = [sum(sent[: i + 1]) / lines[line].clients for i in range(len(sent))]
            place.semilogy(
                range(1, len(errors) + 1) if over == "round" else total, errors, label=line
            )
        place.set(
            title="consensus error after mixing",
            xlabel=over,
            ylabel="mean squared distance from the mean",
        )
    for place in places.flat:
        place.legend(frameon=False)
    figure.suptitle(name.replace("-", " "))
    save(figure, path)


def smoothed(values: Sequence[float], width: int = 3) -> list[float]:
    """The mean of the last few."""
    return [
        sum(part) / len(part)
        for i in range(len(values))
        if (part := values[max(0, i + 1 - width) : i + 1])
    ]


def save(figure: Any, path: Path) -> None:
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
