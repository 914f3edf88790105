"""What a run has trained, in the forms that other programs load: PEFT folders, merged folders of transformers, model cards."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote

import yaml

from fedpref import __version__, trees
from fedpref.errors import UserError
from fedpref.experiment import Experiment
from fedpref.models.language import BUILTIN
from fedpref.models.parts import DOWN, FILE, HEAD, HEAD_DOWN, HEAD_UP, REWARD
from fedpref.rundirectory import CLIENTS, EVALUATION, RunDirectory
from fedpref.running import exported, read_experiment
from fedpref.summary import HEADLINES, headline

Form = Literal["peft", "merged", "gguf-ready"]
MANIFEST = "manifest.json"
ADAPTER = "adapter_model.safetensors"


def export(path: Path, form: Form, output: Path, *, client: str | None = None) -> Path:
    """Write a run's models into a new folder; raises UserError where a model has a part that the form cannot hold.

    `peft`: the shared adapter and each client's, a PEFT folder each, with a manifest of them all. `merged`: the shared model, or the
    one of `client`, as a folder of transformers; `gguf-ready`: the same in float16, as llama.cpp's conversion reads it.
    """
    if output.exists():
        raise UserError(f"{output} exists already. Give another --output, or remove it.")
    experiment = read_experiment(RunDirectory(path))
    if not RunDirectory(path).done:
        raise UserError(f"{path}: the run is not finished. `fedpref resume {path}` finishes it.")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".") as scratch:
        made = Path(scratch) / "made"
        if form == "peft":
            _adapters(path, made, experiment, client)
        else:
            _merged(exported(path, client), made, half=form == "gguf-ready")
            (made / "README.md").write_text(card(path, experiment, client, form))
        made.replace(output)
    return output


# ---- PEFT


def _adapters(path: Path, output: Path, experiment: Experiment, client: str | None) -> None:
    """Every adapter of a run, or one client's, and a manifest."""
    found = {} if client else {"shared": path / "adapter"}
    found |= {unquote(folder.name): folder for sub in ("clients", "newcomers") for folder in sorted(path.glob(f"{sub}/*"))}
    if client:
        found = {client: exported(path, client)}
    entries = []
    for name, folder in found.items():
        if not (folder / ADAPTER).exists():
            continue
        place = output / ("shared" if folder.parent == path and not client else f"clients/{folder.name}")
        place.mkdir(parents=True)
        for file in folder.iterdir():
            if file.name != FILE:
                shutil.copyfile(file, place / file.name)
        left_out = sorted(trees.load(folder / FILE)) if (folder / FILE).exists() else []
        (place / "README.md").write_text(card(path, experiment, name if name != "shared" else None, "peft", left_out))
        rank = json.loads((folder / "adapter_config.json").read_text())["r"]
        entries.append({"name": name, "path": str(place.relative_to(output)), "rank": rank, "left_out": left_out})
    if not entries:
        raise UserError(f"{path}: there are no adapters here; those of real sites have stayed there.")
    base = json.loads((output / str(entries[0]["path"]) / "adapter_config.json").read_text())["base_model_name_or_path"]
    modules = " ".join(f"'{entry['name']}={entry['path']}'" for entry in entries)
    serve = f"vllm serve {base} --enable-lora --max-lora-rank {max(int(str(entry['rank'])) for entry in entries)} --lora-modules {modules}"
    (output / MANIFEST).write_text(json.dumps({"base_model": base, "adapters": entries, "vllm": serve}, indent=1) + "\n")


# ---- transformers


def _merged(folder: Path, output: Path, *, half: bool) -> None:
    """A folder of transformers with the adapter, and the client's own head, in its weights."""
    import torch
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer

    own = trees.load(folder / FILE) if (folder / FILE).exists() else {}
    if DOWN in own:
        raise UserError(
            f"{folder}: this client's model has a bottleneck behind the last layer, for which transformers has no place. "
            "Export it as peft, without it, or train with algorithm.parts.bottleneck: 0."
        )
    model = AutoPeftModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).merge_and_unload()
    if head := {HEAD, HEAD_UP} & own.keys():
        layer = model.get_output_embeddings()
        weight = own[HEAD] if HEAD in head else layer.weight.detach() + own[HEAD_UP] @ own[HEAD_DOWN]
        model.config.tie_word_embeddings = False
        untied = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=layer.bias is not None, dtype=weight.dtype)
        untied.weight.data.copy_(weight)
        if layer.bias is not None:
            untied.bias.data.copy_(layer.bias)
        model.set_output_embeddings(untied)
    model.to(torch.float16 if half else torch.float32).save_pretrained(str(output))
    AutoTokenizer.from_pretrained(str(folder)).save_pretrained(str(output))
    if REWARD in own:
        trees.save({REWARD: own[REWARD]}, output / "reward_head.safetensors")


# ---- the card


def card(path: Path, experiment: Experiment, client: str | None, form: Form, left_out: list[str] | None = None) -> str:
    """A model card: what Hugging Face reads at its top, and the run in words."""
    row = RunDirectory(path).read_rows(EVALUATION)[-1]
    known = json.loads((path / CLIENTS).read_text())
    metric = headline(row["summary"])
    shown, rows = HEADLINES[metric], row["clients"] | row.get("newcomers", {})
    model = experiment.task.model.path
    name = f"{experiment.name}: {client}" if client else experiment.name
    loss = getattr(getattr(experiment.task, "loss", None), "name", experiment.task.name)
    data = getattr(experiment.data, "path", None)
    top: dict[str, Any] = {
        "library_name": "peft" if form == "peft" else "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "fedpref/builtin" if model == BUILTIN else model,
        "tags": ["fedpref", "federated-learning", "preference-alignment", experiment.algorithm.name, loss, "lora"],
        "license": "apache-2.0" if model == BUILTIN else "other",
    }
    if data and not Path(data).exists():
        top["datasets"] = [data]
    value = rows[client][metric] if client in rows else row["summary"][metric]["mean"]
    whose = f"of {client}" if client in rows else f"mean over {len(row['clients'])} clients"
    lines = [
        f"# {name}",
        f"Trained by {experiment.algorithm.name} with [fedpref](https://pypi.org/project/fedpref) {__version__}: {len(known)} clients, "
        f"{experiment.rounds} rounds, seed {experiment.seed}. No client's rows left it.",
        _table({"held-out " + shown.caption: f"{shown.text(value)} ({whose})"} | _counts(known, client)),
    ]
    if top["license"] == "other":
        lines.append("The licence is that of the base model and of the data; say here which.")
    if left_out:
        lines.append(f"This folder is not the whole of the client's model: {', '.join(left_out)} have no place in a PEFT adapter.")
    if form == "gguf-ready":
        lines.append("For llama.cpp: `python convert_hf_to_gguf.py FOLDER --outfile model.gguf`.")
    return f"---\n{yaml.safe_dump(top, sort_keys=False)}---\n\n" + "\n\n".join(lines) + "\n"


def _counts(known: Mapping[str, Mapping[str, int]], client: str | None) -> dict[str, str]:
    some = [known[client]] if client is not None and client in known else list(known.values())
    return {f"{title} examples": str(sum(about[side] for about in some)) for side, title in (("train", "training"), ("test", "held-out"))}


def _table(rows: Mapping[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {text} |" for name, text in rows.items())])
