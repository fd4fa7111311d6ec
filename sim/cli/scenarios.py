"""``servecast scenarios``."""

from __future__ import annotations

from servecast.sim.cli.output import print_json, print_table


def scenarios(*, json: bool = False) -> None:
    """List the scenarios that come with servecast.

    Args:
        json: print a JSON object instead of a table.
    """
    from servecast.sim.scenario.scenario import load, shipped_scenarios

    found = {name: load(name) for name in shipped_scenarios()}
    if json:
        print_json({"scenarios": {name: each.description.strip() for name, each in found.items()}})
        return
    rows = [[name, each.description.strip()] for name, each in found.items()]
    print_table(["scenario", "description"], rows)
