"""A causal language model of transformers, with adapters and own parts as trees."""

from __future__ import annotations

import math
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import blake2b
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from jinja2 import TemplateError
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.func import functional_call

from fedpref.errors import UserError
from fedpref.models import devices
from fedpref.models import fused_layers as fusion
from fedpref.models.attention import (
    ATTENTION,
    Kernel,
    PackingError,
    by_sequence,
    kernels,
    packed_attention,
    register,
)
from fedpref.models.head import even, token_log_probabilities
from fedpref.models.own_parts import (
    FILE,
    NAMES,
    OWN_ADAPTER,
    REWARD,
    Parts,
    after_bottleneck,
    combined_adapter,
    own_head,
)
from fedpref.models.packed import Layout, Row
from fedpref.numerics import trees
from fedpref.numerics.trees import Tree
from fedpref.types import Count, Fraction

BUILTIN = "builtin"


@dataclass(frozen=True)
class Model:
    """Which language model, and its adapter; LoRA's names are those of PEFT's LoraConfig."""

    path: str = BUILTIN
    """A Hub id, a local folder, or `builtin`, the small model that comes with fedpref."""
    revision: str | None = None
    """A branch, tag or commit of a Hub id."""
    trust_remote_code: bool = False
    """Run code that comes with the model."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """The arithmetic of the frozen backbone; `auto` is bfloat16 where the processor has it."""
    device: str = "auto"
    """Where is computed: `cpu`, `cuda`, `cuda:1`; `auto` takes CUDA where there is one."""
    lora_r: Count = 8
    """The adapter's rank."""
    lora_alpha: Count = 16
    """The adapter's scale times its rank."""
    lora_dropout: Fraction = 0.0
    """Dropout on the adapter's input in training."""
    lora_target_modules: tuple[str, ...] | str = "all-linear"
    """Names of the layers that have an adapter, or a regular expression, or `all-linear`."""


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
        from peft import LoraConfig, PeftModel, get_peft_model

        transformers.utils.logging.disable_progress_bar()
        register()
        self.name = settings.path
        self.settings = settings
        self.wanted = devices.wanted(settings.device)
        self.device = torch.device("cpu")
        # what a GPU computes in is seen when it is opened
        known = self.wanted.type == "cpu" or settings.dtype != "auto"
        dtype: Any = devices.arithmetic(settings.dtype, self.wanted) if known else "auto"
        path = (
            str(files("fedpref.models") / "builtin") if settings.path == BUILTIN else settings.path
        )
        options: dict[str, Any] = {
            "revision": settings.revision,
            "trust_remote_code": settings.trust_remote_code,
        }
        try:
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(path, **options)
            backbone = transformers.AutoModelForCausalLM.from_pretrained(
                path, dtype=dtype, **options
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise UserError(
                f"model.path: {settings.path!r} could not be loaded as a causal language model "
                "of transformers. "
                "Expected a local folder with config.json, weights and a tokenizer, or a Hub id "
                "that can be reached "
                f"(or is in the cache). transformers says: {str(error).splitlines()[0]}"
            ) from error
        targets = settings.lora_target_modules
        adapter = LoraConfig(
            task_type="CAUSAL_LM",
            r=settings.lora_r,
            lora_alpha=settings.lora_alpha,
            lora_dropout=settings.lora_dropout,
            target_modules=targets if isinstance(targets, str) else list(targets),
            base_model_name_or_path=path,
        )
        try:
            with warnings.catch_warnings():
                warnings.simplefilter(
                    "ignore"
                    # of PEFT about GPT-2's transposed weights, which it handles, and its own
                    # deprecations
                )
                self.model: PeftModel = get_peft_model(backbone, adapter).eval()
        except (ValueError, re.error) as error:
            raise UserError(
                f"model.lora_target_modules: {targets!r} does not fit the model: {error}"
            ) from error
        self.model.requires_grad_(False)
        fusion.fuse(self.model)
        self.head = self.model.get_output_embeddings()
        self.dropouts = [
            module for name, module in self.model.named_modules() if name.endswith("lora_dropout")
        ]
        self.parameter_names = {
            name.replace(".default", ""): name
            for name, _ in self.model.named_parameters()
            if ".lora_" in name
        }
        self.kernel: Kernel = by_sequence
        self.packs = self.has_plain_head = False
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
            parameter.data = parameter.data.to(self.dtype)
        problem = self._packing_problem()
        self.packs = problem is None
        if problem:
            warnings.warn(
                f"{self.name}: the packed form does not fit this model ({problem}); the padded "
                "one is used.",
                stacklevel=3,
            )

    @property
    def description(self) -> str:
        """Sizes, arithmetic, device and form, in words."""
        counts = [0, 0]
        for name, parameter in self.model.named_parameters():
            counts[".lora_" in name] += parameter.numel()
        sizes = (
            f"model {self.name}: {counts[0] / 1e6:,.1f} M frozen parameters, "
            f"{counts[1] / 1e6:,.2f} M in the adapter"
        )
        if self.device.type != self.wanted.type:
            return f"{sizes}, to compute on {self.wanted}"
        return (
            f"{sizes}, {str(self.dtype).removeprefix('torch.')} on {self.device}, "
            f"{'packed' if self.packs else 'padded'} rows"
        )

    @property
    def context(self) -> int | None:
        """Tokens that the backbone can take, where its config says so."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the frozen backbone as it was loaded, and of what it computes on.

        It is made of all shapes and a sample of each weight.
        """
        digest = blake2b(digest_size=16)
        for name, weight in self.model.named_parameters():
            if ".lora_" not in name:
                sample = weight.detach().flatten()[:: max(1, weight.numel() // 64)].float().cpu()
                digest.update(
                    f"{name} {tuple(weight.shape)} {weight.dtype} {self.wanted.type}".encode()
                )
                digest.update(sample.numpy().tobytes())
        return digest.hexdigest()

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
        if settings.after and not self.has_plain_head:
            raise UserError(
                f"{self.name}: parts of a client's own need logits that are the vocabulary "
                "head's alone, and a head without an adapter. "
                "Take another model, or leave the head out of task.model.lora_target_modules."
            )
        return settings.init(self.head.weight, self.init(rng), rng)

    def log_probabilities(
        self, params: Tree | None, rows: Sequence[Row], *, training: bool = False
    ) -> Float[Tensor, " A"]:
        """Return the summed log-probability of each answer [A]; see `score`."""
        return self.score(params, rows, training=training)[0]

    def score(
        self, params: Tree | None, rows: Sequence[Row], *, training: bool = False
    ) -> tuple[Float[Tensor, " A"], Float[Tensor, " A"] | None]:
        """Score answers.

        Args:
            params: An adapter, with own parts if there are any; None for the backbone. They compute
                in the backbone's dtype; their gradients arrive in their own.
            rows: Prompts' tokens, each with its answers' tokens.
            training: Draw the adapter's dropout. The backbone's stays off, since DPO compares
                log-probabilities.

        Returns:
            Each answer's summed log-probability [A], in the order of the rows, and its explicit
            reward [A] if the parameters have a reward head.
        """
        states, layout, own, logits = self._states(params, rows, training)
        if logits is None:
            return self._answers(states, layout, own)
        return layout.per_answer(
            -nn.functional.cross_entropy(logits[0].float(), layout.targets, reduction="none")
        ), None

    def tokens(
        self,
        params: Tree | None,
        rows: Sequence[Row],
        *,
        training: bool = False,
        temperature: float = 1.0,
    ) -> tuple[Float[Tensor, " n"], Float[Tensor, "n D"]]:
        """Return each answer token's log-probability [n], and the hidden state that predicts it [n,
        D].

        Tokens stand answer after answer; own parts are not used.
        """
        states, layout, _, logits = self._states(params, rows, training)
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
        self, params: Tree | None, rows: Sequence[Row], training: bool
    ) -> tuple[Float[Tensor, "R T D"], Layout, Tree, Float[Tensor, "1 n V"] | None]:
        """Run the model.

        Returns:
            Hidden states, where they lie, own parts in the model's arithmetic, and answers' logits
            where the head alone does not give them.
        """
        for dropout in self.dropouts:
            dropout.train(training)
        cast = {
            name: _aligned(tensor.to(self.device, self.dtype))
            for name, tensor in (params or {}).items()
        }
        adapter = combined_adapter(
            {name: tensor for name, tensor in cast.items() if name not in NAMES}
        )
        own = {name: tensor for name, tensor in cast.items() if name in NAMES}
        if self.packs:
            with suppress(PackingError):  # a window of attention that is shorter than these rows
                layout = Layout.packed(rows, self.device)
                with packed_attention(layout, self.kernel):
                    return self._run(adapter, layout, layout.scored[:0])[0], layout, own, None
        layout = Layout.padded(rows, self.device)
        states, logits = self._run(
            adapter, layout, layout.scored[:0] if self.has_plain_head else layout.scored
        )
        return states, layout, own, None if self.has_plain_head else logits

    def _answers(
        self, states: Float[Tensor, "R T D"], layout: Layout, own: Tree
    ) -> tuple[Float[Tensor, " A"], Float[Tensor, " A"] | None]:
        hidden = states.flatten(0, 1)
        scored = after_bottleneck(even(hidden.index_select(0, layout.scored)), own)[
            : len(layout.scored)
        ]
        weight, change = own_head(self.head.weight, own)
        tokens = token_log_probabilities(scored, weight, self.head.bias, layout.targets, change)
        if REWARD not in own:
            return layout.per_answer(tokens), None
        return layout.per_answer(tokens), (
            after_bottleneck(hidden.index_select(0, layout.last), own) * own[REWARD]
        ).float().sum(1)

    def _packing_problem(self) -> str | None:
        """Try the packed form on a few tokens; return what is wrong with it, None if nothing is.

        It is compared with the padded form under the model's own attention. If nothing is wrong,
        the model keeps the packed form's attention, which elsewhere is transformers' `sdpa`.
        """
        if type(self.head) is not nn.Linear:
            return "its vocabulary head is not a plain linear layer"
        draw = torch.Generator().manual_seed(0)
        tokens = torch.randint(self.head.out_features, (16,), generator=draw).tolist()
        rows: list[Row] = [
            (tokens[:3], (tokens[3:5], tokens[5:9])),
            (tokens[9:10], (tokens[10:13], tokens[13:])),
        ]
        fresh = self.init(draw)
        adapter = {
            name: 0.05 * torch.randn(t.shape, generator=draw).to(self.device, self.dtype)
            for name, t in fresh.items()
        }
        tolerance = 1e-3 if self.dtype == torch.float32 else 0.05
        backbone = self.model.get_base_model()
        own = backbone.config._attn_implementation
        apart = Layout.padded(rows, self.device)
        layout = Layout.packed(rows, self.device)
        problem = ""
        with torch.no_grad():
            states, logits = self._run(adapter, apart, apart.scored)
            expected = states.flatten(0, 1)[apart.scored]
            if (
                _distance(
                    nn.functional.linear(expected, self.head.weight, self.head.bias), logits[0]
                )
                > tolerance
            ):
                return "its logits are not those of its head alone"
            self.has_plain_head = True
            for kernel in kernels(self.device, self.dtype):
                try:
                    backbone.set_attn_implementation(ATTENTION)
                    with packed_attention(layout, kernel):
                        states, _ = self._run(adapter, layout, layout.scored[:0])
                    distance = _distance(states[0][layout.scored], expected)
                # whatever a model's own code makes of a form that it was not written for
                except Exception as error:
                    problem = str(error) or type(error).__name__
                else:
                    if distance <= tolerance:
                        if problem:
                            warnings.warn(
                                f"{self.name}: the fastest attention does not run here "
                                f"({problem}); {kernel.__name__} is used.",
                                stacklevel=5,
                            )
                        self.kernel = kernel
                        return None
                    problem = f"hidden states differ by {distance:.2g} of their size"
            backbone.set_attn_implementation(own)
        return problem

    def _run(
        self, adapter: Tree, layout: Layout, positions: Int[Tensor, " m"]
    ) -> tuple[Float[Tensor, "R T D"], Float[Tensor, "1 m V"]]:
        """Return the states that come to the vocabulary head, and its logits at some places alone.

        Places are those of the flattened ids.
        """
        states: list[Tensor] = []

        def cut(_: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
            states.append(inputs[0])
            return (inputs[0].flatten(0, 1)[positions][None],)

        hook = self.head.register_forward_pre_hook(cut)
        try:
            with self.model.disable_adapter() if not adapter else nullcontext():
                call = {
                    "input_ids": layout.ids,
                    "position_ids": layout.positions,
                    "use_cache": False,
                }
                parameters = {
                    self.parameter_names[name]: tensor for name, tensor in adapter.items()
                }
                logits = functional_call(self.model, parameters, (), call).logits
            return states[0], logits
        finally:
            hook.remove()

    def export(self, params: Tree, folder: Path) -> None:
        """Write a folder that `load_model` loads, and PEFT if there are no own parts, with the
        tokenizer.
        """
        folder.mkdir(parents=True, exist_ok=True)
        adapter = combined_adapter(
            {name: tensor for name, tensor in params.items() if name not in NAMES}
        )
        config = self.model.peft_config["default"]
        # two adapters as one of twice the rank
        times = 2 if any(name.startswith(OWN_ADAPTER) for name in params) else 1
        replace(config, r=times * config.r, lora_alpha=times * config.lora_alpha).save_pretrained(
            str(folder)
        )
        self.tokenizer.save_pretrained(str(folder))
        trees.save(adapter, folder / "adapter_model.safetensors")
        if own := trees.select(params, NAMES):
            trees.save(own, folder / FILE)

    # ---- text to tokens

    def encode(self, prompt: str, answer: str) -> tuple[list[int], list[int]]:
        """Return the tokens of a plain prompt and of an answer.

        The prompt has the tokenizer's opening token if there is one, the answer is closed by the
        end token.
        """
        opening = self.tokenizer(prompt)["input_ids"]
        while opening and opening[-1] == self.tokenizer.eos_token_id:
            opening = opening[:-1]
        return opening, self._closed(answer)

    def encode_chat(
        self, prompt: Sequence[Mapping[str, str]], answers: Sequence[Sequence[Mapping[str, str]]]
    ) -> tuple[list[int], list[list[int]]]:
        """Return the tokens of a conversation and of each answer to it, by the chat template.

        Raises:
            ValueError: The template refuses the conversation.
        """
        try:
            opening = self.tokenizer.apply_chat_template(
                list(prompt), tokenize=False, add_generation_prompt=True
            )
            whole = [
                self.tokenizer.apply_chat_template([*prompt, *answer], tokenize=False)
                for answer in answers
            ]
        except TemplateError as error:
            raise ValueError(str(error)) from error
        # a template that writes a turn differently once it is answered
        if not all(text.startswith(opening) for text in whole):
            opening = os.path.commonprefix([opening, *whole])
        ids: list[int] = self.tokenizer(opening, add_special_tokens=False)["input_ids"]
        return ids, [self._closed(text[len(opening) :]) for text in whole]

    def opens(self, prompt: Sequence[int]) -> int:
        """Return how many of a prompt's first tokens are the tokenizer's opening token.

        They stay when a prompt is cut.
        """
        return int(
            self.tokenizer.bos_token_id is not None and prompt[0] == self.tokenizer.bos_token_id
        )

    def _closed(self, answer: str) -> list[int]:
        ids: list[int] = self.tokenizer(answer, add_special_tokens=False)["input_ids"]
        end = self.tokenizer.eos_token_id
        # a template may close with end token and line break
        return ids if end is None or end in ids[-2:] else [*ids, end]

    @property
    def stops(self) -> list[int]:
        """The tokens that end an answer."""
        said = self.model.generation_config.eos_token_id if self.model.generation_config else None
        return sorted(
            {self.tokenizer.eos_token_id, *(said if isinstance(said, list) else [said])} - {None}
        )

    @property
    def chats(self) -> bool:
        """Whether the tokenizer has a chat template."""
        return self.tokenizer.chat_template is not None


def _aligned(tensor: Tensor) -> Tensor:
    """Return the tensor, copied unless its memory is 64-byte aligned.

    CPU kernels round differently on unaligned memory, and received tensors may be unaligned.
    """
    return tensor if tensor.data_ptr() % 64 == 0 else tensor.clone()


def _distance(computed: Float[Tensor, "n D"], expected: Float[Tensor, "n D"]) -> float:
    """Return the largest relative difference of a row."""
    return float(((computed - expected).float().norm(dim=1) / expected.float().norm(dim=1)).max())
