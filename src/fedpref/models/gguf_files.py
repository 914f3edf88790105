"""Models and adapters as GGUF files, which llama.cpp and Ollama run. Llama's architecture alone."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedpref import __version__
from fedpref.errors import UserError

F16, Q8_0 = "f16", "q8_0"
BLOCK = 32  # numbers that q8_0 has one scale for: rows of other lengths stay in f16
# what the layers' parts are called in both
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
ENDS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")


def write_model(model: Any, tokenizer: Any, file: Path, kind: str, name: str) -> None:
    """Write a model with its tokenizer.

    Args:
        model: A Llama of transformers.
        tokenizer: Its tokenizer, byte-level BPE.
        file: The GGUF file.
        kind: `f16` or `q8_0`; norms are in float32.
        name: What the file says that the model is called.

    Raises:
        UserError: The model or its tokenizer is of another kind.
    """
    import gguf

    config = model.config
    refuse_other(config)
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_name(name)
    writer.add_description(f"by fedpref {__version__}")
    writer.add_file_type(
        gguf.LlamaFileType.MOSTLY_F16 if kind == F16 else gguf.LlamaFileType.MOSTLY_Q8_0
    )
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_rope_dimension_count(head_width(config))
    writer.add_key_length(head_width(config))
    writer.add_value_length(head_width(config))
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer, tokenizer, config)
    for name_there, weight in _tensors(model):
        if weight.ndim == 1:
            writer.add_tensor(name_there, weight)
        elif kind == Q8_0 and weight.shape[-1] % BLOCK == 0:
            of_kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name_there, gguf.quantize(weight, of_kind), raw_dtype=of_kind)
        else:
            writer.add_tensor(name_there, weight.astype(np.float16))
    _finish(writer)


def write_adapter(folder: Path, config: Any, file: Path, name: str) -> None:
    """Write a LoRA adapter, as llama.cpp's `--lora` takes it.

    Args:
        folder: The PEFT adapter.
        config: Of the model that it stands on.
        file: The GGUF file.
        name: What the file says that the adapter is called.

    Raises:
        UserError: The model is of another architecture, or the adapter is on more than linear
            layers that the file has.
    """
    import gguf
    from peft import LoraConfig
    from safetensors.torch import load_file

    refuse_other(config)
    settings = LoraConfig.from_pretrained(str(folder))
    tensors = load_file(folder / "adapter_model.safetensors")
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string("adapter.type", "lora")
    writer.add_name(name)
    writer.add_float32("adapter.lora.alpha", float(settings.lora_alpha))
    for key in sorted(tensors):
        module, _, factor = key.removeprefix("base_model.model.").rpartition(".lora_")
        if factor not in ("A.weight", "B.weight"):
            raise UserError(
                f"{folder}: the adapter is on {module} too, which llama.cpp's form of an adapter "
                "does not hold. Export it merged, or as gguf-ready."
            )
        if module == "lm_head" and config.tie_word_embeddings:
            raise UserError(
                f"{folder}: the adapter is on the head, which a GGUF file of this model does not "
                "have apart from its embeddings. Export it merged, or as gguf-ready."
            )
        weight = tensors[key].float()
        rank = weight.shape[0] if factor[0] == "A" else weight.shape[1]
        if factor[0] == "B":
            # there alpha is divided by the rank, whatever PEFT does with it
            scale = settings.lora_alpha / (rank**0.5 if settings.use_rslora else rank)
            weight = weight * (scale / (settings.lora_alpha / rank))
            weight = torch.from_numpy(_turned(module, weight.numpy(), config))
        there = f"{_named(module)}.weight.lora_{factor[0].lower()}"
        writer.add_tensor(there, weight.numpy().astype(np.float16))
    _finish(writer)


def refuse_other(config: Any) -> None:
    """Raise UserError for a model that is no Llama with rotary embeddings as they are usual."""
    kind = config.model_type
    if kind != "llama":
        raise UserError(
            f"a model of the architecture {kind!r} is not written as GGUF here, only llama is. "
            "Export it as gguf-ready, and convert it by llama.cpp's convert_hf_to_gguf.py."
        )
    rope = config.rope_parameters.get("rope_type", "default")
    if rope != "default" or config.attention_bias or config.mlp_bias:
        what = f"rotary embeddings of the type {rope!r}" if rope != "default" else "biases"
        raise UserError(
            f"a Llama with {what} is not written as GGUF here. Export it as gguf-ready."
        )


def head_width(config: Any) -> int:
    """Return the width of an attention head."""
    return int(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )


def modelfile(model: str, template: str | None) -> str:
    """Return an Ollama Modelfile of a GGUF file.

    Args:
        model: The file, beside the Modelfile.
        template: The tokenizer's chat template; of ChatML's turns Ollama is told.
    """
    lines = [f"FROM ./{model}"]
    if template and "<|im_start|>" in template:
        turns = "".join(
            f"{{{{ if .{part} }}}}<|im_start|>{role}\n{{{{ .{part} }}}}<|im_end|>\n{{{{ end }}}}"
            for part, role in (("System", "system"), ("Prompt", "user"))
        )
        lines.append(f'TEMPLATE """{turns}<|im_start|>assistant\n"""')
        lines.append("PARAMETER stop <|im_end|>")
    return "\n".join(lines) + "\n"


def _tensors(model: Any) -> Iterator[tuple[str, NDArray[np.float32]]]:
    is_tied = model.config.tie_word_embeddings
    for key, tensor in model.state_dict().items():
        module = key.removesuffix(".weight")
        if module == "lm_head" and is_tied:
            continue
        weight = tensor.detach().float().cpu().numpy()
        yield f"{_named(module)}.weight", _turned(module, weight, model.config)


def _named(module: str) -> str:
    """Return what a module is called in a GGUF file."""
    if module in ENDS:
        return ENDS[module]
    found = LAYER.fullmatch(module)
    if found is None or found[2] not in NAMES:
        raise UserError(f"{module}: a Llama in a GGUF file has no such part.")
    return f"blk.{found[1]}.{NAMES[found[2]]}"


def _turned(module: str, weight: NDArray[np.float32], config: Any) -> NDArray[np.float32]:
    """Return the rows of queries and keys in llama.cpp's order.

    It turns neighbouring numbers of a head, where transformers turns those half a head apart.
    """
    heads = {
        "self_attn.q_proj": config.num_attention_heads,
        "self_attn.k_proj": config.num_key_value_heads,
    }
    count = next((n for end, n in heads.items() if module.endswith(end)), None)
    if count is None:
        return weight
    apart = weight.reshape(count, 2, weight.shape[0] // count // 2, *weight.shape[1:])
    return np.ascontiguousarray(apart.swapaxes(1, 2).reshape(weight.shape))


def _add_tokenizer(writer: Any, tokenizer: Any, config: Any) -> None:
    import gguf

    content = json.loads(tokenizer.backend_tokenizer.to_str())
    pre = _pre_tokenizer(content)
    added = {int(one["id"]): one for one in content["added_tokens"]}
    by_id = {i: text for text, i in tokenizer.get_vocab().items()}
    tokens, types = [], []
    for i in range(config.vocab_size):
        tokens.append(by_id.get(i, f"[PAD{i}]"))
        kind = gguf.TokenType.NORMAL if i in by_id else gguf.TokenType.UNUSED
        if i in added:
            is_special = added[i]["special"]
            kind = gguf.TokenType.CONTROL if is_special else gguf.TokenType.USER_DEFINED
        types.append(kind)
    merges = content["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(
        [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
    )
    ends: Mapping[str, Any] = {
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "pad": tokenizer.pad_token_id,
        "unk": tokenizer.unk_token_id,
    }
    for name, number in ends.items():
        if number is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    writer.add_add_bos_token(tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id])
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _pre_tokenizer(content: Mapping[str, Any]) -> str:
    """Return llama.cpp's name for how a tokenizer cuts texts before it merges.

    Raises:
        UserError: It is none that is known here.
    """
    if content.get("normalizer"):
        raise UserError(
            f"a tokenizer that normalises texts ({content['normalizer'].get('type')}) is not "
            "written as GGUF here, for the file would read them as they are. Export the model as "
            "gguf-ready, and convert it by llama.cpp's convert_hf_to_gguf.py."
        )
    cut = content.get("pre_tokenizer") or {}
    parts = cut.get("pretokenizers", [cut])
    kinds = [part.get("type") for part in parts]
    is_plain = content["model"]["type"] == "BPE" and kinds[-1:] == ["ByteLevel"]
    if is_plain and parts[-1].get("use_regex", True) and not parts[-1].get("add_prefix_space"):
        if kinds == ["ByteLevel"]:
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and parts[0].get("individual_digits"):
            return "smollm"
    raise UserError(
        f"a tokenizer of the kind {content['model']['type']} with {', '.join(map(str, kinds))} is "
        "not written as GGUF here. Export the model as gguf-ready, and convert it by llama.cpp's "
        "convert_hf_to_gguf.py."
    )


def _finish(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
