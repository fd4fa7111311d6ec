"""``servecast check``: what is found in the reference tables, nothing in true ones, and each corruption."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from servecast.sim.cli import main
from servecast.sim.metrics import summary
from servecast.sim.scenario import load, shipped_folder
from servecast.sim.simulate import simulate
from servecast.sim.warmup import select
from servecast.validate.check import RULES, Checked, check
from servecast.validate.report_columns import read_name
from servecast.validate.report_of_results import from_results
from servecast.validate.report_of_scenario import from_scenario
from servecast.validate.report_of_table import Context, from_table
from servecast.validate.report_table import Report

TABLES = shipped_folder() / "tables"
Cell = tuple[str, str, str]  # rule, row, column
Row = dict[str, str]


def cells(checked: Checked) -> set[Cell]:
    return {(f.rule, f.level.label, column) for f in checked.findings for column in f.columns}


def of(rule: str, row: str, *columns: str) -> set[Cell]:
    return {(rule, row, column) for column in columns}


def union(*parts: Iterable[Cell]) -> set[Cell]:
    return {cell for part in parts for cell in part}


# -- the reference tables --------------------------------------------------------------------------


def test_l4_warm_up_and_prompts_that_repeat_into_a_warm_cache() -> None:
    """All other cells are clean, those of the other concurrencies and the resource peaks among them."""
    checked = check(from_scenario(load("l4-qwen2.5-0.5b")), predict=False)
    assert cells(checked) == union(
        of("warm-up", "concurrency=1", "ttft_p95_ms", "e2e_p95_ms", "req_s", "output_tok_s"),
        *(of("repeated-prompts", f"concurrency={c}", "ttft_p50_ms") for c in (4, 8, 16, 32)),
        of("repeated-prompts", "concurrency=32", "ttft_p95_ms"),
    )
    (warm_up,) = [f for f in checked.findings if f.rule == "warm-up"]
    assert warm_up.confidence == "certain"
    assert warm_up.numbers["outlier_s"] == pytest.approx(1.7, rel=0.05)


def test_a6000_warm_up_waves_extrapolated_percentiles_and_one_prompt() -> None:
    checked = check(from_scenario(load("a6000-qwen2.5-7b")), predict=False)
    past = ("ttft_p95_s", "e2e_p95_s", "e2e_p99_s")
    assert cells(checked) == union(
        of("warm-up", "concurrency=1", *past, "output_tok_s"),
        of("few-waves", "concurrency=8", "output_tok_s"),
        of("few-waves", "concurrency=512", "output_tok_s"),
        *(of("percentile-past-maximum", f"concurrency={c}", *past) for c in (1, 2, 4, 8)),
        *(
            of("percentile-past-maximum", row, "ttft_p95_s")
            for row in ("phase=alone", "phase=beside_long", "input_tokens=16", "input_tokens=1024")
        ),
        *(
            of("repeated-prompts", f"concurrency={c}", "ttft_p50_s", "ttft_p95_s")
            for c in (64, 128, 256, 512)
        ),
        of("repeated-prompts", "concurrency=8", "ttft_p50_s"),
    )
    (warm_up,) = [f for f in checked.findings if f.rule == "warm-up"]
    assert warm_up.numbers["outlier_s"] == pytest.approx(0.79, rel=0.02)


LLMD = TABLES / "llmd_37_capacity.csv"
POLICIES = ("precise", "default", "load", "random")
QPS = (3, 4, 5, 6, 8, 10, 12, 15, 20)


def llmd_expected() -> set[Cell]:
    swept = [f"experiment={policy}-scheduling qps={qps}" for policy in POLICIES for qps in QPS]
    summed = [f"experiment={policy}-scheduling qps=all" for policy in POLICIES]
    return union(
        *(of("send-rate", row, "req_s") for row in swept),
        *(of("drain", row, "output_tok_s") for row in swept),
        *(of("throughput-requests", row, "req_s", "output_tok_s") for row in summed),
        *(of("zero-latency", row, "itl_p50_s") for row in (*swept, *summed)),
        *(of("halved-itl", row, "itl_mean_s", "itl_p90_s") for row in (*swept, *summed)),
    )


def test_llmd_send_rate_drain_zero_and_halved_itl() -> None:
    checked = check(from_table(LLMD, Context(output_tokens=1000)))
    assert cells(checked) == llmd_expected()
    (drain,) = [
        f
        for f in checked.findings
        if f.rule == "drain" and f.level.label.endswith("precise-scheduling qps=20")
    ]
    assert drain.numbers["time_over_sending"] == pytest.approx(20 * 1000 / 9295.2)


def test_llmd_ttft_below_its_prompts_prefill_is_a_warm_cache() -> None:
    """9,000 fresh tokens of a 70B model on four H100 take a third of a second."""
    context = Context("Llama-3.1-70B-Instruct", "h100", 4, 4, prompt_tokens=9000, output_tokens=1000)
    found = cells(check(from_table(LLMD, context))) - llmd_expected()
    quick = [f"experiment=precise-scheduling qps={qps}" for qps in (*QPS, "all")]
    assert found == union(
        *(of("roofline-prefill", row, "ttft_mean_s", "ttft_p90_s") for row in quick),
        *(
            of("roofline-prefill", f"experiment=default-scheduling qps={q}", "ttft_mean_s")
            for q in (3, 4, 5, 6)
        ),
    )


def test_llmd_scenario_knows_that_whole_prompts_repeat() -> None:
    """249 prompts for 6,830 requests: a TTFT under the bound of 9,400 tokens came out of the cache. The table
    of queues and KV usage is clean."""
    scenario = load("llmd-4x-llama-3.1-70b-tp4-h100")
    swept = [f"experiment=precise-scheduling qps={qps}" for qps in QPS]
    summed = "experiment=precise-scheduling qps=all"
    assert cells(check(from_scenario(scenario), predict=False)) == union(
        llmd_expected(),
        *(of("repeated-prompts", row, "ttft_mean_s", "ttft_p90_s") for row in swept),
        *(
            of("repeated-prompts", f"experiment=default-scheduling qps={q}", "ttft_mean_s")
            for q in (3, 4, 5, 6)
        ),
        of("roofline-prefill", summed, "ttft_mean_s", "ttft_p90_s"),
    )


def test_llmd_queue_and_kv_peaks_are_possible() -> None:
    assert cells(check(from_table(TABLES / "llmd_37_capacity_queue_kv.csv", Context()))) == set()


@pytest.mark.parametrize("phase", ["static", "continuous", "paged"])
def test_infer_contradicts_no_arithmetic(phase: str) -> None:
    """Its memory-cliff rows agree with themselves; only the prediction tells them."""
    checked = check(from_scenario(load(f"infer-rtx5080-{phase}")), predict=False)
    assert cells(checked) == set()


def test_infer_memory_cliff_is_found_by_the_prediction() -> None:
    found = cells(check(from_scenario(load("infer-rtx5080-paged"))))
    every = ("throughput_tok_s", "ttft_p50_ms", "ttft_p99_ms", "itl_p50_ms", "itl_p99_ms", "latency_p50_s")
    cliff = {
        f"workload={workload} model={model}"
        for workload, model in (
            ("chunked_prefill", "Llama"),
            ("chunked_prefill", "Qwen3"),
            ("prefix_caching", "Qwen3"),
        )
    }
    assert {row for _, row, _ in found} == {*cliff, "batch=24"}
    assert found <= union(
        *(of("prediction", row, *every) for row in cliff), of("prediction", "batch=24", "throughput_tok_s")
    )
    assert of("prediction", "batch=24", "throughput_tok_s") <= found


def test_prediction_doubts_what_a_warm_up_or_a_cold_kernel_delayed() -> None:
    found = cells(check(from_scenario(load("a6000-qwen2.5-7b"))))
    doubted = {cell for cell in found if cell[0] == "prediction"}
    warmed_up = of("prediction", "concurrency=1", "ttft_p95_s", "e2e_p95_s", "e2e_p99_s")
    slow = of("prediction", "concurrency=8", "ttft_p50_s", "ttft_p95_s")
    assert of("prediction", "concurrency=1", "ttft_p95_s") | slow <= doubted <= warmed_up | slow


# -- true reports ----------------------------------------------------------------------------------

HARDWARE = {
    "l4-qwen2.5-0.5b": Context("Qwen2.5-0.5B-Instruct", "l4"),
    "a6000-qwen2.5-7b": Context("Qwen2.5-7B-Instruct", "a6000"),
}
COLUMNS = {"req_s": "request_throughput", "output_tok_s": "output_throughput"} | {
    f"{name}_{statistic}_ms": f"{'median' if statistic == 'p50' else statistic}_{metric}_ms"
    for name, metric in (("ttft", "ttft"), ("tpot", "tpot"), ("itl", "itl"), ("e2e", "e2el"))
    for statistic in ("mean", "p50", "p95", "p99")
}
FIXED = {"prompt_tokens": 256, "output_tokens": 128}
VARIED = {
    "prompt_tokens": {"kind": "lognormal", "mean": 700, "std": 500, "min_tokens": 8, "max_tokens": 4000},
    "output_tokens": {"kind": "lognormal", "mean": 100, "std": 70, "min_tokens": 2, "max_tokens": 500},
}
CLOSED_LEVELS = [{"concurrency": c, "num_requests": 20 * c} for c in (1, 2, 4, 8, 16, 32)]


def open_levels(*rates: float) -> list[dict[str, float]]:
    return [{"request_rate": rate, "num_requests": 200} for rate in rates]


def reported(
    path: Path,
    name: str,
    levels: list[Any],
    lengths: Mapping[str, Any],
    *,
    seed: int = 0,
    warm_up_s: float = 0.0,
    arrivals: Mapping[str, Any] | None = None,
) -> list[Row]:
    """Simulate levels and report them as a table; with warm_up_s the first request of all takes that much
    longer."""
    workload = {**lengths, **({"arrivals": arrivals} if arrivals else {})}
    scenario = load(name, {"workload": workload, "sweep": {"levels": levels}, "reported": [], "seed": seed})
    run = simulate(scenario)
    if warm_up_s:
        requests = run.requests
        first = requests["sent"].idxmin()
        later = requests.index != first
        requests.loc[later, ["arrival", "sent", "first_token", "finish"]] += warm_up_s
        requests.loc[first, ["first_token", "finish"]] += warm_up_s
        run.meta["stage_starts_s"] = [0.0, *(start + warm_up_s for start in run.meta["stage_starts_s"][1:])]
    rows = []
    key = "concurrency" if "concurrency" in levels[0] else "request_rate"
    for index, level in enumerate(levels):
        figures = summary(select(run, stage=index), ranks=(95, 99))
        done = figures["completed"]
        row = {key: str(level[key]), "requests": str(done), "errors": "0"}
        if lengths is not FIXED:
            row["output_tokens_mean"] = f"{figures['total_output_tokens'] / done:.1f}"
            row["input_tokens"] = f"{figures['total_input_tokens'] / done:.1f}"
        row |= {column: f"{figures[of_vllm]:.2f}" for column, of_vllm in COLUMNS.items()}
        row["req_s"] = f"{figures['request_throughput']:.4f}"
        rows.append(row)
    write(path, rows)
    return rows


def write(path: Path, rows: list[Row]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def context_of(name: str, lengths: Mapping[str, Any]) -> Context:
    return dataclasses.replace(HARDWARE[name], **FIXED) if lengths is FIXED else HARDWARE[name]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("lengths", [FIXED, VARIED], ids=["fixed", "varied"])
@pytest.mark.parametrize("name", HARDWARE)
@pytest.mark.parametrize("load_kind", ["closed", "open"])
def test_nothing_is_found_in_a_true_report(
    tmp_path: Path, name: str, lengths: Mapping[str, Any], load_kind: str, seed: int
) -> None:
    levels: list[Any] = CLOSED_LEVELS
    if load_kind == "open":
        slow = 1.0 if name.startswith("l4") else 0.1
        levels = open_levels(*(slow * rate for rate in (0.5, 2, 8, 20, 60)))
    path = tmp_path / "true.csv"
    arrivals = {"kind": "poisson", "request_rate": 1.0} if load_kind == "open" else None
    reported(path, name, levels, lengths, seed=seed, arrivals=arrivals)
    checked = check(from_table(path, context_of(name, lengths)))
    assert [(f.rule, f.level.label, f.message) for f in checked.findings] == []
    assert checked.exit_code == 0


def test_nothing_is_found_in_our_own_result(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    changes = ["--set", "workload.content=unique", "--set", "reported=[]"]
    assert main(["simulate", "l4-qwen2.5-0.5b", *changes, "--output", str(out)]) == 0
    checked = check(from_results([out], HARDWARE["l4-qwen2.5-0.5b"]))
    assert [(f.rule, f.level.label, f.message) for f in checked.findings] == []
    assert len(checked.report.levels) == 6


# -- corruptions -----------------------------------------------------------------------------------


@cache
def true_rows(kind: str, folder: Path) -> tuple[Row, ...]:
    name, path = "l4-qwen2.5-0.5b", folder / f"{kind}.csv"
    if kind == "closed":
        return tuple(reported(path, name, CLOSED_LEVELS, FIXED))
    arrivals = {"kind": "poisson", "request_rate": 1.0}
    return tuple(reported(path, name, open_levels(1, 10, 80, 160), FIXED, arrivals=arrivals))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("true")


def times(row: Row, factor: float, *columns: str) -> None:
    for column in columns:
        row[column] = f"{factor * float(row[column]):.4f}"


def all_of(row: Row, *beginnings: str) -> list[str]:
    return [column for column in row if column.startswith(beginnings)]


def percentile_order(rows: list[Row]) -> None:
    rows[2]["ttft_p50_ms"], rows[2]["ttft_p99_ms"] = rows[2]["ttft_p99_ms"], rows[2]["ttft_p50_ms"]


def mean_below_its_tail(rows: list[Row]) -> None:
    times(rows[4], 0.01, "ttft_mean_ms")


def latency_without_ttft(rows: list[Row]) -> None:
    rows[5]["e2e_mean_ms"] = f"{0.8 * float(rows[5]['e2e_mean_ms']):.2f}"


def latency_under_ttft(rows: list[Row]) -> None:
    rows[5]["e2e_p99_ms"] = f"{0.5 * float(rows[5]['ttft_p99_ms']):.2f}"


def tokens_of_the_prompts_too(rows: list[Row]) -> None:
    times(rows[3], 3.0, "output_tok_s")


def slower_than_the_run(rows: list[Row]) -> None:
    rows[3]["e2e_p99_ms"] = f"{3000 * float(rows[3]['requests']) / float(rows[3]['req_s']):.2f}"


def more_in_flight_than_slots(rows: list[Row]) -> None:
    times(rows[4], 1.5, "req_s", "output_tok_s")


def fewer_in_flight_than_slots(rows: list[Row]) -> None:
    times(rows[4], 0.5, "req_s", "output_tok_s")


def rate_of_sending(rows: list[Row]) -> None:
    rows[3]["req_s"] = rows[3]["request_rate"]


def rate_of_sending_alone(rows: list[Row]) -> None:
    for row in rows:
        row["req_s"] = row["request_rate"]
        del row["output_tok_s"]


def tokens_over_the_drain(rows: list[Row]) -> None:
    for row in rows:
        del row["req_s"]
    times(rows[1], 0.5, "output_tok_s")


def no_time_at_all(rows: list[Row]) -> None:
    rows[2]["itl_p50_ms"] = "0.00"


def two_stamps_a_token(rows: list[Row]) -> None:
    for row in rows:
        row["itl_p50_ms"] = "0.00"
        times(row, 0.5, "itl_mean_ms")


def halved_gaps(rows: list[Row]) -> None:
    times(rows[2], 0.5, *all_of(rows[2], "itl", "tpot"))


def ticks(rows: list[Row]) -> None:
    for row in rows:
        for column in all_of(row, "ttft"):
            row[column] = f"{1000 / 64 * max(1, round(float(row[column]) * 64 / 1000)):.2f}"


def tens(rows: list[Row]) -> None:
    for row in rows:
        for column in all_of(row, "e2e"):
            row[column] = f"{10 * round(float(row[column]) / 10):.2f}"


def faster_than_the_weights(rows: list[Row]) -> None:
    times(rows[0], 0.3, *all_of(rows[0], "tpot", "itl"))


def faster_than_the_prompt(rows: list[Row]) -> None:
    times(rows[0], 0.05, *all_of(rows[0], "ttft"))


def faster_than_a_burst(rows: list[Row]) -> None:
    rows[5]["requests"] = "32"
    times(rows[5], 0.15, *all_of(rows[5], "ttft"))


def more_than_the_gpu(rows: list[Row]) -> None:
    times(rows[5], 1000.0, "req_s", "output_tok_s")


def more_streams_than_fit(rows: list[Row]) -> None:
    rows[5]["concurrency"] = "100000"
    times(rows[5], 0.5, *all_of(rows[5], "ttft"))


CORRUPTIONS: list[tuple[str, str, Callable[[list[Row]], None], str]] = [
    ("percentile-order", "closed", percentile_order, "ttft_p50_ms"),
    ("percentile-order", "closed", mean_below_its_tail, "ttft_mean_ms"),
    ("e2e-sum", "closed", latency_without_ttft, "e2e_mean_ms"),
    ("e2e-sum", "closed", latency_under_ttft, "e2e_p99_ms"),
    ("throughput-requests", "closed", tokens_of_the_prompts_too, "output_tok_s"),
    ("wall-time", "closed", slower_than_the_run, "e2e_p99_ms"),
    ("littles-law", "closed", more_in_flight_than_slots, "req_s"),
    ("littles-law", "closed", fewer_in_flight_than_slots, "req_s"),
    ("send-rate", "open", rate_of_sending, "req_s"),
    ("send-rate", "open", rate_of_sending_alone, "req_s"),
    ("drain", "open", rate_of_sending, "output_tok_s"),
    ("drain", "open", tokens_over_the_drain, "output_tok_s"),
    ("zero-latency", "closed", no_time_at_all, "itl_p50_ms"),
    ("halved-itl", "closed", two_stamps_a_token, "itl_mean_ms"),
    ("halved-itl", "closed", halved_gaps, "tpot_mean_ms"),
    ("clock-grid", "closed", ticks, "ttft_mean_ms"),
    ("clock-grid", "closed", tens, "e2e_p95_ms"),
    ("roofline-decode", "closed", faster_than_the_weights, "tpot_mean_ms"),
    ("roofline-prefill", "closed", faster_than_the_prompt, "ttft_mean_ms"),
    ("roofline-prefill", "closed", faster_than_a_burst, "ttft_p95_ms"),
    ("roofline-throughput", "closed", more_than_the_gpu, "output_tok_s"),
    ("kv-capacity", "closed", more_streams_than_fit, "ttft_p50_ms"),
]


@pytest.mark.parametrize(("rule", "kind", "corrupt", "column"), CORRUPTIONS)
def test_each_rule_finds_its_corruption(
    tmp_path: Path, folder: Path, rule: str, kind: str, corrupt: Callable[[list[Row]], None], column: str
) -> None:
    rows = [dict(row) for row in true_rows(kind, folder)]
    path = tmp_path / "corrupt.csv"
    context = context_of("l4-qwen2.5-0.5b", FIXED)
    write(path, rows)
    assert check(from_table(path, context)).findings == ()
    corrupt(rows)
    write(path, rows)
    found = [f for f in check(from_table(path, context)).findings if f.rule == rule]
    assert column in {name for finding in found for name in finding.columns}


def test_a_slow_first_request_is_a_warm_up(tmp_path: Path) -> None:
    path = tmp_path / "warm.csv"
    reported(path, "l4-qwen2.5-0.5b", CLOSED_LEVELS, FIXED, warm_up_s=1.5)
    checked = check(from_table(path, context_of("l4-qwen2.5-0.5b", FIXED)))
    assert {f.rule for f in checked.findings} == {"warm-up"}
    (finding,) = checked.findings
    assert finding.level.label == "concurrency=1"
    assert {"ttft_p95_ms", "ttft_p99_ms", "e2e_p95_ms", "req_s", "output_tok_s"} <= set(finding.columns)
    assert finding.numbers["outlier_s"] == pytest.approx(1.5, rel=0.05)


def test_a_level_of_two_waves(tmp_path: Path) -> None:
    levels = [{"concurrency": 1, "num_requests": 20}, {"concurrency": 8, "num_requests": 12}]
    path = tmp_path / "waves.csv"
    reported(path, "a6000-qwen2.5-7b", levels, FIXED)
    checked = check(from_table(path, context_of("a6000-qwen2.5-7b", FIXED)))
    assert cells(checked) == of("few-waves", "concurrency=8", "req_s", "output_tok_s")


def test_percentiles_past_the_maximum_by_the_exclusive_law(tmp_path: Path, folder: Path) -> None:
    rows = [dict(row) for row in true_rows("closed", folder)]
    write(tmp_path / "t.csv", rows)
    context = dataclasses.replace(context_of("l4-qwen2.5-0.5b", FIXED), law="exclusive")
    found = check(from_table(tmp_path / "t.csv", context)).findings
    assert {(f.rule, f.level.label) for f in found} == {
        ("percentile-past-maximum", f"concurrency={c}") for c in (1, 2, 4)
    }


@pytest.mark.parametrize("stated", [True, False], ids=["requests stated", "requests not stated"])
def test_a_capped_open_loop_is_a_closed_one(tmp_path: Path, stated: bool) -> None:
    levels = open_levels(1, 60, 120, 240)
    arrivals = {"kind": "poisson", "request_rate": 1.0}
    capped = {**FIXED, "max_concurrency": 8}
    path = tmp_path / "capped.csv"
    rows = reported(path, "l4-qwen2.5-0.5b", levels, capped, arrivals=arrivals)
    if not stated:
        for row in rows:
            del row["requests"]
        write(path, rows)
    checked = check(from_table(path, HARDWARE["l4-qwen2.5-0.5b"]))
    assert {(f.rule, f.level.label) for f in checked.findings} == {
        ("open-loop", f"request_rate={rate}") for rate in (60, 120, 240)
    }


def test_prompts_of_a_warm_cache_beat_the_roofline(tmp_path: Path) -> None:
    """The same 4,000 tokens in every request, told as fresh ones."""
    lengths = {"prompt_tokens": 4000, "output_tokens": 64, "content": {"kind": "same", "text": "a"}}
    path = tmp_path / "same.csv"
    levels = [{"concurrency": c, "num_requests": 20 * c} for c in (2, 4)]
    reported(path, "a6000-qwen2.5-7b", levels, lengths)
    context = dataclasses.replace(HARDWARE["a6000-qwen2.5-7b"], prompt_tokens=4000)
    assert ("roofline-prefill", "concurrency=4", "ttft_mean_ms") in cells(check(from_table(path, context)))


def test_repeated_prompts_need_repetition_and_a_cache() -> None:
    for change in ({"workload.content": "unique"}, {"engine.enable_prefix_caching": False}):
        checked = check(from_scenario(load("l4-qwen2.5-0.5b", change)), predict=False)
        assert {f.rule for f in checked.findings} == {"warm-up"}


@pytest.mark.parametrize(
    ("metric", "factor"),
    [("kv_usage", 100.0), ("kv_usage", 10.0), ("kv_usage", 0.1), ("running", 2.0), ("gpu_memory", 0.3)],
)
def test_gauges_that_cannot_be(metric: str, factor: float) -> None:
    report = from_scenario(load("l4-qwen2.5-0.5b"))
    levels = []
    for level in report.levels:
        values = {
            place: dataclasses.replace(value, value=value.value * factor) if place[0] == metric else value
            for place, value in level.values.items()
        }
        levels.append(dataclasses.replace(level, values=values))
    found = check(Report("changed", tuple(levels))).findings
    assert any(f.rule == "kv-arithmetic" for f in found)
    assert not any(f.rule == "kv-arithmetic" for f in check(report, predict=False).findings)


def test_every_rule_has_a_corruption_here() -> None:
    elsewhere = {
        "warm-up", "few-waves", "percentile-past-maximum", "open-loop", "repeated-prompts", "kv-arithmetic",
        "records",
    }  # fmt: skip
    assert {rule for rule, *_ in CORRUPTIONS} | elsewhere == set(RULES)


# -- inputs and the command ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("column", "metric", "statistic", "scale"),
    [
        ("ttft_p95_ms", "ttft", "p95", 1e-3),
        ("P99 ITL (ms)", "itl", "p99", 1e-3),
        ("median TTFT [s]", "ttft", "p50", 1.0),
        ("Latency P50 (s)", "e2el", "p50", 1.0),
        ("Output toks/s", "output_throughput", None, 1.0),
        ("Throughput (tok/s)", "output_throughput", None, 1.0),
        ("Requests/s", "request_throughput", None, 1.0),
        ("kv_pct_max", "kv_usage", "max", 0.01),
        ("goodput%", "goodput", None, 0.01),
    ],
)
def test_column_names(column: str, metric: str, statistic: str | None, scale: float) -> None:
    name = read_name(column)
    assert (name.part, name.name, name.statistic, name.scale) == ("metric", metric, statistic, scale)


def test_a_table_with_a_row_a_number(tmp_path: Path) -> None:
    path = tmp_path / "long.csv"
    path.write_text("model,metric,value\nA,TTFT P50 (ms),20\nA,TTFT P99 (ms),10\nB,TTFT P50 (ms),20\n")
    checked = check(from_table(path, Context()))
    assert cells(checked) == of("percentile-order", "model=A", "TTFT P50 (ms)", "TTFT P99 (ms)")


def vllm_result(folder: Path, **changes: Any) -> Path:
    """A detailed result of vllm bench serve: two requests of three tokens."""
    document = {
        "backend": "vllm", "model_id": "m", "num_prompts": 2, "request_rate": "inf", "max_concurrency": 1,
        "duration": 2.0, "completed": 2, "failed": 0, "total_input_tokens": 20, "total_output_tokens": 6,
        "request_throughput": 1.0, "output_throughput": 3.0,
        "mean_ttft_ms": 500.0, "median_ttft_ms": 500.0, "p99_ttft_ms": 500.0,
        "mean_itl_ms": 250.0, "median_itl_ms": 250.0, "p99_itl_ms": 250.0,
        "mean_e2el_ms": 1000.0, "median_e2el_ms": 1000.0, "p99_e2el_ms": 1000.0,
        "input_lens": [10, 10], "output_lens": [3, 3], "ttfts": [0.5, 0.5], "itls": [[0.25, 0.25]] * 2,
        "start_times": [100.0, 101.0], "errors": ["", ""],
    }  # fmt: skip
    path = folder / "vllm.json"
    path.write_text(json.dumps({**document, **changes}))
    return path


def test_a_result_of_vllm_bench_serve(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(vllm_result(tmp_path))]) == 0
    capsys.readouterr()
    assert main(["check", str(vllm_result(tmp_path, mean_ttft_ms=400.0)), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)["findings"]
    assert {finding["rule"] for finding in found} == {"records", "e2e-sum"}
    assert {cell["column"] for f in found if f["rule"] == "records" for cell in f["cells"]} == {
        "mean_ttft_ms"
    }


SAMPLES = Path(__file__).parent / "samples"


@pytest.mark.parametrize(
    "sample",
    [
        "vllm/vllm-0.23.json",
        "vllm/vllm-0.32.jsonl",
        "guidellm/benchmarks.json",
        "aiperf/profile_export.jsonl",
        "inference_perf/0.7.0/per_request_lifecycle_metrics.json",
        "benchmark_report/servecast.yaml",
    ],
)
def test_results_that_real_tools_wrote_are_clean(sample: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert (main(["check", str(SAMPLES / sample)]), capsys.readouterr().err) == (0, "")


def test_json_and_text_say_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "l4-qwen2.5-0.5b", "--no-predict", "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    for finding in document["findings"]:
        assert set(finding) == {"rule", "cells", "numbers", "confidence", "message"}
        assert finding["confidence"] in ("certain", "likely", "possible")
        assert all(set(cell) == {"table", "row", "column"} for cell in finding["cells"])
    assert main(["check", "l4-qwen2.5-0.5b", "--no-predict"]) == 1
    text = capsys.readouterr().out
    assert all(finding["rule"] in text for finding in document["findings"])
    assert f"{len(document['findings'])} findings" in text


def test_a_report_with_nothing_to_check_is_inconclusive(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "t.csv"
    path.write_text("concurrency,output_tok_s\n1,100\n2,200\n")
    assert main(["check", str(path)]) == 3
    assert "Nothing in it can be checked" in capsys.readouterr().out
    assert main(["check", str(path), "--model-config", "Qwen2.5-7B-Instruct", "--gpu", "h100"]) == 0


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        ("", [], "no rows"),
        ("a,b\n1,2\n", [], "none of its columns is known"),
        ("ttft_p50\n1\n", [], "has no unit"),
        ("ttft_p50_ms\nfast\n", [], "not a number"),
        ("ttft_p50_ms\n1\n", ["--gpu", "h100"], "--model-config is missing"),
        (
            "ttft_p50_ms\n1\n",
            ["--gpu", "none", "--model-config", "Qwen2.5-7B-Instruct"],
            "not in the catalogue",
        ),
    ],
)
def test_bad_input(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, arguments: list[str], message: str
) -> None:
    path = tmp_path / "t.csv"
    path.write_text(text)
    assert main(["check", str(path), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_scenario_takes_no_context(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "l4-qwen2.5-0.5b", "--gpu", "h100"]) == 2
    assert "--gpu" in capsys.readouterr().err
    assert main(["check", "what-if-llama-3.1-70b"]) == 2
    assert "nothing was reported" in capsys.readouterr().err
    assert main(["check", "no-such-scenario"]) == 2
