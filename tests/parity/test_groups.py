"""KV cache groups decide as in vLLM's scheduler, step by step: random ones, and logs of two scenarios."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))

from decisions import record_all
from mutations import Mutation, catch, load_mutations
from places import DATA

from servecast.sim.engine.config import EngineConfig
from servecast.sim.engine.kv_groups import CacheSpec
from servecast.sim.engine.request import Request
from servecast.sim.engine.scheduler import Scheduler
from servecast.validate.parity.parity import Recorded, compare
from servecast.validate.parity.scenarios import Scenario, grouped_scenarios

VERSIONS = {"0.23": 40, "0.32": 60, "0.33": 40}
MUTATIONS = load_mutations("mutations_groups.yaml")

# ---- the logs of two scenarios of vLLM 0.32: 29 and 30 steps

SYSTEM = {"swa": 20, "mamba": 40}  # tokens that prompts share
BLOCK = {"swa": 4, "mamba": 8}
FULL = CacheSpec(kind="full", block_size=4, page_bytes=1)
GROUPS = {
    "swa": (FULL, CacheSpec(kind="sliding", block_size=4, page_bytes=1, window=10)),
    "mamba": (
        CacheSpec(kind="full", block_size=8, page_bytes=1),
        CacheSpec(kind="mamba", block_size=8, page_bytes=1, mode="align"),
    ),
}
POOL = {"swa": (44, 16), "mamba": (26, 24)}  # blocks and budget


def log_of(name: str) -> list[str]:
    """Lines of a scenario of the file, without its first."""
    text = (DATA / "golden" / "kv_groups.txt").read_text()
    return re.split(r"(?m)^== ", text)[1 + ["swa", "mamba"].index(name)].splitlines()[1:]


def requests_of(name: str, line: str) -> list[tuple[int, Request]]:
    """(step, request) of the line that lists them; a, c and d share a prompt, and all but g and h a system
    prompt."""
    found = []
    for number, (letter, prompt, out, step) in enumerate(
        re.findall(r"(\w)\(prompt (\d+), out (\d+), step (\d+)\)", line)
    ):
        content: tuple[tuple[int, int], ...] = ()
        if letter not in "gh":
            content = ((1, SYSTEM[name]),)
        if letter in "acd":
            content = (*content, (2, SYSTEM[name] + 2 * BLOCK[name] + 3))
        request = Request(number, 0.0, int(prompt), int(out), int(out), content, 0)
        found.append((int(step), request))
    return found


def ours(name: str, requests: list[tuple[int, Request]], steps: int) -> list[str]:
    """The same lines of our scheduler."""
    blocks, budget = POOL[name]
    config = EngineConfig(
        version="0.32",
        max_num_seqs=8,
        max_num_batched_tokens=budget,
        max_model_len=512,
        num_gpu_blocks=blocks,
        block_size=BLOCK[name],
        async_scheduling=False,
        kv_groups=GROUPS[name],
        prefix_cache_retention_interval=0,
    )
    scheduler = Scheduler(config, trace=True)
    lines, letters = [], "abcdefgh"
    for step in range(steps):
        for number, (arrives, request) in enumerate(requests):
            if arrives == step:
                scheduler.add(request, number)
        made = scheduler.schedule()
        scheduled = made.scheduled()
        line = f"step {step:2d} | sched " + ", ".join(f"{letters[i]}:{n}" for i, n in scheduled.items())
        if made.cached_tokens:
            line += " | hit " + ", ".join(f"{letters[i]}:{n}" for i, n in made.cached_tokens.items())
        if made.preempted:
            line += f" | preempted {','.join(letters[i] for i in made.preempted)}"
        free = scheduler.free_blocks
        rows = [
            "          "
            + letters[i]
            + "  "
            + "  ".join(
                f"{kind}[{' '.join('.' if block == 0 else str(block) for block in held)}]"
                for kind, held in zip(("full", name), scheduler.block_ids(i), strict=True)
            )
            for i in scheduled
        ]
        waiting = ",".join(letters[i] for i in scheduler.waiting)
        head = f"          free list head {[int(block) for block in scheduler.free_list(8)]}"
        scheduler.complete(made)
        line += f" | free {free} -> {scheduler.free_blocks}"
        if waiting:
            line += f" | waiting {waiting}"
        if made.finished:
            line += f" | finished {','.join(letters[i] for i in made.finished)}"
        lines += [line, *rows, head]
    return lines


@pytest.mark.parametrize("name", ["swa", "mamba"])
def test_a_logged_scenario(name: str) -> None:
    """Every line of the log: tokens, hits, block ids in both groups, free blocks and their list."""
    first, *lines = log_of(name)
    expected = [line.replace("*", "").rstrip() for line in lines if line.strip()]
    steps = sum(line.startswith("step") for line in expected)
    found = ours(name, requests_of(name, first), steps)
    assert [line.rstrip() for line in found] == expected


# ---- vLLM's own scheduler


@pytest.fixture(scope="module")
def recorded() -> dict[str, list[Recorded]]:
    """vLLM's decisions on random scenarios with groups, by release."""
    return record_all(VERSIONS, lambda version, count: grouped_scenarios(version, 0, count))


@pytest.mark.vllm
@pytest.mark.parametrize("version", VERSIONS)
def test_every_decision_is_vllms(recorded: dict[str, list[Recorded]], version: str) -> None:
    steps = 0
    for one in recorded[version]:
        mismatch = compare(one, version)
        assert mismatch is None, str(mismatch)
        steps += sum("schedule" in event for event in one.events())
    assert steps > 10_000


@pytest.mark.vllm
def test_rules_of_another_version_differ(recorded: dict[str, list[Recorded]]) -> None:
    assert sum(compare(one, "0.32") is not None for one in recorded["0.23"]) > 20


@pytest.mark.vllm
@pytest.mark.parametrize("mutation", MUTATIONS, ids=[mutation.rule for mutation in MUTATIONS])
def test_a_broken_rule_is_caught(recorded: dict[str, list[Recorded]], mutation: Mutation) -> None:
    assert catch(mutation, recorded[mutation.version]) is not None, mutation.changed_line()


def test_scenarios_have_groups_of_every_kind() -> None:
    scenarios = list(grouped_scenarios("0.32", 0, 60))
    kinds = {spec.kind for scenario in scenarios for spec in scenario.config.kv_groups}
    assert kinds == {"full", "sliding", "chunked", "mamba"}
    assert {spec.mode for scenario in scenarios for spec in scenario.config.kv_groups} == {"none", "align"}
    assert any(spec.checkpoint for scenario in scenarios for spec in scenario.config.kv_groups)
    again = Scenario.from_json(scenarios[0].to_json(), str(Path("here")))
    assert again == scenarios[0]
