"""A day by the hour, worked by hand, and what sizes and autoscalers make of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from small_scenarios import TINY, scenario_file, small

from servecast.__main__ import main
from servecast.sim.inputs.errors import InputError
from servecast.sim.inputs.schema import parse
from servecast.sim.metrics.periods import by_period, split
from servecast.sim.metrics.records import STEP_COLUMNS, Run
from servecast.sim.metrics.slo import Goodput
from servecast.sim.plan.day import day
from servecast.sim.run.simulate import simulate
from servecast.sim.traffic.arrivals import Extent, Profile


def profile(**fields: Any) -> Profile:
    return parse(Profile, {"kind": "profile", "period_s": 100.0, **fields}, source="test")


def times(law: Profile, seed: int = 0, **extent: Any) -> Any:
    return law.times(
        Extent(extent.get("num_requests"), extent.get("duration_s")), np.random.default_rng(seed)
    )


def test_a_profile_has_its_rate_in_each_period_and_begins_anew() -> None:
    law = profile(rates=[0, 30, 10])
    counts = np.histogram(times(law, duration_s=650.0), bins=np.arange(0, 701, 100))[0]
    expected = np.array([0, 3000, 1000, 0, 3000, 1000, 0])
    assert (np.abs(counts - expected) < 4 * np.sqrt(np.maximum(expected, 1))).all()
    assert times(law).max() < 300
    assert len(times(law, num_requests=17)) == 17


def test_a_profile_is_stretched_to_a_mean_rate_with_the_same_gaps() -> None:
    slow, fast = (
        times(profile(rates=[1, 3]), num_requests=200),
        times(profile(rates=[1, 3], request_rate=4.0), num_requests=200),
    )
    assert (fast[fast < 100] * 2)[:10] == pytest.approx(slow[:10])


def hand_made() -> Run:
    """Three requests: two in the first hour, of which one is slow, one in the third."""
    requests = pd.DataFrame(
        {
            "arrival": [0.0, 3599.0, 7200.0],
            "sent": [0.0, 3599.0, 7200.0],
            "first_token": [0.1, 3601.0, 7200.3],
            "finish": [1.1, 3602.0, 7201.3],
            "prompt_tokens": [36, 72, 18],
            "output_tokens": [11, 11, 11],
            "status": ["finished"] * 3,
        }
    )
    steps = pd.DataFrame(0.0, index=range(3), columns=list(STEP_COLUMNS))
    steps["start"], steps["duration"] = [0.0, 3600.0, 7200.0], [360.0, 720.0, 36.0]
    steps["running"], steps["kv_usage"] = [1.0, 2.0, 10.0], [0.5, 0.1, 1.0]
    return Run(requests, steps, pd.DataFrame(columns=["stage", "gap", "weight"]), ["all"], {})


def test_periods_by_hand() -> None:
    """Replica 0 is there for three hours, replica 1 from half past one to half past two."""
    parts = split(hand_made(), 3600.0, 10800.0)
    found = by_period(hand_made(), parts, Goodput.parse("ttft:500"), [(0, 10800), (5400, 9000)], 3600.0)
    assert found["requests"].tolist() == [2, 0, 1]
    assert found["request_rate"].tolist() == [2 / 3600, 0, 1 / 3600]
    assert found["prompt_tokens_per_s"].tolist() == [108 / 3600, 0, 18 / 3600]
    assert found["median_ttft_ms"].tolist()[::2] == pytest.approx([1050, 300])
    assert found["p95_tpot_ms"].tolist()[::2] == pytest.approx([100, 100])
    assert found["good"].tolist()[::2] == [0.5, 1.0]
    assert found["running"].tolist() == pytest.approx([0.1, 0.4, 0.1])
    assert found["kv_usage"].tolist() == pytest.approx([0.05, 0.02 / 1.5, 0.01 / 1.5])
    assert found["replicas"].tolist() == [1.0, 1.5, 1.5]


DAY: dict[str, Any] = {
    "workload": {
        "arrivals": {"kind": "profile", "rates": [5, 60, 5], "period_s": 60},
        "prompt_tokens": 400,
        "output_tokens": 60,
    },
    "engine": {"version": "0.23", "max_num_seqs": 16},
    "slo": ["ttft:p95:300"],
    "gpu_hour_cost": 2.0,
}


def test_a_day_is_the_run_that_simulate_makes_of_it(tmp_path: Path) -> None:
    scenario = small(tmp_path, **DAY)
    found, run = day(scenario, period_s=60.0), simulate(scenario)
    (fleet,) = found.fleets
    arrival, ttft = run.requests["arrival"], run.requests["first_token"] - run.requests["sent"]
    for number, row in enumerate(fleet.hours.to_dict("records")):
        inside = (arrival >= 60 * number) & (arrival < 60 * number + 60)
        assert row["requests"] == inside.sum()
        assert row["p95_ttft_ms"] == pytest.approx(1000 * np.percentile(ttft[inside], 95))
        assert row["good"] == pytest.approx((ttft[inside] <= 0.3).mean())
    seconds = run.steps["duration"]
    busy = (run.steps["running"] * seconds).sum() / 180
    assert fleet.hours["running"].mean() == pytest.approx(busy, rel=0.02)
    assert fleet.totals["GPU_hours"] == pytest.approx(180 / 3600)
    assert fleet.totals["cost"] == pytest.approx(0.1)


def test_a_day_of_one_period_costs_that_period(tmp_path: Path) -> None:
    one = DAY["workload"] | {"arrivals": {"kind": "profile", "rates": [5], "period_s": 90}}
    (fleet,) = day(small(tmp_path, **DAY | {"workload": one}), period_s=90.0).fleets
    assert fleet.totals["GPU_hours"] == pytest.approx(90 / 3600)
    assert fleet.totals["cost"] == pytest.approx(2 * 90 / 3600)


def test_a_price_is_that_of_the_scenarios_own_gpu(tmp_path: Path) -> None:
    own = small(tmp_path, **DAY)
    other = own.changed({"gpu.name": "H100"})
    assert (own.gpu_price, other.gpu_price, other.changed(gpu_hour_cost=3.0).gpu_price) == (2.0, None, 3.0)
    assert "gpu_hour_cost 2 is not the other GPU's: set it for what that costs" in other.notes


def test_sizes_are_the_fewest_replicas_that_keep_the_objectives(tmp_path: Path) -> None:
    """By trying each number of replicas in turn, on the same sample."""
    scenario = small(tmp_path, **DAY)
    found = day(scenario, period_s=60.0, size=True)
    assert found.sizes is not None
    assert found.sizes[0] == found.sizes[2] == 1
    needed = found.sizes[1]
    assert needed is not None
    assert needed > 1
    for replicas, kept in ((needed - 1, False), (needed, True)):
        sampled = day(scenario.changed({"fleet.replicas": replicas}), period_s=60.0, sample_s=60.0)
        assert sampled.fleets[0].hours["met"].tolist()[1] is kept


def test_an_autoscaler_pays_for_less_than_its_most_and_more_than_its_least(tmp_path: Path) -> None:
    scaler = {"kind": "keda", "metric": "in_flight", "threshold": 10, "max_replicas": 4, "startup_s": 2}
    scaler |= {"sync_period_s": 5, "scrape_interval_s": 5, "scale_down": {"stabilization_window_s": 10}}
    fleets = {"one": {}, "keda": {"fleet.autoscaler": scaler, "fleet.router": "least_outstanding"}}
    found = day(small(tmp_path, **DAY), fleets, period_s=60.0)
    one, keda = (fleet.totals for fleet in found.fleets)
    assert one["requests"] == keda["requests"]
    assert one["GPU_hours"] < keda["GPU_hours"] < 4 * one["GPU_hours"]
    assert keda["good"] > one["good"]
    assert max(count for _, count in found.fleets[1].changes) == keda["most"] <= 4
    found.to_html(tmp_path / "day.html")
    assert "Replicas asked for" in (tmp_path / "day.html").read_text("utf-8")
    assert "keda" in found.to_text()


@pytest.mark.parametrize(
    ("sections", "options", "what"),
    [
        ({}, {"period_s": 0.0}, "periods of 0 s"),
        ({}, {"period_s": 60.0, "sample_s": 90.0}, "samples of 90.0 s"),
        ({"slo": []}, {"size": True}, "no objective to size for"),
        ({"slo": ["itl:p95:50"]}, {}, "an objective of single times between tokens"),
        ({"workload": {"stages": [{"streams": [TINY["workload"]]}] * 2}}, {}, "a day of several stages"),
        ({"fleet": {"autoscaler": {"kind": "wva", "max_replicas": 2}}}, {"sample_s": 9.0}, "an autoscaler"),
        (
            {"workload": TINY["workload"] | {"sessions": {"turns": 2}}},
            {"sample_s": 9.0},
            "samples of traffic that waits for answers",
        ),
    ],
)
def test_what_is_no_day_is_refused(
    tmp_path: Path, sections: dict[str, Any], options: dict[str, Any], what: str
) -> None:
    with pytest.raises(InputError) as error:
        day(small(tmp_path, **(DAY | sections)), **options)
    assert what in str(error.value)


@pytest.mark.parametrize(
    ("fleets", "what"),
    [
        (["none.yaml"], "'none.yaml' is no number of replicas, and no file"),
        (["0"], "'0' is no number of replicas"),
        (["2", "3", "2"], "2 replicas comes twice"),
        (["odd.yaml"], "odd.yaml: not a mapping of fields"),
        (["vpa.yaml"], "'vpa' is not a known kind"),
    ],
)
def test_what_is_no_fleet_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    fleets: list[str],
    what: str,
) -> None:
    scenario_file(tmp_path, **DAY)
    (tmp_path / "odd.yaml").write_text("[1]")
    (tmp_path / "vpa.yaml").write_text("{kind: vpa, max_replicas: 2}")
    monkeypatch.chdir(tmp_path)
    asked = [word for fleet in fleets for word in ("--fleets", fleet)]
    assert main(["day", "tiny.yaml", *asked]) == 2
    assert what in capsys.readouterr().err
    assert main(["day", "tiny.yaml", "--replicas", "3", "--fleets", "2"]) == 2
    assert "--replicas: --replicas 3 beside fleets" in capsys.readouterr().err


@pytest.mark.parametrize("rates", [[], [0, 0], [-1, 2]])
def test_what_is_no_profile_is_refused(tmp_path: Path, rates: list[float]) -> None:
    workload = DAY["workload"] | {"arrivals": {"kind": "profile", "rates": rates}}
    with pytest.raises(InputError, match="rates"):
        small(tmp_path, workload=workload)
