"""A recorded run of a real ``vllm serve`` on the CPU replays through our scheduler, step by step."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path

import numpy as np
import pytest
from recorded_run import recorded_run
from timing import Machine, judge

from servecast.calibrate.measure.vllm.recording import read_recording
from servecast.calibrate.measure.vllm.tiny_model import write_tiny_model
from servecast.sim.inputs.errors import InputError
from servecast.validate.parity.parity import Recorded, compare
from servecast.validate.parity.scenarios import random_scenarios
from servecast.validate.parity.vllm_process import ENVIRONMENT, HERE

REQUESTS = 48
START_UP_S = 900.0


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def _wait_until_ready(server: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + START_UP_S
    while time.monotonic() < deadline and server.poll() is None:
        try:
            connection = HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        except OSError:
            time.sleep(0.5)
    pytest.fail(f"vllm serve did not come up:\n{log.read_text()[-3000:]}")


def _send(port: int, prompt: list[int], max_tokens: int, delay: float, leave_after: int | None) -> None:
    """One streaming request, sent after ``delay`` s; hang up after ``leave_after`` chunks."""
    time.sleep(delay)
    connection = HTTPConnection("127.0.0.1", port, timeout=600)
    body = {"model": "tiny", "prompt": prompt, "max_tokens": max_tokens, "stream": True, "ignore_eos": True}
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    assert response.status == 200, response.read()
    chunks = 0
    while line := response.readline():
        chunks += line.startswith(b"data:")
        if leave_after is not None and chunks == leave_after:
            connection.sock.shutdown(socket.SHUT_RDWR) if connection.sock else response.close()
            break
    connection.close()


@pytest.fixture(scope="module")
def undisturbed() -> list[bool]:
    """Whether this machine was left alone while it was recorded, once it was."""
    return []


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory, undisturbed: list[bool]) -> Path:
    """Prompts with shared prefixes on a pool so small that requests preempt each other; some hang up."""
    folder = tmp_path_factory.mktemp("live")
    model = write_tiny_model(folder / "tiny", max_position_embeddings=512)
    port, log, file = _free_port(), folder / "server.log", folder / "steps.jsonl"
    environment = os.environ | {
        "SERVECAST_RECORDING": str(file),
        "PYTHONPATH": str(HERE.parents[1] / "calibrate"),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    command = [
        *(str(ENVIRONMENT / "bin" / "python"), "-m", "vllm.entrypoints.cli.main", "serve", str(model)),
        *("--served-model-name", "tiny", "--load-format", "dummy", "--enforce-eager", "--port", str(port)),
        *("--max-model-len", "512", "--max-num-seqs", "12", "--max-num-batched-tokens", "256"),
        *("--num-gpu-blocks-override", "15", "--scheduler-cls", "measure.vllm.recording_scheduler.Recording"),
    ]
    with log.open("wb") as out:
        server = subprocess.Popen(command, env=environment, stdout=out, stderr=out)
        try:
            _wait_until_ready(server, port, log)
            machine = Machine()
            rng = np.random.default_rng(1)
            shared = rng.integers(0, 256, 256).tolist()
            with ThreadPoolExecutor(REQUESTS) as clients:
                sent = []
                for n in range(REQUESTS):
                    own = rng.integers(0, 256, int(rng.integers(1, 150))).tolist()
                    prompt = shared[: 128 * int(rng.integers(0, 3))] + own
                    max_tokens, delay = int(rng.integers(20, 100)), float(rng.uniform(0, 1.5))
                    leave = int(rng.integers(1, 15)) if n % 8 == 7 else None
                    sent.append(clients.submit(_send, port, prompt, max_tokens, delay, leave))
                for client in sent:
                    client.result()
            undisturbed.append(machine.quiet())
            time.sleep(1.0)  # the recorder flushes when the engine runs empty
        finally:
            server.terminate()
            server.wait(600)
    return file


@pytest.fixture(scope="module")
def recorded(recording: Path) -> Recorded:
    return recorded_run(recording)


@pytest.mark.vllm
def test_replay_of_a_live_run(recorded: Recorded) -> None:
    mismatch = compare(recorded, recorded.scenario.config.version)
    assert mismatch is None, str(mismatch)


@pytest.mark.vllm
def test_the_live_run_is_worth_replaying(recorded: Recorded) -> None:
    events, scenario = recorded.events(), recorded.scenario
    schedules = [event for event in events if "schedule" in event]
    assert len(scenario.arrivals) == REQUESTS
    assert len(schedules) > 300
    assert sum(len(event["preempted"]) for event in schedules) > 0
    assert len(scenario.aborts) > 0
    prompts = {a.request.request_id: a.request.prompt_tokens for a in scenario.arrivals}
    first = {n: tokens for event in reversed(schedules) for n, tokens in event["scheduled"]}
    assert any(first[n] < prompts[n] for n in first), "no prefix hit and no chunked prompt"
    assert len({a.step for a in scenario.arrivals}) > 10


@pytest.mark.vllm
@pytest.mark.parametrize("version", ["0.23", "0.32"])
def test_recording_with_async_scheduling(tmp_path: Path, version: str) -> None:
    """The CPU server schedules synchronously, so the other class records without one; aborts included."""
    drawn = random_scenarios(version, 11, 200)
    scenario = next(
        s for s in drawn if len(s.aborts) > 8 and s.config.async_scheduling and s.config.enable_prefix_caching
    )
    driver = (
        "from measure.vllm import recording_scheduler as r; import vllm_scheduler as v;"
        "v.Scheduler, v.AsyncScheduler = r.RecordingScheduler, r.RecordingAsyncScheduler; v.main()"
    )
    file = tmp_path / "steps.jsonl"
    folders = [str(HERE), str(HERE.parents[1] / "calibrate")]
    sources = ENVIRONMENT / f"vllm-{version}"
    environment = os.environ | {
        "SERVECAST_RECORDING": str(file),
        "PYTHONPATH": os.pathsep.join([*folders, *([str(sources)] if sources.is_dir() else [])]),
    }
    subprocess.run(
        [str(ENVIRONMENT / "bin" / "python"), "-c", driver],
        input=scenario.to_json() + "\n",
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    recorded = recorded_run(file)
    assert recorded.scenario.config == scenario.config
    assert len(recorded.scenario.arrivals) == len(scenario.arrivals)
    assert {abort.in_flight for abort in recorded.scenario.aborts} == {True, False}
    mismatch = compare(recorded, version)
    assert mismatch is None, str(mismatch)


@pytest.mark.vllm
def test_recording_is_cheap(recording: Path, undisturbed: list[bool]) -> None:
    run = read_recording(recording)
    microseconds = run.cost_ns / len(run.steps) / 1000
    assert microseconds > 0
    what = f"recording took {microseconds:.1f} us a step over {len(run.steps)} steps"
    judge(what, microseconds < 500, quiet=all(undisturbed))


def test_not_a_recording(tmp_path: Path) -> None:
    file = tmp_path / "other.jsonl"
    file.write_text('{"a": 1}\n')
    with pytest.raises(InputError, match="not a recording"):
        recorded_run(file)
