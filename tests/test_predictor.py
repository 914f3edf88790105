"""The predictor against PyTorch's own modules, and what must change nothing about its answers."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from fedpref.models.predictor import Predictor, gaussian_loss, softmax_within
from fedpref.numerics.trees import Tree

SMALL = Predictor(width=16, layers=2, heads=2, feedforward=24, embedder_layers=3)
INPUTS = 5


def fresh(settings: Predictor = SMALL, inputs: int = INPUTS) -> Tree:
    return settings.init(inputs, torch.Generator().manual_seed(0))


def points(count: int, seed: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(1, count, INPUTS, generator=draw), torch.rand(1, count, generator=draw)


def asked(
    params: Tree, context: Tensor, answers: Tensor, targets: Tensor, shown: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    return SMALL(
        params,
        context,
        answers,
        torch.ones_like(answers, dtype=torch.bool) if shown is None else shown,
        targets,
    )


def as_modules(params: Tree) -> tuple[nn.Sequential, nn.TransformerEncoder, nn.Sequential]:
    wide = SMALL.width
    embedder = nn.Sequential(
        nn.Linear(INPUTS + 1, wide),
        nn.ReLU(),
        nn.Linear(wide, wide),
        nn.ReLU(),
        nn.Linear(wide, wide),
    )
    layer = nn.TransformerEncoderLayer(
        wide, SMALL.heads, SMALL.feedforward, dropout=0.0, batch_first=True
    )
    encoder = nn.TransformerEncoder(layer, SMALL.layers, enable_nested_tensor=False)
    head = nn.Sequential(nn.Linear(wide, wide), nn.ReLU(), nn.Linear(wide, 2))

    def part(prefix: str, every: int = 1) -> Tree:
        found = {
            name.removeprefix(prefix): tensor
            for name, tensor in params.items()
            if name.startswith(prefix)
        }
        return (
            {f"{every * int(name[0])}{name[1:]}": t for name, t in found.items()}
            if every > 1
            else found
        )

    embedder.load_state_dict(part("embedder.", 2))
    encoder.load_state_dict(part("encoder."))
    head.load_state_dict(part("head.", 2))
    return embedder, encoder, head


@pytest.mark.parametrize(("inputs", "count"), [(4096, 1_188_354), (5120, 1_319_426)])
def test_the_numbers_of_parameters_are_those_of_gpo(inputs: int, count: int) -> None:
    assert sum(math.prod(shape) for shape in Predictor().shapes(inputs).values()) == count


def test_it_computes_what_pytorchs_own_encoder_does_with_a_mask_that_shows_the_context() -> None:
    params = fresh()
    (context, answers), (targets, _) = points(6, 1), points(4, 2)
    embedder, encoder, head = as_modules(params)
    x = torch.cat([context, targets], 1)
    y = torch.cat([answers, torch.zeros(1, 4)], 1)
    hidden_from_all = torch.ones(10, 10, dtype=torch.bool)
    hidden_from_all[:, :6] = False
    with torch.no_grad():
        expected = head(encoder(embedder(torch.cat([x, y[..., None]], -1)), mask=hidden_from_all))[
            :, 6:
        ]
        raw, std = asked(params, context, answers, targets)
    assert torch.allclose(raw, expected[..., 0], atol=1e-5)
    assert torch.allclose(std, expected[..., 1].exp(), atol=1e-5)


def test_fresh_parameters_are_spread_as_those_of_pytorchs_modules() -> None:
    settings = Predictor(width=64, layers=1)
    found = fresh(settings, 100)
    torch.manual_seed(0)
    layer, linear = nn.TransformerEncoderLayer(64, 4, 128), nn.Linear(101, 64)
    pairs = {
        "embedder.0.weight": linear.weight,
        "embedder.0.bias": linear.bias,
        "encoder.layers.0.self_attn.in_proj_weight": layer.self_attn.in_proj_weight,
        "encoder.layers.0.self_attn.out_proj.weight": layer.self_attn.out_proj.weight,
        "encoder.layers.0.linear2.weight": layer.linear2.weight,
    }
    for name, expected in pairs.items():
        assert float(found[name].abs().max()) == pytest.approx(
            float(expected.detach().abs().max()), rel=0.1
        ), name
    for name in ("encoder.layers.0.self_attn.in_proj_bias", "encoder.layers.0.norm1.bias"):
        assert not found[name].any()


def test_the_order_of_the_context_changes_nothing_and_targets_do_not_see_one_another() -> None:
    params = fresh()
    (context, answers), (targets, _) = points(7, 1), points(5, 2)
    whole = asked(params, context, answers, targets)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(3))
    for found, expected in zip(
        asked(params, context[:, order], answers[:, order], targets), whole, strict=True
    ):
        assert torch.allclose(found, expected, atol=1e-6)
    for i in range(5):
        for found, expected in zip(
            asked(params, context, answers, targets[:, i : i + 1]), whole, strict=True
        ):
            assert torch.allclose(found[0, 0], expected[0, i], atol=1e-6)
    other = asked(params, context, answers.flip(1), targets)[0]
    assert (other - whole[0]).abs().max() > 1e-3  # while the answers in the context do matter


def test_padding_changes_nothing() -> None:
    params = fresh()
    (context, answers), (targets, _) = points(7, 1), points(5, 2)
    padded = (
        nn.functional.pad(context, (0, 0, 0, 4), value=3.0),
        nn.functional.pad(answers, (0, 4), value=0.5),
    )
    shown = torch.arange(11)[None] < 7
    expected = asked(params, context, answers, targets)
    for found, wanted in zip(asked(params, *padded, targets, shown), expected, strict=True):
        assert torch.allclose(found, wanted, atol=1e-6)


def test_shares_sum_to_one_within_each_question_and_follow_the_order_of_options() -> None:
    raw, question = (
        torch.tensor([50.0, 52.0, -3.0, 0.0, 3.0, 700.0]),
        torch.tensor([0, 0, 1, 1, 1, 2]),
    )
    shares = softmax_within(raw, question)
    expected = torch.cat([raw[:2].softmax(0), raw[2:5].softmax(0), torch.ones(1)])
    assert torch.allclose(shares, expected)
    order = torch.tensor([1, 0, 4, 3, 2, 5])
    assert torch.allclose(softmax_within(raw[order], question), shares[order])


def test_the_loss_is_the_gaussians_and_a_bounded_deviation_stays_above_its_bound() -> None:
    raw, question = torch.randn(6), torch.tensor([0, 0, 0, 1, 1, 1])
    std, y = torch.rand(6) + 0.1, torch.rand(6)
    expected = -torch.distributions.Normal(softmax_within(raw, question), std).log_prob(y)
    assert torch.allclose(gaussian_loss(raw, std, question, y), expected, atol=1e-6)
    params = {name: 20 * tensor for name, tensor in fresh().items()}
    bounded = Predictor(
        width=16, layers=2, heads=2, feedforward=24, embedder_layers=3, bounded_std=True
    )
    (context, answers), (targets, _) = points(6, 1), points(40, 2)
    std = bounded(params, context, answers, torch.ones(1, 6, dtype=torch.bool), targets)[1]
    assert float(std.min()) >= 0.05


NORMAL = replace(SMALL, normalize=True)


def normal(context: Tensor, answers: Tensor, targets: Tensor) -> Tensor:
    """Raw means of targets, of embeddings as they lie among those that are shown."""
    shown = torch.ones_like(answers, dtype=torch.bool)
    return NORMAL(fresh(), context, answers, shown, targets)[0]


def test_normalized_embeddings_have_no_mean_and_no_scale() -> None:
    (context, answers), (targets, _) = points(7, 1), points(5, 2)
    found = normal(context, answers, targets)
    away = 40 * torch.randn(INPUTS, generator=torch.Generator().manual_seed(3))
    moved = normal(3 * context + away, answers, 3 * targets + away)
    assert torch.allclose(found, moved, atol=1e-3)
    mean, variance = context.mean(1), context.var(1, correction=0)
    scale = (variance + 0.01 * variance.mean()).sqrt()
    by_hand = ((x - mean) / scale for x in (context, targets))
    first, second = by_hand
    assert torch.allclose(found, asked(fresh(), first, answers, second)[0], atol=1e-5)
    assert not torch.allclose(found, asked(fresh(), context, answers, targets)[0], atol=1e-2)


def test_padding_and_points_that_are_alike_change_nothing_that_is_normalized() -> None:
    params = fresh()
    (context, answers), (targets, _) = points(7, 1), points(5, 2)
    padded = nn.functional.pad(context, (0, 0, 0, 4), value=3.0)
    shown = torch.arange(11)[None] < 7
    found = NORMAL(params, padded, nn.functional.pad(answers, (0, 4)), shown, targets)[0]
    assert torch.allclose(found, normal(context, answers, targets), atol=1e-6)
    alike = context[:, :1].expand(-1, 7, -1)
    assert normal(alike, answers, alike).abs().max() < 5
