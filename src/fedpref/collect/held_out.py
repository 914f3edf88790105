"""Prompts that a run has held out."""

from __future__ import annotations

from fedpref.collect.store import coin
from fedpref.data.preferences import Conversation, Text
from fedpref.data.splits import identity
from fedpref.errors import UserError
from fedpref.experiments.finished import FinishedRun


def held_out_prompts(run: FinishedRun, client: str | None) -> list[Text]:
    """Return the held-out prompts of a client of a run, or of all, each once, in a fixed order.

    Raises:
        UserError: The rows are not here, or have changed since, or there is no such client.
    """
    try:
        clients = run.experiment.read().settled().clients
    except UserError as error:
        raise UserError(
            f"{run.path}: the rows of the run cannot be read here, so that its held-out prompts "
            f"are not known: {error} Name a file of --prompts."
        ) from error
    wanted = [one for one in clients if client in (None, one.name)]
    if not wanted:
        raise UserError(
            f"{run.path}: there is no client {client!r}; there are "
            f"{[one.name for one in clients][:12]}."
        )
    prompts = {
        identity(row.prompt, "prompt"): row.prompt
        for one in wanted
        for row in one.test
        # tools are not shown
        if not (isinstance(row.prompt, Conversation) and row.prompt.given)
    }
    return [prompts[asked] for asked in sorted(prompts, key=lambda asked: coin("order", asked))]
