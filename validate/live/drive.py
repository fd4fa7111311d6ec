"""One load on a live server: predicted, then driven by ``vllm bench serve`` and watched meanwhile."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd

from servecast.calibrate.measure.vllm.bench_serve import TookTooLongError, run_bench
from servecast.sim.inputs.errors import InputError
from servecast.sim.inputs.files import write_whole
from servecast.sim.metrics.metrics import duration
from servecast.sim.metrics.records import Run
from servecast.sim.run.results import cautions, result, to_text
from servecast.sim.run.simulate import simulate
from servecast.sim.scenario.deployment import Deployment
from servecast.sim.traffic.trace_writers import write_timed_trace
from servecast.validate.live.loads import SWEPT, Load
from servecast.validate.live.target import Target, without
from servecast.validate.live.telemetry import DCGM, Prometheus, gpu_sampler, scraper
from servecast.validate.readers import READERS, Reading

RANKS = (50, 90, 95, 99)
BENCH_START_S = 20.0  # vllm bench serve imports torch and reads the tokenizer before it sends
SLOWER = 3.0  # a run that takes this many times its prediction is given up
_CUT_OFF = "ended before its last token"
_IGNORES_EOS = "Do streams break off, or does ignore_eos not reach the server?"


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a load was predicted to do, as it stands on disk.

    Attributes:
        folder: of trace.jsonl, the load's requests as the benchmark reads them, and prediction.json.
        runs: one a seed. cautions: about them. sha256, trace_sha256: of the files. written_at: ISO 8601.
    """

    folder: Path
    runs: tuple[Run, ...]
    cautions: tuple[str, ...]
    sha256: str
    trace_sha256: str
    written_at: str

    @property
    def seconds(self) -> float:
        """How long the load takes."""
        return duration(self.runs[0])


@dataclass(frozen=True, slots=True)
class Outcome:
    """What happened under a load.

    Attributes:
        started_at: ISO 8601. hash_seed: the benchmark's PYTHONHASHSEED, which makes its prompts.
        measured: None if the load did not end. telemetry: see telemetry.METRICS, by time_s of the client's
            clock; empty if not read. gpu: means while requests were in flight.
        recording: the recorder's file. problem: what went wrong. timed_out: it was given up for time.
    """

    load: Load
    prediction: Prediction
    started_at: str
    hash_seed: int
    measured: Reading | None
    telemetry: pd.DataFrame
    gpu: Mapping[str, float]
    recording: Path | None = None
    problem: str | None = None
    timed_out: bool = False


def predict(load: Load, deployment: Deployment, seeds: range, out: Path) -> Prediction:
    """Simulate a load once a seed, and write its trace and prediction.json to a folder of its name in out."""
    folder, stages = out / load.name, load.stages()
    folder.mkdir(parents=True, exist_ok=True)
    write_timed_trace(load.requests, folder / "trace.jsonl")
    runs = tuple(simulate(deployment, seed=seed, stages=stages) for seed in seeds)
    now, trace_sha256 = _now(), file_sha256(folder / "trace.jsonl")
    document = {
        "load": load.to_json(),
        "trace_sha256": trace_sha256,
        "written_at": now,
        "replications": [result(deployment, run, ranks=RANKS) for run in runs],
    }
    path = folder / "prediction.json"
    write_whole(path, lambda part: part.write_text(to_text(document), encoding="utf-8"))
    said = tuple(cautions(deployment, runs[0]))
    return Prediction(folder, runs, said, file_sha256(path), trace_sha256, now)


def file_sha256(path: Path) -> str:
    """Of a file's content, in hexadecimal digits."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def drive(
    load: Load,
    prediction: Prediction,
    target: Target,
    *,
    python: str,
    recording: Path | None = None,
    prometheus: Prometheus | None = None,
    most_s: float | None = None,
) -> Outcome:
    """Run a load, and keep what the benchmark, the engine and the GPU say of it beside its prediction.

    Args:
        python: that has vllm, for the benchmark. recording: file that the server's recorder writes.
        prometheus: asked instead of the server's /metrics.
        most_s: how long the benchmark may take at most.
    """
    folder = prediction.folder
    began, unix, now = time.perf_counter(), time.time(), _now()
    at = recording.stat().st_size if recording is not None and recording.exists() else 0
    hash_seed = int(unix) % (1 << 32)  # prompts that no server has seen
    bound = () if load.max_concurrency is None else ("--max-concurrency", str(load.max_concurrency))
    timeout_s = SLOWER * prediction.seconds + 5 * BENCH_START_S
    measured, problem, timed_out = None, None, False
    scrape = scraper(f"{target.engine}/metrics") if prometheus is None else None
    gpu = gpu_sampler() if target.here else None
    with ExitStack() as stack:
        for sampler in (scrape, gpu):
            if sampler is not None:
                stack.enter_context(sampler)
        try:
            said = run_bench(
                target,
                folder / "trace.jsonl",
                folder / "bench.json",
                python=python,
                args=bound,
                hash_seed=hash_seed,
                timeout_s=timeout_s if most_s is None else min(timeout_s, most_s),
            )
            measured = _read(said, folder / "bench.json", load)
        except InputError as error:
            problem, timed_out = without(target.key, str(error)), isinstance(error, TookTooLongError)
    first, last = (math.nan, math.nan) if measured is None else _in_flight(measured)
    telemetry = pd.DataFrame()
    if scrape is not None:
        telemetry = scrape.frame()
    elif prometheus is not None:
        over = time.time() if measured is None else min(last - began + unix, time.time())
        try:
            telemetry, notes = prometheus.of_load(unix, over)
            telemetry["time_s"] += began - unix
            measured = None if measured is None else replace(measured, notes=(*measured.notes, *notes))
        except InputError as error:
            problem = problem or str(error)
    telemetry.to_csv(folder / "metrics.csv", index=False)
    means = {name: mean for name, mean in _means(telemetry, first, last).items() if name in DCGM}
    if gpu is not None:
        seen = gpu.frame()
        seen.to_csv(folder / "gpu.csv", index=False)
        means |= _means(seen, first, last)
    return Outcome(
        load=load,
        prediction=prediction,
        started_at=now,
        hash_seed=hash_seed,
        measured=measured,
        telemetry=telemetry,
        gpu=means,
        recording=_part(recording, at, folder / "recording.jsonl"),
        problem=problem,
        timed_out=timed_out,
    )


def _read(said: Mapping[str, Any], file: Path, load: Load) -> Reading:
    """What the benchmark said in a file, with the load's rate, which it does not know.

    A stream that breaks off after its first token is completed to vLLM. Here it has failed. Requests are in
    the same order in both.
    """
    asked = load.requests.output_tokens.tolist()
    details = (said.get(name, ()) for name in ("errors", "ttfts", "output_lens", "itls"))
    errors = [
        _CUT_OFF if not error and ttft and max(tokens, 1 + len(gaps)) < wanted else error
        for error, ttft, tokens, gaps, wanted in zip(*details, asked, strict=False)
    ]
    if count := errors.count(_CUT_OFF):
        said = {**said, "errors": errors, "completed": said["completed"] - count}
        if not said["completed"]:
            raise InputError(f"every request {_CUT_OFF}", where=file.name, fix=_IGNORES_EOS)
    (reading,) = READERS["vllm"].read([said], file)
    notes = (f"{count} requests failed: each {_CUT_OFF}. {_IGNORES_EOS}",) if count else ()
    rate = load.request_rate if load.kind in SWEPT else reading.context.request_rate
    context = replace(reading.context, request_rate=rate)
    return replace(reading, context=context, notes=(*reading.notes, *notes))


def _in_flight(reading: Reading) -> tuple[float, float]:
    """When the first request was sent and the last one ended, on the client's clock, s."""
    run = reading.run
    start = float(run.meta["clock_start_s"])
    return start + float(run.requests["sent"].min()), start + float(run.requests["finish"].max())


def _means(frame: pd.DataFrame, first_s: float, last_s: float) -> dict[str, float]:
    """Of each column, between two times; without those that are not known."""
    if "time_s" not in frame:
        return {}
    means = frame[frame["time_s"].between(first_s, last_s)].drop(columns="time_s").mean()
    return {str(name): float(mean) for name, mean in means.items() if not math.isnan(mean)}


def _part(file: Path | None, start: int, target: Path) -> Path | None:
    """What a recording grew by since it had ``start`` bytes, with its first line, in a file of its own."""
    if file is None or not file.exists():
        return None
    with file.open("rb") as lines:
        head = lines.readline()
        lines.seek(max(start, len(head)))
        target.write_bytes(head + lines.read())
    return target


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
