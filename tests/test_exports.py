"""What leaves a run for other programs: PEFT folders, merged models, cards, trackers, a watcher's
view.
"""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers
import yaml
from peft import AutoPeftModelForCausalLM
from tokenizers.normalizers import Lowercase
from transformers import dynamic_module_utils
from typer.testing import CliRunner

from conftest import write_rows
from fedpref import Experiment, UserError, cli, config, run
from fedpref.data import Files
from fedpref.experiments.rounds import Event, evaluated
from fedpref.experiments.run_directory import RunDirectory, file_name
from fedpref.experiments.run_files import EVALUATION, METRICS
from fedpref.models import loading
from fedpref.models.generation import merged
from fedpref.models.gguf_files import write_adapter, write_model
from fedpref.models.language import LanguageModel
from fedpref.models.loading import load_model
from fedpref.models.model_settings import Model
from fedpref.models.named import convert
from fedpref.models.own_parts import Parts
from fedpref.models.texts import Texts
from fedpref.reports.run import read
from fedpref.runs.evaluate import SHARED, evaluate
from fedpref.runs.export import MANIFEST, export
from fedpref.runs.launch import happenings
from fedpref.runs.trackers import tracked
from fedpref.runs.watch import watched
from test_named import needs_real

LOCAL = {"steps": 4, "batch_size": 4, "learning_rate": 0.05}
TEXT = "Human: Which thing?\n\nAssistant: river stone"


@pytest.fixture(scope="module")
def shared(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = config.parse(
        Experiment,
        {**settings, "algorithm": {"name": "feddpo", "local": LOCAL}, "workers": 1},
        "test",
    )
    return run(spec, tmp_path_factory.mktemp("shared") / "run").path


@pytest.fixture(scope="module")
def personal(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clients with an adapter, a low-rank head and a reward head of their own."""
    parts = {"head": "low-rank", "head_rank": 2, "bottleneck": 0, "reward": True, "adapter": True}
    spec = config.parse(
        Experiment,
        {
            **settings,
            "algorithm": {"name": "fedpdpo", "local": LOCAL, "parts": parts},
            "workers": 1,
        },
        "test",
    )
    return run(spec, tmp_path_factory.mktemp("personal") / "run").path


def log_probabilities(model: Any, folder: Path) -> torch.Tensor:
    tokens = transformers.AutoTokenizer.from_pretrained(str(folder))(TEXT, return_tensors="pt")
    with torch.no_grad():
        found: torch.Tensor = model.eval()(**tokens).logits.float().log_softmax(-1)
    return found


def front_matter(folder: Path) -> dict[str, Any]:
    return dict(yaml.safe_load((folder / "README.md").read_text().split("---\n")[1]))


def test_adapters_load_in_peft_and_the_manifest_names_them(
    shared: Path, tiny: Path, tmp_path: Path
) -> None:
    made = export(shared, "peft", tmp_path / "out")
    manifest = json.loads((made / MANIFEST).read_text())
    assert manifest["base_model"] == str(tiny)
    assert manifest["adapters"] == [{"name": "shared", "path": "shared", "rank": 4, "left_out": []}]
    assert "--max-lora-rank 8 --lora-modules shared=shared" in manifest["vllm"]
    plain = log_probabilities(
        AutoPeftModelForCausalLM.from_pretrained(str(made / "shared")), made / "shared"
    )
    assert torch.equal(plain, log_probabilities(load_model(shared / "adapter"), shared / "adapter"))
    base = transformers.AutoModelForCausalLM.from_pretrained(str(tiny))
    assert not torch.allclose(plain, log_probabilities(base, tiny), atol=1e-3), (
        "it has learned something"
    )
    top = front_matter(made / "shared")
    assert top["library_name"] == "peft"
    assert "base_model" not in top, "a folder of this machine is no model of the Hub"
    assert {"feddpo", "dpo", "lora"} <= set(top["tags"])
    mean = RunDirectory(shared).read_rows(EVALUATION)[-1]["summary"]["rewards/accuracies"]["mean"]
    assert f"{100 * mean:.1f} (mean over 4 clients)" in (made / "shared/README.md").read_text()


@pytest.mark.parametrize(("form", "tolerance"), [("merged", 1e-4), ("gguf-ready", 3e-2)])
def test_merged_folders_load_in_transformers_with_the_same_log_probabilities(
    form: Any, tolerance: float, shared: Path, personal: Path, tmp_path: Path
) -> None:
    for path, client, source in (
        (shared, None, shared / "adapter"),
        (personal, "client-1", personal / "clients/client-1"),
    ):
        made = export(path, form, tmp_path / path.parent.name, client=client)
        model = transformers.AutoModelForCausalLM.from_pretrained(str(made))
        assert model.dtype == (torch.float16 if form == "gguf-ready" else torch.float32)
        expected = log_probabilities(load_model(source), source)
        torch.testing.assert_close(
            log_probabilities(model.float(), made), expected, atol=tolerance, rtol=0
        )
        assert front_matter(made)["library_name"] == "transformers"
    assert (made / "reward_head.safetensors").exists()
    last = RunDirectory(personal).read_rows(EVALUATION)[-1]["clients"]["client-1"]
    text = (made / "README.md").read_text()
    for name, metric in (
        ("of the policy", "rewards/accuracies"),
        ("with the reward head beside it", "rewards/accuracies_combined"),
    ):
        assert f"{name} | {100 * last[metric]:.1f} (of client-1)" in text


@pytest.mark.long
def test_a_tokenizer_of_several_templates_and_long_turns_of_users_are_exported(
    settings: dict[str, Any], tiny: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder))
    one = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    tokenizer.chat_template = {"default": one, "tool_use": one}
    tokenizer.save_pretrained(str(folder))
    kept = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**kept, "max_position_embeddings": 1024}))
    long = {"role": "user", "content": "river stone cloud " * 120}
    rows = [
        {
            "prompt": [
                {"role": "user", "content": f"Thing {i}?"},
                {"role": "assistant", "content": "So"},
            ],
            **{
                side: [long, {"role": "assistant", "content": f"{side} {i}"}]
                for side in ("chosen", "rejected")
            },
            "client": i % 2,
        }
        for i in range(24)
    ]
    data = {"name": "files", "path": str(write_rows(tmp_path / "rows.jsonl", rows))}
    task = {**settings["task"], "model": {**settings["task"]["model"], "path": str(folder)}}
    content = {**settings, "data": data, "task": {**task, "max_length": 1024}, "workers": 1}
    path = run(config.parse(Experiment, content, "test"), tmp_path / "run").path
    made = export(path, "peft", tmp_path / "made")
    assert (made / "shared/additional_chat_templates/tool_use.jinja").exists()


def dequantised(file: Path) -> dict[str, torch.Tensor]:
    return {
        tensor.name: torch.from_numpy(
            gguf.dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape[::-1].tolist())
        )
        for tensor in gguf.GGUFReader(file).tensors
    }


@pytest.mark.long
def test_gguf_files_are_read_as_the_same_model(
    shared: Path, personal: Path, tiny: Path, tmp_path: Path
) -> None:
    for path, client, source in (
        (shared, None, shared / "adapter"),
        (personal, "client-1", personal / "clients/client-1"),
    ):
        made = export(path, "gguf", tmp_path / path.parent.name, client=client)
        expected = log_probabilities(load_model(source), source)
        for kind, tolerance in (("f16", 3e-2), ("q8_0", 0.3)):
            convert(made / f"model-{kind}.gguf", made / kind, "float32")
            model = transformers.AutoModelForCausalLM.from_pretrained(str(made / kind))
            found = log_probabilities(model, made / kind)
            torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)
        assert front_matter(made)["library_name"] == "gguf"
        assert (made / "Modelfile").read_text().startswith("FROM ./model-q8_0.gguf\n")
    assert gguf.GGUFReader(made / "model-f16.gguf").fields["general.name"].contents() == (
        "experiment-client-1"
    )
    # the adapter's product is what merging has added, queries and keys in llama.cpp's order
    base = transformers.AutoModelForCausalLM.from_pretrained(str(tiny), dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(tiny))
    write_model(base, tokenizer, tmp_path / "base.gguf", "f16", "base")
    before, after = (
        dequantised(file)
        for file in (tmp_path / "base.gguf", tmp_path / shared.parent.name / "model-f16.gguf")
    )
    file = tmp_path / shared.parent.name / "adapter-f16.gguf"
    factors, fields = dequantised(file), gguf.GGUFReader(file).fields
    names = {name.removesuffix(".lora_a") for name in factors if name.endswith(".lora_a")}
    assert len(names) == 7 * base.config.num_hidden_layers
    for name in names:
        up, down = factors[f"{name}.lora_b"], factors[f"{name}.lora_a"]
        product = fields["adapter.lora.alpha"].contents() / len(down) * up @ down
        torch.testing.assert_close(product, after[name] - before[name], atol=2e-3, rtol=0)
    assert max(float((after[name] - before[name]).abs().max()) for name in names) > 5e-3


def test_what_a_gguf_file_cannot_hold_is_refused(tiny: Path, tmp_path: Path) -> None:
    for targets, where in ((("q_proj", "embed_tokens"), "embed_tokens"), (("lm_head",), "head")):
        language = LanguageModel(Model(path=str(tiny), lora_target_modules=targets))
        config_of = language.model.config
        config_of.tie_word_embeddings = True
        folder = tmp_path / targets[0]
        language.export(language.init(torch.Generator().manual_seed(0)), folder)
        with pytest.raises(UserError, match=f"the adapter is on .*{where}.*Export it merged"):
            write_adapter(folder, config_of, tmp_path / "adapter.gguf", "x")
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(tiny))
    tokenizer.backend_tokenizer.normalizer = Lowercase()
    plain = transformers.AutoModelForCausalLM.from_pretrained(str(tiny))
    with pytest.raises(UserError, match=r"normalises texts \(Lowercase\)"):
        write_model(plain, tokenizer, tmp_path / "model.gguf", "f16", "x")


def test_the_order_of_an_adapters_layers_is_alike_in_every_process(shared: Path) -> None:
    content = json.loads((shared / "adapter/adapter_config.json").read_text())
    assert len(content["target_modules"]) > 2
    assert content["target_modules"] == sorted(content["target_modules"])


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "own"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_models_with_code_of_their_own_are_exported_and_asked(
    settings: dict[str, Any], tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = shutil.copytree(tiny, tmp_path / "own")
    (folder / "modeling_own.py").write_text(CODE)
    said = json.loads((folder / "config.json").read_text())
    named = {
        "AutoConfig": "modeling_own.OwnConfig",
        "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
    }
    (folder / "config.json").write_text(
        json.dumps({**said, "model_type": "own", "auto_map": named})
    )
    content = {**settings, "rounds": 1, "workers": 1}
    model = {**settings["task"]["model"], "path": str(folder), "trust_remote_code": True}
    content["task"] = {**settings["task"], "model": model}
    path = run(config.parse(Experiment, content, "test"), tmp_path / "run").path
    made = export(path, "merged", tmp_path / "merged")
    assert json.loads((made / "config.json").read_text())["model_type"] == "own"
    asked = CliRunner().invoke(cli.app, ["generate", str(path), "A lamp?", "--max-new-tokens", "3"])
    assert asked.exit_code == 0, asked.output
    with pytest.raises(UserError, match="trust_remote_code"):
        load_model(path / "adapter")


def test_other_architectures_are_not_written_as_gguf(
    models: Any, settings: dict[str, Any], tmp_path: Path
) -> None:
    content = {**settings, "rounds": 1, "workers": 1}
    content["task"] = {**settings["task"], "model": {"path": str(models("gpt2")), "lora_r": 2}}
    path = run(config.parse(Experiment, content, "test"), tmp_path / "run").path
    with pytest.raises(UserError, match="architecture 'gpt2' is not written as GGUF"):
        export(path, "gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ["peft", "merged"])
def test_an_export_that_is_another_model_than_the_runs_is_not_kept(
    form: Any, shared: Path, tmp_path: Path
) -> None:
    place = tmp_path / "run"
    shutil.copytree(shared, place)
    config = place / "adapter/adapter_config.json"
    content = json.loads(config.read_text())
    config.write_text(json.dumps({**content, "lora_alpha": 40 * content["lora_alpha"]}))
    with pytest.raises(UserError, match="another model than the run's, and was not kept"):
        export(place, form, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


def test_clients_adapters_say_what_they_leave_out(personal: Path, tmp_path: Path) -> None:
    made = export(personal, "peft", tmp_path / "out")
    entries = {
        entry["name"]: entry for entry in json.loads((made / MANIFEST).read_text())["adapters"]
    }
    assert set(entries) == {"shared", *(f"client-{k}" for k in range(4))}
    assert entries["client-0"]["left_out"] == ["head.down", "head.up", "reward.weight"]
    assert entries["client-0"]["rank"] == 8, "the shared one and its own, as one"
    assert (
        "not the whole of the client's model" in (made / "clients/client-0/README.md").read_text()
    )
    AutoPeftModelForCausalLM.from_pretrained(str(made / "clients/client-0"))
    for place in ("shared", "clients/client-0"):
        assert "not measured" in (made / place / "README.md").read_text(), (
            "the figure is of the whole model"
        )


def test_names_of_clients_stay_names(personal: Path, tmp_path: Path) -> None:
    place = tmp_path / "run"
    shutil.copytree(personal, place)
    odd = "o'brien; touch x"
    for old, new in (("client-0", odd), ("client-1", "shared")):
        (place / "clients" / old).rename(place / "clients" / file_name(new))
        for name in ("clients.json", "evaluation.jsonl"):
            text = (place / name).read_text()
            (place / name).write_text(text.replace(json.dumps(old), json.dumps(new)))
    manifest = json.loads((export(place, "peft", tmp_path / "out") / MANIFEST).read_text())
    paths = {entry["name"]: entry["path"] for entry in manifest["adapters"]}
    assert paths["shared by all"] == "shared"
    assert paths["shared"] == "clients/shared"
    assert f"{odd}=clients/{file_name(odd)}" in shlex.split(manifest["vllm"])


def test_a_card_of_the_shared_model_for_one_client_is_about_that_client(
    shared: Path, tmp_path: Path
) -> None:
    made = export(shared, "peft", tmp_path / "out", client="client-2")
    text = (made / "clients/client-2/README.md").read_text()
    value = RunDirectory(shared).read_rows(EVALUATION)[-1]["clients"]["client-2"][
        "rewards/accuracies"
    ]
    assert f"{100 * value:.1f} (of client-2)" in text
    code = (
        text.split("```python\n")[1]
        .split("```")[0]
        .replace("FOLDER", str(made / "clients/client-2"))
    )
    scope: dict[str, Any] = {}
    exec(code, scope)
    assert scope["model"] is not None


def test_what_a_form_cannot_hold_is_refused_and_nothing_is_written(
    settings: dict[str, Any], shared: Path, tmp_path: Path
) -> None:
    parts = {"head": None, "bottleneck": 2, "reward": False, "adapter": False}
    content = {
        **settings,
        "rounds": 1,
        "algorithm": {"name": "fedpdpo", "local": LOCAL, "parts": parts},
        "workers": 1,
    }
    path = run(config.parse(Experiment, content, "test"), tmp_path / "run").path
    with pytest.raises(UserError, match="bottleneck"):
        export(path, "merged", tmp_path / "out", client="client-0")
    with pytest.raises(UserError, match="choose one with --client"):
        export(path, "merged", tmp_path / "out")
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="exists already"):
        export(shared, "peft", tmp_path / "there")
    assert not (tmp_path / "out").exists()
    assert sorted(place.name for place in tmp_path.iterdir()) == ["run", "there"]
    assert "--format 'onnx'" in str(
        CliRunner().invoke(cli.app, ["export", str(shared), "--format", "onnx"]).exception
    )


# ---- any preferences


def test_a_run_is_measured_on_any_file(
    shared: Path, personal: Path, rows_file: Path, tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in rows_file.read_text().splitlines()][:10]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = evaluate(shared, Files(path=str(tmp_path / "pairs.jsonl")))
    assert list(found) == [SHARED]
    assert found[SHARED]["num_examples"] == 10
    swapped = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    (tmp_path / "swapped.jsonl").write_text("".join(json.dumps(row) + "\n" for row in swapped))
    other = evaluate(shared, Files(path=str(tmp_path / "swapped.jsonl")))
    # columns are called as in the run, if nothing else is said
    called = {"prompt": "question", "chosen": "good", "rejected": "bad"}
    renamed = [{new: row[old] for old, new in called.items()} for row in rows]
    (tmp_path / "renamed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in renamed))
    place = tmp_path / "asked"
    shutil.copytree(shared, place)
    spec = yaml.safe_load((place / "config.yaml").read_text())
    names = {f"{old}_column": new for old, new in called.items()}
    spec["data"] |= {**names, "unusable": "skip", "only": {"kind": ["first"]}}
    (place / "config.yaml").write_text(yaml.safe_dump(spec))
    assert evaluate(place, Files(path=str(tmp_path / "renamed.jsonl"))) == found
    assert found[SHARED]["rewards/accuracies"] + other[SHARED][
        "rewards/accuracies"
    ] == pytest.approx(1.0)
    each = evaluate(personal, Files(path=str(tmp_path / "pairs.jsonl")))
    assert list(each) == [f"client-{k}" for k in range(4)]
    assert len({row["loss"] for row in each.values()}) == 4, "every client's own model answers"
    one = evaluate(personal, Files(path=str(tmp_path / "pairs.jsonl")), "client-2")
    assert one == {"client-2": each["client-2"]}
    with pytest.raises(UserError, match="there is no client 'x'"):
        evaluate(shared, Files(path=str(tmp_path / "pairs.jsonl")), "x")
    own = evaluate(personal, Files(path=str(rows_file)), column="client")
    assert [own[f"client-{k}"]["num_examples"] for k in range(4)] == [24, 16, 12, 9]
    with pytest.raises(UserError, match="give one of them"):
        evaluate(personal, Files(path=str(rows_file)), "client-0", column="client")
    with pytest.raises(UserError, match="there is no client 'first'"):
        evaluate(personal, Files(path=str(rows_file)), column="kind")
    place = tmp_path / "bare"
    shutil.copytree(shared, place)
    shutil.rmtree(place / "checkpoints")
    with pytest.raises(UserError, match="no longer there"):
        evaluate(place, Files(path=str(tmp_path / "pairs.jsonl")))
    shown = CliRunner().invoke(
        cli.app, ["evaluate", str(shared), "--data", str(tmp_path / "pairs.jsonl"), "--json"]
    )
    assert json.loads(shown.output)[SHARED] == pytest.approx(dict(found[SHARED]))


def test_a_client_evaluated_on_its_own_held_out_rows_has_the_run_s_figures(
    personal: Path, tmp_path: Path
) -> None:
    spec = Experiment.load(personal / "config.yaml")
    (client,) = (one for one in spec.clients()[0] if one.name == "client-0")
    rows = [
        {side: getattr(row, side) for side in ("prompt", "chosen", "rejected")}
        for row in client.test
    ]
    (tmp_path / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = evaluate(personal, Files(path=str(tmp_path / "held.jsonl")), "client-0")["client-0"]
    measured = RunDirectory(personal).read_rows(EVALUATION)[-1]["clients"]["client-0"]
    assert found["rewards/accuracies"] == measured["rewards/accuracies"]
    assert found["loss"] == pytest.approx(measured["loss"], rel=1e-4)


# ---- watching and tracking


@pytest.mark.long
def test_a_watcher_sees_what_the_runner_saw(settings: dict[str, Any], tmp_path: Path) -> None:
    spec = config.parse(
        Experiment, {**settings, "baselines": ["alone"], "evaluate_every": 1, "workers": 1}, "test"
    )
    seen = [
        event
        for event in happenings(spec, RunDirectory(tmp_path / "run"))
        if event.kind in ("round", "evaluate")
    ]

    def must_not_wait() -> None:
        raise AssertionError("the run is done")

    found = [event for event in watched(tmp_path / "run", must_not_wait) if event.kind != "begin"]
    for kind in ("round", "evaluate"):
        ran, looked = (
            [(e.line, e.done, e.total) for e in events if e.kind == kind]
            for events in (seen, found)
        )
        assert ran == looked
    assert [e.metrics["loss"] for e in seen if e.kind == "round"] == [
        e.metrics["loss"] for e in found if e.kind == "round"
    ]
    (tmp_path / "run/done").unlink()
    with pytest.raises(AssertionError, match="done"):
        list(watched(tmp_path / "run", must_not_wait))
    notes: list[str] = []
    events = watched(tmp_path / "run", must_not_wait)
    with pytest.raises(AssertionError, match="done"):
        notes.extend(event.note for event in events)
    assert "no process on this machine is at work on it" in notes[-1]
    with RunDirectory(tmp_path / "run").alone():
        assert RunDirectory(tmp_path / "run").is_held
    assert not RunDirectory(tmp_path / "run").is_held
    shown = CliRunner().invoke(cli.app, ["report", str(tmp_path / "run")])
    assert shown.exit_code == 0


class Fake:
    """Stands for wandb, mlflow or trackio: what was called, with what."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any, Any]] = []

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **named: Any) -> Fake:
            self.calls.append((name, args, named))
            return self

        return call


@pytest.mark.parametrize(
    ("name", "logs", "ends"),
    [
        ("wandb", "log", "finish"),
        ("mlflow", "log_metrics", "end_run"),
        ("trackio", "log", "finish"),
    ],
)
def test_trackers_are_told_what_happens(
    name: str,
    logs: str,
    ends: str,
    settings: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake = Fake()
    monkeypatch.setitem(sys.modules, name, fake)
    for variable in ("WANDB_MODE", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(variable, raising=False)
    spec = config.parse(
        Experiment, {**settings, "report_to": [name], "workers": 1, "name": "mine"}, "test"
    )
    list(happenings(spec, RunDirectory(tmp_path / "run")))
    told = [
        (args[0], named.get("step", args[0].get("round")))
        for call, args, named in fake.calls
        if call == logs
    ]
    rows = RunDirectory(tmp_path / "run").read_rows(METRICS)
    losses = {step: figures["feddpo/loss"] for figures, step in told if "feddpo/loss" in figures}
    assert losses == {row["round"]: row["loss"] for row in rows}
    assert any("feddpo/held_out/mean" in figures for figures, _ in told)
    assert fake.calls[-1][0] == ends
    assert not any("FAILED" in args or named.get("exit_code") for _, args, named in fake.calls)
    text = str(fake.calls)
    assert "mine" in text
    assert {"wandb": "'offline'", "mlflow": "sqlite:///", "trackio": "mine"}[name] in text, (
        "nothing leaves this machine by default"
    )


def test_trackers_tell_rows_to_choose_by_from_the_tests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = Fake()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    row = {"round": 3, "summary": {"rewards/accuracies": {"mean": 0.5}}}
    told = [evaluated("feddpo", 3, {**row, "on": on}) for on in ("validation", "test")]
    list(tracked(iter(told), ("wandb",), "mine", {}, tmp_path))
    told_of = [args[0] for call, args, _ in fake.calls if call == "log"]
    names = [name for figures in told_of for name in figures if name != "round"]
    assert names == ["feddpo/validation/mean", "feddpo/held_out/mean"]


def test_trackers_are_told_that_a_run_has_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing() -> Iterator[Event]:
        yield Event("feddpo", "round", 1, 2, {"loss": 0.7})
        raise UserError("training diverged")

    found = {}
    for name in ("wandb", "mlflow"):
        fake = Fake()
        monkeypatch.setitem(sys.modules, name, fake)
        with pytest.raises(UserError, match="diverged"):
            list(tracked(failing(), (name,), "mine", {}, tmp_path))
        found[name] = fake.calls[-1]
    assert found == {
        "wandb": ("finish", (), {"exit_code": 1}),
        "mlflow": ("end_run", ("FAILED",), {}),
    }


def test_tensorboard_reads_what_was_written(settings: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    spec = config.parse(
        Experiment, {**settings, "report_to": ["tensorboard"], "workers": 1}, "test"
    )
    list(happenings(spec, RunDirectory(tmp_path / "run")))
    rows = RunDirectory(tmp_path / "run").read_rows(METRICS)
    again = tracked(
        iter([Event("feddpo", "round", 3, 3, {"loss": 0.25})]),
        ("tensorboard",),
        "mine",
        {},
        tmp_path / "run",
    )
    assert len(list(again)) == 1
    found = EventAccumulator(str(tmp_path / "run/tensorboard/feddpo"))
    found.Reload()
    losses = [row["loss"] for row in rows[:2]] + [0.25]
    assert [(one.step, one.value) for one in found.Scalars("loss")] == [
        (k + 1, pytest.approx(loss)) for k, loss in enumerate(losses)
    ]


def test_a_tracker_that_is_not_there_is_named(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    spec = config.parse(Experiment, {**settings, "report_to": ["wandb"]}, "test")
    with pytest.raises(UserError, match="pip install wandb"):
        list(happenings(spec, RunDirectory(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


# ---- answers to be read


def test_answers_are_drawn_from_the_whole_of_a_clients_model(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    task = config.parse(Experiment, settings, "test").build_task()
    rng = torch.Generator().manual_seed(0)
    params = {**task.init(rng), **task.parts(Parts(bottleneck=4), rng)}
    params = {
        name: tensor + 0.05 * torch.randn(tensor.shape, generator=rng)
        for name, tensor in params.items()
    }
    task.export(params, tmp_path / "client")
    ids = torch.tensor([[5, 17, 300, 8]])
    model = task.language.model.get_base_model()
    with torch.no_grad():
        with task.language.model.disable_adapter():
            before = model(ids).logits
        with merged(task.language, params):
            found = model(ids).logits
        with task.language.model.disable_adapter():
            assert torch.equal(model(ids).logits, before), "everything is put back"
        expected = load_model(tmp_path / "client")(ids).logits
    assert (found - before).abs().max() > 0.1
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_answers_are_asked_for_with_the_runs_day(
    shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    days: list[str] = []

    def texts(tokenizer: Any, model: Any, today: str) -> Texts:
        days.append(today)
        return Texts(tokenizer, model, today)

    monkeypatch.setattr(loading, "Texts", texts)
    asked = CliRunner().invoke(cli.app, ["generate", str(shared), "A?", "--max-new-tokens", "1"])
    assert asked.exit_code == 0, asked.output
    loading.generate(shared / "adapter", "A?", chat=False, max_new_tokens=1)
    assert days == ["2024-07-26", date.today().isoformat()]


@pytest.mark.long
def test_a_run_keeps_answers_before_and_after_where_they_are_asked_for(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    algorithm = {"name": "fedpdpo", "local": LOCAL, "parts": {"bottleneck": 4}}
    asked = {
        **settings,
        "task": {**settings["task"], "samples": 2},
        "algorithm": algorithm,
        "rounds": 1,
        "baselines": ["alone"],
    }
    samples = read(run(config.parse(Experiment, asked, "test"), tmp_path / "run").path).samples
    assert not (tmp_path / "run/baselines/alone/samples").exists()
    assert sorted(samples) == [f"client-{i}" for i in range(4)]
    assert all(
        len(rows) == 2 and rows[0]["prompt"].startswith("Which fish") for rows in samples.values()
    )
    assert any(
        row["before"]["completion"] != row["after"]["completion"]
        for rows in samples.values()
        for row in rows
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tiny", pytest.param("smollm2-q4", marks=needs_real)])
def test_llama_cpp_gives_the_same_log_probabilities(
    kind: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    content = {
        **settings,
        "algorithm": {"name": "feddpo", "local": LOCAL},
        "workers": 1,
        "rounds": 1,
    }
    if kind != "tiny":
        content["task"] = {"model": {"path": kind, "lora_layers_to_transform": "last-2"}}
    folder = run(config.parse(Experiment, content, "test"), tmp_path / "run").path
    made = export(folder, "gguf", tmp_path / "made")
    aligned = load_model(folder / "adapter").float()
    expected = log_probabilities(aligned, folder / "adapter")[0]
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder / "adapter"))
    write_model(aligned.unload(), tokenizer, made / "base.gguf", "f16", "base")
    ids = tokenizer(TEXT)["input_ids"]
    likely = expected > expected.amax(-1, keepdim=True) - 8  # of what nobody expects, f16 says less
    for options, most in (
        ({"model_path": "model-f16.gguf"}, 5e-2),
        ({"model_path": "base.gguf", "lora_path": "adapter-f16.gguf"}, 5e-2),
        ({"model_path": "model-q8_0.gguf"}, 1.0),  # eight bits
    ):
        paths = {key: str(made / name) for key, name in options.items()}
        model = llama_cpp.Llama(n_ctx=64, logits_all=True, verbose=False, **paths)
        assert model.tokenize(TEXT.encode(), add_bos=False, special=True) == ids
        model.eval(ids)
        found = torch.tensor(model.scores[: len(ids)]).log_softmax(-1)
        apart = float((found - expected).abs()[likely].max())
        print(f"{kind}, {options['model_path']}: {apart:.3g}")
        assert apart < most
