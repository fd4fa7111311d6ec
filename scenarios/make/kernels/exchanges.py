"""What passes between ranks, from NVIDIA's tables: collectives, and DeepEP's ways to experts and back."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from servecast.scenarios.make.kernels.timings import KernelTables, Timings, columns, over, parts, times
from servecast.sim.hardware.gpu_constants import AllReduce, Exchange

MOST_RANKS = {"L40S": 2}  # its four and eight ranks were timed in a box without peer-to-peer
_BACKENDS = {"deepep_ht": "deepep_high_throughput", "deepep_ll": "deepep_low_latency"}
_KEYS = ("comm_backend", "ep_size", "hidden_size", "topk", "num_experts", "num_tokens")


def collectives(tables: KernelTables, rows: pd.DataFrame, passes: float) -> dict[int, AllReduce]:
    """Of one kind, by ranks; ``passes``: so often a ring moves (n-1)/n of all bytes."""
    gpu = tables.gpu
    rows = rows.assign(size=2.0 * rows["message_size"])  # elements of two bytes
    rows = rows[rows["size"].between(4096, 512e6)]
    found = {}
    for ranks, part in rows.groupby("num_gpus"):
        number = int(str(ranks))
        if number > MOST_RANKS.get(gpu.name, 8) or gpu.link_bandwidth is None:
            continue
        part = part.assign(megabytes=part["size"] / 1e6)
        ring = passes * (number - 1) / number * part["size"].to_numpy(float) / gpu.link_bandwidth
        fitted = Timings.of(part, "megabytes", 0, 0.1, 1, 10, 1000).sum_of(
            AllReduce, latency_s=times(1, 5e-6, 1e-4), link=over(ring, 0.6, 0.01)
        )
        timed = part.groupby("size")["seconds"].median()
        by_size = {int(float(str(size))): float(f"{seconds:.4g}") for size, seconds in timed.items()}
        found[number] = fitted.model_copy(update={"by_size": by_size})
    return found


def fit_exchanges(
    tables: KernelTables,
) -> tuple[dict[int, AllReduce], dict[int, AllReduce], dict[Any, Exchange]]:
    """NCCL's all-gathers and reduce-scatters, and DeepEP by backend; what was not timed is left out."""
    gathers, scatters = dict[int, AllReduce](), dict[int, AllReduce]()
    if tables.has("comm", "nccl_perf", of="nccl"):
        names = ("op_name", "nccl_dtype", "num_gpus", "message_size")
        rows = tables.read("comm", "nccl_perf", names, of="nccl")
        rows = rows[rows["nccl_dtype"] == "half"]
        gathers, scatters = (
            collectives(tables, rows[rows["op_name"] == name], 1.0)
            for name in ("all_gather", "reduce_scatter")
        )
    return gathers, scatters, _deepep(tables) if tables.has("comm", "moe_a2a_perf") else {}


def _deepep(tables: KernelTables) -> dict[Any, Exchange]:
    """Dispatch and combine together, by the bytes that a rank sends to the others, there and back."""
    link = tables.gpu.link_bandwidth or math.inf
    rows = tables.read("comm", "moe_a2a_perf", (*_KEYS, "phase"))
    rows = rows.assign(seconds=rows["seconds"] * 1e-3)  # the table's latencies are microseconds
    both = rows.groupby(list(_KEYS))["seconds"].agg(["sum", "count"]).reset_index()
    both = both[both["count"] == 2].rename(columns={"sum": "seconds"})
    found = {}
    for backend, part in parts(both, "comm_backend", _BACKENDS):
        ranks, hidden, chosen, tokens = columns(part, "ep_size", "hidden_size", "topk", "num_tokens")
        sent = 2 * tokens * chosen * hidden * 2 * (ranks - 1) / ranks
        found[backend] = Timings.of(part, "num_tokens", 1, 17, 65, 257, 1025, 8193, 65537).sum_of(
            Exchange, floor_s=times(1, 1e-4, 1e-2), link=over(sent / link, 0.5, 0.01)
        )
    return found
