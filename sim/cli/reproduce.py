"""``servecast reproduce``."""

from __future__ import annotations

from pathlib import Path

from servecast.sim.cli.options import WhatIf, check_jobs
from servecast.sim.cli.output import show
from servecast.sim.reproduce import reproduce as reproduction
from servecast.sim.run.results import check_output, write_result


def reproduce(
    scenario: str,
    /,
    *,
    jobs: int = -1,
    output: Path | None = None,
    json: bool = False,
    what_if: WhatIf = WhatIf(),  # noqa: B008 (frozen)
) -> int:
    """Compare predictions with a reported benchmark, cell by cell.

    Says which rows were used to fit the profile and which are predicted, and the error of each metric.
    Exits 0 once that is computed, whatever the error.

    Args:
        scenario: a shipped scenario's name, or a YAML file, with a reported table.
        jobs: processes; -1 is one for each core. Results do not depend on it.
        output: write the result as JSON, as --json prints it.
        json: print one JSON object and nothing else.
    """
    check_jobs(jobs)
    check_output(output, where="--output")
    found = reproduction.reproduce(what_if.load(scenario), jobs=jobs)
    if output is not None:
        write_result(output, found.to_json())
    return show(found, json=json, more=() if output is None else [f"written: {output}"])
