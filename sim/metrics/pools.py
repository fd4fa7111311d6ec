"""Which pool of a fleet of prefill and decode servers binds, and how full both are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from servecast.sim.metrics.binding import QUEUE_LIMITS, WAITING_SHARE, Evidence, Limits, evidence
from servecast.sim.metrics.records import Run


def pools_evidence(run: Run, limits: Limits) -> Evidence:
    """Of the pool in which requests wait for longer, or where they wait in none, that is busier."""
    found = [_of_pool(run, name, numbers, own) for name, numbers, own in limits.pools]
    return max(found, key=_strain)


def _strain(found: Evidence) -> tuple[float, float]:
    queue = sum(getattr(found, name) for name in QUEUE_LIMITS)
    return (queue if queue > WAITING_SHARE else 0.0), found.busy


def _of_pool(run: Run, name: str, numbers: Sequence[int], limits: Limits) -> Evidence:
    steps = run.steps[run.steps["replica"].isin(numbers)]
    requests = run.requests
    ttft = float((requests["first_token"] - requests["sent"]).mean())
    if not len(steps):
        return Evidence(0.0, 0.0, 0.0, 0.0, 0.0, 1.0, (), limits, name)
    if name == "decode":
        steps = steps.assign(waiting=np.maximum(steps["waiting"].to_numpy() - loading(requests, steps), 0))
        front = pd.Series(0.0, index=requests.index)
    else:
        front = (requests["prefill_queued"] - requests["sent"]).dropna()
    part = replace(run, steps=steps, itl=run.itl if name == "decode" else run.itl.iloc[:0])
    found = evidence(part, replace(limits, pools=()))
    moved = float((requests["kv_transfer_end"] - requests["kv_transfer_start"]).mean())
    return replace(
        found,
        front_end=float(front.mean()) / ttft if len(front) and ttft else 0.0,
        delivery=found.delivery if name == "decode" else 1.0,
        pool=name,
        transfer=0.0 if np.isnan(moved) or not ttft else moved / ttft,
    )


def loading(requests: pd.DataFrame, steps: pd.DataFrame) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """At the start of each step, requests of its replica whose KV blocks are on their way."""
    count = np.zeros(len(steps), np.int64)
    for number in steps["replica"].unique():
        here = (requests["replica"] == number).fillna(False).to_numpy() & requests["kv_transfer_end"].notna()
        places = np.flatnonzero(steps["replica"].to_numpy() == number)
        at = steps["start"].to_numpy()[places]
        begun = np.searchsorted(np.sort(requests["kv_transfer_start"][here].to_numpy()), at, side="right")
        over = np.searchsorted(np.sort(requests["scheduled"][here].to_numpy()), at, side="right")
        count[places] = np.maximum(begun - over, 0)
    return count


def pools_load(run: Run) -> list[dict[str, Any]]:
    """A row a pool: its steps and KV cache, and of transfers what went and how long it took."""
    requests, roles = run.requests, run.meta["roles"]
    rows: list[dict[str, Any]] = []
    span = float(requests["finish"].max() - requests["sent"].min())
    seconds = (requests["kv_transfer_end"] - requests["kv_transfer_start"]).dropna()
    for role in ("prefill", "decode"):
        numbers = [number for number, each in enumerate(roles) if each == role]
        steps = run.steps[run.steps["replica"].isin(numbers)]
        busy = float(steps["duration"].sum()) / (span * len(numbers))
        rows.append(
            {
                "pool": role,
                "servers": len(numbers),
                "busy": busy,
                "prefill_tokens": int(steps["prefill_tokens"].sum()),
                "decoded_tokens": int(steps["decodes"].sum()),
                "mean_kv_cache_usage": _mean(steps, "kv_usage", span * len(numbers)),
                "kv_cache_usage_peak": float(steps["kv_usage"].max()) if len(steps) else 0.0,
                "max_num_running": int(steps["running"].max()) if len(steps) else 0,
                "max_num_waiting": int(steps["waiting"].max()) if len(steps) else 0,
            }
        )
    rows[1] |= transfer_facts(requests, seconds)
    return rows


def _mean(steps: pd.DataFrame, column: str, span: float) -> float:
    return float((steps[column] * steps["duration"]).sum()) / span


def transfer_facts(requests: pd.DataFrame, seconds: pd.Series[float]) -> Mapping[str, Any]:
    """Of transfers, NaN where there were none."""
    return {
        "kv_transfers": len(seconds),
        "mean_kv_transfer_ms": 1e3 * float(seconds.mean()),
        "p95_kv_transfer_ms": 1e3 * float(seconds.quantile(0.95)),
        "mean_kv_transfer_mb": float(requests["kv_transfer_bytes"][seconds.index].mean()) / 1e6,
    }
