"""What a suite is of: data, methods, how their settings are chosen, how often all is repeated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from fedpref.errors import UserError
from fedpref.numerics.metrics import ACCURACY, ALIGNMENT

RATES = ("2e-3", "5e-3", "1e-2")  # learning rates that every method is tried with
# what costs no training: regressions on words, and on states of the model as it was; the longer
FreeBaseline = Literal["words", "probe", "length", "majority"]
FREE: tuple[FreeBaseline, ...] = ("words", "probe", "length")


@dataclass(frozen=True)
class DataSet:
    """Clients' preferences, and how a model is trained on them.

    Attributes:
        name: In tables.
        config: A packaged config, or a file.
        settings: Overrides of all methods.
        local: Overrides that read a local copy, with `{folder}` for where tables lie; where there
            are none the set comes with fedpref.
    """

    name: str
    config: str
    settings: tuple[str, ...] = ()
    local: tuple[str, ...] = ()

    def overrides(self, folder: Path | None) -> list[str]:
        """Return the overrides, of a local copy where a folder is given."""
        at = [text.format(folder=folder.resolve()) for text in self.local] if folder else []
        return [*self.settings, *at]


@dataclass(frozen=True)
class Suite:
    """Sets, methods and seeds.

    Attributes:
        name: As it is asked for.
        says: What it is for.
        sets: The data.
        methods: `NAME`, or `NAME: key=value ...`; gains are over the first.
        rates: Learning rates that each method is tried with, for each seed, on validation prompts.
        seeds: Repetitions, each with a split of its own.
        metric: By which rates are chosen.
        free: Baselines that are not trained, once for each seed.
    """

    name: str
    says: str
    sets: tuple[DataSet, ...]
    methods: tuple[str, ...]
    rates: tuple[str, ...] = RATES
    seeds: int = 5
    metric: str = ACCURACY
    free: tuple[FreeBaseline, ...] = FREE


METHODS = (
    "feddpo",
    "fedpdpo",
    "fedprox",
    "ffa-lora",
    "fedsa-lora",
    "fedper",
    "ditto",
    "feddpa",
    "clustered",
    "alone",
    "pooled",
)
SHIPPED = DataSet("shipped", "feddpo", ("task.samples=0",))
PICTURES = (
    "data.sources.preference.path={folder}/image_description_preference.jsonl.gz",
    "data.sources.informativity.path={folder}/image_description_informativity.jsonl.gz",
)
PEOPLE = (
    DataSet("summaries", "summaries", (), ("data.path={folder}",)),
    DataSet("pictures", "pictures", (), PICTURES),
    DataSet("ukpconvarg", "ukpconvarg", (), ("data.path={folder}",)),
    DataSet("metaphor", "metaphor", (), ("data.path={folder}/metaphor_literal_choices.jsonl.gz",)),
    DataSet(
        "coauthor", "coauthor", (), ("data.path={folder}/coauthor_suggestion_choices.jsonl.gz",)
    ),
)
OPPOSED = (
    SHIPPED,
    DataSet("movie-reviews", "movie-reviews", (), ("data.path={folder}",)),
    DataSet("movie-reviews-10", "movie-reviews-10", (), ("data.path={folder}",)),
    DataSet("persona", "persona", (), ("data.path={folder}",)),
    DataSet("dsp", "dsp", (), ("data.path={folder}/dsp_domain_pairs.jsonl.gz",)),
)
OPINIONS = (
    DataSet("countries", "pluralllm", (), ("data.path={folder}",)),
    DataSet(
        "polis",
        "pluralllm",
        ("federation.newcomers=[]", "partition.min_rows=40", "data={name: polis, path: polis}"),
        ("data={{name: polis, path: {folder}}}",),
    ),
)
OBJECTIVES = (
    DataSet("hh-objectives", "hh-objectives", (), ("data.path={folder}",)),
    DataSet("asset", "asset", (), ("data.path={folder}/asset_simplification_pairs.jsonl.gz",)),
    DataSet("pictures-objectives", "pictures-objectives", (), PICTURES),
)
PAPERS = tuple(
    DataSet(name, name)
    for name in ("cross-domain", "webgpt", "py-dpo", "code-vulnerability", "hh", "shp")
)
SUITES = {
    suite.name: suite
    for suite in (
        Suite(
            "quick",
            "the shipped clients on the small shipped model, without a download",
            (
                DataSet(
                    "shipped",
                    "feddpo",
                    ("task.samples=0", "rounds=4", "evaluate_every=4", "partition.max_rows=100"),
                ),
            ),
            ("feddpo", "fedpdpo", "alone", "pooled"),
            rates=("3e-3", "1e-2"),
            seeds=3,
        ),
        Suite("people", "people as clients", PEOPLE, METHODS),
        Suite("opposed", "clients who want opposite things", OPPOSED, METHODS),
        Suite(
            "opinions",
            "groups whose opinions are predicted",
            OPINIONS,
            ("pluralllm", "alone", "pooled"),
            rates=("1e-4", "3e-4", "1e-3"),
            metric=ALIGNMENT,
            free=("majority",),
        ),
        Suite(
            "objectives",
            "several objectives of each client's pairs",
            OBJECTIVES,
            ("firm", "firm-b0: algorithm.name=firm algorithm.solver.b=0", "scalarized", "fedcmoo"),
            free=(),
        ),
        Suite("papers", "the sets of the papers, from the Hub", PAPERS, METHODS),
    )
}


def suite_of(name: str) -> Suite:
    """Return a suite by its name.

    Raises:
        UserError: There is none of this name.
    """
    if name not in SUITES:
        said = "; ".join(f"{suite.name}: {suite.says}" for suite in SUITES.values())
        raise UserError(f"bench {name!r}: there is no such suite. There are {said}.")
    return SUITES[name]


def with_methods(suite: Suite, methods: Sequence[str]) -> Suite:
    """Return a suite of its first method and those that are named, or as it is without any.

    Args:
        suite: The suite.
        methods: `NAME` of its own or of an algorithm, or `NAME: key=value ...`.
    """
    if not methods:
        return suite
    known = {text.partition(":")[0]: text for text in suite.methods}
    asked = [known.get(text, text) for text in methods]
    names = [text.partition(":")[0] for text in asked]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"--method {twice[0]}: it is there twice. Give it once.")
    # the suite's first, over which the others gain, maybe with other settings
    base = suite.methods[0].partition(":")[0]
    first = [text for text in asked if text.partition(":")[0] == base] or [suite.methods[0]]
    return replace(suite, methods=tuple(dict.fromkeys([*first, *asked])))
