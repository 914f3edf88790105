"""One paper, one file; a new algorithm adds one line here."""

from fedpref.algorithms.centralised import Centralised
from fedpref.algorithms.feddpo import FedDPO
from fedpref.algorithms.local import Local

AnyAlgorithm = FedDPO | Local | Centralised

__all__ = ["AnyAlgorithm", "Centralised", "FedDPO", "Local"]
