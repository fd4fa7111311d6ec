"""aiperf's ``profile_export.jsonl``, a record a line, with the ``profile_export_aiperf.json`` beside it, the
tables of its sweeps, and the summary of genai-perf, from which it came."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field, model_validator

from servecast.sim.inputs.errors import InputError
from servecast.sim.inputs.schema import invalid
from servecast.sim.metrics.metrics import Floats
from servecast.validate.readers.aiperf_load import FORM, GENAI_PERF, load_of
from servecast.validate.readers.document import values_of
from servecast.validate.readers.reading import Context, Part, Reading, Statistics, at, broken, expect
from servecast.validate.readers.run_of import Columns, run_of, totals

SUMMARY = "profile_export_aiperf.json"
_SUMMED = ("request_throughput", "request_latency", "request_count", "error_request_count")
_SWEEP = ("aggregation_type", "per_combination_metrics")


Stamp = Annotated[int, Field(ge=0, lt=1 << 63)]  # ns


class _Record(Part):
    """A request; what was not measured of it is None."""

    request_start_ns: Stamp = at("metadata.request_start_ns", default=...)
    credit_issued_ns: Stamp | None = at("metadata.credit_issued_ns")
    benchmark_phase: str = at("metadata.benchmark_phase", default="profiling")
    was_cancelled: bool = at("metadata.was_cancelled", default=False)
    metrics: Mapping[str, Any]
    error: Any = None
    time_to_first_token: float | None = at("metrics.time_to_first_token.value")
    request_latency: float | None = at("metrics.request_latency.value")
    output_sequence_length: float | None = at("metrics.output_sequence_length.value")
    input_sequence_length: float | None = at("metrics.input_sequence_length.value")
    usage_prompt_cache_read_tokens: float | None = at("metrics.usage_prompt_cache_read_tokens.value")
    inter_chunk_latency: list[float] | None = at("metrics.inter_chunk_latency.value")

    @property
    def status(self) -> str:
        """As in ``Columns``."""
        return "aborted" if self.was_cancelled else "failed" if self.error else "finished"


_TOTALS = {  # vLLM's key: the field of a summary
    "failed": "error_request_count",
    "duration": "benchmark_duration",
    "request_throughput": "request_throughput",
    "output_throughput": "output_token_throughput",
    "total_input_tokens": "total_isl",
    "total_output_tokens": "total_osl",
}
_LATENCIES = {  # aiperf's inter-token latency is vLLM's TPOT, its inter-chunk latency vLLM's ITL
    "ttft": "time_to_first_token",
    "tpot": "inter_token_latency",
    "itl": "inter_chunk_latency",
    "e2el": "request_latency",
}


class _Summary(Part):
    """What no request has, as everything of a run of which all failed, is not there."""

    aiperf_version: str | None = None
    input_config: Any = None
    request_count: float | None = at("request_count.avg")
    error_request_count: float | None = at("error_request_count.avg")
    benchmark_duration: float | None = at("benchmark_duration.avg")
    request_throughput: float | None = at("request_throughput.avg")
    output_token_throughput: float | None = at("output_token_throughput.avg")
    total_isl: float | None = at("total_isl.avg")
    total_osl: float | None = at("total_osl.avg")
    input_sequence_length: float | None = at("input_sequence_length.avg")
    output_sequence_length: float | None = at("output_sequence_length.avg")
    time_to_first_token: Statistics | None = None
    inter_token_latency: Statistics | None = None
    inter_chunk_latency: Statistics | None = None
    request_latency: Statistics | None = None

    @model_validator(mode="after")
    def _counted(self) -> _Summary:
        if self.request_count is None:  # genai-perf before 0.0.14 does not say
            return self
        if (self.request_count > 0) != (self.request_latency is not None):
            raise invalid("of request_count and request_latency only one is there", "Save it again.")
        return self

    @property
    def completed(self) -> float | None:
        """Requests that finished, None where it does not say."""
        if self.request_count is not None:
            return self.request_count
        return 0.0 if self.request_latency is None else None

    @property
    def reported(self) -> dict[str, float]:
        """Under vLLM's keys."""
        found = {key: getattr(self, name) for key, name in _TOTALS.items()}
        found["completed"] = done = self.completed
        for key, mean in (
            ("total_input_tokens", self.input_sequence_length),
            ("total_output_tokens", self.output_sequence_length),
        ):
            if found[key] is None and mean is not None and done is not None:
                found[key] = mean * done
        for metric, name in _LATENCIES.items():
            statistics: Statistics | None = getattr(self, name)
            found |= {} if statistics is None else statistics.named(metric, to_ms=1.0)
        return {key: value for key, value in found.items() if value is not None}


class Aiperf:
    """aiperf's records, its summary alone, that of genai-perf before it, and the tables of their sweeps."""

    name = FORM

    def recognises(self, value: Any) -> bool:
        """By a record's start, by the metrics of a summary, or by the combinations of a sweep."""
        if not isinstance(value, dict):
            return False
        metadata = value.get("metadata")
        record = isinstance(metadata, dict) and "request_start_ns" in metadata
        summary = "input_config" in value and any(name in value for name in (*_SUMMED, "records"))
        return record or summary or "aiperf_version" in value or {*_SWEEP} <= value.keys() or _raw(value)

    def read(self, values: Sequence[Any], path: Path) -> list[Reading]:
        """One run, or one a combination of a sweep."""
        value = values[0]
        if _raw(value):
            raise InputError(
                "this is genai-perf's raw profile, which has no token counts",
                where=str(path),
                fix="Give the profile_export_genai_perf.json that stands beside it.",
            )
        if "per_combination_metrics" in value:
            return _sweep(value, path)
        if "metrics" in value and "aiperf_version" in value:
            aggregate = {"parameters": {}, "metrics": value["metrics"]}
            return [_combination(aggregate, str(path), value["aiperf_version"])]
        if "metadata" not in value or "request_start_ns" not in value["metadata"]:
            records = value.get("records")
            flat = {**records, **value} if isinstance(records, dict) else value
            return [_totals(expect(_Summary, flat, source=str(path), form=FORM), str(path))]
        beside = path.with_name(SUMMARY)
        found = None
        if beside.is_file():
            found = expect(_Summary, values_of(beside)[0], source=str(beside), form=FORM)
        records = [
            expect(_Record, value, source=f"{path}, line {number}", form=FORM)
            for number, value in enumerate(values, start=1)
        ]
        return [_reading(records, found, path)]


def _raw(value: Mapping[str, Any]) -> bool:
    """Whether it is genai-perf's profile_export.json."""
    return isinstance(value.get("experiments"), list) and "service_kind" in value


def _totals(summary: _Summary, source: str) -> Reading:
    context = load_of(summary.input_config, summary.aiperf_version, source)
    raw = "profile_export.jsonl" if context.tool == FORM else "a profile_export.json without token counts"
    notes = [f"only totals: the requests are in {raw}"]
    if context.tool == GENAI_PERF:
        notes.append("genai-perf's inter-token latency is a mean of each request, as vLLM's TPOT")
    return totals(source, context, summary.reported, *notes)


def _sweep(value: Mapping[str, Any], path: Path) -> list[Reading]:
    combinations = value["per_combination_metrics"]
    if not isinstance(combinations, list) or not combinations:
        raise broken("there is none of the combinations of its sweep", FORM, where=str(path))
    return [
        _combination(each, f"{path}: per_combination_metrics.{number}", None)
        for number, each in enumerate(combinations)
    ]


class _Over(Part):
    """A statistic over repeated runs."""

    mean: float | None = None


class _Combination(Part):
    parameters: Mapping[str, Any] = {}
    metrics: Mapping[str, _Over | Any] = {}


def _combination(value: Any, source: str, version: Any) -> Reading:
    """One combination of a sweep, of means over its runs: ``time_to_first_token_p99`` and the like."""
    combination = expect(_Combination, value, source=source, form=FORM)
    nested: dict[str, dict[str, float]] = {}
    for key, over in combination.metrics.items():
        name, _, statistic = key.rpartition("_")
        if isinstance(over, _Over) and over.mean is not None and name in _Summary.model_fields:
            nested.setdefault(name, {})[statistic] = over.mean
    complete = {name: each for name, each in nested.items() if "avg" in each}
    summary = expect(_Summary, complete, source=source, form=FORM)
    context = load_of({"loadgen": {**combination.parameters}}, version, source)
    note = "means over the runs of a combination: the requests are in each run's profile_export.jsonl"
    return totals(source, context, summary.reported, note)


def _reading(records: Sequence[_Record], summary: _Summary | None, path: Path) -> Reading:
    context = Context(tool=FORM)
    if summary is not None:
        context = load_of(summary.input_config, summary.aiperf_version or "not stated", str(path))
    notes = ["aiperf's own throughput divides by a phase that begins before the first request is sent"]
    if summary is None:
        notes.append(f"no {SUMMARY} beside it: model, load and version are not stated")
    counted = [each for each in records if each.benchmark_phase == "profiling"]
    if len(counted) < len(records):
        notes.append(f"{len(records) - len(counted)} warm-up requests left out")
    needed = ("time_to_first_token", "request_latency", "output_sequence_length", "input_sequence_length")
    for number, each in enumerate(counted, start=1):
        missing = [name for name in needed if getattr(each, name) is None]
        if each.status == "finished" and missing:
            fix = "Run aiperf with --streaming, and with --export-level records."
            raise InputError(f"request {number} has no {missing[0]}", where=str(path), fix=fix)
    finished = [each for each in counted if each.status == "finished"]
    if summary is not None and summary.completed != len(finished):
        raise broken(
            f"it says {summary.completed or 0:g} requests, and {path.name} lists {len(finished)} finished",
            FORM,
            where=f"{path.with_name(SUMMARY)}: request_count",
        )
    origin = min((each.request_start_ns for each in counted), default=0)

    def column(name: str, scale: float = 1.0, zero: int = 0) -> Floats:
        found = [None if (value := getattr(each, name)) is None else value - zero for each in counted]
        return np.array(found, dtype=np.float64) * scale

    sent = column("request_start_ns", 1e-9, origin)
    run = run_of(
        context,
        str(path),
        Columns(
            arrival=column("credit_issued_ns", 1e-9, origin),
            sent=sent,
            first_token=sent + column("time_to_first_token", 1e-3),
            finish=sent + column("request_latency", 1e-3),
            prompt_tokens=column("input_sequence_length"),
            output_tokens=column("output_sequence_length"),
            cached_tokens=column("usage_prompt_cache_read_tokens"),
            status=[each.status for each in counted],
            gaps=[gap / 1000 for each in finished for gap in each.inter_chunk_latency or ()],
            start=0.0,
        ),
    )
    reported = {} if summary is None else summary.reported
    return Reading(str(path), context, run, reported, tuple(notes), planned=context.max_concurrency is None)
