"""What pytest says at the end of timing verdicts that were wrong where the machine was disturbed."""

from __future__ import annotations

from typing import Any

import pytest
from timing import inconclusive


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
