"""A campaign on a rented machine; most stages are small Python programs instead of servecast commands."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from places import REPOSITORY

sys.path.append(str(REPOSITORY / "tools" / "gpu"))

import campaign as tool
from campaign import GRACE_S, PACK_S, Campaign, Stage

from servecast.__main__ import COMMANDS, build_app
from servecast.sim.hardware.gpu import find_gpu
from servecast.sim.scenario.scenario import load

TOOLS = REPOSITORY / "tools" / "gpu"
NOTE = 'import sys; open(sys.argv[1], "a").write("x")'  # appends to a file, so that runs can be counted


@pytest.fixture(autouse=True)
def _programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tool, "SERVECAST", (sys.executable, "-c"))


def _stage(name: str, program: str, *arguments: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "run": " ".join([f"'{program}'", *arguments]), "time_s": 30.0, **more}


def _run(out: Path, *stages: dict[str, Any], seconds: float = 300.0, packed: Path | None = None) -> Campaign:
    plan = {"models": {"tiny": {"layers": 1}}, "scenarios": {}, "stages": list(stages)}
    campaign = Campaign(plan, out, time.monotonic() + seconds, packed=packed)
    campaign.run()
    return campaign


def _left(campaign: Campaign) -> list[str]:
    return [row["name"] for row in campaign.plan["stages"] if not campaign.done(Stage(**row))]


def test_what_is_done_is_not_done_again(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    stages = (
        _stage("a", NOTE, "{out}/a"),
        _stage("broken", 'import sys; sys.exit("the rows do not fit")'),
        _stage("b", NOTE, "{out}/b", needs="a"),
        _stage("c", NOTE, "{out}/c", needs="nothing"),
    )
    for _ in range(2):
        assert _left(_run(tmp_path, *stages)) == ["broken", "c"]
        assert "c: not started, for want of nothing" in capfd.readouterr().err
    assert [(tmp_path / name).read_text() for name in "ab"] == ["x", "x"]
    assert (tmp_path / "logs" / "broken.err").read_text() == 2 * "the rows do not fit\n"
    rows = [json.loads(line) for line in (tmp_path / "stages.jsonl").read_text().splitlines()]
    assert rows[0]["run"] == [NOTE, "{out}/a"]
    assert [row["stage"] for row in rows[::2]] == ["a", "broken", "b", "broken"]
    assert json.loads((tmp_path / "machine.json").read_text())["schema_version"] == 1


def test_a_stage_is_ended_with_what_it_started_and_goes_on_last(tmp_path: Path) -> None:
    program = (
        "import subprocess, sys, time; "
        'own = [sys.executable, "-c", "import time; time.sleep(600)"]; '
        "p = subprocess.Popen(own, start_new_session=True); "
        'open(sys.argv[1], "w").write(str(p.pid)); time.sleep(600)'
    )
    slow = _stage("slow", program, "{out}/pid") | {"time_s": 4.0}
    campaign = _run(tmp_path, slow, _stage("next", NOTE, "{out}/next"))
    assert _left(campaign) == ["slow"]
    assert campaign.rows(Stage(**slow))[-1]["ended"] == "after its time"
    pid = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 10
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "what the stage started goes on"
        time.sleep(0.05)
    order = 'import sys; open(sys.argv[1], "a").write(sys.argv[2])'
    _run(tmp_path, *(_stage(name, order, "{out}/order", name) for name in ("slow", "next", "new")))
    assert (tmp_path / "order").read_text() == "newslow"


def test_what_does_not_fit_the_time_is_left_for_later(tmp_path: Path) -> None:
    stages = (
        _stage("long", NOTE, "{out}/long", least_s=20.0),
        _stage("short", NOTE, "{out}/short", least_s=1.0),
    )
    hurried = _run(tmp_path, *stages, seconds=GRACE_S + PACK_S + 15)
    assert not (tmp_path / "long").exists()
    assert (tmp_path / "short").exists()
    assert _left(hurried) == ["long", "short"], (
        "whether a measurement was whole in less than its time is not known"
    )
    assert _left(_run(tmp_path, *stages)) == []


def test_a_share_of_a_predicted_rate(tmp_path: Path) -> None:
    stages = (
        _stage("undecided", "print(dict())", makes="logs/undecided.out"),
        _stage("without", NOTE, "{out}/{1*undecided}", needs="logs/undecided.out"),
        _stage(
            "predict", "import json; print(json.dumps(dict(max_request_rate=20)))", makes="logs/predict.out"
        ),
        _stage("live", NOTE, "{out}/{0.8*predict}", needs="logs/predict.out"),
    )
    assert _left(_run(tmp_path, *stages)) == ["without"]
    assert (tmp_path / "16").read_text() == "x"


def test_what_is_packed_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tool, "PART_BYTES", 1000)
    random = 'import os, sys; open(sys.argv[1], "wb").write(os.urandom(3000))'
    _run(tmp_path / "out", _stage("a", random, "{out}/random"), packed=tmp_path / "packed")
    parts = sorted((tmp_path / "packed").iterdir())
    assert len(parts) > 3
    assert [part.name for part in parts] == [f"campaign.tar.xz.{number:02}" for number in range(len(parts))]
    (tmp_path / "whole").write_bytes(b"".join(part.read_bytes() for part in parts))
    with tarfile.open(tmp_path / "whole") as archive:
        archive.extractall(tmp_path / "back", filter="data")
    for name in ("random", "stages.jsonl", "models/tiny/config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    assert not (tmp_path / "back" / "models" / "tiny" / "tokenizer.json").exists()


@pytest.mark.parametrize("name", ["cpu", "h200"])
def test_a_plan_is_whole(tmp_path: Path, name: str) -> None:
    plan = yaml.safe_load((TOOLS / f"{name}.yaml").read_text())
    Campaign(plan | {"stages": []}, tmp_path, time.monotonic()).run()
    for model in plan["models"]:
        assert (tmp_path / "models" / model / "tokenizer.json").exists()
    (tmp_path / "profiles").mkdir()
    find_gpu("h200").save(tmp_path / "profiles" / "cpu.gpu.json")  # a fit writes it
    for scenario in plan["scenarios"]:
        assert load(str(tmp_path / "scenarios" / f"{scenario}.yaml")).config_file().is_file()
    for stage in (Stage(**row) for row in plan["stages"]):
        words = re.sub(
            "{out}|{python}|{(time_s|0.2[*]predict)}", lambda m: "9" if m[1] else "/x", stage.run
        ).split()
        command, _, _ = build_app(COMMANDS).parse_args(words, exit_on_error=False, print_error=False)
        assert command.__name__ in words[:2]
    made = {row.get("makes") for row in plan["stages"]} | {"measurements/engine.jsonl"}
    assert {row["needs"] for row in plan["stages"] if "needs" in row} <= made


def test_the_shell_script_says_what_it_does() -> None:
    done = subprocess.run(["bash", TOOLS / "carry.sh"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "run SECONDS FOLDER" in done.stdout
