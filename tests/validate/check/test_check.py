"""``servecast check``: what is found in the reference tables, nothing in true ones, and each corruption."""

from __future__ import annotations

import csv
import dataclasses
import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from places import SAMPLES

from servecast.__main__ import main
from servecast.sim.metrics.metrics import statistic, summary
from servecast.sim.metrics.warmup import select
from servecast.sim.run.results import result, write_result
from servecast.sim.run.simulate import simulate
from servecast.sim.scenario.deployment import Deployment
from servecast.sim.scenario.scenario import load, shipped_folder
from servecast.validate.check.check import RULES, Checked, check
from servecast.validate.check.finding import Finding
from servecast.validate.check.from_results import from_results
from servecast.validate.check.from_scenario import from_scenario
from servecast.validate.check.from_table import Context, from_table
from servecast.validate.check.table import Report

TABLES = shipped_folder() / "tables"
Cell = tuple[str, str, str]  # rule, row, column
Row = dict[str, str]


def row_of(finding: Finding) -> str:
    """The finding's row, by what is not counted in it."""
    counted = ("requests", "output_tokens_mean", "input_tokens")
    keys = finding.level.keys
    return " ".join(f"{k}={v}" for k, v in keys.items() if k not in counted or keys.keys() <= set(counted))


def cells(checked: Checked) -> set[Cell]:
    return {(f.rule, row_of(f), column) for f in checked.findings for column in f.columns}


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
        part = select(run, stage=index)
        figures = summary(part, ranks=(95, 99))
        done = figures["completed"]
        row = {key: str(level[key]), "requests": str(done), "errors": "0"}
        if lengths is not FIXED:
            row["output_tokens_mean"] = f"{figures['total_output_tokens'] / done:.1f}"
            row["input_tokens"] = f"{figures['total_input_tokens'] / done:.1f}"
        row |= {column: f"{figures[of_vllm] or 0:.2f}" for column, of_vllm in COLUMNS.items()}
        row["e2e_max_ms"] = f"{1000 * statistic(part, 'e2el', 'max'):.2f}"
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


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2, 3))])
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


HEAVY = {  # 64 slots idle for long while the longest output of 640 ends
    "prompt_tokens": 256,
    "output_tokens": {"kind": "lognormal", "mean": 150, "std": 150, "min_tokens": 1, "max_tokens": 4000},
}
ONE = {"prompt_tokens": 512, "output_tokens": 1}


@pytest.mark.parametrize("counts", [True, False], ids=["counts", "no counts"])
@pytest.mark.parametrize("stated", [True, False], ids=["lengths", "no lengths"])
@pytest.mark.parametrize("lengths", [HEAVY, ONE], ids=["heavy tail", "one token"])
def test_nothing_is_found_in_ten_waves_at_loads_far_apart(
    tmp_path: Path, lengths: Mapping[str, Any], stated: bool, counts: bool
) -> None:
    """Of outputs of one token vLLM reports an ITL and a TPOT of 0."""
    levels = [{"concurrency": c, "num_requests": 10 * c} for c in (1, 64, 256)]
    path = tmp_path / "true.csv"
    rows = reported(path, "l4-qwen2.5-0.5b", levels, lengths, seed=2)
    left_out = [] if counts else ["requests", "errors"]
    left_out += [] if stated else ["output_tokens_mean", "input_tokens", "e2e_max_ms"]
    left_out += [] if stated or lengths is HEAVY else all_of(rows[0], "tpot", "itl")
    write(path, [{name: cell for name, cell in row.items() if name not in left_out} for row in rows])
    checked = check(from_table(path, HARDWARE["l4-qwen2.5-0.5b"]))
    assert [(f.rule, f.level.label, f.message) for f in checked.findings] == []


def test_nothing_is_found_in_our_own_sweep_of_long_prompts(tmp_path: Path) -> None:
    """A stage's first step begins when the last request of the stage before it ends, and is not of that."""
    prompts = {"kind": "lognormal", "mean": 2000, "std": 3000, "min_tokens": 8, "max_tokens": 7000}
    levels = [{"concurrency": 1, "num_requests": 60}, {"concurrency": 64, "num_requests": 640}]
    changes = {
        "workload": {"prompt_tokens": prompts, "output_tokens": 20},
        "sweep": {"levels": levels},
        "reported": [],
    }
    scenario = load("l4-qwen2.5-0.5b", changes)
    document = result(Deployment.of(scenario), simulate(scenario))
    write_result(tmp_path / "result.json", document)
    checked = check(from_results([tmp_path / "result.json"], HARDWARE["l4-qwen2.5-0.5b"]))
    assert [(f.rule, f.level.label, f.message) for f in checked.findings] == []


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


Numbers = dict[str, float]
ALL_CLOSED = tuple(f"concurrency={c}" for c in (1, 2, 4, 8, 16, 32))


def near(expected: float, *names: str) -> Callable[[Numbers], bool]:
    """Whether the quotient of two of a finding's numbers (or the one number) is that."""

    def holds(numbers: Numbers) -> bool:
        over = numbers[names[1]] if len(names) > 1 else 1.0
        return numbers[names[0]] / over == pytest.approx(expected, rel=0.1)

    return holds


def under(less: str, more: str) -> Callable[[Numbers], bool]:
    return lambda numbers: numbers[less] < numbers[more]


CORRUPTIONS: list[tuple[str, str, Callable[[list[Row]], None], str, str | tuple[str, ...], str, Any]] = [
    ("percentile-order", "closed", percentile_order, "ttft_p50_ms", "concurrency=4", "certain",
     under("p95", "p50")),
    ("percentile-order", "closed", mean_below_its_tail, "ttft_mean_ms", "concurrency=16", "certain",
     under("mean", "least_mean")),
    ("e2e-sum", "closed", latency_without_ttft, "e2e_mean_ms", "concurrency=32", "certain",
     lambda n: n["e2e_s"] < 0.85 * (n["ttft_s"] + n["tokens_s"])),
    ("e2e-sum", "closed", latency_under_ttft, "e2e_p99_ms", "concurrency=32", "certain",
     near(0.5, "e2e_s", "ttft_s")),
    ("throughput-requests", "closed", tokens_of_the_prompts_too, "output_tok_s", "concurrency=8", "certain",
     near(3, "implied_tokens_a_request", "tokens_a_request")),
    ("wall-time", "closed", slower_than_the_run, "e2e_p99_ms", "concurrency=8", "certain",
     near(3, "latency_s", "run_s")),
    ("littles-law", "closed", more_in_flight_than_slots, "req_s", "concurrency=16", "certain",
     near(1.5, "in_flight", "concurrency")),
    ("littles-law", "closed", fewer_in_flight_than_slots, "req_s", "concurrency=16", "certain",
     near(0.5, "in_flight", "concurrency")),
    ("send-rate", "open", rate_of_sending, "req_s", "request_rate=160", "certain",
     near(1, "requests_s", "offered_rate")),
    ("send-rate", "open", rate_of_sending_alone, "req_s", ("request_rate=80", "request_rate=160"), "likely",
     under("most_completed_s", "requests_s")),
    ("drain", "open", rate_of_sending, "output_tok_s", "request_rate=160", "certain",
     lambda n: n["time_over_sending"] == pytest.approx(n["rate_x_tokens"] / n["output_tok_s"])),
    ("drain", "open", tokens_over_the_drain, "output_tok_s",
     ("request_rate=10", "request_rate=80", "request_rate=160"), "likely",
     lambda n: n["drain_s"] == pytest.approx(n["sending_s"] * (n["time_over_sending"] - 1))),
    ("zero-latency", "closed", no_time_at_all, "itl_p50_ms", "concurrency=4", "certain",
     under("reported_s", "shortest_step_s")),
    ("halved-itl", "closed", two_stamps_a_token, "itl_mean_ms", ALL_CLOSED, "certain", near(2, "ratio")),
    ("halved-itl", "closed", halved_gaps, "tpot_mean_ms", "concurrency=4", "certain", near(2, "ratio")),
    ("clock-grid", "closed", ticks, "ttft_mean_ms", ALL_CLOSED, "likely", near(1 / 64, "tick_s")),
    ("clock-grid", "closed", tens, "e2e_p95_ms", ALL_CLOSED, "likely", near(0.01, "tick_s")),
    ("roofline-decode", "closed", faster_than_the_weights, "tpot_mean_ms", "concurrency=1", "certain",
     under("reported_s", "bound_s")),
    ("roofline-prefill", "closed", faster_than_the_prompt, "ttft_mean_ms", "concurrency=1", "certain",
     under("reported_s", "bound_s")),
    ("roofline-prefill", "closed", faster_than_a_burst, "ttft_p95_ms", "concurrency=32", "likely",
     near(30, "prompts")),
    ("roofline-throughput", "closed", more_than_the_gpu, "output_tok_s", "concurrency=32", "certain",
     lambda n: n["flops"] > n["peak_flops"]),
    ("kv-capacity", "closed", more_streams_than_fit, "ttft_p50_ms", "concurrency=100000", "likely",
     under("pool_tokens", "held_tokens")),
]  # fmt: skip


@pytest.mark.parametrize(
    ("rule", "kind", "corrupt", "column", "rows_found", "confidence", "numbers"), CORRUPTIONS
)
def test_each_rule_finds_its_corruption(
    tmp_path: Path,
    folder: Path,
    rule: str,
    kind: str,
    corrupt: Callable[[list[Row]], None],
    column: str,
    rows_found: str | tuple[str, ...],
    confidence: str,
    numbers: Callable[[Numbers], bool],
) -> None:
    """In the rows that were changed, and in no other."""
    rows = [dict(row) for row in true_rows(kind, folder)]
    corrupt(rows)
    write(tmp_path / "corrupt.csv", rows)
    checked = check(from_table(tmp_path / "corrupt.csv", context_of("l4-qwen2.5-0.5b", FIXED)))
    found = [f for f in checked.findings if f.rule == rule]
    assert {row_of(f) for f in found} == set([rows_found] if isinstance(rows_found, str) else rows_found)
    of_column = [f for f in found if column in f.columns]
    assert confidence in {f.confidence for f in of_column}
    assert all(numbers(f.numbers) for f in of_column if f.confidence == confidence)


def all_tails(rows: list[Row]) -> None:
    for row in rows:
        times(row, 1.03, *(column for column in row if "_p99_" in column or "_max_" in column))


MILD: dict[str, tuple[str, Callable[[list[Row]], None]]] = {
    "latency by 1 %": ("closed", lambda rows: times(rows[5], 0.99, "e2e_mean_ms")),
    "gaps by 1 %": ("closed", lambda rows: times(rows[2], 0.99, *all_of(rows[2], "itl", "tpot"))),
    "tokens by 1 %": ("closed", lambda rows: times(rows[3], 1.01, "output_tok_s")),
    "both rates by 1 %": ("closed", lambda rows: times(rows[4], 1.01, "req_s", "output_tok_s")),
    "some idle slots": ("closed", lambda rows: times(rows[4], 0.85, "req_s", "output_tok_s")),
    "longer tails": ("closed", all_tails),
    "a rate that is met": ("open", lambda rows: rows[0].update(req_s="0.9950", output_tok_s="127.36")),
    "tokens at a rate that is met": ("open", lambda rows: times(rows[1], 0.99, "output_tok_s", "req_s")),
}


@pytest.mark.parametrize("name", MILD)
def test_a_mild_change_could_be_true(tmp_path: Path, folder: Path, name: str) -> None:
    kind, change = MILD[name]
    rows = [dict(row) for row in true_rows(kind, folder)]
    change(rows)
    write(tmp_path / "mild.csv", rows)
    checked = check(from_table(tmp_path / "mild.csv", context_of("l4-qwen2.5-0.5b", FIXED)))
    assert [(f.rule, f.level.label, f.message) for f in checked.findings] == []


def test_a_slow_first_request_is_a_warm_up(tmp_path: Path) -> None:
    path = tmp_path / "warm.csv"
    reported(path, "l4-qwen2.5-0.5b", CLOSED_LEVELS, FIXED, warm_up_s=1.5)
    checked = check(from_table(path, context_of("l4-qwen2.5-0.5b", FIXED)))
    assert {f.rule for f in checked.findings} == {"warm-up"}
    (finding,) = checked.findings
    assert row_of(finding) == "concurrency=1"
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
    context = dataclasses.replace(context_of("l4-qwen2.5-0.5b", FIXED), percentile_law="exclusive")
    found = check(from_table(tmp_path / "t.csv", context)).findings
    assert {(f.rule, row_of(f)) for f in found} == {
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
    assert {(f.rule, row_of(f)) for f in checked.findings} == {
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
        "records", "all-failed", "prefill-difference",
    }  # fmt: skip
    assert {rule for rule, *_ in CORRUPTIONS} | elsewhere == set(RULES)


# -- inputs and the command ------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("changes", "rule", "column"),
    [
        ({"mean_itl_ms": 257.0}, "records", "mean_itl_ms"),
        ({"total_output_tokens": 9}, "records", "total_output_tokens"),
        ({"request_throughput": 2.0}, "wall-time", "request_throughput"),
        ({"duration": 3.0}, "wall-time", "output_throughput"),
        ({"output_throughput": 4.0}, "wall-time", "output_throughput"),
    ],
)
def test_a_result_contradicts_what_it_lists(
    tmp_path: Path, changes: dict[str, float], rule: str, column: str
) -> None:
    found = check(from_results([vllm_result(tmp_path, **changes)], Context())).findings
    assert (rule, column, "certain") in {(f.rule, c, f.confidence) for f in found for c in f.columns}


def test_short_gaps_are_compared_too(tmp_path: Path) -> None:
    """A gap of 5 ms is not 6 ms, however coarse the clock of a TTFT is."""
    gaps = {f"{name}_itl_ms": 5.0 for name in ("mean", "median", "p99")}
    sums = {f"{name}_e2el_ms": 510.0 for name in ("mean", "median", "p99")}
    document = {**gaps, **sums, "itls": [[0.005, 0.005]] * 2, "start_times": [100.0, 100.51]}
    rates = {"duration": 1.02, "request_throughput": 2 / 1.02, "output_throughput": 6 / 1.02}
    path = vllm_result(tmp_path, **document, **rates)
    assert check(from_results([path], Context())).findings == ()
    path = vllm_result(tmp_path, **document | rates | {"median_itl_ms": 6.0})
    assert "records" in {f.rule for f in check(from_results([path], Context())).findings}


def test_totals_contradict_their_duration(tmp_path: Path) -> None:
    details = ("input_lens", "output_lens", "ttfts", "itls", "start_times", "errors")
    document = json.loads(vllm_result(tmp_path, request_throughput=2.0).read_text())
    path = tmp_path / "totals.json"
    path.write_text(json.dumps({name: v for name, v in document.items() if name not in details}))
    found = check(from_results([path], Context())).findings
    assert ("wall-time", "request_throughput") in {(f.rule, c) for f in found for c in f.columns}


def test_a_file_is_no_load_by_its_name(tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    paths = []
    for folder in folders:
        folder.mkdir()
        paths.append(vllm_result(folder).rename(folder / "run concurrency=8 request_rate=x.json"))
    report = from_results(paths, Context())
    assert [level.concurrency for level in report.levels] == [1, 1]
    assert [level.keys["run"] for level in report.levels] == [str(path) for path in paths]


def test_keys_that_only_look_like_a_percentile(tmp_path: Path) -> None:
    path = vllm_result(tmp_path, peak_ttft_ms=500.0, p999_ttft_ms=500.0, max_ttft_ms=500.0)
    (level,) = from_results([path], Context()).levels
    assert {statistic for metric, statistic in level.values if metric == "ttft"} == {
        "mean", "p50", "p99", "max",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ("many", "no list of objects"),
        ([7], "no list of objects"),
        ([{"completed": 1}], "stage"),
        ([{"stage": "a", "completed": "few"}], "completed"),
        ([{"stage": "a", "completed": 1, "request_rate": "fast"}], "request_rate"),
        ([{"stage": "a", "completed": 1, "mean_ttft_ms": -1.0}], "mean_ttft_ms"),
    ],
)
def test_odd_stages_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], stages: Any, message: str
) -> None:
    path = tmp_path / "ours.json"
    path.write_text(
        json.dumps(
            {"schema_version": 1, "servecast_version": "1", "completed": 1, "duration": 1.0,
             "output_throughput": 1.0, "request_throughput": 1.0, "stages": stages}
        )
    )  # fmt: skip
    assert main(["check", str(path)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "sample",
    [
        "vllm/vllm-0.23.json",
        "vllm/vllm-0.32.jsonl",
        "guidellm/benchmarks.json",
        "aiperf/profile_export.jsonl",
        "aiperf/profile_export_aiperf.json",
        "inference_perf/0.7.0/per_request_lifecycle_metrics.json",
        "inference_perf/0.7.0/stage_0_lifecycle_metrics.json",
        "benchmark_report/servecast.yaml",
    ],
)
def test_results_that_real_tools_wrote_are_clean(sample: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert (main(["check", str(SAMPLES / sample)]), capsys.readouterr().err) == (0, "")


@pytest.mark.parametrize("name", ["per_request_lifecycle_metrics.json", "stage_0_lifecycle_metrics.json"])
def test_a_tool_that_halved_its_itl_is_told(name: str) -> None:
    """The reader puts it right; the report is no less wrong."""
    found = check(from_results([SAMPLES / "inference_perf/0.2.0" / name], Context())).findings
    assert {(f.rule, f.confidence) for f in found} == {("halved-itl", "certain")}


@pytest.mark.parametrize(
    ("folder", "listed", "said", "field"),
    [
        ("guidellm", "benchmarks.json", "benchmarks.json",
         "benchmarks.0.metrics.time_to_first_token_ms.successful.mean"),
        ("aiperf", "profile_export.jsonl", "profile_export_aiperf.json", "inter_token_latency.p95"),
        ("inference_perf/0.7.0", "per_request_lifecycle_metrics.json", "stage_0_lifecycle_metrics.json",
         "successes.latency.inter_token_latency.mean"),
    ],
)  # fmt: skip
def test_figures_of_other_tools_are_those_of_their_requests(
    tmp_path: Path, folder: str, listed: str, said: str, field: str
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(SAMPLES / folder, copy)
    document = json.loads((copy / said).read_text())
    part = document
    *path, last = field.split(".")
    for name in path:
        part = part[int(name) if isinstance(part, list) else name]
    part[last] *= 0.8
    (copy / said).write_text(json.dumps(document))
    (finding,) = check(from_results([copy / listed], Context())).findings
    assert (finding.rule, finding.confidence) == ("records", "certain")
    assert finding.numbers["reported"] == pytest.approx(0.8 * finding.numbers["of_records"])


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
    assert f"{len(document['findings'])} findings ({document['rows']} rows" in text


def test_json_and_text_count_the_same_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "t.csv"
    path.write_text("concurrency,ttft_p50_ms\n1,20\n2,\n")
    assert main(["check", str(path)]) == 0
    assert "(1 row," in capsys.readouterr().out
    assert main(["check", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 1


def test_a_report_with_nothing_to_check_is_inconclusive(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "t.csv"
    path.write_text("concurrency,output_tok_s\n1,100\n2,200\n")
    assert main(["check", str(path)]) == 3
    assert "Nothing in it can be checked" in capsys.readouterr().out
    assert main(["check", str(path), "--model-config", "Qwen2.5-7B-Instruct", "--gpu", "h100"]) == 0


def test_a_scenario_takes_no_context(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "l4-qwen2.5-0.5b", "--gpu", "h100"]) == 2
    assert "--gpu" in capsys.readouterr().err
    assert main(["check", "what-if-llama-3.1-70b"]) == 2
    assert "nothing was reported" in capsys.readouterr().err
    assert main(["check", "no-such-scenario"]) == 2
