"""How far to believe a fit: errors by region, seen and left out, and what the residuals follow."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from servecast.calibrate.fit.measurements import Engine
from servecast.calibrate.fit.noise import Floats, Scatter
from servecast.calibrate.fit.physical import PhysicalFit
from servecast.calibrate.fit.rows import Kernel, Step
from servecast.sim.hardware.fit_summary import RegionError, ResidualBin
from servecast.sim.inputs.errors import InputError

REGION_LIMIT = 0.10  # mean error of a region beyond its noise, above which a fit is bad
HELD_OUT_LIMIT = 0.20  # the same for a region that the fit did not see
KERNEL_LIMIT = 0.30  # of a kind of kernel: beside steps it is left out, alone it is a bad fit
FEATURES: Mapping[str, Callable[[Step], float]] = {
    "tokens": lambda step: step.tokens,
    "batch": lambda step: step.batch,
    "context": lambda step: step.context,
}
_BINS = 5
_MIN_BIN = 3  # rows
_FOLLOWS = 0.4  # share of the residuals' variance between bins, above which they follow a feature


class Fit(Protocol):
    """What was fitted. scatter: of the measured times."""

    scatter: Scatter

    def predict(self, engines: Sequence[Engine], steps: Sequence[Step]) -> Floats: ...


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Predictions of steps by fits that did not see them, in seconds; NaN where there is no such fit.
    lost: region -> parameters that only it tells."""

    seconds: Floats
    lost: Mapping[str, tuple[str, ...]]


def leave_out(
    full: PhysicalFit,
    engines: Sequence[Engine],
    steps: Sequence[Step],
    kernels: Sequence[Kernel],
    groups: Sequence[str],
    say: Callable[[str], None],
) -> HeldOut:
    """Predict each group of steps (``groups``: one name a step) by a fit to all others and the kernels."""
    seconds, lost = np.full(len(steps), np.nan), {}
    names = list(dict.fromkeys(groups))
    for name in names if len(names) > 1 or kernels else ():
        say(f"leaving out {name}")
        inside = [group == name for group in groups]
        rest = [step for step, out in zip(steps, inside, strict=True) if not out]
        without = PhysicalFit(full.gpu, full.scatter, start=full.efficiencies_, draws=0)
        try:
            without.fit(engines, rest, kernels)
        except InputError:  # too few rows are left
            continue
        left_out = [step for step, out in zip(steps, inside, strict=True) if out]
        seconds[inside] = without.predict(engines, left_out)
        lost[name] = tuple(told for told in full.told_ if told not in without.told_)
    return HeldOut(seconds, lost)


def region_error(
    region: str, errors: Floats, *, noise: float = 0.0, unseen: Floats | None = None, lost: Sequence[str] = ()
) -> RegionError:
    """Errors of one region: signed and relative, one a row. unseen: absolute, of fits that did not see it."""
    known = unseen is not None and len(unseen) > 0
    return RegionError(
        region=region,
        rows=len(errors),
        error=float(np.abs(errors).mean()),
        bias=float(errors.mean()),
        noise=noise,
        held_out=float(np.mean(unseen)) if known and unseen is not None else None,
        held_out_p90=float(np.quantile(unseen, 0.9)) if known and unseen is not None else None,
        lost=tuple(lost),
    )


def beyond(regions: Sequence[RegionError], limit: float, rows: str = "rows") -> tuple[str, ...]:
    """Regions whose mean error is above a limit, in words."""
    return tuple(
        f"{each.region}: {100 * each.error:.0f} % mean error over {each.rows} {rows} "
        f"(limit {100 * limit:.0f} %)"
        for each in regions
        if each.error > limit
    )


def errors_by_group(
    fit: Fit, engines: Sequence[Engine], steps: Sequence[Step], groups: Sequence[str], held_out: HeldOut
) -> tuple[RegionError, ...]:
    """The errors of each group of steps."""
    measured, noise = fit.scatter.means(steps), fit.scatter.standard_errors(steps)
    errors = fit.predict(engines, steps) / measured - 1
    unseen = np.abs(held_out.seconds / measured - 1)
    found = []
    for name in dict.fromkeys(groups):
        inside = np.array([group == name for group in groups])
        predicted, scatter = unseen[inside & np.isfinite(unseen)], float(noise[inside].mean())
        lost = held_out.lost.get(name, ())
        found.append(region_error(name, errors[inside], noise=scatter, unseen=predicted, lost=lost))
    return tuple(found)


def residual_bins(steps: Sequence[Step], errors: Floats) -> tuple[ResidualBin, ...]:
    """Mean residuals over each feature, in up to five bins of about as many rows each; equal values are never
    parted."""
    found = []
    for feature, value in FEATURES.items():
        values = np.array([value(step) for step in steps])
        edges = np.unique(np.quantile(values, np.linspace(0, 1, _BINS + 1)))
        where = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, len(edges) - 2)
        for at in range(len(edges) - 1):
            if (rows := int((where == at).sum())) >= _MIN_BIN:
                inside, bias = values[where == at], float(errors[where == at].mean())
                low, high = float(inside.min()), float(inside.max())
                found.append(ResidualBin(feature=feature, low=low, high=high, rows=rows, bias=bias))
    return tuple(found)


def followed_feature(steps: Sequence[Step], errors: Floats) -> str:
    """Which feature the residuals follow most, in words."""
    best, share = f"the residuals follow none of {', '.join(FEATURES)}", _FOLLOWS
    total = float(((errors - errors.mean()) ** 2).sum())
    bins = residual_bins(steps, errors)
    for feature in FEATURES:
        own = sorted((each for each in bins if each.feature == feature), key=lambda each: each.bias)
        between = sum(each.rows * (each.bias - errors.mean()) ** 2 for each in own)
        if len(own) > 1 and total and between / total > share:
            share = between / total
            ends = (
                f"{100 * each.bias:+.0f} % at {each.low:.0f}-{each.high:.0f}" for each in (own[0], own[-1])
            )
            best = f"the residuals follow {feature}: {', '.join(ends)}"
    return best


def reasons(regions: Sequence[RegionError], steps: Sequence[Step], errors: Floats) -> tuple[str, ...]:
    """Why a fit is bad; empty if it is good enough to be used. A held-out region counts where the others
    tell all parameters."""
    found = []
    for region in regions:
        seen = region.error > REGION_LIMIT + region.noise
        unseen = region.held_out is not None and not region.lost
        if not seen and not (unseen and (region.held_out or 0.0) > HELD_OUT_LIMIT + region.noise):
            continue
        inside = [step.region == region.region for step in steps]
        follows = followed_feature(
            [step for step, here in zip(steps, inside, strict=True) if here], errors[inside]
        )
        size = f"{100 * region.error:.0f} % mean error over {region.rows} rows"
        if not seen:
            size = f"{100 * (region.held_out or 0.0):.0f} % mean error when left out of the fit"
        found.append(
            f"{region.region}: {size} (limit {100 * (REGION_LIMIT if seen else HELD_OUT_LIMIT):.0f} %, "
            f"noise of a row {100 * region.noise:.1f} %); {follows}"
        )
    return tuple(found)
