"""What tests share: small models and preference rows on disk, in the formats that users have."""

from __future__ import annotations

import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # test runners are parallel already
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import pytest
import torch
import transformers

SHARED_MEMORY, ROOM = Path("/dev/shm"), 4 * 10**9  # bytes that a whole run may take
ROOT = Path(__file__).resolve().parent.parent
REAL_DATA = ROOT.parent / "shared" / "data"
needs_real_data = pytest.mark.skipif(
    not REAL_DATA.is_dir(), reason="the folder of real preference data is not beside this checkout"
)
TOKENIZER = ROOT / "src/fedpref/models/builtin"

SMALL = {
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "hidden_size": 32,
    "max_position_embeddings": 96,
}
MADE = pytest.StashKey[str]()  # the folder in memory
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(
        **SMALL, intermediate_size=48, tie_word_embeddings=True
    ),
    "qwen2": lambda: transformers.Qwen2Config(**SMALL, intermediate_size=48, num_key_value_heads=1),
    "gpt2": lambda: transformers.GPT2Config(n_layer=2, n_head=2, n_embd=32, n_positions=96),
    "mistral": lambda: transformers.MistralConfig(
        **SMALL, intermediate_size=48, num_key_value_heads=2, sliding_window=20
    ),
    "bloom": lambda: transformers.BloomConfig(n_layer=2, n_head=2, hidden_size=32),
    "gpt_neo": lambda: transformers.GPTNeoConfig(
        num_layers=2,
        num_heads=2,
        hidden_size=32,
        attention_types=[[["global", "local"], 1]],
        max_position_embeddings=96,
        intermediate_size=48,
    ),
    "granite": lambda: transformers.GraniteConfig(
        **SMALL, intermediate_size=48, logits_scaling=3.0
    ),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**SMALL, intermediate_size=48),
}
ARCHITECTURES = ("llama", "qwen2", "gpt2", "gpt_neox")


def pytest_configure(config: pytest.Config) -> None:
    """Let tests write to memory where there is room: runs wait for the disk at every step."""
    is_free = SHARED_MEMORY.is_dir() and shutil.disk_usage(SHARED_MEMORY).free > ROOM
    if is_free and not config.option.basetemp and not hasattr(config, "workerinput"):
        config.option.basetemp = config.stash[MADE] = tempfile.mkdtemp(dir=SHARED_MEMORY)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Free it again."""
    if made := config.stash.get(MADE, None):
        shutil.rmtree(made, ignore_errors=True)


def make_model(folder: Path, architecture: str = "llama", seed: int = 0) -> Path:
    """A randomly initialised causal language model as an ordinary Hugging Face folder, with the
    shipped tokenizer.
    """
    tokenizer = transformers.AutoTokenizer.from_pretrained(TOKENIZER)
    configuration = CONFIGS[architecture]()
    configuration.vocab_size = len(tokenizer)
    configuration.bos_token_id = configuration.eos_token_id = tokenizer.eos_token_id
    configuration.pad_token_id = tokenizer.pad_token_id
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(configuration)
    with torch.no_grad():
        # larger weights than the default, so that answers differ in probability
        for parameter in model.parameters():
            parameter.mul_(3.0) if parameter.ndim == 2 else parameter
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def kept_values(run: Path, rounds: int, field: str) -> dict[int, Any]:
    """What clients keep of a field in a checkpoint of a run, by client."""
    from fedpref.engines.store import Store

    store = Store(run / "checkpoints")
    loaded = store.load(run / f"checkpoints/round-{rounds:06d}", [field])
    return {client: kept.value for client, kept in loaded[field].items()}


def make_rows(clients: Sequence[int], seed: int = 0) -> list[dict[str, str]]:
    """Rows for clients of these sizes: each client prefers answers that hold a word of its own."""
    draw = random.Random(seed)
    words = ["river", "stone", "cloud", "lamp", "bread", "glass", "rope", "mill"]
    rows = []
    for number, count in enumerate(clients):
        liked = words[number % len(words)]
        for i in range(count):
            others = [
                draw.choice([w for w in words if w != liked]) for _ in range(draw.randint(2, 9))
            ]
            better = [*others[:1], liked, *others[1:]]
            prompt = f"Human: Which fish, number {number}.{i}?\n\nAssistant:"
            texts = {
                "prompt": prompt,
                "chosen": " " + " ".join(better),
                "rejected": " " + " ".join(others),
            }
            rows.append({**texts, "client": f"client-{number}", "kind": ("first", "second")[i % 2]})
    return rows


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A small model of an architecture, made once."""
    made: dict[str, Path] = {}

    def get(architecture: str) -> Path:
        if architecture not in made:
            made[architecture] = make_model(
                tmp_path_factory.mktemp(architecture) / "model", architecture
            )
        return made[architecture]

    return get


@pytest.fixture(scope="session")
def tiny(models: Callable[[str], Path]) -> Path:
    return models("llama")


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four clients with 24, 16, 12 and 9 rows."""
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", make_rows([24, 16, 12, 9]))


@pytest.fixture(scope="session")
def settings(tiny: Path, rows_file: Path) -> dict[str, Any]:
    """The config of a quick experiment, as plain data."""
    return {
        "data": {"name": "files", "path": str(rows_file), "test_fraction": 0.3},
        "task": {
            "name": "preference",
            "model": {"path": str(tiny), "lora_r": 4, "dtype": "float32"},
            "loss": {"name": "dpo", "beta": 0.5},
        },
        "algorithm": {
            "name": "feddpo",
            "local": {"steps": 2, "batch_size": 4, "learning_rate": 0.01},
        },
        "rounds": 3,
        "workers": 1,
    }


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Small models run fastest so; and sums must not depend on who runs the tests."""
    torch.set_num_threads(1)


def leave(spec: Any, path: Path, after: int, transport: Any = None) -> None:
    """Begin a run, and leave it after so many of its events."""
    from fedpref.experiments.rounds import events, new_directory

    happenings = events(spec, new_directory(spec, path), transport=transport)
    for _ in range(after):
        next(happenings)
    happenings.close()
