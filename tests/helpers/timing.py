"""Timing verdicts of tests: right ones pass anywhere, wrong ones fail where this machine kept time.

Where it was held up a wrong one says nothing. It is counted, and pytest's summary tells (see conftest), so
that it is neither a failure nor passed over in silence.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

inconclusive: list[str] = []  # of this session
MOST_OTHERS = 0.1  # of this machine's CPUs, that others may take


def judge(what: str, right: bool, *, quiet: bool) -> None:
    """A verdict on something that hangs on time. ``quiet``: whether this machine kept time meanwhile."""
    if not right and quiet:
        raise AssertionError(what)
    if not right:
        print(f"inconclusive: {what}")
        inconclusive.append(what)


class Machine:
    """What others than this process, and what it started, take of this machine's CPUs from now on. What the
    machine's host takes from it is theirs, too."""

    def __init__(self) -> None:
        self._began = _used()

    def others(self) -> float:
        """Their share since the last time that this was asked."""
        before, self._began = self._began, _used()
        (all_before, own_before, idle_before), (everything, own, idle) = before, self._began
        passed = everything + idle - all_before - idle_before
        return max(0.0, (everything - all_before) - (own - own_before)) / max(passed, 1)

    def quiet(self) -> bool:
        """Whether these left this machine alone since the last time that this was asked."""
        share = self.others()
        print(f"others took {share:.0%} of the CPUs")
        return share < MOST_OTHERS


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
