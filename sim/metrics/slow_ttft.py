"""What slow first tokens are made of, told by the request and step tables: where each of them waited, and for
what (see `binding`: after ``schedule`` a request waits for exactly one of three reasons)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from servecast.sim.metrics.binding import QUEUE_LIMITS, Limits, waited_for
from servecast.sim.metrics.metrics import statistic
from servecast.sim.metrics.records import Run, engines_of

PARTS = ("front_end", *QUEUE_LIMITS, "cold_start", "running_step", "prefill")


@dataclass(frozen=True, slots=True)
class SlowTtft:
    """The requests whose first token came as late as a statistic says, or later. Times are their means, s.

    parts: of their TTFT, by `PARTS`: before the engine's queue and after its step (``front_end``), in the
    queue by what it waited for, behind the step that ran when they came, and from their first step to that
    of their first token. client_queue_s: before sending, for which TTFT does not stand. steps: of their
    prefill. own_share: of the tokens of these steps, their own. at_start: how many were sent before any first
    token of the run was there.
    """

    threshold_s: float
    requests: int
    ttft_s: float
    parts: Mapping[str, float]
    client_queue_s: float
    steps: float
    own_share: float
    at_start: int


def slow_ttft(run: Run, limits: Limits, name: str, *, cold_start_s: float = 0.0) -> SlowTtft | None:
    """The slow requests of a run (or of the part that ``warmup.select`` gives); None where none finished.

    Args:
        name: the statistic of TTFT that is slow, as "p95"; "mean" takes all requests.
        cold_start_s: how long the first step of each engine is delayed.
    """
    done = run.requests[run.requests["status"] == "finished"]
    done = done[done["scheduled"].notna() & done["replica"].notna()]
    if not len(done) or not len(run.steps):
        return None
    threshold = 0.0 if name == "mean" else statistic(run, "ttft", name)
    ttft = done["first_token"] - done["sent"]
    slow = done[ttft >= min(threshold, float(ttft.max()))]
    cores, known = engines_of(slow), engines_of(run.steps)
    found = [
        _parts(requests, run.steps[known == core], limits, cold_start_s)
        for core, requests in slow.groupby(cores)
    ]
    table = pd.concat(found)
    earliest = float(done["first_token"].min())
    return SlowTtft(
        threshold_s=threshold,
        requests=len(slow),
        ttft_s=float((slow["first_token"] - slow["sent"]).mean()),
        parts={part: float(table[part].mean()) for part in PARTS},
        client_queue_s=float((slow["sent"] - slow["arrival"]).mean()),
        steps=float(table["steps"].mean()),
        own_share=float(table["own"].sum() / max(float(table["tokens"].sum()), 1.0)),
        at_start=int((slow["sent"] < earliest).sum()),
    )


def _parts(requests: pd.DataFrame, steps: pd.DataFrame, limits: Limits, cold_start_s: float) -> pd.DataFrame:
    """A row a request of one replica: seconds of each part, the steps of its prefill, and their tokens."""
    steps = steps.sort_values("start", kind="stable")
    start = steps["start"].to_numpy(dtype=float)
    length = steps["duration"].to_numpy(dtype=float)
    end = start + length
    sent, queued, first = (requests[name].to_numpy(dtype=float) for name in ("sent", "queued", "first_token"))
    scheduled = np.minimum(requests["scheduled"].to_numpy(dtype=float), first)  # later if it was preempted
    waiting = scheduled - queued
    limited = waited_for(steps, limits)
    knots = np.stack([start, end], axis=1).ravel()
    table = {}
    for name in QUEUE_LIMITS:
        spent = length * (limited == name)
        before = np.cumsum(spent) - spent
        total = np.stack([before, before + spent], axis=1).ravel()
        table[name] = np.interp(scheduled, knots, total) - np.interp(queued, knots, total)
    if limits.loads or limits.passes_over:  # an engine without steps waits for it as well
        busy_until = np.maximum.accumulate(end)
        since = np.append(start[0] if cold_start_s else min(start[0], queued.min()), busy_until[:-1])
        until = np.maximum(start, since)
        before = np.cumsum(until - since) - (until - since)
        total = np.stack([before, before + until - since], axis=1).ravel()
        knots = np.stack([since, until], axis=1).ravel()
        idle = np.interp(scheduled, knots, total) - np.interp(queued, knots, total)
        table["kv_loads" if limits.loads else "passed_over"] += idle
    ready = float(start[0])
    cold = np.clip(np.minimum(scheduled, ready) - np.maximum(queued, ready - cold_start_s), 0.0, None)
    table["cold_start"] = cold if cold_start_s else np.zeros(len(cold))
    table["running_step"] = np.clip(waiting - sum(table.values()), 0.0, None)
    begun = np.searchsorted(start, scheduled - 1e-9)
    done = np.maximum(np.searchsorted(end, first + 1e-9, side="right") - 1, begun)
    table["prefill"] = np.maximum(np.minimum(end[np.minimum(done, len(end) - 1)], first) - scheduled, 0.0)
    table["front_end"] = (first - sent) - waiting - table["prefill"]
    tokens = np.concatenate([[0.0], np.cumsum(steps["prefill_tokens"].to_numpy(dtype=float))])
    cached = requests["cached_tokens"].astype("Float64").fillna(0.0).to_numpy(dtype=float)
    table["steps"] = (done - begun + 1).astype(float)
    table["tokens"] = tokens[np.minimum(done + 1, len(start))] - tokens[np.minimum(begun, len(start))]
    table["own"] = np.minimum(requests["prompt_tokens"].to_numpy(dtype=float) - cached, table["tokens"])
    return pd.DataFrame(table)


def largest(parts: Mapping[str, float]) -> str:
    """The part that takes most of the time."""
    return max(parts, key=lambda name: parts[name])
