"""A live vLLM driven and compared with what was predicted of it before.

The order is what makes it a test: the server says what it is, the predictions of all loads are written to
disk, then the loads run, each by ``vllm bench serve`` on a trace that the prediction used as well.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd

from servecast.calibrate.measure.bench_serve import run_bench
from servecast.calibrate.measure.errors import MeasureError
from servecast.calibrate.measure.facts import collect
from servecast.calibrate.measure.folder import Budget
from servecast.calibrate.measure.server import VllmServer, recording
from servecast.sim import capacity
from servecast.sim.deployment import Deployment
from servecast.sim.errors import InputError
from servecast.sim.metrics import duration
from servecast.sim.records import Run
from servecast.sim.results import result
from servecast.sim.scenario import Scenario
from servecast.sim.simulate import RateProbe, simulate
from servecast.validate.live_plan import PLANS, SLO_PLAN, Load, Planner
from servecast.validate.live_server import (
    Target,
    Truth,
    local_gpu,
    overrides,
    proxy_latency_s,
    read_truth,
    refuse_misfit,
    serve_flags,
    warm_up,
)
from servecast.validate.readers import Reading, read
from servecast.validate.telemetry import Prometheus, gpu_sampler, scraper

RANKS = (50, 90, 95, 99)
BENCH_START_S = 20.0  # vllm bench serve imports torch and reads the tokenizer before it sends
SLOWER = 3.0  # a run that takes this many times its prediction is given up


@dataclass(frozen=True, slots=True)
class OwnServer:
    """A server to start: folder of the model, further flags of vllm serve, and the Python that has vllm.

    recorder: record each scheduling decision (costs some microseconds a step).
    """

    model: Path
    args: tuple[str, ...] = ()
    python: str = sys.executable
    env: Mapping[str, str] = field(default_factory=dict)
    recorder: bool = False


@dataclass(frozen=True, slots=True)
class Outcome:
    """One load: what was predicted, and what happened.

    Attributes:
        predicted: a run a seed. prediction_sha256: of the file that was on disk before the load ran.
        measured: None if the load did not end. telemetry: see telemetry.METRICS, by time_s of the client's
            clock; empty if not read. recording: the recorder's file. problem: what went wrong.
    """

    load: Load
    predicted: tuple[Run, ...]
    prediction_sha256: str
    measured: Reading | None
    telemetry: pd.DataFrame
    recording: Path | None = None
    problem: str | None = None


@dataclass(slots=True)
class Campaign:
    """Predicts and measures the loads of some plans on one server.

    Attributes:
        reload: the scenario with fields replaced, by dotted path. server: to start, or where it is.
        out: folder for everything. plans: names of live_plan.PLANS, and "slo".
        seeds: replications of a prediction. time_budget_s: no load is started that would end later.
        prometheus: asked instead of scraping /metrics. python: that has vllm, for the benchmark.
        say: told what is being done.
    """

    reload: Callable[[Mapping[str, Any]], Scenario]
    server: OwnServer | Target
    out: Path
    plans: Sequence[str] = ("rate",)
    duration_s: float = 60.0
    concurrency: tuple[int, ...] = ()
    rates: tuple[float, ...] = ()
    seed: int = 0
    seeds: int = 5
    tolerance: float = 0.05
    time_budget_s: float | None = None
    prometheus: Prometheus | None = None
    python: str = sys.executable
    bench_args: tuple[str, ...] = ()
    key: str | None = None
    say: Callable[[str], None] = lambda _text: None
    outcomes: list[Outcome] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    truth: Truth | None = None
    proxy_s: float | None = None
    max_rate: float | None = None

    def run(self) -> None:
        """Predict and measure; ``outcomes`` has what is done, also after an error.

        Raises:
            InputError: the server is not what the scenario and its profile are of, or a plan is unknown.
            MeasureError: our own server does not start.
        """
        unknown = [name for name in self.plans if name not in PLANS and name != SLO_PLAN]
        if unknown:
            raise InputError(
                f"there is no plan {unknown[0]!r}",
                where="--plan",
                fix=f"Known are {', '.join([*PLANS, SLO_PLAN])}.",
            )
        self.out.mkdir(parents=True, exist_ok=True)
        budget = Budget(self.time_budget_s)
        with ExitStack() as stack:
            target, file = stack.enter_context(self._served({}))
            scenario, deployment = self._meet(target, {})
            planner = Planner(
                scenario,
                deployment,
                self.out,
                self._max_rate(scenario, deployment),
                self.duration_s,
                self.seed,
                self.concurrency,
                self.rates,
            )
            loads = [load for name in self.plans if name != SLO_PLAN for load in PLANS[name](planner)]
            here = [load for load in loads if not load.engine]
            self._all(here, scenario, deployment, target, file, budget)
            if SLO_PLAN in self.plans:
                self._bracket(planner, target, file, budget)
        for load in loads:
            if load.engine:
                self._elsewhere(load, budget)

    def _elsewhere(self, load: Load, budget: Budget) -> None:
        """A load that needs a server with other flags."""
        if isinstance(self.server, Target):
            self.notes.append(f"{load.name} left out: it needs a server with {dict(load.engine)}")
            return
        if not budget.fits(BENCH_START_S):
            self.notes.append(f"{load.name} left out: the time budget is spent")
            return
        with self._served(load.engine) as (target, file):
            changes = {f"engine.{name}": value for name, value in load.engine.items()}
            scenario, deployment = self._meet(target, changes)
            self._all([load], scenario, deployment, target, file, budget)

    def _served(self, engine: Mapping[str, Any]) -> AbstractContextManager[tuple[Target, Path | None]]:
        if isinstance(self.server, Target):
            return nullcontext((self.server, None))
        return _started(self.server, self.reload({}), engine, self.out, self.say)

    def _meet(self, target: Target, changes: Mapping[str, Any]) -> tuple[Scenario, Deployment]:
        """The scenario as the server says it is."""
        facts = collect()
        truth = read_truth(target, gpu=local_gpu(facts, [target.engine]), key=self.key)
        scenario = self.reload({**changes, **overrides(truth, self.reload({}))})
        deployment = Deployment.of(scenario)
        model = self.server.model if isinstance(self.server, OwnServer) else Path(target.tokenizer)
        notes = refuse_misfit(truth, scenario, deployment.profile, model if model.is_dir() else None)
        warm_up(target, key=self.key)
        if target.engine_url is not None:
            self.proxy_s = proxy_latency_s(target, key=self.key)
            costs = deployment.profile.front_end
            slower = replace(costs, latency_s=costs.latency_s + max(self.proxy_s, 0.0))
            deployment = replace(
                deployment, profile=deployment.profile.model_copy(update={"front_end": slower})
            )
        if self.truth is None:
            self.truth = truth
            self.notes += notes
            _write_json(
                self.out / "server.json", {"truth": truth.to_json(), "machine": facts, "notes": notes}
            )
        return scenario, deployment

    def _max_rate(self, scenario: Scenario, deployment: Deployment) -> float:
        """The predicted largest rate at the scenario's SLOs; what a burst is served at without SLOs."""
        self.say("predicting the largest rate")
        probe = RateProbe(scenario, deployment=deployment)
        start = capacity.first_guess(probe, self.seed)
        goodput = scenario.goodput_limits
        if not scenario.slos and goodput is None:
            return 2 * start
        found = capacity.plan(probe, scenario.slos, goodput=goodput, start_rate=start, seed=self.seed, jobs=1)
        self.max_rate = found.max_request_rate
        return found.max_request_rate or start

    def _all(
        self,
        loads: Sequence[Load],
        scenario: Scenario,
        deployment: Deployment,
        target: Target,
        file: Path | None,
        budget: Budget,
    ) -> None:
        """Predict all loads, then run them."""
        self.say(f"predicting {len(loads)} loads")
        predictions = [self._predict(load, scenario, deployment) for load in loads]
        for load, (predicted, sha256) in zip(loads, predictions, strict=True):
            expected = duration(predicted[0]) + BENCH_START_S
            if not budget.fits(expected):
                self.notes.append(
                    f"{load.name} left out: it takes {expected:.0f} s, the time budget has less"
                )
                continue
            outcome = self._measure(load, predicted, sha256, target, file)
            self.outcomes.append(outcome)
            if outcome.problem:
                self.notes.append(f"{load.name}: {outcome.problem}")
                if not _answers(target, self.key):
                    self.notes.append("the server is gone: the loads after it were not run")
                    return

    def _predict(self, load: Load, scenario: Scenario, deployment: Deployment) -> tuple[tuple[Run, ...], str]:
        """Simulate a load and write the prediction; its runs and the file's hash."""
        runs = tuple(
            simulate(scenario, seed=seed, workload=load.workload(), deployment=deployment)
            for seed in range(self.seed, self.seed + self.seeds)
        )
        document = {
            "load": {
                "name": load.name,
                "request_rate": load.request_rate,
                "max_concurrency": load.max_concurrency,
            },
            "trace_sha256": hashlib.sha256(load.trace.read_bytes()).hexdigest(),
            "written_at": time.time(),
            "replications": [result(scenario, deployment, run, what_if={}, ranks=RANKS) for run in runs],
        }
        path = load.trace.with_name("prediction.json")
        _write_json(path, document)
        return runs, hashlib.sha256(path.read_bytes()).hexdigest()

    def _measure(
        self, load: Load, predicted: tuple[Run, ...], sha256: str, target: Target, file: Path | None
    ) -> Outcome:
        expected = duration(predicted[0])
        self.say(f"running {load.name}: about {expected:.0f} s")
        folder, began, unix = load.trace.parent, time.perf_counter(), time.time()
        at = file.stat().st_size if file is not None and file.exists() else 0
        scrape = scraper(f"{target.engine}/metrics") if self.prometheus is None else None
        gpu = gpu_sampler()
        measured, problem = None, None
        with ExitStack() as stack:
            for sampler in (scrape, gpu):
                if sampler is not None:
                    stack.enter_context(sampler)
            limits = () if load.max_concurrency is None else ("--max-concurrency", str(load.max_concurrency))
            try:
                run_bench(
                    target.base_url,
                    target.model,
                    target.tokenizer,
                    load.trace,
                    folder / "bench.json",
                    python=self.python,
                    endpoint=target.endpoint,
                    args=("--ignore-eos", *limits, *self.bench_args),
                    api_key_env=target.api_key_env,
                    hash_seed=1 + len(self.outcomes),  # prompts that this server has not seen
                    timeout_s=SLOWER * expected + 5 * BENCH_START_S,
                )
                measured = read(folder / "bench.json")
            except (MeasureError, InputError) as error:
                problem = str(error)
        if scrape is not None:
            telemetry = scrape.frame()
        else:
            assert self.prometheus is not None
            telemetry = self.prometheus.frame(unix, time.time())
            telemetry["time_s"] += began - unix
        telemetry.to_csv(folder / "metrics.csv", index=False)
        if gpu is not None:
            gpu.frame().to_csv(folder / "gpu.csv", index=False)
        recorded = _part(file, at, folder / "recording.jsonl") if file is not None else None
        return Outcome(load, predicted, sha256, measured, telemetry, recorded, problem)

    def _bracket(self, planner: Planner, target: Target, file: Path | None, budget: Budget) -> None:
        """Measure the largest rate at the SLOs: up or down from the predicted one, then between."""
        scenario, deployment = planner.scenario, planner.deployment
        low: float | None = None
        high: float | None = None
        rate = planner.max_rate
        step = 1 + 2 * self.tolerance
        for _ in range(12):
            load = planner.at_rate(rate, SLO_PLAN)
            count = len(self.outcomes)
            self._all([load], scenario, deployment, target, file, budget)
            if len(self.outcomes) == count or self.outcomes[-1].measured is None:
                return
            if meets(self.outcomes[-1].measured.run, scenario):
                low = rate
            else:
                high = rate
            if low is not None and high is not None:
                if high <= (1 + self.tolerance) * low:
                    return
                rate = (low * high) ** 0.5
            else:
                rate = rate * step if high is None else rate / step


def meets(run: Run, scenario: Scenario) -> bool:
    """Whether one run meets all SLOs of a scenario."""
    return all(margin <= 1.0 for margin in margins(run, scenario))


def margins(run: Run, scenario: Scenario) -> list[float]:
    """Each SLO's statistic in a run over its limit: at most 1 where it holds."""
    from servecast.sim.metrics import good_requests, statistic

    found = [1e3 * statistic(run, slo.metric, slo.statistic) / slo.limit_ms for slo in scenario.slos]
    if scenario.goodput_limits is not None:
        good = good_requests(run, scenario.goodput_limits)
        found.append(0.95 * len(run.requests) / max(good, 1e-9))
    return found


def _answers(target: Target, key: str | None) -> bool:
    try:
        read_truth(target, gpu=None, key=key)
    except InputError:
        return False
    return True


class _started(AbstractContextManager[tuple[Target, "Path | None"]]):
    """Our own server while the block lasts: where it is, and its recorder's file."""

    def __init__(
        self,
        own: OwnServer,
        scenario: Scenario,
        engine: Mapping[str, Any],
        out: Path,
        say: Callable[[str], None],
    ) -> None:
        flags = scenario.engine.model_copy(update=dict(engine))
        flags = flags.model_validate(flags.model_dump(include=flags.model_fields_set | set(engine)))
        args = [*serve_flags(flags), *own.args]
        env = dict(own.env)
        self._file: Path | None = None
        name = "-".join(["server", *(f"{key}-{value}" for key, value in engine.items())])
        if own.recorder:
            self._file = out / f"{name}-recording.jsonl"
            more, variables = recording(self._file)
            args += more
            env |= variables
        say("starting vllm serve")
        self._server = VllmServer(own.model, args, log=out / f"{name}.log", python=own.python, env=env)
        self._model = str(own.model)

    def __enter__(self) -> tuple[Target, Path | None]:
        server = self._server.__enter__()
        return Target(server.base_url, self._model, self._model), self._file

    def __exit__(self, *error: Any) -> None:
        self._server.stop()


def _part(file: Path, start: int, target: Path) -> Path | None:
    """What a recording grew by since it had ``start`` bytes, with its first line, in a file of its own."""
    if not file.exists():
        return None
    with file.open("rb") as lines:
        head = lines.readline()
        if start:
            lines.seek(start)
        else:
            lines.seek(len(head))
        target.write_bytes(head + lines.read())
    return target


def _write_json(path: Path, document: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=1, default=str) + "\n", encoding="utf-8")
