"""A campaign, with stages that are small Python programs instead of servecast commands."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from servecast.calibrate.measure.folder import Budget
from servecast.calibrate.measure.tiny_model import write_tokenizer
from servecast.sim.cli import main
from servecast.sim.errors import InputError
from servecast.sim.scenario import load
from servecast.validate.campaign import MANIFEST, SERVECAST, Campaign
from servecast.validate.campaign_pack import NAME, pack
from servecast.validate.campaign_plan import Plan, read_plan, shipped_plans

FAKE = (sys.executable, "-c")  # a stage's run is then a program and its arguments


def _stage(name: str, program: str, *arguments: str, **more: Any) -> dict[str, Any]:
    words = " ".join([f"'{program}'", *arguments])
    return {"name": name, "run": words, "time_s": 600.0, **more}


def _file(tmp_path: Path, *stages: dict[str, Any], **more: Any) -> Path:
    file = tmp_path / "plan.yaml"
    file.write_text(yaml.safe_dump({"schema_version": 1, "name": "try", "stages": list(stages), **more}))
    return file


def _plan(tmp_path: Path, *stages: dict[str, Any], **more: Any) -> Plan:
    return read_plan(str(_file(tmp_path, *stages, **more)))


def _campaign(tmp_path: Path, plan: Plan, **more: Any) -> Campaign:
    return Campaign(plan, tmp_path / "out", command=FAKE, **more)


def _states(out: Path) -> dict[str, str]:
    return {row["name"]: row["state"] for row in json.loads((out / MANIFEST).read_text())["stages"]}


NOTE = 'import sys; open(sys.argv[1], "a").write("x")'  # appends to a file, so that runs can be counted


def test_stages_run_in_order_and_are_skipped_when_done(tmp_path: Path) -> None:
    plan = _plan(tmp_path, _stage("a", NOTE, "{out}/a.txt"), _stage("b", NOTE, "{out}/b.txt", needs=["a"]))
    campaign = _campaign(tmp_path, plan)
    campaign.run()
    assert _states(tmp_path / "out") == {"a": "done", "b": "done"}
    assert campaign.left == []
    assert {"path": "a.txt", "bytes": 1} in campaign.rows["a"]["files"]
    assert campaign.rows["a"]["run"] == [NOTE, "{out}/a.txt"]
    _campaign(tmp_path, plan, resume=True).run()
    assert (tmp_path / "out" / "a.txt").read_text() == "x"
    _campaign(tmp_path, plan, resume=True, again=["a"]).run()
    assert (tmp_path / "out" / "a.txt").read_text() == "xx"
    assert (tmp_path / "out" / "b.txt").read_text() == "x"


def test_a_failure_is_recorded_and_the_next_stage_goes_on(tmp_path: Path) -> None:
    plan = _plan(
        tmp_path,
        _stage("fit", 'import sys; sys.exit("the rows do not fit")'),
        _stage("predict", NOTE, "{out}/predict.txt", needs=["fit"]),
        _stage("kernels", NOTE, "{out}/kernels.txt"),
    )
    said: list[str] = []
    campaign = _campaign(tmp_path, plan, say=said.append)
    campaign.run()
    assert _states(tmp_path / "out") == {"fit": "failed", "kernels": "done"}
    assert campaign.rows["fit"]["reason"] == "code 1: the rows do not fit"
    assert campaign.rows["fit"]["code"] == 1
    assert campaign.left == ["fit", "predict"]
    assert any("predict: not started: it needs fit" in text for text in said)


def test_a_verdict_is_not_a_failure(tmp_path: Path) -> None:
    plan = _plan(tmp_path, _stage("live", "import sys; sys.exit(3)", good=[0, 1, 3]))
    campaign = _campaign(tmp_path, plan)
    campaign.run()
    assert campaign.rows["live"]["state"] == "done"
    assert campaign.rows["live"]["code"] == 3


def test_a_stage_that_takes_too_long_is_ended_with_what_it_started(tmp_path: Path) -> None:
    program = (
        "import subprocess, sys, time; "
        'own = [sys.executable, "-c", "import time; time.sleep(600)"]; '
        "p = subprocess.Popen(own, start_new_session=True); "
        'open(sys.argv[1], "w").write(str(p.pid)); time.sleep(600)'
    )
    for time_s in (8, 80):  # a machine that is busy needs more, to start what is to be ended
        out = tmp_path / str(time_s)
        out.mkdir()
        plan = _plan(
            out,
            _stage("slow", program, "{out}/pid") | {"time_s": float(time_s)},
            _stage("next", NOTE, "{out}/next.txt", needs=["slow"]) | {"time_s": 600.0},
        )
        campaign = _campaign(out, plan)
        campaign.run()
        if (out / "out" / "pid").exists():
            break
    assert _states(out / "out") == {"slow": "cut", "next": "done"}
    assert f"was not done after {time_s} s" in campaign.rows["slow"]["reason"]
    pid = int((out / "out" / "pid").read_text())
    deadline = time.monotonic() + 300  # half of what it would take if nobody ended it
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
            break  # ended; whoever inherited it has not looked yet
        time.sleep(0.05)
    else:
        assert not Path(f"/proc/{pid}").exists()


def test_what_does_not_fit_the_time_budget_is_left_for_later(tmp_path: Path) -> None:
    plan = _plan(
        tmp_path,
        _stage("long", NOTE, "{out}/long.txt", least_s=1000.0),
        _stage("short", NOTE, "{out}/short.txt"),
    )
    _campaign(tmp_path, plan, budget=Budget(60.0)).run()
    assert _states(tmp_path / "out") == {"short": "done"}
    later = _campaign(tmp_path, plan, resume=True)
    later.run()
    assert _states(tmp_path / "out") == {"long": "done", "short": "done"}
    assert (tmp_path / "out" / "short.txt").read_text() == "x"


def test_a_stage_that_used_up_a_shortened_time_is_run_again(tmp_path: Path) -> None:
    program = "import sys, time; time.sleep(float(sys.argv[1]) * 1.7)"  # half of the time is margin
    plan = _plan(tmp_path, _stage("grid", program, "{time_s}"))
    campaign = _campaign(tmp_path, plan, budget=Budget(8.0))
    campaign.run()
    assert campaign.rows["grid"]["state"] == "cut"


@pytest.mark.parametrize("state", ["running", "cut"])  # "running": when the power went
def test_what_did_not_end_is_run_again(tmp_path: Path, state: str) -> None:
    plan = _plan(tmp_path, _stage("a", NOTE, "{out}/a.txt"), _stage("b", NOTE, "{out}/b.txt"))
    _campaign(tmp_path, plan).run()
    manifest = tmp_path / "out" / MANIFEST
    document = json.loads(manifest.read_text())
    document["stages"][1] |= {"state": state, "code": None}
    manifest.write_text(json.dumps(document))
    _campaign(tmp_path, plan, resume=True).run()
    assert (tmp_path / "out" / "a.txt").read_text() == "x"
    assert (tmp_path / "out" / "b.txt").read_text() == "xx"


def test_a_signal_ends_the_stage_and_leaves_a_manifest_and_a_pack(tmp_path: Path) -> None:
    plan = _file(
        tmp_path,
        {"name": "made", "run": "scenarios", "time_s": 60},
        {"name": "waits", "run": "calibrate measure --python {out}/waits", "time_s": 600},
    )
    out = tmp_path / "out"
    out.mkdir()
    waits = out / "waits"
    waits.write_text(f"#!/bin/sh\necho >{out}/began\nexec sleep 600\n")
    waits.chmod(0o755)
    command = [
        *SERVECAST,
        "validate",
        "campaign",
        str(plan),
        "--out",
        str(out),
        "--pack",
        str(tmp_path / "p"),
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    while not (out / "began").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 130
    assert _states(out) == {"made": "done", "waits": "cut"}
    assert json.loads((tmp_path / "p" / MANIFEST).read_text())["stages"][1]["reason"] == "stopped"


def test_predictions_are_hashed_and_rates_taken_from_them(tmp_path: Path) -> None:
    plan = _plan(
        tmp_path,
        _stage(
            "predict", "import json; print(json.dumps(dict(max_request_rate=20.0)))", predicts="logs/*.out"
        ),
        _stage("live", NOTE, "{out}/{0.8*predict}", needs=["predict"]),
    )
    campaign = _campaign(tmp_path, plan)
    campaign.run()
    assert (tmp_path / "out" / "16").read_text() == "x"
    file = tmp_path / "out" / "logs" / "predict.out"
    assert campaign.rows["predict"]["predictions"] == {
        "logs/predict.out": hashlib.sha256(file.read_bytes()).hexdigest()
    }
    assert campaign.rows["predict"]["ended"] <= campaign.rows["live"]["started"]


def test_what_needs_a_rate_waits_for_one(tmp_path: Path) -> None:
    plan = _plan(
        tmp_path,
        _stage("predict", "import sys; print(dict()); sys.exit(3)", good=[0, 3]),
        _stage("live", NOTE, "{out}/{0.8*predict}", needs=["predict"]),
    )
    said: list[str] = []
    campaign = _campaign(tmp_path, plan, say=said.append)
    campaign.run()
    assert _states(tmp_path / "out") == {"predict": "done"}
    assert campaign.left == ["live"]
    assert any("live: not started" in text and "max_request_rate" in text for text in said)
    (tmp_path / "out" / "logs" / "predict.out").write_text('{"max_request_rate": 20}')
    _campaign(tmp_path, plan, resume=True).run()
    assert (tmp_path / "out" / "16").read_text() == "x"


def test_what_was_cut_off_runs_after_what_nobody_tried(tmp_path: Path) -> None:
    grow = 'import sys, time; open(sys.argv[1], "a").write("x"); time.sleep(float(sys.argv[2]))'
    stages = [
        _stage("grid", grow, "{out}/order", "0"),
        _stage("kernels", 'import sys; open(sys.argv[1], "a").write("k")', "{out}/order"),
        _stage("live", 'import sys; open(sys.argv[1], "a").write("l")', "{out}/order", needs=["grid"]),
    ]
    _campaign(tmp_path, _plan(tmp_path, _stage("grid", grow, "{out}/order", "60") | {"time_s": 2.0})).run()
    assert _states(tmp_path / "out") == {"grid": "cut"}
    _campaign(tmp_path, _plan(tmp_path, *stages), resume=True).run()
    order = (tmp_path / "out" / "order").read_text()
    assert order.removeprefix("x") == "klx"  # its first try may have been cut off before its first word
    assert set(_states(tmp_path / "out").values()) == {"done"}


def test_a_cut_stage_that_left_nothing_runs_in_its_place(tmp_path: Path) -> None:
    plan = _plan(
        tmp_path,
        _stage("fit", NOTE, "{out}/profile.json", makes="profile.json"),
        _stage("predict", NOTE, "{out}/predict.txt", needs=["fit"]),
    )
    campaign = _campaign(tmp_path, plan)
    campaign.out.mkdir()
    (campaign.out / MANIFEST).write_text(
        json.dumps({"plan": "try", "stages": [{"name": "fit", "state": "cut", "files": []}]})
    )
    campaign.resume = True
    campaign.run()
    assert _states(tmp_path / "out") == {"fit": "done", "predict": "done"}


def test_a_stage_that_failed_may_have_left_enough(tmp_path: Path) -> None:
    """Rows are on disk when they are measured, whatever comes after them."""
    program = 'import sys; open(sys.argv[1], "a").write("x"); sys.exit("out of memory")'
    plan = _plan(
        tmp_path,
        _stage("grid", program, "{out}/rows"),
        _stage("nothing", "import sys; sys.exit(1)"),
        _stage("fit", NOTE, "{out}/fit", needs=["grid"]),
        _stage("predict", NOTE, "{out}/predict", needs=["nothing"]),
    )
    _campaign(tmp_path, plan).run()
    assert _states(tmp_path / "out") == {"grid": "failed", "nothing": "failed", "fit": "done"}


def test_named_stages_run_and_no_others(tmp_path: Path) -> None:
    plan = _plan(tmp_path, *(_stage(name, NOTE, f"{{out}}/{name}") for name in "abc"))
    _campaign(tmp_path, plan, only=["a", "c"]).run()
    assert _states(tmp_path / "out") == {"a": "done", "c": "done"}


def test_results_are_kept_when_a_stage_runs_again(tmp_path: Path) -> None:
    """validate live refuses a folder that has a result."""
    new = 'import sys; open(sys.argv[1], "x").write("x")'
    plan = _plan(tmp_path, _stage("live", new, "{out}/result.json", makes="result.json"))
    for _ in range(3):
        _campaign(tmp_path, plan, resume=True, again=["live"]).run()
        assert _states(tmp_path / "out") == {"live": "done"}
    assert sorted(file.name for file in (tmp_path / "out").glob("result*")) == [
        *("result.1.json", "result.2.json", "result.json")
    ]
    broken = _plan(tmp_path, _stage("live", "1 / 0", makes="result.json"))
    _campaign(tmp_path, broken, resume=True, again=["live"]).run()
    assert _states(tmp_path / "out") == {"live": "failed"}
    assert (tmp_path / "out" / "result.json").exists()


def test_a_time_budget_is_one_for_the_whole_command(tmp_path: Path) -> None:
    plan = _plan(tmp_path, _stage("a", NOTE, "{out}/a.txt"))
    campaign = _campaign(tmp_path, plan, budget=Budget(40.0), kept_s=35.0)
    campaign.run()
    assert campaign.rows["a"]["given_s"] <= 5
    late = _campaign(tmp_path, plan, resume=True, again=["a"], budget=Budget(40.0), kept_s=39.5)
    late.run()
    assert (tmp_path / "out" / "a.txt").read_text() == "x"


def test_what_is_there_already_is_not_made_again(tmp_path: Path) -> None:
    plan = _plan(
        tmp_path,
        _stage("fit", NOTE, "{out}/profile.json", makes="profile.json"),
        _stage("fallback", NOTE, "{out}/profile.json", makes="profile.json"),
    )
    _campaign(tmp_path, plan).run()
    assert (tmp_path / "out" / "profile.json").read_text() == "x"
    assert _states(tmp_path / "out") == {"fit": "done", "fallback": "done"}
    _campaign(tmp_path, plan, resume=True, again=["fallback"]).run()
    assert {file.name for file in (tmp_path / "out").glob("prof*")} == {"profile.json", "profile.1.json"}


def test_a_stage_that_did_not_make_its_file_failed(tmp_path: Path) -> None:
    """A crash ends with 1, as a verdict that is a fail does."""
    plan = _plan(tmp_path, _stage("live", "1 / 0", good=[0, 1, 3], makes="result.json"))
    campaign = _campaign(tmp_path, plan)
    campaign.run()
    assert campaign.rows["live"]["state"] == "failed"
    assert campaign.rows["live"]["reason"] == "code 1: ZeroDivisionError: division by zero"


def test_models_and_scenarios_are_written(tmp_path: Path) -> None:
    plan = _plan(
        tmp_path,
        _stage("a", 'import os; open("env", "w").write(os.environ["WITH"])'),
        env={"WITH": "this"},
        models={"tiny": {"layers": 1}, "Qwen2.5-0.5B": "Qwen2.5-0.5B-Instruct"},
        scenarios={
            "chat": {
                "model": {"config": "../models/tiny/config.json"},
                "gpu": {"name": "h200"},
                "engine": {"version": "0.23"},
                "workload": {
                    "arrivals": {"kind": "poisson", "request_rate": 1},
                    "num_requests": 5,
                    "prompt_tokens": 10,
                    "output_tokens": 10,
                },
            }
        },
    )
    _campaign(tmp_path, plan).run()
    out = tmp_path / "out"
    assert (out / "env").read_text() == "this"
    assert load(str(out / "scenarios" / "chat.yaml")).config_file().is_file()
    assert json.loads((out / "models" / "Qwen2.5-0.5B" / "config.json").read_text())["vocab_size"] == 151936
    assert json.loads((out / "machine.json").read_text())["schema_version"] == 1


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"needs": ["nobody"]}, "stages.1.needs"),
        ({"run": "plan {profile}"}, "stands for nothing"),
        ({"run": "plan {0.5*a}"}, "stands for nothing"),  # a is not in its needs
        ({"run": "plan 'x"}, "stages.1.run"),
        ({"name": "a"}, "a second stage"),
        ({"time_s": -1}, "stages.1.time_s"),
    ],
)
def test_a_wrong_plan_is_one_message(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        _plan(tmp_path, _stage("a", "pass"), _stage("b", "pass") | change)


def test_wrong_input_is_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = str(_file(tmp_path, {"name": "a", "run": "scenarios", "time_s": 60}))
    out = tmp_path / "out"
    for arguments in (["h2000"], [good, "--only", "b"], [good, "--time-budget", "0"], [good, "--again", "b"]):
        assert main(["validate", "campaign", *arguments, "--out", str(out)]) == 2
    assert not out.exists()
    assert "there is no stage 'b'" in capsys.readouterr().err
    assert main(["validate", "campaign", good, "--out", str(out)]) == 0
    assert main(["validate", "campaign", good, "--out", str(out)]) == 2
    assert "--resume" in capsys.readouterr().err
    other = _plan(tmp_path, _stage("a", "pass"), **{"name": "other"})
    with pytest.raises(InputError, match="is of plan try"):
        Campaign(other, out, command=FAKE, resume=True).run()


def test_exit_codes(tmp_path: Path) -> None:
    failing = str(_file(tmp_path, {"name": "a", "run": "check nothing", "time_s": 60}))
    assert main(["validate", "campaign", failing, "--out", str(tmp_path / "failing")]) == 1
    late = str(_file(tmp_path, {"name": "a", "run": "scenarios", "time_s": 60, "least_s": 60}))
    assert main(["validate", "campaign", late, "--out", str(tmp_path / "late"), "--time-budget", "9"]) == 3


def test_packed_results_come_back(tmp_path: Path) -> None:
    out, folder = tmp_path / "out", tmp_path / "packed"
    (out / "live").mkdir(parents=True)
    (out / MANIFEST).write_text('{"stages": []}')
    noise = os.urandom(70_000).hex()
    (out / "live" / "a.txt").write_text(noise)
    bench = {"itls": [[0.0123456789]], "ttfts": [0.1], "generated_texts": ["x"], "completed": 1}
    (out / "live" / "bench.json").write_text(json.dumps(bench))
    (out / "tokenizer.json").write_text("{}")
    files, left_out = pack(out, folder, part_bytes=50_000, most_parts=4)
    parts = [file for file in files if file.name != MANIFEST]
    assert [file.name for file in parts] == [f"{NAME}.00", f"{NAME}.01"]
    assert all(file.stat().st_size <= 50_000 for file in parts)
    assert left_out == []
    whole = tmp_path / "whole.tar.xz"
    whole.write_bytes(b"".join(file.read_bytes() for file in parts))
    with tarfile.open(whole) as archive:
        assert sorted(archive.getnames()) == ["live/a.txt", "live/bench.json", MANIFEST]
        archive.extractall(tmp_path / "back", filter="data")
    assert (tmp_path / "back" / "live" / "a.txt").read_text() == noise
    packed = json.loads((tmp_path / "back" / "live" / "bench.json").read_text())
    assert packed == {"itls": [[0.012346]], "ttfts": [0.1], "completed": 1}


def test_what_has_no_room_is_left_out_from_the_end(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name in ("a.json", "server.log"):
        (out / name).write_text(os.urandom(60_000).hex())
    files, left_out = pack(out, tmp_path / "packed", part_bytes=75_000, most_parts=2)
    assert left_out == ["server.log"]
    assert sum(file.stat().st_size for file in files) <= 150_000


def test_what_there_is_no_time_for_is_left_out(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / MANIFEST).write_text("{}")
    (out / "recording.jsonl").write_text("x" * 50_000_000)
    _, left_out = pack(out, tmp_path / "packed", seconds=3)
    assert left_out == ["recording.jsonl"]


def test_a_campaign_that_runs_is_packed_from_elsewhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = str(_file(tmp_path, {"name": "a", "run": "scenarios", "time_s": 60}))
    out, folder = tmp_path / "out", tmp_path / "packed"
    command = ["validate", "campaign", plan, "--out", str(out), "--pack-only"]
    assert main([*command, "--pack", str(folder)]) == 2
    assert "Give the folder of a campaign" in capsys.readouterr().err
    out.mkdir()
    row = {"name": "a", "state": "running", "started": "2026-11-27T12:00:00+00:00"}
    (out / MANIFEST).write_text(json.dumps({"plan": "try", "stages": [row]}))
    assert main(command) == 2
    assert main([*command, "--pack", str(folder)]) == 0
    assert sorted(file.name for file in folder.iterdir()) == [f"{NAME}.00", MANIFEST]
    assert json.loads((out / MANIFEST).read_text())["stages"] == [row], "nothing was run"


def test_a_command_that_is_stopped_stops_what_it_measures_with(tmp_path: Path) -> None:
    """SIGINT reaches the command alone: what it started hears of it through it, and at once."""
    python = tmp_path / "python"
    python.write_text(
        f"#!{sys.executable}\nimport pathlib, time\npathlib.Path({str(tmp_path / 'began')!r}).touch()\n"
        f"try:\n    time.sleep(600)\nexcept KeyboardInterrupt:\n"
        f"    pathlib.Path({str(tmp_path / 'ended')!r}).touch()\n"
    )
    python.chmod(0o755)
    for number in (signal.SIGINT, signal.SIGTERM):
        command = [*SERVECAST, "calibrate", "measure", "--python", str(python), "engine"]
        process = subprocess.Popen(command, start_new_session=True)
        while not (tmp_path / "began").exists():
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(number)
        assert process.wait() == 130
        assert (tmp_path / "ended").exists()
        (tmp_path / "began").unlink()
        (tmp_path / "ended").unlink()


def test_a_benchmark_may_hold_many_connections(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    plan = str(_file(tmp_path, {"name": "a", "run": "scenarios", "time_s": 60}))
    program = (
        "import resource, sys; _, most = resource.getrlimit(7); resource.setrlimit(7, (256, most));"
        "from servecast.sim.cli import main; main(sys.argv[1:]); print(resource.getrlimit(7)[0])"
    ).replace("7", str(int(resource.RLIMIT_NOFILE)))
    command = [sys.executable, "-c", program, "validate", "campaign", plan, "--out", str(tmp_path / "out")]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert int(said.split()[-1]) == (1 << 16 if most == resource.RLIM_INFINITY else min(most, 1 << 16))


def test_shipped_plans_are_whole(tmp_path: Path) -> None:
    for file in shipped_plans():
        plan = read_plan(file.stem)
        assert plan.name == file.stem
        campaign = Campaign(plan, tmp_path / file.stem, command=FAKE)
        campaign.out.mkdir()
        campaign._prepare()
        for name in plan.scenarios:
            text = yaml.safe_load((campaign.out / "scenarios" / f"{name}.yaml").read_text())
            assert text["name"] == name


def test_any_tokens_come_back_from_their_text(tmp_path: Path) -> None:
    """vLLM 0.23's benchmark sends its prompts as text: each token must be read as one again."""
    tokenizers = pytest.importorskip("tokenizers", reason="needs tokenizers")
    write_tokenizer(tmp_path, vocab_size=152_064)
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    ids = [number for number in range(0, 152_064, 7) if not 256 <= number <= 258]
    assert tokenizer.encode(tokenizer.decode(ids)).ids == ids


def test_the_tokenizer_has_a_character_of_its_own_for_each_token(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, vocab_size=152_064)
    model = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
    assert sorted(model["vocab"].values()) == list(range(152_064))
    assert sum(len(text) > 1 for text in model["vocab"]) == 3  # the special ones
    "".join(model["vocab"]).encode()  # none is half of a surrogate pair
