"""A grid of what-ifs, run in parallel, one result file a cell, so that a sweep can be taken up again."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
from joblib import delayed

from servecast.sim.inputs.errors import InputError
from servecast.sim.report.answer import Answer
from servecast.sim.report.progress import progress_bar
from servecast.sim.report.text import table
from servecast.sim.run.kept import Document, fingerprint, kept
from servecast.sim.run.results import check_output, measured, write_result, write_table
from servecast.sim.run.simulation import at_rate, simulate
from servecast.sim.run.workers import Workers, parallel
from servecast.sim.scenario.scenario import Scenario
from servecast.sim.traffic.trace_notes import trace_notes

_COLUMNS = ("request_throughput", "output_throughput", "p95_ttft_ms", "p95_tpot_ms", "p95_e2el_ms", "error")


@dataclass(frozen=True, slots=True)
class Cell:
    """One simulation of a sweep.

    changes: dotted field paths and values, beyond what the whole sweep changes. request_rate,
    num_requests: open-loop traffic (requests/s); None runs the scenario's own workload.
    """

    changes: Mapping[str, Any]
    seed: int
    request_rate: float | None = None
    num_requests: int | None = None

    def to_json(self) -> Document:
        return asdict(self)


def grid(
    vary: Mapping[str, Sequence[Any]],
    *,
    seeds: Sequence[int],
    rates: Sequence[float] = (),
    num_requests: int = 1000,
) -> list[Cell]:
    """All combinations: the first varied field changes slowest, then the others, rates, seeds."""
    cells = []
    for values in itertools.product(*vary.values()):
        changes = dict(zip(vary, values, strict=True))
        for rate in rates or (None,):
            count = None if rate is None else num_requests
            cells += [Cell(changes, seed, rate, count) for seed in seeds]
    return cells


@dataclass(frozen=True, slots=True, repr=False)
class Swept(Answer):
    """A finished sweep.

    Attributes:
        documents: each cell's result in the grid's order, or its error.
        reused: how many cells were there before.
        summary: the file of the table.
        notes: what was done with the scenario's traces.
    """

    documents: tuple[Document, ...]
    reused: int
    summary: Path
    notes: tuple[str, ...] = ()

    @property
    def failed(self) -> int:
        """How many cells have an error instead of a result."""
        return sum("error" in document for document in self.documents)

    @property
    def exit_code(self) -> int:
        """2 if no cell could run, otherwise 0."""
        return 0 if self.failed < len(self.documents) else 2

    @property
    def table(self) -> pd.DataFrame:
        """A row a cell (and stage): what was varied, then the metrics, and the error where it failed."""
        rows = []
        for document in self.documents:
            cell = document["cell"]
            head = {**cell["changes"], "seed": cell["seed"]}
            if cell["request_rate"] is not None:
                head["request_rate"] = cell["request_rate"]
            if "error" in document:
                rows.append(head | {"error": document["error"]})
                continue
            for part in document["stages"]:
                rows.append(head | {"stage": part["stage"]} | measured(part))
            if not document["stages"]:
                rows.append(head | measured(document))
        return pd.DataFrame(rows)

    def to_json(self) -> dict[str, Any]:
        """The table's rows, and how the cells fared."""
        return {
            "cells": len(self.documents),
            "reused": self.reused,
            "failed": self.failed,
            "summary": str(self.summary),
            "notes": list(self.notes),
            "rows": _without_nan(self.table).to_dict("records"),
        }

    def to_text(self) -> str:
        """The table with its main columns, and how the cells fared."""
        found = self.table
        varied = dict.fromkeys(name for document in self.documents for name in document["cell"]["changes"])
        shown = [*dict.fromkeys([*varied, "request_rate", "seed", "stage", *_COLUMNS])]
        columns = [name for name in shown if name in found and found[name].notna().any()]
        return (
            f"{table(columns, _without_nan(found[columns]).to_numpy().tolist())}\n"
            f"{len(self.documents)} cells, {self.reused} were there already, {self.failed} failed\n"
            f"Summary: {self.summary}" + "".join(f"\nnote: {note}" for note in self.notes)
        )


def _without_nan(found: pd.DataFrame) -> pd.DataFrame:
    return found.astype(object).where(found.notna(), None)


def sweep(
    scenario: Scenario,
    vary: Mapping[str, Sequence[Any]] | None = None,
    *,
    rates: Sequence[float] = (),
    num_requests: int = 1000,
    seeds: int = 1,
    out: Path | str = "out/sweep",
    resume: bool = False,
    progress: bool = False,
    **workers: Any,
) -> Swept:
    """Run a grid of what-ifs, in parallel.

    Writes each cell's result as soon as it is done, and ``summary.csv`` at the end. Results do not depend on
    where they are made. A cell whose input is wrong is recorded with its message, and the others go on.

    Args:
        vary: fields by their dotted paths and their values, for all combinations.
        rates: requests/s of the traffic that ``plan`` probes, instead of the scenario's own workload.
        num_requests: how many at each rate.
        seeds: how many seeds to run each cell with, from the scenario's on.
        out: folder of the results; a file is named after its cell's `fingerprint`.
        resume: leave alone the cells that are there; those that failed are tried again.
        progress: show how far it is.
        workers: where they run, as in `Workers`: jobs, backend, dask_scheduler.

    Raises:
        InputError: nothing varies, the backend is not there, or a file cannot be written.
    """
    if not vary and not rates and seeds == 1:
        what = "nothing varies"
        raise InputError(what, where="--vary", fix="Write for example engine.max_num_seqs=64,128.")
    for value, flag in ((seeds, "--seeds"), (num_requests, "--num-requests")):
        if value < 1:
            raise InputError(f"{value} is too few", where=flag, fix="Give at least 1.")
    out = Path(out)
    check_output(out / "summary.csv", where="--out")
    numbers = range(scenario.seed, scenario.seed + seeds)
    cells = grid(vary or {}, seeds=numbers, rates=rates, num_requests=num_requests)
    with progress_bar("sweep", shown=progress) as advance:
        show = lambda done: advance(done / len(cells), f"{done} of {len(cells)} cells")  # noqa: E731
        swept = _run(scenario, cells, out, resume=resume, workers=Workers(**workers), progress=show)
    write_table(swept.summary, swept.table)
    return replace(swept, notes=tuple(_trace_notes(scenario, rates, num_requests)))


def _trace_notes(scenario: Scenario, rates: Sequence[float], num_requests: int) -> list[str]:
    """What was done with the scenario's traces, nothing where it has no traffic at one rate."""
    try:
        return trace_notes(at_rate(scenario, rates[0], num_requests) if rates else scenario.stages())
    except InputError:  # which the cells tell
        return []


def _run(
    scenario: Scenario,
    cells: Sequence[Cell],
    out: Path,
    *,
    resume: bool,
    workers: Workers,
    progress: Callable[[int], None],
) -> Swept:
    documents: dict[int, Document] = {}
    waiting: list[tuple[int, Cell, Scenario]] = []
    names: dict[int, Path] = {}

    def keep(index: int, document: Document) -> None:
        documents[index] = document
        write_result(names[index], document)
        progress(len(documents))

    for index, cell in enumerate(cells):
        try:
            changed = scenario.changed(cell.changes)
            names[index] = out / f"{fingerprint({'cell': cell.to_json()}, changed)}.json"
        except InputError as error:
            names[index] = out / f"{fingerprint({'cell': cell.to_json()}, None)}.json"
            keep(index, {"cell": cell.to_json(), "error": str(error)})
            continue
        found = kept(names[index]) if resume else None
        if found is None:
            waiting.append((index, cell, changed))
        else:
            documents[index] = found
    reused = len(cells) - len(waiting) - sum("error" in each for each in documents.values())
    with parallel(workers) as run:
        for index, document in run(delayed(_simulate)(*each) for each in waiting):
            keep(index, document)
    return Swept(tuple(documents[index] for index in range(len(cells))), reused, out / "summary.csv")


def _simulate(index: int, cell: Cell, scenario: Scenario) -> tuple[int, Document]:
    try:
        rate, count = cell.request_rate, cell.num_requests or 0
        document = simulate(scenario, seed=cell.seed, request_rate=rate, num_requests=count).result
    except InputError as error:
        document = {"error": str(error)}
    return index, {"cell": cell.to_json(), **document}
