"""``servecast explain``."""

from __future__ import annotations

from servecast.sim.cli.options import Load, WhatIf
from servecast.sim.cli.output import show
from servecast.sim.run import explain as explaining


def explain(
    scenario: str,
    /,
    *,
    statistic: str = "p95",
    stage: str | None = None,
    json: bool = False,
    load: Load = Load(),  # noqa: B008 (frozen)
    what_if: WhatIf = WhatIf(),  # noqa: B008
) -> int:
    """Why is the first token slow?

    Runs a scenario once and takes its slowest first tokens apart: the queue at max_num_seqs, for KV blocks or
    for a step's tokens, the client's own limit, prefill, front end, cold start. Names the largest, with the
    numbers and the flag that would change it.

    Args:
        scenario: a shipped scenario's name, or a YAML file.
        statistic: of TTFT: p95 and the like take the requests that wait as long or longer, mean takes all.
        stage: which, by its name, as concurrency=32. Without it, that whose TTFT is longest.
        json: print one JSON object and nothing else.
    """
    found = explaining.explain(
        what_if.load(scenario),
        statistic=statistic,
        request_rate=load.request_rate,
        num_requests=load.count,
        stage=stage,
    )
    return show(found, json=json)
