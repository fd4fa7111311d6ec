"""The closed loops of InferenceX and NVIDIA, predicted from timings of kernels: a sample of their rows.

``make inferencex`` predicts all of them. What is held here is what the accuracy page says of all: mean error
of TPOT at most 8 %, median of TTFT at most 20 %, and nine in ten inside their bands.
"""

from __future__ import annotations

import statistics
from functools import cache

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
    changed = {"reported.0.rows": SAMPLE, "reported.1.rows": apart, "reported.2.rows": experts}
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
    """359 rows: 105 of models that are not modelled, 59 of two mixtures of experts, each in a table of its
    own, and the 195 of two dense models."""
    scenario = load(NAME)
    assert len(read_rows(scenario.reported[0])) == 195
    left_out = sample().to_json()["left_out"]
    assert [each["rows"] for each in left_out] == [33, 45, 60, 26]
    assert all("not modelled" in each["reason"] for each in left_out[1:3])


def test_a_mixture_of_experts_is_predicted_apart() -> None:
    """MiniMax-M2.5 on eight H200, whose ranks hold whole experts: TPOT within 12 %."""
    (cells,) = (table.cells for table in sample().tables if table.name == "minimax_m2.5")
    (tpot,) = (cell for cell in cells if cell.metric == "tpot_mean_ms")
    assert abs(tpot.error or 1) <= 0.12


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
