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
from typing import Any

from servecast.sim.inputs.errors import InputError
from servecast.validate.readers.document import values_of
from servecast.validate.readers.inference_perf_stage import NEAR_ZERO, Load, Stage
from servecast.validate.readers.reading import Context, Part, Reading, at, expect
from servecast.validate.readers.run_of import Columns, run_of, totals

FORM = "inference-perf"
HALVED = (
    "inference-perf before 0.3 times the empty line after each event, which halves ITL and TPOT: put right"
)


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
                _totals(expect(Stage, value, source=str(path), form=FORM), beside, path) for value in values
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


def _context(stage: Stage | None, beside: _Beside) -> Context:
    load = Load(count=0) if stage is None else stage.load_summary
    return Context(
        tool=FORM,
        request_rate=math.inf if load.concurrency is not None else load.requested_rate or None,
        max_concurrency=load.concurrency,
        backend=beside.backend,
        model=beside.model,
    )


def _totals(stage: Stage, beside: _Beside, path: Path) -> Reading:
    notes = ["only totals: the requests are in per_request_lifecycle_metrics.json", _DRAIN, *beside.notes]
    if stage.halved:
        notes.append(HALVED + " (of the ITL's percentiles at most p50 and p90 can be told)")
    return totals(str(path), _context(stage, beside), stage.reported(), *notes, halved=stage.halved)


_DRAIN = (
    "its throughput counts the time until the last request is done; its E2E ends after the tokens are counted"
)


def _run(requests: Sequence[_Request], stage: Stage | None, beside: _Beside, source: str) -> Reading:
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
        raise InputError(
            f"{silent} of {len(requests)} requests have no token times",
            where=source,
            fix="Run inference-perf with streaming.",
        )
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
    return lines < NEAR_ZERO * sum(each[-1] - each[0] for each in times)


def _token_times(request: _Request, doubled: bool) -> list[float]:
    times = request.times[::2] if doubled else request.times
    return times[:-1] if request.old_times is not None and len(times) > 1 else times  # without the end marker


def _stages(path: Path) -> list[Stage]:
    found: list[Stage] = []
    while (file := path.with_name(f"stage_{len(found)}_lifecycle_metrics.json")).is_file():
        found.append(expect(Stage, values_of(file)[0], source=str(file), form=FORM))
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
