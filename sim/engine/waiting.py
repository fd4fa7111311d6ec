"""The waiting queue of the engine, in the order of ``--scheduling-policy``."""

from __future__ import annotations

import heapq
from collections import deque
from typing import Protocol

from servecast.sim.engine.sequence import Sequence


class WaitingQueue(Protocol):
    """Requests that wait for admission; only the head may be admitted."""

    def push(self, sequence: Sequence) -> None:
        """A new request joins."""

    def push_preempted(self, sequence: Sequence) -> None:
        """A preempted request comes back."""

    def head(self) -> Sequence:
        """The next one to admit."""
        ...

    def pop(self) -> Sequence:
        """Take the head."""
        ...

    def remove(self, sequence: Sequence) -> None:
        """Take one out, wherever it stands."""

    def ordered(self) -> list[Sequence]:
        """All, head first."""
        ...

    def __len__(self) -> int: ...


class FcfsQueue:
    """First come, first served; the preempted go to the front."""

    def __init__(self) -> None:
        self._queue: deque[Sequence] = deque()
        self.push = self._queue.append
        self.push_preempted = self._queue.appendleft
        self.pop = self._queue.popleft
        self.remove = self._queue.remove

    def head(self) -> Sequence:
        return self._queue[0]

    def ordered(self) -> list[Sequence]:
        return list(self._queue)

    def __len__(self) -> int:
        return len(self._queue)


class PriorityQueue:
    """Lowest (priority, arrival, request id) first, preempted or not."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, int, Sequence]] = []

    def push(self, sequence: Sequence) -> None:
        heapq.heappush(self._heap, (sequence.priority, sequence.arrival, sequence.request_id, sequence))

    push_preempted = push

    def head(self) -> Sequence:
        return self._heap[0][-1]

    def pop(self) -> Sequence:
        return heapq.heappop(self._heap)[-1]

    def remove(self, sequence: Sequence) -> None:
        self._heap = [entry for entry in self._heap if entry[-1] is not sequence]
        heapq.heapify(self._heap)

    def ordered(self) -> list[Sequence]:
        return [entry[-1] for entry in sorted(self._heap, key=lambda entry: entry[:3])]

    def __len__(self) -> int:
        return len(self._heap)


QUEUES: dict[str, type[FcfsQueue] | type[PriorityQueue]] = {"fcfs": FcfsQueue, "priority": PriorityQueue}
