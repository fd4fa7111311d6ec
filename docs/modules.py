"""The rooms of the tree and their modules, each in the first sentence of its own docstring."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path


def table(repository: Path) -> str:
    """A list a room, a line a module: sim's from its ground floor up, then calibrate and validate."""
    return "\n\n".join(_room(repository, folder) for folder in _folders(repository))


def _folders(repository: Path) -> Iterator[Path]:
    contracts = tomllib.loads((repository / "pyproject.toml").read_text("utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    floors = next(each["layers"] for each in contracts if each["name"] == "the floors of sim")
    rooms = [room.strip() for floor in reversed(floors) for room in floor.split("|")]
    for top in (*(f"sim/{room}" for room in rooms), "calibrate", "validate"):
        yield from sorted(path.parent for path in (repository / top).rglob("__init__.py"))


def _room(repository: Path, folder: Path) -> str:
    lines = [f"`{folder.relative_to(repository).as_posix()}/`: {_sentence(folder / '__init__.py')}", ""]
    modules = sorted(path for path in folder.glob("*.py") if not path.stem.startswith("__"))
    return "\n".join([*lines, *(f"- `{path.name}`: {_sentence(path)}" for path in modules)]).rstrip()


def _sentence(path: Path) -> str:
    """The first sentence of a module's docstring, as Markdown."""
    paragraph = (ast.get_docstring(ast.parse(path.read_text("utf-8"))) or "").split("\n\n")[0]
    sentence = " ".join(paragraph.split()).replace("``", "`").split(". ")[0]
    return sentence if sentence[-1:] in ".?" else f"{sentence}."
