"""llm-d's Benchmark Report v0.2 (and 0.2.1, which adds media), whole or the part that a load generator
writes, and v0.1; JSON or YAML. It holds statistics alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator

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
    broken,
    expect,
    sampled,
)
from servecast.validate.readers.run_of import run_without_requests

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
_LOAD_0_1 = {  # what load generators called it in their arguments, which 0.1 repeats
    "rate_qps": ("request_rate", "request-rate", "qps", "qps_values", "rate"),
    "concurrency": ("max_concurrency", "max-concurrency", "concurrency"),
}
_RATES_0_1 = {
    "output_token_rate": ("output_tokens_per_sec", "tokens/s"),
    "total_token_rate": ("total_tokens_per_sec", "tokens/s"),
    "request_rate": ("requests_per_sec", "queries/s"),
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


class _Throughput(Part):
    output_token_rate: _Statistics | None = None
    total_token_rate: _Statistics | None = None
    request_rate: _Statistics | None = None


class _Aggregate(Part):
    requests: _Requests | None = None
    latency: _Latency | None = None
    throughput: _Throughput | None = None


class _Performance(Part):
    aggregate: _Aggregate


class _Resources(Part):
    kv_cache_usage: _Statistics | None = None
    cache_hit_rate: _Statistics | None = None
    running_requests: _Statistics | None = None
    waiting_requests: _Statistics | None = None
    preemptions: _Statistics | None = None


class _Component(Part):
    aggregate: _Resources | None = None


class _Observability(Part):
    components: list[_Component] | None = None


class _Results(Part):
    request_performance: _Performance
    observability: _Observability | None = None


class _LoadStandard(Part):
    tool: str | None = None
    tool_version: str | None = None
    rate_qps: Rate | None = None
    concurrency: Annotated[float, Field(ge=1, allow_inf_nan=True)] | None = None


class _Load(Part):
    standardized: _LoadStandard


class _Model(Part):
    name: str | None = None


class _StackStandard(Part):
    kind: str | None = None
    tool: str | None = None
    model: _Model | None = None


class _Stack(Part):
    standardized: _StackStandard


class _Scenario(Part):
    stack: list[_Stack] | None = None
    load: _Load | None = None


class _Time(Part):
    start: Any = None


class _Run(Part):
    time: _Time | None = None


class _Report(Part):
    version: str
    run: _Run
    scenario: _Scenario | None = None
    results: _Results


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
        whole = {**value, "version": version}
        report = expect(_Report, _of_0_1(whole) if old else whole, source=str(path), form=f"{FORM} {version}")
        context = _context(report)
        notes = ("only totals: this format has no single requests",)
        return Reading(
            str(path), context.load, context, run_without_requests(context), _reported(report, path), notes
        )


def _of_0_1(value: Mapping[str, Any]) -> dict[str, Any]:
    """A report of 0.1 with its parts where 0.2 has them; what is not of its shape stays, to be refused."""
    scenario, metrics = value["scenario"], value["metrics"]
    if not isinstance(scenario, dict) or not isinstance(metrics, dict):
        return {**value, "run": scenario, "results": metrics}
    model, load, platform = (scenario.get(name) for name in ("model", "load", "platform"))
    arguments = load.get("args") if isinstance(load, dict) else None
    said = {name: _first(arguments, keys) for name, keys in _LOAD_0_1.items()}
    engines = platform.get("engine") if isinstance(platform, dict) else None
    engine = engines[0] if isinstance(engines, list) and engines else {}
    standard = {
        "kind": "inference_engine",
        "tool": engine.get("name") if isinstance(engine, dict) else None,
        "model": model,
    }
    load_0_2 = {"tool": load.get("name") if isinstance(load, dict) else None, **said}
    rates, throughput = metrics.get("throughput"), {}
    if isinstance(rates, dict):
        throughput = {
            name: {"units": unit, "mean": rates[old]}
            for name, (old, unit) in _RATES_0_1.items()
            if rates.get(old) is not None
        }
    time = metrics.get("time")
    return {
        "version": value["version"],
        "run": {"time": time if isinstance(time, dict) else None},
        "scenario": {"stack": [{"standardized": standard}], "load": {"standardized": load_0_2}},
        "results": {
            "request_performance": {
                "aggregate": {
                    "requests": metrics.get("requests"),
                    "latency": metrics.get("latency"),
                    "throughput": throughput,
                }
            }
        },
    }


def _first(arguments: Any, keys: Sequence[str]) -> Any:
    """The first of these arguments that is a single number above 0."""
    for key in keys:
        value = arguments.get(key) if isinstance(arguments, dict) else None
        if isinstance(value, int | float) and not isinstance(value, bool) and value > 0:
            return value
    return None


def _context(report: _Report) -> Context:
    scenario = report.scenario or _Scenario()
    load = scenario.load.standardized if scenario.load else _LoadStandard()
    engines = [
        each.standardized for each in scenario.stack or () if each.standardized.kind == "inference_engine"
    ]
    engine = engines[0] if engines else _StackStandard()
    bounded = load.concurrency is not None and math.isfinite(load.concurrency)
    start = report.run.time.start if report.run.time else None
    return Context(
        tool=load.tool or FORM,
        tool_version=load.tool_version,
        backend=engine.tool,
        model=engine.model.name if engine.model else None,
        request_rate=math.inf if bounded and load.rate_qps is None else load.rate_qps,
        max_concurrency=int(load.concurrency) if bounded and load.concurrency is not None else None,
        date=None if start is None else str(start),
    )


def _reported(report: _Report, path: Path) -> dict[str, float]:
    aggregate = report.results.request_performance.aggregate
    for name in ("requests", "latency", "throughput"):
        if getattr(aggregate, name) is None:
            raise broken(f"there is no {name} among its aggregates", FORM, where=str(path))
    found: dict[str, float] = {}
    if (requests := aggregate.requests) is not None:
        completed = requests.total - (requests.failures or 0) - (requests.incomplete or 0)
        if completed < 0:
            raise broken(f"of {requests.total} requests more failed", FORM, where=str(path))
        found |= {"completed": float(completed), "failed": float(requests.total - completed)}
        for key, length in (
            ("total_input_tokens", requests.input_length),
            ("total_output_tokens", requests.output_length),
        ):
            if length is not None:
                found[key] = length.mean * length.scale * completed
    for name, (metric, _) in LATENCIES.items():
        statistics = getattr(aggregate.latency, name, None)
        if statistics is not None:
            found |= statistics.named(metric, to_ms=1000 * statistics.scale)
    rates = {
        "request_throughput": "request_rate",
        "output_throughput": "output_token_rate",
        "total_token_throughput": "total_token_rate",
    }
    for key, name in rates.items():
        if (statistics := getattr(aggregate.throughput, name, None)) is not None:
            found[key] = statistics.mean * statistics.scale
    return sampled(found) | _engines(report)


def _engines(report: _Report) -> dict[str, float]:
    """What the engines showed, where there is one: peaks of several do not add up."""
    observed = report.results.observability
    known = [each.aggregate for each in (observed.components or () if observed else ()) if each.aggregate]
    if len(known) != 1:
        return {}
    found: dict[str, float] = {}
    peaks = {
        "kv_cache_usage_peak": known[0].kv_cache_usage,
        "max_num_running": known[0].running_requests,
        "max_num_waiting": known[0].waiting_requests,
    }
    for key, statistics in peaks.items():
        if statistics is not None and statistics.max is not None:
            found[key] = statistics.max * statistics.scale
    means = {"prefix_cache_hit_rate": known[0].cache_hit_rate, "num_preemptions": known[0].preemptions}
    for key, statistics in means.items():
        if statistics is not None:
            found[key] = statistics.mean * statistics.scale
    return found
