"""The closed loops of InferenceX and NVIDIA, predicted from timings of kernels: a sample of their rows.

``make inferencex`` predicts all of them. What is held here is what the accuracy page says of all: mean error
of TPOT at most 8 %, median of TTFT at most 20 %, and nine in ten inside their bands.
"""

from __future__ import annotations

import statistics
from functools import cache

import pytest

from servecast.sim.reproduce.reproduce import reproduce
from servecast.sim.reproduce.reproduction import Reproduction
from servecast.sim.scenario.reported import read_rows
from servecast.sim.scenario.scenario import load

NAME = "inferencex-vllm"
SAMPLE = [  # light ones of every group
    {"model": "Llama-3.1-70B-Instruct", "isl": 1024, "osl": 1024, "concurrency": 16},
    {"model": "Qwen3-32B", "isl": 1024, "osl": 1024, "concurrency": 8},
]


@cache
def sample() -> Reproduction:
    apart = [{"isl": 1000, "osl": 500, "tensor_parallel_size": 2}]
    experts = [
        {"model": "MiniMax-M2.5", "isl": 1024, "osl": 1024, "concurrency": 16, "tensor_parallel_size": 8}
    ]
    sinks = [
        {"model": "gpt-oss-120b", "isl": 1024, "osl": 1024, "concurrency": c, "tensor_parallel_size": 2}
        for c in (8, 32)
    ]
    latents = [{"model": "Kimi-K2.5", "isl": 1024, "osl": 1024, "concurrency": 16}]
    ranks = [
        {"tensor_parallel_size": 1, "data_parallel_size": 2, "isl": 1000},
        {"tensor_parallel_size": 2, "expert_parallel": "with", "isl": 8000, "osl": 100},
    ]
    tables = (SAMPLE, apart, experts, sinks, latents, ranks)
    changed = {f"reported.{number}.rows": rows for number, rows in enumerate(tables)}
    return reproduce(load(NAME, changed))


def test_ten_runs_are_predicted_without_a_row_in_a_fit() -> None:
    main = sample().tables[0]
    assert len(main.rows("predicted")) == 10
    assert {cell.used for cell in main.cells} == {"predicted"}
    error = {
        metric: [abs(c.error or 0) for c in main.cells if c.metric == metric] for metric in main.coverage
    }
    assert statistics.mean(error["tpot_mean_ms"]) <= 0.08
    assert statistics.median(error["ttft_mean_ms"]) <= 0.2


def test_nearly_all_of_them_keep_their_bands() -> None:
    coverage = sample().tables[0].coverage
    assert coverage["tpot_mean_ms"] >= 0.9
    assert coverage["ttft_mean_ms"] >= 0.85


def test_errors_are_told_by_group() -> None:
    """Three sizes of Llama on H100, four on H200, and three of Qwen3-32B."""
    document = sample().to_json()
    assert len(document["mape_by_group"]) == 10
    llama = document["mape_by_group"][
        "model Llama-3.1-70B-Instruct, gpu H200, precision fp8, tensor_parallel_size 4"
    ]
    (cell,) = (
        cell
        for cell in document["rows"]
        if (cell["gpu"], cell["tensor_parallel_size"], cell["metric"]) == ("H200", 4, "tpot_mean_ms")
    )
    assert llama["tpot_mean_ms"] == abs(cell["error_pct"])


def test_rows_that_are_not_predicted_say_why() -> None:
    """314 rows: 119 of four mixtures of experts, each in a table of its own, and the 195 of two dense
    models."""
    scenario = load(NAME)
    assert len(read_rows(scenario.reported[0])) == 195
    left_out = sample().to_json()["left_out"]
    assert [each["rows"] for each in left_out] == [33, 15, 45, 26]
    assert all("told apart in the table" in each["reason"] for each in left_out)


@pytest.mark.parametrize("table", ["minimax_m2.5", "gpt_oss", "kimi_k2.5", "qwen3_235b", "qwen3_235b_ranks"])
def test_mixtures_of_experts_are_predicted_apart(table: str) -> None:
    """MiniMax-M2.5 on eight H200, whose ranks hold whole experts; gpt-oss-120b on two H100, with windows,
    sinks and experts of mxfp4; Kimi-K2.5 on eight H200, with latents and experts of int4;
    Qwen3-235B-A22B-FP8 on two H200 by DeepGEMM, its attention split or not: mean TPOT within 12 %."""
    (cells,) = (each.cells for each in sample().tables if each.name == table)
    tpot = [abs(cell.error or 1) for cell in cells if cell.metric == "tpot_mean_ms"]
    assert statistics.mean(tpot) <= 0.12


def test_each_row_is_a_run_with_its_own_settings() -> None:
    """InferenceX sends 10 requests for each in flight, of 0.8 to 1 of the nominal length."""
    (reported,) = load(NAME).reported[:1]
    (row,) = (
        row
        for row in read_rows(reported)
        if row.keys["gpu"] == "H100" and list(row.keys.values())[3:] == [4, 8192, 1024, 32]
    )
    settings = reported.settings(row)
    assert settings["workload.num_requests"] == 320
    assert settings["engine.tensor_parallel_size"] == 4
    assert settings["engine.max_num_seqs"] == 32
    assert settings["workload.prompt_tokens.tokens"] == 7373
