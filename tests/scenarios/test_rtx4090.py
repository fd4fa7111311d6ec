"""Llama-3.1-8B on an RTX 4090: kernels timed one by one, against a real run of the engine."""

from __future__ import annotations

import csv
from functools import cache

import numpy as np
import pandas as pd
import pytest
from places import DATA

from servecast.calibrate.fit.layers import fit_layers
from servecast.scenarios.make.recorded_run import fit_host, read_run, table_of
from servecast.sim.hardware.profile import Profile
from servecast.sim.metrics.metrics import latencies
from servecast.sim.metrics.records import Run
from servecast.sim.reproduce.reproduce import reproduce
from servecast.sim.reproduce.reproduction import TableReproduction
from servecast.sim.run.simulate import simulate
from servecast.sim.scenario.deployment import Deployment
from servecast.sim.scenario.scenario import load
from servecast.sim.traffic.trace_spec import TraceSpec

FOLDER = DATA / "rtx4090_llama8b"
SCENARIO = load("rtx4090-llama-3.1-8b")
BARS = {"makespan": 3, "e2e_mean": 3, "tpot_mean": 3, "ttft_mean": 5, "_p99": 8}  # percent
# 1.5 is the largest error of any cell when this was written: a change that costs accuracy should be seen
REACHED = 2.0


@cache
def reproduced(kind: str = "physical") -> TableReproduction:
    return reproduce(SCENARIO, seeds=1, profile=profile(kind)).tables[0]


@cache
def profile(kind: str) -> Profile:
    """The shipped profile, or the tables themselves with the same host time."""
    path = SCENARIO.profile_file()
    assert path is not None
    shipped = Profile.load(path)
    if kind == "physical":
        return shipped
    tables = fit_layers(FOLDER / "profile", SCENARIO, kind="layers")
    return tables.model_copy(update={"efficiencies": shipped.efficiencies})


@cache
def fitted_to_the_tables() -> Profile:
    return fit_layers(FOLDER / "profile", SCENARIO)


@cache
def real() -> Run:
    workload = SCENARIO.workload
    assert workload is not None
    assert isinstance(workload.trace, TraceSpec)
    return read_run(FOLDER / "run", workload.trace.path)


@cache
def simulated() -> Run:
    return simulate(SCENARIO)


@pytest.mark.parametrize("requests", ["all", "last-240"])
def test_predictions_are_within_the_bars(requests: str) -> None:
    cells = {cell.metric: cell for cell in reproduced().cells if cell.keys == {"requests": requests}}
    assert all(cell.used == "predicted" for cell in cells.values())
    errors = {name: abs(100 * (cell.error or 0.0)) for name, cell in cells.items()}
    checked = [
        (name, error, limit) for name, error in errors.items() for part, limit in BARS.items() if part in name
    ]
    assert len(checked) == 7
    assert [each for each in checked if each[1] > each[2]] == []
    assert max(errors.values()) < REACHED, errors


def test_the_first_requests_are_said_to_be_fitted() -> None:
    assert reproduced().rows("fit") == [{"requests": "first-60"}]


def test_the_tables_themselves_predict_the_run_as_well() -> None:
    """With the host time that was fitted for the other kind: nothing of the run is fitted anew."""
    cells = [cell for cell in reproduced("layers").cells if cell.used == "predicted"]
    for part, limit in BARS.items():
        errors = [100 * abs(cell.error or 0.0) for cell in cells if part in cell.metric]
        assert max(errors) < limit, part


def test_without_anything_of_the_run_the_means_hold() -> None:
    """Kernel times and typical host times on a warm engine: nothing is fitted to any request."""
    kernels = fitted_to_the_tables()
    warm = load("rtx4090-llama-3.1-8b", {"fleet.cold_start_s": 0.0})
    cells = reproduce(warm, seeds=1, profile=kernels).tables[0].cells
    errors = {cell.metric: 100 * abs(cell.error or 0.0) for cell in cells if cell.keys == {"requests": "all"}}
    assert all(errors[name] < 3 for name in ("makespan_s", "e2e_mean_ms", "tpot_mean_ms", "ttft_mean_ms"))


def test_ttft_of_the_first_twenty_requests() -> None:
    """There TTFT is prefill and a short queue, not the long one that all later requests share."""
    measured, predicted = (latencies(run.requests)["ttft"][:20] for run in (real(), simulated()))
    assert predicted.mean() == pytest.approx(measured.mean(), rel=0.15)
    assert predicted[0] == pytest.approx(measured[0], rel=0.15)


@pytest.mark.parametrize(
    ("column", "recorded", "scale"),
    [("running", "running", 1), ("waiting", "waiting", 1), ("kv_usage", "kv_cache_pct", 100)],
)
def test_running_waiting_and_kv_usage_second_by_second(column: str, recorded: str, scale: float) -> None:
    seen = pd.read_csv(FOLDER / "run" / "timeseries.csv")
    steps = simulated().steps
    ends = (steps["start"] + steps["duration"]).iloc[-1]
    at = np.searchsorted(steps["start"], seen["t"], side="right") - 1
    predicted = np.where(seen["t"] > ends, 0.0, scale * steps[column].to_numpy()[at])
    difference = np.abs(predicted - seen[recorded]).mean() / seen[recorded].max()
    assert difference < 0.025  # the bar is 0.05


def test_the_shipped_parameters_are_those_that_the_data_gives() -> None:
    shipped, fitted = profile("physical"), fitted_to_the_tables()
    told = [entry.parameter.partition(".")[2] for entry in fitted.provenance if entry.origin == "fitted"]
    assert len(told) == 7
    for name in told:
        value = getattr(shipped.efficiencies, name)
        assert value == pytest.approx(getattr(fitted.efficiencies, name), rel=1e-3), name
    assert shipped.raw_data_sha256 == fitted.raw_data_sha256
    host = fit_host(SCENARIO, fitted, real())
    assert shipped.efficiencies.host_fixed_s == pytest.approx(host.host_fixed_s, rel=0.02)
    assert SCENARIO.fleet.cold_start_s == pytest.approx(host.cold_start_s, rel=0.02)


def test_the_shipped_profile_holds_no_measured_times() -> None:
    shipped = profile("physical")
    assert shipped.layers is None
    assert shipped.grid is None


def test_the_reported_table_is_that_of_the_data() -> None:
    reported = SCENARIO.reported[0]
    with reported.table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows == table_of(real(), reported, Deployment.of(SCENARIO))
