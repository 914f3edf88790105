"""Commands by which people choose and judge, on a page of their own machine."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Annotated

import typer

from fedpref.cli.shared import app, console
from fedpref.errors import UserError, command, printable, require
from fedpref.experiments.run_lock import RunLock

if TYPE_CHECKING:
    from fedpref.collect.sitting import Sitting

Prompts = typer.Option(
    help="Prompts: JSON Lines, CSV, TSV or Parquet with a column `prompt`, or a .txt file with one "
    "in each line."
)
Length = Annotated[int, typer.Option(min=1, help="Tokens of an answer at most.")]
Temperature = Annotated[
    float | None,
    typer.Option(
        min=0.0,
        help="Of plain sampling; 0: always the likeliest token. By default the model's own "
        "settings decide, or 1 where these do not sample.",
    ),
]
Seed = Annotated[int, typer.Option(min=0, help="Of draws, orders and sides.")]
Chat = Annotated[
    bool | None,
    typer.Option(
        "--chat/--plain",
        help="Lay prompts out by the chat template, or not; by default as in training, and where "
        "a model has a template.",
    ),
]
Port = Annotated[int, typer.Option(min=0, max=65535, help="Of the page; 0 takes a free one.")]
Opens = Annotated[bool, typer.Option("--open", help="Show the page in a browser.")]


@app.command()
def collect(
    output: Annotated[Path, typer.Option(help="The folder of choices; one that is there goes on.")],
    run: Annotated[
        Path | None,
        typer.Argument(help="A finished run, whose model answers.", metavar="[RUN]"),
    ] = None,
    prompts: Annotated[Path | None, Prompts] = None,
    model: Annotated[
        str | None, typer.Option(help="A model that answers: a folder, a Hub id, or a name.")
    ] = None,
    client: Annotated[str | None, typer.Option(help="Whose model of the run.")] = None,
    against: Annotated[
        str | None,
        typer.Option(help="A second run or model, whose answer stands beside the first one's."),
    ] = None,
    candidates: Annotated[
        Path | None,
        typer.Option(help="A file of answers in place of a model: prompt, and completions."),
    ] = None,
    question: Annotated[str, typer.Option(help="What is asked.")] = "Which answer is better?",
    objectives: Annotated[
        str, typer.Option(help="Ask which is the more so, for each: helpful,harmless")
    ] = "",
    select: Annotated[
        str, typer.Option(help="random, or uncertain: first what the model is least sure of.")
    ] = "random",
    random_share: Annotated[
        float,
        typer.Option(min=0, max=1, help="Of training prompts asked about at random all the same."),
    ] = 0.3,
    test_fraction: Annotated[
        float, typer.Option(min=0, max=0.9, help="The share of prompts that are held out.")
    ] = 0.2,
    overlap: Annotated[
        float, typer.Option(min=0, max=1, help="The share of items that all raters see.")
    ] = 0.1,
    ahead: Annotated[int, typer.Option(min=1, help="Items that are drawn ahead.")] = 8,
    limit: Annotated[int | None, typer.Option(min=1, help="Items of each rater at most.")] = None,
    max_new_tokens: Length = 128,
    temperature: Temperature = None,
    seed: Seed = 0,
    chat: Chat = None,
    port: Port = 0,
    opens: Opens = False,
) -> None:
    """Open a page on which people choose between two answers; the choices become preferences.

    Everything stays on this machine. Ctrl-C ends it, and the same command goes on.

    Example: fedpref collect --prompts questions.txt --model smollm2-q4 --output choices
    """
    from fedpref.collect.drawing import Ahead, Plan, candidates_of, prompts_of
    from fedpref.collect.sitting import Sitting, Texts
    from fedpref.collect.speakers import speaker
    from fedpref.collect.store import Store
    from fedpref.experiments.run_directory import refuse_run

    require("the page", "collect", "starlette", "uvicorn")
    sources = [candidates, model, run]
    if sum(source is not None for source in sources) != 1:
        raise UserError(
            "Say where answers come from, and once: a RUN, --model, or --candidates, a file of "
            "answers."
        )
    if candidates is None and prompts is None:
        raise UserError("--prompts: a model needs prompts to answer. Name a file of them.")
    if candidates is not None and (prompts or against or client):
        raise UserError("--candidates: its file has prompts and answers; leave the others out.")
    if select not in ("random", "uncertain"):
        raise UserError(f"--select {select!r}: there are random and uncertain.")
    if select == "uncertain" and candidates is not None:
        raise UserError("--select uncertain: it is a model that is uncertain; a file has none.")
    if temperature == 0 and not (against or candidates):
        raise UserError("--temperature 0: both answers would be the same. Leave it out.")
    names = [name.strip() for name in objectives.split(",") if name.strip()] or [""]
    if len(set(names)) < len(names):
        raise UserError(f"--objectives {objectives!r}: a name stands twice.")
    asked = [question if not name else f"Which answer is more {name}?" for name in names]
    plan = Plan(
        select="uncertain" if select == "uncertain" else "random",
        random_share=random_share,
        test_fraction=test_fraction,
        overlap=overlap,
        max_length=max_new_tokens,
        temperature=temperature,
        seed=seed,
    )
    refuse_run(output)
    with _locked(output):
        if candidates is not None:
            list(candidates_of(_given(candidates), plan))  # what is wrong is said before the page
        else:
            wanted = prompts_of(_given(prompts))
            first = speaker(str(run) if run else str(model), client, chat)
            others = [speaker(against, None, first.chats, first)] if against else []
        store = Store(output)
        store.agree(
            {"objectives": names, "test_fraction": test_fraction, "seed": seed, "kind": "collect"}
        )
        sitting = Sitting(store, Texts("Choose between two answers", asked, names), seed, limit)
        if candidates is not None:
            store.add(list(candidates_of(candidates, plan, store.items())))
        else:
            sitting.ahead = Ahead(
                store, [first, *others], wanted, plan, lambda: sitting.more_wanted(ahead)
            )
        _serve(sitting, port, opens)
        store.close()
        _wait_for(sitting)
    rows = output / "preferences.jsonl"
    console.print(f"choices: {output}", highlight=False, soft_wrap=True)
    count = sum(1 for _ in rows.open(encoding="utf-8"))
    console.print(f"preferences: {count} in {rows}", highlight=False, soft_wrap=True)
    if count:
        console.print(
            "train on them:  "
            + command(
                *("run", "feddpo", "data.name=collected", f"data.path={output}"),
                *("partition.name=natural", "partition.column=rater"),
            ),
            highlight=False,
            soft_wrap=True,
        )


@app.command()
def review(
    run: Annotated[Path, typer.Argument(help="A finished run.", metavar="RUN")],
    client: Annotated[
        str | None, typer.Option(help="Whose model; not needed where all share one.")
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(help="A run or model in place of the run's model before training."),
    ] = None,
    prompts: Annotated[Path | None, Prompts] = None,
    items: Annotated[int, typer.Option(min=1, help="Prompts that are judged.")] = 40,
    question: Annotated[str, typer.Option(help="What is asked.")] = "Which answer is better?",
    max_new_tokens: Length = 128,
    temperature: Temperature = None,
    seed: Seed = 0,
    chat: Chat = None,
    port: Port = 0,
    opens: Opens = False,
) -> None:
    """Open a page on which people judge blind whether training helped, and write what they said.

    Two answers to a prompt, of the model before training and after, without names and in random
    order. Prompts are by default those that were held out of the client's data. Several people may
    judge, all of them the same items. What comes of it stands in the run and on its page.

    Example: fedpref review runs/fedpdpo --client bakery
    """
    import json

    from fedpref.collect import review as reviews
    from fedpref.collect.drawing import Ahead, Plan, prompts_of
    from fedpref.collect.held_out import held_out_prompts
    from fedpref.collect.sitting import Sitting, Texts
    from fedpref.collect.speakers import speaker
    from fedpref.collect.store import Store
    from fedpref.data.preferences import key
    from fedpref.experiments.finished import FinishedRun
    from fedpref.experiments.run_directory import client_folder
    from fedpref.reports.page import REPORT, write_report

    require("the page", "collect", "starlette", "uvicorn")
    finished = FinishedRun.at(run).require_done().refuse_opinions()
    wanted = prompts_of(_given(prompts)) if prompts else held_out_prompts(finished, client)
    wanted = wanted[:items]
    after = speaker(str(run), client, chat)
    before = speaker(against, None, after.chats, after) if against else after.before()
    name = f"{client or 'shared'} against {before.name}"
    # another question, other prompts or other answers are another review
    terms = {
        "client": client,
        "against": str(Path(against).resolve()) if against and Path(against).exists() else against,
        "prompts": [key(prompt) for prompt in wanted],
        "question": question,
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "seed": seed,
        "chats": after.chats,
    }
    folder = client_folder(run, "reviews", json.dumps(terms, sort_keys=True))
    with _locked(folder):
        plan = Plan(
            test_fraction=0.0,
            overlap=1.0,
            max_length=max_new_tokens,
            temperature=temperature,
            seed=seed,
            keeps_empty=True,
        )
        store = Store(folder)
        store.agree({"kind": "review"})
        asked = Texts("Judge two answers", [question], [""], edits=False)
        sitting = Sitting(store, asked, seed, items)
        sitting.ahead = Ahead(
            store, [before, after], wanted, plan, lambda: sitting.more_wanted(len(wanted))
        )
        _serve(sitting, port, opens)
        found = reviews.judged(store)
        store.close()
        if found["raters"]:
            with _locked(run):
                name = reviews.write(run, name, folder.name, found)
        _wait_for(sitting)
    if not found["raters"]:
        console.print("nothing was judged")
        return
    console.print(
        f"{printable(name)}: {reviews.sentence(found)}",
        highlight=False,
        soft_wrap=True,
    )
    for line in reviews.lines(found):
        console.print(line, highlight=False, soft_wrap=True)
    page = write_report([run], run / REPORT)
    console.print(f"report: {page}", highlight=False, soft_wrap=True)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Have a folder to oneself within a `with`; raises UserError while another process has it."""
    lock = RunLock(folder)
    lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _given(path: Path | None) -> Path:
    assert path is not None
    if not path.is_file():
        raise UserError(f"{path}: there is no such file.")
    return path


def _serve(sitting: Sitting, port: int, opens: bool) -> None:
    """Show the page until Ctrl-C or SIGTERM."""
    from fedpref.collect.server import Page

    # told, and not raised: what a raise breaks off while it is printed leaves the console mute, and
    # what was chosen is said after this
    ends: SimpleQueue[int] = SimpleQueue()
    before = {
        number: signal.signal(number, lambda number, frame: ends.put(number))
        for number in (signal.SIGINT, signal.SIGTERM)
        if signal.getsignal(number) is not signal.SIG_IGN  # as of a command in the background
    }
    try:
        page = Page(sitting, port or None)
        if sitting.ahead is not None:
            sitting.ahead.start()
        try:
            console.print(f"page: {page.address}", highlight=False, soft_wrap=True)
            console.print("Ctrl-C ends it.", highlight=False)
            if opens:
                typer.launch(str(page.shortcut()))
            ends.get()
        finally:
            page.end()
            if sitting.ahead is not None:
                sitting.ahead.stop()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait_for(sitting: Sitting) -> None:
    """Wait for an answer that is being drawn, when all else is done: nothing hangs on it."""
    if sitting.ahead is not None:
        with suppress(KeyboardInterrupt):
            sitting.ahead.end()
