"""Rewards that groups give to answers, and how one reward is made of many."""

from fedpref.rewards.combine import AdaptiveAlpha, Combine, Maximum, Mean, Minimum
from fedpref.rewards.groups import CombinedReward, GroupReward, group_rewards

__all__ = ["AdaptiveAlpha", "Combine", "CombinedReward", "GroupReward", "Maximum", "Mean", "Minimum", "group_rewards"]
