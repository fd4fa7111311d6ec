"""How fast and how large a simulation is, beside the engine interpreted, as it runs where nothing compiles.

Runs under ``make benchmark``. Times are CPU time of ``servecast.simulate``, percentiles included, compared
within one run as ratios of medians; only the ratios and sizes, which do not depend on the machine, are kept
in docs/results/speed.json.
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
from unittest.mock import patch

import pytest
import yaml
from cores import interpreted
from pytest_benchmark.fixture import BenchmarkFixture
from same_run import assert_same
from speed_results import keep

from servecast.sim.run.simulation import simulate
from servecast.sim.scenario.scenario import Scenario, load
from servecast.sim.scenario.servers import SERVERS
from servecast.sim.scenario.vllm_server import Vllm

ROUNDS = 5
GROWTH = (10_000, 100_000, 1_000_000)
SMALLER = 20  # so many times fewer requests for the engine in Python
FIXED = {"prompt_tokens": 256, "output_tokens": 128}
LOGNORMAL = {
    "prompt_tokens": {"kind": "lognormal", "mean": 1000, "std": 600, "max_tokens": 6000},
    "output_tokens": {"kind": "lognormal", "mean": 250, "std": 150, "max_tokens": 2000},
}
PREFIXES = {"kind": "shared_prefix", "groups": 64, "prefix_tokens": 700}


def poisson(rate: float, **rest: Any) -> dict[str, Any]:
    return {"arrivals": {"kind": "poisson", "request_rate": rate}, **rest}


def two_streams(rate: float, num_requests: int, **rest: Any) -> dict[str, Any]:
    """Two streams of half the rate, which SimPy carries."""
    streams = [
        {"name": name, "num_requests": num_requests // 2, **poisson(rate / 2, **rest)}
        for name in ("one", "other")
    ]
    return {"stages": [{"streams": streams}]}


WORKLOADS: dict[str, tuple[int, dict[str, Any]]] = {  # name -> requests, workload
    "256 in, 128 out, near saturation": (20_000, poisson(80, **FIXED)),
    "256 in, 128 out, low load": (10_000, poisson(20, **FIXED)),
    "shared prefixes": (20_000, poisson(50, prompt_tokens=300, output_tokens=128, content=PREFIXES)),
    "500 in, 2,000 out": (10_000, poisson(8, prompt_tokens=500, output_tokens=2000)),
    "closed loop of 256, lognormal": (
        10_000,
        {"arrivals": {"kind": "closed_loop", "concurrency": 256}, **LOGNORMAL},
    ),
    "256 in, 128 out, two streams": (20_000, {"streams": 2}),
}


def scenario(workload: dict[str, Any], num_requests: int) -> Scenario:
    if "streams" in workload:
        workload = two_streams(80, num_requests, **FIXED)
    else:
        workload = {"num_requests": num_requests, **workload}
    data = {
        "schema_version": 1,
        "name": "speed",
        "model": {"config": "Llama-3.1-8B-Instruct"},
        "gpu": {"name": "h100"},
        "engine": {
            "version": "0.32",
            "max_num_seqs": 256,
            "max_num_batched_tokens": 8192,
            "max_model_len": 8192,
        },
        "workload": workload,
    }
    with TemporaryDirectory() as folder:
        path = Path(folder) / "speed.yaml"
        path.write_text(yaml.safe_dump(data), "utf-8")
        return load(path)


@pytest.mark.benchmark(timer=time.process_time)
@pytest.mark.parametrize("name", WORKLOADS)
def test_requests_per_cpu_second_beside_the_engine_interpreted(
    name: str, benchmark: BenchmarkFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    num_requests, workload = WORKLOADS[name]
    case, few = scenario(workload, num_requests), scenario(workload, num_requests // SMALLER)
    python_times = []
    in_its_place = Vllm(interpreted()["scheduler"].Scheduler)
    with patch.dict(SERVERS, vllm=in_its_place):
        in_python = simulate(few).run
    assert_same(simulate(few).run, in_python)

    def python_round() -> None:  # before each round of the other, so that both see the same machine
        with patch.dict(SERVERS, vllm=in_its_place):
            start = time.process_time()
            simulate(few)
            python_times.append((time.process_time() - start) * SMALLER)

    fast = benchmark.pedantic(simulate, args=(case,), setup=python_round, rounds=ROUNDS).run
    seconds, python_seconds = benchmark.stats.stats.median, statistics.median(python_times)
    running = fast.steps["running"].mean()
    with capsys.disabled():
        print(
            f"\n{name}: {num_requests / seconds:,.0f} requests a CPU second, "
            f"interpreted {num_requests / python_seconds:,.0f}: {python_seconds / seconds:.1f} times; "
            f"{running:.0f} running, {len(fast.steps) / num_requests:.2f} steps a request"
        )
    keep(
        "beside the engine interpreted",
        {
            name: {
                "times_faster": round(python_seconds / seconds, 1),
                "mean_running": round(running),
                "steps_per_request": round(len(fast.steps) / num_requests, 2),
                "identical_results": True,
            }
        },
    )


def grow(num_requests: int, rate: float) -> tuple[float, int]:
    """CPU seconds of a run, and the most bytes that this process has held."""
    case = scenario(poisson(rate, **FIXED), num_requests)
    start = time.process_time()
    simulate(case)
    seconds = time.process_time() - start
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text("ascii"))
    assert peak is not None
    return seconds, 1024 * int(peak[1])


def test_growth_to_a_million_requests(
    benchmark: BenchmarkFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    rate = 80.0
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
