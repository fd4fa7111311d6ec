"""What a session with a live server comes to: comparison, verdict, and the document that is kept of it."""

from __future__ import annotations

import math
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from servecast.sim.inputs.errors import InputError
from servecast.sim.metrics.confidence import Interval
from servecast.sim.metrics.records import Run
from servecast.sim.plan.judge import Objectives
from servecast.sim.run.results import SCHEMA_VERSION, check_output
from servecast.validate.compare.load import CONFIDENCE, LoadComparison, Row, compare_runs, make_row
from servecast.validate.compare.series import growth
from servecast.validate.compare.sweep import Comparison, compare_loads
from servecast.validate.compare.tolerances import Tolerances
from servecast.validate.compare.verdict import Verdict
from servecast.validate.live.drive import Outcome
from servecast.validate.live.search import SEARCHES
from servecast.validate.live.session import Session
from servecast.validate.live.target import Target

_FIGURES = 6  # significant, of what is kept
RESULT = "result.json"
_MACHINE = ("gpu", "gpu_count", "driver", "host_cpu")  # facts of a machine that say nothing of its owner


def new_result(folder: Path) -> Path:
    """Where the result goes in a folder.

    Raises:
        InputError: there is one already, or it could not be written.
    """
    path = folder / RESULT
    check_output(path, where="--out")
    if path.exists():
        fix = "Give another folder, or move that one away."
        raise InputError("holds the result of an earlier run", where=f"--out {folder}", fix=fix)
    return path


def judge(
    session: Session, tolerances: Tolerances, known: dict[str, LoadComparison] | None = None
) -> Comparison:
    """Compare what ran. A session that is not at its end, or a load that did not end, is inconclusive; so is
    one for whose loads there was no time, unless those that ran fail.

    Args:
        known: loads that were compared already, by name; the others are added.
    """
    known = {} if known is None else known
    ended = [outcome for outcome in session.outcomes if outcome.measured is not None]
    for outcome in ended:
        if outcome.load.name not in known:
            known[outcome.load.name] = _compare(outcome, tolerances)
    loads = [known[outcome.load.name] for outcome in ended]
    comparison = compare_loads(
        loads,
        tolerances=tolerances,
        objectives=Objectives.of(session.scenario),
        predicted={
            SEARCHES[each.kind].metric: each.ends
            for each in session.predicted_rates
            if each.kind in session.kinds  # on both sides, or on neither
        },
    )
    missing = [
        f"{outcome.load.name}: {outcome.problem}"
        for outcome in session.outcomes
        if outcome.measured is None and outcome.problem
    ]
    if not session.finished:
        missing.insert(0, session.stopped or "not all loads have been run yet")
    left_out = [f"the time budget did not last for {', '.join(session.left_out)}"] * bool(session.left_out)
    verdict = comparison.verdict
    if missing or (left_out and verdict.state != "fail"):
        verdict = Verdict("inconclusive", (*missing, *left_out, *verdict.reasons))
    notes = [note for note in session.notes if note not in missing]
    return replace(comparison, notes=(*notes, *comparison.notes), verdict=verdict)


def _compare(outcome: Outcome, tolerances: Tolerances) -> LoadComparison:
    load, measured = outcome.load, outcome.measured
    assert measured is not None
    planned = load.requests.times_s if load.max_concurrency is None else None
    rows = _queue_time(outcome, tolerances)

    def compared(recording: Path | None, notes: tuple[str, ...]) -> LoadComparison:
        return compare_runs(
            outcome.prediction.runs,
            measured,
            tolerances=tolerances,
            telemetry=outcome.telemetry,
            recording=recording,
            planned_s=planned,
            label=load.name,
            notes=notes,
            rows=rows,
        )

    try:
        return compared(outcome.recording, outcome.prediction.cautions)
    except InputError as error:  # the recorder of a server that died stops anywhere
        return compared(None, (*outcome.prediction.cautions, str(error)))


def _queue_time(outcome: Outcome, tolerances: Tolerances) -> list[Row]:
    """How long requests waited in the engine for their first step, on average, by the engine's own word."""
    seen = outcome.telemetry.reindex(columns=["queued", "queue_s"])
    queued, queue_s = (growth(seen[name].to_numpy(dtype=float)) for name in seen)
    if math.isnan(queued) or not queued:
        return []
    measured = 1e3 * queue_s / queued
    predicted = [_mean_queue_ms(run) for run in outcome.prediction.runs]
    difference = float(np.mean(predicted)) - measured

    def known(value: float) -> Interval:
        return Interval(value, math.nan, math.nan, CONFIDENCE, 1)

    return [make_row("mean_queue_time_ms", predicted, known(measured), known(difference), tolerances)]


def _mean_queue_ms(run: Run) -> float:
    """As vLLM counts it: from the step at which the scheduler first saw a request to its own first step."""
    requests = run.requests.dropna(subset="scheduled")
    starts = run.steps["start"].to_numpy(dtype=float)
    scheduled = requests["scheduled"].to_numpy(dtype=float)
    next_step = np.searchsorted(starts, requests["queued"].to_numpy(dtype=float) - 1e-9)
    seen = starts[np.minimum(next_step, len(starts) - 1)]
    return float(1e3 * np.maximum(scheduled - seen, 0.0).mean())


def document(session: Session, comparison: Comparison, *, tolerances: Tolerances) -> dict[str, Any]:
    """The result: what was predicted of what, what came of it, and what both rest on. No key, and no path of
    this machine.

    searches: where the largest rate, or the knee, was predicted to lie. The rows of the sweep take them over
    where the server was searched in the same way, and are otherwise read off the loads that ran.
    """
    judged = {load.label: load.to_json() for load in comparison.loads}
    return {
        "schema_version": SCHEMA_VERSION,
        "servecast_version": version("servecast"),
        "kind": "live",
        "finished": session.finished,
        "date": session.outcomes[0].started_at if session.outcomes else None,
        **facts(session),
        "what_if": session.scenario.changes,
        "machine": {name: session.machine.get(name) for name in _MACHINE},
        "server": None if session.truth is None else asdict(session.truth),
        "plans": list(session.kinds),
        "seed": session.seed,
        "seeds": session.seeds,
        "tolerances": tolerances.model_dump(mode="json"),
        "verdict": comparison.verdict.state,
        "reasons": list(comparison.verdict.reasons),
        "notes": list(comparison.notes),
        "slo": list(session.scenario.slo),
        "searches": [each.to_json() | {"sha256": each.sha256} for each in session.predicted_rates],
        "proxy_added_latency_ms": None if session.proxy_s is None else 1e3 * session.proxy_s,
        "sweep": [_short(row.to_json()) for row in comparison.sweep],
        "loads": [_load(outcome, judged.get(outcome.load.name)) for outcome in session.outcomes],
    }


def facts(session: Session) -> dict[str, Any]:
    """What the session was about, in a few words each."""
    scenario, server, truth = session.scenario, session.server, session.truth
    profile = scenario.profile_file()
    args = () if isinstance(server, Target) else server.args
    flags = [Path(arg).name if arg.startswith("/") else arg for arg in args]  # without our folders
    return {
        "scenario": scenario.name,
        "profile": None if profile is None else profile.name,
        "profile_sha256": session.profile_sha256,
        "served_model": None if truth is None else truth.served_model,
        "server_started": "attached" if isinstance(server, Target) else " ".join(flags),
        "load_generator": f"vllm bench serve {_vllm_of(session.python) or '(version not known)'}",
    }


@cache
def _vllm_of(python: str) -> str | None:
    code = "from importlib.metadata import version; print(version('vllm'))"
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _load(outcome: Outcome, judged: Mapping[str, Any] | None) -> dict[str, Any]:
    found: dict[str, Any] = outcome.load.to_json() | {
        "prediction_sha256": outcome.prediction.sha256,
        "predicted_at": outcome.prediction.written_at,
        "started_at": outcome.started_at,
        "trace_sha256": outcome.prediction.trace_sha256,
        "hash_seed": outcome.hash_seed,
        "gpu": outcome.gpu,
        "problem": outcome.problem,
    }
    if judged is None:
        return found | {"verdict": "inconclusive", "reasons": [outcome.problem], "rows": []}
    return found | {name: _short(value) for name, value in judged.items() if name != "load"}


def _short(value: Any) -> Any:
    """Numbers to the figures that mean something."""
    if isinstance(value, Mapping):
        return {name: _short(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_short(each) for each in value]
    return float(f"{value:.{_FIGURES}g}") if isinstance(value, float) and math.isfinite(value) else value
