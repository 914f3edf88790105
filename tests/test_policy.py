"""Policy gradients, answers drawn from a model, and rewards: closed forms and laws."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from conftest import REAL_DATA, needs_real_data
from fedpref import UserError
from fedpref.losses.policy import GRPO, PPO, RLOO, Sampled, gae, surrogate, whitened
from fedpref.models.generation import OwnSampling, Sampling, generate, merged
from fedpref.models.language import LanguageModel
from fedpref.models.model_settings import Model
from fedpref.numerics import seeds
from fedpref.rewards import Classifier, Distinct, Function, Length, Pattern, Sentiment, Toxicity

COUNTS, SAMPLES = (3, 1, 4, 2), 2


def sampled(seed: int = 0) -> Sampled:
    rng = torch.Generator().manual_seed(seed)
    old, reference = (
        -torch.rand(sum(COUNTS), generator=rng, dtype=torch.float64) for _ in range(2)
    )
    return Sampled(old, reference, COUNTS, SAMPLES)


def rewards(seed: int = 0) -> torch.Tensor:
    return torch.randn(
        len(COUNTS), generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


# ---- estimators


def test_advantages_by_gae_are_the_sums_that_define_them() -> None:
    rng = torch.Generator().manual_seed(1)
    r, v = (torch.randn(sum(COUNTS), generator=rng, dtype=torch.float64) for _ in range(2))
    gamma, lambda_ = 0.9, 0.7
    expected, begin = [], 0
    for count in COUNTS:
        ahead = [*v[begin + 1 : begin + count].tolist(), 0.0]
        errors = [
            float(r[begin + t]) + gamma * ahead[t] - float(v[begin + t]) for t in range(count)
        ]
        expected += [
            sum((gamma * lambda_) ** k * errors[t + k] for k in range(count - t))
            for t in range(count)
        ]
        begin += count
    assert gae(r, v, COUNTS, gamma, lambda_).tolist() == pytest.approx(expected)


def test_with_lambda_one_the_advantage_is_the_return_less_the_value() -> None:
    r, v = (
        rewards(2),
        torch.randn(sum(COUNTS), dtype=torch.float64, generator=torch.Generator().manual_seed(3)),
    )
    settings = PPO(gae_lambda=1.0, kl=0.1, normalize=False)
    draws = sampled()
    advantages, returns = settings.advantages(r, draws, v)
    paid = -0.1 * (draws.old - draws.reference)
    begin = 0
    for answer, count in enumerate(COUNTS):
        for t in range(count):
            expected = float(r[answer] + paid[begin + t : begin + count].sum())
            assert float(returns[begin + t]) == pytest.approx(expected)
            assert float(advantages[begin + t]) == pytest.approx(expected - float(v[begin + t]))
        begin += count


def test_a_critic_that_foretells_everything_leaves_no_advantage() -> None:
    settings = PPO(kl=0.0, normalize=False)
    constant = torch.full((sum(COUNTS),), 0.7, dtype=torch.float64)
    advantages, _ = settings.advantages(
        torch.full((len(COUNTS),), 0.7, dtype=torch.float64), sampled(), constant
    )
    assert advantages.abs().max() < 1e-12
    with pytest.raises(ValueError, match="critic"):
        settings.advantages(rewards(), sampled(), None)


@pytest.mark.parametrize("settings", [RLOO(kl=0.0), RLOO(kl=0.0, normalize=False), GRPO()])
def test_the_advantage_of_a_constant_reward_is_zero(settings: Any) -> None:
    advantages, _ = settings.advantages(
        torch.full((len(COUNTS),), 3.0, dtype=torch.float64), sampled(), None
    )
    assert advantages.abs().max() < 1e-12


def test_an_answer_is_compared_with_the_others_to_its_prompt() -> None:
    draws = sampled()
    r = rewards()
    net = (r - 0.05 * draws.summed(draws.old - draws.reference)).tolist()
    found, _ = RLOO(normalize=False).advantages(r, draws, None)
    of_answer = [net[0] - net[1], net[1] - net[0], net[2] - net[3], net[3] - net[2]]
    assert found.tolist() == pytest.approx(
        [of_answer[i] for i, count in enumerate(COUNTS) for _ in range(count)]
    )
    scaled, _ = RLOO().advantages(r, draws, None)
    assert (scaled / found).std() < 1e-9
    groups = r.view(2, 2)
    expected = (
        (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)
    ).flatten()
    assert GRPO().advantages(r, draws, None)[0].tolist() == pytest.approx(
        expected[draws.owner].tolist()
    )


def test_where_the_policy_drew_the_tokens_the_gradient_is_that_of_their_log_probabilities() -> None:
    draws = sampled()
    for settings in (PPO(), RLOO(), GRPO(kl=0.0)):
        new = draws.old.clone().requires_grad_()
        advantages = torch.randn(
            len(new), generator=torch.Generator().manual_seed(5), dtype=torch.float64
        )
        (gradient,) = torch.autograd.grad(surrogate(new, advantages, draws, settings), new)
        assert gradient.tolist() == pytest.approx((-advantages / len(new)).tolist())


def test_a_ratio_beyond_its_bounds_is_not_followed_further() -> None:
    draws = Sampled(torch.zeros(4), torch.zeros(4), (4,), 1)
    new = torch.tensor([0.5, -0.5, 0.5, -0.5]).requires_grad_()
    advantages = torch.tensor([1.0, -1.0, -1.0, 1.0])
    (gradient,) = torch.autograd.grad(surrogate(new, advantages, draws, PPO(epsilon=0.2)), new)
    assert gradient[:2].tolist() == [0.0, 0.0]
    assert gradient[2:].abs().min() > 0.1


def test_grpo_and_dapo_have_the_means_that_their_papers_have() -> None:
    counts = (3, 5, 1, 4)
    draw = torch.Generator().manual_seed(2)
    gains = torch.randn(sum(counts), generator=draw, dtype=torch.float64)
    zero = torch.zeros_like(gains)
    draws = Sampled(zero, zero, counts, 2)
    parts = gains.split(counts)
    by_answer = sum(float(part.mean()) for part in parts) / len(parts)
    grpo, dapo = (
        float(surrogate(zero, gains, draws, GRPO(kl=0.0, loss_type=name)))
        for name in ("grpo", "dapo")
    )
    assert grpo == pytest.approx(-by_answer)
    assert dapo == pytest.approx(-float(gains.mean()))
    assert abs(grpo - dapo) > 0.01


def test_answers_to_be_read_are_drawn_by_the_models_own_settings(tiny: Path) -> None:
    model = LanguageModel(Model(path=str(tiny), dtype="float32"))
    prompt = model.encode("Which thing is it?", "")[0]

    def drawn(count: int, **settings: Any) -> list[tuple[int, ...]]:
        own = OwnSampling(1, transformers.GenerationConfig(**settings))
        return generate(model, None, [prompt], count, own, seeds.generator(0, "work"))

    ids = torch.tensor([prompt])
    with torch.no_grad(), model.model.disable_adapter():
        logits = model.model(input_ids=ids).logits[0, -1]
    ranked = logits.argsort(descending=True).tolist()
    assert drawn(3) == [(ranked[0],)] * 3  # transformers' default is the likeliest
    few = {token for (token,) in drawn(400, do_sample=True, top_k=3)}
    assert few == set(ranked[:3])
    shares = (logits / 0.5).softmax(0)[ranked].cumsum(0)
    inside = ranked[: int((shares < 0.3).sum()) + 1]
    found = {t for (t,) in drawn(400, do_sample=True, temperature=0.5, top_k=0, top_p=0.3)}
    assert found <= set(inside)
    assert len(found) > 1


def test_grpo_pays_for_kl_in_the_loss() -> None:
    draws = sampled()
    zero = torch.zeros_like(draws.old)
    apart = draws.old - draws.reference
    expected = 0.3 * float((torch.exp(-apart) - 1 + apart).mean())
    assert float(surrogate(draws.old, zero, draws, GRPO(kl=0.3))) == pytest.approx(expected)
    assert expected > 0


def test_equal_values_are_whitened_to_zero() -> None:
    assert whitened(torch.full((5,), 2.0)).tolist() == [0.0] * 5


# ---- drawing


@pytest.fixture(scope="module")
def model(models: Callable[[str], Path]) -> LanguageModel:
    return LanguageModel(Model(path=str(models("llama")), lora_r=4, dtype="float32"))


def adapter(model: LanguageModel, size: float = 0.1) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    return {
        name: tensor + size * torch.randn(tensor.shape, generator=rng)
        for name, tensor in model.init(rng).items()
    }


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2", "gpt_neox"])
def test_the_likeliest_answers_are_those_that_transformers_generates(
    architecture: str, models: Callable[[str], Path]
) -> None:
    model = LanguageModel(Model(path=str(models(architecture)), lora_r=4, dtype="float32"))
    params = adapter(model)
    prompts = [
        model.encode(text, "")[0]
        for text in ("What?", "Which thing is it, number four?", "River stone")
    ]
    settings = Sampling(max_completion_length=12, temperature=1e-4)
    found = generate(model, params, prompts, 2, settings, torch.Generator().manual_seed(0))
    with merged(model, params):
        for i, prompt in enumerate(prompts):
            with torch.no_grad():
                whole = model.model.get_base_model().generate(
                    torch.tensor([prompt]), max_new_tokens=12, do_sample=False, pad_token_id=1
                )
            expected = tuple(whole[0, len(prompt) :].tolist())
            assert found[2 * i] == found[2 * i + 1] == expected[: len(found[2 * i])]
            assert len(found[2 * i]) == 12 or found[2 * i][-1] in model.stops


def test_penalties_of_the_models_own_settings_look_back_as_in_transformers(
    model: LanguageModel,
) -> None:
    prompts = [
        model.encode(text, "")[0]
        for text in ("What?", "Which thing is it, number four, number four?", "River stone")
    ]
    said = {"repetition_penalty": 1.7, "no_repeat_ngram_size": 3}
    own = OwnSampling(20, transformers.GenerationConfig(**said))
    found = generate(model, None, prompts, 2, own, seeds.generator(0, "work"))
    plain = OwnSampling(20, transformers.GenerationConfig())
    assert found != generate(model, None, prompts, 2, plain, seeds.generator(0, "work"))
    with merged(model, None):
        for i, prompt in enumerate(prompts):
            with torch.no_grad():
                whole = model.model.get_base_model().generate(
                    torch.tensor([prompt]), max_new_tokens=20, pad_token_id=1, **said
                )
            expected = tuple(whole[0, len(prompt) :].tolist())
            assert found[2 * i] == found[2 * i + 1] == expected[: len(found[2 * i])]


def test_answers_end_where_the_model_can_read_no_more(models: Callable[[str], Path]) -> None:
    model = LanguageModel(Model(path=str(models("gpt2")), lora_r=4, dtype="float32"))
    most = model.limits.most
    assert most is not None
    prompts = [tuple(range(9, 9 + n)) for n in (most - 3, 5, most - 1)]
    model.model.generation_config.eos_token_id = None
    model.tokenizer.eos_token = None
    settings = Sampling(max_completion_length=most)
    answers = generate(model, None, prompts, 1, settings, torch.Generator().manual_seed(0))
    assert list(map(len, answers)) == [3, most - 5, 1]
    rows = [(prompt, (answer,)) for prompt, answer in zip(prompts, answers, strict=True)]
    assert torch.isfinite(model.log_probabilities(None, rows)).all()
    with pytest.raises(UserError, match=f"has {most} tokens, and the model can read {most} in all"):
        generate(model, None, [range(most)], 1, settings, torch.Generator().manual_seed(0))


def test_tokens_are_drawn_as_often_as_the_model_says(model: LanguageModel) -> None:
    params, prompt = adapter(model), model.encode("Which thing?", "")[0]
    draws = generate(
        model,
        params,
        [prompt],
        4000,
        Sampling(max_completion_length=1),
        torch.Generator().manual_seed(0),
    )
    counts = Counter(answer[0] for answer in draws)
    common = [token for token, _ in counts.most_common(5)]
    with torch.no_grad():
        expected = [
            math.exp(float(model.tokens(params, [(prompt, [[token]])])[0])) for token in common
        ]
    for token, p in zip(common, expected, strict=True):
        assert counts[token] / 4000 == pytest.approx(
            p, abs=4 * math.sqrt(p * (1 - p) / 4000) + 1e-3
        )


def test_any_of_several_end_tokens_ends_an_answer(models: Callable[[str], Path]) -> None:
    model = LanguageModel(Model(path=str(models("llama")), lora_r=4, dtype="float32"))
    settings = Sampling(max_completion_length=6, temperature=1e-3)

    def drawn() -> tuple[int, ...]:
        rng = torch.Generator().manual_seed(0)
        return generate(model, None, [(7, 8, 9)], 1, settings, rng)[0]

    answer = drawn()
    assert len(answer) > 2
    first, end = answer[0], model.tokenizer.eos_token_id
    model.model.generation_config.eos_token_id = [end, 5, first]
    assert model.stops == sorted({end, 5, first})
    assert drawn() == (first,), "the last of the list ends it too"


def test_an_adapter_of_a_lower_rank_is_drawn_from_as_it_is(model: LanguageModel) -> None:
    params, prompt = adapter(model), model.encode("Which thing?", "")[0]
    cut = {name: t[:2] if ".lora_A" in name else t[:, :2] for name, t in params.items()}
    padded = {name: torch.zeros_like(params[name]) for name in params}
    for name, t in cut.items():
        padded[name][tuple(map(slice, t.shape))] = t
    settings = Sampling(max_completion_length=12, temperature=1e-4)
    found = [
        generate(model, some, [prompt], 1, settings, torch.Generator().manual_seed(0))
        for some in (cut, padded, params)
    ]
    assert found[0] == found[1] != found[2]


def test_drawing_leaves_the_models_weights_as_they_were(model: LanguageModel) -> None:
    before = {
        name: tensor.clone()
        for name, tensor in model.model.named_parameters()
        if ".lora_" not in name
    }
    prompt = model.encode("Which thing?", "")[0]
    alone = generate(
        model,
        None,
        [prompt],
        3,
        Sampling(max_completion_length=4),
        torch.Generator().manual_seed(0),
    )
    with pytest.raises(ZeroDivisionError), merged(model, adapter(model)):
        raise ZeroDivisionError
    assert (
        generate(
            model,
            None,
            [prompt],
            3,
            Sampling(max_completion_length=4),
            torch.Generator().manual_seed(0),
        )
        == alone
    )
    after = dict(model.model.named_parameters())
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_log_probabilities_of_tokens_sum_to_those_of_answers_and_heat_flattens_them(
    model: LanguageModel,
) -> None:
    params = adapter(model)
    rows = [([5, 6, 7], ([8, 9], [10, 11, 12])), ([4], ([9],))]
    with torch.no_grad():
        tokens, hidden = model.tokens(params, rows)
        whole = model.log_probabilities(params, rows)
        hot, _ = model.tokens(params, rows, temperature=50.0)
    assert hidden.shape == (6, 32)
    assert [float(part.sum()) for part in tokens.split([2, 3, 1])] == pytest.approx(
        whole.tolist(), rel=1e-5
    )
    vocabulary = model.head.out_features
    assert (hot + math.log(vocabulary)).abs().max() < 0.5


# ---- rewards


def test_rewards_are_read_off_the_text() -> None:
    prompts = ["Q"] * 4
    texts = [" one two three four", "", " a a a a", " yes? no? why?"]
    assert Length(target=4)(prompts, texts) == [1.0, 0.0, 1.0, 0.75]
    assert Length(target=1)(prompts[:1], texts[:1]) == [-1.0]
    assert Distinct(n=1)(prompts, texts) == [1.0, 0.0, 0.25, 1.0]
    assert Distinct()(prompts, texts) == [1.0, 0.0, pytest.approx(1 / 3), 1.0]
    assert Pattern(pattern=r"\?", most=2)(prompts, texts) == [0.0, 0.0, 0.0, 1.0]
    assert Pattern(pattern="two", negate=True)(prompts, texts) == [0.0, 1.0, 1.0, 1.0]
    assert Length(target=2)(
        [[{"role": "user", "content": "Q"}]], [[{"role": "assistant", "content": "one two"}]]
    ) == [1.0]
    with pytest.raises(UserError, match="no regular expression"):
        Pattern(pattern="(")


def test_sentiment_knows_praise_from_blame() -> None:
    good, bad = Sentiment().build()(
        ["Q"] * 2, [" I love this, thank you!", " This is horrible and sad."]
    )
    assert good > 0.5 > -0.5 > bad


def toxic_words(folder: Path) -> Path:
    vocab = np.array(["bad", "fine"])
    arrays = {
        "coef": np.array([[2.0, -1.0], [1.0, 0.0]]),
        "intercept": np.zeros(2),
        "platt_a": -np.ones(2),
        "platt_b": np.zeros(2),
    }
    np.savez(folder / "words.npz", vocab=vocab, **arrays)
    return folder / "words.npz"


def test_toxicity_is_the_mean_of_its_models(tmp_path: Path) -> None:
    reward = Toxicity(path=str(toxic_words(tmp_path))).build()
    found = reward(["Q"] * 3, [" BAD fine day", " nothing", " bad bad"])

    def probability(*scores: float) -> float:
        return sum(1 / (1 + math.exp(-score)) for score in scores) / len(scores)

    assert list(found) == pytest.approx(
        [1 - probability(1, 1), 0.5, 1 - probability(4, 2)], abs=1e-6
    )
    (tmp_path / "other.npz").write_text("no arrays")
    with pytest.raises(UserError, match="could not be read as a toxicity model"):
        Toxicity(path=str(tmp_path / "other.npz")).build()


@needs_real_data
def test_offence_is_found_by_the_public_model() -> None:
    reward = Toxicity(path=str(REAL_DATA / "toxicity_linear.npz")).build()
    kind, rude = reward(
        ["Q"] * 2, [" Of course, I am glad to help you.", " You are a stupid idiot."]
    )
    assert kind > 0.8 > 0.2 > rude


def test_any_classification_model_is_a_reward(tmp_path: Path, tiny: Path) -> None:
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny)
    for labels in (1, 2):
        torch.manual_seed(0)
        configuration = transformers.LlamaConfig.from_pretrained(
            tiny, num_labels=labels, pad_token_id=1
        )
        classifier = transformers.AutoModelForSequenceClassification.from_config(
            configuration
        ).eval()
        classifier.save_pretrained(tmp_path / str(labels))
        tokenizer.save_pretrained(tmp_path / str(labels))
        settings = Classifier(
            path=str(tmp_path / str(labels)), label=None if labels == 1 else 1, batch_size=2
        )
        found = settings.build()(
            ["Which?", "What is it?", "Which?"], [" river", " stone and lamp", " mill"]
        )
        with torch.no_grad():
            ids = tokenizer("What is it? stone and lamp", return_tensors="pt")["input_ids"]
            logits = classifier(input_ids=ids).logits[0]
        expected = float(logits[0]) if labels == 1 else float(logits[1] - logits[0])
        assert found[1] == pytest.approx(expected, abs=1e-3)
        assert len(found) == 3
    several = tmp_path / "2/config.json"
    config = json.loads(several.read_text())
    several.write_text(json.dumps({**config, "problem_type": "multi_label_classification"}))
    apart = settings.build()(["What is it?"], [" stone and lamp"])
    assert apart == pytest.approx([float(logits[1])], abs=1e-3), "labels that are for themselves"
    with pytest.raises(UserError, match="is none of the model's"):
        replace(settings, label=5).build()
    with pytest.raises(UserError, match="could not be loaded as a sequence-classification model"):
        Classifier(path=str(tmp_path / "nowhere")).build()


CHAT = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}"


@pytest.mark.parametrize("padding", [None, 1])
def test_a_classifier_reads_the_last_token_of_texts_of_any_length_and_form(
    padding: int | None, tmp_path: Path, tiny: Path
) -> None:
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny)
    torch.manual_seed(0)
    shape = {"num_labels": 1, "pad_token_id": padding, "max_position_embeddings": 32}
    model: Any = transformers.AutoModelForSequenceClassification.from_config(
        transformers.LlamaConfig.from_pretrained(tiny, **shape)
    ).eval()
    model.save_pretrained(tmp_path / "model")
    tokenizer.chat_template, tokenizer.pad_token = CHAT, None
    tokenizer.model_max_length = 10**30
    tokenizer.save_pretrained(tmp_path / "model")
    asked = [{"role": "user", "content": "Which?"}]
    said = [{"role": "assistant", "content": "A river, of course."}]
    long = " stone" * 200
    prompts: list[Any] = ["Which?", asked, "What is it? "]
    completions: list[Any] = [" mill", said, long]
    found = Classifier(path=str(tmp_path / "model")).build()(prompts, completions)
    texts = ["Which? mill", tokenizer.apply_chat_template([*asked, *said], tokenize=False)]
    ids = [tokenizer(texts[0])["input_ids"], tokenizer(texts[1], add_special_tokens=False)]
    ids = [ids[0], ids[1]["input_ids"], tokenizer("What is it? " + long)["input_ids"][-32:]]
    assert len(ids[2]) == 32
    with torch.no_grad():
        expected = [model(input_ids=torch.tensor([one])).logits.item() for one in ids]
    assert found == pytest.approx(expected, abs=1e-4)
    assert ids[1][-1] == tokenizer.eos_token_id


def double_length(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    return [2.0 * len(text) for text in completions]


def times(factor: float) -> Any:
    return lambda prompts, completions, **_: [factor * len(text) for text in completions]


def test_any_function_that_can_be_imported_is_a_reward() -> None:
    assert Function(path="test_policy:double_length").build()(["Q"], ["abc"]) == [6.0]
    assert Function(path="test_policy:times", arguments={"factor": 3.0}).build()(
        ["Q"], ["abc"]
    ) == [9.0]
    for path in ("test_policy:nothing", "no_such_module:f", "test_policy"):
        with pytest.raises(UserError, match="could not be imported"):
            Function(path=path).build()


def test_draws_depend_on_their_seed_alone(model: LanguageModel) -> None:
    prompts = [model.encode(text, "")[0] for text in ("What?", "Which thing is it?")]
    first, again, other = (
        generate(
            model,
            None,
            prompts,
            3,
            Sampling(max_completion_length=6),
            seeds.generator(seed, "draw"),
        )
        for seed in (0, 0, 1)
    )
    assert first == again != other
