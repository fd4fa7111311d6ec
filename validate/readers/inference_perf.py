"""inference-perf's lifecycle reports: of each request, of a stage, and of the whole run.

Until 0.2 a timestamp was taken for every line of the event stream, the empty one after each event included:
half of all gaps are about zero, and the reported ITL and TPOT are half of what they should be. Until 0.4
the end marker of the stream counts as a last token.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field

from servecast.sim.errors import InputError
from servecast.validate.readers.reading import (
    Context,
    Part,
    Reading,
    broken,
    expect,
    named,
    run_of,
    run_without_requests,
)

FORM = "inference-perf"
HALVED = (
    "inference-perf before 0.3 times the empty line after each event, which halves ITL and TPOT: put right"
)
_MANY_TOKENS = 50  # from here on half of the gaps are those of empty lines, but for 1 %
_NEAR_ZERO = 0.1  # a gap below this share of the mean is that of an empty line


class _Text(Part):
    input_tokens: int


class _RequestMetrics(Part):
    text: _Text


class _ResponseMetrics(Part):
    output_tokens: int = 0
    output_token_times: list[float] = Field(default_factory=list)


class _Info(Part):
    """input_tokens, output_tokens and output_token_times stood here until 0.4."""

    input_tokens: int | None = None
    output_tokens: int | None = None
    output_token_times: list[float] | None = None
    request_metrics: _RequestMetrics | None = None
    response_metrics: _ResponseMetrics | None = None


class _Request(Part):
    start_time: float
    end_time: float
    info: _Info
    error: Any = None

    @property
    def prompt_tokens(self) -> int:
        if self.info.input_tokens is not None:
            return self.info.input_tokens
        return 0 if self.info.request_metrics is None else self.info.request_metrics.text.input_tokens

    @property
    def output_tokens(self) -> int:
        if self.info.output_tokens is not None:
            return self.info.output_tokens
        return 0 if self.info.response_metrics is None else self.info.response_metrics.output_tokens

    @property
    def times(self) -> list[float]:
        old = self.info.output_token_times
        if old is not None:
            return old
        return [] if self.info.response_metrics is None else self.info.response_metrics.output_token_times


class _Statistics(Part):
    mean: float
    median: float | None = None
    p75: float | None = None
    p90: float | None = None
    p95: float | None = None
    p99: float | None = None


class _Latency(Part):
    request_latency: _Statistics
    time_to_first_token: _Statistics | None = None
    time_per_output_token: _Statistics | None = None
    inter_token_latency: _Statistics | None = None


class _Throughput(Part):
    output_tokens_per_sec: float
    total_tokens_per_sec: float
    requests_per_sec: float


class _Successes(Part):
    count: int
    latency: _Latency
    throughput: _Throughput
    output_len: _Statistics
    prompt_len: _Statistics | None = None  # until 0.4
    prompt_tokens: _Statistics | None = None


class _Failures(Part):
    count: int


class _Load(Part):
    count: int
    requested_rate: float | None = None
    achieved_rate: float | None = None
    concurrency: int | None = None


class _Stage(Part):
    load_summary: _Load
    successes: _Successes
    failures: _Failures

    @property
    def halved(self) -> bool:
        """Whether most gaps are about zero, which no engine does."""
        itl = self.successes.latency.inter_token_latency
        return itl is not None and itl.median is not None and itl.median < _NEAR_ZERO * itl.mean

    def reported(self) -> dict[str, float]:
        """The tool's figures, the halved ones put right.

        Of 2 n + 1 gaps between 2 (n + 1) timestamps (n tokens and the end marker), n - 1 lie between
        tokens and the others are about zero: means grow by (2 n + 1) / (n - 1), a reported p75 is
        about the p50 and a p95 the p90, and no p95 or p99 can be told.
        """
        done, latency = self.successes, self.successes.latency
        found = {
            "completed": float(done.count),
            "failed": float(self.failures.count),
            "request_throughput": done.throughput.requests_per_sec,
            "output_throughput": done.throughput.output_tokens_per_sec,
            "total_token_throughput": done.throughput.total_tokens_per_sec,
            **_named("e2el", latency.request_latency),
            **_named("ttft", latency.time_to_first_token),
        }
        found["total_output_tokens"] = done.output_len.mean * done.count
        prompt = done.prompt_tokens or done.prompt_len
        if prompt is not None:
            found["total_input_tokens"] = prompt.mean * done.count
        itl, tpot = latency.inter_token_latency, latency.time_per_output_token
        if not self.halved:
            return found | _named("tpot", tpot) | _named("itl", itl)
        tokens = done.output_len.mean
        factor = (2 * tokens + 1) / (tokens - 1) if tokens > 1 else math.nan
        if tpot is not None:
            found |= {key: value * factor for key, value in _named("tpot", tpot).items()}
        if itl is not None:
            many = tokens >= _MANY_TOKENS
            percentiles = {"p50": itl.p75, "p90": itl.p95} if many else {}
            found |= named("itl", {"mean": itl.mean * factor, **percentiles})
        return found

    def context(self, beside: Mapping[str, Any]) -> Context:
        load = self.load_summary
        closed = load.concurrency is not None
        return Context(
            tool=FORM,
            request_rate=math.inf if closed else load.requested_rate,
            max_concurrency=load.concurrency,
            **beside,
        )


def _named(metric: str, statistics: _Statistics | None) -> dict[str, float]:
    return {} if statistics is None else named(metric, statistics.model_dump())


class InferencePerf:
    """A stage's or the summary's report, or the list of all requests."""

    name = FORM

    def recognises(self, value: Any) -> bool:
        """By a report's three parts, or by a list of requests with their info."""
        if isinstance(value, list):
            return (
                bool(value)
                and isinstance(value[0], dict)
                and {"start_time", "end_time", "info"} <= value[0].keys()
            )
        return isinstance(value, dict) and {"load_summary", "successes", "failures"} <= value.keys()

    def read(self, values: Sequence[Any], path: Path) -> list[Reading]:
        """One run; or, of a list of requests beside the reports of its stages, a run a stage."""
        beside = _config(path)
        if not isinstance(values[0], list):
            return [
                _totals(expect(_Stage, value, source=str(path), form=FORM), beside, path) for value in values
            ]
        requests = [
            expect(_Request, each, source=f"{path}: {number}", form=FORM)
            for number, each in enumerate(values[0])
        ]
        requests.sort(key=lambda each: each.start_time)
        stages = _stages(path)
        if sum(stage.load_summary.count for stage in stages) == len(requests):
            readings, first = [], 0
            for number, stage in enumerate(stages):
                last = first + stage.load_summary.count
                readings.append(_run(requests[first:last], stage, beside, f"{path}: stage {number}"))
                first = last
            return readings
        return [_run(requests, None, beside, str(path))]


def _totals(stage: _Stage, beside: Mapping[str, Any], path: Path) -> Reading:
    notes = ["only totals: the requests are in per_request_lifecycle_metrics.json", _DRAIN]
    if stage.halved:
        notes.append(HALVED + " (of the ITL's percentiles at most p50 and p90 can be told)")
    context = stage.context(beside)
    return Reading(
        str(path), context.load, context, run_without_requests(context), stage.reported(), tuple(notes)
    )


_DRAIN = (
    "its throughput counts the time until the last request is done; its E2E ends after the tokens are counted"
)


def _run(
    requests: Sequence[_Request], stage: _Stage | None, beside: Mapping[str, Any], source: str
) -> Reading:
    context = Context(tool=FORM, **beside) if stage is None else stage.context(beside)
    notes = [
        "its own E2E ends after the tokens are counted; computed from its requests it ends at the last token"
    ]
    if stage is None:
        notes.append(
            "no stage reports beside it that account for its requests: all are one run, load not stated"
        )
    status = ["finished" if each.error is None and each.times else "failed" for each in requests]
    silent = sum(each.error is None and not each.times for each in requests)
    if silent:
        raise InputError(
            f"{silent} of {len(requests)} requests have no token times",
            where=source,
            fix="Run inference-perf with streaming.",
        )
    doubled = _doubled([each.times for each in requests if each.error is None])
    if doubled:
        notes.append(HALVED)
    times = [_token_times(each, doubled) for each in requests]
    run = run_of(
        context,
        sent=[each.start_time for each in requests],
        first_token=[each[0] if each else math.nan for each in times],
        finish=[each[-1] if each else math.nan for each in times],
        prompt_tokens=[each.prompt_tokens for each in requests],
        output_tokens=[each.output_tokens for each in requests],
        status=status,
        gaps=[b - a for each in times for a, b in pairwise(each)],
    )
    return Reading(
        source, context.load, context, run, {} if stage is None else stage.reported(), tuple(notes)
    )


def _doubled(times: Sequence[Sequence[float]]) -> bool:
    """Whether every second gap is that between an event and the empty line after it."""
    if not times or any(len(each) % 2 for each in times):
        return False
    lines = sum(b - a for each in times for a, b in zip(each[::2], each[1::2], strict=True))
    return lines < _NEAR_ZERO * sum(each[-1] - each[0] for each in times)


def _token_times(request: _Request, doubled: bool) -> list[float]:
    times = request.times[::2] if doubled else request.times
    ends_with_marker = request.info.output_token_times is not None and len(times) > 1
    return times[:-1] if ends_with_marker else times


def _stages(path: Path) -> list[_Stage]:
    found: list[_Stage] = []
    while (file := path.with_name(f"stage_{len(found)}_lifecycle_metrics.json")).is_file():
        try:
            document = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise broken(f"it is not valid JSON ({error})", FORM, where=str(file)) from None
        found.append(expect(_Stage, document, source=str(file), form=FORM))
    return found


class _Server(Part):
    type: str | None = None
    model_name: str | None = None


class _Config(Part):
    server: _Server = _Server()


def _config(path: Path) -> dict[str, Any]:
    """Backend and model from the config.yaml that the tool writes beside its reports."""
    file = path.with_name("config.yaml")
    if not file.is_file():
        return {}
    try:
        document = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise broken(f"it is not YAML ({error})", FORM, where=str(file)) from None
    server = expect(_Config, document, source=str(file), form=FORM).server
    return {"backend": server.type, "model": server.model_name}
