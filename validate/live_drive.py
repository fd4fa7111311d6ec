"""One load on a live server: predicted, then driven by ``vllm bench serve`` and watched meanwhile."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd

from servecast.calibrate.measure.bench_serve import run_bench
from servecast.calibrate.measure.errors import MeasureError
from servecast.sim.deployment import Deployment
from servecast.sim.errors import InputError
from servecast.sim.metrics import duration
from servecast.sim.records import Run
from servecast.sim.results import cautions, result, to_text
from servecast.sim.scenario import Scenario
from servecast.sim.simulate import simulate
from servecast.sim.whole_file import write_whole
from servecast.validate.live_plan import SWEPT, Load
from servecast.validate.live_server import Target
from servecast.validate.readers import Reading, read
from servecast.validate.telemetry import Prometheus, gpu_sampler, scraper

RANKS = (50, 90, 95, 99)
BENCH_START_S = 20.0  # vllm bench serve imports torch and reads the tokenizer before it sends
_SLOWER = 3.0  # a run that takes this many times its prediction is given up


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a load was predicted to do, as it stands on disk.

    Attributes:
        runs: one a seed. cautions: about them. sha256: of the file. written_at: ISO 8601.
    """

    runs: tuple[Run, ...]
    cautions: tuple[str, ...]
    sha256: str
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
            clock; empty if not read. gpu: means by the driver. recording: the recorder's file.
        problem: what went wrong.
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


def predict(load: Load, scenario: Scenario, deployment: Deployment, seeds: range) -> Prediction:
    """Simulate a load once a seed, and write prediction.json beside its trace."""
    runs = tuple(
        simulate(scenario, seed=seed, workload=load.workload(), deployment=deployment) for seed in seeds
    )
    now = _now()
    document = {
        "load": load.to_json(),
        "trace_sha256": hashlib.sha256(load.trace.read_bytes()).hexdigest(),
        "written_at": now,
        "replications": [result(scenario, deployment, run, what_if={}, ranks=RANKS) for run in runs],
    }
    path = load.trace.with_name("prediction.json")
    write_whole(path, lambda part: part.write_text(to_text(document), encoding="utf-8"))
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    return Prediction(runs, tuple(cautions(deployment, runs[0])), sha256, now)


def drive(
    load: Load,
    prediction: Prediction,
    target: Target,
    *,
    python: str,
    recording: Path | None = None,
    prometheus: Prometheus | None = None,
    bench_args: tuple[str, ...] = (),
) -> Outcome:
    """Run a load, and keep what the benchmark, the engine and the GPU say of it beside its trace.

    Args:
        python: that has vllm, for the benchmark. recording: file that the server's recorder writes.
        prometheus: asked instead of the server's /metrics. bench_args: further flags of the benchmark.
    """
    folder = load.trace.parent
    began, unix, now = time.perf_counter(), time.time(), _now()
    at = recording.stat().st_size if recording is not None and recording.exists() else 0
    hash_seed = int(unix) % (1 << 32)  # prompts that no server has seen
    bound = () if load.max_concurrency is None else ("--max-concurrency", str(load.max_concurrency))
    measured, problem = None, None
    scrape = scraper(f"{target.engine}/metrics") if prometheus is None else None
    gpu = gpu_sampler()
    with ExitStack() as stack:
        for sampler in (scrape, gpu):
            if sampler is not None:
                stack.enter_context(sampler)
        try:
            run_bench(
                target.base_url,
                target.model,
                target.tokenizer,
                load.trace,
                folder / "bench.json",
                python=python,
                endpoint=target.endpoint,
                args=(*bound, *bench_args),
                api_key_env=target.api_key_env,
                hash_seed=hash_seed,
                timeout_s=_SLOWER * prediction.seconds + 5 * BENCH_START_S,
            )
            measured = _as_sent(read(folder / "bench.json"), load)
        except (MeasureError, InputError) as error:
            problem = _without(target.key, str(error))
    telemetry = pd.DataFrame()
    if scrape is not None:
        telemetry = scrape.frame()
    elif prometheus is not None:
        try:
            telemetry = prometheus.frame(unix, time.time())
            telemetry["time_s"] += began - unix
        except InputError as error:
            problem = problem or str(error)
    telemetry.to_csv(folder / "metrics.csv", index=False)
    seen = pd.DataFrame() if gpu is None else gpu.frame()
    return Outcome(
        load=load,
        prediction=prediction,
        started_at=now,
        hash_seed=hash_seed,
        measured=measured,
        telemetry=telemetry,
        gpu={str(name): float(seen[name].mean()) for name in seen if name != "time_s"},
        recording=_part(recording, at, folder / "recording.jsonl"),
        problem=problem,
    )


def _as_sent(reading: Reading, load: Load) -> Reading:
    """With the rate that the trace stood for, which the benchmark does not know."""
    if load.plan not in SWEPT:
        return reading
    return replace(reading, context=replace(reading.context, request_rate=load.request_rate))


def _part(file: Path | None, start: int, target: Path) -> Path | None:
    """What a recording grew by since it had ``start`` bytes, with its first line, in a file of its own."""
    if file is None or not file.exists():
        return None
    with file.open("rb") as lines:
        head = lines.readline()
        lines.seek(max(start, len(head)))
        target.write_bytes(head + lines.read())
    return target


def _without(key: str | None, text: str) -> str:
    return text if key is None else text.replace(key, "***")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
