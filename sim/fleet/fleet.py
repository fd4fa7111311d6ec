"""Clients, router and replicas in simulated time: runs the stages of a workload to the end."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Generator, Sequence
from functools import partial

import numpy as np
import pandas as pd
import simpy
from numpy.typing import NDArray

from servecast.sim.engine.engine_loop import OUTCOMES
from servecast.sim.engine.request import Request, Stage, Stream
from servecast.sim.fleet.client import Client
from servecast.sim.fleet.endpoint import Endpoint
from servecast.sim.fleet.front_end import after
from servecast.sim.fleet.replica import Job, Replica
from servecast.sim.fleet.spec import Life
from servecast.sim.inputs.units import PICOSECONDS, to_ps, to_seconds
from servecast.sim.metrics.records import STEP_COLUMNS, RequestRecord, Run, finished_frame, requests_frame
from servecast.sim.routing.options import RouterOptions
from servecast.sim.routing.routers import Answered, Informed, Random, RoundRobin, Router

NOT_READY = "no replica was ready (503)"
_UNPICKED = "the router let no replica pass (503)"
_REFUSED = "sent to a replica that had failed before the router knew"
_LOST = "in flight on a replica that failed"


class StreamClient:
    """Sends the requests of one stream: each not before its arrival, at most so many at a time."""

    def __init__(self, fleet: Fleet, stream: Stream, stage: int, index: int) -> None:
        self.fleet, self.stream, self.stage, self.index = fleet, stream, stage, index
        self.open = len(stream.requests)  # not yet done
        self.finished = simpy.Event(fleet.env)
        self._limit = stream.max_concurrency or len(stream.requests) or 1
        self._in_flight = 0
        self._ready: deque[Job] = deque()  # arrived, wait for the semaphore
        self._stopped = False
        fleet.env.process(self._arrivals())
        if stream.until_s is not None:
            after(fleet.env, to_ps(stream.until_s), self._out_of_time)

    def stop(self) -> None:
        """Send no more; what was not sent was never part of the run."""
        self._stopped = True
        unsent = {id(job.record) for job in self._ready}
        self._ready.clear()
        self.fleet.records = [record for record in self.fleet.records if id(record) not in unsent]
        self.open = self._in_flight
        if not self.open and not self.finished.triggered:
            self.finished.succeed()

    def _out_of_time(self) -> None:
        if self.open:
            self.fleet.ran_out |= not self._ready  # it would have sent more
            self.stop()

    def _arrivals(self) -> Generator[simpy.Event, None, None]:
        env, start = self.fleet.env, int(self.fleet.env.now)
        for request in self.stream.requests:
            arrival = start + to_ps(request.arrival_s)
            if arrival > env.now:
                yield env.timeout(arrival - env.now)
            if self._stopped:
                return
            record = RequestRecord(request.request_id, self.stage, self.index, request.prompt_tokens, arrival)
            record.group = request.group
            self.fleet.records.append(record)
            self._ready.append(Job(request, record, self._done))
            self._send()
        if not self.stream.requests:
            self.finished.succeed()

    def _send(self) -> None:
        while self._ready and self._in_flight < self._limit:
            self._in_flight += 1
            self.fleet.send(self._ready.popleft())

    def _done(self) -> None:
        self._in_flight -= 1
        self.open -= 1
        if not self.open and not self.finished.triggered:
            self.fleet.ran_out |= self.stream.until_s is not None and not self._stopped
            self.finished.succeed()
        self._send()


class Fleet:
    """Replicas behind a router, and the client that drives them.

    Args:
        env: SimPy environment whose clock counts picoseconds.
        make_replica: called with (env, index, client) for each replica.
        count: number of replicas, >= 1.
        router: routing policy.
        client: the process that sends and reads. rng: for the order in which it reads.
        options: how late the router knows things. routing: for when it scrapes; without, rng.
        lives: of each replica; without, all are there all the time.
        detection_s: for so long the router still sends requests to a replica that has failed.
    """

    def __init__(
        self,
        env: simpy.Environment,
        make_replica: Callable[[simpy.Environment, int, Client], Replica],
        count: int,
        router: Router,
        client: Client,
        rng: np.random.Generator,
        *,
        options: RouterOptions | None = None,
        routing: np.random.Generator | None = None,
        lives: Sequence[Life] | None = None,
        detection_s: float = 0.0,
    ) -> None:
        self.env = env
        self._rng = rng
        self.records: list[RequestRecord] = []
        self.failures: Counter[str] = Counter()  # why requests failed
        self.ran_out = False  # whether a stream that sends until a time had too few requests for it
        self._stage_starts: list[float] = []
        self.replicas = [make_replica(env, index, client) for index in range(count)]
        self._router = router
        self._client = client
        options = options or RouterOptions()
        lives = lives or [Life()] * count
        self._endpoints = [
            Endpoint(env, replica, life, options, routing or rng)
            for replica, life in zip(self.replicas, lives, strict=True)
        ]
        self._ready = [endpoint for endpoint in self._endpoints if not endpoint.life.start_s]
        for endpoint in self._endpoints:
            if endpoint.life != Life():
                env.process(self._live(endpoint, to_ps(detection_s)))
        self._informed = router if isinstance(router, Informed) else None
        self._told = router if isinstance(router, Answered) else None
        if self._informed is not None:
            self._informed.connect(self._endpoints)

    def send(self, job: Job) -> None:
        """The client starts on a request: its clocks run from here."""
        env, record = self.env, job.record
        now = record.sent = int(env.now)
        if job.request.abort_after_s is not None:
            env.process(self._give_up(job))
        on_wire = self._client.send(now)
        if on_wire > now:
            after(env, on_wire - now, lambda: self._route(job))
        else:
            self._route(job)

    def _route(self, job: Job) -> None:
        """The request reaches the router."""
        if job.record.status == "aborted":
            return
        if not self._ready:  # HTTP 503
            self._fail(job, NOT_READY)
            return
        position = self._router.pick(job.request, self._ready)
        if position is None:
            self._fail(job, _UNPICKED)
            return
        replica = self._ready[position].replica
        informed, told = self._informed, self._told
        if informed is not None:
            request, done, index = job.request, job.done, replica.index

            def ended() -> None:
                informed.ended(request, index)
                done()

            job.done = ended
        if told is not None:
            job.answered = partial(told.answered, job.request, replica.index)
        if replica.failed:
            job.record.replica = replica.index
            self._fail(job, _REFUSED)
        else:
            replica.submit(job)

    def _fail(self, job: Job, why: str) -> None:
        self.failures[why] += 1
        job.record.status = "failed"
        after(self.env, 0, job.done)  # its client may send the next at once, without end

    def _live(self, endpoint: Endpoint, detection: int) -> Generator[simpy.Event, None, None]:
        """A replica comes and goes."""
        env, life, ready = self.env, endpoint.life, self._ready
        if life.start_s:
            yield env.timeout(to_ps(life.start_s))
            ready.append(endpoint)
            ready.sort(key=lambda each: each.index)
        if life.drain_s is not None:
            yield env.timeout(to_ps(life.drain_s) - int(env.now))
            ready.remove(endpoint)
        if life.fail_s is not None:
            yield env.timeout(to_ps(life.fail_s) - int(env.now))
            lost = endpoint.replica.fail()
            if lost:
                self.failures[_LOST] += lost
            if life.drain_s is None:
                yield env.timeout(detection)
                ready.remove(endpoint)

    def _give_up(self, job: Job) -> Generator[simpy.Event, None, None]:
        assert job.request.abort_after_s is not None
        yield self.env.timeout(to_ps(job.request.abort_after_s))
        if job.record.status == "failed":
            return
        if job.record.replica is not None:
            self.replicas[job.record.replica].abort(job.request.request_id)
        else:  # still in the client's process
            job.record.status = "aborted"
            job.done()

    def run(self, stages: list[Stage]) -> Run:
        """Run all stages, one after the other, on the same servers."""
        requests = self._known_beforehand(stages)
        if requests is not None:
            table = self._run_alone(requests, stages[0].streams[0].max_concurrency or 0)
        else:
            self.env.run(until=self.env.process(self._stages(stages)))
            table = requests_frame(self.records)
        steps = np.concatenate([replica.step_rows() for replica in self.replicas])
        gaps = np.concatenate([replica.gap_rows() for replica in self.replicas])
        return Run(
            requests=table,
            steps=pd.DataFrame(steps, columns=list(STEP_COLUMNS)).astype(STEP_COLUMNS),
            itl=_pooled_gaps(gaps, self._rng),
            stages=[stage.name for stage in stages],
            meta={"stage_starts_s": self._stage_starts},
        )

    def _known_beforehand(self, stages: list[Stage]) -> list[Request] | None:
        """The requests, where each engine can run by itself: one stream, a router that does not look, and
        replicas there all the time, of which there is one if requests wait for others or for the client."""
        if len(stages) != 1 or len(stages[0].streams) != 1:
            return None
        stream, router = stages[0].streams[0], self._router
        if stream.background or stream.until_s is not None or not stream.requests:
            return None
        static = (
            isinstance(router, RoundRobin | Random)
            and stream.max_concurrency is None
            and self._client.is_free
        )
        if len(self.replicas) > 1 and not static:
            return None
        if isinstance(router, Informed | Answered) or any(each.life != Life() for each in self._endpoints):
            return None
        if not all(replica.can_run_alone for replica in self.replicas):
            return None
        last = 0.0
        for request in stream.requests:
            if request.abort_after_s is not None or request.arrival_s < last:
                return None
            last = request.arrival_s
        return stream.requests

    def _run_alone(self, requests: list[Request], limit: int) -> pd.DataFrame:
        """Each engine by itself, on what the router sends to it."""
        self._stage_starts.append(0.0)
        arrival = np.rint(np.array([r.arrival_s for r in requests]) * PICOSECONDS).astype(np.int64)
        count = len(requests)
        places = np.zeros(count, np.int64)
        if len(self.replicas) > 1:
            places = np.array([self._router.pick(request, self._endpoints) for request in requests])
        columns = {name: np.empty(count, np.int64) for name in OUTCOMES}
        outputs = np.array([request.output_tokens for request in requests])
        prompts = np.array([request.prompt_tokens for request in requests])
        for place, replica in enumerate(self.replicas):
            own = np.flatnonzero(places == place)
            if not len(own):
                continue
            found = replica.run_alone(arrival[own], [requests[i] for i in own.tolist()], limit)
            for name, values in found.items():
                columns[name][own] = values
            outputs[own] = np.minimum(outputs[own], replica.config.max_model_len - prompts[own])
        columns |= {"arrival": arrival, "replica": places, "output_tokens": outputs}
        return finished_frame(requests, columns)

    def _stages(self, stages: list[Stage]) -> Generator[simpy.Event, None, None]:
        running: list[StreamClient] = []
        for number, stage in enumerate(stages):
            self._stage_starts.append(to_seconds(int(self.env.now)))
            for replica in self.replicas:
                replica.set_stage(number)
            clients = [StreamClient(self, stream, number, i) for i, stream in enumerate(stage.streams)]
            running += clients
            if not stage.drain and stage.duration_s is not None:
                self.env.process(self._end_background(clients))
                yield self.env.timeout(to_ps(stage.duration_s))
            else:
                start = int(self.env.now)
                yield self.env.process(self._end_background(clients))
                if stage.end_s is not None:
                    done = int(self.env.now)
                    noticed = start + to_ps(stage.end_s(to_seconds(done - start)))
                    yield self.env.timeout(max(0, noticed - done))
        yield self.env.all_of([c.finished for c in running if not c.stream.background])

    def _end_background(self, clients: list[StreamClient]) -> Generator[simpy.Event, None, None]:
        """A stage's background streams stop when its foreground is done."""
        yield self.env.all_of([c.finished for c in clients if not c.stream.background])
        for client in clients:
            if client.stream.background:
                client.stop()


_ORDERS = 4  # draws a row for the place of a stream in its batch


def _pooled_gaps(rows: NDArray[np.float64], rng: np.random.Generator) -> pd.DataFrame:
    """Rows (stage, gap, tokens, spread) to the table of inter-token gaps.

    The tokens of a step are read over ``spread`` seconds, in an order that changes from step to step: a
    stream's gap differs from the gap of the batches by the difference of two places in it, each uniform.
    """
    if rows[:, 3].any():
        orders = rng.random((2, _ORDERS, len(rows)))
        gaps = np.maximum(rows[:, 1] + (orders[0] - orders[1]) * rows[:, 3], 0.0)
        rows = np.column_stack((np.tile(rows[:, 0], _ORDERS), gaps.ravel(), np.tile(rows[:, 2], _ORDERS)))
        rows[:, 2] /= _ORDERS
    frame = pd.DataFrame(rows[:, :3], columns=["stage", "gap", "weight"])
    return frame.astype({"stage": "int64"})
