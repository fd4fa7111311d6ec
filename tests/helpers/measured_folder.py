"""Folders of measurements made of a known law, as ``calibrate measure`` would leave them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from model_shapes import config

from servecast.calibrate.fit.rows import Step
from servecast.calibrate.measure.engine.grid import Limits, grid
from servecast.sim.hardware.gpu import find_gpu
from servecast.sim.hardware.model_shape import ModelShape
from servecast.sim.hardware.shard import Shard, cudagraph_capture_sizes
from servecast.sim.hardware.step_time.physical import Efficiencies, PhysicalStepTime

H200 = find_gpu("H200")
LIMITS = Limits(256, 8192, 16_384, 400_000, 16)
Law = Callable[[Step], float]
FACTS: dict[str, Any] = {
    "schema_version": 1,
    "gpu": "NVIDIA H200",
    "gpu_count": 1,
    "memory_bytes": H200.memory_bytes,
    "driver": "580.1",
    "torch": "2.11.0",
    "cuda": "13.0",
    "vllm": "0.32.0",
    "python": "3.12",
    "host_cpu": "x86",
    "date": "2026-11-22T10:00:00Z",
    "clocks": None,
    "command": ["measure"],
}
FLAGS: dict[str, Any] = {
    "version": "0.32.0",
    "max_num_seqs": LIMITS.max_num_seqs,
    "max_num_batched_tokens": LIMITS.max_num_batched_tokens,
    "max_model_len": LIMITS.max_model_len,
    "num_gpu_blocks": 25_000,
    "block_size": 16,
    "async_scheduling": True,
    "enforce_eager": False,
    "kv_cache_dtype": "auto",
    "tensor_parallel_size": 1,
    "dtype": "bfloat16",
}
CAPTURED = cudagraph_capture_sizes(256, 8192, version="0.32", capability=(9, 0))


def steps_of_grid(limits: Limits = LIMITS) -> list[Step]:
    """The compositions of the engine's own grid, without times that mean anything."""
    steps = []
    for case in grid(limits)[0]:
        if case.traffic:
            rng = np.random.default_rng(case.running)
            for n in rng.integers(1, case.running + 1, 40).tolist():
                chunks = ((int(rng.integers(16, 600)), 0),) if rng.random() < 0.2 else ()
                steps.append(_step("long_run", chunks, n, n * int(rng.integers(100, 1500)), len(steps)))
        else:
            decodes = len(case.contexts)
            steps.append(_step(case.region, case.chunks, decodes, sum(case.contexts) + decodes, len(steps)))
    return steps


def _step(region: str, chunks: Any, decodes: int, context: int, number: int) -> Step:
    return Step(
        row="step",
        case=f"{region}/{number}",
        times_s=(1.0,),
        model="made",
        region=region,
        chunks=chunks,
        decodes=decodes,
        decode_context=context,
        samples=decodes + len(chunks),
    )


def physical_law(model: str, efficiencies: Efficiencies, *, ranks: int = 1) -> Law:
    """The law of the physical model itself, on an H200."""
    shape = ModelShape.from_config(config(model))
    return PhysicalStepTime(Shard(shape, H200, ranks, cudagraph_sizes=CAPTURED), efficiencies).seconds


def write_folder(
    folder: Path,
    laws: Mapping[str, Law],
    *,
    steps: Iterable[Step] | None = None,
    kernels: Iterable[tuple[Mapping[str, Any], float]] = (),
    overheads: Iterable[Mapping[str, Any]] = (),
    cv: float = 0.02,
    repeats: int = 9,
    facts: Mapping[str, Any] = FACTS,
    flags: Mapping[str, Any] = FLAGS,
) -> Path:
    """Write a folder: for each model (of the shipped configs) its law's times over the steps, and kernels.

    kernels: row and true seconds. overheads: whole rows.
    """
    rng = np.random.default_rng(1)

    def times(seconds: float, count: int = repeats) -> list[float]:
        return (seconds * rng.lognormal(0, cv, count)).tolist()

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "facts.json").write_text(json.dumps(facts))
    rows: list[Mapping[str, Any]] = []
    for model, law in laws.items():
        rows.append({"row": "engine", "case": model, "model": model, "config": config(model), "flags": flags})
        for number, step in enumerate(steps_of_grid() if steps is None else steps):
            count = 1 if step.region == "long_run" else repeats
            row = step.model_dump(exclude={"engine"}) | {
                "model": model,
                "case": f"{model}/{number}",
                "times_s": times(law(step), count),
            }
            rows.append(row)
    rows += overheads
    if rows:
        _write(folder / "engine.jsonl", rows)
    timed = [{**row, "times_s": times(seconds)} for row, seconds in kernels]
    if timed:
        _write(folder / "kernels.jsonl", timed)
    return folder


def _write(file: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
