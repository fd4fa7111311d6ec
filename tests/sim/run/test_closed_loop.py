"""A closed loop of a duration: it sends until then, and its rates are those of its steady middle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from small_scenarios import small

import servecast

LOOP: dict[str, Any] = {
    "arrivals": {"kind": "closed_loop", "concurrency": 8},
    "duration_s": 60,
    "prompt_tokens": 64,
    "output_tokens": {"kind": "uniform", "tokens": 200, "range_ratio": 0.5},
}


def test_it_sends_until_its_end_and_littles_law_holds_in_the_middle(tmp_path: Path) -> None:
    found = servecast.simulate(small(tmp_path, workload=LOOP))
    requests = found.requests
    assert 59 < requests["sent"].max() < 60
    assert requests["finish"].max() > 60
    assert (requests["status"] == "finished").all()
    in_flight = found.result["request_throughput"] * found.result["mean_e2el_ms"] / 1000
    assert in_flight == pytest.approx(8, rel=0.01)
    assert "rates are those of the steady middle" in found.result["notes"][-1]


def test_a_loop_that_needs_more_requests_than_were_drawn_first_gets_them(tmp_path: Path) -> None:
    short = LOOP | {"output_tokens": 2, "arrivals": {"kind": "closed_loop", "concurrency": 32}}
    requests = servecast.simulate(small(tmp_path, workload=short | {"duration_s": 20})).requests
    assert len(requests) > 1024
    assert requests["sent"].max() > 19.5


def test_a_sweep_may_have_levels_of_a_duration(tmp_path: Path) -> None:
    levels = [{"concurrency": n, "duration_s": 20} for n in (2, 8)]
    workload = {key: value for key, value in LOOP.items() if key not in ("arrivals", "duration_s")}
    stages = servecast.simulate(small(tmp_path, workload=workload, sweep={"levels": levels})).result["stages"]
    for stage, clients in zip(stages, (2, 8), strict=True):
        in_flight = stage["request_throughput"] * stage["mean_e2el_ms"] / 1000
        assert in_flight == pytest.approx(clients, rel=0.05)
