"""The busy loop around an engine that is written in Python: those that pad a batch, and one's own.

It has the interface of ``servecast.sim.engine.engine_loop.EngineLoop``, the loop around vLLM's scheduler.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from servecast.sim.engine.engine import Engine, Step
from servecast.sim.engine.engine_loop import ABORTS, BUSY, ENDED, IDLE
from servecast.sim.engine.request import Request
from servecast.sim.hardware.step_time.physical import StepTime
from servecast.sim.inputs.errors import InputError
from servecast.sim.inputs.units import PICOSECONDS, to_ps
from servecast.sim.metrics.records import STEP_COLUMNS


@dataclass(slots=True)
class InEngine:
    """A request in the engine; see ``sim.engine``. Times are picoseconds, -1 where it did not happen."""

    request: Request
    row: int
    queued: int
    scheduled: int = -1
    ended: int = -1
    first_token: int = -1
    finish: int = -1
    cached_tokens: int = -1
    preemptions: int = 0


class PythonLoop:
    """See ``sim.engine.engine_loop.EngineLoop``.

    Args:
        read: ``Client.read``, or None where reading costs nothing.
    """

    def __init__(
        self,
        engine: Engine,
        index: int,
        step_time: StepTime,
        noise: Iterator[float],
        served_ps: tuple[int, int],
        read: Callable[[int, int, int, int], tuple[int, int]] | None,
        cold_start_ps: int = 0,
    ) -> None:
        self.engine = engine
        self.now = self.wake = self.aborts = self.stage = 0
        self.after_step: Callable[[int], None] | None = None
        self.on_first: Callable[[int, int], None] | None = None
        self.inbox: list[tuple[int, int]] = []
        self.ended: list[int] = []
        self.tell_ends = True
        self._requests: Sequence[Request] = ()
        self._outcomes: NDArray[np.int64] = np.zeros((0, 0), np.int64)
        self._depth = 2 if engine.config.async_scheduling else 1
        self._index = index
        self._seconds, self._floor = step_time.seconds, step_time.roofline_seconds
        self._noise = noise
        (self._token_ps, self._delivery_ps), self._read = served_ps, read
        self._cold_start = cold_start_ps
        self._pending: tuple[int, Step] | None = None  # decided, while the host warms up
        self._in_flight: deque[tuple[Step, int]] = deque()  # with their ends
        self._executing = False
        self._inside: dict[int, InEngine] = {}
        self._arrivals = 0
        self._gpu_free = self._sent = 0
        self._steps, self._gaps = array("d"), array("d")
        self._seen = array("q")  # by tick: when the step's tokens were read, on average

    @property
    def step_columns(self) -> NDArray[np.int64]:
        """See ``EngineLoop``."""
        found = np.empty((len(STEP_COLUMNS), len(self._steps) // len(STEP_COLUMNS)), np.int64)
        for place, kind in enumerate(STEP_COLUMNS.values()):
            found[place].view(kind)[:] = self._steps[place :: len(STEP_COLUMNS)]
        return found

    @property
    def gap_columns(self) -> NDArray[np.float64]:
        """See ``EngineLoop``."""
        return np.array(self._gaps).reshape(-1, 4).T

    def drop_rows(self) -> None:
        """See ``EngineLoop``."""
        del self._steps[:], self._gaps[:]

    def load(self, requests: Sequence[Request], outcomes: NDArray[np.int64]) -> None:
        """See ``EngineLoop``."""
        self._requests, self._outcomes = requests, outcomes

    def take(self, row: int, time: int) -> None:
        """A request reaches the engine that was put into the queue at ``time``."""
        request = self._requests[row]
        self.engine.add(request, self._arrivals)
        self._arrivals += 1
        self._inside[request.request_id] = InEngine(request, row, time)

    def leave(self, row: int) -> None:
        """A request ends without its last token, wherever it stands."""
        request_id = self._requests[row].request_id
        if request_id in self._inside:
            self.engine.abort(request_id)
            self._book(self._inside.pop(request_id))

    def _book(self, request: InEngine) -> None:
        cached = request.cached_tokens if request.scheduled >= 0 else -1
        self._outcomes[1:, request.row] = (
            request.queued,
            request.scheduled,
            request.ended,
            request.first_token,
            request.finish,
            cached,
            request.preemptions,
        )

    def advance(self, until: int) -> int:
        """Run all that starts before ``until``; see ``EngineLoop.advance``."""
        engine = self.engine
        while True:
            if self._pending is not None:
                resume, step = self._pending
                if resume >= until:
                    self.wake = resume
                    return BUSY
                self.now, self._pending = resume, None
                self._executing = not self._launch(step)
                continue
            if self._executing:
                step, end = self._in_flight[0]
                if end >= until:
                    self.wake = end
                    return BUSY
                self.now = max(self.now, end)
                self._executing = False
                self._in_flight.popleft()
                engine.complete(step)
                if self.after_step is not None:
                    self.after_step(self.now)
                if step.emitted:
                    self._deliver(step)
                else:
                    self._seen.append(end)
                if self.ended:
                    return ENDED
            if self.now >= until:
                self.wake = self.now
                return BUSY
            if self.aborts:
                return ABORTS
            for time, row in self.inbox:
                self.take(row, time)
            self.inbox.clear()
            if engine.has_requests:
                step = engine.schedule()
                if self._cold_start:
                    self._pending, self._cold_start = (self.now + self._cold_start, step), 0
                else:
                    self._executing = not self._launch(step)
            elif not self._in_flight:
                return IDLE
            else:
                self._executing = True

    def _launch(self, step: Step) -> bool:
        """Put the step on the GPU, behind the one before. Returns whether one more is decided now."""
        self._in_flight.append((step, self._execute(step)))
        return len(self._in_flight) < self._depth and step.total_tokens > 0

    def _execute(self, step: Step) -> int:
        """Returns when the step ends."""
        start = max(self.now, self._gpu_free)
        if not step.total_tokens:
            if not step.idle_s:
                self._check_progress()
            return start + to_ps(step.idle_s)
        factor = next(self._noise)
        seconds = self._seconds(step) * factor
        if factor < 1.0:
            seconds = max(seconds, self._floor(step))
        self._gpu_free = start + round(seconds * PICOSECONDS)
        for request_id in step.admitted:
            request = self._inside[request_id]
            request.scheduled = start
            request.cached_tokens = step.cached_tokens[request_id]
        for request_id in step.preempted:
            self._inside[request_id].preemptions += 1
        engine = self.engine
        self._steps.extend(
            (
                self._index,
                start / PICOSECONDS,
                seconds,
                step.total_tokens - step.decodes,
                len(step.chunks),
                step.decodes,
                step.decode_context,
                engine.num_running,
                engine.num_waiting,
                engine.kv.usage,
                len(step.preempted),
                step.samples,
                0,  # drafts: these engines propose none
            )
        )
        return self._gpu_free

    def _check_progress(self) -> None:
        if self.engine.num_waiting and not self.engine.num_running:
            request = self._inside[self.engine.waiting[0]].request
            raise InputError(
                f"its {request.prompt_tokens} tokens are never admitted, although the engine is empty",
                where=f"request {request.request_id}",
                fix="With chunked prefill off, max_num_batched_tokens must cover the longest request.",
            )

    def _deliver(self, step: Step) -> None:
        """Tokens go through the API server to the client, in the order of the batch."""
        now, emitted, cost = self.now, step.emitted, self._token_ps
        waiting = max(self._sent, now)
        self._sent = max(self._sent, now + cost * emitted)
        events = (self._sent - waiting) // cost if cost else emitted
        first, pace = self._sent + self._delivery_ps - cost * (emitted - 1), cost
        if self._read is not None:
            first, pace = self._read(first, pace, events, emitted)
        middle = first + pace * (emitted - 1) // 2
        spread = pace * (emitted - 1) / PICOSECONDS
        seen = self._seen
        if step.steady and seen:
            self._gaps.extend((self.stage, (middle - seen[-1]) / PICOSECONDS, step.steady, spread))
        for tick in step.gaps:
            self._gaps.extend((self.stage, (middle - seen[tick]) / PICOSECONDS, 1, spread))
        seen.append(middle)
        last = first + pace * (emitted - 1)
        newest = len(step.first_tokens) - 1
        for position, request_id in enumerate(step.first_tokens):  # the newest stand last in the batch
            comes = self._inside[request_id].first_token = last - pace * (newest - position)
            if self.on_first is not None:
                self.on_first(self._inside[request_id].row, comes)
        share = (last - first) // (len(step.finished) or 1)
        for position, request_id in enumerate(step.finished):  # these are spread over the batch
            request = self._inside.pop(request_id)
            request.ended = now
            request.finish = max(request.first_token, first + share * position + share // 2)
            self._book(request)
            if self.tell_ends:
                self.ended.append(request.row)
