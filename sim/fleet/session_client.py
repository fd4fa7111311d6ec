"""The client of a stream of sessions: requests that wait for the answers to others."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from functools import partial
from typing import TYPE_CHECKING

import simpy

from servecast.sim.fleet.front_end import after
from servecast.sim.fleet.replica import Job
from servecast.sim.inputs.units import to_ps
from servecast.sim.metrics.records import RequestRecord
from servecast.sim.traffic.sessions import SessionRequest, SessionStream

if TYPE_CHECKING:
    from servecast.sim.fleet.fleet import Fleet


class SessionClient:
    """Sends a stream's sessions. One whose request failed, or was given up, sends no more.

    Sessions wait for a place among ``max_sessions`` in order of arrival, and hold it until their last request
    has ended; the clock of a request that waits for ``max_concurrency`` runs from its arrival, as elsewhere.
    """

    def __init__(self, fleet: Fleet, stream: SessionStream, stage: int, index: int) -> None:
        self.fleet, self.stream, self.stage, self.index = fleet, stream, stage, index
        self.finished = simpy.Event(fleet.env)
        self._start, self._stopped, self._in_flight = int(fleet.env.now), False, 0
        self._waiting: deque[SessionRequest] = deque()  # first requests, for a place among the sessions
        self._ready: deque[Job] = deque()  # arrived, for a place in flight
        self._following: dict[int, list[SessionRequest]] = defaultdict(list)
        self._missing: dict[int, int] = {}  # request -> how many that it waits for have not ended
        self._left: Counter[int | None] = Counter()  # session -> its requests that have not ended
        self._going = 0  # sessions
        first: list[SessionRequest] = []
        for request in stream.requests:
            assert isinstance(request, SessionRequest)
            self._left[request.group] += 1
            self._missing[request.request_id] = len(request.after)
            for earlier in request.after:
                self._following[earlier].append(request)
            if not request.after:
                first.append(request)
        self._open = len(self._left)
        self._coming = deque(sorted(first, key=lambda request: request.arrival_s))
        self._next()
        if stream.until_s is not None:
            after(fleet.env, to_ps(stream.until_s), self._out_of_time)
        if not self._open:
            self.finished.succeed()

    def stop(self) -> None:
        """Send no more; what was not sent was never part of the run."""
        self._stopped = True
        unsent = {id(job.record) for job in self._ready}
        self._ready.clear()
        self.fleet.records = [record for record in self.fleet.records if id(record) not in unsent]
        self._finish()

    def _finish(self) -> None:
        done = not self._open or (self._stopped and not self._in_flight)
        if done and not self.finished.triggered:
            self.finished.succeed()

    def _out_of_time(self) -> None:
        if self._open:
            self.fleet.ran_out |= not self._waiting and not self._coming
            self.stop()

    def _after(self, when: int, action: partial[None]) -> None:
        after(self.fleet.env, max(0, when - int(self.fleet.env.now)), action)

    def _next(self) -> None:
        """The next session begins when it arrives."""
        if self._coming:
            request = self._coming.popleft()
            self._after(self._start + to_ps(request.arrival_s), partial(self._begin, request))

    def _begin(self, request: SessionRequest) -> None:
        if self._stopped:
            return
        self._waiting.append(request)
        self._admit()
        self._next()

    def _admit(self) -> None:
        most = self.stream.max_sessions
        while self._waiting and (most is None or self._going < most):
            self._going += 1
            self._arrive(self._waiting.popleft())

    def _arrive(self, request: SessionRequest) -> None:
        """It is meant to be sent now."""
        if self._stopped:
            return
        arrival = int(self.fleet.env.now)
        record = RequestRecord(request.request_id, self.stage, self.index, request.prompt_tokens, arrival)
        record.group = request.group
        self.fleet.records.append(record)
        self._ready.append(Job(request, record, partial(self._ended, request, record)))
        self._send()

    def _send(self) -> None:
        most = self.stream.max_concurrency
        while self._ready and (most is None or self._in_flight < most):
            self._in_flight += 1
            self.fleet.send(self._ready.popleft())

    def _ended(self, request: SessionRequest, record: RequestRecord) -> None:
        self._in_flight -= 1
        group, now = request.group, int(self.fleet.env.now)
        self._left[group] -= 1
        for following in self._following.pop(request.request_id, ()):
            number = following.request_id
            if record.status != "finished":
                self._drop(following)
                continue
            self._missing[number] -= 1
            if not self._missing[number]:
                when = max(now + to_ps(following.delay_s), self._start + to_ps(following.arrival_s))
                self._after(when, partial(self._arrive, following))
        if not self._left[group]:
            self._open -= 1
            self._going -= 1
            self._admit()
        self._send()
        self._finish()

    def _drop(self, request: SessionRequest) -> None:
        """It and all that wait for it are never sent."""
        if self._missing.pop(request.request_id, None) is None:
            return
        self.fleet.unsent += 1
        self._left[request.group] -= 1
        for following in self._following.pop(request.request_id, ()):
            self._drop(following)
