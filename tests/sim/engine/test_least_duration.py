"""What noise cannot undercut: the engine's own sum is the roofline of the step-time model."""

from __future__ import annotations

from itertools import repeat

import numpy as np
import pytest
from model_shapes import load

from servecast.sim.engine.config import EngineConfig
from servecast.sim.engine.engine_loop import OUTCOMES, EngineLoop
from servecast.sim.engine.request import Request, Requests
from servecast.sim.engine.scheduler import Scheduler
from servecast.sim.hardware.gpu import find_gpu
from servecast.sim.hardware.shard import Shard
from servecast.sim.hardware.step_time.physical import PhysicalStepTime

PICOSECONDS = 10**12


def durations(model: PhysicalStepTime, *, own: bool) -> list[float]:
    """Of all steps, where noise would make nothing of them."""
    config = EngineConfig(
        version="0.32",
        max_num_seqs=8,
        max_num_batched_tokens=512,
        max_model_len=4096,
        num_gpu_blocks=2000,
        async_scheduling=False,
    )
    costs = model.costs() if own else None
    loop = EngineLoop(
        Scheduler(config), 0, costs, model.seconds, model.roofline_seconds, repeat(1e-9), (0, 0), None
    )
    rng = np.random.default_rng(5)
    requests = [Request(i, 0.0, int(rng.integers(1, 3000)), out, out) for i in range(30) for out in [1 + i]]
    loop.load(Requests.of(requests), np.full((len(OUTCOMES), len(requests)), -1, np.int64))
    loop.tell_ends = False
    for row in range(len(requests)):
        loop.inbox.append((row, row))
    loop.advance(1000 * PICOSECONDS)
    found: list[float] = loop.step_columns[2].view(np.float64).tolist()
    return found


@pytest.mark.parametrize("name", ["Llama-3.1-8B-Instruct", "Qwen3-30B-A3B"])
def test_steps_that_noise_would_end_at_once_last_the_roofline(name: str) -> None:
    model = PhysicalStepTime(Shard(load(name), find_gpu("H100"), tensor_parallel_size=1))
    found = durations(model, own=True)
    assert len(found) > 100
    assert found == durations(model, own=False)
