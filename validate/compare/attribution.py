"""Where an error of the end-to-end latency comes from, told by the engine's own steps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from servecast.calibrate.measure.vllm.recording import read_recording
from servecast.sim.inputs.errors import InputError
from servecast.sim.metrics.metrics import latencies
from servecast.sim.metrics.records import Run


@dataclass(frozen=True, slots=True)
class Residence:
    """What a request's mean end-to-end latency is made of.

    Attributes:
        outside_s: client, network and API server: what the engine does not see.
        queue_s: from the engine's receipt to its first step. steps: the engine made from then until its
            last token. step_s: mean time of one of them.
    """

    outside_s: float
    queue_s: float
    steps: float
    step_s: float


@dataclass(frozen=True, slots=True)
class Part:
    """A part of the mean E2E latency, in ms; error: predicted less measured. The errors add up to that of
    the mean E2E; steps and step time share one product, whose change is split between them evenly."""

    name: str
    predicted_ms: float
    measured_ms: float
    error_ms: float


def attribute(predicted: Residence, measured: Residence) -> tuple[Part, ...]:
    """The error of the mean E2E latency in four parts."""
    ours, truth = predicted, measured
    more_steps = (ours.steps - truth.steps) * (ours.step_s + truth.step_s) / 2
    longer_steps = (ours.step_s - truth.step_s) * (ours.steps + truth.steps) / 2
    engine = 1000 * ours.steps * ours.step_s, 1000 * truth.steps * truth.step_s
    return (
        _part("client and API server", ours.outside_s, truth.outside_s),
        _part("server queue", ours.queue_s, truth.queue_s),
        Part("scheduling (number of steps)", *engine, 1000 * more_steps),
        Part("step time", *engine, 1000 * longer_steps),
    )


def _part(name: str, predicted_s: float, measured_s: float) -> Part:
    return Part(name, 1000 * predicted_s, 1000 * measured_s, 1000 * (predicted_s - measured_s))


def parts_of_run(run: Run) -> Residence:
    """Of a simulated run."""
    done = run.requests[run.requests["status"] == "finished"]
    queue, inside, counts = [], [], []
    for replica, requests in done.groupby("replica"):
        steps = run.steps[run.steps["replica"] == replica]
        start = steps["start"].to_numpy(dtype=float)
        end = start + steps["duration"].to_numpy(dtype=float)
        scheduled = requests["scheduled"].to_numpy(dtype=float)
        first = np.searchsorted(start, scheduled - 1e-9)
        last = np.searchsorted(end, requests["ended"].to_numpy(dtype=float) + 1e-9, side="right") - 1
        queue.append(scheduled - requests["queued"].to_numpy(dtype=float))
        inside.append(end[last] - scheduled)
        counts.append(last - first + 1)
    return _residence(run, np.concatenate(queue), np.concatenate(inside), np.concatenate(counts))


def parts_of_recording(file: Path, measured: Run) -> Residence:
    """Of a live run: E2E from its client, the rest from the recording of its engine.

    The recording's last requests are taken to be the run's: a benchmark tries the server before it begins.

    Raises:
        InputError: the file is no recording, or has fewer requests than finished.
    """
    recorded = read_recording(file)
    scheduled: dict[int, tuple[int, int]] = {}  # request -> when and in which step first
    ended: dict[int, tuple[int, int]] = {}  # request -> when, and steps until then
    for number, step in enumerate(recorded.steps):
        for n, _, _ in step.scheduled:
            scheduled.setdefault(n, (step.decided, number))
        for n, _ in step.finished:
            assert step.ended is not None
            ended[n] = step.ended, number + 1
    done = int((measured.requests["status"] == "finished").sum())
    whole = [n for n in recorded.requests if n in scheduled and n in ended]
    if len(whole) < done:
        raise InputError(
            f"records {len(whole)} requests to their end, {done} finished",
            where=str(file),
            fix="Give the recording of this run.",
        )
    own = whole[-done:] if done else []
    return _residence(
        measured,
        np.array([(scheduled[n][0] - recorded.requests[n].received) * 1e-9 for n in own]),
        np.array([(ended[n][0] - scheduled[n][0]) * 1e-9 for n in own]),
        np.array([ended[n][1] - scheduled[n][1] for n in own]),
    )


def _residence(run: Run, queue: Any, inside: Any, counts: Any) -> Residence:
    if not len(queue):
        return Residence(math.nan, math.nan, math.nan, math.nan)
    e2e = float(latencies(run.requests)["e2el"].mean())
    steps = float(counts.mean())
    return Residence(
        e2e - float(queue.mean()) - float(inside.mean()),
        float(queue.mean()),
        steps,
        float(inside.mean()) / steps,
    )
