"""Rewards of answers, with the signature of TRL's reward functions, and how many become one."""

from typing import Annotated

from pydantic import Field

from fedpref.rewards.combine import AdaptiveAlpha, Combine, Maximum, Mean, Minimum
from fedpref.rewards.imported import Function, Groups
from fedpref.rewards.models import Classifier, Sentiment, Toxicity
from fedpref.rewards.reward import RewardFunction, RewardSettings
from fedpref.rewards.taste import Taste
from fedpref.rewards.text import Distinct, Length, Pattern
from fedpref.types import Open

Reward = Annotated[
    Length | Distinct | Pattern | Sentiment | Taste | Toxicity | Classifier | Groups | Function,
    Field(discriminator="name"),
    Open("fedpref.rewards", RewardSettings),
]

__all__ = [
    "AdaptiveAlpha",
    "Classifier",
    "Combine",
    "Distinct",
    "Function",
    "Groups",
    "Length",
    "Maximum",
    "Mean",
    "Minimum",
    "Pattern",
    "Reward",
    "RewardFunction",
    "RewardSettings",
    "Sentiment",
    "Taste",
    "Toxicity",
]
