"""Losses as pure functions of tensors: no model, no data, no config."""

from fedpref.losses.explicit import Explicit
from fedpref.losses.feedback import KTO
from fedpref.losses.preference import DPO, IPO, ORPO, Hinge, Loss, PairScores, SimPO

__all__ = ["DPO", "IPO", "KTO", "ORPO", "Explicit", "Hinge", "Loss", "PairScores", "SimPO"]
