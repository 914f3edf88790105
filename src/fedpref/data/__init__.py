"""Preference rows: their formats, their sources, and how they come to clients."""

from fedpref.data.partitions import IID, BySize, Dirichlet, Natural, Partition, partition
from fedpref.data.preferences import ClientData, Feedback, Preference, Row, held_out, split
from fedpref.data.sources import HH, Builtin, Files, MovieReviews, Persona, Source, UKPConvArg

__all__ = [
    "HH",
    "IID",
    "Builtin",
    "BySize",
    "ClientData",
    "Dirichlet",
    "Feedback",
    "Files",
    "MovieReviews",
    "Natural",
    "Partition",
    "Persona",
    "Preference",
    "Row",
    "Source",
    "UKPConvArg",
    "held_out",
    "partition",
    "split",
]
