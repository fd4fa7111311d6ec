"""Reported tables whose rows were measured with other settings than the scenario's, and what-ifs of a table.

Each variant of a table, and each row that sets fields, is a scenario of its own with a part of the rows, so
they are reproduced one by one and put together again; a what-if is the same table predicted once more with
some fields changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from joblib import Parallel, delayed

from servecast.sim.reproduce.reproduction import Reproduction, TableReproduction, WhatIfTable
from servecast.sim.scenario.deployment import Deployment
from servecast.sim.scenario.reported import Reported, matches, read_rows, rows_left_out, stage_of
from servecast.sim.scenario.scenario import Scenario
from servecast.sim.traffic.spec import Row, Workload

Reproduce = Callable[[Scenario], Reproduction]


def in_variants(scenario: Scenario, reproduce: Reproduce, jobs: int) -> Reproduction:
    """Reproduce a scenario whose tables have variants, rows that set fields, or what-ifs.

    Args:
        reproduce: how a scenario without them is reproduced.
        jobs: processes over which such scenarios run.

    Raises:
        InputError: a row belongs to no variant, or an override is wrong.
    """
    tables, variants = [], []
    for reported in scenario.reported:
        found = list(_parts(scenario, reported, reproduce, jobs))
        if not reported.sets:
            variants += [{"row": row, **part.provenance} for row, part in found if row]
        table = _joined(reported, [part.tables[0] for _, part in found])
        what_ifs = []
        for what_if in reported.what_ifs:
            changed = [part for _, part in _parts(scenario, reported, reproduce, jobs, what_if.overrides)]
            cells = _joined(reported, [part.tables[0] for part in changed]).cells
            what_ifs.append(WhatIfTable(what_if.name, what_if.overrides, table.cells, cells))
        tables.append(replace(table, what_ifs=tuple(what_ifs)))
        seeds = found[0][1].seeds
    provenance = {**Deployment.of(scenario).provenance(), "variants": variants}
    return Reproduction(scenario, seeds, tuple(tables), provenance)


def _parts(
    scenario: Scenario,
    reported: Reported,
    reproduce: Reproduce,
    jobs: int,
    overrides: Mapping[str, Any] | None = None,
) -> Iterator[tuple[dict[str, Any], Reproduction]]:
    """Each variant's row and its part of the table; without variants the whole."""
    parts = list(variants_of(scenario, reported))
    tasks = (delayed(reproduce)(alone.changed(overrides or {})) for _, alone in parts)
    found = Parallel(n_jobs=jobs if reported.sets else 1)(tasks)  # without, each has its seeds to share out
    yield from zip((row for row, _ in parts), found, strict=True)


def variants_of(scenario: Scenario, reported: Reported) -> Iterator[tuple[dict[str, Any], Scenario]]:
    """For each variant of a table its row, and a scenario with the fields that it sets, its rows and their
    stages alone; of a table whose rows set fields, the same for each row. A row belongs to the first variant
    that it matches, and to the scenario itself where it matches none: then the variant's row is empty."""
    left = read_rows(reported)
    for variant in (*reported.variants, None):
        its = [row for row in left if variant is None or matches(row.keys, variant.row)]
        if not its:
            continue
        left = [row for row in left if row not in its]
        changed = scenario if variant is None else scenario.changed(variant.overrides)
        name = {} if variant is None else variant.row
        if reported.sets:
            for row in its:
                alone = changed.changed(reported.settings(row))
                yield name, alone.model_copy(update={"reported": (_narrowed(reported, [row.keys]),)})
            continue
        keys = [row.keys for row in its]
        stages = _stages(scenario.workload_of(reported), reported, keys)
        narrow = _narrowed(reported, keys).model_copy(update={"workload": stages, "sweep": None})
        yield name, changed.model_copy(update={"reported": (narrow,)})


def _narrowed(reported: Reported, rows: list[Row]) -> Reported:
    """The table with these rows alone."""
    return reported.model_copy(
        update={
            "rows": tuple(rows),
            "fit_rows": tuple(row for row in rows if any(matches(row, fit) for fit in reported.fit_rows)),
            "excluded": tuple(
                cells for cells in reported.excluded if any(matches(row, cells.row) for row in rows)
            ),
            "what_ifs": (),
            "left_out": (),
        }
    )


def _stages(workload: Workload, reported: Reported, rows: list[Row]) -> Workload:
    """The stages that these rows are about."""
    needed = {stage_of(reported.stage_keys(row), workload) for row in rows}
    if None in needed:
        return workload
    return Workload(stages=tuple(stage for index, stage in enumerate(workload.stages) if index in needed))


def _joined(reported: Reported, parts: list[TableReproduction]) -> TableReproduction:
    """The parts' cells in the order of the table's rows."""
    order = [row.keys for row in read_rows(reported)]
    cells = sorted((cell for part in parts for cell in part.cells), key=lambda cell: order.index(cell.keys))
    left_out = tuple(rows_left_out(reported))  # of the whole table; a part has no row of its own in it
    return replace(parts[0], cells=tuple(cells), left_out=left_out)
