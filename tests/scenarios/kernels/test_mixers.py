"""Constants of latent attention and of states: tables made of known constants give them back."""

from __future__ import annotations

import itertools
from pathlib import Path

import pandas as pd
import pytest

from servecast.scenarios.make.kernels.mixers import fit_latents, fit_states
from servecast.scenarios.make.kernels.timings import KernelTables
from servecast.sim.hardware.gpu import find_gpu
from servecast.sim.hardware.gpu_constants import Product

H100 = find_gpu("H100")
PRODUCT = Product(compute=0.8, bandwidth=0.9, overlap_exponent=2, floor_s=4e-6, activation_passes=0.5)


def write(folder: Path, operation: str, name: str, rows: list[dict[str, object]]) -> None:
    file = folder / "systems" / "data" / "h100_sxm" / operation / "vllm" / "0.24.0" / f"{name}.parquet"
    file.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_parquet(file)


def products_of(heads: int, tokens: int) -> float:
    """Seconds of the four products of DeepSeek-V3's attention with so many heads, by hand: queries and
    latents down, queries up, keys and values up, output."""
    up, out = heads * 192, heads * 128
    weights = 7168 * (1536 + 576) + 1536 * up + 512 * heads * 256 + out * 7168
    moved = 2 * ((7168 + 1536) + 576 + (1536 + up) + (512 + heads * 256) + (out + 7168))
    compute = 2 * tokens * weights / H100.bf16_flops / 0.8
    memory = 2 * weights / H100.bandwidth / 0.9
    return float((compute**2 + memory**2) ** 0.5 + 0.5 * tokens * moved / H100.bandwidth + 4 * 4e-6)


def test_blocks_of_latent_attention_part_into_products_and_the_rest(tmp_path: Path) -> None:
    """A latent of 512 + 64 numbers is read once for all heads; a head multiplies 2 x 512 + 64 of them in a
    decode, and keys of 192 and values of 128 in a prompt, in tiles of 128 tokens."""
    row = {"model": "deepseek-ai/DeepSeek-V3", "kv_cache_dtype": "bfloat16", "gemm_type": "bfloat16"}
    decodes, prompts = [], []
    for heads, batch, step in itertools.product((8, 128), (1, 8, 64, 256), (255, 1023, 4095, 16383)):
        seen = batch * (step + 1)
        compute = seen * heads * 2 * (2 * 512 + 64) / H100.bf16_flops / 0.6
        longer = max(compute, seen * 576 * 2 / H100.bandwidth / 0.9)
        seconds = products_of(heads, batch) + 6e-5 + longer + 1e-7 * batch
        decodes.append(row | {"num_heads": heads, "batch_size": batch, "isl": 1, "step": step})
        decodes[-1]["latency"] = 1e3 * seconds
    for heads, batch, length in itertools.product((8, 128), (1, 4), (128, 512, 2048, 8192)):
        tiles = length // 128
        pairs = batch * 128 * 128 * tiles * (tiles + 1) / 2
        moved = batch * length * 2 * (2 * heads * (192 + 128) + 1536 + 576) / H100.bandwidth
        seconds = products_of(heads, batch * length) + 7e-5 + 5 * moved
        seconds += pairs * heads * 2 * (192 + 128) / H100.bf16_flops / 0.7
        prompts.append(row | {"num_heads": heads, "batch_size": batch, "isl": length, "step": 0})
        prompts[-1]["latency"] = 1e3 * seconds
    write(tmp_path, "mla", "mla_generation_module_perf", decodes * 2)
    write(tmp_path, "mla", "mla_context_module_perf", prompts * 3)
    prompt, decode, indexers = fit_latents(KernelTables(tmp_path, H100), {"bf16": PRODUCT})
    found = decode["bf16"]
    assert (found.compute, found.bandwidth, found.floor_s) == pytest.approx((0.6, 0.9, 6e-5), rel=0.02)
    assert prompt["bf16"].compute == pytest.approx(0.7, rel=0.02)
    assert prompt["bf16"].activation_passes == pytest.approx(5, rel=0.03)
    assert indexers == {}


def test_states_are_read_and_written_whole(tmp_path: Path) -> None:
    """16 heads of 128 x 128 numbers in fp32; two kernels of a decode, of which a table has both."""
    rows = []
    for batch, heads in itertools.product((1, 2, 4, 8, 16, 32, 64, 128, 256, 512), (4, 8, 16, 32)):
        memory = batch * 2 * heads * 128 * 128 * 4 / H100.bandwidth
        row = {
            "phase": "generation",
            "batch_size": batch,
            "seq_len": 1,
            "num_k_heads": 4,
            "num_v_heads": heads,
        }
        rows.append(row | {"kernel_source": "causal_conv1d_update", "latency": 2e-3})
        source = "fused_recurrent_gated_delta_rule_packed_decode"
        rows.append(row | {"kernel_source": source, "latency": 1e3 * (4e-6 + memory / 0.8)})
    for batch, length, heads in itertools.product((1, 4), (64, 256, 1024, 4096, 8192), (4, 8, 16, 32)):
        moved = batch * length * 2 * (2 * 4 * 128 + 2 * heads * 128) / H100.bandwidth
        row = {
            "phase": "context",
            "batch_size": batch,
            "seq_len": length,
            "num_k_heads": 4,
            "num_v_heads": heads,
        }
        seconds = 8e-6 + 4 * moved + 4e-8 * length + 1e-6 * batch
        rows.append(row | {"kernel_source": "causal_conv1d_fn", "latency": 2e-3})
        rows.append(row | {"kernel_source": "chunk_gated_delta_rule_flashinfer", "latency": 1e3 * seconds})
    write(tmp_path, "linear_attention", "gdn_perf", rows)
    prompts, decodes = fit_states(KernelTables(tmp_path, H100))
    assert set(prompts) == set(decodes) == {"gdn"}
    assert (decodes["gdn"].bandwidth, decodes["gdn"].floor_s) == pytest.approx((0.8, 6e-6), rel=0.02)
    prompt = prompts["gdn"]
    assert (prompt.activation_passes, prompt.serial_s) == pytest.approx((4, 4e-8), rel=0.03)
