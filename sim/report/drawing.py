"""How plots look: figures of panels, and panels as inline SVG in the colours of the page."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The light colours of style.html.j2, which a page's SVG takes from its CSS variables.
INK, MUTED, GRID, BAD = "#1a2230", "#667085", "#e3e7ed", "#c6362c"
SERIES = ("#2f6fde", "#e07b1a", "#1b8a4b", "#8a4fd0", "#b03a6e", "#5f7d8c")
FIRST, SECOND = SERIES[:2]
_VARIABLES = {INK: "ink", MUTED: "muted", GRID: "line", BAD: "bad"}
_VARIABLES |= dict(zip(SERIES, ("first", "second", "third", "fourth", "fifth", "sixth"), strict=True))

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 4,
}
PANEL_INCHES = (5.0, 2.8)


def _style(**further: str) -> AbstractContextManager[None]:
    """Figures look as ours while the block lasts."""
    import matplotlib as mpl  # see panels

    return mpl.rc_context(_STYLE | further)


def panels(count: int) -> tuple[Figure, list[Axes]]:
    """A figure of panels side by side: Matplotlib's object, without pyplot and its global state."""
    from matplotlib.figure import Figure  # a third of a second, which only what draws waits for

    figure = Figure(figsize=(PANEL_INCHES[0] * min(count, 2), PANEL_INCHES[1] * -(-count // 2)))
    figure.set_layout_engine("constrained")
    return figure, [figure.add_subplot(-(-count // 2), min(count, 2), i + 1) for i in range(count)]


def drawn(count: int, draw: Callable[[list[Axes]], None]) -> Figure:
    """The figure that ``draw`` makes of so many panels."""
    with _style():
        figure, axes = panels(count)
        draw(axes)
        figure.draw_without_rendering()  # the style holds for what is made at the first drawing
    return figure


@contextmanager
def drawing(count: int, salt: str) -> Iterator[tuple[list[Axes], Callable[[str], str]]]:
    """The axes of panels, and the function that turns them into SVG with a given label: a picture each, which
    a page sets side by side where there is room.

    The salt makes ids that are the same from run to run and differ between the figures of a page.
    """
    made: list[tuple[Figure, list[Axes]]] = []

    def finish(label: str) -> str:
        pictures = [_svg(figure, f"{salt}{number}", label) for number, (figure, _) in enumerate(made)]
        return f'<div class="panels">{"".join(pictures)}</div>'

    with _style():
        made += [panels(1) for _ in range(count)]
        yield [axes for _, (axes,) in made], finish


def picture(salt: str, label: str, count: int, draw: Callable[[list[Axes]], None]) -> str:
    """What ``draw`` makes of so many panels, as SVG; see `drawing`."""
    with drawing(count, salt) as (axes, finish):
        draw(axes)
        return finish(label)


def _svg(figure: Figure, salt: str, label: str) -> str:
    out = io.StringIO()
    with _style(**{"svg.hashsalt": salt}):
        layout = figure.get_layout_engine()
        if layout is not None:  # once, and then out of the way of savefig, which would draw for it alone
            figure.dpi = 72
            layout.execute(figure)
            figure.set_layout_engine("none")
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, count=1, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', rf'\1 role="img" aria-label="{label}"', svg, count=1)
    for color, name in _VARIABLES.items():
        svg = svg.replace(color, f"var(--{name})")
    return svg


def mark(ax: Axes, at: float | None, label: str, color: str, height: float, *, right: bool = False) -> None:
    """A labelled vertical line. height: of the label, as a fraction of the axis. right: of the line."""
    if at is None:
        return
    ax.axvline(at, color=color, lw=1, alpha=0.7)
    ax.annotate(
        label,
        (at, height),
        xycoords=("data", "axes fraction"),
        xytext=(4 if right else -4, 0),
        textcoords="offset points",
        ha="left" if right else "right",
        va="top",
        color=color,
        fontsize=9,
    )
