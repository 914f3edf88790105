"""Trees, seeds, summaries, the channel, cohorts and schedules: closed forms and laws."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from fedpref.channel import Chain, Sender, Stage
from fedpref.channel.compression import alike
from fedpref.engines.engine import weighted_report
from fedpref.errors import UserError
from fedpref.federation.local_training import LocalTraining, rate
from fedpref.federation.participation import Participation, draw
from fedpref.numerics import seeds, trees
from fedpref.numerics.metrics import (
    ACCURACY,
    HEADLINES,
    REWARD,
    low_is_good,
    of_objectives,
    over_clients,
    standard_error,
)
from fedpref.numerics.min_norm import require_solver
from fedpref.numerics.trees import Tree


def tree(seed: int) -> Tree:
    draw = torch.Generator().manual_seed(seed)
    return {"a": torch.randn(3, 2, generator=draw), "b.c": torch.randn(5, generator=draw)}


def test_tree_arithmetic_is_that_of_vectors(tmp_path: Path) -> None:
    a, b = tree(0), tree(1)
    for name in a:
        torch.testing.assert_close(trees.subtract(trees.add(a, b), b)[name], a[name])
        torch.testing.assert_close(trees.total([a, b, a])[name], 2 * a[name] + b[name])
        torch.testing.assert_close(trees.scale(a, -0.5)[name], -a[name] / 2)
    flat = torch.cat([t.flatten() for t in a.values()])
    assert trees.norm(a) == pytest.approx(flat.norm().item())
    assert trees.norm({}) == 0.0
    assert trees.size(a) == 4 * 11


def test_trees_of_other_names_or_shapes_do_not_add() -> None:
    with pytest.raises(ValueError, match="differ in names"):
        trees.add(tree(0), {"a": torch.zeros(3, 2)})
    for one in (torch.zeros(1), torch.tensor(0.0), torch.zeros(2, 1)):
        with pytest.raises(ValueError, match="differ in 'a'"):
            trees.add({"a": torch.zeros(2)}, {"a": one})


def test_of_a_sparse_tree_the_largest_entries_stay() -> None:
    x = torch.tensor([[1.0, -5.0, 0.5], [3.0, 0.0, -2.0]])
    assert trees.largest(x, 0.34).tolist() == [1, 3, 5]
    found = trees.sparse({"a": x}, 0.3)["a"]
    assert found.tolist() == [[0.0, -5.0, 0.0], [3.0, 0.0, 0.0]]


def test_a_headline_is_written_in_its_unit() -> None:
    headline = HEADLINES[ACCURACY]
    assert (headline.text(0.625), headline.text(0.01, "+"), headline.text(math.nan)) == (
        "62.5",
        "+1.0",
        "",
    )


def test_no_interval_of_a_share_leaves_0_to_100() -> None:
    share, reward = HEADLINES[ACCURACY], HEADLINES[REWARD]
    assert share.within(-4.0, 104.0) == (0.0, 100.0)
    assert share.within(40.0, 60.0) == (40.0, 60.0)
    assert reward.within(-4.0, 104.0) == (-4.0, 104.0)
    assert all(math.isnan(end) for end in share.within(math.nan, math.nan))


def test_a_saved_tree_loads_to_the_bit_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    written = tree(2) | {"half": torch.randn(4).bfloat16(), "view": torch.randn(4, 4).T}
    trees.save(written, tmp_path / "tree.safetensors")
    read = trees.load(tmp_path / "tree.safetensors")
    assert read.keys() == written.keys()
    assert all(torch.equal(read[name], written[name]) for name in written)
    assert [path.name for path in tmp_path.iterdir()] == ["tree.safetensors"]


def test_every_part_of_an_address_changes_the_draw() -> None:
    addresses = [
        seeds.seed(0, "work"),
        seeds.seed(1, "work"),
        seeds.seed(0, "cohort"),
        seeds.seed(0, "work", round=1),
        seeds.seed(0, "work", call=1),
        seeds.seed(0, "work", client=1),
    ]
    assert len(set(addresses)) == len(addresses)
    assert all(0 <= address < 2**63 for address in addresses)
    first, again = (torch.rand(4, generator=seeds.generator(3, "x", round=2)) for _ in range(2))
    assert torch.equal(first, again)


def test_the_worst_decile_is_at_least_a_tenth_of_the_clients() -> None:
    values = {str(i): float(i) for i in range(12)}
    summary = over_clients(values, dict.fromkeys(values, 1))
    assert summary["worst_decile"] == 0.5, "two of twelve, not one"
    down = over_clients(values, dict.fromkeys(values, 1), low_is_good=True)
    assert (down["worst"], down["worst_decile"]) == (11.0, 10.5)


def test_summaries_over_clients_have_their_closed_forms() -> None:
    values, counts = {"a": 1.0, "b": 0.5, "c": 0.0}, {"a": 10, "b": 30, "c": 10}
    summary = over_clients(values, counts)
    fairness = {"jain": 2.25 / (3 * 1.25), "cov": math.sqrt(1 / 6) / 0.5, "gap": 1.0}
    fairness |= {"fairness": 1 / (1 + fairness["cov"]), "std": 0.5}
    assert summary == pytest.approx(
        {"mean": 0.5, "weighted_mean": 0.5, "worst": 0.0, "worst_decile": 0.0, **fairness}
    )
    assert over_clients({"a": 0.7, "b": 0.7}, {"a": 1, "b": 9})["jain"] == pytest.approx(1.0)
    assert over_clients({"a": 0.0}, {"a": 1})["jain"] == 1.0
    losses = over_clients({"a": 0.1, "b": 9.0}, {"a": 1, "b": 1}, low_is_good=True)
    assert (losses["worst"], losses["worst_decile"]) == (9.0, 9.0)
    assert "jain" not in over_clients({"a": -1.0, "b": 1.0}, {"a": 1, "b": 1})
    many = {str(i): float(i) for i in range(20)}
    assert over_clients(many, dict.fromkeys(many, 1))["worst_decile"] == pytest.approx(0.5)


def test_the_standard_error_of_equal_clients_is_binomial() -> None:
    names = "abcd"
    error = standard_error(dict.fromkeys(names, 0.6), dict.fromkeys(names, 25))
    assert error == pytest.approx(math.sqrt(16 / 27 * 11 / 27 / 100))
    assert error == pytest.approx(math.sqrt(0.6 * 0.4 / 100), rel=0.01)
    assert standard_error({"a": 1.0}, {"a": 8}) == pytest.approx(math.sqrt(0.9 * 0.1 / 8)), (
        "nobody is certain of eight pairs"
    )


def test_the_empty_chain_is_exact() -> None:
    message = tree(3)
    sender = Sender(0, 0, seeds.generator(0, "channel"))
    assert Chain().encode(message, sender) is message
    assert Chain().decode(message, 3) is message


def test_stages_encode_left_to_right_and_decode_right_to_left() -> None:
    def stage(name: str, factor: float, shift: float) -> Stage:
        def encode(message: Tree, sender: Sender) -> Tree:
            return {k: v * factor + shift for k, v in message.items()}

        def decode(total: Tree, count: int) -> Tree:
            return {k: (v - count * shift) / factor for k, v in total.items()}

        return Stage(name, encode, decode, gives=frozenset({name}))

    chain = Chain((stage("double", 2.0, 1.0), stage("third", 1 / 3, -4.0)))
    sent = [tree(i) for i in range(3)]
    messages = [
        chain.encode(message, Sender(i, 0, seeds.generator(0, "channel")))
        for i, message in enumerate(sent)
    ]
    torch.testing.assert_close(messages[0]["a"], (2 * sent[0]["a"] + 1) / 3 - 4)
    received = chain.decode(trees.total(messages), 3)
    for name, value in trees.total(sent).items():
        torch.testing.assert_close(received[name], value, rtol=1e-4, atol=1e-5)


def test_a_stage_without_what_it_needs_is_refused() -> None:
    noise = Stage("noise", lambda m, s: m, lambda t, n: t, needs=frozenset({"bounded"}))
    clip = Stage("clip", lambda m, s: m, lambda t, n: t, gives=frozenset({"bounded"}))
    Chain((clip, noise))
    for stages in ((noise,), (noise, clip)):
        with pytest.raises(ValueError, match="'noise' needs"):
            Chain(stages)


def test_cohorts_are_uniform_without_replacement_and_ordered() -> None:
    weights = [1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 1.0]  # of clients 0, 2, 3, 7 and 9
    seen = dict.fromkeys((0, 2, 3, 7, 9), 0)
    for round in range(600):
        cohort = draw(weights, 2, seeds.generator(0, "cohort", round=round))
        assert len(set(cohort)) == 2
        assert list(cohort) == sorted(cohort)
        for client in cohort:
            seen[client] += 1
    assert all(abs(count - 240) < 4 * math.sqrt(600 * 0.4 * 0.6) for count in seen.values())
    assert draw(weights, None, seeds.generator(0, "cohort")) == tuple(seen)
    assert draw(weights, 9, seeds.generator(0, "cohort")) == tuple(seen)


def test_examples_are_not_counted_twice() -> None:
    twice = Participation(sampling="examples")  # as older runs have it, which are still read
    with pytest.raises(UserError, match="count a client's examples twice"):
        twice.check()
    Participation(sampling="examples", weighting="equal").check()


@pytest.mark.parametrize("metric", ["loss", "loss/first", "error", "calibration_error", "kl"])
def test_the_worst_client_of_a_metric_where_low_is_good_is_the_highest(metric: str) -> None:
    values = {"a": 0.01, "b": 0.3}
    summary = over_clients(values, {"a": 1, "b": 1}, low_is_good=low_is_good(metric))
    assert summary["worst"] == summary["worst_decile"] == 0.3
    assert not low_is_good("rewards/accuracies")


def test_clients_are_drawn_by_their_examples_or_by_given_weights() -> None:
    sizes = {"a": 10, "b": 30, "c": 0, "d": 60}
    by_examples = Participation(clients_per_round=1, sampling="examples", weighting="equal")
    assert by_examples.weights(sizes, 0) == [10.0, 30.0, 0.0, 60.0]
    drawn = [by_examples.cohort([10.0, 30.0, 0.0, 60.0], 0, round)[0][0] for round in range(600)]
    for client, share in ((0, 0.1), (1, 0.3), (3, 0.6)):
        assert abs(drawn.count(client) - 600 * share) < 4 * math.sqrt(600 * share * (1 - share))
    assert Participation().weights(sizes, 0) == [1.0, 1.0, 0.0, 1.0]
    given = Participation(
        sampling="weighted", sampling_weights={"a": 1.0, "b": 0.0, "c": 5.0, "d": 2.5}
    )
    assert given.weights(sizes, 0) == [1.0, 0.0, 0.0, 2.5]


def test_everybody_takes_part_where_nothing_says_otherwise() -> None:
    assert Participation().takes_everybody
    for settings in ({"clients_per_round": 3}, {"deadline": 1.0}, {"newcomers": 1}):
        assert not Participation(**settings).takes_everybody  # type: ignore[arg-type]


def test_tensors_are_selected_by_name_or_by_what_follows_a_mark() -> None:
    tree = {name: torch.zeros(1) for name in ("a", "m/a", "m/b", "m/b/a")}
    assert trees.select(tree, ["a", "z"]).keys() == {"a"}
    assert trees.select(tree, ["a", "b"], "/").keys() == {"a", "m/a", "m/b"}


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"sampling": "weighted", "sampling_weights": {"a": 1.0, "x": 1.0}}, r"\['b', 'x'\] are"),
        ({"sampling": "weighted", "sampling_weights": {"a": 1.0}}, r"\['b'\] is either"),
        ({"sampling_weights": {"a": 1.0, "b": 1.0}}, "sampling is uniform"),
        ({"sampling": "weighted", "sampling_weights": {"a": 0.0, "b": 0.0}}, "above zero"),
    ],
)
def test_sampling_weights_that_do_not_fit_are_refused(
    settings: dict[str, object], complaint: str
) -> None:
    with pytest.raises(UserError, match=complaint):
        Participation(**settings).weights({"a": 3, "b": 3}, 0)  # type: ignore[arg-type]


def test_stragglers_are_left_out_after_the_deadline_and_counted() -> None:
    weights = [1.0] * 40
    rounds = [
        Participation(deadline=1.5, speed_spread=0.6).cohort(weights, 0, round)
        for round in range(100)
    ]
    assert all(len(cohort) + late == 40 for cohort, late in rounds)
    share = sum(late for _, late in rounds) / 4000
    expected = 0.5 * math.erfc(math.log(1.5) / 0.6 / math.sqrt(2))  # of log-normal times
    assert abs(share - expected) < 0.08  # forty clients keep half of their luck through the run
    absences = [sum(client not in cohort for cohort, _ in rounds) for client in range(40)]
    assert max(absences) > 50 > 10 > min(absences)  # the slow ones are slow again
    only, late = Participation(deadline=1e-9).cohort(weights, 0, 0)
    assert (len(only), late) == (1, 39)
    assert Participation().cohort(weights, 0, 0) == (tuple(range(40)), 0)


def test_reports_are_weighted_means_and_counts_are_sums() -> None:
    reports = {0: {"loss": 1.0, "num_pairs": 4.0}, 3: {"loss": 4.0, "num_pairs": 2.0}}
    assert weighted_report(reports, {0: 2.0, 3: 1.0}) == pytest.approx(
        {"loss": 2.0, "num_pairs": 6.0}
    )
    # who tells nothing is not taken for a zero
    reports[3] = {"age": 2.0}
    assert weighted_report(reports, {0: 2.0, 3: 1.0}) == {"loss": 1.0, "num_pairs": 4.0, "age": 2.0}


def test_learning_rates_warm_up_and_decay_over_the_run() -> None:
    flat = LocalTraining(learning_rate=2.0, lr_scheduler_type="constant", warmup_ratio=0.2)
    assert [rate(flat, p) for p in (0.0, 0.1, 0.2, 0.9)] == pytest.approx([0.0, 1.0, 2.0, 2.0])
    line = LocalTraining(learning_rate=2.0, lr_scheduler_type="linear", warmup_ratio=0.0)
    assert [rate(line, p) for p in (0.0, 0.25, 1.0)] == pytest.approx([2.0, 1.5, 0.0])
    wave = LocalTraining(learning_rate=2.0, lr_scheduler_type="cosine", warmup_ratio=0.5)
    assert [rate(wave, p) for p in (0.5, 0.75, 1.0)] == pytest.approx([2.0, 1.0, 0.0])


# ---- what the mathematics says of what it is not given


def test_messages_are_alike_by_names_types_and_shapes() -> None:
    tree = {"a": torch.ones(2, 3)}
    assert alike(tree, {"a": torch.zeros(2, 3)})
    for other in ({"b": torch.ones(2, 3)}, {"a": torch.ones(3, 2)}, {"a": torch.ones(2, 3).half()}):
        assert not alike(tree, other)


def test_rewards_are_shown_with_what_tells_whether_they_were_worth_it() -> None:
    assert of_objectives(["loss", "kl", "reward", "rewards/a", "distinct_1", "other"]) == [
        "rewards/a",
        "kl",
        "distinct_1",
    ]
    assert of_objectives(["loss", "rewards/accuracies", "rewards/accuracies/a"]) == [
        "rewards/accuracies/a"
    ]


def test_a_damaged_file_of_tensors_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "broken").write_bytes(b"no tensors")
    with pytest.raises(UserError, match="this file of tensors cannot be read"):
        trees.load(tmp_path / "broken")


def test_what_few_need_says_how_it_is_had(monkeypatch: pytest.MonkeyPatch) -> None:
    require_solver()
    monkeypatch.setattr("fedpref.errors.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs scipy: pip install 'fedpref\[firm\]'"):
        require_solver()


def test_dropout_draws_from_its_devices_own_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    assert seeds.of_device(torch.device("cpu")) is torch.default_generator
    several = torch.Generator(), torch.Generator()
    monkeypatch.setattr(torch.cuda, "default_generators", several)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert seeds.of_device(torch.device("cuda", 0)) is several[0]
    assert seeds.of_device(torch.device("cuda")) is several[1]


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e200])
def test_a_summary_bears_any_number(value: float) -> None:
    found = over_clients({"a": value, "b": 1.0}, {"a": 1, "b": 1})
    assert math.isfinite(found["mean"]) == math.isfinite(value)
    assert found["gap"] == value - 1 if math.isfinite(value) else math.isnan(found["gap"])


def test_weights_of_clients_are_of_any_size_but_within_reason_of_one_another() -> None:
    sizes = dict.fromkeys("abc", 1)
    huge = Participation(sampling="weighted", sampling_weights=dict.fromkeys("abc", 1e308))
    assert huge.weights(sizes, 0) == [1.0, 1.0, 1.0]
    apart = Participation(sampling="weighted", sampling_weights={"a": 1.0, "b": 1e-300, "c": 0.0})
    with pytest.raises(UserError, match=r"\['b'\] would be drawn less than once"):
        apart.weights(sizes, 0)
