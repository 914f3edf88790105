"""Answers drawn from a language model, each prompt read once for all its samples."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from fedpref.errors import UserError
from fedpref.models.language import LanguageModel
from fedpref.models.own_parts import NAMES, OWN_ADAPTER, OwnHead
from fedpref.models.trial import Limits, distance
from fedpref.numerics.trees import Tree
from fedpref.types import Count, Positive

LOG = logging.getLogger(__name__)

TOP_K = 50  # of transformers, where a model samples and does not say
ROWS = 256  # answers drawn at a time
SPARSE = 0.25  # share of finished answers from which they are taken out of the batch


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How answers are drawn; names as in TRL's GRPOConfig.

    What is drawn is what is trained: there is no top-k and no top-p.
    """

    max_completion_length: Count = 64
    """Tokens of an answer at most, the end token among them."""
    temperature: Positive = 1.0
    """What logits are divided by."""


@dataclass(frozen=True)
class OwnSampling:
    """How a model's own generation config has answers drawn, for answers that people read.

    Attributes:
        max_completion_length: Tokens of an answer at most.
        settings: The generation config, of transformers.
    """

    max_completion_length: int
    settings: Any

    @cached_property
    def penalties(self) -> Any:
        """What looks back at the text so far, or forbids tokens, of transformers; None where
        nothing does.
        """
        from transformers import (
            LogitsProcessorList,
            NoRepeatNGramLogitsProcessor,
            RepetitionPenaltyLogitsProcessor,
            SuppressTokensLogitsProcessor,
        )

        said, chain = self.settings, []
        if said is not None and said.repetition_penalty not in (None, 1.0):
            chain.append(RepetitionPenaltyLogitsProcessor(float(said.repetition_penalty)))
        if said is not None and said.no_repeat_ngram_size:
            chain.append(NoRepeatNGramLogitsProcessor(said.no_repeat_ngram_size))
        if said is not None and said.suppress_tokens:
            chain.append(SuppressTokensLogitsProcessor(said.suppress_tokens))
        return LogitsProcessorList(chain) if chain else None

    @cached_property
    def warpers(self) -> Any:
        """What logits go through, of transformers; None where the likeliest token is taken."""
        from transformers import (
            LogitsProcessorList,
            MinPLogitsWarper,
            TemperatureLogitsWarper,
            TopKLogitsWarper,
            TopPLogitsWarper,
        )

        said = self.settings
        if said is None or not said.do_sample or said.temperature == 0:
            return None
        chain = [TemperatureLogitsWarper(float(said.temperature or 1.0))]
        # what is left open is what transformers takes
        if top_k := TOP_K if said.top_k is None else said.top_k:
            chain.append(TopKLogitsWarper(top_k))
        if said.top_p is not None and said.top_p < 1:
            chain.append(TopPLogitsWarper(said.top_p))
        if said.min_p is not None:
            chain.append(MinPLogitsWarper(said.min_p))
        return LogitsProcessorList(chain)


@torch.no_grad()
def generate(
    language: LanguageModel,
    params: Tree | None,
    prompts: Sequence[Sequence[int]],
    samples: int,
    settings: Sampling | OwnSampling,
    rng: torch.Generator,
) -> list[tuple[int, ...]]:
    """Draw answers.

    Args:
        language: The model.
        params: An adapter, with own parts if there are any; None for the backbone alone.
        prompts: Tokens of each prompt.
        samples: Answers to each prompt.
        settings: Length and temperature, or the model's own settings.
        rng: Random numbers.

    Returns:
        Tokens of the answers, prompt after prompt. An answer ends with the end token, or has
        `max_completion_length` tokens and no end, or as many as the model can read.

    Raises:
        UserError: A prompt is as long as all that the model can read.
    """
    refuse_filled(language.limits, prompts)
    completions: list[tuple[int, ...]] = [()] * (len(prompts) * samples)
    # neighbours in length, so that little is padding
    ranked = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    size = max(1, ROWS // samples)
    switch = language.limits.switch
    longest = max(map(len, prompts), default=0) + settings.max_completion_length
    is_apart = language.is_apart or (switch is not None and longest > switch)
    if is_apart or not language.has_cache:
        size = 1  # positions are those of the longest row, which others' would follow
    with merged(language, params):
        for first in range(0, len(ranked), size):
            some = ranked[first : first + size]
            drawn = _draw(language, [prompts[i] for i in some], samples, settings, rng).tolist()
            for k, row in enumerate(drawn):
                completions[some[k // samples] * samples + k % samples] = tuple(
                    token for token in row if token >= 0
                )
    return completions


@contextmanager
def merged(language: LanguageModel, params: Tree | None) -> Iterator[None]:
    """Put adapters into the model's weights, and own parts at its head, within a `with`.

    The weights need their memory a second time; they and the head are put back afterwards. Beside
    quantised weights adapters stay factors, for a sum would be rounded.
    """
    given, model = params or {}, language.model.get_base_model()
    first = next(iter(language.parameter_names))
    adapters = [
        {name: given[prefix + name] for name in language.parameter_names}
        for prefix in ("", OWN_ADAPTER)
        if prefix + first in given
    ]
    after = {name: tensor for name, tensor in given.items() if name in NAMES}
    kept: dict[Any, Tensor] = {}
    hooks: list[Any] = []
    with language.model.disable_adapter():
        try:
            for adapter in adapters:
                for adapted in _filled(language, adapter):
                    layer = adapted.get_base_layer()
                    if not layer.weight.is_floating_point():
                        hooks.append(layer.register_forward_hook(_addition(adapted)))
                        continue
                    change = adapted.get_delta_weight("default").float()
                    # the weight before the first adapter, if two change the same layer
                    kept.setdefault(layer, layer.weight)
                    layer.weight = nn.Parameter(
                        (layer.weight.float() + change).to(layer.weight.dtype), requires_grad=False
                    )
            if after:
                model.set_output_embeddings(OwnHead(language.head, after))
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for layer, weight in kept.items():
                layer.weight = weight
            if after:
                model.set_output_embeddings(language.head)


def _filled(language: LanguageModel, adapter: Tree) -> Iterator[Any]:
    """Yield PEFT's layers, which hold the adapter's values until the next call."""
    parameters = dict(language.model.named_parameters())
    for name, full_name in language.parameter_names.items():
        there = parameters[full_name].data
        # which may have a lower rank
        there.zero_()[tuple(map(slice, adapter[name].shape))] = adapter[name]
    for layer in language.model.modules():
        if hasattr(layer, "get_delta_weight") and layer.active_adapters:
            yield layer


def _addition(layer: Any) -> Callable[[Any, tuple[Tensor, ...], Tensor], Tensor]:
    """Return a hook that adds what the adapter in a layer of PEFT makes of an input."""
    down, up = (part["default"].weight.clone() for part in (layer.lora_A, layer.lora_B))
    up *= layer.scaling["default"]

    def add(_: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        added: Tensor = inputs[0].to(down.dtype) @ down.T @ up.T
        return output + added.to(output.dtype)

    return add


def _draw(
    language: LanguageModel,
    prompts: Sequence[Sequence[int]],
    samples: int,
    settings: Sampling | OwnSampling,
    rng: torch.Generator,
) -> Int[Tensor, "A T"]:
    """Return answers' tokens [A, T], -1 after their end."""
    if not language.has_cache:
        (prompt,) = prompts
        return _drawn_without_cache(language, prompt, samples, settings, rng)
    device, longest = language.device, max(map(len, prompts))
    is_padded = any(len(prompt) < longest for prompt in prompts)
    # padding goes before the prompts, so that all of them end at the same column
    ids = torch.tensor(
        [[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=device
    )
    seen = torch.tensor(
        [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device
    )
    # the texts so far, where something looks back at them
    looks_back = isinstance(settings, OwnSampling) and settings.penalties is not None
    texts = [list(prompt) for prompt in prompts for _ in range(samples)] if looks_back else None
    cache = _cache(language)
    logits = _next(
        language, cache, ids, (seen.cumsum(1) - 1).clamp(min=0), seen if is_padded else None
    )
    # a prompt has been read once; its samples share what was computed
    if samples > 1:
        cache.batch_repeat_interleave(samples)
    logits, seen = logits.repeat_interleave(samples, 0), seen.repeat_interleave(samples, 0)
    drawn = torch.full((len(logits), settings.max_completion_length), -1, device=device)
    remaining = torch.arange(len(logits), device=device)
    lives = torch.ones_like(remaining, dtype=torch.bool)
    stops = torch.tensor(language.stops, device=device)
    for step in range(settings.max_completion_length):
        tokens = _sample(logits, settings, rng, texts and [texts[i] for i in remaining.tolist()])
        drawn[remaining[lives], step] = tokens[lives]
        lives &= ~torch.isin(tokens, stops)
        if language.limits.most is not None:  # a longer text could not be read
            lives &= seen.sum(1) + 1 < language.limits.most
        if texts:
            for i, token in zip(remaining.tolist(), tokens.tolist(), strict=True):
                texts[i].append(token)
        if not lives.any() or step + 1 == settings.max_completion_length:
            break
        # not at every end: a smaller batch costs a copy of the whole cache
        if lives.float().mean() <= 1 - SPARSE:
            rows = lives.nonzero()[:, 0]
            cache.batch_select_indices(rows)
            tokens, seen, remaining, lives = tokens[rows], seen[rows], remaining[rows], lives[rows]
        seen = nn.functional.pad(seen, (0, 1), value=1)
        logits = _next(
            language,
            cache,
            tokens[:, None],
            seen.sum(1, keepdim=True) - 1,
            seen if is_padded else None,
        )
    return drawn.cpu()


def _cache(language: LanguageModel) -> Any:
    from transformers import DynamicCache

    return DynamicCache(config=language.model.config)


@torch.no_grad()
def keeps_states(language: LanguageModel) -> bool:
    """Return whether a model goes on from what it keeps of prompts of several lengths, repeated and
    chosen from, as it would from the whole texts.

    Of models whose layers keep no keys and values it is often otherwise, and nothing says so.
    """
    count = len(language.model.get_input_embeddings().weight)
    tokens = torch.randint(count, (7,), generator=torch.Generator().manual_seed(0)).tolist()
    prompts, after = [tokens[:2], tokens[2:6]], tokens[6]
    device = language.device
    try:
        expected = [
            _next(language, None, torch.tensor([[*prompt, after]], device=device), None, None)
            for prompt in prompts
        ]
        cache = _cache(language)
        ids = torch.tensor([[0, 0, *prompts[0]], prompts[1]], device=device)
        seen = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]], device=device)
        _next(language, cache, ids, (seen.cumsum(1) - 1).clamp(min=0), seen)
        cache.batch_repeat_interleave(2)
        rows = torch.tensor([0, 2], device=device)
        cache.batch_select_indices(rows)
        seen = nn.functional.pad(seen, (0, 1), value=1)
        last = torch.full((2, 1), after, device=device)
        found = _next(language, cache, last, seen.sum(1, keepdim=True) - 1, seen)
        apart = distance(found, torch.cat(expected))
    # whatever a model's own code makes of a cache that is not of its kind
    except Exception as error:
        LOG.info("%s: nothing is kept of a prompt: %s", language.name, error)
        apart = math.inf
    works = apart <= (1e-3 if language.dtype == torch.float32 else 0.2)
    if not works:
        warnings.warn(
            f"{language.name}: what it keeps of a prompt cannot be gone on from, so that each step "
            "of an answer reads the whole text again, slowly.",
            stacklevel=4,
        )
    return works


def _drawn_without_cache(
    language: LanguageModel,
    prompt: Sequence[int],
    samples: int,
    settings: Sampling | OwnSampling,
    rng: torch.Generator,
) -> Int[Tensor, "A T"]:
    """Return answers' tokens [A, T], each of whose steps reads the whole text anew."""
    ids = torch.tensor([list(prompt)] * samples, device=language.device)
    most = language.limits.most
    drawn = torch.full((samples, settings.max_completion_length), -1)
    lives = torch.ones(samples, dtype=torch.bool)
    for step in range(settings.max_completion_length):
        logits = _next(language, None, ids, None, None)
        tokens = _sample(logits, settings, rng, ids.tolist())
        drawn[lives, step] = tokens.cpu()[lives]
        lives &= ~torch.isin(tokens.cpu(), torch.tensor(language.stops))
        if not lives.any() or (most is not None and ids.shape[1] + 1 >= most):
            break
        ids = torch.cat([ids, tokens[:, None]], 1)
    return drawn


def _next(
    language: LanguageModel,
    cache: Any,
    ids: Int[Tensor, "A t"],
    positions: Int[Tensor, "A t"] | None,
    seen: Int[Tensor, "A T"] | None,
) -> Float[Tensor, "A V"]:
    """Return the logits of what follows each row [A, V]; without a cache, of whole texts."""
    model = language.model.get_base_model()
    hook = model.get_output_embeddings().register_forward_pre_hook(
        # the head sees the last token alone, for logits of whole prompts would be the largest
        # tensor of all; of a view its product would copy the head for each prompt
        lambda _, inputs: (inputs[0][:, -1:].contiguous(),)
    )
    try:
        call = {
            "input_ids": ids,
            "position_ids": positions,
            "attention_mask": seen,
            "past_key_values": cache,
            "use_cache": cache is not None,
        }
        call = {name: value for name, value in call.items() if value is not None}
        logits: Tensor = model(**call).logits
        return logits[:, 0].float()
    finally:
        hook.remove()


def refuse_filled(limits: Limits, prompts: Sequence[Sequence[int]]) -> None:
    """Raise UserError where a prompt leaves no room for an answer."""
    longest = max(map(len, prompts), default=0)
    if limits.most is not None and longest >= limits.most:
        raise UserError(
            f"a prompt has {longest} tokens, and the model can read {limits.most} in all, so that "
            "no answer has room behind it. Take shorter prompts, or another model."
        )


def _sample(
    logits: Float[Tensor, "A V"],
    settings: Sampling | OwnSampling,
    rng: torch.Generator,
    texts: Sequence[Sequence[int]] | None,
) -> Int[Tensor, " A"]:
    """Return one token of each row: where a random point falls in the cumulated probabilities."""
    if isinstance(settings, Sampling):
        logits = logits / settings.temperature
    else:
        if settings.penalties is not None and texts is not None:
            # a row's own text, without what pads it
            rows = [
                settings.penalties(torch.tensor([text], device=logits.device), row[None])
                for text, row in zip(texts, logits, strict=True)
            ]
            logits = torch.cat(rows)
        if settings.warpers is None:
            return logits.argmax(1)
        logits = settings.warpers(torch.empty(0, dtype=torch.long), logits)  # of logits alone
    # in float64, or the sum over a vocabulary is off by more than rare tokens' probabilities
    reached = logits.softmax(-1).cumsum(-1, dtype=torch.float64)
    points = (
        torch.rand(len(logits), 1, dtype=torch.float64, generator=rng).to(logits.device)
        * reached[:, -1:]
    )
    return torch.searchsorted(reached, points, right=True)[:, 0].clamp(max=logits.shape[1] - 1)
