"""The one search, by what it tries."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import repeat
from typing import Any

import pytest

from servecast.sim.plan.search import readable, search

NEAR = {"near": 1.1}


def tries(holds: Callable[[float], bool | None], first: tuple[float, ...], **options: Any) -> list[float]:
    tried: dict[float, bool] = options.pop("tried", {})
    known = len(tried)
    search(holds, first, tried, **(NEAR | options))
    return [round(value, 2) for value in list(tried)[known:]]


@pytest.mark.parametrize(
    ("first", "options", "expected"),
    [
        ((20.0,), {}, [20, 40, 80, 160, 113.14, 95.14, 103.75]),
        ((300.0,), {}, [300, 150, 75, 106.07, 89.19, 97.26]),
        ((20.0,), {"steps": repeat(1.5)}, [20, 30, 45, 67.5, 101.25, 82.67, 91.49, 96.25]),
        ((95.0, 104.0), {}, [95, 104]),
        ((20.0,), {"most": 50.0}, [20, 40, 50]),
        ((20.0,), {"tries": 2}, [20, 40]),
        ((), {"tried": {90.0: True, 160.0: False}}, [120, 103.92, 96.71]),
        ((100.0, 109.0), {"tried": {20.0: True, 300.0: False}}, [100, 50, 70.71, 84.09, 91.7]),
    ],
)
def test_what_is_tried_for_an_end_at_100(
    first: tuple[float, ...], options: dict[str, Any], expected: list[float]
) -> None:
    assert tries(lambda rate: rate < 100, first, **options) == expected


def test_values_are_tried_as_they_are_rounded() -> None:
    """Between two neighbours of four digits there is nothing left to try."""
    tried: dict[float, bool] = {}
    assert search(lambda rate: rate <= 54.32, (20.0,), tried, near=1.0, rounded=readable) == (54.32, 54.33)
    assert all(rate == float(f"{rate:.4g}") for rate in tried)


def test_what_cannot_be_told_ends_it() -> None:
    assert search(lambda rate: None, (5.0,), {}, near=1.1) == (0.0, math.inf)
    assert tries(lambda rate: rate < 100 if rate > 90 else None, (300.0,)) == [300, 150]


def test_whole_numbers_are_halved_by_their_difference() -> None:
    whole = {"near": 1.0, "rounded": math.floor, "middle": lambda low, high: (low + high) // 2}
    assert tries(lambda count: count < 5, (4.0,), **whole) == [4, 8, 6, 5]
    assert tries(lambda count: False, (4.0,), **whole) == [4, 2, 1]
