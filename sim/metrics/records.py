"""The two tables that everything shown to a person is computed from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from servecast.sim.engine.request import Requests

_MOST_RANKS = 1 << 16
STATUSES = ("unfinished", "finished", "aborted", "failed")
SECONDS_COLUMNS = ("arrival", "sent", "queued", "scheduled", "ended", "first_token", "finish")


@dataclass(slots=True)
class RequestRecord:
    """One request's life. Times are picoseconds from the start of the run; None is "did not happen".

    arrival: the client meant to send it; sent: it was sent (after the concurrency semaphore; where
    TTFT and E2E start); queued: the engine has it; scheduled: first scheduled; ended: the engine had its
    last token; first_token, finish: the client saw its first and last token.
    """

    request_id: int
    stage: int
    stream: int
    prompt_tokens: int
    arrival: int
    replica: int | None = None
    sent: int | None = None
    queued: int | None = None
    scheduled: int | None = None
    ended: int | None = None
    first_token: int | None = None
    finish: int | None = None
    output_tokens: int = 0
    cached_tokens: int | None = None
    preemptions: int = 0
    status: str = "unfinished"  # or "finished", "aborted", "failed"
    group: int | None = None


STEP_COLUMNS: dict[str, str] = {
    "replica": "int64",
    "start": "float64",  # s, from the start of the run
    "duration": "float64",  # s
    "prefill_tokens": "int64",  # tokens in prompt chunks
    "prefill_requests": "int64",
    "decodes": "int64",  # requests that decode, each with one token and its drafts
    "decode_context": "int64",  # KV tokens read by those
    "running": "int64",
    "waiting": "int64",
    "kv_usage": "float64",  # 0..1 after schedule()
    "preempted": "int64",
    "emitted": "int64",  # tokens delivered by the step
    "drafts": "int64",  # draft tokens that it verifies
}


@dataclass(slots=True)
class Run:
    """The result of one simulated or live run.

    requests: a row a request, columns as RequestRecord, times in seconds (NaN where missing).
    steps: a row an engine step, columns as STEP_COLUMNS. Empty where not known (live runs).
    itl: gaps between the messages that bring tokens, pooled over all requests: columns stage, gap (s), weight
    (how many); where drafts are accepted, a message brings several tokens.
    stages: names, in order. meta: provenance: scenario, seed, profile, engine version, assumptions, ...
    """

    requests: pd.DataFrame
    steps: pd.DataFrame
    itl: pd.DataFrame
    stages: list[str] = field(default_factory=list)
    meta: dict[str, Any] = field(default_factory=dict)


def engines_of(rows: pd.DataFrame) -> pd.Series[int]:
    """Which engine core each row of either table is of: its replica, and the rank where it has several."""
    return rows["replica"] * _MOST_RANKS + rows["rank"] if "rank" in rows else rows["replica"]


def requests_table(requests: Requests, columns: Mapping[str, Any]) -> pd.DataFrame:
    """The table of a simulated run.

    Args:
        columns: what the requests do not say by themselves, and ``rows``, which of them there are, unless
            all; times in picoseconds, -1 where it did not happen; ``status`` by its place in ``STATUSES``.
            They may be changed.
    """
    known: dict[str, Any] = dict(columns)
    rows = known.pop("rows", slice(None))
    known |= {name: getattr(requests, name)[rows] for name in ("request_id", "prompt_tokens")}
    known["group"] = np.int64(-1) if requests.group is None else requests.group[rows]
    for name in SECONDS_COLUMNS:
        ps, seconds = known[name], known[name].view(np.float64)
        missing = ps < 0
        np.multiply(ps, 1e-12, out=seconds)
        if missing.any():
            seconds[missing] = np.nan
        known[name] = seconds
    count = len(known["status"])
    for name in ("replica", "cached_tokens", "group"):
        values, missing = known[name], np.broadcast_to(known[name] < 0, count).copy()
        whole = values.astype(np.int64, copy=False) if np.any(values > 0) else np.zeros(count, np.int64)
        known[name] = pd.arrays.IntegerArray(whole, missing)
    there = np.array([(known["status"] == code).any() for code in range(len(STATUSES))])
    codes = (np.cumsum(there) - 1).astype(np.int8)[known["status"]]
    known["status"] = pd.Categorical.from_codes(codes, np.array(STATUSES)[there])
    return pd.DataFrame({name: known[name] for name in RequestRecord.__slots__}, copy=False)


def steps_table(columns: NDArray[np.int64]) -> pd.DataFrame:
    """The table of steps from (fields, n) columns, in which floats are given by their bits."""
    named = zip(STEP_COLUMNS.items(), columns, strict=True)
    return pd.DataFrame({name: values.view(kind) for (name, kind), values in named}, copy=False)
