"""How far people agree beyond chance."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence


def krippendorff_alpha(units: Sequence[Sequence[Hashable]]) -> float:
    """Return Krippendorff's alpha of nominal judgements.

    One less the disagreement over that of judgements shuffled between units (Krippendorff, Content
    Analysis, 2004, chapter 11): 1 is full agreement, 0 what chance would give, below it less.

    Args:
        units: What each thing was judged to be, by those who judged it; units of fewer than two
            judgements are left out.

    Returns:
        The alpha; NaN where no unit has two judgements, or all judgements are alike.
    """
    units = [unit for unit in units if len(unit) > 1]
    totals = Counter(value for unit in units for value in unit)
    count = totals.total()
    pairs = count * (count - 1) - sum(n * (n - 1) for n in totals.values())
    if not pairs:
        return math.nan
    differing = 0.0
    for unit in units:
        alike = sum(n * (n - 1) for n in Counter(unit).values())
        differing += (len(unit) * (len(unit) - 1) - alike) / (len(unit) - 1)
    return 1 - (count - 1) * differing / pairs
