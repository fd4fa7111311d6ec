"""Reported tables: what a benchmark published, and what each of its columns means."""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, model_validator

from servecast.sim.errors import InputError
from servecast.sim.schema import Amount, InputFile, Model, did_you_mean, invalid
from servecast.sim.workload_spec import Row, Sweep, Workload, WorkloadSpec, expand

Metric = Literal[
    "ttft",
    "tpot",
    "itl",
    "e2el",
    "output_throughput",
    "request_throughput",
    "goodput",
    "kv_usage",
    "running",
    "waiting",
    "gpu_memory",
]
Statistic = Annotated[str, Field(pattern=r"^(mean|median|max|p[0-9]{1,2}(\.[0-9]+)?)$")]


class Column(Model):
    """What a column holds: ``statistic`` is "p95", "mean", "max" ..., or nothing for rates and shares."""

    metric: Metric
    statistic: Statistic | None = None
    unit: Literal["s", "ms", "tok/s", "req/s", "percent", "requests", "GiB"]

    @model_validator(mode="after")
    def _makes_sense(self) -> Column:
        if self.metric in ("ttft", "tpot", "itl", "e2el"):
            if self.statistic is None:
                raise invalid(f"{self.metric} without a statistic", "Add one, as p95.", at="statistic")
            if self.unit not in ("s", "ms"):
                raise invalid(f"{self.metric} in {self.unit}", "Its unit is s or ms.", at="unit")
        return self


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
        fit_rows: rows that a fit may use; all others are predictions.
        percentile_law: "linear" (NumPy), or "exclusive" (Python's statistics.quantiles).
        events_beyond_tokens: events a request that the client counts beside its output tokens; they enter
            its token throughput and the divisor of its TPOT.
        workload, sweep: how this table was measured, where it was not by the scenario's own workload.
        known_misses: which cells are known to be missed, and what is known of why.
    """

    name: str = "sweep"
    table: InputFile
    source: str = ""
    keys: tuple[str, ...] = ()
    columns: dict[str, Column] = Field(min_length=1)
    inputs: tuple[str, ...] = ()
    fit_rows: tuple[Row, ...] = ()
    excluded: tuple[Excluded, ...] = ()
    percentile_law: Literal["linear", "exclusive"] = "linear"
    events_beyond_tokens: Amount = 0
    workload: WorkloadSpec | None = None
    sweep: Sweep | None = None
    known_misses: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _columns_named(self) -> Reported:
        if self.sweep is not None and self.workload is None:
            raise invalid("a sweep without a workload", "Add the workload that it varies.", at="sweep")
        for index, cells in enumerate(self.excluded):
            for column in cells.columns:
                if column not in self.columns:
                    raise invalid(
                        f"there is no column {column!r}",
                        did_you_mean(column, self.columns) or f"Known: {', '.join(self.columns)}.",
                        at=f"excluded.{index}.columns",
                    )
        return self

    def own_workload(self) -> Workload | None:
        """The workload that the table was measured with, or None: the scenario's."""
        return None if self.workload is None else expand(self.workload, self.sweep)


@dataclass(frozen=True, slots=True)
class ReportedRow:
    """A row: its keys, its values by column (NaN where not reported), and what it may be used for.

    ``excluded`` gives the reason for each column that a comparison leaves out.
    """

    keys: Row
    values: dict[str, float]
    inputs: dict[str, float]
    fit: bool
    excluded: dict[str, str]


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
        if not any(_matches(row.keys, wanted) for row in rows):
            raise InputError(
                f"no row with {_show(wanted)}", where=str(reported.table), fix="Name a row by its keys."
            )
    return rows


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
        fit=any(_matches(keys, wanted) for wanted in reported.fit_rows),
        excluded={
            column: cells.reason
            for cells in reported.excluded
            if _matches(keys, cells.row)
            for column in cells.columns
        },
    )


def stage_of(keys: Row, workload: Workload) -> int | None:
    """Index of the stage that a row with these keys reproduces; None for a table without keys (the run).

    Raises:
        InputError: no stage, or several.
    """
    if not keys:
        return None
    found = [i for i, stage in enumerate(workload.stages) if stage.row and _matches(stage.row, keys)]
    if len(found) != 1:
        raise InputError(
            f"{len(found) or 'no'} stages reproduce the row with {_show(keys)}",
            where="reported",
            fix="Give each row of the table one level or stage, with the row's keys as its 'row'.",
        )
    return found[0]


def _matches(row: Row, wanted: Row) -> bool:
    return all(row.get(key) == value for key, value in wanted.items())


def _show(row: Row) -> str:
    return ", ".join(f"{key} {value}" for key, value in row.items())
