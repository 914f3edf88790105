"""Commands about what a run has trained."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fedpref.cli.shared import DataOverrides, app, console, files_of
from fedpref.errors import UserError


@app.command()
def generate(
    path: Annotated[Path, typer.Argument(help="The directory of a finished run.", metavar="RUN")],
    prompt: Annotated[
        str | None, typer.Argument(help="The prompt; by default read from standard input.")
    ] = None,
    client: Annotated[
        str | None,
        typer.Option(help="The client whose model answers; not needed where all share one."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of the answer at most.")] = 128,
    temperature: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            help="Of plain sampling; 0: always the likeliest token. By default the model's own "
            "generation config decides.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of the sampling.")] = 0,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--plain",
            help="Lay the prompt out by the chat template, or not; by default as in training.",
        ),
    ] = None,
) -> None:
    """Let a run's model, or a client's own, answer a prompt.

    Example: fedpref generate runs/fedpdpo --client bakery "What goes well with soup?"
    """
    from fedpref.experiments.finished import FinishedRun
    from fedpref.models.loading import generate as answer

    run = FinishedRun.at(path).refuse_opinions()
    model: Any = run.experiment.task.model
    folder = run.model_folder(client)
    laid_out = run.learned_from_conversations if chat is None else chat
    try:
        text = sys.stdin.read().strip() if prompt is None else prompt
        text.encode()
    except UnicodeError as error:
        raise UserError("the prompt is not UTF-8 text.") from error
    if not text:
        raise UserError("the prompt is empty; give it on the command line or on standard input.")
    print(
        answer(
            folder,
            text,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            chat=laid_out,
            # as in training, and the same answer on any day
            template_date=model.template_date,
            trust_remote_code=run.experiment.task.runs_remote_code,
        )
    )


@app.command()
def evaluate(
    path: Annotated[Path, typer.Argument(help="The directory of a finished run.", metavar="RUN")],
    data: Annotated[
        str,
        typer.Option(
            help="Pairs: a JSONL, CSV, TSV or Parquet file, a dataset folder or a Hub id."
        ),
    ],
    client: Annotated[
        str | None,
        typer.Option(help="The client whose model is asked; by default each that has its own."),
    ] = None,
    column: Annotated[
        str | None,
        typer.Option(help="A column that says whose a row is: each is asked about its own."),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(help="Of a dataset folder or Hub dataset.", show_default="test"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print all metrics as JSON.")] = False,
    overrides: DataOverrides = None,
) -> None:
    """Measure a run's models on any preference file, all rows of it.

    Nothing tells which of them the run has trained on.

    Example: fedpref evaluate runs/demo --data pairs.jsonl
    """
    import json
    from dataclasses import replace

    from fedpref.reports.tables import metric_table
    from fedpref.runs.evaluate import evaluate as measure

    is_file = Path(data).expanduser().is_file()
    if split is not None and is_file:
        raise UserError(
            f"--split {split!r}: {data} is one file, which has no splits. Leave it out."
        )
    source, said = files_of(data, overrides)
    if not is_file and "train_split" not in said:
        source = replace(source, train_split=split or "test")
    metrics = measure(path, source, client, column, said)
    if as_json:
        print(json.dumps(metrics, indent=1))
    else:
        console.print(metric_table(metrics))


@app.command()
def export(
    path: Annotated[
        Path, typer.Argument(help="A finished run, or a sweep of them.", metavar="RUN")
    ],
    form: Annotated[
        str, typer.Option("--format", help="peft, merged, gguf-ready or gguf.")
    ] = "peft",
    output: Annotated[
        Path | None,
        typer.Option(
            help="The new folder; by default RUN-FORMAT beside the run, or RUN-FORMAT-CLIENT."
        ),
    ] = None,
    client: Annotated[
        str | None, typer.Option(help="The client whose model; for peft, all by default.")
    ] = None,
) -> None:
    """Write a run's models as other programs load them, with a model card.

    These are PEFT adapters, or a folder of transformers with the adapter merged.

    Example: fedpref export runs/demo --format merged --output demo-model
    """
    import json
    from typing import cast, get_args

    from fedpref.experiments.run_directory import file_name
    from fedpref.runs.export import MANIFEST, Form
    from fedpref.runs.export import export as write
    from fedpref.runs.sweep import is_sweep, members

    if form not in get_args(Form):
        raise UserError(f"--format {form!r}: there are {', '.join(get_args(Form))}.")
    # checked above
    place = path if path.name not in ("", "..") else path.resolve()
    whose = "" if client is None else f"-{file_name(client)}"
    goal = output or place.with_name(f"{place.name}-{form}{whose}")
    if is_sweep(path):
        for run in members(path):
            export(run, form, goal / run.relative_to(path), client)
        return
    made = write(path, cast(Form, form), goal, client=client)
    console.print(f"{form}: {made}", highlight=False, soft_wrap=True)
    if form == "peft" and any(
        entry["left_out"] for entry in json.loads((made / MANIFEST).read_text())["adapters"]
    ):
        console.print(
            "Some are not the whole of their clients' models; the manifest and the cards say "
            "what is left out.",
            soft_wrap=True,
        )


@app.command()
def reward(
    path: Annotated[
        Path,
        typer.Argument(
            help="The directory of a finished run of the task `opinion`.", metavar="RUN"
        ),
    ],
    data: Annotated[
        Path,
        typer.Argument(
            help="Rows with prompt and completions, or prompt, chosen and rejected.", metavar="FILE"
        ),
    ],
    group: Annotated[
        list[str] | None, typer.Option(help="A group; give it for each, or leave it out for all.")
    ] = None,
    combine: Annotated[
        str, typer.Option(help='mean, min, max or alpha, or "{name: alpha, decay: 0.8}".')
    ] = "mean",
    logits: Annotated[
        bool, typer.Option("--logits", help="What the shares are a softmax of, in place of shares.")
    ] = False,
) -> None:
    """Score answers as a run's groups would: JSON Lines with each group's rewards.

    The combined reward stands beside them.

    Example: fedpref reward runs/pluralllm answers.jsonl --group Germany
    """
    from fedpref.runs.score_file import score

    for line in score(path, data, group or (), combine, "logit" if logits else "share"):
        print(line)
