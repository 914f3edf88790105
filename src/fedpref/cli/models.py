"""Commands about what a run has trained."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from fedpref.cli.shared import app
from fedpref.errors import UserError


@app.command()
def generate(
    path: Annotated[Path, typer.Argument(help="The directory of a finished run.", metavar="RUN")],
    prompt: Annotated[str | None, typer.Argument(help="The prompt; by default read from standard input.")] = None,
    client: Annotated[str | None, typer.Option(help="The client whose model answers; not needed where all share one.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of the answer at most.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the likeliest token.")] = 0.7,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    plain: Annotated[bool, typer.Option("--plain", help="Take the prompt as it is, without the chat template.")] = False,
) -> None:
    """Let a run's model, or a client's own, answer a prompt."""
    from fedpref.models.exported import generate as answer
    from fedpref.running import exported

    folder = exported(path, client)
    try:
        text = sys.stdin.read().strip() if prompt is None else prompt
    except UnicodeDecodeError as error:
        raise UserError("the prompt on standard input is not UTF-8 text.") from error
    if not text:
        raise UserError("the prompt is empty; give it on the command line or on standard input.")
    print(answer(folder, text, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, chat=not plain))


@app.command()
def reward(
    path: Annotated[Path, typer.Argument(help="The directory of a finished run of the task `opinion`.", metavar="RUN")],
    data: Annotated[Path, typer.Argument(help="Rows with prompt and completions, or prompt, chosen and rejected.", metavar="FILE")],
    group: Annotated[list[str] | None, typer.Option(help="A group; give it for each, or leave it out for all.")] = None,
    combine: Annotated[str, typer.Option(help='mean, min, max or alpha, or "{name: alpha, decay: 0.8}".')] = "mean",
    logits: Annotated[bool, typer.Option("--logits", help="What the shares are a softmax of, in place of shares.")] = False,
) -> None:
    """Score answers as a run's groups would: JSON Lines with each group's reward of each completion, and the combined one."""
    from fedpref.scoring.answers import score

    for line in score(path, data, group or (), combine, "logit" if logits else "share"):
        print(line)
