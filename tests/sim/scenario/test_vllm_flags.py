"""Engine flags: pasted commands and vLLM's defaults."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from model_shapes import load

from servecast.sim.hardware.gpu import find_gpu
from servecast.sim.inputs.errors import InputError
from servecast.sim.inputs.schema import parse
from servecast.sim.scenario.engine_flags import EngineFlags
from servecast.sim.scenario.vllm_flags import parse_serve_command
from servecast.sim.scenario.vllm_server import GIB, RELEASES, Vllm, release_of


def flags(**given: Any) -> EngineFlags:
    return parse(EngineFlags, {"version": "0.32", **given}, source="test")


def resolved(gpu: str = "A6000", memory_gib: float = 47.4, positions: int = 32768, **given: Any) -> Any:
    on = replace(find_gpu("a6000"), name=gpu, memory_bytes=int(memory_gib * GIB))
    return Vllm().resolve(flags(**given), on, replace(load("Qwen3-4B"), max_position_embeddings=positions))


def test_flags_in_every_spelling() -> None:
    command = parse_serve_command(
        "vllm serve Qwen/Qwen2.5-7B-Instruct --max-num-seqs 128 --max_num_batched_tokens=8k \\\n"
        " --no-enable-prefix-caching -tp 2 --gpu_memory_utilization=0.85 --async-scheduling --enforce-eager "
        "--max-model-len auto --kv-cache-memory-bytes 10G --block-size=32"
    )
    assert command.model == "Qwen/Qwen2.5-7B-Instruct"
    assert command.flags == {
        "max_num_seqs": 128,
        "max_num_batched_tokens": 8000,
        "enable_prefix_caching": False,
        "tensor_parallel_size": 2,
        "gpu_memory_utilization": 0.85,
        "async_scheduling": True,
        "enforce_eager": True,
        "max_model_len": "auto",
        "kv_cache_memory_bytes": 10 * GIB,
        "block_size": 32,
    }
    assert command.ignored == ()


def test_flags_without_effect_are_listed_with_their_values_skipped() -> None:
    command = parse_serve_command(
        "vllm serve --model m --served-model-name a b --port 80 --host=0.0.0.0 --api-key k "
        "--trust-remote-code -O3 --compilation-config.mode=3 --disable-log-stats --data-parallel-size 1"
    )
    assert command.model == "m"
    assert command.ignored == (
        "--served-model-name",
        "--port",
        "--host",
        "--api-key",
        "--trust-remote-code",
        "--disable-log-stats",
    )
    assert command.widening == ("-O3", "--compilation-config.mode")


@pytest.mark.parametrize(
    ("text", "value"), [("1k", 1000), ("1K", 1024), ("25.6k", 25600), ("2M", 2 << 20), ("7", 7)]
)
def test_integers_as_vllm_reads_them(text: str, value: int) -> None:
    assert parse_serve_command(f"vllm serve m --max-model-len {text}").flags == {"max_model_len": value}


@pytest.mark.parametrize(
    ("version", "gpu", "memory_gib", "tokens", "seqs"),
    [
        ("0.32", "B200", 178.0, 16384, 1024),
        ("0.23", "B200", 178.0, 8192, 1024),
        ("0.27", "B200", 178.0, 8192, 1024),
        ("0.28", "B200", 178.0, 16384, 1024),
        ("0.32", "H200", 140.4, 8192, 1024),
        ("0.23", "H100", 79.6, 8192, 1024),
        ("0.32", "A100", 79.3, 2048, 256),
        ("0.23", "RTX A6000", 47.4, 2048, 256),
        ("0.23", "L4", 22.5, 2048, 256),
        ("0.32", "cpu", 64.0, 2048, 128),
    ],
)
def test_batch_defaults(version: str, gpu: str, memory_gib: float, tokens: int, seqs: int) -> None:
    engine = resolved(gpu, memory_gib, version=version)
    assert (engine.max_num_batched_tokens, engine.max_num_seqs) == (tokens, seqs)


@pytest.mark.parametrize(
    ("given", "tokens", "seqs"),
    [
        ({"performance_mode": "throughput"}, 4096, 512),
        ({"performance_mode": "throughput", "max_num_seqs": 10}, 4096, 10),
        ({"max_num_batched_tokens": 100}, 100, 100),
        ({"max_num_seqs": 2, "max_model_len": 512}, 1024, 2),
        ({"enable_chunked_prefill": False}, 32768, 256),
        ({"max_num_batched_tokens": 4096, "max_num_seqs": 512}, 4096, 512),
    ],
    ids=str,
)
def test_batch_sizes_follow_each_other_as_in_vllm(given: dict[str, Any], tokens: int, seqs: int) -> None:
    engine = resolved(**given)
    assert (engine.max_num_batched_tokens, engine.max_num_seqs) == (tokens, seqs)


@pytest.mark.parametrize(
    ("version", "rules", "utilization", "asynchronous", "gate"),
    [
        ("0.10", "0.23", 0.9, False, False),
        ("0.19.0", "0.23", 0.9, True, True),
        ("0.23.0", "0.23", 0.92, True, True),
        ("0.20", "0.20", 0.92, True, True),
        ("0.32", "0.32", 0.92, True, True),
    ],
)
def test_releases(version: str, rules: str, utilization: float, asynchronous: bool, gate: bool) -> None:
    engine = resolved(version=version)
    assert (engine.version, engine.gpu_memory_utilization) == (rules, utilization)
    assert (engine.async_scheduling, engine.scheduler_reserve_full_isl) == (asynchronous, gate)
    assert resolved(version=version, async_scheduling=not asynchronous).async_scheduling is not asynchronous


def test_a_version_without_rules_runs_under_the_nearest_only_on_request() -> None:
    engine = flags(version="0.12", assume_rules=True)
    assert RELEASES[release_of(engine)].rules == "0.23"
    assert Vllm().notes(engine)[0] == "vLLM 0.12 has no rule set; assumed to behave as 0.10"


@pytest.mark.parametrize("version", ["0.34", "0.40.1", "1.0"])
def test_a_release_to_come_runs_under_the_newest_rules(version: str) -> None:
    assert resolved(version=version).version == "0.33"
    assert Vllm().notes(flags(version=version)) == (
        f"vLLM {version} has no rule set; assumed to behave as 0.33",
    )


@pytest.mark.parametrize(
    ("version", "release"), [("0.27.1", "0.27"), ("v0.25.1", "0.25"), ("0.20.2", "0.20")]
)
def test_a_patch_release_is_its_minor_release(version: str, release: str) -> None:
    assert resolved(version=version).version == release
    assert Vllm().notes(flags(version=version)) == ()


def test_the_engines_configuration() -> None:
    config = resolved(watermark=0.01, block_size=32, scheduling_policy="priority")
    assert (config.version, config.max_model_len, config.num_gpu_blocks) == ("0.32", 32768, 0)
    assert (config.watermark, config.block_size, config.scheduling_policy) == (0.01, 32, "priority")
    assert (config.max_num_seqs, config.max_num_batched_tokens) == (256, 2048)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"max_num_batched_tokens": 64, "max_num_seqs": 128},
            "max_num_batched_tokens 64 is below max_num_seqs 128",
        ),
        ({"max_model_len": 40_000}, "max_model_len 40000 is beyond the model's 32768 positions"),
        (
            {"max_num_batched_tokens": 512, "enable_chunked_prefill": False},
            "max_num_batched_tokens 512 is below max_model_len 32768 without chunked prefill",
        ),
        ({"max_num_active_seqs": 300}, "max_num_active_seqs 300 is above max_num_seqs 256"),
    ],
)
def test_combinations_that_vllm_refuses(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        resolved(**given)
