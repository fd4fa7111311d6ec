"""The documentation is true: its blocks run, its outputs are real, and what is generated is current."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
from places import REPOSITORY

sys.path.append(str(REPOSITORY / "docs"))

import accuracy_tables
import blocks
import generate
import scenario_reference

from servecast.sim.routing.routers import ROUTERS
from servecast.sim.scenario.scenario import Scenario
from servecast.sim.scenario.servers import SERVERS

PAGES = {path.name: path for path in blocks.pages()}
GENERATED = (
    *("scenario.md", "api.md", "command-line.md", "accuracy.md", "how-it-works.md", "memory.md", "live.md"),
    *("speed.md", "README.md"),
)
# Plans of many seconds, and a model of 70B under four servers at three rates.
SLOW = {
    *("README.md", "index.md", "calibrate.md", "day.md", "four-ways.md", "optimize.md", "sessions.md"),
    "tutorial.md",
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name in SLOW else ())
        for name, path in PAGES.items()
        if blocks.blocks(path.read_text("utf-8"))
    ],
)
def test_blocks_run_and_print_what_the_page_shows(name: str, tmp_path: Path) -> None:
    with patch.dict(ROUTERS), patch.dict(SERVERS):  # a page adds one
        ran = list(blocks.run_page(PAGES[name].read_text("utf-8"), tmp_path))
    for block, printed in ran:
        if block.output is not None:
            assert blocks.matches(block.output, printed), f"{name}, line {block.line} prints:\n{printed}"


def test_an_output_that_differs_is_noticed() -> None:
    assert blocks.matches("a\n...\nd\n", "a\nb\nc\nd\n")
    assert not blocks.matches("a\n...\nd\n", "a\nb\nc\n")
    assert not blocks.matches("a.c\n", "abc\n")


@pytest.fixture(scope="module")
def generated() -> dict[str, tuple[Path, str]]:
    """Name of a generated page -> where it is, and what it should be."""
    return {path.name: (path, text) for path, text in generate.generated().items() if path.suffix == ".md"}


def test_every_generated_page_is_looked_at(generated: dict[str, tuple[Path, str]]) -> None:
    assert set(generated) == set(GENERATED)


@pytest.mark.parametrize("name", GENERATED)
def test_generated_pages_are_current(name: str, generated: dict[str, tuple[Path, str]]) -> None:
    path, text = generated[name]
    assert _comparable(path, path.read_text("utf-8")) == _comparable(path, text), (
        "run python docs/generate.py"
    )


def test_the_schema_for_editors_is_current() -> None:
    path = REPOSITORY / "scenarios" / "scenario.schema.json"
    assert json.loads(path.read_text("utf-8")) == Scenario.model_json_schema(), "run python docs/generate.py"


def _comparable(path: Path, text: str) -> object:
    """How cyclopts lays out help is its own matter: of that page, the commands and their options count."""
    return (
        re.findall(r"^#+ .*|--[a-z][a-z-]*", text, re.MULTILINE) if path.name == "command-line.md" else text
    )


def test_every_field_of_a_scenario_has_a_meaning() -> None:
    schema = Scenario.model_json_schema()
    known = {"Scenario": schema, **schema["$defs"]}
    for name, definition in known.items():
        for field, prop in scenario_reference.fields_of(definition).items():
            assert field == "kind" or prop.get("description"), f"{name}.{field} has no meaning"


def test_files_that_pages_name_exist() -> None:
    decisions = (REPOSITORY / "docs" / "decisions").glob("*.md")
    pages = PAGES | {path.name: path for path in (REPOSITORY / "CONTRIBUTING.md", *decisions)}
    for name, path in pages.items():
        for file in re.findall(
            r"`((?:sim|calibrate|validate|scenarios|docs|tests)/[\w/.-]+)`", path.read_text("utf-8")
        ):
            assert (REPOSITORY / file).exists(), f"{name} names {file}"


def test_pages_are_for_users() -> None:
    for name, path in PAGES.items():
        assert not re.search(r"/tmp/|TODO|FIXME", path.read_text("utf-8")), name


DOCUMENT = {
    "scenario": "demo",
    "source": "a report",
    "rows": [
        {"concurrency": 1, "metric": "ttft_p95_ms", "reported": 50.0, "predicted": 40.0, "spread": 1.0,
         "error_pct": -20.0, "used": "excluded", "reason": "warm-up"},
        {"concurrency": 2, "metric": "ttft_p95_ms", "reported": 50.0, "predicted": 51.0, "spread": 1.0,
         "error_pct": 2.0, "used": "fit"},
        {"concurrency": 4, "metric": "ttft_p95_ms", "reported": 60.0, "predicted": 66.0, "spread": 1.0,
         "error_pct": 10.0, "used": "predicted"},
        {"concurrency": 4, "metric": "waiting", "reported": 0.0, "predicted": 0.0, "spread": 0.0,
         "error_pct": None, "used": "predicted"},
    ],
    "mape_predicted": {"ttft_p95_ms": 10.0},
    "knee": {"concurrency": 4, "reported_concurrency": None},
    "tables": {},
    "seeds": [0, 1],
    "run_context": {"gpu": "a | b", "notes": None},
    "assumptions": [{"name": "prompt", "value": 11, "origin": "counted"}],
    "provenance": {"profile": "m on g", "basis": "measured here", "error_band": 0.1},
}  # fmt: skip


def test_accuracy_tables_show_every_cell_once() -> None:
    page = accuracy_tables.page([DOCUMENT])
    for line in (
        "|  | TTFT p95, ms | waiting |",
        "| concurrency 1 | 50 → 40 (-20.0 %) [1] |  |",
        "| concurrency 2 | 50 → 51 (+2.0 %) \\* |  |",
        "| concurrency 4 | 60 → 66 (+10.0 %) | 0 → 0 |",
        "| **mean error, predicted** | **10.0 %** |  |",
        "1. excluded: warm-up",
        "Knee, concurrency: 4 (reported: none).",
        "| gpu | a \\| b |",
        "| prompt | 11 | counted |",
    ):
        assert line in page.splitlines(), line
    row = "| `demo` | 2 |  | p95 10.0 % |  |  | 4 (reported: none) |"
    assert row in accuracy_tables.summary([DOCUMENT]).splitlines()


def test_column_names_are_for_people() -> None:
    assert accuracy_tables.name("output_tok_s") == ("output tokens", "/s")
    assert accuracy_tables.name("req_s") == ("requests", "/s")
    assert accuracy_tables.name("e2e_p99_s") == ("E2E p99", "s")
    assert accuracy_tables.name("kv_usage_pct") == ("KV usage", "%")
    assert accuracy_tables.name("running") == ("running", "")
