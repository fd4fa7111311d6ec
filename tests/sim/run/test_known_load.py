"""A load that was run on a real server and reported with its counts."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from servecast.sim.hardware.front_end_costs import FrontEndCosts
from servecast.sim.run.simulate import simulate
from servecast.sim.scenario.deployment import Deployment
from servecast.sim.scenario.scenario import load

SCENARIO = {
    "schema_version": 1,
    "name": "long-outputs",
    "model": {"config": "Qwen2.5-7B-Instruct"},
    "gpu": {"name": "GB200"},
    "profile": "physics",
    "engine": {
        "version": "0.32",
        "max_model_len": 8192,
        "max_num_seqs": 256,
        "kv_cache_memory_bytes": 16 << 30,
        "enable_prefix_caching": False,
    },
    "workload": {
        "arrivals": {"kind": "closed_loop", "concurrency": 128},
        "num_requests": 450,
        "prompt_tokens": {"kind": "uniform", "tokens": 1000, "range_ratio": 0.2},
        "output_tokens": {"kind": "uniform", "tokens": 5000, "range_ratio": 0.2},
    },
}


def test_preemptions_of_a_full_pool_are_as_many_as_reported(tmp_path: Path) -> None:
    """vLLM with 16 GiB of KV on a GB200 reported 299,584 tokens and 1,065 preemptions. With nothing between
    the client and the engine they do not hang on how long a step takes."""
    path = tmp_path / "scenario.yaml"
    path.write_text(yaml.safe_dump(SCENARIO))
    deployment = Deployment.of(load(path))
    alone = deployment.profile.model_copy(update={"front_end": FrontEndCosts()})
    deployment = Deployment.of(load(path), alone)
    assert deployment.memory.logged_tokens == 299_584
    preemptions = int(simulate(deployment, seed=0).requests["preemptions"].sum())
    assert preemptions == pytest.approx(1065, rel=0.02)
