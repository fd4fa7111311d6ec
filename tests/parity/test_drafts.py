"""Speculative decoding decides as in vLLM's scheduler, step by step: random scenarios, alone, beside a KV
connector and with KV cache groups; the logs of single ones are in tests/sim/engine/test_drafts.py."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))

from decisions import record_all
from mutations import Mutation, catch, load_mutations

from servecast.sim.engine.speculation import METHODS
from servecast.validate.parity.parity import Recorded, compare
from servecast.validate.parity.remote import drafted_remote_scenarios
from servecast.validate.parity.scenarios import (
    Scenario,
    drafted_grouped_scenarios,
    drafted_scenarios,
    draw_drafted,
    modules_scenarios,
    recorded_picks,
)

VERSIONS = {"0.32": 64, "0.23": 24, "0.33": 32}
RARE = (389, 1663)  # of 0.32's: an admission that ends at max_model_len; a victim that gives slots back
BESIDE, GROUPED = 16, 34  # scenarios with a connector or by several modules, and with groups
STATES = {"0.23": 50, "0.32": 60, "0.33": 50}  # and with groups that keep states
MUTATIONS = load_mutations("mutations_drafts.yaml")
OF_STATES = load_mutations("mutations_states.yaml")


def rare(version: str) -> list[Scenario]:
    """What chance hardly ever brings about."""
    return [draw_drafted(recorded_picks(0, i)[0], version, f"drafted-{version}-0-{i}") for i in RARE]


@pytest.fixture(scope="module")
def recorded() -> dict[str, list[Recorded]]:
    """vLLM's decisions, by release."""
    return record_all(
        VERSIONS,
        lambda version, count: [
            *drafted_scenarios(version, 0, count),
            *(rare(version) if version == "0.32" else ()),
            *drafted_remote_scenarios(version, 0, BESIDE),
            *drafted_grouped_scenarios(version, 0, GROUPED),
            *(modules_scenarios(version, 0, BESIDE) if version != "0.23" else ()),
        ],
    )


@pytest.mark.vllm
@pytest.mark.parametrize("version", VERSIONS)
def test_every_decision_is_vllms(recorded: dict[str, list[Recorded]], version: str) -> None:
    events = [event for one in recorded[version] for event in one.events()]
    for one in recorded[version]:
        mismatch = compare(one, version)
        assert mismatch is None, str(mismatch)
    schedules = [event for event in events if "schedule" in event]
    assert len(schedules) > {"0.32": 10_000, "0.23": 4_000, "0.33": 5_000}[version]
    assert sum(event["drafts"] for event in schedules) > 10_000
    assert sum(len(event["preempted"]) for event in schedules) > 100


@pytest.fixture(scope="module")
def with_states() -> dict[str, list[Recorded]]:
    """vLLM's decisions where some groups keep states, by release."""
    return record_all(
        STATES, lambda version, count: drafted_grouped_scenarios(version, 0, count, states=True)
    )


@pytest.mark.vllm
@pytest.mark.parametrize("version", STATES)
def test_states_of_drafts_are_vllms(with_states: dict[str, list[Recorded]], version: str) -> None:
    schedules = []
    for one in with_states[version]:
        mismatch = compare(one, version)
        assert mismatch is None, str(mismatch)
        schedules += [event for event in one.events() if "schedule" in event]
    assert len(schedules) > 10_000
    assert sum(event["drafts"] for event in schedules) > 10_000
    assert sum(len(event["preempted"]) for event in schedules) > 100


@pytest.mark.vllm
@pytest.mark.parametrize("mutation", OF_STATES, ids=[mutation.rule for mutation in OF_STATES])
def test_a_broken_rule_of_states_is_caught(
    with_states: dict[str, list[Recorded]], mutation: Mutation
) -> None:
    assert catch(mutation, with_states[mutation.version]) is not None, mutation.changed_line()


@pytest.mark.vllm
def test_rules_of_another_version_differ(recorded: dict[str, list[Recorded]]) -> None:
    assert sum(compare(one, "0.32") is not None for one in recorded["0.23"]) > 10
    assert sum(compare(one, "0.32") is not None for one in recorded["0.33"]) > 10


@pytest.mark.vllm
@pytest.mark.parametrize("mutation", MUTATIONS, ids=[mutation.rule for mutation in MUTATIONS])
def test_a_broken_rule_is_caught(recorded: dict[str, list[Recorded]], mutation: Mutation) -> None:
    assert catch(mutation, recorded[mutation.version]) is not None, mutation.changed_line()


def test_scenarios_have_drafts_of_every_kind() -> None:
    scenarios = list(drafted_scenarios("0.32", 0, VERSIONS["0.32"]))
    drafts = [scenario.config.speculation for scenario in scenarios if scenario.config.speculation]
    assert {each.method for each in drafts} == set(METHODS)
    assert {bool(each.by_batch) for each in drafts} == {True, False}
    assert {scenario.config.async_scheduling for scenario in scenarios} == {True, False}
    assert {scenario.config.scheduling_policy for scenario in scenarios} == {"fcfs", "priority"}
    assert len({each.num_tokens for each in drafts}) == 5
    assert Scenario.from_json(scenarios[0].to_json(), "here") == scenarios[0]
