"""``servecast validate split``: routers judged by the replicas behind them."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from servecast.calibrate.measure.folder import say
from servecast.calibrate.measure.vllm.ending import sigterm_as_ctrl_c
from servecast.sim.cli.options import WhatIf
from servecast.sim.cli.output import print_json
from servecast.sim.run.results import write_result
from servecast.validate.compare.text import verdict_text
from servecast.validate.compare.verdict import Verdict
from servecast.validate.live.own_server import OwnServer, model_folder
from servecast.validate.live.result import new_result
from servecast.validate.live.split import Split, document, judge


def split(
    scenario: str,
    /,
    *vllm_flags: Annotated[str, Parameter(allow_leading_hyphen=True)],
    serve: Path,
    routers: str = "round_robin,prefix_affinity",
    request_rate: float,
    num_requests: int = 400,
    vllm_python: Path | None = None,
    out: Path | None = None,
    json: bool = False,
    what_if: WhatIf = WhatIf(),  # noqa: B008 (frozen)
) -> int:
    """Split one workload over real replicas as simulated routers would, and see which serves it better.

    Starts the scenario's replicas on this machine, each with its share of the GPU's memory (say so in the
    scenario's engine), and sends every router's split with one vllm bench serve a replica. Exits 0 when each
    router has the prefix cache hits that were predicted, within 2 points, and they rank as predicted, 1 when
    not, 3 when it cannot be told. What was measured is in result.json after each router.

    Args:
        scenario: a shipped scenario's name, or a YAML file, with fleet.replicas.
        vllm_flags: after --, further flags of vllm serve.
        serve: folder of the model to serve.
        routers: two or more routing policies, separated by commas.
        request_rate: requests/s over all replicas.
        num_requests: of the traffic.
        vllm_python: Python of an environment with vLLM; the one that runs this without it.
        out: folder for predictions, traces, results and logs (out/split-NAME), without an earlier result.
        json: print one JSON object and nothing else.
    """
    loaded = what_if.load(scenario)
    folder = out or Path("out") / f"split-{loaded.name}"
    path = new_result(folder)
    python = str(vllm_python or sys.executable)
    found = Split(
        loaded,
        OwnServer(model_folder(serve), vllm_flags, python),
        routers.split(","),
        folder,
        request_rate,
        num_requests,
        seed=loaded.seed,
        python=python,
        say=say,
        after_router=partial(_keep, path),
    )
    with sigterm_as_ctrl_c():
        found.run()
    verdict, kept = _keep(path, found)
    if json:
        print_json(kept)
    else:
        print_split(found, verdict)
        print(f"written: {path}")
    return verdict.exit_code


def _keep(path: Path, found: Split) -> tuple[Verdict, dict[str, Any]]:
    verdict = judge(found)
    kept = document(found, verdict)
    write_result(path, kept)
    return verdict, kept


def print_split(split: Split, verdict: Verdict) -> None:
    """Each router's figures as predicted and measured, which is best at each, and the verdict."""
    for router, row in split.measured.items():
        for figure, value in row["measured"].items():
            print(f"{router:20} {figure:16} predicted {row['predicted'][figure]:9.4g} measured {value:9.4g}")
    for figure, best in split.ranking().items():
        print(f"best {figure:16} predicted {best['predicted'] or '-'}, measured {best['measured'] or '-'}")
    print(verdict_text(verdict))
