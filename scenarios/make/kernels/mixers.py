"""Latent and sparse attention and recurrent states, from NVIDIA's timings to a GPU's constants.

The tables time whole blocks of DeepSeek's attention, its projections among them: what the GPU's products take
of that is known, and the rest is fitted. Prompts of sparse attention were timed outside CUDA graphs, so only
long ones count. Of Kimi's delta layers the convolution before a prompt is left out: a development version's
took 0.8 ms of a single token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from servecast.scenarios.make.kernels.timings import (
    BYTES,
    KV,
    LEAST_ROWS,
    TILE,
    WORST_MEDIAN,
    KernelTables,
    Timings,
    columns,
    over,
    times,
)
from servecast.sim.hardware.gpu import GPU
from servecast.sim.hardware.gpu_constants import (
    DecodeAttention,
    Indexer,
    Product,
    PromptAttention,
    StatePrompts,
)
from servecast.sim.hardware.layer_kinds import Mixer
from servecast.sim.hardware.mixing import (
    attended_numbers,
    decode_pair_flops,
    head_padding,
    index_bytes,
    index_flops,
    kv_numbers,
    prompt_pair_flops,
    state_bytes,
)

Floats = npt.NDArray[np.float64]

_DEEPSEEK = Mixer(
    kind="mla", count=1, heads=128, head_dim=192, value_dim=128, query_rank=1536, kv_rank=512, rope_dim=64
)
MODELS: Mapping[str, tuple[int, Mixer]] = {  # model of the tables -> hidden size, its attention
    "deepseek-ai/DeepSeek-V3": (7168, _DEEPSEEK),
    "deepseek-ai/DeepSeek-V3.2": (
        7168,
        replace(_DEEPSEEK, kind="sparse_mla", index_heads=64, index_dim=128, index_topk=2048),
    ),
    "zai-org/GLM-5": (
        6144,
        Mixer(
            kind="sparse_mla",
            count=1,
            heads=64,
            head_dim=256,
            value_dim=256,
            query_rank=2048,
            kv_rank=512,
            rope_dim=64,
            index_heads=32,
            index_dim=128,
            index_topk=2048,
        ),
    ),
}
_STATE = Mixer(kind="gdn", count=1, heads=1, head_dim=128, value_dim=128, state_bytes=4)
WEIGHTS = {"bfloat16": "bf16", "fp8_block": "fp8_block", "nvfp4": "nvfp4"}
MOST_COMPUTE = 0.85  # of the peak in prompts: short ones leave it open, and no kernel reached more
LONG_S = 3e-3  # prompts outside CUDA graphs: longer than their launches
KERNELS = {  # state -> kernels of a prompt and of a decode
    "gdn": (
        ("causal_conv1d_fn", "chunk_gated_delta_rule_flashinfer"),
        ("causal_conv1d_update", "fused_recurrent_gated_delta_rule_packed_decode"),
    ),
    "kda": (("flashkda_fwd",), ("causal_conv1d_update", "fused_recurrent_kda_packed_decode")),
}


@dataclass(frozen=True, slots=True)
class _Block:
    """Timed blocks of latent attention, a row each. linear: s of their products, as fitted; the other arrays
    are s at the datasheet's rates, or counts."""

    seconds: Floats
    batch: Floats
    length: Floats
    linear: Floats
    compute: Floats
    memory: Floats
    moved: Floats
    index_compute: Floats
    index_memory: Floats


def fit_latents(
    tables: KernelTables, products: Mapping[Any, Product], *, sparse: bool = False
) -> tuple[dict[Any, PromptAttention], dict[Any, DecodeAttention], dict[Any, Indexer]]:
    """Constants of prompts, decodes and, of sparse attention, the indexer, by the KV cache's dtype; empty
    where a GPU has no such tables."""
    folder, name = ("sparse_attention", "dsa") if sparse else ("mla", "mla")
    prompts: dict[Any, PromptAttention] = {}
    decodes: dict[Any, DecodeAttention] = {}
    indexers: dict[Any, Indexer] = {}
    for kv, dtype in KV.items():
        context, generation = (
            _blocks(tables, folder, f"{name}_{phase}_module_perf", kv, products)
            for phase in ("context", "generation")
        )
        if context is None or generation is None:
            continue
        decode, index_bandwidth = _decodes(generation)
        prompt, index_compute = _prompts(context, sparse)
        decodes[dtype], prompts[dtype] = decode, prompt
        if sparse:
            indexers[dtype] = Indexer(compute=index_compute, bandwidth=index_bandwidth)
    return prompts, decodes, indexers


def _decodes(block: _Block) -> tuple[DecodeAttention, float]:
    def equation(x: Sequence[float]) -> Floats:
        longer = np.maximum(block.compute / x[1], block.memory / x[2])
        return np.asarray(block.linear + x[0] + longer + x[3] * block.batch + block.index_memory / x[4])

    timings = Timings(block.seconds, block.batch * block.length, (0, 1e3, 1e4, 1e5, 1e6, 1e9))
    (*values, index), kept = timings.fit(
        equation, (6e-5, 0.6, 0.8, 1e-7, 0.9), (0, 0.05, 0.05, 0, 0.05), (5e-4, 1, 1, 5e-6, 1)
    )
    names = ("floor_s", "compute", "bandwidth", "sequence_s")
    return DecodeAttention(**dict(zip(names, values, strict=True)), residuals=kept), index


def _prompts(block: _Block, sparse: bool) -> tuple[PromptAttention, float]:
    def equation(x: Sequence[float]) -> Floats:
        index = block.index_compute / x[3]
        return np.asarray(block.linear + x[0] + block.compute / x[1] + x[2] * block.moved + index)

    timings = Timings(block.seconds, block.length, (1, 129, 513, 2049, 8193, 40000))
    most = LONG_S if sparse else 5e-4  # sparse ones: launches outside CUDA graphs
    (*values, index), kept = timings.fit(
        equation, (most / 2, 0.6, 3.0, 0.5), (0, 0.05, 0, 0.02), (most, MOST_COMPUTE, 30, 1)
    )
    names = ("floor_s", "compute", "activation_passes")
    return PromptAttention(**dict(zip(names, values, strict=True)), residuals=kept), index


def _blocks(
    tables: KernelTables, folder: str, name: str, kv: str, products: Mapping[Any, Product]
) -> _Block | None:
    names = ("model", "kv_cache_dtype", "gemm_type", "num_heads", "batch_size", "isl", "step")
    if not tables.has(folder, name):
        return None
    rows = tables.read(folder, name, names)
    rows = rows[(rows["kv_cache_dtype"] == kv) & rows["model"].isin(MODELS)]
    rows = rows[rows["gemm_type"].map(WEIGHTS).isin(list(products))]
    if "context" in name:
        rows = rows[(rows["batch_size"] * rows["isl"] <= 32768) & (rows["step"] == 0)]
        if folder != "mla":
            rows = rows[(rows["seconds"] > LONG_S) & (rows["isl"] > 2048)]
    else:
        rows = rows[(rows["batch_size"] <= 512) & (rows["step"] >= 16)]
    parts = [
        _block(part, *MODELS[str(key[0])], int(str(key[2])), WEIGHTS[str(key[1])], kv, products, tables.gpu)
        for key, part in rows.groupby(["model", "gemm_type", "num_heads"])
        if int(str(key[2])) <= MODELS[str(key[0])][1].heads
    ]
    if sum(len(part["seconds"]) for part in parts) < LEAST_ROWS:
        return None
    return _Block(*(np.concatenate([part[name] for part in parts]) for name in _Block.__slots__))


def _block(
    rows: pd.DataFrame,
    hidden: int,
    mixer: Mixer,
    heads: int,
    dtype: str,
    kv: str,
    products: Mapping[Any, Product],
    gpu: GPU,
) -> dict[str, Floats]:
    """Rows of one model with so many heads on the rank that was timed."""
    ranks = mixer.heads // heads
    batch, new, step = columns(rows, "batch_size", "isl", "step")
    decode = bool((step > 0).any())
    topk = mixer.index_topk
    if decode:
        length = step + 1
        pairs = batch * length
        seen = batch * np.minimum(length, topk) if topk else pairs
        flops, tokens = decode_pair_flops(mixer, ranks), batch
    else:
        length = new
        tiles = np.ceil(new / TILE)
        pairs = batch * TILE * TILE * tiles * (tiles + 1) / 2
        free = np.minimum(new, topk)
        seen = batch * (free * (free + 1) / 2 + (new - free) * topk) if topk else pairs
        flops = prompt_pair_flops(mixer, ranks) * head_padding(mixer, ranks, gpu)
        tokens = batch * new
    width = 1 if kv == "fp8" else 2
    linears = mixer.linears(hidden)
    product, peak = products[dtype], gpu.peak_flops(dtype)
    assert peak is not None
    weights = sum(each.weights(ranks) for each in linears)
    moved = 2.0 * sum(each.moved(ranks) for each in linears)
    exponent = product.overlap_exponent
    sides = np.power(2 * tokens * weights / peak / product.compute, exponent)
    sides += (weights * BYTES[dtype] / gpu.bandwidth / product.bandwidth) ** exponent
    linear = np.power(sides, 1 / exponent) + product.activation_passes * tokens * moved / gpu.bandwidth
    linear += product.floor_s * sum(not each.joined for each in linears)
    return {
        "seconds": rows["seconds"].to_numpy(float),
        "batch": batch,
        "length": length,
        "linear": linear,
        "compute": seen * flops / gpu.bf16_flops,
        "memory": seen * kv_numbers(mixer, ranks) * width / gpu.bandwidth,
        "moved": tokens * 2 * attended_numbers(mixer, ranks) / gpu.bandwidth,
        "index_compute": pairs * index_flops(mixer) / (gpu.fp8_flops or gpu.bf16_flops),
        "index_memory": pairs * index_bytes(mixer) / gpu.bandwidth,
    }


def fit_states(tables: KernelTables) -> tuple[dict[Any, StatePrompts], dict[Any, DecodeAttention]]:
    """Constants of recurrent states, prompts and decodes, by kind; empty where a GPU has no such tables."""
    prompts: dict[Any, StatePrompts] = {}
    decodes: dict[Any, DecodeAttention] = {}
    bandwidth = tables.gpu.bandwidth
    for kind, kernels in KERNELS.items():
        folder = "linear_attention" if kind == "gdn" else kind
        if not tables.has(folder, f"{kind}_perf"):
            continue
        keys = ["batch_size", "seq_len", "num_k_heads", "num_v_heads"]
        rows = tables.read(folder, f"{kind}_perf", ("phase", "kernel_source", *keys))
        prompt, decode = (
            _together(rows[rows["phase"] == phase], keys, names)
            for phase, names in zip(("context", "generation"), kernels, strict=True)
        )
        prompt = prompt[prompt["batch_size"] * prompt["seq_len"] <= 32768]
        decode = decode[decode["batch_size"] <= 512]
        if min(len(prompt), len(decode)) < LEAST_ROWS:
            continue
        mixers = [
            [
                replace(_STATE, heads=int(v), kv_heads=int(k))
                for k, v in zip(part["num_k_heads"], part["num_v_heads"], strict=True)
            ]
            for part in (prompt, decode)
        ]
        batch, length = columns(prompt, "batch_size", "seq_len")
        numbers = np.array([attended_numbers(mixer, 1) for mixer in mixers[0]])
        of_prompt = Timings.of(prompt, "seq_len", 1, 65, 513, 2049, 8193, 40000).sum_of(
            StatePrompts,
            floor_s=times(1, 1e-5, 1e-4),
            activation_passes=times(batch * length * 2 * numbers / bandwidth, 3, 30),
            serial_s=times(length, 4e-8, 1e-6),
            sequence_s=times(batch, 5e-7, 1e-4),
        )
        (batch,) = columns(decode, "batch_size")
        memory = batch * 2 * np.array([state_bytes(mixer, 1) for mixer in mixers[1]]) / bandwidth
        of_decode = Timings.of(decode, "batch_size", 1, 2, 17, 65, 257, 513).sum_of(
            DecodeAttention,
            floor_s=times(1, 6e-6, 1e-4),
            bandwidth=over(memory, 0.85),
            sequence_s=times(batch, 1e-8, 2e-6),
        )
        assert of_decode.residuals is not None
        if of_decode.residuals.median <= WORST_MEDIAN:  # else states in the L2 cache, as of few heads
            prompts[kind], decodes[kind] = of_prompt, of_decode
    return prompts, decodes


def _together(rows: pd.DataFrame, keys: list[str], kernels: Sequence[str]) -> pd.DataFrame:
    """The summed times of several kernels where all of them were timed, the median of repeated rows."""
    each = [
        rows[rows["kernel_source"] == kernel].groupby(keys)["seconds"].median().rename(kernel)
        for kernel in kernels
    ]
    joined = pd.concat(each, axis=1, join="inner")
    return joined.sum(axis=1).rename("seconds").reset_index()
