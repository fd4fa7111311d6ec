"""From a folder of measurements to a profile, and how far to believe it."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from servecast.calibrate.fit.check import KERNEL_LIMIT
from servecast.calibrate.fit.gpu import gpu_of
from servecast.calibrate.fit.grid import GridFit
from servecast.calibrate.fit.kernels import told_by
from servecast.calibrate.fit.measurements import Engine, Measurements, read_folder
from servecast.calibrate.fit.noise import Scatter, fit_front_end, fit_noise, undisturbed
from servecast.calibrate.fit.physical import PhysicalFit, joined
from servecast.calibrate.fit.rows import Kernel, Step
from servecast.calibrate.fit.verdict import kernel_errors, summarise
from servecast.sim.hardware.error_band import TYPICAL_BAND
from servecast.sim.hardware.fit_summary import FitSummary
from servecast.sim.hardware.front_end_costs import FrontEndCosts
from servecast.sim.hardware.gpu import GPU
from servecast.sim.hardware.noise import StepNoise
from servecast.sim.hardware.profile import Domain, Profile, Provenance
from servecast.sim.hardware.step_time.physical import Efficiencies
from servecast.sim.inputs.errors import InputError
from servecast.sim.scenario.vllm_server import preparation_round

Kind = Literal["physical", "grid"]


@dataclass(frozen=True, slots=True)
class FolderFit:
    """What a fit found.

    profile: with its ``fit`` summary. gpu: whose peaks it is relative to; derived says that these were
    measured, so that a file must go with the profile. good: whether the fit may be used.
    """

    profile: Profile
    gpu: GPU
    derived: bool

    @property
    def summary(self) -> FitSummary:
        assert self.profile.fit is not None
        return self.profile.fit

    @property
    def good(self) -> bool:
        return not self.summary.reasons


def fit_folder(
    folder: str | Path,
    *,
    kind: Kind = "physical",
    gpu: GPU | None = None,
    progress: Callable[[str], None] | None = None,
) -> FolderFit:
    """Fit a profile to a folder of measurements.

    Args:
        kind: "physical" for efficiencies, which carry over to other models and GPUs; "grid" for the measured
            steps themselves, interpolated, for this model alone.
        gpu: of the machine, where the catalogue has it not or not rightly.
        progress: told what is being done.

    Raises:
        InputError: the folder is not usable (see ``read_folder``), has fewer rows than parameters, or says no
            peaks of a GPU that is not in the catalogue. A bad fit is no error: see ``FolderFit.good``.
    """
    say = progress or (lambda _text: None)
    measured = read_folder(folder)
    the_gpu = gpu_of(measured, gpu)
    steps, kernels = joined(measured.steps), told_by(measured.kernels, the_gpu)
    noise = fit_noise(steps)
    say(f"fitting to {len(steps)} steps and {len(kernels)} kernels, relative to {the_gpu.name}")

    if not steps and kind == "grid":
        raise InputError(
            "a grid is made of engine steps, and there are none",
            where=str(measured.folder),
            fix="Measure engine steps into it, or fit the physical kind.",
        )
    scatter = Scatter(noise or StepNoise())
    fit: PhysicalFit | GridFit = (
        PhysicalFit(the_gpu, scatter) if kind == "physical" else GridFit(the_gpu, scatter)
    )
    fit.fit(measured.engines, steps, kernels)
    if steps and isinstance(fit, PhysicalFit):
        kernels, off = _that_agree(fit, measured.engines, steps, kernels)
        measured = replace(measured, notes=(*measured.notes, *off))
    if gpu is not None and gpu.name != measured.facts["gpu"]:
        note = f"facts.json says {measured.facts['gpu']}; the fit is relative to {gpu.name}, as was asked"
        measured = replace(measured, notes=(*measured.notes, note))
    overheads, disturbed = undisturbed(measured.overheads)
    measured = replace(measured, overheads=overheads, notes=(*measured.notes, *disturbed))
    summary = summarise(fit, measured, steps, kernels, say)
    profile = _profile(kind, fit, measured, steps, the_gpu, noise, summary)
    return FolderFit(profile, the_gpu, derived=gpu is None and the_gpu.memory_source == "measured")


def _that_agree(
    fit: PhysicalFit, engines: Sequence[Engine], steps: Sequence[Step], kernels: Sequence[Kernel]
) -> tuple[list[Kernel], list[str]]:
    """Leave out, worst first, the kinds of kernel that are not what the steps are made of, and fit again: an
    engine may run other kernels, or run them otherwise. Returns the kernels that stay, and what left."""
    left, notes = list(kernels), list[str]()
    while left:
        worst = max(kernel_errors(fit, left), key=lambda kind: kind.error)
        if worst.error <= KERNEL_LIMIT:
            break
        left = [row for row in left if row.row != worst.region]
        off = f"{100 * worst.error:.0f} % off what whole steps say"
        notes.append(f"{worst.rows} {worst.region} rows are {off}: left out")
        fit.fit(engines, steps, left)
    return left, notes


def _profile(
    kind: Kind,
    fit: PhysicalFit | GridFit,
    measured: Measurements,
    steps: Sequence[Step],
    gpu: GPU,
    noise: StepNoise | None,
    summary: FitSummary,
) -> Profile:
    facts, engines = measured.facts, measured.engines
    front_end, told = fit_front_end(measured.overheads, preparation_round(measured.version))
    engine = engines[steps[0].engine] if steps else None
    flags = {} if engine is None else engine.flags
    efficiencies = fit.efficiencies_ if isinstance(fit, PhysicalFit) else Efficiencies()
    few = "too few repeats: none"
    return Profile(
        servecast_version=version("servecast"),
        kind=kind,
        gpu=gpu.name,
        model=", ".join(measured.models) or "kernels",
        engine_version=measured.version or "none",
        dtype=str(flags.get("dtype") or "bfloat16"),
        tensor_parallel_size=1 if engine is None else engine.tensor_parallel_size,
        flags={
            name: value
            for name, value in flags.items()
            if value is None or isinstance(value, str | int | float | bool)
        },
        date=_date(facts.get("date")),
        driver=facts.get("driver"),
        torch=facts.get("torch"),
        models=tuple({engine.model.name: engine.model for engine in engines}.values()),
        efficiencies=efficiencies,
        noise=noise or StepNoise(),
        front_end=front_end,
        grid=fit.grid_ if isinstance(fit, GridFit) else None,
        domain=_domain(steps),
        error_band=TYPICAL_BAND if summary.held_out_p90 is None else summary.held_out_p90,
        intervals={f"efficiencies.{name}": ends for name, ends in fit.interval_.items()}
        if isinstance(fit, PhysicalFit)
        else {},
        provenance=(
            *(
                [_efficiency(fit, name) for name in Efficiencies.parameters()]
                if isinstance(fit, PhysicalFit)
                else [Provenance(parameter="grid", origin="measured", note=f"{len(steps)} steps")]
            ),
            *(
                _origin(f"noise.{field.name}", "" if noise is None else "to repeats of the same steps", few)
                for field in fields(StepNoise)
            ),
            *(
                _origin(f"front_end.{name}", "to overhead rows" if name in told else "", "not measured")
                for name in (field.name for field in fields(FrontEndCosts))
            ),
        ),
        raw_data_sha256=measured.sha256,
        fit=summary,
    )


def _origin(parameter: str, fitted_to: str, otherwise: str) -> Provenance:
    """Fitted to something, or assumed."""
    origin: Literal["fitted", "assumed"] = "fitted" if fitted_to else "assumed"
    return Provenance(parameter=parameter, origin=origin, note=fitted_to or otherwise)


def _efficiency(fit: PhysicalFit, name: str) -> Provenance:
    typical = getattr(fit.efficiencies_, name) == getattr(Efficiencies(), name)
    otherwise = "typical value" if typical else "the rows do not tell it: held near its typical value"
    fitted_to = "to measured steps and kernels" if name in fit.told_ else ""
    return _origin(f"efficiencies.{name}", fitted_to, otherwise)


def _domain(steps: Sequence[Step]) -> Domain:
    if not steps:
        return Domain()
    contexts = [tokens + context for step in steps for tokens, context in step.chunks]
    contexts += [round(step.decode_context / step.decodes) for step in steps if step.decodes]
    return Domain(
        tokens=(min(step.tokens for step in steps), max(step.tokens for step in steps)),
        batch=(min(step.batch for step in steps), max(step.batch for step in steps)),
        context=(min(contexts), max(contexts)),
    )


def _date(text: object) -> datetime.date | None:
    try:
        return datetime.date.fromisoformat(str(text)[:10])
    except ValueError:
        return None
