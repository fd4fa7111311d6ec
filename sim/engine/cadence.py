"""``--prefill-schedule-interval``: steps with prompt work keep a distance while others decode."""

from __future__ import annotations


class PrefillCadence:
    """vLLM's local prefill cadence (0.33, Scheduler.schedule and what it calls ``defer_prefills``).

    After a step that carried prompt work, the next ``interval`` - 1 steps carry none as long as somebody
    decodes, unless the last step that could admit left requests waiting.

    Args:
        interval: executed steps from one with prompt work to the next, at least 1; 1 never defers.

    Attributes:
        carries_prefill: whether the step being decided computes prompt tokens; set by the scheduler.
    """

    __slots__ = ("_capacity_bound", "_executed", "_interval", "_last_prefill", "carries_prefill")

    def __init__(self, interval: int) -> None:
        self._interval = interval
        self._executed = 0
        self._last_prefill = -interval
        self._capacity_bound = False
        self.carries_prefill = False

    def begin(self) -> bool:
        """A step begins: whether it would defer prompt work if somebody decodes."""
        self.carries_prefill = False
        return not self._capacity_bound and self._executed + 1 - self._last_prefill < self._interval

    def end(self, *, tokens: int, admitting: bool, waiting: int) -> None:
        """A step is decided.

        Args:
            tokens: that it computes.
            admitting: nobody was preempted and prompt work was not deferred.
            waiting: requests left in the queue.
        """
        if admitting:
            self._capacity_bound = waiting > 0
        self._executed += tokens > 0
        if self.carries_prefill:
            self._last_prefill = self._executed


class CommonCadence:
    """The same of engine cores in lockstep, by their common count of steps (DPEngineCoreProc,
    _should_throttle_prefills, and Scheduler.schedule).

    Attributes:
        throttled: prompt work is deferred in this step; set by the lockstep.
    """

    __slots__ = ("_capacity_bound", "carries_prefill", "throttled")

    def __init__(self) -> None:
        self._capacity_bound = self.throttled = self.carries_prefill = False

    def begin(self) -> bool:
        """See ``PrefillCadence.begin``."""
        return self.throttled and not self._capacity_bound

    def end(self, *, tokens: int, admitting: bool, waiting: int) -> None:
        """See ``PrefillCadence.end``."""
        if admitting:
            self._capacity_bound = waiting > 0
