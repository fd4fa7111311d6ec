"""Logs of vLLM 0.32's real scheduler with a fake KV connector and with native offloading, step by step.

tests/data/golden/connector.txt: what each line means stands at its top. Compared are the requests of a step
with their tokens and blocks, who is admitted, resumed, preempted and waits, free blocks, cached contents,
tokens delivered, ends.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from typing import Any

import pytest
from cores import interpreted
from places import DATA

from servecast.sim.engine.config import EngineConfig
from servecast.sim.engine.request import Request
from servecast.sim.engine.scheduler import Scheduler
from servecast.validate.parity.engine_core import decisions
from servecast.validate.parity.remote import Connected

LOGS = {
    log.split(":", 1)[0]: log.splitlines()
    for log in re.split(r"(?m)^== ", (DATA / "golden" / "connector.txt").read_text())[1:]
}
SHARED = {"a": 16, "d": 16, "e": 16}  # of the prompts of native offloading; of the others a and d are equal


def scenario(name: str, lines: list[str]) -> tuple[EngineConfig, dict[str, Any], list[str]]:
    """Settings, what happens, and the names of the requests."""
    head = dict(re.findall(r"(\w+)=(\S+)", lines[0]))
    asked = [m for line in lines if (m := re.match(r"   (\w+): (\d+) tok, out<=(\d+), at (\d+)(.*)", line))]
    names = [m[1] for m in asked]
    config = EngineConfig(
        version="0.32",
        max_num_seqs=int(head["seqs"]),
        max_num_batched_tokens=int(head["B"]),
        max_model_len=1024,
        num_gpu_blocks=int(head["blocks"]),
        block_size=int(head["bs"]),
        async_scheduling=head["async"] == "True",
    )
    arrivals, aborts, plans = [], [], {}
    for i, m in enumerate(asked):
        prompt, out, step = int(m[2]), int(m[3]), int(m[4])
        content: tuple[tuple[int, int], ...] = ()
        if name.startswith("offload"):
            content = ((1, SHARED[m[1]]),) if m[1] in SHARED else ()
        elif name.startswith("async_load") and m[1] in "ad":
            content = ((1, prompt),)
        request = Request(i, 0.0, prompt, out, out, content, 0)
        arrivals.append({"step": step, "arrival": i, "request": request})
        if plan := re.search(r"\{.*\}", m[5]):
            none = {
                "remote": 0,
                "mode": "async",
                "steps": 1,
                "later": 0,
                "again": False,
                "fail": None,
                "hold": 0,
            }
            plans[str(i)] = none | ast.literal_eval(plan[0])
        if gone := re.search(r"abort at (\d+)", m[5]):
            aborts.append({"step": int(gone[1]), "request_id": i, "in_flight": True})
    offload = None
    if found := re.search(r"offload: (\d+) chunks of (\d+) blocks", "\n".join(lines)):
        offload = {"chunks": int(found[1]), "blocks_per_chunk": int(found[2]), "policy": "lru"}
        offload |= {"store_threshold": 1, "prompt_only": True, "load_steps": 2, "store_steps": 2}
    policy = head["policy"] if head["policy"] != "None" else "fail"
    remote = {"role": head["role"], "policy": policy, "plans": plans, "offload": offload}
    happens = {
        "config": {"async_scheduling": config.async_scheduling, "kv_groups": [], "speculation": None},
        "arrivals": sorted(arrivals, key=lambda arrival: arrival["step"]),
        "aborts": aborts,
        "max_steps": 60,
        "remote": remote,
        "grammars": [],
        "depth": 2 if config.async_scheduling else 1,
        "fills": True,
    }
    return config, happens, names


def logged(line: str) -> dict[str, Any]:
    """What a line of the log says."""
    found: dict[str, Any] = {"free": int(re.search(r"free=(\d+)", line)[1])}  # type: ignore[index]
    found["cached"] = int(re.search(r"cached=(\d+)", line)[1])  # type: ignore[index]
    if line.startswith("S"):
        entry = r"([+^]?)(\w+):(\d+)\+(\d+)(~?)\[(\d+)\]"
        found["admitted"] = [m[1] for m in re.findall(entry, line) if m[0] == "+"]
        found["resumed"] = [m[1] for m in re.findall(entry, line) if m[0] == "^"]
        found["scheduled"] = [(m[1], int(m[3]), int(m[5])) for m in re.findall(entry, line)]
        found["samples"] = sum(not m[4] for m in re.findall(entry, line))
        found["preempted"] = re.findall(r"preempt=(\S+)", line)[0].split(",") if "preempt=" in line else []
        waits = re.findall(r"wait=(\S+)", line)
        found["waiting"] = [name.split(":")[0] for name in waits[0].split(",")] if waits else []
    else:
        said = line.split("->")[0]
        found["emitted"] = sum(int(count) for count in re.findall(r"\w+:\+(\d+)", said))
        found["finished"] = re.findall(r"(\w+):\+\d+!", said)
    return found


def ours(event: dict[str, Any], names: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {"free": event["free_blocks"], "cached": event["cached_blocks"]}
    if "schedule" in event:
        held = [len(blocks) for blocks in event["block_ids"]]
        entries = zip(event["scheduled"], held, strict=True)
        found["scheduled"] = [(names[i], tokens, blocks) for (i, tokens), blocks in entries]
        for key in ("admitted", "resumed", "preempted", "waiting"):
            found[key] = [names[i] for i in event[key]]
        found["samples"] = event["samples"]
    else:
        found["emitted"] = event["emitted"]
        found["finished"] = [names[i] for i in event["finished"]]
    return found


@pytest.mark.parametrize("make", [Scheduler, lambda *a, **k: interpreted()["scheduler"].Scheduler(*a, **k)])
@pytest.mark.parametrize("name", LOGS)
def test_a_logged_scenario(name: str, make: Callable[..., Any]) -> None:
    lines = LOGS[name]
    config, happens, names = scenario(name, lines)
    engine = Connected(make, config, happens["remote"], trace=True)
    expected = [logged(line.strip()) for line in lines if re.match(r"S\d|  U\d", line)]
    found = [ours(event, names) for event in decisions(engine, happens)]
    for number, (theirs, event) in enumerate(zip(expected, found, strict=True)):
        if "finished" in theirs and set(event["finished"]) - set(theirs["finished"]):
            failed = set(event["finished"]) - set(
                theirs["finished"]
            )  # by an error: without a token of theirs
            assert "fail" in name, failed
            event["finished"] = [one for one in event["finished"] if one not in failed]
        assert event == theirs, (number, name)
