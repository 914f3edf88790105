"""A causal language model of transformers, with adapters and own parts as trees."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import cached_property
from hashlib import blake2b
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call

from fedpref.data.preferences import Message
from fedpref.errors import UserError
from fedpref.models import devices, quantized
from fedpref.models import fused_layers as fusion
from fedpref.models.adapter_files import write_adapter
from fedpref.models.adapter_layers import with_adapter
from fedpref.models.attention import (
    Kernel,
    PackingError,
    by_part,
    packed_attention,
    register,
)
from fedpref.models.backbone import PREFIX, load_backbone
from fedpref.models.casting import aligned, cast
from fedpref.models.checkpointing import checkpoint_layers
from fedpref.models.graphs import Graphs
from fedpref.models.head import even, token_log_probabilities
from fedpref.models.model_settings import Model
from fedpref.models.named import MODELS, base_of, converted, located
from fedpref.models.own_parts import (
    FILE,
    NAMES,
    REWARD,
    REWARD_MEAN,
    Parts,
    after_bottleneck,
    combined_adapter,
    own_head,
)
from fedpref.models.packed import Layout, Row
from fedpref.models.texts import Texts
from fedpref.models.trial import Limits, gradients_come_apart, tried
from fedpref.models.trunk import SUFFIX, States, Trunk, row_of_layers
from fedpref.models.variable_length import by_variable_length
from fedpref.numerics import trees
from fedpref.numerics.trees import Tree

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of a number


class LanguageModel:
    """A frozen backbone, its tokenizer, and the shape of an adapter.

    The adapter's values are passed in as a tree, so that one backbone serves any number of clients.
    A tree's names are those of PEFT's own adapter files: a tree saved is an adapter saved.

    Args:
        settings: Which model, and the adapter's shape.

    Raises:
        UserError: The model cannot be loaded, or the adapter does not fit it.
    """

    def __init__(self, settings: Model) -> None:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        import transformers
        from peft.tuners.tuners_utils import BaseTunerLayer

        transformers.utils.logging.disable_progress_bar()
        register()
        self.name = settings.path
        self.settings = settings
        self.wanted = devices.wanted(settings.device)
        self.device = torch.device("cpu")
        # what a GPU computes in is seen when it is opened
        known = self.wanted.type == "cpu" or settings.dtype != "auto"
        dtype: Any = devices.arithmetic(settings.dtype, self.wanted) if known else "auto"
        path = located(settings.path)
        if settings.gguf_file is not None:
            # a GPU's arithmetic may not be known yet; its weights can be cast
            wanted = str(dtype).removeprefix("torch.") if known else "float32"
            path = str(converted(path, settings.gguf_file, settings.revision, wanted))
        options = {"revision": settings.revision, "trust_remote_code": settings.trust_remote_code}
        bits = quantized.options(settings.bits, dtype) if settings.bits else {}
        self.backbone = load_backbone(path, dtype, options, settings.path, bits)
        if settings.bits:
            quantized.settle(self.backbone.model, self.backbone.model.dtype)
        if settings.path in MODELS:
            self.backbone = replace(self.backbone, base=base_of(settings.path))
        self.texts = Texts(self.backbone.tokenizer, self.backbone.model, settings.template_date)
        self.model = with_adapter(self.backbone, settings)
        self.model.requires_grad_(False)
        fusion.fuse(self.model)
        self.head = self.model.get_output_embeddings()
        self.dropouts = [
            module for name, module in self.model.named_modules() if name.endswith("lora_dropout")
        ]
        self.adapted = [
            module for module in self.model.modules() if isinstance(module, BaseTunerLayer)
        ]
        self.parameter_names = {
            name.replace(".default", ""): name
            for name, _ in self.model.named_parameters()
            if ".lora_" in name
        }
        adapted = {name.split(".lora_")[0] for name in self.parameter_names.values()}
        self.trunk = Trunk(self.model, adapted)
        if settings.gradient_checkpointing and (row := row_of_layers(self.model)):
            checkpoint_layers(list(row[1])[len(self.trunk.layers) :])
        self.states = States(settings.trunk_limit_mb * 10**6)
        self.kernel: Kernel = by_part
        self.graphs: Graphs | None = None
        self.packs = self.has_plain_head = self.is_apart = False
        self.limits = Limits.of(self.model)
        if self.wanted.type == "cpu":
            self._settle(self.wanted)

    def move_to(self, worker: int) -> None:
        """Move to the device of a worker, counted from 0.

        Each worker in a process of its own moves its own copy.
        """
        device = devices.of_worker(self.wanted, worker)
        if device != self.device:
            self._settle(device)

    def _settle(self, device: torch.device) -> None:
        self.device, self.dtype = device, devices.arithmetic(self.settings.dtype, device)
        self.model.to(device)
        # buffers stay: positions need float32
        for parameter in self.model.parameters() if device.type == "cuda" else ():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(self.dtype)
        if self.settings.bits:
            quantized.settle(self.model, self.dtype)
        for tried_before in ("has_apart", "has_cache"):
            self.__dict__.pop(tried_before, None)
        trial = tried(self)
        self.has_plain_head, self.is_apart = trial.has_plain_head, trial.is_apart
        self.packs, self.kernel = trial.problem is None, trial.kernel
        self.graphs = self._recorded()
        # where positions depend on a row's length, so do a prompt's states on its answer
        is_own = self.limits.switch is None and not self.is_apart
        self.trunk.works = trial.has_trunk and is_own and self.settings.trunk_states != "none"
        if trial.problem:
            warnings.warn(
                f"{self.name}: the packed form does not fit this model ({trial.problem}); the "
                "padded one is used.",
                stacklevel=3,
            )

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer, of transformers."""
        return self.backbone.tokenizer

    @property
    def description(self) -> str:
        """Sizes, arithmetic, device and form, in words."""
        counts = [0, 0]
        for name, parameter in self.model.named_parameters():
            counts[".lora_" in name] += quantized.size(parameter)
        bits = f" in {self.settings.bits} bits" if self.settings.bits else ""
        sizes = (
            f"model {self.name}: {counts[0] / 1e6:,.1f} M frozen parameters{bits}, "
            f"{counts[1] / 1e6:,.2f} M in the adapter"
        )
        if self.device.type != self.wanted.type:
            return f"{sizes}, to compute on {self.wanted}"
        return (
            f"{sizes}, {str(self.dtype).removeprefix('torch.')} on {self.device}, "
            f"{'packed' if self.packs else 'padded'} rows"
        )

    @property
    def adapted_ends(self) -> frozenset[str]:
        """Which ends of the model have an adapter: `embeddings`, `head`."""
        has_embeddings = any(".lora_embedding_" in name for name in self.parameter_names)
        ends = {"embeddings": has_embeddings, "head": hasattr(self.head, "lora_A")}
        return frozenset(end for end, is_adapted in ends.items() if is_adapted)

    @property
    def context(self) -> int | None:
        """Tokens that the backbone can take, where its config says so."""
        return self.limits.context

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the frozen backbone's weights, its config and what it computes in.

        It does not depend on the adapter, nor on the layers where that is.
        """
        weights = {
            name.removeprefix(PREFIX).replace(".base_layer", ""): weight.detach()
            for name, weight in self.model.named_parameters()
            if ".lora_" not in name
        }
        if self.settings.bits:
            for name, module in self.model.named_modules():
                for kind, scale in quantized.scales(module).items():
                    weights[f"{name.removeprefix(PREFIX)} {kind}"] = scale
        config = self.model.get_base_model().config.to_dict()
        said = {
            name: value
            for name, value in config.items()
            if name[0] != "_" and name not in ("transformers_version", "dtype", "torch_dtype")
        }
        digest = blake2b(json.dumps([said, self.wanted.type], default=str).encode(), digest_size=16)
        for name, weight in sorted(weights.items()):
            digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
            # all bits in one sum, and some by their place
            bits = weight.contiguous().view(BITS[weight.element_size()])
            digest.update(str(int(bits.sum(dtype=torch.int64))).encode())
            sample = bits.flatten()[:: max(1, bits.numel() // 64)].cpu()
            digest.update(sample.numpy().tobytes())
        return digest.hexdigest()

    def keep_in(self, folder: Path) -> None:
        """Keep states of the trunk in a file of a folder, if the settings say so."""
        if self.trunk.layers and self.settings.trunk_states == "file":
            self.states.kept.keep_in(
                folder / f"{self.fingerprint}-{len(self.trunk.layers)}{SUFFIX}"
            )

    def passing(self) -> States:
        """Return a place for states of the trunk of rows that come again soon, as drawn answers do;
        they are gone with it.
        """
        return States(self.settings.trunk_limit_mb * 10**6)

    def init(self, rng: torch.Generator) -> Tree:
        """Return a fresh adapter in float32 on the CPU, drawn as PEFT does.

        A is uniform and B zero, so that the model starts as its backbone.
        """
        parameters = dict(self.model.named_parameters())
        adapter = {
            name: torch.zeros(parameters[full_name].shape)
            for name, full_name in self.parameter_names.items()
        }
        for name, tensor in adapter.items():
            if ".lora_A." in name:
                nn.init.kaiming_uniform_(tensor, a=math.sqrt(5), generator=rng)
            elif "lora_embedding_B" in name:
                nn.init.normal_(tensor, generator=rng)
        return adapter

    def fresh(self, settings: Parts, rng: torch.Generator) -> Tree:
        """Return a client's own parts as they begin.

        Raises:
            UserError: The model's vocabulary head cannot stand beside them.
        """
        # what a GPU computes is seen when a worker has moved there
        is_seen = self.device.type == self.wanted.type
        if settings.after and (is_seen or "head" in self.adapted_ends) and not self.has_plain_head:
            raise self._no_parts()
        return settings.init(self.head.weight, self.init(rng), rng)

    def _no_parts(self) -> UserError:
        return UserError(
            f"{self.name}: parts of a client's own need logits that are the vocabulary "
            "head's alone, and a head without an adapter. "
            "Take another model, or leave the head out of task.model.lora_target_modules."
        )

    def log_probabilities(
        self, params: Tree | None, rows: Sequence[Row], *, training: bool = False
    ) -> Float[Tensor, " A"]:
        """Return the summed log-probability of each answer [A]; see `score`."""
        return self.score(params, rows, training=training)[0]

    def score(
        self,
        params: Tree | None,
        rows: Sequence[Row],
        *,
        training: bool = False,
        units: Sequence[int] = (),
    ) -> tuple[Float[Tensor, " A"], Float[Tensor, " A"] | None]:
        """Score answers.

        Args:
            params: An adapter, with own parts if there are any; None for the backbone. They compute
                in the backbone's dtype; their gradients arrive in their own.
            rows: Prompts' tokens, each with its answers' tokens.
            training: Draw the adapter's dropout. The backbone's stays off, since DPO compares
                log-probabilities.
            units: Of how many rows each unit is, whose gradients come apart: the adapter is then
                given by `copies`, one for each unit.

        Returns:
            Each answer's summed log-probability [A], in the order of the rows, and its explicit
            reward [A] if the parameters have a reward head.
        """
        states, layout, own, logits = self._states(
            params, rows, training, kept=self.states, units=units
        )
        if logits is None:
            return self._answers(states, layout, own)
        if own:
            raise self._no_parts()
        return layout.per_answer(
            -nn.functional.cross_entropy(logits[0].float(), layout.targets, reduction="none")
        ), None

    def copies(self, params: Tree, count: int) -> dict[str, Tensor]:
        """Return leaves of which each has a copy of a parameter for each unit, without memory.

        Args:
            params: Of an adapter.
            count: How many units.
        """
        each = {n: aligned(t.detach().to(self.device, self.dtype)) for n, t in params.items()}
        return {
            name: tensor.expand(count, *tensor.shape).requires_grad_()
            for name, tensor in each.items()
        }

    def takes_apart(self, rows: Sequence[Row]) -> bool:
        """Return whether units' gradients come out of one pass over these rows."""
        return self.has_apart and self._groups(rows) is None

    @cached_property
    def has_cache(self) -> bool:
        """Whether answers can be drawn from what is kept of a prompt; tried on a few tokens."""
        from fedpref.models.generation import keeps_states

        return keeps_states(self)

    @cached_property
    def has_apart(self) -> bool:
        """Whether units' gradients come out of one pass at all; tried once on a few tokens."""
        if self.settings.lora_dropout or self.settings.gradient_checkpointing or self.is_apart:
            return False
        return gradients_come_apart(self)

    def tokens(
        self,
        params: Tree | None,
        rows: Sequence[Row],
        *,
        training: bool = False,
        temperature: float = 1.0,
        kept: States | None = None,
    ) -> tuple[Float[Tensor, " n"], Float[Tensor, "n D"]]:
        """Return each answer token's log-probability [n], and the hidden state that predicts it [n,
        D].

        Tokens stand answer after answer; own parts are not used.

        Args:
            params: An adapter; None for the backbone.
            rows: Prompts' tokens, each with its answers' tokens.
            training: Draw the adapter's dropout.
            temperature: What logits are divided by.
            kept: The rows' states at the trunk's end, as `passing` gives them.
        """
        states, layout, _, logits = self._states(params, rows, training, kept=kept)
        hidden = states.flatten(0, 1).index_select(0, layout.scored)
        if logits is not None:
            return -nn.functional.cross_entropy(
                logits[0].float() / temperature, layout.targets, reduction="none"
            ), hidden
        bias = None if self.head.bias is None else self.head.bias / temperature
        return token_log_probabilities(
            hidden / temperature, self.head.weight, bias, layout.targets
        ), hidden

    def _states(
        self,
        params: Tree | None,
        rows: Sequence[Row],
        training: bool,
        *,
        kept: States | None = None,
        units: Sequence[int] = (),
    ) -> tuple[Float[Tensor, "R T D"], Layout, Tree, Float[Tensor, "1 n V"] | None]:
        """Run the model.

        Args:
            params: An adapter and own parts; None for the backbone.
            rows: Prompts' tokens, each with its answers' tokens.
            training: Draw the adapter's dropout.
            kept: Where the rows' states at the trunk's end are, for rows that come again.
            units: Of how many rows each unit is, whose gradients come apart; of none, nobody's.

        Returns:
            Hidden states, where they lie, own parts in the model's arithmetic, and answers' logits
            where the head alone does not give them.
        """
        for dropout in self.dropouts:
            dropout.train(training)
        given = cast(params or {}, self.device, self.dtype)
        adapter = combined_adapter(
            {name: tensor for name, tensor in given.items() if name not in NAMES}
        )
        own = {name: tensor for name, tensor in given.items() if name in NAMES}
        groups = self._groups(rows)
        if not self.trunk.works or (groups is not None and len(groups) > 1):
            kept = None
        if self.packs and groups is None:
            with suppress(PackingError):  # a window of attention that is shorter than these rows
                layout = Layout.packed(rows, self.device)
                with (
                    self._standing(kept, rows, layout, Layout.packed),
                    _apart(rows, layout, units),
                ):
                    return self._packed(adapter, layout, training), layout, own, None
        layout = Layout.padded(rows, self.device)
        with (
            self._standing(kept, rows, layout, Layout.padded),
            _apart(rows, layout, units),
        ):
            states, logits = self.run(
                adapter,
                layout,
                layout.scored[:0] if self.has_plain_head else layout.scored,
                groups=groups,
            )
        return states, layout, own, None if self.has_plain_head else logits

    def _packed(
        self, adapter: Tree, layout: Layout, training: bool = False
    ) -> Float[Tensor, "R T D"]:
        # drawn dropout, copies for units, and what breaks the call off are not recorded
        is_drawn = training and self.settings.lora_dropout > 0
        is_apart = any(tensor.dim() > 2 for tensor in adapter.values())
        if self.graphs is not None and not (is_drawn or is_apart or self.trunk.is_ending):
            states = self.graphs.states(adapter, layout, self.trunk.given)
            if states is not None:
                return states
        return self.computed(adapter, layout, self.kernel, None)

    def _recorded(self) -> Graphs | None:
        """Return recordings of this model's launches, of which there are none yet; None where they
        cannot be recorded.
        """
        settings = self.settings
        if (
            not settings.cuda_graphs
            or self.device.type != "cuda"
            or self.kernel is not by_variable_length
            or settings.gradient_checkpointing
            or settings.bits
            or self.limits.reach
        ):
            return None

        return Graphs(self.name, self.computed)

    def computed(
        self, adapter: Tree, layout: Layout, kernel: Kernel, standing: Tensor | None
    ) -> Float[Tensor, "1 T D"]:
        """Return the states of a packed row.

        Args:
            adapter: In the model's arithmetic; empty for the backbone.
            layout: The row.
            kernel: How to attend.
            standing: States that stand for the trunk, if they do.
        """
        with (
            packed_attention(layout, kernel),
            nullcontext() if standing is None else self.trunk.standing(standing),
        ):
            return self.run(adapter, layout, layout.scored[:0])[0]

    def _standing(
        self,
        kept: States | None,
        rows: Sequence[Row],
        layout: Layout,
        form: Callable[..., Layout],
    ) -> AbstractContextManager[None]:
        """Let states stand for the trunk, within a `with`; those that are not kept are computed."""
        if kept is None:
            return nullcontext()

        @torch.no_grad()
        def ends(some: Sequence[Row]) -> tuple[Float[Tensor, "R T D"], Layout]:
            where = form(some, self.device)
            if form is Layout.packed:
                return self.trunk.ends(lambda: self._packed({}, where)), where
            return self.trunk.ends(lambda: self.run({}, where, where.scored[:0])), where

        return self.trunk.standing(kept.of(rows, layout, self.dtype, ends))

    def _groups(self, rows: Sequence[Row]) -> list[list[int]] | None:
        """Return which answers are computed together, where not all can be; None where they can.

        Raises:
            UserError: A row is longer than the model takes.
        """
        lengths = [len(prompt) + len(answer) for prompt, answers in rows for answer in answers]
        limits = self.limits
        if limits.is_strict and limits.context and max(lengths) > limits.context:
            raise UserError(
                f"{self.name}: a row has {max(lengths)} tokens, and the model takes "
                f"{limits.context}. Set task.max_length to {limits.context} or less."
            )
        if self.is_apart:
            return [[i] for i in range(len(lengths))]
        # of a whole forward pass, positions are those of its longest row
        short = [i for i, n in enumerate(lengths) if limits.switch is None or n <= limits.switch]
        long = [i for i in range(len(lengths)) if i not in set(short)]
        if short and long:
            return [short, long]
        # a chunk that is in the mask alone, which the packed form does not read
        is_beyond = limits.reach is not None and max(lengths) > limits.reach
        return [list(range(len(lengths)))] if is_beyond else None

    def _answers(
        self, states: Float[Tensor, "R T D"], layout: Layout, own: Tree
    ) -> tuple[Float[Tensor, " A"], Float[Tensor, " A"] | None]:
        hidden = states.flatten(0, 1)
        scored = after_bottleneck(even(hidden.index_select(0, layout.scored)), own)[
            : len(layout.scored)
        ]
        weight, change = own_head(self.head.weight, own)
        tokens = token_log_probabilities(scored, weight, self.head.bias, layout.targets, change)
        sums = layout.per_answer(tokens)
        if REWARD in own:
            last = after_bottleneck(even(hidden.index_select(0, layout.last)), own)
            return sums, (last[: len(layout.last)] * own[REWARD]).float().sum(1)
        if REWARD_MEAN in own:
            return sums, (_means(hidden, layout, own) * own[REWARD_MEAN].float()).sum(1)
        return sums, None

    def mean_states(self, rows: Sequence[Row]) -> Float[Tensor, "A D"]:
        """Return the backbone's mean hidden state over each answer's own tokens [A, D].

        Args:
            rows: Prompts' tokens, each with its answers' tokens.
        """
        states, layout, _, _ = self._states(None, rows, training=False, kept=self.states)
        return _means(states.flatten(0, 1), layout, {})

    def run(
        self,
        adapter: Tree,
        layout: Layout,
        positions: Int[Tensor, " m"],
        *,
        groups: Sequence[Sequence[int]] | None = None,
        factor: float = 1.0,
        own_positions: bool = False,
    ) -> tuple[Float[Tensor, "R T D"], Float[Tensor, "1 m V"]]:
        """Return the states that come to the vocabulary head, and its logits at some places alone.

        Args:
            adapter: The adapter, in the model's arithmetic; empty for the backbone.
            layout: The tokens.
            positions: Places of the flattened ids [m].
            groups: Of a padded layout, the rows of each forward pass; all in one by default.
            factor: What states are multiplied by before the head.
            own_positions: Let the model count positions itself.
        """
        if groups is None or len(groups) == 1:
            counted = None if own_positions else layout.positions
            return self._forward(adapter, layout.ids, counted, positions, factor)
        width = layout.ids.shape[1]
        lengths = (layout.last % width + 1).tolist()
        parts, order, places = [], [], []
        for group in groups:
            rows = torch.tensor(group, device=self.device)
            longest = max(lengths[row] for row in group)
            mine = torch.isin(positions // width, rows).nonzero()[:, 0]
            of_row = torch.zeros(len(layout.ids), dtype=torch.long, device=self.device)
            of_row[rows] = torch.arange(len(group), device=self.device)
            here = positions[mine]
            states, logits = self._forward(
                adapter,
                layout.ids[rows, :longest],
                layout.positions[rows, :longest],
                of_row[here // width] * longest + here % width,
                factor,
            )
            parts.append((nn.functional.pad(states, (0, 0, 0, width - longest)), logits))
            order.append(rows)
            places.append(mine)
        states, logits = torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts], 1)
        return states[torch.cat(order).argsort()], logits[:, torch.cat(places).argsort()]

    def _forward(
        self,
        adapter: Tree,
        ids: Int[Tensor, "R T"],
        position_ids: Int[Tensor, "R T"] | None,
        positions: Int[Tensor, " m"],
        factor: float,
    ) -> tuple[Float[Tensor, "R T D"], Float[Tensor, "1 m V"]]:
        states: list[Tensor] = []

        def cut(_: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
            states.append(inputs[0])
            chosen = inputs[0].flatten(0, 1)[positions][None]
            return (chosen if factor == 1.0 else chosen * factor,)

        hook = self.head.register_forward_pre_hook(cut)
        try:
            with nullcontext() if adapter else self._without_adapter():
                call: dict[str, Any] = {"input_ids": ids, "use_cache": False}
                if position_ids is not None:
                    call["position_ids"] = position_ids
                parameters = {
                    self.parameter_names[name]: tensor for name, tensor in adapter.items()
                }
                # no two of an adapter's tensors are one: to look for such takes longer than a layer
                logits = functional_call(self.model, parameters, (), call, tie_weights=False).logits
            return states[0], logits
        finally:
            hook.remove()

    @contextmanager
    def _without_adapter(self) -> Iterator[None]:
        """Turn the adapter off within a `with`.

        PEFT's own way asks every module of the model how it stands, which takes as long as a layer.
        """
        layers = [layer for layer in self.adapted if not layer.disable_adapters]
        for layer in layers:
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in layers:
                layer.enable_adapters(True)

    def export(self, params: Tree, folder: Path) -> None:
        """Write a folder that `load_model` loads, and PEFT if there are no own parts, with the
        tokenizer.
        """
        folder.mkdir(parents=True, exist_ok=True)
        write_adapter(self.model.peft_config["default"], params, self.backbone.merged, folder)
        self.tokenizer.save_pretrained(str(folder))
        if own := trees.select(params, NAMES):
            trees.save(own, folder / FILE)

    # ---- text to tokens

    def encode(self, prompt: str, answer: str) -> tuple[list[int], list[int]]:
        """Return the tokens of a plain prompt and of an answer; see `Texts.plain`."""
        opening, (closed,) = self.texts.plain(prompt, [answer])
        return opening, closed

    def encode_chat(
        self, prompt: Sequence[Message], answers: Sequence[Sequence[Message]]
    ) -> tuple[list[int], list[list[int]]]:
        """Return the tokens of a conversation and of each answer to it; see `Texts.chat`."""
        return self.texts.chat(prompt, answers)

    def opens(self, prompt: Sequence[int]) -> int:
        """Return how many of a prompt's first tokens are the tokenizer's opening token.

        They stay when a prompt is cut.
        """
        return int(
            self.tokenizer.bos_token_id is not None and prompt[0] == self.tokenizer.bos_token_id
        )

    @property
    def stops(self) -> list[int]:
        """The tokens that end an answer."""
        return self.texts.stops

    @property
    def chats(self) -> bool:
        """Whether the tokenizer has a chat template."""
        return self.texts.chats


def _means(hidden: Float[Tensor, "n D"], layout: Layout, own: Tree) -> Float[Tensor, "A D"]:
    """Return the mean state over each answer's own tokens, behind a bottleneck if there is one."""
    answers = [mine for before, mine in layout.parts if before]
    places = torch.tensor([place for mine in answers for place in mine], device=hidden.device)
    each = after_bottleneck(even(hidden.index_select(0, places)), own)[: len(places)]
    return torch.stack([part.float().mean(0) for part in each.split([len(a) for a in answers])])


def _apart(
    rows: Sequence[Row], layout: Layout, units: Sequence[int]
) -> AbstractContextManager[None]:
    """Let copies of an adapter have the gradients of their units, within a `with`."""
    if not units:
        return nullcontext()
    # a prompt and its answers each; a row of the padded form has its prompt once more
    padded = len(layout.parts) == 2 * sum(len(answers) for _, answers in rows)
    parts = [2 * len(answers) if padded else 1 + len(answers) for _, answers in rows]
    ends = [0, *accumulate(parts)]
    bounds = [0, *accumulate(units)]
    spans = tuple(
        (layout.parts[ends[a]][1].start, layout.parts[ends[b] - 1][1].stop)
        for a, b in pairwise(bounds)
    )
    return fusion.taken_apart(layout.ids.numel(), spans)
