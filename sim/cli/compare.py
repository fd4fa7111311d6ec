"""``servecast compare``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from servecast.sim.cli.options import Load, WhatIf, check_jobs
from servecast.sim.cli.output import print_json
from servecast.sim.compare import compare as comparing
from servecast.sim.run.results import check_output
from servecast.sim.scenario.scenario import Scenario


def compare(
    *sides: str,
    routers: Annotated[list[str] | None, Parameter(consume_multiple=True)] = None,
    seeds: int = 5,
    stage: str | None = None,
    all_metrics: bool = False,
    report: Path | None = None,
    jobs: int = -1,
    json: bool = False,
    load: Load = Load(),  # noqa: B008 (frozen)
    what_if: WhatIf = WhatIf(),  # noqa: B008
) -> int:
    """Put two results, scenarios or routers side by side.

    Give two of: a result's .json file (of servecast simulate or vllm bench serve) and a scenario, which is
    simulated. Or one scenario with --routers to send the same traffic through each, or one scenario with
    what-ifs to compare it before and after. What was simulated on both sides is compared seed by seed.

    Args:
        sides: results or scenarios.
        routers: routing policies, and files of EndpointPickerConfigs, as round_robin precise.yaml.
        seeds: how many to simulate, from --seed on.
        stage: compare this stage alone, as concurrency=32.
        all_metrics: print all that the results have in common.
        report: write a single-file HTML report.
        jobs: processes; -1 is one for each core.
        json: print one JSON object and nothing else.
    """
    check_jobs(jobs)
    check_output(report, where="--report")
    chosen, labels = [_side(name, what_if) for name in sides], list(sides)
    if routers is None and len(sides) == 1 and what_if.changes() and isinstance(chosen[0], Scenario):
        chosen, labels = [_side(sides[0], WhatIf(seed=what_if.seed)), chosen[0]], [sides[0], "what-if"]
    found = comparing.compare(
        *chosen,
        routers=routers or (),
        labels=labels,
        seeds=seeds,
        stage=stage,
        request_rate=load.request_rate,
        num_requests=load.count,
        jobs=jobs,
        progress=sys.stderr.isatty(),
    )
    if report is not None:
        found.to_html(report)
    if json:
        print_json(found.to_json())
    else:
        print(found.to_text(all_metrics=all_metrics))
        if report is not None:
            print(f"\nwritten: {report}")
    return found.exit_code


def _side(name: str, what_if: WhatIf) -> Scenario | Path:
    return Path(name) if name.endswith(".json") else what_if.load(name)
