"""The engine and the fleet as textbook queues: waits, percentiles and conservation laws.

With ``max_num_seqs=1``, one prompt token and one output token, a request is one engine step, so a replica is
a single first-come-first-served server whose service time is the step time. Every statistic is compared
with its closed form (Kleinrock, Queueing Systems I, 1975; Cooper, Introduction to Queueing Theory, 1981)
by a 99 % t-interval over independent replications.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

import numpy as np
import pandas as pd
import pytest

from servecast.sim.engine.config import EngineConfig
from servecast.sim.engine.request import Request, Stage, Stream
from servecast.sim.engine.scheduler import Scheduler
from servecast.sim.fleet.client import Client
from servecast.sim.fleet.fleet import Fleet
from servecast.sim.fleet.replica import Replica
from servecast.sim.hardware.front_end_costs import FrontEndCosts
from servecast.sim.hardware.step_time.physical import Binding, StepShape
from servecast.sim.metrics.confidence import Interval, t_interval
from servecast.sim.metrics.metrics import latencies, percentiles
from servecast.sim.metrics.records import Run
from servecast.sim.metrics.warmup import Warmup, select
from servecast.sim.routing.routers import LeastOutstanding
from servecast.sim.traffic.sessions import SessionRequest, SessionStream

SERVICE_S = 0.1
Noise = Callable[[np.random.Generator], Iterator[float]]


class TokenTime:
    """A step takes a fixed time a token: work is neither lost nor gained by batching."""

    def seconds(self, step: StepShape) -> float:
        return SERVICE_S * (sum(tokens for tokens, _ in step.chunks) + step.decodes)

    def roofline_seconds(self, step: StepShape) -> float:
        return 0.0

    def breakdown(self, step: StepShape) -> dict[str, float]:
        return {"linear": self.seconds(step)}

    def binding(self, step: StepShape) -> Binding:
        return "compute"


def constant(_: np.random.Generator) -> Iterator[float]:
    return itertools.repeat(1.0)


def exponential(rng: np.random.Generator) -> Iterator[float]:
    while True:
        yield from rng.exponential(size=1024).tolist()


def serve(
    requests: list[Request],
    rng: np.random.Generator,
    *,
    noise: Noise = constant,
    servers: int = 1,
    max_concurrency: int | None = None,
    max_num_seqs: int = 1,
    max_num_batched_tokens: int = 512,
) -> Run:
    """Runs requests through replicas without front-end costs, on a synchronous engine."""
    stages = [Stage("main", [Stream("poisson", requests, max_concurrency)])]
    sizes = {"max_num_seqs": max_num_seqs, "max_num_batched_tokens": max_num_batched_tokens}
    return serve_stages(stages, rng, noise=noise, servers=servers, **sizes)


def serve_stages(
    stages: list[Stage],
    rng: np.random.Generator,
    *,
    noise: Noise = constant,
    servers: int = 1,
    step_time: TokenTime | None = None,
    max_num_seqs: int = 1,
    max_num_batched_tokens: int = 512,
) -> Run:
    """The same with clients of any kind."""
    config = EngineConfig(
        version="0.32",
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_model_len=512,
        num_gpu_blocks=4096,
        enable_prefix_caching=False,
        async_scheduling=False,
    )
    free = FrontEndCosts()

    def make_replica(index: int, client: Client) -> Replica:
        draws = noise(rng.spawn(1)[0])
        law = step_time or TokenTime()
        return Replica(index, Scheduler(config), law, draws, free, rng, client)

    return Fleet(make_replica, servers, LeastOutstanding(), Client(free), rng).run(stages)


def poisson(
    rate: float, count: int, rng: np.random.Generator, prompts: list[int] | None = None
) -> list[Request]:
    """Requests of one output token that arrive at random. prompts: their lengths, 1 unless given."""
    arrivals = np.cumsum(rng.exponential(1 / rate, count)).tolist()
    lengths = prompts or [1] * count
    return [
        Request(i, at, length, 1, 1) for i, (at, length) in enumerate(zip(arrivals, lengths, strict=True))
    ]


Statistic = Callable[[pd.DataFrame], float]


def replicated(
    *statistics: Statistic,
    rate: float,
    noise: Noise = constant,
    servers: int = 1,
    max_concurrency: int | None = None,
    lengths: Callable[[np.random.Generator, int], list[int]] | None = None,
    count: int = 2500,
    replications: int = 12,
) -> list[Interval]:
    """Statistics of the request table after the first fifth, over replications."""
    values = []
    for seed in range(replications):
        rng = np.random.default_rng(seed)
        requests = poisson(rate, count, rng, lengths(rng, count) if lengths else None)
        run = serve(requests, rng, noise=noise, servers=servers, max_concurrency=max_concurrency)
        table = select(run, warmup=Warmup(share=0.2)).requests
        values.append([statistic(table) for statistic in statistics])
    return [t_interval(column, 0.99) for column in zip(*values, strict=True)]


def mean_wait(requests: pd.DataFrame) -> float:
    """Mean time from arrival to the first step."""
    return float((requests["scheduled"] - requests["arrival"]).mean())


def holds(interval: Interval, theory: float, *, within: float) -> None:
    """The interval covers the theory, and is narrow enough to mean something."""
    assert interval.low <= theory <= interval.high
    assert interval.high - interval.low < 2 * within * theory


def at_once(requests: pd.DataFrame) -> float:
    """Share of requests whose first step begins when they arrive."""
    return float((requests["scheduled"] - requests["arrival"] < 1e-9).mean())


@pytest.mark.parametrize("load", [0.3, 0.7])
def test_md1_wait(load: float) -> None:
    """Deterministic service s: W = load s / (2 (1 - load))."""
    (wait,) = replicated(mean_wait, rate=load / SERVICE_S)
    holds(wait, load * SERVICE_S / (2 * (1 - load)), within=0.12)


def test_mm1_wait_and_percentile_of_time_in_system() -> None:
    """Exponential service: W = load s / (1 - load), and time in system is exponential with mean
    s / (1 - load), so its p95 is ln 20 times that. An arrival finds the server free with 1 - load."""
    load = 0.6
    wait, p95, free = replicated(
        mean_wait,
        lambda requests: percentiles(latencies(requests)["e2el"], [95])[0],
        at_once,
        rate=load / SERVICE_S,
        noise=exponential,
    )
    holds(wait, load * SERVICE_S / (1 - load), within=0.2)
    holds(p95, math.log(20) * SERVICE_S / (1 - load), within=0.2)
    holds(free, 1 - load, within=0.1)


def test_mg1_wait_depends_on_the_second_moment() -> None:
    """Pollaczek-Khinchine: W = rate E[S^2] / (2 (1 - load)). Prompts of 1 token with 90 % and of 11 with
    10 % make E[S] = 2 s and E[S^2] = 13 s^2; at load 0.5, W = 0.25 * 13 s^2 / s / 1 = 3.25 s."""

    def lengths(rng: np.random.Generator, count: int) -> list[int]:
        return [1 if draw < 0.9 else 11 for draw in rng.random(count).tolist()]

    (wait,) = replicated(mean_wait, rate=0.25 / SERVICE_S, lengths=lengths)
    holds(wait, 3.25 * SERVICE_S, within=0.2)


def erlang_c(servers: int, offered: float) -> float:
    """Probability that an arrival waits in M/M/c, by Erlang B's recursion."""
    blocked = 1.0
    for n in range(1, servers + 1):
        blocked = offered * blocked / (n + offered * blocked)
    return blocked / (1 - offered / servers * (1 - blocked))


def test_erlang_c() -> None:
    """The textbook's M/M/2 at load 0.5: 1/3 wait (2 rho^2 / (1 + rho))."""
    assert erlang_c(2, 1.0) == pytest.approx(1 / 3)
    assert erlang_c(1, 0.7) == pytest.approx(0.7)


@pytest.mark.parametrize("servers", [2, 5])
def test_a_semaphore_before_the_least_loaded_of_c_replicas_is_mmc(servers: int) -> None:
    """``max_concurrency`` as large as the fleet is one central queue: a share C waits (Erlang C), on
    average C s / (c (1 - load)) over all."""
    load = 0.8
    at_once_share, mean = replicated(
        at_once,
        mean_wait,
        rate=load * servers / SERVICE_S,
        noise=exponential,
        servers=servers,
        max_concurrency=servers,
    )
    share = erlang_c(servers, load * servers)
    holds(at_once_share, 1 - share, within=0.2)
    holds(mean, share * SERVICE_S / (servers * (1 - load)), within=0.4)


def batch_traffic(seed: int, count: int = 400) -> list[Request]:
    """Requests of 1 to 200 prompt tokens and one output token at about 80 % load."""
    rng = np.random.default_rng(seed)
    prompts = rng.integers(1, 201, count).tolist()
    return poisson(0.8 / (100.5 * SERVICE_S), count, rng, prompts)


def idle_periods(run: Run) -> list[tuple[float, float]]:
    """(from, to) of the times when no step ran, in nanoseconds rounded."""
    start = run.steps["start"].to_numpy()
    end = start + run.steps["duration"].to_numpy()
    gap = start[1:] - end[:-1] > 1e-9
    return [(round(a, 6), round(b, 6)) for a, b in zip(end[:-1][gap], start[1:][gap], strict=True)]


@pytest.mark.parametrize("seed", range(3))
def test_work_is_conserved_whatever_the_batching(seed: int) -> None:
    """Where time is per token, chunking and batching move work around but neither add nor lose it: the
    server is idle at the same times, and busy for the sum of all tokens."""
    requests = batch_traffic(seed)
    shapes = [(1, 512), (16, 512), (16, 64), (256, 16)]
    runs = [
        serve(
            requests,
            np.random.default_rng(0),
            max_num_seqs=min(seqs, budget),
            max_num_batched_tokens=budget,
        )
        for seqs, budget in shapes
    ]
    periods = [idle_periods(run) for run in runs]
    assert len(periods[0]) > 20
    assert all(found == periods[0] for found in periods[1:])
    work = SERVICE_S * sum(request.prompt_tokens for request in requests)
    assert [run.steps["duration"].sum() for run in runs] == pytest.approx([work] * len(runs))


def test_littles_law_ties_the_step_table_to_the_request_table() -> None:
    """The area under "running" is the time that requests spent running: two tables, one number."""
    rng = np.random.default_rng(5)
    requests = [
        Request(i, at, int(prompt), int(output), int(output))
        for i, (at, prompt, output) in enumerate(
            zip(
                np.cumsum(rng.exponential(8.0, 300)).tolist(),
                rng.integers(1, 100, 300),
                rng.integers(1, 60, 300),
                strict=True,
            )
        )
    ]
    run = serve(requests, rng, max_num_seqs=32, max_num_batched_tokens=64)
    assert run.requests["preemptions"].sum() == 0
    area = float((run.steps["running"] * run.steps["duration"]).sum())
    assert run.steps["running"].max() > 8
    assert area == pytest.approx(float((run.requests["finish"] - run.requests["scheduled"]).sum()), rel=1e-6)


def test_littles_law_in_a_closed_loop() -> None:
    """Concurrency = throughput times time in system, but for the first and last few of 2,000 requests."""
    requests = [Request(i, 0.0, 20, 10, 10) for i in range(2000)]
    run = serve(requests, np.random.default_rng(0), max_concurrency=8, max_num_seqs=4)
    throughput = len(requests) / float(run.requests["finish"].max())
    assert throughput * float(latencies(run.requests)["e2el"].mean()) == pytest.approx(8, rel=0.01)


class StepTime(TokenTime):
    """A step takes a fixed time, whatever is in it."""

    def seconds(self, step: StepShape) -> float:
        return SERVICE_S


def sessions(users: int, turns: int, think_s: float, rng: np.random.Generator) -> list[Request]:
    """Users who think for an exponential time after each answer of one token."""
    thinks = rng.exponential(think_s, (turns, users)).tolist()
    return [
        SessionRequest(
            turn * users + user, 0.0, 1 + turn, 1, 1, group=user, delay_s=thinks[turn][user], turn=turn + 1,
            after=(turn * users + user - users,) if turn else (),
        )
        for turn in range(turns)
        for user in range(users)
    ]  # fmt: skip


def machine_repair(users: int, servers: int, think_s: float) -> tuple[float, float]:
    """Throughput and mean response of M/M/c//N (Kleinrock 1975, 3.9): births (N - n) / Z, deaths min(n, c) /
    S."""
    weights = [1.0]
    for n in range(1, users + 1):
        weights.append(weights[-1] * (users - n + 1) / think_s * SERVICE_S / min(n, servers))
    rate = sum(w * min(n, servers) for n, w in enumerate(weights)) / sum(weights) / SERVICE_S
    return rate, users / rate - think_s


@pytest.mark.parametrize(("users", "servers"), [(4, 1), (8, 2)])
def test_closed_sessions_are_a_machine_repair_model(users: int, servers: int) -> None:
    """As many replicas of one slot as repairmen, and a queue for all of them: at most c requests in flight.
    And Little's law of the loop: users = throughput x (response + think time)."""
    think_s, turns, found = 0.4, 400, []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        stream = SessionStream("users", sessions(users, turns, think_s, rng), max_concurrency=servers)
        requests = serve_stages(
            [Stage("main", [stream])], rng, noise=exponential, servers=servers, step_time=StepTime()
        ).requests
        end = float(requests.groupby("group")["arrival"].max().min())  # from here on some user has gone
        in_loop = requests[(requests["arrival"] > 10) & (requests["finish"] < end)]
        rate = len(in_loop) / (end - 10)
        response = float((in_loop["finish"] - in_loop["arrival"]).mean())
        thinks = in_loop.sort_values("arrival").groupby("group")
        gaps = (thinks["arrival"].shift(-1) - in_loop["finish"]).dropna()
        found.append((rate, response, rate * (response + float(gaps.mean()))))
    rates, responses, loops = (t_interval(column, 0.99) for column in zip(*found, strict=True))
    rate, response = machine_repair(users, servers, think_s)
    holds(rates, rate, within=0.03)
    holds(responses, response, within=0.08)
    assert loops.estimate == pytest.approx(users, rel=0.01)
