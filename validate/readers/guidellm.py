"""guidellm's ``benchmarks.json`` (or .yaml), of its releases 0.3 to 0.8.

0.7 and 0.8 write schema version 2, 0.5 and 0.6 version 1, which has the same places of what is read here, and
0.4 the same without saying so. Until 0.3 the strategy and the times of requests lay elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import AliasChoices, Field, field_validator, model_validator

from servecast.sim.inputs.errors import InputError
from servecast.sim.inputs.schema import Positive, invalid
from servecast.sim.metrics.metrics import Floats
from servecast.validate.readers.reading import (
    Context,
    Part,
    Rate,
    Reading,
    Requests,
    Slots,
    Statistics,
    at,
    expect,
    sampled,
)
from servecast.validate.readers.run_of import Columns, run_of, totals

FORM = "guidellm"
_DAY_S = 86_400.0
_STATUS = {"successful": "finished", "errored": "failed", "incomplete": "aborted"}


class _Metadata(Part):
    version: int | None = None
    guidellm_version: str | None = None

    @property
    def form(self) -> str:
        """The format by its name, an old one by its version, too."""
        if self.version == 2:
            return FORM
        version = self.guidellm_version or "0.4 or older"
        return f"{FORM} {version}" + ("" if self.version is None else f" (schema version {self.version})")


class _Strategy(Part):
    type_: str = Field(validation_alias=AliasChoices("type_", "kind"))
    rate: Rate | None = None
    streams: Slots | None = None


class _Request(Part):
    """A request, by where its parts lie today and in 0.3."""

    targeted_start: float | None = at("info.timings.targeted_start", "scheduler_info.targeted_start_time")
    request_start: float | None = at("info.timings.request_start", "start_time")
    first_token: float | None = at("info.timings.first_token_iteration", "first_token_time")
    last_token: float | None = at("info.timings.last_token_iteration", "last_token_time")
    prompt_tokens: float | None = None
    output_tokens: float | None = None
    cached_tokens: float | None = None

    @field_validator("targeted_start")
    @classmethod
    def _none_of_minus_one(cls, start: float | None) -> float | None:
        return None if start == -1 else start

    @property
    def complete(self) -> bool:
        """Whether it says all of a request that was answered."""
        times = self.request_start, self.first_token, self.last_token
        return None not in (*times, self.prompt_tokens, self.output_tokens)


class _Requests(Part):
    successful: list[_Request]
    errored: list[_Request]
    incomplete: list[_Request]


class _Statistics(Statistics):
    @model_validator(mode="before")
    @classmethod
    def _with_percentiles(cls, data: Any) -> Any:
        percentiles = data.get("percentiles") if isinstance(data, Mapping) else None
        return {**data, **percentiles} if isinstance(percentiles, Mapping) else data


class _Benchmark(Part):
    """What is read of a benchmark, by where it lies today and in 0.3."""

    strategy: _Strategy = at("config.strategy", "args.strategy", default=...)
    backend: str | None = at("config.backend.kind", "worker.backend_type")
    model: str | None = at("config.backend.model", "worker.backend_model")
    max_concurrency: Slots | None = at("config.profile.max_concurrency")
    start_time: float = at("start_time", "run_stats.start_time", default=...)
    end_time: float | None = at("end_time", "run_stats.end_time")
    duration: Positive = math.nan
    requests: _Requests
    successful: Requests = at("metrics.request_totals.successful", "request_totals.successful", default=...)
    errored: Requests = at("metrics.request_totals.errored", "request_totals.errored", default=0)
    requests_per_second: _Statistics = at("metrics.requests_per_second.successful", default=...)
    output_tokens_per_second: _Statistics = at("metrics.output_tokens_per_second.successful", default=...)
    request_latency: _Statistics = at("metrics.request_latency.successful", default=...)
    time_to_first_token_ms: _Statistics = at("metrics.time_to_first_token_ms.successful", default=...)
    inter_token_latency_ms: _Statistics = at("metrics.inter_token_latency_ms.successful", default=...)

    @model_validator(mode="after")
    def _lasted(self) -> _Benchmark:
        if not self.seconds > 0:
            raise invalid("field 'duration' is missing, or its end is before its start", "Add it.")
        return self

    @property
    def seconds(self) -> float:
        """How long it took, which 0.3 does not say."""
        end = math.nan if self.end_time is None else self.end_time
        return end - self.start_time if math.isnan(self.duration) else self.duration


class _Report(Part):
    metadata: _Metadata = _Metadata()
    benchmarks: list[Any]


class Guidellm:
    """guidellm's report: a run a benchmark."""

    name = FORM

    def recognises(self, value: Any) -> bool:
        """By the benchmarks beside guidellm's own metadata, or by what they are."""
        if not isinstance(value, dict) or "benchmarks" not in value:
            return False
        metadata, found = value.get("metadata"), value["benchmarks"]
        if isinstance(metadata, dict) and "guidellm_version" in metadata:
            return True
        first = found[0] if isinstance(found, list) and found else None
        return isinstance(first, dict) and first.get("type_") == "generative_benchmark"

    def read(self, values: Sequence[Any], path: Path) -> list[Reading]:
        """A run a benchmark."""
        readings = []
        for value in values:
            report = expect(_Report, value, source=str(path), form=FORM)
            if report.metadata.version not in (None, 1, 2):
                raise InputError(
                    f"schema version {report.metadata.version} of guidellm, this servecast reads 1 and 2",
                    where=f"{path}: metadata.version",
                    fix="Run guidellm 0.3 to 0.8.",
                )
            if not report.benchmarks:
                raise InputError(
                    "has no benchmark", where=f"{path}: benchmarks", fix="Was the run broken off?"
                )
            for number, each in enumerate(report.benchmarks):
                source = f"{path}: benchmarks.{number}"
                benchmark = expect(_Benchmark, each, source=source, form=report.metadata.form)
                readings.append(_reading(benchmark, report.metadata, source))
        return readings


def _reading(benchmark: _Benchmark, metadata: _Metadata, source: str) -> Reading:
    strategy = benchmark.strategy
    closed = {"synchronous": 1, "concurrent": strategy.streams}
    context = Context(
        tool=FORM,
        tool_version=metadata.guidellm_version or "0.4 or older",
        backend=benchmark.backend,
        model=benchmark.model,
        request_rate=strategy.rate if strategy.rate is not None else math.inf,
        max_concurrency=closed.get(strategy.type_, benchmark.max_concurrency),
        burstiness={"poisson": 1.0, "constant": math.inf}.get(strategy.type_),
    )
    reported = sampled(
        {
            "completed": float(benchmark.successful),
            "failed": float(benchmark.errored),
            "duration": benchmark.seconds,
            "request_throughput": benchmark.requests_per_second.mean,
            "output_throughput": benchmark.output_tokens_per_second.mean,
            **benchmark.time_to_first_token_ms.named("ttft", to_ms=1.0),
            **benchmark.request_latency.named("e2el"),
            "mean_itl_ms": benchmark.inter_token_latency_ms.mean,
        }
    )
    notes = [
        "guidellm's own E2E ends with the stream; computed from its requests it ends at the last token",
        "guidellm's own percentiles are not interpolated",
        "the file has no gaps between tokens, so there is no ITL beside TPOT",
    ]
    asked = benchmark.requests
    if len(asked.successful) < benchmark.successful:
        held = f"{len(asked.successful)} of {benchmark.successful}"
        return totals(source, context, reported, *notes, f"only totals: the file holds {held} requests")
    for number, each in enumerate(asked.successful):
        if not each.complete:
            raise InputError(
                "a request without times of its tokens: the run did not stream, or the file is cut off",
                where=f"{source}.requests.successful.{number}",
                fix="Run guidellm with a streaming backend.",
            )
    # a request that was never sent has no start
    sent = [
        (each.request_start, status, each)
        for name, status in _STATUS.items()
        for each in getattr(asked, name)
        if each.request_start is not None
    ]
    sent.sort(key=lambda of: of[0])
    requests = [each for _, _, each in sent]
    targets, starts = _column(requests, "targeted_start"), _column(requests, "request_start")
    one_clock = not (np.abs(targets - starts) > _DAY_S).any()
    if not one_clock:
        notes.append("the times at which its requests were to be sent are of another clock: left out")
    run = run_of(
        context,
        source,
        Columns(
            arrival=targets if one_clock else None,
            sent=starts,
            first_token=_column(requests, "first_token"),
            finish=_column(requests, "last_token"),
            prompt_tokens=_column(requests, "prompt_tokens"),
            output_tokens=_column(requests, "output_tokens"),
            cached_tokens=_column(requests, "cached_tokens"),
            status=[status for _, status, _ in sent],
            start=benchmark.start_time,
        ),
    )
    planned = one_clock and context.max_concurrency is None
    return Reading(source, context, run, reported, tuple(notes), planned=planned)


def _column(parts: Sequence[Part], name: str) -> Floats:
    return np.array([getattr(each, name) for each in parts], dtype=np.float64)
