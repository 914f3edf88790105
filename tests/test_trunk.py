"""What is computed once: states below the adapter, and answers whatever is beside them."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from fedpref import Experiment, config, run
from fedpref.errors import UserError
from fedpref.experiments.run_directory import RunDirectory
from fedpref.models.kept import Kept
from fedpref.models.language import LanguageModel
from fedpref.models.model_settings import Model
from fedpref.models.own_parts import Parts
from fedpref.models.packed import Row, Unscored
from fedpref.models.trunk import SUFFIX
from fedpref.numerics import seeds
from fedpref.runs.cleaning import clean

ROWS: list[Row] = [
    ((5, 6, 7), ((8, 9), (10, 11, 12, 13), (14,))),
    ((11,), ((12, 13, 14, 15), (16,))),
    (tuple(range(20, 45)), ((25, 26, 27),)),
]
DTYPES: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")


def model(path: Path, **settings: Any) -> LanguageModel:
    return LanguageModel(Model(path=str(path), lora_layers_to_transform="last-1", **settings))


def some(language: LanguageModel, size: float = 0.3) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    fresh = language.init(seeds.generator(0, "init"))
    return {name: size * torch.randn(t.shape, generator=draw) for name, t in fresh.items()}


def scored(language: LanguageModel, params: Any, rows: list[Row]) -> tuple[Any, Any]:
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in params.items()}
    sums = language.log_probabilities(leaves, rows)
    sums.square().sum().backward()
    return sums.detach(), {name: tensor.grad for name, tensor in leaves.items()}


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2", "gpt_neox", "mistral", "bloom"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_states_that_are_kept_change_no_bit(
    architecture: str, dtype: Any, models: Callable[..., Path]
) -> None:
    plain, kept = (
        model(models(architecture), dtype=dtype, trunk_states=where) for where in ("none", "memory")
    )
    assert not plain.trunk.works
    assert kept.trunk.works
    params = some(kept)
    expected, slopes = scored(plain, params, ROWS)
    for _ in range(2):  # computed, then kept
        found, gradients = scored(kept, params, ROWS)
        assert torch.equal(found, expected)
        assert all(torch.equal(gradients[name], slope) for name, slope in slopes.items())
    layer = kept.trunk.layers[0]
    calls: list[int] = []
    layer.register_forward_pre_hook(lambda *_: calls.append(1))
    inner = next(module for name, module in layer.named_modules() if name)
    inner.register_forward_pre_hook(lambda *_: calls.append(2))
    # rows of the same answers in another order, with an own part: nothing of the trunk is run
    parts = {**params, "reward.weight": torch.ones(kept.head.in_features)}
    again, rewards = kept.score(parts, [(ROWS[2][0], ROWS[2][1]), (ROWS[0][0], ROWS[0][1][::-1])])
    assert 2 not in calls
    assert rewards is not None
    order = [expected[5], expected[2], expected[1], expected[0]]
    if kept.packs:
        assert torch.equal(again, torch.stack(order))
    else:
        assert torch.allclose(again, torch.stack(order), rtol=1e-2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2", "gpt_neox"])
def test_the_bits_of_a_score_do_not_depend_on_what_is_beside_it(
    architecture: str, dtype: Any, models: Callable[..., Path]
) -> None:
    language = LanguageModel(Model(path=str(models(architecture)), dtype=dtype))
    params = some(language)
    together = language.log_probabilities(params, ROWS)
    alone = [
        language.log_probabilities(params, [(prompt, (answer,))])
        for prompt, answers in ROWS
        for answer in answers
    ]
    assert torch.equal(together, torch.cat(alone))
    for pooling in ("mean", "last"):
        parts = Parts(head=None, bottleneck=4, adapter=False, reward_pooling=pooling)
        own = language.fresh(parts, seeds.generator(0, "parts"))
        own = {n: torch.randn(t.shape, generator=seeds.generator(0, n)) for n, t in own.items()}
        _, rewards = language.score(own, ROWS)
        each = [language.score(own, [(p, (a,))])[1] for p, answers in ROWS for a in answers]
        assert rewards is not None
        assert rewards.tolist() == [float(one) for one in each if one is not None]
    # a fresh adapter is the reference, in whatever batch
    fresh = language.init(seeds.generator(0, "init"))
    assert torch.equal(
        language.log_probabilities(fresh, ROWS[::-1])[-3:],
        language.log_probabilities(None, ROWS)[:3],
    )


def test_the_adapter_of_some_layers_is_pefts(models: Callable[..., Path], tmp_path: Path) -> None:
    language = model(models("llama"), dtype="float32")
    params = some(language)
    assert all(".layers.1." in name for name in params)
    language.export(params, tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(models("llama"), dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    (prompt, answers), *_ = ROWS
    with torch.no_grad():
        logits = loaded(torch.tensor([[*prompt, *answers[1]]])).logits[0].log_softmax(-1)
    tokens = logits[len(prompt) - 1 : -1].gather(1, torch.tensor(answers[1])[:, None])
    assert float(tokens.sum()) == pytest.approx(
        float(language.log_probabilities(params, [(prompt, answers[1:2])])), abs=1e-4
    )


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lora_layers_to_transform": "last-3"}, "which has 2 layers"),
        ({"lora_layers_to_transform": (0, 7)}, "which has 2 layers"),
        ({"lora_target_modules": r".*q_proj"}, "Give names such as q_proj"),
    ],
)
def test_layers_that_are_not_there(
    settings: dict[str, Any], words: str, models: Callable[..., Path]
) -> None:
    with pytest.raises(UserError, match=words):
        LanguageModel(
            Model(path=str(models("llama")), **{"lora_layers_to_transform": (1,), **settings})
        )


def test_layers_by_number_leave_no_trunk_below_the_first(models: Callable[..., Path]) -> None:
    first, last = (
        LanguageModel(Model(path=str(models("llama")), lora_layers_to_transform=(number,)))
        for number in (0, 1)
    )
    assert (len(first.trunk.layers), len(last.trunk.layers)) == (0, 1)
    both = LanguageModel(
        Model(
            path=str(models("llama")),
            lora_target_modules=("q_proj", "embed_tokens"),
            lora_layers_to_transform=None,
        )
    )
    assert not both.trunk.works, "the embeddings are below everything"


def test_no_more_is_kept_than_the_limit_and_a_file_is_its_owners(
    models: Callable[..., Path], tmp_path: Path
) -> None:
    language = model(models("llama"), dtype="float32")
    language.keep_in(tmp_path)
    language.log_probabilities(None, ROWS[:1])
    (file,) = tmp_path.glob(f"*{SUFFIX}")
    assert file.stat().st_mode & 0o077 == 0
    before = file.stat().st_size
    language.states.kept._limit = before
    expected = model(models("llama"), dtype="float32", trunk_states="none")
    assert torch.equal(
        language.log_probabilities(None, ROWS), expected.log_probabilities(None, ROWS)
    )
    assert file.stat().st_size == before
    memory = Kept(limit=10)
    memory.add({b"a": b"1234"})
    memory.add({b"b": b"1234567"})
    assert memory.find([b"a", b"b"]) == {b"a": b"1234"}


def _writes(file: Path, number: int) -> None:
    kept = Kept()
    kept.keep_in(file)
    for i in range(50):
        kept.add({f"{number} {i}".encode(): b"x" * 1000, b"same": b"y"})


def test_processes_share_a_file_and_a_broken_one_costs_nothing(tmp_path: Path) -> None:
    file = tmp_path / "kept.sqlite"
    parent = Kept()
    parent.keep_in(file)
    parent.add({b"first": b"0"})
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_writes, args=(file, n)) for n in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    keys = [f"{n} {i}".encode() for n in range(3) for i in range(50)]
    assert len(parent.find([*keys, b"first", b"same"])) == 152
    broken = tmp_path / "broken.sqlite"
    broken.write_bytes(b"not a database, and long enough to be read as one" * 50)
    kept = Kept()
    kept.keep_in(broken)
    kept.add({b"a": b"1"})
    assert kept.find([b"a"]) == {b"a": b"1"}


def test_answers_that_differ_in_what_is_scored_are_not_one(models: Callable[..., Path]) -> None:
    language = model(models("llama"), dtype="float32")
    whole = language.log_probabilities(None, [((5, 6), ((7, 8, 9),))])
    part = language.log_probabilities(None, [((5, 6), ((7, Unscored(8), 9),))])
    assert float(part) > float(whole)


@pytest.mark.long
def test_a_run_has_the_same_bits_with_and_without_kept_states_and_leaves_none(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    found = {}
    for where in ("file", "memory", "none"):
        content = {
            **settings,
            "task": {
                **settings["task"],
                "model": {
                    **settings["task"]["model"],
                    "lora_layers_to_transform": "last-1",
                    "trunk_states": where,
                },
            },
            "algorithm": {
                **settings["algorithm"],
                "name": "fedpdpo",
                "phases": "joint",
                "parts": {"head": None, "bottleneck": 0, "reward_pooling": "mean"},
            },
        }
        spec = config.parse(Experiment, content, "test")
        outcome = run(spec, tmp_path / where)
        assert not list((tmp_path / where).rglob(f"*{SUFFIX}"))
        found[where] = outcome.evaluations
    assert found["file"] == found["memory"] == found["none"]
    kept = list((tmp_path / "file/cache").iterdir())
    assert kept
    assert clean([tmp_path / "file"]) == 0 or not list((tmp_path / "file/cache").iterdir())
    with pytest.raises(UserError, match="no such folder"):
        clean([tmp_path / "nowhere"])


def test_only_what_was_kept_is_cleaned_and_not_under_a_run_at_work(tmp_path: Path) -> None:
    own = tmp_path / "elsewhere-trunk.sqlite"
    own.write_text("mine")
    for place in ("sweep/cache", "project/src/cache", "run/clients/cache"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "adapter_model.safetensors").write_text("a model")
    kept = tmp_path / "sweep/cache" / f"a{SUFFIX}"
    kept.write_text("states")
    (tmp_path / "sweep/cache" / f"link{SUFFIX}").symlink_to(own)
    at_work = RunDirectory(tmp_path / "sweep/feddpo/seed-0")
    at_work.create({})
    with at_work.alone(), pytest.raises(UserError, match="a process is at work"):
        clean([tmp_path])
    assert kept.exists()
    assert clean([tmp_path]) == len("states")
    assert own.exists()
    assert len(list(tmp_path.rglob("adapter_model.safetensors"))) == 3


def test_a_file_that_is_removed_costs_work_and_nothing_else(tmp_path: Path) -> None:
    kept = Kept(limit=10_000_000)
    kept.keep_in(tmp_path / "kept.sqlite")
    kept.add({b"a": b"1"})
    (tmp_path / "kept.sqlite").unlink()
    assert kept.find([b"a"]) == {}
    kept.add({b"b": b"2"})
    assert kept.find([b"b"]) == {b"b": b"2"}
    other = Kept()
    other.keep_in(tmp_path / "kept.sqlite")
    assert other.find([b"b"]) == {b"b": b"2"}, "made anew in its place"


def test_a_reward_head_on_the_mean_state(models: Callable[..., Path]) -> None:
    language = model(models("llama"), dtype="float32")
    parts = Parts(head=None, bottleneck=0, adapter=False, reward_pooling="mean")
    own = language.fresh(parts, seeds.generator(0, "parts"))
    assert own.keys() == {"reward_mean.weight"}
    weight = torch.randn(language.head.in_features, generator=torch.Generator().manual_seed(0))
    _, rewards = language.score({"reward_mean.weight": weight}, ROWS)
    assert rewards is not None
    backbone = language.model.get_base_model()
    states: list[torch.Tensor] = []
    hook = language.head.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0]))
    prompt, answer = ROWS[0][0], ROWS[0][1][1]
    with torch.no_grad(), language.model.disable_adapter():
        backbone(torch.tensor([[*prompt, *answer]]))
    hook.remove()
    expected = float(states[0][0, len(prompt) :].mean(0) @ weight)
    assert float(rewards[1]) == pytest.approx(expected, rel=1e-4)
