"""What may be done to a value on its way from clients into a sum."""

from fedpref.channel.chain import Chain, Sender, Stage
from fedpref.channel.compress import Compression, Quantise, TopK

__all__ = ["Chain", "Compression", "Quantise", "Sender", "Stage", "TopK"]
