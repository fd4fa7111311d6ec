"""A whole simulation gives the same tables, to the last bit, with the engine and with its plain model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from engine_swap import plain_engine
from same_run import assert_same
from small_scenarios import small

from servecast.sim.run.simulate import simulate
from servecast.sim.scenario.scenario import Scenario

ENGINE = {"version": "0.32", "max_model_len": 4096, "max_num_seqs": 48, "max_num_batched_tokens": 1024}
LENGTHS = {
    "prompt_tokens": {"kind": "lognormal", "mean": 300, "std": 300, "max_tokens": 2000},
    "output_tokens": {"kind": "lognormal", "mean": 80, "std": 60, "max_tokens": 400},
}
CASES: dict[str, dict[str, Any]] = {
    "open loop": {
        "workload": {"arrivals": {"kind": "poisson", "request_rate": 12}, **LENGTHS},
    },
    "closed loop, few KV blocks, shared prefixes": {
        "engine": {"num_gpu_blocks_override": 500},
        "workload": {
            "arrivals": {"kind": "closed_loop", "concurrency": 64},
            "content": {"kind": "shared_prefix", "groups": 3, "prefix_tokens": 160},
            **LENGTHS,
        },
    },
    "0.23, no async scheduling, stops and aborts": {
        "engine": {"version": "0.23", "async_scheduling": False, "num_gpu_blocks_override": 700},
        "workload": {
            "arrivals": {"kind": "gamma", "request_rate": 20, "burstiness": 0.3},
            "max_tokens": 120,
            "abort_after_s": 6.0,
            **LENGTHS,
        },
    },
    "priority, two replicas": {
        "engine": {"scheduling_policy": "priority", "num_gpu_blocks_override": 400},
        "fleet": {"replicas": 2, "router": "least_outstanding"},
        "workload": {
            "stages": [
                {
                    "streams": [
                        {"name": name, "priority": number, "num_requests": 150, **LENGTHS}
                        | {"arrivals": {"kind": "poisson", "request_rate": 12}}
                        for number, name in enumerate(("late", "soon"))
                    ]
                }
            ]
        },
    },
}


def scenario(folder: Path, case: dict[str, Any]) -> Scenario:
    workload = case["workload"]
    return small(
        folder,
        name="identity",
        model={"config": "Llama-3.1-8B-Instruct"},
        gpu={"name": "l40s"},
        **case
        | {
            "engine": ENGINE | case.get("engine", {}),
            "workload": workload if "stages" in workload else {"num_requests": 300, **workload},
        },
    )


@pytest.mark.parametrize("name", CASES)
def test_the_plain_model_gives_the_same_run(name: str, tmp_path: Path) -> None:
    case = scenario(tmp_path, CASES[name])
    fast = simulate(case)
    with plain_engine():
        plain = simulate(case)
    assert_same(fast, plain)
    if "num_gpu_blocks_override" in str(case.engine.model_fields_set):
        assert fast.requests["preemptions"].sum() > 0, "the case is meant to preempt"
