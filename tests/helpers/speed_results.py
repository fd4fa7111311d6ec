"""Keeps measured speeds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[2] / "docs" / "results" / "speed.json"


def keep(section: str, values: dict[str, Any]) -> None:
    known = json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else {}
    known[section] = known.get(section, {}) | values
    RESULTS.write_text(json.dumps(known, indent=2, sort_keys=True) + "\n", "utf-8")
