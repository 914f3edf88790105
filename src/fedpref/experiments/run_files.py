"""The forms of a run's files: what is read of them is as it was written, or a sentence says not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from fedpref.errors import UserError, reason
from fedpref.numerics.metrics import ACCURACY, COMBINED, HEADLINES
from fedpref.types import Count, Share, WholeNumber

CLIENTS, METRICS, EVALUATION = "clients.json", "metrics.jsonl", "evaluation.jsonl"
# clients that joined when the run was over: sizes, metrics before and after
NEWCOMERS = "newcomers.jsonl"
AGREEMENT = "agreement.jsonl"  # of each round's changes with gold pairs, by client
DATA = "data.json"  # rows that were read, left out, and could not be used
TRAINED = "trained_prompts.json"  # digests of the prompts that were trained on
# keyed hashes of what is held out at sites that say so, as they were when the run began
HELD_OUT = "held_out.json"
REVIEWS = "reviews.json"  # what people have judged blind, by whose model and beside what
ENVIRONMENT = "environment.json"  # versions, machine, commits
FROZEN = "frozen.json"  # digests of what is computed with and not trained

IMPLICIT = f"{ACCURACY}_implicit"  # the policy's, in runs of fedpref 0.1
_MORE = ConfigDict(extra="allow")


def _measured(metrics: dict[str, float]) -> dict[str, float]:
    if not any(name in metrics for name in HEADLINES) or "num_examples" not in metrics:
        raise ValueError(f"expected one of {', '.join(HEADLINES)} and num_examples")
    return metrics


def _alike(clients: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    if not clients or len({frozenset(metrics) for metrics in clients.values()}) > 1:
        raise ValueError("expected the same metrics of every client, and one client at least")
    return clients


def _round(figures: dict[str, float]) -> dict[str, float]:
    if missing := {"round", "seconds", "bytes_up", "bytes_down"} - figures.keys():
        raise ValueError(f"expected {', '.join(sorted(missing))} too")
    return figures


Round = Annotated[dict[str, float], AfterValidator(_round)]
Measured = Annotated[dict[str, float], AfterValidator(_measured)]
MetricsOfClients = Annotated[dict[str, Measured], AfterValidator(_alike)]
Clients = Annotated[
    dict[str, Measured], AfterValidator(lambda clients: clients and _alike(clients))
]
"""Nobody's where figures are told as sums."""


class About(TypedDict):
    """What is said of a client."""

    __pydantic_config__ = _MORE  # type: ignore[misc]
    train: WholeNumber
    test: WholeNumber
    digest: str


class Evaluation(TypedDict):
    """An evaluation: each client's metrics, and summaries over them."""

    __pydantic_config__ = _MORE  # type: ignore[misc]
    round: WholeNumber
    on: NotRequired[Literal["test", "validation"]]
    final: NotRequired[bool]
    kept: NotRequired[WholeNumber]
    ended: NotRequired[Literal["spent", "nobody"]]
    unkept: NotRequired[bool]
    clients: Clients
    summary: dict[str, dict[str, float]]
    bins: NotRequired[dict[str, list[float]]]
    evaluate_pairs: NotRequired[Count]
    diagnostics: NotRequired[dict[str, float]]
    newcomers: NotRequired[MetricsOfClients]
    newcomers_before: NotRequired[MetricsOfClients]


class Joined(TypedDict):
    """A client that joined when the run was over."""

    __pydantic_config__ = _MORE  # type: ignore[misc]
    client: str
    train: WholeNumber
    test: WholeNumber
    before: Measured
    after: Measured


class Agreement(TypedDict):
    """How far clients' changes of a round agree with gold pairs."""

    round: Count
    clients: dict[str, Annotated[float, Field(ge=-1.001, le=1.001)]]


class Rows(TypedDict):
    """How many rows were read, left out, and could not be used by kind."""

    rows: WholeNumber
    left_out: WholeNumber
    unusable: dict[str, WholeNumber]


class Environment(TypedDict):
    """Where a run was made."""

    __pydantic_config__ = _MORE  # type: ignore[misc]
    platform: str
    processors: WholeNumber
    versions: NotRequired[dict[str, Any]]
    commits: NotRequired[dict[str, Any]]


class Sample(TypedDict):
    """A prompt, with an answer before training and one after."""

    __pydantic_config__ = _MORE  # type: ignore[misc]
    prompt: str | list[dict[str, Any]]
    before: dict[str, Any]
    after: dict[str, Any]


class Judged(TypedDict):
    """How many answers a rater, or all of them, preferred."""

    preferred: WholeNumber
    judged: WholeNumber
    ties: WholeNumber
    bad: WholeNumber


class Review(Judged):
    """What people have judged blind of a model's answers before training and after."""

    low: Share
    high: Share
    alike: WholeNumber
    folder: str
    raters: dict[str, Judged]
    alpha: float | None
    longer: Share | None
    words: dict[str, float | None]


# of a file as a whole, or of each of its lines
FORMS: dict[str, TypeAdapter[Any]] = {
    CLIENTS: TypeAdapter(dict[str, About]),
    METRICS: TypeAdapter(Round),
    EVALUATION: TypeAdapter(Evaluation),
    NEWCOMERS: TypeAdapter(Joined),
    AGREEMENT: TypeAdapter(Agreement),
    DATA: TypeAdapter(Rows),
    TRAINED: TypeAdapter(list[str]),
    HELD_OUT: TypeAdapter(list[str]),
    REVIEWS: TypeAdapter(dict[str, Review]),
    ENVIRONMENT: TypeAdapter(Environment),
    FROZEN: TypeAdapter(dict[str, str]),
}
SAMPLES = TypeAdapter(Sample)
# of a client's held-out examples
OUTCOMES = TypeAdapter(list[tuple[str, float] | tuple[str, float, float]])


def read_json(path: Path, form: TypeAdapter[Any] | None = None) -> Any:
    """Return what a file of a run holds; raises UserError where it is damaged.

    Args:
        path: The file.
        form: Its form, where its name does not say it.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        (form or FORMS[path.name]).validate_python(content)
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(path, error) from error
    return content


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a JSON Lines file, without a last one that a crash cut short.

    Raises:
        UserError: The file is damaged.
    """
    form = FORMS.get(path.name, SAMPLES)
    rows = []
    try:
        # line by line, but not at the line separators that JSON may hold
        for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
            row = _of_the_policy(json.loads(line))
            form.validate_python(row)
            rows.append(row)
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(path, error) from error
    return rows


def _of_the_policy(row: Any) -> Any:
    """Return a row in which accuracies are the policy's, as they are written since fedpref 0.2.

    Before, where clients had a reward head, they were those of both together.
    """
    if isinstance(row, dict):
        if IMPLICIT in row and COMBINED not in row:
            row = {**row, COMBINED: row[ACCURACY], ACCURACY: row[IMPLICIT]}
            del row[IMPLICIT]
        return {name: _of_the_policy(part) for name, part in row.items()}
    return row


def _damaged(path: Path, error: Exception) -> UserError:
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_input=False)[0]
        why = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    else:
        why = reason(error)
    return UserError(
        f"{path}: this file of the run is damaged: {why}. Put back a whole copy of it, or "
        "begin the run anew."
    )
