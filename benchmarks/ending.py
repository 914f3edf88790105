"""What a benchmark has started ends with it. A module of the others, not one of them."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any


def end_with_children() -> None:
    """Let a SIGTERM end all processes that were started, and remove temporary folders."""

    def ended(number: int, frame: Any) -> None:
        for process in list(_below(os.getpid())):
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, ended)


def _below(parent: int) -> Iterator[int]:
    """Yield the processes that a process has started, and those that they have."""
    for task in Path(f"/proc/{parent}/task").glob("*"):
        with suppress(OSError):
            for child in map(int, (task / "children").read_text().split()):
                yield from _below(child)
                yield child
