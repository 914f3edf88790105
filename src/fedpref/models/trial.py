"""What a model is: read from its config, and tried on a few tokens before anything is trained."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fedpref.errors import UserError
from fedpref.models.attention import ATTENTION, Kernel, by_part, kernels, packed_attention
from fedpref.models.packed import Layout, Row
from fedpref.numerics.trees import Tree

if TYPE_CHECKING:
    from fedpref.models.language import LanguageModel

LOG = logging.getLogger(__name__)
LONGEST_TRIAL = 256  # tokens: longer windows are told from the config alone
# an attention's window or chunk; not the chunks of recurrent layers, nor counts of layers
WINDOW = re.compile(r"(\w+_)?window(_size)?|attention_chunk_size")
LARGE = 1e4  # logits at which any cap on them shows


@dataclass(frozen=True)
class Limits:
    """What a model's config says of lengths, in tokens.

    Attributes:
        context: The longest row that the model takes; None where it does not say.
        reach: The shortest window or chunk of attention; None without one. Longer rows are padded.
        switch: Rows longer than this have other positions than shorter ones (LongRoPE), and are
            computed apart; None where positions are a token's own.
        is_strict: Whether a row longer than the context would be told wrongly or not at all.
    """

    context: int | None = None
    reach: int | None = None
    switch: int | None = None
    is_strict: bool = False

    @property
    def most(self) -> int | None:
        """The most tokens that a row can have; None where a longer one is read too."""
        return self.context if self.is_strict else None

    @staticmethod
    def of(model: Any) -> Limits:
        """Return what is said by a model's config, and by the sizes of its embeddings."""
        config = model.config.get_text_config()
        said = config.to_dict()
        # MPT's biases by distance are made for so many tokens
        table = said.get("max_seq_len")
        context = getattr(config, "max_position_embeddings", None) or table
        windows = [
            value
            for name, value in said.items()
            if WINDOW.fullmatch(name) and type(value) is int and value > 1
        ]
        kinds = {
            str(rope.get("rope_type", rope.get("type"))): rope
            for rope in _ropes(said.get("rope_parameters") or said.get("rope_scaling"))
        }
        long = kinds.get("longrope", {})
        switch = long.get("original_max_position_embeddings") or (
            said.get("original_max_position_embeddings") if long else None
        )
        tables = [
            module.num_embeddings
            for module in model.modules()
            if isinstance(module, nn.Embedding) and module is not model.get_input_embeddings()
        ]
        has_table = context is not None and (
            context == table or any(context <= rows <= context + 8 for rows in tables)
        )
        # dynamic scaling keeps what the longest row before asked for
        return Limits(context, min(windows, default=None), switch, has_table or "dynamic" in kinds)


def _ropes(parameters: Any) -> list[dict[str, Any]]:
    """Return the settings of rotary positions, which may be given by kind of layer."""
    if not isinstance(parameters, dict):
        return []
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    return nested or [parameters]


@dataclass(frozen=True)
class Trial:
    """What was found.

    Attributes:
        has_plain_head: Logits are those of the vocabulary head alone.
        problem: Why the packed form does not fit; None where it does.
        is_apart: A row's states depend on the rows beside it, so that each is computed alone.
        kernel: The fastest attention that runs here.
        has_trunk: States can stand for the layers below the adapter.
    """

    has_plain_head: bool
    problem: str | None
    is_apart: bool = False
    kernel: Kernel = by_part
    has_trunk: bool = False


def tried(language: LanguageModel) -> Trial:
    """Try a model on a few tokens: its head, a fresh adapter, its neighbours, the packed form.

    If the packed form fits, the model keeps its attention, which elsewhere is transformers' `sdpa`.

    Raises:
        UserError: The adapter cannot be on the layers where it is, or a fresh one changes the
            model.
    """
    draw = torch.Generator().manual_seed(0)
    fresh = language.init(draw)
    adapter = {
        name: 0.05 * torch.randn(tensor.shape, generator=draw).to(language.device, language.dtype)
        for name, tensor in fresh.items()
    }
    tolerance = 1e-3 if language.dtype == torch.float32 else 0.05
    rows = _rows(language, draw)
    layout = Layout.padded(rows, language.device)
    with torch.no_grad():
        try:
            states, _ = language.run(adapter, layout, layout.scored[:1])
        # whatever a layer's own code makes of an adapter around it
        except Exception as error:
            raise UserError(
                "model.lora_target_modules: the model does not run with an adapter on "
                f"{language.settings.lora_target_modules!r}: {type(error).__name__}: {error}. "
                "Name the layers that return one tensor, such as q_proj and v_proj."
            ) from error
        expected = states.flatten(0, 1)[layout.scored]
        _refuse_positions(language, adapter, rows[0], tolerance)
        _refuse_looking_ahead(language, adapter, rows[0], tolerance)
        without = language.run({}, layout, layout.scored[:1])[0].flatten(0, 1)[layout.scored]
        _refuse_changed(language, fresh, layout, without, tolerance)
        _refuse_idle(language, without, expected)
        alone = language.run(
            adapter, layout, layout.scored[:1], groups=[[row] for row in range(len(layout.ids))]
        )[0]
        # the mean, for rounding of other shapes moves a state or two in bfloat16; what a row takes
        # from its neighbours moves them all
        is_apart = _mean_distance(alone.flatten(0, 1)[layout.scored], expected) > tolerance
        if is_apart:
            return Trial(False, "a row's states depend on the rows beside it", True)
        if type(language.head) is not nn.Linear:
            return Trial(False, "its vocabulary head is not a plain linear layer")
        if not _has_plain_head(language, adapter, layout, expected, tolerance):
            return Trial(False, "its logits are not those of its head alone")
        trial = _packed(language, adapter, rows[:2], tolerance)
        return replace(trial, has_trunk=_has_trunk(language, adapter, rows[:2], tolerance))


def gradients_come_apart(language: LanguageModel) -> bool:
    """Return whether one pass gives each unit's gradient as a pass over its rows alone does."""
    draw = torch.Generator().manual_seed(0)
    adapter = {
        name: 0.05 * torch.randn(tensor.shape, generator=draw).to(language.device, language.dtype)
        for name, tensor in language.init(draw).items()
    }
    rows = _rows(language, draw)[:2]
    tolerance = 1e-3 if language.dtype == torch.float32 else 0.1
    copies = language.copies(adapter, 2)
    try:
        sums, _ = language.score(copies, rows, units=(1, 1))
        apart = torch.autograd.grad(sums.sum(), list(copies.values()))
    # whatever a layer's own code makes of several adapters at once
    except Exception as error:
        LOG.info("%s: gradients do not come apart: %s", language.name, error)
        return False
    for k, row in enumerate(rows):
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in adapter.items()}
        sums, _ = language.score(leaves, [row])
        alone = torch.autograd.grad(sums.sum(), list(leaves.values()))
        found, expected = (_joined([one[k] for one in apart]), _joined(alone))
        if not float((found - expected).norm() / expected.norm()) <= tolerance:
            return False
    return True


def _joined(gradients: Sequence[Tensor]) -> Float[Tensor, " n"]:
    return torch.cat([one.flatten().float() for one in gradients])


def _rows(language: LanguageModel, draw: torch.Generator) -> list[Row]:
    """Return two short rows, and one beyond the model's lengths where these are short."""
    beyond = [
        length + 5
        for length in (language.limits.reach, language.limits.switch)
        if length and length + 5 <= min(LONGEST_TRIAL, language.limits.context or LONGEST_TRIAL)
    ]
    longest = max([16, *beyond])
    vocabulary = len(language.model.get_input_embeddings().weight)
    tokens = torch.randint(vocabulary, (longest + 16,), generator=draw).tolist()
    rows: list[Row] = [
        (tokens[:3], (tokens[3:5], tokens[5:9])),
        (tokens[9:10], (tokens[10:13], tokens[13:16])),
    ]
    return rows + [(tokens[16:-3], (tokens[-3:],)) for _ in beyond[:1]]


def _refuse_positions(language: LanguageModel, adapter: Tree, row: Row, tolerance: float) -> None:
    """Raise UserError where a model counts positions otherwise than from 0, by its own words."""
    layout = Layout.padded([(row[0], row[1][:1])], language.device)
    given, own = (
        language.run(adapter, layout, layout.scored[:1], own_positions=is_own)[0].flatten(0, 1)
        for is_own in (False, True)
    )
    if _mean_distance(given, own) > tolerance:
        raise UserError(
            f"model.path: {language.name!r} does not count positions from 0, as decoders do, so "
            "that its rows would be told wrongly. It cannot be trained here."
        )


def _refuse_looking_ahead(
    language: LanguageModel, adapter: Tree, row: Row, tolerance: float
) -> None:
    """Raise UserError where what comes later changes what a model says of what stands before."""
    prompt, (answer, *_) = row
    other = [(answer[-1] + 1) % len(language.model.get_input_embeddings().weight)]
    before = len(prompt) + len(answer) - 1
    states = [
        language.run(adapter, layout, layout.scored[:1])[0].flatten(0, 1)[:before]
        for layout in (
            Layout.padded([(prompt, (one,))], language.device)
            for one in (answer, [*answer[:-1], *other])
        )
    ]
    if _mean_distance(*states) > tolerance:
        raise UserError(
            f"model.path: {language.name!r} does not read from left to right: what it says of a "
            "token hangs on what comes after it, so that an answer would be told from itself. "
            "Take a causal language model."
        )


def _refuse_changed(
    language: LanguageModel,
    fresh: Tree,
    layout: Layout,
    without: Float[Tensor, "n D"],
    tolerance: float,
) -> None:
    """Raise UserError where a fresh adapter, which is zero, changes what the model says."""
    cast = {name: t.to(language.device, language.dtype) for name, t in fresh.items()}
    with_it = language.run(cast, layout, layout.scored[:1])[0].flatten(0, 1)[layout.scored]
    # nothing is added, so that no rounding of the arithmetic excuses a difference
    if (apart := distance(with_it, without)) > tolerance / 50:
        raise UserError(
            f"model.path: {language.name!r} is another model as soon as an adapter is on it, "
            f"though the adapter is zero (hidden states differ by {apart:.2g} of their size): its "
            "layers do more than PEFT's adapter layers call. It cannot be trained against itself."
        )


def _refuse_idle(
    language: LanguageModel, without: Float[Tensor, "n D"], expected: Float[Tensor, "n D"]
) -> None:
    """Raise UserError where an adapter sits on no layer that a text passes through."""
    if "head" not in language.adapted_ends and torch.equal(without, expected):
        raise UserError(
            f"model.lora_target_modules: {language.settings.lora_target_modules!r} names no layer "
            "that a text passes through, so that nothing would be learned."
        )


def _has_plain_head(
    language: LanguageModel,
    adapter: Tree,
    layout: Layout,
    expected: Float[Tensor, "n D"],
    tolerance: float,
) -> bool:
    """Return whether logits are those of the head alone, at the size they have and at large ones.

    A cap bends large logits only, and which are large depends on the text.
    """
    logits = nn.functional.linear(expected, language.head.weight, language.head.bias)
    largest = float(logits.float().abs().max())
    for factor in (1.0, LARGE / max(largest, 1e-6)):
        found = language.run(adapter, layout, layout.scored, factor=factor)[1][0]
        head = nn.functional.linear(expected * factor, language.head.weight, language.head.bias)
        if not distance(head, found) <= tolerance:
            return False
    return True


def _packed(language: LanguageModel, adapter: Tree, rows: list[Row], tolerance: float) -> Trial:
    apart, layout = (form(rows, language.device) for form in (Layout.padded, Layout.packed))
    longest = max(len(prompt) + max(map(len, answers)) for prompt, answers in rows)
    if language.limits.reach and language.limits.reach < longest:
        return Trial(True, f"its attention reaches {language.limits.reach} tokens back")
    backbone = language.model.get_base_model()
    own = backbone.config._attn_implementation
    # also under plain products and softmax, which round otherwise than a fused kernel: in thirty
    # layers of bfloat16 by more than any tolerance that would still tell a misfit
    expected = []
    for implementation in dict.fromkeys((own, "eager")):
        with suppress(Exception):  # of a model that does not know it
            backbone.set_attn_implementation(implementation)
            states, _ = language.run(adapter, apart, apart.scored[:0])
            expected.append(states.flatten(0, 1)[apart.scored])
    backbone.set_attn_implementation(own)
    problem = ""
    for kernel in kernels(language.device, language.dtype):
        try:
            backbone.set_attn_implementation(ATTENTION)
            with packed_attention(layout, kernel):
                states, _ = language.run(adapter, layout, layout.scored[:0])
            found = states[0][layout.scored]
            difference = min(distance(found, form) for form in expected)
        # whatever a model's own code makes of a form that it was not written for
        except Exception as error:
            problem = str(error) or type(error).__name__
        else:
            if difference <= tolerance:
                if problem:
                    warnings.warn(
                        f"{language.name}: the fastest attention does not run here ({problem}); "
                        f"{kernel.__name__} is used.",
                        stacklevel=6,
                    )
                return Trial(True, None, kernel=kernel)
            problem = f"hidden states differ by {difference:.2g} of their size"
    backbone.set_attn_implementation(own)
    return Trial(True, problem)


def _has_trunk(language: LanguageModel, adapter: Tree, rows: list[Row], tolerance: float) -> bool:
    """Return whether states at the trunk's end are all that the layers above it read."""
    trunk = language.trunk
    if not trunk.layers:
        return False
    layout = Layout.padded(rows, language.device)

    def run() -> Tensor:
        return language.run(adapter, layout, layout.scored[:0])[0]

    expected = run().flatten(0, 1)[layout.scored]
    try:
        with trunk.standing(trunk.ends(run)):
            found = run().flatten(0, 1)[layout.scored]
    # whatever a model's own code makes of layers that return what they did not compute
    except Exception as error:
        LOG.info("%s: its layers below the adapter cannot be left out: %s", language.name, error)
        return False
    return distance(found, expected) <= tolerance / 50


def _mean_distance(computed: Float[Tensor, "n D"], expected: Float[Tensor, "n D"]) -> float:
    apart = (computed - expected).float().norm(dim=1) / expected.float().norm(dim=1)
    return float(apart.mean())


def distance(computed: Float[Tensor, "n D"], expected: Float[Tensor, "n D"]) -> float:
    """Return the largest relative difference of a row."""
    return float(((computed - expected).float().norm(dim=1) / expected.float().norm(dim=1)).max())
