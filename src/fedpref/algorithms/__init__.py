"""One paper, one file; a new algorithm adds one line here."""

from fedpref.algorithms.centralised import Centralised
from fedpref.algorithms.feddpo import FedDPO
from fedpref.algorithms.fedopt import FedOpt
from fedpref.algorithms.fedprox import FedProx
from fedpref.algorithms.local import Local
from fedpref.algorithms.scaffold import Scaffold

AnyAlgorithm = FedDPO | FedOpt | FedProx | Scaffold | Local | Centralised

__all__ = ["AnyAlgorithm", "Centralised", "FedDPO", "FedOpt", "FedProx", "Local", "Scaffold"]
