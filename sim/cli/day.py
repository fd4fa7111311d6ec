"""``servecast day``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from servecast.sim.cli.options import WhatIf
from servecast.sim.cli.output import show
from servecast.sim.inputs.errors import InputError
from servecast.sim.inputs.yaml_file import read_yaml
from servecast.sim.plan.day import HOUR_S
from servecast.sim.plan.day import day as run_day
from servecast.sim.run.results import check_output


def day(
    scenario: str,
    /,
    *,
    slo: list[str] | None = None,
    fleets: list[str] | None = None,
    period: float = HOUR_S,
    sample: float | None = None,
    size: bool = False,
    report: Path | None = None,
    json: bool = False,
    what_if: WhatIf = WhatIf(),  # noqa: B008
) -> int:
    """A day of traffic by the hour: load, latency, what is good, replicas, and what autoscalers make of it.

    Args:
        scenario: a shipped scenario's name, or a YAML file. Its workload is one stage: a trace, a rate
            profile.
        slo: an objective, as ttft:p95:500, in place of the scenario's. Can be repeated.
        fleets: a fleet to compare on the same traffic: a number of replicas, or a YAML file that holds an
            autoscaler, or a whole fleet. Can be repeated.
        period: seconds of a row.
        sample: simulate only the first so many seconds of each period, each from empty servers.
        size: find for each period the fewest replicas that keep the objectives.
        report: write an HTML page with the plots.
        json: print one JSON object and nothing else.
    """
    check_output(report, where="--report")
    if fleets and what_if.replicas is not None:
        where, fix = "--replicas", f"Give it as one of them: --fleets {what_if.replicas}."
        raise InputError(f"--replicas {what_if.replicas} beside fleets, which say their own", where, fix)
    found = run_day(
        what_if.load(scenario),
        _named(fleets) if fleets else None,
        slo=slo or (),
        period_s=period,
        sample_s=sample,
        size=size,
    )
    more = [] if report is None else [f"Report: {found.to_html(report)}"]
    return show(found, json=json, more=more)


def _named(texts: list[str]) -> dict[str, dict[str, Any]]:
    found = [_fleet(text) for text in texts]
    names = [name for name, _ in found]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"{name} comes twice", where="--fleets", fix="Give each fleet once.")
    return dict(found)


def _fleet(text: str) -> tuple[str, dict[str, Any]]:
    """A name, and what it changes in the scenario."""
    if text.isdecimal() and int(text):
        return f"{text} replicas", {"fleet.replicas": int(text), "fleet.autoscaler": None}
    path = Path(text)
    if not path.is_file():
        what = f"{text!r} is no number of replicas, and no file"
        raise InputError(what, where="--fleets", fix="Give 4, or hpa.yaml.")
    written = read_yaml(path)
    block = written.get("fleet", written)
    return path.stem, {"fleet.autoscaler": block} if "kind" in block else {
        f"fleet.{name}": value for name, value in block.items()
    }
