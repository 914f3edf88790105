"""With how many others a sender must share its masks where it does not with all of them.

Source: Bell et al. 2020, "Secure Single-Server Aggregation with (Poly)Logarithmic Overhead". There
the graph is undirected; here every sender draws whom it trusts with its shares by itself, so that
nobody else chooses them, and has masks with these and with those who drew it.
"""

from __future__ import annotations

import functools
import math

SAFE = 2.0**-40  # the chance that those who collude hold half of the shares needed of anybody's
WHOLE = 2.0**-30  # the chance that too few shares of anybody's are left


@functools.lru_cache(maxsize=64)
def fewest(senders: int, lost: int, corrupt: int) -> tuple[int, int] | None:
    """Return how many others suffice, and how many of their shares and the sender's own are needed.

    Args:
        senders: Of a sum.
        lost: How many may fall out.
        corrupt: How many may tell one another, and the coordinator, all that they know.

    Returns:
        None where nothing less than all others is enough.
    """
    for others in range(2, senders - 1):
        if (needed := shares_needed(others, senders, lost, corrupt)) is not None:
            return others, needed
    return None


def shares_needed(others: int, senders: int, lost: int, corrupt: int) -> int | None:
    """Return how many shares must give a secret that so many others hold, and who made it.

    More than half of them, so few that they are there when others have fallen out, and so many that
    those who collude have not half of them: whoever is said to have fallen out, a sum that is
    unmasked then has masks of each sender with as many others who do not collude. None where there
    is no such number.
    """
    bad = _tail_above(others, senders - 1, corrupt)
    needed = next(
        (t for t in range((others + 1) // 2 + 1, others + 1) if senders * bad[-(-t // 2)] <= SAFE),
        others + 1,
    )
    # of who has sent its words the own share is there too; of who fell out, the others' alone
    most_gone = others + 1 - needed
    there = _tail_above(others, senders - 1, lost)
    fallen = _tail_above(others, senders - 1, max(0, lost - 1))
    is_whole = needed <= others and senders * max(there[most_gone + 1], fallen[most_gone]) <= WHOLE
    return needed if is_whole else None


def _tail_above(drawn: int, of: int, marked: int) -> list[float]:
    """Return for each t up to drawn + 1 the chance of t marked ones or more among those drawn."""

    def log(n: int, k: int) -> float:
        return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)

    whole = log(of, drawn)
    tails = [0.0] * (drawn + 2)
    for k in range(drawn, -1, -1):
        possible = k <= marked and drawn - k <= of - marked
        here = math.exp(log(marked, k) + log(of - marked, drawn - k) - whole) if possible else 0.0
        tails[k] = tails[k + 1] + here
    return tails
