"""Where ranks share the KV of a sequence out, every step is as in vLLM's scheduler."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))

from decisions import mismatches, record_all

from servecast.validate.parity.parity import Recorded
from servecast.validate.parity.scenarios import shared_out_scenarios

VERSIONS = {"0.20": 8, "0.23": 12, "0.32": 20, "0.33": 12}


@pytest.fixture(scope="module")
def recorded() -> dict[str, list[Recorded]]:
    """vLLM's decisions, asked once."""
    return record_all(VERSIONS, lambda version, count: shared_out_scenarios(version, 0, count))


@pytest.mark.vllm
@pytest.mark.parametrize("version", VERSIONS)
def test_every_step_is_vllms(recorded: dict[str, list[Recorded]], version: str) -> None:
    found = mismatches(recorded[version], version)
    assert not found, str(found[0])


@pytest.mark.vllm
def test_vllm_is_told_of_the_ranks(recorded: dict[str, list[Recorded]]) -> None:
    """It ran them all, requests found prefixes, and the blocks of one hash lie on two ranks or four."""
    events = [one.events() for one in recorded["0.32"]]
    assert not any("raised" in event for each in events for event in each)
    found = [event["cached_tokens"] for each in events for event in each if "schedule" in event]
    assert sum(tokens for cached in found for _, tokens in cached) > 1000
    ranks = {one.scenario.config.decode_context_parallel_size for one in recorded["0.32"]}
    assert ranks == {2, 4}
