"""The shipped scenarios against what was reported of them."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from small_scenarios import small

from servecast.sim.inputs.errors import InputError
from servecast.sim.reproduce.cell import Cell
from servecast.sim.reproduce.reproduce import reproduce
from servecast.sim.reproduce.reproduction import Reproduction, TableReproduction
from servecast.sim.scenario.deployment import Deployment
from servecast.sim.scenario.scenario import load

BARS = {  # mean absolute error of the predicted cells, percent
    "l4-qwen2.5-0.5b": {
        "output_tok_s": 5,
        "e2e_p50_ms": 8,
        "e2e_p95_ms": 8,
        "itl_p50_ms": 8,
        "itl_p95_ms": 25,
        "ttft_p50_ms": 20,
        "ttft_p95_ms": 30,
    },
    "a6000-qwen2.5-7b": {
        "output_tok_s": 5,
        "e2e_p95_s": 8,
        "e2e_p99_s": 8,
        "tpot_p50_s": 8,
        # 20 is missed by two cells, see docs/accuracy.md: without them it is 3
        "ttft_p50_s": 24,
        "ttft_p95_s": 30,
    },
}


@cache
def reproduced(name: str) -> Reproduction:
    return reproduce(load(name))


def cells(name: str, metric: str, **keys: float) -> list[Cell]:
    main = reproduced(name).tables[0]
    return [c for c in main.cells if c.metric == metric and all(c.keys[k] == v for k, v in keys.items())]


@pytest.mark.parametrize("name", BARS)
def test_predicted_cells_are_within_the_bars(name: str) -> None:
    errors = reproduced(name).tables[0].mape_predicted
    assert {metric: errors[metric] for metric, bar in BARS[name].items() if errors[metric] > bar} == {}


@pytest.mark.parametrize("name", BARS)
def test_a_fit_uses_two_rows_and_predicts_the_others(name: str) -> None:
    main = reproduced(name).tables[0]
    assert len(main.rows("fit")) == 2
    assert not [row for row in main.rows("predicted") if row in main.rows("fit")]
    assert all(cell.used == "predicted" for table in reproduced(name).tables[1:] for cell in table.cells)


def test_excluded_are_the_warm_up_cells_only() -> None:
    excluded = {
        name: {
            (c.keys["concurrency"], c.metric)
            for c in reproduced(name).tables[0].cells
            if c.used == "excluded"
        }
        for name in BARS
    }
    assert excluded == {
        "l4-qwen2.5-0.5b": {(1, m) for m in ("ttft_p95_ms", "e2e_p95_ms", "req_s", "output_tok_s")},
        "a6000-qwen2.5-7b": {(1, m) for m in ("ttft_p95_s", "e2e_p95_s", "e2e_p99_s", "output_tok_s")},
    }


def test_l4_peaks() -> None:
    peaks = {cell.metric: cell.predicted for cell in reproduced("l4-qwen2.5-0.5b").tables[1].cells}
    assert peaks["kv_usage_pct"] == pytest.approx(1.1, abs=0.2)
    assert 31 <= peaks["running"] <= 32
    assert peaks["waiting"] == 0
    assert peaks["gpu_memory_gib"] == pytest.approx(13.9, abs=0.3)


def test_a6000_knee_and_cliff() -> None:
    name = "a6000-qwen2.5-7b"
    assert reproduced(name).tables[0].knee == {"concurrency": 256, "reported_concurrency": 256}
    (at_256,) = cells(name, "output_tok_s", concurrency=256)
    (at_512,) = cells(name, "output_tok_s", concurrency=512)
    assert at_512.predicted <= 1.02 * at_256.predicted
    (goodput,) = cells(name, "goodput_pct", concurrency=512)
    assert 40 <= goodput.predicted <= 60


def test_the_json_has_a_flat_object_a_cell() -> None:
    found = reproduced("l4-qwen2.5-0.5b").to_json()
    assert found["fitted_rows"] == [{"concurrency": 2}, {"concurrency": 32}]
    cell = found["rows"][0]
    assert {"concurrency", "metric", "reported", "predicted", "used", "reason"} <= set(cell)
    assert found["run_context"]["commit"] == "8e78aaa"


def test_mape_leaves_out_zeros_fitted_and_excluded_cells() -> None:
    """Errors of +10 % and -30 % count: 20 %."""
    made = [
        Cell({}, "x", 10.0, 11.0, 0.0, "predicted"),
        Cell({}, "x", 10.0, 7.0, 0.0, "predicted"),
        Cell({}, "x", 0.0, 7.0, 0.0, "predicted"),
        Cell({}, "x", 10.0, 70.0, 0.0, "fit"),
        Cell({}, "x", 10.0, 70.0, 0.0, "excluded", "why"),
        Cell({}, "x", 10.0, math.nan, 0.0, "predicted"),
    ]
    assert TableReproduction("t", "", tuple(made)).mape_predicted == {"x": pytest.approx(20.0)}


def test_a_scenario_without_reported_tables_is_refused() -> None:
    scenario = load("l4-qwen2.5-0.5b").model_copy(update={"reported": ()})
    with pytest.raises(InputError, match="nothing was reported"):
        reproduce(scenario)


def test_each_table_has_the_runs_of_its_own_workload(tmp_path: Path) -> None:
    """Ten tables, each of one request of 10, 30, 50 ... tokens: latencies rise from table to table."""
    (tmp_path / "t.csv").write_text("e2el_ms\n1\n")
    tables = [
        {
            "name": f"t{tokens}",
            "table": "t.csv",
            "columns": {"e2el_ms": {"metric": "e2el", "statistic": "mean", "unit": "ms"}},
            "workload": {
                "arrivals": {"kind": "closed_loop", "concurrency": 1},
                "num_requests": 1,
                "prompt_tokens": 20,
                "output_tokens": tokens,
            },
        }
        for tokens in range(10, 210, 20)
    ]
    scenario = small(tmp_path, engine={"version": "0.32"}, workload=tables[0]["workload"], reported=tables)
    found = reproduce(scenario, seeds=1)
    latencies = [table.cells[0].predicted for table in found.tables]
    assert latencies == sorted(latencies)
    assert len(set(latencies)) == 10


def test_a_first_stage_with_the_rate_of_another_is_its_warm_up(tmp_path: Path) -> None:
    """Prompts of the warm-up are ten times as long: the row is of the third stage, not of the first."""
    (tmp_path / "t.csv").write_text("qps,ttft_ms\n5,1\n10,1\n")

    def stage(rate: int, prompt: int) -> dict[str, Any]:
        arrivals = {"kind": "constant", "request_rate": rate}
        lengths = {"prompt_tokens": prompt, "output_tokens": 2}
        return {"streams": [{"arrivals": arrivals, "num_requests": 5, **lengths}], "row": {"qps": rate}}

    table = {
        "name": "t",
        "table": "t.csv",
        "keys": ["qps"],
        "columns": {"ttft_ms": {"metric": "ttft", "statistic": "mean", "unit": "ms"}},
    }
    stages = [stage(5, 1600), stage(10, 160), stage(5, 160)]
    found = reproduce(small(tmp_path, workload={"stages": stages}, reported=[table]), seeds=1)
    first, second = (cell.predicted for cell in found.tables[0].cells)
    assert first == pytest.approx(second, rel=0.3)


def test_rows_that_the_profile_was_fitted_to_are_not_predictions() -> None:
    """The scenario is told to call other rows the fitted ones: those of the profile stay fitted."""
    scenario = load("a6000-qwen2.5-7b", {"reported.0.fit_rows": [{"concurrency": 8}]})
    main = reproduce(scenario, seeds=1).tables[0]
    assert [row["concurrency"] for row in main.rows("fit")] == [4, 8, 256]


def test_what_was_not_measured_has_a_wider_band() -> None:
    fitted = load("a6000-qwen2.5-7b")
    bands = [
        Deployment.of(load("a6000-qwen2.5-7b", changes)).provenance()["error_band"]
        for changes in ({}, {"model.config": "Qwen2.5-0.5B-Instruct"}, {"gpu.name": "h100"})
    ]
    assert fitted.profile is not None
    assert bands == sorted(bands)
    assert len(set(bands)) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"engine.dtype": "float32"}, "engine.dtype: dtype float32 is not modelled"),
        (
            {"engine.quantization": "awq"},
            "engine.quantization: quantization 'awq' quantises no weights by itself",
        ),
        (
            {
                "engine.quantization": "awq",
                "engine.hf_overrides": {"quantization_config": {"quant_method": "fp8"}},
            },
            "engine.quantization: quantization 'awq' is not what the model's config says, 'fp8'",
        ),
    ],
)
def test_what_is_not_modelled_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Deployment.of(load("a6000-qwen2.5-7b", changes))
