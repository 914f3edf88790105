"""The real sets, where they are at hand: every row is read, split and tokenised."""

from __future__ import annotations

import pytest

from conftest import REAL_DATA, ROOT, needs_real_data
from fedpref import Experiment

CONFIGS = ["hh", "hh-iid", "ukpconvarg", "persona", "movie-reviews", "movie-reviews-10"]
CLIENTS = {"hh": 2, "hh-iid": 10, "movie-reviews": 3, "movie-reviews-10": 10}


@needs_real_data
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.long
def test_clients_of_the_real_sets_have_rows_on_both_sides_and_share_no_prompt_between_them(
    name: str,
) -> None:
    experiment = Experiment.load(ROOT / f"configs/{name}.yaml", [f"data.path={REAL_DATA}"])
    clients, _ = experiment.clients()
    assert len(clients) == CLIENTS.get(name, len(clients))
    assert len(clients) >= 2
    train = {row.prompt for client in clients for row in client.train}
    test = {row.prompt for client in clients for row in client.test}
    assert all(client.train and client.test for client in clients)
    assert not train & test
    task = experiment.task.build()
    largest = max(clients, key=lambda client: len(client.train))
    shard = task.encode(largest)
    assert len(shard.train) == len(largest.train)
    assert (
        max(len(pair.prompt) + max(map(len, pair.answers)) for pair in shard.train + shard.test)
        <= task.max_length
    )
