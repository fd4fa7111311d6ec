"""One vLLM server in simulated time: the engine loop around the scheduler.

SimPy time is an integer number of picoseconds. The loop follows vLLM's EngineCore: drain the input
queue, schedule, execute, update. With async scheduling a second step is scheduled while the first
executes, so the composition of a step is fixed when the step before it starts.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass

import numpy as np
import simpy
from simpy.events import EventPriority

from servecast.sim.engine.engine import Engine
from servecast.sim.engine.request import Request
from servecast.sim.engine.step import Step
from servecast.sim.fleet.client import Client
from servecast.sim.fleet.front_end import ApiServer, after
from servecast.sim.hardware.front_end_costs import FrontEndCosts
from servecast.sim.hardware.step_time.physical import StepTime
from servecast.sim.inputs.errors import InputError
from servecast.sim.inputs.units import PICOSECONDS, to_ps
from servecast.sim.metrics.records import RequestRecord

ENGINE = EventPriority(2)  # an arrival at time t comes before the engine step that starts at t


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
        self.stage = 0  # stage that pooled gaps are booked under
        self.after_step: Callable[[], None] | None = None  # called when a step has been completed
        self.failed = False
        self.steps = array("d")  # rows of records.STEP_COLUMNS, flat
        self.gaps = array(
            "d"
        )  # rows (stage, gap in s, tokens, s over which the step's tokens are read), flat
        self._step_seconds = step_time.seconds
        self._noise = noise
        self._floor = floor
        self._api_server = ApiServer(env, costs, rng, self._put, engine.config.preparation_round)
        self._client = client
        self._inbox: deque[tuple[int, Job | int]] = deque()  # (time, new job or id to abort)
        self._jobs: dict[int, Job] = {}
        self._arrivals = 0
        self._seen = array("q")  # by tick: when the step's tokens were read, on average
        self._wake: simpy.Event | None = None
        self._gpu_free = 0
        self._cold_start = to_ps(cold_start_s)
        env.process(self._loop())

    def submit(self, job: Job) -> None:
        """A request has been sent to this replica."""
        self.outstanding += 1
        job.record.replica = self.index
        self._jobs[job.request.request_id] = job
        self._api_server.accept(job, job.request.prompt_tokens)

    def abort(self, request_id: int) -> None:
        """The client has gone away."""
        if request_id in self._jobs:
            self._put(request_id)

    def fail(self) -> int:
        """The server is gone, and every request that it has ends as failed. Returns how many."""
        self.failed = True
        lost = list(self._jobs)
        for request_id in lost:
            self._end(request_id, "failed", int(self.env.now))
        return len(lost)

    def _put(self, item: Job | int) -> None:
        if self.failed:
            return
        self._inbox.append((int(self.env.now), item))
        if self._wake is not None:
            self._wake.succeed()
            self._wake = None

    def _drain(self) -> None:
        """All that has reached the engine's input queue by now."""
        inbox, engine = self._inbox, self.engine
        while inbox:
            time, item = inbox.popleft()
            if isinstance(item, Job):
                if item.record.status == "aborted":
                    continue  # given up while it was prepared
                engine.add(item.request, self._arrivals)
                self._arrivals += 1
                item.record.queued = time
            elif item in self._jobs:
                engine.abort(item)
                self._end(item, "aborted", int(self.env.now))

    def _at(self, time: int) -> simpy.Event:
        event = simpy.Event(self.env)
        event._ok, event._value = True, None
        self.env.schedule(event, ENGINE, time - self.env.now)
        return event

    def _loop(self) -> Generator[simpy.Event, None, None]:
        """EngineCore's busy loop."""
        depth = 2 if self.config.async_scheduling else 1
        in_flight: deque[tuple[Step, int]] = deque()
        engine = self.engine
        while True:
            self._drain()
            if engine.has_requests:
                step = engine.schedule()
                if self._cold_start:
                    yield self._at(int(self.env.now) + self._cold_start)
                    self._cold_start = 0
                    if self.failed:
                        return
                in_flight.append((step, self._execute(step)))
                if len(in_flight) < depth and step.total_tokens:
                    continue
            elif not in_flight:
                self._wake = simpy.Event(self.env)
                yield self._wake
                continue
            step, end = in_flight.popleft()
            if end > self.env.now:
                yield self._at(end)
                if self.failed:
                    return
            engine.complete(step)
            if self.after_step is not None:
                self.after_step()
            if step.emitted:
                self._deliver(step)
            else:
                self._seen.append(end)

    def _execute(self, step: Step) -> int:
        """Put the step on the GPU, behind the one before. Returns when it ends."""
        start = max(int(self.env.now), self._gpu_free)
        if not step.total_tokens:
            if not step.idle_s:
                self._check_progress()
            return start + to_ps(step.idle_s)
        factor = next(self._noise)
        seconds = self._step_seconds(step) * factor
        if factor < 1.0:
            seconds = max(seconds, self._floor(step))
        self._gpu_free = start + round(seconds * PICOSECONDS)
        for request_id in step.admitted:
            record = self._jobs[request_id].record
            record.scheduled = start
            record.cached_tokens = step.cached_tokens[request_id]
        for request_id in step.preempted:
            self._jobs[request_id].record.preemptions += 1
        engine = self.engine
        prefill = step.total_tokens - step.decodes
        self.steps.extend(
            (
                self.index,
                start / PICOSECONDS,
                seconds,
                prefill,
                len(step.chunks),
                step.decodes,
                step.decode_context,
                engine.num_running,
                engine.num_waiting,
                engine.kv.usage,
                len(step.preempted),
                step.samples,
            )
        )
        return self._gpu_free

    def _check_progress(self) -> None:
        if self.engine.num_waiting and not self.engine.num_running:
            request = self._jobs[self.engine.waiting[0]].request
            raise InputError(
                f"its {request.prompt_tokens} tokens are never admitted, although the engine is empty",
                where=f"request {request.request_id}",
                fix="With chunked prefill off, max_num_batched_tokens must cover the longest request.",
            )

    def _deliver(self, step: Step) -> None:
        """Tokens go through the API server to the client, in the order of the batch."""
        now, emitted = int(self.env.now), step.emitted
        first, pace = self._client.read(*self._api_server.stream(now, emitted), emitted)
        middle = first + pace * (emitted - 1) // 2
        spread = pace * (emitted - 1) / PICOSECONDS
        seen = self._seen
        if step.steady and seen:
            self.gaps.extend((self.stage, (middle - seen[-1]) / PICOSECONDS, step.steady, spread))
        for tick in step.gaps:
            self.gaps.extend((self.stage, (middle - seen[tick]) / PICOSECONDS, 1, spread))
        seen.append(middle)
        last = first + pace * (emitted - 1)
        newest = len(step.first_tokens) - 1
        for position, request_id in enumerate(step.first_tokens):  # the newest stand last in the batch
            job = self._jobs[request_id]
            comes = job.record.first_token = last - pace * (newest - position)
            if job.answered is not None:
                after(self.env, comes - now, job.answered)
        share = (last - first) // (len(step.finished) or 1)
        for position, request_id in enumerate(step.finished):  # these are spread over the batch
            first_token = self._jobs[request_id].record.first_token or 0
            self._end(request_id, "finished", max(first_token, first + share * position + share // 2))

    def _end(self, request_id: int, status: str, time: int) -> None:
        job = self._jobs.pop(request_id)
        record = job.record
        record.status = status
        self.outstanding -= 1
        if status == "finished":
            record.ended = int(self.env.now)
            record.finish = time
            record.output_tokens = min(
                job.request.output_tokens, self.config.max_model_len - job.request.prompt_tokens
            )
        if time > self.env.now:
            after(self.env, time - int(self.env.now), job.done)
        else:
            job.done()
