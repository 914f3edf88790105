"""Stages on a value's way from clients into a sum."""

from fedpref.channel.chain import Chain, Sender, Stage
from fedpref.channel.compression import Bfloat16, Compression, LowRank, Quantize, TopK

__all__ = [
    "Bfloat16",
    "Chain",
    "Compression",
    "LowRank",
    "Quantize",
    "Sender",
    "Stage",
    "TopK",
]
