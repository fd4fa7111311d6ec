"""The client of a stream of sessions: requests that wait for the answers to others."""

from __future__ import annotations

from collections import Counter, defaultdict, deque

from servecast.sim.fleet.flow import Flow
from servecast.sim.inputs.units import to_ps
from servecast.sim.traffic.sessions import SessionRequest, SessionStream


class SessionClient:
    """Says when the requests of a stream's sessions are sent. A session whose request failed, or was given
    up, sends no more.

    Sessions wait for a place among ``max_sessions`` in order of arrival, and hold it until their last request
    has ended; requests that are meant to be sent wait for one among ``max_concurrency``, as elsewhere.

    Args:
        flow: in which the stream begins now. number: of the stream. first: row of its first request.
    """

    def __init__(self, flow: Flow, stream: SessionStream, number: int, first: int) -> None:
        self.unsent = 0  # requests whose session had failed
        self._flow, self._number, self._start, self._in_flight = flow, number, flow.now, 0
        self._most, self._limit = stream.max_sessions, stream.max_concurrency
        self._waiting: deque[int] = deque()  # first requests, for a place among the sessions
        self._ready: deque[int] = deque()  # meant to be sent, for a place in flight
        self._rows: dict[int, SessionRequest] = {}
        self._following: dict[int, list[int]] = defaultdict(list)
        self._missing: dict[int, int] = {}  # request -> how many that it waits for have not ended
        self._left: Counter[int | None] = Counter()  # session -> its requests that have not ended
        self._going, self._coming = 0, 0  # sessions
        rows = {request.request_id: row for row, request in enumerate(stream.requests, start=first)}
        flow.open(first, first + len(rows), 0, self)
        for row, request in enumerate(stream.requests, start=first):
            assert isinstance(request, SessionRequest)
            self._rows[row] = request
            self._left[request.group] += 1
            self._missing[row] = len(request.after)
            for earlier in request.after:
                self._following[rows[earlier]].append(row)
            if not request.after:
                self._coming += 1
                flow.remind(self._start + to_ps(request.arrival_s), row)
        flow.drop(number, 0)

    @property
    def all_begun(self) -> bool:
        """Whether no session is left that could begin."""
        return not self._waiting and not self._coming

    def due(self, row: int) -> None:
        """It is time for a request."""
        if self._flow.senders[self._number].stopped:
            return
        if self._rows[row].after:
            self._meant(row)
        else:
            self._coming -= 1
            self._waiting.append(row)
            self._admit()

    def _admit(self) -> None:
        while self._waiting and (self._most is None or self._going < self._most):
            self._going += 1
            self._meant(self._waiting.popleft())

    def _meant(self, row: int) -> None:
        self._flow.meant(row)
        self._ready.append(row)
        self._send()

    def _send(self) -> None:
        while self._ready and (self._limit is None or self._in_flight < self._limit):
            self._in_flight += 1
            self._flow.dispatch(self._ready.popleft())

    def ended(self, row: int, well: bool) -> None:
        """A request has its answer, or none will come."""
        self._in_flight -= 1
        if self._flow.senders[self._number].stopped:
            return
        group = self._rows[row].group
        self._left[group] -= 1
        for following in self._following.pop(row, ()):
            if not well:
                self._drop(following)
                continue
            self._missing[following] -= 1
            if not self._missing[following]:
                request = self._rows[following]
                after_answer = self._flow.now + to_ps(request.delay_s)
                self._flow.remind(max(after_answer, self._start + to_ps(request.arrival_s)), following)
        if not self._left[group]:
            self._going -= 1
            self._admit()
        self._send()

    def _drop(self, row: int) -> None:
        """It and all that wait for it are never sent."""
        if self._missing.pop(row, None) is None:
            return
        self.unsent += 1
        self._left[self._rows[row].group] -= 1
        self._flow.drop(self._number, 1)
        for following in self._following.pop(row, ()):
            self._drop(following)
