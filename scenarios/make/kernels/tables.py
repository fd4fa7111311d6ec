"""From NVIDIA's public timings of vLLM's kernels to a GPU's constants.

The wheels ``aiconfigurator-core`` and ``aisimulate`` (Apache-2.0) hold tables of kernel times under
``systems/data/GPU/OPERATION/vllm/RELEASE/NAME.parquet``: matrix products, attention of prompts and of decodes
with their KV write, expert layers, all-reduces. Each kind of kernel has an equation of two to five constants
(``sim.hardware.gpu_constants``), fitted to the logarithm of its times with a loss that outliers do not bend.

What the tables do not tell: prompts behind a context, steps that mix prompts and decodes, batches of unequal
lengths, whatever the host adds, and, since some dtypes were timed outside CUDA graphs, the floor of
block-wise fp8.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from servecast.scenarios.make.kernels.exchanges import collectives, fit_exchanges
from servecast.scenarios.make.kernels.mixers import fit_latents, fit_states
from servecast.scenarios.make.kernels.timings import (
    BYTES,
    KV,
    LEAST_ROWS,
    TILE,
    WORST_MEDIAN,
    KernelTables,
    Timings,
    columns,
    numbers,
    over,
    parts,
    times,
)
from servecast.sim.hardware.gpu import GPU
from servecast.sim.hardware.gpu_constants import (
    AllReduce,
    DecodeAttention,
    Experts,
    GpuConstants,
    Product,
    PromptAttention,
)

Floats = npt.NDArray[np.float64]

SMALL_KERNEL_S = 2e-6  # norm, rotary and activation: not in the tables; an H100's, launched from a graph
PRODUCTS = {"bfloat16": "bf16", "fp8": "fp8", "nvfp4": "nvfp4"}  # name in the tables -> ours
EXPERTS = {
    "bfloat16": "bf16",
    "fp8_block": "fp8_block",
    "int4_wo": "int4",
    "nvfp4": "nvfp4",
    "w4a16_mxfp4": "mxfp4",
    "w4a8_mxfp4_mxfp8": "mxfp4_mxfp8",
}


def fit_kernel_tables(folder: str | Path, gpu: GPU) -> GpuConstants:
    """Fit a GPU's constants.

    Raises:
        InputError: as ``KernelTables``.
    """
    tables = KernelTables(Path(folder), gpu)
    found: dict[str, Any] = {
        "products": (products := _products(tables)),
        "prompts": _prompts(tables),
        "decodes": _decodes(tables),
        "experts": _experts(tables),
        "cutlass_experts": _experts(tables, "fp8moe_flashinfer_cutlass"),
        "marlin_experts": _experts(tables, "marlin"),
        "all_reduce": _all_reduce(tables),
    }
    found |= zip(("all_gather", "reduce_scatter", "exchanges"), fit_exchanges(tables), strict=True)
    found |= zip(("latent_prompts", "latent_decodes"), fit_latents(tables, products), strict=False)
    sparse = fit_latents(tables, products, sparse=True)
    found |= zip(("sparse_prompts", "sparse_decodes", "indexers"), sparse, strict=True)
    found |= zip(("state_prompts", "state_decodes"), fit_states(tables), strict=True)
    return GpuConstants(
        gpu=gpu.name,
        source="NVIDIA's timings of vLLM's kernels, wheel aiconfigurator-core (Apache-2.0)",
        release=f"vLLM {', '.join(sorted(tables.releases, key=numbers))}",
        small_kernel_s=SMALL_KERNEL_S,
        **found,
    )


def _products(tables: KernelTables) -> dict[Any, Product]:
    gpu = tables.gpu
    rows = tables.read("gemm", "gemm_perf", ("gemm_dtype", "m", "n", "k"))
    rows = rows[rows["n"].between(1024, 32768) & rows["k"].between(1024, 32768) & (rows["m"] <= 8192)]
    found: dict[Any, Product] = {}
    for dtype, part in parts(rows, "gemm_dtype", PRODUCTS):
        if (peak := gpu.peak_flops(dtype)) is None:
            continue
        compute, memory, moved = _product_terms(part, gpu, dtype, peak)

        def equation(
            x: Sequence[float], compute: Floats = compute, memory: Floats = memory, moved: Floats = moved
        ) -> Floats:
            share, bandwidth, exponent, floor, passes = x
            sides = np.power(compute / share, exponent) + np.power(memory / bandwidth, exponent)
            return np.asarray(floor + np.power(sides, 1 / exponent) + passes * moved)

        values, kept = Timings.of(part, "m", 1, 2, 17, 65, 257, 1025, 2049, 8193).fit(
            equation, (0.7, 0.8, 1.8, 4e-6, 0.3), (0.05, 0.05, 1, 0, 0), (1, 1, 8, 4e-5, 30)
        )
        names = ("compute", "bandwidth", "overlap_exponent", "floor_s", "activation_passes")
        found[dtype] = Product(**dict(zip(names, values, strict=True)), residuals=kept)
    # outside a graph: long ones only
    part = rows[(rows["gemm_dtype"] == "fp8_block") & (rows["seconds"] > 2e-4)]
    if "fp8" in found and len(part) >= LEAST_ROWS:
        fp8, peak = found["fp8"], gpu.peak_flops("fp8_block")
        assert peak is not None
        compute, memory, moved = _product_terms(part, gpu, "fp8_block", peak)

        def by_block(x: Sequence[float]) -> Floats:
            sides = np.power(compute / x[0], fp8.overlap_exponent)
            sides += np.power(memory / fp8.bandwidth, fp8.overlap_exponent)
            return np.asarray(fp8.floor_s + np.power(sides, 1 / fp8.overlap_exponent) + x[1] * moved)

        values, kept = Timings.of(part, "m", 1, 65, 257, 1025, 2049, 8193).fit(
            by_block, (0.6, 1.0), (0.05, 0), (1, 30)
        )
        if kept.median <= WORST_MEDIAN:  # else a kernel that was not tuned: fp8 stands for it
            changes = {"compute": values[0], "activation_passes": values[1], "residuals": kept}
            found["fp8_block"] = fp8.model_copy(update=changes)
    return found


def _product_terms(rows: pd.DataFrame, gpu: GPU, dtype: str, peak: float) -> tuple[Floats, Floats, Floats]:
    """Seconds at the datasheet's rates: of the FLOPs, the weights, and the activations in and out."""
    m, n, k = columns(rows, *"mnk")
    return 2 * m * n * k / peak, n * k * BYTES[dtype] / gpu.bandwidth, 2 * m * (k + n) / gpu.bandwidth


def _prompts(tables: KernelTables) -> dict[Any, PromptAttention]:
    gpu = tables.gpu
    rows = _attention(tables, "context_attention_perf")
    rows = rows[rows["batch_size"] * rows["isl"] <= 16384]
    found = {}
    for dtype, part in parts(rows, "kv_cache_dtype", KV):
        batch, length, heads, kv_heads = columns(
            part, "batch_size", "isl", "num_heads", "num_key_value_heads"
        )
        tiles = np.ceil(length / TILE)
        pairs = TILE * TILE * tiles * (tiles + 1) / 2
        found[dtype] = Timings.of(part, "isl", 1, 65, 129, 513, 2049, 8193, 16385).sum_of(
            PromptAttention,
            compute=over(batch * 4 * heads * 128 * pairs / gpu.bf16_flops, 0.6),
            activation_passes=times(
                batch * length * 128 * 2 * (2 * heads + 2 * kv_heads) / gpu.bandwidth, 2.0, 30
            ),
            floor_s=times(1, 12e-6, 6e-5),
        )
    return found


def _decodes(tables: KernelTables) -> dict[Any, DecodeAttention]:
    rows = _attention(tables, "generation_attention_perf")
    rows = rows.assign(context=rows["isl"] + rows["step"])
    rows = rows[(rows["batch_size"] <= 512) & rows["context"].between(16, 131072)]
    found = {}
    for dtype, part in parts(rows, "kv_cache_dtype", KV):
        batch, kv_heads, context = columns(part, "batch_size", "num_key_value_heads", "context")
        read = 2 * kv_heads * 128 * BYTES[dtype] * context * batch
        part = part.assign(read=read / 1e6)
        found[dtype] = Timings.of(part, "read", 0, 1, 10, 100, 1000, 1e6).sum_of(
            DecodeAttention,
            bandwidth=over(read / tables.gpu.bandwidth, 0.85),
            sequence_s=times(batch, 3e-8, 2e-6),
            floor_s=times(1, 12e-6, 6e-5),
        )
    return found


def _attention(tables: KernelTables, name: str) -> pd.DataFrame:
    """Rows of full attention at the usual head size."""
    names = ("kv_cache_dtype", "batch_size", "isl", "step", "num_heads", "num_key_value_heads", "head_dim")
    rows = tables.read("attention", name, names, optional=("window_size",))
    if "window_size" in rows:
        rows = rows[rows["window_size"] == 0]
    return rows[(rows["head_dim"] == 128) & (rows["num_heads"] >= 4)]


def _experts(tables: KernelTables, kernel: str = "") -> dict[Any, Experts]:
    """Of experts on one rank. By a kernel whose source is so named: with a floor that grows with the experts.
    CUTLASS's are whole ones on one of several ranks, evenly used, since chance and skew are counted
    elsewhere; Marlin's are of four bits, in any format."""
    gpu = tables.gpu
    sizes = ("num_tokens", "hidden_size", "inter_size", "topk", "num_experts", "moe_tp_size", "moe_ep_size")
    rows = tables.read("moe", "moe_perf", ("moe_dtype", "distribution", *sizes), optional=("kernel_source",))
    if kernel:
        rows = rows[rows.get("kernel_source", pd.Series("", rows.index)).str.contains(kernel)]
    whole, marlin = "cutlass" in kernel, kernel == "marlin"
    if whole:
        rows = rows[(rows["distribution"] == "balanced") & (rows["moe_ep_size"] > 1)]
        rows = rows[rows["num_experts"] >= 8 * rows["moe_ep_size"]]
    else:
        rows = rows[(rows["distribution"] == "power_law_1.01") & (rows["moe_ep_size"] == 1)]
    if marlin:
        rows = rows.assign(moe_dtype="int4_wo")
    rows = rows[(rows["moe_tp_size"] <= 8) & (rows["num_tokens"] <= 8192)]
    found = {}
    for dtype, part in parts(rows, "moe_dtype", EXPERTS):
        if (peak := gpu.peak_flops(dtype)) is None:
            continue
        tokens, hidden, width, chosen, experts, split, ranks = columns(part, *sizes)
        width, sent, held = width / split, tokens * chosen / ranks, experts / ranks
        touched = experts * (1 - np.power(1 - chosen / experts, tokens))
        if whole:
            touched = np.minimum(held, np.ceil(sent))
        growth: dict[str, Any] = {"expert_s": times(held, 5e-6, 1e-5)} if kernel else {}
        found[dtype] = Timings.of(part, "num_tokens", 1, 2, 17, 65, 257, 1025, 2049, 8193).sum_of(
            Experts,
            compute=over(6 * sent * hidden * width / peak, 0.5, 0.02),
            bandwidth=over(touched * 3 * hidden * width * BYTES[dtype] / gpu.bandwidth, 0.9),
            floor_s=times(1, 3e-5, 2e-4),
            activation_passes=times(2 * sent * (2 * hidden + 3 * width) / gpu.bandwidth, 1.0, 5),
            **growth,
        )
    return found


def _all_reduce(tables: KernelTables) -> dict[int, AllReduce]:
    rows = tables.read("comm", "custom_allreduce_perf", ("kernel_source", "num_gpus", "message_size"))
    graphs = rows["kernel_source"].str.contains("graph", case=False)
    return collectives(tables, rows[graphs] if graphs.any() else rows, 2.0)
