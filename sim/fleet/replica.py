"""One server in simulated time: its engine loop and its API server, and who has gone where.

SimPy time is an integer number of picoseconds. The loop runs ahead of it, up to the next event of anybody:
what happens outside at a time comes before the engine's steps that start then.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass

import numpy as np
import simpy
from numpy.typing import NDArray
from simpy.events import EventPriority

from servecast.sim.engine.alone import Alone
from servecast.sim.engine.engine import Engine, Step
from servecast.sim.engine.engine_loop import ABORTS, BUSY, ENDED, EngineLoop
from servecast.sim.engine.request import Request
from servecast.sim.engine.scheduler import Scheduler
from servecast.sim.engine.sequence import Sequence
from servecast.sim.fleet.client import Client
from servecast.sim.fleet.engine_loop import InEngine, PythonLoop
from servecast.sim.fleet.front_end import ApiServer, after
from servecast.sim.hardware.front_end_costs import FrontEndCosts
from servecast.sim.hardware.step_time.physical import PhysicalStepTime, StepTime
from servecast.sim.inputs.units import to_ps
from servecast.sim.metrics.records import RequestRecord

ENGINE = EventPriority(2)  # an arrival at time t comes before the engine step that starts at t
_END_OF_TIME = 1 << 62


@dataclass(slots=True)
class Job:
    """A request on its way through the fleet."""

    request: Request
    record: RequestRecord
    done: Callable[[], None]
    answered: Callable[[], None] | None = None  # called when the first token comes


class Replica:
    """An engine, its API server, and what is recorded of both.

    Args:
        env: SimPy environment whose clock counts picoseconds.
        index: number of the replica in its fleet.
        engine: a fresh one.
        step_time: how long a step takes.
        noise: factors of mean 1 on the step time, one a step.
        floor: a step's least duration in seconds, which noise does not undercut (its roofline).
        costs, rng: of the API server in front of the engine. client: the process that reads its tokens.
        cold_start_s: how long the host is busy between deciding the first step and its start on the GPU.

    Raises:
        InputError: out of the simulation, when a request can never run.
    """

    def __init__(
        self,
        env: simpy.Environment,
        index: int,
        engine: Engine,
        step_time: StepTime,
        noise: Iterator[float],
        floor: Callable[[Step], float],
        costs: FrontEndCosts,
        rng: np.random.Generator,
        client: Client,
        *,
        cold_start_s: float = 0.0,
    ) -> None:
        self.env = env
        self.index = index
        self.config = engine.config
        self.engine = engine
        self.outstanding = 0
        self.failed = False
        self._api_server = ApiServer(env, costs, rng, self._put, engine.config.preparation_round)
        self._client = client
        self._jobs: dict[int, Job] = {}
        self._wake: simpy.Event | None = None
        token_ps, delivery_ps = to_ps(costs.token_s), to_ps(costs.delivery_s)
        read = client.read if client.reading_costs else None
        self._loop: EngineLoop | PythonLoop
        if isinstance(engine, Scheduler):
            self._loop = EngineLoop(
                engine,
                index,
                step_time.costs() if type(step_time) is PhysicalStepTime else None,
                step_time.seconds,
                floor,
                noise,
                (token_ps, delivery_ps),
                read,
                to_ps(cold_start_s),
            )
        else:
            served = (token_ps, delivery_ps)
            self._loop = PythonLoop(engine, index, step_time, floor, noise, served, read, to_ps(cold_start_s))
        env.process(self._run())

    @property
    def now(self) -> int:
        """Up to when the engine has run: at or after SimPy's time while it works."""
        return self._loop.now

    def set_stage(self, number: int) -> None:
        """Pooled gaps are booked under this stage from now on."""
        self._loop.stage = number

    def call_after_step(self, action: Callable[[int], None]) -> None:
        """Call it with the time whenever a step has been completed."""
        self._loop.after_step = action

    def step_rows(self) -> NDArray[np.float64]:
        """Rows of ``records.STEP_COLUMNS``."""
        rows: NDArray[np.float64] = self._loop.step_rows()
        return rows

    def gap_rows(self) -> NDArray[np.float64]:
        """Rows (stage, gap in s, tokens, s over which the step's tokens are read)."""
        rows: NDArray[np.float64] = self._loop.gap_rows()
        return rows

    @property
    def can_run_alone(self) -> bool:
        return isinstance(self._loop, EngineLoop)

    def run_alone(
        self, times: NDArray[np.int64], requests: list[Request], limit: int
    ) -> dict[str, NDArray[np.int64]]:
        """One client's requests that arrive at these times, to the end of the last; see ``Alone``."""
        assert isinstance(self._loop, EngineLoop)
        server, client = self._api_server, self._client
        send = None if client.is_free else client.send
        costs = server.costs.latency_s, server.costs.request_s, server.costs.prompt_token_s
        most = self.config.preparation_round
        alone = Alone(self._loop, send, costs, server.variation, most, limit)
        columns: dict[str, NDArray[np.int64]] = alone.run(times, requests)
        return columns

    def submit(self, job: Job) -> None:
        """A request has been sent to this replica."""
        self.outstanding += 1
        job.record.replica = self.index
        self._jobs[job.request.request_id] = job
        if job.answered is not None:
            self._loop.on_first = self._tell_answered
        self._api_server.accept(job, job.request.prompt_tokens)

    def abort(self, request_id: int) -> None:
        """The client has gone away."""
        if request_id in self._jobs:
            self._loop.aborts += 1
            self._put(request_id)

    def fail(self) -> int:
        """The server is gone, and every request that it has ends as failed. Returns how many."""
        self.failed = True
        lost = list(self._jobs)
        for request_id in lost:
            self._end(request_id, "failed", self._loop.find(request_id))
        return len(lost)

    def _put(self, item: Job | int) -> None:
        if self.failed:
            return
        if isinstance(item, Job):
            if item.record.status == "aborted":
                return  # given up while it was prepared
            self._loop.inbox.append((int(self.env.now), item.request))
        else:
            self._loop.inbox.append((int(self.env.now), item))
        if self._wake is not None:
            self._wake.succeed()
            self._wake = None

    def _at(self, time: int) -> simpy.Event:
        event = simpy.Event(self.env)
        event._ok, event._value = True, None
        self.env.schedule(event, ENGINE, time - self.env.now)
        return event

    def _run(self) -> Generator[simpy.Event, None, None]:
        """Advance the engine from event to event."""
        env, loop = self.env, self._loop
        while True:
            state = loop.advance(int(max(min(env.peek(), _END_OF_TIME), env.now + 1)))
            if state == ENDED:
                self._take_ended()
            elif state == ABORTS:
                self._drain()
            else:
                if state == BUSY:
                    yield self._at(loop.wake)
                else:
                    self._wake = simpy.Event(env)
                    yield self._wake
                    loop.now = int(env.now)
                if self.failed:
                    return

    def _drain(self) -> None:
        """All that has reached the engine's input queue by now, where clients have gone."""
        loop = self._loop
        while loop.inbox:
            time, item = loop.inbox.pop(0)
            if isinstance(item, Request):
                if self._jobs[item.request_id].record.status != "aborted":
                    loop.take(item, time)
            elif item in self._jobs:
                inside = loop.find(item)
                loop.abort(item)
                self._end(item, "aborted", inside)
        loop.aborts = 0

    def _tell_answered(self, request_id: int, time: int) -> None:
        answered = self._jobs[request_id].answered
        if answered is not None:
            after(self.env, time - int(self.env.now), answered)

    def _take_ended(self) -> None:
        """Requests whose last token is on its way."""
        env, ended = self.env, self._loop.ended
        self._loop.ended = []
        now, longest = int(env.now), self.config.max_model_len
        for inside in ended:
            job = self._jobs.pop(inside.request_id)
            record = job.record
            _note(record, inside)
            record.status = "finished"
            record.output_tokens = min(job.request.output_tokens, longest - job.request.prompt_tokens)
            self.outstanding -= 1
            if inside.finish > now:
                after(env, inside.finish - now, job.done)
            else:
                job.done()

    def _end(self, request_id: int, status: str, inside: Sequence | InEngine | None) -> None:
        job = self._jobs.pop(request_id)
        if inside is not None:
            _note(job.record, inside)
        job.record.status = status
        self.outstanding -= 1
        job.done()


def _note(record: RequestRecord, inside: Sequence | InEngine) -> None:
    """What the engine knows of a request."""
    record.queued = inside.queued
    if inside.scheduled >= 0:
        record.scheduled, record.cached_tokens = inside.scheduled, inside.cached_tokens
    if inside.first_token >= 0:
        record.first_token = inside.first_token
    if inside.finish >= 0:
        record.ended, record.finish = inside.ended, inside.finish
    record.preemptions = inside.preemptions
