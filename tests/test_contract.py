"""What every algorithm promises on every engine."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

import personal
from fedpref import config
from fedpref.algorithms import (
    FFA,
    FIRM,
    FSMGDA,
    Alone,
    ChocoDPO,
    Clustered,
    DecDPO,
    DecPDPO,
    Ditto,
    FedBuff,
    FedCMOO,
    FedDPA,
    FedDPO,
    FedEF,
    FedOpt,
    FedPDPO,
    FedPer,
    FedProx,
    FedSA,
    GradientTracking,
    PluralLLM,
    Scaffold,
    Scalarized,
    StaleDecDPO,
    StaleFedDPO,
)
from fedpref.algorithms.fedopt import Adaptive
from fedpref.engines import RemoteEngine, Simulation
from fedpref.engines.store import Store
from fedpref.experiments.evaluations import evaluate
from fedpref.experiments.experiment import Experiment
from fedpref.experiments.run_directory import RunDirectory
from fedpref.federation.aggregation import FrozenA, Product
from fedpref.federation.local_training import LocalTraining
from fedpref.federation.participation import draw
from fedpref.models.own_parts import Parts
from fedpref.numerics import seeds
from fedpref.numerics.trees import Tree
from process_engine import Processes, process_engine, sent_up, shares

CLIENTS, ROUNDS = 3, 4
LOCAL = LocalTraining(steps=2, batch_size=3, learning_rate=0.01)
KEEPING = LocalTraining(steps=2, batch_size=3, learning_rate=0.01, keep_optimizer=True)
ALGORITHMS = {
    "feddpo": FedDPO(local=LOCAL),
    "feddpo-keeping-moments": FedDPO(local=KEEPING),
    "feddpo-stale": StaleFedDPO(local=LOCAL),
    "fedbuff": FedBuff(local=KEEPING),
    "fed-ef": FedEF(fraction=0.3, local=KEEPING),
    "fedopt": FedOpt(server=Adaptive(), local=LOCAL),
    "fedprox": FedProx(mu=0.1, local=LOCAL),
    "scaffold": Scaffold(local=LOCAL),
    "fedpdpo": FedPDPO(local=KEEPING, personal_steps=1),
    "fedpdpo-shared-bottleneck": FedPDPO(
        local=LOCAL, share_bottleneck=True, parts=Parts(bottleneck=4)
    ),
    "fedpdpo-joint": FedPDPO(
        local=LOCAL, phases="joint", parts=Parts(head="low-rank", bottleneck=4)
    ),
    "fedper": FedPer(local=LOCAL),
    "fedrep": FedPer(local=LOCAL, phases="alternate"),
    "fedsa-lora": FedSA(local=KEEPING),
    "ffa-lora": FFA(local=LOCAL),
    "ditto": Ditto(local=LOCAL, personal=LOCAL),
    "feddpa": FedDPA(local=LOCAL),
    "clustered": Clustered(local=LOCAL),
    "decdpo": DecDPO(local=KEEPING),
    "decdpo-combining-first": DecDPO(local=LOCAL, order="combine-then-adapt", aggregate=FrozenA()),
    "decdpo-mixing-products": DecDPO(local=LOCAL, aggregate=Product(ranks=(4, 2))),
    "decdpo-stale": StaleDecDPO(local=LOCAL),
    "decpdpo": DecPDPO(local=KEEPING, parts=Parts(bottleneck=4)),
    "gradient-tracking": GradientTracking(local=LOCAL),
    "choco": ChocoDPO(local=LOCAL),
    "pluralllm": PluralLLM(local=KEEPING),
    "firm": FIRM(local=KEEPING, smoothing=0.5),
    "scalarized": Scalarized(local=LOCAL, preference=(0.7, 0.3)),
    "fsmgda": FSMGDA(local=KEEPING),
    "fedcmoo": FedCMOO(local=LOCAL),
    "alone": Alone(local=KEEPING),
    "personal": personal.Personal(local=LOCAL),
}
MakeEngine = Callable[..., Any]


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    # one site hosts two clients
    started = Processes(
        shares(2), tmp_path_factory.mktemp("sites"), ["personal", "fedpref.experiments.rounds"]
    )
    yield started
    started.stop()


@pytest.fixture(scope="module")
def content(settings: dict[str, Any]) -> dict[str, Any]:
    """An experiment on the three largest clients, with dropout, so that every kind of random draw
    takes part, and two objectives.
    """
    of_objectives = {"objective_column": "kind", "objective_names": ["first", "second"]}
    task = {
        **settings["task"],
        **of_objectives,
        "model": {**settings["task"]["model"], "lora_dropout": 0.1},
    }
    return {
        **settings,
        "task": task,
        "algorithm": {"name": "decdpo"},  # at sites, neighbours exchange only where some gossip
        "partition": {"name": "natural", "max_clients": CLIENTS},
        "rounds": ROUNDS,
    }


@pytest.fixture(scope="module")
def engines(
    processes: Processes, content: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, MakeEngine]:
    cache = tmp_path_factory.mktemp("cache")
    experiment = config.parse(Experiment, content, "test")
    task = experiment.task.build()
    shards = [
        task.prepare(task.encode(client), cache / "all") for client in experiment.clients()[0]
    ]
    return {
        "simulation": lambda run="", began=None: Simulation(
            task, shards, seed=experiment.seed, rounds=ROUNDS
        ),
        "processes": lambda run="", began=None: process_engine(processes, content, run, began),
    }


@pytest.fixture(scope="module")
def start(engines: dict[str, MakeEngine]) -> Tree:
    return engines["simulation"]()._task.init(seeds.generator(0, "init"))


@dataclass
class Drive:
    """A run by hand: the engine, its last state, and every round's metrics."""

    engine: Any
    state: Any
    metrics: list[dict[str, float]]


def cohort(engine: Any, round: int) -> tuple[int, ...]:
    return draw([1.0] * len(engine.clients), 2, seeds.generator(0, "cohort", round=round))


def drive(
    algorithm: Any, engine: Any, start: Tree, rounds: range = range(ROUNDS), state: Any = None
) -> Drive:
    state = algorithm.init(engine, start) if state is None else state
    metrics = []
    for round in rounds:
        engine.begin(round, cohort(engine, round))
        state, measured = algorithm.step(engine, state)
        metrics.append(dict(measured))
    return Drive(engine, state, metrics)


CHECKPOINTS = count(1)


def contents(engine: Any, state: Any, folder: Path) -> dict[str, Tree]:
    """All values of a state, those on clients by way of their files."""
    values = {field.name: getattr(state, field.name) for field in fields(state)}
    found: dict[str, Tree] = {
        name: value for name, value in values.items() if isinstance(value, dict)
    }
    private = {name: value for name, value in values.items() if name not in found}
    folder = folder / f"round-{next(CHECKPOINTS):06d}"
    engine.save(private, folder)
    written = [folder]
    if isinstance(engine, RemoteEngine):
        written = list(engine.processes.folder.glob(f"*/{engine.run}/checkpoints/{folder.name}"))
    for place in written:
        for name, kept in Store(place.parent).load(place, list(private)).items():
            found |= {f"{name}/{client}": one.value for client, one in kept.items()}
    return found


def assert_equal(a: dict[str, Tree], b: dict[str, Tree]) -> None:
    assert a.keys() == b.keys()
    for place in a:
        assert a[place].keys() == b[place].keys(), place
        assert all(torch.equal(a[place][name], b[place][name]) for name in a[place]), place


AT_SITES = ("feddpo", "feddpo-keeping-moments", "fedpdpo", "firm", "scaffold", "decpdpo", "choco")


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in AT_SITES else pytest.mark.long) for n in ALGORITHMS],
)
def test_engines_agree_to_the_last_bit(
    name: str, engines: dict[str, MakeEngine], start: Tree, tmp_path: Path
) -> None:
    algorithm = ALGORITHMS[name]
    runs = {kind: drive(algorithm, make(), start) for kind, make in engines.items()}
    states = {kind: contents(run.engine, run.state, tmp_path / kind) for kind, run in runs.items()}
    assert_equal(states["simulation"], states["processes"])
    assert runs["simulation"].metrics == runs["processes"].metrics
    assert runs["simulation"].engine.traffic == runs["processes"].engine.traffic
    held_out = []
    for run in runs.values():
        run.engine.begin(ROUNDS, run.engine.clients, "evaluate")
        held_out.append(run.engine.disclose(run.engine.each(evaluate, *algorithm.model(run.state))))
    assert held_out[0] == held_out[1]


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_site_that_consents_to_an_algorithm_consents_to_all_that_it_runs(
    name: str, engines: dict[str, MakeEngine], start: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    algorithm, asked = ALGORITHMS[name], set()
    each = Simulation.each

    def noting(self: Simulation, work: Any, *args: Any) -> Any:
        asked.add(work.name)
        return each(self, work, *args)

    monkeypatch.setattr(Simulation, "each", noting)
    run = drive(algorithm, engines["simulation"](), start, range(2))
    run.engine.begin(ROUNDS, run.engine.clients, "join")
    algorithm.join(run.engine, run.state, 1)
    assert asked
    assert asked <= {work.name for work in algorithm.works}


@pytest.mark.parametrize(
    "name", ["fedpdpo", "fedpdpo-joint", "fedrep", "feddpa", "ditto", "alone", "decpdpo"]
)
def test_no_bytes_of_a_private_part_are_in_any_message(
    name: str, engines: dict[str, MakeEngine], start: Tree, rows_file: Path, tmp_path: Path
) -> None:
    engine, algorithm, seen = engines["processes"](), ALGORITHMS[name], dict[str, Tree]()
    state = algorithm.init(engine, start)
    for round in range(3):
        engine.begin(round, engine.clients)
        state, _ = algorithm.step(engine, state)
        seen |= {
            f"{round}/{key}": tree
            for key, tree in contents(engine, state, tmp_path / str(round)).items()
        }
    sent = b"".join(engine.processes.wire)

    def is_sent(tensor: torch.Tensor) -> bool:
        """Whether any 32 bytes of it are, looked at every so often, unless all alike."""
        content = tensor.flatten().contiguous().view(torch.uint8).numpy().tobytes()
        pieces = [
            content[i : i + 32] for i in range(0, len(content) - 31, max(32, len(content) // 50))
        ]
        return any(len(set(piece)) > 8 and piece in sent for piece in pieces)

    def is_private(key: str) -> bool:
        field = key.split("/", 1)[1]
        # what gossip shares lies on clients
        return "/" in field and not (name == "decpdpo" and field.startswith("theta/"))

    private = {
        f"{key}/{n}": t for key, tree in seen.items() if is_private(key) for n, t in tree.items()
    }
    assert len(private) >= 9
    assert not [key for key, tensor in private.items() if is_sent(tensor)]
    assert not any(part.encode() in sent for part in ("head.", "reward.", "bottleneck.", "own."))
    assert not any(
        json.loads(line)["chosen"].encode() in sent for line in rows_file.read_text().splitlines()
    )
    shared = [
        t
        for key, tree in seen.items()
        if not is_private(key) and int(key[0]) < 2
        for t in tree.values()
    ]
    if name != "decpdpo":  # whose clients' adapters are seen after mixing, and sent before
        assert all(map(is_sent, shared))  # so that the search is seen to find what is there
    assert bool(shared) == (name != "alone")


# at sites those whose states differ in kind: nothing private, moments, parts, weights, control
# variates, gossip
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((n, "simulation") for n in ALGORITHMS),
        *(pytest.param(n, "processes", marks=pytest.mark.long) for n in AT_SITES),
    ],
)
def test_a_run_is_finite_learns_and_can_be_taken_up_again(
    name: str, kind: str, engines: dict[str, MakeEngine], start: Tree, tmp_path: Path
) -> None:
    algorithm = ALGORITHMS[name]
    whole = drive(algorithm, engines[kind](), start)
    assert all(math.isfinite(value) for metrics in whole.metrics for value in metrics.values())
    expected = contents(whole.engine, whole.state, tmp_path / "whole")
    beginning = contents(whole.engine, algorithm.init(whole.engine, start), tmp_path / "beginning")
    assert any(
        not torch.equal(t, expected[place][n])
        for place, tree in beginning.items()
        for n, t in tree.items()
    )

    half = drive(algorithm, engines[kind](), start, range(2))
    folder = RunDirectory(tmp_path / "run")
    folder.checkpoint(2, half.state, half.engine)
    engine = engines[kind](*((half.engine.run, half.engine.about) if kind == "processes" else ()))
    state, rounds = folder.restore(algorithm.init(engine, start), engine)
    assert rounds == 2
    rest = drive(algorithm, engine, start, range(2, ROUNDS), state)
    assert_equal(contents(engine, rest.state, tmp_path / "rest"), expected)
    assert half.metrics + rest.metrics == whole.metrics


def test_private_names_are_in_no_message(engines: dict[str, MakeEngine], start: Tree) -> None:
    run = drive(ALGORITHMS["personal"], engines["processes"](), start)
    names = [name.split("/", 1)[1] for name in sent_up(run.engine.processes)]
    assert names
    assert not any(personal.is_private(name) for name in names)


@pytest.mark.parametrize("kind", ["simulation", "processes"])
def test_absent_clients_keep_their_private_parts(
    kind: str, engines: dict[str, MakeEngine], start: Tree, tmp_path: Path
) -> None:
    algorithm, engine = ALGORITHMS["personal"], engines[kind]()
    before = contents(engine, algorithm.init(engine, start), tmp_path / "before")
    after = contents(engine, drive(algorithm, engine, start, range(1)).state, tmp_path / "after")
    present = cohort(engine, 0)
    for client in engine.clients:
        same = all(
            torch.equal(t, after[f"private/{client}"][n])
            for n, t in before[f"private/{client}"].items()
        )
        assert same == (client not in present)


def test_clients_free_what_no_state_refers_to(engines: dict[str, MakeEngine], start: Tree) -> None:
    algorithm, engine = ALGORITHMS["personal"], engines["processes"]()
    state = algorithm.init(engine, start)
    for round in range(3):
        state = drive(algorithm, engine, start, range(round, round + 1), state).state
    assert all(len(names) == 1 for names in engine.names().values())  # the private part alone


def test_work_that_clients_cannot_find_by_name_is_refused(engines: dict[str, MakeEngine]) -> None:
    from fedpref.federation.verbs import work

    with pytest.raises(TypeError, match="not registered"):
        engines["simulation"]().each(lambda client: {})
    with pytest.raises(TypeError, match="module-level"):

        @work("test_contract.inner")
        def inner(client: Any) -> Tree:
            return {}


def test_values_of_one_engine_mean_nothing_to_another(
    engines: dict[str, MakeEngine], start: Tree
) -> None:
    foreign = Alone().init(engines["processes"](), start)
    with pytest.raises(TypeError, match="another engine"):
        engines["simulation"]().mean(foreign.theta)
