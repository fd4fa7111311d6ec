"""Decode context parallelism: KV of a rank, what ranks read and exchange, and what vLLM refuses."""

from __future__ import annotations

import re
from typing import Any

import pytest
from model_shapes import load
from step_cases import Step, decode

from servecast.sim.hardware.gpu import find_gpu
from servecast.sim.hardware.shard import Shard
from servecast.sim.hardware.step_time.physical import Efficiencies, PhysicalStepTime
from servecast.sim.inputs.errors import InputError
from servecast.sim.inputs.schema import parse
from servecast.sim.run.simulation import simulate
from servecast.sim.scenario.deployment import Deployment
from servecast.sim.scenario.scenario import Scenario

H200 = find_gpu("h200")
EFFICIENCIES = Efficiencies(link=0.5, allreduce_s=20e-6, kernel_s=2e-6)


def step_time(model: str, ranks: int, **shared: Any) -> PhysicalStepTime:
    return PhysicalStepTime(Shard(load(model), H200, ranks, **shared), EFFICIENCIES)


def scenario(**engine: Any) -> Scenario:
    document = {
        "schema_version": 1,
        "name": "shared-out",
        "model": {"config": engine.pop("model", "Kimi-K2.5")},
        "gpu": {"name": engine.pop("gpu", "h200")},
        "engine": {"version": "0.32", "tensor_parallel_size": 8, "max_model_len": 8192} | engine,
        "workload": {
            "prompt_tokens": 3000,
            "output_tokens": 20,
            "arrivals": {"kind": "poisson", "request_rate": 4},
            "num_requests": 20,
        },
    }
    return parse(Scenario, document, source="shared-out.yaml")


@pytest.mark.parametrize(("model", "size"), [("Kimi-K2.5", 8), ("Qwen3-235B-A22B", 2)])
def test_the_pool_holds_each_token_once(model: str, size: int) -> None:
    """Eight ranks hold the whole latents each, or two a KV head: shared out, the same blocks have the tokens
    of all, and as many bytes on each rank."""
    weights = {"quantization": "fp8"} if model == "Qwen3-235B-A22B" else {}
    alone, shared = (
        Deployment.of(scenario(model=model, decode_context_parallel_size=each, **weights))
        for each in (1, size)
    )
    assert shared.memory.bytes_per_block == alone.memory.bytes_per_block
    assert shared.config.num_gpu_blocks == alone.config.num_gpu_blocks
    assert shared.config.block_size == size * alone.config.block_size
    assert shared.memory.logged_tokens == pytest.approx(size * alone.memory.logged_tokens, rel=0.02)


@pytest.mark.parametrize(
    ("model", "size", "layers", "query", "output", "kernels"),
    [
        # bytes of a token in one layer: all 64 heads of queries and of outputs, on latents, in 16 bits
        ("Kimi-K2.5", 8, 61, 64 * 576 * 2, 64 * 512 * 2, 1),
        # two ranks of eight share a KV head, with eight query heads each, of 128
        ("Qwen3-235B-A22B", 2, 94, 16 * 128 * 2, 16 * 128 * 2, 2),
    ],
)
def test_what_a_decode_exchanges(
    model: str, size: int, layers: int, query: int, output: int, kernels: int
) -> None:
    """An all-gather of queries, one of log-sum-exps, a reduce-scatter of outputs, each 20 us and (n - 1) / n
    of the bytes at half of 450 GB/s, and small kernels; an all-to-all saves one latency."""
    assert H200.link_bandwidth == 450e9
    heads = query // 576 // 2 if kernels == 1 else query // 128 // 2
    sums = heads * 4  # fp32, from each rank
    exchange = step_time(model, 8, context_ranks=size).breakdown(decode(10))["context_parallel"]
    sent = 10 * (size - 1) / size * (query + output + size * sums) / (450e9 / 2)
    assert exchange == pytest.approx(layers * (3 * 20e-6 + kernels * 2e-6 + sent))
    both = step_time(model, 8, context_ranks=size, context_backend="a2a").breakdown(decode(10))
    sent = 10 * (size - 1) / size * (query + output + sums) / (450e9 / 2)
    assert both["context_parallel"] == pytest.approx(layers * (2 * 20e-6 + kernels * 2e-6 + sent))


def test_a_rank_reads_its_part_of_the_context() -> None:
    """Keys and values of one head, half of the tokens; of latents an eighth, for the heads of all ranks."""
    long = decode(8, 200_000)
    alone, shared = (
        step_time("Qwen3-235B-A22B", 8, context_ranks=size).breakdown(long)["attention_decode"]
        for size in (1, 2)
    )
    fixed = 94 * 8 * EFFICIENCIES.attention_seq_s
    assert shared - fixed == pytest.approx((alone - fixed) / 2)
    latent = step_time("Kimi-K2.5", 8, context_ranks=8).breakdown(long)["attention_decode"]
    read = 61 * 8 * 200_000 / 8 * 576 * 2 / (H200.bandwidth * EFFICIENCIES.kv_bandwidth)
    assert latent == pytest.approx(read + 61 * 8 * EFFICIENCIES.attention_seq_s)


def test_prompts_gather_older_latents_and_grouped_queries() -> None:
    """Of latents a chunk's older tokens go to all ranks, 576 numbers of 16 bits a layer. Grouped-query
    attention exchanges all tokens of a step as soon as one request in it has KV."""
    chunk, size = Step(chunks=((1000, 30_000),)), 61 * 30_000 * 7 / 8 * 576 * 2
    found = [
        step_time("Kimi-K2.5", 8, context_ranks=each).breakdown(chunk)["attention_prefill"] for each in (1, 8)
    ]
    assert found[1] - found[0] == pytest.approx(size / (450e9 / 2))
    grouped = step_time("Qwen3-235B-A22B", 8, context_ranks=2)
    parts = [
        grouped.breakdown(each)["context_parallel"]
        for each in (
            Step(chunks=((1000, 0),)),
            Step(chunks=((999, 0),), decodes=1, decode_context=10, samples=1),
            decode(1000),
        )
    ]
    assert parts[0] == 0.0 < parts[1] == parts[2]


def test_a_run_takes_these_times() -> None:
    """The engine's own sums are those of the step time, to the bit."""
    made = scenario(decode_context_parallel_size=8)
    found, deployment = simulate(made), Deployment.of(made)
    rows = found.steps[(found.steps["prefill_tokens"] == 0) & (found.steps["decodes"] > 0)]
    assert len(rows) > 50
    for row in rows.itertuples():
        asked = Step(decodes=row.decodes, decode_context=row.decode_context, samples=row.decodes)
        assert row.duration == pytest.approx(deployment.step_time.seconds(asked), rel=1e-12)
    assert {"--block-size 16", "--decode-context-parallel-size 8"} <= set(
        re.findall(r"--(?:block|decode)\S+ \d+", found.to_text())
    )


@pytest.mark.parametrize(
    ("engine", "says"),
    [
        ({"decode_context_parallel_size": 3}, "a tensor_parallel_size of 8 by 3"),
        (
            {"model": "Qwen3-235B-A22B", "decode_context_parallel_size": 4, "quantization": "fp8"},
            "4 context-parallel ranks: 8 hold 2 copies of each KV head",
        ),
        ({"model": "Llama-3.1-70B-Instruct", "decode_context_parallel_size": 2}, "8 KV heads 8 ranks do not"),
        ({"model": "gpt-oss-120b", "decode_context_parallel_size": 2}, "whose layers are not all alike"),
        ({"decode_context_parallel_size": 8, "cp_kv_cache_interleave_size": 5}, "5 tokens in a row"),
        ({"decode_context_parallel_size": 8, "dcp_kv_cache_interleave_size": 32}, "32 tokens in a row"),
        ({"decode_context_parallel_size": 8, "kv_offloading_size": 10}, "KV connectors with decode context"),
        (
            {"decode_context_parallel_size": 8, "version": "0.24", "kv_cache_dtype": "fp8"},
            "latents in fp8 over context-parallel ranks",
        ),
        (
            {"decode_context_parallel_size": 8, "version": "0.24", "gpu": "b200"},
            "without log-sum-exps",
        ),
        ({"dcp_comm_backend": "a2a", "version": "0.28"}, "dcp_comm_backend a2a of one rank"),
    ],
)
def test_what_vllm_refuses_is_refused(engine: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        Deployment.of(scenario(**engine))


@pytest.mark.parametrize(
    "engine",
    [
        {"decode_context_parallel_size": 8, "version": "0.25", "kv_cache_dtype": "fp8"},
        {"decode_context_parallel_size": 4, "version": "0.25", "gpu": "b200"},
        {"decode_context_parallel_size": 2, "cp_kv_cache_interleave_size": 16},
        {"dcp_comm_backend": "a2a", "version": "0.29"},
    ],
)
def test_what_vllm_takes_is_taken(engine: dict[str, Any]) -> None:
    assert Deployment.of(scenario(**engine)).shard.context_ranks == engine.get(
        "decode_context_parallel_size", 1
    )
