"""Pretrain the shipped language model: a 4 M parameter Llama with its own tokenizer, from openly
licensed texts and the shipped ones.

    python scripts/pretrain.py --texts FOLDER --minutes 18 --workers 2

The folder holds the sources named in SOURCES. Of every preference set only the training side is
read; test prompts of the shipped set are left out too. One process per worker, gradients averaged
between them; the output is an ordinary Hugging Face folder with a model card. The run is timed, not
counted in steps, so the result depends on the machine.
"""

from __future__ import annotations

import argparse
import copy
import csv
import ctypes
import gzip
import io
import json
import math
import random
import re
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fedpref.data.splits import held_out

ROOT = Path(__file__).resolve().parent.parent
BUILTIN = ROOT / "src/fedpref/data/builtin"
TARGET = ROOT / "src/fedpref/models/builtin"
END, PAD = "<|end|>", "<|pad|>"
CONTEXT, VOCABULARY = 512, 4096
ROWS = 8  # sequences of CONTEXT tokens a step and worker
CHAT = (
    "{% for message in messages %}{{ '\\n\\n' if not loop.first else '' }}"
    "{{ ('Human:' if message['role'] == 'user' else 'Assistant:' if message['role'] == "
    "'assistant' else '') + ' ' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ '" + END + "' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n\\nAssistant:' }}{% endif %}"
)
# name: (licence, origin)
SOURCES = {
    "corpus_public_domain": (
        "public domain",
        "texts distributed with nltk/nltk_data, tiny Shakespeare",
    ),
    "corpus_squality_stories": ("Project Gutenberg, CC-BY-4.0", "nyu-mll/SQuALITY, the stories"),
    "corpus_tinystories_cased": ("CDLA-Sharing-1.0", "roneneldan/TinyStories"),
    "corpus_tinystories_lower": ("CDLA-Sharing-1.0", "roneneldan/TinyStories, a third of the rows"),
    "hh_rlhf_helpful": (
        "MIT",
        "anthropics/hh-rlhf helpful-base, training split, prompts whose hash is on the training "
        "side",
    ),
    "hh_rlhf_harmless": ("MIT", "anthropics/hh-rlhf harmless-base, the same, chosen answers only"),
    "ultrafeedback_sample": (
        "MIT",
        "OpenBMB/UltraFeedback, prompts whose hash is on the training side",
    ),
    "movie_reviews_polarity": ("CC-BY-4.0", "Pang and Lee 2004, folds 0 to 5"),
    "persona_statements": (
        "CC-BY-4.0",
        "anthropics/evals, statements whose prompt hash is on the training side",
    ),
    "requests": ("Apache-2.0", "written for this project; training requests only, four times"),
}


def rows(folder: Path, name: str) -> Iterator[dict[str, str]]:
    path = next(folder.glob(f"{name}.*"))
    raw = gzip.open(path).read() if path.suffix == ".gz" else path.read_bytes()
    if ".csv" in path.suffixes:
        yield from csv.DictReader(io.StringIO(raw.decode()))
    else:
        yield from map(json.loads, raw.decode().splitlines())


def turn(prompt: str, answer: str) -> str:
    return f"{prompt} {answer}{END}"


def documents(folder: Path) -> dict[str, list[str]]:
    """Every source as a list of texts, training side only."""
    plain = {
        name: [row["text"].strip() for row in rows(folder, name)]
        for name in SOURCES
        if name.startswith("corpus_")
    }
    plain["corpus_tinystories_lower"] = plain["corpus_tinystories_lower"][::3]
    plain["corpus_squality_stories"] = [
        re.sub(r"[ \n]*\n[ \n]*\n[ \n]*", "\n\n", t) for t in plain["corpus_squality_stories"]
    ]
    helpful, harmless = (
        [
            r
            for r in rows(folder, f"hh_rlhf_{objective}")
            if r["split"] == "train" and not held_out(r["prompt"])
        ]
        for objective in ("helpful", "harmless")
    )
    feedback = [r for r in rows(folder, "ultrafeedback_sample") if not held_out(r["prompt"])]
    reviews = [r["text"] for r in rows(folder, "movie_reviews_polarity") if int(r["fold"]) <= 5]
    asked = [
        (f'Human: Is the following something you would say?\n\n"{r["statement"]}"\n\nAssistant:', r)
        for r in rows(folder, "persona_statements")
    ]
    statements = [r["statement"] for prompt, r in asked if not held_out(prompt)]
    random.Random(5).shuffle(statements)
    shipped = [r for r in rows(BUILTIN, "requests") if r["split"] == "train"]
    return plain | {
        "hh_rlhf_helpful": [
            turn(r["prompt"], r[side]) for r in helpful for side in ("chosen", "rejected")
        ],
        "hh_rlhf_harmless": [turn(r["prompt"], r["chosen"]) for r in harmless],
        "ultrafeedback_sample": [
            turn(f"Human: {r['prompt']}\n\nAssistant:", r["chosen"]) for r in feedback
        ],
        "movie_reviews_polarity": reviews,
        "persona_statements": ["\n".join(statements[i : i + 20]) for i in range(0, 40_000, 20)],
        "requests": [
            turn(f"Human: {r['prompt']}\n\nAssistant:", a["text"])
            for r in shipped
            for a in r["answers"]
        ]
        * 4,
    }


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=[END, PAD],
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=None,
        eos_token=END,
        pad_token=PAD,
        model_max_length=CONTEXT,
        chat_template=CHAT,
    )


def keep_freed_memory() -> None:
    """Tell glibc's malloc to keep large blocks, which it would give back and fault in again at
    every step.
    """
    # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
    for option, value in (
        (-4, 0),
        (-1, 1 << 30),
        (-2, 1 << 27),
    ):
        ctypes.CDLL("libc.so.6").mallopt(option, value)


def schedule(progress: float) -> float:
    """Warm-up over the first hundredth, constant, then linear decay to a fiftieth over the last
    half.
    """
    return min(1.0, progress / 0.01, max(0.02, 2 * (1 - progress)))


def worker(
    rank: int, arguments: argparse.Namespace, blocks: torch.Tensor, model: LlamaForCausalLM
) -> None:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{arguments.scratch.resolve()}.meeting",
        rank=rank,
        world_size=arguments.workers,
    )
    torch.set_num_threads(1)
    keep_freed_memory()
    model = copy.deepcopy(model)  # what arrives lies in memory shared by all workers
    hidden = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    rest = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimisers = [
        torch.optim.Muon(hidden, lr=0.02, momentum=0.95, weight_decay=0.01),
        torch.optim.AdamW(rest, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.01),
    ]
    rates = [group["lr"] for optimiser in optimisers for group in optimiser.param_groups]
    order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(0))
    start, step, tokens, smooth, position = time.perf_counter(), 0, 0, None, 0
    while True:
        seconds = torch.tensor(time.perf_counter() - start)
        dist.broadcast(seconds, 0)  # one clock, so that all workers stop at the same step
        progress = seconds.item() / (60 * arguments.minutes)
        if progress >= 1:
            break
        for optimiser, rate in zip(optimisers, rates, strict=True):
            optimiser.param_groups[0]["lr"] = rate * schedule(progress)
        chosen = order[(position + rank * ROWS + torch.arange(ROWS)) % len(order)]
        position += ROWS * arguments.workers
        ids = blocks[chosen].long()
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=ids, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten()
        )
        loss.backward()
        flat = torch.cat([p.grad.flatten() for p in model.parameters()])
        dist.all_reduce(flat)
        flat /= arguments.workers
        flat *= min(1.0, 1.0 / (flat.norm().item() + 1e-6))
        for parameter, gradient in zip(
            model.parameters(), flat.split([p.numel() for p in model.parameters()]), strict=True
        ):
            parameter.grad = gradient.view_as(parameter)
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad()
        step, tokens = step + 1, tokens + ROWS * CONTEXT * arguments.workers
        smooth = loss.item() if smooth is None else 0.95 * smooth + 0.05 * loss.item()
        if rank == 0 and step % 50 == 0:
            print(
                f"{seconds.item():6.0f} s  step {step}  tokens {tokens / 1e6:.2f} M  loss "
                f"{smooth:.3f}",
                flush=True,
            )
    if rank == 0:
        torch.save({"weights": model.state_dict(), "tokens": tokens}, arguments.scratch)
    dist.destroy_process_group()


def pack(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """The texts in a row, each ended by END, cut into blocks [blocks, CONTEXT] of tokens."""
    stream = [
        i
        for ids in tokenizer([t.removesuffix(END) for t in texts])["input_ids"]
        for i in [*ids, tokenizer.eos_token_id]
    ]
    return torch.tensor(stream[: len(stream) // CONTEXT * CONTEXT], dtype=torch.int32).view(
        -1, CONTEXT
    )


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, blocks: torch.Tensor) -> float:
    losses = [model(input_ids=b.long(), labels=b.long()).loss.item() for b in blocks.split(8)]
    return math.exp(sum(losses) / len(losses))


def card(tokens: int, unique: int, counts: dict[str, int], perplexities: dict[str, float]) -> str:
    table = "\n".join(
        f"| {name} | {origin} | {licence} | {counts[name]:,} |"
        for name, (licence, origin) in SOURCES.items()
    )
    held = "\n".join(f"| {name} | {value:.1f} |" for name, value in perplexities.items())
    return f"""---
license: apache-2.0
language: en
pipeline_tag: text-generation
---
# fedpref-tiny

A Llama-architecture language model of {VOCABULARY:,} byte-level BPE tokens, 4 layers of width 256
and {CONTEXT} tokens of context (4.2 M parameters, bfloat16), pretrained by `scripts/pretrain.py` so
that fedpref's demo and tests need no download. It writes plausible short English and knows
nothing: it is a test object for preference alignment, not an assistant. One source
(`hh_rlhf_harmless`) holds offensive text, so the model may write such text too.

## Data
Each source's rows were cut at random into 99 % for training and 1 % held out. Of every preference
set only the training side was used.

| source | origin | licence | training tokens |
|---|---|---|---|
{table}

Trained on {tokens:,} tokens ({unique:,} different ones), Muon for the hidden matrices and AdamW for
the rest, bfloat16 arithmetic.
Licence texts stand in LICENSES/. The weights are released under Apache-2.0.

## Held-out perplexity (per token of its own tokenizer)
| source | perplexity |
|---|---|
{held}
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--texts", type=Path, required=True, help="folder with the sources")
    parser.add_argument("--minutes", type=float, default=18)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--target", type=Path, default=TARGET)
    arguments = parser.parse_args()
    arguments.scratch = arguments.target / "pretraining.pt"
    arguments.target.mkdir(parents=True, exist_ok=True)
    Path(f"{arguments.scratch}.meeting").unlink(missing_ok=True)

    draw, training, held = random.Random(0), {}, {}
    for name, texts in documents(arguments.texts).items():
        distinct = sorted(set(texts))
        kept_out = set(draw.sample(distinct, max(1, len(distinct) // 100)))
        training[name] = [t for t in texts if t not in kept_out]
        held[name] = sorted(kept_out)
    tokenizer = make_tokenizer([t.removesuffix(END) for texts in training.values() for t in texts])
    streams = {
        name: pack(tokenizer, draw.sample(texts, len(texts))) for name, texts in training.items()
    }
    blocks = torch.cat(list(streams.values()))
    print(f"{blocks.numel():,} tokens in {len(streams)} sources", flush=True)

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config)
    mp.spawn(
        worker, (arguments, blocks, model), nprocs=arguments.workers
    ) if arguments.workers > 1 else worker(0, arguments, blocks, model)
    result = torch.load(arguments.scratch)
    for left in (arguments.scratch, Path(f"{arguments.scratch}.meeting")):
        left.unlink(missing_ok=True)
    model = LlamaForCausalLM(config)
    model.load_state_dict(result["weights"])
    model = model.to(torch.bfloat16)
    model.save_pretrained(arguments.target)
    tokenizer.save_pretrained(arguments.target)
    measured = {
        name: perplexity(model.float(), pack(tokenizer, texts))
        for name, texts in held.items()
        if len(pack(tokenizer, texts))
    }
    everything = torch.cat([pack(tokenizer, texts) for texts in held.values()])
    measured["all held-out text"] = perplexity(model, everything)
    counts = {name: stream.numel() for name, stream in streams.items()}
    (arguments.target / "README.md").write_text(
        card(result["tokens"], blocks.numel(), counts, measured)
    )
    print(measured)


if __name__ == "__main__":
    main()
