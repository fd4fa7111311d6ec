"""guidellm's ``benchmarks.json`` (or .yaml), of its releases 0.3 to 0.8.

0.7 and 0.8 write schema version 2, 0.5 and 0.6 version 1, which has the same places of what is read here, and
0.4 the same without saying so. Until 0.3 the strategy and the times of requests lay elsewhere: they are put
where they lie today.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import AliasChoices, Field, model_validator

from servecast.sim.inputs.errors import InputError
from servecast.sim.inputs.schema import Positive
from servecast.sim.metrics.metrics import Floats
from servecast.validate.readers.reading import (
    Context,
    Part,
    Rate,
    Reading,
    Requests,
    Slots,
    Statistics,
    expect,
    sampled,
)
from servecast.validate.readers.run_of import Columns, run_of, run_without_requests

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


class _Backend(Part):
    kind: str | None = None
    model: str | None = None


class _Profile(Part):
    max_concurrency: Slots | None = None


class _Config(Part):
    strategy: _Strategy
    backend: _Backend = _Backend()
    profile: _Profile = _Profile()


class _Timings(Part):
    targeted_start: float | None = None
    request_start: float | None = None
    first_token_iteration: float | None = None
    last_token_iteration: float | None = None


class _Info(Part):
    timings: _Timings


class _Request(Part):
    info: _Info
    prompt_tokens: float | None = None
    output_tokens: float | None = None
    cached_tokens: float | None = None


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


class _Successful(Part):
    successful: _Statistics


class _Totals(Part):
    successful: Requests
    errored: Requests = 0


class _Metrics(Part):
    request_totals: _Totals
    requests_per_second: _Successful
    output_tokens_per_second: _Successful
    request_latency: _Successful
    time_to_first_token_ms: _Successful
    inter_token_latency_ms: _Successful


class _Benchmark(Part):
    config: _Config
    start_time: float
    duration: Positive
    requests: _Requests
    metrics: _Metrics


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
                benchmark = expect(_Benchmark, _today(each), source=source, form=report.metadata.form)
                readings.append(_reading(benchmark, report.metadata, source))
        return readings


def _today(benchmark: Any) -> Any:
    """A benchmark of 0.3 with its parts where 0.4 and later have them; any other as it is."""
    arguments = benchmark.get("args") if isinstance(benchmark, dict) else None
    if not isinstance(arguments, dict) or "strategy" not in arguments or "config" in benchmark:
        return benchmark
    worker, metrics, times = (benchmark.get(name) for name in ("worker", "metrics", "run_stats"))
    backend = {}
    if isinstance(worker, dict):
        backend = {"kind": worker.get("backend_type"), "model": worker.get("backend_model")}
    if isinstance(metrics, dict):
        metrics = {"request_totals": benchmark.get("request_totals"), **metrics}
    moved = {"config": {"strategy": arguments["strategy"], "backend": backend}, "metrics": metrics}
    if isinstance(times, dict) and "duration" not in benchmark:
        start, end = (benchmark.get(name, times.get(name)) for name in ("start_time", "end_time"))
        if isinstance(start, int | float) and isinstance(end, int | float):
            moved |= {"start_time": start, "duration": end - start}
    requests = benchmark.get("requests")
    if isinstance(requests, dict):
        moved["requests"] = {
            status: [_request_today(each) for each in listed] if isinstance(listed, list) else listed
            for status, listed in requests.items()
        }
    return {**benchmark, **moved}


def _request_today(request: Any) -> Any:
    """A request of 0.3. Its targeted start is -1 where there is none."""
    if not isinstance(request, dict):
        return request
    scheduled = request.get("scheduler_info")
    target = scheduled.get("targeted_start_time") if isinstance(scheduled, dict) else None
    timings = {
        "targeted_start": None if target == -1 else target,
        "request_start": request.get("start_time"),
        "first_token_iteration": request.get("first_token_time"),
        "last_token_iteration": request.get("last_token_time"),
    }
    return {**request, "info": {"timings": timings}}


def _reading(benchmark: _Benchmark, metadata: _Metadata, source: str) -> Reading:
    strategy, metrics = benchmark.config.strategy, benchmark.metrics
    closed = {"synchronous": 1, "concurrent": strategy.streams}
    context = Context(
        tool=FORM,
        tool_version=metadata.guidellm_version or "0.4 or older",
        backend=benchmark.config.backend.kind,
        model=benchmark.config.backend.model,
        request_rate=strategy.rate if strategy.rate is not None else math.inf,
        max_concurrency=closed.get(strategy.type_, benchmark.config.profile.max_concurrency),
        burstiness={"poisson": 1.0, "constant": math.inf}.get(strategy.type_),
    )
    reported = sampled(
        {
            "completed": float(metrics.request_totals.successful),
            "failed": float(metrics.request_totals.errored),
            "duration": benchmark.duration,
            "request_throughput": metrics.requests_per_second.successful.mean,
            "output_throughput": metrics.output_tokens_per_second.successful.mean,
            **metrics.time_to_first_token_ms.successful.named("ttft", to_ms=1.0),
            **metrics.request_latency.successful.named("e2el"),
            "mean_itl_ms": metrics.inter_token_latency_ms.successful.mean,
        }
    )
    notes = [
        "guidellm's own E2E ends with the stream; computed from its requests it ends at the last token",
        "guidellm's own percentiles are not interpolated",
        "the file has no gaps between tokens, so there is no ITL beside TPOT",
    ]
    asked = benchmark.requests
    if len(asked.successful) < metrics.request_totals.successful:
        held = f"{len(asked.successful)} of {metrics.request_totals.successful}"
        notes.append(f"only totals: the file holds {held} requests")
        return Reading(source, context.load, context, run_without_requests(context), reported, tuple(notes))
    # a request that was never sent has no start
    sent = [
        (status, each)
        for name, status in _STATUS.items()
        for each in getattr(asked, name)
        if each.info.timings.request_start is not None
    ]
    for number, (status, each) in enumerate(sent):
        times = each.info.timings
        needed = (
            times.first_token_iteration,
            times.last_token_iteration,
            each.prompt_tokens,
            each.output_tokens,
        )
        if status == "finished" and None in needed:
            raise InputError(
                "a request without times of its tokens: the run did not stream, or the file is cut off",
                where=f"{source}.requests.successful.{number}",
                fix="Run guidellm with a streaming backend.",
            )
    sent.sort(key=lambda pair: pair[1].info.timings.request_start or 0.0)
    requests = [each for _, each in sent]
    timings = [each.info.timings for each in requests]
    targets, starts = _column(timings, "targeted_start"), _column(timings, "request_start")
    one_clock = not (np.abs(targets - starts) > _DAY_S).any()
    if not one_clock:
        notes.append("the times at which its requests were to be sent are of another clock: left out")
    run = run_of(
        context,
        source,
        Columns(
            arrival=targets if one_clock else None,
            sent=starts,
            first_token=_column(timings, "first_token_iteration"),
            finish=_column(timings, "last_token_iteration"),
            prompt_tokens=_column(requests, "prompt_tokens"),
            output_tokens=_column(requests, "output_tokens"),
            cached_tokens=_column(requests, "cached_tokens"),
            status=[status for status, _ in sent],
            start=benchmark.start_time,
        ),
    )
    planned = one_clock and context.max_concurrency is None
    return Reading(source, context.load, context, run, reported, tuple(notes), planned=planned)


def _column(parts: Sequence[Part], name: str) -> Floats:
    return np.array([getattr(each, name) for each in parts], dtype=np.float64)
