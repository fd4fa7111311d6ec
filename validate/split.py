"""Routing judged on real engines: traffic split beforehand as a simulated router splits it, sent to replicas.

The engines are real, the router is not: which replica takes a request is what the simulator decided. So it is
the prefix caches and queues behind a split that are judged, and which router serves a workload better.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from servecast.calibrate.measure.bench_serve import run_bench
from servecast.sim.deployment import Deployment
from servecast.sim.errors import InputError
from servecast.sim.metrics import statistic
from servecast.sim.records import Run
from servecast.sim.scenario import Scenario
from servecast.sim.simulate import simulate
from servecast.sim.trace_writers import from_requests, write_timed_trace
from servecast.sim.traces import Trace, TraceSpec
from servecast.sim.whole_file import write_whole
from servecast.sim.workload import build, with_request_rate
from servecast.sim.workload_spec import StageSpec, StreamSpec, Workload
from servecast.validate.live_plan import BLOCK_TOKENS
from servecast.validate.live_server import OwnServer, Target, started, warm_up
from servecast.validate.readers import read
from servecast.validate.telemetry import get, parse_metrics

BETTER = {"prefix_hit_rate": max, "mean_ttft_ms": min, "p95_ttft_ms": min, "mean_tpot_ms": min}


@dataclass(slots=True)
class Split:
    """Predicts and measures one workload under several routers.

    Args:
        scenario: with its replicas, all alike. server: how to start one of them.
        routers: names of routing policies. out: folder for everything.
        request_rate: requests/s over all replicas. num_requests: of the traffic.

    Attributes:
        found: router -> requests of each replica, the prediction's hash, and figures "predicted" and
            "measured".
    """

    scenario: Scenario
    server: OwnServer
    routers: Sequence[str]
    out: Path
    request_rate: float
    num_requests: int
    seed: int = 0
    python: str = sys.executable
    say: Callable[[str], None] = lambda _text: None
    found: dict[str, dict[str, Any]] = field(default_factory=dict)

    def run(self) -> None:
        """Start the replicas, predict all routers, then send each one's split.

        Raises:
            InputError: the replicas are not alike, or one does not start.
            MeasureError: a load generator fails.
        """
        if self.scenario.fleet.size < 2 or any(
            not spec.as_in_scenario or spec.life.drain_s or spec.life.fail_s
            for spec in self.scenario.fleet.specs
        ):
            raise InputError(
                "a split needs several replicas that are alike",
                where=f"{self.scenario.source}: fleet.replicas",
                fix="Give a number from 2.",
            )
        self.out.mkdir(parents=True, exist_ok=True)
        trace = self._trace()
        deployment = Deployment.of(self.scenario)
        splits = {router: self._predict(router, trace, deployment) for router in self.routers}
        with ExitStack() as stack:
            targets = []
            for number in range(self.scenario.fleet.size):  # in turn: each takes its share of what is free
                self.say(f"starting replica {number}")
                logs = self.out.absolute() / f"replica-{number}"
                logs.mkdir(exist_ok=True)
                server = started(self.server, self.scenario.engine, {}, logs)
                targets.append(stack.enter_context(server).target)
            for target in targets:
                warm_up(target)
            for router, split in splits.items():
                self.say(f"sending what {router} gives each replica")
                self.found[router]["measured"] = self._measure(router, split, targets)

    def _trace(self) -> Trace:
        """The traffic: the scenario's open-loop workload at the rate."""
        workload = with_request_rate(
            self.scenario.open_loop(), self.request_rate, num_requests=self.num_requests
        )
        arrivals, lengths, content = np.random.default_rng(self.seed).spawn(3)
        stages = build(workload, arrivals=arrivals, lengths=lengths, content=content)
        requests = [request for stream in stages[0].streams for request in stream.requests]
        requests.sort(key=lambda request: request.arrival_s)
        trace = from_requests(requests, block_tokens=BLOCK_TOKENS)
        write_timed_trace(trace, self.out / "trace.jsonl")
        return trace

    def _predict(self, router: str, trace: Trace, deployment: Deployment) -> list[Trace]:
        """Simulate the fleet behind a router, write the prediction down, and return each replica's part."""
        spec = TraceSpec(format="timed_trace", path=self.out / "trace.jsonl", block_tokens=BLOCK_TOKENS)
        workload = Workload(stages=(StageSpec(streams=(StreamSpec(trace=spec),)),))
        scenario = self.scenario.changed({"fleet.router": router})
        run = simulate(scenario, seed=self.seed, workload=workload, deployment=deployment)
        requests = run.requests.sort_values("request_id")
        hit_rate = float(requests["cached_tokens"].sum() / requests["prompt_tokens"].sum())
        predicted = _figures(run, hit_rate)
        replica = requests["replica"].to_numpy()
        parts = [trace.take(replica == number) for number in range(self.scenario.fleet.size)]
        row = {"requests": [len(part) for part in parts], "predicted": predicted}
        path = self.out / router / "prediction.json"
        write_whole(path, lambda part: part.write_text(json.dumps(row | {"replica": replica.tolist()})))
        self.found[router] = row | {"prediction_sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        return parts

    def _measure(self, router: str, parts: Sequence[Trace], targets: Sequence[Target]) -> dict[str, float]:
        seed = int(time.time()) % (1 << 32)  # prompts that no replica has seen
        before = [_counters(target) for target in targets]

        def drive(number: int) -> Run:
            folder, target = self.out / router, targets[number]
            file = folder / f"trace-{number}.jsonl"
            write_timed_trace(parts[number], file)
            result = folder / f"replica-{number}" / "bench.json"
            result.parent.mkdir(exist_ok=True)
            run_bench(
                target.base_url,
                target.model,
                target.tokenizer,
                file,
                result,
                python=self.python,
                hash_seed=seed,
            )
            return read(result).run

        used = [number for number, part in enumerate(parts) if len(part)]
        with ThreadPoolExecutor(len(used)) as pool:
            runs = list(pool.map(drive, used))
        grown = [
            (after[0] - known[0], after[1] - known[1])
            for known, after in zip(before, map(_counters, targets), strict=True)
        ]
        queries, hits = (sum(each) for each in zip(*grown, strict=True))
        pooled = Run(pd.concat([run.requests for run in runs]), runs[0].steps, runs[0].itl, runs[0].stages)
        return _figures(pooled, hits / queries if queries else float("nan"))

    def ranking(self) -> dict[str, dict[str, str]]:
        """Figure -> the router that is best at it, "predicted" and "measured"."""
        return {
            figure: {
                kind: best(self.found, key=lambda router: self.found[router][kind][figure])
                for kind in ("predicted", "measured")
            }
            for figure, best in BETTER.items()
        }


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
