"""What a profile keeps of its fit: how well it describes what was measured, and where it does not."""

from __future__ import annotations

from servecast.sim.inputs.schema import Model


class RegionError(Model):
    """Errors over one region of the measured grid, relative (0.05 is 5 %).

    Attributes:
        region: "decode", "prefill", ...; a kernel's kind; or, for what transfer costs, a model's name.
        rows: compositions measured.
        error: mean of |fitted / measured - 1|. bias: mean of fitted / measured - 1.
        noise: standard error of a row's measured time, the mean over rows.
        held_out: mean of |predicted / measured - 1| by a fit that did not see the region; None if there is
            no such fit.
        held_out_p90: the error that 90 % of the rows stay under in that prediction.
        lost: parameters that only this region tells, so that ``held_out`` rests on typical values.
    """

    region: str
    rows: int
    error: float
    bias: float
    noise: float
    held_out: float | None = None
    held_out_p90: float | None = None
    lost: tuple[str, ...] = ()


class ResidualBin(Model):
    """Rows between two values of a feature ("tokens", "batch", "context") and their mean of
    fitted / measured - 1."""

    feature: str
    low: float
    high: float
    rows: int
    bias: float


class MeasuredStep(Model):
    """One measured composition beside the fit and the roofline, in seconds. context: KV tokens a request."""

    region: str
    model: str
    tokens: int
    batch: int
    context: float
    measured_s: float
    fitted_s: float
    roofline_s: float


class FitSummary(Model):
    """How a fit did.

    Attributes:
        regions: errors by region. transfer: each model predicted by a fit to the others.
        held_out_p90: the error that 90 % of the steps stay under in fits that did not see their region;
            None if there is no such fit.
        residuals: against each feature. shown: measured against fitted, at most ``MAX_SHOWN`` steps, spread
            over all of them.
        notes: what a reader should know. reasons: why the fit is bad; empty if it is not.
    """

    regions: tuple[RegionError, ...] = ()
    transfer: tuple[RegionError, ...] = ()
    held_out_p90: float | None = None
    residuals: tuple[ResidualBin, ...] = ()
    shown: tuple[MeasuredStep, ...] = ()
    notes: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()


MAX_SHOWN = 200
