"""The examples run: scripts as they are, a notebook cell by cell."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
from places import REPOSITORY

EXAMPLES = {path.name: path for path in sorted((REPOSITORY / "examples").iterdir())}


def test_there_are_examples_of_each_kind() -> None:
    assert [*EXAMPLES] == ["check.py", "plan.ipynb", "plan.py", "what_if.py"]


@pytest.mark.parametrize("name", [name for name in EXAMPLES if name.endswith(".py")])
def test_a_script_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(EXAMPLES[name]), run_name="__main__")


@pytest.mark.parametrize("name", [name for name in EXAMPLES if name.endswith(".ipynb")])
def test_a_notebook_runs_and_keeps_no_outputs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    cells = [
        cell for cell in json.loads(EXAMPLES[name].read_text("utf-8"))["cells"] if cell["cell_type"] == "code"
    ]
    namespace: dict[str, object] = {"__name__": "__main__"}
    for number, cell in enumerate(cells):
        assert (cell["outputs"], cell["execution_count"]) == ([], None)
        exec(compile("".join(cell["source"]), f"cell {number}", "exec"), namespace)
