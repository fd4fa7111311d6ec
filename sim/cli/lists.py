"""``servecast scenarios``, ``gpus``, ``models`` and ``profiles``."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from servecast.sim.cli.output import print_json
from servecast.sim.report.text import table
from servecast.sim.scenario import lists
from servecast.sim.scenario.scenario import load, shipped_scenarios


def scenarios(*, json: bool = False) -> None:
    """List the scenarios that come with servecast.

    Args:
        json: print a JSON object instead of a table.
    """
    found = {name: load(name).description.strip() for name in shipped_scenarios()}
    if json:
        print_json({"scenarios": found})
    else:
        print(table(["scenario", "description"], [[name, text] for name, text in found.items()]))


def gpus(*, json: bool = False) -> None:
    """List the GPUs of the catalogue, and what a scenario without a profile rests on for each.

    Args:
        json: print a JSON object instead of a table, with the source of each GPU's figures.
    """
    _show("gpus", lists.gpus(), json, without=("source",))


def models(*, json: bool = False) -> None:
    """List the models that come with servecast, and the families whose config.json it reads.

    Args:
        json: print a JSON object instead of a table.
    """
    found, families = lists.models(), lists.families()
    if json:
        print_json({"models": _records(found), "families": _records(families), "refused": lists.refused()})
        return
    by_reason: dict[str, list[str]] = {}
    for model_type, why in lists.refused().items():
        by_reason.setdefault(why, []).append(model_type)
    print(
        _text(found), "", "Families whose config.json is read, of multimodal models the text part:", sep="\n"
    )
    print(_text(families), "", "Refused by name:", sep="\n")
    for why, types in by_reason.items():
        print(f"  {', '.join(types)}: {why}")


def profiles(*, json: bool = False) -> None:
    """List the profiles that come with servecast: their GPU, model and server, and how far each is off.

    Args:
        json: print a JSON object instead of a table.
    """
    _show("profiles", lists.profiles(), json)


def _show(name: str, found: pd.DataFrame, json: bool, without: Sequence[str] = ()) -> None:
    """Print a table, or all of it as JSON. without: columns that are not printed as text."""
    if json:
        print_json({name: _records(found)})
    else:
        print(_text(found.drop(columns=list(without))))


def _records(found: pd.DataFrame) -> list[dict[str, object]]:
    return [
        {str(name): value for name, value in row.items()}
        for row in found.astype(object).where(found.notna(), None).to_dict("records")
    ]


def _text(found: pd.DataFrame) -> str:
    names = [str(name) for name in found]
    return table(names, [[row[name] for name in names] for row in _records(found)])
