"""Routing judged on real engines: traffic split beforehand as a simulated router splits it, sent to replicas.

The engines are real, the router is not: which replica takes a request is what the simulator decided. So it is
the prefix caches and queues behind a split that are judged, and which router serves a workload better.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil

from servecast.calibrate.measure.vllm.bench_serve import run_bench
from servecast.sim.inputs.errors import InputError
from servecast.sim.inputs.files import write_whole
from servecast.sim.metrics.metrics import duration, statistic
from servecast.sim.metrics.records import Run
from servecast.sim.run.simulate import simulate
from servecast.sim.scenario.deployment import Deployment
from servecast.sim.scenario.scenario import Scenario
from servecast.sim.traffic.draw import draw, replayed, with_request_rate
from servecast.sim.traffic.trace_writers import from_requests, write_timed_trace
from servecast.sim.traffic.traces import Trace
from servecast.validate.compare.load import ClientLag
from servecast.validate.compare.tolerances import Tolerances
from servecast.validate.compare.verdict import State, Verdict, verdict_of
from servecast.validate.live.drive import BENCH_START_S, SLOWER, file_sha256
from servecast.validate.live.own_server import OwnServer, started
from servecast.validate.live.target import Target, warm_up
from servecast.validate.live.telemetry import get, parse_metrics
from servecast.validate.readers import read

BETTER = {"prefix_hit_rate": max, "mean_ttft_ms": min, "p95_ttft_ms": min, "mean_tpot_ms": min}
AGREE = 0.02  # of prompt tokens found cached: as far as two shares may lie apart and be the same


@dataclass(slots=True)
class Split:
    """Predicts and measures one workload under several routers.

    Args:
        scenario: with its replicas, all alike. server: how to start one of them, or where all of them are.
        routers: names of routing policies. out: folder for everything.
        request_rate: requests/s over all replicas. num_requests: of the traffic.
        limits: which share of failed requests and which lag of the client leave a measurement worth it.
        after_router: called when a router's split was measured, to keep what is done.

    Attributes:
        found: router -> requests of each replica, the prediction's hash, and figures "predicted" and
            "measured", with "problems": why the latter say nothing.
        stopped: why it ended before its end. finished: whether it came to that.
    """

    scenario: Scenario
    server: OwnServer | Sequence[Target]
    routers: Sequence[str]
    out: Path
    request_rate: float
    num_requests: int
    seed: int = 0
    python: str = sys.executable
    limits: Tolerances = field(default_factory=Tolerances.load)
    say: Callable[[str], None] = lambda _text: None
    after_router: Callable[[Split], object] = lambda _split: None
    found: dict[str, dict[str, Any]] = field(default_factory=dict)
    stopped: str | None = None
    finished: bool = False

    def run(self) -> None:
        """Start the replicas, predict all routers, then send each one's split. Ctrl-C, or an error after the
        first router, ends it with what is done.

        Raises:
            InputError: an argument cannot be, the replicas are not alike, cache no prefixes, one does not
                start, or a load generator fails.
        """
        self._refuse()
        self.out.mkdir(parents=True, exist_ok=True)
        requests = self._requests()
        write_timed_trace(requests, self.out / "trace.jsonl")
        deployment = Deployment.of(self.scenario)
        splits = {router: self._predict(router, requests, deployment) for router in self.routers}
        try:
            with self._replicas() as targets:
                for target in targets:
                    warm_up(target)
                for router, (parts, seconds) in splits.items():
                    self.say(f"sending what {router} gives each replica")
                    self.found[router] |= self._measure(router, parts, seconds, targets)
                    self.after_router(self)
        except KeyboardInterrupt:
            self.stopped = "stopped by hand"
        except (InputError, OSError) as error:
            if not self.measured:
                raise
            self.stopped = f"not all routers were measured: {error}"
        self.finished = self.stopped is None

    @property
    def measured(self) -> dict[str, dict[str, Any]]:
        """What was found of the routers that were measured."""
        return {router: row for router, row in self.found.items() if "measured" in row}

    def _refuse(self) -> None:
        if len(set(self.routers)) < 2:
            fix = "Give two or more, separated by commas."
            raise InputError(f"{','.join(self.routers)!r}", where="--routers", fix=fix)
        if not 0 < self.request_rate < float("inf"):
            raise InputError(f"{self.request_rate:g}", where="--request-rate", fix="Give requests/s above 0.")
        if self.num_requests < 1:
            raise InputError(f"{self.num_requests} requests", where="--num-requests", fix="Give at least 1.")
        fleet = self.scenario.fleet
        here = fleet.size if isinstance(self.server, OwnServer) else len(self.server)
        if not 2 <= fleet.size == here or any(
            not spec.as_in_scenario or spec.life.drain_s or spec.life.fail_s for spec in fleet.specs
        ):
            raise InputError(
                "a split needs several replicas that are alike",
                where=f"{self.scenario.source}: fleet.replicas",
                fix="Give a number from 2; that of the servers, where they run already.",
            )
        if not self.scenario.engine.enable_prefix_caching:
            raise InputError(
                "without a prefix cache there are no hits to judge a router by",
                where=f"{self.scenario.source}: engine.enable_prefix_caching",
                fix="Set it to true.",
            )

    @contextmanager
    def _replicas(self) -> Iterator[Sequence[Target]]:
        """Where the replicas are: our own run while the block lasts."""
        if not isinstance(self.server, OwnServer):
            yield self.server
            return
        with ExitStack() as stack:
            targets = []
            for number in range(self.scenario.fleet.size):  # in turn: each takes its share of what is free
                self.say(f"starting replica {number}")
                logs = self.out.absolute() / f"replica-{number}"
                logs.mkdir(exist_ok=True)
                server = started(self.server, self.scenario.engine, {}, logs)
                targets.append(stack.enter_context(server).target)
            yield targets

    def _requests(self) -> Trace:
        """The traffic: the scenario's open-loop workload at the rate."""
        workload = with_request_rate(
            self.scenario.open_loop(), self.request_rate, num_requests=self.num_requests
        )
        requests = [request for stream in draw(workload, self.seed)[0].streams for request in stream.requests]
        return from_requests(sorted(requests, key=lambda request: request.arrival_s))

    def _predict(self, router: str, requests: Trace, deployment: Deployment) -> tuple[list[Trace], float]:
        """Simulate the fleet behind a router, write the prediction down, and return each replica's part and
        how long all of it takes, in seconds."""
        behind = replace(deployment, scenario=self.scenario.changed({"fleet.router": router}))
        run = simulate(behind, seed=self.seed, stages=replayed(requests))
        records = run.requests.sort_values("request_id")
        hit_rate = float(records["cached_tokens"].sum() / records["prompt_tokens"].sum())
        predicted = _figures(run, hit_rate)
        replica = records["replica"].to_numpy()
        parts = [requests.take(replica == number) for number in range(self.scenario.fleet.size)]
        row = {"requests": [len(part) for part in parts], "predicted": predicted}
        path = self.out / router / "prediction.json"
        write_whole(path, lambda part: part.write_text(json.dumps(row | {"replica": replica.tolist()})))
        self.found[router] = row | {"prediction_sha256": file_sha256(path)}
        return parts, duration(run)

    def _measure(
        self, router: str, parts: Sequence[Trace], seconds: float, targets: Sequence[Target]
    ) -> dict[str, Any]:
        seed = int(time.time()) % (1 << 32)  # prompts that no replica has seen
        before = [_counters(target) for target in targets]

        def drive(number: int) -> Run:
            folder, target = self.out / router, targets[number]
            file = folder / f"trace-{number}.jsonl"
            write_timed_trace(parts[number], file)
            result = folder / f"replica-{number}" / "bench.json"
            result.parent.mkdir(exist_ok=True)
            run_bench(
                target,
                file,
                result,
                python=self.python,
                hash_seed=seed,
                timeout_s=SLOWER * seconds + 5 * BENCH_START_S,
            )
            return read(result).run

        used = [number for number, part in enumerate(parts) if len(part)]
        others = set(psutil.Process().children(recursive=True))
        with ThreadPoolExecutor(len(used)) as pool:
            driven = [pool.submit(drive, number) for number in used]
            try:
                runs = [each.result() for each in driven]
            except BaseException:  # leaving the pool would wait for the benchmarks to end by themselves
                while not all(each.done() for each in driven):
                    for child in set(psutil.Process().children(recursive=True)) - others:
                        with suppress(psutil.NoSuchProcess):
                            child.kill()
                    time.sleep(0.1)
                raise
        grown = [
            (after[0] - known[0], after[1] - known[1])
            for known, after in zip(before, map(_counters, targets), strict=True)
        ]
        queries, hits = (sum(each) for each in zip(*grown, strict=True))
        pooled = Run(pd.concat([run.requests for run in runs]), runs[0].steps, runs[0].itl, runs[0].stages)
        figures = _figures(pooled, hits / queries if queries else math.nan)
        problems = _problems(pooled, figures, self.limits)
        lags = [
            ClientLag.behind(np.sort(run.requests["sent"].to_numpy(dtype=float)), parts[number].times_s)
            for run, number in zip(runs, used, strict=True)
        ]
        if known := [lag for lag in lags if lag is not None]:
            problems += max(known, key=lambda lag: lag.p95_ms).problems(self.limits)
        return {"measured": figures, "problems": problems}

    def ranking(self) -> dict[str, dict[str, str | None]]:
        """Figure -> the router that is best at it, "predicted" and "measured", of those that were measured;
        None where that cannot be told."""
        return {
            figure: {
                kind: _best({router: row[kind][figure] for router, row in self.measured.items()}, better)
                for kind in ("predicted", "measured")
            }
            for figure, better in BETTER.items()
        }


def judge(split: Split) -> Verdict:
    """Pass where each router's prefix hit rate is the predicted one within AGREE, and the routers rank as
    predicted: two of them are in the other order if either side tells them apart by more than AGREE."""
    problems = [] if split.finished else [split.stopped or "not all routers have been measured yet"]
    problems += [f"{router}: {each}" for router, row in split.measured.items() for each in row["problems"]]
    hits = {
        router: (row["predicted"]["prefix_hit_rate"], row["measured"]["prefix_hit_rate"])
        for router, row in split.measured.items()
    }
    states: list[tuple[State, str]] = []
    for router, (predicted, measured) in hits.items():
        text = (
            f"{router}: prefix hits predicted {predicted:.1%}, measured {measured:.1%} ({AGREE:.1%} allowed)"
        )
        states.append(("pass" if abs(predicted - measured) <= AGREE else "fail", text))
    for one, other in combinations(hits, 2):
        predicted, measured = (a - b for a, b in zip(hits[one], hits[other], strict=True))
        same = predicted * measured > 0 or max(abs(predicted), abs(measured)) <= AGREE
        text = f"prefix hits, {one} less {other}: predicted {predicted:+.1%}, measured {measured:+.1%}"
        states.append(("pass" if same else "fail", text))
    return verdict_of(states, problems)


def document(split: Split, verdict: Verdict) -> dict[str, Any]:
    """What is kept of a split."""
    return {
        "schema_version": 1,
        "kind": "split",
        "finished": split.finished,
        "verdict": verdict.state,
        "reasons": list(verdict.reasons),
        "scenario": split.scenario.name,
        "what_if": split.scenario.changes,
        "replicas": split.scenario.fleet.size,
        "request_rate": split.request_rate,
        "num_requests": split.num_requests,
        "hit_rate_tolerance": AGREE,
        "routers": split.found,
        "best": split.ranking(),
    }


def _problems(run: Run, figures: Mapping[str, float], limits: Tolerances) -> list[str]:
    """Why a measurement says nothing."""
    found = []
    if math.isnan(figures["prefix_hit_rate"]):
        found.append("the replicas counted no look-ups in a prefix cache: is it off?")
    failed = int((run.requests["status"] != "finished").sum())
    if failed > limits.max_failed_share * len(run.requests):
        found.append(f"{failed} of {len(run.requests)} requests failed")
    return found


def _best(values: Mapping[str, float], better: Callable[..., str]) -> str | None:
    if not values or any(math.isnan(value) for value in values.values()):
        return None
    return better(values, key=values.__getitem__)


def _figures(run: Run, hit_rate: float) -> dict[str, float]:
    return {
        "prefix_hit_rate": hit_rate,
        "mean_ttft_ms": 1e3 * statistic(run, "ttft", "mean"),
        "p95_ttft_ms": 1e3 * statistic(run, "ttft", "p95"),
        "mean_tpot_ms": 1e3 * statistic(run, "tpot", "mean"),
    }


def _counters(target: Target) -> tuple[float, float]:
    """Prompt tokens that a replica looked up in its prefix cache so far, and that it found."""
    try:
        found: Mapping[str, float] = parse_metrics(get(f"{target.engine}/metrics"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"does not answer ({error})", where=f"{target.engine}/metrics", fix="Look at the replica's log."
        ) from None
    return found["prefix_queries"], found["prefix_hits"]
