"""Measures how fast and how large simulations are: ``make benchmark``, which writes docs/results/speed.json.

Times are CPU time of one core in ``servecast.simulate``, percentiles included, of a scenario that is loaded.
All rows take turns, five times over, so that each sees the same machine, and the median counts. Long runs are
measured in fresh processes, with the most memory that each has held.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any

import yaml

from servecast.sim.engine import engine_loop
from servecast.sim.run.simulation import simulate
from servecast.sim.scenario.scenario import Scenario, load

RESULTS = Path(__file__).parents[2] / "docs" / "results" / "speed.json"
ROUNDS = 5
GROWTH = (10_000, 100_000, 1_000_000, 10_000_000)
PRECISE, APPROXIMATE = "precise-prefix-cache-scorer", "prefix-cache-scorer"
FIXED = {"prompt_tokens": 256, "output_tokens": 128}
OUTPUT = {"kind": "lognormal", "mean": 250, "std": 150, "max_tokens": 2000}


def prompts(mean: int) -> dict[str, Any]:
    return {"kind": "lognormal", "mean": mean, "std": 0.6 * mean, "max_tokens": 6000}


def poisson(rate: float, **rest: Any) -> dict[str, Any]:
    return {"arrivals": {"kind": "poisson", "request_rate": rate}, **rest}


def prefixes(groups: int) -> dict[str, Any]:
    return {"kind": "shared_prefix", "groups": groups, "prefix_tokens": 700}


def behind(router: str, replicas: int) -> dict[str, Any]:
    """A fleet at 40 requests a second and replica, with 32 prefixes."""
    lengths = {"prompt_tokens": 300, "output_tokens": 128, "content": prefixes(32)}
    fleet = {"replicas": replicas, "router": router}
    return {"fleet": fleet, "workload": poisson(40.0 * replicas, **lengths)}


CLOSED = {
    "arrivals": {"kind": "closed_loop", "concurrency": 256},
    "prompt_tokens": prompts(1000),
    "output_tokens": OUTPUT,
}
SHARED = poisson(50, prompt_tokens=300, output_tokens=128, content=prefixes(64))
# name -> requests, the rate that is aimed at (None: none), what differs from the usual scenario
ROWS: dict[str, tuple[int, int | None, dict[str, Any]]] = {
    "256 in, 128 out, near saturation": (20_000, 120_000, {"workload": poisson(80, **FIXED)}),
    "the same, sent by two clients": (20_000, 96_000, {"clients": 2, "workload": poisson(40, **FIXED)}),
    "256 in, 128 out, low load": (10_000, 60_000, {"workload": poisson(20, **FIXED)}),
    "64 shared prefixes": (20_000, 80_000, {"workload": SHARED}),
    "500 in, 2,000 out, saturated": (
        2_000,
        40_000,
        {"workload": poisson(20, prompt_tokens=500, output_tokens=2000)},
    ),
    "closed loop of 256, lognormal": (10_000, 50_000, {"workload": CLOSED}),
    "4 replicas, precise prefix cache": (12_000, 30_000, behind(PRECISE, 4)),
    "64 replicas, precise prefix cache": (20_000, 15_000, behind(PRECISE, 64)),
    "256 replicas, precise prefix cache": (40_000, None, behind(PRECISE, 256)),
    "64 replicas, approximate prefix cache": (20_000, None, behind(APPROXIMATE, 64)),
    "64 replicas, least outstanding": (20_000, None, behind("least_outstanding", 64)),
    "64 replicas, round robin": (20_000, None, behind("round_robin", 64)),
}
BEHIND_PREFIX = {"prompt_tokens": prompts(300), "output_tokens": OUTPUT, "content": prefixes(32)}
MILLION = {"fleet": {"replicas": 4, "router": PRECISE}, "workload": poisson(120, **BEHIND_PREFIX)}


def picker(scorer: str) -> str:
    """An EndpointPickerConfig with this scorer beside those of load."""
    own: dict[str, Any] = {"type": scorer}
    if scorer == PRECISE:
        own["parameters"] = {"indexerConfig": {"tokenProcessorConfig": {"blockSize": 16}}}
    scorers = [{"type": "queue-scorer"}, {"type": "kv-cache-utilization-scorer"}, own]
    profile = [{"pluginRef": plugin["type"], "weight": 2 if plugin is own else 1} for plugin in scorers]
    config = {
        "apiVersion": "inference.networking.x-k8s.io/v1alpha1",
        "kind": "EndpointPickerConfig",
        "plugins": [*scorers, {"type": "max-score-picker"}, {"type": "single-profile-handler"}],
        "schedulingProfiles": [{"name": "default", "plugins": [*profile, {"pluginRef": "max-score-picker"}]}],
    }
    return yaml.safe_dump(config, sort_keys=False)


def scenario(home: str, num_requests: int, case: dict[str, Any]) -> Scenario:
    """Llama-3.1-8B on H100s. home: a folder that outlives it."""
    folder, fleet = Path(mkdtemp(dir=home)), dict(case.get("fleet", {}))
    workload = {"num_requests": num_requests, **case["workload"]}
    if "clients" in case:
        each = {**workload, "num_requests": num_requests // case["clients"]}
        workload = {"stages": [{"streams": [{"name": str(i), **each} for i in range(case["clients"])]}]}
    if fleet.get("router") in (PRECISE, APPROXIMATE):
        (folder / "epp.yaml").write_text(picker(fleet["router"]), "utf-8")
        fleet["router"] = "epp.yaml"
    engine = {"max_num_seqs": 256, "max_num_batched_tokens": 8192, "max_model_len": 8192}
    data = {
        "schema_version": 1,
        "name": "speed",
        "model": {"config": "Llama-3.1-8B-Instruct"},
        "gpu": {"name": "h100"},
        "engine": {"version": "0.32", **engine},
        "fleet": fleet,
        "workload": workload,
    }
    (folder / "speed.yaml").write_text(yaml.safe_dump(data), "utf-8")
    return load(folder / "speed.yaml")


def measured_rows(home: str) -> list[dict[str, Any]]:
    cases = {name: scenario(home, number, case) for name, (number, _aim, case) in ROWS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    facts: dict[str, dict[str, Any]] = {}
    for _ in range(ROUNDS + 1):  # the first warms up
        for name, case in cases.items():
            start = time.process_time()
            run = simulate(case).run
            seconds[name].append(time.process_time() - start)
            facts[name] = {
                "mean_running": round(float(run.steps["running"].mean())),
                "steps_per_request": round(len(run.steps) / len(run.requests), 2),
            }
    rows = []
    for name, (number, aim, _case) in ROWS.items():
        rate = float(f"{number / statistics.median(seconds[name][1:]):.3g}")
        rows.append({"name": name, "requests_per_cpu_s": rate, "aim": aim, **facts[name]})
        print(f"{name:40} {rate:9,.0f} requests a CPU second, aim {aim}", flush=True)
    return rows


def alone(num_requests: int, case: dict[str, Any]) -> dict[str, Any]:
    """A run in this process: CPU and wall seconds, and the most bytes that the process has held."""
    with TemporaryDirectory() as home:
        concrete = scenario(home, num_requests, case)
        wall, start = time.perf_counter(), time.process_time()
        simulate(concrete)
        seconds, wall = time.process_time() - start, time.perf_counter() - wall
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text("ascii"))
    assert peak is not None
    return {"requests": num_requests, "cpu_s": seconds, "wall_s": wall, "bytes": 1024 * int(peak[1])}


def measured_alone(sizes: tuple[int, ...], case: dict[str, Any]) -> list[dict[str, Any]]:
    """Runs of these sizes, each in a fresh process."""
    found = []
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as fresh:
        empty = fresh.submit(alone, 1000, case).result()["bytes"]
        for number in sizes:
            each = fresh.submit(alone, number, case).result()
            rate, held = number / each["cpu_s"], (each["bytes"] - empty) / number
            print(f"{number:>10,} requests: {rate:,.0f} a CPU second, {held:.0f} bytes a request", flush=True)
            each |= {"cpu_s": round(each["cpu_s"], 2), "wall_s": round(each["wall_s"], 2)}
            rates = {"requests_per_cpu_s": float(f"{rate:.3g}"), "bytes_per_request": round(held)}
            found.append(each | rates)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--most", type=int, default=GROWTH[-1], help="largest run of the growth table")
    most = parser.parse_args().most
    cpu = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text("utf-8"))
    with TemporaryDirectory() as home:
        rows = measured_rows(home)
    document = {
        "machine": f"{cpu[1] if cpu else platform.machine()}, Python {platform.python_version()}",
        "compiled": str(engine_loop.__file__).endswith(".so"),
        "rows": rows,
        "million": measured_alone((1_000_000,), MILLION)[0],
        "growth": measured_alone(tuple(n for n in GROWTH if n <= most), {"workload": poisson(80, **FIXED)}),
    }
    RESULTS.write_text(json.dumps(document, indent=2) + "\n", "utf-8")
