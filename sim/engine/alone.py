"""One client in front of one engine, when nothing else happens."""

from __future__ import annotations

from heapq import heappop, heappush
from typing import Any

import cython
import numpy as np

from servecast.sim.engine.engine_loop import OUTCOMES, EngineLoop
from servecast.sim.engine.sequence import Sequence

if cython.compiled:
    from cython.cimports.libc.math import rint
else:
    from servecast.sim.engine.engine_loop import ENDED

    rint = round

PICOSECONDS = cython.declare(cython.double, 1e12)
ARRIVAL = cython.declare(cython.int, 0)
ON_WIRE = cython.declare(cython.int, 1)
AT_SERVER = cython.declare(cython.int, 2)
PREPARED = cython.declare(cython.int, 3)
ENCODED = cython.declare(cython.int, 4)
DONE = cython.declare(cython.int, 5)


class Alone:
    """One client, one API server and one engine, when nothing else happens: what ``Fleet``, ``ApiServer`` and
    ``Replica`` do with events of SimPy, in the same order, see there.

    Args:
        loop: of the engine. send: when a request that the client starts now is on the wire; None: at once.
        costs_s: latency, preparation and, for a prompt token, encoding at the API server. variation: factors
            of the first two, in the order of need. most: requests of a round of preparation.
        limit: requests in flight at most, first come, first served; 0 is no limit.
    """

    def __init__(
        self,
        loop: EngineLoop,
        send: Any,
        costs_s: tuple[float, float, float],
        variation: Any,
        most: int,
        limit: int,
    ) -> None:
        self.loop, self.send, self.variation, self.limit = loop, send, variation, limit
        self.latency_s, self.request_s, self.prompt_token_s = costs_s
        self.most, self.tokenizer_free = most, 0
        self.heap, self.rounds, self.requests = [], [], []
        self.order = self.busy_until = 0
        self.ready = self.started = self.in_flight = 0

    def run(self, times: cython.longlong[::1], requests: list[Any]) -> dict[str, Any]:
        """Run requests that arrive at these times, which do not fall, to the end of the last.

        Returns:
            A column for each of ``OUTCOMES``, a value a request.
        """
        loop: EngineLoop = self.loop
        count: cython.Py_ssize_t = len(requests)
        time: cython.longlong
        what: cython.int
        event: tuple
        sequence: Sequence
        self.times, self.requests = times, requests
        loop.outcomes = np.zeros((len(OUTCOMES), count), np.int64)
        loop.tell_ends = self.limit > 0
        self.sent = loop.outcomes[0]
        self.push(times[0], ARRIVAL, 0)
        while True:
            time = 1 << 62
            if self.heap:
                event = self.heap[0]
                time = event[0]
            if loop.advance(time) == ENDED:
                for sequence in loop.ended:
                    self.push(sequence.finish, DONE, 0)
                loop.ended.clear()
                continue
            if not self.heap:
                break
            event = heappop(self.heap)
            what = event[2]
            if what == ARRIVAL:
                self.arrive(time)
            elif what == ON_WIRE:
                self.accept(time, event[3])
            elif what == AT_SERVER:
                self.prepare(time, event[3])
            elif what == PREPARED:
                self.end_round(time)
            elif what == ENCODED:
                self.put(time, event[3])
            else:
                self.in_flight -= 1
                self.start(time)
        columns: Any = np.asarray(loop.outcomes)
        return dict(zip(OUTCOMES, columns, strict=True))

    def push(self, time: cython.longlong, what: cython.int, request: cython.Py_ssize_t) -> cython.int:
        heappush(self.heap, (time, self.order, what, request))
        self.order += 1
        return 0

    def arrive(self, now: cython.longlong) -> cython.int:
        """All that the client means to send by now, and when the next one comes (StreamClient._arrivals)."""
        count: cython.Py_ssize_t = len(self.requests)
        while self.ready < count and self.times[self.ready] <= now:
            self.ready += 1
            self.start(now)
        if self.ready < count:
            self.push(self.times[self.ready], ARRIVAL, 0)
        return 0

    def start(self, now: cython.longlong) -> cython.int:
        """Send what may be sent (StreamClient._send)."""
        request: cython.Py_ssize_t
        on_wire: cython.longlong = now
        while self.started < self.ready and (not self.limit or self.in_flight < self.limit):
            request = self.started
            self.started += 1
            self.in_flight += 1
            self.sent[request] = now
            if self.send is not None:
                on_wire = self.send(now)
            if on_wire > now:
                self.push(on_wire, ON_WIRE, request)
            else:
                self.accept(now, request)
        return 0

    def varied(self, seconds: cython.double) -> cython.longlong:
        factor: cython.double = next(self.variation)
        return cython.cast(cython.longlong, rint(seconds * factor * PICOSECONDS))

    def accept(self, now: cython.longlong, request: cython.Py_ssize_t) -> cython.int:
        """ApiServer.accept."""
        latency: cython.longlong = self.varied(self.latency_s)
        if latency:
            self.push(now + latency, AT_SERVER, request)
        else:
            self.prepare(now, request)
        return 0

    def prepare(self, now: cython.longlong, request: cython.Py_ssize_t) -> cython.int:
        """ApiServer._prepare and Preparation.start."""
        cost: cython.longlong = self.varied(self.request_s)
        if not cost:
            self.encode(now, request)
            return 0
        self.busy_until = max(now, self.busy_until) + cost
        if not self.rounds or len(self.rounds[len(self.rounds) - 1][1]) == self.most:
            self.rounds.append([0, []])
            if len(self.rounds) == 1:
                self.push(now + cost, PREPARED, 0)
        self.rounds[len(self.rounds) - 1][1].append(request)
        self.rounds[len(self.rounds) - 1][0] = self.busy_until
        return 0

    def encode(self, now: cython.longlong, request: cython.Py_ssize_t) -> cython.int:
        """ApiServer._encode."""
        tokens: cython.longlong = self.requests[request].prompt_tokens
        cost: cython.longlong = cython.cast(cython.longlong, rint(self.prompt_token_s * tokens * PICOSECONDS))
        if cost:
            self.tokenizer_free = max(now, self.tokenizer_free) + cost
            self.push(self.tokenizer_free, ENCODED, request)
        else:
            self.put(now, request)
        return 0

    def put(self, now: cython.longlong, request: cython.Py_ssize_t) -> cython.int:
        self.loop.inbox.append((now, self.requests[request], request))
        return 0

    def end_round(self, now: cython.longlong) -> cython.int:
        """Preparation._end."""
        if now == self.rounds[0][0]:
            for request in self.rounds.pop(0)[1]:
                self.encode(now, request)
        if self.rounds:
            self.push(self.rounds[0][0], PREPARED, 0)
        return 0
