"""Whether two runs are the same."""

from __future__ import annotations

import pandas as pd

from servecast.sim.metrics.records import Run


def assert_same(fast: Run, plain: Run) -> None:
    """Equal records and steps; equal gaps, however their rows are grouped."""
    pd.testing.assert_frame_equal(fast.requests, plain.requests, check_exact=True)
    pd.testing.assert_frame_equal(fast.steps, plain.steps, check_exact=True)
    gaps = [run.itl.groupby(["stage", "gap"])["weight"].sum() for run in (fast, plain)]
    pd.testing.assert_series_equal(gaps[0][gaps[0] > 0], gaps[1][gaps[1] > 0], check_exact=True)
