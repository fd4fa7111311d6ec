"""Runs the code blocks of README.md and of this folder's pages, and renews the outputs that they show.

A ``sh`` block runs in bash, a ``python`` block in one namespace a page, a block with a ``title="FILE"``
is written to that file; all in a folder of the page's own, in order. A ``text`` block right behind is the
output, where a line ``...`` stands for any lines. Blocks of ``make`` are only checked: they set up what
runs them.

``python docs/blocks.py [PAGE ...]`` renews outputs. Around a ``...`` as many lines are kept as were there.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
REPOSITORY = DOCS.parent
_PLAIN = re.compile(r"servecast [^|<>&;$`*?~#\\]+")
_FENCE = re.compile(r"^```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True, slots=True)
class Block:
    """A block that runs or is written. output: what the page shows of it, None: nothing.

    line: of the block in its page. output_at: where its output's text begins and ends in the page.
    """

    language: str
    title: str | None
    code: str
    line: int
    output: str | None = None
    output_at: tuple[int, int] = (0, 0)


def pages() -> list[Path]:
    """README.md and the pages of this folder."""
    return [REPOSITORY / "README.md", *sorted(DOCS.glob("*.md"))]


def blocks(text: str) -> list[Block]:
    """The blocks of a page that do something, each with its output."""
    found: list[Block] = []
    end = -1
    for match in _FENCE.finditer(text):
        language, title, code = match.groups()
        if language == "text" and found and not text[end : match.start()].strip():
            last = found.pop()
            found.append(Block(last.language, last.title, last.code, last.line, code, match.span(3)))
        elif title is not None or language in ("sh", "python"):
            found.append(Block(language, title, code, text[: match.start()].count("\n") + 1))
            end = match.end()
        else:
            end = -1
    return found


def run_page(text: str, folder: Path) -> Iterator[tuple[Block, str]]:
    """Runs a page's blocks in a folder, and yields each with what it printed.

    Raises:
        subprocess.CalledProcessError: a command failed.
    """
    namespace: dict[str, Any] = {"__name__": "page"}
    for block in blocks(text):
        if block.title is not None:
            (folder / block.title).write_text(block.code, "utf-8")
        elif block.language == "python":
            printed = io.StringIO()
            with contextlib.chdir(folder), contextlib.redirect_stdout(printed):
                exec(compile(block.code, f"line {block.line}", "exec"), namespace)
            yield block, printed.getvalue()
        else:
            yield block, _shell(block.code, folder)


def matches(shown: str, printed: str) -> bool:
    """Whether an output is the one shown; blanks at the ends of lines do not count."""
    lines = [re.escape(line.rstrip()) + "\n" for line in shown.strip().splitlines()]
    pattern = "".join("(?:.*\n)*?" if line == re.escape("...") + "\n" else line for line in lines)
    return re.fullmatch(pattern, _trimmed(printed)) is not None


def renew(path: Path) -> None:
    """Replace the outputs of a page by what its blocks print now."""
    text = path.read_text("utf-8")
    with tempfile.TemporaryDirectory() as folder:
        ran = list(run_page(text, Path(folder)))
    for block, printed in reversed(ran):
        if block.output is not None:
            start, end = block.output_at
            text = text[:start] + _abridged(block.output, _trimmed(printed)) + text[end:]
    path.write_text(text, "utf-8")


def _abridged(shown: str, printed: str) -> str:
    """An output with as many first and last lines as the one that is shown has around its ``...``."""
    parts = re.split(r"^\.\.\.\n", shown, flags=re.MULTILINE)
    if len(parts) == 1:
        return printed
    lines, first, last = printed.splitlines(True), parts[0].count("\n"), parts[-1].count("\n")
    return "".join([*lines[:first], "...\n", *lines[len(lines) - last :]])


def _trimmed(printed: str) -> str:
    return "\n".join(line.rstrip() for line in printed.strip("\n").splitlines()) + "\n"


def _shell(code: str, folder: Path) -> str:
    lines = code.splitlines()
    if all(_PLAIN.fullmatch(line) for line in lines):
        return "".join(_command(line, folder) for line in lines)
    if all(line.startswith("make ") for line in lines):
        code, folder = "\n".join(line.replace("make ", "make -n ", 1) for line in lines), REPOSITORY
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", code],
        cwd=folder,
        env={**os.environ, "PATH": path, "COLUMNS": "100"},
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    return done.stdout


def _command(line: str, folder: Path) -> str:
    """What a command of ours prints that asks nothing of a shell: here, which spares it the start."""
    from servecast.__main__ import main  # only what runs blocks needs it

    printed, columns = io.StringIO(), os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "100"
    try:
        with contextlib.chdir(folder), contextlib.redirect_stdout(printed):
            if code := main(shlex.split(line)[1:]):
                raise subprocess.CalledProcessError(code, line, printed.getvalue())
    finally:
        del os.environ["COLUMNS"]
        os.environ |= {} if columns is None else {"COLUMNS": columns}
    return printed.getvalue()


if __name__ == "__main__":
    for name in sys.argv[1:] or pages():
        renew(Path(name))
