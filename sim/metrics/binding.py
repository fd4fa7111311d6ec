"""What keeps a server from more: the queue's cause where requests wait, else what its steps spend time on.

After ``schedule`` a request still waits for exactly one of three reasons: the running list is full, the
step's token budget is used up, or its KV blocks could not be had (the scheduler stops at the first that
applies). So the step table tells which, step by step. Two more are taken to be so where blocks are free: KV
cache is on its way, where it is loaded from elsewhere, or a request is passed over, for its adapter's slot or
its grammar.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from servecast.sim.engine.engine import StepShape
from servecast.sim.metrics.records import Run, engines_of

QUEUE_LIMITS = ("max_num_seqs", "token_budget", "kv_loads", "passed_over", "kv_blocks")
BLOCKS_FREE = 0.9  # of the KV blocks in use, below which nobody waits for one
LINK_SHARE = 0.8  # of the time that a link is busy, from which on it binds
WAITING_SHARE = 0.05  # a queue that stands for less of the engine's time does not bind
FRONT_END_SHARE = 0.5  # of TTFT before the engine's queue
DELIVERY_LAG = 1.2  # gaps seen by the client over the steps that produced them
STEP_SAMPLE = 200
SAMPLED = ("prefill_tokens", "prefill_requests", "decodes", "decode_context", "emitted", "drafts", "duration")


@dataclass(frozen=True, slots=True)
class Limits:
    """What an engine of a run could not exceed, and what its step-time model knows.

    num_gpu_blocks includes the null block; None where no request waits for blocks. stride: steps from one
    token of a request to its next, several where steps overlap in a pipeline. bound_by: what most of a step's
    time goes to (``StepTime.binding``). parts: part of a step to seconds (``StepTime.breakdown``).
    None where the step-time model cannot tell. loads: KV cache is loaded from elsewhere. draft_length: drafts
    that each request gets after a step of so many; None without speculation. waits: a step lasts longer than
    its parts while other engine cores are waited for. passes_over: requests may wait for the slot of a LoRA
    adapter, or for a grammar. encodes: what a step with prompts lasts longer is its vision tower's.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    num_gpu_blocks: int | None
    bound_by: Callable[[StepShape], str] | None = None
    parts: Callable[[StepShape], Mapping[str, float]] | None = None
    loads: bool = False
    draft_length: Callable[[int], int] | None = None
    stride: int = 1
    pools: tuple[tuple[str, tuple[int, ...], Limits], ...] = ()
    waits: bool = False
    passes_over: bool = False
    encodes: bool = False


@dataclass(slots=True)
class StepRow:
    """A StepShape from a row of the step table. Prompt chunks are taken as equal and at context 0."""

    chunks: Sequence[tuple[int, int]]
    decodes: int
    decode_context: int
    samples: int
    drafts: int = 0
    drafters: int = 0
    draft_length: int = 0


@dataclass(frozen=True, slots=True)
class Evidence:
    """Shares in 0..1, each of the engine's busy time unless it says otherwise.

    max_num_seqs, token_budget, kv_loads, passed_over, kv_blocks: steps in which requests waited for it.
    kv_link: of the run, in which the busiest link that KV cache is moved over was busy.
    busy: busy time of the window. front_end: of the mean TTFT, spent before the engine's queue.
    delivery: mean inter-token gap at the client over the mean of the steps behind it (not a share).
    steps: of each replication, steps spread evenly over it, see ``sampled``. limits: the engine's. pool: of
    whose servers this is, empty without pools. transfer: of the mean TTFT, while KV blocks were on their way.
    """

    max_num_seqs: float
    token_budget: float
    kv_blocks: float
    busy: float
    front_end: float
    delivery: float
    steps: tuple[NDArray[np.float64], ...]
    limits: Limits
    pool: str = ""
    transfer: float = 0.0
    kv_loads: float = 0.0
    kv_link: float = 0.0
    passed_over: float = 0.0

    @classmethod
    def mean(cls, all_of: Sequence[Evidence]) -> Evidence:
        """The mean over replications, of those in which the pool binds that binds in most."""
        names = [each.pool for each in all_of]
        pool = max(names, key=names.count)
        all_of = [each for each in all_of if each.pool == pool]
        values: dict[str, float] = {
            field.name: float(np.mean([getattr(each, field.name) for each in all_of]))
            for field in fields(cls)
            if field.name not in ("steps", "limits", "pool")
        }
        steps = tuple(sample for each in all_of for sample in each.steps)
        return cls(**values, steps=steps, limits=all_of[0].limits, pool=pool)

    @property
    def step_shares(self) -> tuple[dict[str, float], dict[str, float]]:
        """Shares of the sampled steps' time by what most of a step's goes to, and by part; means over
        replications. Empty where the step-time model cannot tell."""
        if not self.steps:
            return {}, {}
        bound, parts = zip(*(step_shares(sample, self.limits) for sample in self.steps), strict=True)
        return _mean_shares(bound), _mean_shares(parts)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        rest = {field.name: getattr(self, field.name) for field in fields(self)}
        del rest["steps"], rest["limits"]
        if not self.pool:
            del rest["pool"], rest["transfer"]
        bound_by, parts = self.step_shares
        return {**rest, "bound_by": bound_by, "parts": parts}


@dataclass(frozen=True, slots=True)
class Binding:
    """What binds ("compute", "memory_bandwidth", "host", "interconnect", "front_end", "kv_blocks",
    "kv_loads", "passed_over", "kv_link", "max_num_seqs", "token_budget", "none" or "unknown"), and why one
    should believe it."""

    limit: str
    reasons: tuple[str, ...]


def evidence(run: Run, limits: Limits) -> Evidence:
    """What the tables of a run (or of the part that ``warmup.select`` gives) say about its limits."""
    steps, requests = run.steps, run.requests
    time = steps["duration"].to_numpy(dtype=float)
    total = float(time.sum()) or math.nan
    limited = waited_for(steps, limits)
    waited = {name: float(time[limited == name].sum()) / total for name in QUEUE_LIMITS}
    window = float(steps["start"].max() - steps["start"].min()) + float(time[-1:].sum())
    ttft = (requests["first_token"] - requests["sent"]).mean()
    decodes = steps["decodes"].to_numpy(dtype=float)
    gap = float(np.average(run.itl["gap"], weights=run.itl["weight"])) if len(run.itl) else math.nan
    behind = float(np.average(time, weights=decodes)) if decodes.any() else math.nan
    return Evidence(
        **waited,
        kv_link=max((float(share) for share in run.meta.get("kv_links", {}).values()), default=0.0),
        busy=total / (window * max(engines_of(steps).nunique(), 1)) if window else math.nan,
        front_end=float((requests["queued"] - requests["sent"]).mean() / ttft),
        delivery=gap / (behind * limits.stride),
        steps=(sampled(steps),),
        limits=limits,
        pool="",
    )


def waited_for(steps: pd.DataFrame, limits: Limits) -> np.ndarray[tuple[int], np.dtype[np.str_]]:
    """What requests waited for in each step, one of ``QUEUE_LIMITS``; "" where none waited."""
    waits = steps["waiting"].to_numpy() > 0
    full = waits & ((steps["running"].to_numpy() >= limits.max_num_seqs) | (limits.num_gpu_blocks is None))
    scheduled = sum(steps[name].to_numpy() for name in ("prefill_tokens", "decodes", "drafts"))
    spent = waits & (scheduled >= limits.max_num_batched_tokens)
    free = waits & (steps["kv_usage"].to_numpy() < BLOCKS_FREE)
    found = [full, spent, free & limits.loads, free & limits.passes_over, waits]
    return np.select(found, list(QUEUE_LIMITS), default="")


def binding_limit(found: Evidence, *, only_token_times: bool) -> Binding:
    """Names the limit that the evidence points to, and of which pool.

    only_token_times: the load fails on the time between tokens alone (TPOT, ITL) and nothing piles up;
    then a queue for admission is beside the point.

    In this order: the client sees tokens more than 20 % later than the steps make them, or spends more
    than half of TTFT before the engine's queue: front_end. A link that KV cache is moved over is busy more
    than 80 % of the time: kv_link. Requests wait in more than 5 % of the engine's time: what they wait for.
    Otherwise: what the steps' time goes to.
    """
    bound = _binding_limit(found, only_token_times=only_token_times)
    if not found.pool:
        return bound
    return Binding(bound.limit, (f"the {found.pool} servers bind", *bound.reasons))


def _binding_limit(found: Evidence, *, only_token_times: bool) -> Binding:
    if not only_token_times and found.transfer > FRONT_END_SHARE:
        return Binding("kv_link", (f"{found.transfer:.0%} of TTFT passes while KV blocks are on their way",))
    if found.delivery > DELIVERY_LAG:
        lag = f"{found.delivery:.2f} times as far apart as the engine makes them"
        return Binding("front_end", (f"tokens reach the client {lag}",))
    if not only_token_times and found.front_end > FRONT_END_SHARE:
        return Binding("front_end", (f"{found.front_end:.0%} of TTFT passes before the engine's queue",))
    bound_by, parts = found.step_shares
    step = _step_reasons(found.busy, bound_by, parts)
    if found.kv_link > LINK_SHARE:
        busy = f"a link that moves KV cache is busy {found.kv_link:.0%} of the time"
        return Binding("kv_link", (busy, *step))
    if not only_token_times:
        queue = {name: getattr(found, name) for name in QUEUE_LIMITS}
        cause = max(QUEUE_LIMITS, key=lambda name: queue[name])
        if sum(queue.values()) > WAITING_SHARE:
            return Binding(cause, (_queue_reason(cause, queue[cause], found.limits), *step))
    if not bound_by:
        return Binding("unknown", ("no queue and no step-time model that could tell", *step))
    return Binding(max(bound_by, key=lambda name: bound_by[name]), tuple(step))


def _queue_reason(cause: str, share: float, limits: Limits) -> str:
    budget = f"{limits.max_num_batched_tokens} tokens of a step (max_num_batched_tokens)"
    what = {
        "max_num_seqs": f"all {limits.max_num_seqs} sequence slots (max_num_seqs) are taken",
        "token_budget": f"the {budget} are used up",
        "kv_loads": "KV cache is on its way, and blocks are free",
        "passed_over": "blocks are free, but no slot for their adapter (max_loras), or no grammar yet",
        "kv_blocks": f"no more of the {(limits.num_gpu_blocks or 1) - 1} KV blocks can be had",
    }
    return f"in {share:.0%} of the engine's time requests wait while {what[cause]}"


def _step_reasons(busy: float, bound_by: Mapping[str, float], parts: Mapping[str, float]) -> list[str]:
    reasons = [f"the engine is busy {busy:.0%} of the time"]
    for label, shares in (("bound by", bound_by), ("spent on", parts)):
        if shares:
            top = sorted(shares.items(), key=lambda item: -item[1])[:3]
            reasons.append(f"step time {label} " + ", ".join(f"{name} {share:.0%}" for name, share in top))
    return reasons


def sampled(steps: pd.DataFrame) -> NDArray[np.float64]:
    """Steps spread evenly over a run: (n, 7), ``SAMPLED``."""
    rows = np.unique(np.linspace(0, len(steps) - 1, STEP_SAMPLE if len(steps) else 0).astype(int))
    return np.column_stack([steps[name].to_numpy(dtype=float)[rows] for name in SAMPLED])


def step_shares(sample: NDArray[np.float64], limits: Limits) -> tuple[dict[str, float], dict[str, float]]:
    """Shares of the time of ``sampled`` steps by what most of a step's goes to, and by part; empty where the
    step-time model cannot tell."""
    bound: dict[str, float] = {}
    parts: dict[str, float] = {}
    if limits.bound_by is None:
        return bound, parts
    for *counts, duration in sample.tolist():
        tokens, requests, decodes, context, emitted, drafts = map(int, counts)
        each, extra = divmod(tokens, requests or 1)
        chunks = [(each + (number < extra), 0) for number in range(requests)]
        shape = StepRow(chunks, decodes, context, emitted)
        if limits.draft_length is not None:
            shape = StepRow(chunks, decodes, context, decodes + drafts, drafts, decodes)
            shape.draft_length = limits.draft_length(decodes + requests)
        name = limits.bound_by(shape)
        bound[name] = bound.get(name, 0.0) + duration
        own = dict(limits.parts(shape)) if limits.parts else {}
        if limits.waits and own:
            own["other_cores"] = max(0.0, duration - sum(own.values()))
        if limits.encodes and own and chunks:
            own["vision_tower"] = max(0.0, duration - sum(own.values()))
        for part, seconds in own.items():
            parts[part] = parts.get(part, 0.0) + seconds
    return _normalised(bound), _normalised(parts)


def _normalised(weights: Mapping[str, float]) -> dict[str, float]:
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items()} if total else {}


def _mean_shares(shares: Sequence[Mapping[str, float]]) -> dict[str, float]:
    summed: dict[str, float] = {}
    for each in shares:
        for name, share in each.items():
            summed[name] = summed.get(name, 0.0) + share
    return _normalised(summed)
