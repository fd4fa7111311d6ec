"""The encoder's budget and cache decide as in vLLM's scheduler, step by step."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))

from decisions import mismatches, record_all
from mutations import Mutation, catch, load_mutations

from servecast.validate.parity.parity import Recorded
from servecast.validate.parity.scenarios import corner_cases, pictured_scenarios

VERSIONS = {"0.20": 4, "0.23": 4, "0.32": 8, "0.33": 4}
MUTATIONS = load_mutations("mutations_images.yaml")


@pytest.fixture(scope="module")
def recorded() -> dict[str, list[Recorded]]:
    """vLLM's decisions, asked once."""
    return record_all(
        VERSIONS,
        lambda version, count: [*pictured_scenarios(version, 0, count), *corner_cases(version)],
    )


@pytest.mark.vllm
@pytest.mark.parametrize("version", VERSIONS)
def test_every_step_is_vllms(recorded: dict[str, list[Recorded]], version: str) -> None:
    found = mismatches(recorded[version], version)
    assert not found, str(found[0])


def test_the_scenarios_have_what_they_are_for() -> None:
    scenarios = list(pictured_scenarios("0.32", 0, 2 * VERSIONS["0.32"]))
    for name in ("disable_chunked_mm_input", "async_scheduling", "enable_prefix_caching"):
        assert {getattr(each.config, name) for each in scenarios} == {True, False}, name
    items = [item for each in scenarios for a in each.arrivals for item in a.request.media]
    assert len(items) > 10 * len({item.content for item in items})
    assert any(item.lead for item in items)
    assert any(item.tail for item in items)


@pytest.mark.vllm
@pytest.mark.parametrize("mutation", MUTATIONS, ids=[mutation.rule for mutation in MUTATIONS])
def test_a_broken_rule_is_caught(recorded: dict[str, list[Recorded]], mutation: Mutation) -> None:
    assert catch(mutation, recorded[mutation.version]) is not None, mutation.changed_line()
