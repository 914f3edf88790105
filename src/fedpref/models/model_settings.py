"""The settings of a language model and of its adapter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fedpref.models.named import BUILTIN
from fedpref.types import Count, Date, Fraction, Last, WholeNumber

ALL_LINEAR = "all-linear"  # of `lora_target_modules`


@dataclass(frozen=True)
class Model:
    """Which language model, and its adapter; LoRA's names are those of PEFT's LoraConfig."""

    path: str = BUILTIN
    """A Hub id, a local folder, `builtin`, the small model that comes with fedpref, or a name that
    `fedpref model` has fetched. A folder of a LoRA adapter is its base with the adapter merged into
    it."""
    gguf_file: str | None = None
    """A GGUF file in that folder, dequantised once."""
    revision: str | None = None
    """A branch, tag or commit of a Hub id."""
    trust_remote_code: bool = False
    """Run code that comes with the model."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """The arithmetic of the frozen backbone; `auto` is bfloat16 where that is faster than
    float32."""
    device: str = "auto"
    """Where is computed: `cpu`, `cuda`, `cuda:1`; `auto` takes CUDA where there is one."""
    lora_r: Count = 8
    """The adapter's rank."""
    lora_alpha: Count = 16
    """The adapter's scale times its rank."""
    lora_dropout: Fraction = 0.0
    """Dropout on the adapter's input in training."""
    use_rslora: bool = False
    """Divide `lora_alpha` by the root of the rank, in place of the rank."""
    lora_target_modules: tuple[str, ...] | str = ALL_LINEAR
    """Names of the layers that have an adapter, or a regular expression, or `all-linear`, which
    leaves out the vocabulary head, routers, experts that are kept in one tensor, and towers that
    no text passes through."""
    lora_layers_to_transform: tuple[WholeNumber, ...] | Last | None = None
    """The decoder layers that have an adapter, by number from 0, or the last ones, as `last-8`;
    null takes all."""
    modules_to_save: tuple[str, ...] = ()
    """Refused: whole modules beside the adapter would be sent whole. What is a client's own stands
    in `algorithm.parts`."""
    load_in_4bit: bool = False
    """Hold the frozen backbone in four bits (NF4), by bitsandbytes (`fedpref[quantized]`)."""
    load_in_8bit: bool = False
    """Hold it in eight bits (LLM.int8) instead. A few large states decide the rounding of all that
    are computed with them, so that each answer is computed by itself."""
    gradient_checkpointing: bool = False
    """Keep each layer's input alone for the backward pass, and compute the rest again: less memory,
    more time."""
    trunk_states: Literal["file", "memory", "none"] = "file"
    """Where states at the end of the layers below the adapter are kept, once they are computed: in
    a file beside the run that only you can read and that goes when the run is over (at a site by
    `fedpref clean`), in each process's memory, or nowhere. Of answers that are drawn and rewarded
    they live as long as the batch."""
    cuda_graphs: bool = False
    """On a GPU in bfloat16, record a row's launches once for each of few sizes and replay them: a
    small model's steps are launches above all. Each recording is compared with what it recorded,
    and none is kept that differs."""
    trunk_limit_mb: Count = 4096
    """MB above which no more of these states are kept."""
    template_date: Date = "2024-07-26"
    """The day that chat templates write as today's, as 2024-07-26: a run's tokens do not depend on
    the day."""

    @property
    def bits(self) -> int | None:
        """The bits of a frozen weight where it is quantised."""
        return 4 if self.load_in_4bit else 8 if self.load_in_8bit else None

    def __post_init__(self) -> None:
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError("load_in_4bit and load_in_8bit exclude one another")
        if self.modules_to_save:
            raise ValueError(
                "modules_to_save: only adapters are trained and sent, so that a round is small and "
                "the backbone serves all clients; a vocabulary head of each client's own is "
                "algorithm.parts.head of fedpdpo, embeddings stay as they are"
            )
