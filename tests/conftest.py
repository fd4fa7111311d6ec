"""What all tests share: a small scenario, which tests need vLLM, and what pytest says at the end of timing
verdicts that were wrong where the machine was disturbed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from places import VLLM
from small_scenarios import scenario_file
from timing import inconclusive

import servecast.sim

# No time of this machine decides a test, and no chance: what fails here, fails for everyone.
settings.register_profile("any machine", deadline=None, derandomize=True)
settings.load_profile("any machine")


# The files that take longest, the longest first, so that the workers of pytest-xdist end together.
LONGEST = (
    *("test_fit.py", "test_wheel.py", "test_against_plain.py", "test_docs.py", "test_optimize.py"),
    *("test_mutated_inputs.py", "test_command_line.py", "test_runs.py", "test_llmd_capacity.py"),
    *("test_session.py", "test_sweep.py", "test_grid.py", "test_measure.py", "test_capacity.py"),
)


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    """The file of a scenario that takes milliseconds, as a command takes it."""
    return str(scenario_file(tmp_path))


def pytest_sessionstart() -> None:
    """A compiled module that is older than its source would be tested in its place."""
    for compiled in Path(str(servecast.sim.__file__)).parent.glob("*/*.so"):
        name = compiled.with_name(compiled.name.partition(".")[0])
        sources = [name.with_suffix(end) for end in (".py", ".pxd") if name.with_suffix(end).exists()]
        if name.name == "memoryviews":
            continue  # Cython's own
        if not sources or compiled.stat().st_mtime < max(source.stat().st_mtime for source in sources):
            pytest.exit(f"{compiled} is older than its source: run make build", returncode=3)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What takes longest comes first. What measures speed is left to ``make benchmark``. Where vLLM is not
    installed, say so once a test instead of failing in each of its own ways."""
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))
    if not config.getoption("benchmark_only", default=False):
        measures = [item for item in items if "benchmark" in getattr(item, "fixturenames", ())]
        config.hook.pytest_deselected(items=measures)
        items[:] = [item for item in items if item not in measures]
    if not VLLM.exists():
        for item in items:
            if item.get_closest_marker("vllm"):
                item.add_marker(pytest.mark.skip(reason="needs vLLM: run make vllm"))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker of pytest-xdist hands over its own."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["inconclusive"] = inconclusive


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    inconclusive.extend(getattr(node, "workeroutput", {}).get("inconclusive", []))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if inconclusive:
        count = f"{len(inconclusive)} timing verdict{'s' * (len(inconclusive) != 1)} inconclusive"
        terminalreporter.section(f"{count}: this machine was disturbed")
        for what in inconclusive:
            terminalreporter.write_line(what)
