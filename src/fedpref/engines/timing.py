"""How long a round's verbs take."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

VERBS = ("each", "mean", "mix", "report")


class Clock:
    """A federation whose verbs are timed; all else is the engine's own."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.seconds = dict.fromkeys(VERBS, 0.0)

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._engine, name)
        return self._timed(name, attribute) if name in VERBS else attribute

    def _timed(self, verb: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            begun = time.perf_counter()
            result = method(*args)
            self.seconds[verb] += time.perf_counter() - begun
            return result

        return call
