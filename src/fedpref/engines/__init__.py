"""Engines carry out the verbs of a federation."""

from fedpref.engines.coordinator import Patience, RemoteEngine, Sites, Transport
from fedpref.engines.engine import Engine, Traffic
from fedpref.engines.simulation import Simulation

__all__ = ["Engine", "Patience", "RemoteEngine", "Simulation", "Sites", "Traffic", "Transport"]
