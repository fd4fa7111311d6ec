"""vLLM's native offloading to host memory: OffloadingConnector, without a model of time of its own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from servecast.sim.engine.chunk_cache import Accesses, ChunkCache, Policy
from servecast.sim.engine.connector import Ending, FailurePolicy, Role, Transfers
from servecast.sim.engine.offloading_rules import offloading_rules_for
from servecast.sim.engine.scheduler import Scheduler
from servecast.sim.engine.sequence import Sequence
from servecast.sim.engine.step import Step
from servecast.sim.inputs.errors import InputError


@dataclass(slots=True)
class Job:
    """A transfer of chunks of one request. blocks: of the GPU, those it reads or writes."""

    number: int
    request_id: int
    keys: tuple[int, ...]
    blocks: tuple[int, ...]
    stores: bool


@dataclass(slots=True)
class Jobs:
    """What the workers are told with a step. flush: numbers of stores that must be over before it runs."""

    loads: list[Job]
    stores: list[Job]
    flush: set[int]


class Copies(Protocol):
    """The worker half: when jobs are done. Times are picoseconds."""

    def start(self, jobs: Jobs, now: int) -> float:
        """A step starts at ``now``. Returns seconds that it waits for flushed stores."""
        ...

    def finished(self, now: int) -> list[Job]:
        """Jobs done by ``now`` that were not named yet."""
        ...

    def next_event(self, now: int) -> int: ...


@dataclass(slots=True, eq=False)
class Tracked:
    """A request. local: tokens of its last look-up's hit on the GPU. next_chunk: the first that was not
    offered. holds: its blocks are those of the table, or, once it has ended, ``blocks``."""

    sequence: Sequence
    accesses: Accesses = field(default_factory=Accesses)
    keys: list[int] = field(default_factory=list)
    jobs: set[int] = field(default_factory=set)
    blocks: list[int] = field(default_factory=list)
    local: int = 0
    next_chunk: int = 0
    holds: bool = False
    ending: Ending | None = None
    signaled: bool = False


class OffloadingConnector:
    """Every chunk of a prompt is written to host memory once it is computed, and read from there where the
    GPU has it no more (vllm/distributed/kv_transfer/kv_connector/v1/offloading/scheduler.py; one KV cache
    group).

    Args:
        chunks: that fit into host memory. blocks_per_chunk: GPU blocks of one.
        copies: when transfers are done.
        policy, store_threshold, max_tracker_size: see ``ChunkCache``, which ``bind`` makes.
        offload_prompt_only: outputs are not written.
    """

    role: Role = "kv_both"
    load_failure_policy: FailurePolicy = "fail"
    requires_kv_delivery = False

    def __init__(
        self,
        chunks: int,
        copies: Copies,
        *,
        blocks_per_chunk: int = 1,
        policy: Policy = "lru",
        store_threshold: int = 1,
        offload_prompt_only: bool = True,
        max_tracker_size: int = 64_000,
    ) -> None:
        self._kept = (chunks, policy, store_threshold, max_tracker_size)
        self.copies, self.blocks_per_chunk = copies, blocks_per_chunk
        self.prompt_only = offload_prompt_only
        self._tracked: dict[int, Tracked] = {}
        self._jobs: dict[int, Job] = {}
        self._number = 0
        self._loads: list[Job] = []
        self._given: set[int] = set()  # blocks that somebody got since the last step was decided
        self._fenced: dict[int, set[int]] = {}  # blocks of ended requests -> stores that still read them
        self._loading: set[int] = set()
        self._behind: set[int] = set()  # requests with chunks that found no room
        self._ended: list[int] = []

    # ---- the scheduler half

    def bind(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._block_size = scheduler.config.block_size
        self._chunk = self._block_size * self.blocks_per_chunk
        self.rules = offloading_rules_for(scheduler.config.version)
        chunks, policy, threshold, tracked = self._kept
        self.cache = ChunkCache(chunks, policy, self.rules, store_threshold=threshold, tracked=tracked)
        scheduler.watch_allocations()

    def on_new_request(self, sequence: Sequence) -> None:
        self._tracked[sequence.request_id] = Tracked(sequence)

    def _extend_keys(self, tracked: Tracked) -> None:
        """Keys of all its whole chunks: those of their last blocks."""
        count = tracked.sequence.num_tokens // self._chunk
        if len(tracked.keys) < count:
            blocks = self._scheduler.block_keys(tracked.sequence, count * self.blocks_per_chunk)
            for place in range(len(tracked.keys), count):
                key = blocks[(place + 1) * self.blocks_per_chunk - 1]
                tracked.keys.append(key)
                tracked.accesses.places[key] = place

    def get_num_new_matched_tokens(
        self, sequence: Sequence, num_computed_tokens: int
    ) -> tuple[int, bool] | None:
        tracked = self._tracked[sequence.request_id]
        tracked.holds = False
        if self.rules.offers_again:
            tracked.next_chunk = 0
        if tracked.jobs and self.rules.waits_for_own:
            return None
        self._extend_keys(tracked)
        tracked.local = num_computed_tokens
        found = self._lookup(tracked)
        self.cache.touch(tracked.keys)
        return None if found is None else (found, found > 0)

    def _lookup(self, tracked: Tracked) -> int | None:
        """Tokens beyond the local hit; None while a chunk is being written, or loaded for another request."""
        first, hits, pending = tracked.local // self._chunk, 0, False
        if len(tracked.keys) * self._chunk - tracked.local < self._chunk:
            return 0
        for key in tracked.keys[first:]:
            there = self.cache.lookup(key)
            if there is False:
                break
            pending |= there is None
            hits += 1
        if pending:
            return None
        tokens = (first + hits) * self._chunk - tracked.local
        if not hits or tokens < self._chunk:
            return 0
        waits = self._scheduler.config.enable_prefix_caching
        waits = waits and any(key in self._loading for key in tracked.keys[first : first + hits])
        return None if waits else tokens

    def update_state_after_alloc(self, sequence: Sequence, num_external_tokens: int) -> None:
        if not num_external_tokens:
            return
        tracked = self._tracked[sequence.request_id]
        if tracked.jobs:
            raise InputError(
                f"request {sequence.request_id} is loaded while it is stored, for which vLLM's engine ends",
                where="engine.kv_offloading_size",
                fix="Use version 0.24 or newer, or leave async scheduling out.",
            )
        blocks = self._scheduler.block_ids(sequence.request_id)
        self._given.update(blocks)
        end = tracked.local + num_external_tokens
        first = tracked.local // self._block_size
        chunks = -(-end // self._chunk)
        keys = tracked.keys[first // self.blocks_per_chunk : chunks]
        self.cache.prepare_load(keys, tracked.accesses)
        tracked.next_chunk = chunks
        self._loads.append(
            self._add(tracked, keys, blocks[first : -(-end // self._block_size)], stores=False)
        )
        self._loading.update(keys)

    def _add(self, tracked: Tracked, keys: list[int], blocks: list[int], *, stores: bool) -> Job:
        job = Job(self._number, tracked.sequence.request_id, tuple(keys), tuple(blocks), stores)
        self._number += 1
        self._jobs[job.number] = job
        tracked.jobs.add(job.number)
        return job

    def build_connector_meta(self, step: Step) -> Jobs:
        for sequence in step.joined:
            self._tracked[sequence.request_id].holds = True
            self._given.update(self._scheduler.block_ids(sequence.request_id))
        self._given.update(self._scheduler.take_allocations())
        earlier = set(self._jobs)
        stores = [job for tracked in self._to_store(step) if (job := self._store(tracked)) is not None]
        flush = {job for sequence in step.victims for job in self._tracked[sequence.request_id].jobs}
        flush.update(job for block in self._given.intersection(self._fenced) for job in self._fenced[block])
        if self.rules.flushes_at_the_end and all(tracked.ending for tracked in self._tracked.values()):
            flush |= earlier
        for request_id in self._ended:
            tracked = self._tracked[request_id]
            tracked.signaled = True
            self.cache.on_request_finished(tracked.accesses)
            if not tracked.jobs:
                del self._tracked[request_id]
        self._ended = []
        meta = Jobs(self._loads, stores, flush)
        self._loads, self._given = [], set()
        return meta

    def _to_store(self, step: Step) -> list[Tracked]:
        """Who may have new chunks, in the order of the step; those that have ended come last."""
        chunks = {sequence.request_id for sequence in step.prefilling}
        if not self.prompt_only:
            chunks.update(sequence.request_id for sequence in step.samplers)
        behind = {i for i in self._behind if self._tracked[i].sequence.scheduled_tick == step.tick}
        order = [sequence.request_id for sequence in step.prefilling]
        if not chunks.issuperset(behind) or not self.prompt_only:
            order = [i for i in self._scheduler.running if i in chunks or i in behind]
        self._ended.sort()
        ended = self._ended if self.rules.stores_ended else ()
        return [self._tracked[request_id] for request_id in [*order, *ended]]

    def _store(self, tracked: Tracked) -> Job | None:
        """Plan the store of its new whole chunks (_build_store_jobs)."""
        sequence = tracked.sequence
        computed = sequence.computed
        if tracked.ending is not None and tracked.ending != "aborted":
            computed = max(sequence.prompt_tokens, sequence.num_tokens - 1)
        tokens = min(computed, sequence.num_tokens)
        if self.prompt_only:
            tokens = min(tokens, sequence.prompt_tokens)
        self._extend_keys(tracked)
        blocks = tracked.blocks
        if tracked.ending is None:
            blocks = self._scheduler.block_ids(sequence.request_id)
        end = min(tokens // self._chunk, len(blocks) // self.blocks_per_chunk, len(tracked.keys))
        first = tracked.next_chunk
        self._behind.discard(sequence.request_id)
        if end <= first:
            if self.rules.returns:
                tracked.next_chunk = end
            return None
        accepted = self.cache.prepare_store(tracked.keys[first:end], tracked.accesses)
        if accepted is None:
            if tracked.ending is None:
                self._behind.add(sequence.request_id)
            return None
        tracked.next_chunk = end
        if not accepted:
            return None
        self.cache.touch(tracked.keys)
        wanted, source = set(accepted), list[int]()
        for place in range(first, end):
            if tracked.keys[place] in wanted:
                source += blocks[place * self.blocks_per_chunk : (place + 1) * self.blocks_per_chunk]
        job = self._add(tracked, accepted, source, stores=True)
        if tracked.ending is not None:
            self._fence(job)
        return job

    def _fence(self, job: Job) -> None:
        for block in job.blocks:
            self._fenced.setdefault(block, set()).add(job.number)

    def request_finished(self, sequence: Sequence, ending: Ending) -> bool:
        tracked = self._tracked[sequence.request_id]
        self._extend_keys(tracked)
        tracked.ending = ending
        tracked.blocks = self._scheduler.block_ids(sequence.request_id) if tracked.holds else []
        self._behind.discard(sequence.request_id)
        self._ended.append(sequence.request_id)
        for number in tracked.jobs:
            if self._jobs[number].stores:
                self._fence(self._jobs[number])
        return False

    def update_connector_output(self, transfers: Transfers) -> None:
        for number in transfers.jobs:
            job = self._jobs.pop(number)
            tracked = self._tracked[job.request_id]
            if job.stores:
                self.cache.complete_store(job.keys)
                for block in job.blocks if tracked.ending is not None else ():
                    self._fenced[block].discard(number)
                    if not self._fenced[block]:
                        del self._fenced[block]
            else:
                self.cache.complete_load(job.keys)
                self._loading.difference_update(job.keys)
            tracked.jobs.discard(number)
            if tracked.signaled and not tracked.jobs:
                del self._tracked[job.request_id]

    def has_pending_push_work(self) -> bool:
        """Whether the engine goes on for its transfers."""
        return bool(self._jobs)

    # ---- the worker half

    def start_load_kv(self, meta: Jobs, now: int) -> float:
        return self.copies.start(meta, now)

    def get_finished(self, now: int) -> Transfers | None:
        done = self.copies.finished(now)
        if not done:
            return None
        received = tuple(job.request_id for job in done if not job.stores)
        return Transfers(finished_recving=received, jobs=tuple(job.number for job in done))

    def next_event(self, now: int) -> int:
        return self.copies.next_event(now)
