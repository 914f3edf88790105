"""Differential privacy: what is promised, the secret behind its noise, and what has been spent."""

from fedpref.privacy.accountant import Guarantee, epsilon_of
from fedpref.privacy.ledger import Ledger
from fedpref.privacy.secret import Secret
from fedpref.privacy.settings import Column, FixedClip, Masks, Privacy, QuantileClip, Unit

__all__ = [
    "Column",
    "FixedClip",
    "Guarantee",
    "Ledger",
    "Masks",
    "Privacy",
    "QuantileClip",
    "Secret",
    "Unit",
    "epsilon_of",
]
