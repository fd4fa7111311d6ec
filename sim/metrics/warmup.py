"""Which part of a run counts: one stage of it, without its warm-up."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from servecast.sim.inputs.errors import InputError
from servecast.sim.metrics.confidence import mser5
from servecast.sim.metrics.metrics import latencies
from servecast.sim.metrics.records import Run


@dataclass(frozen=True, slots=True)
class Warmup:
    """What to leave out at the start of a run: exactly one of these.

    seconds: what was sent before this time; requests: the first so many sent; share: the first part of
    all requests; auto: what MSER-5 cuts from the TTFT or the E2E series, whichever is more.
    """

    seconds: float | None = None
    requests: int | None = None
    share: float | None = None
    auto: bool = False

    @classmethod
    def parse(cls, text: str) -> Warmup:
        """ "30s", "100" (requests), "20%" or "auto"."""
        text = text.strip()
        try:
            if text == "auto":
                return cls(auto=True)
            if text.endswith("s") and 0 <= (seconds := float(text[:-1])) < math.inf:
                return cls(seconds=seconds)
            if text.endswith("%") and 0 <= (percent := float(text[:-1])) < 100:
                return cls(share=percent / 100)
            if text.isdecimal():
                return cls(requests=int(text))
        except ValueError:
            pass
        what = f"cannot read {text!r}"
        raise InputError(what, where="--warmup", fix="Give 30s, a number of requests, 20% or auto.")


def select(run: Run, *, stage: int | str | None = None, warmup: Warmup | None = None) -> Run:
    """The part of a run that counts: one stage of it, without its warm-up.

    The requests are those of the stage that were sent after the warm-up, the steps those that began
    between its end and the last finish, and before the next stage. Inter-token gaps carry no time, so the
    warm-up stays in them.
    ``meta["start_s"]`` says where the part begins: at the end of the warm-up, else at the stage's start
    (``meta["stage_starts_s"]``, or its first arrival where that is not recorded).
    """
    requests, itl, start = run.requests, run.itl, float(run.meta.get("start_s", 0.0))
    end = math.inf
    if stage is not None:
        index = _stage_index(run, stage)
        requests, itl = _where(requests, requests["stage"] == index), _where(itl, itl["stage"] == index)
        starts = run.meta.get("stage_starts_s")
        start = float(starts[index] if starts else requests["arrival"].min())
        if starts and index + 1 < len(starts):
            end = float(starts[index + 1])
    if warmup is not None:
        order = requests["sent"].to_numpy().argsort(kind="stable")
        cut = _warmup_requests(requests, order, warmup, start)
        if cut >= len(order):
            fix = "Cut less, or run longer."
            raise InputError(f"the warm-up leaves none of {len(order)} requests", where="warmup", fix=fix)
        order[cut:].sort()
        requests = requests.iloc[order[cut:]]
        start = start + warmup.seconds if warmup.seconds is not None else float(requests["sent"].min())
    steps = run.steps
    if (stage is not None or warmup is not None) and len(steps):
        begins = steps["start"]
        steps = _where(steps, (begins >= start) & (begins <= requests["finish"].max()) & (begins < end))
    return replace(run, requests=requests, steps=steps, itl=itl, meta={**run.meta, "start_s": start})


def _where(table: pd.DataFrame, kept: pd.Series[bool]) -> pd.DataFrame:
    """Those rows; the table itself, and no copy of it, where that is all of them."""
    return table if kept.all() else table[kept]


def part_of(run: Run, first: int, end: int) -> Run:
    """A run's requests [first, end), counted from 0 in the order in which they were sent."""
    kept = select(run, warmup=Warmup(requests=first))
    in_order = kept.requests.sort_values("sent", kind="stable")
    return replace(kept, requests=in_order.iloc[: end - first].sort_index())


def _stage_index(run: Run, stage: int | str) -> int:
    if stage in run.stages:
        return run.stages.index(str(stage))
    if isinstance(stage, int) and 0 <= stage < max(len(run.stages), 1):
        return stage
    raise InputError(f"no stage {stage!r}", where="stage", fix=f"The run has {', '.join(run.stages)}.")


def _warmup_requests(requests: pd.DataFrame, order: NDArray[np.int64], warmup: Warmup, start: float) -> int:
    """How many requests, the first in ``order``, are warm-up."""
    if warmup.seconds is not None:
        return int((requests["sent"] < start + warmup.seconds).sum())
    if warmup.requests is not None:
        return warmup.requests
    if warmup.share is not None:
        return int(warmup.share * len(order))
    in_order = requests.iloc[order]
    done = latencies(in_order)
    cut = max(mser5(done["ttft"])[0], mser5(done["e2el"])[0])
    return int(in_order.index.get_indexer(done.index[cut : cut + 1])[0]) if cut else 0
