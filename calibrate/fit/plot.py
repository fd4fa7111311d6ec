"""A profile as a picture: measured steps beside the fit and the roofline, or, where it keeps none, what it
says of steps of its own model and GPU."""

from __future__ import annotations

import html
import io
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from servecast.sim.hardware.fit_summary import MeasuredStep
from servecast.sim.hardware.gpu import find_gpu
from servecast.sim.hardware.model_shape import ModelShape
from servecast.sim.hardware.profile import Profile, build_step_time
from servecast.sim.hardware.shard import Shard
from servecast.sim.inputs.errors import InputError
from servecast.sim.inputs.files import write_whole
from servecast.sim.metrics.binding import StepRow
from servecast.sim.scenario.scenario import shipped_folder

_MEASURED, _FITTED, _ROOFLINE = "#1f6feb", "#d1242f", "#6e7781"
_BATCHES, _CONTEXT = tuple(2**power for power in range(9)), 1024
_TOKENS = tuple(2**power for power in range(4, 14))


def plot(profile: Profile, path: Path) -> None:
    """Write an SVG, or an HTML page with it, by the ending of ``path``.

    Four panels: pure decode steps over the batch, prompts over their tokens, mixed steps over their tokens,
    and all of them measured against fitted. Of a profile that keeps no measured steps, as one fitted to a
    report: decode steps and prompts as it predicts them, and what the time of each goes to.

    Raises:
        InputError: the ending is another, or the profile keeps no measured steps and its model or GPU is not
            at hand.
    """
    if path.suffix not in (".svg", ".html"):
        raise InputError(
            f"ends in {path.suffix or 'nothing'}", where=f"--plot {path}", fix="Name a .svg or .html."
        )
    shown = () if profile.fit is None else profile.fit.shown
    title = f"{profile.model} on {profile.gpu}, {profile.server}"
    draw = partial(_measured, shown=shown) if shown else partial(_predicted, profile=profile)
    svg = _svg(draw, title)
    if path.suffix == ".html":
        svg = svg[svg.index("<svg") :]
        svg = f'<!doctype html>\n<meta charset="utf-8">\n<title>{html.escape(title)}</title>\n{svg}'
    write_whole(path, lambda partial: partial.write_text(svg, encoding="utf-8"))


def _svg(draw: Callable[[list[Axes]], None], title: str) -> str:
    with mpl.rc_context({"svg.hashsalt": "fit", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(11, 7.5), layout="constrained")
        figure.suptitle(title)
        draw(figure.subplots(2, 2).ravel().tolist())
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return out.getvalue()


def _measured(axes: list[Axes], shown: Sequence[MeasuredStep]) -> None:
    decodes = [s for s in shown if s.region.startswith("decode")]
    _over(axes[0], "pure decode", "batch", decodes, lambda s: s.batch)
    prompts = [s for s in shown if s.region.startswith("prefill")]
    _over(axes[1], "prompts", "tokens", prompts, lambda s: s.tokens)
    rest = [s for s in shown if not s.region.startswith(("decode", "prefill"))]
    _over(axes[2], "mixed steps and long runs", "tokens", rest, lambda s: s.tokens)
    _against(axes[3], shown)


def _predicted(axes: list[Axes], profile: Profile) -> None:
    gpu = find_gpu(profile.gpu, where="--plot: the profile's gpu")
    shard = Shard(_shape(profile), gpu, profile.tensor_parallel_size)
    step_time = build_step_time(profile, shard)
    decodes = {n: StepRow((), n, n * _CONTEXT, n) for n in _BATCHES}
    prompts = {n: StepRow(((n, 0),), 0, 0, 1) for n in _TOKENS}
    for ax, parts, title, name, steps in (
        (axes[0], axes[2], f"decodes at {_CONTEXT:,} tokens of context", "batch", decodes),
        (axes[1], axes[3], "one prompt", "tokens", prompts),
    ):
        for label, color, of in (
            ("roofline", _ROOFLINE, step_time.roofline_seconds),
            ("predicted", _FITTED, step_time.seconds),
        ):
            ax.plot([*steps], [1000 * of(step) for step in steps.values()], color=color, label=label)
        _label(ax, title, name, "ms")
        shares = [step_time.breakdown(step) for step in steps.values()]
        names = [part for part in shares[0] if any(share.get(part) for share in shares)]
        rows = [[share[part] / sum(share.values()) for share in shares] for part in names]
        parts.stackplot([*steps], rows, labels=names)
        parts.set_title("what the time goes to", loc="left")
        parts.set_xlabel(name)
        parts.set_xscale("log")
        parts.set_ylim(0, 1)
        parts.legend(fontsize=7, framealpha=0.8)


def _shape(profile: Profile) -> ModelShape:
    """The model of a profile: the one that it keeps, or a shipped one of that name."""
    if profile.models:
        return profile.models[0]
    file = shipped_folder() / "models" / f"{profile.model.rsplit('/', 1)[-1]}.json"
    if not file.is_file():
        raise InputError(
            f"the profile keeps no measured steps, and there are no sizes of its model {profile.model!r}",
            where="--plot",
            fix="Plot one that was fitted to engine steps.",
        )
    return ModelShape.from_config(file)


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
    _label(ax, title, name, "ms", filled=bool(shown))


def _against(ax: Axes, shown: Sequence[MeasuredStep]) -> None:
    for region in dict.fromkeys(step.region for step in shown):
        steps = [step for step in shown if step.region == region]
        measured, fitted = (
            [1000 * getattr(s, f"{side}_s") for s in steps] for side in ("measured", "fitted")
        )
        ax.plot(measured, fitted, ".", label=region)
    ends = [1000 * pick(step.measured_s for step in shown) for pick in (min, max)]
    ax.plot(ends, ends, color=_ROOFLINE, lw=1)
    _label(ax, "fitted against measured", "measured, ms", "fitted, ms")


def _label(ax: Axes, title: str, x: str, y: str, *, filled: bool = True) -> None:
    ax.set_title(title, loc="left")
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    ax.legend(frameon=False)
    if filled:  # an empty axis has no logarithms
        ax.set_xscale("log")
        ax.set_yscale("log")
    ax.grid(alpha=0.3)
