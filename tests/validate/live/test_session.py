"""A live session that is cut short, badly asked for or badly predicted, with a server and a load generator
that are not vLLM: what it keeps, what it refuses, and what it says."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from live_fakes import SAYS_ONLY_ITS_BLOCKS, SCENARIO, FakeServer, fake_python

from servecast.__main__ import main
from servecast.calibrate.measure.vllm.tiny_model import write_tiny_model
from servecast.sim.hardware.gpu import find_gpu
from servecast.sim.inputs.errors import InputError
from servecast.sim.run.simulate import simulate
from servecast.sim.scenario.deployment import Deployment
from servecast.sim.scenario.scenario import load
from servecast.validate.compare.tolerances import Tolerances
from servecast.validate.live import drive as live_drive
from servecast.validate.live import result as live_result
from servecast.validate.live import search as live_search
from servecast.validate.live import session as live
from servecast.validate.live.own_server import Started
from servecast.validate.live.result import document, judge
from servecast.validate.live.search import meets, search_near
from servecast.validate.live.session import Session
from servecast.validate.live.target import Target

MACHINE = {"gpu": "cpu", "gpu_count": 0, "driver": None, "host_cpu": "x86"}
INFO = {"scheduler_config": {"max_num_seqs": 8, "async_scheduling": False}}
BENCHES = Callable[[Callable[[int], None]], None]


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A scenario on a GPU that a file describes, which a machine without one may serve."""
    write_tiny_model(tmp_path / "tiny")
    find_gpu("L4").save(tmp_path / "gpu.json")
    path = tmp_path / "tiny.yaml"
    path.write_text(SCENARIO + "profile: physics\n")
    monkeypatch.setenv("FAKE_SCENARIO", str(path))
    return path


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer(info=INFO, metrics=SAYS_ONLY_ITS_BLOCKS) as fake:
        yield fake


@pytest.fixture
def session(file: Path, server: FakeServer, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Runs a session and returns its result."""

    def run(**options: Any) -> dict[str, Any]:
        wanted = Session(
            load(file, options.pop("changes", {})),
            Target(server.url, "tiny", str(tmp_path / "tiny")),
            tmp_path / "out",
            python=str(fake_python(tmp_path)),
            machine=MACHINE,
            **{"duration_s": 1.0, "seeds": 2, **options},
        )
        wanted.run()
        limits = Tolerances.load()
        return document(wanted, judge(wanted, limits), tolerances=limits)

    return run


@pytest.fixture
def command(file: Path, server: FakeServer, tmp_path: Path) -> Callable[..., tuple[int, dict[str, Any]]]:
    """``servecast validate live`` on the server: its exit code and result.json."""

    def run(*options: str) -> tuple[int, dict[str, Any]]:
        where = () if "--serve" in options else ("--base-url", server.url, "--model", "tiny")
        tokenizer = () if "--serve" in options else ("--tokenizer", str(tmp_path / "tiny"))
        code = main(
            [
                *("validate", "live", str(file), *where, *tokenizer, *options),
                *("--duration", "1", "--seeds", "2", "--out", str(tmp_path / "out")),
                *("--vllm-python", str(fake_python(tmp_path))),
            ]
        )
        kept = tmp_path / "out" / "result.json"
        return code, json.loads(kept.read_text()) if kept.exists() else {}

    return run


@pytest.fixture
def before_bench(monkeypatch: pytest.MonkeyPatch) -> BENCHES:
    """Does something before a benchmark begins, given its number from 1."""
    real = live_drive.run_bench
    count = [0]

    def install(act: Callable[[int], None]) -> None:
        def bench(*args: Any, **options: Any) -> Any:
            count[0] += 1
            act(count[0])
            return real(*args, **options)

        monkeypatch.setattr(live_drive, "run_bench", bench)

    return install


# what is kept when something breaks


def test_the_result_is_on_disk_after_each_load(
    command: Callable[..., Any], before_bench: BENCHES, tmp_path: Path
) -> None:
    seen = []

    def look(number: int) -> None:
        if number > 1:
            seen.append(json.loads((tmp_path / "out" / "result.json").read_text()))

    before_bench(look)
    code, kept = command("--rates", "20,40")
    assert (code, kept["verdict"], kept["finished"]) == (0, "pass", True)
    (part,) = seen
    assert (part["verdict"], part["finished"]) == ("inconclusive", False)
    assert part["reasons"][0] == "not all loads have been run yet"
    assert [each["name"] for each in part["loads"]] == ["rate-20"]
    assert part["loads"][0] == kept["loads"][0]


def test_sigterm_keeps_what_is_done_and_ends_our_server(
    command: Callable[..., Any],
    before_bench: BENCHES,
    server: FakeServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ended = []

    @contextmanager
    def started(*_: Any) -> Iterator[Started]:
        try:
            yield Started(Target(server.url, "tiny", str(tmp_path / "tiny")), None, 0)
        finally:
            ended.append(True)

    def terminate(number: int) -> None:
        if number == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(live, "started", started)
    before = signal.getsignal(signal.SIGTERM)
    before_bench(terminate)
    code, kept = command("--rates", "20,40,60", "--serve", str(tmp_path / "tiny"))
    assert (code, kept["verdict"], kept["finished"]) == (3, "inconclusive", False)
    assert kept["reasons"] == ["stopped by hand"]
    assert len(kept["loads"]) == 1
    assert ended == [True]
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("error", [InputError("is odd", "trace", "Look."), OSError(28, "no space left")])
def test_an_error_after_the_first_load_keeps_it(
    command: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
) -> None:
    real = live.predict

    def predict(asked: Any, *args: Any) -> Any:
        if asked.kind == "slo":
            raise error
        return real(asked, *args)

    monkeypatch.setattr(live, "predict", predict)
    code, kept = command("--plan", "rate,slo", "--rates", "20")
    assert (code, kept["verdict"]) == (3, "inconclusive")
    assert kept["reasons"] == [f"not all loads were run: {error}"]
    assert kept["loads"][0]["verdict"] == "pass"
    said = capsys.readouterr()
    assert said.out.count(str(error)) == 1
    assert "Traceback" not in said.err


def test_an_error_before_any_load_is_refused(
    command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def predict(*_: Any) -> Any:
        raise InputError("is odd", "trace.jsonl", "Look.")

    monkeypatch.setattr(live, "predict", predict)
    assert command("--rates", "20") == (2, {})


def test_a_killed_server_by_the_command_line(
    command: Callable[..., Any],
    server: FakeServer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    real = live.drive

    def drive(asked: Any, *args: Any, **options: Any) -> Any:
        outcome = real(asked, *args, **options)
        if asked.name == "rate-40":
            server.stop()
            return replace(outcome, measured=None, problem="no request completed")
        return outcome

    monkeypatch.setattr(live, "drive", drive)
    monkeypatch.setattr(FakeServer, "__exit__", lambda *_: None)  # it is gone already
    code, kept = command("--rates", "20,40,60")
    gone = "the server was gone after rate-40: no load was run after it"
    assert (code, kept["verdict"]) == (3, "inconclusive")
    assert kept["reasons"] == [gone, "rate-40: no request completed"]
    assert [(each["name"], each["verdict"]) for each in kept["loads"]] == [
        ("rate-20", "pass"),
        ("rate-40", "inconclusive"),
    ]
    assert capsys.readouterr().out.count(gone) == 1


# the time budget


def test_a_load_gets_what_is_left_of_the_time_and_ends_the_session_with_it(
    session: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, given = live.drive, []

    def drive(*args: Any, **options: Any) -> Any:
        given.append(options["most_s"])
        return replace(real(*args, **options), measured=None, timed_out=True, problem="not done after 9 s")

    monkeypatch.setattr(live, "drive", drive)
    kept = session(rates=(20.0, 40.0), time_budget_s=60.0)
    assert len(given) == 1
    assert 30 < given[0] < 60
    assert kept["verdict"] == "inconclusive"
    assert kept["reasons"][0] == "rate-20 did not end in time: no load was run after it"


def test_a_load_that_was_left_out_is_no_pass_and_hides_no_fail(
    session: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live.Budget, "fits", lambda self, seconds: seconds < 22)
    options = {"rates": (40.0, 4.0)}  # 20 requests take 5 s at the second
    kept = session(**options)
    assert kept["verdict"] == "inconclusive"
    assert kept["reasons"] == ["the time budget did not last for rate-4"]
    assert [each["verdict"] for each in kept["loads"]] == ["pass"]
    monkeypatch.setenv("FAKE_SLOWER", "1.5")
    kept = session(**options)
    assert kept["verdict"] == "fail"
    assert any(note.startswith("rate-4 left out") for note in kept["notes"])


# largest rates


def test_the_rate_by_which_loads_are_chosen_is_on_disk_before_and_the_only_one(
    session: Callable[..., dict[str, Any]], before_bench: BENCHES, tmp_path: Path
) -> None:
    file = tmp_path / "out" / "prediction-slo.json"
    found = []
    before_bench(lambda number: found.append(hashlib.sha256(file.read_bytes()).hexdigest()))
    kept = session(kinds=("prefix",))
    (searched,) = kept["searches"]
    assert set(found) == {searched["sha256"]}
    assert json.loads(file.read_text()) == {name: searched[name] for name in searched if name != "sha256"}
    (low, high), (load,) = searched["between"], kept["loads"]
    assert low <= 2 * load["request_rate"] <= high <= 1.0101 * low
    assert not [name for name in kept if "max_request_rate" in name]


def test_failed_requests_and_unknown_figures_miss(file: Path) -> None:
    scenario = load(file, {"slo": ["e2el:p95:5000"]})
    run = simulate(scenario)
    assert meets([run], scenario)
    count = len(run.requests)
    half = run.requests.assign(status=np.where(np.arange(count) % 2, "finished", "failed"))
    assert not meets([replace(run, requests=half)], scenario)
    assert not meets([replace(run, requests=run.requests.assign(status="failed"))], scenario)
    good = load(file, {"slo": [], "goodput": "e2el:5000"})
    assert meets([run], good)
    assert not meets([replace(run, requests=half)], good)
    assert not meets([replace(run, requests=run.requests[:0])], good)


def test_the_largest_rate_of_a_goodput_is_compared(session: Callable[..., dict[str, Any]]) -> None:
    kept = session(rates=(20.0, 600.0), changes={"slo": [], "goodput": "e2el:50"})
    (row,) = [row for row in kept["sweep"] if row["metric"] == "max_request_rate"]
    assert 20 < row["measured"] < 600


def test_searches_are_predicted_before_any_load_and_judged(
    session: Callable[..., dict[str, Any]], before_bench: BENCHES, tmp_path: Path
) -> None:
    """On a server that is twice as slow as predicted, both ends differ for sure."""
    files = [tmp_path / "out" / f"prediction-{plan}.json" for plan in ("slo", "knee")]
    found: list[list[str]] = []
    before_bench(lambda _: found.append([hashlib.sha256(file.read_bytes()).hexdigest() for file in files]))
    changes = {"slo": ["e2el:p95:60"]}
    kept = session(kinds=("slo", "knee"), duration_s=1.0, changes=changes)
    assert all(hashes == [each["sha256"] for each in kept["searches"]] for hashes in found)
    assert [each["metric"] for each in kept["searches"]] == ["max_request_rate", "knee"]
    for each in kept["searches"]:
        low, high = each["between"]
        assert high <= 1.0101 * low
        row = next(row for row in kept["sweep"] if row["metric"] == each["metric"])
        assert row["predicted_interval"] == pytest.approx([low, high], rel=1e-5)


@pytest.mark.parametrize("off", [0.25, 0.5, 0.97, 1.0, 1.03, 2.0, 4.0])
@pytest.mark.parametrize("known", [{}, {20.0: True, 300.0: False}])
def test_a_guess_that_is_off_is_bracketed(off: float, known: dict[float, bool]) -> None:
    """The largest rate is 100. A good guess is confirmed by two tries; a bad one is refuted at least."""
    tried = dict(known)
    search_near(lambda rate: rate < 100, 100 * off, tried)
    low = max(rate for rate, held in tried.items() if held)
    high = min(rate for rate, held in tried.items() if not held)
    assert low < 100 <= high <= low * (1.031 if 0.9 < off < 1.1 else 1.25)
    assert len(tried) - len(known) <= (2 if off == 1 else live_search.MOST_LOADS)


def test_a_search_that_can_not_be_told_ends() -> None:
    tried: dict[float, bool] = {}
    search_near(lambda rate: None, 10, tried)
    assert tried == {}


# what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rates": (5.0, 5.00001)}, "rate 5 is there 2 times"),
        ({"rates": (5.0, 5.0)}, "rate 5 is there 2 times"),
        ({"concurrency": (4, 4)}, "concurrency 4 is there 2 times"),
        ({"kinds": ("rate", "rate")}, "rate is there 2 times"),
    ],
)
def test_loads_that_would_share_a_folder_are_refused(
    session: Callable[..., Any], tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        session(**options)
    assert not (tmp_path / "out").exists()


def test_the_command_line_runs_a_load_once(command: Callable[..., Any]) -> None:
    code, kept = command("--plan", "rate,rate", "--rates", "20,20.0")
    assert code == 0
    assert [each["name"] for each in kept["loads"]] == ["rate-20"]


def test_a_folder_with_a_result_is_refused_before_anything_starts(
    command: Callable[..., Any],
    server: FakeServer,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "result.json").write_text('{"kind": "live"}')
    assert command("--rates", "20") == (2, {"kind": "live"})
    assert server.asked == []
    said = capsys.readouterr().err
    assert f"--out {tmp_path / 'out'}: holds the result of an earlier run. Give another folder" in said


# facts


def test_the_profile_is_hashed_before_the_run_and_vllm_asked_once(
    command: Callable[..., Any],
    before_bench: BENCHES,
    file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    profile = tmp_path / "profile.json"
    Deployment.of(load(file)).profile.save(profile)
    file.write_text(SCENARIO + "profile: profile.json\n")
    before = hashlib.sha256(profile.read_bytes()).hexdigest()
    before_bench(lambda number: profile.write_text("{}") and None)
    monkeypatch.setenv("FAKE_SCENARIO", str(tmp_path / "same.yaml"))
    (tmp_path / "same.yaml").write_text(SCENARIO + "profile: physics\n")
    asked, real = [], live_result.subprocess.run
    monkeypatch.setattr(live_result.subprocess, "run", lambda *a, **k: asked.append(a[0]) or real(*a, **k))
    _, kept = command("--rates", "20,40")
    assert kept["profile_sha256"] == before
    assert kept["load_generator"] == "vllm bench serve 0.32.0"
    assert sum("version('vllm')" in words[-1] for words in asked) == 1
