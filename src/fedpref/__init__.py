"""fedpref: federated and decentralised preference alignment of language models."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedpref.errors import UserError
    from fedpref.experiment import Experiment
    from fedpref.launch import resume, run
    from fedpref.models.exported import load_model
    from fedpref.running import Result

__version__ = "0.1.0"
__all__ = ["Experiment", "Result", "UserError", "load_model", "resume", "run"]
_HOMES = {"Experiment": "experiment", "Result": "running", "resume": "launch", "run": "launch", "UserError": "errors"}
_HOMES["load_model"] = "models.exported"


def __getattr__(name: str) -> Any:
    """Import on first use: torch and transformers take seconds, the command line's help should not."""
    if name in _HOMES:
        return getattr(import_module(f"fedpref.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'fedpref' has no attribute {name!r}")
