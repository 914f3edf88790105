"""One paper, one file; a new algorithm adds one line here."""

from typing import Annotated

from pydantic import Field

from fedpref.algorithms.alone import Alone
from fedpref.algorithms.choco import ChocoDPO
from fedpref.algorithms.clustered import Clustered
from fedpref.algorithms.decdpo import DecDPO
from fedpref.algorithms.decdpo_stale import StaleDecDPO
from fedpref.algorithms.decpdpo import DecPDPO
from fedpref.algorithms.ditto import Ditto
from fedpref.algorithms.fed_ef import FedEF
from fedpref.algorithms.fedbuff import FedBuff
from fedpref.algorithms.fedcmoo import FedCMOO
from fedpref.algorithms.feddpa import FedDPA
from fedpref.algorithms.feddpo import FedDPO
from fedpref.algorithms.feddpo_stale import StaleFedDPO
from fedpref.algorithms.fedopt import FedOpt
from fedpref.algorithms.fedpdpo import FedPDPO
from fedpref.algorithms.fedper import FedPer
from fedpref.algorithms.fedprox import FedProx
from fedpref.algorithms.fedsa_lora import FedSA
from fedpref.algorithms.ffa_lora import FFA
from fedpref.algorithms.firm import FIRM
from fedpref.algorithms.fsmgda import FSMGDA
from fedpref.algorithms.gradient_tracking import GradientTracking
from fedpref.algorithms.pluralllm import PluralLLM
from fedpref.algorithms.pooled import Pooled
from fedpref.algorithms.scaffold import Scaffold
from fedpref.algorithms.scalarized import Scalarized
from fedpref.federation.algorithm import Algorithm
from fedpref.types import Open

Federated = (
    FedDPO
    | StaleFedDPO
    | FedBuff
    | FedEF
    | FedPDPO
    | FedOpt
    | FedProx
    | Scaffold
    | FFA
    | FedSA
    | FedPer
    | Ditto
    | FedDPA
    | Clustered
    | PluralLLM
)
Decentralized = DecDPO | DecPDPO | StaleDecDPO | GradientTracking | ChocoDPO
MultiObjective = FIRM | Scalarized | FSMGDA | FedCMOO
Baseline = Alone | Pooled
AnyAlgorithm = Annotated[
    Federated | Decentralized | MultiObjective | Baseline,
    Field(discriminator="name"),
    Open(
        "fedpref.algorithms",
        Algorithm,
        also=(
            ("fedavg", "feddpo"),
            ("fedadam", "fedopt"),
            ("fedyogi", "fedopt"),
            ("centralised", "pooled"),
            ("centralized", "pooled"),
            ("gossip", "decdpo"),
            ("mgda", "firm"),
        ),
    ),
]

__all__ = [
    "FFA",
    "FIRM",
    "FSMGDA",
    "Alone",
    "AnyAlgorithm",
    "ChocoDPO",
    "Clustered",
    "DecDPO",
    "DecPDPO",
    "Ditto",
    "FedBuff",
    "FedCMOO",
    "FedDPA",
    "FedDPO",
    "FedEF",
    "FedOpt",
    "FedPDPO",
    "FedPer",
    "FedProx",
    "FedSA",
    "GradientTracking",
    "PluralLLM",
    "Pooled",
    "Scaffold",
    "Scalarized",
    "StaleDecDPO",
    "StaleFedDPO",
]
