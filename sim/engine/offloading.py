"""vLLM's native OffloadingConnector: KV cache of prompts, kept in host memory.

Followed: ``vllm/distributed/kv_transfer/kv_connector/v1/offloading`` of 0.32, for one KV cache group. Chunks
are some blocks each; they are stored as prompts are computed, and loaded aside.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from servecast.sim.engine.connector import NEVER, Ending, FailurePolicy, Role, Transfers
from servecast.sim.engine.cpu_cache import Access, CpuCache
from servecast.sim.engine.pipe import Pipe
from servecast.sim.engine.sequence import Sequence
from servecast.sim.engine.step import Step
from servecast.sim.engine.tiers import chunk_keys
from servecast.sim.inputs.units import to_seconds


@dataclass(slots=True)
class Job:
    """A copy of whole chunks for a request, in blocks of the GPU."""

    request_id: int
    keys: list[int]
    blocks: list[int]
    is_store: bool


@dataclass(slots=True)
class Meta:
    """What a step's workers do, by numbers of jobs. Stores are begun with the next step; ``flush`` is awaited."""

    loads: list[int] = field(default_factory=list)
    stores: list[int] = field(default_factory=list)
    flush: set[int] = field(default_factory=set)


@dataclass(slots=True)
class _Request:
    """chunks: leading ones that are stored, or need not be. jobs: under way."""

    sequence: Sequence
    access: Access = field(default_factory=Access)
    keys: list[int] = field(default_factory=list)
    places: dict[int, int] = field(default_factory=dict)
    chunks: int = 0
    local: int = 0
    jobs: set[int] = field(default_factory=set)
    ended: bool = False


class OffloadingConnector:
    """See ``Connector``.

    Args:
        cache: host memory. blocks_per_chunk: of the GPU. block_bytes: of one, on one rank.
        to_gpu, to_host: each way between one GPU and its host.
        role, load_failure_policy: see ``Connector``. replica: its number.

    Attributes:
        now: the time of the scheduler's calls, ps.
        loaded_blocks: from host memory, so far.
    """

    requires_kv_delivery = False

    def __init__(
        self,
        cache: CpuCache,
        blocks_per_chunk: int,
        block_bytes: int,
        to_gpu: Pipe,
        to_host: Pipe,
        role: Role = "kv_both",
        load_failure_policy: FailurePolicy = "fail",
        replica: int = 0,
    ) -> None:
        self.cache, self.blocks_per_chunk, self.block_bytes = cache, blocks_per_chunk, block_bytes
        self.to_gpu, self.to_host = to_gpu, to_host
        self.role, self.load_failure_policy, self.replica = role, load_failure_policy, replica
        self.now = self.loaded_blocks = self._made = 0
        self.scheduler: Any = None
        self._requests: dict[int, _Request] = {}
        self._jobs: dict[int, Job] = {}
        self._loading: set[int] = set()  # chunks
        self._fenced: dict[int, set[int]] = {}  # blocks of requests that have ended -> their stores
        self._unplaced: dict[int, None] = {}  # requests with chunks that found no room
        self._ended: list[int] = []  # since the last step
        self._meta = Meta()
        self._deferred: list[int] = []  # stores, to be begun
        self._due: dict[int, int] = {}  # job -> end, ps

    @property
    def links(self) -> dict[str, Pipe]:
        """What it moves KV cache over."""
        return {"host_to_gpu": self.to_gpu, "gpu_to_host": self.to_host}

    @property
    def loaded_tokens(self) -> dict[str, int]:
        """By the tier that they came from."""
        return {"cpu": self.loaded_blocks * self.block}

    @property
    def evictions(self) -> int:
        """Chunks that made room."""
        return self.cache.evictions

    # ---- the scheduler half

    def bind(self, scheduler: Any) -> None:
        """See ``Connector``."""
        self.scheduler = scheduler
        self.block = scheduler.kv.block_size
        self.chunk = self.block * self.blocks_per_chunk

    def on_new_request(self, sequence: Sequence) -> None:
        """See ``Connector``."""
        self._requests[sequence.request_id] = _Request(sequence)

    def _learn(self, request: _Request) -> None:
        """The keys of all its whole chunks."""
        sequence = request.sequence
        if len(request.keys) < sequence.num_tokens // self.chunk:
            request.keys = chunk_keys(self.scheduler, sequence, self.chunk, sequence.num_tokens, self.replica)
            request.places = {key: place for place, key in enumerate(request.keys)}

    def get_num_new_matched_tokens(
        self, sequence: Sequence, num_computed_tokens: int
    ) -> tuple[int, bool] | None:
        """See ``Connector``: whole chunks, of a preempted request also its own. Later, where one is being
        stored or loaded, or the request has copies under way."""
        request = self._requests[sequence.request_id]
        if request.jobs:
            return None
        self._learn(request)
        request.local = num_computed_tokens
        first, hits, pending = num_computed_tokens // self.chunk, 0, False
        if len(request.keys) * self.chunk - num_computed_tokens < self.chunk:
            return 0, False
        for key in request.keys[first:]:
            there = self.cache.lookup(key)
            if there is False:
                break
            hits += 1
            pending |= there is None
        found = (first + hits) * self.chunk - num_computed_tokens
        if not hits or (not pending and found < self.chunk):
            return 0, False
        if pending or not self._loading.isdisjoint(request.keys[first : first + hits]):
            return None
        return found, True

    def update_state_after_alloc(self, sequence: Sequence, num_external_tokens: int) -> None:
        """See ``Connector``."""
        if not num_external_tokens:
            return
        request = self._requests[sequence.request_id]
        first, end = request.local, request.local + num_external_tokens
        chunks = -(-end // self.chunk)
        keys = request.keys[first // self.chunk : chunks]
        self.cache.load(keys, request.places, request.access)
        self._loading.update(keys)
        request.chunks = chunks
        blocks = self.scheduler.block_ids(sequence.request_id)[first // self.block : -(-end // self.block)]
        self._meta.loads.append(self._job(request, keys, blocks, is_store=False))

    def _job(self, request: _Request, keys: list[int], blocks: list[int], *, is_store: bool) -> int:
        number, self._made = self._made, self._made + 1
        self._jobs[number] = Job(request.sequence.request_id, keys, blocks, is_store)
        request.jobs.add(number)
        return number

    def build_connector_meta(self, step: Step) -> Meta:
        """See ``Connector``."""
        meta, self._meta = self._meta, Meta()
        for request_id in step.preempted:
            meta.flush |= self._requests[request_id].jobs
        for block, jobs in self._fenced.items():
            if self.scheduler.kv.pool.held(block):
                meta.flush |= jobs
        ends = {
            sequence.request_id: min(context + tokens, sequence.prompt_tokens)
            for (tokens, context), sequence in zip(step.chunks, step.prefilling, strict=True)
        }
        for request_id in self._unplaced:  # they go on trying, as long as they run
            sequence = self._requests[request_id].sequence
            loads = any(not self._jobs[number].is_store for number in self._requests[request_id].jobs)
            if sequence.computed and request_id not in ends and not loads:
                ends[request_id] = min(sequence.computed, sequence.prompt_tokens)
        for request_id in self._ended:
            sequence = self._requests[request_id].sequence
            ends[request_id] = sequence.prompt_tokens if self._requests[request_id].ended else 0
        for request_id, end in ends.items():
            self._store(self._requests[request_id], end, meta)
        for request_id in self._ended:
            request = self._requests[request_id]
            self._unplaced.pop(request_id, None)
            self.cache.finished(request.access)
            if not request.jobs:
                del self._requests[request_id]
        self._ended = []
        return meta

    def _store(self, request: _Request, tokens: int, meta: Meta) -> None:
        """Offer the whole chunks of its first ``tokens`` that were not."""
        self._learn(request)
        end = tokens // self.chunk
        offered = request.keys[request.chunks : end]
        if not offered:
            return
        request_id = request.sequence.request_id
        stored = self.cache.store(offered, request.places, request.access)
        if stored is None:
            self._unplaced[request_id] = None
            return
        self._unplaced.pop(request_id, None)
        request.chunks = end
        if not stored:
            return
        table = self.scheduler.block_ids(request_id) if request_id in self.scheduler.sequences else []
        per = self.blocks_per_chunk
        places = [request.places[key] * per for key in stored]
        blocks = [block for place in places for block in table[place : place + per]]
        meta.stores.append(self._job(request, stored, blocks, is_store=True))

    def request_finished(self, sequence: Sequence, ending: Ending) -> bool:
        """See ``Connector``: its blocks go at once, and what is being copied of them is fenced."""
        request = self._requests[sequence.request_id]
        request.ended = ending == "finished"
        self._ended.append(sequence.request_id)
        for number in request.jobs:
            if self._jobs[number].is_store:
                self._fence(number)
        return False

    def _fence(self, number: int) -> None:
        for block in self._jobs[number].blocks:
            self._fenced.setdefault(block, set()).add(number)

    def update_connector_output(self, transfers: Transfers) -> None:
        """See ``Connector``: jobs are over."""
        for number in transfers.jobs:
            job = self._jobs.pop(number)
            if job.is_store:
                self.cache.stored(job.keys)
            else:
                self.cache.loaded(job.keys)
                self._loading.difference_update(job.keys)
            for block in job.blocks:
                if number in (fence := self._fenced.get(block, set())):
                    fence.discard(number)
                    if not fence:
                        del self._fenced[block]
            request = self._requests[job.request_id]
            request.jobs.discard(number)
            if not request.jobs and self._is_gone(job.request_id):
                del self._requests[job.request_id]

    def _is_gone(self, request_id: int) -> bool:
        return request_id not in self.scheduler.sequences and request_id not in self._ended

    # ---- the worker half

    def start_load_kv(self, meta: Meta, now: int) -> float:
        """See ``Connector``: begins the stores of the step before, and waits for those that are flushed."""
        begun = [*self._deferred, *(number for number in meta.stores if number in meta.flush)]
        for number in begun:
            self._due[number] = self.to_host.send(self._bytes(number), now)
        self._deferred = [number for number in meta.stores if number not in meta.flush]
        wait = max((self._due.get(number, now) for number in meta.flush), default=now)
        self._due |= dict.fromkeys(meta.flush & self._due.keys(), now)  # the host has waited for them
        for number in meta.loads:
            self.loaded_blocks += len(self._jobs[number].blocks)
            self._due[number] = self.to_gpu.send(self._bytes(number), now)
        return to_seconds(max(0, wait - now))

    def _bytes(self, number: int) -> int:
        return len(self._jobs[number].keys) * self.blocks_per_chunk * self.block_bytes

    def get_finished(self, now: int) -> Transfers | None:
        """See ``Connector``."""
        done = sorted(number for number, end in self._due.items() if end <= now)
        if not done:
            return None
        for number in done:
            del self._due[number]
        loads = self._requests_of(number for number in done if not self._jobs[number].is_store)
        return Transfers(finished_recving=loads, jobs=tuple(done))

    def _requests_of(self, jobs: Iterable[int]) -> tuple[int, ...]:
        return tuple(self._jobs[number].request_id for number in jobs)

    def next_event(self, now: int) -> int:
        """See ``Connector``."""
        if self._deferred:
            return now + 1
        return min((end for end in self._due.values() if end > now), default=NEVER)
