"""Arrival laws, lengths, contents, and what stays the same when something else changes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy import stats

from servecast.sim.engine.request import Request, Stage
from servecast.sim.inputs.errors import InputError
from servecast.sim.inputs.schema import parse
from servecast.sim.traffic.arrivals import (
    Arrivals,
    ClosedLoop,
    Constant,
    Extent,
    Gamma,
    InferencePerf,
    Poisson,
    Timestamps,
    VllmBench,
)
from servecast.sim.traffic.draw import check_requests, draw, with_request_rate
from servecast.sim.traffic.forms import expand
from servecast.sim.traffic.lengths import Empirical, Fixed, Lognormal, Uniform
from servecast.sim.traffic.spec import StreamSpec, Sweep, Workload


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def times(law: Arrivals, num_requests: int | None = None, duration_s: float | None = None) -> Any:
    return law.times(Extent(num_requests, duration_s), rng())


def workload(stream: dict[str, Any], sweep: dict[str, Any] | None = None) -> Workload:
    levels = None if sweep is None else parse(Sweep, sweep, source="test")
    return expand(parse(StreamSpec, stream, source="test"), levels)


def staged(*stages: dict[str, Any]) -> Workload:
    return parse(Workload, {"stages": list(stages)}, source="test")


def drawn(load: Workload, seed: int = 0) -> list[Stage]:
    return draw(load, seed)


def requests_of(load: Workload, seed: int = 0) -> list[Request]:
    return [r for stage in drawn(load, seed) for stream in stage.streams for r in stream.requests]


def open_loop(**changes: Any) -> dict[str, Any]:
    stream: dict[str, Any] = {
        "arrivals": {"kind": "poisson", "request_rate": 2.0},
        "num_requests": 50,
        "prompt_tokens": 100,
        "output_tokens": 10,
    }
    return {**stream, **changes}


# Arrival laws


def test_poisson_gaps_are_exponential_and_the_first_is_waited() -> None:
    gaps = np.diff(times(Poisson(kind="poisson", request_rate=4.0), 20_000), prepend=0.0)
    assert stats.kstest(gaps, "expon", args=(0, 0.25)).pvalue > 0.01


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gamma_gaps_have_the_burstiness_as_shape(burstiness: float) -> None:
    law = Gamma(kind="gamma", request_rate=2.0, burstiness=burstiness)
    gaps = np.diff(times(law, 20_000), prepend=0.0)
    assert stats.kstest(gaps, "gamma", args=(burstiness, 0, 0.5 / burstiness)).pvalue > 0.01


def test_constant_arrivals_have_equal_gaps() -> None:
    assert times(Constant(kind="constant", request_rate=4.0), 4).tolist() == [0.0, 0.25, 0.5, 0.75]


def test_a_duration_cuts_the_same_process_that_a_count_cuts() -> None:
    law = Poisson(kind="poisson", request_rate=3.0)
    by_time, by_count = times(law, duration_s=100.0), times(law, num_requests=1000)
    assert len(by_time) < 1000
    assert by_time.tolist() == [t for t in by_count.tolist() if t < 100.0]
    assert by_time.tolist() == times(law, num_requests=1000, duration_s=100.0).tolist()


def test_a_duration_gives_a_poisson_number_of_requests() -> None:
    law = Poisson(kind="poisson", request_rate=5.0)
    counts = [len(law.times(Extent(None, 20.0), rng(seed))) for seed in range(400)]
    assert abs(np.mean(counts) - 100) < 4 * 10 / math.sqrt(400)
    assert 70 < np.var(counts) < 135


@pytest.mark.parametrize("burstiness", [0.5, 1.0, math.inf])
def test_vllm_bench_ends_at_n_over_rate_and_waits_the_first_gap(burstiness: float) -> None:
    law = VllmBench(kind="vllm_bench", request_rate=4.0, burstiness=burstiness)
    arrivals = times(law, 100)
    assert arrivals[-1] == pytest.approx(25.0)
    assert arrivals[0] > 0
    if math.isinf(burstiness):
        assert np.allclose(np.diff(arrivals), 0.25)


@pytest.mark.parametrize("strategy", ["linear", "exponential"])
def test_vllm_bench_ramp_up_sets_the_rate_by_index_and_does_not_rescale(strategy: Any) -> None:
    law = VllmBench(
        kind="vllm_bench",
        ramp_up_strategy=strategy,
        ramp_up_start_rps=1.0,
        ramp_up_end_rps=8.0,
        burstiness=2.0,
    )
    n, gaps = 40, rng().standard_gamma(2.0, 40)
    expected, t = [], 0.0
    for i in range(n):
        progress = i / (n - 1)
        rate = 1.0 + 7.0 * progress if strategy == "linear" else 8.0**progress
        t += gaps[i] / (rate * 2.0)
        expected.append(t)
    assert np.allclose(times(law, n), expected)


def test_vllm_bench_at_infinite_rate_sends_all_at_once() -> None:
    assert times(VllmBench(kind="vllm_bench"), 3).tolist() == [0.0, 0.0, 0.0]


def test_inference_perf_constant_is_poisson_that_ends_with_its_duration() -> None:
    law = InferencePerf(kind="inference_perf", request_rate=20.0)
    arrivals = times(law, duration_s=200.5)
    assert len(arrivals) == 4010
    assert arrivals[-1] == pytest.approx(201.5)  # the first second is a pause
    gaps = np.diff(arrivals, prepend=1.0)
    assert stats.kstest(gaps, "expon", args=(0, gaps.mean())).pvalue > 0.01


def test_inference_perf_poisson_fills_each_second_up_to_its_end() -> None:
    law = InferencePerf(kind="inference_perf", request_rate=0.7, load="poisson", start_delay_s=0.0)
    arrivals = times(law, duration_s=1000.0)
    assert len(arrivals) == 700
    assert (np.diff(arrivals) > 0).all()
    ends = arrivals[np.diff(np.ceil(arrivals - 1e-9), append=np.inf) > 0][:-1]
    assert np.allclose(ends, np.round(ends))
    counts = np.bincount(np.ceil(arrivals - 1e-9).astype(int))[1:-1]
    assert 0.5 < counts.mean() < 0.9
    assert (counts == 0).mean() == pytest.approx(math.exp(-0.7), abs=0.06)


def test_timestamps_are_replayed_and_stretched_to_a_rate() -> None:
    law = Timestamps(kind="timestamps", times_s=(0.0, 1.0, 1.0, 4.0))
    assert times(law).tolist() == [0.0, 1.0, 1.0, 4.0]
    assert times(law.model_copy(update={"request_rate": 2.0})).tolist() == [0.0, 0.5, 0.5, 2.0]


def test_a_closed_loop_is_a_semaphore_over_requests_at_zero() -> None:
    stream = drawn(workload(open_loop(arrivals={"kind": "closed_loop", "concurrency": 3})))[0].streams[0]
    assert stream.max_concurrency == 3
    assert {r.arrival_s for r in stream.requests} == {0.0}
    assert times(ClosedLoop(kind="closed_loop", concurrency=3), 2).tolist() == [0.0, 0.0]


# Lengths


@pytest.mark.parametrize(
    ("tokens", "ratio", "low", "high"), [(10, 0.25, 7, 13), (128, 0.0, 128, 128), (1, 0.9, 1, 2)]
)
def test_uniform_lengths_take_vllms_bounds_both_included(
    tokens: int, ratio: float, low: int, high: int
) -> None:
    lengths = Uniform(kind="uniform", tokens=tokens, range_ratio=ratio).draw(2000, rng())
    assert sorted(set(lengths.tolist())) == list(range(low, high + 1))


def test_lognormal_lengths_by_mean_and_std_or_by_median_and_sigma() -> None:
    by_mean = Lognormal(kind="lognormal", mean=1000, std=400).draw(50_000, rng())
    assert by_mean.mean() == pytest.approx(1000, rel=0.01)
    assert by_mean.std() == pytest.approx(400, rel=0.03)
    by_median = Lognormal(kind="lognormal", median=200, sigma=0.5, min_tokens=50, max_tokens=900).draw(
        50_000, rng()
    )
    assert np.median(by_median) == pytest.approx(200, rel=0.02)
    assert (by_median.min(), by_median.max()) == (50, 900)


def test_empirical_lengths_from_values_a_histogram_and_a_column(tmp_path: Any) -> None:
    values = Empirical(kind="empirical", values=(5, 9)).draw(4000, rng())
    assert (values == 5).mean() == pytest.approx(0.5, abs=0.03)
    histogram = Empirical(kind="empirical", values=(5, 9, 11), weights=(1.0, 0.0, 3.0)).draw(4000, rng())
    assert sorted(set(histogram.tolist())) == [5, 11]
    assert (histogram == 11).mean() == pytest.approx(0.75, abs=0.03)
    (tmp_path / "lengths.csv").write_text("id,tokens\n1,30\n2,40\n")
    column = Empirical(kind="empirical", path=tmp_path / "lengths.csv", column="tokens").draw(100, rng())
    assert set(column.tolist()) == {30, 40}


def test_a_number_is_short_for_a_fixed_length() -> None:
    assert parse(StreamSpec, open_loop(), source="test").prompt_tokens == Fixed(tokens=100)


def test_output_stops_before_max_tokens_or_at_it() -> None:
    lengths = {"kind": "empirical", "values": [5, 500]}
    requests = requests_of(workload(open_loop(output_tokens=lengths, max_tokens=64)))
    assert {(r.output_tokens, r.max_tokens) for r in requests} == {(5, 64), (64, 64)}
    requests = requests_of(workload(open_loop(output_tokens=lengths)))
    assert {(r.output_tokens, r.max_tokens) for r in requests} == {(5, 5), (500, 500)}


# Contents


def shared_tokens(a: Request, b: Request) -> int:
    """Leading tokens that two prompts have in common, by their contents."""
    shared = 0
    for (id_a, end_a), (id_b, end_b) in zip(a.content, b.content, strict=False):
        if id_a != id_b:
            break
        assert end_a == end_b
        shared = end_a
    return shared


CONTENTS = [
    "unique",
    "repeat",
    "same",
    {"kind": "same", "text": "other"},
    {"kind": "shared_prefix", "groups": 3, "prefix_tokens": 40},
    {"kind": "shared_prefix", "groups": 3, "prefix_tokens": 40, "prompts_per_group": 2, "order": "cycle"},
]


@pytest.mark.parametrize("content", CONTENTS, ids=str)
@pytest.mark.parametrize("system", [0, 24])
def test_equal_ids_are_equal_tokens_and_everything_before_them(content: Any, system: int) -> None:
    stream = open_loop(
        content=content,
        prompt_tokens={"kind": "uniform", "tokens": 60, "range_ratio": 0.5},
        system_prompt_tokens=system,
        suffix_tokens=5,
    )
    other = {**stream, "name": "other", "num_requests": 20}
    before: dict[int, tuple[tuple[int, int], ...]] = {}
    for request in requests_of(staged({"streams": [stream, other]}, {"streams": [stream]})):
        ends = [end for _, end in request.content]
        assert ends == sorted(set(ends))
        assert not ends or 0 < ends[-1] <= request.prompt_tokens
        for k, (content_id, _) in enumerate(request.content):
            assert before.setdefault(content_id, request.content[: k + 1]) == request.content[: k + 1]


def test_unique_prompts_share_the_system_prompt_only() -> None:
    first, second = requests_of(workload(open_loop(system_prompt_tokens=24)))[:2]
    assert shared_tokens(first, second) == 24
    assert first.prompt_tokens == 124
    assert requests_of(workload(open_loop()))[0].content == ()


def test_repeated_prompts_are_the_same_in_every_level_and_differ_within_one() -> None:
    lengths = {"kind": "uniform", "tokens": 60, "range_ratio": 0.5}
    stream = {"prompt_tokens": lengths, "output_tokens": 8, "content": "repeat"}
    levels = [{"concurrency": 1, "num_requests": 10}, {"concurrency": 2, "num_requests": 20}]
    small, large = (stage.streams[0].requests for stage in drawn(workload(stream, {"levels": levels})))
    assert [r.content for r in small] == [r.content for r in large[:10]]
    assert [r.prompt_tokens for r in small] == [r.prompt_tokens for r in large[:10]]
    assert len({r.content for r in large}) == 20


def test_same_prompts_are_beginnings_of_one_text() -> None:
    levels = [{"row": {"input": n}, "prompt_tokens": n} for n in (16, 100)]
    stream = {
        "arrivals": {"kind": "closed_loop", "concurrency": 1},
        "num_requests": 2,
        "prompt_tokens": 1,
        "output_tokens": 8,
        "content": "same",
        "system_prompt_tokens": 24,
        "suffix_tokens": 5,
    }
    short, long = (stage.streams[0].requests for stage in drawn(workload(stream, {"levels": levels})))
    assert shared_tokens(long[0], long[1]) == long[0].prompt_tokens == 129
    assert shared_tokens(short[0], long[0]) == 40  # all but the text behind the short one's end


def test_shared_prefixes_come_before_the_prompts_own_tokens() -> None:
    content = {"kind": "shared_prefix", "groups": 4, "prefix_tokens": 64}
    requests = requests_of(workload(open_loop(content=content, num_requests=400)))
    assert {r.prompt_tokens for r in requests} == {164}
    assert {r.group for r in requests} == {0, 1, 2, 3}
    a, b = requests[0], next(r for r in requests[1:] if r.group == requests[0].group)
    c = next(r for r in requests if r.group != a.group)
    assert (shared_tokens(a, b), shared_tokens(a, c)) == (64, 0)


def test_a_cycle_repeats_whole_prompts_and_starts_anew_in_each_stage() -> None:
    content = {
        "kind": "shared_prefix",
        "groups": 4,
        "prefix_tokens": 64,
        "prompts_per_group": 3,
        "order": "cycle",
    }
    lengths = {"kind": "uniform", "tokens": 60, "range_ratio": 0.5}
    stream = open_loop(content=content, num_requests=30, prompt_tokens=lengths)
    first, second = (
        s.streams[0].requests for s in drawn(staged({"streams": [stream]}, {"streams": [stream]}))
    )
    assert len({r.content for r in first[:12]}) == 12
    assert [r.content for r in first[12:24]] == [r.content for r in first[:12]]
    assert [r.content for r in second] == [r.content for r in first]


# Streams, stages, rates


def test_request_ids_count_over_all_streams_and_stages() -> None:
    stages = [{"streams": [open_loop(), open_loop(name="other")]}, {"streams": [open_loop()]}]
    assert [r.request_id for r in requests_of(staged(*stages))] == list(range(150))


def test_priorities_aborts_and_background_reach_the_requests() -> None:
    stream = open_loop(name="b", priority=3, abort_after_s=2.0, background=True, max_concurrency=4)
    stage = drawn(staged({"streams": [open_loop(), stream]}))[0]
    assert [(s.background, s.max_concurrency) for s in stage.streams] == [(False, None), (True, 4)]
    assert {(r.priority, r.abort_after_s) for r in stage.streams[1].requests} == {(3, 2.0)}
    assert {(r.priority, r.abort_after_s) for r in stage.streams[0].requests} == {(0, None)}


def test_start_s_delays_a_stream_within_its_stage() -> None:
    plain, late = requests_of(workload(open_loop())), requests_of(workload(open_loop(start_s=2.5)))
    assert [r.arrival_s + 2.5 for r in plain] == [r.arrival_s for r in late]


def test_one_seed_draws_the_same_and_another_seed_something_else() -> None:
    load = workload(open_loop(prompt_tokens={"kind": "lognormal", "mean": 100, "std": 40}))
    assert requests_of(load) == requests_of(load)
    assert requests_of(load, seed=0) != requests_of(load, seed=1)


def test_another_arrival_law_leaves_lengths_and_contents_as_they_were() -> None:
    varied = {
        "prompt_tokens": {"kind": "lognormal", "mean": 100, "std": 40},
        "output_tokens": {"kind": "lognormal", "mean": 20, "std": 9},
        "content": CONTENTS[4],
    }
    poisson = requests_of(workload(open_loop(**varied)))
    gamma = {"kind": "gamma", "request_rate": 9.0, "burstiness": 0.3}
    bursty = requests_of(workload(open_loop(**varied, arrivals=gamma)))
    assert [(r.prompt_tokens, r.output_tokens, r.content) for r in poisson] == [
        (r.prompt_tokens, r.output_tokens, r.content) for r in bursty
    ]


@pytest.mark.parametrize(
    "law",
    [
        {"kind": "poisson", "request_rate": 2.0},
        {"kind": "gamma", "request_rate": 2.0, "burstiness": 0.5},
        {"kind": "constant", "request_rate": 2.0},
        {"kind": "vllm_bench", "request_rate": 2.0},
        {"kind": "inference_perf", "request_rate": 2.0, "start_delay_s": 0.0},
        {"kind": "timestamps", "times_s": [0.0, 1.0, 4.0, 5.0], "request_rate": 2.0},
    ],
    ids=lambda law: law["kind"],
)
def test_another_rate_stretches_the_same_traffic_in_time(law: dict[str, Any]) -> None:
    lengths = {"kind": "lognormal", "mean": 100, "std": 40}
    n = 4 if law["kind"] == "timestamps" else 50
    load = workload(open_loop(arrivals=law, prompt_tokens=lengths, num_requests=n))
    slow, fast = requests_of(with_request_rate(load, 2.0)), requests_of(with_request_rate(load, 8.0))
    assert np.allclose([r.arrival_s for r in slow], [4 * r.arrival_s for r in fast])
    assert [r.prompt_tokens for r in slow] == [r.prompt_tokens for r in fast]
    longer = requests_of(with_request_rate(load, 2.0, num_requests=n))
    assert longer == slow


def test_more_requests_begin_with_the_same_ones() -> None:
    load = workload(open_loop(prompt_tokens={"kind": "lognormal", "mean": 100, "std": 40}))
    few, many = (requests_of(with_request_rate(load, 2.0, num_requests=n)) for n in (50, 300))
    assert many[:50] == few


def test_a_rate_is_shared_by_the_foreground_streams_in_their_proportion() -> None:
    streams = [
        open_loop(name="a", arrivals={"kind": "constant", "request_rate": 1.0}),
        open_loop(name="b", arrivals={"kind": "constant", "request_rate": 3.0}),
        open_loop(name="c", arrivals={"kind": "constant", "request_rate": 5.0}, background=True),
    ]
    scaled = with_request_rate(staged({"streams": streams}), 8.0).stages[0].streams
    assert [s.arrivals.request_rate for s in scaled if isinstance(s.arrivals, Constant)] == [2.0, 6.0, 5.0]


def test_a_closed_loop_has_no_rate_to_set() -> None:
    load = workload(open_loop(arrivals={"kind": "closed_loop", "concurrency": 3}))
    with pytest.raises(InputError, match="closed_loop arrivals have no rate to set"):
        with_request_rate(load, 2.0)


def test_several_stages_have_no_single_rate() -> None:
    with pytest.raises(InputError, match="a workload of 2 stages has no single request rate"):
        with_request_rate(staged({"streams": [open_loop()]}, {"streams": [open_loop()]}), 2.0)


def test_levels_of_a_rate_sweep_keep_the_law() -> None:
    law = {"kind": "gamma", "request_rate": 1.0, "burstiness": 0.5}
    load = workload(open_loop(arrivals=law), {"levels": [{"request_rate": 3.0}, {"request_rate": 5.0}]})
    assert [stage.row for stage in load.stages] == [{"request_rate": 3.0}, {"request_rate": 5.0}]
    assert [stage.streams[0].arrivals for stage in load.stages] == [
        Gamma(kind="gamma", request_rate=rate, burstiness=0.5) for rate in (3.0, 5.0)
    ]


def test_stages_without_drain_last_as_long_as_their_streams() -> None:
    stream = {key: value for key, value in open_loop().items() if key != "num_requests"}
    load = workload(stream, {"drain": False, "levels": [{"request_rate": 3.0, "duration_s": 20.0}]})
    assert (drawn(load)[0].drain, drawn(load)[0].duration_s) == (False, 20.0)


def test_requests_beyond_max_model_len_are_refused() -> None:
    stages = drawn(workload(open_loop(prompt_tokens=1000, output_tokens=25)))
    check_requests(stages, 1025, where="test")
    with pytest.raises(
        InputError, match="1000 prompt tokens and max_tokens 25 is longer than max_model_len 1024"
    ):
        check_requests(stages, 1024, where="test")
