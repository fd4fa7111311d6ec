"""A live vLLM driven and compared with what was predicted of it before.

The order is what makes it a test: the server says what it is, the predictions of all loads are written to
disk, then the loads run, each by ``vllm bench serve`` on a trace that the prediction used as well. The loads
of a search (as "slo") hang on what the ones before showed: each is predicted before it runs.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from servecast.calibrate.measure.facts import collect
from servecast.calibrate.measure.folder import Budget
from servecast.sim.inputs.errors import InputError
from servecast.sim.plan.capacity import first_guess
from servecast.sim.plan.judge import Objectives
from servecast.sim.run.results import write_result
from servecast.sim.run.simulate import RateProbe
from servecast.sim.scenario.deployment import Deployment
from servecast.sim.scenario.scenario import Scenario
from servecast.validate.live.drive import BENCH_START_S, Outcome, drive, file_sha256, predict
from servecast.validate.live.loads import KINDS, SWEPT, Load, Loads, check_kinds
from servecast.validate.live.misfit import refuse_misfit, replaced
from servecast.validate.live.own_server import OwnServer, started
from servecast.validate.live.search import SEARCHES, PredictedRate, predict_rate, search_near
from servecast.validate.live.target import Target, answers, proxy_latency_s, warm_up
from servecast.validate.live.telemetry import Prometheus
from servecast.validate.live.truth import Truth, read_truth

SERVER_START_S = 90.0


@dataclass(frozen=True, slots=True)
class _Served:
    """A server that runs, and the deployment that it says it is. recording: its recorder's file."""

    target: Target
    recording: Path | None
    deployment: Deployment


@dataclass(slots=True)
class Session:
    """Predicts and measures loads on one server.

    Args:
        scenario: what is predicted. server: to start, or where it is.
        out: folder for everything. kinds: of loads, see loads.KINDS and SEARCHED.
        duration_s: how long an open-loop load sends. rates: requests/s, concurrency: levels, instead of each
            kind's own. seed: of the traffic. seeds: replications of a prediction.
        time_budget_s: a load that would end later is not started, and one that has not ended by then is cut.
        prometheus: asked instead of scraping /metrics. python: that has vllm, for the benchmark.
        say: told what is being done.
        after_load: called when a load has ended, to keep what is done.

    Attributes:
        outcomes: of the loads that ran, also after an error.
        predicted_rates: where the searches end in simulation, before any load runs: those of the kinds "slo"
            and "knee", and that of the largest rate wherever loads are chosen by it. They judge a load in the
            way in which what was measured is judged, so that the two can be compared; ``servecast plan`` is
            stricter: it asks for confidence over other traffic, in a steady state.
        profile_sha256: before anything ran. truth, machine: of the server, and of this machine.
        proxy_s: what a proxy adds to a request.
        left_out: loads for which the time budget did not last.
        stopped: why it ended before its end. finished: whether it came to that.
    """

    scenario: Scenario
    server: OwnServer | Target
    out: Path
    kinds: Sequence[str] = ("rate",)
    duration_s: float = 60.0
    rates: tuple[float, ...] = ()
    concurrency: tuple[int, ...] = ()
    seed: int = 0
    seeds: int = 5
    time_budget_s: float | None = None
    prometheus: Prometheus | None = None
    python: str = sys.executable
    say: Callable[[str], None] = lambda _text: None
    after_load: Callable[[Session], object] = lambda _session: None
    outcomes: list[Outcome] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    truth: Truth | None = None
    machine: Mapping[str, Any] = field(default_factory=collect)
    proxy_s: float | None = None
    predicted_rates: list[PredictedRate] = field(default_factory=list)
    profile_sha256: str | None = None
    left_out: list[str] = field(default_factory=list)
    stopped: str | None = None
    finished: bool = False

    @property
    def max_rate(self) -> float | None:
        """The predicted largest rate at the objectives, None if it was not looked for or not bracketed."""
        ends = next((each.ends for each in self.predicted_rates if each.kind == "slo"), None)
        return None if ends is None or not ends.low or math.isinf(ends.high) else ends.estimate

    def run(self) -> None:
        """Predict and measure. Ctrl-C, a server that dies, or an error after the first load ends it with what
        is done.

        Raises:
            InputError: the server is not what the scenario and its profile are of, it does not start, or a
                kind of load is unknown or does not fit the scenario.
        """
        check_kinds(self.kinds, self.rates, self.concurrency)
        if "slo" in self.kinds and Objectives.of(self.scenario) is None:
            raise InputError(
                "there is no SLO to search the largest rate of",
                where=f"{self.scenario.source}: slo",
                fix="Add one, for example ttft:p95:500, or leave out --plan slo.",
            )
        if self.scenario.fleet.size > 1:
            raise InputError(
                f"{self.scenario.fleet.size} replicas are more than the one server that is driven",
                where=f"{self.scenario.source}: fleet.replicas",
                fix="Judge one replica: --replicas 1.",
            )
        profile = self.scenario.profile_file()
        self.profile_sha256 = None if profile is None else file_sha256(profile)
        self.out.mkdir(parents=True, exist_ok=True)
        budget = Budget(self.time_budget_s)
        try:
            elsewhere = self._at_home(budget)
            for load in elsewhere:
                if self.stopped is None:
                    self._elsewhere(load, budget)
        except KeyboardInterrupt:
            self.stopped = "stopped by hand"
        except (InputError, OSError) as error:
            if not self.outcomes:
                raise
            self.stopped = f"not all loads were run: {error}"
        self.finished = self.stopped is None

    def _at_home(self, budget: Budget) -> list[Load]:
        """Run what the server as it is can be asked; the loads that need another are returned."""
        with self._served({}) as served:
            maker = Loads(
                served.deployment,
                2 * first_guess(RateProbe(served.deployment), self.seed),
                self.duration_s,
                self.seed,
                self.rates,
                self.concurrency,
            )
            self._predict_rates(maker)
            maker = replace(maker, max_rate=self.max_rate or maker.max_rate)
            loads = [load for name in self.kinds if name in KINDS for load in KINDS[name](maker)]
            self._all([load for load in loads if not load.engine], served, budget)
            for searched in self.predicted_rates:
                if self.stopped is None and searched.kind in self.kinds:
                    self._search(searched, maker, served, budget)
        return [load for load in loads if load.engine]

    def _elsewhere(self, load: Load, budget: Budget) -> None:
        """A load that needs a server with other flags."""
        if isinstance(self.server, Target):
            flags = ", ".join(f"{name}={value}" for name, value in load.engine.items())
            self.notes.append(f"{load.name} left out: it needs a server with {flags}")
        elif not budget.fits(SERVER_START_S + BENCH_START_S + self.duration_s):
            self._leave_out(load, "the time budget does not last for another server")
        else:
            with self._served(load.engine) as served:
                self._all([load], served, budget)

    def _leave_out(self, load: Load, why: str) -> None:
        self.left_out.append(load.name)
        self.notes.append(f"{load.name} left out: {why}")

    @contextmanager
    def _served(self, engine: Mapping[str, Any]) -> Iterator[_Served]:
        """The server, or our own with other engine flags, met while the block lasts."""
        changes = {f"engine.{name}": value for name, value in engine.items()}
        if isinstance(self.server, Target):
            yield self._meet(self.server, None, changes)
            return
        self.say("starting vllm serve")
        flags = self.scenario.changed(changes).engine if changes else self.scenario.engine
        with started(self.server, flags, engine, self.out.absolute()) as server:
            yield self._meet(server.target, server.recording, changes)

    def _meet(self, target: Target, recording: Path | None, changes: Mapping[str, Any]) -> _Served:
        """Ask the server what it is, and make the scenario that."""
        truth = read_truth(target, self.machine)
        wanted = self.scenario.changed(changes) if changes else self.scenario
        scenario = wanted.changed(truth.overrides()) if truth.overrides() else wanted
        deployment = Deployment.of(scenario)
        model = self.server.model if isinstance(self.server, OwnServer) else Path(target.tokenizer)
        notes = refuse_misfit(truth, deployment, model if model.is_dir() else None)
        warm_up(target)
        if target.engine_url is not None:
            self.proxy_s = proxy_latency_s(target, truth.served_model)
            costs = deployment.profile.front_end
            costs = replace(costs, latency_s=costs.latency_s + max(self.proxy_s, 0.0))
            profile = deployment.profile.model_copy(update={"front_end": costs})
            deployment = replace(deployment, profile=profile)
        if self.truth is None:
            self.truth = truth
            self.notes += [*notes, *replaced(truth, self.scenario)]
        return _Served(target, recording, deployment)

    def _all(self, loads: Sequence[Load], served: _Served, budget: Budget) -> None:
        """Predict all loads, then run them."""
        self.say(f"predicting {len(loads)} load{'s' * (len(loads) != 1)}")
        seeds = range(self.seed, self.seed + self.seeds)
        predictions = [predict(load, served.deployment, seeds, self.out.absolute()) for load in loads]
        for load, prediction in zip(loads, predictions, strict=True):
            expected = prediction.seconds + BENCH_START_S
            if not budget.fits(expected):
                self._leave_out(load, f"{expected:.0f} s are more than the time budget has")
                continue
            self.say(f"running {load.name}, about {prediction.seconds:.0f} s")
            outcome = drive(
                load,
                prediction,
                served.target,
                python=self.python,
                recording=served.recording,
                prometheus=self.prometheus,
                most_s=None if math.isinf(budget.left_s) else budget.left_s,
            )
            self.outcomes.append(outcome)
            if outcome.problem:
                self.notes.append(f"{load.name}: {outcome.problem}")
            if not answers(served.target):
                self.stopped = f"the server was gone after {load.name}: no load was run after it"
            elif outcome.timed_out:
                self.stopped = f"{load.name} did not end in time: no load was run after it"
            self.after_load(self)
            if self.stopped is not None:
                return

    def _predict_rates(self, loads: Loads) -> None:
        """Search what is to be searched, and the largest rate where other loads are chosen by it, by
        simulation, and write prediction-KIND.json."""
        kinds = [name for name in self.kinds if name in SEARCHES]
        chosen = {"rate": not self.rates, "concurrency": False}  # the other kinds always choose by it
        by_rate = any(chosen.get(name, True) for name in self.kinds if name in KINDS)
        if by_rate and "slo" not in kinds and Objectives.of(self.scenario) is not None:
            kinds.insert(0, "slo")
        for kind in kinds:
            self.say(f"predicting where the search of {kind} ends")
            found = predict_rate(kind, loads, range(self.seed, self.seed + self.seeds))
            path = self.out / f"prediction-{kind}.json"
            write_result(path, found.to_json())
            self.predicted_rates.append(replace(found, sha256=file_sha256(path)))

    def _search(self, searched: PredictedRate, loads: Loads, served: _Served, budget: Budget) -> None:
        """Find the rate on the server: on from what was swept, and first where it is predicted."""
        judged, scenario = SEARCHES[searched.kind], served.deployment.scenario
        tried = {
            outcome.load.request_rate: judged.holds([outcome.measured.run], scenario)
            for outcome in self.outcomes
            if outcome.load.kind in SWEPT and outcome.measured and outcome.load.request_rate
        }

        def holds(request_rate: float) -> bool | None:
            count = len(self.outcomes)
            self._all([loads.at_rate(request_rate, searched.kind)], served, budget)
            if (
                len(self.outcomes) == count
                or self.stopped
                or (measured := self.outcomes[-1].measured) is None
            ):
                return None
            return judged.holds([measured.run], scenario)

        search_near(holds, searched.ends.estimate, tried)
