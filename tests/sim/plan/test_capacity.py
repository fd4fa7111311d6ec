"""The search against a single server whose largest rate at an SLO is known in closed form."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import pytest
from mm1 import SERVICE_RATE, mm1, steps_frame, table

from servecast.sim.hardware.step_time.physical import StepShape
from servecast.sim.inputs.errors import InputError
from servecast.sim.metrics.binding import Evidence, Limits, binding_limit, evidence
from servecast.sim.metrics.knee import closed_loop_knee, open_loop_knee
from servecast.sim.metrics.records import Run
from servecast.sim.metrics.saturation import saturation
from servecast.sim.metrics.slo import SLO, Goodput
from servecast.sim.plan.capacity import Plan, plan
from servecast.sim.plan.effort import Effort
from servecast.sim.plan.judge import Objectives
from servecast.sim.plan.prober import requests_needed
from servecast.sim.plan.size import Size, Unit, check_target
from servecast.sim.plan.traffic import Traffic

LIMIT_S = 1.0
P95 = SLO.parse("ttft:p95:1000")
AT_P95 = Objectives((P95,))
# The time in an M/M/1 system is exponential with rate mu - lambda: its p95 is ln 20 / (mu - lambda).
MAX_RATE = SERVICE_RATE - math.log(20) / LIMIT_S
FEW = Effort(replications=(4,), max_requests=400)


LIMITS = Limits(max_num_seqs=1, max_num_batched_tokens=2048, num_gpu_blocks=11)


@pytest.fixture(scope="module")
def found() -> Plan:
    return plan(mm1, AT_P95, effort=Effort(max_requests=4000), limits=LIMITS)


def test_finds_the_rate_that_theory_gives(found: Plan) -> None:
    assert found.max_request_rate is not None
    assert found.max_request_rate == pytest.approx(MAX_RATE, rel=0.06)
    assert found.max_request_rate < MAX_RATE * 1.005  # a rate above it has at most 5 % chance to pass
    low, high = found.interval
    assert low == found.max_request_rate
    assert high is not None
    assert low is not None
    assert low < MAX_RATE < high * 1.005
    assert (found.state == "found") == (high / low < 1.03)


def test_the_knee_is_where_the_server_is_full(found: Plan) -> None:
    assert found.knee == pytest.approx(SERVICE_RATE, rel=0.06)


def test_probes_are_consistent(found: Plan) -> None:
    """States do not go back to pass above a miss, adjacent rates around the answer are within 3 %."""
    states = [probe.state for probe in found.probes]
    assert found.probes[len([s for s in states if s == "pass"]) - 1].rate == found.max_request_rate
    miss = next(probe for probe in found.probes if probe.state != "pass")
    assert miss.rate <= (found.max_request_rate or 0) * 1.0301
    assert miss.reasons
    for lower, upper in pairwise(found.probes):
        assert lower.rate < upper.rate
    assert all(probe.saturated for probe in found.probes if probe.rate > 11)


def test_the_queue_for_the_only_slot_binds(found: Plan) -> None:
    assert found.binding.limit == "max_num_seqs"
    assert "all 1 sequence slots (max_num_seqs) are taken" in found.binding.reasons[0]


def test_a_size_has_whole_replicas_and_their_cost() -> None:
    """35 requests/s at 3.941 each are 8.88, so 9; with 30 % in hand 45.5 are 11.55, so 12. Of four GPUs at 3
    each 9 cost 108 an hour, for 35 x 3600 requests of 100 + 25 tokens: 108 / 15.75 for a million of both."""
    unit, traffic = Unit(1, 4, 12.0), Traffic("poisson", 100.0, 200.0, 25.0, 50.0)
    size, more = (Size(35.0, margin, 3.941, unit, traffic) for margin in (0.0, 0.3))
    assert (size.replicas, size.gpus, size.hour_cost, size.month_cost) == (9, 36, 108.0, 78_840.0)
    assert size.in_hand == pytest.approx(9 * 3.941 / 35 - 1)
    assert (more.replicas, more.gpus, more.hour_cost) == (12, 48, 144.0)
    found = size.to_json()
    assert found["cost_per_million_tokens"] == pytest.approx(108 / 15.75)
    assert found["cost_per_million_input_tokens"] == pytest.approx(108 / 12.6)
    assert found["cost_per_million_output_tokens"] == pytest.approx(108 / 3.15)
    assert size.to_text() == "9 replicas, 36 GPUs, 1.3% in hand; 108.00 an hour, 78,840 a month"
    assert Size(8.0, 0.0, 4.0, Unit(2, 2, None), traffic).to_text() == "4 replicas, 4 GPUs, 0.0% in hand"


def test_estimates_decide_at_even_odds() -> None:
    """One replication then tells whether a rate holds: none is open."""
    effort = Effort(confidence=0.5, tolerance=0.1, replications=(1,), least_requests=400)
    result = plan(mm1, AT_P95, effort=effort, knee=False, start_rate=6.0)
    assert {probe.state for probe in result.probes} == {"pass", "fail"}
    assert result.max_request_rate == pytest.approx(MAX_RATE, rel=0.2)
    assert result.simulated == sum(probe.num_requests for probe in result.probes) + 500  # the first look


def test_a_plan_is_plain_json(found: Plan) -> None:
    result = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert result["binding_limit"] == "max_num_seqs"
    assert result["objectives"]["slos"] == ["ttft:p95:1000"]
    assert result["probes"][0]["verdicts"][0]["value"]["samples"] >= 4
    assert found.exit_code in (0, 3)


def test_processes_do_not_change_the_result() -> None:
    effort = Effort(replications=(2, 4), max_requests=500)
    first = plan(mm1, AT_P95, effort=effort, start_rate=6.0)
    assert plan(mm1, AT_P95, effort=replace(effort, jobs=2), start_rate=6.0).to_json() == first.to_json()
    assert plan(mm1, AT_P95, effort=effort, start_rate=6.0, seed=1).to_json() != first.to_json()


def test_an_slo_that_a_lone_request_misses_is_infeasible() -> None:
    result = plan(mm1, Objectives((SLO.parse("ttft:p95:50"),)), effort=FEW)
    assert (result.state, result.max_request_rate, result.exit_code) == ("infeasible", None, 1)
    assert result.interval[0] is None


def test_a_rate_cap_leaves_the_answer_unbounded() -> None:
    result = plan(mm1, AT_P95, effort=FEW, limits=LIMITS, max_rate=4.0)
    assert (result.state, result.max_request_rate, result.interval) == ("unbounded", 4.0, (4.0, None))
    assert result.binding.limit == "none"
    assert result.knee is None


def test_goodput_is_judged_by_its_share() -> None:
    """95 % of requests within 1 s is the p95 of the same latency."""
    share = Objectives((), Goodput.parse("ttft:1000"), attainment=0.95)
    result = plan(mm1, share, effort=Effort(max_requests=4000), start_rate=6.0)
    assert result.max_request_rate == pytest.approx(MAX_RATE, rel=0.08)


def test_two_replications_that_disagree_are_inconclusive() -> None:
    """TTFT is 0.9 s with even seeds and 1.1 s with odd ones at any rate: no number of them decides."""

    def torn(request_rate: float, seed: int, num_requests: int) -> Run:
        arrival = np.arange(1, num_requests + 1) / request_rate
        done = arrival + (0.9 if seed % 2 == 0 else 1.1)
        empty = pd.DataFrame({"stage": [], "gap": [], "weight": []})
        return Run(table(arrival, arrival, done), steps_frame(start=[]), empty)

    effort = Effort(replications=(2, 4), max_requests=100)
    result = plan(torn, AT_P95, effort=effort, limits=LIMITS, max_rate=10)
    assert (result.state, result.exit_code) == ("inconclusive", 3)
    assert result.max_request_rate is None
    assert {probe.state for probe in result.probes} == {"inconclusive"}
    assert result.probes[0].reasons == ("ttft:p95:1000: 1000 +-184 leaves 1000 open",)


@pytest.mark.parametrize(("spread", "state"), [(0.0, "found"), (0.005, "found"), (0.03, "inconclusive")])
def test_a_bracket_is_found_only_if_it_is_as_narrow_as_the_tolerance(spread: float, state: str) -> None:
    """TTFT is 0.1 s times the rate, more or less by ``spread`` with the seed. Four replications leave it
    open by 2.35 (t) x 1.15 spread / 2 to either side of 10/s: 1.4 % in all, which is looked at more closely,
    or 8 %."""

    def scattered(request_rate: float, seed: int, num_requests: int) -> Run:
        arrival = np.arange(1, num_requests + 1) / request_rate
        first_token = arrival + 0.1 * request_rate * (1 + (spread if seed % 2 else -spread))
        empty = pd.DataFrame({"stage": [], "gap": [], "weight": []})
        return Run(table(arrival, arrival, first_token), steps_frame(start=[]), empty)

    result = plan(scattered, AT_P95, effort=FEW, start_rate=7.0, max_rate=20)
    low, high = result.interval
    assert low is not None
    assert high is not None
    assert low < 10 < high
    assert (result.state, high <= 1.03 * low) == (state, state == "found")
    said = any(f"rates between {low:g} and {high:g} requests/s" in note for note in result.notes)
    assert said == (state == "inconclusive")


def test_progress_rises_to_the_end() -> None:
    seen: list[tuple[float, str, float]] = []
    plan(mm1, AT_P95, effort=FEW, progress=lambda rate, state, done: seen.append((rate, state, done)))
    shares = [done for _, _, done in seen]
    assert shares == sorted(shares)
    assert 0.9 < shares[-1] <= 1.0
    assert [state for _, state, _ in seen[::2]] == ["running"] * (len(seen) // 2)


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda: plan(mm1, AT_P95, start_rate=0.0), "start_rate: 0 is not positive"),
        (lambda: check_target(-1.0, 0.0), "--target-rate: -1 is not positive"),
        (lambda: check_target(1.0, -0.1), "--margin: -0.1 is no share"),
        (lambda: Effort(tolerance=0.0), "tolerance: 0 is not positive"),
        (lambda: Effort(confidence=1.0), "confidence: 1 is out of range"),
        (lambda: Effort(replications=()), "replications:"),
        (lambda: Effort(replications=(1,)), "replications:"),
        (lambda: Effort(replications=(8, 4)), "replications:"),
        (lambda: Objectives((), Goodput.parse("ttft:1"), 1.0), "--attainment: 1 is not a share"),
        (lambda: Objectives(()), "--slo: no objective"),
        (lambda: plan(mm1, Objectives((SLO.parse("tpot:p95:50"),)), effort=FEW), "no request has a tpot"),
    ],
)
def test_bad_arguments_are_refused(ask: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ask()


def test_requests_needed() -> None:
    """p95: 20 / 0.05 = 400 counted, 500 sent; at 100/s and 5 s each, 10 x 5 x 100 = 5,000 counted."""
    objectives = Objectives((P95, SLO.parse("tpot:mean:50")))
    assert requests_needed(objectives, 1.0, 0.5, least=100, most=20_000) == 500
    assert requests_needed(objectives, 1.0, 0.5, most=20_000) == 1250
    assert requests_needed(objectives, 100.0, 5.0, most=20_000) == 6250
    assert requests_needed(objectives, 100.0, 5.0, most=1000) == 1250
    assert requests_needed(Objectives((SLO.parse("ttft:p99:500"),)), 1.0, 0.5, most=100) == 2500


def fluid(rate: float, capacity: float, n: int = 4000, wave: float = 0.0) -> Run:
    """Constant arrivals at ``rate``, each served at once for 0.1 s at most ``capacity`` a second."""
    arrival = np.arange(1, n + 1) / rate + wave * np.sin(np.arange(n) / 40)
    start = np.maximum(arrival, np.arange(n) / capacity)
    steps = steps_frame(start=[])
    return Run(
        table(arrival, start, start + 0.1), steps, pd.DataFrame({"stage": [], "gap": [], "weight": []})
    )


def test_saturation_by_completion_rate_and_by_queue_growth() -> None:
    """Offered 10/s. Capacity 9/s completes 90 % and queues 1/s more each second. Capacity 9.85/s
    completes 98.5 %, within 2 %, but its queue grows by 0.15/s, more than 1 % of 10. At 20/s it holds."""
    heavy = saturation(fluid(10, 9))
    assert heavy.completion_ratio == pytest.approx(0.9, abs=0.005)
    assert heavy.queue_growth == pytest.approx(1.0, rel=0.02)
    assert "completes 90" in heavy.reason
    light = saturation(fluid(10, 9.85))
    assert light.completion_ratio > 0.98
    assert light.queue_growth == pytest.approx(0.15, rel=0.05)
    assert "queue grows by 0.15" in light.reason
    assert not saturation(fluid(10, 20)).saturated
    assert not saturation(fluid(10, 20, wave=0.5)).saturated
    assert not saturation(fluid(10, 9.95)).saturated  # grows by 0.5 %: counts as level


def test_saturation_needs_an_open_loop() -> None:
    run = fluid(10, 9)
    run.requests["arrival"] = 0.0
    with pytest.raises(InputError, match="needs an open loop"):
        saturation(run)


def test_saturation_rarely_accuses_a_stationary_queue() -> None:
    """M/M/1 at 70 % load and 2,000 requests: at most 10 of 100 seeds are called saturated; at 120 %: all."""
    assert sum(saturation(mm1(7.0, seed, 2000)).saturated for seed in range(100)) <= 10
    assert all(saturation(mm1(12.0, seed, 2000)).saturated for seed in range(20))


def test_closed_loop_knee() -> None:
    """The RTX A6000 table: 4,039.9 tok/s at 256 is the maximum, 128 has 3,138.1, 512 has 3,896.1."""
    levels, throughput = [64, 128, 256, 512], [2127.6, 3138.1, 4039.9, 3896.1]
    assert closed_loop_knee(levels, throughput) == 256
    assert closed_loop_knee(levels[::-1], throughput[::-1]) == 256
    assert closed_loop_knee(levels[:3], throughput[:3]) is None  # still rising at the last level
    assert closed_loop_knee([1, 2, 4], [95, 97, 100]) == 1
    assert closed_loop_knee([], []) is None


def test_open_loop_knee() -> None:
    assert open_loop_knee([1, 2, 4, 8], [False, False, True, True]) == 2
    assert open_loop_knee([8, 4, 2, 1], [False, True, False, False]) == 2
    assert open_loop_knee([1, 2], [False, False]) is None
    assert open_loop_knee([1, 2], [True, True]) is None


def busy_run(**columns: Any) -> Run:
    """Ten requests with a TTFT of 1 s, 0.1 s of it in front of the engine, and four steps of 1 s."""
    requests = table(np.arange(10.0), np.arange(10) + 0.5, np.arange(10) + 1.0)
    requests["queued"] = requests["sent"] + 0.1
    steps = steps_frame(start=[0, 1, 2, 3], duration=[1, 1, 1, 1], **columns)
    return Run(requests, steps, pd.DataFrame({"stage": [0], "gap": [1.0], "weight": [3]}))


def bound_by(step: StepShape) -> str:
    return "compute" if step.chunks else "memory_bandwidth"


ENGINE = Limits(4, 100, 11, bound_by, lambda _: {"linear": 1.0})


@pytest.mark.parametrize(
    ("columns", "limit"),
    [
        ({"waiting": [0, 2, 2, 2], "running": [4, 4, 4, 1], "decodes": [4, 4, 4, 1]}, "max_num_seqs"),
        (
            {
                "waiting": [2, 2, 2, 0],
                "running": [3] * 4,
                "prefill_tokens": [98] * 4,
                "decodes": [2] * 4,
                "prefill_requests": [1] * 4,
            },
            "token_budget",
        ),
        ({"waiting": [2, 2, 2, 0], "running": [3] * 4, "decodes": [3] * 4}, "kv_blocks"),
        ({"waiting": [0] * 4, "running": [3] * 4, "decodes": [3] * 4}, "memory_bandwidth"),
        ({"prefill_tokens": [5] * 4, "prefill_requests": [2] * 4, "decodes": [1, 0, 0, 0]}, "compute"),
    ],
)
def test_what_binds(columns: dict[str, Any], limit: str) -> None:
    found = evidence(busy_run(**columns), ENGINE)
    assert binding_limit(found, only_token_times=False).limit == limit
    assert found.busy == pytest.approx(1.0)
    assert found.front_end == pytest.approx(0.1)
    assert found.step_shares[1] == {"linear": 1.0}
    if limit == "max_num_seqs":
        assert (found.max_num_seqs, found.token_budget, found.kv_blocks) == (0.5, 0.0, 0.25)
        assert binding_limit(found, only_token_times=True).limit == "memory_bandwidth"


def test_the_front_end_binds_by_time_to_first_token_or_by_late_tokens() -> None:
    run = busy_run(decodes=[3] * 4)
    run.requests["queued"] = run.requests["sent"] + 0.6
    assert binding_limit(evidence(run, ENGINE), only_token_times=False).limit == "front_end"
    assert binding_limit(evidence(run, ENGINE), only_token_times=True).limit == "memory_bandwidth"
    run = busy_run(decodes=[3] * 4)
    run.itl["gap"] = 1.3
    assert binding_limit(evidence(run, ENGINE), only_token_times=True).limit == "front_end"


def test_step_shapes_are_rebuilt_from_rows() -> None:
    """7 prompt tokens of 2 requests are chunks of 4 and 3."""
    shapes: list[StepShape] = []

    def remember(step: StepShape) -> str:
        shapes.append(step)
        return "compute"

    run = busy_run(prefill_tokens=[7] * 4, prefill_requests=[2] * 4, decodes=[3] * 4, emitted=[5] * 4)
    assert evidence(run, Limits(4, 100, 11, remember)).step_shares == ({"compute": 1.0}, {})
    assert [(list(s.chunks), s.decodes, s.samples) for s in shapes] == [([(4, 0), (3, 0)], 3, 5)] * 4


def test_evidence_is_averaged_over_replications() -> None:
    """A second of prompts, and two seconds of decoding: half and half, as each replication counts once."""
    one = Evidence(0.2, 0.0, 0.0, 1.0, 0.1, 1.0, (np.array([[5, 1, 0, 0, 1, 0, 1.0]]),), ENGINE)
    two = Evidence(0.4, 0.0, 0.2, 0.8, 0.3, 1.2, (np.array([[0, 0, 3, 30, 3, 0, 2.0]]),), ENGINE)
    mean = Evidence.mean([one, two])
    assert (mean.max_num_seqs, mean.kv_blocks, mean.busy) == pytest.approx((0.3, 0.1, 0.9))
    assert mean.step_shares == ({"compute": 0.5, "memory_bandwidth": 0.5}, {"linear": 1.0})


def test_replications_grow_with_the_latency_they_find() -> None:
    """End-to-end latency is as many seconds as the rate: doubling it asks for four times the requests."""

    def growing(request_rate: float, seed: int, num_requests: int) -> Run:
        arrival = np.arange(1, num_requests + 1) / request_rate
        empty = pd.DataFrame({"stage": [], "gap": [], "weight": []})
        return Run(table(arrival, arrival, arrival + request_rate), steps_frame(start=[]), empty)

    effort = Effort(replications=(2,), max_requests=100_000)
    result = plan(growing, Objectives((SLO.parse("ttft:p95:20000"),)), effort=effort)
    best = result.best
    assert best is not None
    assert best.rate == pytest.approx(20, rel=0.03)
    for probe in result.probes:
        if probe.state == "pass":
            assert 0.8 * probe.num_requests >= max(1000, 10 * probe.rate**2 / 1.25) - 1
