"""Constants of a GPU from tables of kernel times: tables made of known constants give them back."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from model_shapes import load
from step_cases import Step, steps

import servecast
from servecast.__main__ import main
from servecast.scenarios import __file__ as SCENARIOS
from servecast.scenarios.make.kernels.tables import fit_kernel_tables
from servecast.scenarios.make.kernels.timings import FOLDERS
from servecast.sim.hardware.gpu import find_gpu
from servecast.sim.hardware.gpu_constants import GpuConstants
from servecast.sim.hardware.shard import Shard
from servecast.sim.hardware.step_time.physical import PhysicalStepTime
from servecast.sim.inputs.errors import InputError
from servecast.sim.scenario.deployment import Deployment

H100 = find_gpu("H100")
SHIPPED = sorted((Path(SCENARIOS).parent / "gpus").glob("*.json"))
CONSTANTS = [GpuConstants.load(file) for file in SHIPPED]


def write(
    folder: Path, operation: str, name: str, rows: list[dict[str, object]], release: str = "0.24.0"
) -> None:
    file = folder / "systems" / "data" / "h100_sxm" / operation / "vllm" / release / f"{name}.parquet"
    file.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_parquet(file)


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tables of an H100 whose kernels follow their equations to the letter, latencies in ms."""
    folder = tmp_path_factory.mktemp("tables")
    products = []
    for m, n, k in itertools.product((1, 8, 64, 256, 1024, 4096), (1024, 4096, 16384), (1024, 4096, 16384)):
        sides = (2 * m * n * k / H100.bf16_flops / 0.8) ** 2 + (2 * n * k / H100.bandwidth / 0.9) ** 2
        seconds = 4e-6 + sides**0.5 + 0.5 * 2 * m * (n + k) / H100.bandwidth
        products.append({"gemm_dtype": "bfloat16", "m": m, "n": n, "k": k, "latency": 1e3 * seconds})
    write(folder, "gemm", "gemm_perf", products)
    write(folder, "gemm", "gemm_perf", [products[0] | {"latency": 99.0}], release="0.9.2")
    prompts, decodes = [], []
    for batch, length, heads in itertools.product((1, 4, 16), (128, 512, 1024, 4096), (8, 16, 32)):
        if batch * length > 16384:
            continue
        tiles = -(-length // 128)
        pairs = 128 * 128 * tiles * (tiles + 1) / 2
        seconds = 1e-5 + batch * 4 * heads * 128 * pairs / H100.bf16_flops / 0.7
        seconds += 2 * batch * length * 128 * 2 * (2 * heads + 2 * 8) / H100.bandwidth
        row = {
            "kv_cache_dtype": "bfloat16",
            "batch_size": batch,
            "num_heads": heads,
            "num_key_value_heads": 8,
        }
        row |= {"head_dim": 128, "window_size": 0}
        prompts.append(row | {"isl": length, "step": 0, "latency": 1e3 * seconds})
        seconds = 1.2e-5 + 2 * 8 * 128 * 2 * (length + 1) * batch / H100.bandwidth / 0.85 + 5e-8 * batch
        decodes.append(row | {"isl": length, "step": 1, "latency": 1e3 * seconds})
    write(folder, "attention", "context_attention_perf", prompts * 2)
    write(folder, "attention", "generation_attention_perf", decodes * 2)
    experts = []
    for tokens, hidden, width in itertools.product(
        (1, 4, 16, 64, 256, 1024, 4096), (2048, 4096), (768, 1536, 4096)
    ):
        touched = 64 * (1 - (1 - 4 / 64) ** tokens)
        seconds = 3e-5 + 6 * tokens * 4 * hidden * width / H100.bf16_flops / 0.5
        seconds += touched * 3 * hidden * width * 2 / H100.bandwidth / 0.9
        seconds += 2 * tokens * 4 * (2 * hidden + 3 * width) / H100.bandwidth
        row = {"moe_dtype": "bfloat16", "distribution": "power_law_1.01", "num_tokens": tokens, "topk": 4}
        row |= {
            "hidden_size": hidden,
            "inter_size": width,
            "num_experts": 64,
            "moe_tp_size": 1,
            "moe_ep_size": 1,
        }
        experts.append(row | {"latency": 1e3 * seconds})
    write(folder, "moe", "moe_perf", experts)
    reduce = []
    for size in 2 ** np.arange(11, 27):
        seconds = 5e-6 + 2 * 3 / 4 * 2 * float(size) / H100.link_bandwidth / 0.6
        row = {"num_gpus": 4, "message_size": int(size)}
        reduce.append(row | {"kernel_source": "vLLM_custom_graph", "latency": 1e3 * seconds})
        reduce.append(row | {"kernel_source": "vLLM_custom_eager", "latency": 9e3 * seconds})
    write(folder, "comm", "custom_allreduce_perf", reduce)
    return folder


def test_known_constants_come_back(tables: Path) -> None:
    found = fit_kernel_tables(tables, H100)
    product = found.products["bf16"]
    assert product.compute == pytest.approx(0.8, rel=0.01)
    assert product.bandwidth == pytest.approx(0.9, rel=0.01)
    assert product.overlap_exponent == pytest.approx(2, rel=0.02)
    assert product.floor_s == pytest.approx(4e-6, rel=0.02)
    assert product.activation_passes == pytest.approx(0.5, rel=0.1)
    assert found.prompts["bf16"].compute == pytest.approx(0.7, rel=0.01)
    assert found.prompts["bf16"].floor_s == pytest.approx(1e-5, rel=0.02)
    decodes = found.decodes["bf16"]
    assert (decodes.bandwidth, decodes.floor_s) == pytest.approx((0.85, 1.2e-5), rel=0.01)
    experts = found.experts["bf16"]
    assert (experts.compute, experts.bandwidth, experts.floor_s) == pytest.approx((0.5, 0.9, 3e-5), rel=0.03)
    link = found.all_reduce[4]
    assert (link.latency_s, link.link) == pytest.approx((5e-6, 0.6), rel=0.01)
    assert product.residuals is not None
    assert product.residuals.p90 < 0.01
    assert found.release == "vLLM 0.24.0"  # not 0.9.2, of which nothing was read


def test_the_command_writes_the_constants(
    tables: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "h100.json"
    assert (
        main(["calibrate", "fit", "--kernel-tables", str(tables), "--gpu", "h100", "--output", str(file)])
        == 0
    )
    assert "products bf16: compute 0.8" in capsys.readouterr().out
    assert GpuConstants.load(file).gpu == "H100"
    assert main(["calibrate", "fit", str(tables), "--kernel-tables", "--output", str(file)]) == 2
    assert "no GPU is named" in capsys.readouterr().err


def test_a_scenario_can_rest_on_kernel_timings() -> None:
    scenario = servecast.load("what-if-llama-3.1-70b").changed({"profile": "kernels", "gpu.name": "h100"})
    deployment = Deployment.of(scenario)
    assert deployment.provenance()["basis"] == "measured kernels of the H100"
    origins = {entry.parameter: entry.origin for entry in deployment.profile.provenance}
    assert origins["efficiencies.compute"] == "kernels"
    assert origins["efficiencies.host_fixed_s"] == "assumed"
    near = Deployment.of(scenario.changed({"gpu.name": "a6000", "engine.tensor_parallel_size": 8}))
    assert near.transfer.basis == "kernels of the L40S scaled to the A6000 by peak and bandwidth"


def test_what_the_tables_do_not_hold_is_not_made_up(tables: Path) -> None:
    found = fit_kernel_tables(tables, H100)
    assert set(found.products) == {"bf16"}
    assert set(found.all_reduce) == {4}
    with pytest.raises(InputError, match="no timings of fp8 weights on a H100"):
        found.efficiencies(Shard(replace(load("Llama-3.1-8B-Instruct"), weight_bytes_each=1), H100, 1))


def test_wrong_folders_and_gpus_are_one_message(tables: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there are no kernel tables of a L4"):
        fit_kernel_tables(tables, find_gpu("L4"))
    with pytest.raises(InputError, match="no folder systems/data/h200_sxm"):
        fit_kernel_tables(tables, find_gpu("H200"))
    write(tmp_path, "gemm", "gemm_perf", [{"m": 1}])
    with pytest.raises(InputError, match=r"gemm_perf\.parquet: is no table of kernel times"):
        fit_kernel_tables(tmp_path, H100)


def test_a_file_of_constants_that_is_wrong_is_one_message(tmp_path: Path) -> None:
    file = tmp_path / "gpu.json"
    for text, match in (
        ("{", "is no file"),
        ('{"gpu": "H100"}', "source: Field required"),
        ("[]", "is no file"),
    ):
        file.write_text(text)
        with pytest.raises(InputError, match=match):
            GpuConstants.load(file)


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_shipped_constants_load_and_keep_physics(file: Path) -> None:
    """Every share is at most one (the schema holds it), each fit's median error below a fifth."""
    constants = GpuConstants.load(file)
    assert find_gpu(constants.gpu).name in FOLDERS
    for _, kind in constants.kinds():
        for fitted in kind.values():
            assert fitted.residuals is not None
            assert fitted.residuals.median < 0.25


def test_the_experts_of_a_model_are_counted_per_token() -> None:
    shard = Shard(load("Qwen3-30B-A3B"), H100, 1)
    assert shard.expert_flops(1) == 48 * 2 * 8 * 3 * 2048 * 768
    assert shard.expert_bytes(1) == pytest.approx(48 * 8 * 3 * 2048 * 768 * 2)
    assert shard.expert_moved_bytes(1) == 48 * 8 * (2 * 2048 + 3 * 768) * 2


@pytest.mark.parametrize("name", ["Llama-3.1-8B-Instruct", "Qwen3-30B-A3B", "gemma-3-1b-it"])
@settings(max_examples=25)
@given(step=steps())
def test_steps_from_shipped_constants_keep_the_roofline(name: str, step: Step) -> None:
    for constants in CONSTANTS:
        shard = Shard(load(name), find_gpu(constants.gpu), 1, cudagraph_sizes=(1, 2, 4, 8, 16, 64, 256))
        model_of_time = PhysicalStepTime(shard, constants.efficiencies(shard))
        seconds = model_of_time.seconds(step)
        assert seconds >= model_of_time.roofline_seconds(step)
        assert sum(model_of_time.breakdown(step).values()) == pytest.approx(seconds)
