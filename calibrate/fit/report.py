"""Fit a profile to a few rows of a reported table, through the simulator itself.

A table of latencies and throughputs says little about each part of a step, so most of the physical
model stays at typical values, and every fitted parameter is held to its typical value by a prior: what the
rows do not determine is not moved. Rows that the scenario does not name as ``fit_rows`` are never looked at.
"""

from __future__ import annotations

import datetime
import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.optimize import least_squares

from servecast.sim.hardware.front_end_costs import FrontEndCosts
from servecast.sim.hardware.noise import StepNoise
from servecast.sim.hardware.profile import Domain, Profile, Provenance
from servecast.sim.hardware.step_time.physical import Efficiencies
from servecast.sim.inputs.errors import InputError
from servecast.sim.inputs.schema import did_you_mean
from servecast.sim.metrics.warmup import select
from servecast.sim.reproduce.cell import Cell
from servecast.sim.reproduce.reproduce import reproduce
from servecast.sim.run.simulate import simulate
from servecast.sim.scenario.deployment import Deployment
from servecast.sim.scenario.reported import FitStep, Reported, read_rows, stage_of
from servecast.sim.scenario.scenario import Scenario
from servecast.sim.traffic.spec import Row, Workload


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter that reports can tell something about.

    typical: where the prior is centred. spread: standard deviation of the prior, in the logarithm.
    low, high: bounds.
    """

    typical: float
    spread: float
    low: float
    high: float


PARAMETERS: dict[str, Parameter] = {
    "efficiencies.bandwidth": Parameter(0.88, 0.1, 0.3, 1.0),
    "efficiencies.compute": Parameter(0.7, 0.3, 0.1, 1.0),
    "efficiencies.host_fixed_s": Parameter(3e-4, 0.7, 1e-5, 1e-2),
    "efficiencies.host_per_seq_s": Parameter(5e-6, 1.0, 1e-7, 5e-4),
    "front_end.request_s": Parameter(1.5e-3, 1.0, 1e-5, 3e-2),
    "front_end.token_s": Parameter(3e-5, 1.0, 1e-6, 1e-3),
    "front_end.latency_s": Parameter(8e-3, 1.0, 1e-4, 1.0),
    "front_end.client_request_s": Parameter(5e-4, 1.0, 1e-5, 1e-2),
    "front_end.client_token_s": Parameter(3e-5, 1.0, 1e-6, 1e-3),
    "front_end.cv": Parameter(0.2, 0.7, 0.01, 1.0),
    "noise.cv": Parameter(0.05, 0.7, 0.005, 0.5),
}

FURTHER: dict[str, Parameter] = {  # that take part where the rows tell them, or fit_steps name them
    "efficiencies.kv_bandwidth": Parameter(0.9, 0.1, 0.3, 1.0),
    "efficiencies.attention_seq_s": Parameter(2e-7, 1.0, 1e-8, 2e-6),
    "front_end.prompt_token_s": Parameter(1.6e-6, 0.5, 1e-7, 2e-5),
}
_EAGER_KERNEL_S = 6e-6  # a kernel launched from Python, without a CUDA graph: 5 to 10 us of host time

PRIOR_WEIGHT = 0.3  # a prior counts this much beside a cell whose error is one precision
_PRECISION = {  # how well a small benchmark knows a statistic, relative: medians and rates, tails
    "ttft": (0.2, 0.3),
    "itl": (0.08, 0.25),
    "tpot": (0.08, 0.25),
    "e2el": (0.08, 0.08),
}
_RATE_PRECISION = 0.05
_FIT_SEEDS = 2
_STEP = 0.03  # of the logarithm of a parameter, for differences: above the grain of the simulation
_TOLD = 0.25  # precisions by which a cell moves, if a parameter moves by its prior's spread, that tell it
_BANDS = {  # metric -> the band that its errors make
    "ttft": "ttft",
    "tpot": "tpot",
    "itl": "tpot",
    **dict.fromkeys(("e2el", "output_throughput", "request_throughput"), "throughput"),
}


@dataclass(frozen=True, slots=True)
class ReportFit:
    """What a fit found. cells: the fitted rows, reported against predicted by ``profile``."""

    profile: Profile
    cells: tuple[Cell, ...]


def fit_report(
    scenario: Scenario,
    *,
    progress: Callable[[str], None] | None = None,
    max_evaluations: int = 25,
    jobs: int = 1,
) -> ReportFit:
    """Fit a profile to the rows that the scenario's main reported table gives for it: all parameters they
    tell, to all rows together, or as the table's ``fit_steps`` say.

    The error bands are found by leaving one row out: each of the rows of a step is predicted by a fit to its
    others, and a band covers 90 % of the errors of its metric; ``error_band`` of token times and throughputs
    together. Interrupted (KeyboardInterrupt), the best found so far is kept, with what bands there are.

    Args:
        progress: called with what is being done, first with what it costs at most. max_evaluations: of each
            least-squares search. jobs: processes over which the simulations run; the fit does not depend on
            it.

    Raises:
        InputError: the scenario reports nothing, or names no rows to fit, or a parameter that is not known.
    """
    if not scenario.reported or not scenario.reported[0].fit_rows:
        raise InputError(
            "no rows to fit", where=f"{scenario.source}: reported", fix="Name them in reported.0.fit_rows."
        )
    reported = scenario.reported[0]
    say = progress or (lambda _text: None)
    base = Deployment.of(scenario.model_copy(update={"profile": None}))
    began = time.perf_counter()
    typical = cells_of(scenario, reported, _profile(base, {}), jobs)
    once_s = time.perf_counter() - began
    steps = reported.fit_steps
    if not steps:
        told = [name for name in FURTHER if _tells(scenario, reported, base, typical, name, jobs)]
        parameters = (*PARAMETERS, *told)
        columns = tuple(reported.columns)
        steps = (FitStep(rows=reported.fit_rows, parameters=parameters, columns=columns),)
    most = sum(
        (1 + (len(step.rows) if len(step.rows) > 1 else 0))
        * min(max_evaluations, step.max_evaluations)
        * (1 + len(step.parameters))
        for step in steps
    )
    say(f"at most {most} simulations of the rows, {most * once_s / 60:.1f} min; Ctrl-C keeps the best so far")
    stopped: list[str] = []

    def search(step: FitStep, known: dict[str, float]) -> dict[str, float]:
        return known | _search(scenario, reported, step, base, known, (max_evaluations, jobs), stopped)

    values: dict[str, float] = {}
    for step in steps:
        if not stopped:
            say(f"fitting {len(step.parameters)} parameters to {len(step.rows)} rows")
            values = search(step, values)
    profile = _profile(base, values)
    fitted_to = {
        "domain": _domain(reported, Deployment.of(scenario, profile)),
        "fitted_rows": tuple(str(row) for row in reported.fit_rows),
        "raw_data_sha256": hashlib.sha256(reported.table.read_bytes()).hexdigest(),
    }
    profile = profile.model_copy(update=fitted_to)
    errors: dict[str, list[float]] = {}
    for step in steps:
        for row in step.rows if len(step.rows) > 1 else ():
            if stopped:
                break
            say(f"leaving out {row}")
            rest = step.model_copy(update={"rows": tuple(other for other in step.rows if other != row)})
            known = {name: value for name, value in values.items() if name not in step.parameters}
            without = _profile(base, search(rest, known))
            for cell in cells_of(scenario, _only(reported, (row,)), without, jobs) if not stopped else ():
                of = _BANDS.get(reported.columns[cell.metric].metric)
                if cell.error is not None and cell.metric in step.columns and of is not None:
                    errors.setdefault(of, []).append(abs(cell.error))
    bands = {metric: float(np.quantile(each, 0.9)) for metric, each in errors.items()}
    both = [*errors.get("tpot", ()), *errors.get("throughput", ())]
    found = {"error_band": float(np.quantile(both, 0.9)) if both else None, "error_bands": bands}
    if stopped:
        say("stopped: what was found so far is kept, and there may be no error band")
    return ReportFit(profile.model_copy(update=found), cells_of(scenario, reported, profile, jobs))


def _tells(
    scenario: Scenario, reported: Reported, base: Deployment, typical: tuple[Cell, ...], name: str, jobs: int
) -> bool:
    """Whether a cell of the rows moves with a parameter."""
    prior = _prior(name, base)
    moved = prior.typical * math.exp(-prior.spread)
    cells = cells_of(scenario, reported, _profile(base, {name: max(moved, prior.low)}), jobs)
    return any(
        abs(math.log(cell.predicted / before.predicted)) > _TOLD * _precision(reported, cell)
        for cell, before in zip(cells, typical, strict=True)
        if cell.predicted > 0 and before.predicted > 0
    )


def _only(reported: Reported, rows: tuple[Row, ...]) -> Reported:
    return reported.model_copy(update={"fit_rows": rows})


def cells_of(scenario: Scenario, reported: Reported, profile: Profile, jobs: int = 1) -> tuple[Cell, ...]:
    """The fitted rows' cells, as a profile predicts them. A fit in steps simulates only the stages of its
    rows and those that no row is about, such as a warm-up."""
    alone = scenario
    if reported.fit_steps and reported.workload is None:
        stages = scenario.stages()
        rows = [row for row in read_rows(reported) if not row.summary]
        about = {stage_of(reported.stage_keys(row.keys), stages): False for row in rows}
        about |= {stage_of(reported.stage_keys(row.keys), stages): True for row in rows if row.fit}
        kept = tuple(stage for index, stage in enumerate(stages.stages) if about.get(index, True))
        alone = scenario.model_copy(update={"workload": Workload(stages=kept), "sweep": None})
    only = reported.model_copy(update={"rows": reported.fit_rows, "ranking": None})
    alone = alone.model_copy(update={"reported": (only,)})
    cells = reproduce(alone, seeds=_FIT_SEEDS, profile=profile, jobs=jobs).tables[0].cells
    return tuple(
        cell
        for cell in cells
        if cell.used == "fit" and any(row.items() <= cell.keys.items() for row in reported.fit_rows)
    )


def _prior(name: str, base: Deployment) -> Parameter:
    known = PARAMETERS | FURTHER
    if name not in known:
        fix = did_you_mean(name, known) or f"Known: {', '.join(known)}."
        raise InputError(f"there is no parameter {name!r} to fit", where="reported.0.fit_steps", fix=fix)
    if name == "efficiencies.host_fixed_s" and base.scenario.engine.enforce_eager:
        return Parameter(base.model.kernels * _EAGER_KERNEL_S, 0.7, 1e-5, 1e-1)
    return known[name]


def _search(
    scenario: Scenario,
    reported: Reported,
    step: FitStep,
    base: Deployment,
    known: dict[str, float],
    effort: tuple[int, int],
    stopped: list[str],
) -> dict[str, float]:
    """The parameters of one step, by least squares. known: those of the steps before it. effort: most
    evaluations, and processes. stopped: gets a word if it was interrupted; then the best so far is
    returned."""
    max_evaluations, jobs = effort
    best: list[tuple[float, NDArray[np.float64]]] = []
    names = list(step.parameters)
    prior = [_prior(name, base) for name in names]
    centre = np.log([p.typical for p in prior])
    spread = np.array([p.spread for p in prior])
    rows = _only(reported, step.rows)

    def values_at(point: NDArray[np.float64]) -> dict[str, float]:
        return dict(zip(names, np.exp(point).tolist(), strict=True))

    def residuals(point: NDArray[np.float64]) -> NDArray[np.float64]:
        cells = cells_of(scenario, rows, _profile(base, known | values_at(point)), jobs)
        misfit = [_misfit(reported, c) for c in cells if c.reported and c.metric in step.columns]
        left = np.array([*misfit, *(PRIOR_WEIGHT * (point - centre) / spread)])
        cost = float(np.sum(np.sqrt(1.0 + left**2)))
        if not best or cost < best[0][0]:
            best[:] = [(cost, point.copy())]
        return left

    try:
        found = least_squares(
            residuals,
            centre,
            bounds=(np.log([p.low for p in prior]), np.log([p.high for p in prior])),
            diff_step=(
                _STEP / np.maximum(np.abs(centre), 1.0)
                if step.difference is None
                else step.difference * spread / np.abs(centre)
            ),
            x_scale=spread,
            loss="soft_l1",
            max_nfev=min(max_evaluations, step.max_evaluations),
        )
    except KeyboardInterrupt:
        if not best:
            raise
        stopped.append("interrupted")
        return values_at(best[0][1])
    return values_at(found.x)


def _misfit(reported: Reported, cell: Cell) -> float:
    if not cell.predicted > 0:
        raise InputError(
            f"{cell.metric} is predicted as {cell.predicted}, which has no relative error",
            where="reported.0.fit_rows",
            fix="Exclude this column from the rows to fit.",
        )
    return math.log(cell.predicted / cell.reported) / _precision(reported, cell)


def _precision(reported: Reported, cell: Cell) -> float:
    column = reported.columns[cell.metric]
    if column.metric not in _PRECISION:
        return _RATE_PRECISION
    median, tail = _PRECISION[column.metric]
    return median if column.statistic in ("mean", "median", "p50") else tail


def _profile(base: Deployment, values: dict[str, float]) -> Profile:
    """A profile with these parameters; all others are typical."""
    of: dict[str, dict[str, Any]] = {
        group: {n.split(".")[1]: v for n, v in values.items() if n.startswith(f"{group}.")}
        for group in ("efficiencies", "front_end", "noise")
    }
    own = [f"efficiencies.{name}" for name in Efficiencies.parameters()]
    return Profile(
        servecast_version=version("servecast"),
        gpu=base.gpu.name,
        model=base.model.name,
        models=(base.model,),
        engine_version=base.scenario.engine.version,
        tensor_parallel_size=base.scenario.engine.tensor_parallel_size,
        date=datetime.date.today(),
        flags={"enforce_eager": True} if base.scenario.engine.enforce_eager else {},
        efficiencies=replace(Efficiencies(), **of["efficiencies"]),
        noise=StepNoise(**of["noise"]),
        front_end=FrontEndCosts(**of["front_end"]),
        provenance=(
            *Provenance.of(values, "fitted", "to a report, held by a prior"),
            *Provenance.of((name for name in own if name not in values), "assumed", "typical"),
        ),
    )


def _domain(reported: Reported, deployment: Deployment) -> Domain:
    """What the steps of the fitted rows ranged over."""
    scenario = deployment.scenario
    workload = scenario.workload_of(reported)
    rows = [row for row in read_rows(reported) if row.fit]
    parts = []
    for router in dict.fromkeys(row.router for row in rows):
        behind = scenario if router is None else scenario.behind(router)
        run = simulate(replace(deployment, scenario=behind), workload=workload)
        parts += [
            select(run, stage=stage_of(reported.stage_keys(row.keys), workload))
            for row in rows
            if row.router == router
        ]
    steps = pd.concat([part.steps for part in parts])
    requests = pd.concat([part.requests for part in parts])
    tokens = steps["prefill_tokens"] + steps["decodes"]
    batch = steps["prefill_requests"] + steps["decodes"]
    longest = requests["prompt_tokens"] + requests["output_tokens"]
    return Domain(
        tokens=(float(tokens.min()), float(tokens.max())),
        batch=(float(batch.min()), float(batch.max())),
        context=(1.0, float(longest.max())),
    )
