"""Rows of preferences and opinions: formats, sources, and how they come to clients."""

from typing import Annotated

from pydantic import Field

from fedpref.data.collected import Collected
from fedpref.data.opinions import Opinions, Polis
from fedpref.data.partitions import IID, BySize, Dirichlet, Natural, Partition, partition
from fedpref.data.preferences import (
    ClientData,
    Feedback,
    Opinion,
    Preference,
    Prompt,
    Row,
)
from fedpref.data.public import (
    HHH,
    ChatbotArena,
    Domains,
    HelpSteer2,
    Prism,
    SafeRLHF,
    Summaries,
    WebGPT,
)
from fedpref.data.source import DataSource
from fedpref.data.sources import HH, SHP, Builtin, Files, MovieReviews, Persona, UKPConvArg
from fedpref.data.splits import held_out, split
from fedpref.types import Open

Source = Annotated[
    Files
    | Collected
    | Builtin
    | HH
    | HHH
    | SHP
    | UKPConvArg
    | Persona
    | MovieReviews
    | Summaries
    | WebGPT
    | SafeRLHF
    | HelpSteer2
    | Prism
    | ChatbotArena
    | Domains
    | Opinions
    | Polis,
    Field(discriminator="name"),
    Open("fedpref.data", DataSource),
]

__all__ = [
    "HH",
    "HHH",
    "IID",
    "SHP",
    "Builtin",
    "BySize",
    "ChatbotArena",
    "ClientData",
    "Collected",
    "DataSource",
    "Dirichlet",
    "Domains",
    "Feedback",
    "Files",
    "HelpSteer2",
    "MovieReviews",
    "Natural",
    "Opinion",
    "Opinions",
    "Partition",
    "Persona",
    "Polis",
    "Preference",
    "Prism",
    "Prompt",
    "Row",
    "SafeRLHF",
    "Source",
    "Summaries",
    "UKPConvArg",
    "WebGPT",
    "held_out",
    "partition",
    "split",
]
