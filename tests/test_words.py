"""What words alone say of two answers."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from typing import Any

import torch

from fedpref.data.preferences import Preference
from fedpref.data.words import Pair, differences, longer, words


def test_words_are_in_lower_case_and_marks_stand_alone() -> None:
    assert words("It's GOOD, isn't it?") == [
        *("it", "'", "s", "good", ",", "isn", "'", "t", "it", "?")
    ]


def test_a_conversation_is_what_its_messages_say() -> None:
    chat: Any = ({"role": "user", "content": "hi"}, {"role": "assistant", "content": None})
    said: Any = ({"role": "assistant", "content": "bb"},)
    row = Preference(chat, "a", said, "x:1")
    assert Pair.of(row) == Pair("hi\n", "a", "bb")
    assert longer(Pair.of(row)) == -1


def test_features_are_differences_of_log_counts_and_of_log_lengths() -> None:
    train = {"a": [Pair("p", "good good day here", "bad bad day here")] * 2}
    ((found, held),) = differences(
        train, {"a": [Pair("q", "day day day here", "unknown day here too")]}
    ).values()
    assert found.shape == (2, 5)  # bad, day, good, here, and the length
    assert torch.equal(found[0], found[1])
    # the length's difference is as long as those of all words together
    expected = [-math.log1p(2), 0.0, 0.0, math.log1p(2), math.sqrt(2) * math.log1p(2)]
    assert torch.allclose(found[0].sort().values, torch.tensor(expected))
    assert math.isclose(float(held.max()), math.log1p(3) - math.log1p(1), rel_tol=1e-5)


def test_features_are_alike_in_every_process() -> None:
    program = (
        "from fedpref.data.words import Pair, differences\n"
        "pairs = [Pair('p', f'stone {i} river lamp', f'mill rope {i}') for i in range(9)]\n"
        "(found, _), = differences({'a': pairs}, {'a': []}).values()\n"
        "print(found.tolist())\n"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": number},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for number in ("0", "1")
    }
    assert len(found) == 1


def test_short_answers_mean_what_the_prompts_words_make_of_them() -> None:
    train = {"a": [Pair("I like dogs", "Yes", "No"), Pair("I like cats", "No", "Yes")] * 2}
    ((found, _),) = differences(train, {"a": []}).values()
    assert not torch.equal(found[0], -found[1])  # dogs and cats tell them apart
    assert found[0].abs().sum() > 2 * math.log1p(1)
