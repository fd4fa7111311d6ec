"""Result files as a report: ours, and those of the load generators that `readers` knows."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from servecast.sim.inputs.errors import InputError
from servecast.sim.inputs.schema import Amount, Count, NonNegative
from servecast.sim.metrics.metrics import Floats, summary
from servecast.sim.run.results import read_result
from servecast.sim.traffic.spec import Row
from servecast.validate.check.columns import read_statistic
from servecast.validate.check.from_table import Context
from servecast.validate.check.table import LATENCIES, Lengths, Level, Report, Value, exactly
from servecast.validate.readers import Reading, read_all
from servecast.validate.readers.guidellm import FORM as GUIDELLM
from servecast.validate.readers.reading import Part, broken, expect

_VLLM, _OURS = "vllm bench serve", "servecast simulate"  # tools with our definitions
_STAGE_LOAD = r"\b(concurrency|request_rate)=(\d+(?:\.\d+)?)(?=\s|$)"


class _Stage(Part):
    """What places a stage of our own result; its figures are read by their keys."""

    stage: str
    request_rate: NonNegative | Literal["inf"] | None = None
    max_concurrency: Count | None = None
    completed: Amount
    failed: Amount = 0
    duration: NonNegative | None = None
    total_input_tokens: Amount = 0
    total_output_tokens: Amount = 0


def from_results(paths: Sequence[Path], context: Context) -> Report:
    """Results of ``servecast simulate`` (a level a stage) or of a load generator that `readers` knows.

    Raises:
        InputError: a file is no such result.
    """
    levels: list[Level] = []
    notes: list[str] = []
    for path in paths:
        stages = _stages(path)
        levels += [_stage_level(path, number, stage, context) for number, stage in enumerate(stages)]
        for reading in read_all(path) if not stages else ():
            levels.append(_level_of(reading, context))
            notes += [f"{reading.source}: {note}" for note in reading.notes]
    hardware = context.hardware()
    return Report(
        ", ".join(map(str, paths)),
        tuple(replace(level, hardware=hardware) for level in levels),
        notes=tuple(dict.fromkeys(notes)),
    )


def _stages(path: Path) -> list[dict[str, Any]]:
    """The stages of a result of ours that has several."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []  # for a reader to tell
    if not (isinstance(document, dict) and "servecast_version" in document):
        return []
    stages = read_result(path).get("stages") or []
    if not (isinstance(stages, list) and all(isinstance(each, dict) for each in stages)):
        raise broken("its stages are no list of objects", _OURS, where=f"{path}: stages")
    return stages


def _stage_level(path: Path, number: int, figures: Mapping[str, Any], context: Context) -> Level:
    source = f"{path}: stages.{number}"
    stage = expect(_Stage, figures, source=source, form=_OURS)
    named = {key: float(load) for key, load in re.findall(_STAGE_LOAD, stage.stage)}
    rate = None if stage.request_rate == "inf" else stage.request_rate
    level = _level({"stage": stage.stage}, {**figures, **stage.model_dump()}, context, source)
    return replace(
        level,
        concurrency=int(named.get("concurrency", stage.max_concurrency or 0)) or None,
        request_rate=named.get("request_rate", rate) or None,
        duration_s=stage.duration,
    )


def _level_of(reading: Reading, context: Context) -> Level:
    """A level of a load generator's run: its own figures where they have our definitions, else those that
    come out of its requests."""
    ours = reading.context.tool in (_VLLM, _OURS)
    figures = reading.reported if ours or not reading.has_requests else reading.figures()
    rate = reading.context.request_rate
    level = replace(
        _level({"run": reading.source}, figures, context, reading.source),
        concurrency=reading.context.max_concurrency,
        request_rate=rate if rate is not None and 0 < rate < math.inf else None,
        duration_s=figures.get("duration") if ours else None,
        halved=reading.halved,
    )
    done = reading.run.requests[reading.run.requests["status"] == "finished"]
    if not len(done):
        return level
    return replace(
        level,
        output=_lengths(done["output_tokens"].to_numpy(dtype=float)),
        prompt=_lengths(done["prompt_tokens"].to_numpy(dtype=float)),
        records=_records(reading),
    )


def _lengths(tokens: Floats) -> Lengths:
    return Lengths(exactly(float(tokens.mean())), bool(tokens.min() == tokens.max()))


def _level(keys: Row, figures: Mapping[str, Any], context: Context, source: str) -> Level:
    """A level from figures under the keys of vllm bench serve, its load left open."""
    completed = figures.get("completed")
    lengths = context.lengths()
    if completed:
        for name, total in (
            ("output_tokens", "total_output_tokens"),
            ("prompt_tokens", "total_input_tokens"),
        ):
            if figures.get(total):
                lengths[name] = Lengths(exactly(figures[total] / completed), False)
    for key, _, number in _figures(figures):
        if number < 0:
            raise InputError(
                f"{key} is {number:g}, which cannot be", where=source, fix="Save the result again."
            )
    return Level(
        table="result",
        keys=keys,
        series=(),
        values={place: _value(key, place, number) for key, place, number in _figures(figures)},
        num_requests=int(completed) if completed else None,
        failed=figures.get("failed"),
        output=lengths["output_tokens"],
        prompt=lengths["prompt_tokens"],
        law=context.percentile_law,
    )


def _value(key: str, place: tuple[str, str | None], number: float) -> Value:
    return Value(key, *place, number, abs(number) * 1e-9)


def _records(reading: Reading) -> tuple[tuple[Value, float], ...]:
    """Reported figures, and what comes out of the requests, where both mean the same."""
    reported = {place: (key, number) for key, place, number in _figures(reading.reported)}
    ranks = {float(name[1:]) for _, name in reported if name is not None and name.startswith("p")}
    again = summary(reading.run, ranks=sorted(ranks))
    pairs = [
        (Value(key, key, None, reading.reported[key]), float(again[key]))
        for key in ("total_input_tokens", "total_output_tokens")
        if key in reading.reported
    ]
    tool = reading.context.tool
    for place, number in {place: number for _, place, number in _figures(again)}.items():
        metric, statistic = place
        if place not in reported or statistic == "std":
            continue
        if metric not in LATENCIES and (metric != "output_throughput" or tool not in (_VLLM, _OURS)):
            continue  # others take rates over another time
        if tool == GUIDELLM and statistic != "mean":
            continue  # not interpolated
        if reading.halved and metric in ("itl", "tpot"):
            continue  # put right by an estimate
        pairs.append((_value(reported[place][0], place, reported[place][1]), number))
    return tuple(pairs)


def _figures(figures: Mapping[str, Any]) -> Iterable[tuple[str, tuple[str, str | None], float]]:
    """Key, (metric, statistic) and value in SI of what a result gives."""
    others = {
        "request_throughput": ("request_throughput", None),
        "output_throughput": ("output_throughput", None),
        "kv_cache_usage_peak": ("kv_usage", "max"),
        "max_num_running": ("running", "max"),
        "max_num_waiting": ("waiting", "max"),
    }
    for key, number in figures.items():
        if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
            continue
        word, _, rest = key.partition("_")
        metric, statistic = rest.removesuffix("_ms"), read_statistic(word)
        if key in others:
            yield key, others[key], float(number)
        elif rest.endswith("_ms") and metric in LATENCIES and statistic is not None:
            yield key, (metric, statistic), number * 1e-3
