"""Scenarios made concrete: lengths that the model, the memory and overrides decide, and what is said of
them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from places import DATA
from small_scenarios import scenario_file

from servecast.sim.inputs.errors import InputError
from servecast.sim.run.explain import explain
from servecast.sim.run.simulation import simulate
from servecast.sim.scenario.deployment import Deployment
from servecast.sim.scenario.scenario import Scenario, load

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


def scenario(folder: Path, model: str = "Qwen3-8B", gpu: str = "H100", **engine: Any) -> Scenario:
    changes = {"model.config": model, "gpu": {"name": gpu}, "engine": {"version": "0.32", **engine}}
    return load(scenario_file(folder), {**changes, "profile": None})


@pytest.mark.parametrize("asked", ["auto", -1])
def test_a_length_is_fitted_to_the_pool(tmp_path: Path, asked: str | int) -> None:
    fitted = Deployment.of(scenario(tmp_path, gpu="RTX 4090", max_model_len=asked))
    assert fitted.config.max_model_len == fitted.memory.kv_tokens < 40_960
    pasted = scenario(tmp_path, gpu="RTX 4090", command=f"vllm serve m --max-model-len {asked}")
    assert Deployment.of(pasted).config.max_model_len == fitted.config.max_model_len
    assert Deployment.of(scenario(tmp_path, max_model_len=asked)).config.max_model_len == 40_960


def test_yarn_stretches_the_positions(tmp_path: Path) -> None:
    """Up to 0.31 vLLM takes the original positions times the factor; 0.32 what max_position_embeddings
    says."""
    asked = {"max_model_len": 131_072, "hf_overrides": {"rope_scaling": YARN}}
    stretched = Deployment.of(scenario(tmp_path, **asked | {"version": "0.23"}))
    assert stretched.config.max_model_len == 131_072
    with pytest.raises(InputError, match="beyond the model's 40960 positions"):
        Deployment.of(scenario(tmp_path, **asked))
    overrides = '{"rope_parameters":{"rope_type":"yarn","factor":4.0},"max_position_embeddings":131072}'
    command = f"vllm serve m --max-model-len 131072 --hf-overrides '{overrides}'"
    assert Deployment.of(scenario(tmp_path, command=command)).config.max_model_len == 131_072


def test_rope_of_other_kinds(tmp_path: Path) -> None:
    linear = {"rope_scaling": {"type": "linear", "factor": 2.0}}
    assert Deployment.of(scenario(tmp_path, hf_overrides=linear)).config.max_model_len == 81_920
    llama3 = {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}
    assert Deployment.of(scenario(tmp_path, hf_overrides=llama3)).config.max_model_len == 40_960
    long = {"rope_scaling": {"type": "longrope"}, "original_max_position_embeddings": 4096}
    assert Deployment.of(scenario(tmp_path, hf_overrides=long)).config.max_model_len == 4096


def test_overrides_that_are_no_object_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--hf-overrides takes a JSON object"):
        scenario(tmp_path, command="vllm serve m --hf-overrides 7")


def test_a_run_says_its_pool_and_flags(tmp_path: Path) -> None:
    found = simulate(scenario(tmp_path, num_gpu_blocks_override=4096, max_model_len=8192))
    text = found.to_text().splitlines()
    assert "GPU KV cache size: 65,536 tokens, 8.00x of max_model_len 8,192" in text
    flags = next(line for line in text if line.startswith("Flags: "))
    assert "--max-num-seqs 1024 --max-num-batched-tokens 8192 --gpu-memory-utilization 0.92" in flags
    assert flags.endswith("--enable-prefix-caching --enable-chunked-prefill --async-scheduling")
    assert found.result["kv_cache"]["tokens"] == 65_536
    other = simulate(scenario(tmp_path, block_size=64, disable_hybrid_kv_cache_manager=True)).to_text()
    assert "--block-size 64 " in other
    assert "--disable-hybrid-kv-cache-manager" in other


def test_blocks_that_no_kernel_takes_are_refused(tmp_path: Path) -> None:
    """vLLM's attention backends each take multiples of 16 (get_supported_kernel_block_sizes), so that one of
    17 leaves none, and the server does not start."""
    with pytest.raises(InputError, match=r"engine\.block_size: blocks of 17 tokens"):
        Deployment.of(scenario(tmp_path, block_size=17))
    assert Deployment.of(scenario(tmp_path, block_size=48)).config.block_size == 48


def test_float16_of_models_that_vllm_bars_it_from(tmp_path: Path) -> None:
    """_FLOAT16_NOT_SUPPORTED_MODELS: refused where it is asked for, and a GPU without bfloat16 falls back to
    float32 (_resolve_auto_dtype)."""
    with pytest.raises(InputError, match=r"vLLM refuses float16 of gemma3_text\. Use bfloat16\."):
        Deployment.of(scenario(tmp_path, "gemma-3-1b-it", dtype="half"))
    with pytest.raises(InputError, match="and runs it in float32 on a T4, which is not modelled"):
        Deployment.of(scenario(tmp_path, "gemma-3-1b-it", "T4"))
    assert Deployment.of(scenario(tmp_path, "gemma-3-1b-it", "L4"))
    assert Deployment.of(scenario(tmp_path, "Qwen2.5-0.5B-Instruct", "T4", dtype="float16"))


def test_offloading_of_nothing_is_none(tmp_path: Path) -> None:
    """A grid's 0 is the cell without, in sweep, optimize and a pasted command."""
    for engine in ({"kv_offloading_size": 0}, {"command": "vllm serve m --kv-offloading-size 0"}):
        assert Deployment.of(scenario(tmp_path, **engine)).offloading is None


def test_explain_tells_what_the_deployment_does(tmp_path: Path) -> None:
    """What was told or assumed of the server, and its KV cache groups: a layer in six of Gemma 3 is full."""
    made = scenario(tmp_path, "gemma-3-1b-it", "L4", stream_interval=4)
    notes = explain(made).notes
    assert any(note.startswith("KV cache groups: ") and "sliding" in note for note in notes)
    assert set(Deployment.of(made).notes) <= set(notes)
    assert any("stream_interval 4 is not modelled" in note for note in notes)


def test_what_may_fit_runs_with_a_note(tmp_path: Path) -> None:
    found = simulate(scenario(tmp_path, gpu="RTX 4090", max_model_len=40_960))
    assert found.result["engine"]["num_gpu_blocks"] == 40_960 // 16 + 1
    assert any("may be up to" in note for note in found.result["notes"])


def test_bfloat16_needs_a_gpu_that_has_it(tmp_path: Path) -> None:
    """vLLM: "Bfloat16 is only supported on GPUs with compute capability of at least 8.0"; auto is float16."""
    small = {"model": "Qwen2.5-0.5B-Instruct", "gpu": "T4"}
    with pytest.raises(InputError, match=r"engine\.dtype: vLLM refuses bfloat16 on a T4"):
        Deployment.of(scenario(tmp_path, **small, dtype="bfloat16"))
    assert Deployment.of(scenario(tmp_path, **small)).gpu.name == "T4"


FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}


@pytest.mark.parametrize(
    ("name", "said", "ranks", "groups", "block"),
    [  # vLLM's groups by pattern: twelve layers each, or one of all latents. A page holds a state: Nemotron's
        # 73,728 + 5,242,880 bytes take 1,298 tokens of 4,096, and blocks are multiples of 16
        ("gpt-oss-20b", {"quant_method": "mxfp4"}, 1, ["sliding", "full"], 16),
        ("Qwen3-Next-80B-A3B", FP8, 4, ["mamba", "mamba", "mamba", "full"], 272),
        ("DeepSeek-V3.2", FP8, 8, [], 64),
        ("Kimi-K2", FP8, 16, [], 16),
        ("Nemotron-Nano-9B-v2", None, 1, ["mamba"] * 7 + ["full"], 1312),
    ],
)
def test_models_of_every_kind_are_served(
    tmp_path: Path, name: str, said: dict[str, Any] | None, ranks: int, groups: list[str], block: int
) -> None:
    configs = json.loads((DATA / "model_configs" / "configs.json").read_text())
    file = tmp_path / f"{name}.json"
    file.write_text(json.dumps(configs[name]["config"] | {"quantization_config": said}))
    asked = scenario(tmp_path, str(file), "H200", max_model_len=8192, tensor_parallel_size=ranks)
    deployment = Deployment.of(asked.changed({"gpu.per_node": max(8, ranks)}))
    config = deployment.config
    assert ([spec.kind for spec in config.kv_groups], config.block_size) == (groups, block)
    run = simulate(deployment.scenario)
    assert set(run.requests["status"]) == {"finished"}
    told = [line for line in run.to_text().splitlines() if line.startswith("KV cache groups: ")]
    assert len(told) == bool(groups)
    assert [note for note in explain(deployment.scenario).notes if note in told] == told
    assert deployment.memory.logged_tokens > 100_000
