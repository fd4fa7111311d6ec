"""``vllm bench serve --save-result`` or ``--append-result``, with or without ``--save-detailed``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import chain, compress
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import ConfigDict, Field, RootModel

from servecast.sim.inputs.schema import Positive
from servecast.sim.metrics.records import Run
from servecast.sim.run.results import measured
from servecast.validate.readers.reading import (
    Context,
    Part,
    Rate,
    Reading,
    Requests,
    Slots,
    broken,
    expect,
    sampled,
)
from servecast.validate.readers.run_of import Columns, run_of, totals

FORM, OURS = "vllm bench serve", "servecast simulate"
_TOTALS = ("total_input_tokens", "total_output_tokens")


class _Result(Part):
    backend: str | None = None
    model_id: str | None = None
    date: str | None = None
    vllm_version: str | None = None  # only where --metadata vllm_version=... said it
    servecast_version: str | None = None
    request_rate: Rate | Literal["inf"] | None = None
    burstiness: Rate | None = None
    max_concurrency: Slots | None = None
    ramp_up_strategy: str | None = None
    ramp_up_start_rps: float | None = None
    ramp_up_end_rps: float | None = None
    duration: Positive
    completed: Requests
    fleet_load: Mapping[str, Any] = Field(default_factory=dict)

    @property
    def ramp(self) -> tuple[float, float] | None:
        """Rates of --ramp-up-strategy, under which the request rate is said to be inf."""
        ends = self.ramp_up_start_rps, self.ramp_up_end_rps
        return None if ends[0] is None or ends[1] is None else (ends[0], ends[1])


class _Figures(RootModel[Mapping[str, float | None]]):
    model_config = ConfigDict(allow_inf_nan=False)


class _Details(Part):
    """Values a request, in seconds, of --save-detailed. ``latencies`` and ``queue_times`` came after
    vLLM 0.23; ``start_times`` are on the client's monotonic clock."""

    input_lens: list[float]
    output_lens: list[float]
    ttfts: list[float]
    itls: list[list[float]]
    start_times: list[float]
    errors: list[str]
    latencies: list[float] | None = None
    queue_times: list[float] | None = None


class VllmBench:
    """vLLM's result: one JSON object, or one a line."""

    name = FORM

    def recognises(self, value: Any) -> bool:
        """By the keys that each of its results has."""
        return isinstance(value, dict) and {"completed", "duration", "request_throughput"} <= value.keys()

    def read(self, values: Sequence[Any], path: Path) -> list[Reading]:
        """A run an object."""
        several = len(values) > 1
        return [
            self._one(value, f"{path}, line {number}" if several else str(path))
            for number, value in enumerate(values, start=1)
        ]

    def _one(self, value: dict[str, Any], source: str) -> Reading:
        result = expect(_Result, value, source=source, form=FORM)
        rate = math.inf if result.request_rate == "inf" else result.request_rate
        ours = result.servecast_version is not None
        context = Context(
            tool=OURS if ours else FORM,
            tool_version=result.servecast_version or result.vllm_version,
            backend=result.backend,
            model=result.model_id,
            request_rate=rate if result.ramp is None else None,
            max_concurrency=result.max_concurrency,
            burstiness=result.burstiness,
            date=result.date,
            ramp=result.ramp,
        )
        notes = []
        if result.ramp is not None:
            notes.append(f"{context.load}: the rate rose during the run ({result.ramp_up_strategy})")
        said = measured(value) | {key: value.get(key) for key in _TOTALS}
        figures = expect(_Figures, said, source=source, form=FORM).root
        reported = sampled({key: each for key, each in figures.items() if each is not None})
        if "itls" not in value or "start_times" not in value:
            why = "this release does not save when each request was sent (start_times)"
            why = why if "itls" in value else "saved without --save-detailed"
            return totals(source, context, reported, *notes, f"only totals: {why}")
        run = _run(expect(_Details, value, source=source, form=FORM), result, context, source)
        if "latencies" not in value and result.max_concurrency is not None:
            notes.append("the file does not say how long requests waited in the client for their turn")
        return Reading(source, context, run, reported, tuple(notes))


def _run(details: _Details, result: _Result, context: Context, source: str) -> Run:
    lengths = {
        name: len(each) for name in _Details.model_fields if (each := getattr(details, name)) is not None
    }
    if len(set(lengths.values())) > 1:
        said = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise broken(f"its lists differ in length ({said})", FORM, where=source)
    sent, ttft = np.array(details.start_times), np.array(details.ttfts)
    finished = np.array([not error for error in details.errors], dtype=bool) & (ttft > 0)
    if finished.sum() != result.completed:
        raise broken(
            f"it says {result.completed} completed and lists {finished.sum()}",
            FORM,
            where=f"{source}: completed",
        )
    if details.latencies is None:
        e2el = ttft + np.array([sum(gaps) for gaps in details.itls])
    else:
        e2el = np.array(details.latencies)
    finish = sent + e2el
    # The file does not say when the benchmark began, but how long it took, up to the last completion.
    start = float(finish[finished].max()) - result.duration if finished.any() else None
    return run_of(
        context,
        source,
        Columns(
            arrival=None if details.queue_times is None else sent - np.array(details.queue_times),
            sent=sent,
            first_token=sent + ttft,
            finish=finish,
            prompt_tokens=details.input_lens,
            output_tokens=details.output_lens,
            status=np.where(finished, "finished", "failed").tolist(),
            gaps=list(chain.from_iterable(compress(details.itls, finished))),
            start=start,
        ),
    )
