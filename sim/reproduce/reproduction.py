"""What a reproduction found: reported and predicted tables, cell by cell."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from servecast.sim.hardware.error_band import Bands
from servecast.sim.report.answer import Answer
from servecast.sim.report.text import aligned
from servecast.sim.reproduce.cell import Cell
from servecast.sim.reproduce.reported_ranking import RouterRanking, Sustained
from servecast.sim.scenario.scenario import Scenario


@dataclass(frozen=True, slots=True)
class WhatIfTable:
    """A table predicted with some fields changed. cells: the changed predictions, by the side of the
    unchanged in ``before``, in the same order; nothing was reported of them."""

    name: str
    overrides: Mapping[str, Any]
    before: tuple[Cell, ...]
    cells: tuple[Cell, ...]

    def to_json(self) -> dict[str, Any]:
        """A flat object a cell: ``before`` and ``predicted`` in the column's unit."""
        rows = [
            {
                **cell.keys,
                "metric": cell.metric,
                "before": old.predicted,
                "predicted": cell.predicted,
                "used": old.used,
            }
            for old, cell in zip(self.before, self.cells, strict=True)
        ]
        return {"name": self.name, "overrides": dict(self.overrides), "rows": rows}

    def to_text(self) -> str:
        """A line a row that changes: predicted values before and after, ( ) where the row is excluded."""
        columns = list(dict.fromkeys(cell.metric for cell in self.cells))
        pairs = list(zip(self.before, self.cells, strict=True))
        by_row: dict[str, dict[str, str]] = {}
        for old, cell in pairs:
            if any(o.predicted != c.predicted for o, c in pairs if c.keys == cell.keys):
                name = _keys(cell.keys)
                text = f"{old.predicted:.4g} -> {cell.predicted:.4g}"
                by_row.setdefault(name, {})[cell.metric] = f"({text})" if old.reason else text
        if not by_row:
            return f"what if {self.name}: nothing changes"
        lines = [["", *columns], *([name, *(row[c] for c in columns)] for name, row in by_row.items())]
        text = "\n".join(aligned(lines, [False] * len(lines[0])))
        return f"what if {self.name}: predicted, before -> after\n{text}"


@dataclass(frozen=True, slots=True)
class TableReproduction:
    """One reported table. cells: row by row. experiments: the key that tells its routers apart, if there are
    several. ranking, sustained: see ``router_ranking``. groups: keys by whose values errors are told apart.
    left_out: rows of the table's file that are not predicted, as ``rows_left_out`` has them."""

    name: str
    source: str
    cells: tuple[Cell, ...]
    knee: dict[str, int | None] | None = None
    known_misses: tuple[str, ...] = ()
    experiments: str | None = None
    ranking: RouterRanking | None = None
    sustained: dict[str, Sustained] | None = None
    what_ifs: tuple[WhatIfTable, ...] = ()
    groups: tuple[str, ...] = ()
    left_out: tuple[Mapping[str, Any], ...] = ()

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
        return _mape(self.cells)

    @property
    def mape_by_experiment(self) -> dict[str, dict[str, float]] | None:
        """The same for the rows of each router; None for a table of one."""
        if self.experiments is None:
            return None
        names = dict.fromkeys(str(cell.keys[self.experiments]) for cell in self.cells)
        return {
            name: _mape([cell for cell in self.cells if str(cell.keys[self.experiments]) == name])
            for name in names
        }

    @property
    def mape_by_group(self) -> dict[str, dict[str, float]] | None:
        """The same for each group of rows, named by the values of its keys; None for a table without
        groups."""
        if not self.groups:
            return None
        by_group: dict[str, list[Cell]] = {}
        for cell in self.cells:
            by_group.setdefault(", ".join(f"{key} {cell.keys[key]}" for key in self.groups), []).append(cell)
        return {name: _mape(cells) for name, cells in by_group.items()}

    @property
    def coverage(self) -> dict[str, float]:
        """Metric -> share of its predicted cells whose error keeps the band that is stated for it."""
        found: dict[str, list[bool]] = {}
        for cell in self.cells:
            if cell.used == "predicted" and cell.inside is not None:
                found.setdefault(cell.metric, []).append(cell.inside)
        return {metric: sum(inside) / len(inside) for metric, inside in found.items()}

    def to_text(self) -> str:
        """A line a row: predicted values with their error; marked * where fitted, ( ) where excluded."""
        columns = list(dict.fromkeys(cell.metric for cell in self.cells))
        by_row: dict[str, dict[str, str]] = {}
        for cell in self.cells:
            name = _keys(cell.keys) or "whole run"
            error = "" if cell.error is None else f" {100 * cell.error:+.1f}%"
            true = "" if cell.true is None else f" [{cell.true:.4g}]"
            text = f"{cell.predicted:.4g}{error}{true}"
            marked = {"fit": f"{text}*", "summary": f"{text}+", "excluded": f"({text})"}.get(cell.used, text)
            by_row.setdefault(name, {})[cell.metric] = marked
        mape = {metric: f"{value:.1f}%" for metric, value in self.mape_predicted.items()}
        lines = [["", *columns]]
        lines += [[name, *(row.get(column, "") for column in columns)] for name, row in by_row.items()]
        for name, errors in (self.mape_by_experiment or self.mape_by_group or {}).items():
            shown = (f"{errors[column]:.1f}%" if column in errors else "" for column in columns)
            lines.append([f"mean error, {name}", *shown])
        lines.append(["mean error, predicted", *(mape.get(column, "") for column in columns)])
        inside = {metric: f"{share:.0%}" for metric, share in self.coverage.items()}
        if inside:
            lines.append(["inside the error band", *(inside.get(column, "") for column in columns)])
        text = "\n".join(aligned(lines, [False] + [True] * len(columns)))
        knee = ""
        if self.knee is not None:
            ours, theirs = self.knee["concurrency"], self.knee["reported_concurrency"]
            knee = f"\nknee: predicted {ours}, reported {theirs}"
        for name, held in (self.sustained or {}).items():
            knee += f"\n{name}: {held.to_text()}"
        if self.ranking is not None:
            knee += f"\n{self.ranking.to_text()}"
        misses = "".join(f"\nknown miss: {miss}" for miss in self.known_misses)
        misses += "".join(
            f"\nleft out: {each['rows']} rows, {_keys(each['row'])}: {each['reason']}"
            for each in self.left_out
        )
        what_ifs = "".join(f"\n\n{what_if.to_text()}" for what_if in self.what_ifs)
        return f"{self.name}: predicted, error against reported\n{text}{knee}{misses}{what_ifs}"

    def to_json(self) -> dict[str, Any]:
        """As described for ``servecast reproduce --json``."""
        return {
            "source": self.source,
            "fitted_rows": self.rows("fit"),
            "predicted_rows": self.rows("predicted"),
            "rows": [cell.to_json() for cell in self.cells],
            "mape_predicted": self.mape_predicted,
            "mape_by_group": self.mape_by_group,
            "coverage": self.coverage,
            "left_out": list(self.left_out),
            "knee": self.knee,
            "known_misses": list(self.known_misses),
            "what_ifs": [what_if.to_json() for what_if in self.what_ifs],
        } | self._routers_to_json()

    def _routers_to_json(self) -> dict[str, Any]:
        """What a table of several routers has beside that."""
        if self.experiments is None:
            return {}
        return {
            "mape_by_experiment": self.mape_by_experiment,
            "ranking": None if self.ranking is None else self.ranking.to_json(),
            "sustained": {name: asdict(held) for name, held in (self.sustained or {}).items()},
        }


@dataclass(frozen=True, slots=True, repr=False)
class Reproduction(Answer):
    """All reported tables of a scenario; the first is the main one. Computed is good: whether it is good
    enough is for the reader."""

    scenario: Scenario
    seeds: tuple[int, ...]
    tables: tuple[TableReproduction, ...]
    provenance: dict[str, Any]

    def to_text(self) -> str:
        """All tables, what they rest on, and how to read them."""
        parts = [table.to_text() for table in self.tables]
        context = self.scenario.run_context
        if context is not None:
            said = (f"{name}: {value}" for name, value in context.model_dump().items() if value)
            parts.insert(0, "\n".join(said))
        rests = self.provenance
        bands = Bands(**rests["error_bands"]).to_text()
        parts.append(
            "* used to fit the profile; + sums up other rows; [ ] without the peculiarities of the "
            "report's harness; ( ) excluded, with the reason in --json. "
            f"Means over {len(self.seeds)} seeds.\n"
            f"profile: {rests['profile']}; {rests['basis']}; error bands {bands}"
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
            "notes": list(scenario.notes),
            "provenance": self.provenance,
        }


def _keys(row: Mapping[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in row.items())


def _mape(cells: Iterable[Cell]) -> dict[str, float]:
    errors: dict[str, list[float]] = {}
    for cell in cells:
        if cell.used == "predicted" and cell.error is not None and math.isfinite(cell.error):
            errors.setdefault(cell.metric, []).append(abs(cell.error))
    return {metric: 100 * float(np.mean(values)) for metric, values in errors.items()}
