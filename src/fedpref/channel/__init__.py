"""Stages on a value's way from clients into a sum."""

from fedpref.channel.chain import Chain, Sender, Stage
from fedpref.channel.compression import Compression, Quantize, TopK

__all__ = ["Chain", "Compression", "Quantize", "Sender", "Stage", "TopK"]
