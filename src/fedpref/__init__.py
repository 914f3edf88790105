"""fedpref: federated and decentralised preference alignment of language models."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedpref.errors import UserError
    from fedpref.experiments.experiment import Experiment
    from fedpref.experiments.finished import FinishedRun
    from fedpref.experiments.rounds import Event
    from fedpref.federation.algorithm import Algorithm
    from fedpref.federation.verbs import Client, Federation, PerClient, work
    from fedpref.models.loading import load_model
    from fedpref.reports.python import Result, report, resume, run

__version__ = "0.2.0.dev0"
__all__ = [
    "Algorithm",
    "Client",
    "Event",
    "Experiment",
    "Federation",
    "FinishedRun",
    "PerClient",
    "Result",
    "UserError",
    "load_model",
    "report",
    "resume",
    "run",
    "work",
]
_HOMES = {
    "Algorithm": "federation.algorithm",
    "Client": "federation.verbs",
    "Event": "experiments.rounds",
    "Experiment": "experiments.experiment",
    "Federation": "federation.verbs",
    "FinishedRun": "experiments.finished",
    "PerClient": "federation.verbs",
    "Result": "reports.python",
    "UserError": "errors",
    "load_model": "models.loading",
    "report": "reports.python",
    "resume": "reports.python",
    "run": "reports.python",
    "work": "federation.verbs",
}


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    """Import on first use: torch takes seconds, the command line's help should not."""
    if name in _HOMES:
        return getattr(import_module(f"fedpref.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'fedpref' has no attribute {name!r}")
