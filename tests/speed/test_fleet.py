"""How long a fleet takes to simulate, and how that grows with its replicas. Runs under ``make benchmark``.

CPU time is measured and printed, and only its ratios are kept, in docs/results/speed.json.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from pytest_benchmark.fixture import BenchmarkFixture
from speed_results import keep

from servecast.sim.run.simulate import simulate
from servecast.sim.scenario.deployment import Deployment
from servecast.sim.scenario.scenario import Scenario, load

QPS_A_REPLICA = 5
BLOCK_SIZE = 64
FLEETS = (1, 4, 16, 64)
SCORERS = {
    "precise": {
        "type": "precise-prefix-cache-scorer",
        "parameters": {"indexerConfig": {"tokenProcessorConfig": {"blockSize": BLOCK_SIZE}}},
    },
    "approximate": {"type": "prefix-cache-scorer"},
    "load": None,
}


def scenario(folder: Path, router: str, *, replicas: int, seconds: int) -> Scenario:
    """Llama-3.1-70B on 4 H100 a replica, 83 prefixes of 8,000 tokens with 3 questions of 1,000, 250 out."""
    own = SCORERS.get(router)
    if router in SCORERS:
        scorers = [{"type": "queue-scorer"}, {"type": "kv-cache-utilization-scorer"}, *([own] if own else [])]
        profile = [{"pluginRef": plugin["type"], "weight": 2 if plugin is own else 1} for plugin in scorers]
        config = {
            "apiVersion": "inference.networking.x-k8s.io/v1alpha1",
            "kind": "EndpointPickerConfig",
            "plugins": [*scorers, {"type": "max-score-picker"}, {"type": "single-profile-handler"}],
            "schedulingProfiles": [
                {"name": "default", "plugins": [*profile, {"pluginRef": "max-score-picker"}]}
            ],
        }
        (folder / "epp.yaml").write_text(yaml.safe_dump(config, sort_keys=False), "utf-8")
    data: dict[str, Any] = {
        "schema_version": 1,
        "name": "fleet speed",
        "model": {"config": "Llama-3.1-70B-Instruct"},
        "gpu": {"name": "h100"},
        "engine": {
            "version": "0.10",
            "tensor_parallel_size": 4,
            "max_model_len": 16384,
            "block_size": BLOCK_SIZE,
        },
        "fleet": {"replicas": replicas, "router": "epp.yaml" if router in SCORERS else router},
        "workload": {
            "arrivals": {"kind": "poisson", "request_rate": QPS_A_REPLICA * replicas},
            "num_requests": QPS_A_REPLICA * replicas * seconds,
            "prompt_tokens": 1000,
            "output_tokens": 250,
            "content": {
                "kind": "shared_prefix",
                "groups": 83 * -(-replicas // 4),
                "prefix_tokens": 8000,
                "prompts_per_group": 3,
            },
        },
    }
    path = folder / "fleet.yaml"
    path.write_text(yaml.safe_dump(data), "utf-8")
    return load(path)


@pytest.mark.benchmark(timer=time.process_time)
@pytest.mark.parametrize("router", ["precise", "approximate", "load", "round_robin"])
def test_a_thousand_seconds_at_20_requests_a_second_on_4_replicas(
    router: str, tmp_path: Path, benchmark: BenchmarkFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    case = scenario(tmp_path, router, replicas=4, seconds=1000)
    deployment = Deployment.of(case)
    run = benchmark.pedantic(simulate, args=(deployment,), rounds=1)
    assert (run.requests["status"] == "finished").all()
    seconds = benchmark.stats.stats.median
    with capsys.disabled():
        print(
            f"\n{router}: {len(run.requests):,} requests, {len(run.steps):,} steps, "
            f"{run.requests['finish'].max():,.0f} simulated seconds in {seconds:.1f} CPU seconds"
        )


@pytest.mark.benchmark(timer=time.process_time)
def test_cost_grows_with_the_work_and_hardly_with_the_fleet(
    tmp_path: Path, benchmark: BenchmarkFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    def cost(replicas: int) -> float:
        case = scenario(tmp_path, "precise", replicas=replicas, seconds=60)
        deployment = Deployment.of(case)
        start = time.process_time()
        run = simulate(deployment)
        return (time.process_time() - start) / len(run.requests)

    costs = benchmark.pedantic(lambda: [cost(replicas) for replicas in FLEETS], rounds=1)
    kept = {}
    for replicas, each in zip(FLEETS, costs, strict=True):
        kept[str(replicas)] = round(each / costs[0], 2)
        with capsys.disabled():
            print(
                f"\n{replicas:>3} replicas: {1e6 * each:,.0f} us a request, {each / costs[0]:.2f} times",
                end="",
            )
    keep("cost of a request by replicas, precise scheduling", kept)
