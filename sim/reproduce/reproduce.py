"""Predicted against reported: the tables of a scenario, cell by cell."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from joblib import Parallel, delayed

from servecast.sim.hardware.profile import Profile
from servecast.sim.inputs.errors import InputError
from servecast.sim.metrics.knee import closed_loop_knee
from servecast.sim.metrics.records import Run
from servecast.sim.metrics.saturation import Saturation, saturation
from servecast.sim.metrics.warmup import part_of, select
from servecast.sim.reproduce.cell import Cell
from servecast.sim.reproduce.reported_ranking import rank, sustained
from servecast.sim.reproduce.reproduction import Reproduction, TableReproduction
from servecast.sim.reproduce.values import Value, summed_up, values_of
from servecast.sim.reproduce.variants import in_variants
from servecast.sim.run.simulate import simulate
from servecast.sim.scenario.deployment import Deployment
from servecast.sim.scenario.reported import (
    Reported,
    ReportedRow,
    read_rows,
    rows_left_out,
    stage_of,
)
from servecast.sim.scenario.scenario import Scenario
from servecast.sim.traffic.spec import Workload

Row = tuple[str, tuple[tuple[str, float | int | str], ...]]  # a table's name, and a row's keys


def reproduce(
    scenario: Scenario, *, seeds: int | None = None, profile: Profile | None = None, jobs: int = 1
) -> Reproduction:
    """Simulate what each reported table measured, and set the two side by side.

    Args:
        seeds: replications, instead of the scenario's; predictions are their means.
        profile: instead of the scenario's.
        jobs: processes over which the simulations run; results do not depend on it.

    Raises:
        InputError: the scenario has no reported tables, or one does not fit its workload.
    """
    if not scenario.reported:
        where, fix = f"{scenario.source}: reported", "Add a reported table, or use simulate."
        raise InputError("nothing was reported of this scenario", where, fix)
    plain = partial(_reproduce, seeds=seeds or scenario.replications, profile=profile, jobs=jobs)
    if any(table.variants or table.sets or table.what_ifs for table in scenario.reported):
        return in_variants(scenario, plain, jobs)
    return plain(scenario)


def _reproduce(scenario: Scenario, *, seeds: int, profile: Profile | None, jobs: int) -> Reproduction:
    """All tables as measured with the scenario's own settings."""
    deployment = Deployment.of(scenario, profile)
    numbers = tuple(scenario.seed + k for k in range(seeds))
    rows = [read_rows(reported) for reported in scenario.reported]
    simulated: dict[tuple[str, str | Path | None], list[int]] = {}  # own workload, router -> tables
    for index, reported in enumerate(scenario.reported):
        own = reported.name if reported.workload is not None else ""  # "": the scenario's workload
        for router in dict.fromkeys(row.router for row in rows[index]):
            simulated.setdefault((own, router), []).append(index)
    tasks = [
        delayed(_measured)(
            deployment if router is None else replace(deployment, scenario=scenario.behind(router)),
            seed,
            [(scenario.reported[i], [row for row in rows[i] if row.router == router]) for i in tables],
        )
        for (_, router), tables in simulated.items()
        for seed in numbers
    ]
    measured: dict[Row, list[_Measured]] = {}  # a row's, seed by seed
    for found in Parallel(n_jobs=jobs)(tasks):
        for row, values in found.items():
            measured.setdefault(row, []).append(values)
    tables = [_table(reported, rows[i], measured, deployment) for i, reported in enumerate(scenario.reported)]
    return Reproduction(scenario, numbers, tuple(tables), deployment.provenance())


@dataclass(frozen=True, slots=True)
class _Measured:
    """One row on one seed: its values by column, and whether its load held (None: not asked)."""

    values: dict[str, Value]
    request_rate: float | None = None
    saturation: Saturation | None = None


def _measured(
    deployment: Deployment, seed: int, tables: list[tuple[Reported, list[ReportedRow]]]
) -> dict[Row, _Measured]:
    """Simulate once, and measure the rows that the tables have of it."""
    workload = deployment.scenario.workload_of(tables[0][0])
    run = simulate(deployment, seed=seed, workload=workload)
    found: dict[Row, _Measured] = {}
    for reported, rows in tables:
        parts: list[tuple[int, dict[str, Value]]] = []
        for row in rows:
            if row.summary:
                continue
            stage = stage_of(reported.stage_keys(row.keys), workload)
            part = _part(run, stage, workload)
            if (requests := reported.part(row.keys)) is not None:
                part = part_of(part, *requests)
            values = values_of(part, row.columns, reported, deployment)
            parts.append((len(part.requests), values))
            rate = None
            if reported.routers and stage is not None:
                rate = getattr(workload.stages[stage].streams[0].arrivals, "request_rate", None)
            start_s = float(part.requests["arrival"].min())
            held = None if rate is None else saturation(part, start_s=start_s)
            found[_name(reported, row)] = _Measured(values, rate, held)
        for row in rows:
            if row.summary:
                found[_name(reported, row)] = _Measured(summed_up(row.columns, reported, parts))
    return found


def _name(reported: Reported, row: ReportedRow) -> Row:
    return reported.name, tuple(row.keys.items())


def _table(
    reported: Reported,
    rows: list[ReportedRow],
    measured: dict[Row, list[_Measured]],
    deployment: Deployment,
) -> TableReproduction:
    cells = []
    throughput: dict[int, tuple[float, float]] = {}
    held: dict[str, dict[float, list[Saturation]]] = {}  # router's rows -> rate -> seed by seed
    for row in rows:
        seeds = measured[_name(reported, row)]
        fitted = row.fit or str(row.keys) in deployment.profile.fitted_rows
        for column in row.columns:
            cell = _cell(row, column, [seed.values[column] for seed in seeds], fitted=fitted)
            what = reported.columns[column]
            if what.statistic in (None, "mean", "median", "p50"):  # bands speak of these, and of rates
                cell = replace(cell, band=deployment.bands.of(what.metric))
            cells.append(cell)
            level = row.keys.get("concurrency")
            if what.metric == "output_throughput" and isinstance(level, int):
                throughput[level] = (cell.predicted, cell.reported)
        for seed in seeds:
            if seed.request_rate is not None and seed.saturation is not None:
                by_rate = held.setdefault(str(row.keys[reported.keys[0]]), {})
                by_rate.setdefault(seed.request_rate, []).append(seed.saturation)
    knee = None
    if throughput:
        levels = list(throughput)
        knee = {
            "concurrency": closed_loop_knee(levels, [throughput[level][0] for level in levels]),
            "reported_concurrency": closed_loop_knee(levels, [throughput[level][1] for level in levels]),
        }
    table = TableReproduction(
        reported.name,
        reported.source,
        tuple(cells),
        knee,
        reported.known_misses,
        groups=reported.groups,
        left_out=tuple(rows_left_out(reported)),
    )
    if not reported.routers:
        return table
    return replace(
        table,
        experiments=reported.keys[0],
        ranking=rank(reported, cells),
        sustained={name: sustained(by_rate) for name, by_rate in held.items()},
    )


def _cell(row: ReportedRow, column: str, values: list[Value], *, fitted: bool) -> Cell:
    reason = row.excluded.get(column)
    used = "fit" if fitted else "predicted"
    used = "summary" if row.summary else used
    used = "excluded" if reason is not None else used
    predicted = [value for value, _ in values]
    true = [value for _, value in values if value is not None]
    return Cell(
        dict(row.keys),
        column,
        row.values[column],
        float(np.mean(predicted)),
        float(np.std(predicted)),
        used,
        reason,
        float(np.mean(true)) if true else None,
    )


def _part(run: Run, stage: int | None, workload: Workload) -> Run:
    """A row's part of a run: a stage without its background streams, or everything."""
    if stage is None:
        return run
    part = select(run, stage=stage)
    background = {i for i, stream in enumerate(workload.stages[stage].streams) if stream.background}
    if background:
        part.requests = part.requests[~part.requests["stream"].isin(background)]
    return part
