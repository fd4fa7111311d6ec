"""Small scenarios, written as files into a test's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from servecast.sim.scenario.scenario import Scenario, load


def open_loop(
    request_rate: float, num_requests: int, prompt_tokens: Any, output_tokens: Any
) -> dict[str, Any]:
    """A workload of Poisson arrivals (requests/s); lengths are numbers, or laws as a scenario writes them."""
    return {
        "arrivals": {"kind": "poisson", "request_rate": request_rate},
        "num_requests": num_requests,
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
    }


TINY: dict[str, Any] = {
    "schema_version": 1,
    "name": "tiny",
    "model": {"config": "Qwen2.5-0.5B-Instruct"},
    "gpu": {"name": "l4"},
    "engine": {"version": "0.23"},
    "workload": open_loop(20, 60, 64, 8),
}
MINIMAL = """\
schema_version: 1
name: mine
model: {config: Qwen2.5-7B-Instruct}
gpu: {name: a6000}
engine: {version: "0.32"}
workload:
  arrivals: {kind: poisson, request_rate: 2}
  num_requests: 100
  prompt_tokens: 256
  output_tokens: 128
"""


def scenario_file(folder: Path, **sections: Any) -> Path:
    """TINY with other sections, as NAME.yaml."""
    data = TINY | sections
    path = folder / f"{data['name']}.yaml"
    path.write_text(yaml.safe_dump(data, sort_keys=False), "utf-8")
    return path


def small(folder: Path, **sections: Any) -> Scenario:
    """TINY with other sections, loaded."""
    return load(scenario_file(folder, **sections))
