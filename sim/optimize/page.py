"""The single-file page of an optimum: the answer, its runners-up, the plot, and the files to deploy it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from servecast.sim.optimize.figures import draw_pareto
from servecast.sim.optimize.offer import Offer
from servecast.sim.plan.page import LIMITS
from servecast.sim.report.drawing import picture
from servecast.sim.report.page import Plot, write_page
from servecast.sim.report.text import cell_text
from servecast.sim.run.results import engine_lines

if TYPE_CHECKING:
    from servecast.sim.optimize.optimize import Optimum

_PARETO = (
    "A line a candidate, through the rates that were looked at; a disc where it serves its largest rate "
    "within all objectives. Up is cheaper, right is faster for each user; the shaded side misses the "
    "objective on TPOT. Grey: further candidates."
)


def write_optimum_page(path: Path | str, found: Optimum, *, date: str | None) -> Path:
    """Write the page; whole or not at all. date: to put on it."""
    best, made = found.best, found.context
    limit, remedy = ("", "")
    if best is not None:
        name = best.document["binding_limit"]
        limit, remedy = LIMITS.get(name, (name, ""))
    label = "Output tokens/s of a GPU against tokens/s that a user sees"
    svg = picture("pareto", label, 1, partial(draw_pareto, found)) if best is not None else ""
    rows = [[cell_text(cell) for cell in row] for row in found.rows()]
    return write_page(
        path,
        "servecast.sim.optimize",
        found=found,
        best=best,
        title=f"The cheapest way to serve {made.get('served_name', found.scenario)}",
        asked=f"{found.demand.target_rate:g} requests/s at {found.objectives}",
        date=date,
        limit=limit,
        remedy=remedy,
        plots=[Plot("What a GPU makes, what a user sees", svg, _PARETO, wide=True)] if rows else [],
        rows=list(zip(found.offers, rows, strict=True)),
        texts=len(found.offers[0].candidate.label) if rows else 0,  # the first columns
        facts={} if best is None else _facts(best, found.prices[0].currency),
        resolved=dict(line.split(": ", 1) for line in engine_lines(made)) if made else {},
    )


def _facts(best: Offer, currency: str) -> dict[str, str]:
    """The figures of the best, by name."""
    size, traffic = best.size, best.demand.traffic
    facts = {
        "An hour": f"{size.hour_cost:,.2f} {currency}",
        "A month": f"{size.month_cost:,.0f} {currency}",
        "A million tokens, in and out": f"{size.million(traffic.prompt_tokens + traffic.output_tokens):.3g} "
        f"{currency}",
        "A replica serves": f"{(best.rate or 0.0) / best.unit.replicas:.4g} requests/s",
        "In hand": f"{size.in_hand:.1%}",
    }
    if best.banded is not None:
        band = f"With its error band in hand, {best.bands.max_rate:.0%}"
        facts[band] = f"{best.banded.gpus:,} GPUs, {best.banded.month_cost:,.0f} {currency} a month"
    return facts
