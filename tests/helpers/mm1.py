"""A server whose largest rate at an objective is known in closed form: an M/M/1 queue."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from servecast.sim.metrics.records import STEP_COLUMNS, Run

SERVICE_RATE = 10.0


def table(arrival: Any, start: Any, finish: Any) -> pd.DataFrame:
    """Finished requests of one token each; sent when they arrive, first token when they finish."""
    n = len(arrival)
    return pd.DataFrame(
        {
            "request_id": np.arange(n),
            "stage": 0,
            "prompt_tokens": 1,
            "arrival": arrival,
            "sent": arrival,
            "queued": arrival,
            "scheduled": start,
            "first_token": finish,
            "finish": finish,
            "output_tokens": 1,
            "cached_tokens": pd.arrays.IntegerArray(np.zeros(n, np.int64), np.zeros(n, bool)),
            "preemptions": 0,
            "status": pd.Categorical.from_codes(np.zeros(n, np.int8), ["finished"]),
        }
    )


def steps_frame(**columns: Any) -> pd.DataFrame:
    size = max(len(column) for column in columns.values())
    known = {name: np.asarray(columns.get(name, np.zeros(size)), kind) for name, kind in STEP_COLUMNS.items()}
    return pd.DataFrame(known)


def mm1(request_rate: float, seed: int, num_requests: int, service_rate: float = SERVICE_RATE) -> Run:
    """An M/M/1 queue by Lindley's recursion, summed up; the service is the first token."""
    rng = np.random.default_rng(seed)
    draws = rng.exponential(size=(num_requests, 2))  # row by row, so that more requests extend the traffic
    arrival = np.cumsum(draws[:, 0]) / request_rate
    service = draws[:, 1] / service_rate
    done = np.cumsum(service)
    finish = done + np.maximum.accumulate(arrival - done + service)
    start = finish - service
    waiting = np.arange(num_requests) - np.searchsorted(finish, arrival)
    steps = steps_frame(start=start, duration=service, running=np.ones(num_requests), waiting=waiting)
    return Run(table(arrival, start, finish), steps, pd.DataFrame({"stage": [], "gap": [], "weight": []}))
