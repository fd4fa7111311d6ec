"""A scenario's own closed-loop sweep, simulated, beside what was reported of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isnan

from servecast.sim.metrics.knee import closed_loop_knee
from servecast.sim.metrics.metrics import summary
from servecast.sim.metrics.warmup import select
from servecast.sim.run.simulate import simulate
from servecast.sim.scenario.reported import read_rows
from servecast.sim.scenario.scenario import Scenario
from servecast.sim.traffic.arrivals import ClosedLoop


@dataclass(frozen=True, slots=True)
class SweepPoint:
    """One level of a closed-loop sweep: output tokens/s at a concurrency, and what was reported there."""

    concurrency: int
    output_throughput: float
    reported: float | None = None


def sweep_points(scenario: Scenario) -> tuple[SweepPoint, ...]:
    """The levels of the scenario's sweep; empty where it has none, or one that is not closed-loop."""
    laws = [stage.streams[0].arrivals for stage in scenario.stages().stages]
    levels = [law.concurrency for law in laws if isinstance(law, ClosedLoop)]
    if scenario.sweep is None or len(levels) < len(laws):
        return ()
    run = simulate(scenario)
    throughput = [summary(select(run, stage=index))["output_throughput"] for index in range(len(levels))]
    reported = _reported(scenario)
    return tuple(
        SweepPoint(level, value, reported.get(level)) for level, value in zip(levels, throughput, strict=True)
    )


def knee(points: Sequence[SweepPoint]) -> int | None:
    """The concurrency of the knee; None where throughput still rises at the last level."""
    return closed_loop_knee([p.concurrency for p in points], [p.output_throughput for p in points])


def _reported(scenario: Scenario) -> dict[int, float]:
    """Output tokens/s by concurrency, as far as the scenario's sweep was reported."""
    found = {}
    for table in scenario.reported:
        columns = [name for name, column in table.columns.items() if column.metric == "output_throughput"]
        if table.keys == ("concurrency",) and table.workload is None and columns:
            for row in read_rows(table):
                if columns[0] not in row.excluded and not isnan(row.values[columns[0]]):
                    found[int(row.keys["concurrency"])] = row.values[columns[0]]
    return found
