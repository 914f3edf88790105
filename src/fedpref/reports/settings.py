"""Settings as tables, for a terminal and for documents, read off the dataclasses that hold them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic.fields import FieldInfo
from rich.table import Table
from rich.text import Text

from fedpref import config
from fedpref.algorithms import AnyAlgorithm
from fedpref.algorithms.fedopt import Adaptive, Momentum
from fedpref.channel import Compression, robust
from fedpref.data import Partition, Source
from fedpref.engines.sites import Patience
from fedpref.errors import UserError
from fedpref.experiments.attack import Attack
from fedpref.experiments.choosing import Stop
from fedpref.experiments.experiment import Experiment
from fedpref.federation.aggregation import Aggregate
from fedpref.federation.local_training import LocalTraining
from fedpref.federation.network import Network
from fedpref.federation.participation import Participation
from fedpref.losses import KTO, Explicit, Loss
from fedpref.losses.policy import GRPO, PPO, RLOO
from fedpref.models.encoder import Encoder
from fedpref.models.generation import Sampling
from fedpref.models.model_settings import Model
from fedpref.models.own_parts import Parts
from fedpref.models.predictor import Predictor
from fedpref.numerics.min_norm import MinNorm
from fedpref.numerics.topology import AnyTopology
from fedpref.privacy import Column, FixedClip, Masks, Privacy, QuantileClip
from fedpref.rewards import Combine, Reward
from fedpref.sites.consent import Limits, SiteFile
from fedpref.tasks import AnyTask
from fedpref.tasks.generation_metrics import Generation
from fedpref.types import Open

GROUPS: Mapping[str, tuple[str, Sequence[Any]]] = {
    "experiment": ("the whole of a YAML file", (Experiment,)),
    "algorithms": ("algorithm", config.kinds(AnyAlgorithm)),
    "local": ("algorithm.local: how a client trains within a round", (LocalTraining,)),
    "parts": ("algorithm.parts: what of the model is each client's own", (Parts,)),
    "aggregates": (
        "algorithm.aggregate: how clients' adapters become one",
        config.kinds(Aggregate),
    ),
    "servers": ("algorithm.server of fedopt", (Momentum, Adaptive)),
    "solvers": ("algorithm.solver of firm and fsmgda", (MinNorm,)),
    "tasks": ("task", config.kinds(AnyTask)),
    "models": ("task.model", (Model, Encoder)),
    "losses": ("task.loss", (*config.kinds(Loss), KTO)),
    "explicit": ("task.explicit: the reward beside DPO's implicit one", (Explicit,)),
    "predictors": ("task.predictor of the task opinion", (Predictor,)),
    "rewards": (
        "task.rewards of the task dialogue, task.generation.rewards, task.judge of the task "
        "online-preference",
        config.kinds(Reward),
    ),
    "combinations": ("task.rewards.NAME.combine of the reward groups", config.kinds(Combine)),
    "estimators": ("task.estimator of the task dialogue", (PPO, RLOO, GRPO)),
    "generation": ("task.generation: what a model's own answers are like", (Generation,)),
    "sampling": ("task.sampling of the tasks dialogue and online-preference", (Sampling,)),
    "data": ("data", config.kinds(Source)),
    "partitions": ("partition", config.kinds(Partition)),
    "federation": ("federation: who takes part", (Participation,)),
    "network": ("network: who hears whom, in decentralised algorithms", (Network,)),
    "topologies": ("network.topology", config.kinds(AnyTopology)),
    "compressions": ("network.compression", config.kinds(Compression)),
    "patience": ("patience: how long sites are waited for", (Patience,)),
    "privacy": ("privacy: what is promised", (Privacy,)),
    "units": ("privacy.unit, where it is none of the names", (Column,)),
    "clips": ("privacy.clip", (FixedClip, QuantileClip)),
    "secrecy": ("secrecy: sums that the coordinator sees the whole of alone", (Masks,)),
    "rules": ("federation.combine: what becomes of clients' values", config.kinds(robust.Combine)),
    "attack": ("attack: hostile clients of a simulated run", (Attack,)),
    "stop": ("stop: when a line is over", (Stop,)),
    "site": ("a site's own file, site.yaml", (SiteFile, Limits)),
}
"""Kinds of settings: name -> where they stand, and the dataclasses."""
OPEN: Mapping[str, Open] = {
    group: choice
    for group, hint in {
        "algorithms": AnyAlgorithm,
        "losses": Loss,
        "rewards": Reward,
        "data": Source,
        "partitions": Partition,
    }.items()
    if (choice := config.opened(hint))
}
"""Kinds to which one's own may be added."""


@dataclass(frozen=True)
class Setting:
    """A key of a config.

    Attributes:
        key: Its name.
        type: What may stand there, in words.
        default: As it would be written; empty where the key must be given.
        sentence: What it does.
    """

    key: str
    type: str
    default: str
    sentence: str


@dataclass(frozen=True)
class Kind:
    """A dataclass of settings.

    Attributes:
        source: The class.
        names: By which a config chooses it; none where there is no choice.
    """

    source: Any
    names: tuple[str, ...]

    @property
    def title(self) -> str:
        """Its names, or the class's."""
        return ", ".join(self.names) or self.source.__name__

    @property
    def sentence(self) -> str:
        """What it is: its docstring's first sentence."""
        return str(self.source.__doc__ or "").strip().split("\n\n")[0].replace("\n    ", " ")

    @property
    def settings(self) -> tuple[Setting, ...]:
        """Its keys but for the name, in the order in which they are declared."""
        sentences = config.sentences(self.source)
        hints = get_type_hints(self.source, include_extras=True)
        return tuple(
            Setting(field.name, _type(hints[field.name]), _default(field), sentences[field.name])
            for field in fields(self.source)
            if field.init and not (field.name == "name" and self.names)
        )


def named_kinds() -> dict[str, tuple[Kind, ...]]:
    """Return all kinds of settings, in the order of `GROUPS`."""
    return {
        group: tuple(Kind(source, config.names_of(source)) for source in sources)
        for group, (_, sources) in GROUPS.items()
    }


def kinds_table(groups: Mapping[str, Sequence[Kind]]) -> Table:
    """Return the names of kinds and what they are, for a terminal."""
    table = Table.grid(padding=(0, 2))
    for group, kinds in groups.items():
        table.add_row(Text(group, style="bold"), Text(GROUPS[group][0], style="dim"))
        for kind in kinds:
            table.add_row(f"  {kind.title}", Text(kind.sentence))
        for name, point in OPEN[group].installed.items() if group in OPEN else ():
            table.add_row(f"  {name}", Text(f"Installed: {point.value}."))
    return table


def own_kind(name: str) -> Kind | None:
    """Return a kind of one's own by its name, of whichever choice it fits; None if it is none.

    Raises:
        UserError: It cannot be imported, or fits no choice.
    """
    choices = [c for c in OPEN.values() if ":" in name or name in c.installed]
    reasons: list[UserError] = []
    for choice in choices:
        try:
            return Kind(config.own_class(choice, name, name), (name,))
        except UserError as error:
            reasons.append(error)
    # of what it is derived from, if it is of any of them
    if reasons:
        raise min(reasons, key=lambda error: "not derived from" in str(error))
    return None


def kind_table(kind: Kind) -> Text:
    """Return a kind's name and what it is, for a terminal."""
    return Text.assemble((kind.title, "bold"), f": {kind.sentence}")


def setting_table(kind: Kind) -> Table:
    """Return a kind's settings, for a terminal."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for title in ("setting", "type", "default", ""):
        table.add_column(title, justify="left", no_wrap=title == "setting")
    for setting in kind.settings:
        table.add_row(*map(Text, (setting.key, setting.type, setting.default, setting.sentence)))
    return table


def markdown() -> str:
    """Return the page of all settings."""
    parts = [
        "# Settings",
        "Every key of an experiment's YAML file, and of a site's own file. This page is made from "
        "the code (`make references`); `fedpref list NAME` prints the same on a terminal, and "
        "`fedpref schema` writes a JSON schema by which editors complete and check files.",
        "Where there is a choice, `name` chooses: `loss: {name: ipo, beta: 0.5}`, or `loss: ipo` "
        "for its defaults. On a command line, `task.loss.beta=0.5` overrides the file.",
    ]
    for group, kinds in named_kinds().items():
        parts.append(f"## {group}\n{GROUPS[group][0][:1].upper()}{GROUPS[group][0][1:]}.")
        for kind in kinds:
            heading = f"### {kind.title}\n" if len(kinds) > 1 or kind.names else ""
            parts.append(f"{heading}{kind.sentence}")
            if kind.settings:
                parts.append(_markdown_table(kind.settings))
    return "\n\n".join(parts) + "\n"


def _markdown_table(settings: Sequence[Setting]) -> str:
    def cell(text: str) -> str:
        return text.replace("|", "\\|").replace("\n", " ")

    rows = [
        f"| `{s.key}` | {cell(s.type)} | {f'`{cell(s.default)}`' if s.default else ''} | "
        f"{cell(s.sentence)} |"
        for s in settings
    ]
    return "\n".join(["| setting | type | default | |", "|---|---|---|---|", *rows])


def _default(field: Any) -> str:
    if field.default_factory is not MISSING:
        return "{}" if not field.default_factory() else str(field.default_factory())
    if field.default is MISSING:
        return ""
    return _written(field.default)


def _written(value: Any) -> str:
    """Return a value as one would write it in YAML."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(map(_written, value))}]"
    if is_dataclass(value):
        chosen: Any = value
        return str(chosen.name) if config.names_of(type(value)) else "{}"
    return str(value)


_BOUNDS = {Ge: ("ge", "≥"), Gt: ("gt", ">"), Le: ("le", "≤"), Lt: ("lt", "<")}
_WORDS = {
    int: "whole number",
    float: "number",
    str: "text",
    bool: "true or false",
    type(None): "null",
}


def _type(hint: Any) -> str:
    """Return what may stand under a key, in words."""
    if get_origin(hint) is Annotated:
        base, *extras = get_args(hint)
        bounds = [
            f"{sign} {getattr(item, key):g}"
            for extra in extras
            for item in (extra.metadata if isinstance(extra, FieldInfo) else [extra])
            for kind, (key, sign) in _BOUNDS.items()
            if isinstance(item, kind)
        ]
        least = [item for e in extras if isinstance(e, FieldInfo) for item in e.metadata]
        if any(isinstance(item, MinLen) for item in least):
            bounds.append("not empty")
        own = " or `module:Class`" if config.opened(hint) else ""
        return f"{_type(base)} {' and '.join(bounds)}".strip() + own
    if hint in _WORDS:
        return _WORDS[hint]
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return " or ".join(f"`{arg}`" for arg in args)
    if origin is tuple:
        inner = [arg for arg in args if arg is not Ellipsis]
        return (
            f"list of {_type(inner[0])}"
            if Ellipsis in args
            else f"{len(inner)} of {_type(inner[0])}"
        )
    if origin is not None and isinstance(origin, type) and issubclass(origin, Mapping):
        return f"mapping of {_type(args[0])} to {_type(args[1])}"
    if is_dataclass(hint):
        kind: Any = hint
        return (
            " or ".join(f"`{name}`" for name in config.names_of(hint))
            or f"{kind.__name__} settings"
        )
    if args:
        return " or ".join(dict.fromkeys(_type(arg) for arg in args))
    return "anything"
