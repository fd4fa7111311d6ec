"""A scenario's reported tables as a report: load, lengths and repetition of prompts from its workload."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from servecast.sim.engine.request import Request, Stage
from servecast.sim.inputs.errors import InputError
from servecast.sim.reproduce.variants import variants_of
from servecast.sim.scenario.deployment import Deployment
from servecast.sim.scenario.reported import Reported, ReportedRow, read_rows, stage_of
from servecast.sim.scenario.scenario import Scenario
from servecast.sim.traffic.arrivals import ClosedLoop
from servecast.sim.traffic.draw import draw
from servecast.sim.traffic.spec import Row, StageSpec
from servecast.validate.check.columns import read_name
from servecast.validate.check.from_table import decimals_of
from servecast.validate.check.table import Hardware, Lengths, Level, Report, Span, Value

_SCALE = {"s": 1.0, "ms": 1e-3, "percent": 0.01, "GiB": float(1 << 30)}


def from_scenario(scenario: Scenario) -> Report:
    """The scenario's reported tables; lengths, load and repetition of prompts from its workload.

    Raises:
        InputError: nothing was reported, or a table does not fit the scenario.
    """
    if not scenario.reported:
        raise InputError(
            "nothing was reported of this scenario",
            where=f"{scenario.source}: reported",
            fix="Add a reported table, or give a table or a result file.",
        )
    levels: list[Level] = []
    seen: list[tuple[Path, Row]] = []
    for reported in scenario.reported:
        alone = [scenario.model_copy(update={"reported": (reported,)})]
        if reported.variants or reported.sets:
            alone = [variant for _, variant in variants_of(scenario, reported)]
        found = [level for part in alone for level in _table_levels(part)]
        for row in read_rows(reported):
            if (reported.table, row.keys) not in seen:  # two tables may be of the same rows
                seen.append((reported.table, row.keys))
                levels += [level for level in found if level.keys == row.keys]
    return Report(scenario.source, tuple(levels), scenario=scenario)


def _table_levels(scenario: Scenario) -> Iterable[Level]:
    """The rows of the only reported table of a scenario, all measured with its settings."""
    (reported,) = scenario.reported
    workload = scenario.workload_of(reported)
    drawn = [
        _Drawn.of(spec, stage)
        for spec, stage in zip(workload.stages, draw(workload, scenario.seed), strict=True)
    ]
    hardware: Hardware | None = None
    repeated: list[float | None] = [None] * len(drawn)
    if isinstance(scenario.fleet.replicas, int):  # bounds are those of one kind of replica
        deployment, replicas = Deployment.of(scenario), scenario.fleet.replicas
        hardware = Hardware(
            deployment.shard,
            replicas,
            deployment.memory.kv_tokens,
            deployment.memory.memory_used_bytes,
            scenario.engine.enable_prefix_caching,
        )
        repeated = _repeated(drawn, deployment.memory.kv_tokens * replicas)
    decimals = decimals_of(reported.table)
    for row in read_rows(reported):
        stage = None if row.summary else stage_of(reported.stage_keys(row.keys), workload)
        level = _reported_level(reported, row, decimals, drawn, stage, repeated)
        yield replace(level, hardware=hardware)


@dataclass(frozen=True, slots=True)
class _Drawn:
    """The foreground requests of a stage."""

    requests: list[Request]
    concurrency: int | None
    request_rate: float | None

    @classmethod
    def of(cls, spec: StageSpec, stage: Stage) -> _Drawn:
        requests = [r for stream in stage.streams if not stream.background for r in stream.requests]
        streams = [stream for stream in spec.streams if not stream.background]
        concurrency = rate = None
        if len(streams) == 1:
            law = streams[0].arrivals
            concurrency = law.concurrency if isinstance(law, ClosedLoop) else streams[0].max_concurrency
            rate = getattr(law, "request_rate", None)
        return cls(requests, concurrency, rate if rate is not None and math.isfinite(rate) else None)


def _repeated(stages: Sequence[_Drawn], capacity: int) -> list[float | None]:
    """By stage, the share of requests whose whole prompt (all but its last tokens, which are never taken from
    the cache) an earlier request had; None from where all prompts together no longer fit the KV pool."""
    seen: dict[int, int] = {}  # content id -> tokens of the longest prompt that had it
    shares: list[float | None] = []
    distinct = 0
    for stage in stages:
        hits = 0
        for request in stage.requests:
            known = 0
            for part, end in request.content:
                if part not in seen:
                    break
                known = min(end, seen[part])
            hits += known >= request.prompt_tokens
            distinct += request.prompt_tokens - known
            for part, end in request.content:
                seen[part] = max(end, seen.get(part, 0))
        shares.append(hits / max(1, len(stage.requests)) if distinct <= capacity else None)
    return shares


def _reported_level(
    reported: Reported,
    row: ReportedRow,
    decimals: Mapping[str, int],
    drawn: Sequence[_Drawn],
    stage: int | None,
    repeated: Sequence[float | None],
) -> Level:
    parts = drawn if stage is None else [drawn[stage]]
    requests = [request for part in parts for request in part.requests]
    values: dict[tuple[str, str | None], Value] = {}
    for column, number in row.values.items():
        if math.isnan(number):
            continue
        what = reported.columns[column]
        scale = _SCALE.get(what.unit, 1.0)
        statistic = "p50" if what.statistic == "median" else what.statistic
        half = 0.5 * 10.0 ** -decimals[column] * scale
        values[what.metric, statistic] = Value(column, what.metric, statistic, number * scale, half)
    summed_up = stage is None
    own = {key: value for key, value in row.keys.items() if isinstance(value, str)}
    return Level(
        table=reported.name,
        keys=row.keys,
        series=tuple(str(value) for value in own.values()),
        values=values,
        concurrency=max((p.concurrency for p in parts if p.concurrency is not None), default=None),
        request_rate=None if summed_up else parts[0].request_rate,
        num_requests=len(requests),
        failed=row.inputs.get("errors"),
        output=_output(reported, row, requests, decimals),
        prompt=_lengths([float(request.prompt_tokens) for request in requests]),
        repeated=None if stage is None else repeated[stage],
        law=reported.percentile_law,
        whole_run=summed_up,
    )


def _output(
    reported: Reported, row: ReportedRow, requests: Sequence[Request], decimals: Mapping[str, int]
) -> Lengths:
    """Tokens as the client counts them: as the report states their mean, else as the workload draws them."""
    each, extra = reported.output_tokens_each, reported.events_beyond_tokens
    drawn = _lengths([request.output_tokens * each + extra for request in requests])
    for column, number in row.inputs.items():
        if read_name(column).name == "output_tokens" and not math.isnan(number):
            half = 0.5 * 10.0 ** -decimals[column]
            return Lengths(Span(number - half, number + half), drawn.fixed)
    return drawn


def _lengths(drawn: Sequence[float]) -> Lengths:
    """Lengths of which these are a sample: their mean within three standard errors."""
    mean, spread = float(np.mean(drawn)), 3 * float(np.std(drawn)) / math.sqrt(len(drawn))
    return Lengths(Span(mean - spread, mean + spread), spread == 0)
