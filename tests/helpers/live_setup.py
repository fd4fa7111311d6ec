"""Live servers of the tests: their scenarios, their calibration, and ways to disturb them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from metronome_law import Law
from metronome_setup import FLAGS as MEASURED_FLAGS
from metronome_setup import metronome_environment

from servecast.calibrate.fit.folder import FolderFit, fit_folder
from servecast.calibrate.measure.facts import collect
from servecast.calibrate.measure.served import FrontEnd
from servecast.calibrate.measure.turns import in_turn
from servecast.calibrate.measure.vllm.recording import read_recording
from servecast.sim.hardware.gpu import GPU
from servecast.validate.live.own_server import OwnServer
from servecast.validate.live.target import Target
from servecast.validate.parity.vllm_process import ENVIRONMENT

PYTHON = str(ENVIRONMENT / "bin" / "python")
FLAGS = (
    *("--worker-cls", "metronome.MetronomeWorker", "--distributed-executor-backend", "uni"),
    *("--load-format", "dummy"),
)
LEVELS = (2, 12)  # requests in progress while a front end is measured
SCENARIO = """
schema_version: 1
name: metronome
description: A vLLM whose steps last what a known law says, and no GPU.
model: {config: model/config.json}
gpu: {file: gpu.json}
profile: profile.json
engine: {version: "0.32", max_model_len: 2048, max_num_seqs: 16, max_num_batched_tokens: 512, block_size: 128,
  enforce_eager: true, async_scheduling: false}
workload:
  prompt_tokens: {kind: uniform, tokens: 200, range_ratio: 0.7}
  output_tokens: {kind: uniform, tokens: 40, range_ratio: 0.6}
  arrivals: {kind: poisson, request_rate: 4}
  num_requests: 100
slo: ["ttft:p95:300"]
"""


def write_scenario(folder: Path, text: str, model: Path, gpu: GPU) -> Path:
    """The scenario's file in a folder with its model, beside the GPU's; the profile comes later."""
    (folder / "model").symlink_to(model)
    gpu.save(folder / "gpu.json")
    file = folder / "scenario.yaml"
    file.write_text(text)
    return file


@dataclass(frozen=True)
class Calibrated:
    """A metronome's model, where its GPU's peaks would lie, its measurements, and the profile that was fitted
    to these.

    disturbed: what says that this machine did not keep time while it was measured.
    """

    model: Path
    gpu: GPU
    measured: Path
    profile: Path
    disturbed: list[str] = field(default_factory=list)

    def scenario(self, folder: Path, text: str) -> Path:
        """Its scenario's file in a folder, beside model, GPU and profile."""
        file = write_scenario(folder, text, self.model, self.gpu)
        if self.profile.exists():
            shutil.copy(self.profile, folder / "profile.json")
        return file


def metronome(model: Path, law: dict[str, Any]) -> OwnServer:
    """A metronome to start; its decisions are recorded."""
    return OwnServer(model, FLAGS, PYTHON, metronome_environment(law), recorder=True)


def measure(what: str, model: Path, out: Path, law: dict[str, Any], *flags: str) -> Path:
    """What ``calibrate measure`` finds of a metronome, in a folder."""
    subprocess.run(
        [
            *(str(Path(sys.executable).with_name("servecast")), "calibrate", "measure", what),
            *("--python", PYTHON, "--model", str(model), "--out", str(out), "--name", "model", *flags),
            *MEASURED_FLAGS,
        ],
        env=os.environ | metronome_environment(law),
        check=True,
        capture_output=True,
    )
    return out


def measure_steps(model: Path, out: Path, law: dict[str, Any], *regions: str) -> Path:
    """Step times of a metronome, by ``calibrate measure engine``; all regions if none is named."""
    few = ("--steps", "5", "--long-run-steps", "80", "--largest", "70000", "--case-seconds", "0.4")
    return measure("engine", model, out, law, *few, *(("--regions", *regions) if regions else ()))


def measure_overheads(target: Target, recording: Path, out: Path, levels: Sequence[int]) -> int:
    """Add what stands between client and engine of a server that runs, as ``calibrate measure served``
    measures it on one of its own. Returns how long the recording was when the second turn began."""
    front_end = FrontEnd(target, recording, output_tokens=24, python=PYTHON)
    rows, second = list[dict[str, Any]](), 0
    for _, turn, found in in_turn(levels, lambda level, turn: front_end.measure(out, level, turn), {}):
        rows += found
        if turn == 1:
            second = recording.stat().st_size
    with (out / "engine.jsonl").open("a") as file:
        for number, row in enumerate(rows):
            file.write(json.dumps({"model": "model", "case": f"model/served/{number}"} | row) + "\n")
    return second


def calibrate(folder: Path, gpu: GPU, profile: Path) -> FolderFit:
    """Fit a profile to a folder of measurements."""
    fit = fit_folder(folder, gpu=gpu)
    fit.profile.save(profile)
    return fit


@dataclass(frozen=True)
class RecordedStep:
    """A step by a server's recorder: when it was decided, when its result was there, and when that of the one
    before was, in s; the (tokens, context) of its chunks, its decodes' contexts, its samples."""

    began: float
    ended: float
    before: float
    chunks: list[tuple[int, int]]
    contexts: list[int]
    samples: int

    @property
    def directly(self) -> bool:
        """Whether the engine did not run empty before it."""
        return self.began - self.before < 0.002

    @property
    def seconds(self) -> float:
        return self.ended - (self.before if self.directly else self.began)


def recorded_steps(recording: Path) -> Iterator[RecordedStep]:
    """The steps that a recording holds."""
    run = read_recording(recording)
    before = 0.0
    for step in run.steps:
        if step.ended is None:
            break
        if step.scheduled:
            work = [(run.requests[request].prompt_tokens, n, done) for request, n, done in step.scheduled]
            yield RecordedStep(
                step.began / 1e9,
                step.ended / 1e9,
                before,
                [(n, done) for prompt, n, done in work if done < prompt],
                [n + done for prompt, n, done in work if done >= prompt],
                sum(n + done >= prompt for prompt, n, done in work),
            )
        before = step.ended / 1e9


def lost_time(recording: Path, law: dict[str, Any], start_s: float, end_s: float) -> float:
    """The share of a span of time by which a metronome's steps were longer than their law."""
    known = Law(json.dumps(law))
    lost = 0.0
    for step in recorded_steps(recording):
        if start_s <= step.began <= end_s:
            lasts = known.seconds(step.chunks, len(step.contexts), sum(step.contexts))
            lost += max(0.0, step.seconds - lasts - 0.005)  # less is made up for by the step after it
    return lost / (end_s - start_s)


def steps_folder(recording: Path, model: Path, out: Path) -> Path:
    """What a recording says of step times, as a folder of measurements."""
    engine = json.loads(recording.read_text().partition("\n")[0])[1]
    version = engine["version"].split("+")[0]
    rows: list[dict[str, Any]] = [
        {
            "row": "engine",
            "case": "model/engine",
            "model": "model",
            "config": json.loads((model / "config.json").read_text()),
            "flags": engine | {"version": version, "enforce_eager": True},
        }
    ]
    rows += [
        {
            "row": "step",
            "case": f"model/recorded/{number}",
            "model": "model",
            "region": "long_run",
            "chunks": step.chunks,
            "decodes": len(step.contexts),
            "decode_context": sum(step.contexts),
            "samples": step.samples,
            "times_s": [step.seconds],
        }
        for number, step in enumerate(recorded_steps(recording))
        if step.directly
    ]
    out.mkdir()
    (out / "facts.json").write_text(json.dumps(collect() | {"vllm": version}))
    (out / "engine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return out


@contextmanager
def slowed(pid: int, *, stop_s: float = 0.05, go_s: float = 0.1) -> Iterator[None]:
    """Every process of a group stands still again and again while the block lasts."""
    over = threading.Event()

    def loop() -> None:
        while not over.wait(go_s):
            os.killpg(pid, signal.SIGSTOP)
            time.sleep(stop_s)
            os.killpg(pid, signal.SIGCONT)

    thread = threading.Thread(target=loop)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def starved_python(folder: Path) -> str:
    """A Python with vLLM that gets no CPU for most of the time from when it has a socket."""
    file = folder / "starved-python"
    file.write_text(
        f"""#!{sys.executable}
import os, signal, subprocess, sys, time
process = subprocess.Popen([{PYTHON!r}, *sys.argv[1:]])
files, sends = f"/proc/{{process.pid}}/fd", False
while process.poll() is None:
    time.sleep(0.1)
    try:
        sends = sends or any("socket" in os.readlink(f"{{files}}/{{each}}") for each in os.listdir(files))
    except OSError:
        continue
    if sends:
        process.send_signal(signal.SIGSTOP)
        time.sleep(0.2)
        process.send_signal(signal.SIGCONT)
sys.exit(process.returncode)
"""
    )
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    return str(file)
