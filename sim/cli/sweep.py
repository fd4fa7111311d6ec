"""``servecast sweep``."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from cyclopts import Group, Parameter

from servecast.sim.cli.options import WhatIf, assignments, check_jobs, numbers, requests_at
from servecast.sim.cli.output import show
from servecast.sim.compare import sweep as sweeping
from servecast.sim.run.workers import Workers

WorkersFlags = Annotated[Workers, Parameter(name="*", group=Group("Workers", sort_key=9))]


def sweep(
    scenario: str,
    /,
    *,
    vary: list[str] | None = None,
    rates: str | None = None,
    num_requests: int | None = None,
    seeds: int = 1,
    out: Path = Path("out/sweep"),
    resume: bool = False,
    json: bool = False,
    workers: WorkersFlags = Workers(),  # noqa: B008 (frozen)
    what_if: WhatIf = WhatIf(),  # noqa: B008
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
        num_requests: how many requests at each rate, 1000 without it.
        seeds: how many seeds to run each cell with, from --seed on.
        out: folder for the results.
        resume: run only the cells that are not there yet.
        json: print one JSON object and nothing else.
    """
    check_jobs(workers.jobs)
    found = sweeping.sweep(
        what_if.load(scenario),
        dict(assignments(text) for text in vary or ()),
        rates=() if rates is None else numbers(rates, where="--rates"),
        num_requests=requests_at(rates, num_requests, "--rates"),
        seeds=seeds,
        out=out,
        resume=resume,
        progress=sys.stderr.isatty(),
        **asdict(workers),
    )
    code = show(found, json=json)
    if code:
        print(f"servecast: no cell could run; the first: {found.documents[0]['error']}", file=sys.stderr)
    return code
