"""Flags of pipeline stages and LoRA adapters, and traffic of adapters and grammars."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import yaml
from model_shapes import load
from small_scenarios import small

from servecast.sim.engine.held_costs import AdapterCache, GrammarCosts, Grammars
from servecast.sim.engine.request import Requests
from servecast.sim.inputs.errors import InputError
from servecast.sim.optimize.deploy import deployment_files
from servecast.sim.run.simulate import simulate
from servecast.sim.scenario.deployment import Deployment
from servecast.sim.scenario.stages import runs_on_v2
from servecast.sim.scenario.vllm_flags import parse_serve_command
from servecast.sim.traffic.draw import draw

MS = 10**9
NGRAM = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 4}
EXPERTS = {
    "engine.data_parallel_size": 2,
    "engine.enable_expert_parallel": True,
    "model.config": "Qwen3-30B-A3B",
}


@pytest.mark.parametrize(
    ("model", "release", "v2"),
    # VllmConfig.use_v2_model_runner and DEFAULT_V2_MODEL_RUNNER_ARCHITECTURES of each release
    [
        ("Qwen3-8B", "0.21", False),
        ("Qwen3-8B", "0.22", True),
        ("Llama-3.1-8B-Instruct", "0.22", False),
        ("Llama-3.1-8B-Instruct", "0.23", True),
        ("Qwen2.5-7B-Instruct", "0.24", False),
        ("Qwen2.5-7B-Instruct", "0.25", True),
        ("Qwen3-30B-A3B", "0.28", False),
        ("Qwen3-30B-A3B", "0.29", True),
    ],
)
def test_models_on_model_runner_v2(model: str, release: str, v2: bool) -> None:
    assert runs_on_v2(load(model), release) is v2


def test_flags_of_a_command() -> None:
    words = "-pp 2 --enable-lora --max-loras 2 --max-cpu-loras 8 --max-lora-rank 32 --lora-modules a=/x b=/y"
    flags = parse_serve_command(f"vllm serve m {words}", version="0.32").flags
    assert flags == {
        "pipeline_parallel_size": 2,
        "enable_lora": True,
        "max_loras": 2,
        "max_cpu_loras": 8,
        "max_lora_rank": 32,
        "lora_modules": ["a", "b"],
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"engine.pipeline_parallel_size": 25}, "25 stages of the 24 layers"),
        ({"engine.pipeline_parallel_size": 2, "engine.pp_layer_partition": [10, 10]}, "pp_layer_partition"),
        ({"engine.max_loras": 2}, "max_loras without enable_lora"),
        ({"engine.enable_lora": True, "engine.max_lora_rank": 10}, "max_lora_rank 10"),
        ({"engine.enable_lora": True, "engine.max_loras": 4, "engine.max_cpu_loras": 2}, "max_cpu_loras 2"),
        (
            {"engine.enable_lora": True, "engine.pipeline_parallel_size": 2},
            "may put more adapters into a step",
        ),
        ({"workload.lora_traffic_split": {"a": 0.5}}, "the server has none"),
        (
            {
                "workload.lora_traffic_split": {"a": 0.5},
                "engine.enable_lora": True,
                "engine.lora_modules": ["b"],
            },
            "'a' is not among",
        ),
        ({"workload.lora_traffic_split": {"a": 0.5, "b": 0.6}}, "add up to 1.1"),
        *(
            (asked | beside, f"{what} with {other} are not modelled")
            for asked, what in (
                ({"engine.pipeline_parallel_size": 2}, "pipeline stages"),
                ({"engine.enable_lora": True}, "LoRA adapters"),
                ({"workload.structured_outputs": {}}, "structured outputs"),
            )
            for beside, other in (
                ({"engine.speculative_config": NGRAM, "acceptance": 0.5}, "drafts"),
                ({"engine.kv_offloading_size": 8}, "KV connectors"),
            )
        ),
        (
            EXPERTS | {"engine.pipeline_parallel_size": 2},
            "pipeline stages of engine cores that step together",
        ),
        ({"engine.pipeline_parallel_size": 2, "model.config": "gpt-oss-120b"}, "KV cache groups"),
        (
            EXPERTS | {"workload.structured_outputs": {}},
            "structured outputs with engine cores that step together",
        ),
        (
            EXPERTS
            | {
                "engine.version": "0.32",
                "engine.speculative_config": NGRAM
                | {"num_speculative_tokens_per_batch_size": [[1, 8, 3], [9, 99, 1]]},
                "acceptance": 0.5,
            },
            "drafts in parallel or by batch size with engine cores that step together",
        ),
        ({"engine.kv_offloading_size": 8, "engine.policy": "static"}, "not modelled for the policy 'static'"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], message: str, tmp_path: Any) -> None:
    with pytest.raises(InputError, match=message):
        Deployment.of(scenario(tmp_path).changed(changes))


def scenario(folder: Any) -> Any:
    return small(folder, model={"config": "Qwen2.5-0.5B-Instruct"}, gpu={"name": "h100"})


def test_adapters_leave_all_else_of_the_traffic_as_it_is(tmp_path: Any) -> None:
    """Lengths and times stay, shares are those that were asked for, and contents of adapters are apart."""
    plain = scenario(tmp_path).changed({"workload.num_requests": 2000})
    split = plain.changed({"workload.lora_traffic_split": {"a": 0.5, "b": 0.3}})
    first, second = (Requests.of(draw(each.stages(), 0)[0].streams[0].requests) for each in (plain, split))
    assert (first.prompt_tokens == second.prompt_tokens).all()
    assert (first.arrival_s == second.arrival_s).all()
    assert second.adapter is not None
    shares = np.bincount(second.adapter) / 2000
    assert shares == pytest.approx([0.2, 0.5, 0.3], abs=0.04)  # 4 standard deviations


def test_layers_of_stages_are_read_and_written_as_vllms_variable(tmp_path: Any) -> None:
    """vllm/envs.py: VLLM_PP_LAYER_PARTITION, numbers with commas between them."""
    pasted = "VLLM_PP_LAYER_PARTITION=10,14 vllm serve m -pp 2"
    deployment = Deployment.of(scenario(tmp_path).changed({"engine.command": pasted}))
    assert deployment.scenario.engine.pp_layer_partition == (10, 14)
    assert not parse_serve_command(pasted).widening
    files = deployment_files(deployment, 1)
    assert "\nVLLM_PP_LAYER_PARTITION=10,14 vllm serve m " in files["vllm-serve.sh"]
    for name, path in (("deployment.yaml", "spec"), ("llm-d-values.yaml", "decode")):
        found = yaml.safe_load(files[name])[path]
        found = found["template"]["spec"] if path == "spec" else found
        assert found["containers"][0]["env"] == [{"name": "VLLM_PP_LAYER_PARTITION", "value": "10,14"}]
    with pytest.raises(InputError, match="VLLM_PP_LAYER_PARTITION is 'ten'"):
        parse_serve_command("VLLM_PP_LAYER_PARTITION=ten vllm serve m -pp 2")


def test_files_of_a_server_with_adapters_name_each(tmp_path: Any) -> None:
    """As vLLM's LoRAParserAction takes them: name=path, each a word."""
    changes = {"engine.enable_lora": True, "engine.lora_modules": ["sql", "chat"]}
    line = deployment_files(Deployment.of(scenario(tmp_path).changed(changes)), 1)["vllm-serve.sh"]
    assert "--lora-modules sql=PATH chat=PATH" in line
    assert "the path of each adapter" in line


def test_the_least_recently_used_adapter_goes() -> None:
    """Two slots, three in host memory; 1 s from disk, 0.1 s to a slot."""
    cache = AdapterCache(2, 3, 1.0, 0.1)
    loads = [cache.load(adapters) for adapters in ([1, 2], [1], [3], [2], [1], [4], [2])]
    assert loads == pytest.approx([2.2, 0.0, 1.1, 0.1, 0.1, 1.1, 0.1])


def test_grammars_are_compiled_once_each_by_so_many_threads() -> None:
    grammars = Grammars(GrammarCosts(compile_s=0.2, mask_s=1e-3, threads=2))
    requests = ((1, 0), (2, 0), (3, 50), (1, 100), (1, 300))
    asked = [grammars.ready(grammar, time * MS) // MS for grammar, time in requests]
    assert asked == [200, 200, 400, 200, 300]
    assert grammars.mask_seconds(127) == pytest.approx(0.127)  # one after the other below 128
    assert grammars.mask_seconds(128) == pytest.approx(4 * 16 * 1e-3)  # then 8 batches of 16 on 2 threads


def test_a_request_waits_for_its_grammar(tmp_path: Any) -> None:
    """Requests of a grammar that takes 10 s to compile get their first token after that, others not."""
    changes = {
        "workload.structured_outputs": {"share": 0.5},
        "engine.grammar_compile_s": 10.0,
        "workload.num_requests": 20,
    }
    run = simulate(Deployment.of(scenario(tmp_path).changed(changes)))
    waited = (run.requests["first_token"] - run.requests["sent"]).to_numpy()
    assert (waited > 9.0).sum() + (waited < 1.0).sum() == 20
    assert 3 < (waited > 9.0).sum() < 17


def test_a_third_adapter_starves_behind_two_slots(tmp_path: Any) -> None:
    """Under a load that keeps both in use, as in vLLM's log: its requests wait longer than others."""
    changes = {
        "engine.enable_lora": True,
        "engine.max_loras": 2,
        "workload.lora_traffic_split": {"a": 0.45, "b": 0.45, "c": 0.1},
        "workload.num_requests": 300,
        "workload.arrivals.request_rate": 50.0,
        "workload.output_tokens": 100,
    }
    crowded = scenario(tmp_path).changed(changes)
    run = simulate(Deployment.of(crowded))
    adapter = Requests.of(draw(crowded.stages(), crowded.seed)[0].streams[0].requests).adapter
    assert adapter is not None
    wait = (run.requests["scheduled"] - run.requests["queued"]).to_numpy()
    assert wait[adapter == 3].mean() > 10 * wait[adapter != 3].mean()


def test_slots_take_memory_at_their_rank(tmp_path: Any) -> None:
    """Qwen2.5-0.5B: 24 layers of q 896x896, k and v 896x128, o 896x896, gate, up and down 896x4864; two slots
    of rank 16 in 16 bits hold (inputs + outputs) x 16 of each."""
    changes = {"engine.enable_lora": True, "engine.max_loras": 2}
    memory = Deployment.of(scenario(tmp_path).changed(changes)).memory
    line = next(line for line in memory.lines if line.name == "LoRA slots")
    assert -line.bytes == 2 * 2 * 16 * 24 * (2 * (896 + 896) + 2 * (896 + 128) + 3 * (896 + 4864))
