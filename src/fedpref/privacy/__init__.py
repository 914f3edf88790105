"""Differential privacy: what is promised, the secret behind its noise, and what has been spent."""

from fedpref.privacy.accountant import Guarantee
from fedpref.privacy.ledger import Ledger
from fedpref.privacy.secret import Secret
from fedpref.privacy.settings import FixedClip, Privacy

__all__ = ["FixedClip", "Guarantee", "Ledger", "Privacy", "Secret"]
