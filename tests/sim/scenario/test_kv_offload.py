"""Offloading as written: flags and JSON to sizes, links, connectors, and refusals; and whole runs with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from small_scenarios import scenario_file

from servecast.sim.inputs.errors import InputError
from servecast.sim.metrics.binding import binding_limit, evidence
from servecast.sim.run.loading import loading, prefill_s
from servecast.sim.run.simulate import simulate
from servecast.sim.run.simulation import simulate as answer
from servecast.sim.scenario.deployment import Deployment
from servecast.sim.scenario.scenario import Scenario, load

GIB = 1 << 30
LLAMA = "Llama-3.1-8B-Instruct"
TOKEN = 32 * 2 * 8 * 128 * 2  # bytes of its KV cache: layers, K and V, KV heads, head size, bf16
NATIVE = {"kv_connector": "OffloadingConnector", "kv_role": "kv_both"}
LMCACHE = {"kv_connector": "LMCacheConnectorV1", "kv_role": "kv_both"}
GROUPS = {
    "arrivals": {"kind": "poisson", "request_rate": 4.0},
    "num_requests": 120,
    "prompt_tokens": 100,
    "output_tokens": 20,
    "content": {"kind": "shared_prefix", "groups": 12, "prefix_tokens": 2048},
}


def scenario(folder: Path, changes: dict[str, Any] | None = None, **engine: Any) -> Scenario:
    base = {
        "model.config": LLAMA,
        "gpu": {"name": "H100"},
        "profile": None,
        "workload": GROUPS,
        "engine": {"version": "0.32", "num_gpu_blocks_override": 600, "max_model_len": 4096, **engine},
    }
    return load(scenario_file(folder), base | (changes or {}))


def deployed(folder: Path, changes: dict[str, Any] | None = None, **engine: Any) -> Deployment:
    return Deployment.of(scenario(folder, changes, **engine))


def extra(**options: Any) -> dict[str, Any]:
    return {"kv_connector_extra_config": options}


def test_a_size_is_of_all_ranks_together(tmp_path: Path) -> None:
    """CPUOffloadingSpec: 4 GiB over blocks of 16 tokens on two ranks, each half of the bytes."""
    found = deployed(tmp_path, kv_offloading_size=4.0, tensor_parallel_size=2).offloading
    assert found is not None
    assert found.native_chunks == 4 * GIB // (16 * TOKEN)
    assert found.block_bytes == 16 * TOKEN // 2
    assert (found.transfer.connector, found.host_bytes) == ("OffloadingConnector", 4 * GIB)


def test_the_flag_and_the_json_are_one(tmp_path: Path) -> None:
    native = NATIVE | extra(cpu_bytes_to_use=4.0 * GIB)
    pasted = f"vllm serve m --kv-transfer-config '{json.dumps(native)}'"
    flagged = deployed(tmp_path, command="vllm serve m --kv-offloading-size 4 --kv-offloading-backend native")
    assert deployed(tmp_path, command=pasted).offloading == flagged.offloading
    assert deployed(tmp_path, kv_transfer_config=native).offloading == flagged.offloading


def test_chunks_of_several_blocks(tmp_path: Path) -> None:
    config = NATIVE | extra(cpu_bytes_to_use=GIB, block_size=64)
    found = deployed(tmp_path, kv_transfer_config=config).offloading
    assert found is not None
    assert (found.blocks_per_chunk, found.native_chunks) == (4, GIB // (64 * TOKEN))


@pytest.mark.parametrize(
    ("version", "connector"), [("0.22", "LMCacheConnectorV1"), ("0.23", "LMCacheMPConnector")]
)
def test_the_lmcache_backend_by_release(tmp_path: Path, version: str, connector: str) -> None:
    """From 0.23 on vLLM takes LMCache's server, and does not tell it the size."""
    flags = {"kv_offloading_size": 8.0, "kv_offloading_backend": "lmcache", "tensor_parallel_size": 2}
    found = deployed(tmp_path, {"kv_offload.lmcache_server_gib": 5.0}, version=version, **flags).offloading
    assert found is not None
    assert found.transfer.connector == connector
    assert found.host_bytes == (8 if version == "0.22" else 5) * GIB


def test_lmcache_is_set_by_variables_too(tmp_path: Path) -> None:
    command = f"LMCACHE_MAX_LOCAL_CPU_SIZE=3 LMCACHE_CHUNK_SIZE=128 vllm serve m --kv-transfer-config '{json.dumps(LMCACHE)}'"  # noqa: E501
    found = deployed(tmp_path, command=command).offloading
    assert found is not None
    assert found.lmcache_chunk == (128, 128 * TOKEN)
    assert found.host_bytes == 3 * GIB


@pytest.mark.parametrize(
    ("engine", "changes", "what"),
    [
        ({"kv_transfer_config": {"kv_connector": "OffloadingConnector"}}, {}, "has no kv_role"),
        ({"kv_transfer_config": NATIVE}, {}, "no cpu_bytes_to_use"),
        ({"kv_transfer_config": LMCACHE | extra(**{"lmcache.cache_policy": "LFU"})}, {}, "'LFU' is not"),
        ({"kv_transfer_config": LMCACHE | extra(**{"lmcache.chunk_size": 100})}, {}, "no multiple of a KV"),
        ({"kv_transfer_config": LMCACHE | extra(**{"lmcache.local_cpu": False})}, {}, "nowhere to keep"),
        ({"kv_offloading_size": 4.0, "kv_offloading_backend": "lmcache"}, {}, "how much memory LMCache"),
        ({"kv_offloading_size": 1e-4}, {}, "hold no chunk"),
        ({"kv_offloading_size": 4096.0}, {}, "it has 2,048"),
        ({"kv_offloading_size": 300.0}, {"fleet.replicas": 8}, "8 replicas on a server take 2,400 GiB"),
        ({"kv_offloading_size": 100.0}, {"kv_offload.host_memory_gib": 64.0}, "it has 64"),
        ({"command": "VLLM_USE_SIMPLE_KV_OFFLOAD=1 vllm serve m --kv-offloading-size 4"}, {}, "SIMPLE"),
    ],
)  # fmt: skip
def test_refusals(tmp_path: Path, engine: dict[str, Any], changes: dict[str, Any], what: str) -> None:
    with pytest.raises(InputError, match=what):
        deployed(tmp_path, changes, **engine)


def test_more_is_allowed_where_nobody_knows_the_server(tmp_path: Path) -> None:
    found = deployed(tmp_path, {"gpu": {"name": "RTX 4090"}}, quantization="fp8", kv_offloading_size=4096.0)
    assert found.offloading is not None


@pytest.mark.parametrize(
    "engine",
    [
        {"kv_offloading_size": 16.0},
        {"kv_transfer_config": LMCACHE | extra(**{"lmcache.max_local_cpu_size": 16})},
        {"kv_offloading_size": 16.0, "kv_offloading_backend": "lmcache"},
        {
            "kv_transfer_config": {
                "kv_connector": "MultiConnector",
                "kv_role": "kv_both",
                **extra(
                    connectors=[
                        NATIVE | extra(cpu_bytes_to_use=8 * GIB),
                        LMCACHE | extra(**{"lmcache.max_local_cpu_size": 8}),
                    ]
                ),
            }
        },
    ],
    ids=["native", "lmcache", "lmcache-server", "multi"],
)
def test_what_the_gpu_forgets_comes_from_the_host(tmp_path: Path, engine: dict[str, Any]) -> None:
    """12 prefixes of 2,048 tokens in a pool of 9,600: without offloading most are computed again. What is
    loaded is what was found, byte by byte, and all requests end with all their tokens."""
    plain = simulate(scenario(tmp_path))
    run = simulate(scenario(tmp_path, {"kv_offload.lmcache_server_gib": 16.0}, **engine))
    assert (run.requests["status"] == "finished").all()
    assert run.requests["output_tokens"].equals(plain.requests["output_tokens"])
    assert run.requests["cached_tokens"].sum() > 1.5 * plain.requests["cached_tokens"].sum()
    (counters,) = run.meta["kv_offload"]
    loaded = sum(counters["loaded_tokens"].values())
    assert counters["kv_offload_load_bytes"] == loaded * TOKEN
    assert 0 < counters["external_prefix_cache_hits"] <= loaded  # of whole chunks
    assert counters["kv_offload_store_bytes"] > 0
    assert run.requests["cached_tokens"].sum() == pytest.approx(
        counters["prefix_cache_hits"] + counters["external_prefix_cache_hits"]
    )


def test_replicas_share_a_remote_store(tmp_path: Path) -> None:
    """Each of two replicas computes prefixes that the other has stored, unless there is a store for both."""
    remote = LMCACHE | extra(**{"lmcache.local_cpu": False, "lmcache.remote_url": "lm://store:65432"})
    fleet = {"fleet.replicas": 2}
    alone = simulate(scenario(tmp_path, fleet, kv_offloading_size=16.0))
    shared = simulate(scenario(tmp_path, fleet, kv_transfer_config=remote))
    assert shared.requests["cached_tokens"].sum() > alone.requests["cached_tokens"].sum()
    assert sum(each["loaded_tokens"].get("remote", 0) for each in shared.meta["kv_offload"]) > 0


def test_a_load_is_part_of_the_step_of_lmcache_and_beside_the_native_one(tmp_path: Path) -> None:
    """A link of 1 GB/s: a prefix takes 0.27 s. In LMCache's process the step waits for it; natively the
    others go on meanwhile."""
    slow = {"kv_offload.host_gb_per_s": 1.0}
    inside = simulate(
        scenario(tmp_path, slow, kv_transfer_config=LMCACHE | extra(**{"lmcache.max_local_cpu_size": 16}))
    )
    aside = simulate(scenario(tmp_path, slow, kv_offloading_size=16.0))
    assert inside.steps["duration"].max() > 0.26
    assert aside.steps["duration"].quantile(0.99) < 0.1
    assert inside.steps["duration"].sum() > 1.5 * aside.steps["duration"].sum()


def test_break_even_is_bytes_over_bandwidth(tmp_path: Path) -> None:
    """8B on an H100 at 50 GB/s: 1,024 tokens are 134 MB, and 64 blocks of 1 us."""
    changes = {"kv_offload.host_gb_per_s": 50.0, "kv_offload.block_us": 1.0}
    found = deployed(tmp_path, changes, kv_offloading_size=16.0)
    (row,) = loading(found, (1024,))
    assert row.load_s == pytest.approx(1024 * TOKEN / 50e9 + 64e-6)
    assert row.recompute_s == pytest.approx(prefill_s(found, 1024))
    assert row.break_even_gb_per_s == pytest.approx(1024 * TOKEN / (row.recompute_s - 64e-6) / 1e9)
    assert row.least_reuse == 0.0
    lmcache = deployed(tmp_path, changes, kv_transfer_config=LMCACHE)
    (row,) = loading(lmcache, (1024,))
    assert row.least_reuse == pytest.approx(row.load_s / (row.recompute_s - row.load_s))


def test_an_answer_names_tiers_links_and_the_break_even(tmp_path: Path) -> None:
    found = answer(scenario(tmp_path, kv_offloading_size=16.0))
    offloaded = found.result["kv_offload"]
    assert offloaded["cpu_tokens"] == 16 * GIB // (16 * TOKEN) * 16
    assert 0 < offloaded["external_hit_rate"] < 1
    assert set(offloaded["link_busy"]) == {"host_to_gpu", "gpu_to_host"}
    text = found.to_text()
    assert "tokens loaded from cpu" in text
    assert "Loading a prompt's KV cache against computing it" in text


@pytest.mark.parametrize(("gb_per_s", "binds"), [(0.15, True), (50.0, False)])
def test_a_slow_link_binds(tmp_path: Path, gb_per_s: float, binds: bool) -> None:
    """A prefix of 268 MB: at 0.15 GB/s and four requests a second the link cannot keep up."""
    found = deployed(tmp_path, {"kv_offload.host_gb_per_s": gb_per_s}, kv_offloading_size=16.0)
    seen = evidence(simulate(found), found.limits)
    limit = binding_limit(seen, only_token_times=False).limit
    assert (limit in ("kv_link", "kv_loads")) == binds
    assert (seen.kv_link > 0.5) == binds
