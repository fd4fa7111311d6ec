"""A plain model of vLLM's V1 scheduler and KV cache: the oracle that the fast engine is held against.

It is written from the rules alone and loops over every running request in every step, so that each
rule of vLLM (releases 0.20 to 0.33, one full-attention group) can be read here as it stands. How many
drafts are proposed and accepted is told, request by request; what a KV connector has, from 0.23 on, is in its
``FakeStore``. Speed does not matter.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from servecast.sim.engine.config import EngineConfig
from servecast.sim.engine.request import Request

BlockHash = tuple[str, int, int]


@dataclass(slots=True, eq=False)
class State:
    """What the scheduler knows of one request; counts are tokens."""

    request: Request
    arrival: int
    num_tokens: int  # prompt + outputs delivered so far
    num_computed_tokens: int = 0  # advanced when scheduled, before execution
    placeholders: int = 0  # async: outputs that are sampled by steps still in flight
    status: str = "WAITING"  # RUNNING, PREEMPTED, LOADING, FINISHED
    blocks: list[int] = field(default_factory=list)
    num_cached_blocks: int = 0  # leading blocks that have their hash
    catch_up: int = 0  # num_tokens at the last admission: what must be computed before it decodes
    spec_tokens: int = 0  # drafts that wait to be verified
    samplings: int = 0
    preemptions: int = 0
    in_flight: dict[int, int] = field(default_factory=dict)  # tokens by tick of steps that are not over
    received: bool = False  # its load is over, and failed: and went wrong
    failed: bool = False
    prefilling: bool = False  # it loads, or has not sampled since a chunk of its prompt
    cut_now: bool = False  # it lost computed tokens to a failed load, and was not scheduled since
    passed: bool = False  # it was passed over in the queue
    drops_before: int = 0  # outputs of steps before this tick are void

    @property
    def request_id(self) -> int:
        return self.request.request_id

    @property
    def last_in_flight(self) -> bool:
        """Async: the token that reaches max_tokens is already being computed."""
        limit = self.request.prompt_tokens + self.request.max_tokens
        return self.placeholders > 0 and self.num_computed_tokens + 2 - self.placeholders >= limit

    @property
    def prefills(self) -> bool:
        return self.num_computed_tokens < self.catch_up and not self.cut_now

    def block_hash(self, index: int, block_size: int, behind: int) -> BlockHash:
        """Identity of full block ``index``: that of the part which holds its last token, or the last one of
        those ``behind`` it that its hash covers."""
        last_token = (index + 1) * block_size - 1 + behind
        for content_id, end_token in self.request.content:
            if last_token < end_token:
                return ("content", content_id, index)
        return ("private", self.request_id, index)


@dataclass(slots=True)
class PlainStep:
    """One engine step: what schedule() decided and, below, what complete() delivered.

    chunks: (tokens, context before) of every scheduled entry that still catches up with its prompt (or,
    when resumed, with its recomputed outputs); decodes: the other entries, one token each, and
    decode_context the KV tokens they read, the new ones included. samples: entries that sample a token.
    """

    tokens: list[tuple[int, int]] = field(default_factory=list)  # (request id, tokens) in vLLM's order
    admitted: list[int] = field(default_factory=list)
    resumed: list[int] = field(default_factory=list)
    preempted: list[int] = field(default_factory=list)  # in victim order
    cached_tokens: dict[int, int] = field(default_factory=dict)  # prefix hit of the new and resumed
    chunks: list[tuple[int, int]] = field(default_factory=list)
    decodes: int = 0
    decode_context: int = 0
    samplers: list[int] = field(default_factory=list)
    spec_tokens: dict[int, int] = field(default_factory=dict)  # drafts that are verified, by request
    draft_length: int = 0

    tick: int = 0
    transfers: Any = None  # what the connector's workers report with it
    connector_meta: Any = None
    deferred: bool = False

    finished: list[int] = field(default_factory=list)
    first_tokens: list[int] = field(default_factory=list)
    emitted: int = 0

    def scheduled(self) -> dict[int, int]:
        return dict(self.tokens)

    @property
    def total_tokens(self) -> int:
        return sum(tokens for _, tokens in self.tokens)

    @property
    def drafts(self) -> int:
        return sum(self.spec_tokens.values())

    @property
    def samples(self) -> int:
        return len(self.samplers) + self.drafts


class PlainEngine:
    """The scheduler with its KV cache. With async scheduling call schedule(k+1) before complete(k)."""

    def __init__(self, config: EngineConfig, connector: Any = None, *, trace: bool = True) -> None:
        self.config, self.connector = config, connector
        self.minor = int(config.version.split(".")[1])  # 0.20 to 0.33
        assert 20 <= self.minor <= 33
        self.executed = 0  # steps with tokens, and the one of them that last carried prompt work
        self.last_prefill = -config.prefill_schedule_interval
        self.capacity_bound = False
        self.requests: dict[int, State] = {}
        self.running_states: list[State] = []  # in admission order
        self.waiting_states: list[State] = []  # head first
        self.beside: list[State] = []  # who was passed over or, from 0.31 on, holds blocks; comes first
        self.tick = self.prefix_queries = self.prefix_hits = self.external_queries = self.external_hits = 0
        self.deferred: list[tuple[int, list[int]]] = []  # (tick, blocks) to free when the step is over
        self.last_step = -1  # the newest one with tokens
        self.finished_req_ids: list[int] = []  # sent out by the next schedule()
        self.free: deque[int] = deque(range(1, config.num_gpu_blocks))  # block 0 is the null block
        self.ref_count = [0] * config.num_gpu_blocks
        self.hash_of: dict[int, BlockHash] = {}
        self.cache: dict[BlockHash, list[int]] = {}  # blocks of a hash, in order of insertion
        self.drafts = SimpleNamespace(told={}, num_drafts=0, num_draft_tokens=0, num_accepted_tokens=0)
        self.drafts.per_position = []
        self.encoder = None
        self.k = self.lookahead = self.slots = self.behind = 0
        self.token_budget = config.max_num_batched_tokens
        self.seats = config.max_num_seqs
        spec = config.speculation
        if spec is not None:
            self.k, self.lookahead, self.behind = spec.num_tokens, spec.lookahead, spec.hash_lookahead
            self.drafts.per_position = [0] * self.k
            if connector is not None and self.behind:  # a block's hash is the usual one
                self.behind = 0
            if self.minor >= 28:
                self.slots = spec.draft_slots
            else:
                self.token_budget -= spec.draft_slots * config.max_num_seqs
            if self.minor >= 33 and spec.method in ("dflash", "dspark"):
                self.seats = min(self.seats, self.token_budget // spec.lookahead)

    # ---- read-outs

    @property
    def has_requests(self) -> bool:
        return bool(self.requests or self.finished_req_ids)

    @property
    def running(self) -> list[int]:
        return [state.request_id for state in self.running_states]

    @property
    def waiting(self) -> list[int]:
        return [state.request_id for state in self.beside + self.waiting_states]

    @property
    def free_blocks(self) -> int:
        return len(self.free)

    @property
    def kv(self) -> SimpleNamespace:
        return SimpleNamespace(usage=1.0 - len(self.free) / (self.config.num_gpu_blocks - 1))

    @property
    def cached_blocks(self) -> int:
        return len(self.cache)

    def free_list(self, n: int) -> list[int]:
        return list(self.free)[:n]

    def block_ids(self, request_id: int) -> list[int]:
        return list(self.requests[request_id].blocks) if request_id in self.requests else []

    # ---- requests come and go

    def add(self, request: Request, arrival: int) -> None:
        state = State(request, arrival, num_tokens=request.prompt_tokens)
        self.requests[request.request_id] = state
        self.waiting_states.append(state)
        self.sort_waiting()

    def abort(self, request_id: int) -> None:
        """Drop a request in any state; output still in flight is thrown away. Unknown ids are ignored."""
        if request_id in self.requests and self.requests[request_id].status != "FINISHED":
            self.finish(self.requests[request_id], ended=False)

    def finish(self, state: State, *, ended: bool) -> None:
        """Take it out of whichever queue holds it and free its blocks, unless they are still loaded or the
        connector keeps them. ended: with its last token."""
        for queue in (self.running_states, self.waiting_states, self.beside):
            if state in queue:
                queue.remove(state)
        kept = state.status == "LOADING" and not state.received
        if self.connector is not None:
            kept |= self.connector.store.finished(state.request_id, ended)
        state.status = "FINISHED"
        self.finished_req_ids.append(state.request_id)
        if not kept:
            self.forget(state)

    def forget(self, state: State) -> None:
        self.free_request_blocks(state)
        del self.requests[state.request_id]

    def sort_waiting(self) -> None:
        """FCFS keeps the order of arrival (preempted ones in front); PRIORITY is a heap."""
        if self.config.scheduling_policy == "priority":
            self.waiting_states.sort(key=self.sort_key)
            self.beside.sort(key=self.sort_key)

    @staticmethod
    def sort_key(state: State) -> tuple[int, int, int]:
        return state.request.priority, state.arrival, state.request_id

    # ---- one step

    def schedule(self) -> PlainStep:
        step = PlainStep(tick=self.tick)
        threshold = self.prefill_threshold()
        held = self.executed + 1 - self.last_prefill < self.config.prefill_schedule_interval
        held = held and not self.capacity_bound and not all(s.prefills for s in self.running_states)
        self.carries_prefill = False
        budget = self.schedule_running(step, threshold, held)
        if not step.preempted:
            self.schedule_waiting(step, threshold, budget, held)
            if not held:
                self.capacity_bound = any(not state.passed for state in self.waiting_states + self.beside)
        self.executed += bool(step.tokens)
        if self.carries_prefill:
            self.last_prefill = self.executed
        self.advance(step)
        self.place_drafts(step)
        if step.tokens:
            self.last_step = self.tick
        self.tick += 1
        self.finished_req_ids = []
        return step

    def prefill_threshold(self) -> int:
        """Most tokens of one request in this step; 0 is no limit. 0.31 lifts it when few are there."""
        threshold = self.config.long_prefill_token_threshold
        if threshold > 0 and self.minor >= 31:
            requests = len(self.running_states) + len(self.waiting_states) + len(self.beside)
            if requests <= 1:
                return 0
            if self.config.long_prefill_token_threshold_adaptive:
                return max(threshold, self.config.max_num_batched_tokens // requests)
        return threshold

    def schedule_running(self, step: PlainStep, threshold: int, held: bool) -> int:
        """Phase 1: every running request catches up, preempting others where blocks run out.

        Returns the token budget that is left.
        """
        budget = self.token_budget
        index = 0
        while index < len(self.running_states) and budget > self.slots:
            state = self.running_states[index]
            tokens = state.num_tokens + state.spec_tokens + state.placeholders - state.num_computed_tokens
            if 0 < threshold < tokens:
                tokens = threshold
            tokens = min(
                tokens, budget - self.slots, self.config.max_model_len - state.num_computed_tokens - 1
            )
            tokens = self.spare_lookahead(state, state.num_computed_tokens, tokens)
            if state.last_in_flight or tokens == 0 or (held and state.prefills):
                index += 1
                continue
            while not self.allocate_slots(state, tokens, hit=[]):
                victim = self.pick_victim()
                if self.minor >= 30 and not self.may_free(victim):
                    return budget  # it would give nothing now
                victim_index = self.running_states.index(victim)
                given_back = step.scheduled().get(victim.request_id)
                if given_back is not None:  # it was scheduled earlier in this step
                    step.tokens.remove((victim.request_id, given_back))
                    step.spec_tokens.pop(victim.request_id, None)
                    budget += given_back + self.slots
                if victim_index < index if self.minor >= 28 else given_back is not None:
                    index -= 1
                self.preempt(victim)
                step.preempted.append(victim.request_id)
                if victim is state:
                    break
            if state.status == "PREEMPTED":
                if self.minor >= 33 and self.config.scheduling_policy == "priority":
                    continue
                return budget
            self.carries_prefill |= state.prefills
            step.tokens.append((state.request_id, tokens))
            ahead = tokens + state.num_computed_tokens - state.num_tokens - state.placeholders
            if state.spec_tokens and ahead > 0:
                step.spec_tokens[state.request_id] = min(ahead, state.spec_tokens)
            state.spec_tokens = 0
            budget -= tokens + self.slots
            index += 1
        return budget

    def spare_lookahead(self, state: State, computed: int, tokens: int) -> int:
        """A chunk of a prompt leaves several MTP modules what they read behind it, or nothing."""
        spec = self.config.speculation
        left = state.num_tokens - computed - tokens
        if spec is not None and 0 < left < spec.prompt_lookahead:
            tokens -= spec.prompt_lookahead - left
        return max(tokens, 0)

    def pick_victim(self) -> State:
        if self.config.scheduling_policy == "priority":
            return max(self.running_states, key=lambda s: (s.request.priority, s.arrival))
        return self.running_states[-1]

    def preempt(self, victim: State) -> None:
        """Free all it has and queue it in front; its tokens in flight are still delivered."""
        self.free_request_blocks(victim)
        self.running_states.remove(victim)
        victim.num_computed_tokens = victim.spec_tokens = 0
        victim.status, victim.prefilling, victim.cut_now = "PREEMPTED", False, False
        victim.preemptions += 1
        if self.connector is None or self.minor >= 27 or self.k:
            victim.placeholders = 0
        if self.minor >= 27 and self.connector is not None and self.connector.requires_kv_delivery:
            victim.drops_before = self.tick
        self.waiting_states.insert(0, victim)
        self.sort_waiting()

    def schedule_waiting(self, step: PlainStep, threshold: int, budget: int, held: bool) -> None:
        """Phase 2: admit from the head of the queue; the first one that does not fit blocks the rest."""
        max_running = self.seats
        prefill_scheduled = any(self.requests[request_id].prefills for request_id, _ in step.tokens)
        somebody_runs = bool(step.tokens)
        if self.config.max_num_active_seqs is not None:
            max_running = min(max_running, self.config.max_num_active_seqs)
        passed: list[State] = []
        while budget > self.slots and len(self.running_states) < max_running:
            queue = self.next_queue()
            if not queue:
                break
            state = queue[0]
            if state.status == "LOADING" and not self.arrived(state):
                passed.append(queue.pop(0))
                continue
            asked = state.num_computed_tokens == 0
            hit = self.longest_hit(state) if asked else []
            cached_tokens = len(hit) * self.config.block_size
            if asked and self.minor < 27:
                self.count_lookup(state, cached_tokens)
            external, loads = 0, False
            if asked and self.connector is not None:
                found = self.connector.store.match(
                    state.request_id,
                    state.request.prompt_tokens,
                    state.num_tokens,
                    cached_tokens,
                    self.config.block_size,
                )
                if found is None:
                    passed.append(queue.pop(0))
                    continue
                external, loads = found
            computed = state.num_computed_tokens + cached_tokens + external
            tokens = state.num_tokens - computed
            prefills = tokens > 1
            padded = False
            if loads:
                tokens = 0
            else:
                if held and prefills:
                    break
                padded = tokens == 1 and self.may_pad and not prefill_scheduled
                padded = padded and (somebody_runs or (self.minor >= 30 and computed > 0))
                if padded:
                    end = computed + 1 + self.k + (self.minor >= 29)
                    if end > self.config.max_model_len and self.minor < 29:
                        break
                    if end > self.config.max_model_len:
                        padded = False
                    elif 1 + self.k > budget - self.slots:
                        break
                    else:
                        tokens += self.k
                if 0 < threshold < tokens:
                    tokens = threshold
                if tokens > budget - self.slots and not self.config.enable_chunked_prefill:
                    break
                tokens = self.spare_lookahead(state, computed, min(tokens, budget - self.slots))
                if tokens == 0:
                    break
            if not self.allocate_slots(state, external + tokens, hit, loads=loads):
                break
            queue.pop(0)
            if asked and self.minor >= 27:
                self.count_lookup(state, cached_tokens)
            if self.connector is not None:
                block_size = self.config.block_size
                self.connector.store.allocated(state.request_id, state.blocks, external, block_size)
                if asked and not state.preemptions:
                    self.external_queries += state.num_tokens - cached_tokens
                    self.external_hits += external
            state.num_computed_tokens = computed
            if loads:
                state.status, state.prefilling = "LOADING", True
                passed.append(state)
                continue
            self.carries_prefill |= prefills
            self.running_states.append(state)
            (step.resumed if state.preemptions else step.admitted).append(state.request_id)
            state.status, state.passed = "RUNNING", False
            state.prefilling |= computed + tokens < state.num_tokens
            state.catch_up = state.num_tokens
            step.cached_tokens[state.request_id] = computed
            step.tokens.append((state.request_id, tokens))
            if padded:
                step.spec_tokens[state.request_id] = self.k
            budget -= tokens + self.slots
        for state in reversed(passed):
            state.passed = True
            holds = self.minor < 31 or state.num_computed_tokens > 0 or state.status == "LOADING"
            (self.beside if holds else self.waiting_states).insert(0, state)
        self.sort_waiting()

    def next_queue(self) -> list[State]:
        """Who was passed over comes before all others; before 0.31, by priority, in turn with them."""
        both = self.beside and self.waiting_states and self.minor < 31
        if both and self.config.scheduling_policy == "priority":
            return min(self.beside, self.waiting_states, key=lambda queue: self.sort_key(queue[0]))
        return self.beside or self.waiting_states

    def count_lookup(self, state: State, cached_tokens: int) -> None:
        if self.config.enable_prefix_caching and not state.preemptions:
            self.prefix_queries += state.num_tokens
            self.prefix_hits += cached_tokens

    @property
    def may_pad(self) -> bool:
        """Whether an admission that computes one token may be padded with drafts that nobody accepts."""
        return self.minor >= 25 and self.k > 0 and not self.config.speculation.by_batch

    def place_drafts(self, step: PlainStep) -> None:
        """How many drafts follow the step; async, their places are taken at once."""
        step.draft_length = self.k
        if self.k and self.config.speculation.by_batch and step.tokens:
            requests = len(step.tokens)
            most = [k for first, k in self.config.speculation.by_batch if first <= requests][-1]
            step.draft_length = min(most, self.k)
        if self.k and self.config.async_scheduling:
            for request_id in step.samplers:
                self.requests[request_id].spec_tokens = step.draft_length

    def advance(self, step: PlainStep) -> None:
        """Count the scheduled tokens as computed, and note who samples."""
        for request_id, tokens in step.tokens:
            state = self.requests[request_id]
            before = state.num_computed_tokens
            drafts = step.spec_tokens.get(request_id, 0)
            if before >= state.catch_up or drafts:
                step.decodes += 1
                step.decode_context += before + tokens
            else:
                step.chunks.append((tokens, before))
            state.num_computed_tokens += tokens
            if state.num_computed_tokens >= state.num_tokens + state.placeholders:
                step.samplers.append(request_id)
                state.prefilling = False
                if self.config.async_scheduling:
                    state.placeholders += 1 + drafts
            state.in_flight[step.tick] = tokens
            state.cut_now = False

    def complete(self, step: PlainStep) -> None:
        """Deliver the sampled tokens in the order of the step; finish who has reached its end. Then those
        end whose load has failed, and what was received or sent is taken note of."""
        for state in self.requests.values():
            state.in_flight.pop(step.tick, None)
        while step.tokens and self.deferred and self.deferred[0][0] <= step.tick:
            self.release(self.deferred.pop(0)[1])
        void = self.load_failures(step)
        recomputes = self.connector is not None and self.connector.load_failure_policy == "recompute"
        for request_id in step.samplers:
            state = self.requests.get(request_id)
            if state is None or state.status == "FINISHED":  # while the step was in flight
                continue
            if state in void or step.tick < state.drops_before:
                state.samplings += 1
                if self.k and not self.config.async_scheduling and state.status == "RUNNING":
                    self.propose(state, step)
                continue
            stale = state.status != "RUNNING"  # 0.27 zeroed its counts when it was preempted
            drafts = step.spec_tokens.get(request_id, 0)
            accepted = self.accept(state, drafts)
            if not stale:
                state.num_computed_tokens -= drafts - accepted
            delivered = 0
            while delivered < 1 + accepted:
                delivered += 1
                state.num_tokens += 1
                outputs = state.num_tokens - state.request.prompt_tokens
                if outputs == 1:
                    step.first_tokens.append(request_id)
                if outputs >= state.request.output_tokens or state.num_tokens >= self.config.max_model_len:
                    break
            step.emitted += delivered
            if self.config.async_scheduling and not stale:
                state.placeholders -= drafts - accepted + delivered
                ahead = state.placeholders
                if self.connector is not None and self.minor >= 33:
                    ahead = sum(state.in_flight.values()) + 1 + accepted - delivered
                self.cache_blocks(state, state.num_computed_tokens - ahead)
            elif self.config.async_scheduling and state.placeholders:
                state.placeholders -= 1
            if not self.config.async_scheduling and self.k:
                if self.minor >= 33:
                    self.cache_blocks(state, state.num_tokens - 1)
                self.propose(state, step)
            if outputs >= state.request.output_tokens or state.num_tokens >= self.config.max_model_len:
                self.finish(state, ended=True)
                step.finished.append(request_id)
        for state in [] if recomputes else sorted(void, key=lambda state: state.request_id):
            if state.status != "FINISHED":
                self.finish(state, ended=False)
                step.finished.append(state.request_id)
        if step.transfers is not None:
            for request_id in step.transfers.finished_recving:
                state = self.requests[request_id]
                state.received = True
                if state.status == "FINISHED":
                    self.forget(state)
            for request_id in step.transfers.finished_sending:
                self.forget(self.requests[request_id])

    # ---- what a KV connector brings

    def arrived(self, state: State) -> bool:
        """Whether one that loads may go on: it can be found from now on, and computes its last token."""
        if not state.received:
            return False
        if state.failed and state.num_computed_tokens == 0:
            self.free_request_blocks(state)
        else:
            self.cache_blocks(state, state.num_computed_tokens)
        state.received = state.failed = False
        if state.num_computed_tokens == state.num_tokens:
            state.num_computed_tokens -= 1
        state.status = "PREEMPTED" if state.preemptions else "WAITING"
        return True

    def load_failures(self, step: PlainStep) -> list[State]:
        """Whose output of the step is void, since blocks that it counts on were not loaded."""
        if step.transfers is None or not step.transfers.invalid_block_ids:
            return []
        invalid = step.transfers.invalid_block_ids
        aside = self.cut([state for state in self.beside if state.status == "LOADING"], step, invalid)
        inside = self.cut(list(self.running_states), step, invalid)
        if self.connector.load_failure_policy == "fail":
            for state in inside:
                first = state.num_computed_tokens // self.config.block_size
                for block in state.blocks[first:] if state.failed else []:
                    self.evict(block)
                state.failed = False
            return aside + inside
        for state in inside:
            state.failed, state.cut_now = False, True
        return inside

    def cut(self, states: list[State], step: PlainStep, invalid: frozenset[int]) -> list[State]:
        """Those that count on invalid blocks. Computed tokens end before the first that no other computes
        again, which is marked by ``failed``, or where they stood before the step."""
        marked: set[int] = set()
        affected = []
        for state in states:
            before = state.num_computed_tokens - step.scheduled().get(state.request_id, 0)
            counted = state.blocks[: -(-before // self.config.block_size)]
            bad = [index for index, block in enumerate(counted) if block in invalid]
            own = [index for index in bad if counted[index] not in marked]
            if not bad:
                continue
            marked.update(counted[index] for index in bad)
            state.num_computed_tokens = own[0] * self.config.block_size if own else before
            state.failed = bool(own) or state.status == "LOADING"
            state.catch_up = state.num_tokens + state.placeholders
            affected.append(state)
        return affected

    def may_free(self, state: State) -> bool:
        """Whether no step in flight may write its blocks, where that is waited for."""
        defers = self.connector is not None and self.minor >= 24 and self.config.async_scheduling
        return not (defers and self.connector.role != "kv_producer" and state.in_flight)

    def reserved_blocks(self) -> int:
        """Blocks that those who prefill or load still need."""
        drafts = 1 + self.k + self.lookahead if self.k and self.minor >= 31 else 0
        block_size = self.config.block_size
        blocks = -(-drafts // block_size)
        for state in self.requests.values():
            if state.prefilling and state.status != "FINISHED":
                tokens = min(state.num_tokens, self.config.max_model_len) + drafts
                blocks += max(0, -(-tokens // block_size) - len(state.blocks))
        return blocks

    def propose(self, state: State, step: PlainStep) -> None:
        """Drafts that it gets after its newest sampling step."""
        proposed = self.drafts.told[state.request_id][1]
        state.spec_tokens = min(step.draft_length, proposed[(state.samplings - 1) % len(proposed)])

    def accept(self, state: State, drafts: int) -> int:
        """How many of the drafts that it verified are accepted, by what was told; counted as vLLM does."""
        if not self.k:
            return 0
        told = self.drafts.told[state.request_id][0]
        accepted = min(told[state.samplings % len(told)], drafts)
        state.samplings += 1
        self.drafts.num_drafts += drafts > 0
        self.drafts.num_draft_tokens += drafts
        self.drafts.num_accepted_tokens += accepted
        for position in range(accepted):
            self.drafts.per_position[position] += 1
        return accepted

    # ---- the KV cache

    def longest_hit(self, state: State) -> list[int]:
        """Cached leading blocks; at least the last token is left to compute."""
        hit: list[int] = []
        for index in range((state.num_tokens - 1) // self.config.block_size):
            blocks = self.cache.get(state.block_hash(index, self.config.block_size, self.behind))
            if not blocks:
                break
            hit.append(blocks[0])
        spec = self.config.speculation
        drops = spec is not None and (spec.drops_block or (spec.hash_lookahead and not self.behind))
        if drops:
            del hit[-1:]
        return hit

    def allocate_slots(self, state: State, tokens: int, hit: list[int], *, loads: bool = False) -> bool:
        """Give ``state`` the blocks for ``tokens`` more tokens after ``hit``; False if they are not there.
        loads: they are loaded aside, and can be found when that is over."""
        cfg = self.config
        admission = state.status != "RUNNING"
        evicted = sum(self.ref_count[block] == 0 for block in hit)  # hits that leave the free list
        reserve = 0
        if admission and self.running_states:
            reserve = int(cfg.watermark * cfg.num_gpu_blocks)
        if admission and cfg.scheduler_reserve_full_isl:
            missing = max(self.blocks_for(state.num_tokens) - len(state.blocks) - len(hit), 0)
            if missing + evicted + reserve > len(self.free):
                return False
        end = state.num_computed_tokens + len(hit) * cfg.block_size + tokens
        lookahead = self.lookahead if self.minor >= 23 or not admission else 0
        if loads:  # 0.23 reserves it for drafters that take no hidden states
            draft_model = self.lookahead and self.config.speculation.method == "draft_model"
            lookahead = self.lookahead if self.minor == 23 and draft_model else 0
            reserve += self.reserved_blocks()
        missing = max(self.blocks_for(end + lookahead) - len(state.blocks) - len(hit), 0)
        if missing + evicted + reserve > len(self.free):
            return False

        for block in hit:
            if self.ref_count[block] == 0:
                self.free.remove(block)
            self.ref_count[block] += 1
        state.blocks += hit
        state.num_cached_blocks += len(hit)
        for _ in range(missing):
            block = self.free.popleft()
            self.evict(block)
            self.ref_count[block] = 1
            state.blocks.append(block)
        if not loads:
            self.cache_blocks(state, min(end, state.num_tokens))
        return True

    def blocks_for(self, tokens: int) -> int:
        return -(-min(tokens, self.config.max_model_len) // self.config.block_size)

    def evict(self, block: int) -> None:
        if block in self.hash_of:
            block_hash = self.hash_of.pop(block)
            self.cache[block_hash].remove(block)
            if not self.cache[block_hash]:
                del self.cache[block_hash]

    def cache_blocks(self, state: State, tokens: int) -> None:
        """Hash the full blocks among the first ``tokens`` tokens. Duplicates are kept side by side."""
        if not self.config.enable_prefix_caching:
            return
        spec = self.config.speculation
        rewritten = max(0, spec.prompt_lookahead - 1) if spec is not None else 0
        hashed = min(tokens - rewritten, state.num_tokens - self.behind)
        for index in range(state.num_cached_blocks, hashed // self.config.block_size):
            block = state.blocks[index]
            assert block not in self.hash_of
            block_hash = state.block_hash(index, self.config.block_size, self.behind)
            self.hash_of[block] = block_hash
            self.cache.setdefault(block_hash, []).append(block)
            state.num_cached_blocks = index + 1

    def free_request_blocks(self, state: State) -> None:
        """Its blocks go, when no step in flight may write them."""
        if self.may_free(state):
            self.release(state.blocks)
        else:
            self.deferred.append((self.last_step, state.blocks))
        state.blocks = []
        state.num_cached_blocks = 0

    def release(self, blocks: list[int]) -> None:
        """Release blocks, last one first. 0.24 puts those without a hash at the head of the list."""
        released = []
        for block in reversed(blocks):
            self.ref_count[block] -= 1
            if self.ref_count[block] == 0:
                released.append(block)
        first = self.minor >= 24 and (self.minor != 27 or self.config.enable_prefix_caching)
        plain = [block for block in released if first and block not in self.hash_of]
        self.free.extendleft(reversed(plain))
        self.free.extend(block for block in released if block not in plain)
