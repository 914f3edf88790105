"""What is checked of an algorithm before it runs: types, flags, and the work it runs on clients."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, get_args, get_origin, get_type_hints

import pytest

from conftest import ROOT
from fedpref import config
from fedpref.algorithms import AnyAlgorithm, FedDPO
from fedpref.federation.algorithm import Algorithm
from fedpref.federation.local_training import LocalTraining
from fedpref.federation.verbs import WORK, Client, Work, registered, work
from fedpref.numerics import trees
from fedpref.numerics.trees import Tree

KINDS = config.kinds(AnyAlgorithm)
FEDDPO = """
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedpref.algorithms.feddpo import FedDPO, train
from fedpref.federation.common import AdapterState
from fedpref.federation.verbs import Federation


class Mine(FedDPO):
    def step(
        self, fed: Federation, state: AdapterState
    ) -> tuple[AdapterState, Mapping[str, float]]:
        messages, moments, metrics = fed.each(train, state.adapter, state.moments, self)
        adapter, residual = self.aggregate.merge(fed, state.adapter, {averaged})
        return AdapterState(adapter, state.moments | moments), fed.report({reported})
"""


def checked(tmp_path: Path, **names: str) -> str:
    """What mypy says of feddpo's step with other values averaged and reported."""
    file = tmp_path / "mine.py"
    file.write_text(FEDDPO.format(**names))
    settings = (
        "--config-file",
        str(ROOT / "pyproject.toml"),
        "--cache-dir",
        str(ROOT / ".mypy_cache"),
    )
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *settings, str(file)], capture_output=True, text=True
    )
    return done.stdout + done.stderr


@pytest.mark.long
def test_averaging_metrics_in_place_of_messages_is_a_type_error(tmp_path: Path) -> None:
    right = {"averaged": "messages", "reported": "metrics"}
    assert "Success" in checked(tmp_path, **right)
    wrong = checked(tmp_path, **{**right, "averaged": "metrics"})
    assert 'Argument 3 to "merge"' in wrong
    assert 'expected "PerClient[Mapping[str, Tensor]]"' in wrong
    # A report would show a client's tensors to the coordinator
    assert 'Argument 1 to "report"' in checked(tmp_path, **{**right, "reported": "messages"})
    # What is averaged is known to the coordinator; what is not averaged is no such value
    assert "error" in checked(tmp_path, **{**right, "averaged": "state.adapter"})


def test_a_misspelt_flag_is_an_error_when_the_class_is_made() -> None:
    with pytest.raises(
        TypeError, match=r"Mine\.gosips: Algorithm declares no such flag\..*'gossips'"
    ):

        class Mine(FedDPO):
            gosips = True

    with pytest.raises(TypeError, match=r"Other\.needs_network: Algorithm declares no such flag"):

        class Other(FedDPO):
            needs_network: ClassVar[bool] = True


def test_a_setting_that_the_base_reads_must_have_a_default() -> None:
    with pytest.raises(TypeError, match=r"Mine\.local: give it a default"):

        @dataclass(frozen=True, kw_only=True)
        class Mine(Algorithm[Any]):
            local: LocalTraining


def test_an_algorithm_without_a_step_cannot_be_made() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Mine(Algorithm[Any]):
        local: LocalTraining = LocalTraining()

    with pytest.raises(TypeError, match=r"abstract methods '?init'?, '?model'?, '?step'?"):
        Mine()  # type: ignore[abstract]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_an_algorithm_lists_work_by_names_of_its_own(kind: Any) -> None:
    names = [each.name for each in kind.works]
    assert all(isinstance(each, Work) for each in kind.works)
    assert len(set(names)) == len(names)
    # A name is the module and the function, without the folders, in which files may move
    assert all(name.count(".") == 1 for name in names)


def test_work_that_is_not_registered_is_refused() -> None:
    def train(client: Client) -> Tree:
        return {}

    with pytest.raises(TypeError, match=r"decorate it with @work"):
        registered(train)
    with pytest.raises(TypeError, match="must be a module-level function"):
        work("test_verbs.train")(train)


def test_a_name_belongs_to_one_piece_of_work() -> None:
    with pytest.raises(TypeError, match=r"feddpo has registered work called 'feddpo\.train'"):
        work("feddpo.train")(checked)
    work("test_verbs.checked")(checked)
    work("test_verbs.checked")(checked)  # the same place, as a cell that runs again
    with pytest.raises(TypeError, match="test_verbs has registered"):
        work("test_verbs.checked")(trees.add)


@pytest.mark.parametrize("each", WORK.values(), ids=lambda each: each.name)
def test_work_sends_values_that_it_returns(each: Work[..., Any]) -> None:
    returned = get_type_hints(each.function)["return"]
    count = len(get_args(returned)) if get_origin(returned) is tuple else 1
    assert set(each.sends) <= set(range(count))
