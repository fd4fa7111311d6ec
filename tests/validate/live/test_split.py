"""Routers judged by replicas, with servers and a load generator that are not vLLM."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from live_fakes import FakeServer, fake_python

from servecast.__main__ import main
from servecast.calibrate.measure.vllm.tiny_model import write_tiny_model
from servecast.sim.hardware.gpu import find_gpu
from servecast.sim.inputs.errors import InputError
from servecast.sim.scenario.scenario import load
from servecast.validate.live import split as split_module
from servecast.validate.live.own_server import Started
from servecast.validate.live.split import Split, judge
from servecast.validate.live.target import Target

SCENARIO = """
schema_version: 1
name: tiny
model: {config: tiny/config.json}
gpu: {file: gpu.json}
engine: {version: "0.32", max_num_seqs: 8, max_model_len: 1024, num_gpu_blocks_override: 900, block_size: 32}
workload:
  content: {kind: shared_prefix, groups: 6, prefix_tokens: 256}
  prompt_tokens: {kind: uniform, tokens: 60, range_ratio: 0.5}
  output_tokens: 8
  arrivals: {kind: poisson, request_rate: 20}
  num_requests: 40
"""
ROUTERS = ("round_robin", "prefix_affinity")


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A scenario of one replica, which the load generator simulates."""
    write_tiny_model(tmp_path / "tiny")
    find_gpu("L4").save(tmp_path / "gpu.json")
    path = tmp_path / "tiny.yaml"
    path.write_text(SCENARIO)
    monkeypatch.setenv("FAKE_SCENARIO", str(path))
    return path


@pytest.fixture
def targets(file: Path) -> Iterator[list[Target]]:
    with FakeServer() as one, FakeServer() as other:
        yield [Target(server.url, "tiny", str(file.parent / "tiny")) for server in (one, other)]


@pytest.fixture
def split(file: Path, targets: list[Target], tmp_path: Path) -> Callable[..., Split]:
    def make(changes: dict[str, Any] | None = None, **options: Any) -> Split:
        scenario = load(file, {"fleet.replicas": 2} | (changes or {}))
        python = str(fake_python(tmp_path))
        return Split(
            scenario,
            **{"server": targets, "routers": ROUTERS, "out": tmp_path / "out"} | options,
            request_rate=20,
            num_requests=40,
            python=python,
        )

    return make


@pytest.fixture
def hits(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes the replicas count what is given: a share of hits a router, or what is off the predicted one."""

    def install(found: Split, *shares: float, off: float = 0.0) -> None:
        def counters(_target: Target) -> tuple[float, float]:
            router = list(found.found)[asked[0] // 4]
            after = asked[0] % 4 >= 2  # both replicas before, then both after
            asked[0] += 1
            share = found.found[router]["predicted"]["prefix_hit_rate"] + off
            if shares:
                share = shares[(asked[0] - 1) // 4]
            return (1000.0, 1000.0 * share) if after and share == share else (0.0, 0.0)

        asked = [0]
        monkeypatch.setattr(split_module, "_counters", counters)

    return install


@pytest.fixture
def command(
    file: Path, targets: list[Target], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, dict[str, Any]]]:
    """``servecast validate split`` with replicas that only look started; counts those that were ended."""
    ended: list[Target] = []

    def run(*options: str) -> tuple[int, dict[str, Any]]:
        waiting = list(targets)

        @contextmanager
        def started(*_: Any) -> Iterator[Started]:
            target = waiting.pop(0)
            try:
                yield Started(target, None, 0)
            finally:
                ended.append(target)

        monkeypatch.setattr(split_module, "started", started)
        code = main(
            [
                *("validate", "split", str(file), "--serve", str(tmp_path / "tiny"), "--replicas", "2"),
                *("--request-rate", "20", "--num-requests", "40", "--out", str(tmp_path / "out")),
                *("--vllm-python", str(fake_python(tmp_path)), *options),
            ]
        )
        kept = tmp_path / "out" / "result.json"
        return code, json.loads(kept.read_text()) | {"ended": len(ended)} if kept.exists() else {}

    return run


# the verdict


def test_hits_as_predicted_pass_on_servers_that_run_already(split: Any, hits: Any, tmp_path: Path) -> None:
    found = split()
    hits(found, off=0.01)
    found.run()
    verdict = judge(found)
    assert (verdict.state, verdict.exit_code) == ("pass", 0), verdict.reasons
    for router in ROUTERS:
        row = found.found[router]
        assert sum(row["requests"]) == 40
        assert row["measured"]["prefix_hit_rate"] - row["predicted"]["prefix_hit_rate"] == pytest.approx(0.01)
        assert (tmp_path / "out" / router / "prediction.json").exists()
    ranking = found.ranking()["prefix_hit_rate"]
    assert ranking == {"predicted": "prefix_affinity", "measured": "prefix_affinity"}


def test_hits_beyond_two_points_fail(split: Any, hits: Any) -> None:
    found = split()
    hits(found, off=0.03)
    found.run()
    verdict = judge(found)
    assert verdict.exit_code == 1
    assert len(verdict.reasons) == 2
    assert verdict.reasons[0].startswith("round_robin: prefix hits predicted")


@pytest.mark.parametrize(
    ("predicted", "measured", "state"),
    [
        ((0.50, 0.60), (0.51, 0.59), "pass"),
        ((0.50, 0.515), (0.515, 0.50), "pass"),  # a tie on both sides
        ((0.50, 0.525), (0.51, 0.515), "pass"),
        ((0.50, 0.525), (0.515, 0.51), "fail"),  # the other way round
        ((0.50, 0.60), (0.53, 0.60), "fail"),
        ((0.50, 0.60), (0.60, 0.50), "fail"),
    ],
)
def test_routers_rank_as_predicted(
    split: Any, predicted: tuple[float, ...], measured: tuple[float, ...], state: str
) -> None:
    found = split()
    found.finished = True
    for router, *rates in zip(ROUTERS, predicted, measured, strict=True):
        sides = [dict.fromkeys(split_module.BETTER, rate) for rate in rates]
        found.found[router] = {"predicted": sides[0], "measured": sides[1], "problems": []}
    assert judge(found).state == state


def test_replicas_that_count_no_hits_are_inconclusive(split: Any, hits: Any) -> None:
    found = split()
    hits(found, 0.5, float("nan"))
    found.run()
    verdict = judge(found)
    assert verdict.exit_code == 3
    assert "prefix_affinity: the replicas counted no look-ups" in verdict.reasons[0]
    assert found.ranking()["prefix_hit_rate"]["measured"] is None


def test_failed_requests_and_a_late_client_are_inconclusive(
    split: Any, hits: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = split_module.read

    def disturbed(path: Path) -> Any:
        reading = real(path)
        requests = reading.run.requests
        requests.loc[::2, "status"] = "failed"
        requests["sent"] += np.arange(len(requests)) / 100
        return reading

    monkeypatch.setattr(split_module, "read", disturbed)
    found = split()
    hits(found)
    found.run()
    verdict = judge(found)
    assert verdict.exit_code == 3
    assert any("of 40 requests failed" in reason for reason in verdict.reasons)
    assert any("the client was late" in reason for reason in verdict.reasons)


# what is kept when something breaks


def test_a_benchmark_is_bounded_in_time(split: Any, hits: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    given = []
    real = split_module.run_bench

    def bench(*args: Any, **options: Any) -> Any:
        given.append(options["timeout_s"])
        return real(*args, **options)

    monkeypatch.setattr(split_module, "run_bench", bench)
    found = split()
    hits(found)
    found.run()
    assert len(given) >= 3
    assert all(100 < seconds < 200 for seconds in given)


def test_the_result_is_on_disk_after_each_router(
    command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Split._measure
    seen = []

    def measure(self: Split, router: str, *args: Any) -> Any:
        if router == "prefix_affinity":
            seen.append(json.loads((tmp_path / "out" / "result.json").read_text()))
        row = real(self, router, *args)
        row["measured"]["prefix_hit_rate"] = self.found[router]["predicted"]["prefix_hit_rate"]
        return row | {"problems": []}

    monkeypatch.setattr(Split, "_measure", measure)
    monkeypatch.setattr(split_module, "_counters", lambda target: (0.0, 0.0))
    code, kept = command()
    assert (code, kept["verdict"], kept["finished"], kept["ended"]) == (0, "pass", True, 2)
    (part,) = seen
    assert (part["verdict"], part["finished"]) == ("inconclusive", False)
    assert "measured" in part["routers"]["round_robin"]
    assert "measured" not in part["routers"]["prefix_affinity"]


@pytest.mark.parametrize(
    "error",
    [InputError("is odd", "trace", "Look."), OSError(28, "no space")],
)
def test_an_error_after_the_first_router_keeps_it(
    command: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    real = Split._measure

    def measure(self: Split, router: str, *args: Any) -> Any:
        if router == "prefix_affinity":
            raise error
        return real(self, router, *args)

    monkeypatch.setattr(Split, "_measure", measure)
    monkeypatch.setattr(split_module, "_counters", lambda target: (0.0, 0.0))
    code, kept = command()
    assert (code, kept["verdict"], kept["finished"], kept["ended"]) == (3, "inconclusive", False, 2)
    assert kept["reasons"][0] == f"not all routers were measured: {error}"
    assert "measured" in kept["routers"]["round_robin"]
    assert capsys.readouterr().out.count(str(error)) == 1


def test_sigterm_ends_benchmarks_and_replicas(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, not when the benchmarks have ended."""

    def bench(*_: Any, **__: Any) -> None:
        if not signals:
            signals.append(threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)))
            signals[0].start()
        done = subprocess.run([sys.executable, "-c", "import time; time.sleep(600)"], check=False)
        ended.append(done.returncode)
        raise InputError("was killed", "bench", "Look.")

    signals: list[threading.Timer] = []
    ended: list[int] = []
    monkeypatch.setattr(split_module, "run_bench", bench)
    monkeypatch.setattr(split_module, "_counters", lambda target: (0.0, 0.0))
    code, kept = command()
    assert set(ended) == {-signal.SIGKILL}
    assert (code, kept["verdict"], kept["ended"]) == (3, "inconclusive", 2)
    assert kept["reasons"] == ["stopped by hand"]


# what is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fleet.replicas": 1}, "several replicas that are alike"),
        ({"fleet.replicas": 3}, "that of the servers"),
        ({"engine.enable_prefix_caching": False}, "without a prefix cache there are no hits"),
    ],
)
def test_what_cannot_be_judged_is_refused(
    split: Any, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        split(changes).run()
    assert not (tmp_path / "out").exists()


def test_a_folder_with_a_result_is_refused(
    command: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "result.json").write_text("{}")
    assert command() == (2, {"ended": 0})
    assert "holds the result of an earlier run" in capsys.readouterr().err
