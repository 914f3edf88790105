"""Texts as vectors, by a language model's last hidden states or a sentence-embedding model."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from fedpref.data.hub import look_for_hub
from fedpref.data.whole_models import longest_input, one_at_a_time, refuse_partial
from fedpref.errors import UserError, reason
from fedpref.models import devices
from fedpref.models.named import BUILTIN, located
from fedpref.types import Count

ENDS = 2  # tokens that a tokenizer may put around a text
DEFAULT_LENGTH = 1024  # of a model that does not say how much it can take


@dataclass(frozen=True)
class Encoder:
    """The model that turns texts into vectors; nothing of it is trained."""

    path: str = BUILTIN
    """A Hub id, a local folder, or `builtin`, the small model that comes with fedpref."""
    kind: Literal["auto", "language-model", "sentence-transformers"] = "auto"
    """What the model is; `auto` tells by its folder."""
    revision: str | None = None
    """A branch, tag or commit of a Hub id."""
    trust_remote_code: bool = False
    """Run code that comes with the model."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """The model's arithmetic; `auto` is bfloat16 where the processor has it."""
    device: str = "auto"
    """Where is computed: `cpu`, `cuda`, `cuda:1`; `auto` takes CUDA where there is one."""
    tokens_per_batch: Count = 4096
    """Tokens that are embedded at once."""

    @property
    def embeds_sentences(self) -> bool:
        """Whether the model is one of sentence-transformers."""
        named = (
            self.path.startswith("sentence-transformers/")
            or (Path(self.path).expanduser() / "modules.json").is_file()
        )
        return self.kind == "sentence-transformers" or (self.kind == "auto" and named)

    def open(self) -> TextEncoder:
        """Load the model; raises UserError where there is none."""
        return TextEncoder(self)


class TextEncoder:
    """A loaded model that embeds texts."""

    def __init__(self, settings: Encoder) -> None:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        self.settings = settings
        self.wanted = devices.wanted(settings.device)
        self.device = torch.device("cpu")
        self.tokenizer: Any
        path = located(settings.path)
        options: dict[str, Any] = {
            "revision": settings.revision,
            "trust_remote_code": settings.trust_remote_code,
        }
        try:
            self.model, self.tokenizer = (
                _sentences if settings.embeds_sentences else _language_model
            )(path, options)
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(
                f"task.model.path: {settings.path!r} could not be loaded as a model of "
                "transformers or sentence-transformers: "
                f"{reason(error)}"
            ) from error
        self.model.requires_grad_(False).eval()
        if self.wanted.type == "cpu":
            self.move_to(0)

    def move_to(self, worker: int) -> None:
        """Move to the device of a worker."""
        self.device = devices.of_worker(self.wanted, worker)
        self.model.to(self.device, devices.arithmetic(self.settings.dtype, self.device))

    @property
    def dimensions(self) -> int:
        if self.tokenizer is None:
            return int(self.model.encode(["width"]).shape[1])
        return int(self.model.config.get_text_config().hidden_size)

    @property
    def longest(self) -> int:
        """Tokens of a text beyond which something is cut off."""
        if self.tokenizer is None:
            return int(self.model.max_seq_length or DEFAULT_LENGTH)
        return longest_input(self.model, self.tokenizer) or DEFAULT_LENGTH

    def cuts(self, text: str) -> bool:
        """Return whether a text is too long to be embedded whole."""
        tokenizer = self.model.tokenizer if self.tokenizer is None else self.tokenizer
        return (
            len(text.encode(errors="replace")) + ENDS > self.longest  # a token has a byte at least
            and len(tokenizer(text, truncation=False)["input_ids"]) > self.longest
        )

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the weights, shapes and a sample of each, and of how they are used."""
        tokenizer = self.model.tokenizer if self.tokenizer is None else self.tokenizer
        rules = (
            json.loads(tokenizer.backend_tokenizer.to_str())
            if hasattr(tokenizer, "backend_tokenizer")
            else {"name": str(tokenizer)}
        )
        # which calls set as they go
        kept = {name: rule for name, rule in rules.items() if name not in ("padding", "truncation")}
        used = (
            f"{self.settings.dtype} {self.wanted.type} {self.model} "
            f"{getattr(self.model, 'config', '')} {json.dumps(kept)}"
        )
        digest = blake2b(used.encode(), digest_size=16)
        for name, weight in self.model.named_parameters():
            digest.update(f"{name} {tuple(weight.shape)}".encode())
            digest.update(
                weight.detach()
                .flatten()[:: max(1, weight.numel() // 64)]
                .float()
                .cpu()
                .numpy()
                .tobytes()
            )
        return digest.hexdigest()

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> Float[Tensor, "n D"]:
        """Return each text's vector [n, D], in float32 on the CPU, in the order of the texts."""
        if self.tokenizer is None:
            embeddings: Tensor = self.model.encode(
                list(texts), convert_to_tensor=True, show_progress_bar=False
            )
            return embeddings.float().cpu()
        # the end is what sets options apart
        ids = [self.tokenizer(text)["input_ids"][-self.longest :] for text in texts]
        vectors = torch.empty(len(texts), self.dimensions)
        for batch in self._batches([len(one) for one in ids]):
            width = max(len(ids[i]) for i in batch)
            padded = torch.tensor(
                [ids[i] + [0] * (width - len(ids[i])) for i in batch], device=self.device
            )
            there = torch.tensor(
                [[1] * len(ids[i]) + [0] * (width - len(ids[i])) for i in batch], device=self.device
            )
            states = self.model(
                input_ids=padded, attention_mask=there, use_cache=False
            ).last_hidden_state.float()
            vectors[batch] = ((states * there[..., None]).sum(1) / there.sum(1, keepdim=True)).cpu()
        return vectors

    def _batches(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Yield indices of texts of similar length, at most so many tokens with their padding."""
        batch: list[int] = []
        for i in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
            if batch and lengths[i] * (len(batch) + 1) > self.settings.tokens_per_batch:
                yield batch
                batch = []
            batch.append(i)
        if batch:
            yield batch


@one_at_a_time
def _language_model(path: str, options: dict[str, Any]) -> tuple[Any, Any]:
    import transformers

    look_for_hub(path)
    transformers.utils.logging.disable_progress_bar()
    model, said = transformers.AutoModel.from_pretrained(path, output_loading_info=True, **options)
    refuse_partial(model, said, f"task.model.path: {path!r}", spare="pooler")  # means are taken
    return model, transformers.AutoTokenizer.from_pretrained(path, **options)


def _sentences(path: str, options: dict[str, Any]) -> tuple[Any, None]:
    look_for_hub(path)
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise UserError(
            f"task.model.path: {path!r} needs sentence-transformers. Install fedpref[sentences]."
        ) from error
    return SentenceTransformer(path, device="cpu", **options), None
