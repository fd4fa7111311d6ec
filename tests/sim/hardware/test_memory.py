"""KV blocks and memory against what servers reported."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

import pytest
from cache_models import MODELS as CACHE_MODELS
from model_shapes import load
from places import DATA

from servecast.sim.engine.config import EngineConfig
from servecast.sim.hardware.gpu import find_gpu
from servecast.sim.hardware.memory import KVMemory, MemoryLine, kv_memory
from servecast.sim.hardware.model_shape import ModelShape
from servecast.sim.hardware.shard import Shard, cudagraph_capture_sizes
from servecast.sim.inputs.errors import InputError

GIB = 1 << 30
MODELS: dict[str, Any] = json.loads((DATA / "model_configs" / "configs.json").read_text())


def pool(model: str, gpu: str, **changes: Any) -> KVMemory:
    settings: dict[str, Any] = {"max_num_seqs": 256, "max_num_batched_tokens": 2048, "max_model_len": 8192}
    settings |= {"gpu_memory_utilization": 0.92, "version": "0.23"} | changes
    names = {field.name for field in fields(EngineConfig)} - {"version"}
    config = EngineConfig("0.32", **{name: settings.pop(name) for name in names & set(settings)})
    device, version = find_gpu(gpu), settings["version"]
    sizes = cudagraph_capture_sizes(
        config.max_num_seqs,
        config.max_num_batched_tokens,
        version=version,
        capability=device.capability,
    )
    ranks, kv = settings.pop("tensor_parallel_size", 1), settings.pop("kv_dtype_bytes", 2)
    shard = Shard(load(model), device, ranks, kv_dtype_bytes=kv, cudagraph_sizes=sizes)
    return kv_memory(shard, config, **settings)


def line(memory: KVMemory, name: str) -> MemoryLine:
    return next(line for line in memory.lines if line.name == name)


def test_l4_benchmark() -> None:
    """Reported: 13.9 GiB used, and a KV peak of 1.1 % with 31 requests of about 290 + 128 tokens."""
    memory = pool("Qwen2.5-0.5B-Instruct", "L4", gpu_memory_utilization=0.6)
    assert memory.memory_used_bytes / GIB == pytest.approx(13.9, rel=0.02)
    half_way = 31.5 * (290 + 64) / memory.kv_tokens
    assert half_way == pytest.approx(0.011, abs=0.002)


def test_rtx_4090_run() -> None:
    """Llama-3.1-8B under vLLM 0.19 got 2,588 blocks at its first start."""
    changes: dict[str, Any] = {"version": "0.19", "gpu_memory_utilization": 0.9, "compile_cache": "cold"}
    memory = pool("Llama-3.1-8B-Instruct", "RTX 4090", **changes)
    assert memory.num_gpu_blocks == pytest.approx(2588, rel=0.01)


def test_the_cold_start_of_qwen3_8b_on_an_rtx_4090() -> None:
    """A log of vLLM 0.27.1 has 35,792 tokens, one of 0.24 with a warm cache 43,888."""
    changes: dict[str, Any] = {"version": "0.27", "max_model_len": 32768}
    cold = pool("Qwen3-8B", "RTX 4090", compile_cache="cold", **changes)
    assert cold.logged_tokens == pytest.approx(35_792, rel=0.04)
    warm = pool("Qwen3-8B", "RTX 4090", **changes)
    assert warm.logged_tokens == pytest.approx(43_888, rel=0.02)
    assert warm.range[0] < 35_792 < 43_888 < warm.range[1]


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
    assert [line.origin for line in exact.lines][6:] == ["given"]
    assert exact.range == (exact.logged_tokens, exact.logged_tokens)
    assert exact.num_gpu_blocks == 10 * GIB // exact.bytes_per_block
    assert exact.memory_used_bytes < base.memory_used_bytes
    override = pool("Qwen2.5-7B-Instruct", "A6000", num_gpu_blocks_override=1000)
    assert (override.num_gpu_blocks, override.kv_tokens) == (1000, 15_984)


def test_ranks_have_a_pool_each() -> None:
    memory = pool("Llama-3.1-70B-Instruct", "H100", tensor_parallel_size=4)
    assert memory.bytes_per_block == 16 * 327_680 // 4
    assert memory.kv_tokens > 300_000


@pytest.mark.parametrize(
    ("model", "version", "charged"),
    [
        ("Qwen2.5-7B-Instruct", "0.20", False),
        ("Qwen2.5-7B-Instruct", "0.21", True),  # Model Runner V1
        ("Llama-3.1-8B-Instruct", "0.23", False),  # V2, whose profile_cudagraph_memory returns 0
        ("Qwen3-30B-A3B", "0.23", True),  # experts run on V1
        ("Llama-3.1-8B-Instruct", "0.32", True),  # V2 measures them
    ],
)
def test_cuda_graphs_are_charged_by_release_and_runner(model: str, version: str, charged: bool) -> None:
    memory = pool(model, "H200", version=version)
    assert (line(memory, "CUDA graphs").bytes < 0) is charged


def test_the_sampler_s_peak_is_that_of_the_sources() -> None:
    """By the logit: 2 + 4 (copy) + 12 (sorted values and indices) + 20 (the sort's own) up to 0.16; 2 + 4 + 4
    (probabilities) + 4 (noise) and a row a multiprocessor from 0.17 on. Logged: 5.64 and 2.23 GiB."""
    changes: dict[str, Any] = {"max_num_seqs": 1024, "max_num_batched_tokens": 8192}
    logits, states = 1024 * 151_936, (8192 + 2 * 1024) * 5120 * 2
    for version, peak, logged in (
        ("0.16", 38 * logits, 5.64),
        ("0.17", 14 * logits + 132 * 151_936 * 4, 2.23),
    ):
        memory = pool("Qwen3-14B", "H100", version=version, **changes)
        assert -line(memory, "activation peak").bytes == peak + states + (32 << 20)
        assert -line(memory, "activation peak").bytes / GIB == pytest.approx(logged, abs=0.006)


def test_experts_add_their_workspaces() -> None:
    """Logged: 2.68 GiB; 8,192 tokens x 8 experts x 2,048 hidden, twice, are 0.5 of it."""
    memory = pool("Qwen3-30B-A3B", "H100", version="0.19", max_num_seqs=1024, max_num_batched_tokens=8192)
    assert -line(memory, "activation peak").bytes / GIB == pytest.approx(2.68, abs=0.01)


def test_vllm_s_log_line() -> None:
    """vLLM counts the null block: 12,288 blocks and sequences of 32,768 are 6 sequences."""
    memory = pool("Qwen3-4B", "H200", max_model_len=32768, num_gpu_blocks_override=12_288)
    assert (memory.logged_tokens, memory.max_concurrency) == (196_608, 6.0)
    low, high = pool("Qwen3-4B", "H200").range
    assert low < pool("Qwen3-4B", "H200").logged_tokens < high


def test_auto_fits_the_length_to_the_pool() -> None:
    fitted = pool("Qwen3-8B", "RTX 4090", max_model_len=40_960, version="0.32", fit_max_model_len=True)
    assert fitted.max_model_len == fitted.kv_tokens < 40_960
    assert pool("Qwen3-8B", "H200", max_model_len=40_960, fit_max_model_len=True).max_model_len == 40_960


def test_what_may_fit_is_a_warning() -> None:
    """A length between the estimate and the upper end of its range is not refused."""
    fits = pool("Qwen3-8B", "RTX 4090", max_model_len=38_000, version="0.32")
    assert fits.warning is None
    longest = (fits.logged_tokens + fits.range[1]) // 2
    doubtful = pool("Qwen3-8B", "RTX 4090", max_model_len=longest, version="0.32")
    assert doubtful.warning is not None
    assert "may be up to" in doubtful.warning
    assert "CUDA graphs -0.59 GiB" in doubtful.warning
    assert longest <= doubtful.kv_tokens < longest + 16
    with pytest.raises(InputError, match=r"auto fits it to the pool"):
        pool("Qwen3-8B", "RTX 4090", max_model_len=fits.range[1] + 32, version="0.32")


@pytest.mark.parametrize(
    ("model", "gpu", "changes", "message"),
    [
        ("Llama-3.1-70B-Instruct", "H100", {}, "131.4 GiB of weights, but one H100 has 79.2 GiB"),
        ("Llama-3.1-8B-Instruct", "RTX 5080", {}, "no memory is left for KV blocks: requested"),
        ("Qwen3-8B", "H100", {"kv_cache_memory_bytes": 100}, "kv_cache_memory_bytes: no memory is left"),
        ("Llama-3.1-8B-Instruct", "RTX 4090", {"max_model_len": 131_072}, "a sequence up to 131072"),
        ("Qwen3-4B", "L4", {"gpu_memory_utilization": 1.2}, "1.2 is not a share"),
        ("Qwen3-4B", "L4", {"tensor_parallel_size": 5}, "cannot be split 5 ways"),
    ],
)
def test_what_does_not_fit_is_named(model: str, gpu: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        pool(model, gpu, **changes)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "version", "gib", "ranks", "kv", "longest", "tokens", "concurrency"),
    [  # what vLLM's own functions say of layers of these sizes, with a budget of 8,192 tokens, async
        ("gemma-3-27b text", "0.32", 15, 1, 2, 32_768, 46_918, 1.43),
        ("gemma-3-27b text", "0.23", 15, 1, 2, 32_768, 73_076, 2.23),
        ("gemma-3-27b text", "0.32", 15, 1, 1, 32_768, 93_836, 2.86),
        ("gemma-3-1b", "0.32", 60, 1, 2, 32_768, 3_839_362, 117.17),
        ("gpt-oss-20b", "0.32", 55, 1, 2, 131_072, 2_133_894, 16.28),
        ("gpt-oss-20b", "0.23", 55, 1, 2, 131_072, 2_259_288, 17.24),
        ("gpt-oss-120b", "0.32", 60, 8, 2, 131_072, 12_415_438, 94.72),
        ("Qwen3-Next-80B-A3B", "0.32", 20, 4, 2, 262_144, 1_736_366, 6.62),
        ("DeepSeek-V3", "0.32", 8, 8, 1, 131_072, 244_416, 1.86),
        ("DeepSeek-V3.2", "0.32", 8, 8, 1, 131_072, 178_688, 1.36),
        ("Llama-4-Scout text", "0.32", 40, 8, 2, 131_072, 1_747_616, 13.33),
    ],
)
def test_pools_of_groups(
    name: str, version: str, gib: int, ranks: int, kv: int, longest: int, tokens: int, concurrency: float
) -> None:
    said = {"quant_method": "fp8", "weight_block_size": [128, 128]} if "DeepSeek" in name else None
    model = ModelShape.from_config(MODELS[name]["config"] | {"quantization_config": said})
    config = EngineConfig(version, 256, 8192, longest, gpu_memory_utilization=0.92)
    shard = Shard(model, find_gpu("H200"), ranks, kv_dtype_bytes=kv)
    memory = kv_memory(shard, config, version=version, kv_cache_memory_bytes=gib * GIB)
    assert (memory.logged_tokens, round(memory.max_concurrency, 2)) == (tokens, concurrency)
    assert memory.range == (tokens, tokens)


def test_one_kind_of_layers_needs_no_groups() -> None:
    """A block a full layer and sequence: what the engine keeps is as before."""
    config = EngineConfig("0.32", 256, 8192, 32_768)
    one = kv_memory(
        Shard(load("Qwen3-8B"), find_gpu("H200"), 1), config, version="0.32", kv_cache_memory_bytes=GIB * 20
    )
    assert (one.kv_groups, one.block_size, one.bytes_per_block) == ((), 16, 16 * 147_456)
    latent = Shard(ModelShape.from_config(MODELS["DeepSeek-V2-Lite"]["config"]), find_gpu("H200"), 1)
    found = kv_memory(latent, config, version="0.32", kv_cache_memory_bytes=GIB * 20)
    assert (found.kv_groups, found.bytes_per_block) == ((), found.block_size * 27 * 576 * 2)


@pytest.mark.parametrize(
    ("name", "cache"),
    [
        ("gemma-3-27b text", "gemma-3-27b"),
        ("gpt-oss-20b", "gpt-oss-20b"),
        ("Mistral-7B-v0.1", "mistral-7b-v0.1"),
        ("Qwen3-Next-80B-A3B", "qwen3-next-80b TP4"),
        ("granite-4.0-h-small", "granite-4.0-h-small"),
        ("Nemotron-Nano-9B-v2", "nemotron-nano-9b-v2 TP2"),
        ("Kimi-Linear-48B-A3B", "kimi-linear-48b"),
        ("DeepSeek-V3", "deepseek-v3 fp8 TP8"),
        ("DeepSeek-V3.2", "deepseek-v3.2"),
        ("Llama-4-Scout text", "llama-4-scout TP8"),
        ("MiMo-V2-Flash", "mimo-v2-flash TP2"),
    ],
)
def test_a_config_says_the_layers_whose_pools_are_vllms(name: str, cache: str) -> None:
    """tests/sim/engine/test_kv_groups.py holds the pools of these layers against vLLM's own functions."""
    by_hand = {model.name: model.layers for model in CACHE_MODELS}
    assert ModelShape.from_config(MODELS[name]["config"]).cache_layers == by_hand[cache]
