"""A causal language model of transformers with a LoRA adapter: one frozen backbone, any number of adapters as trees."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call

from fedpref import trees
from fedpref.errors import UserError
from fedpref.trees import Tree

BUILTIN = "builtin"


@dataclass(frozen=True)
class Model:
    """Which language model, and its adapter; LoRA's names as in PEFT's LoraConfig with a prefix."""

    path: str = BUILTIN  # a Hub id, a local folder, or the model shipped with fedpref
    revision: str | None = None  # of a Hub id
    trust_remote_code: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the frozen backbone; the adapter is float32
    device: str = "auto"  # "auto" takes CUDA where there is one; "cpu", "cuda", "cuda:1"
    lora_r: Annotated[int, Field(ge=1)] = 8
    lora_alpha: Annotated[int, Field(ge=1)] = 16
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    lora_target_modules: tuple[str, ...] | str = "all-linear"


@dataclass(frozen=True)
class Sequences:
    """R token sequences, right-padded to T tokens, and which of their tokens belong to the answer."""

    ids: Int[Tensor, "R T"]
    answer: Bool[Tensor, "R T"]
    lengths: Int[Tensor, " R"]  # tokens without padding

    @staticmethod
    def of(rows: Sequence[tuple[Sequence[int], Sequence[int]]], device: torch.device) -> Sequences:
        """Lay out (prompt, answer) token rows; padding is token 0, which nothing looks at."""
        lengths = torch.tensor([len(prompt) + len(answer) for prompt, answer in rows])
        ids = torch.zeros(len(rows), int(lengths.max()), dtype=torch.long)
        for row, (question, reply) in zip(ids, rows, strict=True):
            row[: len(question) + len(reply)] = torch.tensor([*question, *reply])
        position = torch.arange(ids.shape[1])
        first = torch.tensor([len(prompt) for prompt, _ in rows])
        answer = (position >= first[:, None]) & (position < lengths[:, None])
        return Sequences(ids.to(device), answer.to(device), lengths)


class LanguageModel:
    """Backbone, tokenizer and the adapter's shape; the adapter's values are passed in as a tree.

    A tree's names are those of PEFT's own adapter files, so that a tree saved is an adapter saved.
    """

    def __init__(self, settings: Model) -> None:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        import transformers
        from peft import LoraConfig, PeftModel, get_peft_model

        transformers.utils.logging.disable_progress_bar()
        self.device = _device(settings.device)
        path = str(files("fedpref.models") / "builtin") if settings.path == BUILTIN else settings.path
        options = {"revision": settings.revision, "trust_remote_code": settings.trust_remote_code}
        try:
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(path, **options)
            backbone = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, settings.dtype), **options)
        except (OSError, ValueError) as error:
            raise UserError(
                f"model.path: {settings.path!r} could not be loaded as a causal language model of transformers. "
                f"Expected a local folder with config.json, weights and a tokenizer, or a Hub id that can be reached "
                f"(or is in the cache). transformers says: {str(error).splitlines()[0]}"
            ) from error
        targets = settings.lora_target_modules
        lora = LoraConfig(
            task_type="CAUSAL_LM",
            r=settings.lora_r,
            lora_alpha=settings.lora_alpha,
            lora_dropout=settings.lora_dropout,
            target_modules=targets if isinstance(targets, str) else list(targets),
            base_model_name_or_path=path,
        )
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers for a property that is being renamed
                self.model: PeftModel = get_peft_model(backbone, lora).to(self.device).eval()
        except ValueError as error:
            raise UserError(f"model.lora_target_modules: {error}") from error
        self.model.requires_grad_(False)
        self.dropouts = [module for name, module in self.model.named_modules() if name.endswith("lora_dropout")]
        self.places = {name.replace(".default", ""): name for name, _ in self.model.named_parameters() if ".lora_" in name}

    @property
    def context(self) -> int | None:
        """Tokens the backbone can take, where its config says so."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the frozen backbone: shapes and a sample of each weight, in the arithmetic it is used in."""
        digest = blake2b(digest_size=16)
        for name, weight in self.model.named_parameters():
            if ".lora_" not in name:
                sample = weight.detach().flatten()[:: max(1, weight.numel() // 64)].float().cpu()
                digest.update(f"{name} {tuple(weight.shape)} {weight.dtype} {weight.device.type}".encode())
                digest.update(sample.numpy().tobytes())
        return digest.hexdigest()

    def init(self, rng: torch.Generator) -> Tree:
        """A fresh adapter as PEFT initialises it: the model starts as its backbone."""
        from peft.tuners.lora import LoraLayer

        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(int(torch.randint(2**62, (), generator=rng)))
            for module in self.model.modules():
                if isinstance(module, LoraLayer):
                    module.reset_lora_parameters("default", True)
        parameters = dict(self.model.named_parameters())
        return {name: parameters[place].detach().clone() for name, place in self.places.items()}

    def log_probabilities(self, adapter: Tree | None, sequences: Sequences, *, training: bool = False) -> Float[Tensor, " R"]:
        """The summed log-probability of each sequence's answer tokens; without an adapter, the backbone's.

        The vocabulary head sees only the positions before an answer token. Right padding needs no attention mask: under causal
        attention no real token sees it. `training` turns the adapter's dropout on; the backbone's stays off, since DPO compares
        log-probabilities.
        """
        before = sequences.answer[:, 1:]
        targets = sequences.ids[:, 1:][before]
        for dropout in self.dropouts:
            dropout.train(training)
        with _head_only_at(self.model.get_output_embeddings(), before), _adapter_off(self.model, adapter is None):
            parameters = {self.places[name]: tensor for name, tensor in (adapter or {}).items()}
            call = {"input_ids": sequences.ids, "use_cache": False}
            logits = functional_call(self.model, parameters, (), call).logits[0]
        scores = -nn.functional.cross_entropy(logits.float(), targets, reduction="none")
        return torch.stack([part.sum() for part in scores.split(before.sum(1).tolist())])

    def export(self, adapter: Tree, folder: Path) -> None:
        """Write a folder that `PeftModel.from_pretrained` loads, and the tokenizer beside it."""
        folder.mkdir(parents=True, exist_ok=True)
        self.model.peft_config["default"].save_pretrained(str(folder))
        self.tokenizer.save_pretrained(str(folder))
        trees.save(adapter, folder / "adapter_model.safetensors")

    # ---- text to tokens

    def encode(self, prompt: str, answer: str) -> tuple[list[int], list[int]]:
        """Tokens of a plain prompt, with the tokenizer's opening token if it has one, and of an answer, closed by the end token."""
        opening = self.tokenizer(prompt)["input_ids"]
        while opening and opening[-1] == self.tokenizer.eos_token_id:
            opening = opening[:-1]
        return opening, self._closed(answer)

    def encode_chat(self, prompt: Sequence[Mapping[str, str]], answer: Sequence[Mapping[str, str]]) -> tuple[list[int], list[int]]:
        """Tokens of a conversation and of its answer, through the chat template."""
        opening = self.tokenizer.apply_chat_template(list(prompt), tokenize=False, add_generation_prompt=True)
        whole = self.tokenizer.apply_chat_template([*prompt, *answer], tokenize=False)
        if not whole.startswith(opening):
            opening = os.path.commonprefix([opening, whole])
        return self.tokenizer(opening, add_special_tokens=False)["input_ids"], self._closed(whole[len(opening) :])

    def _closed(self, answer: str) -> list[int]:
        ids: list[int] = self.tokenizer(answer, add_special_tokens=False)["input_ids"]
        end = self.tokenizer.eos_token_id
        return ids if end is None or end in ids[-2:] else [*ids, end]  # a template may close with end token and line break

    @property
    def chats(self) -> bool:
        """Whether the tokenizer has a chat template."""
        return self.tokenizer.chat_template is not None


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f'model.device: {name!r} is no device; expected "auto", "cpu", "cuda" or "cuda:0".') from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f'model.device: {name!r} was asked for, but this PyTorch sees no CUDA GPU. Set model.device to "cpu" or "auto".')
    return device


@contextmanager
def _head_only_at(head: nn.Module, positions: Bool[Tensor, "R T-1"]) -> Iterator[None]:
    """Feed the vocabulary head the hidden states of these positions alone, as one row; all else in the model stays its own."""
    hook = head.register_forward_pre_hook(lambda _, inputs: (inputs[0][:, :-1][positions][None],))
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def _adapter_off(model: Any, off: bool) -> Iterator[None]:
    if off:
        with model.disable_adapter():
            yield
    else:
        yield
