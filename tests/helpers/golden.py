"""Workloads whose whole tables are kept as digests, made by an engine that was written otherwise.

python tests/helpers/golden.py keeps them anew: only after a change that is meant to move predictions.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from places import DATA
from small_scenarios import small

from servecast.sim.metrics.records import Run
from servecast.sim.run.simulate import simulate
from servecast.sim.scenario.scenario import Scenario

KEPT = DATA / "golden" / "engine.json"
LOGNORMAL = {
    "prompt_tokens": {"kind": "lognormal", "mean": 1000, "std": 600, "max_tokens": 6000},
    "output_tokens": {"kind": "lognormal", "mean": 250, "std": 150, "max_tokens": 1500},
}
FIXED = {"prompt_tokens": 256, "output_tokens": 128}


def poisson(rate: float, n: int, **rest: Any) -> dict[str, Any]:
    return {"arrivals": {"kind": "poisson", "request_rate": rate}, "num_requests": n, **rest}


WORKLOADS: dict[str, dict[str, Any]] = {
    "256 in, 128 out": {"workload": poisson(80, 800, **FIXED)},
    "256 in, 128 out, tokens cost": {
        "model": {"config": "Qwen2.5-7B-Instruct"},
        "gpu": {"name": "a6000"},
        "profile": "a6000-qwen2.5-7b",
        "workload": poisson(12, 500, **FIXED),
    },
    "256 in, 128 out, noise": {
        "model": {"config": "Qwen2.5-0.5B-Instruct"},
        "gpu": {"name": "l4"},
        "profile": "l4-qwen2.5-0.5b",
        "fleet": {"replicas": 2},
        "workload": poisson(50, 500, **FIXED),
    },
    "lognormal, 6,000 blocks": {
        "engine": {"num_gpu_blocks_override": 6000},
        "workload": poisson(25, 400, **LOGNORMAL),
    },
    "lognormal, 3,000 blocks, preempting": {
        "engine": {"num_gpu_blocks_override": 3000, "version": "0.23"},
        "workload": poisson(25, 400, **LOGNORMAL),
    },
    "shared prefixes": {
        "workload": poisson(
            50,
            500,
            prompt_tokens=300,
            output_tokens=128,
            content={"kind": "shared_prefix", "groups": 64, "prefix_tokens": 700},
        ),
    },
    "500 in, 2,000 out": {"workload": poisson(8, 200, prompt_tokens=500, output_tokens=2000)},
    "closed loop, no async scheduling": {
        "engine": {"async_scheduling": False, "num_gpu_blocks_override": 2000},
        "workload": {
            "arrivals": {"kind": "closed_loop", "concurrency": 64},
            "num_requests": 300,
            **LOGNORMAL,
        },
    },
    "four replicas by least outstanding, aborts": {
        "fleet": {"replicas": 4, "router": "least_outstanding"},
        "workload": poisson(150, 600, abort_after_s=3.0, **LOGNORMAL),
    },
}
ENGINE = {"version": "0.32", "max_num_seqs": 256, "max_num_batched_tokens": 8192, "max_model_len": 8192}


def scenario(folder: Path, name: str) -> Scenario:
    case = WORKLOADS[name]
    usual = {"name": "golden", "model": {"config": "Llama-3.1-8B-Instruct"}, "gpu": {"name": "h100"}}
    return small(folder, **usual | case | {"engine": ENGINE | case.get("engine", {})})


def digests(run: Run) -> dict[str, Any]:
    """Rows, and for each column the start of the SHA-256 of its values, bit by bit."""
    tables = {"requests": run.requests, "steps": run.steps, "itl": run.itl}
    return {
        name: {"rows": len(table), **{column: _digest(table[column]) for column in table}}
        for name, table in tables.items()
    }


def _digest(column: pd.Series[Any]) -> str:
    if column.dtype == "Int64":
        column = column.fillna(-1).astype("int64")
    data = column.to_numpy()
    raw = "\n".join(map(str, data)).encode() if data.dtype == object else np.ascontiguousarray(data).tobytes()
    return hashlib.sha256(raw).hexdigest()[:12]


if __name__ == "__main__":
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as home:
        found = {name: digests(simulate(scenario(Path(home), name))) for name in WORKLOADS}
    KEPT.parent.mkdir(exist_ok=True)
    KEPT.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
