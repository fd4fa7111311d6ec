"""From layer timing tables to a profile: the tables as they are, or the physical model fitted to them."""

from __future__ import annotations

import datetime
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

from servecast.calibrate.fit.check import REGION_LIMIT, beyond, region_error
from servecast.calibrate.fit.layer_tables import read_layer_tables
from servecast.sim.hardware.fit_summary import FitSummary
from servecast.sim.hardware.profile import Domain, Profile, Provenance
from servecast.sim.hardware.shard import Shard
from servecast.sim.hardware.step_time.layers import LayeredStepTime
from servecast.sim.hardware.step_time.physical import Efficiencies, PhysicalStepTime
from servecast.sim.inputs.errors import InputError
from servecast.sim.metrics.binding import StepRow
from servecast.sim.scenario.deployment import Deployment
from servecast.sim.scenario.scenario import Scenario

Floats = NDArray[np.float64]
Kind = Literal["physical", "layers"]
REGIONS = ("decode", "prefill", "mixed")
BOUNDS = {  # parameter: lowest, highest
    "compute": (0.1, 1.0),
    "bandwidth": (0.1, 1.0),
    "attention_compute": (0.1, 1.0),
    "kv_bandwidth": (0.1, 1.0),
    "overlap_exponent": (1.0, 20.0),
    "kernel_s": (1e-7, 1e-4),
    "attention_seq_s": (1e-8, 1e-5),
}
TYPICAL = Efficiencies()
_HOST = ("host_fixed_s", "host_per_seq_s")
_NO_HOST = replace(TYPICAL, host_fixed_s=0.0, host_per_seq_s=0.0)  # as the tables are
_STEPS = 1500
_TRIES = 100  # a step
_PRECISION = 0.03  # of the physical model, relative to a step: errors beyond it count less than squared


@dataclass(slots=True)
class DesignedStep(StepRow):
    """A step to compare the models on."""

    region: str = ""


def fit_layers(folder: Path, scenario: Scenario, *, kind: Kind = "physical") -> Profile:
    """Fit a profile to a folder of layer timing tables (see ``layer_tables``).

    Args:
        scenario: its model and GPU are those of the tables; its KV pool bounds the contexts of the steps
            that the physical model is fitted to.
        kind: "layers" keeps the tables, which hold for this model and GPU alone; "physical" fits
            efficiencies, which carry over. Host times are not in the tables: they stay typical.

    Raises:
        InputError: the tables are not usable, or not of the scenario's model and GPU. A bad fit is no error:
            see ``FitSummary.reasons``.
    """
    deployment = Deployment.of(scenario.model_copy(update={"profile": None}))
    ranks = deployment.shard.tensor_parallel_size
    own = None if scenario.gpu.file is None else deployment.gpu
    found = read_layer_tables(folder, deployment.model, own, tensor_parallel_size=ranks)
    tables = found.tables
    shard = Shard(deployment.model, deployment.gpu, ranks)
    layered = LayeredStepTime(tables, shard, _NO_HOST, measured_only=True)
    profile = Profile(
        servecast_version=version("servecast"),
        kind=kind,
        gpu=deployment.gpu.name,
        model=deployment.model.name,
        engine_version=found.engine_version,
        tensor_parallel_size=ranks,
        date=datetime.date.today(),
        models=(deployment.model,),
        domain=Domain(
            tokens=(tables.tokens[0], tables.tokens[-1]),
            batch=(1, tables.decodes[-1]),
            context=(1, tables.decode_context[-1]),
        ),
        raw_data_sha256=found.sha256,
    )
    note = f"kernel times of {found.model}"
    if kind == "layers":
        known = sum(value is not None for value in tables.attention)
        points = f"{known:,} of {len(tables.attention):,} points of attention"
        note += f"; {points}, the others put together from them"
        told = Provenance.of(["layers"], "measured", note)
        changes: dict[str, Any] = {"layers": tables}
        assumed = list(_HOST)
    else:
        pool_tokens = (deployment.config.num_gpu_blocks - 1) * deployment.config.block_size
        steps = designed_steps(layered, pool_tokens, _STEPS)
        efficiencies = _fit(layered, steps)
        told = Provenance.of((f"efficiencies.{name}" for name in BOUNDS), "fitted", f"to {note}")
        changes = {"efficiencies": replace(efficiencies, **{name: getattr(TYPICAL, name) for name in _HOST})}
        changes["fit"] = summary = _summary(layered, steps, efficiencies)
        changes["error_band"] = summary.held_out_p90
        assumed = [name for name in Efficiencies.parameters() if name not in BOUNDS]
    typical = Provenance.of((f"efficiencies.{name}" for name in assumed), "assumed", "typical")
    return profile.model_copy(update={**changes, "provenance": (*told, *typical)})


def designed_steps(layered: LayeredStepTime, pool_tokens: int, count: int) -> list[DesignedStep]:
    """Steps inside the tables whose KV fits a pool of so many tokens: decodes, one prompt chunk, and both, in
    turn, their sizes evenly spread in the logarithm, half of the chunks without context.

    Raises:
        InputError: hardly a step is inside.
    """
    rng, tables = np.random.default_rng(0), layered.tables

    def spread(axis: Sequence[int]) -> int:
        return round(math.exp(rng.uniform(math.log(axis[1]), math.log(axis[-1]))))  # axis[0] is 0

    steps: list[DesignedStep] = []
    for _ in range(_TRIES * count):
        region = REGIONS[len(steps) % len(REGIONS)]
        decodes, decode_context = 0, 0
        chunks: tuple[tuple[int, int], ...] = ()
        if region != "prefill":
            decodes = spread(tables.decodes)
            decode_context = decodes * spread(tables.decode_context)
        if region != "decode":
            chunks = ((spread(tables.chunk), 0 if rng.random() < 0.5 else spread(tables.context)),)
        step = DesignedStep(chunks, decodes, decode_context, decodes + len(chunks), region=region)
        if decode_context + sum(map(sum, chunks)) <= pool_tokens and _inside(layered, step):
            steps.append(step)
            if len(steps) == count:
                return steps
    raise InputError(
        f"hardly a {region} step that was measured fits the {pool_tokens} KV tokens of the scenario",
        where="profile: layers",
        fix="Name a scenario with a larger KV cache, or measure smaller steps.",
    )


def _inside(layered: LayeredStepTime, step: DesignedStep) -> bool:
    try:
        return layered.seconds(step) > 0.0
    except InputError:
        return False


def _parts(step_time: LayeredStepTime | PhysicalStepTime, step: DesignedStep) -> tuple[float, float, float]:
    """Seconds of matrix products of the layers, of the LM head and sampler, and of all else."""
    parts = step_time.breakdown(step)
    linear = parts["linear"] + parts.get("experts", 0.0)
    head = parts.get("lm_head", 0.0) + parts.get("sampler", 0.0)
    return linear, head, sum(parts.values()) - linear - head


def _fit(layered: LayeredStepTime, steps: Sequence[DesignedStep]) -> Efficiencies:
    """Robust least squares of each part, relative to the whole step, so that no part pays for another."""
    names = list(BOUNDS)
    measured = np.array([_parts(layered, step) for step in steps])
    whole = measured.sum(axis=1, keepdims=True)
    low, high = np.log(np.array(list(BOUNDS.values()))).T

    def at(point: Floats) -> Efficiencies:
        return replace(_NO_HOST, **dict(zip(names, np.exp(point).tolist(), strict=True)))

    def residuals(point: Floats) -> Floats:
        model = PhysicalStepTime(layered.shard, at(point))
        parts = np.array([_parts(model, step) for step in steps])
        return np.ravel((parts - measured) / whole)

    start = np.log([getattr(_NO_HOST, name) for name in names])
    found = least_squares(residuals, start, bounds=(low, high), loss="soft_l1", f_scale=_PRECISION)
    return at(found.x)


def _errors(layered: LayeredStepTime, efficiencies: Efficiencies, steps: Sequence[DesignedStep]) -> Floats:
    model = PhysicalStepTime(layered.shard, efficiencies)
    return np.array([model.seconds(step) / layered.seconds(step) - 1 for step in steps])


def _summary(
    layered: LayeredStepTime, steps: Sequence[DesignedStep], efficiencies: Efficiencies
) -> FitSummary:
    """Errors of the fit, and of each half of the steps as a fit to the other half predicts it."""
    errors = _errors(layered, efficiencies, steps)
    unseen = np.empty(len(steps))
    for half in (0, 1):
        unseen[half::2] = np.abs(_errors(layered, _fit(layered, steps[1 - half :: 2]), steps[half::2]))
    of = np.array([step.region for step in steps])
    regions = tuple(region_error(name, errors[of == name], unseen=unseen[of == name]) for name in REGIONS)
    reasons = beyond(regions, REGION_LIMIT, "steps")
    return FitSummary(regions=regions, held_out_p90=float(np.quantile(unseen, 0.9)), reasons=reasons)
