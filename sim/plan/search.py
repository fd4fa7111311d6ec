"""The one search: up to which rate (or number) something holds.

What "holds" means is the caller's: that a rate passes, that it does not fail, that it is not saturated, that
a live server met its objectives, that so many replicas are still too few.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, MutableMapping, Sequence
from itertools import count, islice, repeat

from servecast.sim.metrics.knee import ends

DIGITS = 4  # significant, of a rate that people read
DOUBLING = repeat(2.0)


def search(
    holds: Callable[[float], bool | None],
    first: Sequence[float],
    tried: MutableMapping[float, bool],
    *,
    near: float,
    steps: Iterable[float] = DOUBLING,
    most: float = math.inf,
    tries: int | None = None,
    rounded: Callable[[float], float] = float,
    middle: Callable[[float, float], float] = lambda low, high: math.sqrt(low * high),
) -> tuple[float, float]:
    """Try values until what holds and what does not are near each other.

    As long as one end is not known, or both lie on one side of ``first``, the next value is a step further
    from there, but not past the middle; then the bracket is halved.

    Args:
        holds: whether a value holds; None if that cannot be told, which ends the search.
        first: tried before others, as far as they lie between the ends: where the end is thought to be.
        tried: value -> whether it held; those that are known, to which the new ones are added.
        near: the ratio of the ends that is near enough.
        steps: factors from value to value, one after the other.
        most: the largest value to try. tries: how many values, None: any number.
        rounded: a value as it is tried. middle: of a bracket; rates are compared by their ratio.

    Returns: see `knee.ends`.
    """
    factors = iter(steps)
    for _ in islice(count(), tries):
        low, high = ends(tried)
        inside = [value for value in first if low < value < high]
        if inside:
            value = inside[0]
        elif near_enough(low, high, near):
            break
        else:
            centre = 0.0 if not low else math.inf if math.isinf(high) else middle(low, high)
            if high <= min(first, default=0.0) or not low:
                value = max(high / next(factors), centre)
            elif low >= max(first, default=math.inf) or math.isinf(high):
                value = min(low * next(factors), centre)
            else:
                value = centre
        value = rounded(min(value, most))
        if not low < value < high:
            break
        held = holds(value)
        if held is None:
            break
        tried[value] = held
    return ends(tried)


def fewest(too_few: Callable[[int], bool], start: int, most: int) -> int | None:
    """The smallest number, from 1 to ``most``, that is not too few; None if all are. start: tried first."""

    def holds(count: float) -> bool:
        return too_few(int(count))

    middle = lambda low, high: (low + high) // 2  # noqa: E731
    _, found = search(holds, (start,), {}, near=1.0, most=most, rounded=math.floor, middle=middle)
    return int(found) if found <= most else None


def near_enough(low: float, high: float, near: float) -> bool:
    """Whether both ends are known, and their ratio is at most ``near`` (but for rounding)."""
    return low > 0 and high <= near * low * (1 + 1e-9)


def readable(rate: float) -> float:
    """A rate in requests/s to the digits that people read."""
    return float(f"{rate:.{DIGITS}g}")
