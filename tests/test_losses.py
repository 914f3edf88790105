"""Losses against TRL's own trainers, against closed forms, and by gradient check."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fedpref.losses import DPO, IPO, KTO, ORPO, Hinge, Loss, PairScores, SimPO

LOSSES: list[Loss] = [
    DPO(beta=0.3),
    DPO(beta=0.3, label_smoothing=0.1),
    DPO(beta=0.3, label_smoothing=0.1, smoothing="robust"),
    IPO(beta=0.4),
    Hinge(beta=0.3),
    SimPO(beta=2.0, gamma=0.5),
    ORPO(beta=0.2),
]
NAMES = [
    f"{loss.name}-{getattr(loss, 'label_smoothing', 0)}-{getattr(loss, 'smoothing', '')}"
    for loss in LOSSES
]


def scores(seed: int, pairs: int = 6) -> PairScores:
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, 30, (2, pairs), generator=draw).double()
    means = -torch.rand(2, pairs, generator=draw, dtype=torch.float64) * 3 - 0.05
    sums = means * tokens
    return PairScores(sums[0], sums[1], tokens[0], tokens[1])


@pytest.mark.parametrize("loss", LOSSES, ids=NAMES)
def test_gradients_agree_with_finite_differences(loss: Loss) -> None:
    policy, reference = scores(1), scores(2)

    def of(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
        return loss(
            PairScores(chosen, rejected, policy.chosen_tokens, policy.rejected_tokens), reference
        )

    inputs = (policy.chosen.clone().requires_grad_(), policy.rejected.clone().requires_grad_())
    assert torch.autograd.gradcheck(of, inputs)


@pytest.mark.parametrize("loss", LOSSES, ids=NAMES)
def test_a_loss_says_whether_it_needs_a_reference(loss: Loss) -> None:
    one, other = (loss(scores(1), scores(reference)) for reference in (2, 3))
    assert torch.equal(one, other) != loss.needs_reference


TRL_SETTINGS: list[tuple[Loss, dict[str, Any]]] = [
    (DPO(beta=0.3), {"loss_type": ["sigmoid"], "beta": 0.3}),
    (
        DPO(beta=0.3, label_smoothing=0.1, smoothing="robust"),
        {"loss_type": ["robust"], "beta": 0.3, "label_smoothing": 0.1},
    ),
    (IPO(beta=0.4), {"loss_type": ["ipo"], "beta": 0.4}),
    (Hinge(beta=0.3), {"loss_type": ["hinge"], "beta": 0.3}),
]


@pytest.fixture(scope="module")
def trl_batch(models: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Two models, and a batch as TRL's collator makes it."""
    import transformers
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    from conftest import make_model

    policy = transformers.AutoModelForCausalLM.from_pretrained(models("llama"))
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        make_model(tmp_path_factory.mktemp("other"), seed=1)
    )
    draw = torch.Generator().manual_seed(3)

    def ids(count: int) -> list[int]:
        return torch.randint(5, 4000, (count,), generator=draw).tolist()

    rows = [
        {"prompt_ids": ids(4 + i), "chosen_ids": ids(3 + 2 * i), "rejected_ids": ids(9 - i)}
        for i in range(4)
    ]
    return policy, reference, DataCollatorForPreference(pad_token_id=1)(rows)


@pytest.mark.parametrize(
    ("loss", "arguments"),
    TRL_SETTINGS,
    ids=[settings["loss_type"][0] for _, settings in TRL_SETTINGS],
)
def test_losses_agree_with_trls_dpo_trainer(
    loss: Loss, arguments: dict[str, Any], trl_batch: Any, models: Any, tmp_path: Any
) -> None:
    import datasets
    import transformers
    from trl import DPOConfig, DPOTrainer

    policy, reference, batch = trl_batch
    trainer = DPOTrainer(
        model=policy,
        ref_model=reference,
        args=DPOConfig(
            output_dir=str(tmp_path),
            report_to=[],
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            **arguments,
        ),
        train_dataset=datasets.Dataset.from_list(
            [{"prompt": "a", "chosen": " b", "rejected": " c"}]
        ),
        processing_class=transformers.AutoTokenizer.from_pretrained(models("llama")),
    )
    theirs = trainer._compute_loss(policy, batch, return_outputs=False)
    ours = loss(_plain_scores(policy, batch), _plain_scores(reference, batch)).mean()
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)


def _plain_scores(model: Any, batch: Any) -> PairScores:
    """Answer log-probabilities from a full forward and a log-softmax."""
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[
            :, :-1
        ]
    tokens = torch.log_softmax(logits, -1).gather(2, batch["input_ids"][:, 1:, None])[..., 0]
    answer = batch["completion_mask"][:, 1:]
    sums, counts = (tokens * answer).sum(1).chunk(2), answer.sum(1).chunk(2)
    return PairScores(sums[0], sums[1], counts[0].float(), counts[1].float())


def test_kto_agrees_with_trls_kto_trainer(trl_batch: Any, models: Any, tmp_path: Any) -> None:
    import datasets
    import transformers
    from trl import KTOConfig, KTOTrainer
    from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

    policy, reference, _ = trl_batch
    draw = torch.Generator().manual_seed(5)
    lengths, labels = ((4, 6, 3), (5, 2, 7), (6, 9, 5), (3, 4, 4)), (True, False, False, True)
    names = ("prompt_ids", "completion_ids", "KL_completion_ids")
    tokens = [
        [torch.randint(5, 4000, (n,), generator=draw).tolist() for n in row] for row in lengths
    ]
    batch = DataCollatorForUnpairedPreference(pad_token_id=1)(
        [
            dict(zip(names, row, strict=True)) | {"label": label}
            for row, label in zip(tokens, labels, strict=True)
        ]
    )
    trainer = KTOTrainer(
        model=policy,
        ref_model=reference,
        args=KTOConfig(
            output_dir=str(tmp_path),
            report_to=[],
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            per_device_train_batch_size=2,
            train_sampling_strategy="sequential",
            beta=0.4,
            desirable_weight=1.3,
            undesirable_weight=0.8,
        ),
        train_dataset=datasets.Dataset.from_list(
            [{"prompt": "a", "completion": " b", "label": True}] * 2
        ),
        processing_class=transformers.AutoTokenizer.from_pretrained(models("llama")),
    )
    theirs = trainer._compute_loss(policy, batch, return_outputs=False)

    def log_probabilities(model: Any, answer: int) -> torch.Tensor:
        sums = []
        for row in tokens:
            ids = torch.tensor([row[0] + row[answer]])
            with torch.no_grad():
                scored = torch.log_softmax(model(ids).logits[0, :-1], -1).gather(
                    1, ids[0, 1:, None]
                )
            sums.append(scored[len(row[0]) - 1 :].sum())
        return torch.stack(sums)

    ratio, mismatched = (
        log_probabilities(policy, answer) - log_probabilities(reference, answer)
        for answer in (1, 2)
    )
    loss = KTO(beta=0.4, desirable_weight=1.3, undesirable_weight=0.8)
    assert loss(ratio, mismatched, torch.tensor(labels)).mean().item() == pytest.approx(
        theirs.item(), rel=1e-4
    )


def test_ktos_point_of_indifference_is_never_negative_and_learns_nothing() -> None:
    ratio = torch.tensor([0.5, -0.5], requires_grad=True)
    mismatched = torch.tensor([2.0, 1.0], requires_grad=True)
    losses = KTO(beta=1.0)(ratio, mismatched, torch.tensor([True, False]))
    assert losses.tolist() == pytest.approx(
        [1 - 1 / (1 + math.exp(1.0)), 1 - 1 / (1 + math.exp(-2.0))]
    )
    losses.sum().backward()
    assert ratio.grad is not None
    assert ratio.grad[0] < 0 < ratio.grad[1]
    assert mismatched.grad is None
    assert KTO().kl(torch.tensor([-3.0, 1.0])) == 0.0


def test_simpo_and_conservative_dpo_agree_with_trls_cpo_trainer() -> None:
    from trl.experimental.cpo import CPOTrainer

    policy, reference = scores(4), scores(5)
    chosen, rejected = policy.per_token()
    there = SimpleNamespace(device="cpu")
    trainer = SimpleNamespace(
        alpha=0.0,
        accelerator=there,
        loss_type="simpo",
        simpo_gamma=0.7,
        beta=2.5,
        label_smoothing=0.0,
    )
    theirs, good, bad = CPOTrainer.cpo_loss(trainer, chosen, rejected)
    ours = SimPO(beta=2.5, gamma=0.7)
    torch.testing.assert_close(ours(policy, reference), theirs)
    torch.testing.assert_close(ours.rewards(policy, reference), (good, bad))

    trainer = SimpleNamespace(
        alpha=0.0, accelerator=there, loss_type="sigmoid", beta=0.3, label_smoothing=0.1
    )
    ratios = policy.chosen - reference.chosen, policy.rejected - reference.rejected
    theirs, good, bad = CPOTrainer.cpo_loss(trainer, *ratios)
    smoothed = DPO(beta=0.3, label_smoothing=0.1)
    torch.testing.assert_close(smoothed(policy, reference), theirs)
    torch.testing.assert_close(smoothed.rewards(policy, reference), (good, bad))


def test_orpo_agrees_with_trls_odds_ratio() -> None:
    from trl.experimental.orpo import ORPOTrainer

    policy = scores(6)
    chosen, rejected = policy.per_token()
    trainer = SimpleNamespace(beta=0.2, accelerator=SimpleNamespace(device="cpu"))
    theirs = -chosen - ORPOTrainer.odds_ratio_loss(trainer, chosen, rejected)[0]
    torch.testing.assert_close(
        ORPO(beta=0.2)(policy, policy), theirs, rtol=1e-5, atol=1e-6, check_dtype=False
    )


def test_a_policy_that_is_its_reference_starts_at_ln_2_with_rewards_of_zero() -> None:
    both = scores(7)
    assert torch.allclose(DPO()(both, both), torch.full((6,), math.log(2), dtype=torch.float64))
    assert all(
        torch.equal(reward, torch.zeros(6, dtype=torch.float64))
        for reward in DPO().rewards(both, both)
    )


def test_robust_dpo_is_unbiased_under_label_flips() -> None:
    policy, reference, flip = scores(8), scores(9), 0.2
    swapped = [
        PairScores(s.rejected, s.chosen, s.rejected_tokens, s.chosen_tokens)
        for s in (policy, reference)
    ]
    robust = DPO(beta=0.3, label_smoothing=flip, smoothing="robust")
    expected = (1 - flip) * robust(policy, reference) + flip * robust(*swapped)
    torch.testing.assert_close(expected, DPO(beta=0.3)(policy, reference))


def test_ipo_vanishes_where_the_margin_meets_its_target() -> None:
    reference = scores(10)
    beta = 0.25
    chosen = reference.chosen + reference.chosen_tokens / (2 * beta)
    policy = PairScores(
        chosen, reference.rejected, reference.chosen_tokens, reference.rejected_tokens
    )
    torch.testing.assert_close(
        IPO(beta=beta)(policy, reference), torch.zeros(6, dtype=torch.float64)
    )
    assert IPO(beta=beta).rewards(policy, reference)[0] == pytest.approx(
        torch.full((6,), 0.5).numpy()
    )


def test_orpo_ranks_by_mean_log_probability_and_stays_finite_for_certain_answers() -> None:
    certain = PairScores(torch.zeros(1), torch.tensor([-5.0]), torch.ones(1), torch.ones(1))
    assert torch.isfinite(ORPO()(certain, certain)).all()
    chosen, rejected = ORPO(beta=0.5).rewards(certain, certain)
    assert (chosen - rejected).item() == pytest.approx(2.5)


def test_hinge_rewards_are_dpos() -> None:
    policy, reference = scores(11), scores(12)
    torch.testing.assert_close(
        Hinge(beta=0.3).rewards(policy, reference), DPO(beta=0.3).rewards(policy, reference)
    )


def test_losses_begin_with_trls_defaults() -> None:
    from trl import DPOConfig, KTOConfig

    def default(kind: Any, name: str) -> Any:
        return kind.__dataclass_fields__[name].default

    assert {loss().beta for loss in (DPO, IPO)} == {default(DPOConfig, "beta")}
    assert DPO().label_smoothing == default(DPOConfig, "label_smoothing")
    for name in ("beta", "desirable_weight", "undesirable_weight"):
        assert getattr(KTO(), name) == default(KTOConfig, name)
