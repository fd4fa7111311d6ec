"""``servecast check``."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from servecast.sim.cli.output import print_json, print_table
from servecast.sim.inputs.errors import InputError
from servecast.sim.inputs.yaml_file import read_yaml
from servecast.sim.scenario import scenario as scenarios
from servecast.validate.check.check import Checked
from servecast.validate.check.check import check as run_check
from servecast.validate.check.finding import Finding
from servecast.validate.check.from_results import from_results
from servecast.validate.check.from_scenario import from_scenario
from servecast.validate.check.from_table import Context, from_table
from servecast.validate.check.table import Report

_SHOWN_ROWS = 3


def check(
    report: str,
    /,
    *more: Path,
    context: Annotated[Context, Parameter(name="*")] = Context(),  # noqa: B008 (frozen)
    no_predict: bool = False,
    json: bool = False,
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
    for f in fields(context):
        number = getattr(context, f.name)
        if isinstance(number, int) and number < 1:
            raise InputError(f"is {number}", where=_flag(f.name), fix="Give a number from 1 on.")
    checked = run_check(_read(report, list(more), context), predict=not no_predict)
    if json:
        print_json(checked.to_json())
    else:
        _print(checked)
    return checked.exit_code


def _read(report: str, more: list[Path], context: Context) -> Report:
    path = Path(report)
    if all(_is_result(each) for each in (path, *more)):
        return from_results([path, *more], context)
    if more:
        raise InputError(
            "only result files come several at a time", where=str(more[0]), fix="Give one table or scenario."
        )
    if path.suffix == ".csv":
        return from_table(path, context)
    given = [f.name for f in fields(Context) if getattr(context, f.name) != f.default]
    if given:
        raise InputError(
            "a scenario says it itself",
            where=_flag(given[0]),
            fix="Leave it out, or change the scenario.",
        )
    return from_scenario(scenarios.load(report))


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _is_result(path: Path) -> bool:
    """Whether a file is a load generator's result: JSON, or YAML that is no scenario."""
    if path.suffix in (".yaml", ".yml") and path.is_file():
        return "schema_version" not in read_yaml(path)
    return path.suffix in (".json", ".jsonl")


def _print(checked: Checked) -> None:
    groups: dict[tuple[str, str, str], list[Finding]] = {}
    for finding in checked.findings:
        groups.setdefault((finding.rule, finding.level.table, finding.confidence), []).append(finding)
    rows = []
    for (rule, table, sure), found in groups.items():
        clearest = max(found, key=lambda finding: finding.weight)
        rows.append([rule, sure, f"{table}: {_cells(found)}", clearest.message])
    if rows:
        print_table(["rule", "sure", "cells", "what (the clearest)"], rows)
    asked = f"{checked.rows} rows, {len(checked.rules)} rules"
    if not checked.asked:
        print("Nothing in it can be checked: no latency, no two rates, no bound.")
    else:
        print(f"{len(checked.findings) or 'no'} findings ({asked})")
    for note in checked.report.notes:
        print(note)


def _cells(found: list[Finding]) -> str:
    """Columns and rows of the findings, the rows counted where they are many."""
    columns = dict.fromkeys(column for finding in found for column in finding.columns)
    labels = list(dict.fromkeys(finding.level.label for finding in found))
    rows = ", ".join(labels) if len(labels) <= _SHOWN_ROWS else f"{len(labels)} rows"
    return f"{', '.join(columns)} at {rows}"
