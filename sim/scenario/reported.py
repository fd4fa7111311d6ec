"""Reported tables: what a benchmark published, and what each of its columns means."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

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
    """What a column holds."""

    metric: Metric
    """What was measured."""
    statistic: Statistic | None = None
    """Which statistic of it, such as ``p95`` or ``mean``. None for rates and shares."""
    unit: Literal["s", "ms", "tok/s", "req/s", "share", "percent", "requests", "GiB"]
    """Unit of the column."""

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
    differ in nothing else, by each of ``columns``."""

    columns: tuple[str, ...] = Field(min_length=1)
    """The columns to rank by, latencies or throughputs."""
    tie: NonNegative = 0.05
    """Reported values this close, relatively, have no order."""
    without: tuple[Row, ...] = ()
    """Rows to leave out."""


class FitStep(Model):
    """One step of a fit: what some rows determine."""

    rows: tuple[Row, ...] = Field(min_length=1)
    """The rows that are looked at."""
    parameters: tuple[str, ...] = Field(min_length=1)
    """What they determine, as ``efficiencies.compute``."""
    columns: tuple[str, ...] = Field(min_length=1)
    """The columns that are looked at."""
    max_evaluations: Count = 25
    """Most steps of the search."""
    difference: Positive | None = None
    """Over how much of a parameter's logarithm its effect is looked at, in standard deviations of its prior;
    it must be above the grain of the simulation. Default, 0.03 of the logarithm."""


class Variant(Model):
    """Rows that were measured with other settings."""

    row: Row = Field(min_length=1)
    """Keys of the rows. A row belongs to the first variant that it matches; keys that all variants name
    say nothing of its stage."""
    overrides: dict[str, bool | int | float | str] = Field(min_length=1)
    """Fields of the scenario, by dotted paths, and their values for these rows, as
    ``{engine.max_num_seqs: 12}``."""


class Part(Model):
    """Rows that are about a part of the requests."""

    row: Row = Field(min_length=1)
    """Keys of the rows. Keys that parts name say nothing of a row's stage."""
    requests: tuple[Amount, Count]
    """Their requests, [first, end), counted from 0 in the order in which they were sent."""

    @model_validator(mode="after")
    def _some(self) -> Part:
        if self.requests[0] >= self.requests[1]:
            raise invalid("a part without requests", "Write it as [first, end).", at="requests")
        return self


class WhatIf(Model):
    """A table predicted once more."""

    name: str
    """What is asked."""
    overrides: dict[str, bool | int | float | str] = Field(min_length=1)
    """Fields of the scenario, by dotted paths, and their values."""


class Excluded(Model):
    """Cells that a comparison leaves out."""

    row: Row
    """Keys of the row."""
    columns: tuple[str, ...] = Field(min_length=1)
    """Its columns to leave out."""
    reason: str
    """Why."""


class LeftOut(Model):
    """Rows of a table's file that are not predicted."""

    row: Row = Field(min_length=1)
    """Keys of the rows."""
    reason: str
    """Why."""


class Reported(Model):
    """A reported table."""

    name: str = "sweep"
    """Name of the table."""
    table: InputFile
    """CSV file with a header. An empty cell was not reported."""
    source: str = ""
    """Where it was published."""
    keys: tuple[str, ...] = ()
    """Columns that say which stage a row is. None, where the one row is the whole run."""
    columns: dict[str, Column] = Field(min_length=1)
    """What each column to compare holds."""
    inputs: tuple[str, ...] = ()
    """Columns that are inputs here, such as requests a level."""
    rows: tuple[Row, ...] = ()
    """Rows of the file that the table is, by their keys. Default, all."""
    left_out: tuple[LeftOut, ...] = ()
    """Rows of the file that are not predicted."""
    sets: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """Fields of the scenario, by dotted paths, that take their values from a column, row by row: each row is
    a run of its own, of the scenario's one stream, as ``{concurrency: [workload.arrivals.concurrency]}``."""
    groups: tuple[str, ...] = ()
    """Keys by whose values errors are told apart."""
    routers: dict[str, RouterName] = Field(default_factory=dict)
    """The router that rows were measured behind, by the value of the first key."""
    summary: Row | None = None
    """Keys of the rows that sum up the others behind their router, as ``{qps: all}``: a throughput is their
    mean, a rate of requests the rate over all of them, a latency their mean weighted with requests."""
    fit_rows: tuple[Row, ...] = ()
    """Rows that a fit may use. All others are predictions."""
    fit_steps: tuple[FitStep, ...] = ()
    """Which of them determine which parameters, one step after the other. Default, all at once."""
    excluded: tuple[Excluded, ...] = ()
    """Cells that the comparison leaves out."""
    percentile_law: Literal["linear", "exclusive"] = "linear"
    """How the source takes percentiles: NumPy's ``linear``, or ``exclusive`` as Python's
    ``statistics.quantiles`` (see [Percentiles](modelled.md#percentiles))."""
    events_beyond_tokens: Amount = 0
    """Events a request that the client counts beside its output tokens: in its token throughput, and in the
    divisor of its TPOT."""
    harness: Literal["vllm_bench", "inference_perf"] = "vllm_bench"
    """What measured it; ``inference_perf`` as of September 2025 (see
    [Reports of inference-perf](modelled.md#reports-of-inference-perf))."""
    output_tokens_each: Positive = 1.0
    """Output tokens that the harness counts for each generated one, as it encodes the outputs again."""
    gauges: Literal["scrapes", "arrivals"] = "scrapes"
    """Whether ``kv_usage``, ``running`` and ``waiting`` are peaks over scrapes, or statistics over samples of
    every replica at the arrivals of requests."""
    ranking: Ranking | None = None
    """Compare the order of the routers."""
    workload: WorkloadSpec | None = None
    """How this table was measured, where not by the scenario's workload."""
    sweep: Sweep | None = None
    """Levels of that workload."""
    known_misses: tuple[str, ...] = ()
    """Which cells the prediction is known to miss, and what is known of why."""
    parts: tuple[Part, ...] = ()
    """Rows that are about a part of the requests."""
    variants: tuple[Variant, ...] = ()
    """Rows that were measured with other settings than the scenario's."""
    what_ifs: tuple[WhatIf, ...] = ()
    """The table predicted once more, with other settings."""

    @model_validator(mode="after")
    def _columns_named(self) -> Reported:
        if self.sweep is not None and self.workload is None:
            raise invalid("a sweep without a workload", "Add the workload that it varies.", at="sweep")
        columns, keys = tuple(self.columns), self.keys
        named = [(f"excluded.{n}.columns", each.columns, columns) for n, each in enumerate(self.excluded)]
        named += [(f"fit_steps.{n}.columns", step.columns, columns) for n, step in enumerate(self.fit_steps)]
        named += [("sets", tuple(self.sets), (*keys, *self.inputs)), ("groups", self.groups, keys)]
        if self.ranking is not None:
            named.append(("ranking.columns", self.ranking.columns, columns))
        for where, asked, known in named:
            for column in asked:
                if column not in known:
                    fix = did_you_mean(column, known) or f"Known: {', '.join(known)}."
                    raise invalid(f"there is no column {column!r}", fix, at=where)
        for number, step in enumerate(self.fit_steps):
            if not all(row in self.fit_rows for row in step.rows):
                where = f"fit_steps.{number}.rows"
                raise invalid("a row that a fit may not use", "Add it to fit_rows.", at=where)
        if self.gauges == "arrivals":
            for name, what in self.columns.items():
                if what.metric in GAUGES and what.statistic is None:
                    where = f"columns.{name}.statistic"
                    raise invalid(f"{name} without a statistic", "Add one, as p90.", at=where)
        if (self.ranking is not None or self.summary is not None) and not self.routers:
            fix = "Add routers, by the value of the first key."
            raise invalid("nothing to rank or to sum up", fix, at="routers")
        return self

    def stage_keys(self, keys: Row) -> Row:
        """What of a row's keys names its stage: all but the key of the routers, those of parts, and those of
        all variants; nothing where each row is a run of its own."""
        if self.sets:
            return {}
        other = set(self.keys[:1]) if self.routers else set()
        other.update(key for part in self.parts for key in part.row)
        if self.variants:
            other |= set.intersection(*(set(variant.row) for variant in self.variants))
        return {key: value for key, value in keys.items() if key not in other}

    def part(self, keys: Row) -> tuple[int, int] | None:
        """The requests, [first, end), that the row with these keys is about; None: all."""
        return next((part.requests for part in self.parts if matches(keys, part.row)), None)

    def settings(self, row: ReportedRow) -> dict[str, float | int | str]:
        """The scenario's fields, by dotted paths, that a row sets; an empty cell sets none."""
        whole = {name: int(value) for name, value in row.inputs.items() if value.is_integer()}
        values = row.inputs | whole | row.keys
        return {
            path: values[column]
            for column, paths in self.sets.items()
            for path in paths
            if values[column] == values[column]
        }

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
        where = str(reported.table)
        for column in expected:
            if column not in header:
                fix = did_you_mean(column, header) or f"Its columns are {', '.join(header)}."
                raise InputError(f"there is no column {column!r}", where=where, fix=fix)
        for column in header:
            if column not in expected:
                fix = "Add it to keys, columns or inputs of the reported table."
                raise InputError(f"nothing says what column {column!r} is", where=where, fix=fix)
        lines = list(reader)
    rows = [_row(reported, line, f"{reported.table}, line {n}") for n, line in enumerate(lines, start=2)]
    for wanted in (
        *reported.fit_rows,
        *reported.rows,
        *(cells.row for cells in reported.excluded),
        *(each.row for each in reported.left_out),
    ):
        if not any(matches(row.keys, wanted) for row in rows):
            raise InputError(f"no row with {_show(wanted)}", where=where, fix="Name a row by its keys.")
    meant = [
        row
        for row in rows
        if (not reported.rows or any(matches(row.keys, wanted) for wanted in reported.rows))
        and not any(matches(row.keys, other.row) for other in reported.left_out)
    ]
    for row in meant:
        if reported.routers and row.router is None:
            raise InputError(
                f"nothing says which router the row with {_show(row.keys)} is about",
                where="reported.routers",
                fix=f"Add the router of {row.keys[reported.keys[0]]!r}, or leave the row out with rows.",
            )
    return meant


def rows_left_out(reported: Reported) -> Iterator[dict[str, Any]]:
    """What ``left_out`` leaves out: "row", its keys, "rows", how many they are, and "reason"."""
    everything = read_rows(reported.model_copy(update={"rows": (), "left_out": ()}))
    for each in reported.left_out:
        rows = sum(matches(row.keys, each.row) for row in everything)
        yield {"row": each.row, "rows": rows, "reason": each.reason}


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
    """Index of the stage that a row with these keys reproduces; None for a table without keys (the run). A
    first stage that has the keys of one other is its warm-up.

    Raises:
        InputError: no stage, or several.
    """
    if not keys:
        return None
    found = [i for i, stage in enumerate(workload.stages) if stage.row and matches(stage.row, keys)]
    if len(found) == 2 and found[0] == 0:
        return found[1]
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
