"""A run's models in the forms that other programs load: PEFT, transformers, model cards."""

from __future__ import annotations

import html
import json
import re
import shlex
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from safetensors import SafetensorError

from fedpref import __version__
from fedpref.errors import UserError, printable
from fedpref.experiments.choosing import VALIDATION
from fedpref.experiments.experiment import Experiment
from fedpref.experiments.finished import FinishedRun
from fedpref.experiments.promises import promised, spent_of
from fedpref.experiments.run_directory import file_name
from fedpref.experiments.run_files import METRICS
from fedpref.models.backbone import merged_adapter
from fedpref.models.gguf_files import (
    F16,
    Q8_0,
    modelfile,
    refuse_other,
    write_adapter,
    write_model,
)
from fedpref.models.model_settings import Model
from fedpref.models.named import BUILTIN, MODELS, convert
from fedpref.models.own_parts import DOWN, FILE, REWARDS, VOCABULARY_HEAD, head_weight
from fedpref.numerics import trees
from fedpref.numerics.files import unwritten
from fedpref.numerics.metrics import COMBINED, HEADLINES, headline
from fedpref.runs.comparing import Comparison

Form = Literal["peft", "merged", "gguf-ready", "gguf"]
MANIFEST = "manifest.json"
ADAPTER = "adapter_model.safetensors"
SHARED = "shared"
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM takes (its LoRAConfig)
LOADS = {
    "peft": """from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

model = AutoPeftModelForCausalLM.from_pretrained("FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")""",
    "transformers": """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")""",
}


def export(path: Path, form: Form, output: Path, *, client: str | None = None) -> Path:
    """Write a run's models into a new folder, and return it.

    Args:
        path: The run directory.
        form: `peft`: the shared adapter and each client's, a PEFT folder each, with a manifest of
            them all. `merged`: the shared model, or the one of `client`, as a folder of
            transformers. `gguf-ready`: the same in float16, as llama.cpp's conversion reads it.
            `gguf`: the same as GGUF files in f16 and q8_0, with the adapter alone as another and an
            Ollama Modelfile; of Llama's architecture.
        output: The new folder.
        client: Whose model.

    Raises:
        UserError: The folder is there already, the run is not finished, a model has a part that
            the form cannot hold, or what was made does not score held-out answers as the run does.
    """
    if output.exists():
        raise UserError(f"{output} exists already. Give another --output, or remove it.")
    run = FinishedRun.at(path).refuse_opinions().require_done()
    experiment, measured = run.experiment, Measured.read(run)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".") as scratch:
        made = Path(scratch) / "made"
        if form == "peft":
            _adapters(run, made, client, measured)
        else:
            folder, half = run.model_folder(client), form != "merged"
            if form == "gguf":
                compared = _gguf(run, folder, client, made, experiment.name)
            else:
                _merged(folder, made, half=half, code=_code(run))
                compared = _compared(run, folder, client, made, half=half)
            base = _base(folder)
            (made / "README.md").write_text(
                card(measured, experiment, client, form, base=base, compared=compared)
            )
        made.replace(output)
    return output


# ---- PEFT


def _adapters(run: FinishedRun, output: Path, client: str | None, measured: Measured) -> None:
    """Write every adapter of a run, or one client's, and a manifest."""
    from peft import PeftModel

    path = run.path
    own = [*run.client_folders.items(), *run.joined_folders.items()]
    shared = [(None, path / "adapter")] if (path / "adapter" / ADAPTER).exists() else []
    folders: list[tuple[str | None, Path]] = (
        [*shared, *own] if client is None else [(client, run.model_folder(client))]
    )
    if not folders:
        raise UserError(
            f"{path}: there are no adapters here; those of real sites have stayed there."
        )
    entries = []
    comparison = Comparison(run, client)
    base_model = _plain_base(folders[0][1], run)
    for name, folder in folders:
        target = output / (f"clients/{file_name(name)}" if name else SHARED)
        target.mkdir(parents=True)
        # tokenizers of several templates have a folder of them
        shutil.copytree(
            folder,
            target,
            ignore=shutil.ignore_patterns(FILE),
            copy_function=shutil.copyfile,
            dirs_exist_ok=True,
        )
        left_out = sorted(trees.load(folder / FILE)) if (folder / FILE).exists() else []
        try:
            exported = PeftModel.from_pretrained(base_model, str(target)).eval()
        except (SafetensorError, OSError, RuntimeError, ValueError) as error:
            raise UserError(f"{folder}: this adapter is damaged: {error}") from error
        comparison.check(folder, exported, is_whole=False)
        base_model = exported.unload()
        (target / "README.md").write_text(
            card(
                measured,
                run.experiment,
                name,
                "peft",
                left_out,
                base=_base(folder),
                compared=comparison.sentence,
            )
        )
        rank = int(json.loads((folder / "adapter_config.json").read_text())["r"])
        title = name or (SHARED if SHARED not in dict(own) else f"{SHARED} by all")
        entries.append(
            {
                "name": title,
                "path": str(target.relative_to(output)),
                "rank": rank,
                "left_out": left_out,
            }
        )
    base = json.loads((folders[0][1] / "adapter_config.json").read_text())[
        "base_model_name_or_path"
    ]
    largest = max(int(str(entry["rank"])) for entry in entries)
    words = [
        "vllm",
        "serve",
        base,
        "--enable-lora",
        "--max-lora-rank",
        str(next((rank for rank in VLLM_RANKS if rank >= largest), largest)),
    ]
    words += ["--lora-modules", *(f"{entry['name']}={entry['path']}" for entry in entries)]
    (output / MANIFEST).write_text(
        json.dumps({"base_model": base, "adapters": entries, "vllm": shlex.join(words)}, indent=1)
        + "\n"
    )


def _base(folder: Path) -> str:
    """Return the Hub id or folder of the model on which a run's adapter stands."""
    config = json.loads((folder / "adapter_config.json").read_text())
    return str(config["base_model_name_or_path"])


def _plain_base(folder: Path, run: FinishedRun) -> Any:
    """Load the model on which a run's adapter stands, as anybody would."""
    import torch
    import transformers

    config = json.loads((folder / "adapter_config.json").read_text())
    return transformers.AutoModelForCausalLM.from_pretrained(
        config["base_model_name_or_path"],
        revision=config.get("revision"),
        dtype=torch.float32,
        **_code(run),
    ).eval()


def _code(run: FinishedRun) -> dict[str, bool]:
    """Return whether a run's models bring code of their own that may be run, for transformers."""
    return {"trust_remote_code": run.experiment.task.runs_remote_code}


# ---- transformers


def _compared(run: FinishedRun, folder: Path, client: str | None, made: Path, *, half: bool) -> str:
    """Compare a merged model with the run's; return what came of it, in words."""
    import torch
    import transformers

    comparison = Comparison(run, client)
    exported = transformers.AutoModelForCausalLM.from_pretrained(
        str(made), dtype=torch.float32, **_code(run)
    )
    dtype = "float16" if half else "float32"
    comparison.check(folder, exported.eval(), is_whole=True, dtype=dtype)
    return comparison.sentence


def _gguf(run: FinishedRun, folder: Path, client: str | None, output: Path, name: str) -> str:
    """Write the merged model and the adapter as GGUF files; return how near they come, in words."""
    import torch
    import transformers

    base = transformers.AutoConfig.from_pretrained(_base(folder), **_code(run))
    refuse_other(base)
    output.mkdir(parents=True)
    title = f"{name}-{client}" if client else name
    with tempfile.TemporaryDirectory(dir=output.parent) as scratch:
        plain = Path(scratch) / "merged"
        _merged(folder, plain, half=False, code=_code(run))
        model = transformers.AutoModelForCausalLM.from_pretrained(
            str(plain), dtype=torch.float32, **_code(run)
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(plain), **_code(run))
        for kind in (F16, Q8_0):
            write_model(model, tokenizer, output / f"model-{kind}.gguf", kind, title)
        write_adapter(folder, base, output / f"adapter-{F16}.gguf", title)
        (output / "Modelfile").write_text(modelfile(f"model-{Q8_0}.gguf", tokenizer.chat_template))
        # as somebody reads it who has the file alone
        comparison = Comparison(run, client)
        read = Path(scratch) / "read"
        convert(output / f"model-{F16}.gguf", read, "float32")
        exported = transformers.AutoModelForCausalLM.from_pretrained(str(read), dtype=torch.float32)
        comparison.check(folder, exported.eval(), is_whole=True, dtype="float16")
    return comparison.sentence


def _merged(folder: Path, output: Path, *, half: bool, code: Mapping[str, bool]) -> None:
    """Write a folder of transformers with the adapter and the client's own head in its weights."""
    own = trees.load(folder / FILE) if (folder / FILE).exists() else {}
    if DOWN in own:
        raise UserError(
            f"{folder}: this client's model has a bottleneck behind the last layer, for which "
            "transformers has no place. "
            "Export it as peft, without it, or train with algorithm.parts.bottleneck: 0."
        )
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    model = merged_adapter(folder, dtype=torch.float32, **code)
    if VOCABULARY_HEAD & own.keys():
        layer = model.get_output_embeddings()
        weight = head_weight(layer.weight.detach(), own)
        model.config.tie_word_embeddings = False
        untied = torch.nn.Linear(
            weight.shape[1], weight.shape[0], bias=layer.bias is not None, dtype=weight.dtype
        )
        untied.weight.data.copy_(weight)
        if layer.bias is not None:
            untied.bias.data.copy_(layer.bias)
        model.set_output_embeddings(untied)
    try:
        model.to(torch.float16 if half else torch.float32).save_pretrained(str(output))
    except SafetensorError as error:  # as of a full disk
        raise unwritten(output / "model.safetensors", error) from error
    transformers.AutoTokenizer.from_pretrained(str(folder), **code).save_pretrained(str(output))
    if heads := trees.select(own, REWARDS):
        trees.save(heads, output / "reward_head.safetensors")


# ---- the card


@dataclass(frozen=True)
class Measured:
    """What cards say of a run's clients, read once for all cards.

    Attributes:
        known: Sizes, by client.
        last: The last evaluation.
        joined: Clients that joined when the run was over.
        has_own: Whether clients have models of their own.
        late: Newcomers.
        spent: What has been spent of privacy, by the name of its figure.
    """

    known: Mapping[str, Mapping[str, int]]
    last: Mapping[str, Any]
    joined: Mapping[str, Mapping[str, Any]]
    has_own: bool
    """Clients have models of their own."""
    late: frozenset[str] = frozenset()
    """Newcomers, who joined when training was over."""
    spent: Mapping[str, float] = field(default_factory=dict)

    @staticmethod
    def read(run: FinishedRun) -> Measured:
        """Return what is measured of a finished run."""
        last: dict[str, Any] = next(reversed(run.folder.read_rows(METRICS)), {})
        names, spec = list(run.clients), run.experiment
        return Measured(
            {**run.clients, **run.joined},
            run.last_evaluation,
            run.joined,
            run.folder.has_own,
            frozenset(names[i] for i in spec.federation.joining(names, spec.seed)),
            spent_of(last, run.last_evaluation),
        )

    @property
    def rounds(self) -> str:
        """How many rounds there were, in words, and after which the model was as it is."""
        done, kept = self.last["round"], self.last.get("kept", self.last["round"])
        return f"{done} rounds" + (f", as it was after round {kept}" if kept != done else "")

    @property
    def trained(self) -> set[str]:
        """The clients that trained."""
        return set(self.known.keys() - self.late - self.joined.keys())

    def metrics(self, client: str | None, *, whole: bool) -> dict[str, str]:
        """Return the held-out metric of a model.

        It is the client's own, or over all clients that of the model that they share, if it is
        their whole model. A client's policy that has a reward head beside it has a metric of its
        own, and one of both.
        """
        if not self.last["summary"]:
            return {}
        metric = headline(self.last["summary"])
        rows = (
            self.last["clients"]
            | self.last.get("newcomers", {})
            | {name: later["after"] for name, later in self.joined.items()}
        )
        side = "validation " if self.last.get("on") == VALIDATION else "held-out "
        title = side + HEADLINES[metric].caption
        if client in rows and whole:
            named = {
                f"{title}, of the policy": metric,
                f"{title}, with the reward head beside it": COMBINED,
            }
            if COMBINED not in rows[client]:
                named = {title: metric}
            return {
                name: f"{HEADLINES[metric].text(rows[client][one])} (of {_escaped(str(client))})"
                for name, one in named.items()
            }
        if client is None and not self.has_own:
            mean = HEADLINES[metric].text(self.last["summary"][metric]["mean"])
            of = f"{len(self.last['clients'])} clients" if self.last["clients"] else "clients"
            return {title: f"{mean} (mean over {of})"}
        return {title: "not measured"}

    def counts(self, client: str | None) -> dict[str, str]:
        """Return numbers of examples, of all clients that trained or of one, if they are known."""
        names = self.trained if client is None else self.known.keys() & {client}
        titles = {"train": "training", "test": "held-out"}
        return {
            f"{title} examples": str(sum(self.known[name][side] for name in names))
            for side, title in titles.items()
            if names
        }


def _drawn(experiment: Experiment, measured: Measured) -> str:
    """Return what else a run is told by: nothing that would help to take its noise away."""
    if experiment.privacy:
        return ""
    if not measured.last["clients"]:  # figures are told as sums
        return f", seed {experiment.seed}"
    return f", {len(measured.trained)} clients, seed {experiment.seed}"


def _promised(experiment: Experiment, spent: Mapping[str, float], client: str | None) -> str:
    """Return what is promised of privacy, in a card, which then holds no figure of clients."""
    figures = {
        "each": "Figures of clients are outside the promise and not given here.",
        "private": "Figures of evaluations were told within it, and are not given here.",
        "none": "No figures of clients were told.",
    }
    whose = (
        "It has parts of one client's own, which are that client's and outside the promise: it is "
        "kept towards all others."
        if client
        else figures[experiment.telling]
    )
    said = promised(experiment, spent)
    return f"Differential privacy: {said}. {whose}" if said else ""


def card(
    measured: Measured,
    experiment: Experiment,
    client: str | None,
    form: Form,
    left_out: Sequence[str] = (),
    *,
    base: str = "",
    compared: str = "",
) -> str:
    """Return a model card: what Hugging Face reads at its top, and the run in words.

    Metrics stand only where this very model was measured.
    """
    given, data = experiment.task.model.path, experiment.data.location
    named, read_as = MODELS.get(given), experiment.task.model
    file = read_as.gguf_file if isinstance(read_as, Model) else None
    # where an adapter was given as the model, exports stand on its base
    has_base = bool(base) and not named and not file and given != BUILTIN
    model = base if has_base and Path(base) != Path(given) else (named and named.hub) or given
    loss = experiment.task.loss_name or experiment.task.name
    library = "peft" if form == "peft" else "transformers"
    top: dict[str, Any] = {
        "library_name": "gguf" if form == "gguf" else library,
        "pipeline_tag": "text-generation",
        "base_model": model,
        "tags": [
            "fedpref",
            "federated-learning",
            "preference-alignment",
            experiment.algorithm.name,
            loss,
            "lora",
        ],
        "license": "apache-2.0" if model == BUILTIN or named else "other",
    }
    is_here = model == BUILTIN or Path(model).exists() or (named and not named.hub)
    if is_here:
        del top["base_model"]  # a folder of this machine, which the Hub does not know
    if data and not Path(data).exists():
        top["datasets"] = [data]
    where = f", `{Path(data).name if Path(data).exists() else data}`" if data else ""
    if named:
        said = named.says
    elif model == BUILTIN:
        said = "the small model that comes with fedpref"
    else:
        said = f"`{Path(model).name if is_here else model}`"
    if file:
        said += f", dequantised from `{file}`"
    lines = [
        f"# {_escaped(experiment.name)}" + (f": {_escaped(client)}" if client else ""),
        f"Trained by {experiment.algorithm.name} with fedpref {__version__}: "
        f"{measured.rounds}{_drawn(experiment, measured)}."
        + (
            " All clients' rows were in one place."
            if experiment.algorithm.pools_data
            else " No client's rows left it."
        ),
        f"Data: {experiment.data.name}{where}. Base model: {said}.",
        _promised(experiment, measured.spent, client)
        if experiment.privacy
        else _table(measured.metrics(client, whole=not left_out) | measured.counts(client)),
        *([] if form == "gguf" else [f"```python\n{LOADS[library]}\n```"]),
    ]
    if top["license"] == "other":
        lines.append("The licence is that of the base model and of the data; say here which.")
    if has_base and model != given:
        adapter = Path(given).name if Path(given).exists() else given
        lines.append(
            f"Training began with the adapter `{_escaped(adapter)}` merged into the base model; it "
            "is part of this model."
        )
    if isinstance(read_as, Model) and (bits := read_as.bits):
        lines.append(
            f"It was trained, and the metrics above were measured, on the base model rounded to "
            f"{bits} bits (bitsandbytes); here it stands on weights that are not rounded."
        )
    if compared and not experiment.privacy:
        lines.append(compared)
    if left_out:
        lines.append(
            f"This folder is not the whole of the client's model: {', '.join(left_out)} "
            "have no place in a PEFT adapter."
        )
    if form == "gguf":
        lines.append(
            "`llama-cli -m model-q8_0.gguf`, or `ollama create NAME -f Modelfile` in this folder. "
            "adapter-f16.gguf is the adapter alone, for `--lora` on the base model."
        )
    if form == "gguf-ready":
        lines.append("For llama.cpp: `python convert_hf_to_gguf.py FOLDER --outfile model.gguf`.")
    return f"---\n{yaml.safe_dump(top, sort_keys=False)}---\n\n" + "\n\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    """Return foreign text as Markdown that shows it, on one line, and does nothing else."""
    plain = html.escape(printable(text).replace("\n", " "), quote=False)
    return re.sub(r"([\\`*_{}\[\]()#|!~])", r"\\\1", plain)


def _table(rows: Mapping[str, str]) -> str:
    return "\n".join(
        ["| | |", "|---|---|", *(f"| {name} | {text} |" for name, text in rows.items())]
    )
