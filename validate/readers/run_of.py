"""A load generator's requests as a run, and what no run can be."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from servecast.sim.metrics.metrics import Floats
from servecast.sim.metrics.records import STEP_COLUMNS, RequestRecord, Run
from servecast.validate.readers.reading import Context, Reading, broken

Bools = NDArray[np.bool_]
Column = Sequence[float | None] | Floats

MOST_TOKENS = 10_000_000  # of a request: the longest contexts
LONGEST_S = 30 * 86_400.0  # of a run


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Columns:
    """What a load generator kept of its requests, a value a request; None and NaN are not known.

    Attributes:
        sent, first_token, finish, arrival: seconds on any one clock.
        status: "finished", "failed" or "aborted"; of the last two only the sending and the prompt are kept
            (0 tokens if not known).
        gaps: seconds between tokens, over all finished requests.
        start: when the benchmark began, on that clock; the first arrival or sending without it.
    """

    sent: Column = ()
    first_token: Column = ()
    finish: Column = ()
    prompt_tokens: Column = ()
    output_tokens: Column = ()
    status: Sequence[str] = ()
    arrival: Column | None = None
    cached_tokens: Column | None = None
    gaps: Column = ()
    start: float | None = None


def run_of(context: Context, source: str, kept: Columns) -> Run:
    """A run of one stage. source: file and which of its runs, for messages.

    Raises:
        InputError: times or lengths that no request has.
    """
    good = np.array([each == "finished" for each in kept.status], dtype=bool)

    def column(values: Column | None) -> Floats:
        return np.full(len(good), math.nan) if values is None else np.array(values, dtype=np.float64)

    times = {
        "arrival": column(kept.arrival),
        "sent": column(kept.sent),
        "first_token": np.where(good, column(kept.first_token), math.nan),
        "finish": np.where(good, column(kept.finish), math.nan),
    }
    tokens = {
        "prompt_tokens": column(kept.prompt_tokens),
        "output_tokens": np.where(good, column(kept.output_tokens), 0.0),
        "cached_tokens": column(kept.cached_tokens),
    }
    gap = np.array(kept.gaps, dtype=np.float64)
    began = kept.start
    if began is None:
        began = float(np.nanmin([*times["arrival"], *times["sent"]])) if len(good) else 0.0
    if wrong := _impossible(times, tokens, good, gap, began):
        raise broken(wrong, context.tool, where=source)
    unknown = pd.array([None] * len(good), dtype="Int64")
    columns: dict[str, Any] = {
        "request_id": np.arange(len(good)),
        "stage": 0,
        "stream": 0,
        "prompt_tokens": np.nan_to_num(tokens["prompt_tokens"]).astype("int64"),
        **{name: values - began for name, values in times.items()},
        "queued": math.nan,
        "scheduled": math.nan,
        "replica": unknown,
        "output_tokens": tokens["output_tokens"].astype("int64"),
        "cached_tokens": pd.array(tokens["cached_tokens"], dtype="Int64"),
        "preemptions": math.nan,
        "status": list(kept.status),
        "group": unknown,
    }
    return Run(
        requests=pd.DataFrame(columns, columns=list(RequestRecord.__slots__)),
        steps=pd.DataFrame({name: pd.Series(dtype=kind) for name, kind in STEP_COLUMNS.items()}),
        itl=pd.DataFrame({"stage": 0, "gap": gap, "weight": np.ones(len(gap))}),
        meta={
            "request_rate": context.request_rate,
            "burstiness": context.burstiness,
            "max_concurrency": context.max_concurrency,
            "clock_start_s": began,  # what the tool's clock showed at 0 s
        },
    )


def _impossible(
    times: Mapping[str, Floats], tokens: Mapping[str, Floats], good: Bools, gaps: Floats, began: float
) -> str | None:
    """What the columns say that no benchmark sees; every comparison is false where a value is not known."""
    done = {name: values[good] for name, values in times.items()}
    sent, first, finish = done["sent"], done["first_token"], done["finish"]
    if not (ordered := (sent <= first) & (first <= finish)).all():
        row = ordered.argmin()
        times_s = ", ".join(f"{each[row] - began:.6g}" for each in (sent, first, finish))
        return f"a request's sending, first and last token are at {times_s} s"
    for name, least in (
        ("prompt_tokens", 1),
        ("output_tokens", 1),
        ("prompt_tokens", 0),
        ("cached_tokens", 0),
    ):
        counts = tokens[name][good] if least else tokens[name][~np.isnan(tokens[name])]
        whole = (counts >= least) & (counts <= MOST_TOKENS) & (np.floor(counts) == counts)
        if not whole.all():
            return f"a request has {counts[whole.argmin()]:.6g} {name}"
    if not (gaps >= 0).all():
        return f"a gap between tokens is {gaps.min():.6g} s"
    if not len(finish):
        return None
    if not finish.max() > began:
        return "it ends before it begins"
    every = np.array([began, *done["arrival"], *sent, *finish])
    span = float(np.nanmax(every) - np.nanmin(every))
    return None if span < LONGEST_S else f"it took {span / 86_400:.4g} days"


def totals(
    source: str, context: Context, reported: Mapping[str, float], *notes: str, halved: bool = False
) -> Reading:
    """What a file says that has only totals."""
    return Reading(source, context, run_of(context, "", Columns()), reported, notes, halved=halved)
