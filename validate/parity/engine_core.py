"""EngineCore's loop without a model: when vLLM calls its scheduler, and what the scheduler then decided.

The same loop drives vLLM's real scheduler (vllm_scheduler.py, in vLLM's own environment) and the simulator's,
so it imports nothing but the standard library. It follows ``EngineCore.step`` and, for async
scheduling and pipeline stages, ``EngineCore.step_with_batch_queue``.

A scenario is a dict, as servecast.validate.parity.scenarios writes it: ``config`` (EngineConfig's fields),
``arrivals`` (``step``, ``arrival``, ``request``), ``aborts`` (``step``, ``request_id``, ``in_flight``) and
``grammars`` (``step``, ``request_id``: compiled by then), all in the order in which they happen; ``depth``
steps are in flight at most, and ``fills`` says whether empty ones are queued, too. ``step`` counts schedule()
calls; an idle engine jumps to the next arrival's.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator
from typing import Any, Protocol

FREE_LIST_HEAD = 16  # blocks of the free list that are compared


class Step(Protocol):
    """One engine step as the loop sees it."""

    total_tokens: int
    chunks: list[tuple[int, int]]  # (tokens, context) of prompt chunks
    decode_context: int  # KV tokens that the other requests read
    samples: int  # rows that the step samples of, drafts included
    drafts: int  # that the step verifies
    admitted: list[int]
    resumed: list[int]
    preempted: list[int]  # in victim order
    cached_tokens: dict[int, int]  # request id -> computed tokens at admission, new and resumed
    finished: list[int]  # once complete
    emitted: int  # tokens delivered, once complete
    deferred: bool  # it samples when the step before is complete: a grammar needs its tokens
    encoder_inputs: dict[int, list[int]]  # request id -> places of its items that are encoded

    def scheduled(self) -> dict[int, int]:
        """Request id -> tokens, in vLLM's order."""
        ...


class Engine(Protocol):
    """What the loop needs of a scheduler, vLLM's or the simulator's."""

    @property
    def has_requests(self) -> bool: ...
    @property
    def running(self) -> list[int]: ...
    @property
    def waiting(self) -> list[int]: ...
    @property
    def free_blocks(self) -> int: ...
    @property
    def cached_blocks(self) -> int: ...
    @property
    def kv(self) -> Any: ...  # has ``usage``, the share of blocks in use
    @property
    def prefix_queries(self) -> int: ...
    @property
    def prefix_hits(self) -> int: ...
    @property
    def drafts(self) -> Any: ...  # has vLLM's counters of drafts; None where there are none
    @property
    def encoder(self) -> Any: ...  # has ``state`` of vLLM's encoder cache; None where there is none
    @property
    def external_queries(self) -> int: ...  # of a connector
    @property
    def external_hits(self) -> int: ...

    def free_list(self, limit: int) -> list[int]: ...
    def block_ids(self, request_id: int) -> list[Any]: ...
    def add(self, request: Any, arrival: int) -> None: ...
    def abort(self, request_id: int) -> None: ...
    def grammar_ready(self, request_id: int) -> None: ...
    def schedule(self) -> Any: ...
    def complete(self, step: Any) -> None: ...

    def execute(self, step: Any) -> list[Any]:
        """With a connector: the step runs, and what has been transferred by then is part of its output.
        Returns the transfers that begin with it, where the connector is vLLM's own."""


def draft_counts(speculation: dict[str, Any], request_id: int) -> tuple[list[int], list[int]]:
    """Accepted and proposed drafts of a request's sampling steps, over and over, for both schedulers.

    Each request has its own temper: some accept all, some nothing, most of them something of it.
    """
    k = speculation["num_tokens"]
    chance = random.Random(f"{speculation['seed']} {request_id}")
    least, most = sorted((chance.randint(0, k), chance.randint(0, k)))
    accepted = [chance.randint(least, most) for _ in range(29)]
    misses = speculation["method"] in ("ngram", "suffix")
    return accepted, [chance.randint(0, k) if misses else k for _ in range(31)]


def decisions(engine: Engine, scenario: dict[str, Any], *, observed: bool = True) -> Iterator[dict[str, Any]]:
    """Run the scenario; yield one dict after every schedule() and every complete().

    Args:
        observed: False leaves out what a simulation never reads (composition, block ids, cached blocks),
            to show that reading it changes nothing.

    It stops after the scenario's ``max_steps``: without ``scheduler_reserve_full_isl`` vLLM can go on for
    ever, with requests that preempt each other and never end.
    """
    arrivals = deque(scenario["arrivals"])
    on_input = deque(abort for abort in scenario["aborts"] if not abort["in_flight"])
    in_flight = deque(abort for abort in scenario["aborts"] if abort["in_flight"])
    sizes = {group["block_size"] for group in scenario["config"]["kv_groups"]}
    # beside smaller blocks vLLM gives a prompt's last block of full attention a second hash, never looked up
    counted = observed and len(sizes) < 2
    grammars = deque(scenario["grammars"])
    depth, fills = scenario["depth"], scenario["fills"]
    remote = scenario["remote"] is not None
    batch_queue: deque[tuple[int, Step]] = deque()
    clock = steps = 0
    while arrivals or batch_queue or engine.has_requests:
        if not batch_queue and not engine.has_requests:
            clock = max(clock, arrivals[0]["step"])
        while arrivals and arrivals[0]["step"] <= clock:
            arrival = arrivals.popleft()
            engine.add(arrival["request"], arrival["arrival"])
        while on_input and on_input[0]["step"] <= clock:
            engine.abort(on_input.popleft()["request_id"])
        while grammars and grammars[0]["step"] <= clock:
            engine.grammar_ready(grammars.popleft()["request_id"])
        if engine.has_requests:
            if steps == scenario["max_steps"]:
                return
            steps += 1
            step = engine.schedule()
            transfers = {"transfers": engine.execute(step)} if remote else {}
            yield {
                "schedule": clock,
                **transfers,
                **_composition(engine, step, observed),
                **_state(engine, counted, remote),
            }
            batch_queue.append((clock, step))
            clock += 1
            oldest_done = not fills and batch_queue[0][1].total_tokens == 0
            goes_on = not step.deferred and (step.total_tokens > 0 or (fills and engine.has_requests))
            if len(batch_queue) < depth and goes_on and not oldest_done:
                continue
        number, step = batch_queue.popleft()
        while in_flight and in_flight[0]["step"] < clock:
            engine.abort(in_flight.popleft()["request_id"])
        engine.complete(step)
        yield {"complete": number, **_outcome(engine, step, remote), **_state(engine, counted, remote)}


def _composition(engine: Engine, step: Step, observed: bool) -> dict[str, Any]:
    composition: dict[str, Any] = {
        "admitted": step.admitted,
        "resumed": step.resumed,
        "preempted": step.preempted,
        "cached_tokens": [list(item) for item in sorted(step.cached_tokens.items())],
        "samples": step.samples,
        "drafts": step.drafts,
        "context": sum(sum(chunk) for chunk in step.chunks) + step.decode_context,
    }
    if engine.encoder is not None:
        composition["encoded"] = [list(item) for item in step.encoder_inputs.items()]
    if observed:
        scheduled = step.scheduled()
        composition["scheduled"] = [list(item) for item in scheduled.items()]
        composition["block_ids"] = [engine.block_ids(request_id) for request_id in scheduled]
    return composition


def _outcome(engine: Engine, step: Step, remote: bool) -> dict[str, Any]:
    counted: dict[str, Any] = {}
    if remote:
        counted["external"] = [engine.external_queries, engine.external_hits]
    if engine.drafts is not None:
        counts = engine.drafts
        counted["draft_counters"] = [counts.num_drafts, counts.num_draft_tokens, counts.num_accepted_tokens]
        counted["draft_counters"] += counts.per_position
    return counted | {
        "finished": step.finished,
        "emitted": step.emitted,
        "prefix_queries": engine.prefix_queries,
        "prefix_hits": engine.prefix_hits,
        "usage": engine.kv.usage,
    }


def _state(engine: Engine, counted: bool, remote: bool) -> dict[str, Any]:
    state: dict[str, Any] = {
        "running": engine.running,
        "waiting": engine.waiting,
        "free_blocks": engine.free_blocks,
        "free_list": engine.free_list(FREE_LIST_HEAD),
    }
    if remote:
        held = [(request_id, engine.block_ids(request_id)) for request_id in engine.waiting]
        state["waiting_blocks"] = [[request_id, blocks] for request_id, blocks in held if any(blocks)]
    if engine.encoder is not None:
        state["encoder"] = engine.encoder.state
    if counted:
        state["cached_blocks"] = engine.cached_blocks
    return state
