"""Servers with several engine cores, from a scenario to its answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from model_shapes import load as shape
from small_epp import EPP

from servecast.sim.inputs.errors import InputError
from servecast.sim.metrics.binding import evidence
from servecast.sim.optimize.candidates import Choices
from servecast.sim.plan.size import Unit
from servecast.sim.run.simulation import Simulation, simulate
from servecast.sim.scenario.deployment import Deployment
from servecast.sim.scenario.engine_flags import EngineFlags
from servecast.sim.scenario.ranks import expert_ranks
from servecast.sim.scenario.scenario import Scenario, load

DENSE = {"engine.version": "0.32"}
EXPERTS: dict[str, Any] = {
    "model.config": "Qwen3-30B-A3B",
    "gpu.name": "H100",
    "profile": "kernels",
    "engine.version": "0.32",
    "engine.max_model_len": 4096,
}


def of(changes: dict[str, Any], **flags: Any) -> Scenario:
    return load("a6000-qwen2.5-7b", changes | {f"engine.{name}": value for name, value in flags.items()})


def run(scenario: Scenario, rate: float = 30, count: int = 120) -> Simulation:
    return simulate(scenario, request_rate=rate, num_requests=count)


def test_two_dense_ranks_are_as_two_replicas() -> None:
    """vLLM gives a dense model's cores no ties: one server of two is as two replicas behind a router that
    counts what is in flight."""
    ranks = run(of(DENSE, data_parallel_size=2))
    replicas = run(of(DENSE | {"fleet.replicas": 2, "fleet.router": "least_outstanding"}))
    counts = ranks.requests.groupby("rank").size().tolist()
    assert max(counts) - min(counts) <= 2 < sum(counts) == 120
    for key in ("mean_ttft_ms", "mean_tpot_ms", "request_throughput"):
        assert ranks.result[key] == pytest.approx(replicas.result[key], rel=0.05)
    assert "dummy_steps" not in ranks.result
    assert [row["requests"] for row in ranks.result["ranks"]] == counts


def test_cores_with_experts_step_together() -> None:
    found = run(of(EXPERTS, data_parallel_size=2, enable_expert_parallel=True))
    steps = found.steps.pivot_table(index="start", columns="rank", values="duration")
    both = steps.dropna()
    assert len(both) > 0.9 * len(steps)
    assert (both[0] == both[1]).all()
    assert found.result["dummy_steps"]["steps"] >= len(steps) - len(both)
    assert evidence(found.run, Deployment.of(of(EXPERTS, data_parallel_size=2)).limits).busy <= 1.0
    assert "each of 2 engine cores" in found.to_text()


@pytest.mark.parametrize(
    ("version", "flags", "kernel"),
    [
        # get_fp8_moe_backend and TritonOrDeepGemmExperts.apply of 0.11.0 and 0.12.0
        ("0.11", {"tensor_parallel_size": 2}, "triton"),
        ("0.12", {"tensor_parallel_size": 2}, "deep_gemm"),
        ("0.12", {"tensor_parallel_size": 4, "data_parallel_size": 2}, "triton"),
        ("0.15", {"tensor_parallel_size": 8, "enable_expert_parallel": True}, "deep_gemm"),
        # select_fp8_moe_backend of 0.16.0, _get_priority_backends of 0.17.0 and 0.32.0
        ("0.16", {"tensor_parallel_size": 4}, "cutlass"),
        ("0.17", {"tensor_parallel_size": 4}, "triton"),
        ("0.32", {"tensor_parallel_size": 4, "enable_expert_parallel": True}, "cutlass"),
        (
            "0.32",
            {
                "data_parallel_size": 4,
                "enable_expert_parallel": True,
                "all2all_backend": "deepep_low_latency",
            },
            "triton",
        ),
    ],
)
def test_the_kernel_of_fp8_experts_is_that_of_the_release(
    version: str, flags: dict[str, Any], kernel: str
) -> None:
    found = expert_ranks(EngineFlags(version=version, **flags), "0.32", shape("MiniMax-M2.5"), "engine")
    assert found.kernel == kernel
    assert found.padded_alike is (version in ("0.11", "0.12", "0.15", "0.16"))


@pytest.mark.parametrize(
    ("flags", "endpoints"),
    [
        ({"data_parallel_external_lb": True}, 4),
        ({"data_parallel_hybrid_lb": True, "data_parallel_size_local": 2}, 2),
    ],
)
def test_the_router_balances_what_is_balanced_outside(flags: dict[str, Any], endpoints: int) -> None:
    """Round robin over nodes, or over all ranks; the cores of all step together all the same."""
    scenario = of(EXPERTS, data_parallel_size=4, enable_expert_parallel=True, **flags)
    found = run(scenario)
    assert found.requests.groupby("replica").size().tolist() == [120 // endpoints] * endpoints
    assert Deployment.of(scenario).endpoints == endpoints
    ends = (found.steps["start"] + found.steps["duration"]).round(9)
    assert ends.groupby(found.steps["start"].round(9)).nunique().max() == 1
    assert len(found.result["fleet_load"]["replicas"]) == endpoints


def test_dense_ranks_have_adapters_stages_and_host_memory_of_their_own() -> None:
    """Each core is an engine: two of them are as two replicas, whatever an engine has."""
    adapters = {"enable_lora": True, "max_loras": 1, "max_cpu_loras": 4}
    split = {"workload.lora_traffic_split": {"a": 0.5, "b": 0.5}}
    for flags, more in (
        (adapters, split),
        ({"pipeline_parallel_size": 2}, {}),
        (adapters | {"pipeline_parallel_size": 2, "version": "0.33"}, split),
        ({"kv_offloading_size": 4.0, "num_gpu_blocks_override": 400, "max_model_len": 4096}, {}),
    ):
        ranks = run(of(DENSE | more, data_parallel_size=2, **flags))
        replicas = run(of(DENSE | more | {"fleet.replicas": 2, "fleet.router": "least_outstanding"}, **flags))
        assert ranks.requests["rank"].nunique() == 2
        for key in ("mean_ttft_ms", "mean_tpot_ms", "request_throughput"):
            assert ranks.result[key] == pytest.approx(replicas.result[key], rel=0.1), (flags, key)
        if "kv_offloading_size" in flags:
            stored = [each.result["kv_offload"]["kv_offload_store_bytes"] for each in (ranks, replicas)]
            assert stored[0] == pytest.approx(stored[1], rel=0.1)


def test_a_router_keeps_adapters_apart(tmp_path: Path) -> None:
    """Two replicas with a slot each, two adapters: while a replica has requests of one, it has no room for
    the other (1 + 1 < 1 is false), so that an adapter's requests go where it is, and wait for no slot."""
    file = tmp_path / "epp.yaml"
    file.write_text(EPP.replace("PREFIX", "lora-affinity-scorer").replace("weight: 2", "weight: 3"))
    lora = DENSE | {"workload.lora_traffic_split": {"a": 0.5, "b": 0.5}, "fleet.replicas": 2}
    ttft = []
    for router in ("round_robin", str(file)):
        made = of(lora | {"fleet.router": router}, enable_lora=True, max_loras=1, max_cpu_loras=2)
        ttft.append(run(made, 8, 200).result["mean_ttft_ms"])
    assert ttft[1] < 0.1 * ttft[0]


def test_cores_with_experts_draft_together() -> None:
    """Looked-up drafts, nearly all accepted, save steps, and all cores verify as many in dummy steps."""
    drafts = {"method": "ngram_gpu", "num_speculative_tokens": 3, "prompt_lookup_max": 4}
    plain = run(of(EXPERTS, data_parallel_size=2, enable_expert_parallel=True))
    acceptance = EXPERTS | {"acceptance": 0.9, "engine.speculative_config": drafts}
    found = run(of(acceptance, data_parallel_size=2, enable_expert_parallel=True))
    assert found.result["mean_tpot_ms"] < 0.6 * plain.result["mean_tpot_ms"]
    both = found.steps.pivot_table(index="start", columns="rank", values="duration").dropna()
    assert len(both) > 50
    assert (both[0] == both[1]).all()


def test_cores_of_prefill_and_decode_servers() -> None:
    """Two cores that share experts in each of two servers: every prompt is computed in one of the first, its
    blocks go once, and the last token alone is computed again. Behind a slow link a core whose only request
    waits for its KV runs dummy steps until that is there."""
    pools = {"fleet.prefill": 1, "fleet.decode": 1, "workload.prompt_tokens": 1000}
    slow = {"fleet.kv_link": {"kind": "infiniband", "gb_per_s": 0.5}}
    made = of(EXPERTS | pools | slow, data_parallel_size=2, enable_expert_parallel=True)
    found = run(made, 4, 40).run
    requests, steps = found.requests, found.steps
    assert set(requests["status"]) == {"finished"}
    sizes = set(requests["kv_transfer_bytes"] // (16 * 98_304))  # blocks of 16 tokens, 98,304 bytes each
    assert sizes == {64, 65}  # 1000 tokens and the template's 29, of which a core knows the first 16 soon
    computed = requests["prompt_tokens"] - requests["cached_tokens"]
    assert steps[steps["replica"] == 0]["prefill_tokens"].sum() == computed.sum()
    assert steps[steps["replica"] == 1]["prefill_tokens"].sum() == 40
    assert steps.groupby(["replica", "rank"]).ngroups == 4
    alone = run(made, 0.01, 1).run
    moving = (alone.requests["kv_transfer_end"] - alone.requests["kv_transfer_start"]).sum()
    assert moving == pytest.approx(alone.requests["kv_transfer_bytes"].sum() / 0.5e9, rel=0.01)
    share = alone.meta["dummy_steps"]["share"]
    assert share / (1 - share) * alone.steps["duration"].sum() > 2 * moving  # of both cores


def test_more_api_servers_balance_worse() -> None:
    """Each sees what it has sent itself; one sees all."""
    spread = []
    for servers in (1, 8):
        found = run(of(DENSE, data_parallel_size=8, api_server_count=servers), 200, 400)
        spread.append(found.requests.groupby("rank").size().std())
    assert spread[0] < spread[1]


def test_what_is_bought_are_the_gpus_of_all_ranks() -> None:
    scenario = of(EXPERTS | {"fleet.replicas": 3}, data_parallel_size=2, tensor_parallel_size=2)
    assert Unit.of(scenario, 1.5) == Unit(3, 12, 18.0)
    found = Choices(tensor_parallel=2, data_parallel=(1, 2), expert_parallel=("on", "off")).of(scenario)
    assert [str(each) for each in found] == [
        *("TP2 DP1 expert_parallel=on", "TP2 DP1 expert_parallel=off"),
        *("TP2 DP2 expert_parallel=on", "TP2 DP2 expert_parallel=off"),
    ]
    assert [each.scenario.engine.gpus for each in found] == [2, 2, 4, 4]
    shared = Choices(tensor_parallel=8, decode_context_parallel=(1, 2)).of(scenario)
    assert [str(each) for each in shared] == ["TP8 DCP1", "TP8 DCP2"]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"data_parallel_size": 4, "tensor_parallel_size": 4}, "16 ranks are more than the 8 GPUs"),
        ({"data_parallel_external_lb": True}, "ranks of a data_parallel_size of 1"),
        ({"data_parallel_size": 2, "data_parallel_rank": 2}, "data_parallel_rank 2 with"),
        ({"data_parallel_size": 2, "data_parallel_size_local": 3}, "data_parallel_size_local 3 with"),
        ({"data_parallel_size": 2, "data_parallel_hybrid_lb": True}, "hybrid balancing"),
        (
            {"data_parallel_size": 2, "data_parallel_hybrid_lb": True, "data_parallel_external_lb": True},
            "both external and hybrid",
        ),
        ({"enable_eplb": True}, "enable_eplb without expert parallelism"),
        (
            {
                "enable_expert_parallel": True,
                "data_parallel_size": 2,
                "eplb_config": {"num_redundant_experts": 2},
            },
            "num_redundant_experts without EPLB",
        ),
        (
            {
                "enable_expert_parallel": True,
                "data_parallel_size": 2,
                "enable_eplb": True,
                "eplb_config": {"num_redundant_experts": 3},
            },
            "128 experts and 3 redundant ones over 2 ranks",
        ),
        (
            {"enable_expert_parallel": True, "data_parallel_size": 2, "all2all_backend": "nixl_ep"},
            "nothing is known of the times of the all2all_backend nixl_ep",
        ),
        ({"api_server_count": 2}, "2 API servers in front of one engine core"),
    ],
)
def test_what_vllm_refuses_or_is_not_modelled_is_refused(flags: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        Deployment.of(of(EXPERTS, **flags))


@pytest.mark.parametrize("release", ["0.20", "0.21"])
def test_dense_models_with_external_balancing_are_refused_since_021(release: str) -> None:
    """EngineArgs.create_engine_config: "Non-MoE models do not support external data parallel mode"."""
    scenario = of({"engine.version": release}, data_parallel_size=2, data_parallel_external_lb=True)
    if release == "0.20":
        assert Deployment.of(scenario).endpoints == 2
        return
    with pytest.raises(InputError, match="which has no experts"):
        Deployment.of(scenario)


def test_a_pasted_command_of_a_rank_stands_for_all() -> None:
    command = (
        "vllm serve Qwen/Qwen3-30B-A3B --data-parallel-size 4 --data-parallel-rank 1 "
        "--enable-expert-parallel --all2all-backend pplx --enable-eplb --eplb-config.num_redundant_experts 4"
    )
    deployment = Deployment.of(of(EXPERTS, command=command))
    assert deployment.endpoints == 4
    assert deployment.shard.expert_ranks.redundant == 4
    assert any("all 4 data-parallel ranks are simulated" in note for note in deployment.notes)
    assert any("all2all_backend pplx is allgather_reducescatter" in note for note in deployment.notes)


def test_loads_of_experts_are_as_many_as_there_are() -> None:
    with pytest.raises(InputError, match="3 loads of 128 experts"):
        Deployment.of(of(EXPERTS | {"model.expert_loads": [1, 2, 3]}))
    even = of(
        EXPERTS | {"model.expert_loads": [1.0] * 128}, data_parallel_size=4, enable_expert_parallel=True
    )
    assert Deployment.of(even).shard.fullest_rank(float("inf")) == pytest.approx(1.0)
