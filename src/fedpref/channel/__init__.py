"""What may be done to a value on its way from clients into a sum."""

from fedpref.channel.chain import Chain, Sender, Stage

__all__ = ["Chain", "Sender", "Stage"]
