"""Predicted against reported: the tables of a scenario, cell by cell."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from servecast.sim.deployment import Deployment
from servecast.sim.errors import InputError
from servecast.sim.knee import closed_loop_knee
from servecast.sim.metrics import duration, good_requests, latencies, series, statistic, statistics_of
from servecast.sim.profile import Profile
from servecast.sim.records import Run
from servecast.sim.reported import Column, Reported, ReportedRow, read_rows, stage_of
from servecast.sim.scenario import Scenario
from servecast.sim.simulate import simulate
from servecast.sim.slo import Goodput
from servecast.sim.warmup import select

GIB = 1 << 30
SCRAPE_INTERVAL_S = 15.0  # Prometheus' usual interval; gauges are seen at its scrapes only
_SCALE = {"s": 1.0, "ms": 1000.0}


@dataclass(frozen=True, slots=True)
class Cell:
    """One number of a table.

    keys: the row's keys. metric: the column. reported, predicted: in the column's unit; predicted is the
    mean over the seeds, and spread its standard deviation over them. used: "fit", "predicted" or
    "excluded", the last with its reason.
    """

    keys: dict[str, float | int | str]
    metric: str
    reported: float
    predicted: float
    spread: float
    used: str
    reason: str | None = None

    @property
    def error(self) -> float | None:
        """Relative error, None where the reported value is 0."""
        return self.predicted / self.reported - 1 if self.reported else None

    def to_json(self) -> dict[str, Any]:
        """One flat object, the row's keys first."""
        plain = {
            **self.keys,
            "metric": self.metric,
            "reported": self.reported,
            "predicted": _number(self.predicted),
            "spread": _number(self.spread),
            "error_pct": None if self.error is None else _number(100 * self.error),
            "used": self.used,
        }
        return plain if self.reason is None else {**plain, "reason": self.reason}


@dataclass(frozen=True, slots=True)
class TableReproduction:
    """One reported table. cells: row by row."""

    name: str
    source: str
    cells: tuple[Cell, ...]
    knee: dict[str, int | None] | None = None
    known_misses: tuple[str, ...] = ()

    def rows(self, used: str) -> list[dict[str, float | int | str]]:
        """Keys of the rows that have cells of this use, each once."""
        found: list[dict[str, float | int | str]] = []
        for cell in self.cells:
            if cell.used == used and cell.keys not in found:
                found.append(cell.keys)
        return found

    @property
    def mape_predicted(self) -> dict[str, float]:
        """Metric -> mean absolute error of its predicted cells, in percent, without those reported as 0."""
        errors: dict[str, list[float]] = {}
        for cell in self.cells:
            if cell.used == "predicted" and cell.error is not None and math.isfinite(cell.error):
                errors.setdefault(cell.metric, []).append(abs(cell.error))
        return {metric: 100 * float(np.mean(values)) for metric, values in errors.items()}

    def to_text(self) -> str:
        """A line a row: predicted values with their error; marked * where fitted, ( ) where excluded."""
        columns = list(dict.fromkeys(cell.metric for cell in self.cells))
        by_row: dict[str, dict[str, str]] = {}
        for cell in self.cells:
            name = " ".join(f"{key}={value}" for key, value in cell.keys.items()) or "whole run"
            error = "" if cell.error is None else f" {100 * cell.error:+.1f}%"
            text = f"{cell.predicted:.4g}{error}"
            marked = {"fit": f"{text}*", "excluded": f"({text})"}.get(cell.used, text)
            by_row.setdefault(name, {})[cell.metric] = marked
        mape = {metric: f"{value:.1f}%" for metric, value in self.mape_predicted.items()}
        lines = [["", *columns]]
        lines += [[name, *(row.get(column, "") for column in columns)] for name, row in by_row.items()]
        lines.append(["mean error, predicted", *(mape.get(column, "") for column in columns)])
        widths = [max(len(line[i]) for line in lines) for i in range(len(columns) + 1)]
        text = "\n".join(
            "  ".join(
                word.ljust(w) if i == 0 else word.rjust(w)
                for i, (word, w) in enumerate(zip(line, widths, strict=True))
            )
            for line in lines
        )
        knee = ""
        if self.knee is not None:
            knee = (
                f"\nknee: predicted {self.knee['concurrency']}, reported {self.knee['reported_concurrency']}"
            )
        misses = "".join(f"\nknown miss: {miss}" for miss in self.known_misses)
        return f"{self.name}: predicted, error against reported\n{text}{knee}{misses}"

    def to_json(self) -> dict[str, Any]:
        """As described for ``servecast reproduce --json``."""
        return {
            "source": self.source,
            "fitted_rows": self.rows("fit"),
            "predicted_rows": self.rows("predicted"),
            "rows": [cell.to_json() for cell in self.cells],
            "mape_predicted": self.mape_predicted,
            "knee": self.knee,
            "known_misses": list(self.known_misses),
        }


@dataclass(frozen=True, slots=True)
class Reproduction:
    """All reported tables of a scenario; the first is the main one."""

    scenario: Scenario
    seeds: tuple[int, ...]
    tables: tuple[TableReproduction, ...]
    provenance: dict[str, Any]

    exit_code = 0  # it was computed; whether it is good enough is for the reader

    def to_text(self) -> str:
        """All tables, what they rest on, and how to read them."""
        parts = [table.to_text() for table in self.tables]
        context = self.scenario.run_context
        if context is not None:
            parts.insert(
                0, "\n".join(f"{name}: {value}" for name, value in context.model_dump().items() if value)
            )
        rests = self.provenance
        band = "not known" if rests["error_band"] is None else f"+-{100 * rests['error_band']:.0f} %"
        parts.append(
            "* used to fit the profile; ( ) excluded, with the reason in --json. "
            f"Means over {len(self.seeds)} seeds.\n"
            f"profile: {rests['profile']}; {rests['basis']}; error band {band}"
        )
        return "\n\n".join(parts)

    def to_json(self) -> dict[str, Any]:
        """The main table's keys at the top, the others under "tables"."""
        scenario, (main, *others) = self.scenario, self.tables
        return {
            "scenario": scenario.name,
            **main.to_json(),
            "tables": {table.name: table.to_json() for table in others},
            "seeds": list(self.seeds),
            "run_context": None if scenario.run_context is None else scenario.run_context.model_dump(),
            "assumptions": [entry.model_dump() for entry in scenario.assumptions],
            "notes": list(scenario.engine.notes),
            "provenance": self.provenance,
        }


def reproduce(scenario: Scenario, *, seeds: int = 8, profile: Profile | None = None) -> Reproduction:
    """Simulate what each reported table measured, and set the two side by side.

    Args:
        seeds: replications; predictions are their means. profile: instead of the scenario's.

    Raises:
        InputError: the scenario has no reported tables, or one does not fit its workload.
    """
    if not scenario.reported:
        raise InputError(
            "nothing was reported of this scenario",
            where=f"{scenario.source}: reported",
            fix="Add a reported table, or use simulate.",
        )
    deployment = Deployment.of(scenario, profile)
    numbers = tuple(scenario.seed + k for k in range(seeds))
    runs: dict[str, list[Run]] = {}  # by table; those of the scenario's own workload share ""
    tables = []
    for reported in scenario.reported:
        workload = scenario.workload_of(reported)
        own = reported.name if reported.workload is not None else ""
        if own not in runs:
            runs[own] = [
                simulate(scenario, seed=seed, workload=workload, deployment=deployment) for seed in numbers
            ]
        tables.append(_table(scenario, reported, runs[own], deployment))
    return Reproduction(scenario, numbers, tuple(tables), deployment.provenance())


def _table(
    scenario: Scenario, reported: Reported, runs: list[Run], deployment: Deployment
) -> TableReproduction:
    cells = []
    workload = scenario.workload_of(reported)
    throughput: dict[int, tuple[float, float]] = {}
    for row in read_rows(reported):
        stage = stage_of(row.keys, workload)
        background = (
            set()
            if stage is None
            else {index for index, stream in enumerate(workload.stages[stage].streams) if stream.background}
        )
        parts = [_part(run, stage, background) for run in runs]
        for column, reported_value in row.values.items():
            if math.isnan(reported_value):
                continue
            what = reported.columns[column]
            values = [measure(part, what, reported, scenario.goodput_limits, deployment) for part in parts]
            fitted = row.fit or str(row.keys) in deployment.profile.fitted_rows
            cell = _cell(row, column, reported_value, values, fitted=fitted)
            cells.append(cell)
            if what.metric == "output_throughput" and isinstance(row.keys.get("concurrency"), int):
                throughput[int(row.keys["concurrency"])] = (cell.predicted, reported_value)
    knee = None
    if throughput:
        levels = list(throughput)
        knee = {
            "concurrency": closed_loop_knee(levels, [throughput[level][0] for level in levels]),
            "reported_concurrency": closed_loop_knee(levels, [throughput[level][1] for level in levels]),
        }
    return TableReproduction(reported.name, reported.source, tuple(cells), knee, reported.known_misses)


def _cell(row: ReportedRow, column: str, reported: float, values: list[float], *, fitted: bool) -> Cell:
    reason = row.excluded.get(column)
    used = "excluded" if reason is not None else "fit" if fitted else "predicted"
    return Cell(dict(row.keys), column, reported, float(np.mean(values)), float(np.std(values)), used, reason)


def _part(run: Run, stage: int | None, background: set[int]) -> Run:
    part = run if stage is None else select(run, stage=stage)
    if background:
        part.requests = part.requests[~part.requests["stream"].isin(background)]
    return part


def measure(
    run: Run, column: Column, reported: Reported, goodput: Goodput | None, deployment: Deployment
) -> float:
    """The value of a column in its unit, as the table's source would have measured it on this run."""
    metric, extra = column.metric, reported.events_beyond_tokens
    done = run.requests[run.requests["status"] == "finished"]
    if metric == "gpu_memory":
        return deployment.memory.memory_used_bytes / GIB
    if metric in ("kv_usage", "running", "waiting"):
        return _gauge_peak(run, metric) * (100 if column.unit == "percent" else 1)
    if metric == "output_throughput":
        return float((done["output_tokens"] + extra).sum()) / duration(run)
    if metric == "request_throughput":
        return len(done) / duration(run)
    if metric == "goodput":
        if goodput is None:
            raise InputError(
                "a goodput column, but no limits", where="goodput", fix='Add them, as goodput: "ttft:1000".'
            )
        return 100 * good_requests(run, goodput) / len(run.requests)
    assert column.statistic is not None
    name = "p50" if column.statistic == "median" else column.statistic
    if metric == "tpot" and extra:
        values = latencies(run.requests)
        events = done["output_tokens"] + extra - 1
        sample = ((values["e2el"] - values["ttft"]) / events).to_numpy()
        seconds = statistics_of(sample, None, [name], reported.percentile_law)[0]
    else:
        seconds = statistic(run, metric, name, law=reported.percentile_law)
    return seconds * _SCALE[column.unit]


def _gauge_peak(run: Run, column: str) -> float:
    """The largest value that a scraper sees, for the median of its possible starts."""
    values = series(run.steps, column)
    times, seen = values.index.to_numpy(), values.to_numpy()
    end = float(run.requests["finish"].max())
    peaks = []
    for offset in np.linspace(0.0, SCRAPE_INTERVAL_S, 60, endpoint=False):
        at = np.searchsorted(times, np.arange(offset, end, SCRAPE_INTERVAL_S), side="right") - 1
        if (at >= 0).any():
            peaks.append(seen[at[at >= 0]].max())
    return float(np.median(peaks)) if peaks else math.nan


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
