"""What carries out the verbs of a federation."""

from fedpref.engines.engine import Engine, Traffic
from fedpref.engines.simulation import Simulation

__all__ = ["Engine", "Simulation", "Traffic"]
