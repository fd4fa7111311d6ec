"""Collectives and exchanges whose times follow their equations are found again."""

from __future__ import annotations

import itertools
from pathlib import Path

import pandas as pd
import pytest

from servecast.scenarios.make.kernels.exchanges import fit_exchanges
from servecast.scenarios.make.kernels.timings import KernelTables
from servecast.sim.hardware.gpu import find_gpu

H100 = find_gpu("H100")
LINK = H100.link_bandwidth or 0.0


def write(folder: Path, name: str, rows: list[dict[str, object]]) -> None:
    file = folder / "data" / "h100_sxm" / "comm" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_parquet(file)


def test_what_passes_between_ranks_is_found_again(tmp_path: Path) -> None:
    """All-gathers of 10 us and 60 % of the link, DeepEP of 100 us and a half of it; NCCL's latencies are
    milliseconds by elements of two bytes, DeepEP's microseconds by way."""
    rows: list[dict[str, object]] = []
    for name, ranks, power in itertools.product(("all_gather", "reduce_scatter"), (2, 8), range(8, 28)):
        size = 1 << power
        seconds = 10e-6 + 2 * size * (ranks - 1) / ranks / (0.6 * LINK)
        row = {"op_name": name, "num_gpus": ranks, "message_size": size, "latency": 1e3 * seconds}
        rows += [row | {"nccl_dtype": "half"}, row | {"nccl_dtype": "int8", "latency": 99.0}]
    write(tmp_path, "nccl/2.29.2/nccl_perf.parquet", rows)
    ways: list[dict[str, object]] = []
    for tokens, hidden in itertools.product(
        (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256), (2048, 3072, 4096, 7168)
    ):
        sent = 2 * tokens * 8 * hidden * 2 * 7 / 8
        seconds = 100e-6 + sent / (0.5 * LINK)
        row = {
            "comm_backend": "deepep_ll",
            "ep_size": 8,
            "hidden_size": hidden,
            "topk": 8,
            "num_experts": 256,
        }
        row |= {"num_tokens": tokens}
        ways += [row | {"phase": way, "latency": 1e6 * seconds / 2} for way in ("dispatch", "combine")]
    write(tmp_path, "vllm/0.24.0/moe_a2a_perf.parquet", ways)
    gathers, scatters, exchanges = fit_exchanges(KernelTables(tmp_path, H100))
    for found in (gathers, scatters):
        assert sorted(found) == [2, 8]
        assert found[8].latency_s == pytest.approx(10e-6, rel=0.02)
        assert found[8].link == pytest.approx(0.6, rel=0.02)
    assert list(exchanges) == ["deepep_low_latency"]
    assert exchanges["deepep_low_latency"].floor_s == pytest.approx(100e-6, rel=0.02)
    assert exchanges["deepep_low_latency"].link == pytest.approx(0.5, rel=0.02)
