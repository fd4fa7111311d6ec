"""aiperf's ``profile_export.jsonl``, a record a line, with the ``profile_export_aiperf.json`` beside it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field, model_validator

from servecast.sim.inputs.errors import InputError
from servecast.sim.inputs.schema import invalid
from servecast.sim.metrics.metrics import Floats
from servecast.validate.readers.document import values_of
from servecast.validate.readers.reading import (
    Context,
    Part,
    Rate,
    Reading,
    Slots,
    Statistics,
    broken,
    expect,
)
from servecast.validate.readers.run_of import Columns, run_of, run_without_requests

FORM = "aiperf"
SUMMARY = "profile_export_aiperf.json"


Stamp = Annotated[int, Field(ge=0, lt=1 << 63)]  # ns


class _Metadata(Part):
    request_start_ns: Stamp
    request_end_ns: Stamp
    credit_issued_ns: Stamp | None = None
    benchmark_phase: str = "profiling"
    was_cancelled: bool = False


class _Value(Part):
    value: float | list[float] | None = None


class _Record(Part):
    metadata: _Metadata
    metrics: Mapping[str, _Value]
    error: Any = None

    def number(self, name: str) -> float | None:
        found = self.metrics[name].value if name in self.metrics else None
        return found if isinstance(found, float) else None


class _Total(Part):
    avg: float


class _Phase(Part):
    kind: str | None = None
    name: str | None = None
    type: str | None = None
    rate: Rate | None = None
    concurrency: Slots | None = None


class _Model(Part):
    name: str | None = None


class _Models(Part):
    items: tuple[_Model, ...] = ()


class _Endpoint(Part):
    type: str | None = None


class _Input(Part):
    models: _Models = _Models()
    endpoint: _Endpoint = _Endpoint()
    phases: tuple[_Phase, ...] = ()


class _Summary(Part):
    """What no request has, as everything of a run of which all failed, is not there."""

    aiperf_version: str
    input_config: _Input = _Input()
    request_count: _Total = _Total(avg=0)
    benchmark_duration: _Total | None = None
    request_throughput: _Total | None = None
    output_token_throughput: _Total | None = None
    total_isl: _Total | None = None
    total_osl: _Total | None = None
    time_to_first_token: Statistics | None = None
    inter_token_latency: Statistics | None = None
    inter_chunk_latency: Statistics | None = None
    request_latency: Statistics | None = None

    @model_validator(mode="after")
    def _counted(self) -> _Summary:
        if (self.request_count.avg > 0) != (self.request_latency is not None):
            raise invalid("of request_count and request_latency only one is there", "Save it again.")
        return self

    @property
    def reported(self) -> dict[str, float]:
        """aiperf's inter-token latency is vLLM's TPOT, its inter-chunk latency vLLM's ITL."""
        totals = {
            "completed": self.request_count,
            "duration": self.benchmark_duration,
            "request_throughput": self.request_throughput,
            "output_throughput": self.output_token_throughput,
            "total_input_tokens": self.total_isl,
            "total_output_tokens": self.total_osl,
        }
        latencies = {
            "ttft": self.time_to_first_token,
            "tpot": self.inter_token_latency,
            "itl": self.inter_chunk_latency,
            "e2el": self.request_latency,
        }
        found = {key: total.avg for key, total in totals.items() if total is not None}
        for metric, statistics in latencies.items():
            if statistics is not None:
                found |= statistics.named(metric, to_ms=1.0)
        return found

    @property
    def context(self) -> Context:
        phase = next(
            (each for each in self.input_config.phases if each.kind in (None, "profiling")), _Phase()
        )
        model = self.input_config.models.items[:1]
        closed = phase.rate is None and phase.concurrency is not None
        return Context(
            tool=FORM,
            tool_version=self.aiperf_version,
            backend=self.input_config.endpoint.type,
            model=model[0].name if model else None,
            request_rate=math.inf if closed else phase.rate,
            max_concurrency=phase.concurrency,
            burstiness={"poisson": 1.0, "constant": math.inf}.get(phase.type or ""),
        )


class Aiperf:
    """aiperf's records, or its summary alone."""

    name = FORM

    def recognises(self, value: Any) -> bool:
        """By a record's start, or by the summary's version."""
        if not isinstance(value, dict):
            return False
        metadata = value.get("metadata")
        return "aiperf_version" in value or (isinstance(metadata, dict) and "request_start_ns" in metadata)

    def read(self, values: Sequence[Any], path: Path) -> list[Reading]:
        """One run."""
        if "aiperf_version" in values[0]:
            summary = expect(_Summary, values[0], source=str(path), form=FORM)
            run = run_without_requests(summary.context)
            notes = ("only totals: the requests are in profile_export.jsonl",)
            return [Reading(str(path), summary.context.load, summary.context, run, summary.reported, notes)]
        beside = path.with_name(SUMMARY)
        found = None
        if beside.is_file():
            found = expect(_Summary, values_of(beside)[0], source=str(beside), form=FORM)
        records = [
            expect(_Record, value, source=f"{path}, line {number}", form=FORM)
            for number, value in enumerate(values, start=1)
        ]
        return [_reading(records, found, path)]


def _reading(records: Sequence[_Record], summary: _Summary | None, path: Path) -> Reading:
    context = Context(tool=FORM) if summary is None else summary.context
    notes = ["aiperf's own throughput divides by a phase that begins before the first request is sent"]
    if summary is None:
        notes.append(f"no {SUMMARY} beside it: model, load and version are not stated")
    counted = [each for each in records if each.metadata.benchmark_phase == "profiling"]
    if len(counted) < len(records):
        notes.append(f"{len(records) - len(counted)} warm-up requests left out")
    status = ["aborted" if r.metadata.was_cancelled else "failed" if r.error else "finished" for r in counted]
    for number, (each, state) in enumerate(zip(counted, status, strict=True), start=1):
        needed = ("time_to_first_token", "request_latency", "output_sequence_length", "input_sequence_length")
        if state == "finished" and (missing := [name for name in needed if each.number(name) is None]):
            raise InputError(
                f"request {number} has no {missing[0]}",
                where=str(path),
                fix="Run aiperf with --streaming, and with --export-level records.",
            )
    finished = status.count("finished")
    if summary is not None and summary.request_count.avg != finished:
        raise broken(
            f"it says {summary.request_count.avg:g} requests, and {path.name} lists {finished} finished",
            FORM,
            where=f"{path.with_name(SUMMARY)}: request_count",
        )
    origin = min((each.metadata.request_start_ns for each in counted), default=0)

    def seconds(stamp: int | None) -> float:
        return math.nan if stamp is None else (stamp - origin) * 1e-9

    def column(name: str) -> Floats:
        return np.array([each.number(name) for each in counted], dtype=np.float64)

    sent = np.array([seconds(each.metadata.request_start_ns) for each in counted], dtype=np.float64)
    gaps = [
        gap / 1000
        for each, state in zip(counted, status, strict=True)
        if state == "finished" and "inter_chunk_latency" in each.metrics
        for gap in _list(each.metrics["inter_chunk_latency"].value)
    ]
    run = run_of(
        context,
        str(path),
        Columns(
            arrival=[seconds(each.metadata.credit_issued_ns) for each in counted],
            sent=sent,
            first_token=sent + column("time_to_first_token") / 1000,
            finish=sent + column("request_latency") / 1000,
            prompt_tokens=column("input_sequence_length"),
            output_tokens=column("output_sequence_length"),
            cached_tokens=column("usage_prompt_cache_read_tokens"),
            status=status,
            gaps=gaps,
            start=0.0,
        ),
    )
    reported = {} if summary is None else summary.reported
    open_loop = context.max_concurrency is None
    return Reading(str(path), context.load, context, run, reported, tuple(notes), planned=open_loop)


def _list(value: float | list[float] | None) -> list[float]:
    return value if isinstance(value, list) else []
