"""The profiles of the ``infer`` server's three phases, fitted to the few rows that its scenarios name for it.

``python -m servecast.scenarios.make.infer_profiles FOLDER`` writes one for each model and phase. What each
row determines, through the simulator:

- ``baseline`` of a model and phase, one request at a time: the fixed costs of a decode and of a prefill pass
- ``continuous_batching`` of a model under static batching: the cost of a decoding row
- ``chunked_prefill`` of the first model under static batching, with long rows: how often the KV crosses the
  memory bus, shared by all models and phases
- ``paged_attention`` of the first model under paged batching: what a row costs more under continuous
  batching. There every row's KV is written on its own, layer by layer, to slots as to pages, so both
  continuous engines and all models share this cost, a layer

The share of the peak FLOP/s is not fitted.
"""

from __future__ import annotations

import datetime
import hashlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
from cyclopts import App
from numpy.typing import NDArray
from scipy.optimize import least_squares

from servecast.sim.hardware.profile import Domain, Profile, Provenance
from servecast.sim.hardware.step_time.padded import PaddedCosts
from servecast.sim.reproduce.reproduce import reproduce
from servecast.sim.reproduce.variants import variants_of
from servecast.sim.scenario.deployment import Deployment
from servecast.sim.scenario.reported import Reported, matches, read_rows
from servecast.sim.scenario.scenario import Scenario, load
from servecast.sim.traffic.spec import Row, Workload

SCENARIOS = {  # by engine policy
    "static": "infer-rtx5080-static",
    "contiguous": "infer-rtx5080-continuous",
    "paged": "infer-rtx5080-paged",
}
COMPUTE = 100 / 112.6  # prompt tokens at about 100 TFLOP/s
FITTED = ("throughput_tok_s", "latency_p50_s")  # TTFT follows them under load, ITL is rounded to whole ms
_BAND_METRICS = (*FITTED, "ttft_p50_ms", "itl_p50_ms")
_BAND_SHARE = 0.9

Vector = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Server:
    """One model in one phase. reported: the table's rows of this model, as its scenario has them."""

    scenario: Scenario
    reported: Reported
    deployment: Deployment

    @property
    def fit_rows(self) -> list[Row]:
        """Keys of the rows that a fit may use."""
        return [row.keys for row in read_rows(self.reported) if row.fit]

    def measured(self, costs: PaddedCosts, workload: str, columns: tuple[str, ...]) -> Vector:
        """Reported and predicted values of a row that a fit may use, shape (columns, 2)."""
        (keys,) = (row for row in self.fit_rows if row["workload"] == workload)
        stages = self.scenario.workload_of(self.reported).stages
        stage = next(stage for stage in stages if stage.row and matches(keys, stage.row))
        table = {"rows": (keys,), "fit_rows": (), "excluded": (), "workload": Workload(stages=(stage,))}
        alone = self.scenario.model_copy(update={"reported": (self.reported.model_copy(update=table),)})
        found = reproduce(
            alone, seeds=1, profile=self.deployment.profile.model_copy(update={"padded": costs})
        )
        cells = {cell.metric: (cell.reported, cell.predicted) for cell in found.tables[0].cells}
        return np.array([cells[column] for column in columns])

    def misfit(self, costs: PaddedCosts, workload: str) -> list[float]:
        """Logarithms of predicted over reported."""
        values = np.log(self.measured(costs, workload, FITTED))
        return [float(value) for value in values[:, 1] - values[:, 0]]

    def with_baseline(self, costs: PaddedCosts) -> PaddedCosts:
        """With the fixed costs that give the baseline's TTFT and latency, which are linear in them."""
        values = self.measured(costs, "baseline", ("ttft_p50_ms", "latency_p50_s"))
        ttft, latency = values[:, 0] - values[:, 1]
        (stage,) = (s for s in self.scenario.stages().stages if s.row == {"workload": "baseline"})
        tokens = stage.streams[0].output_tokens
        assert tokens is not None
        decodes = int(tokens.draw(1, np.random.default_rng(0))[0]) - 1
        return replace(
            costs,
            prefill_s=max(0.0, costs.prefill_s + ttft / 1000),
            step_s=max(0.0, costs.step_s + (latency - ttft / 1000) / decodes),
        )


def fit_padded(say: Callable[[str], None] = lambda _text: None) -> dict[str, Profile]:
    """The profiles of all models and phases, by the names under which the scenarios look for them.

    Args:
        say: called with what is being done.
    """
    phases = {policy: _servers(load(name)) for policy, name in SCENARIOS.items()}
    first, *others = phases["static"]
    costs: dict[tuple[str, str], PaddedCosts] = {}

    say(f"{first}: cost of a row, and passes of the KV")
    start = PaddedCosts(compute=COMPUTE)
    server = phases["static"][first]

    def first_model(x: Vector) -> PaddedCosts:
        return server.with_baseline(replace(start, row_s=x[0], kv_passes=x[1]))

    found = _solve(
        first_model,
        lambda c: server.misfit(c, "continuous_batching") + server.misfit(c, "chunked_prefill"),
        (start.row_s, start.kv_passes),
        low=(0.0, 1.0),
    )
    costs["static", first] = found
    start = replace(start, kv_passes=found.kv_passes)
    for model in others:
        say(f"{model}: cost of a row")
        costs["static", model] = _row_cost(phases["static"][model], start, "continuous_batching")

    say(f"{first}: what a row costs more under continuous batching")
    paged = _row_cost(phases["paged"][first], costs["static", first], "paged_attention")
    more = paged.row_s - costs["static", first].row_s
    layers = phases["paged"][first].deployment.model.layers
    for policy in ("contiguous", "paged"):
        for model, server in phases[policy].items():
            say(f"{model}, {policy}: fixed costs")
            static = costs["static", model]
            row_s = static.row_s + more * server.deployment.model.layers / layers
            costs[policy, model] = server.with_baseline(replace(static, row_s=row_s))

    profiles = {
        str(server.scenario.profile): _profile(server, policy, costs[policy, model], phases)
        for policy, servers in phases.items()
        for model, server in servers.items()
    }
    for policy in SCENARIOS:
        say(f"{policy}: error band")
        band = _error_band(phases[policy], profiles)
        for server in phases[policy].values():
            key = str(server.scenario.profile)
            profiles[key] = profiles[key].model_copy(update={"error_band": band})
    return profiles


def _servers(scenario: Scenario) -> dict[str, Server]:
    """The models of a scenario's main table, by their name in it."""
    found: dict[str, Server] = {}
    for row, alone in variants_of(scenario, scenario.reported[0]):
        if set(row) == {"model"}:
            unfitted = Profile.typical("", "", "", servecast_version=version("servecast"), kind="padded")
            found[str(row["model"])] = Server(alone, alone.reported[0], Deployment.of(alone, unfitted))
    return found


def _solve(
    costs: Callable[[Vector], PaddedCosts],
    misfit: Callable[[PaddedCosts], list[float]],
    start: tuple[float, ...],
    low: tuple[float, ...],
) -> PaddedCosts:
    found = least_squares(
        lambda x: misfit(costs(x)), start, bounds=(low, np.inf), x_scale=np.array(start), diff_step=0.02
    )
    return costs(found.x)


def _row_cost(server: Server, start: PaddedCosts, workload: str) -> PaddedCosts:
    return _solve(
        lambda x: server.with_baseline(replace(start, row_s=x[0])),
        lambda costs: server.misfit(costs, workload),
        (start.row_s,),
        low=(0.0,),
    )


def _profile(
    server: Server, policy: str, costs: PaddedCosts, phases: dict[str, dict[str, Server]]
) -> Profile:
    deployment, static = server.deployment, SCENARIOS["static"]
    first = next(iter(phases["static"]))
    rows = phases["static" if policy == "static" else "paged"][first].deployment.config.max_num_seqs
    row = f"to continuous_batching of {static}"
    if policy != "static":
        row += f", and to {first}'s paged_attention of {SCENARIOS['paged']}"
    notes = {
        "step_s": "to the baseline's latency",
        "row_s": row,
        "kv_passes": f"to {first}'s chunked_prefill of {static}",
        "prefill_s": "to the baseline's TTFT",
    }
    return Profile(
        servecast_version=version("servecast"),
        kind="padded",
        gpu=deployment.gpu.name,
        model=deployment.model.name,
        engine_version=server.scenario.engine.version,
        date=datetime.date.today(),
        padded=costs,
        domain=Domain(batch=(1.0, float(rows))),
        provenance=(
            *(Provenance(parameter=f"padded.{n}", origin="fitted", note=note) for n, note in notes.items()),
            Provenance(parameter="padded.compute", origin="assumed", note="about 100 TFLOP/s"),
        ),
        fitted_rows=tuple(str(row) for row in server.fit_rows),
        raw_data_sha256=hashlib.sha256(server.reported.table.read_bytes()).hexdigest(),
    )


def _error_band(servers: dict[str, Server], profiles: dict[str, Profile]) -> float:
    """What holds nine of ten predicted medians and throughputs of the phase's table."""
    errors = [
        abs(cell.error)
        for server in servers.values()
        for cell in reproduce(server.scenario, seeds=1, profile=profiles[str(server.scenario.profile)])
        .tables[0]
        .cells
        if cell.used == "predicted" and cell.metric in _BAND_METRICS and cell.error is not None
    ]
    return float(np.quantile(errors, _BAND_SHARE))


app = App(help="Fit the profiles of the infer server.")


@app.default
def main(folder: Path) -> None:
    """Write a profile for each model and phase, which takes about a minute.

    Args:
        folder: where they are written.
    """
    for name, profile in fit_padded(say=lambda text: print(text, file=sys.stderr)).items():
        profile.save(folder / f"{name}.json")


if __name__ == "__main__":
    app()
