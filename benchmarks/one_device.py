"""What a local step reaches on one device: seconds, tokens a second, peak memory, and its share of
the device's matrix rate.

    # a 1 B-parameter Llama of random weights on a GPU, where there is one
    python benchmarks/one_device.py
    # a small one, on whatever there is
    python benchmarks/one_device.py --quick

The work is that of benchmarks/throughput.py: a LoRA adapter of rank 8 on all linear layers, AdamW,
pairs with the lengths of hh-rlhf's. Floating-point operations are counted as 4 a frozen weight and
token (forward, and backward to the input), 6 an adapter weight, and the vocabulary head at answers
alone; attention is not counted, so the share is a lower bound.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
import transformers

from fedpref.engines.workers import keep_freed_memory, one_thread
from fedpref.federation.local_training import LocalTraining, train_locally
from fedpref.federation.verbs import Client
from fedpref.models.model_settings import Model
from fedpref.numerics import seeds
from fedpref.tasks import PreferenceTask
from fedpref.tasks.examples import OfflineShard
from throughput import BUILTIN, matrix_rate, pairs

LARGE = {
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 8192,
    "vocab_size": 128256,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
SMALL = LARGE | {
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 688,
}
SMALL |= {"vocab_size": 8192}


def measure(
    configuration: dict[str, int | bool], batch: int, steps: int, folder: Path
) -> dict[str, float | str]:
    """Medians over single steps, after two that warm up."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**configuration, bos_token_id=0, eos_token_id=0)
    ).to(torch.bfloat16)
    model.save_pretrained(folder)
    del model
    transformers.AutoTokenizer.from_pretrained(BUILTIN).save_pretrained(folder)
    task = PreferenceTask(model=Model(path=str(folder)), reference_scores="ahead").build()
    task.move_to(0)
    shard = task.prepare(OfflineShard("client", tuple(pairs(64, 4096)), ()), folder)
    start = task.init(seeds.generator(0, "init"))
    seconds, tokens, operations = [], [], []
    frozen = adapter = 0
    for name, parameter in task.language.model.named_parameters():
        if ".lora_" in name:
            adapter += parameter.numel()
        elif parameter.ndim == 2 and "embed" not in name and "lm_head" not in name:
            frozen += parameter.numel()
    head = task.language.head.weight.numel()
    share = sum(len(answer) for pair in shard.train for answer in pair.answers) / sum(
        pair.tokens for pair in shard.train
    )
    for step in range(steps + 2):
        client = Client(0, task, shard, seeds.generator(0, "train", round=step), 0, 1)
        begun = time.perf_counter()
        # ends with a copy to the CPU, so all is done
        metrics = train_locally(client, start, LocalTraining(steps=1, batch_size=batch), {})[2]
        seconds.append(time.perf_counter() - begun)
        tokens.append(metrics["num_tokens"])
        operations.append(tokens[-1] * (4 * frozen + 6 * adapter + share * 4 * head))
    rates = [count / s for count, s in zip(operations[2:], seconds[2:], strict=True)]
    return {
        "device": torch.cuda.get_device_name(task.device)
        if task.device.type == "cuda"
        else "cpu, one thread",
        "form": task.description,
        "seconds_a_step": statistics.median(seconds[2:]),
        "tokens_a_second": statistics.median(
            count / s for count, s in zip(tokens[2:], seconds[2:], strict=True)
        ),
        "matmul_share": statistics.median(rates) / matrix_rate(task.device),
        **(
            {"peak_memory_gb": torch.cuda.max_memory_allocated() / 1e9}
            if task.device.type == "cuda"
            else {}
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a small model and few steps")
    parser.add_argument("--batch", type=int, default=16, help="pairs a step")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    keep_freed_memory()
    with one_thread(), tempfile.TemporaryDirectory() as place:
        found = measure(
            SMALL if arguments.quick else LARGE,
            arguments.batch,
            3 if arguments.quick else 20,
            Path(place),
        )
    for name, value in found.items():
        print(f"{name:16s} {value if isinstance(value, str) else format(value, '.4g')}")
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
