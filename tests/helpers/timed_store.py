"""A KV connector on the simulation's clock: loads and kept blocks of so many seconds, per request."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from servecast.sim.engine.connector import NEVER, Ending, FailurePolicy, Role, Transfers
from servecast.sim.engine.scheduler import Scheduler
from servecast.sim.engine.sequence import Sequence
from servecast.sim.engine.step import Step


@dataclass
class Plan:
    """remote: tokens that are elsewhere; load_s: until they are here, aside, or, ``sync``, within the step;
    fails: they never come. hold_s: blocks are kept so long after its end."""

    remote: int = 0
    load_s: float = 0.0
    sync: bool = False
    fails: bool = False
    hold_s: float = 0.0


class TimedStore:
    """See ``Connector``."""

    requires_kv_delivery = False

    def __init__(
        self, plans: dict[int, Plan], role: Role = "kv_consumer", policy: FailurePolicy = "fail"
    ) -> None:
        self.role, self.load_failure_policy, self.plans = role, policy, plans
        self.new: list[Plan] = []
        self.due: list[tuple[int, str, int]] = []
        self.ended: list[int] = []
        self.lost: set[int] = set()
        self.polls = 0

    def bind(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler

    def on_new_request(self, sequence: Sequence) -> None:
        pass

    def get_num_new_matched_tokens(
        self, sequence: Sequence, num_computed_tokens: int
    ) -> tuple[int, bool] | None:
        plan = self.plans.get(sequence.request_id, Plan())
        lost = sequence.request_id in self.lost
        tokens = 0 if lost else max(0, plan.remote - num_computed_tokens)
        return tokens, tokens > 0 and not plan.sync

    def update_state_after_alloc(self, sequence: Sequence, num_external_tokens: int) -> None:
        if num_external_tokens:
            self.ended.append(~sequence.request_id)

    def build_connector_meta(self, step: Step) -> list[int]:
        started, self.ended = self.ended, []
        return started

    def request_finished(self, sequence: Sequence, ending: Ending) -> bool:
        held = ending == "finished" and self.plans.get(sequence.request_id, Plan()).hold_s > 0
        if held:
            self.ended.append(sequence.request_id)
        return held

    def update_connector_output(self, transfers: Transfers) -> None:
        pass

    def start_load_kv(self, meta: Any, now: int) -> float:
        wait = 0.0
        for entry in meta:
            plan = self.plans[entry if entry >= 0 else ~entry]
            if entry >= 0:
                self.due.append((now + round(plan.hold_s * 1e12), "sent", entry))
            elif plan.sync:
                wait += plan.load_s
            else:
                self.due.append((now + round(plan.load_s * 1e12), "received", ~entry))
        return wait

    def get_finished(self, now: int) -> Transfers | None:
        self.polls += 1
        ready = [entry for entry in self.due if entry[0] <= now]
        self.due = [entry for entry in self.due if entry[0] > now]
        if not ready:
            return None
        received = tuple(request for _, kind, request in ready if kind == "received")
        self.lost.update(request for request in received if self.plans[request].fails)
        return Transfers(
            finished_recving=received,
            finished_sending=tuple(request for _, kind, request in ready if kind == "sent"),
            failed_recving=tuple(request for request in received if self.plans[request].fails),
        )

    def next_event(self, now: int) -> int:
        return min((time for time, _, _ in self.due), default=NEVER)
