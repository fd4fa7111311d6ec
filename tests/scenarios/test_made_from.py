"""The notes on the shipped scenarios name every file, and what they say can be run."""

from __future__ import annotations

import re
from importlib import import_module

from servecast.sim.scenario.scenario import shipped_folder

NOTES = (shipped_folder() / "README.md").read_text("utf-8")
NOT_DATA = ("README.md", "NOTICE", "__init__.py")


def test_every_shipped_file_is_in_the_notes() -> None:
    patterns = [text for text in re.findall(r"`([^`\n]+)`", NOTES) if "." in text and " " not in text]
    files = [file.relative_to(shipped_folder()) for file in shipped_folder().rglob("*") if file.is_file()]
    data = [file for file in files if file.suffix not in (".py", ".pyc") and file.name not in NOT_DATA]
    missing = [str(file) for file in data if not any(file.match(pattern) for pattern in patterns)]
    assert missing == []


def test_the_scripts_that_made_them_are_there() -> None:
    scripts = set(re.findall(r"python -m (servecast\.scenarios\.make\.\w+)", NOTES))
    assert {
        f"servecast.scenarios.make.{path.stem}" for path in (shipped_folder() / "make").glob("[!_]*.py")
    } == scripts
    for script in scripts:
        assert import_module(script).app
