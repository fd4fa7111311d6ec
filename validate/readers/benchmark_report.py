"""llm-d's Benchmark Report v0.2 (and 0.2.1, which adds media), whole or the part that a load generator
writes, and v0.1; JSON or YAML. It holds statistics alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, field_validator

from servecast.sim.inputs.errors import InputError
from servecast.sim.inputs.schema import invalid
from servecast.sim.run.benchmark_report import LATENCIES
from servecast.validate.readers.reading import (
    Context,
    Part,
    Rate,
    Reading,
    Requests,
    Statistics,
    at,
    broken,
    expect,
    sampled,
)
from servecast.validate.readers.run_of import totals

FORM = "llm-d Benchmark Report"
_SCALE = {  # to seconds, shares and counts
    "s": 1.0,
    "ms": 1e-3,
    "s/token": 1.0,
    "ms/token": 1e-3,
    "percent": 0.01,
    "fraction": 1.0,
    "count": 1.0,
    "tokens/s": 1.0,
    "queries/s": 1.0,
}
_OLD = {"version", "scenario", "metrics"}  # parts of a report of 0.1
_ASKED = "scenario.load.args"  # of a load generator, which 0.1 repeats
_RATES = {  # ours: the report's name, and which of its statistics
    "request_throughput": ("request_rate", "mean"),
    "output_throughput": ("output_token_rate", "mean"),
    "total_token_throughput": ("total_token_rate", "mean"),
}
_LENGTHS = {"total_input_tokens": ("input_length", "mean"), "total_output_tokens": ("output_length", "mean")}
_OF_ENGINE = {
    "kv_cache_usage_peak": ("kv_cache_usage", "max"),
    "max_num_running": ("running_requests", "max"),
    "max_num_waiting": ("waiting_requests", "max"),
    "prefix_cache_hit_rate": ("cache_hit_rate", "mean"),
    "num_preemptions": ("preemptions", "mean"),
}


class _Statistics(Statistics):
    units: str

    @field_validator("units")
    @classmethod
    def _known(cls, units: str) -> str:
        if units not in _SCALE:
            raise invalid(f"its unit {units!r} is not one of {', '.join(_SCALE)}", "Convert it.")
        return units

    @property
    def scale(self) -> float:
        """What turns its numbers into seconds, shares and counts."""
        return _SCALE[self.units]


class _Requests(Part):
    total: Requests
    failures: Requests | None = None
    incomplete: Requests | None = None
    input_length: _Statistics | None = None
    output_length: _Statistics | None = None


class _Latency(Part):
    time_to_first_token: _Statistics | None = None
    time_per_output_token: _Statistics | None = None
    inter_token_latency: _Statistics | None = None
    request_latency: _Statistics | None = None


def _mean_alone(value: Any) -> Any:
    """A rate of 0.1, which is a number, as the statistics that 0.2 has."""
    return {"units": "count", "mean": value} if isinstance(value, int | float) else value


_Mean = Annotated[_Statistics | None, BeforeValidator(_mean_alone)]


class _Throughput(Part):
    output_token_rate: _Mean = at("output_token_rate", "output_tokens_per_sec")
    total_token_rate: _Mean = at("total_token_rate", "total_tokens_per_sec")
    request_rate: _Mean = at("request_rate", "requests_per_sec")


class _Resources(Part):
    kv_cache_usage: _Statistics | None = None
    cache_hit_rate: _Statistics | None = None
    running_requests: _Statistics | None = None
    waiting_requests: _Statistics | None = None
    preemptions: _Statistics | None = None


class _Component(Part):
    aggregate: _Resources | None = None


class _Engine(Part):
    kind: str | None = at("standardized.kind")
    tool: str | None = at("standardized.tool")
    model: str | None = at("standardized.model.name")


def _one_number(value: Any) -> Any:
    """An argument that is a single number above 0; None for lists and the like."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) and value > 0 else None


_Slots = Annotated[float, Field(ge=1, allow_inf_nan=True)]


class _Report(Part):
    """What is read of a report, by where it lies in 0.2 and in 0.1."""

    requests: _Requests = at(
        "results.request_performance.aggregate.requests", "metrics.requests", default=...
    )
    latency: _Latency = at("results.request_performance.aggregate.latency", "metrics.latency", default=...)
    throughput: _Throughput = at(
        "results.request_performance.aggregate.throughput", "metrics.throughput", default=...
    )
    components: list[_Component] | None = at("results.observability.components")
    start: Any = at("run.time.start", "metrics.time.start")
    tool: str | None = at("scenario.load.standardized.tool", "scenario.load.name")
    tool_version: str | None = at("scenario.load.standardized.tool_version")
    rate_qps: Rate | None = at("scenario.load.standardized.rate_qps")
    concurrency: _Slots | None = at("scenario.load.standardized.concurrency")
    rate_asked: Annotated[Rate | None, BeforeValidator(_one_number)] = at(
        *(f"{_ASKED}.{name}" for name in ("request_rate", "request-rate", "qps", "qps_values", "rate"))
    )
    concurrency_asked: Annotated[_Slots | None, BeforeValidator(_one_number)] = at(
        *(f"{_ASKED}.{name}" for name in ("max_concurrency", "max-concurrency", "concurrency"))
    )
    stack: list[_Engine] | None = at("scenario.stack")
    engine: str | None = at("scenario.platform.engine.0.name")
    model: str | None = at("scenario.model.name")

    @property
    def context(self) -> Context:
        """The load, and what it was put on."""
        engines = [each for each in self.stack or () if each.kind == "inference_engine"]
        engine = engines[0] if engines else _Engine()
        rate, slots = self.rate_qps or self.rate_asked, self.concurrency or self.concurrency_asked
        bounded = slots is not None and math.isfinite(slots)
        return Context(
            tool=self.tool or FORM,
            tool_version=self.tool_version,
            backend=engine.tool or self.engine,
            model=engine.model or self.model,
            request_rate=math.inf if bounded and rate is None else rate,
            max_concurrency=int(slots) if bounded and slots is not None else None,
            date=None if self.start is None else str(self.start),
        )


class BenchmarkReport:
    """A report: one run."""

    name = FORM

    def recognises(self, value: Any) -> bool:
        """By its three parts, which in 0.1 were two others."""
        return isinstance(value, dict) and (
            {"version", "run", "results"} <= value.keys() or value.keys() >= _OLD
        )

    def read(self, values: Sequence[Any], path: Path) -> list[Reading]:
        """A run a report."""
        return [self._one(value, path) for value in values]

    def _one(self, value: dict[str, Any], path: Path) -> Reading:
        version = str(value["version"])
        old = version == "0.1" and value.keys() >= _OLD
        if not old and version != "0.2" and not version.startswith("0.2."):
            raise InputError(
                f"version {version!r} of the {FORM}, this servecast reads 0.1 and 0.2",
                where=f"{path}: version",
                fix="Convert it with llm-d-benchmark's tools.",
            )
        report = expect(_Report, value, source=str(path), form=f"{FORM} {version}")
        note = "only totals: this format has no single requests"
        return totals(str(path), report.context, _reported(report, path), note)


def _reported(report: _Report, path: Path) -> dict[str, float]:
    requests = report.requests
    completed = requests.total - (requests.failures or 0) - (requests.incomplete or 0)
    if completed < 0:
        raise broken(f"of {requests.total} requests more failed", FORM, where=str(path))
    found = {"completed": float(completed), "failed": float(requests.total - completed)}
    found |= {key: mean * completed for key, mean in _picked(requests, _LENGTHS).items()}
    for name, (metric, _) in LATENCIES.items():
        statistics = getattr(report.latency, name)
        if statistics is not None:
            found |= statistics.named(metric, to_ms=1000 * statistics.scale)
    observed = [each.aggregate for each in report.components or () if each.aggregate]
    engine = _picked(observed[0], _OF_ENGINE) if len(observed) == 1 else {}  # peaks of several do not add up
    return sampled(found | _picked(report.throughput, _RATES)) | engine


def _picked(part: Part, table: Mapping[str, tuple[str, str]]) -> dict[str, float]:
    """Ours -> what a statistic of a part says, in SI, where it is there."""
    found = {}
    for key, (name, statistic) in table.items():
        said: _Statistics | None = getattr(part, name)
        if said is not None and (value := getattr(said, statistic)) is not None:
            found[key] = value * said.scale
    return found
