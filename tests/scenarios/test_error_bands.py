"""The stated error bands against the errors of the shipped reproductions, groups of runs left out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from servecast.scenarios.make.error_bands import FITTED, Error, band, by_kind, errors, left_out, read, widest
from servecast.sim.hardware import error_band
from servecast.sim.hardware.error_band import Bands

FOUND = list(errors(read(Path(__file__).parents[2] / "docs" / "results")))


def kinds(basis: str, metric: str) -> dict[str, dict[str, list[float]]]:
    return by_kind(each for each in FOUND if (each.basis, each.metric) == (basis, metric))


def test_a_band_is_what_nine_in_ten_errors_keep_and_groups_count_alike() -> None:
    """Nine errors of 0.1 and one of 0.5; and the same beside a hundred of 0.2 in another group."""
    few = [0.1] * 9 + [0.5]
    assert band({"a": few}) == 0.1
    assert band({"a": few, "b": [0.2] * 100}) == 0.2


def test_a_group_left_out_is_judged_by_the_others() -> None:
    """By the worst precision of them."""
    assert left_out({"": {"a": [0.1, 0.1], "b": [0.1, 0.4]}}) == {"a": 1.0, "b": 0.5}
    assert left_out({"fp8": {"a": [0.1], "b": [0.1]}, "bf16": {"c": [0.4]}}) == {"a": 1.0, "b": 1.0, "c": 0.0}


@pytest.mark.parametrize(("metric", "share"), [("tpot", 0.9), ("ttft", 0.85), ("throughput", 0.85)])
def test_runs_that_were_left_out_lie_inside(metric: str, share: float) -> None:
    """Of ten groups of real servers, each predicted by kernel timings alone and judged by the band of the
    others."""
    of = kinds("kernel timings", metric)
    runs = {name: len(own) for groups in of.values() for name, own in groups.items()}
    assert (len(runs), sum(runs.values())) == (10, 195)
    assert sum(inside * runs[name] for name, inside in left_out(of).items()) / 195 >= share


@pytest.mark.parametrize("metric", ["tpot", "ttft", "throughput"])
def test_mixtures_of_experts_that_were_left_out_lie_inside(metric: str) -> None:
    """Eight groups of gpt-oss, Kimi, MiniMax and Qwen3-235B, a row for each of 119 settings; those with
    several cores are told apart."""
    of = kinds("kernel timings, experts", metric)
    runs = {name: len(own) for groups in of.values() for name, own in groups.items()}
    assert (len(runs), sum(runs.values())) == (8, 119)
    assert sum(inside * runs[name] for name, inside in left_out(of).items()) / 119 >= 0.85
    assert widest(of) <= getattr(error_band.KERNELS_MOE, metric) <= 1.6 * widest(of)


@pytest.mark.parametrize("metric", ["tpot", "ttft", "throughput"])
def test_the_stated_band_is_no_narrower_than_the_errors(metric: str) -> None:
    worst, stated = widest(kinds("kernel timings", metric)), getattr(error_band.KERNELS, metric)
    assert worst <= stated <= 1.6 * worst  # nor made safe by being wide


def test_the_band_of_ttft_of_fitted_profiles_holds_nine_in_ten() -> None:
    values = np.concatenate([np.asarray(own) for own in kinds("fitted", "ttft")[""].values()])
    assert np.mean(values <= error_band.FITTED_TTFT) >= 0.9


def test_no_metric_but_throughput_speaks_of_e2e() -> None:
    bands = Bands(tpot=0.1, ttft=0.5, throughput=0.2)
    assert [bands.of(metric) for metric in ("tpot", "ttft", "e2el", "success")] == [0.1, 0.5, 0.2, None]


def test_guesses_are_marked() -> None:
    bands = Bands(tpot=0.1, ttft=None, throughput=0.2, max_rate=0.3, guessed=("max_rate",))
    assert bands.to_text() == "TPOT +-10%, throughput +-20%, largest rate +-30%?"
    assert Bands().to_text() == "not known"


def test_an_error_of_a_table_without_a_band_is_not_counted() -> None:
    """Shares and percentiles have none."""
    cells = [
        {"metric": metric, "used": "predicted", "error_pct": -10.0}
        for metric in ("goodput_pct", "ttft_p95_s", "ttft_p50_s")
    ]
    document = {"scenario": "one", "provenance": {"basis": FITTED}, "rows": cells, "tables": {}}
    assert list(errors([document])) == [Error("fitted", "", "one", "ttft", 0.1)]
