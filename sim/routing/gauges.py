"""What a router knows of a server's gauges: the last scrape, which is always a little old."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple


class Gauges(NamedTuple):
    """A server's gauges, as of the end of an engine step (vLLM sets them once a step).

    waiting: vllm:num_requests_waiting. running: vllm:num_requests_running. kv_usage:
    vllm:kv_cache_usage_perc, 0..1; cached blocks that no request holds count as free. adapters: those of
    waiting and of running requests, which both lists of vllm:lora_requests_info name
    (LoRARequestStates.update_scheduler_stats).
    """

    waiting: int = 0
    running: int = 0
    kv_usage: float = 0.0
    adapters: frozenset[int] = frozenset()


class Scrape:
    """Scrapes every ``interval`` from ``first`` on, each known ``delay`` after it was taken.

    The same as a process that ticks, but only the readings that somebody could ask for are kept: what the
    server says at time t is known from the first scrape at or after t, plus the delay.

    Args:
        interval, delay: picoseconds; with an interval of 0 every change is seen.
        first: time of the first scrape, picoseconds.
    """

    __slots__ = ("_delay", "_interval", "_known", "_newest", "_pending", "_taken")

    def __init__(self, interval: int, delay: int, first: int) -> None:
        self._interval, self._delay = interval, delay
        self._taken, self._newest = first, -1  # the scrape to come, and the one that has the newest gauges
        self._known = Gauges()
        self._pending: deque[tuple[int, Gauges]] = deque()  # (known from, what)

    def put(self, now: int, gauges: Gauges) -> int | None:
        """The server's gauges from now on. Times must not fall. Returns from when they are known, unless
        others would be known from then."""
        taken, pending = self._taken, self._pending
        if now > taken:
            interval = self._interval
            taken = self._taken = now + (taken - now) % interval if interval else now
        known_from = taken + self._delay
        if taken == self._newest and pending:
            pending[-1] = (known_from, gauges)
            return None
        self.get(now)
        self._newest = taken
        pending.append((known_from, gauges))
        return known_from

    def get(self, now: int) -> Gauges:
        """What is known now; all zero before the first scrape. Times must not fall."""
        pending = self._pending
        while pending and pending[0][0] <= now:
            self._known = pending.popleft()[1]
        return self._known
