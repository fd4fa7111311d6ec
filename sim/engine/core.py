# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""The engine in the plain form of vLLM's own loop, compiled by Cython where there was a compiler.

One source: interpreted it is what a debugger steps through, compiled it is the engine. Every running request
is visited in every step, as vLLM does it, so a rule of vLLM is one place here; comments name the function of
vLLM (``vllm/v1``) that has it. In it are the KV cache with its prefix cache, the scheduler, EngineCore's busy
loop around it, and the way of the tokens to the client: one file, because calls between its classes are C
calls, which they would not be across modules.

Times are picoseconds in int64 and floats are added in one order, so compiled and interpreted agree to the
last bit.
"""

from __future__ import annotations

from array import array
from heapq import heappop, heappush
from typing import Any

import cython
import numpy as np

from servecast.sim.engine.cadence import PrefillCadence
from servecast.sim.engine.rules import rules_for
from servecast.sim.engine.waiting import QUEUES
from servecast.sim.inputs.errors import InputError

if cython.compiled:
    from cython.cimports.libc.math import rint
else:
    rint = round

COMPILED = cython.compiled

WAITING = cython.declare(cython.int, 0)
RUNNING = cython.declare(cython.int, 1)
PREEMPTED = cython.declare(cython.int, 2)
FINISHED = cython.declare(cython.int, 3)

# What a block holds for the prefix cache, where it is no key: nothing, or what only its own request can ask
# for, and that only once it is preempted.
UNHASHED = cython.declare(cython.longlong, -1)
PRIVATE = cython.declare(cython.longlong, -2)

BLOCKS_PER_CONTENT = cython.declare(cython.longlong, 1 << 24)  # a content id owns this many block keys
REMEMBERED = cython.declare(cython.int, 4096)  # different shared prefixes whose keys are kept
PICOSECONDS = cython.declare(cython.double, 1e12)
EXACT = cython.declare(cython.longlong, 1 << 53)  # integers below are doubles, too
OUTCOMES = ("sent", "queued", "scheduled", "ended", "first_token", "finish", "cached_tokens", "preemptions")
STEP_FIELDS = cython.declare(cython.int, 12)  # columns of a step's row
GAP_FIELDS = cython.declare(cython.int, 4)

# What ``EngineLoop.advance`` came to.
IDLE, BUSY, ENDED, ABORTS = range(4)
_IDLE = cython.declare(cython.int, 0)
_BUSY = cython.declare(cython.int, 1)
_ENDED = cython.declare(cython.int, 2)
_ABORTS = cython.declare(cython.int, 3)


@cython.final
@cython.cclass
class Sequence:
    """A request inside the engine. Counts are tokens, times picoseconds, -1 where it did not happen.

    computed: advanced when scheduled, before the step runs. placeholders: async, outputs that steps in flight
    sample. limit: prompt and max_tokens. final_tokens: when it ends. blocks_end: tokens that its blocks hold.
    cached_end: tokens whose blocks have their hash. catch_up: num_tokens at its last admission, which it has
    to compute before it decodes. slot: its row of the block table.
    """

    status: cython.int
    num_tokens: cython.int
    computed: cython.int
    placeholders: cython.int
    limit: cython.int
    blocks_end: cython.int
    cached_end: cython.int
    catch_up: cython.int
    token_tick: cython.longlong  # of the step that delivered its newest token
    final_tokens: cython.int
    slot: cython.int
    scheduled_tick: cython.longlong  # priority: of its last step, and its tokens there
    scheduled_tokens: cython.int
    arrival = cython.declare(cython.longlong, visibility="readonly")
    serial: cython.longlong
    row: cython.Py_ssize_t  # in the table of outcomes, -1 outside of it
    shared_keys: list
    priority = cython.declare(cython.longlong, visibility="readonly")
    prompt_tokens = cython.declare(cython.int, visibility="readonly")
    request_id = cython.declare(cython.longlong, visibility="readonly")
    preemptions = cython.declare(cython.int, visibility="readonly")
    cached_tokens = cython.declare(cython.int, visibility="readonly")
    queued = cython.declare(cython.longlong, visibility="readonly")
    scheduled = cython.declare(cython.longlong, visibility="readonly")
    ended = cython.declare(cython.longlong, visibility="readonly")
    first_token = cython.declare(cython.longlong, visibility="readonly")
    finish = cython.declare(cython.longlong, visibility="readonly")

    def __init__(
        self, request_id: cython.longlong, priority: cython.longlong, prompt_tokens: cython.int
    ) -> None:
        self.request_id, self.priority, self.prompt_tokens = request_id, priority, prompt_tokens
        self.status = WAITING
        self.computed = self.placeholders = self.catch_up = self.preemptions = 0
        self.blocks_end = self.cached_end = self.scheduled_tokens = 0
        self.slot = self.cached_tokens = self.row = -1
        self.token_tick = self.scheduled_tick = self.arrival = self.serial = -1
        self.queued = self.scheduled = self.ended = self.first_token = self.finish = -1

    @property
    def sort_key(self) -> tuple[int, int, int]:
        """The order of the priority queue."""
        return self.priority, self.arrival, self.request_id


@cython.final
@cython.cclass
class Step:
    """What one ``schedule`` decided, and after ``complete`` what came of it; see ``Step`` in
    ``servecast.sim.engine.engine``."""

    tick = cython.declare(cython.longlong, visibility="readonly")
    total_tokens = cython.declare(cython.int, visibility="readonly")
    chunks = cython.declare(list, visibility="readonly")
    decodes = cython.declare(cython.int, visibility="readonly")
    decode_context = cython.declare(cython.longlong, visibility="readonly")
    gaps = cython.declare(list, visibility="readonly")
    steady = cython.declare(cython.int, visibility="readonly")
    emitted = cython.declare(cython.int, visibility="readonly")
    start: cython.longlong
    end: cython.longlong
    samplers: list
    prefilling: list  # priority: whose the chunks are
    joined: list  # admitted and resumed, with what they found cached, and whether resumed
    joined_cached: list
    joined_again: list
    victims: list
    firsts: list
    leavers: list
    composition: list

    def __init__(self, tick: cython.longlong) -> None:
        self.tick = tick
        self.total_tokens = self.decodes = self.steady = self.emitted = 0
        self.decode_context = self.start = self.end = 0
        self.chunks, self.gaps, self.samplers, self.prefilling = [], [], [], []
        self.joined, self.joined_cached, self.joined_again, self.victims = [], [], [], []
        self.firsts, self.leavers = [], []
        self.composition = None

    @property
    def samples(self) -> int:
        return len(self.samplers)

    @property
    def admitted(self) -> list[int]:
        return [s.request_id for s, again in zip(self.joined, self.joined_again, strict=True) if not again]

    @property
    def resumed(self) -> list[int]:
        return [s.request_id for s, again in zip(self.joined, self.joined_again, strict=True) if again]

    @property
    def cached_tokens(self) -> dict[int, int]:
        return {s.request_id: cached for s, cached in zip(self.joined, self.joined_cached, strict=True)}

    @property
    def preempted(self) -> list[int]:
        return [s.request_id for s in self.victims]

    @property
    def first_tokens(self) -> list[int]:
        return [s.request_id for s in self.firsts]

    @property
    def finished(self) -> list[int]:
        return [s.request_id for s in self.leavers]

    @property
    def idle_s(self) -> float:
        return 0.0

    def scheduled(self) -> dict[int, int]:
        """Request id -> tokens, in vLLM's order. Only from a scheduler made with ``trace=True``."""
        assert self.composition is not None, "the scheduler was not made with trace=True"
        return {s.request_id: tokens for s, tokens in self.composition}


@cython.final
@cython.cclass
class KVCache:
    """vLLM's BlockPool: blocks, the list of those that are free, and which hold known content.

    The free list is linked through the blocks in both directions; block 0, the null block, is its two ends. A
    content is an integer key, found through a hash table with open addresses; blocks with equal content are
    chained in the order in which they got it.

    ``on_store`` and ``on_evict`` are called, where they are set, with the keys of blocks whose content is
    known from now on, and with the key of one whose content is forgotten; with shared ones only.
    """

    num_blocks = cython.declare(cython.int, visibility="readonly")
    free_blocks = cython.declare(cython.int, visibility="readonly")
    on_store = cython.declare(object, visibility="public")
    on_evict = cython.declare(object, visibility="public")
    contents: list  # dense number of a content -> its id
    dense: dict
    bits: cython.int
    mask: cython.int
    prev: cython.int[::1]
    next: cython.int[::1]
    ref: cython.int[::1]
    later: cython.int[::1]
    key: cython.longlong[::1]
    table_key: cython.longlong[::1]
    table_block: cython.int[::1]

    def __init__(self, num_blocks: cython.int) -> None:
        size: cython.int = 16
        self.bits = 4
        while size < 2 * num_blocks:
            size *= 2
            self.bits += 1
        self.mask = size - 1
        self.num_blocks = num_blocks
        self.free_blocks = num_blocks - 1
        self.prev = np.arange(-1, num_blocks - 1, dtype=np.int32)
        self.next = np.arange(1, num_blocks + 1, dtype=np.int32)
        self.prev[0], self.next[num_blocks - 1] = num_blocks - 1, 0
        self.ref, self.later = array("i", [0]) * num_blocks, array("i", [-1]) * num_blocks
        self.key, self.table_key = array("q", [-1]) * num_blocks, array("q", [-1]) * size
        self.table_block = array("i", [0]) * size
        self.contents, self.dense = [], {}
        self.on_store = self.on_evict = None

    @property
    def usage(self) -> float:
        """Share of the usable blocks in use, 0..1 (vllm:kv_cache_usage_perc)."""
        free: cython.double = self.free_blocks
        return 1.0 - free / (self.num_blocks - 1)

    @property
    def cached_keys(self) -> int:
        """Distinct contents in the prefix cache."""
        keys = np.asarray(self.key)
        return int((np.asarray(self.table_key) != UNHASHED).sum() + (keys == PRIVATE).sum())

    def free_list(self, limit: int) -> list[int]:
        """The first ``limit`` blocks of the free list, next one first."""
        found: list = []
        block: cython.int = self.next[0]
        while block != 0 and len(found) < limit:
            found.append(block)
            block = self.next[block]
        return found

    def shared_keys(self, content: tuple[tuple[int, int], ...], block_size: int) -> list[int]:
        """Keys of the blocks whose last token lies in a shared part of the prompt."""
        keys: list = []
        for content_id, end_token in content:
            number = self.dense.get(content_id)
            if number is None:
                number = self.dense[content_id] = len(self.contents)
                self.contents.append(content_id)
            first = 2 * number * BLOCKS_PER_CONTENT  # even: shared, odd: private
            keys.extend(range(first + len(keys), first + end_token // block_size))
        return keys

    @cython.cfunc
    def public_key(self, key: cython.longlong) -> Any:
        """The key as routers know it, by content id."""
        content: Any = self.contents[key // (2 * BLOCKS_PER_CONTENT)]
        return 2 * content * (1 << 24) + key % BLOCKS_PER_CONTENT

    # ---- the free list

    @cython.cfunc
    @cython.exceptval(check=False)
    def unlink(self, block: cython.int) -> cython.void:
        self.next[self.prev[block]] = self.next[block]
        self.prev[self.next[block]] = self.prev[block]
        self.free_blocks -= 1

    @cython.cfunc
    @cython.exceptval(check=False)
    def append(self, block: cython.int) -> cython.void:
        last: cython.int = self.prev[0]
        self.prev[block], self.next[block] = last, 0
        self.next[last] = self.prev[0] = block
        self.free_blocks += 1

    @cython.cfunc
    @cython.exceptval(check=False)
    def prepend(self, block: cython.int) -> cython.void:
        first: cython.int = self.next[0]
        self.next[block], self.prev[block] = first, 0
        self.prev[first] = self.next[0] = block
        self.free_blocks += 1

    @cython.cfunc
    def take(self) -> cython.int:
        """The block at the head of the free list; its content is forgotten (BlockPool.get_new_blocks)."""
        block: cython.int = self.next[0]
        self.unlink(block)
        if self.key[block] >= 0:
            if self.on_evict is not None and not self.key[block] & BLOCKS_PER_CONTENT:
                self.on_evict(self.public_key(self.key[block]))
            self.evict(block)
        self.key[block] = UNHASHED
        self.ref[block] = 1
        return block

    # ---- which blocks hold what

    @cython.cfunc
    @cython.inline
    @cython.exceptval(check=False)
    @cython.overflowcheck(False)
    def home(self, key: cython.longlong) -> cython.int:
        product: cython.ulonglong = cython.cast(cython.ulonglong, key) * cython.cast(
            cython.ulonglong, 0x9E3779B97F4A7C15
        )
        if not cython.compiled:
            product &= (1 << 64) - 1
        return cython.cast(cython.int, product >> (64 - self.bits))

    @cython.cfunc
    @cython.exceptval(check=False)
    def find(self, key: cython.longlong) -> cython.int:
        """Where in the table a key is, or would be."""
        at: cython.int = self.home(key)
        while self.table_key[at] != UNHASHED and self.table_key[at] != key:
            at = (at + 1) & self.mask
        return at

    @cython.cfunc
    @cython.exceptval(check=False)
    def lookup(self, key: cython.longlong) -> cython.int:
        """The block in which a content is found, -1 if in none."""
        at: cython.int = self.find(key)
        return self.table_block[at] if self.table_key[at] != UNHASHED else -1

    @cython.cfunc
    @cython.exceptval(check=False)
    def cache(self, block: cython.int, key: cython.longlong) -> cython.void:
        """Record a block's content. One that is known keeps being found where it was."""
        at: cython.int = self.find(key)
        other: cython.int
        self.key[block], self.later[block] = key, -1
        if self.table_key[at] == UNHASHED:
            self.table_key[at] = key
            self.table_block[at] = block
            return
        other = self.table_block[at]
        while self.later[other] != -1:
            other = self.later[other]
        self.later[other] = block

    @cython.cfunc
    @cython.exceptval(check=False)
    def evict(self, block: cython.int) -> cython.void:
        """Forget a block's content; further blocks that have it stay findable."""
        at: cython.int = self.find(self.key[block])
        later: cython.int = self.later[block]
        other: cython.int
        gap: cython.int
        if self.table_block[at] != block:
            other = self.table_block[at]
            while self.later[other] != block:
                other = self.later[other]
            self.later[other] = later
        elif later != -1:
            self.table_block[at] = later
        else:  # close the gap, so that no probe ends early
            gap, at = at, (at + 1) & self.mask
            while self.table_key[at] != UNHASHED:
                if ((at - self.home(self.table_key[at])) & self.mask) >= ((at - gap) & self.mask):
                    self.table_key[gap] = self.table_key[at]
                    self.table_block[gap] = self.table_block[at]
                    gap = at
                at = (at + 1) & self.mask
            self.table_key[gap] = UNHASHED


@cython.final
@cython.cclass
class Scheduler:
    """vLLM's V1 scheduler: who computes how many tokens in the next step, and on which KV blocks.

    Use: ``add``, then ``step = schedule()`` and ``complete(step)`` in turn; with async scheduling the next
    ``schedule`` comes before the ``complete`` of the step in flight.

    Args:
        config: flags and pool size.
        trace: keep each step's full composition for ``Step.scheduled``; changes no decision.
    """

    config = cython.declare(object, visibility="readonly")
    rules = cython.declare(object, visibility="readonly")
    kv = cython.declare("KVCache", visibility="readonly")
    tick = cython.declare(cython.longlong, visibility="readonly")  # number of schedule() calls so far
    prefix_queries = cython.declare(cython.longlong, visibility="readonly")  # tokens, as in vLLM's counters
    prefix_hits = cython.declare(cython.longlong, visibility="readonly")
    num_waiting = cython.declare(cython.int, visibility="readonly")
    reuse_unhashed_first: cython.bint
    lone_request_ignores_threshold: cython.bint
    cursor_follows_victim: cython.bint
    count_admitted_lookups: cython.bint
    loop_goes_on_after_own_preemption: cython.bint
    cadence: Any
    prefix_caching: cython.bint
    chunked_prefill: cython.bint
    is_async: cython.bint
    full_isl: cython.bint
    adaptive: cython.bint
    priority: cython.bint
    trace: cython.bint
    max_tokens: cython.int
    max_running: cython.int
    max_model_len: cython.int
    block_size: cython.int
    long_prefill_threshold: cython.int
    watermark: cython.int
    finished_unsent: cython.bint
    added: cython.longlong
    sequences: dict
    runners: list  # in the order of admission
    queue: Any
    prefixes: dict
    table: cython.int[::1]  # KV blocks of the running, a row a slot
    width: cython.Py_ssize_t
    slots: list

    def __init__(self, config: Any, *, trace: bool = False) -> None:
        rules = rules_for(config.version)
        self.config, self.rules, self.trace = config, rules, trace
        appends = rules.append_without_caching and not config.enable_prefix_caching
        self.reuse_unhashed_first = rules.reuse_unhashed_first and not appends
        self.loop_goes_on_after_own_preemption = rules.loop_goes_on_after_own_preemption
        self.lone_request_ignores_threshold = rules.lone_request_ignores_threshold
        self.cursor_follows_victim = rules.cursor_follows_victim
        self.count_admitted_lookups = rules.count_admitted_lookups
        self.cadence = None
        if config.prefill_schedule_interval > 1:
            self.cadence = PrefillCadence(config.prefill_schedule_interval)
        self.prefix_caching = config.enable_prefix_caching
        self.chunked_prefill = config.enable_chunked_prefill
        self.is_async, self.full_isl = config.async_scheduling, config.scheduler_reserve_full_isl
        self.adaptive = config.long_prefill_token_threshold_adaptive
        self.priority = config.scheduling_policy == "priority"
        self.max_tokens, self.max_model_len = config.max_num_batched_tokens, config.max_model_len
        self.block_size = config.block_size
        self.max_running = min(config.max_num_seqs, config.max_num_active_seqs or config.max_num_seqs)
        self.long_prefill_threshold = config.long_prefill_token_threshold
        self.watermark = int(config.watermark * config.num_gpu_blocks)
        self.tick = self.prefix_queries = self.prefix_hits = self.added = 0
        self.num_waiting = 0
        self.finished_unsent = False
        self.kv = KVCache(config.num_gpu_blocks)
        self.sequences, self.runners, self.prefixes = {}, [], {}
        self.queue = QUEUES[config.scheduling_policy]()
        self.width = self.blocks_for(self.max_model_len) + 1
        rows = self.max_running + 1  # one more: what a look-up finds
        self.table = np.zeros(rows * self.width, np.int32)
        self.slots = list(range(rows))

    # ---- what can be read -------------------------------------------------------------------------

    @property
    def has_requests(self) -> bool:
        """Whether the engine loop goes on: one more (empty) step follows the last finish."""
        return bool(self.sequences) or self.finished_unsent

    @property
    def num_running(self) -> int:
        return len(self.runners)

    @property
    def running(self) -> list[int]:
        """Request ids, in order of admission."""
        return [sequence.request_id for sequence in self.runners]

    @property
    def waiting(self) -> list[int]:
        """Request ids, next one first."""
        return [sequence.request_id for sequence in self.queue.ordered()]

    @property
    def free_blocks(self) -> int:
        return self.kv.free_blocks

    def free_list(self, limit: int) -> list[int]:
        """The next ``limit`` blocks to be taken."""
        return self.kv.free_list(limit)

    @property
    def cached_blocks(self) -> int:
        """Distinct block contents that a look-up could find now."""
        return self.kv.cached_keys

    def block_ids(self, request_id: int) -> list[int]:
        sequence: Sequence = self.sequences[request_id]
        first: cython.Py_ssize_t = sequence.slot * self.width
        return [int(self.table[first + i]) for i in range(sequence.blocks_end // self.block_size)]

    # ---- requests come and go ---------------------------------------------------------------------

    @cython.ccall
    def add(self, request: Any, arrival: cython.longlong) -> Sequence:
        """Queue a request. ``arrival`` rises from call to call; ties of priority go by it.

        Raises:
            InputError: the request could never run alone: longer than ``max_model_len`` or than the pool.
        """
        return self.enter(
            request.request_id,
            request.prompt_tokens,
            request.output_tokens,
            request.max_tokens,
            request.content,
            request.priority,
            arrival,
        )

    @cython.cfunc
    def enter(
        self,
        request_id: cython.longlong,
        prompt: cython.int,
        output: cython.int,
        most: cython.int,
        content: tuple,
        priority: cython.longlong,
        arrival: cython.longlong,
    ) -> Sequence:
        """``add``, without the object."""
        sequence: Sequence = Sequence(request_id, priority, prompt)
        need: cython.int
        sequence.num_tokens = prompt
        sequence.limit = prompt + most
        sequence.final_tokens = min(prompt + output, sequence.limit, self.max_model_len)
        sequence.arrival, sequence.serial = arrival, self.added
        self.added += 1
        if prompt >= self.max_model_len:
            raise InputError(
                f"its prompt of {prompt} tokens leaves no room for an output",
                where=f"request {request_id}",
                fix=f"Shorten it below max_model_len={self.max_model_len}, or raise max_model_len.",
            )
        need = (sequence.final_tokens + self.block_size - 2) // self.block_size  # the last is never computed
        if need > self.kv.num_blocks - 1:
            raise InputError(
                f"its {sequence.final_tokens} tokens need {need} KV blocks of {self.block_size}",
                where=f"request {request_id}",
                fix=f"The pool has {self.kv.num_blocks - 1}: enlarge it or shorten the request.",
            )
        sequence.shared_keys = None
        if content and self.prefix_caching:
            keys: Any = self.prefixes.get(content)
            if keys is None:
                if len(self.prefixes) >= REMEMBERED:
                    self.prefixes.clear()
                keys = self.prefixes[content] = self.kv.shared_keys(content, self.block_size)
            sequence.shared_keys = keys
        self.sequences[sequence.request_id] = sequence
        self.queue.push(sequence)
        self.num_waiting += 1
        return sequence

    @cython.ccall
    def abort(self, request_id: Any) -> Any:
        """Drop a request wherever it stands; an unknown or finished one is ignored."""
        found: Any = self.sequences.get(request_id)
        if found is None:
            return None
        sequence: Sequence = found
        if sequence.status == RUNNING:
            self.runners.remove(sequence)
            self.free(sequence)
        else:
            self.queue.remove(sequence)
            self.num_waiting -= 1
        self.forget(sequence)
        return None

    @cython.cfunc
    def forget(self, sequence: Sequence) -> cython.int:
        sequence.status = FINISHED
        del self.sequences[sequence.request_id]
        self.finished_unsent = True
        return 0

    # ---- a step is decided ------------------------------------------------------------------------

    @cython.ccall
    def schedule(self) -> Step:
        """Decide the next step; computed tokens advance at once, sampled ones arrive by ``complete``."""
        step: Step = Step(self.tick)
        threshold: cython.int = self.chunk_limit()
        budget: cython.int
        defer: cython.bint = False
        self.finished_unsent = False
        if self.trace:
            step.composition = []
        if self.cadence is not None:
            defer = self.cadence.begin() and self.somebody_decodes()
        budget = self.schedule_running(step, threshold, defer)
        if self.num_waiting and not step.victims:
            self.schedule_waiting(step, budget, threshold, defer)
        self.tick += 1
        if self.cadence is not None:
            admitting = not step.victims and not defer
            self.cadence.end(tokens=step.total_tokens, admitting=admitting, waiting=self.num_waiting)
        return step

    @cython.cfunc
    def somebody_decodes(self) -> cython.bint:
        """Whether a running request has left its prefill (Scheduler.schedule: "not r.is_prefill_chunk")."""
        sequence: Sequence
        decoding: cython.int = 0
        for sequence in self.runners:
            decoding += sequence.computed >= sequence.catch_up
        return decoding > 0

    @cython.cfunc
    def chunk_limit(self) -> cython.int:
        """``long_prefill_token_threshold`` in force in this step; 0 is none."""
        # Scheduler.schedule, before its loops: num_eligible_reqs
        active: cython.int
        if self.long_prefill_threshold and self.lone_request_ignores_threshold:
            active = len(self.runners) + self.num_waiting
            if active <= 1:
                return 0
            if self.adaptive:
                return max(self.long_prefill_threshold, self.max_tokens // active)
        return self.long_prefill_threshold

    @cython.cfunc
    def schedule_running(self, step: Step, threshold: cython.int, defer: cython.bint) -> cython.int:
        """Phase 1: running requests catch up, in order of admission, but for those that prefill where their
        work is to ``defer``; where blocks run out, others are preempted. Returns the budget left."""
        # Scheduler.schedule, "First, schedule the RUNNING requests": index is its req_index
        runners: list = self.runners
        sequence: Sequence
        victim: Sequence
        budget: cython.int = self.max_tokens
        index: cython.Py_ssize_t = 0
        position: cython.Py_ssize_t
        tokens: cython.int
        end: cython.int
        need: cython.int
        given_back: cython.int
        while index < len(runners) and budget > 0:
            sequence = cython.cast(Sequence, runners[index])
            if sequence.placeholders > 0 and sequence.computed + 2 - sequence.placeholders >= sequence.limit:
                index += 1  # its last token is being computed
                continue
            # num_tokens_with_spec + num_output_placeholders - num_computed_tokens
            tokens = sequence.num_tokens + sequence.placeholders - sequence.computed
            if 0 < threshold < tokens:
                tokens = threshold
            if tokens > budget:
                tokens = budget
            if tokens > self.max_model_len - sequence.computed - 1:
                tokens = self.max_model_len - sequence.computed - 1
            if tokens == 0 or (defer and sequence.computed < sequence.catch_up):
                index += 1
                continue
            end = sequence.computed + tokens
            if end > sequence.blocks_end:
                need = self.blocks_for(end) - sequence.blocks_end // self.block_size
                while need > self.kv.free_blocks:
                    position = self.pick_victim()
                    victim = runners[position]
                    given_back = 0
                    if self.priority and victim.scheduled_tick == self.tick:
                        given_back = self.withdraw(step, victim)
                        budget += given_back
                    # before 0.28: "if preempted_req in scheduled_running_reqs": it gave tokens back
                    if position < index if self.cursor_follows_victim else given_back > 0:
                        index -= 1
                    self.preempt(step, victim, position)
                    if victim is sequence:
                        break
                if sequence.status != RUNNING:
                    if self.loop_goes_on_after_own_preemption:  # under FCFS it was the last anyway
                        continue  # its place in the list is the next one's now
                    return budget
                self.take_blocks(sequence, need)
            if self.prefix_caching:
                self.cache_blocks(sequence, min(end, sequence.num_tokens))
            if self.cadence is not None and sequence.computed < sequence.catch_up:
                self.cadence.carries_prefill = True
            self.advance(step, sequence, tokens)
            budget -= tokens
            index += 1
        return budget

    @cython.cfunc
    def pick_victim(self) -> cython.Py_ssize_t:
        """Position among the running of the one that is preempted next."""
        # Scheduler.schedule: max(self.running, key=lambda r: (r.priority, r.arrival_time)), or running.pop()
        best: cython.Py_ssize_t = len(self.runners) - 1
        if self.priority:
            keys: list = [sequence.sort_key[:2] for sequence in self.runners]
            best = keys.index(max(keys))
        return best

    @cython.cfunc
    def withdraw(self, step: Step, victim: Sequence) -> cython.int:
        """Take a victim out of the step in which it was scheduled already. Returns its tokens."""
        tokens: cython.int = victim.scheduled_tokens
        before: cython.int = victim.computed - tokens
        position: cython.Py_ssize_t
        step.total_tokens -= tokens
        if before >= victim.catch_up:
            step.decodes -= 1
            step.decode_context -= before + 1
        else:
            position = step.prefilling.index(victim)
            del step.chunks[position], step.prefilling[position]
        if victim in step.samplers:
            step.samplers.remove(victim)
            if self.is_async:
                victim.placeholders -= 1
        if step.composition is not None:
            step.composition.remove((victim, tokens))
        return tokens

    @cython.cfunc
    def preempt(self, step: Step, sequence: Sequence, position: cython.Py_ssize_t) -> cython.int:
        """Recompute later: give everything back and wait at the front (Scheduler._preempt_request). Tokens
        in flight are still delivered."""
        self.publish(sequence)
        self.free(sequence)
        del self.runners[position]
        sequence.computed = 0
        sequence.status = PREEMPTED
        sequence.preemptions += 1
        self.queue.push_preempted(sequence)
        self.num_waiting += 1
        step.victims.append(sequence)
        return 0

    @cython.cfunc
    def schedule_waiting(
        self, step: Step, budget: cython.int, threshold: cython.int, defer: cython.bint
    ) -> cython.int:
        """Phase 2: the head of the queue, while it fits and has no prompt work to ``defer``; the first one
        that does not blocks the rest."""
        sequence: Sequence
        kv: KVCache = self.kv
        slot: cython.int
        row: cython.Py_ssize_t
        hits: cython.int
        cached: cython.int
        tokens: cython.int
        reserve: cython.int
        need: cython.int
        fit: cython.int
        i: cython.int
        block: cython.int
        carries_prefill: cython.bint
        while self.num_waiting and budget > 0 and len(self.runners) < self.max_running:
            sequence = self.queue.head()
            slot = self.slots[len(self.slots) - 1]
            row = slot * self.width
            hits = self.longest_hit(sequence, row) if self.prefix_caching else 0
            cached = hits * self.block_size
            if not self.count_admitted_lookups:
                self.count_lookup(sequence, cached)
            tokens = sequence.num_tokens - cached
            carries_prefill = tokens > 1
            if defer and carries_prefill:
                break
            if 0 < threshold < tokens:
                tokens = threshold
            if tokens > budget:
                if not self.chunked_prefill:
                    break
                tokens = budget
            # KVCacheManager.allocate_slots; hits that lie free are taken from the free list, too
            reserve = self.watermark if self.runners else 0
            for i in range(hits):
                if kv.ref[self.table[row + i]] == 0:
                    reserve += 1
            need = fit = self.blocks_for(cached + tokens) - hits
            if self.full_isl:  # full_sequence_must_fit
                fit = max(need, self.blocks_for(sequence.num_tokens) - hits)
            if fit + reserve > kv.free_blocks:
                break
            self.queue.pop()
            self.num_waiting -= 1
            self.slots.pop()
            if self.cadence is not None and carries_prefill:
                self.cadence.carries_prefill = True
            if self.count_admitted_lookups:
                self.count_lookup(sequence, cached)
            for i in range(hits):  # BlockPool.touch
                block = self.table[row + i]
                if kv.ref[block] == 0:
                    kv.unlink(block)
                kv.ref[block] += 1
            sequence.slot = slot
            sequence.blocks_end = sequence.cached_end = cached
            self.take_blocks(sequence, need)
            step.joined.append(sequence)
            step.joined_cached.append(cached)
            step.joined_again.append(sequence.status == PREEMPTED)
            if sequence.status == WAITING:
                sequence.cached_tokens = cached
            sequence.status = RUNNING
            sequence.computed = cached
            sequence.catch_up = sequence.num_tokens
            self.runners.append(sequence)
            if self.prefix_caching:
                self.cache_blocks(sequence, cached + tokens)
            self.advance(step, sequence, tokens)
            budget -= tokens
        return 0

    @cython.cfunc
    def count_lookup(self, sequence: Sequence, hit_tokens: cython.int) -> cython.int:
        """vLLM keeps the look-ups of preempted requests out of its counters (PrefixCacheStats.record)."""
        if self.prefix_caching and not sequence.preemptions:
            self.prefix_queries += sequence.num_tokens
            self.prefix_hits += hit_tokens
        return 0

    @cython.cfunc
    @cython.inline
    @cython.exceptval(check=False)
    def advance(self, step: Step, sequence: Sequence, tokens: cython.int) -> cython.void:
        """Scheduled tokens count as computed; note whether it samples (Scheduler._update_after_schedule)."""
        step.total_tokens += tokens
        if sequence.computed >= sequence.catch_up:
            step.decodes += 1
            step.decode_context += sequence.computed + 1
        else:
            self.note_chunk(step, sequence, tokens)
        if self.priority or self.trace:
            self.note_scheduled(step, sequence, tokens)
        sequence.computed += tokens
        if sequence.computed >= sequence.num_tokens + sequence.placeholders:
            step.samplers.append(sequence)
            if self.is_async:
                sequence.placeholders += 1

    @cython.cfunc
    @cython.exceptval(check=False)
    def note_chunk(self, step: Step, sequence: Sequence, tokens: cython.int) -> cython.void:
        step.chunks.append((tokens, sequence.computed))
        if self.priority:
            step.prefilling.append(sequence)

    @cython.cfunc
    @cython.exceptval(check=False)
    def note_scheduled(self, step: Step, sequence: Sequence, tokens: cython.int) -> cython.void:
        sequence.scheduled_tick, sequence.scheduled_tokens = self.tick, tokens
        if self.trace:
            step.composition.append((sequence, tokens))

    # ---- a step is done ---------------------------------------------------------------------------

    @cython.ccall
    def complete(self, step: Step) -> Any:
        """Deliver the tokens of a step, in its order; who has its last one leaves with its blocks
        (Scheduler.update_from_output)."""
        sequence: Sequence
        left: cython.bint = False
        tick: cython.longlong = step.tick
        emitted: cython.int = 0
        steady: cython.int = 0
        i: cython.Py_ssize_t
        samplers: list = step.samplers
        for i in range(len(samplers)):
            sequence = cython.cast(Sequence, samplers[i])
            if sequence.status == FINISHED:
                continue  # while the step was in flight
            sequence.num_tokens += 1
            emitted += 1
            if sequence.token_tick == tick - 1 and tick > 0:
                steady += 1
            elif sequence.token_tick < 0:
                step.firsts.append(sequence)
            else:
                step.gaps.append(sequence.token_tick)
            sequence.token_tick = tick
            if self.is_async:
                if sequence.placeholders > 0:
                    sequence.placeholders -= 1
                if self.prefix_caching and sequence.status == RUNNING:
                    self.cache_blocks(sequence, sequence.computed - sequence.placeholders)
            if sequence.num_tokens >= sequence.final_tokens:
                if sequence.status == RUNNING:
                    left = True
                    self.free(sequence)
                else:  # preempted while its last token was in flight
                    self.queue.remove(sequence)
                    self.num_waiting -= 1
                self.forget(sequence)
                step.leavers.append(sequence)
        step.emitted, step.steady = emitted, steady
        if left:
            still: list = []
            for i in range(len(self.runners)):
                sequence = cython.cast(Sequence, self.runners[i])
                if sequence.status != FINISHED:
                    still.append(sequence)
            self.runners = still
        return None

    # ---- blocks of a sequence ---------------------------------------------------------------------

    @cython.cfunc
    @cython.inline
    @cython.exceptval(check=False)
    def blocks_for(self, tokens: cython.int) -> cython.int:
        if tokens > self.max_model_len:
            tokens = self.max_model_len
        return (tokens + self.block_size - 1) // self.block_size

    @cython.cfunc
    def take_blocks(self, sequence: Sequence, count: cython.int) -> cython.int:
        at: cython.Py_ssize_t = sequence.slot * self.width + sequence.blocks_end // self.block_size
        i: cython.int
        for i in range(count):
            self.table[at + i] = self.kv.take()
        sequence.blocks_end += count * self.block_size
        return 0

    @cython.cfunc
    @cython.inline
    def cache_blocks(self, sequence: Sequence, tokens: cython.int) -> cython.int:
        """The full blocks among the first ``tokens`` tokens can be found from now on."""
        if sequence.cached_end + self.block_size <= tokens:
            self.hash_blocks(sequence, tokens)
        return 0

    @cython.cfunc
    def hash_blocks(self, sequence: Sequence, tokens: cython.int) -> cython.int:
        """A content that only its own request can ask for has a mark until the request is preempted."""
        kv: KVCache = self.kv
        row: cython.Py_ssize_t = sequence.slot * self.width
        index: cython.int = sequence.cached_end // self.block_size
        end: cython.int = tokens // self.block_size
        shared: cython.int = 0
        key: cython.longlong
        told: list = None
        if sequence.shared_keys is not None:
            shared = len(sequence.shared_keys)
            if kv.on_store is not None and index < shared:
                told = [kv.public_key(key) for key in sequence.shared_keys[index:end]]
        while index < end:
            if index < shared:
                key = sequence.shared_keys[index]
                kv.cache(self.table[row + index], key)
            elif sequence.preemptions:
                kv.cache(self.table[row + index], self.private_key(sequence) + index)
            else:
                kv.key[self.table[row + index]] = PRIVATE
            index += 1
        sequence.cached_end = end * self.block_size
        if told:
            kv.on_store(told)
        return 0

    @cython.cfunc
    @cython.inline
    @cython.exceptval(check=False)
    def private_key(self, sequence: Sequence) -> cython.longlong:
        return (2 * sequence.serial + 1) * BLOCKS_PER_CONTENT

    @cython.cfunc
    def publish(self, sequence: Sequence) -> cython.int:
        """It is preempted: from now on it may look for what is its own."""
        row: cython.Py_ssize_t = sequence.slot * self.width
        i: cython.int
        for i in range(sequence.cached_end // self.block_size):
            if self.kv.key[self.table[row + i]] == PRIVATE:
                self.kv.cache(self.table[row + i], self.private_key(sequence) + i)
        return 0

    @cython.cfunc
    def longest_hit(self, sequence: Sequence, row: cython.Py_ssize_t) -> cython.int:
        """Cached leading blocks, into a row of the table. The last token is always computed, for its logits
        (KVCacheManager.get_computed_blocks)."""
        index: cython.int
        block: cython.int
        shared: cython.int = 0
        key: cython.longlong
        most: cython.int = (sequence.num_tokens - 1) // self.block_size
        if sequence.shared_keys is not None:
            shared = len(sequence.shared_keys)
        for index in range(most):
            if index < shared:
                key = sequence.shared_keys[index]
            elif sequence.preemptions:
                key = self.private_key(sequence) + index
            else:
                return index
            block = self.kv.lookup(key)
            if block < 0:
                return index
            self.table[row + index] = block
        return most

    @cython.cfunc
    def free(self, sequence: Sequence) -> cython.int:
        """Give its blocks back, last one first, so that a prefix outlives what follows it
        (BlockPool.free_blocks); see ``Rules`` for those without a hash."""
        kv: KVCache = self.kv
        row: cython.Py_ssize_t = sequence.slot * self.width
        count: cython.int = sequence.blocks_end // self.block_size
        i: cython.int
        block: cython.int
        for i in range(count):
            block = self.table[row + count - 1 - i]
            kv.ref[block] -= 1
            if kv.ref[block] == 0 and (kv.key[block] != UNHASHED or not self.reuse_unhashed_first):
                kv.append(block)
        if self.reuse_unhashed_first:
            for i in range(count):
                block = self.table[row + i]
                if kv.ref[block] == 0 and kv.key[block] == UNHASHED:
                    kv.prepend(block)
        self.slots.append(sequence.slot)
        sequence.slot = -1
        sequence.blocks_end = sequence.cached_end = 0
        return 0


@cython.final
@cython.cclass
class StepCosts:
    """What steps cost, in the numbers of ``servecast.sim.hardware.step_time.physical``, which fills it.

    by_tokens, by_rows: called for the seconds that a number of computed tokens or of sampled rows decides;
    each number is asked for once.
    """

    pair_s: cython.double
    kv_read_s: cython.double
    decode_kv_s: cython.double
    mixed_decode_kv_s: cython.double
    decode_s: cython.double
    block_s: cython.double
    chunk_token_s: cython.double
    request_s: cython.double
    eager_s: cython.double  # of a step of more tokens than ``graphed`` at least
    graphed: cython.longlong
    prompt_tile: cython.longlong  # 0: chunks are not padded
    layers: cython.longlong
    sliding_layers: cython.longlong
    sliding_window: cython.longlong
    by_tokens: Any
    by_rows: Any
    tokens_s: cython.double[::1]
    rows_s: cython.double[::1]

    def __init__(self, numbers: dict[str, Any], by_tokens: Any, by_rows: Any) -> None:
        self.pair_s, self.kv_read_s = numbers["pair_s"], numbers["kv_read_s"]
        self.decode_kv_s, self.mixed_decode_kv_s = numbers["decode_kv_s"], numbers["mixed_decode_kv_s"]
        self.decode_s, self.block_s = numbers["decode_s"], numbers["block_s"]
        self.chunk_token_s, self.request_s = numbers["chunk_token_s"], numbers["request_s"]
        self.eager_s, self.graphed = numbers["eager_s"], numbers["graphed"]
        self.prompt_tile, self.layers = numbers["prompt_tile"], numbers["layers"]
        self.sliding_layers = numbers["sliding_layers"]
        self.sliding_window = numbers["sliding_window"]
        self.by_tokens, self.by_rows = by_tokens, by_rows
        self.tokens_s, self.rows_s = array("d", [-1.0]) * 64, array("d", [-1.0]) * 64

    @cython.cfunc
    def of_tokens(self, tokens: cython.longlong) -> cython.double:
        if tokens >= len(self.tokens_s):
            self.tokens_s = longer(self.tokens_s, tokens + 1)
        if self.tokens_s[tokens] < 0.0:
            self.tokens_s[tokens] = self.by_tokens(tokens)
        return self.tokens_s[tokens]

    @cython.cfunc
    def of_rows(self, rows: cython.longlong) -> cython.double:
        if rows >= len(self.rows_s):
            self.rows_s = longer(self.rows_s, rows + 1)
        if self.rows_s[rows] < 0.0:
            self.rows_s[rows] = self.by_rows(rows)
        return self.rows_s[rows]

    @cython.cfunc
    def kv_token_layers(self, context: cython.longlong, sequences: cython.longlong) -> cython.longlong:
        """ModelShape.kv_token_layers."""
        seen: cython.longlong
        if not self.sliding_layers:
            return self.layers * context
        seen = min(context, sequences * self.sliding_window)
        return (self.layers - self.sliding_layers) * context + self.sliding_layers * seen

    @cython.cfunc
    def attention_pairs(self, tokens: cython.longlong, context: cython.longlong) -> cython.double:
        """ModelShape.attention_pairs."""
        free: cython.longlong
        seen: cython.double
        pairs: cython.double = (self.layers - self.sliding_layers) * tokens * (context + 0.5 * (tokens + 1))
        if self.sliding_layers:
            free = min(tokens, self.sliding_window - context)
            if free < 0:
                free = 0
            seen = free * (context + 0.5 * (free + 1)) + (tokens - free) * self.sliding_window
            pairs += self.sliding_layers * seen
        return pairs

    @cython.cfunc
    def seconds(self, step: Step) -> cython.double:
        """PhysicalStepTime.seconds, its sums in the same order."""
        total: cython.double = 0.0
        tokens: cython.longlong = step.decodes
        requests: cython.longlong = step.decodes
        pairs: cython.double = 0.0
        moved: cython.double = 0.0
        older: cython.longlong = 0
        longest: cython.longlong = 0
        new: cython.longlong
        context: cython.longlong
        i: cython.Py_ssize_t
        chunk: tuple
        if step.chunks:
            requests += len(step.chunks)
            for i in range(len(step.chunks)):
                chunk = step.chunks[i]
                new = chunk[0]
                context = chunk[1]
                tokens += new
                if self.prompt_tile:
                    moved += new * self.chunk_token_s
                    new = (new + self.prompt_tile - 1) // self.prompt_tile * self.prompt_tile
                pairs += self.attention_pairs(new, context)
                if context:
                    older += self.kv_token_layers(context, 1)
                    longest = max(longest, context)
            total = moved + max(pairs * self.pair_s, older * self.kv_read_s, longest * self.block_s)
        elif not step.decodes:
            return 0.0
        if step.decodes:
            total += (
                self.kv_token_layers(step.decode_context, step.decodes)
                * (self.mixed_decode_kv_s if step.chunks else self.decode_kv_s)
                + step.decodes * self.decode_s
            )
        total += self.of_tokens(tokens) + self.of_rows(len(step.samplers)) + requests * self.request_s
        return total if tokens <= self.graphed or total > self.eager_s else self.eager_s


def writable(values: Any) -> Any:
    """A column that may be written to, as typed views want it."""
    return np.require(values, None, "W")


@cython.ccall
def longer(values: cython.double[::1], least: cython.Py_ssize_t) -> Any:
    """The same with room for twice as many, at least ``least``; new places hold -1."""
    grown = np.full(max(2 * len(values), least), -1.0)
    grown[: len(values)] = values
    return grown


@cython.cfunc
def in_seconds(ps: cython.longlong) -> cython.double:
    """Python's ps / PICOSECONDS, which rounds once."""
    if -EXACT < ps < EXACT:
        return ps / PICOSECONDS
    exact: Any = ps
    return exact / 1_000_000_000_000


@cython.final
@cython.cclass
class EngineLoop:
    """EngineCore's busy loop around a scheduler, the GPU, and the way of the tokens to the client.

    ``advance(until)`` runs it; ``arrive`` puts a request into its input queue. With async scheduling a second
    step is scheduled while the first executes, so the composition of a step is fixed when the step before it
    starts.

    Args:
        scheduler: a fresh one. index: of the replica, for its rows of steps.
        costs: of steps, or None, where ``seconds`` is called for each.
        seconds, floor: of a step, s, without noise; the least that noise may make of it.
        noise: factors of mean 1, one a step.
        served_ps: what the API server takes for a token that it streams, and its way to the client.
        read: called with the first token's time at the client, the spacing, how many events and tokens; or
            None, where reading costs nothing.
        cold_start_ps: between deciding the first step and its start on the GPU.

    Attributes:
        now: up to when it has run. wake: when to call ``advance`` again, where it came to BUSY.
        tell_ends: ``advance`` returns when requests have ended.
        ended: rows of requests that ended since they were last taken, where it tells.
        after_step: called with the time when a step has been completed, or None.
        on_first: called with a request's row and the time at which its first token comes, or None.
        inbox: (time, row of a request, or ~row of one whose client has gone), in order.
    """

    now = cython.declare(cython.longlong, visibility="public")
    wake = cython.declare(cython.longlong, visibility="readonly")
    tell_ends = cython.declare(cython.bint, visibility="public")
    aborts = cython.declare(cython.int, visibility="public")  # in the inbox
    stage = cython.declare(cython.int, visibility="public")
    after_step = cython.declare(object, visibility="public")
    on_first = cython.declare(object, visibility="public")
    inbox = cython.declare(list, visibility="readonly")
    request_ids: cython.longlong[::1]
    prompts: cython.longlong[::1]
    outputs: cython.longlong[::1]
    most: cython.longlong[::1]
    priorities: cython.longlong[::1]
    prioritized: cython.bint
    contents: list
    content: cython.int[::1]
    outcomes: cython.longlong[:, ::1]
    ended = cython.declare(list, visibility="public")
    scheduler: Scheduler
    costs: StepCosts
    step_seconds: Any
    floor: Any
    noise: Any
    read: Any
    index: cython.int
    is_async: cython.bint
    executing: cython.bint
    first: Step
    second: Step
    pending: Step  # decided, while the host warms up
    resume: cython.longlong
    cold_start: cython.longlong
    gpu_free: cython.longlong
    sent: cython.longlong
    token_ps: cython.longlong
    delivery_ps: cython.longlong
    arrivals: cython.longlong
    seen: cython.longlong[::1]  # by tick: when the step's tokens were read, on average
    num_seen: cython.Py_ssize_t
    steps: cython.longlong[:, ::1]
    step_floats: cython.double[:, ::1]
    num_steps: cython.Py_ssize_t
    gaps: cython.double[:, ::1]
    num_gaps: cython.Py_ssize_t

    def __init__(
        self,
        scheduler: Scheduler,
        index: int,
        costs: StepCosts | None,
        seconds: Any,
        floor: Any,
        noise: Any,
        served_ps: tuple[int, int],
        read: Any,
        cold_start_ps: int = 0,
    ) -> None:
        self.scheduler, self.index, self.costs = scheduler, index, costs
        self.step_seconds, self.floor, self.noise, self.read = seconds, floor, noise, read
        self.token_ps, self.delivery_ps = served_ps
        self.cold_start = cold_start_ps
        self.is_async = scheduler.is_async
        self.now = self.wake = self.gpu_free = self.sent = self.resume = self.arrivals = 0
        self.aborts = self.stage = 0
        self.tell_ends, self.executing = True, False
        self.first = self.second = self.pending = None
        self.after_step = self.on_first = None
        self.inbox, self.ended = [], []
        self.seen = np.zeros(1024, np.int64)
        self.room_for_steps(1024)
        self.room_for_gaps(1024)
        self.num_seen = self.num_steps = self.num_gaps = 0

    @property
    def step_columns(self) -> Any:
        """(fields, steps): a row for each of ``records.STEP_COLUMNS``, floats by their bits."""
        return np.asarray(self.steps)[:, : self.num_steps]

    @property
    def gap_columns(self) -> Any:
        """(4, gaps): stage, gap in s, tokens, s over which the step's tokens are read."""
        return np.asarray(self.gaps)[:, : self.num_gaps]

    @cython.cfunc
    def room_for_steps(self, count: cython.Py_ssize_t) -> cython.int:
        steps: Any = np.zeros((STEP_FIELDS, count), np.int64)
        if self.num_steps:
            steps[:, : self.num_steps] = self.steps
        self.steps, self.step_floats = steps, steps.view(np.float64)
        return 0

    @cython.cfunc
    def room_for_gaps(self, count: cython.Py_ssize_t) -> cython.int:
        gaps: Any = np.zeros((GAP_FIELDS, count))
        if self.num_gaps:
            gaps[:, : self.num_gaps] = self.gaps
        self.gaps = gaps
        return 0

    def load(self, requests: Any, outcomes: Any) -> None:
        """The table whose rows the inbox names, and (fields, n) what becomes of them, by ``OUTCOMES``."""
        self.request_ids, self.prompts = writable(requests.request_id), writable(requests.prompt_tokens)
        self.outputs, self.most = writable(requests.output_tokens), writable(requests.max_tokens)
        self.contents, self.content = requests.contents, writable(requests.content)
        self.prioritized = requests.priority is not None
        if self.prioritized:
            self.priorities = writable(requests.priority)
        self.outcomes = outcomes

    @cython.ccall
    def take(self, row: cython.Py_ssize_t, time: cython.longlong) -> cython.int:
        """A request reaches the scheduler that was put into the queue at ``time``."""
        sequence: Sequence = self.scheduler.enter(
            self.request_ids[row],
            self.prompts[row],
            self.outputs[row],
            self.most[row],
            self.contents[self.content[row]],
            self.priorities[row] if self.prioritized else 0,
            self.arrivals,
        )
        self.arrivals += 1
        sequence.queued = time
        sequence.row = row
        return 0

    def leave(self, row: int) -> None:
        """A request ends without its last token, wherever it stands."""
        request_id: Any = self.request_ids[row]
        found: Any = self.scheduler.sequences.get(request_id)
        if found is not None:
            self.book(found)
            self.scheduler.abort(request_id)

    @cython.ccall
    def advance(self, until: cython.longlong) -> cython.int:
        """Run all that starts before ``until``: what happens outside at that time comes first.

        Returns:
            IDLE: nothing to do until something arrives. BUSY: call again at ``wake``. ENDED: requests have
            ended; the loop stands behind the step that ended them, at ``now``. ABORTS: the loop stands where
            it looks into its inbox, at ``now``, and finds that a client has gone, which is the host's.

        Raises:
            InputError: a request can never run.
        """
        scheduler: Scheduler = self.scheduler
        sequence: Sequence
        step: Step
        while True:
            if self.pending is not None:
                if self.resume >= until:
                    self.wake = self.resume
                    return _BUSY
                self.now = self.resume
                step = self.pending
                self.pending = None
                self.executing = not self.launch(step)
                continue
            if self.executing:
                step = self.first
                if step.end >= until:
                    self.wake = step.end
                    return _BUSY
                if step.end > self.now:
                    self.now = step.end
                self.executing = False
                self.first, self.second = self.second, None
                scheduler.complete(step)
                if self.after_step is not None:
                    self.after_step(self.now)
                self.deliver(step)
                if step.leavers and self.tell_ends:
                    for sequence in step.leavers:
                        self.ended.append(sequence.row)
                    return _ENDED
            if self.first is None and self.inbox and not (scheduler.sequences or scheduler.finished_unsent):
                self.now = max(self.now, self.next_arrival())
            if self.now >= until:
                self.wake = self.now
                return _BUSY
            if self.inbox:
                if self.aborts:
                    return _ABORTS
                self.drain()
            if scheduler.sequences or scheduler.finished_unsent:
                step = scheduler.schedule()
                if self.cold_start:
                    self.resume, self.cold_start = self.now + self.cold_start, 0
                    self.pending = step
                else:
                    self.executing = not self.launch(step)
            elif self.first is None:
                return _IDLE
            else:
                self.executing = True

    @cython.cfunc
    def next_arrival(self) -> cython.longlong:
        item: tuple = self.inbox[0]
        time: cython.longlong = item[0]
        return time

    @cython.cfunc
    def drain(self) -> cython.int:
        """All that has reached the engine's input queue by now (EngineCore._process_input_queue)."""
        item: tuple
        for item in self.inbox:
            self.take(item[1], item[0])
        self.inbox.clear()
        return 0

    @cython.cfunc
    def launch(self, step: Step) -> cython.bint:
        """Put the step on the GPU, behind the one before. Returns whether one more is decided now."""
        self.execute(step)
        if self.first is None:
            self.first = step
        else:
            self.second = step
        return self.is_async and self.second is None and step.total_tokens > 0

    @cython.cfunc
    def execute(self, step: Step) -> cython.int:
        scheduler: Scheduler = self.scheduler
        sequence: Sequence
        kv: KVCache = scheduler.kv
        factor: cython.double
        seconds: cython.double
        i: cython.Py_ssize_t
        at: cython.Py_ssize_t
        step.start = step.end = max(self.now, self.gpu_free)
        if not step.total_tokens:
            if scheduler.num_waiting and not scheduler.runners:
                self.refuse()
            return 0
        factor = next(self.noise)
        seconds = self.costs.seconds(step) if self.costs is not None else self.step_seconds(step)
        seconds = seconds * factor
        if factor < 1.0:
            seconds = max(seconds, cython.cast(cython.double, self.floor(step)))
        self.gpu_free = step.end = step.start + cython.cast(cython.longlong, rint(seconds * PICOSECONDS))
        for i in range(len(step.joined)):
            sequence = step.joined[i]
            if sequence.scheduled < 0:
                sequence.scheduled = step.start
        at = self.num_steps
        if at == self.steps.shape[1]:
            self.room_for_steps(2 * at)
        self.num_steps += 1
        self.steps[0, at] = self.index
        self.step_floats[1, at] = in_seconds(step.start)
        self.step_floats[2, at] = seconds
        self.steps[3, at] = step.total_tokens - step.decodes
        self.steps[4, at] = len(step.chunks)
        self.steps[5, at] = step.decodes
        self.steps[6, at] = step.decode_context
        self.steps[7, at] = len(scheduler.runners)
        self.steps[8, at] = scheduler.num_waiting
        self.step_floats[9, at] = kv.usage
        self.steps[10, at] = len(step.victims)
        self.steps[11, at] = len(step.samplers)
        return 0

    @cython.cfunc
    def refuse(self) -> cython.int:
        """The engine is empty, and the head of the queue does not fit."""
        head: Any = self.scheduler.queue.head()
        raise InputError(
            f"its {head.prompt_tokens} tokens are never admitted, although the engine is empty",
            where=f"request {head.request_id}",
            fix="With chunked prefill off, max_num_batched_tokens must cover the longest request.",
        )

    # ---- tokens on their way ----------------------------------------------------------------------

    @cython.cfunc
    def deliver(self, step: Step) -> cython.int:
        """Tokens go through the API server to the client, in the order of the batch; see ``ApiServer.stream``
        and ``Client.read``."""
        n: cython.longlong = step.emitted
        cost: cython.longlong = self.token_ps
        waiting: cython.longlong
        events: cython.longlong
        first: cython.longlong
        pace: cython.longlong
        middle: cython.longlong
        last: cython.longlong
        share: cython.longlong
        spread: cython.double
        tick: cython.Py_ssize_t
        i: cython.Py_ssize_t
        count: cython.Py_ssize_t
        sequence: Sequence
        if not n:
            self.note_seen(step.end)
            return 0
        waiting = max(self.sent, self.now)
        self.sent = max(self.sent, self.now + cost * n)
        events = (self.sent - waiting) // cost if cost else n
        first, pace = self.sent + self.delivery_ps - cost * (n - 1), cost
        if self.read is not None:
            first, pace = self.read(first, pace, events, n)
        middle = first + pace * (n - 1) // 2
        spread = in_seconds(pace * (n - 1))
        if step.steady and self.num_seen:
            self.note_gap(middle - self.seen[self.num_seen - 1], step.steady, spread)
        for i in range(len(step.gaps)):
            tick = step.gaps[i]
            self.note_gap(middle - self.seen[tick], 1, spread)
        self.note_seen(middle)
        last = first + pace * (n - 1)
        count = len(step.firsts)
        for i in range(count):  # the newest stand last in the batch
            sequence = step.firsts[i]
            sequence.first_token = last - pace * (count - 1 - i)
            if self.on_first is not None:
                self.on_first(sequence.row, sequence.first_token)
        count = len(step.leavers)
        if count:
            share = (last - first) // count
            for i in range(count):  # these are spread over the batch
                sequence = step.leavers[i]
                sequence.ended = self.now
                sequence.finish = max(sequence.first_token, first + share * i + share // 2)
                self.book(sequence)
        return 0

    @cython.cfunc
    def book(self, sequence: Sequence) -> cython.int:
        row: cython.Py_ssize_t = sequence.row
        self.outcomes[1, row], self.outcomes[2, row] = sequence.queued, sequence.scheduled
        self.outcomes[3, row], self.outcomes[4, row] = sequence.ended, sequence.first_token
        self.outcomes[5, row] = sequence.finish
        if sequence.scheduled >= 0:
            self.outcomes[6, row] = sequence.cached_tokens
        if sequence.preemptions:
            self.outcomes[7, row] = sequence.preemptions
        return 0

    @cython.cfunc
    def note_seen(self, time: cython.longlong) -> cython.int:
        if self.num_seen == self.seen.shape[0]:
            self.seen = np.concatenate((np.asarray(self.seen), np.zeros_like(np.asarray(self.seen))))
        self.seen[self.num_seen] = time
        self.num_seen += 1
        return 0

    @cython.cfunc
    def note_gap(self, gap: cython.longlong, tokens: cython.longlong, spread: cython.double) -> cython.int:
        at: cython.Py_ssize_t = self.num_gaps
        if at == self.gaps.shape[1]:
            self.room_for_gaps(2 * at)
        self.num_gaps += 1
        self.gaps[0, at] = self.stage
        self.gaps[1, at] = in_seconds(gap)
        self.gaps[2, at] = tokens
        self.gaps[3, at] = spread
        return 0
