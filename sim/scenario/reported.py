"""Reported tables: what a benchmark published, and what each of its columns means."""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from servecast.sim.fleet.spec import RouterName
from servecast.sim.inputs.errors import InputError
from servecast.sim.inputs.schema import (
    Amount,
    Count,
    InputFile,
    Model,
    NonNegative,
    Positive,
    did_you_mean,
    invalid,
)
from servecast.sim.traffic.forms import WorkloadSpec, expand
from servecast.sim.traffic.spec import Row, Sweep, Workload

Metric = Literal[
    "ttft",
    "tpot",
    "itl",
    "e2el",
    "output_throughput",
    "request_throughput",
    "makespan",
    "success",
    "goodput",
    "kv_usage",
    "running",
    "waiting",
    "gpu_memory",
]
Statistic = Annotated[str, Field(pattern=r"^(mean|median|max|p[0-9]{1,2}(\.[0-9]+)?)$")]


GAUGES = ("kv_usage", "running", "waiting")


class Column(Model):
    """What a column holds: ``statistic`` is "p95", "mean", "max" ..., or nothing for rates and shares."""

    metric: Metric
    statistic: Statistic | None = None
    unit: Literal["s", "ms", "tok/s", "req/s", "share", "percent", "requests", "GiB"]

    @model_validator(mode="after")
    def _makes_sense(self) -> Column:
        if self.metric in ("ttft", "tpot", "itl", "e2el"):
            if self.statistic is None:
                raise invalid(f"{self.metric} without a statistic", "Add one, as p95.", at="statistic")
            if self.unit not in ("s", "ms"):
                raise invalid(f"{self.metric} in {self.unit}", "Its unit is s or ms.", at="unit")
        return self


class Ranking(Model):
    """Does the prediction rank the routers as the report does? Asked of each pair of them in the rows that
    differ in nothing else, by each of ``columns``, a latency or a throughput. Reported values within ``tie``
    of each other are no order. ``without`` names rows to leave out."""

    columns: tuple[str, ...] = Field(min_length=1)
    tie: NonNegative = 0.05
    without: tuple[Row, ...] = ()


class FitStep(Model):
    """One step of a fit: the ``parameters`` that these ``rows`` determine by these ``columns``, in at most
    ``max_evaluations`` steps of the search. ``difference``: over how much of a parameter (of the logarithm,
    in standard deviations of its prior) its effect is looked at, which must be above the grain of the
    simulation; None: 0.03 of the logarithm."""

    rows: tuple[Row, ...] = Field(min_length=1)
    parameters: tuple[str, ...] = Field(min_length=1)
    columns: tuple[str, ...] = Field(min_length=1)
    max_evaluations: Count = 25
    difference: Positive | None = None


class Variant(Model):
    """Rows that were measured with other settings: those with the keys of ``row``, under ``overrides``,
    fields of the scenario by their dotted paths (as {engine.max_num_seqs: 12}). A row belongs to the first
    variant that it matches. Keys that all variants name say nothing of the row's stage."""

    row: Row = Field(min_length=1)
    overrides: dict[str, bool | int | float | str] = Field(min_length=1)


class Part(Model):
    """Rows that are about a part of the requests: those with the keys of ``row`` are about ``requests``
    [first, end), counted from 0 in the order in which they were sent. Keys that parts name say nothing of a
    row's stage."""

    row: Row = Field(min_length=1)
    requests: tuple[Amount, Count]

    @model_validator(mode="after")
    def _some(self) -> Part:
        if self.requests[0] >= self.requests[1]:
            raise invalid("a part without requests", "Write it as [first, end).", at="requests")
        return self


class WhatIf(Model):
    """A table predicted once more, under ``overrides``."""

    name: str
    overrides: dict[str, bool | int | float | str] = Field(min_length=1)


class Excluded(Model):
    """Cells that a comparison leaves out, and why."""

    row: Row
    columns: tuple[str, ...] = Field(min_length=1)
    reason: str


class Reported(Model):
    """A reported table.

    Attributes:
        table: CSV with a header. An empty cell was not reported.
        keys: columns that say which stage of the workload a row is; none if the one row is the whole run.
        columns: the columns to compare. inputs: columns that are inputs here, such as requests a level.
        rows: which rows of the table are meant, by their keys; all without it.
        routers: router by the value of the first key, where the rows were measured behind several.
        summary: what the keys of rows say that sum up the other rows behind their router, as {qps: all}: a
            throughput as their mean, a rate of requests as the rate over all of them, and a latency as their
            mean weighted with requests.
        fit_rows: rows that a fit may use; all others are predictions. fit_steps: which of them determine
            which parameters, one step after the other; without it they determine all together.
        percentile_law: "linear" (NumPy), or "exclusive" (Python's statistics.quantiles).
        events_beyond_tokens: events a request that the client counts beside its output tokens; they enter
            its token throughput and the divisor of its TPOT.
        harness: what measured it: "vllm_bench", or "inference_perf" as of September 2025 (see
            ``inference_perf_report``). output_tokens_each: what a generated token counts there, since it
            encodes the outputs again.
        gauges: kv_usage, running and waiting are the largest that "scrapes" see, or a statistic over samples
            of every replica at the "arrivals" of requests.
        ranking: whether to compare the ranks of the routers.
        parts: which rows are about a part of the requests.
        variants: which rows were measured with other settings than the scenario's. what_ifs: further
            predictions of the same rows.
        workload, sweep: how this table was measured, where it was not by the scenario's own workload.
        known_misses: which cells are known to be missed, and what is known of why.
    """

    name: str = "sweep"
    table: InputFile
    source: str = ""
    keys: tuple[str, ...] = ()
    columns: dict[str, Column] = Field(min_length=1)
    inputs: tuple[str, ...] = ()
    rows: tuple[Row, ...] = ()
    routers: dict[str, RouterName] = Field(default_factory=dict)
    summary: Row | None = None
    fit_rows: tuple[Row, ...] = ()
    fit_steps: tuple[FitStep, ...] = ()
    excluded: tuple[Excluded, ...] = ()
    percentile_law: Literal["linear", "exclusive"] = "linear"
    events_beyond_tokens: Amount = 0
    harness: Literal["vllm_bench", "inference_perf"] = "vllm_bench"
    output_tokens_each: Positive = 1.0
    gauges: Literal["scrapes", "arrivals"] = "scrapes"
    ranking: Ranking | None = None
    workload: WorkloadSpec | None = None
    sweep: Sweep | None = None
    known_misses: tuple[str, ...] = ()
    parts: tuple[Part, ...] = ()
    variants: tuple[Variant, ...] = ()
    what_ifs: tuple[WhatIf, ...] = ()

    @model_validator(mode="after")
    def _columns_named(self) -> Reported:
        if self.sweep is not None and self.workload is None:
            raise invalid("a sweep without a workload", "Add the workload that it varies.", at="sweep")
        named = [(f"excluded.{index}", cells.columns) for index, cells in enumerate(self.excluded)]
        named += [(f"fit_steps.{index}", step.columns) for index, step in enumerate(self.fit_steps)]
        if self.ranking is not None:
            named.append(("ranking", self.ranking.columns))
        for where, columns in named:
            for column in columns:
                if column not in self.columns:
                    raise invalid(
                        f"there is no column {column!r}",
                        did_you_mean(column, self.columns) or f"Known: {', '.join(self.columns)}.",
                        at=f"{where}.columns",
                    )
        for number, step in enumerate(self.fit_steps):
            if not all(row in self.fit_rows for row in step.rows):
                raise invalid(
                    "a row that a fit may not use", "Add it to fit_rows.", at=f"fit_steps.{number}.rows"
                )
        if self.gauges == "arrivals":
            for name, what in self.columns.items():
                if what.metric in GAUGES and what.statistic is None:
                    raise invalid(
                        f"{name} without a statistic", "Add one, as p90.", at=f"columns.{name}.statistic"
                    )
        if (self.ranking is not None or self.summary is not None) and not self.routers:
            raise invalid(
                "nothing to rank or to sum up", "Add routers, by the value of the first key.", at="routers"
            )
        return self

    def stage_keys(self, keys: Row) -> Row:
        """What of a row's keys names its stage: all but the key of the routers, those of parts, and those of
        all variants."""
        other = set(self.keys[:1]) if self.routers else set()
        other.update(key for part in self.parts for key in part.row)
        if self.variants:
            other |= set.intersection(*(set(variant.row) for variant in self.variants))
        return {key: value for key, value in keys.items() if key not in other}

    def part(self, keys: Row) -> tuple[int, int] | None:
        """The requests, [first, end), that the row with these keys is about; None: all."""
        return next((part.requests for part in self.parts if matches(keys, part.row)), None)

    def own_workload(self) -> Workload | None:
        """The workload that the table was measured with, or None: the scenario's."""
        return None if self.workload is None else expand(self.workload, self.sweep)


@dataclass(frozen=True, slots=True)
class ReportedRow:
    """A row: its keys, its values by column (NaN where not reported), and what it may be used for.

    ``excluded`` gives the reason for each column that a comparison leaves out. ``router`` is what it was
    measured behind, None: the scenario's. ``summary``: it sums up the others behind its router.
    """

    keys: Row
    values: dict[str, float]
    inputs: dict[str, float]
    fit: bool
    excluded: dict[str, str]
    router: str | Path | None = None
    summary: bool = False

    @property
    def columns(self) -> list[str]:
        """The columns that were reported."""
        return [column for column, value in self.values.items() if not math.isnan(value)]


def read_rows(reported: Reported) -> list[ReportedRow]:
    """The table's rows.

    Raises:
        InputError: the file's columns are not those that the scenario names, a cell is no number, or a row
            to fit or to exclude is not in it.
    """
    expected = [*reported.keys, *reported.columns, *reported.inputs]
    with reported.table.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        header = list(reader.fieldnames or ())
        for column in expected:
            if column not in header:
                raise InputError(
                    f"there is no column {column!r}",
                    where=str(reported.table),
                    fix=did_you_mean(column, header) or f"Its columns are {', '.join(header)}.",
                )
        for column in header:
            if column not in expected:
                raise InputError(
                    f"nothing says what column {column!r} is",
                    where=str(reported.table),
                    fix="Add it to keys, columns or inputs of the reported table.",
                )
        lines = list(reader)
    rows = [_row(reported, line, f"{reported.table}, line {n}") for n, line in enumerate(lines, start=2)]
    for wanted in (*reported.fit_rows, *(cells.row for cells in reported.excluded)):
        if not any(matches(row.keys, wanted) for row in rows):
            raise InputError(
                f"no row with {_show(wanted)}", where=str(reported.table), fix="Name a row by its keys."
            )
    meant = [
        row for row in rows if not reported.rows or any(matches(row.keys, wanted) for wanted in reported.rows)
    ]
    for row in meant:
        if reported.routers and row.router is None:
            raise InputError(
                f"nothing says which router the row with {_show(row.keys)} is about",
                where="reported.routers",
                fix=f"Add the router of {row.keys[reported.keys[0]]!r}, or leave the row out with rows.",
            )
    return meant


def _row(reported: Reported, line: dict[str, str], where: str) -> ReportedRow:
    def number(column: str) -> float:
        text = line[column] or ""
        try:
            return float(text) if text.strip() else math.nan
        except ValueError:
            raise InputError(
                f"{column} is {text!r}, not a number", where=where, fix="Correct it, or leave it empty."
            ) from None

    keys: Row = {}
    for key in reported.keys:
        try:
            value = float(line[key])
            keys[key] = int(value) if value.is_integer() else value
        except ValueError:
            keys[key] = line[key]
    return ReportedRow(
        keys=keys,
        values={column: number(column) for column in reported.columns},
        inputs={column: number(column) for column in reported.inputs},
        fit=any(matches(keys, wanted) for wanted in reported.fit_rows),
        excluded={
            column: cells.reason
            for cells in reported.excluded
            if matches(keys, cells.row)
            for column in cells.columns
        },
        router=reported.routers.get(str(keys[reported.keys[0]])) if reported.routers else None,
        summary=reported.summary is not None and matches(keys, reported.summary),
    )


def stage_of(keys: Row, workload: Workload) -> int | None:
    """Index of the stage that a row with these keys reproduces; None for a table without keys (the run).

    Raises:
        InputError: no stage, or several.
    """
    if not keys:
        return None
    found = [i for i, stage in enumerate(workload.stages) if stage.row and matches(stage.row, keys)]
    if len(found) != 1:
        raise InputError(
            f"{len(found) or 'no'} stages reproduce the row with {_show(keys)}",
            where="reported",
            fix="Give each row of the table one level or stage, with the row's keys as its 'row'.",
        )
    return found[0]


def matches(row: Row, wanted: Row) -> bool:
    """Whether a row has these keys."""
    return all(row.get(key) == value for key, value in wanted.items())


def _show(row: Row) -> str:
    return ", ".join(f"{key} {value}" for key, value in row.items())
