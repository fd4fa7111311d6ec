"""A store of KV cache that answers as a scenario says: one for vLLM's connector and for the simulator's.

Imports nothing but the standard library, for it runs under vLLM's Python, too. Time is steps: what is
submitted with a step is reported by the output of the step so many later.
"""

from __future__ import annotations

from typing import Any

LOST = -1  # stands for all blocks of a load


class FakeStore:
    """Loads, failures and kept blocks by plan.

    Args:
        plans: by request id (as text): ``remote``: prompt tokens that it has; ``mode``: async or sync;
            ``steps``: until an asynchronous load is over; ``later``: look-ups that it puts off; ``again``: a
            preempted request finds them again; ``fail``: block of the load, counted from its first, that goes
            wrong, or None, and with it the whole load where there are several cache groups; ``hold``: steps
            for which blocks are kept when it has ended, 0 is none.
    """

    def __init__(self, plans: dict[str, dict[str, Any]]) -> None:
        self.plans = plans
        self.clock = 0  # steps so far
        self.asked: dict[int, int] = {}
        self.loaded: set[int] = set()
        self.local: dict[int, int] = {}  # blocks hit at the last look-up
        self.due: list[tuple[int, str, int, list[int]]] = []  # (step, kind, request, failed blocks)
        self.invalid: list[int] = []  # of synchronous loads of the step being decided

    def match(
        self, request_id: int, prompt: int, tokens: int, local: int, block: int
    ) -> tuple[int, bool] | None:
        """``get_num_new_matched_tokens``."""
        plan = self.plans.get(str(request_id))
        if plan is None:
            return 0, False
        self.asked[request_id] = self.asked.get(request_id, 0) + 1
        if self.asked[request_id] <= plan["later"]:
            return None
        if request_id in self.loaded and not plan["again"]:
            return 0, False
        self.local[request_id] = local // block
        asynchronous = plan["mode"] == "async"
        most = tokens if asynchronous and tokens > 1 else tokens - 1
        count = min(plan["remote"], prompt, most) - local
        return (count, asynchronous) if count > 0 else (0, False)

    def allocated(self, request_id: int, blocks: list[Any], external: int, block: int) -> None:
        """``update_state_after_alloc``; blocks: a list of them, or one a group."""
        if external <= 0:
            return
        plan = self.plans[str(request_id)]
        failed: list[int] = []
        first = self.local[request_id]
        last = first + -(-external // block)
        if plan["fail"] is not None and request_id not in self.loaded and first + plan["fail"] < last:
            failed = [LOST] if isinstance(blocks[0], list) else [blocks[first + plan["fail"]]]
            failed = [block for block in failed if block]  # none where it is out of a window
        self.loaded.add(request_id)
        if plan["mode"] == "async":
            self.due.append((self.clock + plan["steps"], "received", request_id, failed))
        else:
            self.invalid += failed

    def finished(self, request_id: int, ended: bool) -> bool:
        """``request_finished``; ``ended``: with its last token."""
        hold = self.plans[str(request_id)]["hold"] if ended and str(request_id) in self.plans else 0
        if hold:
            self.due.append((self.clock + hold, "sent", request_id, []))
        return bool(hold)

    def step(self) -> dict[str, list[int]]:
        """A step has been decided and runs: what its output reports."""
        ready = [due for due in self.due if due[0] <= self.clock]
        self.due = [due for due in self.due if due[0] > self.clock]
        self.clock += 1
        invalid, self.invalid = self.invalid, []
        return {
            "received": [request for _, kind, request, _ in ready if kind == "received"],
            "sent": [request for _, kind, request, _ in ready if kind == "sent"],
            "invalid": sorted({*invalid, *(block for *_, failed in ready for block in failed)} - {LOST}),
            "lost": [request for *_, request, failed in ready if LOST in failed],
        }


class FakeCopies:
    """The workers of native offloading: a store is submitted in the step after its own, a flushed one is over
    before the step runs; ``load_steps`` and ``store_steps`` from there on."""

    def __init__(self, load_steps: int, store_steps: int) -> None:
        self.load_steps, self.store_steps = load_steps, store_steps
        self.clock = 0
        self.due: list[tuple[int, int]] = []  # (step, number of the job)

    def step(self, loads: list[int], stores: list[int], flush: set[int]) -> list[int]:
        """Numbers of jobs that end with this step."""
        self.due += [(self.clock + self.load_steps, number) for number in loads]
        self.due += [(self.clock + 1 + self.store_steps, number) for number in stores]
        ready = sorted(number for step, number in self.due if step <= self.clock or number in flush)
        self.due = [(step, number) for step, number in self.due if number not in ready]
        self.clock += 1
        return ready
