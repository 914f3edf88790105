"""The frozen model under an adapter: how it is loaded, and which of its layers may have one."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedpref.data.hub import look_for_hub
from fedpref.data.whole_models import one_at_a_time, refuse_partial
from fedpref.errors import UserError, reason
from fedpref.models.own_parts import FILE
from fedpref.numerics.trees import Tree, is_down

PREFIX = "base_model.model."  # of PEFT's names
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")


@dataclass(frozen=True)
class Backbone:
    """A loaded model of transformers with its tokenizer.

    Attributes:
        model: The model, in evaluation mode.
        tokenizer: Its tokenizer.
        base: The Hub id or folder of the model itself, on which exports stand.
        revision: Of that Hub id.
        merged: The adapter that was merged into it, by PEFT's names and with its scale in it;
            empty without one. An export holds it beside what was learned.
    """

    model: Any
    tokenizer: Any
    base: str
    revision: str | None = None
    merged: Tree = field(default_factory=dict)


@one_at_a_time
def load_backbone(
    path: str,
    dtype: Any,
    options: Mapping[str, Any],
    setting: str,
    quantization: Mapping[str, Any],
) -> Backbone:
    """Load a causal language model, or a LoRA adapter with its base, merged.

    Args:
        path: A Hub id or a local folder, of a model or of a PEFT adapter.
        dtype: The arithmetic, or "auto".
        options: `revision` and `trust_remote_code`.
        setting: What the user wrote, for messages.
        quantization: What loads its weights in fewer bits; empty leaves them as they are.

    Raises:
        UserError: It cannot be loaded, or it is not what it says, or it is an adapter, which
            would be merged into rounded weights.
    """
    import transformers
    from transformers.utils.peft_utils import find_adapter_config_file

    look_for_hub(path)
    try:
        if find_adapter_config_file(path, revision=options.get("revision")) is None:
            config = transformers.AutoConfig.from_pretrained(path, **options)
            if getattr(config, "is_encoder_decoder", False):
                # some have a class of the decoder alone, whose files are not these
                raise UserError(
                    f"model.path: {setting!r} ({config.model_type}) reads with an encoder and "
                    "writes with a decoder. Expected a causal language model, which is one stack."
                )
            tokenizer = transformers.AutoTokenizer.from_pretrained(path, **options)
            model, said = transformers.AutoModelForCausalLM.from_pretrained(
                path, dtype=dtype, output_loading_info=True, **options, **quantization
            )
            refuse_partial(model, said, f"model.path: {setting!r}")
            _warn_of_unread(said, setting)
            backbone = Backbone(model.eval(), tokenizer, path, options.get("revision"))
        elif quantization:
            raise UserError(
                f"model.path: {setting!r} is an adapter, which would be merged into rounded "
                "weights. Merge it first (PEFT's merge_and_unload, then save_pretrained), or leave "
                "out load_in_4bit and load_in_8bit."
            )
        else:
            backbone = _with_adapter(path, dtype, options)
    except UserError:
        raise
    # whatever transformers makes of a folder and of a config's values
    except Exception as error:
        raise UserError(
            f"model.path: {setting!r} could not be loaded as a causal language model of "
            "transformers. Expected a local folder with config.json, weights and a tokenizer, a "
            "folder of a LoRA adapter, or a Hub id that can be reached (or is in the cache). "
            f"transformers says: {reason(error, whole=True)}"
        ) from error
    _refuse_wide_tokenizer(backbone, setting)
    return backbone


def _warn_of_unread(said: Mapping[str, Any], setting: str) -> None:
    """Warn of weights that stand in a model's files and have no place in the model."""
    if unread := sorted(said.get("unexpected_keys", ())):
        warnings.warn(
            f"{setting}: its files hold {len(unread)} weights for which its config has no place, "
            f"such as {unread[0]!r}; they are left out.",
            stacklevel=5,
        )


def _with_adapter(path: str, dtype: Any, options: Mapping[str, Any]) -> Backbone:
    """Load an adapter's base, and merge the adapter into it."""
    import transformers
    from peft import PeftConfig, PeftModel, get_peft_model_state_dict, load_peft_weights

    if (Path(path) / FILE).exists():
        raise UserError(
            f"model.path: beside the adapter in {path} lie a client's own parts ({FILE}), which "
            "are no part of an adapter. Export that client's model merged, and give that folder."
        )
    if Path(path).is_dir() and not any((Path(path) / name).is_file() for name in ADAPTER_FILES):
        raise UserError(
            f"model.path: {path} has an adapter's config and none of its weights "
            f"({' or '.join(ADAPTER_FILES)}). Fetch the folder anew."
        )
    config = PeftConfig.from_pretrained(path, revision=options.get("revision"))
    if getattr(config, "target_parameters", None):
        raise UserError(
            f"model.path: the adapter in {path} is on single tensors, as of a mixture's experts, "
            "beside which no other adapter could lie. Merge it (PEFT's merge_and_unload), and give "
            "the whole model."
        )
    base, code = config.base_model_name_or_path, options.get("trust_remote_code", False)
    if not base:
        raise UserError(
            f"model.path: the adapter in {path} does not say what it stands on. Set "
            "base_model_name_or_path in its adapter_config.json."
        )
    try:
        _refuse_kind(config, base, path)
        inner, said = transformers.AutoModelForCausalLM.from_pretrained(
            base,
            dtype=dtype,
            revision=config.revision,
            trust_remote_code=code,
            output_loading_info=True,
        )
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"model.path: {base!r}, on which the adapter in {path} stands "
            "(base_model_name_or_path in its adapter_config.json), could not be loaded: "
            f"{reason(error, whole=True)}"
        ) from error
    refuse_partial(inner, said, f"model.path: {base!r}, the base of the adapter in {path},")
    # what may be asked only before layers are wrapped
    ends = {
        name
        for name, module in inner.named_modules()
        if module in (inner.get_input_embeddings(), inner.get_output_embeddings())
    }
    before = _sums(inner)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of PEFT's use of transformers
        model = PeftModel.from_pretrained(inner, path, revision=options.get("revision"))
    after = _sums(model)
    if any(after.get(name, total) != total for name, total in before.items()):
        raise UserError(
            f"model.path: loading the adapter in {path} changes the base's own weights (as PiSSA "
            "and OLoRA do), which no exported adapter could say. Convert it to plain LoRA "
            "(PEFT's save_pretrained with path_initial_model_for_weight_conversion), or merge it."
        )
    learned = get_peft_model_state_dict(model)
    merged: dict[str, Any] = {}
    problem = "" if config.peft_type == "LORA" else f"it is of the kind {config.peft_type}"
    for name, tensor in learned.items():
        layer, _, factor = name.rpartition(".lora_")
        if factor not in ("A.weight", "B.weight"):
            problem = problem or f"it holds {name.removeprefix(PREFIX)}, which is no factor"
        elif layer.removeprefix(PREFIX) in ends:
            problem = problem or "it is on the embeddings or the vocabulary head"
        else:
            # the scale goes into B, so that any two adapters can stand side by side
            scale = model.get_submodule(layer).scaling["default"] if factor[0] == "B" else 1.0
            merged[name] = tensor.detach().float().cpu() * scale
    if problem:
        raise _more_than_lora(path, problem)
    given = load_peft_weights(path, device="cpu", revision=options.get("revision"))
    refuse_partial(model, {"missing_keys": learned.keys() - given.keys()}, f"model.path: {path!r}")
    if unread := sorted(given.keys() - learned.keys()):
        raise UserError(
            f"model.path: the adapter in {path} holds {len(unread)} tensors that find no layer, "
            f"such as {unread[0]!r}: its adapter_config.json, or the base {base!r}, is not the one "
            "that it was made with."
        )
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, **options)
    except (OSError, ValueError):  # an adapter folder need not hold one
        tokenizer = transformers.AutoTokenizer.from_pretrained(base, trust_remote_code=code)
    return Backbone(model.merge_and_unload().eval(), tokenizer, str(base), config.revision, merged)


def _refuse_kind(config: Any, base: str, path: str) -> None:
    """Raise UserError for an adapter that is none that can stand beside another on its base."""
    from transformers.utils.peft_utils import find_adapter_config_file

    kinds = {
        "use_dora": "it is DoRA",
        "layer_replication": "it repeats layers",
        "target_parameters": "it is on parameters of no layer",
    }
    for name, what in kinds.items():
        if getattr(config, name, None):
            raise _more_than_lora(path, what)
    if find_adapter_config_file(base, revision=config.revision) is not None:
        raise _more_than_lora(path, f"its base {base} is an adapter too")


def _more_than_lora(path: str, what: str) -> UserError:
    return UserError(
        f"model.path: the adapter in {path} is more than plain LoRA on inner layers ({what}), "
        "which an exported adapter cannot hold beside what is learned here. Merge it first (PEFT's "
        "merge_and_unload, then save_pretrained), and give the merged folder."
    )


def _sums(model: Any) -> dict[str, float]:
    """Return a sum of each weight that is no adapter's, by which a change is noticed."""
    return {
        name.removeprefix(PREFIX).replace(".base_layer", ""): float(weight.detach().double().sum())
        for name, weight in model.named_parameters()
        if "lora_" not in name
    }


def side_by_side(first: Tree, second: Tree) -> dict[str, Tensor]:
    """Return one adapter whose change of every layer is the sum of two adapters' changes.

    Ranks add up; a layer that one of them does not know has zeros there, so that all layers have
    one rank.

    Args:
        first: Factors of each layer, [r, in] and [out, r], whose product is the change.
        second: Factors likewise, of any layers and another rank.
    """
    ranks = [
        max((t.shape[0] for n, t in tree.items() if is_down(n)), default=0)
        for tree in (first, second)
    ]
    both: dict[str, Tensor] = {}
    for name in {**first, **second}:
        axis = 0 if is_down(name) else 1
        other = first.get(name, second.get(name))
        assert other is not None
        parts = []
        for tree, rank in zip((first, second), ranks, strict=True):
            shape = list(other.shape)
            shape[axis] = rank
            part = torch.zeros(shape)
            if name in tree:
                part.narrow(axis, 0, tree[name].shape[axis]).copy_(tree[name])
            parts.append(part)
        both[name] = torch.cat(parts, axis)
    return both


@one_at_a_time
def merged_adapter(path: str | Path, **options: Any) -> Any:
    """Return the base model of a PEFT folder with the adapter merged into its weights.

    Where the adapter changes embeddings or the head of a model that shares them, the two are
    untied, for otherwise the one's change would be the other's too.

    Args:
        path: The adapter folder.
        **options: What else `AutoPeftModelForCausalLM.from_pretrained` is given.
    """
    from peft import AutoPeftModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of PEFT's use of transformers
        # it says that a merge would go wrong, which untying prevents
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*")
        model = AutoPeftModelForCausalLM.from_pretrained(str(path), **options)
        _untie_adapted(model)
        return model.merge_and_unload().eval()


def _untie_adapted(model: Any) -> None:
    """Give embeddings and head weights of their own where an adapter is on either of them."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    inner = model.get_base_model()
    ends = [inner.get_input_embeddings(), inner.get_output_embeddings()]
    adapted = [isinstance(end, BaseTunerLayer | ModulesToSaveWrapper) for end in ends]
    if not any(adapted) or not inner.config.get_text_config().tie_word_embeddings:
        return
    head = ends[1].get_base_layer() if isinstance(ends[1], BaseTunerLayer) else ends[1]
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    for config in (inner.config, inner.config.get_text_config()):
        config.tie_word_embeddings = False


def _refuse_wide_tokenizer(backbone: Backbone, setting: str) -> None:
    """Raise UserError where the tokenizer gives tokens that the model has no embedding of.

    Some models never see a few of their tokenizer's added tokens, such as those of images; these
    are refused where a text has them.
    """
    tokenizer, rows = backbone.tokenizer, len(backbone.model.get_input_embeddings().weight)
    beyond = {token: i for token, i in tokenizer.get_vocab().items() if i >= rows}
    if not beyond:
        return
    template = tokenizer.chat_template or ""
    used = {tokenizer.bos_token, tokenizer.eos_token}
    added = tokenizer.get_added_vocab()
    reached = sorted(
        token for token in beyond if token in used or token not in added or token in template
    )
    if reached:
        raise UserError(
            f"model.path: the tokenizer of {setting!r} has tokens that the model has no embedding "
            f"of: it has {rows} embeddings, and {reached[0]!r} is token {beyond[reached[0]]}. "
            "Take the tokenizer that belongs to the model, or resize the model's embeddings "
            "(model.resize_token_embeddings) and save it."
        )
    warnings.warn(
        f"{setting}: the model has no embedding of the tokenizer's {sorted(beyond)[:4]}; a text "
        "that has one is refused.",
        stacklevel=4,
    )
