"""``servecast sweep``."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from servecast.sim.cli.options import WhatIf, assignments, check_jobs, numbers
from servecast.sim.cli.output import print_json, print_table, progress_bar
from servecast.sim.inputs.errors import InputError

if TYPE_CHECKING:
    from servecast.sim.scenario.scenario import Scenario

_COLUMNS = ("request_throughput", "output_throughput", "p95_ttft_ms", "p95_tpot_ms", "p95_e2el_ms", "error")


def sweep(
    scenario: str,
    /,
    *,
    vary: list[str] | None = None,
    rates: str | None = None,
    num_requests: int = 1000,
    seeds: int = 1,
    out: Path = Path("out/sweep"),
    resume: bool = False,
    jobs: int = -1,
    backend: Literal["loky", "dask", "ray"] = "loky",
    dask_scheduler: str | None = None,
    json: bool = False,
    what_if: WhatIf = WhatIf(),  # noqa: B008 (frozen)
) -> int:
    """Run a grid of what-ifs, in parallel.

    Writes a result for each cell as soon as it is done, and summary.csv at the end. A cell whose input is
    wrong is recorded with its message; exits 2 only if all are.

    Args:
        scenario: a shipped scenario's name, or a YAML file.
        vary: a field and its values, as engine.max_num_seqs=64,128,256. Can be repeated, for all
            combinations.
        rates: requests a second, as 5,10,20, of the traffic that plan probes, instead of the scenario's
            own workload.
        num_requests: how many requests at each rate.
        seeds: how many seeds to run each cell with, from --seed on.
        out: folder for the results.
        resume: run only the cells that are not there yet.
        jobs: processes; -1 is one for each core. Results do not depend on it.
        backend: where they run.
        dask_scheduler: address of the scheduler for --backend dask, as tcp://127.0.0.1:8786.
        json: print one JSON object and nothing else.
    """
    varied = dict(assignments(text) for text in vary or ())
    if not varied and rates is None and seeds == 1:
        raise InputError(
            "nothing varies", where="--vary", fix="Write for example engine.max_num_seqs=64,128."
        )
    check_jobs(jobs)
    for value, flag in ((seeds, "--seeds"), (num_requests, "--num-requests")):
        if value < 1:
            raise InputError(f"{value} is too few", where=flag, fix="Give at least 1.")
    at = numbers(rates, where="--rates") if rates is not None else ()
    loaded, changes = what_if.load(scenario)

    from servecast.sim.compare import sweep as sweeping
    from servecast.sim.run.results import check_output

    check_output(out / "summary.csv", where="--out")
    cells = sweeping.grid(
        varied,
        seeds=[loaded.seed + number for number in range(seeds)],
        rates=at,
        num_requests=num_requests,
    )
    with progress_bar("sweep") as advance:
        swept = sweeping.sweep(
            partial(_reload, what_if, scenario),
            cells,
            out,
            what_if=changes,
            resume=resume,
            jobs=jobs,
            backend=backend,
            dask_scheduler=dask_scheduler,
            progress=lambda done, total: advance(done / total, f"{done} of {total} cells"),
        )
    summary = out / "summary.csv"
    table = swept.table()
    if json:
        print_json(
            {
                "cells": len(cells),
                "reused": swept.reused,
                "failed": swept.failed,
                "summary": str(summary),
                "rows": table.astype(object).where(table.notna(), None).to_dict("records"),
            }
        )
    else:
        shown = [*dict.fromkeys([*varied, "request_rate", "seed", "stage", *_COLUMNS])]
        columns = [name for name in shown if name in table and table[name].notna().any()]
        rows = table[columns].astype(object).where(table[columns].notna(), None)
        print_table(columns, rows.to_numpy().tolist())
        print(f"{len(cells)} cells, {swept.reused} were there already, {swept.failed} failed")
        print(f"Summary: {summary}")
    if swept.failed < len(cells):
        return 0
    print(f"servecast: no cell could run; the first: {swept.documents[0]['error']}", file=sys.stderr)
    return 2


def _reload(what_if: WhatIf, name: str, changes: Mapping[str, Any]) -> Scenario:
    return what_if.load(name, changes)[0]
