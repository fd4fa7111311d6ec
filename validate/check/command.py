"""``servecast check``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from cyclopts import Group, Parameter

from servecast.sim.cli.output import show
from servecast.validate.check import check as checking
from servecast.validate.check.from_table import Context

About = Annotated[Context, Parameter(name="*", group=Group("What a table or a result does not say"))]


def check(
    report: str,
    /,
    *more: Path,
    no_predict: bool = False,
    json: bool = False,
    about: About = Context(),  # noqa: B008 (frozen)
) -> int:
    """Can this benchmark report be true?

    Asks Little's law, sums of latencies, tokens against requests, rooflines, KV arithmetic, the order of
    percentiles, warm-up, drain and clocks, and sets a scenario's reports against the prediction. Exits 0
    without findings, 1 with, 2 when the report cannot be read, 3 when it has nothing that can be checked.

    Args:
        report: a scenario (a shipped one's name or a YAML file) with reported tables, a CSV table, or a
            result's JSON.
        more: further result files, one a level of load.
        no_predict: leave out the comparison with the prediction.
        json: print one JSON object and nothing else.
    """
    return show(checking.check(report, *more, predict=not no_predict, **asdict(about)), json=json)
