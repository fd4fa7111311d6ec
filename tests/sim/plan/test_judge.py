"""The one judge: with confidence, and by means alone."""

from __future__ import annotations

import math

import pytest

from servecast.sim.metrics.slo import SLO, Goodput
from servecast.sim.plan.fleet_size import FleetSize
from servecast.sim.plan.judge import CERTAIN, Objectives, Observation, judge

TTFT = Objectives((SLO.parse("ttft:p95:100"),))
SHARE = Objectives((), Goodput.parse("ttft:100"), attainment=0.9)


def taking(*values_ms: float) -> list[Observation]:
    return [Observation((value,), 0, 100, None) for value in values_ms]


@pytest.mark.parametrize(
    ("values_ms", "confident", "by_means"),
    [
        ((60, 70, 80), "pass", "pass"),
        ((80, 95, 110), "inconclusive", "pass"),
        ((90, 105, 120), "inconclusive", "fail"),
        ((140, 150, 160), "fail", "fail"),
        ((60, 70, math.inf), "fail", "fail"),
        ((60, 70, math.nan), "fail", "fail"),
    ],
)
def test_latencies(values_ms: tuple[float, ...], confident: str, by_means: str) -> None:
    assert judge(taking(*values_ms), TTFT, 0.9).state == confident
    found = judge(taking(*values_ms), TTFT, CERTAIN)
    assert found.state == by_means
    assert (found.strain <= 1) == (by_means == "pass")


def test_one_run_is_judged_by_its_value_alone() -> None:
    assert judge(taking(99.0), TTFT, CERTAIN).strain == pytest.approx(0.99)
    assert judge(taking(99.0), TTFT, CERTAIN).state == "pass"
    assert judge(taking(99.0), TTFT, 0.95).state == "inconclusive"


def test_values_are_written_out_whatever_their_size() -> None:
    """As the table beside them writes them: 78033, not 7.803e+04."""
    for value, said in ((78032.6, "78033"), (1000.2, "1000"), (120.04, "120")):
        assert judge(taking(value), TTFT, CERTAIN).reasons == (f"ttft:p95:100: {said} misses 100",)


def test_shares() -> None:
    """960 of 1,000 are good where 900 must be: 40 of the 100 that may be bad."""
    runs = [Observation((), good, 500, None) for good in (470, 490)]
    found = judge(runs, SHARE, CERTAIN)
    assert (found.state, found.strain) == ("pass", pytest.approx(0.4))
    assert judge([Observation((), 0, 0, None)], SHARE, CERTAIN).state == "fail"


@pytest.mark.parametrize(("replicas", "why"), [(9, "does not split"), (7, "share bursts"), (8, None)])
def test_a_fleet_s_size_says_why_it_is_not_that_of_the_division(replicas: int, why: str | None) -> None:
    found = FleetSize(35.0, replicas, (), divided=8)
    assert found.to_json()["divided"] == 8
    if why is None or found.note is None:
        assert found.note is why
    else:
        assert f"comes to 8 replicas, as if each had an even share for itself; {replicas} holds" in found.note
        assert why in found.note
        assert found.note in found.to_text()
