"""Latencies by turn and by session. A run of sessions has the column ``turn`` in its requests, from 1."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd

from servecast.sim.metrics.metrics import known_or_none, latencies, percentiles, prefix_hit_rate
from servecast.sim.metrics.records import Run


def session_summary(run: Run, ranks: Sequence[float]) -> dict[str, Any] | None:
    """What sessions took, and each of their turns; None where there are none.

    turn: from the arrival of its first request to the last token of its last, tools and agents between them
    included. session: from the arrival of its first request to the last token of all. Times of sessions are
    of ``whole_sessions``, whose requests were all sent and have finished. served_share: of the time of these
    sessions, that in which at least one of their requests was with the server.
    """
    requests = run.requests
    if "turn" not in requests:
        return None
    every = _spans(requests, ["stage", "stream", "group"])
    cut = every.index.get_level_values("group").isin(list(run.meta.get("cut_sessions", ())))
    sessions = every.assign(end=every["end"].where(~cut))
    turns = _spans(requests, ["stage", "stream", "group", "turn"])
    found = {
        "sessions": len(sessions),
        "whole_sessions": int(sessions["end"].notna().sum()),
        "mean_turns": float(turns.groupby(["stage", "stream", "group"]).size().mean()),
        "mean_requests": len(requests) / len(sessions),
        "served_share": _served(requests, sessions),
        **_times("session", sessions, ranks),
        **_times("turn", turns, ranks),
    }
    each = []
    for turn, part in requests.groupby("turn"):
        whole = turns[turns.index.get_level_values("turn") == turn]
        row: dict[str, Any] = {"turn": int(str(turn)), "turns": len(whole), "requests": len(part)}
        row["mean_prompt_tokens"] = float(part["prompt_tokens"].mean())
        row["prefix_cache_hit_rate"] = prefix_hit_rate(part)
        ttft = latencies(part)["ttft"]
        for rank, value in zip((50, *ranks), percentiles(ttft, (50, *ranks)), strict=True):
            row[f"{'median' if rank == 50 else f'p{rank:g}'}_ttft_ms"] = value * 1000
        each.append(known_or_none(row | _times("turn", whole, ranks)))
    return known_or_none(found) | {"turns": each}


def _spans(requests: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """Start and end of each session or turn, in seconds; the end is NaN where not all of it has finished."""
    grouped = requests.groupby(keys)
    spans = grouped.agg(start=("arrival", "min"), end=("finish", "max"))
    done = (requests["status"] == "finished").groupby([requests[key] for key in keys]).all()
    return spans.assign(end=spans["end"].where(done))


def _times(name: str, spans: pd.DataFrame, ranks: Sequence[float]) -> dict[str, float]:
    seconds = (spans["end"] - spans["start"]).dropna()
    found = {f"mean_{name}_s": float(seconds.mean()) if len(seconds) else math.nan}
    values = percentiles(seconds, (50, *ranks))
    return found | {
        f"{'median' if rank == 50 else f'p{rank:g}'}_{name}_s": value
        for rank, value in zip((50, *ranks), values, strict=True)
    }


def _served(requests: pd.DataFrame, sessions: pd.DataFrame) -> float:
    keys = ["stage", "stream", "group"]
    rows = requests.sort_values([*keys, "arrival"])
    before = rows.groupby(keys)["finish"].cummax().groupby([rows[key] for key in keys]).shift()
    busy = (rows["finish"] - rows["arrival"].where(~(before > rows["arrival"]), before)).clip(lower=0)
    by_session = busy.groupby([rows[key] for key in keys]).sum()
    whole = (sessions["end"] - sessions["start"]).dropna()
    return float(by_session[whole.index].sum() / whole.sum()) if whole.sum() > 0 else math.nan
