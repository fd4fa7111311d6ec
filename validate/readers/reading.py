"""What a saved result says: a run like a simulated one, the load it was under, and the tool's own figures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from pydantic import BaseModel, ConfigDict

from servecast.sim.errors import InputError
from servecast.sim.metrics import summary
from servecast.sim.records import STEP_COLUMNS, RequestRecord, Run
from servecast.sim.schema import parse

RANKS = (50, 90, 95, 99)


@dataclass(frozen=True, slots=True)
class Context:
    """What the file says of the run; None is not said.

    request_rate: requests/s, inf where only the concurrency bounds it. burstiness: shape of the gamma law
    of the gaps between arrivals.
    """

    tool: str
    tool_version: str | None = None
    backend: str | None = None
    model: str | None = None
    request_rate: float | None = None
    max_concurrency: int | None = None
    burstiness: float | None = None
    date: str | None = None

    @property
    def load(self) -> str:
        """The load in words: "4 requests/s", "concurrency 8"."""
        parts = []
        if self.request_rate is not None and math.isfinite(self.request_rate):
            parts.append(f"{self.request_rate:.4g} requests/s")
        if self.max_concurrency is not None:
            parts.append(f"concurrency {self.max_concurrency}")
        if not parts:
            parts.append("all at once" if self.request_rate is not None else "load not stated")
        return ", ".join(parts)


@dataclass(frozen=True, slots=True)
class Reading:
    """One run under one load, out of a result file.

    Attributes:
        source: file, and which of its runs where it has several. label: which, in short.
        run: without requests where the file has only totals. Times are seconds from the start of the
            benchmark; ``arrival`` is NaN where the tool does not say when it meant to send, ``preemptions``
            and ``steps`` are never known to a client.
        reported: the tool's own figures, under the keys of vllm bench serve.
        planned: whether ``arrival`` is when the tool meant to send, and not when a request began to wait
            for its turn in the client.
        notes: what was put right, and what means something else than in vllm bench serve.
    """

    source: str
    label: str
    context: Context
    run: Run
    reported: Mapping[str, float]
    notes: tuple[str, ...] = ()
    planned: bool = False

    @property
    def has_requests(self) -> bool:
        """Whether the file says what happened to each request."""
        return len(self.run.requests) > 0

    def figures(self) -> dict[str, Any]:
        """The run's figures under the keys of vllm bench serve: computed from its requests, or those
        reported where there are none."""
        return summary(self.run, ranks=RANKS) if self.has_requests else dict(self.reported)


class Reader(Protocol):
    """Reads one format."""

    name: str

    def recognises(self, value: Any) -> bool:
        """Whether a JSON value (of a file, or of a line of JSONL) is of this format."""
        ...

    def read(self, values: Sequence[Any], path: Path) -> list[Reading]:
        """The runs in a file's values, all of which it recognises.

        Raises:
            InputError: something that the format promises is missing or contradicts itself.
        """
        ...


class Part(BaseModel):
    """A part of a result file: the fields that we read; others are let be."""

    model_config = ConfigDict(extra="ignore", frozen=True)


P = TypeVar("P", bound=Part)


def expect(model: type[P], value: Any, *, source: str, form: str) -> P:
    """The part of a file that was recognised as ``form``.

    Raises:
        InputError: a field is missing or not what the format has there.
    """
    try:
        return parse(model, value, source=source)
    except InputError as error:
        raise broken(error.what, form, where=error.where) from None


def broken(what: str, form: str, *, where: str) -> InputError:
    """The error about a file that begins like a format and does not keep to it."""
    return InputError(
        f"this is a result of {form}, but {what}",
        where=where,
        fix="Is the file cut off or edited? Save it again with the tool.",
    )


def run_of(
    context: Context,
    *,
    sent: ArrayLike,
    first_token: ArrayLike,
    finish: ArrayLike,
    prompt_tokens: ArrayLike,
    output_tokens: ArrayLike,
    status: Sequence[str],
    arrival: ArrayLike | None = None,
    cached_tokens: Sequence[int | None] | None = None,
    gaps: ArrayLike = (),
    start: float | None = None,
) -> Run:
    """A run of one stage from columns, a value a request.

    Args:
        sent, first_token, finish, arrival: seconds on any one clock, NaN where not known.
        status: "finished", "failed" or "aborted"; of the last two only the sending is kept.
        gaps: seconds between tokens, over all requests.
        start: when the benchmark began, on that clock; the first arrival or sending without it.
    """
    good = np.array([each == "finished" for each in status], dtype=bool)
    times = {
        "arrival": np.full(len(good), math.nan) if arrival is None else np.asarray(arrival, dtype=float),
        "sent": np.asarray(sent, dtype=float),
        "first_token": np.where(good, np.asarray(first_token, dtype=float), math.nan),
        "finish": np.where(good, np.asarray(finish, dtype=float), math.nan),
    }
    began = float(np.nanmin([*times["arrival"], *times["sent"]])) if start is None else start
    unknown = pd.array([None] * len(good), dtype="Int64")
    columns: dict[str, Any] = {
        "request_id": np.arange(len(good)),
        "stage": 0,
        "stream": 0,
        "prompt_tokens": np.asarray(prompt_tokens, dtype="int64"),
        **{name: values - began for name, values in times.items()},
        "queued": math.nan,
        "scheduled": math.nan,
        "replica": unknown,
        "output_tokens": np.where(good, np.asarray(output_tokens, dtype="int64"), 0),
        "cached_tokens": unknown if cached_tokens is None else pd.array(list(cached_tokens), dtype="Int64"),
        "preemptions": math.nan,
        "status": list(status),
        "group": unknown,
    }
    gap = np.asarray(gaps, dtype=float)
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


def run_without_requests(context: Context) -> Run:
    """The run of a file that has only totals."""
    return run_of(
        context,
        sent=[],
        first_token=[],
        finish=[],
        prompt_tokens=[],
        output_tokens=[],
        status=[],
        start=0.0,
    )


def named(metric: str, statistics: Mapping[str, float | None], *, to_ms: float = 1000.0) -> dict[str, float]:
    """A tool's statistics of a latency under vllm bench serve's keys: mean, median (or p50), std, p90, ..."""
    wanted = {"mean": "mean", "std": "std", "median": "median", "p50": "median"}
    wanted |= {f"p{rank}": f"p{rank}" for rank in (90, 95, 99)}
    return {
        f"{key}_{metric}_ms": value * to_ms
        for name, key in wanted.items()
        if (value := statistics.get(name)) is not None
    }
