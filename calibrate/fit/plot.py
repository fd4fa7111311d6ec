"""Measured steps beside the fit and the roofline, as a picture."""

from __future__ import annotations

import html
import io
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from servecast.sim.hardware.fit_summary import MeasuredStep
from servecast.sim.hardware.profile import Profile
from servecast.sim.inputs.errors import InputError
from servecast.sim.inputs.files import write_whole

_MEASURED, _FITTED, _ROOFLINE = "#1f6feb", "#d1242f", "#6e7781"


def plot(profile: Profile, path: Path) -> None:
    """Write an SVG, or an HTML page with it, by the ending of ``path``.

    Four panels: pure decode steps over the batch, prompts over their tokens, mixed steps over their tokens,
    and all of them measured against fitted.

    Raises:
        InputError: the profile keeps no measured steps, or the ending is another.
    """
    if path.suffix not in (".svg", ".html"):
        raise InputError(
            f"ends in {path.suffix or 'nothing'}", where=f"--plot {path}", fix="Name a .svg or .html."
        )
    shown = () if profile.fit is None else profile.fit.shown
    if not shown:
        raise InputError(
            "the profile keeps no measured steps to plot",
            where="--plot",
            fix="Plot one that was fitted to engine steps.",
        )
    title = f"{profile.model} on {profile.gpu}, vLLM {profile.engine_version}"
    svg = _svg(shown, title)
    if path.suffix == ".html":
        svg = svg[svg.index("<svg") :]
        svg = f'<!doctype html>\n<meta charset="utf-8">\n<title>{html.escape(title)}</title>\n{svg}'
    write_whole(path, lambda partial: partial.write_text(svg, encoding="utf-8"))


def _svg(shown: Sequence[MeasuredStep], title: str) -> str:
    with mpl.rc_context({"svg.hashsalt": "fit", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(11, 7.5), layout="constrained")
        figure.suptitle(title)
        axes = figure.subplots(2, 2).ravel().tolist()
        _over(
            axes[0],
            "pure decode",
            "batch",
            [s for s in shown if s.region.startswith("decode")],
            lambda s: s.batch,
        )
        _over(
            axes[1],
            "prompts",
            "tokens",
            [s for s in shown if s.region.startswith("prefill")],
            lambda s: s.tokens,
        )
        rest = [s for s in shown if not s.region.startswith(("decode", "prefill"))]
        _over(axes[2], "mixed steps and long runs", "tokens", rest, lambda s: s.tokens)
        _against(axes[3], shown)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return out.getvalue()


def _over(
    ax: Axes, title: str, name: str, shown: Sequence[MeasuredStep], feature: Callable[[MeasuredStep], float]
) -> None:
    at = [feature(step) for step in shown]
    for label, color, marker in (
        ("roofline", _ROOFLINE, "_"),
        ("measured", _MEASURED, "o"),
        ("fitted", _FITTED, "x"),
    ):
        ms = [1000 * getattr(step, f"{label}_s") for step in shown]
        ax.plot(at, ms, marker, color=color, label=label, markersize=5, fillstyle="none", ls="none")
    ax.set_title(title, loc="left")
    ax.set_xlabel(name)
    ax.set_ylabel("ms")
    _logarithmic(ax, bool(shown))
    ax.legend(frameon=False)


def _against(ax: Axes, shown: Sequence[MeasuredStep]) -> None:
    for region in dict.fromkeys(step.region for step in shown):
        steps = [step for step in shown if step.region == region]
        ax.plot(
            [1000 * step.measured_s for step in steps],
            [1000 * step.fitted_s for step in steps],
            ".",
            label=region,
        )
    ends = [1000 * pick(step.measured_s for step in shown) for pick in (min, max)]
    ax.plot(ends, ends, color=_ROOFLINE, lw=1)
    ax.set_title("fitted against measured", loc="left")
    ax.set_xlabel("measured, ms")
    ax.set_ylabel("fitted, ms")
    _logarithmic(ax, True)
    ax.legend(frameon=False)


def _logarithmic(ax: Axes, filled: bool) -> None:
    if filled:
        ax.set_xscale("log")
        ax.set_yscale("log")
    ax.grid(alpha=0.3)
