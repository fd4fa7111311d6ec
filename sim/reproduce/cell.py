"""One number of a reported table, and its prediction."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Cell:
    """One number of a table.

    keys: the row's keys. metric: the column. reported, predicted: in the column's unit; predicted is the
    mean over the seeds, and spread its standard deviation over them. used: "fit", "predicted", "summary"
    (it sums up other rows) or "excluded", the last with its reason. true: where the report's harness
    measures something else than its column says, the predicted value without that. band: what its error is
    said to keep, relative; None where nothing is said of it (a share, a percentile).
    """

    keys: dict[str, float | int | str]
    metric: str
    reported: float
    predicted: float
    spread: float
    used: str
    reason: str | None = None
    true: float | None = None
    band: float | None = None

    @property
    def error(self) -> float | None:
        """Relative error, None where the reported value is 0."""
        return self.predicted / self.reported - 1 if self.reported else None

    @property
    def inside(self) -> bool | None:
        """Whether its error keeps its band; None where there is none of them."""
        return None if self.error is None or self.band is None else abs(self.error) <= self.band

    def to_json(self) -> dict[str, Any]:
        """One flat object, the row's keys first."""
        plain = {
            **self.keys,
            "metric": self.metric,
            "reported": self.reported,
            "predicted": _number(self.predicted),
            "spread": _number(self.spread),
            "error_pct": None if self.error is None else _number(100 * self.error),
            "used": self.used,
        }
        if self.true is not None:
            plain["true"] = _number(self.true)
        return plain if self.reason is None else {**plain, "reason": self.reason}


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
