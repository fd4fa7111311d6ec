"""What HTML pages have in common: their template, their look, and the plots on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from servecast.sim.inputs.files import write_whole

PACKAGE = "servecast.sim.report"


@dataclass(frozen=True, slots=True)
class Plot:
    """One figure of a page. wide: over both columns."""

    title: str
    svg: str
    caption: str = ""
    wide: bool = False

    @property
    def markup(self) -> Markup:
        """The SVG, exempt from escaping: it is our own."""
        return Markup(self.svg)


def write_page(path: Path | str, package: str, **content: object) -> Path:
    """Write a single file that needs no network and is the same, byte for byte, for the same content; whole
    or not at all.

    Args:
        package: where its page.html.j2 is, which may include what lies beside this module. content: what the
            template shows.

    Raises:
        InputError: the file cannot be written.
    """
    folders = [resources.files(each) for each in (package, PACKAGE)]

    def text(each: str) -> str:
        found = next(file for folder in folders if (file := folder.joinpath(each)).is_file())
        return found.read_text(encoding="utf-8")

    environment = Environment(
        loader=FunctionLoader(text),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["figure"] = figure_text
    page = environment.get_template("page.html.j2").render(**content)
    path = Path(path)
    write_whole(path, lambda partial: partial.write_text(page, encoding="utf-8"))
    return path


def write_plain_page(
    path: Path | str,
    *,
    title: str,
    subtitle: str = "",
    plots: Sequence[Plot] = (),
    tables: Sequence[tuple[str, Sequence[str], Sequence[Sequence[str]]]] = (),
    text: str = "",
) -> Path:
    """Write the page of an answer that has no template of its own. tables: title, header, rows. Raises as
    ``write_page``."""
    return write_page(path, PACKAGE, title=title, subtitle=subtitle, plots=plots, tables=tables, text=text)


def figure_text(value: float) -> str:
    """Four digits, and no powers of ten."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}" if abs(value) >= 0.0001 else "0"
