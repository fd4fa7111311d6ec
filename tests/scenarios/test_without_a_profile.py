"""Answers without a profile, against servers whose figures are known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from small_scenarios import open_loop, scenario_file, small

from servecast.sim.run.results import result
from servecast.sim.run.simulate import simulate
from servecast.sim.scenario.deployment import Deployment
from servecast.sim.scenario.scenario import Scenario, load


def one_client(folder: Path, model: str) -> Scenario:
    """One client, 128 tokens in and out, on an A100 with vLLM 0.10."""
    workload = {
        "arrivals": {"kind": "closed_loop", "concurrency": 1},
        "num_requests": 8,
        "prompt_tokens": 128,
        "output_tokens": 128,
    }
    engine = {"version": "0.10"}
    return small(folder, model={"config": model}, gpu={"name": "a100"}, engine=engine, workload=workload)


def measured(scenario: Scenario) -> dict[str, Any]:
    deployment = Deployment.of(scenario)
    return result(deployment, simulate(scenario))


@pytest.mark.parametrize(
    ("model", "tpot_ms", "request_throughput"),
    [
        ("Qwen3-0.6B", 4.2, 1.83),  # bound by the host: the weights alone take 0.6 ms
        ("Qwen3-30B-A3B", 9.6, 0.795),
    ],
)
def test_small_steps_without_async_scheduling_on_an_a100(
    model: str, tpot_ms: float, request_throughput: float, tmp_path: Path
) -> None:
    """As users' servers of June 2025 measured them."""
    found = measured(one_client(tmp_path, model))
    assert found["mean_tpot_ms"] == pytest.approx(tpot_ms, rel=0.15)
    assert found["request_throughput"] == pytest.approx(request_throughput, rel=0.15)


def chat(folder: Path) -> Scenario:
    """A chat service: Llama-3.1-70B in fp8 on four H100."""
    prompts = {"kind": "lognormal", "median": 1200, "sigma": 0.978, "max_tokens": 24000}
    outputs = {"kind": "lognormal", "median": 250, "sigma": 0.7, "max_tokens": 4000}
    engine = {
        "version": "0.32",
        "quantization": "fp8",
        "kv_cache_dtype": "fp8",
        "tensor_parallel_size": 4,
        "max_model_len": 32768,
    }
    sections = {"model": {"config": "Llama-3.1-70B-Instruct"}, "gpu": {"name": "h100"}, "engine": engine}
    return load(scenario_file(folder, **sections, workload=open_loop(3, 150, prompts, outputs)))


def test_kernels_and_the_profile_of_a_server_agree_within_their_bands(tmp_path: Path) -> None:
    """Each is right within its band, so they are apart by no more than both."""
    kernels = chat(tmp_path)
    fitted = kernels.changed(profile="llmd-4x-llama-3.1-70b-tp4-h100")
    ours, theirs = measured(kernels), measured(fitted)
    assert "llmd-4x-llama-3.1-70b-tp4-h100 was fitted to a server on this GPU" in " ".join(ours["notes"])
    for metric, key in (("tpot", "mean_tpot_ms"), ("ttft", "mean_ttft_ms")):
        bands = [getattr(Deployment.of(each).bands, metric) for each in (kernels, fitted)]
        both = (1 + bands[0]) * (1 + bands[1])
        assert 1 / both < ours[key] / theirs[key] < both
