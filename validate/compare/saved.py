"""A saved benchmark result judged: the same load is simulated and compared with it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from servecast.sim.inputs.errors import InputError
from servecast.sim.metrics.records import Run
from servecast.sim.plan.judge import Objectives
from servecast.sim.run.explain import explain_run
from servecast.sim.run.simulate import simulate
from servecast.sim.scenario.deployment import Deployment
from servecast.sim.scenario.scenario import Scenario
from servecast.sim.traffic.arrivals import Arrivals, ClosedLoop, Constant, Gamma, Poisson, VllmBench
from servecast.sim.traffic.content import Unique
from servecast.sim.traffic.draw import replayed, with_request_rate
from servecast.sim.traffic.spec import StageSpec, StreamSpec, Workload
from servecast.sim.traffic.traces import Trace
from servecast.validate.compare.load import LoadComparison, compare_runs, spoken
from servecast.validate.compare.sweep import Comparison, compare_loads
from servecast.validate.compare.tolerances import Tolerances
from servecast.validate.readers import Reading
from servecast.validate.readers.run_of import LONGEST_S
from servecast.validate.readers.vllm_bench import FORM as VLLM_BENCH
from servecast.validate.readers.vllm_bench import OURS

Traffic = Literal["requests", "scenario"]
_MOST_REQUESTS = 10_000_000
_UNIQUE = "simulated prompts share nothing, since the file does not say what its prompts share"


def judge_result(
    readings: Sequence[Reading],
    deployment: Deployment,
    *,
    tolerances: Tolerances,
    seeds: int = 5,
    traffic: Traffic | None = None,
) -> Comparison:
    """Predict each run of a result with a scenario made concrete, and compare.

    Args:
        seeds: replications, from the scenario's seed on.
        traffic: "requests" simulates the very requests of the file, by their times and lengths (their
            prompts are taken to have nothing in common); "scenario" the scenario's traffic under the
            file's load. None: the requests where the file has them.

    Raises:
        InputError: the file does not say what is needed for that traffic.
    """
    scenario = deployment.scenario

    def judged(reading: Reading) -> LoadComparison:
        if reading.figures().get("completed") == 0:
            fix = "Give a result of requests that did."
            raise InputError("none of its requests finished", where=reading.source, fix=fix)
        replays = reading.has_requests if traffic is None else traffic == "requests"
        stages, workload, notes = None, None, list[str]()
        if replays:
            stages = replayed(*requests_of(reading))
            streams = [stream for stage in scenario.stages().stages for stream in stage.streams]
            shared = (s.system_prompt_tokens > 0 or not isinstance(s.content, Unique | None) for s in streams)
            notes += [_UNIQUE] * any(shared)
        else:
            workload, notes = _as_in_scenario(reading, scenario)
        try:
            predicted = [
                simulate(deployment, seed=seed, workload=workload, stages=stages)
                for seed in range(scenario.seed, scenario.seed + seeds)
            ]
        except InputError as error:
            where = f"{reading.source}: {error.where}" if replays else error.where
            raise InputError(error.what, where=where, fix=error.fix) from None
        compared = compare_runs(predicted, reading, tolerances=tolerances, notes=notes)
        return replace(compared, notes=(*compared.notes, *_why(compared, predicted[0], deployment)))

    return compare_loads(
        [judged(each) for each in readings], tolerances=tolerances, objectives=Objectives.of(scenario)
    )


def _why(compared: LoadComparison, predicted: Run, deployment: Deployment) -> Iterator[str]:
    """Of each statistic of TTFT that is off: what the predicted one is made of."""
    for row in compared.rows:
        name, _, metric = row.metric.partition("_")
        if row.state != "fail" or metric != "ttft_ms":
            continue
        found = explain_run(predicted, deployment, name)
        if found is not None:
            advice = "; ".join(found.advice)
            yield f"{spoken(row.metric)} as predicted is {found.sentence}; to change it: {advice}"


def requests_of(reading: Reading) -> tuple[Trace, int | None]:
    """The requests that a result says were sent, and the concurrency that bounded them.

    Times are those at which the tool meant to send. Where it does not say: 0 in a closed loop, otherwise
    those at which it sent, which hold the effect of a bound already. A failed request is not repeated.

    Raises:
        InputError: the file has no requests.
    """
    requests, context = reading.run.requests, reading.context
    done = requests[requests["status"] == "finished"].sort_values("sent", kind="stable")
    if not len(done):
        fix = "Give a result with details of each request, or --traffic scenario."
        raise InputError("has no requests to simulate again", where=reading.source, fix=fix)
    times = done["arrival"].to_numpy(dtype=float)
    bound = context.max_concurrency
    if bound is not None and context.ramp is None and context.request_rate in (None, math.inf):
        times = np.zeros(len(done))
    elif np.isnan(times).any():
        times, bound = done["sent"].to_numpy(dtype=float), None
    times = np.maximum.accumulate(times - min(float(times.min()), 0.0))
    trace = Trace(
        times, done["prompt_tokens"].to_numpy(dtype=np.int64), done["output_tokens"].to_numpy(dtype=np.int64)
    )
    return trace, bound


def _as_in_scenario(reading: Reading, scenario: Scenario) -> tuple[Workload, list[str]]:
    """The scenario's traffic under the load of a result, as many requests, and notes of what else it took."""
    context = reading.context
    if reading.has_requests:
        count = len(reading.run.requests)
    else:
        said = reading.reported.get("completed", math.nan) + reading.reported.get("failed", 0.0)
        if not 1 <= said <= _MOST_REQUESTS:
            raise InputError(
                f"says that {said:.6g} requests were sent", where=reading.source, fix="Correct it."
            )
        count = round(said)
    rate, bound = context.request_rate, context.max_concurrency
    if rate is not None and math.isfinite(rate):
        if count / rate > LONGEST_S:
            raise InputError(
                f"{count} requests at {rate:g} requests/s take {count / rate / 86_400:.4g} days",
                where=reading.source,
                fix="Is its rate one of requests a second?",
            )
        at_rate = with_request_rate(scenario.open_loop(), rate, num_requests=count)
        return _with_arrivals(at_rate, reading, scenario)
    if bound is not None and context.ramp is None:
        stream = scenario.open_loop().stages[0].streams[0]
        law = ClosedLoop(kind="closed_loop", concurrency=bound)
        changes = {"arrivals": law, "max_concurrency": None, "num_requests": count}
        return Workload(stages=(StageSpec(streams=(stream.model_copy(update=changes),)),)), []
    workload = scenario.stages()
    if len(workload.stages) > 1:
        raise InputError(
            f"does not say under which load it ran, and scenario {scenario.name} has "
            f"{len(workload.stages)} of them",
            where=reading.source,
            fix="Give a scenario with one load, that of the result.",
        )
    return workload, []


def _burstiness(law: Arrivals | None) -> float | None:
    """Shape of the gaps of an arrival law, None where they are not those of a gamma law."""
    if isinstance(law, Gamma | VllmBench):
        return law.burstiness
    return 1.0 if isinstance(law, Poisson) else math.inf if isinstance(law, Constant) else None


def _with_arrivals(workload: Workload, reading: Reading, scenario: Scenario) -> tuple[Workload, list[str]]:
    """The workload under the file's bound, and where that states another law of gaps than the scenario, with
    such gaps at its streams' own rates, which a note says."""
    context, stage = reading.context, workload.stages[0]
    stated, bound = context.burstiness, context.max_concurrency
    own = [each.arrivals for each in scenario.open_loop().stages[0].streams if not each.background]
    others = stated is not None and any(_burstiness(law) != stated for law in own)

    def law(rate: float) -> Arrivals:
        assert stated is not None
        if context.tool in (VLLM_BENCH, OURS):
            return VllmBench(kind="vllm_bench", request_rate=rate, burstiness=stated)
        if math.isinf(stated):
            return Constant(kind="constant", request_rate=rate)
        if stated == 1:
            return Poisson(kind="poisson", request_rate=rate)
        return Gamma(kind="gamma", request_rate=rate, burstiness=stated)

    def changed(stream: StreamSpec) -> StreamSpec:
        source = stream.arrivals or stream.trace
        rate = None if source is None or isinstance(source, ClosedLoop) else source.request_rate
        changes: dict[str, object] = {} if bound is None else {"max_concurrency": bound}
        if others and not stream.background and rate is not None:
            changes["arrivals"] = law(rate)
        return stream.model_copy(update=changes)

    streams = tuple(changed(stream) for stream in stage.streams)
    notes = []
    if others:
        how = "equal gaps" if stated == math.inf else f"gaps of burstiness {stated:g}"
        notes.append(f"arrivals as the file states them: {how}, where the scenario has others")
    return Workload(stages=(stage.model_copy(update={"streams": streams}),)), notes
