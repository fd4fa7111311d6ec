"""How fast and how large a simulation is, beside the plain loop over all running requests.

Runs under ``make benchmark``. Times are CPU time, compared within one run as ratios of medians; only the
ratios and sizes, which do not depend on the machine, are kept in docs/results/speed.json.
"""

from __future__ import annotations

import re
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import yaml
from engine_swap import plain_engine
from pytest_benchmark.fixture import BenchmarkFixture
from same_run import assert_same
from speed_results import keep

from servecast.sim.run.simulate import simulate
from servecast.sim.scenario.deployment import Deployment
from servecast.sim.scenario.scenario import Scenario, load

LOAD = 0.8  # of saturation
SEQUENCES = 256
ROUNDS = 5
GROWTH = (10_000, 100_000, 1_000_000)
WORKLOADS: dict[str, tuple[int, dict[str, Any]]] = {  # name -> requests, lengths
    "256 in, 128 out": (5_000, {"prompt_tokens": 256, "output_tokens": 128}),
    "lognormal 1000 in, 250 out": (
        2_000,
        {
            "prompt_tokens": {"kind": "lognormal", "mean": 1000, "std": 600, "max_tokens": 6000},
            "output_tokens": {"kind": "lognormal", "mean": 250, "std": 150, "max_tokens": 2000},
        },
    ),
}


def scenario(lengths: dict[str, Any], num_requests: int, arrivals: dict[str, Any]) -> Scenario:
    data = {
        "schema_version": 1,
        "name": "speed",
        "model": {"config": "Llama-3.1-8B-Instruct"},
        "gpu": {"name": "h100"},
        "engine": {
            "version": "0.32",
            "max_num_seqs": SEQUENCES,
            "max_num_batched_tokens": 8192,
            "max_model_len": 8192,
        },
        "workload": {"arrivals": arrivals, "num_requests": num_requests, **lengths},
    }
    with TemporaryDirectory() as folder:
        path = Path(folder) / "speed.yaml"
        path.write_text(yaml.safe_dump(data), "utf-8")
        return load(path)


def request_rate(lengths: dict[str, Any]) -> float:
    """A share of the rate that the engine completes while all its slots are taken, requests/s."""
    full = simulate(scenario(lengths, 8 * SEQUENCES, {"kind": "closed_loop", "concurrency": SEQUENCES}))
    last_sent = float(full.requests["sent"].max())
    return float(LOAD * (full.requests["finish"] <= last_sent).sum() / last_sent)


@pytest.mark.benchmark(timer=time.process_time)
@pytest.mark.parametrize("name", WORKLOADS)
def test_requests_per_cpu_second_beside_the_plain_loop(
    name: str, benchmark: BenchmarkFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    num_requests, lengths = WORKLOADS[name]
    case = scenario(lengths, num_requests, {"kind": "poisson", "request_rate": request_rate(lengths)})
    deployment = Deployment.of(case)
    plain_times = []
    with plain_engine():
        plain = simulate(deployment)

    def plain_round() -> None:  # before each round of the other, so that both see the same machine
        with plain_engine():
            start = time.process_time()
            simulate(deployment)
            plain_times.append(time.process_time() - start)

    fast = benchmark.pedantic(simulate, args=(deployment,), setup=plain_round, rounds=ROUNDS)
    assert_same(fast, plain)

    seconds, plain_seconds = benchmark.stats.stats.median, statistics.median(plain_times)
    running = fast.steps["running"].mean()
    with capsys.disabled():
        print(
            f"\n{name}: {num_requests / seconds:,.0f} requests a CPU second, "
            f"plain loop {num_requests / plain_seconds:,.0f}: {plain_seconds / seconds:.1f} times; "
            f"{running:.0f} running, {len(fast.steps) / num_requests:.2f} steps a request"
        )
    keep(
        "beside the plain loop",
        {
            name: {
                "times_faster": round(plain_seconds / seconds, 1),
                "mean_running": round(running),
                "steps_per_request": round(len(fast.steps) / num_requests, 2),
                "identical_results": True,
            }
        },
    )


def grow(num_requests: int, rate: float) -> tuple[float, int]:
    """CPU seconds of a run, and the most bytes that this process has held."""
    lengths = WORKLOADS["256 in, 128 out"][1]
    case = scenario(lengths, num_requests, {"kind": "poisson", "request_rate": rate})
    start = time.process_time()
    simulate(case)
    seconds = time.process_time() - start
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text("ascii"))
    assert peak is not None
    return seconds, 1024 * int(peak[1])


def test_growth_to_a_million_requests(
    benchmark: BenchmarkFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    rate = request_rate(WORKLOADS["256 in, 128 out"][1])
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as fresh:
        _, empty = fresh.submit(grow, 1, rate).result()
        found = benchmark.pedantic(lambda: [fresh.submit(grow, n, rate).result() for n in GROWTH], rounds=1)
    first = found[0][0] / GROWTH[0]
    kept = {}
    for num_requests, (seconds, size) in zip(GROWTH, found, strict=True):
        cost, memory = seconds / num_requests / first, (size - empty) / num_requests
        kept[f"{num_requests:,}"] = {"cost_per_request": round(cost, 2), "bytes_per_request": round(memory)}
        with capsys.disabled():
            print(
                f"\n{num_requests:>9,} requests: {num_requests / seconds:,.0f} a CPU second, "
                f"{cost:.2f} times the cost of the first, {memory:,.0f} bytes a request",
                end="",
            )
    keep("growth", kept)
