"""Pipeline stages, LoRA slots and grammars decide as in vLLM's scheduler, step by step."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))

from decisions import mismatches, record_all
from mutations import Mutation, catch, load_mutations

from servecast.validate.parity.parity import Recorded
from servecast.validate.parity.scenarios import staged_scenarios

VERSIONS = {"0.20": 20, "0.23": 30, "0.32": 50, "0.33": 30}
MUTATIONS = load_mutations("mutations_stages.yaml")


@pytest.fixture(scope="module")
def recorded() -> dict[str, list[Recorded]]:
    """vLLM's decisions, asked once."""
    return record_all(VERSIONS, lambda version, count: staged_scenarios(version, 0, count))


@pytest.mark.vllm
@pytest.mark.parametrize("version", VERSIONS)
def test_every_step_is_vllms(recorded: dict[str, list[Recorded]], version: str) -> None:
    found = mismatches(recorded[version], version)
    assert not found, str(found[0])


def test_the_scenarios_have_what_they_are_for() -> None:
    configs = [scenario.config for scenario in staged_scenarios("0.32", 0, VERSIONS["0.32"])]
    assert {config.pipeline_parallel_size for config in configs} == {1, 2, 3, 4}
    assert {config.max_loras > 0 for config in configs} == {True, False}
    assert any(scenario.grammars for scenario in staged_scenarios("0.32", 0, VERSIONS["0.32"]))


@pytest.mark.vllm
@pytest.mark.parametrize("mutation", MUTATIONS, ids=[mutation.rule for mutation in MUTATIONS])
def test_a_broken_rule_is_caught(recorded: dict[str, list[Recorded]], mutation: Mutation) -> None:
    assert catch(mutation, recorded[mutation.version]) is not None, mutation.changed_line()
