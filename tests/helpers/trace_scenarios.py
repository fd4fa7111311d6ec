"""Scenarios of the comparison of schedulers, out of a recorded trace."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from servecast.sim.engine.config import EngineConfig
from servecast.sim.engine.request import Request
from servecast.validate.parity.scenarios import Arrival, Scenario

TRACE_BLOCK = 512  # tokens that a hash id of a Mooncake trace stands for


def trace_scenarios(trace: Path, version: str, count: int, *, requests: int = 200) -> Iterator[Scenario]:
    """Windows of a Mooncake trace, 1/32 of the length: who shares what with whom is the trace's.

    Every other one has a pool that hardly holds two requests.

    Args:
        trace: JSON lines with timestamp (ms), input_length, output_length, hash_ids.
        count: number of windows, evenly spread over the trace.
        requests: requests a window.
    """
    lines = trace.read_text().splitlines()
    scale = 32
    part = TRACE_BLOCK // scale
    for window in range(count):
        start = window * (len(lines) - requests) // count
        rows = [json.loads(line) for line in lines[start : start + requests]]
        arrivals: list[Arrival] = []
        for row in rows:
            prompt = max(row["input_length"] // scale, 1)
            output = min(max(row["output_length"] // scale, 1), 60)
            ends = [min(part * (k + 1), prompt) for k in range(len(row["hash_ids"]))]
            content = tuple(
                (hash_id, end)
                for k, (hash_id, end) in enumerate(zip(row["hash_ids"], ends, strict=True))
                if k == 0 or end > ends[k - 1]
            )
            request = Request(len(arrivals), 0.0, prompt, output, output, content)
            arrivals.append(Arrival((row["timestamp"] - rows[0]["timestamp"]) // 500, len(arrivals), request))
        longest = max(a.request.prompt_tokens + a.request.output_tokens for a in arrivals)
        config = EngineConfig(
            version=version,
            max_num_seqs=32,
            max_num_batched_tokens=512,
            max_model_len=longest + 1,
            num_gpu_blocks=2 + (20, 2)[window % 2] * -(-longest // 16),
            async_scheduling=window % 4 < 2,
        )
        yield Scenario(f"{trace.stem}-{version}-{window}", config, tuple(arrivals))
