"""The face: what a notebook imports, and that it says what the command says."""

from __future__ import annotations

import math
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from matplotlib.figure import Figure

import servecast
from servecast.__main__ import main

TINY = """
schema_version: 1
name: tiny
model: {config: Qwen2.5-0.5B-Instruct}
gpu: {name: l4}
engine: {version: "0.23"}
workload:
  arrivals: {kind: poisson, request_rate: 20}
  num_requests: 60
  prompt_tokens: 64
  output_tokens: 8
slo: ["ttft:p95:100"]
"""
ROUGH: dict[str, Any] = {"tolerance": 0.3, "jobs": 1, "max_requests": 300}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("face") / "tiny.yaml"
    path.write_text(TINY)
    return path


@pytest.fixture(scope="module")
def scenario(tiny: Path) -> servecast.Scenario:
    return servecast.load(tiny)


def test_exported_names() -> None:
    assert servecast.__all__ == sorted(servecast.__all__)
    assert set(servecast.__all__) == {*servecast._MODULES}
    assert set(servecast.__all__) == {
        "Answer",
        "Choices",
        "Effort",
        "InputError",
        "Profile",
        "Run",
        "Scenario",
        "Workers",
        "check",
        "compare",
        "day",
        "explain",
        "gpus",
        "load",
        "models",
        "optimize",
        "plan",
        "profiles",
        "reproduce",
        "simulate",
        "sweep",
    }
    for name in servecast.__all__:
        assert name in dir(servecast)
        public = getattr(servecast, name)
        assert public is getattr(import_module(f"servecast.{servecast._MODULES[name]}"), name)
        assert public.__doc__
    with pytest.raises(AttributeError, match="has no attribute 'simulator'"):
        _ = servecast.simulator


def test_importing_the_face_imports_nothing_behind_it() -> None:
    code = "import sys, servecast; print([name for name in sys.modules if name.startswith('servecast.')])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "[]\n"


def test_the_command_is_a_module_too() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "servecast", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip()


@pytest.fixture(scope="module")
def answer(scenario: servecast.Scenario) -> servecast.Answer:
    return servecast.plan(scenario, **ROUGH)


def test_a_printed_plan_is_what_the_command_prints(
    answer: servecast.Answer,
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["plan", str(tiny), "--tolerance", "0.3", "--max-num-requests", "300", "--jobs", "1"]) == 0
    assert capsys.readouterr().out == f"{answer}\nReport: out/plan-tiny.html\n"


@pytest.mark.slow
def test_so_is_that_of_a_shipped_scenario(tmp_path: Path) -> None:
    code = "import servecast\nprint(servecast.plan(servecast.load('l4-qwen2.5-0.5b'), slo=['ttft:p95:500']))"
    printed = subprocess.check_output([sys.executable, "-c", code], text=True, cwd=tmp_path)
    command = [sys.executable, "-m", "servecast", "plan", "l4-qwen2.5-0.5b", "--slo", "ttft:p95:500"]
    shown = subprocess.check_output(command, text=True, cwd=tmp_path)
    assert shown == f"{printed}Report: out/plan-l4-qwen2.5-0.5b.html\n"


def test_a_plan_can_be_taken_apart(answer: Any, tmp_path: Path) -> None:
    assert isinstance(answer, servecast.Answer)
    assert answer.max_request_rate == answer.interval[0] == answer.to_json()["max_request_rate"]
    assert (answer.state, answer.exit_code) == ("found", 0)
    assert answer.error_band == pytest.approx(0.3 + 0.02 * math.log2(864 / 300))  # two doublings of bandwidth
    assert answer.provenance["basis"] == "kernels of the L40S scaled to the L4 by peak and bandwidth"
    assert isinstance(answer.probes, pd.DataFrame)
    passed = answer.probes[answer.probes["state"] == "pass"]
    assert passed["request_rate"].max() == answer.max_request_rate
    assert (passed["ttft:p95:100"] < 100).all()
    assert isinstance(answer.run, servecast.Run)
    assert isinstance(answer.plot(), Figure)
    page = answer.to_html(tmp_path / "pages" / "plan.html")
    assert "Probed rates" in page.read_text()
    assert "Largest request rate" in answer._repr_html_()
    assert str(answer) == repr(answer) == answer.to_text()


def test_an_slo_that_cannot_be_read_is_told_in_one_message(scenario: servecast.Scenario) -> None:
    with pytest.raises(servecast.InputError, match="'ttft:500' is not an SLO"):
        servecast.plan(scenario, "ttft:500")


def test_progress_is_shown_where_nobody_looks_at_a_terminal(
    scenario: servecast.Scenario, capsys: pytest.CaptureFixture[str]
) -> None:
    servecast.plan(scenario, "ttft:p95:100", **ROUGH, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "\rplan: " in err
    assert err.endswith(f"{' ' * 10}\r")  # the line is wiped


def test_a_what_if_remembers_what_was_changed(scenario: servecast.Scenario) -> None:
    other = scenario.changed({"engine.max_num_seqs": 2}, seed=3).changed({"gpu.name": "h100"})
    assert other.changes == {"engine.max_num_seqs": 2, "seed": 3, "gpu.name": "h100"}
    assert (other.engine.max_num_seqs, other.seed, other.gpu.name) == (2, 3, "h100")
    assert (scenario.changes, scenario.engine.max_num_seqs) == ({}, None)
    assert servecast.simulate(other).to_json()["what_if"] == other.changes
    with pytest.raises(servecast.InputError, match="Did you mean 'max_num_seqs'"):
        scenario.changed({"engine.max_num_seq": 2})


def test_a_simulation_has_its_tables(
    scenario: servecast.Scenario, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = servecast.simulate(scenario, request_rate=10, num_requests=40)
    assert len(found.requests) == found.to_json()["completed"] == 40
    assert found.steps["emitted"].sum() == 40 * 8
    assert found.error_band == pytest.approx(0.33, abs=0.01)
    assert isinstance(found.plot(), Figure)
    assert main(["simulate", str(tiny), "--request-rate", "10", "--num-requests", "40"]) == 0
    assert capsys.readouterr().out == f"{found}\n"


def test_scenarios_compare(scenario: servecast.Scenario, tmp_path: Path) -> None:
    faster = scenario.changed({"gpu.name": "h100"})
    found = servecast.compare(scenario, faster, seeds=2, jobs=1)
    assert found.table.labels == ("tiny", "gpu.name=h100")
    assert "FLOP/s, bandwidth and memory" in str(found)
    page = found.to_html(tmp_path / "comparison.html").read_text()
    for words in ("tiny against gpu.name=h100", "<svg", "What differs between the runs", "median_ttft_ms"):
        assert words in page
    with pytest.raises(servecast.InputError, match="nothing to compare with"):
        servecast.compare(scenario)


def test_routers_compare(scenario: servecast.Scenario, tmp_path: Path) -> None:
    fleet = scenario.changed({"fleet.replicas": 2})
    found = servecast.compare(fleet, routers=["round_robin", "least_outstanding"], seeds=1, jobs=1)
    assert found.routers is not None
    assert found.to_json()["labels"] == ("round_robin", "least_outstanding")
    assert "Places" in found.to_html(tmp_path / "routers.html").read_text()


def test_a_sweep_is_a_table(scenario: servecast.Scenario, tmp_path: Path) -> None:
    swept = servecast.sweep(scenario, {"engine.max_num_seqs": [1, 8]}, out=tmp_path / "sweep", jobs=1)
    assert swept.table["engine.max_num_seqs"].tolist() == [1, 8]
    assert (swept.exit_code, swept.failed, len(swept.documents)) == (0, 0, 2)
    assert "2 cells, 0 were there already, 0 failed" in str(swept)


def test_a_reproduction_and_a_check_are_answers(tmp_path: Path) -> None:
    scenario = servecast.load("l4-qwen2.5-0.5b")
    found = servecast.reproduce(scenario, seeds=1)
    assert isinstance(found, servecast.Answer)
    assert "mean error, predicted" in str(found)
    checked = servecast.check(scenario, predict=False)
    assert checked.to_json() == servecast.check("l4-qwen2.5-0.5b", predict=False).to_json()
    assert "rules)" in str(checked)
    table = tmp_path / "report.csv"
    table.write_text("concurrency,ttft_p50_ms,ttft_p95_ms\n1,20,10\n")
    assert servecast.check(table, gpu="l4", model_config="Qwen2.5-0.5B-Instruct").exit_code == 1
