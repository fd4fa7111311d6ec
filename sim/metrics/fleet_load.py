"""How the load lay on the replicas of a fleet: what explains that one router does better than another."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from servecast.sim.metrics.metrics import known_or_none, prefix_hit_rate
from servecast.sim.metrics.pools import pools_load
from servecast.sim.metrics.records import Run, engines_of


def fleet_load(run: Run) -> dict[str, Any]:
    """The load of a run (or of the part that ``warmup.select`` gives), over all replicas and one by one, from
    its first send to its last finish.

    send_rate: requests sent a second. uncached_tokens_per_s: prompt tokens that were not in the prefix cache
    when their request was first scheduled, a second. mean_...: over time, where a replica without a step in
    progress has nothing running, waiting or in use; of the fleet the sum of running and waiting, the mean of
    KV cache usage. token_imbalance: computed tokens (prompt and output) of the busiest replica over the mean.
    What is not known is None.
    """
    requests, steps = run.requests, run.steps
    sent = requests["sent"]
    span = float(requests["finish"].max() - sent.min())
    sending = float(sent.max() - sent.min())
    roles, replicas = run.meta.get("roles"), list[dict[str, Any]]()
    for number in range(int(run.meta.get("replicas", 1))):
        own = requests[requests["replica"] == number]
        if roles is not None:
            own = _leg(requests, number, roles[number])
        replicas.append(_replica(number, own, steps[steps["replica"] == number], span))
    table = pd.DataFrame(replicas)
    busiest, mean = table["computed_tokens"].max(), table["computed_tokens"].mean()
    found = {
        "send_rate": (len(requests) - 1) / sending if sending > 0 else math.nan,
        "uncached_tokens_per_s": float(table["uncached_tokens_per_s"].sum()),
        "mean_kv_cache_usage": float(table["mean_kv_cache_usage"].mean()),
        "mean_num_running": float(table["mean_num_running"].sum()),
        "mean_num_waiting": float(table["mean_num_waiting"].sum()),
        "token_imbalance": float(busiest / mean) if mean else math.nan,
    }
    found = known_or_none(found) | {"replicas": [known_or_none(row) for row in replicas]}
    return found if roles is None else found | {"pools": [known_or_none(row) for row in pools_load(run)]}


def _leg(requests: pd.DataFrame, number: int, role: str) -> pd.DataFrame:
    """What a server of a pool had to do for which requests: those that it prefills alone, or those that it
    decodes, of which it computes nothing that came from elsewhere."""
    if role == "prefill":
        return requests[(requests["prefill_replica"] == number).fillna(False)]
    own = requests[requests["replica"] == number]
    return own.assign(
        cached_tokens=own["cached_tokens"].where(own["prefill_replica"].isna(), own["prompt_tokens"])
    )


def rank_load(run: Run) -> list[dict[str, Any]]:
    """The same rows for each engine core, where servers have several; else none."""
    requests, steps = run.requests, run.steps
    if "rank" not in requests:
        return []
    span, found = float(requests["finish"].max() - requests["sent"].min()), []
    for _, part in requests.groupby(["replica", "rank"]):
        replica, rank = int(part["replica"].iloc[0]), int(part["rank"].iloc[0])
        own = steps[(steps["replica"] == replica) & (steps["rank"] == rank)]
        row = _replica(replica, part, own, span)
        found.append(known_or_none({"replica": row.pop("replica"), "rank": rank} | row))
    return found


def _replica(number: int, requests: pd.DataFrame, steps: pd.DataFrame, span: float) -> dict[str, Any]:
    seconds, cores = steps["duration"], max(engines_of(steps).nunique(), 1)
    cached = requests["cached_tokens"].astype("float64")
    uncached = float((requests["prompt_tokens"] - cached).sum())
    return {
        "replica": number,
        "requests": len(requests),
        "failed": int((requests["status"] == "failed").sum()),
        "prefix_cache_hit_rate": prefix_hit_rate(requests),
        "uncached_tokens_per_s": uncached / span,
        "computed_tokens": int(steps[["prefill_tokens", "decodes", "drafts"]].to_numpy().sum()),
        "mean_num_running": float((steps["running"] * seconds).sum()) / span,
        "mean_num_waiting": float((steps["waiting"] * seconds).sum()) / span,
        "max_num_waiting": float(steps["waiting"].max()),
        "mean_kv_cache_usage": float((steps["kv_usage"] * seconds).sum()) / span / cores,
        "kv_cache_usage_peak": float(steps["kv_usage"].max()),
        "num_preemptions": int(requests["preemptions"].sum()),
    }
