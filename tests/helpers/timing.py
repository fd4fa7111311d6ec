"""Timing verdicts of tests: right ones pass anywhere, wrong ones fail where this machine kept time.

Where it was held up a wrong one says nothing. It is counted, and pytest's summary tells (see conftest), so
that it is neither a failure nor passed over in silence. What is wrong by chance or for once is right when it
is run again; a wrong model is wrong each time.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

inconclusive: list[str] = []  # of this session
MOST_OTHERS = 0.1  # of this machine's CPUs, that others may take
MOST_SLOWER = 1.2  # times that the same work may take as long as at best: a neighbour slows CPUs unseen
AGAIN = 2  # times that a load is run again, if its figures are wrong
_paces: list[float] = []  # of this session


def judge(what: str, right: bool, *, quiet: bool) -> None:
    """A verdict on something that hangs on time. ``quiet``: whether this machine kept time meanwhile."""
    if not right and quiet:
        raise AssertionError(what)
    if not right:
        print(f"inconclusive: {what}")
        inconclusive.append(what)


def until_right(run: Callable[[int], tuple[str, bool, bool]]) -> None:
    """Judge what a load shows: run again, ``AGAIN`` times at most, where it is wrong. It fails if it was
    wrong each time, on a machine that kept time.

    Args:
        run: a load's number, from 0 -> what it shows, whether that is right, and whether it was quiet.
    """
    calm = True
    for again in range(1 + AGAIN):
        what, right, quiet = run(again)
        calm &= quiet
        if right:
            break
        print(f"wrong in try {again + 1}: {what}")
    judge(what, right, quiet=calm)


class Machine:
    """What others than this process, and what it started, take of this machine's CPUs from now on. What the
    machine's host takes from it is theirs, too; so is what makes the CPUs slower than they were."""

    def __init__(self) -> None:
        _pace()
        self._began = _used()

    def others(self) -> float:
        """Their share since the last time that this was asked."""
        before, self._began = self._began, _used()
        (all_before, own_before, idle_before), (everything, own, idle) = before, self._began
        passed = everything + idle - all_before - idle_before
        return max(0.0, (everything - all_before) - (own - own_before)) / max(passed, 1)

    def quiet(self) -> bool:
        """Whether these left this machine alone since the last time that this was asked."""
        share, before = self.others(), _paces[-1]
        slower = max(before, _pace()) / min(_paces)
        print(f"others took {share:.0%} of the CPUs, which were {slower:.2f} times slower than at best")
        return share < MOST_OTHERS and slower < MOST_SLOWER


def _pace() -> float:
    """How long the same work takes now, in s. A slow second does not count, a slow minute does."""
    for _ in range(5):
        _paces.append(statistics.median(_work() for _ in range(25)))
        if _paces[-1] < MOST_SLOWER * min(_paces):
            break
        time.sleep(0.3)
    return _paces[-1]


def _work() -> float:
    """How long a few milliseconds of work take, in s."""
    began = time.perf_counter()
    sum(range(200_000))
    return time.perf_counter() - began


def _used() -> tuple[int, int, int]:
    """CPU time in ticks: of all, of this process with its descendants, and idle."""
    parents, times = dict[int, int](), dict[int, int]()
    for file in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended
            fields = file.read_text().rpartition(")")[2].split()
            parents[int(file.parent.name)] = int(fields[1])
            times[int(file.parent.name)] = sum(map(int, fields[11:15]))
    cpu = Path("/proc/stat").read_text().partition("\n")[0].split()[1:]
    user, nice, system, idle, waiting, interrupts, soft, stolen = map(int, cpu[:8])
    own = sum(ticks for process, ticks in times.items() if _is_ours(process, parents))
    return user + nice + system + interrupts + soft + stolen, own, idle + waiting


def _is_ours(process: int, parents: dict[int, int]) -> bool:
    while process in parents and process != os.getpid():
        process = parents[process]
    return process == os.getpid()
