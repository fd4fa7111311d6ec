"""``servecast scenarios``."""

from __future__ import annotations

from servecast.sim.cli.output import print_json
from servecast.sim.report.text import table
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
