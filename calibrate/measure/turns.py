"""Turns at one load, compared: a front end that was disturbed while it was measured is noticed.

What disturbs a measurement (another program, a server that is still warming up) makes it longer and never
shorter, and it passes. So each load is measured in turns with the others, apart in time, and the quietest
turn counts once a second one says the same. Until then there are more turns.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import median

from .folder import Row

TURNS, MOST_TURNS = 2, 4  # at each load
FACTOR, NEAR_S = 1.5, 0.003  # medians say the same that are within either
LUMPED = 0.1  # of the streams, whose tokens came together: more is a load that the front end lags behind
Turns = Mapping[int, Sequence[Row]]  # number of a turn -> its rows


def in_turn(
    loads: Sequence[int], measure: Callable[[int, int], Sequence[Row]], known: Mapping[int, Turns]
) -> Iterator[tuple[int, int, Sequence[Row]]]:
    """Measure all loads in turns, and those again whose turns do not agree.

    Args:
        measure: the rows of a load's turn, by its number from 1. known: turns that were measured before.

    Yields:
        The load, the turn's number and its rows, once measured.
    """
    done = {load: dict(known.get(load, {})) for load in loads}
    for turn in range(1, MOST_TURNS + 1):
        for load in loads:
            if turn not in done[load] and (turn <= TURNS or not confirmed(done[load])):
                rows = done[load][turn] = measure(load, turn)
                yield load, turn, rows


def confirmed(turns: Turns) -> tuple[int, ...]:
    """The two quietest turns, if they say the same; none if they do not. A turn alone has to do."""
    if len(turns) < 2:
        return tuple(turns)
    first, second = _by_quiet(turns)[:2]
    here, there = _medians(turns[first]), _medians(turns[second])
    same = here.keys() == there.keys() and all(_same(here[kind], there[kind]) for kind in here)
    return (first, second) if same else ()


def trusted(turns: Turns) -> tuple[int, ...]:
    """The turns that count: those confirmed, else the quietest."""
    return confirmed(turns) or (_by_quiet(turns)[0],)


def complaints(loads: Mapping[int, Turns]) -> list[str]:
    """What is wrong with the turns at some loads (requests in progress), one sentence each."""
    found, above = [], math.inf  # what it took with more in progress
    for load, turns in sorted(loads.items(), reverse=True):
        at = f"with {load} requests in progress"
        waits = [outside(turns[turn]) for turn in sorted(turns)]
        least = min(waits)
        took = f"{at} a first token spent {_ms(waits)} ms outside of the engine"
        if not confirmed(turns):
            found.append(f"{took}, turn by turn: the quietest is not confirmed, this machine was disturbed")
        if least > above and not _same(least, above):
            found.append(f"{took}, and {_ms([above])} ms with more of them: this machine was disturbed")
        if lags([row for rows in turns.values() for row in rows]):
            found.append(
                f"{at} API server or client fell behind: tokens came in lumps, and tell no cost of one"
            )
        above = min(least, above)
    return found


def lags(rows: Sequence[Row]) -> bool:
    """Whether the front end fell behind the engine."""
    return any(row.get("lumped", 0.0) > LUMPED for row in rows)


def outside(rows: Sequence[Row]) -> float:
    """What a first token spent outside of the engine, on its way in and out, s."""
    medians = _medians(rows)
    return medians.get(("request_in", False), 0.0) + medians.get(("token_out", True), 0.0)


def _ms(seconds: Sequence[float]) -> str:
    return ", ".join(f"{1000 * each:.1f}" for each in seconds)


def _by_quiet(turns: Turns) -> list[int]:
    return sorted(turns, key=lambda turn: outside(turns[turn]))


def _medians(rows: Sequence[Row]) -> dict[tuple[str, bool], float]:
    """Over all bursts, by the kind of row and whether it is one of first tokens, s."""
    times: dict[tuple[str, bool], list[float]] = defaultdict(list)
    for row in rows:
        times[row["kind"], bool(row.get("first"))] += row["times_s"]
    return {kind: median(each) for kind, each in times.items()}


def _same(one: float, other: float) -> bool:
    low, high = sorted((one, other))
    return high <= FACTOR * low or high - low <= NEAR_S
