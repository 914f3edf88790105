"""Private local steps: units' gradients apart, bounded, with noise that is noise, and counted."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from conftest import leave, make_rows, write_rows
from fedpref import Experiment, UserError, cli, config, resume, run
from fedpref.algorithms import AnyAlgorithm
from fedpref.engines.private_examples import LEDGERS, PrivateExamples, ledger_file
from fedpref.engines.site_privacy import SitePrivacy
from fedpref.experiments.experiment import encoded
from fedpref.experiments.promises import JOINING
from fedpref.experiments.rounds import events, new_directory
from fedpref.experiments.run_directory import RunDirectory
from fedpref.federation import private_steps
from fedpref.federation.aggregation import FrozenA
from fedpref.federation.private_steps import PrivateSteps, add_clipped
from fedpref.numerics import seeds, trees
from fedpref.numerics.trees import Tree
from fedpref.privacy import Column, Guarantee, Ledger, Secret, epsilon_of
from fedpref.runs import auditing
from fedpref.tasks.batches import chance_of, numbered_by
from fedpref.tasks.task import Apart

KEY = bytes(range(32))
DRAWS = partial(seeds.generator, 0)  # random numbers by address, as a secret's
SLOW = pytest.mark.slow
Settings = dict[str, Any]


def spec_of(settings: Settings, rows: Path, **changes: Any) -> Experiment:
    content = {
        **deepcopy(settings),
        "data": {"name": "files", "path": str(rows), "test_fraction": 0.3},
        "privacy": {"unit": "example", "noise_multiplier": 1.5, "delta": 0.02},
        "rounds": 3,
    }
    return config.parse(Experiment, {**content, **changes}, "test")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two pairs a prompt, of two annotators, for three clients."""
    made = make_rows([16, 14, 12])
    for i, row in enumerate(made):
        row["annotator"] = f"a{i % 3}"
    other = {"first": "second", "second": "first"}
    again = [
        {
            **row,
            "rejected": row["rejected"] + " again",
            "annotator": "b",
            "kind": other[row["kind"]],
        }
        for row in made
    ]
    return write_rows(tmp_path_factory.mktemp("private") / "rows.jsonl", [*made, *again])


def at_work(spec: Experiment) -> tuple[Any, list[Any], Tree]:
    task = spec.build_task()
    _, shards = encoded(spec, task)
    task.move_to(0)
    rng = torch.Generator().manual_seed(1)
    start = task.init(seeds.generator(spec.seed, "init"))
    # both factors away from zero, or neither would have a gradient
    moved = {n: t + 0.02 * torch.randn(t.shape, generator=rng) for n, t in start.items()}
    return task, shards, moved


def steps_of(folder: Path, key: bytes = KEY, **changes: Any) -> PrivateSteps:
    given: dict[str, Any] = {
        "secret": Secret(key),
        "ledger": Ledger.at(folder),
        "guarantee": Guarantee(1.0, 0.5, 1e-2),
        "batch": 8,
        "unit": "example",
        "clip": 1.0,
    }
    return PrivateSteps(0, 0, 1, **{**given, **changes})


def apart(
    task: Any, shard: Any, theta: Tree, units: Sequence[Sequence[int]], wanted: Any = None
) -> list[Tensor]:
    """Each unit's gradient of all names, one vector each."""
    found = []
    names = sorted(wanted or theta)
    for part in task.gradients_apart(theta, theta, shard, units, 8, names, DRAWS):
        flat = torch.cat([part.gradients[name].flatten(1) for name in names], 1)
        found += list(flat)
    return found


# ---- gradients of units


@pytest.mark.parametrize(
    ("architecture", "form"),
    [
        ("llama", "packed"),
        ("qwen2", "packed"),
        ("gpt2", "packed"),
        ("llama", "padded"),
        ("llama", "dropout"),
        pytest.param("qwen2", "padded", marks=SLOW),
        pytest.param("gpt2", "padded", marks=SLOW),
        pytest.param("qwen2", "dropout", marks=SLOW),
        pytest.param("gpt2", "dropout", marks=SLOW),
    ],
)
def test_gradients_of_examples_are_those_of_batches_of_one(
    architecture: str,
    form: str,
    settings: Settings,
    rows: Path,
    models: Callable[[str], Path],
) -> None:
    model = {**settings["task"]["model"], "path": str(models(architecture))}
    if form == "dropout":
        model["lora_dropout"] = 0.1
    spec = spec_of(settings, rows, task={**settings["task"], "model": model})
    task, shards, theta = at_work(spec)
    if form == "padded":
        task.language.packs = False
    assert task.language.has_apart == (form != "dropout"), "one pass where it can be"
    units = [[0], [3], [5], [1]]
    if form == "dropout":  # of a unit it is the unit's own, whatever is beside it
        (*_, beside), (alone,) = (apart(task, shards[0], theta, some) for some in (units, [[1]]))
        assert torch.equal(beside, alone)
    for module in task.language.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # which two passes would draw otherwise
    together = apart(task, shards[0], theta, units)
    for k, unit in enumerate(units):
        leaves = {name: t.clone().requires_grad_() for name, t in theta.items()}
        batch = task._with_base([shards[0].train[i] for i in unit])
        losses, _ = task.losses(leaves, batch)
        losses.sum().backward()
        alone = torch.cat([leaves[name].grad.flatten() for name in sorted(theta)])  # type: ignore[union-attr]
        assert float((together[k] - alone).norm() / alone.norm()) < 1e-5
        assert float(alone.norm()) > 0


def test_units_of_several_examples_have_the_sum_of_their_gradients(
    settings: Settings, rows: Path
) -> None:
    task, shards, theta = at_work(spec_of(settings, rows))
    shard = shards[0]
    of_prompt = task.units(shard, "prompt")
    assert 1 < max(of_prompt) + 1 < len(shard)
    members = [i for i, unit in enumerate(of_prompt) if unit == 0]
    assert len(members) == 2
    (both,) = apart(task, shard, theta, [members])
    first, second = apart(task, shard, theta, [[i] for i in members])
    assert torch.allclose(both, first + second, rtol=1e-4, atol=1e-6)
    # more than one pass holds
    (many,) = apart(task, shard, theta, [list(range(len(shard)))])
    each = apart(task, shard, theta, [[i] for i in range(len(shard))])
    assert torch.allclose(many, torch.stack(each).sum(0), rtol=1e-3, atol=1e-5)
    annotators = task.units(shard, Column(column="annotator"))
    assert len(set(annotators)) == 4
    with pytest.raises(UserError, match="no column 'who'"):
        task.units(shard, Column(column="who"))
    column = Column(column="x")
    assert numbered_by(column, [{"x": 1}, {"x": 2}, {"x": 1}], "c") == [0, 1, 0]
    spelled = ["1", "1 ", 1.0, "caf\u00e9", "cafe\u0301", "caf\u00e9\u00ad"]
    assert numbered_by(column, [{"x": name} for name in spelled], "c") == [0, 0, 0, 1, 1, 1]
    with pytest.raises(UserError, match="2 training rows of client 'c' have nothing"):
        numbered_by(column, [{"x": None}, {"x": "a"}, {"x": float("nan")}], "c")
    with pytest.raises(UserError, match="expected a name or a number"):
        numbered_by(column, [{"x": ["a"]}], "c")


def test_an_own_adapter_and_an_own_head_have_gradients_apart_too(
    settings: Settings, rows: Path
) -> None:
    parts = {"head": "low-rank", "head_rank": 2, "bottleneck": 3, "reward": True, "adapter": True}
    algorithm = {**settings["algorithm"], "name": "fedpdpo", "parts": parts, "phases": "joint"}
    spec = spec_of(settings, rows, algorithm=algorithm)
    task, shards, theta = at_work(spec)
    assert spec.algorithm.parts
    rng = torch.Generator().manual_seed(2)
    own = task.parts(spec.algorithm.parts, rng)
    own = {n: t + 0.02 * torch.randn(t.shape, generator=rng) for n, t in own.items()}
    whole = {**theta, **own}
    units = [[0], [2, 4], [7]]
    adapters = {name for name in whole if "lora_" in name}
    fast = apart(task, shards[0], whole, units, adapters)  # heads stay: in one pass
    slow = [
        torch.cat([one[name].flatten() for name in sorted(adapters)])
        for one in (
            task._alone(whole, whole, [shards[0].train[i] for i in unit], adapters)
            for unit in units
        )
    ]
    for one, other in zip(fast, slow, strict=True):
        assert float((one - other).norm() / other.norm()) < 1e-4
    everything = apart(task, shards[0], whole, units)
    assert all(len(one) == sum(t.numel() for t in whole.values()) for one in everything)


# ---- one step


def gradient(task: Any, shard: Any, theta: Tree, steps: PrivateSteps) -> Tensor:
    found: Tensor = steps.gradient(task, shard, theta, theta, sorted(theta))
    return found


@pytest.mark.parametrize("unit", ["example", "prompt", Column(column="annotator")])
def test_one_unit_moves_a_sum_by_at_most_the_clip(
    unit: Any, settings: Settings, rows: Path, tmp_path: Path
) -> None:
    task, shards, theta = at_work(spec_of(settings, rows))
    shard = shards[0]
    of = task.units(shard, unit)
    without = dataclasses.replace(
        shard, train=tuple(e for e, u in zip(shard.train, of, strict=True) if u)
    )
    clip, quiet = 0.05, Guarantee(1e-9, 1.0, 1e-2)

    def clipped_sum(some: Any, k: int) -> Tensor:
        members: dict[int, list[int]] = {}
        for i, number in enumerate(task.units(some, unit)):
            members.setdefault(number, []).append(i)
        total = torch.zeros(1, sum(t.numel() for t in theta.values()), dtype=torch.float64)
        for part in task.gradients_apart(
            theta, theta, some, list(members.values()), 8, sorted(theta), DRAWS
        ):
            add_clipped(total, part, sorted(theta), clip)
        return total

    apart_by = float((clipped_sum(shard, 0) - clipped_sum(without, 1)).norm())
    assert 0.5 * clip < apart_by <= clip * (1 + 1e-6), "gradients here are longer than the clip"
    assert quiet.noise_multiplier < 1e-8


def test_pieces_of_a_unit_are_shortened_together_and_nonsense_is_nothing() -> None:
    gradients = {"a": torch.tensor([[3.0], [4.0], [0.1], [torch.nan]])}
    total = torch.zeros(2, 1, dtype=torch.float64)
    add_clipped(total, Apart(gradients, [0, 0, 1, 2], [0, 1, 0, 1]), ["a"], 1.0)
    assert total[:, 0].tolist() == pytest.approx([0.6 + 0.1, 0.8])


def test_the_noise_of_a_step_is_what_was_asked_for_and_never_the_same_on_two_values(
    settings: Settings, rows: Path, tmp_path: Path
) -> None:
    task, shards, theta = at_work(spec_of(settings, rows))
    shard = shards[0]
    first = gradient(task, shard, theta, steps_of(tmp_path))
    again = gradient(task, shard, theta, steps_of(tmp_path))
    assert torch.equal(first, again), "the same value at the same place"
    other = {name: tensor * 1.01 for name, tensor in theta.items()}
    moved = gradient(task, shard, other, steps_of(tmp_path))
    # values differ by a percent of a clip, and their noise would go if it were the same
    expected = task.private_batch(shard, 8)[1][0]
    assert float((first - moved).std()) * expected == pytest.approx(2**0.5, rel=0.1)
    assert not torch.equal(first, gradient(task, shard, theta, steps_of(tmp_path, bytes(32))))
    # an empty batch is noise alone
    alone = steps_of(tmp_path, guarantee=Guarantee(1.0, 1e-12, 1e-2))
    assert float(gradient(task, shard, theta, alone).std()) * expected == pytest.approx(1, rel=0.1)


def test_batches_are_drawn_by_words_of_the_secret(tmp_path: Path) -> None:
    units = [[i] for i in range(40)]
    sizes = []
    for number in range(100):
        steps = steps_of(tmp_path, number.to_bytes(32, "big"))
        sizes.append(len(steps._drawn(units)))
    assert sum(sizes) / 100 == pytest.approx(20, abs=1.0)
    assert len(set(sizes)) > 5, "of no fixed size"


def test_sizes_that_are_nearly_the_same_have_one_chance() -> None:
    assert [chance_of(n, 8) for n in (0, 4, 8, 20)] == [1.0, 1.0, 1.0, 0.4]
    assert chance_of(1000, 8) == chance_of(1010, 8) > chance_of(1100, 8)
    assert all(8 / n <= chance_of(n, 8) <= 8 / n * 1.07 for n in range(8, 3000))


# ---- runs


def ledgers(path: Path) -> list[int]:
    return [
        Ledger.at(path / "privacy" / LEDGERS, file.name).charged
        for file in sorted((path / "privacy" / LEDGERS).glob("*.jsonl"))
    ]


@pytest.mark.long
def test_a_run_with_private_steps_ends_within_its_budget(
    settings: Settings, rows: Path, tmp_path: Path
) -> None:
    privacy = {"unit": "prompt", "epsilon": 6.0, "delta": 0.02}
    path = run(spec_of(settings, rows, privacy=privacy), tmp_path / "run").path
    metrics = RunDirectory(path).read_rows("metrics.jsonl")
    spent = [row["epsilon_units"] for row in metrics]
    assert spent == sorted(spent)
    assert 5.9 < spent[-1] <= 6.0
    assert ledgers(path) == [6, 6, 6], "two steps in each of three rounds"
    assert not (path / "privacy/.secret").exists()
    # nothing that is measured on raw batches
    assert not {"loss", "rewards/accuracies", "num_pairs"} & metrics[0].keys()
    assert "grad_norm" in metrics[0]


@pytest.mark.long
def test_a_client_that_was_charged_twice_ends_the_run_at_its_budget(
    settings: Settings, rows: Path, tmp_path: Path
) -> None:
    privacy = {"unit": "example", "epsilon": 6.0, "delta": 0.02}
    spec = spec_of(settings, rows, privacy=privacy)
    leave(spec, tmp_path / "run", 2)
    ledger = Ledger.at(tmp_path / "run/privacy" / LEDGERS, ledger_file("client-1"))
    kind = ledger.entries[0]["noise_multiplier"], ledger.entries[0]["sampling_probability"]
    ledger.charge(0, 1, "another processor's", kind, 2)
    done = len(RunDirectory(tmp_path / "run").read_rows("metrics.jsonl"))
    path = resume(tmp_path / "run").path
    assert len(RunDirectory(path).read_rows("metrics.jsonl")) == done < 3
    assert RunDirectory(path).done
    assert RunDirectory(path).read_rows("evaluation.jsonl")[-1]["ended"] == "spent"


@pytest.mark.long
def test_private_steps_that_were_left_end_with_the_same_bits_for_nothing(
    settings: Settings, rows: Path, tmp_path: Path
) -> None:
    spec = spec_of(settings, rows, federation={"clients_per_round": 2})
    leave(spec, tmp_path / "broken", 3)
    folder = tmp_path / "broken"
    before = ledgers(folder)
    key = (folder / "privacy/.secret").read_bytes()
    leave(spec, tmp_path / "whole", 2)
    whole = tmp_path / "whole"
    for file in (whole / "privacy" / LEDGERS).glob("*"):
        file.unlink()
    (whole / "privacy/.secret").write_bytes(key)
    (whole / "metrics.jsonl").unlink()  # as if it had not begun: its rows would miss the ledgers
    for checkpoint in (whole / "checkpoints").glob("round-*"):
        for inner in sorted(checkpoint.rglob("*"), reverse=True):
            inner.unlink() if inner.is_file() else inner.rmdir()
        checkpoint.rmdir()
    resume(whole)
    resume(folder)
    one, other = (
        trees.load(path / "adapter/adapter_model.safetensors") for path in (whole, folder)
    )
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert ledgers(folder) == ledgers(whole)
    assert sum(ledgers(folder)) >= sum(before)


def test_a_ledger_that_says_less_than_was_done_ends_the_run(
    settings: Settings, rows: Path, tmp_path: Path
) -> None:
    leave(spec_of(settings, rows), tmp_path / "run", 3)
    for file in (tmp_path / "run/privacy" / LEDGERS).glob("*"):
        file.unlink()
    with pytest.raises(UserError, match="its ledgers say less than what has been done"):
        resume(tmp_path / "run")


@pytest.mark.long
def test_both_promises_are_kept_side_by_side(
    settings: Settings, rows: Path, tmp_path: Path
) -> None:
    both = [
        {"unit": "client", "noise_multiplier": 2.0, "delta": 0.1},
        {"unit": "example", "noise_multiplier": 1.5, "delta": 0.02},
    ]
    changes: dict[str, Any] = {
        "federation": {"weighting": "equal"},
        "algorithm": {**settings["algorithm"], "aggregate": {"name": "frozen-a"}},
    }
    spec = spec_of(settings, rows, privacy=both, **changes)
    path = run(spec, tmp_path / "run").path
    last = RunDirectory(path).read_rows("metrics.jsonl")[-1]
    assert last["epsilon"] > 0
    assert last["epsilon_units"] > 0
    for wrong in ([both[0]], [both[0], both[0]], [*both, both[1]]):
        with pytest.raises(UserError):
            spec_of(settings, rows, privacy=wrong, **changes)


def test_a_client_takes_part_no_oftener_than_it_may(
    settings: Settings, rows: Path, tmp_path: Path
) -> None:
    federation = {"max_participations": 2, "clients_per_round": 1}
    spec = spec_of(settings, rows, federation=federation, rounds=9)
    path = run(spec, tmp_path / "run").path
    assert ledgers(path) == [4, 4, 4]
    rounds = RunDirectory(path).read_rows("metrics.jsonl")
    assert len(rounds) == 6, "nobody is left after six"
    assert RunDirectory(path).done


DIFFERENT = {
    "fedsa-lora": {},
    "ffa-lora": {},
    "fedopt": {},
    "fedper": {"head": "low-rank"},
    "fedpdpo": {"parts": {"head": "low-rank", "head_rank": 2, "bottleneck": 2}},
    "decpdpo": {"parts": {"head": "low-rank", "head_rank": 2, "bottleneck": 2}},
}
STEPS = [
    "feddpo",
    "fedprox",
    "fedopt",
    "ffa-lora",
    "ditto",
    "fedpdpo",
    "fedper",
    "feddpa",
    "fedsa-lora",
    "scaffold",
    "feddpo-stale",
    "fedbuff",
    "fed-ef",
    "decdpo",
    "choco",
    "decpdpo",
    "decdpo-stale",
    "gradient-tracking",
    "firm",
    "scalarized",
]


def test_every_algorithm_runs_with_each_unit_or_is_refused_by_its_reason() -> None:
    shared = {"fsmgda", "fedcmoo", "clustered"}  # share more than means of changes, or choose
    gossip = {"decdpo", "choco", "decpdpo", "decdpo-stale", "gradient-tracking"}
    local = {"alone", "pooled"}
    for kind in config.kinds(AnyAlgorithm):
        algorithm = kind()
        assert (algorithm.sums > 0) == (algorithm.name not in shared | gossip | local)
        assert algorithm.sends_local_steps == (algorithm.name not in shared | local)
        if algorithm.sends_local_steps and algorithm.name != "pluralllm":
            assert algorithm.name in STEPS


OFTEN = {"fedpdpo", "scaffold", "decdpo", "scalarized"}  # one of each kind; the others are slow


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in OFTEN else SLOW) for name in STEPS]
)
@pytest.mark.long
def test_every_algorithm_that_may_takes_private_steps(
    name: str, settings: Settings, rows: Path, tmp_path: Path
) -> None:
    algorithm = {"name": name, "local": settings["algorithm"]["local"], **DIFFERENT.get(name, {})}
    spec = spec_of(settings, rows, algorithm=algorithm, rounds=2)
    path = run(spec, tmp_path / "run").path
    spent = [row["epsilon_units"] for row in RunDirectory(path).read_rows("metrics.jsonl")]
    assert 0 < spent[0] < spent[1]
    assert ledgers(path) == [4, 4, 4]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"algorithm": {"name": "clustered"}}, "clustered sends more than what comes of private"),
        ({"algorithm": {"name": "fedcmoo"}}, "fedcmoo sends more than what comes of private"),
        ({"algorithm": {"name": "fsmgda"}}, "fsmgda sends more than what comes of private"),
        ({"algorithm": {"name": "feddpo", "local": {"num_iterations": 2}}}, "num_iterations"),
        ({"algorithm": {"name": "feddpo", "local": {"max_tokens_per_batch": 99}}}, "max_tokens"),
        ({"task": {"name": "feedback"}}, "the task feedback cannot tell one example"),
        ({"diagnostics": ["disagreement"]}, "sums without noise"),
        ({"baselines": ["pooled"]}, "pooled would be published without a promise"),
        (
            {"privacy": {"unit": "question", "epsilon": 1}},
            "the task preference cannot tell one question",
        ),
        (
            {"privacy": {"unit": "example", "epsilon": 1, "clip": {"name": "quantile"}}},
            "a quantile is of clients' changes",
        ),
        (
            {"privacy": {"unit": "example", "epsilon": 1, "against": "model-users"}},
            "towards everybody",
        ),
        ({"privacy": {"unit": "pair", "epsilon": 1}}, "privacy.unit"),
    ],
)
def test_what_private_steps_do_not_cover_is_refused(
    changes: dict[str, Any], message: str, settings: Settings, rows: Path
) -> None:
    with pytest.raises(UserError, match=message):
        spec_of(settings, rows, **changes)


def said(spec: Experiment, path: Path) -> str:
    first = next(events(spec, new_directory(spec, path)))
    return first.note


def test_what_joins_without_noise_is_said(settings: Settings, rows: Path, tmp_path: Path) -> None:
    local = settings["algorithm"]["local"]
    federation = {"newcomers": 1}
    notes = {
        name: said(
            spec_of(
                settings, rows, algorithm={"name": name, "local": local}, federation=federation
            ),
            tmp_path / name,
        )
        for name in ("feddpo", "fedsa-lora")
    }
    assert JOINING in notes["fedsa-lora"]
    assert JOINING not in notes["feddpo"], "nothing is fitted by who joins"
    assert JOINING not in said(spec_of(settings, rows), tmp_path / "nobody")


def test_advice_is_of_what_is_not_so_already(
    settings: Settings, rows: Path, tmp_path: Path
) -> None:
    privacy = {"unit": "example", "noise_multiplier": 500.0, "delta": 0.02}
    spec = spec_of(settings, rows, privacy=privacy)
    assert "take aggregate: frozen-a, a smaller rank, fewer rounds" in said(spec, tmp_path / "a")
    task = {**settings["task"], "model": {**settings["task"]["model"], "lora_r": 1}}
    frozen = replace(spec.algorithm, aggregate=FrozenA())  # type: ignore[type-var]
    spec = replace(spec_of(settings, rows, privacy=privacy, task=task), algorithm=frozen)
    assert "through that: take fewer rounds or more rows" in said(spec, tmp_path / "b")


def test_a_delta_that_would_publish_an_example_is_refused(settings: Settings, rows: Path) -> None:
    privacy = {"unit": "example", "epsilon": 1, "delta": 0.2}
    with pytest.raises(UserError, match=r"0.2 is more than one over the \d+ units of client 0"):
        run(spec_of(settings, rows, privacy=privacy))


@pytest.mark.long
def test_objectives_on_pairs_cost_one_query(settings: Settings, rows: Path, tmp_path: Path) -> None:
    task = {
        **settings["task"],
        "objective_column": "kind",
        "objective_names": ["first", "second"],
    }
    algorithm = {"name": "firm", "local": settings["algorithm"]["local"]}
    path = run(spec_of(settings, rows, task=task, algorithm=algorithm), tmp_path / "run").path
    assert ledgers(path) == [6, 6, 6]
    row = RunDirectory(path).read_rows("metrics.jsonl")[-1]
    assert row["weights/first"] + row["weights/second"] == pytest.approx(1)


@pytest.mark.long
def test_prompts_whose_answers_are_drawn_are_units(
    settings: Settings, rows: Path, tmp_path: Path
) -> None:
    task = {
        "name": "dialogue",
        "model": settings["task"]["model"],
        "rewards": {
            "brief": {"name": "length", "target": 2},
            "watery": {"name": "pattern", "pattern": "river|lake|sea"},
        },
        "estimator": {"name": "rloo"},
        "num_generations": 2,
        "sampling": {"max_completion_length": 6},
        "evaluation_prompts": 2,
    }
    algorithm = {"name": "firm", "local": {"steps": 2, "batch_size": 3, "learning_rate": 0.01}}
    privacy = {"unit": "prompt", "noise_multiplier": 1.5, "delta": 0.02}
    spec = spec_of(settings, rows, task=task, algorithm=algorithm, privacy=privacy, rounds=2)
    path = run(spec, tmp_path / "run").path
    assert ledgers(path) == [4, 4, 4]
    row = RunDirectory(path).read_rows("metrics.jsonl")[-1]
    assert "rewards/brief" not in row, "rewards of raw batches are not told"
    assert row["weights/brief"] + row["weights/watery"] == pytest.approx(1)

    work, shards, theta = at_work(spec)
    assert work.units(shards[0], "prompt") == list(range(len(shards[0])))
    # of a prompt that two have written one stands, and the other's absence would change whose it is
    with pytest.raises(UserError, match="the task dialogue cannot tell one column from another"):
        spec_of(
            settings,
            rows,
            task=task,
            algorithm=algorithm,
            privacy={**privacy, "unit": {"column": "annotator"}},
        )
    names = sorted(theta)
    first, second = work.gradients_apart(theta, theta, shards[0], [[0], [1, 2]], 3, names, DRAWS)
    assert list(first.objectives) == [0, 1]
    assert all(len(first.gradients[name]) == 2 for name in names)
    # whoever else is in the batch, a unit's answers are those that it has alone
    (alone,) = work.gradients_apart(theta, theta, shards[0], [[1, 2]], 3, names, DRAWS)
    assert all(torch.equal(alone.gradients[name], second.gradients[name]) for name in names)
    other = {**task, "estimator": {"name": "ppo"}}
    with pytest.raises(UserError, match="critics are trained on raw rewards"):
        spec_of(settings, rows, task=other, algorithm=algorithm, privacy=privacy)


def test_questions_of_a_predictor_are_units_of_disjoint_tasks(tiny: Path, tmp_path: Path) -> None:
    questions = [
        {
            "question": f"How is it with matter {number}?",
            "options": ["often", "never"],
            "selections": {"north": [0.3 + number / 60, 0.7 - number / 60], "south": [0.5, 0.5]},
        }
        for number in range(24)
    ]
    file = write_rows(tmp_path / "survey.jsonl", questions)
    content = {
        "data": {"name": "opinions", "path": str(file)},
        "partition": {"name": "natural", "column": "group"},
        "task": {
            "name": "opinion",
            "model": {"path": str(tiny), "dtype": "float32"},
            "predictor": {"width": 16, "layers": 1, "heads": 2, "feedforward": 16},
            "context_questions": [2, 4],
            "target_questions": [2, 4],
            "evaluation_context": 4,
        },
        "algorithm": {"name": "pluralllm", "local": {"steps": 2, "batch_size": 2}},
        "rounds": 2,
        "workers": 1,
        "privacy": {"unit": "question", "noise_multiplier": 1.0, "delta": 0.02},
    }
    spec = config.parse(Experiment, content, "test")
    path = run(spec, tmp_path / "run").path
    assert ledgers(path) == [4, 4]
    task, shards, theta = at_work(spec)
    shard = task.prepare(shards[0], tmp_path / "cache")
    assert task.pieces_of_unit == 2, (
        "a question that is there changes a task's gradient for another"
    )
    chance, (expected,) = task.private_batch(shard, 2)
    assert expected == 2
    assert chance == chance_of(len(shard), 12)
    names = sorted(theta)
    units = [[i] for i in range(len(shard))]
    parts = list(task.gradients_apart(theta, theta, shard, units, 3, names, DRAWS))
    assert 1 < len(parts) <= 3
    # a question that is not there changes the gradient of its task alone
    fewer = list(task.gradients_apart(theta, theta, shard, units[1:], 3, names, DRAWS))
    same = [
        any(all(torch.equal(one.gradients[n], two.gradients[n]) for n in names) for two in fewer)
        for one in parts
    ]
    assert same.count(False) == 1
    wrong = {**content, "privacy": {"unit": "example", "noise_multiplier": 1.0}}
    with pytest.raises(UserError, match="cannot tell one example from another"):
        config.parse(Experiment, wrong, "test")


# ---- the audit


@pytest.mark.parametrize("mutant", ["", "no clip", "too little noise"])
@pytest.mark.long
def test_the_audit_of_pairs_stays_below_epsilon_and_convicts_a_mistake(
    mutant: str,
    settings: Settings,
    rows: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    local = {"steps": 2, "batch_size": 200, "learning_rate": 0.01}
    privacy = {
        "unit": "example",
        "epsilon": 2.0,
        "delta": 1e-5,
        "clip": {"name": "fixed", "norm": 0.1},
    }
    algorithm = {"name": "feddpo", "local": local, "aggregate": {"name": "frozen-a"}}
    spec = spec_of(settings, rows, privacy=privacy, algorithm=algorithm, rounds=2)
    if mutant == "no clip":

        def unclipped(total: Tensor, part: Apart, names: Sequence[str], clip: float) -> None:
            add_clipped(total, part, names, 1e9)

        monkeypatch.setattr(private_steps, "add_clipped", unclipped)
        monkeypatch.setattr(auditing, "add_clipped", unclipped)
    if mutant == "too little noise":
        honest = private_steps._sampler
        monkeypatch.setattr(
            private_steps,
            "_sampler",
            lambda clip, noise, numbers: honest(clip, noise / 14, numbers),
        )
    (found,) = auditing.audit(spec, 100)
    assert found.epsilon == pytest.approx(2.0, rel=0.01)
    assert found.highest > found.epsilon
    if mutant:
        assert not found.holds
    else:
        assert found.bound.epsilon < found.epsilon / 2


def test_a_config_is_audited_from_the_command_line(
    settings: Settings, rows: Path, tmp_path: Path
) -> None:
    both = [
        {"unit": "client", "epsilon": 2.0, "delta": 1e-5},
        {"unit": "example", "epsilon": 2.0, "delta": 1e-5},
    ]
    local = {"steps": 1, "batch_size": 8, "learning_rate": 0.01}
    algorithm = {"name": "feddpo", "local": local, "aggregate": {"name": "frozen-a"}}
    changes = {"algorithm": algorithm, "federation": {"weighting": "equal"}, "rounds": 1}
    spec = spec_of(settings, rows, privacy=both, **changes)
    (tmp_path / "spec.yaml").write_text(config.to_yaml(spec))
    arguments = ["audit", str(tmp_path / "spec.yaml"), "--canaries", "40"]
    said = CliRunner().invoke(cli.app, arguments)
    assert said.exit_code == 0, said.output
    assert said.output.count("within the promise") == 2
    plain = replace(spec, privacy=None)
    with pytest.raises(UserError, match="no promise to audit"):
        next(auditing.audit(plain))


def test_what_is_done_again_with_another_outcome_is_refused_beyond_the_budget(
    settings: Settings, rows: Path, tmp_path: Path
) -> None:
    task, shards, theta = at_work(spec_of(settings, rows))
    first = steps_of(tmp_path)
    gradient(task, shards[0], theta, first)
    first.settle()
    again = steps_of(tmp_path, fits=lambda steps: False)
    gradient(task, shards[0], theta, again)
    again.settle()  # the same is free, whatever the budget
    other = steps_of(tmp_path, fits=lambda steps: False)
    gradient(task, shards[0], {n: t + 0.1 for n, t in theta.items()}, other)
    with pytest.raises(UserError, match="would be charged beyond the budget"):
        other.settle()
    assert Ledger.at(tmp_path).charged == 1
    # two noisy sums of one batch are one with less noise
    more = Ledger.at(tmp_path).with_one(0, 1, (1.0, 0.5))
    assert [noise for noise, _ in more.events] == [pytest.approx(2**-0.5)]
    assert list(more.events.values()) == [1]
    assert more.charged == 2


def test_jobs_at_the_same_time_keep_a_sites_limit(
    settings: Settings, rows: Path, tmp_path: Path
) -> None:
    task, shards, theta = at_work(spec_of(settings, rows))
    guarantee = Guarantee(1.0, 0.5, 1e-2)
    limit = 1.2 * epsilon_of(Counter({guarantee.kind: 1}), guarantee.delta)

    def steps(job: str) -> PrivateSteps:
        folder = tmp_path / job / "privacy"
        examples = PrivateExamples(
            *(Secret(KEY), folder, {0: "a"}, {0: guarantee}, "example", 1.0, 8, None, 1, 1)
        )
        promise = SitePrivacy(folder, {0: "a"}, None, 0.0, examples, {"unit": limit}, tmp_path)
        made = promise.steps(0, 0, 1)
        assert made is not None
        return made

    first, second = map(steps, ("one", "two"))
    for one in (first, second):
        gradient(task, shards[0], theta, one)
    first.settle()
    with pytest.raises(UserError, match="would be charged beyond the budget"):
        second.settle()  # begun before the first was charged
    files = (tmp_path / job / "privacy" / LEDGERS for job in ("one", "two"))
    assert [Ledger.at(folder, ledger_file("a")).charged for folder in files] == [1, 0]
