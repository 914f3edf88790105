"""Engines carry out the verbs of a federation."""

from fedpref.engines.coordinator import RemoteEngine
from fedpref.engines.engine import Engine, Telling, Traffic
from fedpref.engines.simulation import Simulation
from fedpref.engines.sites import Patience, Sites, Transport

__all__ = [
    "Engine",
    "Patience",
    "RemoteEngine",
    "Simulation",
    "Sites",
    "Telling",
    "Traffic",
    "Transport",
]
