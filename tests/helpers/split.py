"""Traffic split beforehand as a simulated router splits it, and sent to real replicas.

The engines are real, the router is not: which replica takes a request is what the simulator decided. So it is
the prefix caches behind a split that are judged.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from servecast.calibrate.measure.vllm.bench_serve import run_bench
from servecast.sim.run.simulate import simulate
from servecast.sim.scenario.deployment import Deployment
from servecast.sim.scenario.scenario import Scenario
from servecast.sim.traffic.draw import draw, replayed, with_request_rate
from servecast.sim.traffic.trace_writers import from_requests, write_timed_trace
from servecast.sim.traffic.traces import Trace
from servecast.validate.live.target import Target, warm_up
from servecast.validate.live.telemetry import get, parse_metrics

BENCH_S = 300.0  # most that one takes


def open_traffic(scenario: Scenario, request_rate: float, num_requests: int, seed: int = 0) -> Trace:
    """The scenario's requests at a rate over all replicas."""
    workload = with_request_rate(scenario.open_loop(), request_rate, num_requests=num_requests)
    requests = [request for stream in draw(workload, seed)[0].streams for request in stream.requests]
    return from_requests(sorted(requests, key=lambda request: request.arrival_s))


def predicted(scenario: Scenario, router: str, requests: Trace) -> tuple[list[Trace], float]:
    """Each replica's part of the traffic behind a router, and the share of prompt tokens found cached."""
    behind = replace(Deployment.of(scenario), scenario=scenario.changed({"fleet.router": router}))
    records = simulate(behind, stages=replayed(requests)).requests.sort_values("request_id")
    replica = records["replica"].to_numpy()
    parts = [requests.take(replica == number) for number in range(scenario.fleet.size)]
    return parts, float(records["cached_tokens"].sum() / records["prompt_tokens"].sum())


def measured(parts: Sequence[Trace], targets: Sequence[Target], folder: Path, python: str) -> float:
    """The same share by the replicas' own counters, from one ``vllm bench serve`` a replica."""
    for target in targets:
        warm_up(target)
    seed = int(time.time()) % (1 << 32)  # prompts that no replica has seen
    before = [_counters(target) for target in targets]

    def drive(number: int) -> None:
        inside = folder / f"replica-{number}"
        inside.mkdir(parents=True)
        write_timed_trace(parts[number], inside / "trace.jsonl")
        result = run_bench(
            targets[number],
            inside / "trace.jsonl",
            inside / "bench.json",
            python=python,
            hash_seed=seed,
            timeout_s=BENCH_S,
        )
        assert result["completed"] == len(parts[number])

    with ThreadPoolExecutor(len(targets)) as pool:
        list(pool.map(drive, [number for number, part in enumerate(parts) if len(part)]))
    grown = [
        {name: after[name] - known[name] for name in known}
        for known, after in zip(before, map(_counters, targets), strict=True)
    ]
    return sum(each["prefix_hits"] for each in grown) / sum(each["prefix_queries"] for each in grown)


def _counters(target: Target) -> Mapping[str, float]:
    found = parse_metrics(get(f"{target.engine}/metrics"))
    return {name: found[name] for name in ("prefix_hits", "prefix_queries")}
