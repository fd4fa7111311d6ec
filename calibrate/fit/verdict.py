"""How a fit did, and whether it may be used: the summary that its profile keeps."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from servecast.calibrate.fit.check import (
    KERNEL_LIMIT,
    HeldOut,
    beyond,
    errors_by_group,
    leave_out,
    reasons,
    region_error,
    residual_bins,
)
from servecast.calibrate.fit.gpu import beyond_the_datasheet
from servecast.calibrate.fit.grid import GridFit
from servecast.calibrate.fit.measurements import Engine, Measurements
from servecast.calibrate.fit.noise import Floats
from servecast.calibrate.fit.physical import PhysicalFit
from servecast.calibrate.fit.rows import Kernel, Step
from servecast.sim.hardware.fit_summary import MAX_SHOWN, FitSummary, MeasuredStep, RegionError
from servecast.sim.hardware.step_time.physical import Efficiencies

_BAND = 0.9  # share of held-out errors inside the error band
_UNDER = 0.02  # under the roofline by more than this is not noise


def summarise(
    fit: PhysicalFit | GridFit,
    measured: Measurements,
    steps: Sequence[Step],
    kernels: Sequence[Kernel],
    say: Callable[[str], None],
) -> FitSummary:
    """Errors seen and left out, what the residuals follow, and the verdict. ``say`` is told of each refit."""
    engines, gpu = measured.engines, fit.gpu
    notes = [*measured.notes, *beyond_the_datasheet(measured, gpu)]
    if not steps:
        assert isinstance(fit, PhysicalFit)
        regions = kernel_errors(fit, kernels)
        notes.append("no engine steps: what the host adds is assumed, and no whole step was compared")
        return FitSummary(regions=regions, notes=tuple(notes), reasons=beyond(regions, KERNEL_LIMIT))
    if isinstance(fit, GridFit):
        covered = fit.inside(steps)
        if outside := len(steps) - len(covered):
            notes.append(f"{outside} of {len(steps)} steps lie outside of the grid: not compared")
        steps = covered
    groups = [step.region for step in steps]
    held_out = (
        fit.leave_nodes_out(engines, steps)
        if isinstance(fit, GridFit)
        else leave_out(fit, engines, steps, kernels, groups, say)
    )
    regions = errors_by_group(fit, engines, steps, groups, held_out)
    errors = fit.predict(engines, steps) / fit.scatter.means(steps) - 1
    models = [engine.step_time(gpu, Efficiencies()) for engine in engines]
    roofline = np.array([models[step.engine].roofline_seconds(step) for step in steps])
    under = fit.scatter.means(steps) < (1 - _UNDER) * roofline
    if under.any():
        worst = 1 - float((fit.scatter.means(steps) / roofline).min())
        notes.append(
            f"{under.sum()} of {len(steps)} steps were faster than the roofline of {gpu.name}, by up to "
            f"{100 * worst:.0f} %: are its peaks right? A prediction never is"
        )
    transfer: tuple[RegionError, ...] = ()
    if isinstance(fit, PhysicalFit):
        regions += kernel_errors(fit, kernels)
        if len(measured.models) > 1:
            names = [engines[step.engine].model.name for step in steps]
            unseen = leave_out(fit, engines, steps, kernels, names, say)
            transfer = errors_by_group(fit, engines, steps, names, unseen)
    judged = [region for region in regions if region.region in groups]
    return FitSummary(
        regions=regions,
        transfer=transfer,
        held_out_p90=_held_out_p90(held_out, fit.scatter.means(steps), groups),
        residuals=residual_bins(steps, errors),
        shown=_shown(fit, engines, steps, roofline),
        notes=tuple(notes),
        reasons=reasons(judged, steps, errors),
    )


def kernel_errors(fit: PhysicalFit, kernels: Sequence[Kernel]) -> tuple[RegionError, ...]:
    """The errors of each kind of kernel."""
    if not kernels:
        return ()
    errors = fit.predict_kernels(kernels) / np.array([row.median_s for row in kernels]) - 1
    kinds = np.array([row.row for row in kernels])
    return tuple(region_error(kind, errors[kinds == kind]) for kind in dict.fromkeys(kinds.tolist()))


def _shown(
    fit: PhysicalFit | GridFit, engines: Sequence[Engine], steps: Sequence[Step], roofline: Floats
) -> tuple[MeasuredStep, ...]:
    measured, fitted = fit.scatter.means(steps), fit.predict(engines, steps)
    chosen = np.unique(np.linspace(0, len(steps) - 1, MAX_SHOWN).astype(int))
    return tuple(
        MeasuredStep(
            region=steps[at].region,
            model=engines[steps[at].engine].model.name,
            tokens=steps[at].tokens,
            batch=steps[at].batch,
            context=round(steps[at].context, 1),
            measured_s=float(f"{measured[at]:.6g}"),
            fitted_s=float(f"{fitted[at]:.6g}"),
            roofline_s=float(f"{roofline[at]:.6g}"),
        )
        for at in chosen.tolist()
    )


def _held_out_p90(held_out: HeldOut, measured: Floats, groups: Sequence[str]) -> float | None:
    """Over the steps whose region no parameter depends on alone."""
    errors = np.abs(held_out.seconds / measured - 1)
    told = np.array([not held_out.lost.get(group) for group in groups])
    known = errors[told & np.isfinite(errors)]
    return float(np.quantile(known, _BAND)) if len(known) else None
