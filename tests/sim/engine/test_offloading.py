"""The native OffloadingConnector, step by step, against logs of vLLM 0.32's own scheduler with its own
connector and copies that take two steps each (tests/data/golden/offloading.txt)."""

from __future__ import annotations

import re
from collections import deque
from typing import Any

import pytest
from places import DATA

from servecast.sim.engine.config import EngineConfig
from servecast.sim.engine.copies import LinkedCopies
from servecast.sim.engine.offloading import Job, OffloadingConnector
from servecast.sim.engine.pipe import Pipe
from servecast.sim.engine.request import Request
from servecast.sim.engine.scheduler import Scheduler

LOG = (DATA / "golden" / "offloading.txt").read_text("utf-8")
SHARED = ("a", "d", "e")  # whose first 16 tokens are the same


class TwoSteps(Pipe):
    """Each copy is over two steps later."""

    def __init__(self) -> None:
        super().__init__(1.0)

    def send(self, num_bytes: int, now: int) -> int:
        return now + 2


def section(name: str) -> list[str]:
    return LOG.split(f"== {name}:", 1)[1].split("\n== ", 1)[0].splitlines()


def told(lines: list[str]) -> list[str]:
    """What is compared: jobs of each step, blocks free after it, and what each update reports and frees."""
    found = []
    for line in lines[1:]:
        if jobs := re.match(r" {7}((?:store|load|flush) .*)", line):
            found.append(jobs[1])
        elif step := re.match(r"S(\d+) .*free=(\d+)", line):
            found.append(f"S{step[1]} free={step[2]}")
        elif update := re.match(r"  U(\d+) .*free=(\d+) cached=\d+(.*)", line):
            rest = " ".join(re.findall(r"done=\[.*?\]|recv=\[.*?\]", update[3]))
            found.append(f"U{update[1]} free={update[2]} {rest}".rstrip())
    return found


def simulated(lines: list[str]) -> list[str]:
    """The same requests through the engine, in the same words."""
    said, words = "\n".join(lines), dict(re.findall(r"(\w+)=(\w+)", lines[0]))
    chunks, per_chunk = map(int, re.search(r"offload: (\d+) chunks of (\d+) blocks", said).groups())  # type: ignore[union-attr]
    asked = [
        (name, int(prompt), int(out), int(at))
        for name, prompt, out, at in re.findall(r"(\w+): (\d+) tok, out<=(\d+), at (\d+)", said)
    ]
    config = EngineConfig(
        "0.32",
        max_num_seqs=4,
        max_num_batched_tokens=16,
        max_model_len=1024,
        num_gpu_blocks=13,
        block_size=4,
        async_scheduling=words["async"] == "True",
    )
    copies = LinkedCopies(TwoSteps(), TwoSteps(), 1)
    connector = OffloadingConnector(chunks, copies, blocks_per_chunk=per_chunk)
    scheduler = Scheduler(config, connector)
    names = [name for name, *_ in asked]
    found: list[str] = []
    flying: deque[tuple[int, Any]] = deque()

    def shown(job: Job) -> str:
        ways = (job.blocks, job.keys) if job.stores else (job.keys, job.blocks)
        return f"{job.number}({names[job.request_id]}:{'->'.join(str(len(way)) for way in ways)})"

    tick = 0
    while True:
        for number, (name, prompt, out, at) in enumerate(asked):
            if at == tick:
                content = ((1, 16),) if name in SHARED else ()
                request = Request(number, 0.0, prompt, out, out, content)
                scheduler.add(request, number)
        if not scheduler.has_requests and not flying:
            return found
        if scheduler.has_requests and len(flying) < 1 + config.async_scheduling:
            step = scheduler.schedule()
            meta = step.connector_meta
            found.append(f"S{tick} free={scheduler.free_blocks}")
            parts = [
                f"{word} {','.join(shown(job) for job in jobs)}"
                for word, jobs in (("load", meta.loads), ("store", meta.stores))
                if jobs
            ]
            found += [" ".join(parts + [f"flush {sorted(meta.flush)}"] * bool(meta.flush))] * bool(
                parts or meta.flush
            )
            connector.start_load_kv(meta, tick)
            step.transfers = connector.get_finished(tick)
            flying.append((tick, step))
            tick += 1
            if config.async_scheduling and len(flying) < 2 and step.total_tokens:
                continue
        number, step = flying.popleft()
        scheduler.complete(step)
        line = f"U{number} free={scheduler.free_blocks}"
        if step.transfers is not None:
            line += f" done={sorted(step.transfers.jobs)}"
            if step.transfers.finished_recving:
                line += f" recv={[names[request] for request in step.transfers.finished_recving]}"
        found.append(line)


@pytest.mark.parametrize("name", ["offload", "offload_async", "offload_small", "offload_chunk2"])
def test_every_job_and_every_block_is_that_of_vllm(name: str) -> None:
    lines = section(name)
    expected = told(lines)
    assert expected[0] == "S0 free=8"
    assert simulated(lines) == expected
