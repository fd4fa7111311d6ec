"""A comparison as text."""

from __future__ import annotations

from collections.abc import Sequence

from servecast.sim.cli.output import print_table
from servecast.validate.compare.load import Row, spoken
from servecast.validate.compare.page import allowed_text, error_interval_text, error_text, load_facts
from servecast.validate.compare.sweep import Comparison
from servecast.validate.compare.verdict import Verdict

_HEADER = ("figure", "predicted", "measured", "error", "interval (95 %)", "allowed", "")


def print_comparison(comparison: Comparison) -> None:
    """Each load's rows, what they show together, and the verdict with its reasons."""
    for load in comparison.loads:
        _print_rows(load.rows, f"\n{load.label}: {load.verdict.state}")
        for part in load.attribution:
            print(f"error of the mean E2E by {part.name}: {part.error_ms:+.3g} ms")
        for fact in (*load_facts(load), *(f"note: {note}" for note in load.notes)):
            print(fact)
    if comparison.sweep:
        _print_rows(comparison.sweep, "\nknee and largest rate")
    for note in comparison.notes:
        print(f"note: {note}")
    print_verdict(comparison.verdict)


def print_verdict(verdict: Verdict) -> None:
    """Its state, and the reasons."""
    print(f"\nverdict: {verdict.state}")
    for reason in verdict.reasons:
        print(f"  {reason}")


def _print_rows(rows: Sequence[Row], title: str) -> None:
    print_table(
        _HEADER,
        [
            [
                spoken(row.metric),
                row.predicted.estimate,
                row.measured.estimate,
                error_text(row),
                error_interval_text(row),
                allowed_text(row),
                row.state or "",
            ]
            for row in rows
        ],
        title=title,
    )
