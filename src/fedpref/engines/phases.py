"""What a site was asked for in each phase of a run, within the bounds that it consents to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from fedpref.engines.host import Bounds
from fedpref.engines.messages import RefusedError


class Phases:
    """Calls, clients and seconds, by purpose and round."""

    def __init__(self) -> None:
        self._done: dict[tuple[str, int], Counter[tuple[int, int]]] = {}
        self._seconds: dict[tuple[str, int], float] = {}

    def count(
        self, purpose: str, round: int, call: int, clients: Sequence[int], bounds: Bounds
    ) -> None:
        """Count what is asked for.

        The same draw under other parameters says more of the rows in it than another draw does.
        Evaluations draw nothing.

        Raises:
            RefusedError: Draws would be repeated, or the phase takes too much.
        """
        phase = purpose, round
        done = self._done.setdefault(phase, Counter())
        addresses = [(call, client) for client in clients]
        is_repeated = len(set(addresses)) < len(addresses) or any(done[a] for a in addresses)
        if is_repeated and purpose != "evaluate":
            raise RefusedError(f"call {call} of round {round} was made already")
        done.update(addresses)
        most = max(Counter(client for _, client in done.elements()).values(), default=0)
        if bounds.calls is not None and most > bounds.calls:
            raise RefusedError(
                f"{most} calls in a phase of round {round} are more than the {bounds.calls} that "
                "this site consents to"
            )
        if bounds.seconds is not None and self._seconds.get(phase, 0.0) > bounds.seconds:
            raise RefusedError(
                f"a phase of round {round} has taken the {bounds.seconds:g} seconds that this "
                "site consents to"
            )

    def spend(self, purpose: str, round: int, seconds: float) -> None:
        """Count the time that work of a phase has taken."""
        self._seconds[purpose, round] = self._seconds.get((purpose, round), 0.0) + seconds
