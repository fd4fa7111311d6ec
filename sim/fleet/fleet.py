"""Clients, router and replicas in simulated time: runs the stages of a workload to the end."""

from __future__ import annotations

import gc
import math
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pandas as pd
import simpy
from numpy.typing import NDArray

from servecast.sim.engine.engine_loop import OUTCOMES
from servecast.sim.engine.request import Requests, Stage
from servecast.sim.fleet.autoscaler import AutoscalerSpec
from servecast.sim.fleet.client import Client
from servecast.sim.fleet.endpoint import Board, Endpoint, Endpoints
from servecast.sim.fleet.flow import NOT_READY, Flow
from servecast.sim.fleet.legs import Disaggregation, Legs
from servecast.sim.fleet.replica import Replica
from servecast.sim.fleet.scaling import Scaling
from servecast.sim.fleet.session_client import SessionClient
from servecast.sim.fleet.spec import Life
from servecast.sim.inputs.errors import InputError
from servecast.sim.inputs.units import to_ps, to_seconds
from servecast.sim.metrics.records import STATUSES, STEP_COLUMNS, Run, requests_table, steps_table
from servecast.sim.routing.backends import Backend
from servecast.sim.routing.options import RouterOptions
from servecast.sim.routing.pools import Splitting
from servecast.sim.routing.routers import Informed, Random, RoundRobin, Router
from servecast.sim.traffic.sessions import SessionStream

__all__ = ["NOT_READY", "Fleet"]
_LOST = "in flight on a replica that failed"
_NEVER = 1 << 62
_MOST_REPLICAS = 10_000  # that an autoscaler may start
Columns = dict[str, Any]


class Fleet:
    """Replicas behind a router, and the clients that drive them.

    Requests go their way in a `Flow`; SimPy has what happens now and then: stages, timers, the life of
    replicas.

    Args:
        make_replica: called with (index, client) for each replica.
        replicas: how many, >= 1, or when each is there; those of the beginning, where an autoscaler decides.
        router: routing policy.
        client: the process that sends and reads. rng: for the order in which it reads.
        options: how late the router knows things. routing: for when it scrapes; without, rng.
        detection_s: for so long the router still sends requests to a replica that has failed.
        autoscaler: what lets replicas come and go.
        disaggregation: where some of them prefill and others decode; ``router`` is then its own.
    """

    def __init__(
        self,
        make_replica: Callable[[int, Client], Replica],
        replicas: int | Sequence[Life],
        router: Router | Splitting,
        client: Client,
        rng: np.random.Generator,
        *,
        options: RouterOptions | None = None,
        routing: np.random.Generator | None = None,
        detection_s: float = 0.0,
        autoscaler: AutoscalerSpec | None = None,
        disaggregation: Disaggregation | None = None,
    ) -> None:
        self._env = simpy.Environment()
        self._rng, self._client, self._router = rng, client, router
        self._disaggregation = disaggregation
        self._legs: Legs | None = None
        self._detection = to_ps(detection_s)
        self.failures: Counter[str] = Counter()  # why requests failed
        self.unsent = 0  # requests whose session had failed
        self.ran_out = False  # whether a stream that sends until a time had too few requests for it
        self._flow: Flow | None = None
        self._finished: list[simpy.Event] = []  # by stream
        self._stage_starts: list[float] = []
        self._autoscaler, self._make_replica = autoscaler, make_replica
        self.scaling: Scaling | None = None
        self._condensed_s: float | None = None
        self._condensed: list[dict[str, float]] = []
        self._options, self._routing = options or RouterOptions(), routing or rng
        lives = [Life()] * replicas if isinstance(replicas, int) else replicas
        self._board = Board(len(lives) if autoscaler is None else _MOST_REPLICAS, lambda: self.now)
        self.replicas: list[Replica] = []
        self._endpoints: list[Endpoint] = []
        for life in lives:
            self._endpoint(life)
        ready = [endpoint for endpoint in self._endpoints if not endpoint.life.start_s]
        self._ready = Endpoints(self._endpoints, ready, self._board)
        if isinstance(router, Informed):
            router.connect(Endpoints(self._endpoints, self._endpoints, self._board))

    def _endpoint(self, life: Life) -> Endpoint:
        """Of one more replica."""
        self.replicas.append(self._make_replica(len(self.replicas), self._client))
        self._endpoints.append(Endpoint(self.replicas[-1], life, self._options, self._routing, self._board))
        return self._endpoints[-1]

    def _started(self) -> Endpoint:
        """A replica starts while the others run."""
        if len(self.replicas) == _MOST_REPLICAS:
            raise InputError(
                f"the autoscaler started {_MOST_REPLICAS:,} replicas",
                where="fleet.autoscaler",
                fix="Let it decide more slowly, or simulate a part of the day.",
            )
        endpoint = self._endpoint(Life(start_s=to_seconds(self.now)))
        assert self._flow is not None
        self._flow.add(endpoint.replica.server)
        for loop in endpoint.replica.loops:
            loop.stage = max(len(self._stage_starts) - 1, 0)
        if isinstance(self._router, Informed):
            self._router.connect(Endpoints(self._endpoints, [endpoint], self._board))
        return endpoint

    @property
    def now(self) -> int:
        """Simulated time, picoseconds."""
        return 0 if self._flow is None else self._flow.now

    def run(self, stages: list[Stage], *, condensed_s: float | None = None) -> Run:
        """Run all stages, one after the other, on the same servers.

        Args:
            condensed_s: keep one row of the step table for each replica and so many seconds, of sums, and of
                means over time where they are gauges, and no times between tokens: those of a day do not fit
                in memory.
        """
        self._condensed_s = condensed_s
        parts = [Requests.of(stream.requests) for stage in stages for stream in stage.streams]
        requests = Requests.joined(parts)
        with _no_collections():
            if condensed_s is None and self._apart(stages, requests):
                columns = self._run_apart(requests)
            else:
                columns = self._run_together(stages, requests)
        loops = [loop for replica in self.replicas for loop in replica.loops]
        if condensed_s is not None:
            self._condense()
            steps = pd.DataFrame(self._condensed, columns=list(STEP_COLUMNS)).astype({"replica": "int64"})
        else:
            steps = steps_table(_joined([loop.step_columns for loop in loops]))
        first: Columns = {}
        if self._legs is not None and self._disaggregation is not None:
            rows, cached = columns.get("rows", slice(None)), columns["cached_tokens"]
            first = self._legs.columns(self._disaggregation.exchange, rows, cached)
        table = requests_table(requests, columns)
        table = table.assign(**first) if first else table
        ranks = [range(len(replica.loops)) for replica in self.replicas]
        if max(map(len, ranks)) > 1:
            table["rank"] = pd.arrays.IntegerArray(columns["rank"], columns["rank"] < 0)
            if condensed_s is None:
                counts = [loop.step_columns.shape[1] for loop in loops]
                steps["rank"] = np.repeat([rank for each in ranks for rank in each], counts)
        return Run(
            requests=table,
            steps=steps,
            itl=_pooled_gaps(_joined([loop.gap_columns for loop in loops]), self._rng),
            stages=[stage.name for stage in stages],
            meta={"stage_starts_s": self._stage_starts},
        )

    def _condense(self) -> None:
        """The step tables so far, as a row each."""
        for loop in (loop for replica in self.replicas for loop in replica.loops):
            steps = steps_table(loop.step_columns.copy())
            loop.drop_rows()
            if len(steps):
                seconds = steps["duration"].to_numpy()
                row = {name: float(steps[name].sum()) for name in STEP_COLUMNS}
                row |= {name: float(steps[name].iloc[0]) for name in ("replica", "start")}
                for name in ("running", "waiting", "kv_usage"):
                    row[name] = float(steps[name].to_numpy() @ seconds) / max(float(seconds.sum()), 1e-12)
                self._condensed.append(row)

    def _condense_on(self, every: int) -> Generator[simpy.Event, None, None]:
        while True:
            yield self._env.timeout(every)
            self._condense()

    def _longest(self) -> NDArray[np.int64]:
        return np.array([replica.config.max_model_len for replica in self.replicas])

    # ---- replicas that do not touch each other ----------------------------------------------------

    def _apart(self, stages: list[Stage], requests: Requests) -> bool:
        """Whether each replica can run by itself, and nobody waits for an end: one stream without a limit, a
        router that does not look, replicas that are there all the time, and a client that costs nothing where
        there are several."""
        if len(stages) != 1 or len(stages[0].streams) != 1 or not len(requests):
            return False
        stream = stages[0].streams[0]
        return (
            self._disaggregation is None
            and isinstance(self._router, RoundRobin | Random)
            and not (stream.background or stream.until_s or stream.max_concurrency)
            and not isinstance(stream, SessionStream)
            and self._autoscaler is None
            and (len(self.replicas) == 1 or not any(replica.shares for replica in self.replicas))
            and requests.abort_after_s is None
            and not any(replica.server.connected() for replica in self.replicas)
            and (self._client.is_free or len(self.replicas) == 1)
            and all(endpoint.life == Life() for endpoint in self._endpoints)
            and all(replica.config.data_parallel is None for replica in self.replicas)
            and bool((np.diff(requests.arrival_s) >= 0).all())
        )

    def _run_apart(self, requests: Requests) -> Columns:
        """Each replica by itself, on what the router sends to it."""
        self._stage_starts.append(0.0)
        count = len(requests)
        if len(self.replicas) == 1:
            return self._alone(self.replicas[0], requests)
        whole: Columns = {}
        any_request = requests[0]  # the router does not look
        assert isinstance(self._router, RoundRobin | Random)
        places = np.array([self._router.pick(any_request, self._endpoints) for _ in range(count)])
        for place, replica in enumerate(self.replicas):
            rows = np.flatnonzero(places == place)
            for name, values in self._alone(replica, requests.take(rows)).items():
                whole.setdefault(name, np.empty(count, values.dtype))[rows] = values
        return whole

    def _alone(self, replica: Replica, requests: Requests) -> Columns:
        flow = self._make_flow(requests, [self._endpoints[replica.index]], quiet=True)
        flow.open(0, len(requests), 0)
        flow.advance(_NEVER)
        flow.columns["status"][:] = STATUSES.index("finished")
        return _columns(flow, [(0, 0)], self._longest())

    def _make_flow(
        self, requests: Requests, ready: Sequence[Backend], *, quiet: bool, ordered: bool = False
    ) -> Flow:
        router, send = self._router, None if self._client.is_free else self._client.send
        split = self._disaggregation
        if split is not None:
            self._legs = Legs(requests, split.router, to_ps(split.hop_s))
        flow = Flow(
            requests,
            [replica.server for replica in self.replicas],
            ready,
            send,
            None if quiet else router,
            self._board.outstanding,
            quiet=quiet,
            ordered=ordered,
            legs=self._legs,
        )
        if split is not None and split.exchange is not None:
            split.exchange.wake = flow.wake_server
        return flow

    # ---- all together -----------------------------------------------------------------------------

    def _run_together(self, stages: list[Stage], requests: Requests) -> Columns:
        """What happens up to SimPy's next event, and that event, in turn."""
        env = self._env
        streams = [(number, i) for number, stage in enumerate(stages) for i in range(len(stage.streams))]
        ordered = len(streams) > 1 or isinstance(stages[0].streams[0], SessionStream)
        self._flow = flow = self._make_flow(requests, self._ready, quiet=False, ordered=ordered)
        for endpoint in self._endpoints:
            if endpoint.life != Life():
                env.process(self._live(flow, endpoint))
        if self._autoscaler is not None:
            self.scaling = Scaling(env, flow, self._autoscaler, self._started)
        if self._condensed_s is not None:
            env.process(self._condense_on(to_ps(self._condensed_s)))
        whole = env.process(self._stages(flow, stages))
        while not whole.processed:
            flow.advance(_NEVER if math.isinf(env.peek()) else int(env.peek()))
            for number in flow.finished:
                self._succeed(self._finished[number], flow.now)
            flow.finished = []
            env.step()
        self.failures.update(flow.failures)
        self.unsent = sum(each.sessions.unsent for each in flow.senders if each.sessions is not None)
        return _columns(flow, streams, self._longest())

    def _succeed(self, event: simpy.Event, time: int) -> None:
        event._ok, event._value = True, None
        self._env.schedule(event, delay=time - self._env.now)

    def _stages(self, flow: Flow, stages: list[Stage]) -> Generator[simpy.Event, None, None]:
        env, running, first = self._env, list[simpy.Event](), 0
        for number, stage in enumerate(stages):
            self._stage_starts.append(to_seconds(int(env.now)))
            for loop in (loop for replica in self.replicas for loop in replica.loops):
                loop.stage = number
            front, back = list[simpy.Event](), list[int]()
            for stream in stage.streams:
                self._finished.append(simpy.Event(env))
                first, here = first + len(stream.requests), first
                if isinstance(stream, SessionStream):
                    SessionClient(flow, stream, len(self._finished) - 1, here)
                else:
                    flow.open(here, first, stream.max_concurrency or 0)
                if stream.background:
                    back.append(len(self._finished) - 1)
                else:
                    front.append(self._finished[-1])
                if stream.until_s is not None:
                    env.process(self._out_of_time(flow, len(self._finished) - 1, to_ps(stream.until_s)))
            running += front
            start = int(env.now)
            ended = env.process(self._end_background(flow, front, back))
            if not stage.drain and stage.duration_s is not None:
                yield env.timeout(to_ps(stage.duration_s))
            else:
                yield ended
                if stage.end_s is not None:
                    done = int(env.now)
                    noticed = start + to_ps(stage.end_s(to_seconds(done - start)))
                    yield env.timeout(max(0, noticed - done))
        yield env.all_of(running)

    def _end_background(
        self, flow: Flow, front: list[simpy.Event], back: list[int]
    ) -> Generator[simpy.Event, None, None]:
        """A stage's background streams stop when its foreground is done."""
        yield self._env.all_of(front)
        for number in back:
            flow.stop(number)

    def _out_of_time(self, flow: Flow, number: int, after: int) -> Generator[simpy.Event, None, None]:
        """A stream stops that sends until a time. Its requests ran out if it would have sent more."""
        sender = flow.senders[number]
        until = self._env.timeout(after)
        yield until | self._finished[number]
        if sender.open:
            sessions = sender.sessions
            self.ran_out |= sender.ready == sender.started if sessions is None else sessions.all_begun
            flow.stop(number)
        else:
            self.ran_out |= not sender.stopped

    def _live(self, flow: Flow, endpoint: Endpoint) -> Generator[simpy.Event, None, None]:
        """A replica comes and goes."""
        env, life, ready = self._env, endpoint.life, self._ready
        if life.start_s:
            yield env.timeout(to_ps(life.start_s))
            ready.add(endpoint)
        if life.drain_s is not None:
            yield env.timeout(to_ps(life.drain_s) - int(env.now))
            ready.remove(endpoint)
        if life.fail_s is not None:
            yield env.timeout(to_ps(life.fail_s) - int(env.now))
            lost = flow.fail(endpoint.index)
            if self._disaggregation is not None and self._disaggregation.exchange is not None:
                self._disaggregation.exchange.fail(endpoint.index, int(env.now))
            if lost:
                self.failures[_LOST] += lost
            if life.drain_s is None:
                yield env.timeout(self._detection)
                ready.remove(endpoint)


def _columns(flow: Flow, streams: list[tuple[int, int]], longest: NDArray[np.int64]) -> Columns:
    """What became of the requests that have arrived and were not dropped unsent, in the order of arrival.

    Args:
        streams: stage and place in it of each stream. longest: sequence, of each replica.
    """
    rows: slice | NDArray[np.int64] = slice(0, flow.senders[0].ready)
    if len(streams) > 1 or flow.order:
        arrived = np.array(flow.order, np.int64)
        rows = arrived[flow.columns["outcomes"][0][arrived] >= 0]
    found: Columns = dict(zip(OUTCOMES, flow.columns["outcomes"], strict=True))
    found |= {name: flow.columns[name] for name in ("arrival", "replica", "status", "rank")}
    found = {name: values[rows] for name, values in found.items()}
    requests = flow.requests
    outputs, done = requests.output_tokens[rows], found["status"] == STATUSES.index("finished")
    fits = longest[found["replica"]] - requests.prompt_tokens[rows]
    if not (done.all() and (outputs <= fits).all()):
        outputs = np.where(done, np.minimum(outputs, fits), 0)
    found["output_tokens"] = outputs
    if not isinstance(rows, slice) or rows.stop < len(requests):
        found["rows"] = rows
    number = flow.columns["stream"][rows]
    for name, places in zip(("stage", "stream"), zip(*streams, strict=True), strict=True):
        found[name] = np.array(places, np.int64)[number] if any(places) else np.zeros(len(number), np.int64)
    return found


@contextmanager
def _no_collections() -> Iterator[None]:
    """Without Python's search for cycles among objects, of which a run makes many and no cycles."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


_ORDERS = 4  # draws a row for the place of a stream in its batch


def _joined(parts: list[NDArray[Any]]) -> NDArray[Any]:
    """The columns of all, behind each other."""
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)


def _pooled_gaps(columns: NDArray[np.float64], rng: np.random.Generator) -> pd.DataFrame:
    """Stage, gap, tokens and spread to the table of inter-token gaps.

    The tokens of a step are read over ``spread`` seconds, in an order that changes from step to step: a
    stream's gap differs from the gap of the batches by the difference of two places in it, each uniform.
    """
    stage, gap, tokens, spread = columns
    if spread.any():
        places = rng.random((_ORDERS, len(gap)))
        for place in places:  # becomes the gap
            place -= rng.random(len(gap))
            place *= spread
            place += gap
            np.maximum(place, 0.0, out=place)
        gap, tokens = places.ravel(), np.tile(tokens / _ORDERS, _ORDERS)
        stage = np.tile(stage, _ORDERS) if stage.any() else np.zeros(len(gap))
    whole = stage.astype(np.int64) if stage.any() else np.zeros(len(gap), np.int64)
    return pd.DataFrame({"stage": whole, "gap": gap, "weight": tokens}, copy=False)
