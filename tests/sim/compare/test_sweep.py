"""Sweeps: the same bytes from every backend, resumable, never a stale cell."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from small_scenarios import open_loop, scenario_file

from servecast.__main__ import main
from servecast.sim.compare.sweep import Cell, grid
from servecast.sim.scenario.scenario import shipped_folder

GRID = ("--vary", "engine.max_num_seqs=2,64", "--rates", "5,40", "--seeds", "2", "--num-requests", "100")


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def sweep(capsys: pytest.CaptureFixture[str], scenario: str, out: Path, *options: str) -> dict[str, Any]:
    assert main(["sweep", scenario, "--out", str(out), "--json", *options]) == 0
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    return document


@pytest.fixture
def dask_scheduler(tmp_path: Path) -> Iterator[str]:
    """A scheduler and two workers, each a process of its own, on ports that the system chooses."""
    contact = tmp_path / "scheduler.json"
    python = [sys.executable, "-m"]
    scheduler = [*python, "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", "0"]
    worker = [*python, "distributed.cli.dask_worker", "--host", "127.0.0.1", "--nthreads", "1", "--no-nanny"]
    shared = ["--scheduler-file", str(contact), "--no-dashboard"]
    commands = [[*scheduler, *shared], [*worker, *shared], [*worker, *shared]]
    log = (tmp_path / "dask.log").open("w")
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for command in commands:
            processes.append(subprocess.Popen(command, stdout=log, stderr=log, cwd=tmp_path))
            wait_for(contact.exists, processes)
        yield json.loads(contact.read_text())["address"]
    finally:
        for process in reversed(processes):  # a worker that loses its scheduler would wait for it
            process.kill()
            process.wait()
        log.close()


def wait_for(condition: Any, processes: list[subprocess.Popen[bytes]], seconds: float = 600) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in processes)
        time.sleep(0.02)


def test_loky_gives_the_bytes_of_a_serial_sweep(
    tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = sweep(capsys, tiny, tmp_path / "serial", *GRID, "--jobs", "1")
    assert (found["cells"], found["failed"], len(found["rows"])) == (8, 0, 8)
    sweep(capsys, tiny, tmp_path / "loky", *GRID, "--jobs", "2")
    assert files(tmp_path / "loky") == files(tmp_path / "serial")
    assert len(files(tmp_path / "serial")) == 9  # a file a cell, and the summary


def test_dask_gives_the_bytes_of_a_serial_sweep(
    tiny: str, tmp_path: Path, dask_scheduler: str, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep(capsys, tiny, tmp_path / "serial", *GRID, "--jobs", "1")
    options = ("--backend", "dask", "--dask-scheduler", dask_scheduler)
    found = sweep(capsys, tiny, tmp_path / "dask", *GRID, *options)
    assert (found["cells"], found["failed"]) == (8, 0)
    assert files(tmp_path / "dask") == files(tmp_path / "serial")


def test_resume_after_a_kill_runs_only_the_rest(
    tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--rates", "5,10,20,40", "--seeds", "3", "--num-requests", "1500", "--jobs", "1")
    out = tmp_path / "killed"
    command = [sys.executable, "-c", "import sys; from servecast.__main__ import main; sys.exit(main())"]
    process = subprocess.Popen([*command, "sweep", tiny, "--out", str(out), *options])
    wait_for(lambda: len(list(out.glob("*.json"))) >= 2, [process])
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = {path: path.stat().st_mtime_ns for path in out.glob("*.json")}
    assert 2 <= len(kept) < 12
    assert not (out / "summary.csv").exists()

    found = sweep(capsys, tiny, out, *options, "--resume")
    assert found["reused"] == len(kept)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    whole = tmp_path / "whole"
    sweep(capsys, tiny, whole, *options)
    assert {name: content for name, content in files(out).items() if not name.startswith(".")} == files(whole)


def test_resume_reuses_nothing_of_a_changed_scenario(
    tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.json"
    shipped = (shipped_folder() / "models" / "Qwen2.5-0.5B-Instruct.json").read_text()
    config.write_text(shipped)
    out, options = tmp_path / "out", ("--jobs", "1", "--resume", "--model-config", str(config))
    two = (*options, "--seeds", "2")
    assert sweep(capsys, tiny, out, *two)["reused"] == 0
    assert sweep(capsys, tiny, out, *two)["reused"] == 2
    scenario_file(tmp_path, workload=open_loop(20, 60, 64, 9))
    assert sweep(capsys, tiny, out, *two)["reused"] == 0
    config.write_text(shipped.replace('"num_hidden_layers": 24', '"num_hidden_layers": 12'))
    assert config.read_text() != shipped
    assert sweep(capsys, tiny, out, *two)["reused"] == 0  # the same path, another content
    assert sweep(capsys, tiny, out, *options, "--seeds", "3")["reused"] == 2


def test_a_cell_with_wrong_input_is_recorded_and_tried_again(
    tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, vary = tmp_path / "out", ("--vary", "engine.max_num_seqs=0,8", "--jobs", "1")
    found = sweep(capsys, tiny, out, *vary)
    assert (found["cells"], found["failed"]) == (2, 1)
    wrong, right = found["rows"]
    assert "max_num_seqs should be greater than or equal to 1, not 0" in wrong["error"]
    assert (right["error"], right["completed"]) == (None, 60)
    again = sweep(capsys, tiny, out, *vary, "--resume")
    assert (again["reused"], again["failed"]) == (1, 1)
    assert main(["sweep", tiny, "--out", str(out), "--vary", "engine.max_num_seqs=0,-1"]) == 2
    assert "no cell could run; the first: " in capsys.readouterr().err


def test_the_summary_has_a_row_a_cell_in_the_order_of_the_grid(
    tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep(capsys, tiny, tmp_path / "out", *GRID, "--jobs", "2")
    table = pd.read_csv(tmp_path / "out" / "summary.csv")
    assert table["engine.max_num_seqs"].tolist() == [2] * 4 + [64] * 4
    assert table["request_rate"].tolist() == [5.0, 5.0, 40.0, 40.0] * 2
    assert table["seed"].tolist() == [0, 1] * 4
    assert (table["completed"] == 100).all()
    assert table["max_num_running"].max() > 2
    assert (table.loc[table["engine.max_num_seqs"] == 2, "max_num_running"] <= 2).all()


def test_a_grid_is_the_product_of_what_varies() -> None:
    vary = {"fleet.replicas": [1, 2], "engine.max_num_seqs": [8]}
    assert grid(vary, seeds=[3]) == [
        Cell({"fleet.replicas": 1, "engine.max_num_seqs": 8}, 3),
        Cell({"fleet.replicas": 2, "engine.max_num_seqs": 8}, 3),
    ]
    assert grid({}, seeds=[0], rates=[1.0, 2.0], num_requests=9) == [Cell({}, 0, 1.0, 9), Cell({}, 0, 2.0, 9)]
