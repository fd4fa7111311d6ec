"""Metrics of small tables whose numbers can be checked by hand."""

from __future__ import annotations

import json
import math
import statistics as stdlib
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from servecast.sim.inputs.errors import InputError
from servecast.sim.inputs.units import to_ps
from servecast.sim.metrics import metrics
from servecast.sim.metrics.confidence import mser5, t_interval, wilson
from servecast.sim.metrics.records import SECONDS_COLUMNS, STEP_COLUMNS, RequestRecord, Run
from servecast.sim.metrics.slo import Goodput
from servecast.sim.metrics.warmup import Warmup, select


def record(
    request_id: int, times: tuple[float, float, float, float], output: int, **more: Any
) -> RequestRecord:
    """A finished request from (arrival, sent, first token, finish) in seconds."""
    arrival, sent, first, finish = (to_ps(time) for time in times)
    fields: dict[str, Any] = {"stage": 0, "stream": 0, "prompt_tokens": 100, "status": "finished", **more}
    return RequestRecord(
        request_id,
        arrival=arrival,
        sent=sent,
        queued=sent,
        scheduled=sent,
        first_token=first,
        finish=finish,
        output_tokens=output,
        **fields,
    )


def steps_frame(rows: list[dict[str, float]]) -> pd.DataFrame:
    values = [[row.get(name, 0) for name in STEP_COLUMNS] for row in rows]
    return pd.DataFrame(values, columns=list(STEP_COLUMNS)).astype(STEP_COLUMNS)


def requests_frame(records: list[RequestRecord]) -> pd.DataFrame:
    """RequestRecords to a table with times in seconds."""
    columns: dict[str, Any] = {}
    for name in RequestRecord.__slots__:
        values = [getattr(record, name) for record in records]
        if name in SECONDS_COLUMNS:
            known = np.array([np.nan if v is None else v for v in values], dtype="float64")
            columns[name] = known * 1e-12
        elif name in ("replica", "cached_tokens", "group"):
            columns[name] = pd.array(values, dtype="Int64")
        else:
            columns[name] = values
    return pd.DataFrame(columns, columns=list(RequestRecord.__slots__))


@pytest.fixture
def run() -> Run:
    """Four requests, the last of them failed.

    | id | arrival | sent | first token | finish | tokens | ttft | e2el | tpot            |
    | 0  | 0       | 0    | 0.1         | 0.5    | 5      | 0.1  | 0.5  | 0.4 / 4 = 0.1   |
    | 1  | 0.2     | 0.5  | 0.7         | 1.7    | 11     | 0.2  | 1.2  | 1.0 / 10 = 0.1  |
    | 2  | 1.0     | 1.0  | 1.6         | 1.6    | 1      | 0.6  | 0.6  | none            |
    """
    failed = RequestRecord(3, 0, 0, 100, to_ps(1.5), sent=to_ps(1.5), status="failed")
    return Run(
        requests=requests_frame(
            [
                record(0, (0.0, 0.0, 0.1, 0.5), 5, cached_tokens=0),
                record(1, (0.2, 0.5, 0.7, 1.7), 11, cached_tokens=50, preemptions=2),
                record(2, (1.0, 1.0, 1.6, 1.6), 1, cached_tokens=10),
                failed,
            ]
        ),
        steps=steps_frame(
            [
                {"start": 0.0, "running": 1, "waiting": 0, "kv_usage": 0.1},
                {"start": 0.6, "running": 2, "waiting": 3, "kv_usage": 0.4},
                {"start": 1.5, "running": 1, "waiting": 1, "kv_usage": 0.2},
            ]
        ),
        itl=pd.DataFrame({"stage": [0, 0], "gap": [0.1, 0.2], "weight": [13, 1]}),
        stages=["main"],
        meta={"request_rate": 2.0, "max_concurrency": 2, "burstiness": 1.0},
    )


def test_latencies_start_at_sent(run: Run) -> None:
    table = metrics.latencies(run.requests)
    assert table["ttft"].tolist() == pytest.approx([0.1, 0.2, 0.6])
    assert table["e2el"].tolist() == pytest.approx([0.5, 1.2, 0.6])
    assert table["tpot"].tolist()[:2] == pytest.approx([0.1, 0.1])
    assert math.isnan(table["tpot"].tolist()[2])
    assert table["client_queue_time"].tolist() == pytest.approx([0.0, 0.3, 0.0])
    assert table["e2el_including_client_queue"].tolist() == pytest.approx([0.5, 1.5, 0.6])


def test_summary_has_the_numbers_and_keys_of_vllm_bench(run: Run) -> None:
    result = metrics.summary(run, ranks=(50, 95, 99.9), goodput=Goodput.parse("ttft:500 tpot:100"))
    assert result["completed"] == 3
    assert result["failed"] == 1
    assert result["duration"] == pytest.approx(1.7)
    assert result["total_input_tokens"] == 300  # the failed one's prompt does not count
    assert result["total_output_tokens"] == 17
    assert result["output_throughput"] == pytest.approx(17 / 1.7)
    assert result["total_token_throughput"] == pytest.approx(317 / 1.7)
    assert result["request_throughput"] == pytest.approx(3 / 1.7)
    assert result["mean_ttft_ms"] == pytest.approx(300)
    assert result["median_ttft_ms"] == pytest.approx(200)
    assert result["p95_ttft_ms"] == pytest.approx(200 + 0.9 * 400)
    assert result["std_ttft_ms"] == pytest.approx(1000 * np.std([0.1, 0.2, 0.6]))
    assert result["mean_tpot_ms"] == pytest.approx(100)
    assert result["mean_itl_ms"] == pytest.approx(1000 * 1.5 / 14)
    assert result["p50_itl_ms"] == pytest.approx(100)
    assert "p99.9_e2el_ms" in result
    assert result["mean_client_queue_time_ms"] == pytest.approx(100)
    assert result["kv_cache_usage_peak"] == pytest.approx(0.4)
    assert (result["max_num_running"], result["max_num_waiting"], result["num_preemptions"]) == (2, 3, 2)
    assert result["prefix_cache_hit_rate"] == pytest.approx(60 / 300)
    json.dumps(result, allow_nan=False)


def test_goodput_counts_a_single_token_as_zero_tpot_and_a_limit_as_met(run: Run) -> None:
    """Request 2 has no TPOT and a TTFT of 600 ms: good at 600, not at 599. Four requests were sent."""
    assert metrics.good_requests(run, Goodput.parse("ttft:600.0000001 tpot:100.0000001")) == 3
    assert metrics.good_requests(run, Goodput.parse("ttft:599 tpot:100.0000001")) == 2
    result = metrics.summary(run, goodput=Goodput.parse("ttft:599"))
    assert result["request_goodput"] == pytest.approx(2 / 1.7)
    assert result["goodput_share"] == 0.5
    low, high = result["goodput_share_interval"]
    assert low < 0.5 < high


def test_peaks_are_those_of_one_second_buckets(run: Run) -> None:
    """Second 0: five tokens of request 0 and three of request 1 (at 0.7, 0.8, 0.9), two requests in flight.
    Second 1: eight of request 1 (1.0 to 1.7) and one of request 2, both in flight."""
    tokens, concurrency = metrics.peaks(run.requests)
    assert tokens == 9
    assert concurrency == 2


def test_nothing_finished_is_missing_not_zero() -> None:
    empty = Run(requests_frame([]), steps_frame([]), pd.DataFrame({"stage": [], "gap": [], "weight": []}))
    result = metrics.summary(empty)
    assert result["completed"] == 0
    for key in ("mean_ttft_ms", "p99_itl_ms", "output_throughput", "kv_cache_usage_peak", "max_num_running"):
        assert result[key] is None


def test_unknown_metric_and_statistic_are_refused(run: Run) -> None:
    with pytest.raises(InputError, match="unknown metric 'ttf'"):
        metrics.statistic(run, "ttf", "p95")
    for name in ("p101", "q95", "p", "pnan"):
        with pytest.raises(InputError, match="unknown statistic"):
            metrics.statistic(run, "ttft", name)
    assert metrics.statistic(run, "e2el", "max") == pytest.approx(1.2)


@given(
    st.lists(st.floats(0, 1e3), min_size=1, max_size=40),
    st.lists(st.floats(0, 100), min_size=1, max_size=5),
)
def test_linear_percentiles_are_numpys(values: list[float], ranks: list[float]) -> None:
    assert metrics.percentiles(values, ranks) == np.percentile(values, ranks).tolist()


@given(st.lists(st.floats(0, 1e3), min_size=2, max_size=40), st.integers(1, 99))
def test_exclusive_percentiles_are_the_standard_librarys(values: list[float], rank: int) -> None:
    expected = stdlib.quantiles(values, n=100)[rank - 1]
    assert metrics.percentiles(values, [rank], law="exclusive")[0] == pytest.approx(
        expected, rel=1e-9, abs=1e-9
    )


def test_the_exclusive_law_goes_past_the_maximum() -> None:
    """Twelve samples 1..12: rank 95 lies at 12.35, 0.35 past the last step of length 1."""
    assert metrics.percentiles(range(1, 13), [95], law="exclusive") == pytest.approx([12.35])


@settings(max_examples=50)
@given(
    st.lists(st.tuples(st.floats(0, 10), st.integers(1, 9)), min_size=1, max_size=30),
    st.sampled_from(("linear", "exclusive")),
)
def test_weights_equal_expanding_them(pairs: list[tuple[float, int]], law: Any) -> None:
    values, weights = zip(*pairs, strict=True)
    expanded, ranks = np.repeat(values, weights), [0, 37.5, 50, 95, 99, 100]
    found = metrics.percentiles(values, ranks, weights=weights, law=law)
    np.testing.assert_array_equal(found, metrics.percentiles(expanded, ranks, law=law))


def test_weights_may_be_fractions() -> None:
    """Four rows of a quarter each count as one value."""
    values, weights = [3.0] * 4 + [1.0] * 4 + [2.0], [0.25] * 8 + [1.0]
    assert metrics.percentiles(values, [0, 25, 50, 75, 100], weights=weights) == [1.0, 1.5, 2.0, 2.5, 3.0]


def test_series_sums_replicas_and_keeps_their_last_value() -> None:
    """Replica 0 runs 3 from 0 on, replica 1 runs 5 from 1 and 0 from 2 on: 3, 8, 3; KV is averaged."""
    steps = steps_frame(
        [
            {"replica": 0, "start": 0.0, "running": 3, "kv_usage": 0.2},
            {"replica": 1, "start": 1.0, "running": 5, "kv_usage": 0.6},
            {"replica": 1, "start": 2.0, "running": 0, "kv_usage": 0.0},
        ]
    )
    assert metrics.series(steps, "running").tolist() == [3, 8, 3]
    assert metrics.series(steps, "kv_usage").tolist() == pytest.approx([0.1, 0.4, 0.1])


def test_the_printed_block_is_vllms(run: Run) -> None:
    """Layout of vllm/benchmarks/serve.py: 50 wide headers, labels padded to 40, values to 10."""
    text = metrics.vllm_bench_text(
        metrics.summary(run, ranks=(99,), goodput=Goodput.parse("ttft:500"))
    ).splitlines()
    assert text[:6] == [
        "============ Serving Benchmark Result ============",
        "Successful requests:                     3         ",
        "Failed requests:                         1         ",
        "Maximum request concurrency:             2         ",
        "Request rate configured (RPS):           2.00      ",
        "Benchmark duration (s):                  1.70      ",
    ]
    assert "Request goodput (req/s):                 1.18      " in text
    at = text.index("---------------Time to First Token----------------")
    assert text[at + 1 : at + 4] == [
        "Mean TTFT (ms):                          300.00    ",
        "Median TTFT (ms):                        200.00    ",
        "P99 TTFT (ms):                           592.00    ",
    ]
    assert "-----Time per Output Token (excl. 1st token)------" in text
    assert text[-1] == "=" * 50


def test_warmup_by_time_by_count_and_by_share(run: Run) -> None:
    for warmup, steps in (
        (Warmup(seconds=0.6), [0.6, 1.5]),
        (Warmup(requests=2), [1.5]),
        (Warmup(share=0.5), [1.5]),
    ):
        part = select(run, warmup=warmup)
        assert part.requests["request_id"].tolist() == [2, 3]
        assert part.steps["start"].tolist() == steps
    assert metrics.duration(select(run, warmup=Warmup(seconds=0.6))) == pytest.approx(1.6 - 0.6)
    assert metrics.duration(select(run, warmup=Warmup(requests=2))) == pytest.approx(1.6 - 1.0)
    with pytest.raises(InputError, match="leaves none of 4 requests"):
        select(run, warmup=Warmup(requests=4))


def test_automatic_warmup_cuts_the_transient() -> None:
    """TTFT falls from 10 s to 0.1 s over the first 50 of 400 requests, then stays level."""
    noise = np.random.default_rng(1).normal(0, 0.01, 400)
    ttft = np.where(np.arange(400) < 50, 10 - 0.2 * np.arange(400), 0.1) + abs(noise)
    records = [record(i, (i, i, i + t, i + t + 1), 2) for i, t in enumerate(ttft.tolist())]
    run = Run(requests_frame(records), steps_frame([]), pd.DataFrame({"stage": [], "gap": [], "weight": []}))
    part = select(run, warmup=Warmup(auto=True))
    assert part.requests["request_id"].min() == 50
    assert part.meta["start_s"] == 50.0


def test_stages_are_selected_by_name_or_number() -> None:
    records = [record(0, (0, 0, 1, 2), 2), record(1, (3, 3, 3.5, 5), 2, stage=1)]
    itl = pd.DataFrame({"stage": [0, 1], "gap": [1.0, 1.5], "weight": [1, 1]})
    steps = steps_frame([{"start": 0.0}, {"start": 3.0}])
    run = Run(requests_frame(records), steps, itl, ["low", "high"])
    for stage in ("high", 1):
        part = select(run, stage=stage)
        assert part.requests["request_id"].tolist() == [1]
        assert part.itl["gap"].tolist() == [1.5]
        assert part.steps["start"].tolist() == [3.0]
        assert metrics.duration(part) == pytest.approx(2.0)
    run.meta["stage_starts_s"] = [0.0, 2.5]
    assert metrics.duration(select(run, stage=1)) == pytest.approx(2.5)
    with pytest.raises(InputError, match="no stage 'top'"):
        select(run, stage="top")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("30s", Warmup(seconds=30)),
        ("100", Warmup(requests=100)),
        ("20%", Warmup(share=0.2)),
        ("auto", Warmup(auto=True)),
    ],
)
def test_warmup_is_read_from_text(text: str, expected: Warmup) -> None:
    assert Warmup.parse(text) == expected


@pytest.mark.parametrize("text", ["", "fast", "-3s", "100%", "-1", "nans", "1.5"])
def test_warmup_that_means_nothing_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="--warmup"):
        Warmup.parse(text)


def test_t_interval() -> None:
    """Values 1..5: mean 3, s / sqrt(n) = sqrt(2.5 / 5), t(4, 97.5 %) = 2.7764."""
    interval = t_interval([1, 2, 3, 4, 5])
    half = 2.776445 * math.sqrt(0.5)
    assert [interval.low, interval.high] == pytest.approx([3 - half, 3 + half])
    assert math.isnan(t_interval([1.0]).low)
    assert math.isnan(t_interval([1.0, math.nan]).estimate)


def test_wilson_interval() -> None:
    """8 of 10 at 95 %: 0.4901625 to 0.9433178 (Newcombe, Statistics in Medicine 17, 1998, method 3)."""
    interval = wilson(8, 10)
    assert [interval.low, interval.high] == pytest.approx([0.4901625, 0.9433178])
    assert wilson(10, 10).high == 1.0
    assert wilson(10, 10).low < 1.0


def test_mser5_leaves_a_level_series_alone_and_reports_a_drifting_one() -> None:
    level = np.random.default_rng(3).normal(1, 0.1, 1000)
    cut, steady = mser5(level)
    assert steady
    assert cut <= 100
    cut, steady = mser5(np.arange(1000.0))
    assert cut == 500
    assert not steady


@given(
    st.lists(st.tuples(st.floats(0, 50), st.floats(0, 2), st.integers(1, 300)), min_size=1, max_size=8),
    st.sampled_from([1.0, 0.1, 1 / 3]),
)
def test_tokens_by_second_are_those_of_all_tokens_expanded(
    rows: list[tuple[float, float, int]], scale: float
) -> None:
    first, gap, tokens = (
        np.array([r[0] for r in rows]),
        np.array([r[1] * scale for r in rows]),
        [r[2] for r in rows],
    )
    every = [
        one + number * step
        for one, step, count in zip(first, gap, tokens, strict=True)
        for number in range(count)
    ]
    seconds = int(max(every)) + 2
    expected = np.bincount(np.array(every).astype(int), minlength=seconds)
    assert metrics._by_second(first, gap, np.array(tokens), seconds).tolist() == expected.tolist()
