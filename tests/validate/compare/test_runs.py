"""Predictions against measurements: rows, intervals, verdicts, knees, and where an error comes from."""

from __future__ import annotations

import functools
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

from servecast.sim.inputs.errors import InputError
from servecast.sim.metrics.confidence import Interval
from servecast.sim.metrics.metrics import latencies, summary
from servecast.sim.metrics.records import Run
from servecast.sim.metrics.slo import SLO, Goodput
from servecast.sim.plan.judge import Objectives
from servecast.sim.run.simulate import simulate
from servecast.sim.scenario.scenario import load
from servecast.validate.compare.attribution import attribute, parts_of_recording, parts_of_run
from servecast.validate.compare.load import LoadComparison, Row, compare_runs
from servecast.validate.compare.page import write_comparison_page
from servecast.validate.compare.series import figures_of, scraped, simulated
from servecast.validate.compare.sweep import bracket_row, compare_loads, judged
from servecast.validate.compare.text import comparison_text
from servecast.validate.compare.tolerances import Tolerances
from servecast.validate.compare.verdict import judge_row, verdict_of
from servecast.validate.readers import Context, Reading

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
    return Reading("test.json", known, measured, {})


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


@pytest.mark.slow
def test_intervals_of_a_measurement_hold_its_truth() -> None:
    """Figures of independent runs lie in the first one's bootstrap interval about as often as they should."""
    seeds = range(20, 40)
    runs = [run(20, seed) for seed in seeds]
    found = [compared(each) for each in runs]
    for metric in ("median_tpot_ms", "mean_ttft_ms"):
        truth = np.mean([summary(each)[metric] for each in runs])
        intervals = [row(each, metric).measured for each in found]
        assert sum(each.low <= truth <= each.high for each in intervals) >= 0.85 * len(seeds), metric


def test_what_both_say_of_the_same_requests_is_no_chance() -> None:
    """Near saturation latencies of requests differ a lot, and those of one request on both sides do not."""
    predicted, measured = run(45, 1), slower(run(45, 1), 0.2)
    found = compare_runs([predicted], reading(measured, request_rate=45), tolerances=SHIPPED)
    each = row(found, "mean_ttft_ms")
    assert each.difference.low == pytest.approx(-200, abs=0.1)
    assert each.difference.high == pytest.approx(-200, abs=0.1)
    assert each.measured.high - each.measured.low > 200
    assert row(found, "median_ttft_ms").state == "fail"
    fewer = replace(measured, requests=measured.requests.iloc[:-1])
    unpaired = compare_runs([predicted], reading(fewer, request_rate=45), tolerances=SHIPPED)
    wide = row(unpaired, "mean_ttft_ms").difference
    assert wide.high - wide.low > 200


def test_few_seeds_leave_a_wide_interval() -> None:
    """Student's t over the seeds; where only figures are known, the measured one is one run more."""
    two, five = ([run(20, seed) for seed in range(count)] for count in (2, 5))
    figures = {k: v for k, v in summary(run(20, 9)).items() if isinstance(v, float | int)}
    nothing = replace(run(20, 9), requests=run(20, 9).requests.iloc[:0])
    totals = Reading("t.json", Context("test", request_rate=20.0), nothing, figures)
    widths = []
    for runs in (two, five):
        each = row(compare_runs(runs, totals, tolerances=LOOSE), "mean_e2el_ms")
        widths.append(each.difference.high - each.difference.low)
        predicted = each.predicted.high - each.predicted.low
        assert widths[-1] == pytest.approx(predicted * math.sqrt(len(runs) + 1), rel=0.25)
    assert widths[0] > widths[1]


def test_a_figure_without_requests_has_no_interval_of_its_own() -> None:
    figures = {
        k: v for k, v in summary(run(20, 9), ranks=(50, 90, 95, 99)).items() if isinstance(v, float | int)
    }
    nothing = replace(run(20, 9), requests=run(20, 9).requests.iloc[:0])
    totals = Reading("t.json", Context("test", request_rate=20.0), nothing, figures)
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


def test_a_closed_loop_that_leaves_its_slots_empty_says_nothing() -> None:
    law = {"kind": "closed_loop", "concurrency": 8}
    scenario = load("l4-qwen2.5-0.5b", {**EMPTY, "workload.arrivals": law, "workload.num_requests": 100})
    prompt = simulate(scenario, seed=1)
    loop = {"request_rate": math.inf, "max_concurrency": 8}
    found = compare_runs([prompt], reading(prompt, **loop), tolerances=LOOSE)
    assert found.lag is not None
    assert found.lag.p95_ms < 5
    sent = prompt.requests["sent"].to_numpy()
    late = replace(prompt, requests=prompt.requests.assign(sent=sent + np.where(np.arange(100) < 8, 0, 0.1)))
    starved = compare_runs([prompt], reading(late, **loop), tolerances=LOOSE)
    assert starved.verdict.state == "inconclusive"
    assert any("the client was late" in reason for reason in starved.verdict.reasons)


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
    seen = simulated(of, times)
    prompt = of.requests.sort_values("finish")
    done = np.searchsorted(prompt["finish"].to_numpy(), times)
    queries = np.concatenate([[0], prompt["prompt_tokens"].cumsum()])[done]
    counters = {"preemptions": 7, "prefix_queries": 1000 + queries, "prefix_hits": 500 + queries // 4}
    return seen.assign(time_s=times + offset, **counters)


def test_what_the_engine_showed_is_compared_at_the_same_times() -> None:
    measured = run(20, 9)
    measured.meta["clock_start_s"] = 100.0
    found = compared(measured, telemetry=telemetry(measured, offset=100.0))
    assert found.series is not None
    ours, truth = found.series
    assert ours["time_s"].tolist() == truth["time_s"].tolist()
    seen = simulated(measured, truth["time_s"].to_numpy())
    assert row(found, "max_num_running").measured.estimate == seen["running"].max()
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
    figures = figures_of(scraped(frame))
    assert figures.keys() == {"max_num_running", "max_num_waiting"}
    of_client = replace(measured, steps=measured.steps.iloc[:0])
    found = compared(of_client, telemetry=frame)
    assert found.notes[-1] == ("not known of both, so not judged: kv_cache_usage_peak")


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


def ttft_within(limit_ms: float) -> Objectives:
    return Objectives((SLO.parse(f"ttft:p95:{limit_ms:g}"),))


def sweep(measured: Callable[[float], Run]) -> list[LoadComparison]:
    return [compared(measured(rate), rate=rate) for rate in (5, 10, 20, 40)]


def test_the_knee_and_the_largest_rate_are_compared() -> None:
    loads = [compared(run(rate, 9), rate=rate) for rate in (20, 33, 34, 35, 36, 37, 38, 45)]
    found = compare_loads(loads, tolerances=SHIPPED, objectives=ttft_within(200))
    rows = {each.metric: each for each in found.sweep}
    assert rows.keys() == {"knee", "max_request_rate"}
    largest = rows["max_request_rate"]
    assert largest.state in ("pass", "inconclusive")
    assert 33 <= largest.measured.low < largest.measured.estimate < largest.measured.high <= 38
    assert largest.error == pytest.approx(0, abs=0.06)


def test_levels_too_far_apart_leave_the_knee_unjudged() -> None:
    found = compare_loads(sweep(lambda rate: run(rate, 9)), tolerances=SHIPPED, objectives=ttft_within(200))
    rows = {each.metric: each for each in found.sweep}
    assert rows["knee"].measured.estimate == rows["knee"].predicted.estimate == 20
    assert rows["knee"].state is None
    assert rows["max_request_rate"].state is None
    assert (
        "the knee lies between 20 and 40 requests/s, too far apart to judge it to 1 requests/s" in found.notes
    )


def test_a_prediction_that_holds_wherever_the_server_does_not_fails() -> None:
    """And the other way round: neither has a bracket of its own, and both are certain."""
    slow = functools.partial(run, seed=9, engine__max_num_seqs=4)
    for rates in ((20, 30), (2, 3)):
        loads = [compared(slow(rate) if rate > 10 else run(rate, 9), rate=rate) for rate in rates]
        found = compare_loads(loads, tolerances=SHIPPED, objectives=ttft_within(150))
        states = {each.metric: each.state for each in found.sweep}
        assert states == ({"knee": "fail", "max_request_rate": "fail"} if rates[0] > 10 else {})
        assert found.verdict.state == ("fail" if rates[0] > 10 else "pass")
    assert "the knee lies beyond 3 requests/s, predicted and measured" in found.notes


def test_failed_requests_and_missing_latencies_do_not_meet_an_objective() -> None:
    slo, goodput = ttft_within(1000), Objectives((), Goodput.parse("ttft:1000"))

    def strain(of: Run, objectives: Objectives) -> float:
        return judged([of], objectives).strain

    good = run(20, 9)
    assert strain(good, slo) < 1
    assert strain(good, goodput) == 0
    part = replace(good, requests=good.requests.assign(status=["failed", *["finished"] * 9] * 40))
    assert strain(part, slo) == math.inf
    assert strain(part, goodput) == pytest.approx(2)
    few = replace(good, requests=good.requests.assign(status=["failed", *["finished"] * 49] * 8))
    by_ttft = good.requests.assign(first_token=good.requests["sent"] + np.arange(400) / 400)
    assert strain(replace(few, requests=by_ttft), slo) == pytest.approx(0.95, abs=0.01)
    by_ttft = by_ttft.assign(status=few.requests["status"])
    assert strain(replace(few, requests=by_ttft), slo) == pytest.approx(0.97, abs=0.01)
    nothing = replace(good, requests=good.requests.assign(output_tokens=1))
    assert strain(nothing, Objectives((SLO.parse("tpot:p95:1000"),))) == math.inf


def test_another_knee_fails_the_whole() -> None:
    loads = sweep(lambda rate: run(rate, 9, engine__max_num_seqs=5))
    found = compare_loads(loads, tolerances=SHIPPED)
    knee = next(each for each in found.sweep if each.metric == "knee")
    assert knee.measured.estimate < knee.predicted.estimate
    assert knee.state == "fail"
    assert found.verdict.state == "fail"
    assert any(reason.startswith("knee") for reason in found.verdict.reasons)


@pytest.mark.parametrize(
    ("predicted", "measured", "state"),
    [
        ((10, 10.3), (10.1, 10.4), "pass"),
        ((10, 10.3), (10.3, 10.7), "inconclusive"),
        ((10, 10.3), (11, 11.4), "fail"),
        ((10, 12), (10, 12), None),
        ((10, 12), (8, 10.5), None),
        ((10, 12), (5, 6), "fail"),
        ((10, math.inf), (8, 8.3), "fail"),
        ((10, 10.3), (0, 8), "fail"),
        ((10, math.inf), (10, 10.3), None),
    ],
)
def test_a_bracket_passes_only_if_it_is_narrow(
    predicted: tuple[float, float], measured: tuple[float, float], state: str | None
) -> None:
    ours, truth = (Interval(low or high, low, high, 0.95, 1) for low, high in (predicted, measured))
    assert bracket_row("knee", ours, truth, SHIPPED).state == state
    assert bracket_row("knee", ours, truth, SHIPPED.model_copy(update={"rows": {}})).state is None


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
    assert found.sweep[0].state == "pass"
    assert compare_loads(loads[:3], tolerances=SHIPPED).notes[-1] == "no knee in concurrency"


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
        ("rows: {p95_tfft_ms: {relative: 0.1}}", "there is no figure 'p95_tfft_ms'"),
        ("rows: [", "not valid YAML"),
    ):
        file.write_text(text)
        with pytest.raises(InputError, match=message):
            Tolerances.load(file)
    with pytest.raises(InputError, match="cannot be read"):
        Tolerances.load(tmp_path / "absent.yaml")


def test_the_report_is_one_file_that_says_the_verdict(
    tmp_path: Path,
) -> None:
    measured = run(20, 9)
    measured.meta["clock_start_s"] = 0.0
    recording = tmp_path / "recording.jsonl"
    recorded(measured, recording)
    loads = [
        compared(measured, telemetry=telemetry(measured), recording=recording),
        compared(slower(run(10, 9), 0.5), rate=10, tolerances=SHIPPED),
    ]
    found = compare_loads(loads, tolerances=SHIPPED, objectives=ttft_within(100))
    file = tmp_path / "report.html"
    write_comparison_page(file, found, title="<A & B>", question="Does it hold?", facts={"seed": 1})
    page = file.read_text()
    assert "&lt;A &amp; B&gt;" in page
    assert '<div class="number fail">fail</div>' in page
    assert page.count("<svg") >= 6
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "src=" not in page
    for name in ("server queue", "Kolmogorov-Smirnov", "TTFT p95, ms", "KV cache, %"):
        assert name in page
    write_comparison_page(
        tmp_path / "again.html", found, title="<A & B>", question="Does it hold?", facts={"seed": 1}
    )
    assert (tmp_path / "again.html").read_text() == page
    text = comparison_text(found)
    assert "verdict: fail" in text
    assert "20 requests/s: prefix_cache_hit_rate: predicted 0.056, measured 0.25" in text
    assert json.loads(json.dumps(found.to_json()))["loads"][1]["verdict"] == "fail"
