"""A comparison as text."""

from __future__ import annotations

from collections.abc import Sequence

from servecast.sim.report.text import table
from servecast.validate.compare.load import Row
from servecast.validate.compare.page import load_facts, row_cells
from servecast.validate.compare.sweep import Comparison
from servecast.validate.compare.verdict import Verdict

_HEADER = ("figure", "predicted", "measured", "error", "interval (95 %)", "allowed", "")


def comparison_text(comparison: Comparison) -> str:
    """Each load's rows, what they show together, and the verdict with its reasons."""
    lines = []
    for load in comparison.loads:
        lines.append(_rows_text(load.rows, f"\n{load.label}: {load.verdict.state}"))
        for part in load.attribution:
            lines.append(f"error of the mean E2E by {part.name}: {part.error_ms:+.3g} ms")
        lines += [*load_facts(load), *(f"note: {note}" for note in load.notes)]
    if comparison.sweep:
        lines.append(_rows_text(comparison.sweep, "\nknee and largest rate"))
    lines += [f"note: {note}" for note in comparison.notes]
    return "\n".join([*lines, verdict_text(comparison.verdict)])


def verdict_text(verdict: Verdict) -> str:
    """Its state, and the reasons."""
    return "\n".join([f"\nverdict: {verdict.state}", *(f"  {reason}" for reason in verdict.reasons)])


def _rows_text(rows: Sequence[Row], title: str) -> str:
    shown = ("name", "predicted", "measured", "error", "error_interval", "allowed")
    cells = [[*(row_cells(row)[name] for name in shown), row.state or ""] for row in rows]
    return table(_HEADER, cells, title=title)
