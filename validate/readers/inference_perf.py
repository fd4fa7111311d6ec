"""inference-perf's lifecycle reports: of each request, of a stage, and of the whole run.

Until 0.2 a timestamp was taken for every line of the event stream, the empty one after each event included:
half of all gaps are about zero, and the reported ITL and TPOT are half of what they should be. Until 0.4
the end marker of the stream counts as a last token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from servecast.sim.inputs.errors import InputError
from servecast.sim.inputs.schema import invalid
from servecast.validate.readers.document import values_of
from servecast.validate.readers.reading import Context, Part, Reading, Requests, Slots, Statistics, at, expect
from servecast.validate.readers.run_of import Columns, run_of, totals

FORM = "inference-perf"
HALVED = (
    "inference-perf before 0.3 times the empty line after each event, which halves ITL and TPOT: put right"
)
_NEAR_ZERO = 0.1  # a gap below this share of the mean is that of an empty line
_MANY_TOKENS = 50  # from here on half of the gaps are those of empty lines, but for 1 %
_AGREES = 0.25  # how far the sum of the gaps may be from the latency after the first token


class _Load(Part):
    count: Requests
    requested_rate: Annotated[float, Field(ge=0)] | None = None
    concurrency: Slots | None = None


class _Stage(Part):
    load_summary: _Load
    count: Requests = at("successes.count", default=...)
    failed: Requests = at("failures.count", default=...)
    e2el: Statistics | None = at("successes.latency.request_latency")
    ttft: Statistics | None = at("successes.latency.time_to_first_token")
    tpot: Statistics | None = at("successes.latency.time_per_output_token")
    itl: Statistics | None = at("successes.latency.inter_token_latency")
    output_tokens_per_sec: float = at("successes.throughput.output_tokens_per_sec", default=...)
    total_tokens_per_sec: float = at("successes.throughput.total_tokens_per_sec", default=...)
    requests_per_sec: float = at("successes.throughput.requests_per_sec", default=...)
    output_tokens: float | None = at("successes.output_len.mean")  # of a request; None of no request
    prompt_tokens: float | None = at("successes.prompt_tokens.mean", "successes.prompt_len.mean")
    today: Any = at("successes.prompt_tokens")
    until_0_4: Any = at("successes.prompt_len")

    @model_validator(mode="after")
    def _summed_up(self) -> _Stage:
        if self.count and (self.e2el is None or self.output_tokens is None):
            raise invalid("request_latency or output_len is missing", "Save it again.")
        return self

    @property
    def halved(self) -> bool:
        """Whether an old version wrote it, most gaps are about zero, and all 2 n + 1 of them add up to the
        latency after the first token (see ``reported``)."""
        e2el, ttft, tpot, itl, tokens = self.e2el, self.ttft, self.tpot, self.itl, self.output_tokens
        old = self.until_0_4 is not None and self.today is None
        if not old or e2el is None or ttft is None or tpot is None or itl is None or itl.median is None:
            return False
        if tokens is None:
            return False
        gaps, after_first = tpot.mean * (2 * tokens + 1), e2el.mean - ttft.mean
        return itl.median < _NEAR_ZERO * itl.mean and abs(gaps - after_first) < _AGREES * after_first

    def reported(self) -> dict[str, float]:
        """The tool's figures, the halved ones put right.

        Of 2 n + 1 gaps between 2 (n + 1) timestamps (n tokens and the end marker), n - 1 lie between
        tokens and the others are about zero: means grow by (2 n + 1) / (n - 1), a reported p75 is
        about the p50 and a p95 the p90, and no p95 or p99 can be told.
        """
        found = {
            "completed": float(self.count),
            "failed": float(self.failed),
            "request_throughput": self.requests_per_sec,
            "output_throughput": self.output_tokens_per_sec,
            "total_token_throughput": self.total_tokens_per_sec,
            **_named("e2el", self.e2el),
            **_named("ttft", self.ttft),
        }
        means = {"total_output_tokens": self.output_tokens, "total_input_tokens": self.prompt_tokens}
        found |= {key: mean * self.count for key, mean in means.items() if mean is not None}
        tpot, itl, tokens = _named("tpot", self.tpot), _named("itl", self.itl), self.output_tokens
        if not self.halved:
            return found | tpot | itl
        if tokens is None or tokens <= 1:
            return found
        factor = (2 * tokens + 1) / (tokens - 1)
        found |= {key: value * factor for key, value in tpot.items()}
        found["mean_itl_ms"] = itl["mean_itl_ms"] * factor
        if tokens >= _MANY_TOKENS:
            ranks = {"median_itl_ms": "p75_itl_ms", "p90_itl_ms": "p95_itl_ms"}
            found |= {key: itl[theirs] for key, theirs in ranks.items() if theirs in itl}
        return found


def _named(metric: str, statistics: Statistics | None) -> dict[str, float]:
    return {} if statistics is None else statistics.named(metric)


@dataclass(frozen=True, slots=True)
class _Beside:
    """What another file says of the run."""

    backend: str | None = None
    model: str | None = None
    notes: tuple[str, ...] = ()


class _Request(Part):
    """A request. Its tokens' times stood under ``info`` until 0.4."""

    start_time: float
    end_time: float
    info: Mapping[str, Any]
    error: Any = None
    prompt_tokens: float | None = at("info.request_metrics.text.input_tokens", "info.input_tokens")
    output_tokens: float | None = at("info.response_metrics.output_tokens", "info.output_tokens")
    old_times: list[float] | None = at("info.output_token_times")
    new_times: list[float] | None = at("info.response_metrics.output_token_times")

    @property
    def times(self) -> list[float]:
        return (self.new_times or []) if self.old_times is None else self.old_times


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
        beside = _beside(path)
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


def _context(stage: _Stage | None, beside: _Beside) -> Context:
    load = _Load(count=0) if stage is None else stage.load_summary
    return Context(
        tool=FORM,
        request_rate=math.inf if load.concurrency is not None else load.requested_rate or None,
        max_concurrency=load.concurrency,
        backend=beside.backend,
        model=beside.model,
    )


def _totals(stage: _Stage, beside: _Beside, path: Path) -> Reading:
    notes = ["only totals: the requests are in per_request_lifecycle_metrics.json", _DRAIN, *beside.notes]
    if stage.halved:
        notes.append(HALVED + " (of the ITL's percentiles at most p50 and p90 can be told)")
    return totals(str(path), _context(stage, beside), stage.reported(), *notes, halved=stage.halved)


_DRAIN = (
    "its throughput counts the time until the last request is done; its E2E ends after the tokens are counted"
)


def _run(requests: Sequence[_Request], stage: _Stage | None, beside: _Beside, source: str) -> Reading:
    context = _context(stage, beside)
    notes = [
        "its own E2E ends after the tokens are counted; computed from its requests it ends at the last token",
        *beside.notes,
    ]
    if stage is None:
        notes.append(
            "no stage reports beside it that account for its requests: all are one run, load not stated"
        )
    done = [each for each in requests if each.error is None]
    silent = sum(not each.times for each in done)
    if silent:
        fix = "Run inference-perf with streaming."
        raise InputError(f"{silent} of {len(requests)} requests have no token times", where=source, fix=fix)
    doubled = _doubled(done)
    if doubled:
        notes.append(HALVED)
    times = [_token_times(each, doubled) if each.error is None else [] for each in requests]
    run = run_of(
        context,
        source,
        Columns(
            sent=[each.start_time for each in requests],
            first_token=[each[0] if each else None for each in times],
            finish=[each[-1] if each else None for each in times],
            prompt_tokens=[each.prompt_tokens for each in requests],
            output_tokens=[each.output_tokens for each in requests],
            status=["finished" if each.error is None else "failed" for each in requests],
            gaps=[b - a for each in times for a, b in pairwise(each)],
        ),
    )
    reported = {} if stage is None else stage.reported()
    return Reading(source, context, run, reported, tuple(notes), halved=doubled)


def _doubled(requests: Sequence[_Request]) -> bool:
    """Whether an old version wrote them, and every second gap is that between an event and the empty line
    after it."""
    times = [each.times for each in requests]
    if not times or any(each.old_times is None or len(each.times) % 2 for each in requests):
        return False
    lines = sum(b - a for each in times for a, b in zip(each[::2], each[1::2], strict=True))
    return lines < _NEAR_ZERO * sum(each[-1] - each[0] for each in times)


def _token_times(request: _Request, doubled: bool) -> list[float]:
    times = request.times[::2] if doubled else request.times
    return times[:-1] if request.old_times is not None and len(times) > 1 else times  # without the end marker


def _stages(path: Path) -> list[_Stage]:
    found: list[_Stage] = []
    while (file := path.with_name(f"stage_{len(found)}_lifecycle_metrics.json")).is_file():
        found.append(expect(_Stage, values_of(file)[0], source=str(file), form=FORM))
    return found


class _Config(Part):
    server: Mapping[str, Any]
    type: str | None = at("server.type")
    model_name: str | None = at("server.model_name")


def _beside(path: Path) -> _Beside:
    """From the config.yaml that the tool writes beside its reports."""
    file = path.with_name("config.yaml")
    if not file.is_file():
        return _Beside()
    try:
        server = expect(_Config, values_of(file)[0], source=str(file), form=FORM)
    except InputError:
        return _Beside(notes=("the config.yaml beside it is no inference-perf's: model not stated",))
    return _Beside(server.type, server.model_name)
