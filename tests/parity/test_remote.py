"""KV connectors decide as in vLLM's scheduler, step by step: a fake one, also on KV cache groups, and native
offloading."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parent))

from decisions import record_all
from mutations import Mutation, catch, load_mutations

from servecast.sim.engine import chunk_cache, offloading
from servecast.validate.parity import remote
from servecast.validate.parity.parity import Recorded, compare
from servecast.validate.parity.remote import (
    drafted_grouped_remote_scenarios,
    grouped_remote_scenarios,
    offloading_scenarios,
    remote_scenarios,
)
from servecast.validate.parity.scenarios import Scenario

VERSIONS = {"0.23": 25, "0.32": 45, "0.33": 25}
GROUPED = {"0.23": 8, "0.32": 24, "0.33": 8}
OFFLOADING = {"0.23": 30, "0.32": 20, "0.33": 20}
MUTATIONS = load_mutations("mutations_remote.yaml")
OF_OFFLOADING = load_mutations("mutations_offloading.yaml")


@pytest.fixture(scope="module")
def recorded() -> dict[str, list[Recorded]]:
    """vLLM's decisions on random scenarios, by release."""
    return record_all(
        VERSIONS,
        lambda version, count: [
            *grouped_remote_scenarios(version, 0, GROUPED[version]),
            *drafted_grouped_remote_scenarios(version, 0, GROUPED[version] // 4),
            *remote_scenarios(version, 0, count),
            *offloading_scenarios(version, 0, OFFLOADING[version]),
        ],
    )


@pytest.mark.vllm
@pytest.mark.parametrize("version", VERSIONS)
def test_every_decision_is_vllms(recorded: dict[str, list[Recorded]], version: str) -> None:
    steps = 0
    for one in recorded[version]:
        mismatch = compare(one, version)
        assert mismatch is None, str(mismatch)
        steps += sum("schedule" in event for event in one.events())
    assert steps > (10_000 if version == "0.32" else 4_000)


@pytest.mark.vllm
def test_what_the_scenarios_cover(recorded: dict[str, list[Recorded]]) -> None:
    """Loads that wait, requests that end by a failed load, blocks that outlive their request; and of native
    offloading loads, stores, and stores that somebody waits for."""
    found: Counter[str] = Counter()
    for one in recorded["0.32"]:
        asked: Any = one.scenario.remote
        for event in one.events():
            found["waiting with blocks"] += bool(event.get("waiting_blocks"))
            if "external" in event and event["external"][1]:
                found["hits"] += 1
            for kind, jobs in zip(
                ("loads", "stores", "flushes"), event.get("transfers") or ((), (), ()), strict=True
            ):
                found[kind] += len(jobs)
        found[asked["role"]] += 1
        found[asked["policy"]] += 1
        found["async"] += one.scenario.config.async_scheduling
        found["failing"] += any(plan["fail"] is not None for plan in asked["plans"].values())
        found["kept"] += any(plan["hold"] for plan in asked["plans"].values())
    assert min(found[role] for role in ("kv_producer", "kv_consumer", "kv_both")) >= 5
    assert min(found["fail"], found["recompute"], found["async"]) >= 15
    assert min(found["failing"], found["kept"]) >= 15
    assert found["waiting with blocks"] > 1000
    assert found["hits"] > 5000
    assert found["loads"] > 50
    assert found["stores"] > 300
    assert found["flushes"] > 20


@pytest.mark.vllm
def test_rules_of_another_version_differ(recorded: dict[str, list[Recorded]]) -> None:
    fakes = [one for one in recorded["0.23"] if one.scenario.name.startswith("remote-")]
    assert sum(compare(one, "0.32") is not None for one in fakes) >= 20


@pytest.mark.vllm
@pytest.mark.parametrize("mutation", MUTATIONS, ids=[mutation.rule for mutation in MUTATIONS])
def test_a_broken_rule_is_caught(recorded: dict[str, list[Recorded]], mutation: Mutation) -> None:
    assert catch(mutation, recorded[mutation.version]) is not None, mutation.changed_line()


@pytest.mark.vllm
@pytest.mark.parametrize("mutation", OF_OFFLOADING, ids=[mutation.rule for mutation in OF_OFFLOADING])
def test_a_broken_rule_of_offloading_is_caught(
    recorded: dict[str, list[Recorded]], mutation: Mutation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The broken module stands in for the one that the scenarios' connector is made of."""
    broken = ModuleType(f"servecast.sim.engine.{mutation.file}")
    monkeypatch.setitem(sys.modules, broken.__name__, broken)  # dataclasses look themselves up there
    exec(compile(mutation.source(), mutation.file, "exec"), broken.__dict__)
    if mutation.file == "offloading":
        monkeypatch.setattr(remote, "OffloadingConnector", broken.OffloadingConnector)
    else:
        monkeypatch.setattr(offloading, "ChunkCache", broken.ChunkCache)
        monkeypatch.setattr(chunk_cache.Accesses, "tail_first", broken.Accesses.tail_first)
    version = mutation.version
    found = (compare(one, version) for one in recorded[version] if one.scenario.remote["offload"])
    assert any(mismatch is not None for mismatch in found), mutation.changed_line()


def test_a_scenario_survives_its_json_form() -> None:
    for scenario in [*remote_scenarios("0.32", 3, 5), *offloading_scenarios("0.32", 3, 5)]:
        assert Scenario.from_json(scenario.to_json(), "here") == scenario
