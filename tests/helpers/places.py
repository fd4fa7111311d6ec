"""Where tests find things."""

from __future__ import annotations

from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
REPOSITORY = TESTS.parent
HELPERS = TESTS / "helpers"
SAMPLES = TESTS / "samples"
DATA = TESTS / "data"
VLLM = REPOSITORY / ".venv-vllm"  # made by `make vllm`
