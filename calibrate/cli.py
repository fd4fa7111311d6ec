"""``servecast calibrate``: measurements or reports in, a profile out."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from servecast.calibrate.from_report import fit_report
from servecast.sim.profile import Profile
from servecast.sim.scenario import load

app = App(name="calibrate", help="Fit a profile, or show what one says and where it ends.")


@app.command
def fit(
    scenario: str,
    *,
    from_report: Annotated[bool, Parameter(negative=())],
    output: Path,
    json_: Annotated[bool, Parameter(name="--json", negative=())] = False,
) -> None:
    """Fit a profile to the reported rows that a scenario names for it (reported.0.fit_rows).

    Args:
        scenario: a shipped scenario's name, or a YAML file.
        from_report: fit to the scenario's reported table, through the simulator. Takes a few minutes.
        output: where the profile is written.
        json_: print the fitted cells as JSON.
    """
    found = fit_report(load(scenario), progress=lambda text: print(text, file=sys.stderr))
    found.profile.save(output)
    if json_:
        print(json.dumps({"profile": str(output), "rows": [cell.to_json() for cell in found.cells]}))
        return
    for cell in found.cells:
        row = " ".join(f"{key}={value}" for key, value in cell.keys.items())
        error = "" if cell.error is None else f"{100 * cell.error:+.1f} %"
        print(f"{row:20} {cell.metric:16} reported {cell.reported:9.4g} fitted {cell.predicted:9.4g} {error}")
    print(f"profile written to {output}")


@app.command
def show(profile: Path, *, json_: Annotated[bool, Parameter(name="--json", negative=())] = False) -> None:
    """Print what a profile says: parameters with their origin, domain, error band.

    Args:
        profile: a profile's JSON file.
        json_: print it as JSON.
    """
    loaded = Profile.load(profile)
    if json_:
        print(loaded.model_dump_json(indent=2))
        return
    print(f"{loaded.model} on {loaded.gpu}, vLLM {loaded.engine_version}, {loaded.dtype}, {loaded.date}")
    for entry in loaded.provenance:
        group, _, name = entry.parameter.partition(".")
        value = getattr(getattr(loaded, group), name)
        print(f"  {entry.parameter:32} {value:<12.4g} {entry.origin}: {entry.note}")
    for name in ("tokens", "batch", "context"):
        span = getattr(loaded.domain, name)
        print(f"  domain {name:25} {'not restricted' if span is None else f'{span[0]:g} to {span[1]:g}'}")
    band = "not known" if loaded.error_band is None else f"+-{100 * loaded.error_band:.0f} %"
    print(f"  error band {band}; fitted rows: {', '.join(loaded.fitted_rows) or 'none'}")
