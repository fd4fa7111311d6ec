"""Predictions against measurements: rows, intervals, verdicts, knees, and where an error comes from."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from servecast.sim.confidence import Interval
from servecast.sim.errors import InputError
from servecast.sim.metrics import latencies, summary
from servecast.sim.records import Run
from servecast.sim.scenario import load
from servecast.sim.simulate import simulate
from servecast.sim.slo import SLO
from servecast.validate.attribution import attribute, parts_of_recording, parts_of_run
from servecast.validate.compare_report import write_comparison_report
from servecast.validate.compare_runs import LoadComparison, Row, compare_runs
from servecast.validate.compare_sweep import bracket_row, compare_loads
from servecast.validate.compare_text import print_comparison
from servecast.validate.readers import Context, Reading
from servecast.validate.series import EngineSeries
from servecast.validate.verdict import Tolerances, judge_row, verdict_of

SHIPPED = Tolerances.load()
LOOSE = SHIPPED.model_copy(
    update={"rows": {key: t.model_copy(update={"relative": 0.2}) for key, t in SHIPPED.rows.items()}}
)
EMPTY = {"sweep": None, "workload.num_requests": 400, "workload.content": "unique", "engine.max_num_seqs": 48}


@cache
def run(rate: float, seed: int = 0, **changes: Any) -> Run:
    """The L4 scenario in an open loop at a rate."""
    fields = {name.replace("__", "."): value for name, value in changes.items()}
    arrivals = {"kind": "poisson", "request_rate": rate}
    scenario = load("l4-qwen2.5-0.5b", {**EMPTY, "workload.arrivals": arrivals, **fields})
    return simulate(scenario, seed=seed)


def reading(measured: Run, **context: Any) -> Reading:
    """A simulated run as if a client had seen it."""
    known = Context("test", **context)
    return Reading("test.json", known.load, known, measured, {})


def compared(
    measured: Run, *, rate: float = 20, tolerances: Tolerances = LOOSE, **options: Any
) -> LoadComparison:
    predicted = [run(rate, seed) for seed in (1, 2, 3)]
    return compare_runs(predicted, reading(measured, request_rate=rate), tolerances=tolerances, **options)


def row(comparison: LoadComparison, metric: str) -> Row:
    return next(each for each in comparison.rows if each.metric == metric)


# rows


def test_rows_are_the_figures_of_both_sides() -> None:
    found = compared(run(20, 9))
    predicted = [summary(run(20, seed), ranks=(50, 90, 95, 99)) for seed in (1, 2, 3)]
    measured = summary(run(20, 9), ranks=(50, 90, 95, 99))
    for key in ("mean_ttft_ms", "p95_tpot_ms", "p99_e2el_ms", "median_itl_ms", "request_throughput"):
        each = row(found, key)
        assert each.predicted.estimate == pytest.approx(np.mean([of[key] for of in predicted]))
        assert each.measured.estimate == pytest.approx(measured[key])
        assert each.error == pytest.approx(each.predicted.estimate / each.measured.estimate - 1)
        assert each.difference.low <= each.difference.estimate <= each.difference.high
    latency = [each.metric for each in found.rows if each.metric.endswith("_ms")]
    assert len(latency) == 4 * 5
    assert found.verdict.state == "pass"
    assert found.verdict.exit_code == 0


def test_intervals_of_a_measurement_hold_its_truth() -> None:
    """Medians of independent runs lie in the first one's bootstrap interval about as often as they should."""
    inside = []
    for seed in range(20, 32):
        each = row(compared(run(20, seed)), "median_tpot_ms").measured
        truth = np.mean([summary(run(20, other))["median_tpot_ms"] for other in range(20, 32)])
        inside.append(each.low <= truth <= each.high)
    assert sum(inside) >= 8


def test_a_figure_without_requests_has_no_interval_of_its_own() -> None:
    figures = {
        k: v for k, v in summary(run(20, 9), ranks=(50, 90, 95, 99)).items() if isinstance(v, float | int)
    }
    nothing = replace(run(20, 9), requests=run(20, 9).requests.iloc[:0])
    totals = Reading("t.json", "20", Context("test", request_rate=20.0), nothing, figures)
    found = compare_runs([run(20, 1), run(20, 2)], totals, tolerances=LOOSE)
    assert found.verdict.state == "pass"
    assert math.isnan(row(found, "median_ttft_ms").measured.low)
    assert not math.isnan(row(found, "median_ttft_ms").difference.low)
    assert found.distances == ()


def test_distances_are_zero_against_itself_and_grow() -> None:
    alone = compare_runs([run(20, 1)], reading(run(20, 1)), tolerances=LOOSE)
    assert all(each.kolmogorov_smirnov < 0.01 and each.wasserstein_ms < 0.1 for each in alone.distances)
    slow = compare_runs([run(20, 1)], reading(slower(run(20, 1), 0.1)), tolerances=LOOSE)
    e2el = next(each for each in slow.distances if each.metric == "e2el")
    assert e2el.wasserstein_ms == pytest.approx(100, rel=0.01)


def slower(of: Run, seconds: float) -> Run:
    """The run with first tokens, and what follows, later."""
    late = of.requests.assign(
        first_token=of.requests["first_token"] + seconds, finish=of.requests["finish"] + seconds
    )
    return replace(of, requests=late)


# verdicts


@pytest.mark.parametrize(
    ("difference", "low", "high", "state"),
    [
        (0.5, -2, 3, "pass"),
        (-1.0, -3, 1, "pass"),
        (2.0, 1.5, 2.5, "fail"),
        (-2.0, -2.5, -1.5, "fail"),
        (2.0, 0.5, 3.5, "inconclusive"),
        (-2.0, -3.5, -0.5, "inconclusive"),
        (2.0, math.nan, math.nan, "fail"),
    ],
)
def test_a_row_passes_fails_or_may_be_chance(difference: float, low: float, high: float, state: str) -> None:
    assert judge_row(difference, low, high, allowed=1.0) == state


def test_the_worst_state_is_the_verdict_and_problems_come_first() -> None:
    assert verdict_of([("pass", "a"), ("inconclusive", "b"), ("fail", "c")], []).reasons == ("c",)
    assert verdict_of([("pass", "a"), ("inconclusive", "b")], []).state == "inconclusive"
    assert verdict_of([("pass", "a")], []).exit_code == 0
    assert verdict_of([("fail", "a")], []).exit_code == 1
    assert verdict_of([("fail", "a")], ["late"]).exit_code == 3
    assert verdict_of([], []).reasons == ("nothing that has a tolerance was measured",)


def test_a_slower_server_fails_and_the_reason_has_the_numbers() -> None:
    found = compared(slower(run(20, 9), 0.05))
    assert found.verdict.state == "fail"
    assert row(found, "median_ttft_ms").state == "fail"
    assert row(found, "median_tpot_ms").state == "pass"
    reason = next(each for each in found.verdict.reasons if each.startswith("median_ttft_ms"))
    assert "predicted 4" in reason
    assert "measured 9" in reason


def lagging(of: Run) -> dict[str, Any]:
    planned = of.requests["arrival"].to_numpy().copy()
    planned[200:] -= 0.2
    return {"planned_s": planned}


def fewer(of: Run) -> Run:
    return replace(of, requests=of.requests.iloc[:15])


def broken(of: Run) -> Run:
    status = np.where(np.arange(len(of.requests)) >= 350, "failed", "finished")
    return replace(of, requests=of.requests.assign(status=status))


@pytest.mark.parametrize(
    ("measured", "options", "reason"),
    [
        (lambda: run(20, 9), lambda: lagging(run(20, 9)), "the client was late: p95 of 200.0 ms"),
        (lambda: fewer(run(20, 9)), dict, "15 requests finished, at least 20 are needed"),
        (lambda: broken(run(20, 9)), dict, "50 of 400 requests failed"),
        (lambda: run(20, 9, workload__output_tokens=64), dict, "another traffic: outputs of 128.0 tokens"),
    ],
)
def test_a_run_that_says_nothing_is_inconclusive(
    measured: Callable[[], Run], options: Callable[[], dict[str, Any]], reason: str
) -> None:
    found = compared(measured(), **options())
    assert found.verdict.state == "inconclusive"
    assert found.verdict.exit_code == 3
    assert any(each.startswith(reason) for each in found.verdict.reasons)


def test_lag_is_what_distorts_the_traffic_not_a_common_offset() -> None:
    measured = run(20, 9)
    planned = measured.requests["arrival"].to_numpy() - 5.0
    found = compared(measured, planned_s=planned)
    assert found.lag is not None
    assert found.lag.max_ms == pytest.approx(0, abs=0.01)
    assert compared(measured).lag is None


# series


def telemetry(of: Run, offset: float = 0.0, step: float = 0.25) -> pd.DataFrame:
    times = np.arange(-1.0, float(of.requests["finish"].max()) + 1, step)
    seen = EngineSeries.of_run(of, times)
    prompt = of.requests.sort_values("finish")
    done = np.searchsorted(prompt["finish"].to_numpy(), times)
    queries = np.concatenate([[0], prompt["prompt_tokens"].cumsum()])[done]
    return pd.DataFrame(
        {
            "time_s": times + offset,
            "running": seen.running,
            "waiting": seen.waiting,
            "kv_usage": seen.kv_usage,
            "preemptions": 7 + seen.preemptions_total,
            "prefix_queries": 1000 + queries,
            "prefix_hits": 500 + queries // 4,
        }
    )


def test_what_the_engine_showed_is_compared_at_the_same_times() -> None:
    measured = run(20, 9)
    measured.meta["clock_start_s"] = 100.0
    found = compared(measured, telemetry=telemetry(measured, offset=100.0))
    assert found.series is not None
    ours, truth = found.series
    assert (ours.time_s == truth.time_s).all()
    assert (
        row(found, "max_num_running").measured.estimate
        == EngineSeries.of_run(measured, truth.time_s).running.max()
    )
    assert row(found, "prefix_cache_hit_rate").measured.estimate == pytest.approx(0.25, rel=1e-3)
    assert row(found, "num_preemptions").measured.estimate == 0
    own = compare_runs(
        [measured], reading(measured), tolerances=LOOSE, telemetry=telemetry(measured, offset=100.0)
    )
    assert row(own, "kv_cache_usage_peak").difference.estimate == pytest.approx(0)
    assert row(own, "max_num_running").difference.estimate == 0


def test_what_was_not_scraped_has_no_row() -> None:
    measured = run(20, 9)
    frame = telemetry(measured).drop(columns=["prefix_hits", "preemptions"])
    frame["kv_usage"] = math.nan
    figures = EngineSeries.of_telemetry(frame).figures()
    assert figures.keys() == {"max_num_running", "max_num_waiting"}


# where an error comes from


def test_parts_add_up_to_the_error_of_the_mean() -> None:
    predicted, measured = run(40, 1), run(40, 9, engine__max_num_seqs=24)
    parts = {part.name: part for part in attribute(parts_of_run(predicted), parts_of_run(measured))}
    means = [1000 * float(latencies(of.requests)["e2el"].mean()) for of in (predicted, measured)]
    assert sum(part.error_ms for part in parts.values()) == pytest.approx(means[0] - means[1])
    assert parts["server queue"].error_ms < -100 < abs(parts["client and API server"].error_ms) + 1
    assert parts["step time"].error_ms > 0  # fewer sequences wait longer and step faster
    assert max(parts.values(), key=lambda part: abs(part.error_ms)).name == "server queue"


def recorded(of: Run, file: Path) -> None:
    """What the recorder would have written of a simulated run, with one earlier request."""
    lines: list[Any] = [["engine", {}], ["add", 0, 0, 8, 1, 0, []]]
    steps = of.steps
    starts = (steps["start"].to_numpy() * 1e9).astype(int) + 10**9
    ends = starts + (steps["duration"].to_numpy() * 1e9).astype(int)
    lines += [["schedule", 10, 20, [[0, 8, 0]], [], 9], ["update", 30, 40, [[0, 1]], 1]]
    done = of.requests.sort_values("queued", kind="stable")
    first = np.searchsorted(steps["start"].to_numpy(), done["scheduled"].to_numpy() - 1e-9)
    last = (
        np.searchsorted((steps["start"] + steps["duration"]).to_numpy(), done["finish"].to_numpy(), "right")
        - 1
    )
    for n, queued in enumerate(done["queued"], start=1):
        lines.append(["add", int(queued * 1e9) + 10**9, n, 256, 128, 0, []])
    for index in range(len(steps)):
        began = [[int(n) + 1, 1, 0] for n in np.flatnonzero(first == index)]
        over = [[int(n) + 1, 128] for n in np.flatnonzero(last == index)]
        lines.append(["schedule", int(starts[index]) - 5, int(starts[index]), began, [], 9])
        lines.append(["update", int(ends[index]) - 5, int(ends[index]), over, 1])
    file.write_text("\n".join(json.dumps(line) for line in lines))


def test_a_recording_gives_the_parts_that_the_run_had(tmp_path: Path) -> None:
    file = tmp_path / "recording.jsonl"
    measured = run(20, 9)
    recorded(measured, file)
    ours, theirs = parts_of_run(measured), parts_of_recording(file, measured)
    assert theirs.queue_s == pytest.approx(ours.queue_s, abs=1e-6)
    assert theirs.steps == pytest.approx(ours.steps)
    assert theirs.step_s == pytest.approx(ours.step_s, rel=1e-6)
    assert theirs.outside_s == pytest.approx(ours.outside_s, abs=1e-6)
    found = compared(measured, recording=file)
    assert [part.name for part in found.attribution][1] == "server queue"
    file.write_text(file.read_text()[:2000])
    with pytest.raises(InputError, match=r"not a recording|requests to their end"):
        parts_of_recording(file, measured)


# several loads


def sweep(measured: Callable[[float], Run]) -> list[LoadComparison]:
    return [compared(measured(rate), rate=rate) for rate in (5, 10, 20, 40)]


def test_the_knee_and_the_largest_rate_are_compared() -> None:
    loads = sweep(lambda rate: run(rate, 9))
    found = compare_loads(loads, tolerances=SHIPPED, slos=[SLO.parse("ttft:p95:200")])
    rows = {each.metric: each for each in found.sweep}
    assert rows.keys() == {"knee", "max_request_rate"}
    assert rows["knee"].measured.estimate == rows["knee"].predicted.estimate
    assert rows["knee"].state == "pass"
    largest = rows["max_request_rate"].measured
    assert largest.low <= largest.estimate <= largest.high


def test_another_knee_fails_the_whole() -> None:
    loads = sweep(lambda rate: run(rate, 9, engine__max_num_seqs=5))
    found = compare_loads(loads, tolerances=SHIPPED)
    knee = next(each for each in found.sweep if each.metric == "knee")
    assert knee.measured.estimate < knee.predicted.estimate
    assert knee.state == "fail"
    assert found.verdict.state == "fail"
    assert any(reason.startswith("knee") for reason in found.verdict.reasons)


def test_brackets_that_touch_are_inconclusive() -> None:
    predicted, measured = Interval(10, 10, 12, 0.95, 1), Interval(8, 8, 10.5, 0.95, 1)
    assert bracket_row("knee", predicted, measured, SHIPPED).state == "inconclusive"
    assert bracket_row("knee", predicted, Interval(5, 5, 6, 0.95, 1), SHIPPED).state == "fail"
    assert bracket_row("knee", predicted, Interval(10, 10, 11, 0.95, 1), SHIPPED).state == "pass"
    unjudged = SHIPPED.model_copy(update={"rows": {}})
    assert bracket_row("knee", predicted, measured, unjudged).state is None


def test_a_closed_loop_has_a_knee_in_concurrency() -> None:
    loads = []
    for level in (1, 4, 16, 64):
        law = {"kind": "closed_loop", "concurrency": level}
        scenario = load("l4-qwen2.5-0.5b", {**EMPTY, "workload.arrivals": law, "engine.max_num_seqs": 8})
        runs = [simulate(scenario, seed=seed) for seed in (1, 2)]
        load_of = reading(runs[1], request_rate=math.inf, max_concurrency=level)
        loads.append(compare_runs(runs[:1], load_of, tolerances=LOOSE))
    found = compare_loads(loads, tolerances=SHIPPED)
    assert [each.metric for each in found.sweep] == ["knee"]
    assert found.sweep[0].measured.estimate == 16 == found.sweep[0].predicted.estimate


# tolerances and output


def test_tolerances_come_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "t.yaml"
    file.write_text("rows:\n  median_tpot_ms: {relative: 0.5}\nmin_requests: 10\n")
    own = Tolerances.load(file)
    found = compared(slower(run(20, 9), 0.05), tolerances=own)
    assert found.verdict.state == "pass"
    assert [each.metric for each in found.rows if each.state is not None] == ["median_tpot_ms"]
    for text, message in (
        ("rows: {median_tpot_ms: {relative: -1}}", "greater than or equal to 0"),
        ("rows: {median_tpot_ms: {}}", "the tolerance is nothing"),
        ("rows: {}\nmin_request: 1", "unknown field 'min_request'"),
        ("rows: [", "is not YAML"),
    ):
        file.write_text(text)
        with pytest.raises(InputError, match=message):
            Tolerances.load(file)
    with pytest.raises(InputError, match="cannot be read"):
        Tolerances.load(tmp_path / "absent.yaml")


def test_the_report_is_one_file_that_says_the_verdict(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measured = run(20, 9)
    measured.meta["clock_start_s"] = 0.0
    recording = tmp_path / "recording.jsonl"
    recorded(measured, recording)
    loads = [
        compared(measured, telemetry=telemetry(measured), recording=recording),
        compared(slower(run(40, 9), 0.5), rate=40, tolerances=SHIPPED),
    ]
    found = compare_loads(loads, tolerances=SHIPPED, slos=[SLO.parse("ttft:p95:100")])
    file = tmp_path / "report.html"
    write_comparison_report(file, found, title="<A & B>", question="Does it hold?", facts={"seed": 1})
    page = file.read_text()
    assert "&lt;A &amp; B&gt;" in page
    assert '<div class="number fail">fail</div>' in page
    assert page.count("<svg") >= 6
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "src=" not in page
    for name in ("server queue", "Kolmogorov-Smirnov", "TTFT p95, ms", "KV cache, %"):
        assert name in page
    write_comparison_report(
        tmp_path / "again.html", found, title="<A & B>", question="Does it hold?", facts={"seed": 1}
    )
    assert (tmp_path / "again.html").read_text() == page
    print_comparison(found)
    text = capsys.readouterr().out
    assert "verdict: fail" in text
    assert "20 requests/s: prefix_cache_hit_rate: predicted 0.056, measured 0.25" in text
    assert json.loads(json.dumps(found.to_json()))["loads"][1]["verdict"] == "fail"
