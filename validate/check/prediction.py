"""A report against the prediction: what physics and arithmetic allow, but our simulator does not expect."""

from __future__ import annotations

from collections.abc import Iterator

from servecast.sim.reproduce.reproduce import reproduce
from servecast.sim.scenario.deployment import Deployment
from servecast.validate.check.finding import Confidence, Finding
from servecast.validate.check.table import Report

_FACTOR, _BANDS = 2.0, 5.0  # off by this factor and by so many error bands: more than a predictor's own error
_FAR = 5.0  # and from this factor on hardly its fault
_UNKNOWN_BAND = 0.5
_SEEDS = 1  # its noise is far under a factor of two


def prediction(report: Report) -> Iterator[Finding]:
    """Cells that are off the prediction by more than a factor of two and five error bands. Rows that the
    profile was fitted to are left out: there the two agree by construction."""
    scenario = report.scenario
    assert scenario is not None
    known = Deployment.of(scenario).error_band
    band = _UNKNOWN_BAND if known is None else known
    limit = max(_FACTOR, 1 + _BANDS * band)
    by_row = {(level.table, tuple(level.keys.items())): level for level in report.levels}
    for table in reproduce(scenario, seeds=_SEEDS).tables:
        for cell in table.cells:
            if cell.used in ("fit", "summary") or not cell.predicted > 0 or not cell.reported > 0:
                continue
            factor = max(cell.reported / cell.predicted, cell.predicted / cell.reported)
            if factor < limit:
                continue
            level = by_row.get((table.name, tuple(cell.keys.items())))
            if level is None:
                continue  # a table that repeats the rows of another
            numbers = {"reported": cell.reported, "predicted": cell.predicted, "factor": factor}
            sure: Confidence = "possible" if known is None or factor < _FAR else "likely"
            message = f"{cell.metric} is {cell.reported:.4g}, predicted {cell.predicted:.4g}"
            yield Finding(level, (cell.metric,), numbers | {"error_band": band}, sure, message, factor)
