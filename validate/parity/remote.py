"""Scenarios with a KV connector, and the simulator's half of its fake store."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal

from servecast.sim.engine.connector import NEVER, Ending, FailurePolicy, Role, Transfers
from servecast.sim.engine.offloading import Job, Jobs, OffloadingConnector
from servecast.sim.engine.remote_rules import WHOLE_LOADS_FAIL_SINCE
from servecast.sim.engine.rules import since
from servecast.sim.engine.scheduler import Scheduler
from servecast.sim.engine.sequence import Sequence
from servecast.sim.engine.step import Step
from servecast.validate.parity.fake_store import FakeCopies, FakeStore
from servecast.validate.parity.scenarios import (
    Pick,
    Scenario,
    drafted_grouped_scenarios,
    draw_grouped,
    draw_scenario,
    of_kind,
    recorded_picks,
    with_drafts,
)

MAX_STEPS = 600


class StoreConnector:
    """The connector of a scenario, answering from a ``FakeStore``; see ``Connector``."""

    def __init__(self, remote: dict[str, Any]) -> None:
        self.role: Role = remote["role"]
        self.load_failure_policy: FailurePolicy = remote["policy"]
        self.requires_kv_delivery = self.role != "kv_consumer"
        self.store = FakeStore(remote["plans"])

    def bind(self, scheduler: Scheduler) -> None:
        self._scheduler, self._block = scheduler, scheduler.config.block_size

    def on_new_request(self, sequence: Sequence) -> None:
        pass

    def get_num_new_matched_tokens(
        self, sequence: Sequence, num_computed_tokens: int
    ) -> tuple[int, bool] | None:
        return self.store.match(
            sequence.request_id,
            sequence.prompt_tokens,
            sequence.num_tokens,
            num_computed_tokens,
            self._block,
        )

    def update_state_after_alloc(self, sequence: Sequence, num_external_tokens: int) -> None:
        blocks: list[Any] = self._scheduler.block_ids(sequence.request_id)
        if len(self._scheduler.config.kv_groups) == 1:
            blocks = blocks[0]
        self.store.allocated(sequence.request_id, blocks, num_external_tokens, self._block)

    def build_connector_meta(self, step: Step) -> None:
        pass

    def request_finished(self, sequence: Sequence, ending: Ending) -> bool:
        return self.store.finished(sequence.request_id, ending == "finished")

    def update_connector_output(self, transfers: Transfers) -> None:
        pass

    def start_load_kv(self, meta: Any, now: int) -> float:
        return 0.0

    def get_finished(self, now: int) -> Transfers | None:
        report = self.store.step()
        return Transfers(
            finished_recving=tuple(report["received"]),
            finished_sending=tuple(report["sent"]),
            invalid_block_ids=frozenset(report["invalid"]),
            failed_recving=tuple(report["lost"]),
        )

    def next_event(self, now: int) -> int:
        return now + 1 if self.store.due else NEVER


class StepCopies:
    """The worker half of native offloading on the clock of steps."""

    def __init__(self, load_steps: int, store_steps: int) -> None:
        self.fake = FakeCopies(load_steps, store_steps)
        self.jobs: dict[int, Job] = {}
        self.done: list[int] = []

    def start(self, jobs: Jobs, now: int) -> float:
        self.jobs.update({job.number: job for job in [*jobs.loads, *jobs.stores]})
        loads, stores = ([job.number for job in some] for some in (jobs.loads, jobs.stores))
        self.done = self.fake.step(loads, stores, jobs.flush)
        return 0.0

    def finished(self, now: int) -> list[Job]:
        return [self.jobs.pop(number) for number in self.done]

    def next_event(self, now: int) -> int:
        return now + 1 if self.jobs else NEVER


def offloading(asked: dict[str, Any]) -> OffloadingConnector:
    """Native offloading as a scenario says."""
    return OffloadingConnector(
        asked["chunks"],
        StepCopies(asked["load_steps"], asked["store_steps"]),
        blocks_per_chunk=asked["blocks_per_chunk"],
        policy=asked["policy"],
        store_threshold=asked["store_threshold"],
        offload_prompt_only=asked["prompt_only"],
    )


def drafted_grouped_remote_scenarios(version: str, seed: int, count: int) -> Iterator[Scenario]:
    """As those of ``draw_grouped_remote``, each with drafts."""
    return drafted_grouped_scenarios(version, seed, count, draw_grouped_remote)


def draw_grouped_remote(pick: Pick, version: str, name: str) -> Scenario:
    """``draw_remote`` on KV cache groups."""
    return draw_remote(pick, version, name, draw_grouped(pick, version, name, states=False))


def draw_drafted_remote(pick: Pick, version: str, name: str) -> Scenario:
    """``draw_remote`` with drafts."""
    return with_drafts(pick, draw_remote(pick, version, name))


def draw_remote(pick: Pick, version: str, name: str, plain: Scenario | None = None) -> Scenario:
    """A random scenario in which some, or most, requests have KV cache elsewhere or are wanted there. With
    groups only a whole load can fail, where vLLM's connectors can say so."""
    plain = plain or draw_scenario(pick, version, name)
    config = plain.config
    whole = since(version, WHOLE_LOADS_FAIL_SINCE)
    role: Role = ("kv_consumer", "kv_both", "kv_producer")[pick(0, 2)]
    policy: Literal["fail", "recompute"] = ("recompute", "fail")[pick(0, 1)]
    many, failing = pick(0, 2), pick(0, 3)
    modes = pick(0, 3)  # async alone, or both
    plans: dict[str, dict[str, Any]] = {}
    for arrival in plain.arrivals:
        request = arrival.request
        if pick(0, 3) > many + 1:
            continue
        mode = "sync" if pick(0, 3) < modes else "async"
        fails = pick(0, 5) < failing and (len(config.kv_groups) < 2 or (whole and mode == "async"))
        remote = request.prompt_tokens if pick(0, 1) else pick(0, request.prompt_tokens)
        plans[str(request.request_id)] = {
            "remote": 0 if role == "kv_producer" and pick(0, 1) else remote,
            "mode": mode,
            "steps": pick(0, 12),
            "later": pick(0, 4) if pick(0, 3) == 3 else 0,
            "again": pick(0, 1) == 1,
            "fail": pick(0, 3) if fails else None,
            "hold": pick(0, 15) if role != "kv_consumer" and pick(0, 1) else 0,
        }
    room = pick(0, 2)  # what waits and what has ended hold blocks, too
    return dataclasses.replace(
        plain,
        config=dataclasses.replace(
            config, num_gpu_blocks=config.num_gpu_blocks + room * config.num_gpu_blocks // 2
        ),
        remote={"role": role, "policy": policy, "plans": plans, "offload": None},
        max_steps=MAX_STEPS,
    )


def offloading_scenarios(version: str, seed: int, count: int) -> Iterator[Scenario]:
    """As ``random_scenarios``, with native offloading to host memory."""
    for index in range(count):
        yield draw_offloading(recorded_picks(seed, index)[0], version, f"offloading-{version}-{seed}-{index}")


def draw_offloading(pick: Pick, version: str, name: str) -> Scenario:
    """A random scenario with little or much host memory; most requests come a second time, when the GPU may
    have forgotten them."""
    plain = draw_scenario(pick, version, name)
    arrivals = list(plain.arrivals)
    for arrival in plain.arrivals:
        request = arrival.request
        if request.content and pick(0, 3):
            again = dataclasses.replace(request, request_id=len(arrivals))
            arrivals.append(dataclasses.replace(arrival, step=arrival.step + pick(5, 80), request=again))
    arrivals.sort(key=lambda arrival: arrival.step)
    arrivals = [dataclasses.replace(arrival, arrival=i) for i, arrival in enumerate(arrivals)]
    blocks = plain.config.num_gpu_blocks
    asked = {
        "chunks": pick(2, 8) if pick(0, 3) == 3 else pick(blocks // 2 + 2, 4 * blocks),
        "blocks_per_chunk": (1, 1, 2, 3)[pick(0, 3)],
        "policy": ("lru", "arc")[pick(0, 1)],
        "store_threshold": (1, 1, 1, 2)[pick(0, 3)],
        "prompt_only": pick(0, 2) < 2,
        "load_steps": pick(0, 6),
        "store_steps": pick(0, 10),
    }
    remote = {"role": "kv_both", "policy": "fail", "plans": {}, "offload": asked}
    return dataclasses.replace(plain, arrivals=tuple(arrivals), remote=remote, max_steps=MAX_STEPS)


class Connected:
    """The simulator's scheduler with the connector of a scenario, for ``engine_core.decisions``."""

    def __init__(self, make: Any, config: Any, remote: dict[str, Any], *, trace: bool) -> None:
        offload = remote["offload"]
        self.connector: Any = offloading(offload) if offload else StoreConnector(remote)
        self.engine = make(config, self.connector, trace=trace)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def execute(self, step: Any) -> list[Any]:
        meta: Any = step.connector_meta
        self.connector.start_load_kv(meta, 0)
        step.transfers = self.connector.get_finished(0)
        if meta is None:
            return []
        loads, stores = (
            [[job.number, job.request_id, len(job.keys)] for job in jobs]
            for jobs in (meta.loads, meta.stores)
        )
        return [loads, stores, sorted(meta.flush)]


remote_scenarios = of_kind("remote", draw_remote)
grouped_remote_scenarios = of_kind("grouped-remote", draw_grouped_remote)
drafted_remote_scenarios = of_kind("drafted-remote", draw_drafted_remote)
