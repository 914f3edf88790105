"""What a malicious coordinator gets out of a site, what a malicious site does to a run, and what
kills and full disks leave of it.

    python benchmarks/attacks.py --quick
    python benchmarks/attacks.py --json attacks.json

Everything runs on this machine, on a small model of random weights, with the engine's own classes
and real processes; nothing of it is trained for its accuracy. Each attack that should fail is also
run where it should work (without limits, with the rule switched off), so that it can be seen to be
one. For messages, kills and disks there is no such thing: they count what a site answers, and what
is left.

Figures: `messages_tried`, `messages_taken` and `messages_leaked`, `private_trees_tried`,
`private_trees_wanted`, `private_trees_got` and `private_trees_got_without_labels`,
`private_works_never_done`, `rows_reconstructed_ENDING`, `bad_sites_tried` and
`runs_ended_by_bad_site`, `kills_tried` and `kills_equal`, `full_disks_tried` and
`full_disks_resumed`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import safetensors.torch
import torch
import transformers
import yaml

from ending import end_with_children
from fedpref import Experiment, config
from fedpref.engines import Patience, RemoteEngine, Sites
from fedpref.engines import site as site_module
from fedpref.engines.host import Hosted
from fedpref.engines.messages import HEADER, pack, unpack, version
from fedpref.engines.site import Site
from fedpref.engines.site_masks import FIGURES
from fedpref.experiments.clients import SimulatedSite
from fedpref.experiments.rounds import events
from fedpref.experiments.run_directory import RunDirectory
from fedpref.federation import leaving
from fedpref.federation.leaving import Label
from fedpref.federation.verbs import Work
from fedpref.numerics import seeds, trees
from fedpref.numerics.trees import Tree
from fedpref.sites.consent import consenting

TOKENIZER = Path(__file__).resolve().parent.parent / "src/fedpref/models/builtin"
LOCAL = {"steps": 2, "batch_size": 4, "learning_rate": 0.01, "keep_optimizer": True}


# ---- a small world


def make_model(folder: Path, hidden: int = 32) -> None:
    """A Llama of random weights with the shipped tokenizer."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(TOKENIZER)
    shape = transformers.LlamaConfig(
        num_hidden_layers=2,
        num_attention_heads=2,
        hidden_size=hidden,
        intermediate_size=48,
        max_position_embeddings=96,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(shape)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0) if parameter.ndim == 2 else parameter
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


WORDS = [
    "garden",
    "river",
    "market",
    "window",
    "bread",
    "winter",
    "teacher",
    "music",
    "letter",
    "bridge",
    "forest",
    "kitchen",
    "doctor",
    "village",
    "paper",
    "summer",
    "engine",
    "coffee",
    "island",
    "mirror",
    "button",
    "candle",
    "pocket",
    "ladder",
    "basket",
]


def make_rows(file: Path, clients: Sequence[int]) -> None:
    """Rows of several clients, each with two objectives."""
    draw = random.Random(0)
    rows = []
    for client, count in enumerate(clients):
        for i in range(count):
            prompt, chosen, rejected = (
                " ".join(draw.choices(WORDS, k=length)) for length in (6, 4, 4)
            )
            rows.append(
                {
                    "client": f"client-{client}",
                    "kind": ("first", "second")[i % 2],
                    "prompt": f"{prompt} {i}",
                    "chosen": f" {chosen}",
                    "rejected": f" {rejected} so",
                }
            )
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def settings(folder: Path, **more: Any) -> dict[str, Any]:
    """An experiment on that world, as plain data."""
    task = {
        "name": "preference",
        "model": {"path": str(folder / "model"), "lora_r": 4, "dtype": "float32"},
        "objective_column": "kind",
        "objective_names": ["first", "second"],
    }
    return {
        "data": {"name": "files", "path": str(folder / "rows.jsonl"), "test_fraction": 0.3},
        "partition": {"name": "natural", "column": "client"},
        "task": task,
        "algorithm": {"name": "feddpo", "local": LOCAL},
        "rounds": 3,
        "workers": 1,
        **more,
    }


def forged(header: Any, tensors: Mapping[str, torch.Tensor]) -> bytes:
    """Return a message of whatever safetensors can write, types that do not travel among it."""
    whole = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    return safetensors.torch.save(whole, {HEADER: json.dumps(header)})


class Direct:
    """Sites in this process, of which one may change what it answers."""

    def __init__(self, sites: Mapping[str, Site]) -> None:
        self.all = dict(sites)
        self.change: dict[str, Callable[..., Any]] = {}
        self.evil = ""

    @property
    def sites(self) -> Sequence[str]:
        return list(self.all)

    def peers(self, name: str) -> Any:
        direct = self

        class Peers:
            def tell(self, site: str, message: bytes) -> None:
                direct.all[site].hear(name, message)

        return Peers()

    def ask(self, messages: Mapping[str, bytes], seconds: float) -> Mapping[str, bytes]:
        verb = unpack(next(iter(messages.values())))[0]["verb"]
        if verb != "exchange":  # transformers does not load models in threads
            return {site: self._one(site, message) for site, message in messages.items()}
        answers: dict[str, bytes] = {}

        def ask(site: str, message: bytes) -> None:
            answers[site] = self._one(site, message)

        threads = [threading.Thread(target=ask, args=entry) for entry in messages.items()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return answers

    def _one(self, site: str, message: bytes) -> bytes:
        answer, asked = self.all[site].answer(message), unpack(message)[0]
        if site != self.evil or asked["verb"] not in self.change:
            return answer
        header, tensors = unpack(answer)
        changed = self.change[asked["verb"]](asked, dict(header), dict(tensors))
        return changed if isinstance(changed, bytes) else forged(*changed)


def said(site: Site, header: Mapping[str, Any], tensors: Tree | None = None) -> Any:
    """What a site answers: its header and its tensors."""
    return unpack(
        site.answer(pack({**version(), **header} if opens(header) else header, tensors or {}))
    )


def opens(header: Mapping[str, Any]) -> bool:
    return header.get("verb") in ("open", "split", "consent")


# ---- messages that are none


NASTY: list[Any] = [
    None,
    True,
    -1,
    0,
    1,
    2**31,
    2**63,
    10**30,
    1e308,
    float("nan"),
    "",
    "..",
    "../../up",
    "/etc",
    "a/../b",
    "\x00",
    "é" * 200,
    "x" * 10_000,
    "round-000001",
    "round-999999/../..",
    "1.0",
    "-1",
    "٣",
    [],
    {},
    [[]],
    {"0": "1.0"},
    {"-1": "1.0"},
    {"0": {"0": 1e9}},
    ["*"],
    {"a": {"b": {"c": []}}},
]


SUM = {"purpose": "train", "round": 1, "call": 2, "attempt": 0}


def valid_messages(experiment: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One good message of each verb, from which bad ones are made."""
    return [
        {
            "verb": "open",
            "experiment": experiment,
            "run": "fuzz",
            "resumes": True,
            "is_known": True,
            "held_out": [],
        },
        {"verb": "split", "experiment": experiment, "everything": False},
        {"verb": "consent", "experiments": [experiment]},
        {"verb": "number", "ids": {"client-0": 0, "client-1": 1}, "sites": {"site": [0, 1]}},
        {
            "verb": "each",
            "work": "common.no_moments",
            "args": [],
            "clients": [0],
            "purpose": "init",
            "round": 0,
            "call": 1,
            "name": "5",
        },
        {
            "verb": "each",
            "work": "common.own_copy",
            "args": [{"tree": 0}],
            "clients": [0, 1],
            "purpose": "train",
            "round": 1,
            "call": 1,
            "name": "6",
        },
        {"verb": "contribute", "own": {"0": "6.0"}, "shares": {"0": 0.5}},
        {
            "verb": "exchange",
            "own": {"0": "6.0"},
            "weights": {"0": {"0": 1.0}},
            "round": 1,
            "call": 2,
            "name": "7",
            "wait": 0.01,
        },
        {"verb": "report", "own": {"0": "6.0"}},
        {
            "verb": "keys",
            "address": SUM,
            "sites": ["site", "other"],
            "told": "",
            "value_name": "6.0",
        },
        {
            "verb": "boxes",
            "address": SUM,
            "adverts": {
                "other": {
                    "mask": "ab" * 32,
                    "box": "cd" * 32,
                    "holders": None,
                    "signature": "",
                    "certificate": "",
                }
            },
            "threshold": 2,
            "plan": {"site": {"0": 0.5}, "other": {"1": 0.5}},
        },
        {
            "verb": "tally",
            "own": {"0": "6.0"},
            "masked": {"address": {**SUM, "call": FIGURES}, "boxes": {"other": "00"}},
        },
        {"verb": "agree", "address": SUM, "survivors": ["site", "other"]},
        {
            "verb": "unmask",
            "address": SUM,
            "survivors": ["site"],
            "signatures": {"site": "00"},
            "heard": {"site": {"heard": "1", "signature": "00"}},
        },
        {"verb": "save", "own": {"state": {"0": "6.0"}}, "checkpoint": "round-000001"},
        {"verb": "load", "checkpoint": "round-000001", "fields": ["state"], "name": "8"},
        {"verb": "names", "free": [[0, "6.0"]]},
    ]


def damaged(message: Any, draw: random.Random) -> Any:
    """A copy of plain data in which one place is something else, or gone, or twice there."""
    if isinstance(message, dict) and message and draw.random() < 0.85:
        key = draw.choice(list(message))
        kind = draw.random()
        if kind < 0.08:
            return {k: v for k, v in message.items() if k != key}
        if kind < 0.14:
            return {
                **message,
                draw.choice(["verb", "free", "run", "checkpoint", "x"]): draw.choice(NASTY),
            }
        if kind < 0.2:
            return {
                (str(draw.choice(NASTY))[:100] if k == key else k): v for k, v in message.items()
            }
        return {**message, key: damaged(message[key], draw)}
    if isinstance(message, list) and message and draw.random() < 0.7:
        at = draw.randrange(len(message))
        return [*message[:at], damaged(message[at], draw), *message[at + 1 :]]
    return draw.choice(NASTY)


def hostile(messages: Sequence[Mapping[str, Any]], draw: random.Random) -> bytes:
    """The bytes of one hostile message."""
    header: Any = draw.choice(messages)
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        header = damaged(header, draw)
    tensors: dict[str, torch.Tensor] = {}
    if draw.random() < 0.5:
        name = draw.choice(["0/w", "w", "0/../w", "", "0/" + "n" * 300])
        kind = draw.choice([torch.float32, torch.bfloat16, torch.int8, torch.complex64, torch.bool])
        tensors[name] = torch.zeros(draw.choice([0, 1, 5]), dtype=kind)
        if kind == torch.float32 and draw.random() < 0.3:
            tensors[name] = torch.full((2,), draw.choice([float("nan"), float("inf"), 3e38]))
    if isinstance(header, dict) and opens(header):
        header = {**version(), **header}
    content = forged(header, tensors)
    if draw.random() < 0.15:
        at = draw.randrange(len(content))
        content = (
            content[:at] + bytes([draw.randrange(256)]) + content[at + draw.choice([0, 1, 50]) :]
        )
    return content


@contextmanager
def small_site(folder: Path, algorithm: Mapping[str, Any]) -> Iterator[Site]:
    """A site with two clients of an experiment open, whose limits allow small batches."""
    spec = settings(folder, algorithm=dict(algorithm))
    limits = {"least_examples": 1, "least_batch": 1, "least_evaluated": 1}
    file = {
        "data": spec["data"],
        "partition": {"name": "natural", "column": "client"},
        "algorithms": [algorithm["name"]],
        "models": {str(folder / "model"): str(folder / "model")},
        "limits": {**limits, "max_calls": 10**6, "max_openings": 10**6, "max_memory_mb": 64},
    }
    with tempfile.TemporaryDirectory(dir=folder) as place:
        (Path(place) / "site.yaml").write_text(yaml.safe_dump(file))
        host, runs = consenting("site", Path(place) / "site.yaml")

        class Nowhere:
            def tell(self, site: str, message: bytes) -> None: ...

        yield Site("site", host, runs, Nowhere())


def numbers(site: Site) -> dict[str, Any]:
    """What clients of an open site are told of their numbers."""
    ids = {name: number for number, name in enumerate(site._opened.shards)}
    return {"ids": ids, "sites": {"site": list(ids.values())}}


def files_outside(folder: Path, place: Path) -> dict[str, bytes]:
    """What is outside a place: its files' names and contents."""
    outside = [f for f in folder.rglob("*") if f.is_file() and not f.is_relative_to(place)]
    return {str(f): hashlib.sha256(f.read_bytes()).digest() for f in outside}


PROMISED: dict[str, Any] = {
    "algorithm": {"name": "feddpo", "local": LOCAL, "aggregate": {"name": "frozen-a"}},
    "federation": {"weighting": "equal"},
    "secrecy": {"name": "masks", "min_sites": 2},
    "privacy": [
        {"unit": "client", "noise_multiplier": 2.0, "delta": 0.01},
        {"unit": "example", "noise_multiplier": 2.0, "delta": 0.01},
    ],
}


def fuzz(folder: Path, count: int, seed: int = 0) -> dict[str, float]:
    """Hostile messages: errors that the site did not foresee, and files outside its folder.

    Half of them meet an experiment with masks and promises of privacy.
    """
    plain = {"algorithm": {"name": "ditto", "local": LOCAL}}
    found = [fuzz_one(folder, count // 2, seed + k, one) for k, one in enumerate((plain, PROMISED))]
    leaked, taken = map(sum, zip(*found, strict=True))
    return {"messages_tried": count, "messages_leaked": leaked, "messages_taken": taken}


def fuzz_one(folder: Path, count: int, seed: int, changes: Mapping[str, Any]) -> tuple[int, int]:
    """How many hostile messages do harm in an experiment with these settings, and how many are
    taken for good ones.
    """
    draw, leaked, taken = random.Random(seed), 0, 0
    spec = config.dump(config.parse(Experiment, settings(folder, **changes), "x"))
    messages = valid_messages(spec)
    # what goes well: the second work is one of ditto's
    good = [messages[0], *messages[3 : 5 if "privacy" in changes else 6]]
    # opening loads the model: rarely, so that most messages meet a site at work
    cheap = [m for m in messages if not opens(m)]
    with small_site(folder, changes["algorithm"]) as site:
        runs = site._folder
        for number in range(count):
            if number % 500 == 0:
                for message in good:
                    more = numbers(site) if message["verb"] == "number" else {}
                    tensors = {"0/w": torch.ones(3)} if message["verb"] == "each" else {}
                    answer = said(site, {**message, **more}, tensors)[0]
                    assert "refused" not in answer, answer
                before = files_outside(folder, runs)
            some = messages if draw.random() < 0.01 else cheap
            message = hostile(some, draw)
            try:
                refused = unpack(site.answer(message))[0].get("refused")
            except BaseException as error:
                refused = f"it failed ({type(error).__name__})"
            taken += refused is None
            # the site answers so where an error reached its end that nobody had thought of
            if refused is not None and refused.startswith("it failed"):
                leaked += 1
                print(f"  leaked: {refused}: {message[:300]!r}")
            if number % 500 == 499 and files_outside(folder, runs) != before:
                leaked += 1
                print("  files outside the site's folder changed")
    return leaked, taken


# ---- private trees


ALGORITHMS: dict[str, dict[str, Any]] = {
    "feddpo": {},
    "feddpo-stale": {},
    "fedbuff": {},
    "fed-ef": {},
    "fedprox": {},
    "scaffold": {},
    "fedpdpo": {"parts": {"bottleneck": 2}, "personal_steps": 1},
    "fedper": {},
    "fedsa-lora": {},
    "ffa-lora": {},
    "ditto": {},
    "feddpa": {},
    "clustered": {"keep_optimizer": False},
    "decdpo": {},
    "decdpo-stale": {},
    "decpdpo": {"parts": {"bottleneck": 2}},
    "gradient-tracking": {},
    "choco": {},
    "firm": {},
    "scalarized": {},
    "fsmgda": {},
    "fedcmoo": {},
    "alone": {},
}


@dataclass(frozen=True)
class Honest:
    """How work was asked for in an honest round."""

    args: Sequence[dict[str, Any]] = ()
    tensors: Tree | None = None
    purpose: str = ""


@dataclass
class Target:
    """An open site after two honest rounds, and what of it is private."""

    site: Site
    spec: Experiment
    private: dict[str, str]  # field -> a value's name
    trees: dict[str, Tree]  # field -> what the attacker wants
    start: Tree  # what everybody starts from
    honest: Mapping[str, Honest]  # by work
    calls: int = 1000

    def fresh(self) -> int:
        self.calls += 1
        return self.calls


@contextmanager
def target(
    folder: Path, name: str, algorithm: Mapping[str, Any], wanted: Sequence[str] | None = None
) -> Iterator[Target]:
    """Run an algorithm's first rounds at one site, honestly.

    Args:
        folder: Where model and rows are.
        name: The algorithm.
        algorithm: Its settings.
        wanted: Fields of the state that count as private; None asks the labels.
    """
    more = dict(algorithm)
    local = {**LOCAL, "keep_optimizer": more.pop("keep_optimizer", True)}
    content = {"name": name, "local": local, **more}
    spec = config.parse(Experiment, settings(folder, algorithm=content, rounds=900), "x")
    with small_site(folder, content) as site:
        sites = Sites(Direct({"site": site}), config.dump(spec), "run", Patience())
        engine = RemoteEngine(sites)
        honest: dict[str, Honest] = {}
        usual = site.answer

        def noted(message: bytes) -> bytes:
            header, tensors = unpack(message)
            if header.get("verb") == "each":
                honest[header["work"]] = Honest(header["args"], tensors, header["purpose"])
            return usual(message)

        site.answer = noted  # type: ignore[method-assign]
        start = spec.build_task().init(seeds.generator(0, "init"))
        state: Any = spec.algorithm.init(engine, start)
        for round in range(2):
            engine.begin(round, engine.clients)
            state, _ = spec.algorithm.step(engine, state)
        site.answer = usual  # type: ignore[method-assign]
        values = {one.name: getattr(state, one.name) for one in fields(state)}
        names = {
            field: value.names[0].text
            for field, value in values.items()
            if not isinstance(value, Mapping)
        }
        kept = {field: site._values.get(0, value) for field, value in names.items()}
        private = [
            field
            for field, one in kept.items()
            if one.value
            and (
                one.label.audience < leaving.Audience.COORDINATOR
                if wanted is None
                else field in wanted
            )
        ]
        wanted_trees = {field: dict(kept[field].value) for field in private}
        yield Target(site, spec, names, wanted_trees, start, honest)
        del values, state  # or the site would be told to free them


def plain_for(hint: Any, goal: Target, draw: random.Random) -> Any:
    """A plain argument of a type, of what the experiment says: a site takes no other."""
    given = goal.spec.algorithm.given(goal.spec.federation.join_steps)
    algorithm: Any = goal.spec.algorithm
    if isinstance(hint, type) and isinstance(algorithm, hint):
        return config.dump(algorithm)
    numbers = [getattr(algorithm, one.name) for one in fields(algorithm)]
    for some in (given, numbers):
        if fitting := [one for one in some if isinstance(hint, type) and isinstance(one, hint)]:
            value = draw.choice(fitting)
            return config.dump(value) if is_dataclass(value) else value
    aggregate = getattr(algorithm, "aggregate", None)
    return 0.0 if aggregate is None else config.dump(aggregate)


def attempts(
    goal: Target, work: Work[..., Any], values: Sequence[str], draw: random.Random, most: int
) -> Iterator[tuple[list[dict[str, Any]], Tree]]:
    """Yield arguments for work: each private value in each place, with common trees beside it.

    Half of them are the honest ones, but for what stands in one place.
    """
    hints = {k: h for k, h in get_type_hints(work.function).items() if k != "return"}
    places = list(hints.items())[1:]
    honest = goal.honest.get(work.name, Honest())
    for _ in range(most):
        args: list[dict[str, Any]] = []
        common: dict[str, torch.Tensor] = {}
        is_honest = draw.random() < 0.5
        other = draw.randrange(len(places)) if places else 0
        for place, (name, hint) in enumerate(places):
            is_tree = hint == Tree or "Mapping" in str(hint)
            keeps = is_honest and place != other
            if not is_tree:
                plain = honest.args[place] if keeps and honest.args else None
                args.append(plain or {"plain": plain_for(hint, goal, draw)})
                continue
            if keeps and honest.args and "own" in honest.args[place]:
                value = goal.private.get(name) or draw.choice(list(values))
                args.append({"own": {"0": value}})
                continue
            if not keeps and draw.random() < 0.6:
                args.append({"own": {"0": draw.choice(list(values))}})
                continue
            if keeps:
                like = trees.part(honest.tensors or {}, place)
            else:
                zeros = draw.choice([goal.start, *goal.trees.values(), {}])
                like = trees.scale(zeros, 0.0)
            common |= {f"{place}/{key}": tensor for key, tensor in like.items()}
            args.append({"tree": place})
        yield args, common


def got(goal: Target, name: str, parts: int | None) -> set[str]:
    """Fields whose private tensors are among what the site gives of a call's values.

    One has come if what was given, either way round, is nearer to it than a twentieth of what is
    private of it: its distance from what everybody starts from, or from nothing.
    """
    taken = set()
    for k in range(parts or 1):
        header, tensors = said(
            goal.site, {"verb": "contribute", "own": {"0": f"{name}.{k}"}, "shares": {"0": 1.0}}
        )
        if "refused" in header:
            continue
        for field, tree in goal.trees.items():
            for key, tensor in tree.items():
                if not tensor.is_floating_point():
                    continue
                known = goal.start.get(key)
                is_known = known is not None and known.shape == tensor.shape
                secret = float(tensor.norm())
                if is_known:
                    secret = min(secret, float((tensor - known).norm()))
                if secret < 1e-6:
                    continue
                for one in tensors.values():
                    if one.shape == tensor.shape and one.is_floating_point():
                        apart = min(float((sign * one - tensor).norm()) for sign in (1, -1))
                        if apart < 0.05 * secret:
                            taken.add(field)
    return taken


def steal(
    folder: Path,
    name: str,
    singles: int,
    triples: int,
    seed: int,
    wanted: Sequence[str] | None = None,
) -> tuple[int, set[str], set[str], set[str]]:
    """Single works, pairs and triples of an algorithm's works, each with private values in any
    place; returns tries, private trees, those that came, and works of an honest round that were
    never done.

    Where fields are named, what is private is not asked for as it is: works alone are tried.
    """
    draw = random.Random(seed)
    with target(folder, name, ALGORITHMS[name], wanted) as goal:
        works = list(goal.spec.algorithm.works)
        tried, taken, done = 0, set[str](), set[str]()
        own = list(goal.private.values())

        def call(work: Work[..., Any], args: list[dict[str, Any]], common: Tree) -> str | None:
            number = goal.fresh()
            header, _ = said(
                goal.site,
                {
                    "verb": "each",
                    "work": work.name,
                    "args": args,
                    "clients": [0],
                    "purpose": goal.honest.get(work.name, Honest()).purpose
                    or draw.choice(["train", "join", "init", "evaluate"]),
                    "round": draw.randrange(3, 900),
                    "call": number,
                    "name": str(number),
                },
                common,
            )
            if "refused" in header or header["failed"]:
                return None
            done.add(work.name)
            taken.update(got(goal, str(number), header["parts"]))
            return f"{number}.{draw.randrange(header['parts'] or 1)}"

        for field, value in goal.private.items() if wanted is None else ():
            header, tensors = said(
                goal.site, {"verb": "contribute", "own": {"0": value}, "shares": {"0": 1.0}}
            )
            tried += 1
            if "refused" not in header and field in goal.trees and tensors:
                taken.add(field)
        for work in works:
            for args, common in attempts(goal, work, own, draw, singles):
                call(work, args, common)
                tried += 1
        for first in works:
            for second in works:
                made = [
                    value
                    for args, common in attempts(goal, first, own, draw, 2)
                    if (value := call(first, args, common))
                ]
                for args, common in attempts(goal, second, own + 3 * made, draw, 2):
                    call(second, args, common)
                tried += 1
        for _ in range(triples):
            made = []
            for _ in range(3):
                work = draw.choice(works)
                for args, common in attempts(goal, work, own + 3 * made, draw, 1):
                    if value := call(work, args, common):
                        made.append(value)
            tried += 1
        trained = {name for name, one in goal.honest.items() if one.purpose != "init"}
        return tried, set(goal.trees), taken, trained - done


def private_trees(folder: Path, quick: bool) -> dict[str, float]:
    """All algorithms; then some without labels, where private trees must come."""
    tried, wanted, came = 0, dict[str, set[str]](), 0
    left: dict[str, set[str]] = {}
    singles, triples = (4, 6) if quick else (40, 2000 // len(ALGORITHMS) + 1)
    for number, name in enumerate(ALGORITHMS):
        made, private, taken, left[name] = steal(folder, name, singles, triples, number)
        tried, came, wanted[name] = tried + made, came + len(taken), private
        for field in taken:
            print(f"  {name}: {field} came")
        if left[name]:
            print(f"  {name}: never done: {', '.join(sorted(left[name]))}")
    rule, kinds = site_module.labels, site_module.fits
    site_module.fits = lambda work, place, label: True
    site_module.labels = lambda work, arguments, results: [Label()] * len(results)
    try:
        unruled = sum(
            len(steal(folder, name, 40, 0, 0, sorted(wanted[name]))[2])
            for name in ("fedsa-lora", "ditto", "alone")
        )
    finally:
        site_module.labels, site_module.fits = rule, kinds
    return {
        "private_trees_tried": tried,
        "private_trees_wanted": sum(map(len, wanted.values())),
        "private_trees_got": came,
        "private_works_never_done": sum(map(len, left.values())),
        "private_trees_got_without_labels": unruled,
    }


# ---- rows out of gradients


def reconstruct(folder: Path, calls: int, *, limited: bool, targets: Any) -> tuple[int, int]:
    """Read rows' words out of the gradients of one update after another.

    Args:
        folder: Where model and rows are.
        calls: Updates that are asked for.
        limited: Whether the site has its default limits, and the attacker what these allow.
        targets: The layers of the adapter: the embeddings, whose gradient has a column for each
            word of the batch; or a first layer's, whose gradient lies in what the words span.

    Returns:
        Rows of which all words but two at most are read and none is wrong, and rows there are.
    """
    is_embedding = "embed_tokens" in targets
    local = {
        "steps": 2 if limited else 1,
        "batch_size": 4 if limited else 1,
        "optim": "sgd",
        "learning_rate": 1.0,
        "lr_scheduler_type": "constant",
        "warmup_ratio": 0.0,
        "max_grad_norm": 1e9,
    }
    model = {
        "path": str(folder / "model"),
        "dtype": "float32",
        "lora_r": 64 if limited else 256,
        "lora_alpha": 64 if limited else 256,
        "lora_target_modules": targets,
        **({} if is_embedding else {"lora_layers_to_transform": [0]}),
    }
    spec = settings(folder, task={"name": "preference", "model": model}, rounds=900)
    spec["algorithm"] = {"name": "feddpo", "local": local}
    spec = config.dump(config.parse(Experiment, spec, "x"))
    loose = {"least_examples": 1, "least_batch": 1, "embeddings": True, "max_lora_r": 512}
    file = {
        "data": spec["data"],
        "client": "clinic",
        "algorithms": ["feddpo"],
        "models": {str(folder / "model"): str(folder / "model")},
        **({} if limited else {"limits": loose}),
    }
    with tempfile.TemporaryDirectory(dir=folder) as place:
        (Path(place) / "site.yaml").write_text(yaml.safe_dump(file))
        host, runs = consenting("clinic", Path(place) / "site.yaml")
        site = Site("clinic", host, runs, Direct({}).peers("clinic"))
        opened = said(
            site,
            {
                "verb": "open",
                "experiment": spec,
                "run": "r",
                "resumes": False,
                "is_known": True,
                "held_out": [],
            },
        )[0]
        if "refused" in opened:
            rows = sum(1 for _ in (folder / "rows.jsonl").open())
            print(f"  {targets}: refused, {opened['refused']}")
            return 0, rows
        said(site, {"verb": "number", "ids": {"clinic": 0}, "sites": {"clinic": [0]}})
        hosted: Hosted = site._opened
        truth = hosted.shards["clinic"].train
        draw = torch.Generator().manual_seed(0)
        adapter = {
            name: torch.randn(t.shape, generator=draw)
            for name, t in hosted.task.init(seeds.generator(0, "init")).items()
        }
        language: Any = hosted.task.language  # type: ignore[attr-defined]
        inner = language.model.get_base_model().model
        words = (
            inner.layers[0].input_layernorm(language.model.get_input_embeddings().weight).detach()
        )
        empty = {
            "verb": "each",
            "work": "common.no_moments",
            "args": [],
            "clients": [0],
            "purpose": "init",
            "round": 0,
            "call": 1,
            "name": "900000",
        }
        assert "refused" not in said(site, empty)[0]
        moments = {"own": {"0": "900000.0"}}
        read = []
        for call in range(1, calls + 1):
            said(
                site,
                {
                    "verb": "each",
                    "work": "feddpo.train",
                    "clients": [0],
                    "purpose": "train",
                    "round": call % 900,
                    "call": call,
                    "name": str(call),
                    "args": [{"tree": 0}, moments, {"plain": spec["algorithm"]}],
                },
                trees.nest({0: adapter}),
            )
            header, tensors = said(
                site, {"verb": "contribute", "own": {"0": f"{call}.0"}, "shares": {"0": 1.0}}
            )
            if "refused" in header:
                continue
            update = trees.part(tensors, 0)
            if is_embedding:
                rows_of = next(t for n, t in update.items() if "embedding_A" in n and t.ndim == 2)
                read.append(frozenset(rows_of.abs().sum(0).nonzero()[:, 0].tolist()))
                continue
            stacked = torch.cat(
                [t for name, t in update.items() if "lora_A" in name and t.ndim == 2]
            ).double()
            basis = torch.linalg.svd(stacked, full_matrices=False)
            rank = int((basis.S[0] * 1e-6 < basis.S).sum())
            span = basis.Vh[:rank]
            unit = torch.nn.functional.normalize(words.double(), dim=1)
            left = (unit - unit @ span.T @ span).norm(dim=1)
            if rank < words.shape[1]:  # otherwise everything is in it
                # far nearer than the others, which lie beyond a half
                is_in = (left < 0.3) & (words.norm(dim=1) > 1e-6)
                read.append(frozenset(is_in.nonzero()[:, 0].tolist()))
    # or the attack would fail for want of anything to read
    assert len(read) > calls / 2, f"{len(read)} of {calls} updates were had"
    exact = 0
    for example in truth:
        real = frozenset(example.prompt) | {t for answer in example.answers for t in answer}
        exact += any(len(real - some) <= 2 and not some - real for some in read)
    return exact, len(truth)


def rows(folder: Path, quick: bool) -> dict[str, float]:
    """Both attacks under the default limits, and where there are none."""
    calls = 40 if quick else 120
    wide = folder / "wide"
    wide.mkdir()
    make_model(wide / "model", 256)
    make_rows(wide / "rows.jsonl", [80])
    figures: dict[str, float] = {}
    for limited, ending in ((True, "default"), (False, "without_limits")):
        for targets, kind in ((["embed_tokens"], "embeddings"), (["q_proj", "v_proj"], "layer")):
            exact, there = reconstruct(wide, calls, limited=limited, targets=targets)
            print(f"  {kind}, {ending}: {exact} of {there} rows")
            figures[f"rows_reconstructed_{ending}_{kind}"] = exact
    for ending in ("default", "without_limits"):
        figures[f"rows_reconstructed_{ending}"] = max(
            figures.pop(f"rows_reconstructed_{ending}_{kind}") for kind in ("embeddings", "layer")
        )
    return figures


# ---- a malicious site

Change = Callable[[dict[str, Any], dict[str, Any], dict[str, torch.Tensor]], Any]


def about(**changed: Any) -> Change:
    def change(asked: Any, header: Any, tensors: Any) -> Any:
        for entry in header["about"].values():
            for key, value in changed.items():
                entry.pop(key, None) if value is None else entry.update({key: value})
        return header, tensors

    return change


def clients(names: Sequence[str]) -> Change:
    def change(asked: Any, header: Any, tensors: Any) -> Any:
        first = next(iter(header["about"].values()))
        return {**header, "about": dict.fromkeys(names, first)}, tensors

    return change


def metric(**changed: Any) -> Change:
    def change(asked: Any, header: Any, tensors: Any) -> Any:
        for row in header["metrics"].values():
            for key, value in changed.items():
                key = key.replace("__", "/")
                row.pop(key, None) if value is None else row.update({key: value})
        return header, tensors

    return change


def header(**changed: Any) -> Change:
    return lambda asked, head, tensors: ({**head, **changed}, tensors)


def tensor(change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return lambda asked, head, tensors: (head, {k: change(v) for k, v in tensors.items()})


def raw(content: bytes) -> Change:
    return lambda asked, head, tensors: content


def others(asked: Any, head: Any, tensors: Any) -> Any:
    return {
        **head,
        "failed": {str(i): "no" for i in range(3) if i not in asked["clients"]},
    }, tensors


def lie(asked: Any, head: Any, tensors: Any) -> Any:
    row = {"rewards/accuracies": 0.0, "loss": 9.0, "num_examples": 1.0}
    return {"metrics": {str(i): row for i in range(3)}}, tensors


BAD: dict[str, dict[str, Change]] = {
    **{
        f"open: {key}={str(value)[:12]}": {"open": about(**{key: value})}
        for key, value in (
            ("train", None),
            ("train", 0),
            ("train", 10**30),
            ("train", 10**400),
            ("train", -1),
            ("train", "x"),
            ("test", None),
            ("test", 0),
            ("digest", None),
            ("digest", "x" * 10**6),
            ("number", 10**30),
            ("truncated", 1.5),
            ("unknown", 1),
        )
    },
    **{
        f"open: clients {str(names)[:20]}": {"open": clients(names)}
        for names in (
            [],
            [f"sybil-{k}" for k in range(300)],
            ["client-1"],
            [".."],
            ["n" * 300],
            [""],
            ["\x1b[2J"],
            ["[/bold]"],
            ["a/b"],
            ["<b>"],
        )
    },
    "open: refusal of 1 MB": {"open": lambda a, h, t: ({"refused": "\x1b[31m" + "x" * 10**6}, {})},
    "open: refusal that is no text": {"open": lambda a, h, t: ({"refused": {"a": 1}}, {})},
    **{
        f"each: parts {parts}": {"each": header(parts=parts)}
        for parts in (None, 1, 2, 5, 64, 65, -1, "x")
    },
    "each: fails others' clients": {"each": others},
    **{
        f"each: failed {str(failed)[:20]}": {"each": header(failed=failed)}
        for failed in ({"-1": "x"}, {str(10**9): "y"}, {"0": "z" * 10**6}, [], {"0": 3}, None)
    },
    **{
        f"report: {key}={value}": {"report": metric(**{key: value})}
        for key, value in (
            ("num_examples", None),
            ("num_examples", 0.0),
            ("num_examples", -5.0),
            ("num_examples", 1e300),
            ("rewards__accuracies", None),
            ("rewards__accuracies", 7.0),
            ("rewards__accuracies", -1.0),
            ("zzz", 1.0),
            ("round", 77.0),
            ("clients", 0.5),
            ("late", -1.0),
            ("loss", 1e308),
            ("loss", -1e308),
            ("loss", "x"),
            ("<script>", 1.0),
            ("\x1b[2J", 1.0),
        )
    },
    "report: 100,000 names": {"report": metric(**{f"x{i}": 1.0 for i in range(100_000)})},
    "report: empty rows": {
        "report": lambda a, h, t: ({"metrics": {k: {} for k in h["metrics"]}}, t)
    },
    "report: others' metrics": {"report": lie},
    "report: nothing": {"report": header(metrics={})},
    **{
        f"contribute: {name}": {"contribute": tensor(change)}
        for name, change in {
            "x1000": lambda v: v * 1000,
            "x1e30": lambda v: v * 1e30,
            "nan": lambda v: v * float("nan"),
            "float64": torch.Tensor.double,
            "int8": lambda v: v.to(torch.int8),
            "bool": lambda v: v > 0,
            "complex": lambda v: v.to(torch.complex64),
            "transposed": lambda v: v.T.contiguous() if v.ndim == 2 else v,
            "3e38": lambda v: torch.full_like(v, 3e38),
            "float8": lambda v: v.to(torch.float8_e4m3fn),
            "empty": lambda v: v[:0],
        }.items()
    },
    "contribute: nothing": {"contribute": lambda a, h, t: (h, {})},
    "contribute: one more": {
        "contribute": lambda a, h, t: (
            h,
            {**t, f"{next(iter(t)).split('/')[0]}/more": torch.ones(2)},
        )
    },
    **{
        f"answer: {name}": {"contribute": raw(content), "report": raw(content)}
        for name, content in {
            "nothing": b"",
            "FF": b"\xff" * 8,
            "deep": (20_000).to_bytes(8, "little") + b"[" * 20_000,
            "lying length": pack({}) + (10**9).to_bytes(8, "little") + b"{}",
        }.items()
    },
    "save: refused": {"save": lambda a, h, t: ({"refused": "no"}, {})},
    "save: more": {"save": header(more=1)},
    "each: refused": {"each": lambda a, h, t: ({"refused": "no answer at all"}, {})},
    "consent: for others": {"consent": header(reasons=[])},
    "consent: refused": {"consent": lambda a, h, t: ({"reasons": ["no"] * len(h["reasons"])}, {})},
    "split: forged": {"split": header(held_out=["x"], has_sides=True)},
}
GOSSIP: dict[str, dict[str, Change]] = {
    f"exchange: {name}": {"exchange": header(**changed)}
    for name, changed in {
        "sizes of nobody": {"sizes": {str(10**6): 5, "0": 1}},
        "no sizes": {"sizes": {}},
        "size 10^400": {"sizes": {"0": 10**400}},
        "unheard everybody": {"unheard": [0, 1, 2, 10**9, -4]},
        "unheard text": {"unheard": "x"},
    }.items()
}


def bad_sites(folder: Path, quick: bool) -> dict[str, float]:
    """Runs of three sites of which one answers what it should not; two clients are enough."""
    cases = [(name, change, "feddpo") for name, change in BAD.items()]
    cases += [(name, change, "decdpo") for name, change in GOSSIP.items()]
    if quick:
        cases = cases[::4] + cases[-len(GOSSIP) :: 2]
    ended = 0
    for number, (name, change, algorithm) in enumerate(cases):
        content = settings(
            folder,
            algorithm={"name": algorithm, "local": {"steps": 1, "batch_size": 4}},
            partition={"name": "natural", "column": "client", "max_clients": 3},
            rounds=2,
            patience={"seconds": 20, "min_clients": 1},
        )
        spec = config.parse(Experiment, content, "x")
        with tempfile.TemporaryDirectory(dir=folder) as place:
            direct = Direct({})
            for k in range(3):
                host = SimulatedSite(k, 3)
                direct.all[f"site-{k}"] = Site(
                    f"site-{k}", host, Path(place) / f"site-{k}", direct.peers(f"site-{k}")
                )
            direct.evil, direct.change = f"site-{number % 3}", change
            run = RunDirectory(Path(place) / "run")
            try:
                for _ in events(spec, run, transport=direct):
                    pass
                rows = run.read_rows("metrics.jsonl")
                assert [row["round"] for row in rows] == [1, 2], rows
                assert all(row["clients"] >= 2 for row in rows), rows
                evaluated = run.read_rows("evaluation.jsonl")[-1]
                assert evaluated["summary"]["rewards/accuracies"]["mean"] <= 1
            except BaseException as error:
                ended += 1
                print(f"  {name}: {type(error).__name__}: {str(error)[:150]}")
    return {"bad_sites_tried": len(cases), "runs_ended_by_bad_site": ended}


# ---- kills, and full disks

STATEFUL = ("fedpdpo", "scaffold", "decdpo", "choco", "firm")
SCRIPT = """
import sys, json
from fedpref import config, Experiment, resume, run
from fedpref.experiments.run_directory import RunDirectory
from fedpref.experiments.rounds import events
import fedpref.reports.page, transformers, peft
from pathlib import Path
print("ready", flush=True)
sys.stdin.readline()
place = Path(sys.argv[2])
spec = config.parse(Experiment, json.loads(Path(sys.argv[1]).read_text()), "x")
for _ in events(spec, RunDirectory(place)): pass
"""


class Child:
    """A process that runs an experiment, or goes on with it, once it is told to."""

    def __init__(self, spec: Path, place: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(spec), str(place)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self.process.stdout is not None
        self.process.stdout.readline()

    def go(self, kill_after: float | None = None) -> tuple[int, str]:
        """Let it run; return the exit status and what it complained of."""
        timer = None
        if kill_after is not None:
            timer = threading.Timer(kill_after, lambda: os.killpg(self.process.pid, signal.SIGKILL))
            timer.start()
        _, complaint = self.process.communicate("go\n")
        if timer:
            timer.cancel()
        return self.process.returncode, complaint


def state_of(run: Path) -> dict[str, Any]:
    """What two runs must have in common: models, clients' values, evaluations, metrics."""
    from fedpref.engines.store import Store

    (*_, last) = sorted((run / "checkpoints").glob("round-*"))
    found: dict[str, Any] = {
        str(f.relative_to(run)): trees.digest(trees.load(f)).hex()
        for f in [
            *last.glob("*.safetensors"),
            *run.glob("adapter/*.safetensors"),
            *run.glob("clients/*/*.safetensors"),
        ]
    }
    store = Store(run / "checkpoints")
    fields_kept = json.loads((last / "values.json").read_text())
    for field, some in store.load(last, list(fields_kept)).items():
        found |= {f"{field}/{i}": trees.digest(kept.value).hex() for i, kept in some.items()}
    found["evaluation"] = (run / "evaluation.jsonl").read_text()
    found["metrics"] = [
        {key: row[key] for key in row if not key.startswith("seconds")}
        for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    ]
    return found


def spec_file(folder: Path, name: str) -> Path:
    more: dict[str, Any] = {
        "algorithm": {"name": name, "local": {**LOCAL, "steps": 3, "batch_size": 3}}
    }
    file = folder / f"{name}.json"
    file.write_text(json.dumps(settings(folder, rounds=6, evaluate_every=2, **more)))
    return file


def kills(folder: Path, quick: bool) -> dict[str, float]:
    """SIGKILL at random moments, then on to the end: the same state as without."""
    draw, tried, equal = random.Random(0), 0, 0
    each = 2 if quick else 20
    for name in STATEFUL[:3] if quick else STATEFUL:
        spec = spec_file(folder, name)
        child, whole = Child(spec, folder / f"{name}-whole"), time.monotonic()
        status, complaint = child.go()
        whole = time.monotonic() - whole
        assert status == 0, complaint
        wanted, done = state_of(folder / f"{name}-whole"), 0
        while done < each:
            place = folder / f"{name}-killed"
            deaths = 0
            while deaths < 3 and done + deaths < each:
                status, complaint = Child(spec, place).go(draw.uniform(0.05, whole))
                if status != -signal.SIGKILL:
                    break
                deaths += 1
            if deaths and status == -signal.SIGKILL:
                status, complaint = Child(spec, place).go()
            is_equal = status == 0 and state_of(place) == wanted
            if deaths and not is_equal:
                print(f"  {name}: {status} {complaint[-300:]}")
            tried, equal, done = tried + deaths, equal + deaths * is_equal, done + deaths
            shutil.rmtree(place, ignore_errors=True)
    return {"kills_tried": tried, "kills_equal": equal}


def full_disks(folder: Path, quick: bool) -> dict[str, float]:
    """A disk that is full at some moment: a sentence, and with room again the same state.

    It needs a file system of its own, which only root may mount.
    """
    disk = folder / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        print("  no file system can be mounted here: not tried")
        return {"full_disks_tried": 0, "full_disks_resumed": 0}
    tried = resumed = 0
    try:
        spec = spec_file(folder, "scaffold")
        whole = folder / "scaffold-disk"
        status, complaint = Child(spec, whole).go()
        assert status == 0, complaint
        wanted, needs = (
            state_of(whole),
            sum(f.stat().st_size for f in whole.rglob("*") if f.is_file()),
        )
        for kilobytes in (
            (60, 250, 600) if quick else (8, 60, 150, 250, 400, 600, 800, needs // 1024 - 40)
        ):
            shutil.rmtree(disk / "run", ignore_errors=True)
            subprocess.run(
                ["mount", "-o", f"remount,size={max(4, kilobytes)}k", str(disk)], check=True
            )
            status, complaint = Child(spec, disk / "run").go()
            subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
            # a run for which there was room says nothing of a full disk
            is_sentence = status != 0 and "UserError" in complaint.strip().splitlines()[-1]
            status, after = Child(spec, disk / "run").go()
            is_same = status == 0 and state_of(disk / "run") == wanted
            tried, resumed = tried + 1, resumed + (is_sentence and is_same)
            if not (is_sentence and is_same):
                print(f"  {kilobytes} kB: {complaint.strip()[-200:]} | {after.strip()[-200:]}")
    finally:
        subprocess.run(["umount", "-l", str(disk)])
    return {"full_disks_tried": tried, "full_disks_resumed": resumed}


PARTS = ("fuzz", "private", "rows", "sites", "kills", "disks")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer of everything")
    parser.add_argument("--json", type=Path, help="where the figures go")
    parser.add_argument(
        "--only", nargs="*", default=[], choices=PARTS, metavar="PART", help=" ".join(PARTS)
    )
    options = parser.parse_args()
    end_with_children()
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    parts: dict[str, Callable[[Path], dict[str, float]]] = {
        "fuzz": lambda f: fuzz(f, 2_000 if options.quick else 20_000),
        "private": lambda f: private_trees(f, options.quick),
        "rows": lambda f: rows(f, options.quick),
        "sites": lambda f: bad_sites(f, options.quick),
        "kills": lambda f: kills(f, options.quick),
        "disks": lambda f: full_disks(f, options.quick),
    }
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, part in parts.items():
            if options.only and name not in options.only:
                continue
            folder = Path(scratch) / name
            folder.mkdir()
            make_model(folder / "model")
            make_rows(folder / "rows.jsonl", [40, 32, 28, 24])
            begun = time.monotonic()
            figures |= part(folder)
            print(f"{name}: {time.monotonic() - begun:.0f} s", flush=True)
    for name, value in figures.items():
        print(f"{name}: {value:g}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
