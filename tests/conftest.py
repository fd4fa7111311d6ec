"""What all tests share: small scenarios, and which tests need vLLM."""

from __future__ import annotations

import pytest
from places import VLLM


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where vLLM is not installed, say so once a test instead of failing in each of its own ways."""
    if not VLLM.exists():
        for item in items:
            if item.get_closest_marker("vllm"):
                item.add_marker(pytest.mark.skip(reason="needs vLLM: run make vllm"))
