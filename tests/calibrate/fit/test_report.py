"""A fit to a few rows of a report finds what made them, as far as they tell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from small_scenarios import small

from servecast.calibrate.cli import app
from servecast.calibrate.fit import report as from_report
from servecast.calibrate.fit.report import fit_report
from servecast.sim.hardware.front_end_costs import FrontEndCosts
from servecast.sim.hardware.noise import StepNoise
from servecast.sim.hardware.profile import Profile
from servecast.sim.hardware.step_time.physical import Efficiencies
from servecast.sim.inputs.errors import InputError
from servecast.sim.reproduce.reproduce import reproduce
from servecast.sim.scenario.deployment import Deployment
from servecast.sim.scenario.reported import FitStep
from servecast.sim.scenario.scenario import Scenario, load

COLUMNS = {
    "output_tok_s": {"metric": "output_throughput", "unit": "tok/s"},
    "ttft_p50_ms": {"metric": "ttft", "statistic": "p50", "unit": "ms"},
    "itl_p50_ms": {"metric": "itl", "statistic": "p50", "unit": "ms"},
    "e2e_p95_ms": {"metric": "e2el", "statistic": "p95", "unit": "ms"},
}
LEVELS = (1, 4, 16, 48)
TRUTH = {
    "efficiencies": Efficiencies(bandwidth=0.7, compute=0.5, host_fixed_s=1e-3, host_per_seq_s=2e-5),
    "front_end": FrontEndCosts(request_s=4e-3, latency_s=5e-3, token_s=2e-5),
    "noise": StepNoise(cv=0.08),
}


def write_scenario(folder: Path, cells: dict[int, dict[str, float]], fit_rows: list[int]) -> Scenario:
    table = folder / "table.csv"
    lines = [",".join(["concurrency", *COLUMNS])]
    lines += [",".join(str(v) for v in (level, *(row[c] for c in COLUMNS))) for level, row in cells.items()]
    table.write_text("\n".join(lines) + "\n")
    return small(
        folder,
        name="made",
        engine={"version": "0.23", "max_model_len": 2048},
        workload={"prompt_tokens": 200, "output_tokens": 24},
        sweep={"levels": [{"concurrency": level, "num_requests": 3 * level + 9} for level in LEVELS]},
        reported=[
            {
                "table": "table.csv",
                "keys": ["concurrency"],
                "columns": COLUMNS,
                "fit_rows": [{"concurrency": level} for level in fit_rows],
            }
        ],
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Scenario:
    """A scenario whose reported table is what the true profile gives."""
    folder = tmp_path_factory.mktemp("made")
    ones = {level: dict.fromkeys(COLUMNS, 1.0) for level in LEVELS}
    blank = write_scenario(folder, ones, [1, 48])
    truth = Profile.typical("L4", "m", "0.23", servecast_version="0").model_copy(update=TRUTH)
    table = reproduce(blank, seeds=4, profile=truth).tables[0]
    cells = {
        level: {c.metric: c.predicted for c in table.cells if c.keys == {"concurrency": level}}
        for level in LEVELS
    }
    return write_scenario(folder, cells, [1, 48])


@pytest.mark.slow
def test_a_fit_to_two_rows_predicts_the_rows_between(made: Scenario) -> None:
    profile = fit_report(made, max_evaluations=8).profile
    table = reproduce(made, seeds=4, profile=profile).tables[0]
    errors = table.mape_predicted
    assert errors["output_tok_s"] < 4
    assert errors["itl_p50_ms"] < 4
    assert errors["e2e_p95_ms"] < 6
    assert errors["ttft_p50_ms"] < 15
    assert profile.error_band is not None
    assert profile.domain.batch == (1.0, 48.0)
    assert profile.fitted_rows == ("{'concurrency': 1}", "{'concurrency': 48}")
    told = {"efficiencies.attention_seq_s", "front_end.prompt_token_s"}  # which move these cells
    fitted = {entry.parameter for entry in profile.provenance if entry.origin == "fitted"}
    assert fitted == {*from_report.PARAMETERS, *told}


def test_what_the_rows_do_not_tell_stays_typical(made: Scenario) -> None:
    """No step of this row waits for the client: its costs stay within their prior."""
    everything = in_steps(made, *from_report.PARAMETERS, level=48, columns=tuple(COLUMNS))
    profile = fit_report(everything, max_evaluations=3).profile
    typical = from_report.PARAMETERS["front_end.client_token_s"].typical
    assert profile.front_end.client_token_s == pytest.approx(typical, rel=1.5)


def in_steps(
    made: Scenario, *parameters: str, level: int = 1, columns: tuple[str, ...] = ("itl_p50_ms",)
) -> Scenario:
    step = FitStep(rows=({"concurrency": level},), parameters=parameters, columns=columns, max_evaluations=4)
    return made.model_copy(update={"reported": (made.reported[0].model_copy(update={"fit_steps": (step,)}),)})


def test_a_step_moves_only_its_parameters(made: Scenario) -> None:
    """Gaps at concurrency 1 are the truth's 0.7 of the bandwidth, not the typical 0.88."""
    profile = fit_report(in_steps(made, "efficiencies.bandwidth")).profile
    fitted = [entry.parameter for entry in profile.provenance if entry.origin == "fitted"]
    assert fitted == ["efficiencies.bandwidth"]
    assert profile.efficiencies.bandwidth < 0.8
    assert profile.efficiencies.compute == Efficiencies().compute
    assert profile.error_band is None  # one row leaves none to predict it


def test_rows_of_long_contexts_tell_the_bandwidth_of_the_kv_cache(tmp_path: Path) -> None:
    """16 decodes of Qwen2.5-0.5B at 1,900 tokens read 0.4 GB of KV and 1 GB of weights; one at 200 reads next
    to no KV."""
    cells = {level: dict.fromkeys(COLUMNS, 1.0) for level in LEVELS}
    for tokens, told in ((1800, True), (200, False)):
        scenario = write_scenario(tmp_path, cells, [16 if told else 1])
        scenario = scenario.changed({"workload.prompt_tokens": tokens, "workload.output_tokens": 200})
        base = Deployment.of(scenario)
        typical = from_report.cells_of(scenario, scenario.reported[0], from_report._profile(base, {}))
        name = "efficiencies.kv_bandwidth"
        found = from_report._tells(scenario, scenario.reported[0], base, typical, name, 1)
        assert found == told


def test_an_interrupted_fit_keeps_the_best_so_far(made: Scenario, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted in its fourth simulation: a profile comes of it, without a band, and what it costs at most
    was said in advance."""
    calls, said = [], []
    real = from_report.cells_of

    def stops(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(from_report, "cells_of", stops)
    found = fit_report(in_steps(made, "efficiencies.bandwidth"), progress=said.append)
    assert found.profile.error_band is None
    assert found.profile.efficiencies.bandwidth < 1
    assert said[0].startswith("at most 8 simulations of the rows")
    assert said[-1].startswith("stopped")


def test_a_step_of_an_unknown_parameter_is_refused(made: Scenario) -> None:
    with pytest.raises(InputError, match=r"no parameter .efficiencies\.bandwith. to fit.*bandwidth"):
        fit_report(in_steps(made, "efficiencies.bandwith"))


def test_a_scenario_without_rows_to_fit_is_refused(made: Scenario) -> None:
    bare = made.model_copy(update={"reported": (made.reported[0].model_copy(update={"fit_rows": ()}),)})
    with pytest.raises(InputError, match="no rows to fit"):
        fit_report(bare)


def test_show_names_origin_and_domain(capsys: pytest.CaptureFixture[str]) -> None:
    path = load("l4-qwen2.5-0.5b").profile_file()
    app(["show", str(path)], result_action="return_value")
    out = capsys.readouterr().out
    assert "efficiencies.bandwidth" in out
    assert "fitted: to a report" in out
    assert "domain batch" in out
    assert "error band +-" in out
