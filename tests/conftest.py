"""What all tests share: a small scenario, and which tests need vLLM."""

from __future__ import annotations

from pathlib import Path

import pytest
from places import VLLM
from small_scenarios import scenario_file


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    """The file of a scenario that takes milliseconds, as a command takes it."""
    return str(scenario_file(tmp_path))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where vLLM is not installed, say so once a test instead of failing in each of its own ways."""
    if not VLLM.exists():
        for item in items:
            if item.get_closest_marker("vllm"):
                item.add_marker(pytest.mark.skip(reason="needs vLLM: run make vllm"))
