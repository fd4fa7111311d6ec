"""What a fit found and what a profile says, as lines of text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from servecast.sim.hardware.fit_summary import FitSummary, RegionError
from servecast.sim.hardware.gpu_constants import GpuConstants
from servecast.sim.hardware.profile import Profile, Provenance
from servecast.sim.reproduce.cell import Cell


def profile_lines(profile: Profile) -> Iterator[str]:
    """Where it comes from, its parameters with 90 % intervals and origin, domain, error band, and its fit."""
    software = [
        f"{name} {value}" for name, value in (("driver", profile.driver), ("torch", profile.torch)) if value
    ]
    engine = profile.server
    yield f"{profile.model} on {profile.gpu}, " + ", ".join(
        [engine, *software, profile.dtype, str(profile.date)]
    )
    known = {entry.parameter: entry for entry in profile.provenance}
    for parameter in (*known, *(name for name in profile.parameters() if name not in known)):
        group, _, name = parameter.partition(".")
        value = f"{getattr(getattr(profile, group), name):<12.4g}" if name else " " * 12
        ends = profile.intervals.get(parameter)
        interval = f"{ends[0]:.3g} to {ends[1]:.3g}" if ends else ""
        entry = known.get(parameter, Provenance(parameter=parameter, origin="assumed", note="typical value"))
        origin = f"{entry.origin}: {entry.note}" if entry.note else entry.origin
        yield f"  {parameter:32} {value} {interval:24} {origin}"
    for name in ("tokens", "batch", "context"):
        span = getattr(profile.domain, name)
        yield f"  domain {name:25} {'not restricted' if span is None else f'{span[0]:g} to {span[1]:g}'}"
    band = "not known" if profile.error_band is None else f"+-{100 * profile.error_band:.0f} %"
    yield f"  error band {band}; fitted rows: {', '.join(profile.fitted_rows) or 'none'}"
    if profile.raw_data_sha256:
        yield f"  raw data sha256 {profile.raw_data_sha256}"
    if profile.fit is not None:
        yield from _summary_lines(profile.fit)


def cell_line(row: str, cell: Cell) -> str:
    """A cell of a reported row as its fit has it."""
    error = "" if cell.error is None else f"{100 * cell.error:+.1f} %"
    return f"{row:20} {cell.metric:16} reported {cell.reported:9.4g} fitted {cell.predicted:9.4g} {error}"


def constants_lines(constants: GpuConstants) -> Iterator[str]:
    """Where a GPU's constants come from, and each with how its fit did."""
    yield f"{constants.gpu}: {constants.source}; {constants.release}"
    if constants.compute_factor != 1.0:
        yield f"  compute times {constants.compute_factor:.2f}, for the power of the GPU that it stands for"
    for kernels, entries in constants.kinds():
        for name, fitted in entries.items():
            values = fitted.model_dump(exclude={"residuals", "by_size"})
            shown = ", ".join(f"{key} {value:.4g}" for key, value in values.items())
            left = fitted.residuals
            error = "" if left is None else f"; {left.rows} rows, off {left.median:.1%} in the median"
            yield f"  {kernels} {name}: {shown}{error}"


def _summary_lines(summary: FitSummary) -> Iterator[str]:
    """Errors by region, what transfer costs, what the residuals follow, notes."""
    yield f"{'region':20} {'rows':>5} {'error':>8} {'bias':>8} {'noise':>8} {'left out':>9}"
    yield from _table(summary.regions)
    if summary.transfer:
        yield "transfer: each model predicted by a fit to the others"
        yield from _table(summary.transfer)
    for feature in dict.fromkeys(entry.feature for entry in summary.residuals):
        bins = (
            f"{100 * entry.bias:+.1f} % at {entry.low:.0f}-{entry.high:.0f}"
            for entry in summary.residuals
            if entry.feature == feature
        )
        yield f"residuals by {feature}: {', '.join(bins)}"
    for note in summary.notes:
        yield f"note: {note}"
    for reason in summary.reasons:
        yield f"bad fit: {reason}"


def _table(errors: Iterable[RegionError]) -> Iterator[str]:
    for entry in errors:
        held_out = "-" if entry.held_out is None else f"{100 * entry.held_out:.1f} %"
        lost = f"  only this tells {', '.join(entry.lost)}" if entry.lost else ""
        yield (
            f"{entry.region:20} {entry.rows:5} {100 * entry.error:6.1f} % {100 * entry.bias:+6.1f} % "
            f"{100 * entry.noise:6.1f} % {held_out:>9}{lost}"
        )
