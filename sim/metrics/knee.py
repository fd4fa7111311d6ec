"""Where a load stops to hold: the knees of a closed and of an open loop."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

KNEE_SHORTFALL = 0.05  # the closed-loop knee's throughput is within this of the sweep's maximum


def closed_loop_knee(concurrency: Sequence[int], throughput: Sequence[float]) -> int | None:
    """The smallest swept concurrency whose throughput is within 5 % of the sweep's maximum.

    None if that is the highest swept one (the knee, if any, lies beyond), or if nothing was swept.
    """
    levels = sorted(zip(concurrency, throughput, strict=True))
    if not levels:
        return None
    enough = (1 - KNEE_SHORTFALL) * max(throughput)
    knee = next(level for level, value in levels if value >= enough)
    return knee if knee < levels[-1][0] else None


def open_loop_knee(rates: Sequence[float], saturated: Sequence[bool]) -> float | None:
    """The largest swept rate that holds, below the smallest that does not.

    None if every rate holds (the knee lies beyond) or none does.
    """
    low, high = ends(dict(zip(rates, [not full for full in saturated], strict=True)))
    return low if low and math.isfinite(high) else None


def ends(tried: Mapping[float, bool]) -> tuple[float, float]:
    """Between which levels (rates or counts, above 0) it stops to hold: the largest that holds below the
    smallest that does not (0: none does), and that smallest one (infinite: all hold).

    tried: level -> whether it holds.
    """
    high = min((level for level, holds in tried.items() if not holds), default=math.inf)
    return max((level for level in tried if level < high), default=0.0), high
