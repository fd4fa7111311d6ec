"""A recorded run of LLMServingSim's bench: its latencies, and a profile and reported table made from it.

``python -m servecast.scenarios.make.recorded_run SCENARIO FOLDER --profile FILE --table FILE`` fits
efficiencies to ``FOLDER/profile`` (see ``fit_layers``) and two host times to the first requests of
``FOLDER/run``.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from cyclopts import App
from numpy.typing import NDArray
from scipy.optimize import least_squares

from servecast.calibrate.fit.layers import fit_layers
from servecast.sim.hardware.profile import Profile, Provenance
from servecast.sim.inputs.errors import InputError
from servecast.sim.inputs.files import write_whole
from servecast.sim.metrics.metrics import latencies
from servecast.sim.metrics.records import STEP_COLUMNS, Run
from servecast.sim.metrics.warmup import part_of
from servecast.sim.reproduce.values import measure
from servecast.sim.run.simulate import simulate
from servecast.sim.scenario.deployment import Deployment
from servecast.sim.scenario.reported import Reported
from servecast.sim.scenario.scenario import Scenario, load

FIRST = 60  # requests that host times are fitted to
_CLOCKS = ("arrival_time", "queued_ts", "scheduled_ts", "first_token_ts", "last_token_ts")
_LENGTHS = ("input_toks", "output_toks")


def read_run(folder: Path, workload: Path | None = None) -> Run:
    """The run in ``requests.jsonl`` of a folder, as a Run without steps.

    A request's ``arrival_time`` is read from the wall clock and the others from a monotonic one; the two are
    aligned where a request was queued soonest after it arrived.

    Args:
        folder: of the run.
        workload: what was sent, default ``workload.jsonl`` in the folder. Time 0 is its own.

    Raises:
        InputError: a file is missing, broken, or the two do not hold the same requests.
    """
    done, planned = _records(folder / "requests.jsonl"), _records(workload or folder / "workload.jsonl")
    rows = pd.DataFrame(done)
    offered = pd.DataFrame(planned)
    missing = [name for name in (*_CLOCKS, *_LENGTHS) if name not in rows]
    missing += [name for name in ("arrival_time_ns", *_LENGTHS) if name not in offered]
    if missing:
        raise InputError(f"no {missing[0]!r}", where=str(folder), fix="Give a run of LLMServingSim's bench.")
    gaps = [name for name in (*_CLOCKS, *_LENGTHS) if rows[name].isna().any()]
    if gaps:
        raise InputError(
            f"a request without {gaps[0]!r}", where=str(folder / "requests.jsonl"), fix="Remove it from both."
        )
    if len(rows) != len(offered) or (rows[[*_LENGTHS]] != offered[[*_LENGTHS]]).any(axis=None):
        raise InputError(
            "requests.jsonl and the workload hold different requests",
            where=str(folder),
            fix="Give the two files of one run.",
        )
    planned_s = offered["arrival_time_ns"] * 1e-9
    clocks = float((rows["queued_ts"] - rows["arrival_time"]).min())
    arrival = rows["arrival_time"] + clocks
    start = float((arrival - planned_s).median())
    requests = pd.DataFrame(
        {
            "request_id": rows.index,
            "stage": 0,
            "prompt_tokens": rows["input_toks"],
            "output_tokens": rows["output_toks"],
            "arrival": arrival - start,
            "sent": arrival - start,
            "queued": rows["queued_ts"] - start,
            "scheduled": rows["scheduled_ts"] - start,
            "first_token": rows["first_token_ts"] - start,
            "finish": rows["last_token_ts"] - start,
            "status": "finished",
        }
    )
    steps = pd.DataFrame({name: pd.Series(dtype=kind) for name, kind in STEP_COLUMNS.items()})
    return Run(requests, steps, pd.DataFrame({"stage": [], "gap": [], "weight": []}), ["stage 0"])


def _records(path: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise InputError(
            f"cannot be read ({error})", where=str(path), fix="Give a run of LLMServingSim's bench."
        ) from None


def table_of(run: Run, reported: Reported, deployment: Deployment) -> list[dict[str, str]]:
    """The reported table: the values of its columns on a run, for all requests and for each of its parts."""
    key = reported.keys[0]
    rows: list[tuple[Mapping[str, Any], Run]] = [({key: "all"}, run)]
    rows += [(part.row, part_of(run, *part.requests)) for part in reported.parts]
    return [
        {key: str(keys[key])}
        | {
            name: f"{measure(part, column, reported, deployment):.6g}"
            for name, column in reported.columns.items()
        }
        for keys, part in rows
    ]


@dataclass(frozen=True, slots=True)
class HostFit:
    """Host times, s. host_fixed_s: per step. cold_start_s: before the first step (``fleet.cold_start_s``)."""

    host_fixed_s: float
    cold_start_s: float


def fit_host(scenario: Scenario, profile: Profile, run: Run, *, first: int = FIRST) -> HostFit:
    """Fit the two host times to mean TTFT and mean TPOT of the first requests sent, through the simulator.
    The traffic of the others is simulated, their latencies are not looked at."""

    def means(of: Run) -> NDArray[np.float64]:
        values = latencies(of.requests.nsmallest(first, "sent"))
        return np.array([values["ttft"].mean(), values["tpot"].mean()])

    measured = means(run)

    def misfit(point: NDArray[np.float64]) -> NDArray[np.float64]:
        fleet = scenario.fleet.model_copy(update={"cold_start_s": float(point[1])})
        started = scenario.model_copy(update={"fleet": fleet})
        efficiencies = replace(profile.efficiencies, host_fixed_s=float(point[0]) * 1e-3)
        deployment = Deployment.of(started, profile.model_copy(update={"efficiencies": efficiencies}))
        predicted = simulate(deployment)
        return np.log(means(predicted) / measured)

    start = [profile.efficiencies.host_fixed_s * 1e3, 0.3]  # ms and s: of about one size
    found = least_squares(misfit, start, bounds=([0.0, 0.0], [10.0, 10.0]), diff_step=0.05)
    return HostFit(host_fixed_s=float(found.x[0]) * 1e-3, cold_start_s=float(found.x[1]))


app = App(help="Make a scenario's profile and reported table from LLMServingSim's data.")


@app.default
def main(scenario: str, folder: Path, *, profile: Path, table: Path) -> None:
    """Write the profile and the first reported table of a scenario, and print its cold start.

    Args:
        scenario: a shipped scenario's name, or a YAML file.
        folder: with profile/ and run/.
        profile, table: where they are written.
    """
    loaded = load(scenario)
    reported, run = loaded.reported[0], read_run(folder / "run")
    fitted = fit_layers(folder / "profile", loaded)
    host = fit_host(loaded, fitted, run)
    note = f"to the first {FIRST} requests of the run"
    made = fitted.model_copy(
        update={
            "efficiencies": replace(fitted.efficiencies, host_fixed_s=host.host_fixed_s),
            "provenance": tuple(
                Provenance(parameter=entry.parameter, origin="fitted", note=note)
                if entry.parameter == "efficiencies.host_fixed_s"
                else entry
                for entry in fitted.provenance
            ),
            "fitted_rows": tuple(str(row) for row in reported.fit_rows),
        }
    )
    rows = table_of(run, reported, Deployment.of(loaded, made))
    made.save(profile)
    write_whole(table, lambda partial: _write(partial, rows))
    print(f"fleet.cold_start_s: {host.cold_start_s:.4g}, {note}")


def _write(path: Path, rows: list[dict[str, str]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    app()
