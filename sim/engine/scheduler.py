"""vLLM's V1 scheduler: who computes how many tokens in the next step, and on which KV blocks.

Every decision equals vLLM's, step by step (see docs/parity.md). Where a rule is copied, a comment names the
function of vLLM (``vllm/v1/core``) that has it. What differs is the bookkeeping: most
running requests decode one token a step, and nothing has to be touched for them until a block fills or
they end. Such *cruising* sequences (see ``Sequence``) are counted, not visited, so the cost of a step
grows with what changes in it and not with the batch.

Use: ``add``, then ``step = schedule()`` and ``complete(step)`` in turn; with async scheduling the next
``schedule`` comes before the ``complete`` of the step in flight.
"""

from __future__ import annotations

from operator import attrgetter

from servecast.sim.engine.cadence import PrefillCadence
from servecast.sim.engine.config import EngineConfig
from servecast.sim.engine.cruise import Cruise
from servecast.sim.engine.kv_cache import KVCache
from servecast.sim.engine.request import Request
from servecast.sim.engine.rules import rules_for
from servecast.sim.engine.sequence import FINISHED, PREEMPTED, RUNNING, Sequence
from servecast.sim.engine.step import Step
from servecast.sim.engine.waiting import QUEUES, WaitingQueue
from servecast.sim.inputs.errors import InputError

_by_order = attrgetter("order")


class Scheduler:
    """The engine's state and its decisions.

    Args:
        config: flags and pool size.
        trace: keep each step's full composition for ``Step.scheduled``; costs a visit of every running
            request a step, changes no decision.
    """

    def __init__(self, config: EngineConfig, *, trace: bool = False) -> None:
        self.config = config
        self.rules = rules_for(config.version)
        self.trace = trace
        appends = self.rules.append_without_caching and not config.enable_prefix_caching
        reuse_unhashed_first = self.rules.reuse_unhashed_first and not appends
        self.kv = KVCache(config.num_gpu_blocks, reuse_unhashed_first=reuse_unhashed_first)
        self.tick = 0  # number of schedule() calls so far
        self.prefix_queries = 0  # tokens looked up and found, as vLLM's counters have them
        self.prefix_hits = 0
        self._block_size = config.block_size
        self._priority = config.scheduling_policy == "priority"
        self._max_running = min(config.max_num_seqs, config.max_num_active_seqs or config.max_num_seqs)
        self._watermark_blocks = int(config.watermark * config.num_gpu_blocks)
        self._sequences: dict[int, Sequence] = {}
        self._waiting: WaitingQueue = QUEUES[config.scheduling_policy]()
        self._running: dict[int, Sequence] = {}  # by order, rising
        self._unsettled: dict[int, Sequence] = {}  # the running ones that prefill or were starved, by order
        self._next_order = 0
        self._cruise = Cruise(config.block_size, async_scheduling=config.async_scheduling)
        self._cadence = PrefillCadence(config.prefill_schedule_interval)
        self._in_flight: list[Step] = []  # decided, not completed: at most two
        self._finished_unsent = False

    # ---- what can be read -------------------------------------------------------------------------

    @property
    def has_requests(self) -> bool:
        """Whether the engine loop goes on: one more (empty) step follows the last finish."""
        return bool(self._sequences) or self._finished_unsent

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> list[int]:
        """Request ids, in order of admission."""
        return [sequence.request_id for sequence in self._running.values()]

    @property
    def waiting(self) -> list[int]:
        """Request ids, next one first."""
        return [sequence.request_id for sequence in self._waiting.ordered()]

    @property
    def free_blocks(self) -> int:
        return self.kv.free_blocks

    def free_list(self, limit: int) -> list[int]:
        """The next ``limit`` blocks to be taken."""
        return self.kv.free_list(limit)

    @property
    def cached_blocks(self) -> int:
        """Distinct block contents that a look-up could find now."""
        for sequence in self._running.values():
            self._cache_full_blocks(sequence)
        return self.kv.cached_keys

    def block_ids(self, request_id: int) -> list[int]:
        return list(self._sequences[request_id].blocks)

    # ---- requests come and go ---------------------------------------------------------------------

    def add(self, request: Request, arrival: int) -> None:
        """Queue a request. ``arrival`` rises from call to call; ties of priority go by it.

        Raises:
            InputError: the request could never run alone: longer than ``max_model_len`` or than the pool.
        """
        config = self.config
        sequence = Sequence(request, arrival, self._block_size, config.max_model_len)
        where = f"request {request.request_id}"
        if request.prompt_tokens >= config.max_model_len:
            raise InputError(
                f"its prompt of {request.prompt_tokens} tokens leaves no room for an output",
                where=where,
                fix=f"Shorten it below max_model_len={config.max_model_len}, or raise max_model_len.",
            )
        need = -(-(sequence.final_tokens - 1) // self._block_size)  # the last token is never computed
        if need > config.num_gpu_blocks - 1:
            raise InputError(
                f"its {sequence.final_tokens} tokens need {need} KV blocks of {self._block_size}",
                where=where,
                fix=f"The pool has {config.num_gpu_blocks - 1}: enlarge it or shorten the request.",
            )
        self._sequences[request.request_id] = sequence
        self._waiting.push(sequence)

    def abort(self, request_id: int) -> None:
        """Drop a request wherever it stands; an unknown or finished one is ignored."""
        sequence = self._sequences.get(request_id)
        if sequence is None:
            return
        if sequence.status == RUNNING:
            if sequence.cruising:
                self._drop_in_flight(sequence)
            self._remove_running(sequence)
        else:
            self._waiting.remove(sequence)
        self._forget(sequence)

    # ---- a step is decided ------------------------------------------------------------------------

    def schedule(self) -> Step:
        """Decide the next step; computed tokens advance at once, sampled ones arrive by ``complete``."""
        step = Step(self.tick)
        self._finished_unsent = False
        threshold = self._chunk_limit()
        defer = self._cadence.begin() and self._somebody_decodes()
        budget = self._schedule_running(step, self.config.max_num_batched_tokens, threshold, defer=defer)
        if not step.preempted and len(self._waiting):
            budget = self._admit(step, budget, threshold, defer=defer)
        self._advance(step)
        admitting = not step.preempted and not defer
        self._cadence.end(tokens=step.total_tokens, admitting=admitting, waiting=len(self._waiting))
        return step

    def _somebody_decodes(self) -> bool:
        """Whether a running request has left its prefill (Scheduler.schedule: "not r.is_prefill_chunk")."""
        return len(self._running) > sum(sequence.prefills for sequence in self._unsettled.values())

    def _chunk_limit(self) -> int:
        """``long_prefill_token_threshold`` in force in this step; 0 is none."""
        # Scheduler.schedule, before its loops: num_eligible_reqs
        threshold = self.config.long_prefill_token_threshold
        if threshold and self.rules.lone_request_ignores_threshold:
            active = len(self._running) + len(self._waiting)
            if active <= 1:
                return 0
            if self.config.long_prefill_token_threshold_adaptive:
                return max(threshold, self.config.max_num_batched_tokens // active)
        return threshold

    def _demand(self, sequence: Sequence, threshold: int) -> int:
        """Tokens that an unsettled running sequence asks for."""
        # Scheduler.schedule: num_tokens_with_spec + num_output_placeholders - num_computed_tokens
        wanted = sequence.num_tokens - sequence.computed
        if 0 < threshold < wanted:
            wanted = threshold
        return wanted

    def _schedule_running(self, step: Step, budget: int, threshold: int, *, defer: bool) -> int:
        """Phase 1: running requests, in order of admission, without those that prefill where their work is
        to ``defer``. Returns the budget left."""
        for sequence in self._cruise.last_in_flight(self.tick):
            self._stop_cruising(sequence)
        due = self._cruise.blocks_due(self.tick)
        if not self._unsettled and self._cruise.count <= budget and len(due) <= self.kv.free_blocks:
            if len(due) > 1:
                due.sort(key=_by_order)
            for sequence in due:
                self._cruise.add_block(sequence, self.kv.take_one())
            return budget - self._cruise.count
        if not defer and self._settled_can_be_skipped(due, budget, threshold):
            if self._unsettled:
                due = [*due, *self._unsettled.values()]
            due.sort(key=_by_order)
            return self._walk_changes(step, due, budget, threshold)
        return self._walk_all(step, budget, threshold, defer=defer)

    def _settled_can_be_skipped(self, due: list[Sequence], budget: int, threshold: int) -> bool:
        """Whether all cruisers get their token whatever the order, so that only changes are visited."""
        if self._cruise.count > budget:
            return False
        demands = [self._demand(sequence, threshold) for sequence in self._unsettled.values()]
        if self._priority:
            blocks = len(due) + sum(
                -(-(s.computed + n) // self._block_size) - len(s.blocks)
                for s, n in zip(self._unsettled.values(), demands, strict=True)
            )
            if blocks > self.kv.free_blocks:
                return False
        if self._cruise.count + sum(demands) <= budget:
            return True
        tail = reversed(self._running)
        return all(next(tail) in self._unsettled for _ in demands)

    def _walk_changes(self, step: Step, members: list[Sequence], budget: int, threshold: int) -> int:
        """Visit only the sequences that need a block or prefill; preempt from the end of the running list."""
        budget -= self._cruise.count
        for sequence in members:
            if sequence.status != RUNNING:
                continue  # a victim of this step
            tokens = 1 if sequence.cruising else min(self._demand(sequence, threshold), budget)
            if tokens <= 0:
                continue
            computed = self.tick - sequence.base if sequence.cruising else sequence.computed
            need = -(-(computed + tokens) // self._block_size) - len(sequence.blocks)
            while need > self.kv.free_blocks:
                victim = next(reversed(self._running.values()))
                budget += victim.cruising
                self._preempt(step, victim)
                if victim is sequence:
                    break
            if sequence.status != RUNNING:
                break
            if sequence.cruising:
                self._cruise.add_block(sequence, self.kv.take_one())
            else:
                self._cadence.carries_prefill |= sequence.prefills
                self._grow(sequence, tokens, need)
                step.entries.append((sequence, tokens))
                budget -= tokens
        return budget

    def _walk_all(self, step: Step, budget: int, threshold: int, *, defer: bool) -> int:
        """Visit every running sequence, as vLLM's loop does: some may get no token, or lose it again."""
        # Scheduler.schedule, "First, schedule the RUNNING requests": cursor is its req_index
        members = list(self._running.values())
        scheduled: dict[int, int] = {}  # order -> tokens
        cursor = 0
        while cursor < len(members) and budget > 0:
            sequence = members[cursor]
            if sequence.cruising:
                tokens, computed = 1, self.tick - sequence.base
            else:
                tokens, computed = min(self._demand(sequence, threshold), budget), sequence.computed
            idle = sequence.order not in self._unsettled and not sequence.cruising
            if tokens <= 0 or idle or (defer and sequence.prefills):
                cursor += 1
                continue
            need = -(-(computed + tokens) // self._block_size) - len(sequence.blocks)
            while need > self.kv.free_blocks:
                victim = self._victim(members)
                position = members.index(victim)
                del members[position]
                given_back = scheduled.pop(victim.order, 0)
                budget += given_back
                # before 0.28: "if preempted_req in scheduled_running_reqs": it gave tokens back
                if given_back if not self.rules.cursor_follows_victim else position < cursor:
                    cursor -= 1
                self._preempt(step, victim, scheduled=bool(given_back))
                if victim is sequence:
                    break
            if sequence.status != RUNNING:
                if self.rules.loop_goes_on_after_own_preemption:  # under FCFS it was the last anyway
                    continue  # its place in the list is the next one's now
                break
            if sequence.cruising:
                if need > 0:
                    self._cruise.add_block(sequence, self.kv.take_one())
            else:
                self._cadence.carries_prefill |= sequence.prefills
                self._grow(sequence, tokens, need)
            scheduled[sequence.order] = tokens
            budget -= tokens
            cursor += 1
        for sequence in members:
            if sequence.order in scheduled:
                if not sequence.cruising:
                    step.entries.append((sequence, scheduled[sequence.order]))
            elif sequence.cruising:  # starved
                self._stop_cruising(sequence)
                self._unsettled[sequence.order] = sequence
        return budget

    def _victim(self, members: list[Sequence]) -> Sequence:
        # Scheduler.schedule: max(self.running, key=lambda r: (r.priority, r.arrival_time)), or running.pop()
        if self._priority:
            return max(members, key=lambda s: (s.request.priority, s.arrival))
        return members[-1]

    def _admit(self, step: Step, budget: int, threshold: int, *, defer: bool) -> int:
        """Phase 2: the head of the queue, while it fits and has no prompt work to ``defer``. Returns the
        budget left."""
        kv, block_size, config = self.kv, self._block_size, self.config
        while len(self._waiting) and budget > 0 and len(self._running) < self._max_running:
            sequence = self._waiting.head()
            hits: list[int] = []
            if config.enable_prefix_caching:
                # KVCacheManager.get_computed_blocks: the last token is always computed, for its logits
                hits = kv.lookup(sequence.keys(0, (sequence.num_tokens - 1) // block_size))
            hit_tokens = len(hits) * block_size
            if not self.rules.count_admitted_lookups:
                self._count_lookup(sequence, hit_tokens)
            tokens = sequence.num_tokens - hit_tokens
            carries_prefill = tokens > 1
            if defer and carries_prefill:
                break
            if 0 < threshold < tokens:
                tokens = threshold
            if not config.enable_chunked_prefill and tokens > budget:
                break
            tokens = min(tokens, budget)
            reserve = kv.count_free(hits) if hits else 0
            if self._running:
                reserve += self._watermark_blocks
            # KVCacheManager.allocate_slots; hits that lie free are taken from the free list, too
            need = -(-min(hit_tokens + tokens, config.max_model_len) // block_size) - len(hits)
            fit = need
            if config.scheduler_reserve_full_isl:  # full_sequence_must_fit
                full = -(-min(sequence.num_tokens, config.max_model_len) // block_size) - len(hits)
                fit = max(need, full)
            if fit + reserve > kv.free_blocks:
                break
            self._waiting.pop()
            self._cadence.carries_prefill |= carries_prefill
            if self.rules.count_admitted_lookups:
                self._count_lookup(sequence, hit_tokens)
            kv.touch(hits)
            sequence.blocks = hits
            sequence.num_cached = len(hits)
            sequence.computed = hit_tokens
            (step.resumed if sequence.status == PREEMPTED else step.admitted).append(sequence.request_id)
            step.cached_tokens[sequence.request_id] = hit_tokens
            sequence.status = RUNNING
            sequence.prefill_tokens = sequence.num_tokens
            sequence.order = self._next_order
            self._next_order += 1
            self._running[sequence.order] = sequence
            self._unsettled[sequence.order] = sequence
            self._grow(sequence, tokens, need)
            step.entries.append((sequence, tokens))
            budget -= tokens
        return budget

    def _count_lookup(self, sequence: Sequence, hit_tokens: int) -> None:
        """vLLM keeps the look-ups of preempted requests out of its counters (PrefixCacheStats.record)."""
        if self.config.enable_prefix_caching and not sequence.preemptions:
            self.prefix_queries += sequence.num_tokens
            self.prefix_hits += hit_tokens

    def _advance(self, step: Step) -> None:
        """The step is on its way: computed tokens advance, and who now decodes starts cruising."""
        cruisers = step.cruisers = self._cruise.count
        context = self._cruise.context(self.tick)
        if self.trace:
            tokens = {sequence.order: count for sequence, count in step.entries}
            step._composition = {
                s.request_id: tokens.get(order, 1)
                for order, s in self._running.items()
                if order in tokens or s.cruising
            }
        self.tick += 1
        step.total_tokens = step.samples = step.decodes = cruisers
        for sequence, count in step.entries:
            before = sequence.computed
            sequence.computed += count
            step.total_tokens += count
            ends = sequence.computed >= sequence.num_tokens
            if before >= sequence.prefill_tokens:
                step.decodes += 1
                context += before + 1
            else:
                step.chunks.append((count, before))
            if ends:
                step.samples += 1
                del self._unsettled[sequence.order]
                self._cruise.join(sequence, self.tick)
        step.decode_context = context
        self._in_flight.append(step)

    # ---- a step is done ---------------------------------------------------------------------------

    def complete(self, step: Step) -> None:
        """Deliver the tokens of a step; who has its last one leaves with its blocks."""
        assert step is self._in_flight[0], "steps complete in the order in which they were decided"
        del self._in_flight[0]
        ended: list[Sequence] = []
        for sequence, _count in step.entries:
            if sequence.join_tick != step.tick or sequence.status == FINISHED:
                continue  # no token yet, or nobody to take it
            step.emitted += 1
            if sequence.token_tick is None:
                step.first_tokens.append(sequence.request_id)
            else:
                step.gaps.append(sequence.token_tick)
            sequence.token_tick = step.tick
            if not sequence.cruising:
                self._deliver(sequence, ended)
        for sequence in step.stragglers:
            if sequence.status == FINISHED:
                step.dropped += 1
                continue
            sequence.token_tick = step.tick
            self._deliver(sequence, ended)
        step.steady = step.cruisers - step.dropped
        step.emitted += step.steady
        for sequence in self._cruise.ended_by(step.tick):
            ended.append(sequence)
            self._drop_in_flight(sequence)
        if len(ended) > 1:
            ended.sort(key=_by_order)
        for sequence in ended:
            if sequence.status == RUNNING:
                self._remove_running(sequence, computed=sequence.final_tokens - 1)
            else:
                self._waiting.remove(sequence)  # preempted while its last token was in flight
            self._forget(sequence)
            step.finished.append(sequence.request_id)

    def _deliver(self, sequence: Sequence, ended: list[Sequence]) -> None:
        sequence.num_tokens += 1
        if sequence.status == RUNNING and self.config.enable_prefix_caching:
            self._cache_up_to(sequence, sequence.computed // self._block_size)
        if sequence.num_tokens >= sequence.final_tokens:
            ended.append(sequence)

    # ---- sequences change state -------------------------------------------------------------------

    def _stop_cruising(self, sequence: Sequence) -> None:
        """Bring its numbers up to date; a token in flight is delivered to it in person."""
        self._cache_full_blocks(sequence)
        self._cruise.leave(sequence)
        computed = sequence.computed = self.tick - sequence.base
        if self._in_flight:
            last = self._in_flight[-1]
            sequence.num_tokens = computed
            if sequence.join_tick != last.tick:
                last.stragglers.append(sequence)
                sequence.token_tick = last.tick
        else:
            sequence.num_tokens = computed + 1
            sequence.token_tick = self.tick - 1

    def _drop_in_flight(self, sequence: Sequence) -> None:
        """A cruiser ends: the tokens that steps in flight compute for it are nobody's."""
        for step in self._in_flight:
            if step.tick > sequence.join_tick:
                step.dropped += 1

    def _grow(self, sequence: Sequence, tokens: int, need: int) -> None:
        """Blocks for ``tokens`` more; full ones are known to the prefix cache at once."""
        if need > 0:
            sequence.blocks += self.kv.take(need)
        if self.config.enable_prefix_caching:
            known = min(sequence.computed + tokens, sequence.num_tokens)
            self._cache_up_to(sequence, known // self._block_size)

    def _cache_full_blocks(self, sequence: Sequence, *, scheduled: bool = False) -> None:
        """Catch up with the blocks that filled while cruising: nobody else looks up its own outputs.

        A block is known once its last token is computed *and* known: under async scheduling the newest
        computed token is still in flight. ``scheduled``: the step being decided has already served it.
        """
        if not sequence.cruising or not self.config.enable_prefix_caching:
            return
        computed = self.tick - sequence.base + scheduled
        if self._in_flight and self.config.async_scheduling:
            computed -= 1
        self._cache_up_to(sequence, computed // self._block_size)

    def _cache_up_to(self, sequence: Sequence, full_blocks: int) -> None:
        start = sequence.num_cached
        if full_blocks > start:
            self.kv.cache(sequence.keys(start, full_blocks), sequence.blocks[start:full_blocks])
            sequence.num_cached = full_blocks

    def _preempt(self, step: Step, sequence: Sequence, *, scheduled: bool = False) -> None:
        """Recompute later: give everything back and wait at the front (Scheduler._preempt_request)."""
        if sequence.cruising:
            self._cache_full_blocks(sequence, scheduled=scheduled)
            self._stop_cruising(sequence)
        sequence.computed = 0
        self._leave_running(sequence)
        sequence.status = PREEMPTED
        sequence.preemptions += 1
        self._waiting.push_preempted(sequence)
        step.preempted.append(sequence.request_id)

    def _remove_running(self, sequence: Sequence, computed: int | None = None) -> None:
        """It ends: what it computed (all, where ``computed`` is None) stays findable."""
        if sequence.cruising:
            if computed is None:
                self._cache_full_blocks(sequence)
            self._cruise.leave(sequence)
        if computed is not None and self.config.enable_prefix_caching:
            self._cache_up_to(sequence, computed // self._block_size)
        self._leave_running(sequence)

    def _leave_running(self, sequence: Sequence) -> None:
        del self._running[sequence.order]
        self._unsettled.pop(sequence.order, None)
        self.kv.release(sequence.blocks, sequence.num_cached)
        sequence.blocks = []
        sequence.num_cached = 0

    def _forget(self, sequence: Sequence) -> None:
        sequence.status = FINISHED
        del self._sequences[sequence.request_id]
        self._finished_unsent = True
