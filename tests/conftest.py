"""What pytest says at the end of live tests."""

from __future__ import annotations

import pytest
from timing import inconclusive


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Timing verdicts that were wrong beside other work, or by a machine that did not keep time."""
    if inconclusive:
        count = f"{len(inconclusive)} timing verdict{'s' * (len(inconclusive) != 1)} inconclusive"
        terminalreporter.section(f"{count}: this machine was disturbed")
        for what in inconclusive:
            terminalreporter.write_line(what)
