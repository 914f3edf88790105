"""Parts of a client's own: their laws, and FedPDPO, which trains them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import kept_values, make_rows, write_rows
from fedpref import Experiment, UserError, config, run
from fedpref.algorithms import FedPDPO
from fedpref.algorithms.fedpdpo import train
from fedpref.experiments.finished import FinishedRun
from fedpref.federation.aggregation import Factors
from fedpref.federation.local_training import LocalTraining, train_locally
from fedpref.federation.verbs import Client
from fedpref.losses import DPO, Explicit, Hinge
from fedpref.models import head
from fedpref.models.head import token_log_probabilities
from fedpref.models.language import LanguageModel
from fedpref.models.model_settings import Model
from fedpref.models.own_parts import (
    DOWN,
    HEAD,
    HEADS,
    NAMES,
    REWARD,
    UP,
    VOCABULARY_HEAD,
    Parts,
)
from fedpref.models.packed import Row
from fedpref.numerics import seeds, trees
from fedpref.tasks import PreferenceTask

ROWS: list[Row] = [((5, 6, 7), ((8, 9), (10, 11, 12, 13))), ((11,), ((12, 13, 14, 15), (16,)))]
EVERYTHING = [Parts(bottleneck=6), Parts(head="low-rank", head_rank=3, bottleneck=6, adapter=False)]


@pytest.fixture(scope="module")
def model(tiny: Path) -> LanguageModel:
    return LanguageModel(Model(path=str(tiny), dtype="float32"))


def shaken(tree: trees.Tree, seed: int = 0) -> trees.Tree:
    draw = torch.Generator().manual_seed(seed)
    return {name: t + 0.2 * torch.randn(t.shape, generator=draw) for name, t in tree.items()}


# ---- laws of the loss


def test_either_answer_is_preferred_with_probabilities_that_sum_to_one() -> None:
    implicit, explicit = torch.randn(2, 50, dtype=torch.float64)
    law = Explicit(alpha=0.7, gamma=0.0)
    one, other = law(DPO(), implicit, explicit), law(DPO(), -implicit, -explicit)
    torch.testing.assert_close((-one).exp() + (-other).exp(), torch.ones(50, dtype=torch.float64))


def test_without_alpha_it_is_dpo_and_without_beta_a_reward_model() -> None:
    implicit, explicit = torch.randn(2, 20)
    assert torch.equal(
        Explicit(alpha=0.0, gamma=0.0)(DPO(), implicit, explicit), DPO().of_margin(implicit)
    )
    bradley_terry = -torch.nn.functional.logsigmoid(explicit)
    torch.testing.assert_close(
        Explicit(alpha=1.0, gamma=0.0)(DPO(), 0 * implicit, explicit), bradley_terry
    )
    torch.testing.assert_close(
        Explicit(alpha=0.0, gamma=0.5)(Hinge(), 0 * implicit, explicit), 1 + 0.5 * bradley_terry
    )


@pytest.mark.parametrize("stop", [True, False])
def test_the_reward_head_is_a_constant_in_the_sum_unless_asked_otherwise(stop: bool) -> None:
    implicit, explicit = torch.randn(2, 20).unbind(0)
    explicit.requires_grad_()
    Explicit(alpha=2.0, gamma=0.3, stop_gradient=stop)(DPO(), implicit, explicit).sum().backward()
    own = -0.3 * torch.sigmoid(-explicit.detach())
    rest = -2.0 * torch.sigmoid(-(implicit + 2.0 * explicit.detach()))
    torch.testing.assert_close(explicit.grad, own if stop else own + rest)


# ---- parts in the model


@pytest.mark.parametrize("parts", EVERYTHING, ids=["full head", "low-rank head"])
def test_fresh_parts_change_nothing(parts: Parts, model: LanguageModel) -> None:
    own = model.fresh(parts, seeds.generator(0, "work"))
    adapter = model.init(seeds.generator(0, "init"))
    found, rewards = model.score({**adapter, **own}, ROWS)
    torch.testing.assert_close(found, model.log_probabilities(None, ROWS))
    assert rewards is not None
    assert rewards.tolist() == [0.0] * 4


@pytest.mark.parametrize("parts", EVERYTHING, ids=["full head", "low-rank head"])
@pytest.mark.parametrize("packs", [True, False], ids=["packed", "padded"])
def test_parts_compute_what_their_definition_says(parts: Parts, packs: bool, tiny: Path) -> None:
    model = LanguageModel(Model(path=str(tiny), dtype="float32"))
    model.packs = packs
    own = shaken(model.fresh(parts, seeds.generator(0, "work")))
    backbone = model.model.get_base_model()
    weight = own.get(
        HEAD, model.head.weight + own["head.up"] @ own["head.down"] if "head.up" in own else None
    )
    expected, expected_rewards = [], []
    for prompt, answers in ROWS:
        for answer in answers:
            ids = torch.tensor([[*prompt, *answer]])
            with torch.no_grad(), model.model.disable_adapter():
                hidden = backbone.model(ids).last_hidden_state[0]
            fused = (
                hidden
                + torch.nn.functional.gelu(hidden @ own["bottleneck.down"].T)
                @ own["bottleneck.up"].T
            )
            tokens = torch.log_softmax(fused @ weight.T, -1)[:-1].gather(1, ids[0, 1:, None])
            expected.append(tokens[len(prompt) - 1 :].sum().item())
            expected_rewards.append((fused[-1] @ own[REWARD]).item())
    found, rewards = model.score(own, ROWS)
    assert rewards is not None
    assert found.tolist() == pytest.approx(expected, abs=1e-4)
    assert rewards.tolist() == pytest.approx(expected_rewards, abs=1e-4)


@pytest.mark.parametrize("low_rank", [False, True])
def test_a_trained_head_has_the_gradients_of_a_full_softmax(
    low_rank: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "ROWS", 7)
    monkeypatch.setattr(head, "_logits", lambda device: 7 * 40)
    draw = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randn(*shape, generator=draw) for shape in ((23, 8), (40, 8), (40,))
    )
    down, up = torch.randn(3, 8, generator=draw), torch.randn(40, 3, generator=draw)
    leaves = (hidden, down, up) if low_rank else (hidden, weight)
    for leaf in leaves:
        leaf.requires_grad_()
    targets, upstream = torch.randint(40, (23,), generator=draw), torch.randn(23, generator=draw)
    ours = token_log_probabilities(hidden, weight, bias, targets, (down, up) if low_rank else None)
    logits = hidden @ (weight + up @ down if low_rank else weight).T + bias
    plainly = -torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(ours, plainly)
    for found, expected in zip(
        torch.autograd.grad(ours, leaves, upstream),
        torch.autograd.grad(plainly, leaves, upstream),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ["granite"])
def test_a_model_whose_logits_are_not_its_heads_alone_can_have_no_parts(
    architecture: str, models: Callable[[str], Path]
) -> None:
    with pytest.warns(UserWarning, match="the padded one is used"):
        model = LanguageModel(Model(path=str(models(architecture)), dtype="float32"))
    assert (
        model.fresh(Parts(head=None, bottleneck=0, reward=False, adapter=False), torch.Generator())
        == {}
    )
    with pytest.raises(UserError, match="the vocabulary head's alone"):
        model.fresh(Parts(), torch.Generator())


# ---- the task


def test_a_shift_of_all_rewards_by_the_prompt_changes_neither_loss_nor_gradient(tiny: Path) -> None:
    task = config.parse(
        PreferenceTask, {"model": {"path": str(tiny), "dtype": "float32"}}, "test"
    ).build()
    policy, explicit = torch.randn(2, 5, 2).unbind(0)
    batch: Any = type(
        "Batch",
        (),
        {
            "reference": torch.randn(5, 2),
            "examples": [type("E", (), {"answers": ((1,), (1, 2))})] * 5,
        },
    )
    results = []
    for shift in (torch.zeros(5, 1), torch.randn(5, 1)):
        leaves = policy.clone().requires_grad_(), explicit.clone().requires_grad_()
        loss = task.measure(leaves[0], leaves[1] + shift, batch)["loss_joint"].sum()
        results.append((loss, *torch.autograd.grad(loss, leaves)))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_at_the_start_the_loss_is_ln_2_and_the_two_rewards_are_ranked_apart(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    spec = config.parse(Experiment, settings, "test")
    task = spec.task.build()
    shard = task.prepare(task.encode(spec.clients()[0][0]), tmp_path)
    params = {
        **task.init(seeds.generator(0, "init")),
        **task.parts(Parts(), seeds.generator(0, "work")),
    }
    measured = task.evaluate(params, shard)
    assert measured["loss"] == pytest.approx(math.log(2), abs=1e-4), "DPO's, of the policy"
    # the sum's and the reward head's own
    assert measured["loss_joint"] == pytest.approx(1.2 * math.log(2), abs=1e-4)
    assert measured["rewards/accuracies_explicit"] == 0.5
    moved = task.evaluate({**params, REWARD: torch.randn(params[REWARD].shape)}, shard)
    assert moved["rewards/accuracies_explicit"] != 0.5
    assert moved["rewards/accuracies"] == measured["rewards/accuracies"], "the policy's"
    assert moved["rewards/accuracies_combined"] != measured["rewards/accuracies_combined"]


# ---- the algorithm


def opposed(tmp_path: Path) -> Path:
    """Two clients who judge the same kind of pairs, one the other way round."""
    rows = make_rows([90])
    other = [
        {
            "prompt": row["prompt"],
            "chosen": row["rejected"],
            "rejected": row["chosen"],
            "client": "client-1",
        }
        for row in make_rows([90])
    ]
    return write_rows(tmp_path / "rows.jsonl", [*rows, *other])


def accuracy(settings: dict[str, Any], path: Path, data: Path, algorithm: dict[str, Any]) -> float:
    spec = config.parse(
        Experiment,
        {**settings, "data": {**settings["data"], "path": str(data)}, "algorithm": algorithm},
        "test",
    )
    rows = next(iter(run(spec, path).evaluations.values()))
    return sum(row["rewards/accuracies"] for row in rows.values()) / len(rows)


@pytest.mark.long
def test_opposed_clients_are_at_a_coin_with_one_model_and_apart_with_own_parts(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    data, local = opposed(tmp_path), {"steps": 10, "batch_size": 8, "learning_rate": 0.02}
    shared = accuracy(settings, tmp_path / "a", data, {"name": "feddpo", "local": local})
    personal = accuracy(
        settings, tmp_path / "b", data, {"name": "fedpdpo", "local": local, "head_rate": 1.0}
    )
    assert abs(shared - 0.5) < 0.1
    assert personal > shared + 0.2


@pytest.mark.long
def test_without_parts_it_is_feddpo_to_the_bit(settings: dict[str, Any], tmp_path: Path) -> None:
    local = {"steps": 2, "batch_size": 4, "learning_rate": 0.01}
    none = {"head": None, "bottleneck": 0, "reward": False, "adapter": False}
    specs = [
        config.parse(Experiment, {**settings, "algorithm": algorithm, "seed": 3}, "test")
        for algorithm in (
            {"name": "feddpo", "local": local},
            {"name": "fedpdpo", "local": local, "parts": none},
            {"name": "fedpdpo", "local": local, "parts": none, "phases": "joint"},
        )
    ]
    adapters = [
        trees.load(run(spec, tmp_path / str(i)).path / "adapter" / "adapter_model.safetensors")
        for i, spec in enumerate(specs)
    ]
    for other in adapters[1:]:
        assert all(torch.equal(adapters[0][name], other[name]) for name in adapters[0])


@pytest.mark.parametrize(
    ("freeze", "frozen"), [("heads", HEADS), ("vocabulary-head", VOCABULARY_HEAD)]
)
def test_the_second_phase_leaves_heads_as_the_first_made_them(
    freeze: Any, frozen: frozenset[str], settings: dict[str, Any], tmp_path: Path
) -> None:
    spec = config.parse(Experiment, settings, "test")
    task = spec.task.build()
    shard = task.prepare(task.encode(spec.clients()[0][0]), tmp_path)
    local = LocalTraining(
        steps=5,
        batch_size=4,
        keep_optimizer=True,
        warmup_ratio=0.0,
        sampling_strategy="independent",
    )
    method = FedPDPO(
        local=local, personal_steps=2, freeze=freeze, aggregate=Factors(residual=False)
    )
    adapter, own = (
        task.init(seeds.generator(0, "init")),
        task.parts(Parts(), seeds.generator(0, "work")),
    )

    def client() -> Client:
        return Client(0, task, shard, seeds.generator(0, "train"), 0, 4)

    first, _, _ = train_locally(
        client(), own, replace(local, steps=2), {}, fixed=adapter, rates=method.rates(own)
    )
    delta, after, moments, metrics = train(client(), adapter, own, {}, method)
    assert after.keys() == own.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, after[name]) == (name in frozen), name
    assert any(not torch.equal(first[name], own[name]) for name in frozen & own.keys())
    assert delta.keys() == adapter.keys()
    assert trees.norm(delta) > 1e-4
    assert {name.split("/", 1)[1] for name in moments} == {*adapter, *own}
    assert "personal/loss" in metrics
    assert metrics["num_pairs"] == 5 * 4  # of both phases


def test_a_first_phase_of_too_few_examples_for_metrics_is_counted_nowhere(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    spec = config.parse(Experiment, settings, "test")
    task = spec.task.build()
    shard = task.prepare(task.encode(spec.clients()[0][0]), tmp_path)
    local = LocalTraining(steps=3, batch_size=4, sampling_strategy="independent")
    client = Client(
        0, task, shard, seeds.generator(0, "train"), 0, 4, least_examples=5
    )  # one batch has four
    own = task.parts(Parts(), seeds.generator(0, "work"))
    adapter = task.init(seeds.generator(0, "init"))
    *_, metrics = train(client, adapter, own, {}, FedPDPO(local=local, personal_steps=1))
    assert metrics["num_pairs"] == 2 * 4
    assert not [name for name in metrics if name.startswith("personal/")]


def test_own_parts_learn_at_rates_of_their_own(settings: dict[str, Any], tmp_path: Path) -> None:
    spec = config.parse(Experiment, settings, "test")
    task = spec.task.build()
    shard = task.prepare(task.encode(spec.clients()[0][0]), tmp_path)
    adapter, own = (
        task.init(seeds.generator(0, "init")),
        task.parts(Parts(), seeds.generator(0, "work")),
    )
    local = LocalTraining(
        steps=1, batch_size=4, lr_scheduler_type="constant", warmup_ratio=0.0, learning_rate=0.01
    )
    for phases in ("alternate", "joint"):
        # adapters move in both phases; a first step of AdamW is the rate itself
        steps = 2 if phases == "alternate" else 1
        method = FedPDPO(local=replace(local, steps=steps), phases=phases, adapter_rate=0.3)  # type: ignore[arg-type]
        _, after, _, _ = train(
            Client(0, task, shard, seeds.generator(0, "train"), 0, 4), adapter, own, {}, method
        )
        moved = {name: (after[name] - own[name]).abs().max().item() for name in own}
        assert moved[HEAD] == pytest.approx(0.1 * 0.01, rel=1e-3)
        assert moved[REWARD] == pytest.approx(steps * 0.01, rel=0.05)
        assert moved[UP] == pytest.approx(steps * 0.1 * 0.01, rel=0.05)
        assert max(
            value for name, value in moved.items() if name.startswith("own.")
        ) == pytest.approx(steps * 0.3 * 0.01, rel=0.05)


def test_a_shared_bottleneck_is_averaged_and_nobodys_own(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    from fedpref import load_model

    local = {"steps": 3, "batch_size": 4, "learning_rate": 0.02, "warmup_ratio": 0.0}
    algorithm = {
        "name": "fedpdpo",
        "parts": {"bottleneck": 4},
        "share_bottleneck": True,
        "local": local,
    }
    path = run(
        config.parse(Experiment, {**settings, "algorithm": algorithm}, "test"), tmp_path / "run"
    ).path
    last = path / "checkpoints" / "round-000003"
    assert trees.load(last / "adapter.safetensors").keys() & NAMES == {DOWN, UP}
    assert not {DOWN, UP} & kept_values(path, 3, "own")[0].keys()
    assert trees.norm({UP: trees.load(last / "adapter.safetensors")[UP]}) > 0
    load_model(path / "clients" / "client-0")
    load_model(path / "adapter")


@pytest.mark.parametrize(
    ("algorithm", "task", "message"),
    [
        ({"name": "fedpdpo", "local": {"steps": 1}}, {}, "1 steps leave none for the second phase"),
        (
            {"name": "fedper", "phases": "alternate", "personal_steps": 3, "local": {"steps": 3}},
            {},
            "after 3 of the first",
        ),
        (
            {"name": "fedpdpo", "share_bottleneck": True, "aggregate": "product"},
            {},
            "no product of factors",
        ),
        ({"name": "fedpdpo"}, {"loss": "ipo"}, "defined beside the losses dpo and hinge"),
        ({"name": "fedpdpo"}, {"name": "feedback"}, "an explicit reward is for pairs"),
        ({"name": "fedpdpo"}, {"explicit": {"gamma": 0}}, "nothing would train the reward head"),
        ({"name": "ditto", "aggregate": "product"}, {}, "algorithm.*aggregate"),
    ],
)
def test_what_does_not_fit_together_is_refused_when_it_is_read(
    algorithm: dict[str, Any], task: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        config.parse(Experiment, {"algorithm": algorithm, "task": task}, "test")


@pytest.mark.long
def test_a_clients_folder_loads_as_a_model_that_gives_its_log_probabilities(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    from fedpref import load_model

    for number, algorithm in enumerate(
        (
            {"name": "fedpdpo", "parts": {"bottleneck": 4}},
            {"name": "fedpdpo", "parts": {"head": "low-rank", "head_rank": 2, "bottleneck": 0}},
            {"name": "feddpa"},
        )
    ):
        local = {"steps": 2, "batch_size": 4, "learning_rate": 0.02, "warmup_ratio": 0.0}
        spec = config.parse(
            Experiment,
            {**settings, "algorithm": {**algorithm, "local": local}, "rounds": 2},
            "test",
        )
        path = run(spec, tmp_path / str(number)).path
        state = {**trees.load(path / "checkpoints" / "round-000002" / "adapter.safetensors")}
        own = kept_values(path, 2, "own")[1]
        task = spec.task.build()
        expected = task.language.log_probabilities({**state, **own}, ROWS)
        model = load_model(path / "clients" / "client-1")
        found = []
        for prompt, answers in ROWS:
            for answer in answers:
                ids = torch.tensor([[*prompt, *answer]])
                with torch.no_grad():
                    tokens = torch.log_softmax(model(ids).logits[0, :-1], -1).gather(
                        1, ids[0, 1:, None]
                    )
                found.append(tokens[len(prompt) - 1 :].sum().item())
        assert found == pytest.approx(expected.tolist(), abs=1e-3)
        assert (
            max(
                abs(a - b)
                for a, b in zip(
                    found, task.language.log_probabilities(None, ROWS).tolist(), strict=True
                )
            )
            > 1e-2
        )


@pytest.mark.long
def test_baselines_with_parts_are_what_the_method_is_without_the_others(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    local = settings["algorithm"]["local"]
    parts = {"head": None, "bottleneck": 0, "reward": True, "adapter": True}
    method = {"name": "fedpdpo", "parts": parts, "phases": "joint", "local": local}
    names = ["alone-parts", "feddpo-reward", "reward-head"]
    spec = config.parse(Experiment, {**settings, "algorithm": method, "baselines": names}, "test")
    evaluations = run(spec, tmp_path / "run").evaluations
    assert [*evaluations] == ["fedpdpo", *names]
    only = evaluations["reward-head"].values()
    assert all(row["rewards/accuracies"] == 0.5 for row in only), "its policy is untrained"
    assert any(row["rewards/accuracies_explicit"] != 0.5 for row in only)
    shared = FinishedRun.at(tmp_path / "run").lines["feddpo-reward"]
    own = trees.load(next((shared.path / "clients").glob("*/own_parts.safetensors")))
    assert own.keys() == {REWARD}, "one adapter for all, and a head of each client's own"
    # alone with parts is the method with one client; an own adapter would begin at random
    method = {**method, "parts": {**parts, "adapter": False}}
    one = {**settings, "partition": {"name": "natural", "only": ["client-1"]}, "algorithm": method}
    ours, alone = (
        run(config.parse(Experiment, {**one, **changes}, "test"), tmp_path / name).evaluations
        for name, changes in (("ours", {}), ("alone", {"baselines": ["alone-parts"]}))
    )
    # a mean of one is its own change added again, to the last bits of float32
    (mine,), (theirs,) = ours["fedpdpo"].values(), alone["alone-parts"].values()
    assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    with pytest.raises(UserError, match="baselines: reward-head is about parts of a client's own"):
        config.parse(Experiment, {**settings, "baselines": ["reward-head"]}, "test")
