"""The plot of an optimum: what a GPU makes against what a user sees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from servecast.sim.report.drawing import BAD, MUTED, SERIES, mark

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from servecast.sim.optimize.optimize import Optimum

MOST_LINES = len(SERIES)  # with a colour of their own; the others are grey


def draw_pareto(found: Optimum, axes: Sequence[Axes]) -> None:
    """A line an offer, through the rates that were looked at; a disc where it is used."""
    (ax,), fastest = axes, [0.0]
    for place, offer in reversed(list(enumerate(found.offers))):
        points = offer.points(found.tpot)
        own = place < MOST_LINES
        color = SERIES[place] if own else MUTED
        label = str(offer.candidate) if own else None
        speeds, tokens = [each.user_speed for each in points], [each.gpu_speed for each in points]
        ax.plot(speeds, tokens, color=color, lw=2.4 if place == 0 else 1.2, alpha=1 if own else 0.4)
        for point in [point for point in points if point.state == "pass"][-1:]:
            size = 9 if place == 0 else 5
            ax.plot([point.user_speed], [point.gpu_speed], "o", color=color, ms=size, label=label)
        fastest += speeds
    if found.tpot is not None:
        slowest = 1000 / float(found.tpot.rpartition(":")[2])
        ax.axvspan(0, slowest, color=BAD, alpha=0.06, lw=0)
        mark(ax, slowest, f"SLO {slowest:.3g}", BAD, 0.98)
    statistic = "mean" if found.tpot is None else found.tpot.split(":")[1]
    ax.set(xlim=(0, 1.05 * max(fastest)), xlabel=f"tokens/s of a user (of TPOT, {statistic})")
    ax.set(ylim=(0, None), ylabel="output tokens/s of a GPU")
    handles, labels = ax.get_legend_handles_labels()
    ax.legend(handles[::-1], labels[::-1], loc="upper right", fontsize=9)
