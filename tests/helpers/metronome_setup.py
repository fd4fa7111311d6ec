"""A metronome (see metronome.py) to measure, fit and drive: its model, flags and laws, and where its GPU's
peaks would lie."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from servecast.calibrate.measure.vllm.tiny_model import write_tiny_model
from servecast.sim.hardware.gpu import GPU, find_gpu
from servecast.sim.hardware.model_shape import ModelShape
from servecast.sim.hardware.shard import Shard

TESTS = Path(__file__).resolve().parent
LATE_S = 0.002  # as in metronome.py, which runs where this can't be imported
FLAGS = (
    *(
        "--worker-cls",
        "metronome.MetronomeWorker",
        "--enforce-eager",
        "--distributed-executor-backend",
        "uni",
    ),
    *("--max-model-len", "4096"),
    *("--max-num-seqs", "64", "--max-num-batched-tokens", "512"),
)
SIZES = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512)  # that the staircase pads to
ROOFLINE: dict[str, Any] = {
    "law": "bandwidth_compute",
    "fixed_s": 0.020,
    "request_s": 5e-5,
    "token_s": 7e-5,
    "weights_s": 0.015,
    "power": 3.0,
    "elementwise_s": 2.3e-5,
    "kv_s": 1.3e-7,
    "pair_s": 1e-8,
}
STAIRCASE: dict[str, Any] = ROOFLINE | {
    "fixed_s": 0.025,
    "token_s": 1.1e-4,
    "weights_s": 1e-3,
    "elementwise_s": 1.6e-6,
    "kv_s": 3e-8,
    "sizes": SIZES,
}
NO_MACHINE: dict[str, Any] = {"law": "faster_when_full", "fixed_s": 0.02, "idle_s": 0.06, "requests": 4}


def metronome_model(folder: Path) -> Path:
    """Large enough that reading its weights outweighs reading KV, small enough to start at once."""
    return write_tiny_model(folder, layers=2, hidden_size=1024, intermediate_size=4096, heads=16, kv_heads=1)


def metronome_environment(law: dict[str, Any], late: Path | None = None) -> dict[str, str]:
    """Variables of a vLLM process that keeps that law, and tells in a folder how late its steps were."""
    path = [str(TESTS), os.environ.get("PYTHONPATH", "")]
    return {
        "METRONOME_LAW": json.dumps(law),
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        **({} if late is None else {"METRONOME_LATE": str(late)}),
    }


def share_late(folder: Path, began: float, ended: float) -> float:
    """The share of a span of time (``time.monotonic``) by which a server's steps were longer than their law,
    of the process with most: what this machine took from it, since the law is all that a step computes. Less
    than ``LATE_S`` is made up for by the step after it."""
    shares = [0.0]
    for file in folder.iterdir():
        steps = [list(map(float, line.split())) for line in file.read_text().splitlines()]
        beyond = [max(0.0, late - LATE_S) for end, late in steps if began <= end <= ended]
        shares.append(sum(beyond) / (ended - began))
    return max(shares)


def metronome_gpu(law: dict[str, Any], model: Path) -> GPU:
    """A GPU with peaks somewhat above what the law makes of the model."""
    shape = ModelShape.from_config(json.loads((model / "config.json").read_text()), "metronome")
    shard = Shard(shape, find_gpu("H100"), 1)
    return GPU(
        name="metronome",
        memory_bytes=1 << 33,
        bandwidth=shard.linear_bytes(1) / (0.9 * law["weights_s"]),
        bf16_flops=shard.linear_flops_per_token / (0.75 * law["token_s"]),
        link_bandwidth=1e9,
        capability=(9, 0),
    )
