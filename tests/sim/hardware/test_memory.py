"""KV blocks and memory against what servers reported."""

from __future__ import annotations

from typing import Any

import pytest
from model_shapes import load

from servecast.sim.hardware.gpu import find_gpu
from servecast.sim.hardware.memory import KVMemory, kv_memory
from servecast.sim.hardware.shard import Shard, cudagraph_capture_sizes
from servecast.sim.inputs.errors import InputError

GIB = 1 << 30


def pool(model: str, gpu: str, **changes: Any) -> KVMemory:
    settings: dict[str, Any] = {"version": "0.23", "max_num_seqs": 256, "max_num_batched_tokens": 2048}
    settings |= {"max_model_len": 8192, **changes}
    device = find_gpu(gpu)
    sizes = cudagraph_capture_sizes(
        settings["max_num_seqs"],
        settings["max_num_batched_tokens"],
        version=settings["version"],
        capability=device.capability,
    )
    ranks = settings.pop("tensor_parallel_size", 1)
    return kv_memory(Shard(load(model), device, ranks, cudagraph_sizes=sizes), **settings)


def test_l4_benchmark() -> None:
    """Reported: 13.9 GiB used, and a KV peak of 1.1 % with 31 requests of about 290 + 128 tokens."""
    memory = pool("Qwen2.5-0.5B-Instruct", "L4", gpu_memory_utilization=0.6)
    assert memory.memory_used_bytes / GIB == pytest.approx(13.9, rel=0.02)
    half_way = 31.5 * (290 + 64) / memory.kv_tokens
    assert half_way == pytest.approx(0.011, abs=0.002)


def test_rtx_4090_run() -> None:
    """Llama-3.1-8B under vLLM 0.19 got 2,588 blocks."""
    memory = pool("Llama-3.1-8B-Instruct", "RTX 4090", version="0.19", gpu_memory_utilization=0.9)
    assert memory.num_gpu_blocks == pytest.approx(2588, rel=0.02)


def test_a6000_defaults_hold_a_full_batch() -> None:
    memory = pool("Qwen2.5-7B-Instruct", "A6000", max_model_len=32768)
    assert memory.bytes_per_block == 16 * 57_344
    assert 450_000 < memory.kv_tokens < 560_000


def test_the_account_adds_up() -> None:
    memory = pool("Qwen3-32B", "H200", version="0.32", max_num_seqs=1024, max_num_batched_tokens=8192)
    left = sum(line.bytes for line in memory.lines)
    assert [line.name for line in memory.lines][:2] == ["requested", "weights"]
    assert {line.origin for line in memory.lines} == {"computed", "assumed"}
    assert 0 <= left - memory.kv_bytes < memory.bytes_per_block


def test_given_figures_replace_estimates() -> None:
    base = pool("Qwen2.5-7B-Instruct", "A6000")
    exact = pool("Qwen2.5-7B-Instruct", "A6000", kv_cache_memory_bytes=10 * GIB)
    assert [line.origin for line in exact.lines][5:] == ["given"]
    assert exact.num_gpu_blocks == 10 * GIB // exact.bytes_per_block
    assert exact.memory_used_bytes < base.memory_used_bytes
    override = pool("Qwen2.5-7B-Instruct", "A6000", num_gpu_blocks_override=1000)
    assert (override.num_gpu_blocks, override.kv_tokens) == (1000, 15_984)


def test_ranks_have_a_pool_each() -> None:
    memory = pool("Llama-3.1-70B-Instruct", "H100", tensor_parallel_size=4)
    assert memory.bytes_per_block == 16 * 327_680 // 4
    assert memory.kv_tokens > 300_000


def test_cuda_graphs_are_charged_from_0_21_on() -> None:
    old, new = (pool("Qwen2.5-7B-Instruct", "A6000", version=version) for version in ("0.20", "0.21"))
    assert old.num_gpu_blocks > new.num_gpu_blocks


@pytest.mark.parametrize(
    ("model", "gpu", "changes", "message"),
    [
        ("Llama-3.1-70B-Instruct", "H100", {}, "131.4 GiB of weights, but one H100 has 79.2 GiB"),
        ("Llama-3.1-8B-Instruct", "RTX 5080", {}, "no memory is left for KV blocks: requested"),
        ("Llama-3.1-8B-Instruct", "RTX 4090", {"max_model_len": 131_072}, "a sequence up to 131072"),
        ("Qwen3-4B", "L4", {"gpu_memory_utilization": 1.2}, "1.2 is not a share"),
        ("Qwen3-4B", "L4", {"tensor_parallel_size": 5}, "cannot be split 5 ways"),
    ],
)
def test_what_does_not_fit_is_named(model: str, gpu: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        pool(model, gpu, **changes)
    assert message in str(caught.value)
