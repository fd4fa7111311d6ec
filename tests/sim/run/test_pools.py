"""Scenarios of prefill and decode servers: what loads, what is refused, and what answers say of both
pools."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from servecast.sim.inputs.errors import InputError
from servecast.sim.inputs.schema import parse
from servecast.sim.metrics.pools import pools_evidence
from servecast.sim.optimize.candidates import Choices
from servecast.sim.optimize.deploy import deployment_files
from servecast.sim.plan.size import Unit
from servecast.sim.run.disaggregated import link_of, pools_facts
from servecast.sim.run.explain import explain
from servecast.sim.run.results import measured
from servecast.sim.run.simulate import simulate as run_of
from servecast.sim.run.simulation import simulate
from servecast.sim.scenario.deployment import Deployment
from servecast.sim.scenario.scenario import Scenario, load

NIXL = '{"kv_connector": "NixlConnector", "kv_role": "%s"}'
HPA = {"kind": "hpa", "metric": "waiting", "target": 1, "max_replicas": 3}
GUIDE = "llmd-8p2d-gpt-oss-120b-h200"


def scenario(fleet: dict[str, Any], **fields: Any) -> Scenario:
    workload = {
        "arrivals": {"kind": "poisson", "request_rate": 8},
        "prompt_tokens": 1000,
        "output_tokens": 20,
        "num_requests": 60,
    }
    document: dict[str, Any] = {
        "schema_version": 1,
        "name": "pools",
        "model": {"config": "Llama-3.1-8B-Instruct"},
        "gpu": {"name": "h100"},
        "engine": {"version": "0.32", "max_model_len": 8192},
        "workload": workload,
        "fleet": fleet,
    }
    return parse(Scenario, document | fields, source="pools.yaml")


def served(role: str, *flags: str) -> dict[str, Any]:
    command = [
        "vllm serve meta-llama/Llama-3.1-8B-Instruct",
        "--kv-transfer-config",
        f"'{NIXL % role}'",
        *flags,
    ]
    return {"engine": {"command": " ".join(command)}}


def test_a_window_moves_no_more_than_itself() -> None:
    """gpt-oss-120b, 18 layers with a window of 128 tokens and 18 without, 8 KV heads of 64 in bf16: blocks of
    16 tokens have 589,824 bytes in 18 layers; of 1000 tokens 63 move, and of the window its 8 blocks and one
    (get_exchange_clipped_blocks). Kept whole, 63 of all 36 layers."""
    fleet, model = {"prefill": 1, "decode": 1}, {"config": "gpt-oss-120b"}
    for whole, expected in ((False, (63 + 9) * 589_824), (True, 63 * 2 * 589_824)):
        engine = {"version": "0.32", "max_model_len": 8192, "disable_hybrid_kv_cache_manager": whole}
        found = run_of(scenario(fleet, model=model, engine=engine, gpu={"name": "h200"}))
        assert set(found.requests["kv_transfer_bytes"]) == {expected}


def test_two_numbers_are_a_fleet() -> None:
    found = run_of(scenario({"prefill": 2, "decode": 1}))
    assert found.meta["roles"] == ["prefill", "prefill", "decode"]
    assert found.requests["prefill_replica"].value_counts().to_dict() == {0: 30, 1: 30}
    assert set(found.requests["replica"]) == {2}
    sizes = found.requests["kv_transfer_bytes"]
    assert set(sizes) == {63 * 16 * 131_072}  # whole blocks: 1000 tokens are 62.5 of 16
    steps = found.steps
    assert steps[steps["replica"] < 2]["decodes"].sum() == 0
    assert steps[steps["replica"] < 2]["prefill_tokens"].sum() == 60 * 1000
    assert steps[steps["replica"] == 2]["prefill_tokens"].sum() == 60  # the last token of each


def test_ttft_is_of_both_servers_and_what_lies_between() -> None:
    """Ten times slower a link shows in TTFT alone, by what its bytes take more: 132 MB at 42.5 and 4.25
    GB/s."""
    fast, slow = (
        run_of(
            scenario({"prefill": 1, "decode": 1, "kv_link": {"kind": "infiniband", "gb_per_s": rate}})
        ).requests
        for rate in (42.5, 4.25)
    )
    later = (slow["kv_transfer_end"] - slow["kv_transfer_start"]).min() - (
        fast["kv_transfer_end"] - fast["kv_transfer_start"]
    ).min()
    assert later == pytest.approx(132_120_576 / 4.25e9 - 132_120_576 / 42.5e9, rel=1e-6)
    assert slow["first_token"].mean() - fast["first_token"].mean() > 0.9 * later


def test_pasted_commands_make_the_pools() -> None:
    """Their flags count before the scenario's own, each with its own ranks and role."""
    made = scenario(
        {
            "prefill": served("kv_producer") | {"count": 2},
            "decode": served("kv_both", "--tensor-parallel-size 2", "--max-num-seqs 64"),
        }
    )
    facts = pools_facts(Deployment.of(made))
    assert [facts["prefill"][0][name] for name in ("servers", "tensor_parallel_size")] == [2, 1]
    assert [facts["decode"][0][name] for name in ("tensor_parallel_size", "max_num_seqs")] == [2, 64]
    assert Unit.of(made, 3.0) == Unit(3, 4, 12.0)
    assert (run_of(made).requests["status"] == "finished").all()


@pytest.mark.parametrize(
    ("fleet", "message"),
    [
        ({"prefill": 1}, "the fleet has no decode servers"),
        ({"prefill": 1, "decode": 1, "replicas": 2}, "replicas beside prefill and decode servers"),
        ({"replicas": 2, "kv_link": {"kind": "tcp"}}, "kv_link without prefill and decode servers"),
        (
            {"prefill": 1, "decode": 1, "autoscaler": HPA},
            "an autoscaler of prefill and decode servers is not modelled",
        ),
    ],
)
def test_half_a_fleet_is_refused(fleet: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        scenario(fleet)


PULLED = {"kv_connector": "NixlConnector", "kv_role": "kv_both"}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (PULLED | {"kv_connector": "MoRIIOConnector"}, "MoRIIOConnector is not modelled"),
        (
            PULLED | {"kv_connector": "NixlConector"},
            "no connector 'NixlConector'. Did you mean 'NixlConnector'",
        ),
        (PULLED | {"kv_roll": "kv_both"}, "no 'kv_roll'. Did you mean 'kv_role'"),
        (PULLED | {"kv_role": "both"}, "kv_role is 'both'"),
        (
            PULLED | {"kv_connector_extra_config": {"bidirectional_kv_xfer": True}},
            "bidirectional_kv_xfer is not modelled",
        ),
    ],
)
def test_connectors_that_are_not_modelled_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        scenario({"prefill": 1, "decode": {"engine": {"kv_transfer_config": config}}})


def test_a_connector_with_nobody_to_exchange_with_is_told() -> None:
    engine = {"version": "0.32", "max_model_len": 8192, "kv_transfer_config": PULLED}
    lone = Deployment.of(scenario({"replicas": 2}, engine=engine))
    assert any("NixlConnector is without effect" in note for note in lone.notes)
    pools = Deployment.of(scenario({"prefill": 1, "decode": 1}, engine=engine))
    assert not any("without effect" in note for note in pools.notes)


@pytest.mark.parametrize("pool", ["prefill", "decode"])
def test_pools_that_offload_are_refused(pool: str) -> None:
    with pytest.raises(InputError, match="OffloadingConnector on prefill and decode servers"):
        Deployment.of(scenario({"prefill": 1, "decode": 1, pool: {"engine": {"kv_offloading_size": 8}}}))


@pytest.mark.parametrize(
    ("prefill", "decode", "message"),
    [
        (served("kv_consumer"), served("kv_consumer"), "a prefill server that is kv_consumer"),
        (
            served("kv_producer"),
            served("kv_both", "--block-size 32"),
            "KV blocks of 32 tokens beside some of 16",
        ),
        (served("kv_producer"), served("kv_both", "--kv-cache-dtype fp8"), "kv_cache_dtype fp8 beside auto"),
    ],
)
def test_servers_that_cannot_exchange_blocks_are_refused(
    prefill: dict[str, Any], decode: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        run_of(scenario({"prefill": prefill, "decode": decode}))


def test_releases_that_differ_are_refused_as_the_handshake_does() -> None:
    """NixlConnector hashes vLLM's version (compute_nixl_compatibility_hash, in each release), which the
    decode server compares unless told not to; Mooncake's compares nothing."""
    old = {"engine": {"version": "0.31"}}
    with pytest.raises(InputError, match=r"version 0\.32 beside 0\.31"):
        run_of(scenario({"prefill": old, "decode": 1}))
    same = {"prefill": {"engine": {"version": "0.32.0"}}, "decode": 1}
    assert len(run_of(scenario(same)).requests) == 60
    loose = PULLED | {"kv_connector_extra_config": {"enforce_handshake_compat": False}}
    for config in (loose, PULLED | {"kv_connector": "MooncakeConnector"}):
        engine = {"version": "0.32", "max_model_len": 8192, "kv_transfer_config": config}
        assert len(run_of(scenario({"prefill": old, "decode": 1}, engine=engine)).requests) == 60
    strict = {"engine": {"kv_transfer_config": PULLED}}
    engine = {"version": "0.32", "max_model_len": 8192, "kv_transfer_config": loose}
    with pytest.raises(InputError, match=r"version 0\.32 beside 0\.31"):
        run_of(scenario({"prefill": old, "decode": strict}, engine=engine))


def test_the_link_by_default() -> None:
    """NVLink where all GPUs are in one node that has it, else InfiniBand; what is given is told as given."""

    def of(fleet: dict[str, Any], **fields: Any) -> Any:
        made = scenario(fleet, **fields)
        one = Deployment.of(made)
        return link_of(made, [one] * made.fleet.size)

    near = of({"prefill": 4, "decode": 4})
    assert (near.kind, near.bandwidth) == ("nvlink", 0.3 * 450e9)
    assert of({"prefill": 5, "decode": 4}).kind == "infiniband"
    assert of({"prefill": 1, "decode": 1}, gpu={"name": "l40s"}).kind == "pcie"
    given = of({"prefill": 1, "decode": 1, "kv_link": {"kind": "tcp", "gb_per_s": 2}})
    assert (given.per_server, given.bandwidth, given.origin) == (True, 2e9, "given")
    assert near.origin.startswith("assumed")


def test_a_result_tells_of_both_pools_and_of_the_transfers() -> None:
    found = simulate(scenario({"prefill": 1, "decode": 1}))
    prefill, decode = found.result["fleet_load"]["pools"]
    assert (prefill["prefill_tokens"], prefill["decoded_tokens"]) == (60_000, 0)
    assert (decode["prefill_tokens"], decode["decoded_tokens"]) == (60, 60 * 19)
    assert decode["kv_transfers"] == 60
    assert decode["mean_kv_transfer_mb"] == pytest.approx(132.120576)
    text = str(found)
    assert "Prefill: 1 x 1 H100" in text
    assert "KV link: nvlink, 135 GB/s a GPU (assumed" in text


def test_prefix_hits_are_those_of_the_server_that_computes_the_prompt() -> None:
    """Two prefixes of 800 tokens before 60 prompts of 1000: all but the first of each find 50 blocks."""
    content = {"kind": "shared_prefix", "groups": 2, "prefix_tokens": 800}
    found = simulate(scenario({"prefill": 1, "decode": 1}).changed({"workload.content": content}))
    assert sorted(set(found.requests["cached_tokens"])) == [0, 800]
    assert (found.requests["cached_tokens"] == 0).sum() == 2
    assert found.result["prefix_cache_hit_rate"] == pytest.approx(58 * 800 / (60 * 1800))
    assert "pools" not in measured(found.result)


@pytest.mark.parametrize(
    ("workload", "binds"),
    [
        ({"prompt_tokens": 4000, "output_tokens": 4}, "prefill"),
        ({"prompt_tokens": 20, "output_tokens": 400}, "decode"),
    ],
)
def test_the_evidence_is_of_the_pool_that_has_more_to_do(workload: dict[str, int], binds: str) -> None:
    made = scenario({"prefill": 1, "decode": 1}).changed(
        {f"workload.{name}": n for name, n in workload.items()}
    )
    found = pools_evidence(run_of(made), Deployment.of(made).limits)
    assert found.pool == binds


def test_optimize_varies_both_pools() -> None:
    made = scenario({"prefill": 1, "decode": {"count": 1, "engine": {"tensor_parallel_size": 2}}})
    grid = Choices(prefill=(1, 2), decode_tensor_parallel=(1, 2)).of(made)
    assert [str(each) for each in grid] == ["1P TP1", "1P TP2", "2P TP1", "2P TP2"]
    assert [Unit.of(each.scenario, None).gpus for each in grid] == [2, 3, 3, 4]
    with pytest.raises(InputError, match="the scenario has no prefill and decode servers to vary"):
        Choices(prefill=2).of(scenario({"replicas": 2}))


def test_files_of_both_pools() -> None:
    made = Deployment.of(
        scenario({"prefill": 2, "decode": served("kv_consumer", "--tensor-parallel-size 2")})
    )
    files = deployment_files(made, 6)
    lines = [line for line in files["vllm-serve.sh"].splitlines() if not line.startswith("#")]
    assert [("kv_producer" in line, "--tensor-parallel-size 2" in line) for line in lines] == [
        (True, False),
        (False, True),
    ]
    assert "# 4 prefill servers of 1 H100 each" in files["deployment.yaml"]
    assert "prefill:\n  create: true\n  replicas: 4" in files["llm-d-values.yaml"]


def test_explain_is_refused() -> None:
    with pytest.raises(InputError, match="a first token of prefill and decode servers is not taken apart"):
        explain(scenario({"prefill": 1, "decode": 1}))


def test_llm_ds_guide_runs_as_written() -> None:
    """Eight prefill servers get equal shares of prompts of one length, two decode servers those of the
    answers."""
    made = load(GUIDE)
    found = run_of(made, workload=made.stages()).requests
    shares = found["prefill_replica"].value_counts()
    assert set(shares.index) == set(range(8))
    assert shares.max() / shares.min() < 1.05
    assert found["replica"].value_counts().to_dict() == {8: 2700, 9: 2700}
    assert np.isfinite(found["first_token"]).all()


def test_a_picker_that_knows_no_prefill_servers_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "epp.yaml"
    file.write_text(
        "apiVersion: llm-d.ai/v1alpha1\nkind: EndpointPickerConfig\nplugins: [{type: queue-scorer}]\n"
    )
    with pytest.raises(InputError, match="its handler sends no prompt to a prefill server"):
        run_of(scenario({"prefill": 1, "decode": 1, "router": str(file)}))
