"""vLLM's V1 scheduler: who computes how many tokens in the next step, and on which KV blocks.

Every running request is visited in every step, as vLLM does it, so a rule of vLLM is one place here; comments
name the function of vLLM (``vllm/v1``) that has it.
"""

from __future__ import annotations

from typing import Any

import cython

from servecast.sim.engine.cadence import PrefillCadence
from servecast.sim.engine.drafts import Drafts
from servecast.sim.engine.encoder_cache import EncoderCache
from servecast.sim.engine.group_cache import GroupCache
from servecast.sim.engine.kv_cache import KVCache
from servecast.sim.engine.pipeline_rules import decode_stride, loras_of_all_running, stale_waits
from servecast.sim.engine.remote_kv import RemoteKV
from servecast.sim.engine.remote_rules import remote_rules_for
from servecast.sim.engine.rules import rules_for
from servecast.sim.engine.sequence import Sequence
from servecast.sim.engine.step import NOBODY, Step
from servecast.sim.engine.waiting import QUEUES
from servecast.sim.inputs.errors import InputError

if not cython.compiled:
    from servecast.sim.engine.sequence import FINISHED, LOADING, PREEMPTED, RUNNING
    from servecast.sim.engine.step import own

NOBODYS = cython.declare(cython.int, 1 << 30)  # more placeholders than any request has


class Scheduler:
    """vLLM's V1 scheduler: who computes how many tokens in the next step, and on which KV blocks.

    Use: ``add``, then ``step = schedule()`` and ``complete(step)`` in turn; with async scheduling the next
    ``schedule`` comes before the ``complete`` of the step in flight.

    Args:
        config: flags and pool size.
        connector: where KV cache comes from or goes to (``servecast.sim.engine.connector``), or None.
        trace: keep each step's full composition for ``Step.scheduled``; changes no decision.
    """

    def __init__(self, config: Any, connector: Any = None, *, trace: bool = False) -> None:
        rules = rules_for(config.version)
        self.config, self.rules, self.trace = config, rules, trace
        appends = rules.append_without_caching and not config.enable_prefix_caching
        self.loop_goes_on_after_own_preemption = rules.loop_goes_on_after_own_preemption
        self.lone_request_ignores_threshold = rules.lone_request_ignores_threshold
        self.cursor_follows_victim = rules.cursor_follows_victim
        self.count_admitted_lookups = rules.count_admitted_lookups
        self.cadence = None
        if config.prefill_schedule_interval > 1:
            self.cadence = PrefillCadence(config.prefill_schedule_interval)
        self.prefix_caching = config.enable_prefix_caching
        self.chunked_prefill = config.enable_chunked_prefill
        self.is_async = config.async_scheduling
        self.least = self.is_async
        self.adaptive = config.long_prefill_token_threshold_adaptive
        self.priority = config.scheduling_policy == "priority"
        self.pipelined = config.pipeline_parallel_size > 1
        self.stride, self.staggers = decode_stride(config)
        self.stales = self.pipelined and stale_waits(config.version)
        self.max_loras = config.max_loras
        self.counts_running_loras = config.max_loras > 0 and loras_of_all_running(config.version)
        self.holds_back = self.stales or self.max_loras > 0
        self.clock = 0
        self.notes = self.priority or trace or self.staggers
        self.encoder = EncoderCache(config) if config.encoder_cache_size else None
        self.marks = bool(config.kv_groups) or connector is not None or self.pipelined or self.max_loras > 0
        self.marks = self.marks or self.encoder is not None
        self.names_chunks = self.priority or connector is not None
        drafts: Any = Drafts(config) if config.speculation is not None else None
        self.drafts, self.speculates = drafts, drafts is not None
        self.singly = self.notes or self.speculates
        self.max_tokens, self.max_model_len = config.max_num_batched_tokens, config.max_model_len
        self.max_running = min(config.max_num_seqs, config.max_num_active_seqs or config.max_num_seqs)
        self.budget, self.draft_slots, self.prompt_lookahead = self.max_tokens, 0, 0
        if self.speculates:
            self.budget, self.draft_slots = self.drafts.budget, self.drafts.slots
            self.prompt_lookahead = config.speculation.prompt_lookahead
            self.max_running = min(self.max_running, self.drafts.seats)
        self.long_prefill_threshold = config.long_prefill_token_threshold
        self.watermark = int(config.watermark * config.num_gpu_blocks)
        self.tick = self.prefix_queries = self.prefix_hits = self.added = 0
        self.num_waiting = self.num_passed = 0
        self.finished_unsent = False
        self.window, self.chunked = 0, False
        cache = GroupCache if config.kv_groups else KVCache
        self.kv = cache(config, rules.reuse_unhashed_first and not appends, self.max_running)
        self.sequences, self.runners, self.lent = {}, [], False
        self.queue, self.beside = QUEUES[config.scheduling_policy](), QUEUES[config.scheduling_policy]()
        self.holders_wait_apart = remote_rules_for(config.version).holders_wait_apart
        self.remote = None
        if connector is not None:
            self.remote = RemoteKV(connector, self.kv, config)
            self.kv.keyed = True
            if self.kv.hash_lookahead:  # not with connectors (num_hash_lookahead_tokens)
                self.kv.hash_plainly()
            connector.bind(self)

    # ---- what can be read -------------------------------------------------------------------------

    @property
    def has_requests(self) -> bool:
        """Whether the engine loop goes on: one more (empty) step follows the last finish."""
        return self.goes_on()

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
        return [sequence.request_id for sequence in self.beside.ordered() + self.queue.ordered()]

    @property
    def free_blocks(self) -> int:
        return self.kv.pool.free_blocks

    def free_list(self, limit: int) -> list[int]:
        """The next ``limit`` blocks to be taken."""
        return self.kv.pool.free_list(limit)

    @property
    def cached_blocks(self) -> int:
        """Distinct block contents that a look-up could find now."""
        return self.kv.pool.cached_keys

    def block_ids(self, request_id: int) -> list[int]:
        return self.kv.block_ids(self.sequences[request_id])

    @property
    def kept_blocks(self) -> list[int]:
        """Blocks of requests that have ended: kept for a connector, or until no step in flight may write
        them."""
        if self.remote is None:
            return []
        sequence: Sequence
        kept: list = []
        for sequence in self.sequences.values():
            if sequence.status == FINISHED:
                kept.append(self.kv.block_ids(sequence))
        for entry in self.remote.deferred:
            kept.append(self.kv.block_ids(entry[1]))
        if self.config.kv_groups:
            kept = [blocks for groups in kept for blocks in groups]
        return [block for blocks in kept for block in blocks if block]

    @property
    def adapters(self) -> frozenset[int]:
        """LoRA adapters of its requests, waiting or running."""
        sequence: Sequence
        found: set = set()
        for sequence in self.sequences.values():
            if sequence.adapter:
                found.add(sequence.adapter)
        return frozenset(found)

    @property
    def connector(self) -> Any:
        return None if self.remote is None else self.remote.connector

    @property
    def external_queries(self) -> int:
        """Tokens that a connector was asked for (vLLM's external_prefix_cache_queries)."""
        return 0 if self.remote is None else self.remote.queries

    @property
    def external_hits(self) -> int:
        return 0 if self.remote is None else self.remote.hits

    def goes_on(self) -> cython.bint:
        """``has_requests``."""
        kept: cython.Py_ssize_t = 0
        if self.remote is not None and not self.remote.steps_while_sending:
            kept = self.remote.held
        if len(self.sequences) > kept or self.finished_unsent:
            return True
        return self.remote is not None and self.remote.pending_work is not None and self.remote.pending_work()

    def block_keys(self, sequence: Sequence, count: int) -> list[int]:
        """What the first ``count`` blocks of its tokens hold, or will hold: equal where contents are."""
        return [self.kv.block_key(sequence, index) for index in range(count)]

    def watch_allocations(self) -> None:
        """``take_allocations`` is going to be asked."""
        self.kv.pool.taken = []

    def take_allocations(self) -> list[int]:
        """Blocks that were given to somebody since the last call."""
        taken: list = self.kv.pool.taken
        self.kv.pool.taken = []
        return taken

    # ---- requests come and go ---------------------------------------------------------------------

    def add(self, request: Any, arrival: cython.longlong) -> Sequence:
        """Queue a request. ``arrival`` rises from call to call; ties of priority go by it.

        Raises:
            InputError: the request could never run alone: longer than ``max_model_len`` or than the pool.
        """
        sequence: Sequence = self.enter(
            request.request_id,
            request.prompt_tokens,
            request.output_tokens,
            request.max_tokens,
            request.content,
            request.priority,
            arrival,
        )
        sequence.adapter = request.adapter
        if request.grammar:
            self.wait_for_grammar(sequence, 1 << 62)
        if request.media:
            self.carry(sequence, request.media)
        return sequence

    def carry(self, sequence: Sequence, media: tuple) -> cython.int:
        """A request that was queued carries images or the like.

        Raises:
            InputError: there is no encoder, or an item never fits.
        """
        if self.encoder is None:
            raise InputError(
                "it carries images or the like, and the engine has no encoder",
                where=f"request {sequence.request_id}",
                fix="Set encoder_cache_size and max_num_encoder_input_tokens.",
            )
        return self.encoder.admit(sequence, media)

    def grammar_ready(self, request_id: Any) -> Any:
        """The grammar of a request is compiled; an unknown or finished one is ignored."""
        found: Any = self.sequences.get(request_id)
        if found is not None:
            sequence: Sequence = found
            sequence.ready = 0
        return None

    def wait_for_grammar(self, sequence: Sequence, ready: cython.longlong) -> cython.int:
        """It is not scheduled before ``clock`` reaches ``ready``: its grammar is compiled
        (WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR)."""
        sequence.ready, sequence.constrained = ready, True
        sequence.passed = True
        self.num_passed += 1
        if not self.holders_wait_apart:  # _enqueue_waiting_request
            self.queue.remove(sequence)
            self.beside.push(sequence)
            sequence.aside = True
        self.holds_back = self.notes = self.singly = True
        return 0

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
        sequence.decodes_until = min(sequence.limit, self.max_model_len) - 1
        sequence.final_tokens = min(prompt + output, sequence.limit, self.max_model_len)
        sequence.arrival, sequence.serial = arrival, self.added
        self.added += 1
        if prompt >= self.max_model_len:
            raise InputError(
                f"its prompt of {prompt} tokens leaves no room for an output",
                where=f"request {request_id}",
                fix=f"Shorten it below max_model_len={self.max_model_len}, or raise max_model_len.",
            )
        need = self.kv.most_blocks(
            sequence.final_tokens - 1 + self.kv.lookahead
        )  # the last is never computed
        if need > self.kv.pool.num_blocks - 1:
            raise InputError(
                f"its {sequence.final_tokens} tokens need {need} KV blocks of {self.kv.block_size}",
                where=f"request {request_id}",
                fix=f"The pool has {self.kv.pool.num_blocks - 1}: enlarge it or shorten the request.",
            )
        sequence.shared_keys = self.kv.shared_keys(content)
        self.sequences[sequence.request_id] = sequence
        self.queue.push(sequence)
        self.num_waiting += 1
        if self.remote is not None:
            self.remote.connector.on_new_request(sequence)
        return sequence

    def abort(self, request_id: Any) -> Any:
        """Drop a request wherever it stands; an unknown or finished one is ignored."""
        found: Any = self.sequences.get(request_id)
        if found is None:
            return None
        sequence: Sequence = found
        if sequence.status != FINISHED:
            self.drop(sequence, "aborted")
        return None

    def drop(self, sequence: Sequence, ending: Any) -> cython.int:
        """It ends before its last token, wherever it stands (Scheduler.finish_requests)."""
        if sequence.status == RUNNING:
            self.own_runners().remove(sequence)
        else:
            self.unqueue(sequence)
        return self.end(sequence, ending)

    def unqueue(self, sequence: Sequence) -> cython.int:
        """It waits no more."""
        (self.beside if sequence.aside else self.queue).remove(sequence)
        self.num_waiting -= 1
        self.num_passed -= sequence.passed
        sequence.aside = sequence.passed = False
        return 0

    def own_runners(self) -> list:
        """The running, to be changed: a step that all of them sample in may hold the list, too."""
        if self.lent:
            self.runners, self.lent = self.runners[:], False
        return self.runners

    def end(self, sequence: Sequence, ending: Any) -> cython.int:
        """A request has ended: its blocks go, unless a connector keeps them (Scheduler._free_request)."""
        self.finished_unsent = True
        if sequence.media is not None:
            self.encoder.free(sequence)
        if self.remote is not None and self.remote.keeps(sequence, ending):
            return 0
        sequence.status = FINISHED
        return self.forget(sequence)

    def forget(self, sequence: Sequence) -> cython.int:
        """Its blocks go, and with them all that is known of it (Scheduler._free_blocks)."""
        del self.sequences[sequence.request_id]
        if sequence.slot >= 0:
            if self.remote is None:
                self.kv.free(sequence)
            else:
                self.remote.free(sequence, self.tick)
        return 0

    # ---- a step is decided ------------------------------------------------------------------------

    def schedule(self) -> Step:
        """Decide the next step; computed tokens advance at once, sampled ones arrive by ``complete``."""
        step: Step = Step(self.tick)
        threshold: cython.int = self.chunk_limit()
        budget: cython.int
        defer: cython.bint = False
        self.finished_unsent = False
        self.kv.new_step_starts()
        if self.encoder is not None:
            self.encoder.budget = self.encoder.budget_of_step
        if self.trace:
            step.composition = []
        if self.cadence is not None:
            defer = self.cadence.begin() and self.somebody_decodes()
        budget = self.schedule_running(step, threshold, defer)
        if self.num_waiting and not step.victims:
            self.schedule_waiting(step, budget, threshold, defer)
        if self.speculates:
            self.note_drafters(step)
        if self.remote is not None:
            if step.total_tokens:
                self.remote.last_step = self.tick
                if self.remote.cut_now:
                    self.remote.cut_now.difference_update(step.prefilling)
            step.connector_meta = self.remote.connector.build_connector_meta(step)
        self.tick += 1
        if self.cadence is not None:
            admitting = not step.victims and not defer
            waiting = self.num_waiting - self.num_passed
            self.cadence.end(tokens=step.total_tokens, admitting=admitting, waiting=waiting)
        return step

    def somebody_decodes(self) -> cython.bint:
        """Whether a running request has left its prefill (Scheduler.schedule: "not r.is_prefill_chunk")."""
        sequence: Sequence
        decoding: cython.int = 0
        for sequence in self.runners:
            decoding += not self.in_prefill(sequence)
        return decoding > 0

    def in_prefill(self, sequence: Sequence) -> cython.bint:
        """Whether a running request counts as in its prefill (request.is_prefill_chunk): one that lost
        computed tokens to a failed load does not, until it is scheduled again."""
        if sequence.computed >= sequence.catch_up:
            return False
        return self.remote is None or sequence not in self.remote.cut_now

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

    def schedule_running(self, step: Step, threshold: cython.int, defer: cython.bint) -> cython.int:
        """Phase 1: running requests catch up, in order of admission, but for those that prefill where their
        work is to ``defer``; where blocks run out, others are preempted. Returns the budget left."""
        # Scheduler.schedule, "First, schedule the RUNNING requests": index is its req_index
        runners: list = self.runners
        sequence: Sequence
        victim: Sequence
        budget: cython.int = self.budget
        index: cython.Py_ssize_t = 0
        position: cython.Py_ssize_t
        tokens: cython.int
        given_back: cython.int
        computed: cython.int
        decodes: cython.int = 0
        context: cython.longlong = 0
        all_sample: cython.bint = not self.singly
        spared: cython.bint = False
        while index < len(runners) and budget > 0:
            sequence = cython.cast(Sequence, runners[index])
            computed = sequence.computed
            if (
                sequence.catch_up <= computed < sequence.decodes_until
                and sequence.num_tokens + sequence.placeholders == computed + 1
                and not self.singly
                and (computed + 1 < sequence.kv_due or self.kv.allocate_slots(sequence, 1, 0, 0))
            ):  # it decodes: what all that follows comes to then
                sequence.computed = computed + 1
                sequence.placeholders += self.is_async
                if self.marks:
                    self.note_scheduled(step, sequence, 1)
                if not all_sample:
                    step.samplers.append(sequence)
                context += computed + 1
                if self.window:
                    step.windowed += self.in_window(computed + 1)
                decodes += 1
                budget -= 1
                index += 1
                continue
            if all_sample:
                step.samplers, all_sample = runners[:index], False
            if sequence.placeholders > 0 and sequence.computed + 2 - sequence.placeholders >= sequence.limit:
                index += 1  # its last token is being computed
                continue
            if self.staggers and self.tick < sequence.eligible:
                index += 1  # the first stage gets its token later
                continue
            # num_tokens_with_spec + num_output_placeholders - num_computed_tokens
            tokens = sequence.num_tokens + sequence.drafts + sequence.placeholders - sequence.computed
            if 0 < threshold < tokens:
                tokens = threshold
            if tokens > budget:
                tokens = budget
            if tokens > self.max_model_len - sequence.computed - 1:
                tokens = self.max_model_len - sequence.computed - 1
            if self.kv.aligned:
                tokens = self.kv.align_chunk(sequence, sequence.computed, tokens)
            if sequence.media is not None and not (defer and self.in_prefill(sequence)):
                tokens = self.encoder.fit(sequence, sequence.computed, tokens)
            if self.prompt_lookahead:
                tokens = self.spare_lookahead(sequence, sequence.computed, tokens)
            # below 0 behind drafts that reach max_model_len; vLLM before 0.28 ends there
            if tokens <= 0 or (defer and self.in_prefill(sequence)):
                index += 1
                continue
            if sequence.computed + tokens >= sequence.kv_due:
                while not self.kv.allocate_slots(sequence, tokens, 0, 0):
                    position = self.pick_victim()
                    victim = runners[position]
                    if self.remote is not None and not self.remote.may_preempt(victim, self.tick):
                        spared = True
                        break
                    given_back = 0
                    if self.priority and victim.scheduled_tick == self.tick:
                        given_back = self.withdraw(step, victim)
                        budget += given_back
                    # before 0.28: "if preempted_req in scheduled_running_reqs": it gave tokens back
                    if position < index if self.cursor_follows_victim else given_back > 0:
                        index -= 1
                    self.preempt(step, victim, position)
                    runners = self.runners
                    if victim is sequence:
                        break
                if spared:
                    break
                if sequence.status != RUNNING:
                    if self.loop_goes_on_after_own_preemption:  # under FCFS it was the last anyway
                        continue  # its place in the list is the next one's now
                    break
            if self.cadence is not None and self.in_prefill(sequence):
                self.cadence.carries_prefill = True
            if sequence.media is not None:
                self.encoder.accept(sequence, step)
            self.advance(step, sequence, tokens, False)
            budget -= tokens + self.draft_slots
            index += 1
        if all_sample and index:
            step.samplers, step.borrowed = runners if index == len(runners) else runners[:index], True
            self.lent = True
        step.total_tokens += decodes
        step.decodes += decodes
        step.decode_context += context
        return budget

    def spare_lookahead(self, sequence: Sequence, computed: cython.int, tokens: cython.int) -> cython.int:
        """Tokens of a chunk that leaves MTP modules what they read behind it (_reserve_prefill_lookahead)."""
        left: cython.int = sequence.num_tokens - computed - tokens
        if 0 < left < self.prompt_lookahead:
            tokens -= self.prompt_lookahead - left
        return max(tokens, 0)

    def pick_victim(self) -> cython.Py_ssize_t:
        """Position among the running of the one that is preempted next."""
        # Scheduler.schedule: max(self.running, key=lambda r: (r.priority, r.arrival_time)), or running.pop()
        best: cython.Py_ssize_t = len(self.runners) - 1
        if self.priority:
            keys: list = [sequence.sort_key[:2] for sequence in self.runners]
            best = keys.index(max(keys))
        return best

    def withdraw(self, step: Step, victim: Sequence) -> cython.int:
        """Take a victim out of the step in which it was scheduled already. Returns its tokens."""
        tokens: cython.int = victim.scheduled_tokens
        before: cython.int = victim.computed - tokens
        drafts: cython.int = 0
        position: cython.Py_ssize_t
        victim.eligible = 0
        if victim.adapter and self.max_loras:
            step.adapters[victim.adapter] -= tokens
            if not step.adapters[victim.adapter]:
                del step.adapters[victim.adapter]
        if victim.media is not None:
            self.encoder.withdraw(victim, step)
        step.total_tokens -= tokens
        if before >= victim.catch_up:
            step.decodes -= 1
            step.decode_context -= victim.computed
            step.windowed -= self.in_window(victim.computed)
        else:
            position = step.prefilling.index(victim)
            del step.chunks[position], step.prefilling[position]
        if victim in step.samplers:
            position = step.samplers.index(victim)
            del step.samplers[position]
            if self.speculates:
                drafts = step.verified.pop(position)
                step.drafts -= drafts
            if self.is_async:
                victim.placeholders -= 1 + drafts
        if step.composition is not None:
            step.composition.remove((victim, tokens))
        return tokens + self.draft_slots

    def preempt(self, step: Step, sequence: Sequence, position: cython.Py_ssize_t) -> cython.int:
        """Recompute later: give everything back and wait at the front (Scheduler._preempt_request). Tokens
        in flight are still delivered."""
        self.kv.publish(sequence)
        if self.remote is None:
            self.kv.free(sequence)
        else:
            self.remote.free(sequence, self.tick)
            self.remote.prefills.pop(sequence, None)
            self.remote.cut_now.discard(sequence)
            if self.remote.drops:
                sequence.drops_before = self.tick
            if self.remote.forgets:
                sequence.placeholders = 0
        if sequence.media is not None:
            self.encoder.free(sequence)
        if self.stales:
            sequence.placeholders, sequence.stale_tick = 0, sequence.scheduled_tick
            if sequence.stale_tick == self.tick:  # withdrawn
                sequence.stale_tick = sequence.previous_tick
        del self.own_runners()[position]
        sequence.computed = 0
        if self.speculates:  # drafts of a step in flight that are rejected count no more
            sequence.placeholders = 0
        sequence.status = PREEMPTED
        sequence.preemptions += 1
        self.queue.push_preempted(sequence)
        self.num_waiting += 1
        step.victims = own(step.victims)
        step.victims.append(sequence)
        return 0

    def schedule_waiting(
        self, step: Step, budget: cython.int, threshold: cython.int, defer: cython.bint
    ) -> cython.int:
        """Phase 2: the head of the queue, while it fits and has no prompt work to ``defer``; the first one
        that does not blocks the rest. Who cannot go for another reason is passed over."""
        sequence: Sequence
        remote: RemoteKV = self.remote
        queue: Any
        adapters: Any = self.adapters_in(step) if self.max_loras else None
        passed: list = NOBODY
        cached: cython.int
        computed: cython.int
        external: cython.int
        tokens: cython.int
        reserve: cython.int
        padding: cython.int = 0
        together: cython.bint = step.total_tokens > 0
        prefills: cython.bint = self.counts_prefills(step)
        loads: cython.bint
        asked: cython.bint
        carries_prefill: cython.bint
        while self.num_waiting > len(passed) and budget > 0 and len(self.runners) < self.max_running:
            queue = self.queue if remote is None and not self.holds_back else self.next_queue()
            sequence = queue.head()
            if sequence.status == LOADING and not remote.arrived(sequence):
                passed = own(passed)
                passed.append(queue.pop())
                continue
            if self.holds_back and self.held_back(sequence, adapters):
                passed = own(passed)
                passed.append(queue.pop())
                continue
            cached = external = 0
            loads, asked = False, sequence.computed == 0
            if asked:
                cached = self.kv.get_computed_blocks(sequence)
                if not self.count_admitted_lookups:
                    self.count_lookup(sequence, cached)
                if remote is not None:
                    found: Any = remote.match(sequence, cached)
                    if found is None:
                        passed = own(passed)
                        passed.append(queue.pop())
                        continue
                    external, loads = found
            computed = sequence.computed + cached + external
            tokens = sequence.num_tokens - computed
            carries_prefill = tokens > 1
            if loads:
                tokens = 0
            else:
                if defer and carries_prefill:
                    break
                if self.speculates and tokens == 1:
                    padding = self.drafts.padding(computed, budget, together, prefills)
                    if padding < 0:
                        break
                    tokens += padding
                if 0 < threshold < tokens:
                    tokens = threshold
                if tokens > budget:
                    if not self.chunked_prefill:
                        break
                    tokens = budget
                if self.kv.aligned:
                    tokens = self.kv.align_chunk(sequence, cached, tokens)
                    if tokens == 0:
                        break
                    if padding and tokens <= padding:  # padding is whole, or there is none
                        tokens, padding = 1, 0
                if sequence.media is not None:
                    tokens = self.encoder.fit(sequence, computed, tokens)
                    if tokens == 0:
                        if not self.encoder.passes_over:
                            break
                        passed = own(passed)
                        passed.append(queue.pop())
                        continue
                if self.prompt_lookahead:
                    tokens = self.spare_lookahead(sequence, computed, tokens)
                    if tokens == 0:
                        break
            reserve = self.watermark if self.runners else 0
            if remote is None:
                if not self.kv.allocate_slots(sequence, tokens, cached, reserve):
                    if sequence.media is not None:
                        self.encoder.free(sequence)
                    break
            else:
                others: cython.int = remote.reserved_blocks() if loads else 0
                if not self.kv.allocate_remote(sequence, tokens, external, cached, reserve, others):
                    break
                remote.allocated(sequence, asked, cached, external)
            queue.pop()
            if asked and self.count_admitted_lookups:
                self.count_lookup(sequence, cached)
            if asked and sequence.preemptions == 0:
                sequence.cached_tokens = computed
            if loads:
                sequence.computed, sequence.status = computed, LOADING
                remote.prefills[sequence] = None
                passed = own(passed)
                passed.append(sequence)
                continue
            self.num_waiting -= 1
            self.num_passed -= sequence.passed
            sequence.aside = sequence.passed = False
            if self.cadence is not None and carries_prefill:
                self.cadence.carries_prefill = True
            step.joined, step.joined_cached = own(step.joined), own(step.joined_cached)
            step.joined_again = own(step.joined_again)
            step.joined.append(sequence)
            step.joined_cached.append(computed)
            step.joined_again.append(sequence.status == PREEMPTED)
            sequence.status = RUNNING
            sequence.computed = computed
            sequence.catch_up = sequence.num_tokens
            if remote is not None and computed + tokens < sequence.num_tokens:
                remote.prefills[sequence] = None
            self.own_runners().append(sequence)
            if sequence.adapter and self.max_loras:
                adapters[sequence.adapter] = None
            if sequence.media is not None:
                self.encoder.accept(sequence, step)
            self.advance(step, sequence, tokens, padding > 0)
            budget -= tokens + self.draft_slots
            padding = 0
        if len(passed):
            self.put_back(passed)
        return 0

    def counts_prefills(self, step: Step) -> cython.bint:
        """Whether a running request of the step was in its prefill before (request.is_prefill_chunk)."""
        if self.remote is None or not self.remote.cut_now:
            return len(step.chunks) > 0
        return not self.remote.cut_now.issuperset(step.prefilling)

    def held_back(self, sequence: Sequence, adapters: Any) -> cython.bint:
        """Whether it cannot go in this step for another reason than room: its grammar is not there, output of
        it is in flight, or its adapter would be one too many."""
        if sequence.ready > self.clock or sequence.stale_tick > self.kv.processed:
            return True
        if not self.max_loras or not sequence.adapter or sequence.adapter in adapters:
            return False
        return len(adapters) == self.max_loras

    def adapters_in(self, step: Step) -> Any:
        """LoRA adapters of the running requests that are in the step, or of all (Scheduler.schedule:
        scheduled_loras).

        Raises:
            InputError: more than there are slots, which ends vLLM's engine.
        """
        sequence: Sequence
        adapters: Any = {} if step.adapters is None else dict(step.adapters)
        if self.counts_running_loras:
            for sequence in self.runners:
                if sequence.adapter:
                    adapters[sequence.adapter] = None
        if len(adapters) > self.max_loras:
            raise InputError(
                f"a step has requests of {len(adapters)} LoRA adapters, for which vLLM's engine ends",
                where="engine.max_loras",
                fix="Raise it, or use version 0.33.",
            )
        return adapters

    def next_queue(self) -> Any:
        """The queue whose head comes next (kv_holding_waiting, or _select_waiting_queue_for_scheduling)."""
        if not len(self.beside):
            return self.queue
        if self.holders_wait_apart or not self.priority or not len(self.queue):
            return self.beside
        return self.queue if self.queue.head().sort_key < self.beside.head().sort_key else self.beside

    def put_back(self, passed: list) -> cython.int:
        """Those that were passed over are the next ones to be looked at, in their order."""
        sequence: Sequence
        for sequence in reversed(passed):
            sequence.aside = (
                not self.holders_wait_apart or sequence.computed > 0 or sequence.status == LOADING
            )
            self.num_passed += not sequence.passed
            sequence.passed = True
            (self.beside if sequence.aside else self.queue).push_preempted(sequence)
        return 0

    def count_lookup(self, sequence: Sequence, hit_tokens: cython.int) -> cython.int:
        """vLLM keeps the look-ups of preempted requests out of its counters (PrefixCacheStats.record)."""
        if self.prefix_caching and not sequence.preemptions:
            self.prefix_queries += sequence.num_tokens
            self.prefix_hits += hit_tokens
        return 0

    def advance(self, step: Step, sequence: Sequence, tokens: cython.int, padded: cython.bint) -> None:
        """Scheduled tokens count as computed; note whether it samples (Scheduler._update_after_schedule).
        ``padded``: all but the first are drafts that stand for none."""
        drafts: cython.int = 0
        step.total_tokens += tokens
        if sequence.computed >= sequence.catch_up or padded:
            step.decodes += 1
            step.decode_context += sequence.computed + tokens
            if self.window:
                step.windowed += self.in_window(sequence.computed + tokens)
        else:
            self.note_chunk(step, sequence, tokens)
        if self.notes or self.marks:
            self.note_scheduled(step, sequence, tokens)
        sequence.computed += tokens
        sequence.drafts = 0
        if sequence.computed >= sequence.num_tokens + sequence.placeholders:
            if step.borrowed:
                step.samplers, step.borrowed = step.samplers[:], False
            step.samplers = own(step.samplers)
            step.samplers.append(sequence)
            if self.speculates:  # num_scheduled_spec_tokens
                drafts = sequence.computed - sequence.num_tokens - sequence.placeholders
                step.drafts += drafts
                step.verified = own(step.verified)
                step.verified.append(-drafts if padded else drafts)
            if self.is_async:
                if sequence.constrained and sequence.placeholders > 0:
                    step.deferred = True
                sequence.placeholders += 1 + drafts
            if self.staggers:
                sequence.eligible = self.tick + self.stride
            if self.remote is not None and not self.speculates:
                self.remote.prefills.pop(sequence, None)

    def note_drafters(self, step: Step) -> cython.int:
        """Who proposes how many drafts after a step; async, placeholders stand for them at once
        (AsyncScheduler._update_after_schedule)."""
        sequence: Sequence
        step.drafters = len(step.samplers)
        step.draft_length = self.drafts.length(step.decodes + len(step.chunks))
        if self.is_async:
            for sequence in step.samplers:
                sequence.drafts = step.draft_length
        if (
            self.remote is not None
        ):  # who ends a prefill counts for this step's loads: its drafts have no room
            for sequence in step.samplers:
                self.remote.prefills.pop(sequence, None)
        return 0

    def in_window(self, tokens: cython.longlong) -> cython.longlong:
        """Of a sequence's tokens those that its newest attends to in a layer with a window."""
        if self.chunked:
            return (tokens - 1) % self.window + 1
        return min(tokens, self.window)

    def note_chunk(self, step: Step, sequence: Sequence, tokens: cython.int) -> None:
        step.chunks = own(step.chunks)
        step.chunks.append((tokens, sequence.computed))
        if self.names_chunks:
            step.prefilling = own(step.prefilling)
            step.prefilling.append(sequence)

    def note_scheduled(self, step: Step, sequence: Sequence, tokens: cython.int) -> None:
        if self.remote is not None or self.pipelined:
            sequence.previous_tick, sequence.previous_tokens = (
                sequence.scheduled_tick,
                sequence.scheduled_tokens,
            )
        sequence.scheduled_tick, sequence.scheduled_tokens = self.tick, tokens
        if sequence.adapter and self.max_loras:
            if step.adapters is None:
                step.adapters = {}
            step.adapters[sequence.adapter] = step.adapters.get(sequence.adapter, 0) + tokens
        if sequence.media is not None and (sequence.held or sequence.computed < sequence.media_end):
            step.looking = own(step.looking)
            step.looking.append(sequence)
        if self.trace:
            step.composition.append((sequence, tokens))

    # ---- a step is done ---------------------------------------------------------------------------

    def complete(self, step: Step) -> Any:
        """Deliver the tokens of a step, in its order; who has its last one leaves with its blocks
        (Scheduler.update_from_output)."""
        sequence: Sequence
        left: cython.bint = False
        tick: cython.longlong = step.tick
        before: cython.longlong = tick - self.stride if tick >= self.stride else -2  # -1 is nobody's
        emitted: cython.int = 0
        steady: cython.int = 0
        i: cython.Py_ssize_t
        tokens: cython.int
        samplers: list = step.samplers
        self.kv.processed = tick
        if step.looking:
            self.encoder.step_done(step)
        if self.remote is not None:
            samplers = self.count_reports(step)
            self.least = NOBODYS if self.remote.skewed else self.is_async
        if self.speculates:
            self.complete_drafts(step, samplers)
            return self.follow_reports(step)
        for i in range(len(samplers)):
            sequence = cython.cast(Sequence, samplers[i])
            if (
                sequence.token_tick == before
                and sequence.num_tokens + 1 < sequence.final_tokens
                and sequence.status == RUNNING
                and sequence.placeholders >= self.least
                and sequence.computed - sequence.placeholders + 1 < sequence.kv_due
            ):  # one more token, as in the step before
                sequence.num_tokens += 1
                sequence.placeholders -= self.is_async
                sequence.token_tick = tick
                steady += 1
                continue
            if sequence.status == FINISHED:
                continue  # while the step was in flight
            if tick < sequence.drops_before:
                continue  # it was preempted, and computes it again
            sequence.num_tokens += 1
            if sequence.token_tick == before:
                steady += 1
            elif sequence.token_tick < 0:
                step.firsts = own(step.firsts)
                step.firsts.append(sequence)
                emitted += 1
            else:
                emitted += 1
                step.gaps = own(step.gaps)
                step.gaps.append(sequence.token_tick)
            sequence.token_tick = tick
            if self.is_async:
                if sequence.placeholders > 0:
                    sequence.placeholders -= 1
                tokens = sequence.computed - sequence.placeholders
                if self.least == NOBODYS:
                    tokens = self.remote.processed_tokens(sequence, tick)
                if tokens >= sequence.kv_due and sequence.status == RUNNING:
                    self.kv.cache_blocks(sequence, tokens)
            if sequence.num_tokens >= sequence.final_tokens:
                if sequence.status == RUNNING:
                    left = True
                else:  # preempted while its last token was in flight
                    self.unqueue(sequence)
                self.end(sequence, "finished")
                step.leavers = own(step.leavers)
                step.leavers.append(sequence)
        step.emitted = step.outputs = emitted + steady
        step.steady = steady
        if left:
            self.drop_finished()
        if self.remote is not None:
            self.follow_reports(step)
        return None

    def drop_finished(self) -> cython.int:
        """Those that have finished no longer run."""
        still: list = []
        sequence: Sequence
        i: cython.Py_ssize_t
        for i in range(len(self.runners)):
            sequence = cython.cast(Sequence, self.runners[i])
            if sequence.status != FINISHED:
                still.append(sequence)
        self.runners, self.lent = still, False
        return 0

    def complete_drafts(self, step: Step, delivering: list) -> cython.int:
        """``complete`` where tokens are drafted: each sampler delivers one token and the drafts that were
        accepted, up to its end; what was rejected counts no more as computed. ``delivering``: samplers
        whose output no failed load has made void."""
        drafts: Drafts = self.drafts
        sequence: Sequence
        left: cython.bint = False
        tick: cython.longlong = step.tick
        before: cython.longlong = tick - 1 if tick else -2  # -1 is nobody's
        i: cython.Py_ssize_t
        verified: cython.int
        accepted: cython.int
        rejected: cython.int
        tokens: cython.int
        cached: cython.int
        due: cython.int
        for i in range(len(step.samplers)):
            sequence = cython.cast(Sequence, step.samplers[i])
            if sequence.status == FINISHED:
                continue  # it ended while the step ran
            if tick < sequence.drops_before or (
                delivering is not step.samplers and sequence not in delivering
            ):
                sequence.samplings += 1
                if sequence.status == RUNNING and not self.is_async:
                    sequence.drafts = drafts.propose(sequence, step.draft_length)
                continue  # its output is void
            verified = step.verified[i]
            accepted = drafts.accept(sequence, verified)
            rejected = abs(verified) - accepted
            tokens = min(1 + accepted, sequence.final_tokens - sequence.num_tokens)
            sequence.num_tokens += tokens
            step.emitted += tokens
            step.outputs += 1
            if sequence.token_tick == before:
                step.steady += 1
            elif sequence.token_tick < 0:
                step.firsts = own(step.firsts)
                step.firsts.append(sequence)
            else:
                step.gaps = own(step.gaps)
                step.gaps.append(sequence.token_tick)
            sequence.token_tick = tick
            if sequence.status == RUNNING:  # else it was preempted, and all of that is reset
                sequence.computed -= rejected
                if self.is_async:
                    sequence.placeholders -= rejected + tokens
                else:
                    sequence.drafts = drafts.propose(sequence, step.draft_length)
                due = sequence.kv_due - (self.least == NOBODYS)  # then the newest token may count, too
                if (self.is_async or drafts.hashes_at_update) and sequence.num_tokens > due:
                    cached = min(sequence.num_tokens - 1, sequence.computed - sequence.placeholders)
                    if self.least == NOBODYS:  # without what its end has cut
                        cached = self.remote.processed_tokens(sequence, tick) + tokens - 1 - accepted
                    self.kv.cache_blocks(sequence, cached)
            if sequence.num_tokens >= sequence.final_tokens:
                if sequence.status == RUNNING:
                    left = True
                    if drafts.uncounts_cut:
                        sequence.computed -= 1 + accepted - tokens
                else:
                    self.unqueue(sequence)
                self.end(sequence, "finished")
                step.leavers = own(step.leavers)
                step.leavers.append(sequence)
        if left:
            self.drop_finished()
        return 0

    def count_reports(self, step: Step) -> list:
        """A step is over, and its report says which loads have failed: whose tokens it has brought. Those
        that end by it stand in ``step.failed``."""
        void: list
        if step.total_tokens:
            self.remote.step_over(step.tick)
        if step.transfers is None:
            return step.samplers
        void = self.remote.fail(step.transfers, self.beside.ordered(), self.runners, step.tick)
        if not void:
            return step.samplers
        if not self.remote.recomputes:
            step.failed = sorted(void, key=request_number)
        return [sequence for sequence in step.samplers if sequence not in void]

    def follow_reports(self, step: Step) -> Any:
        """Who has failed ends; what was received may go on, and what was sent is given back."""
        sequence: Sequence
        for sequence in step.failed:
            if sequence.status != FINISHED:
                self.drop(sequence, "error")
        if step.transfers is not None:
            for sequence in self.remote.told(step.transfers, self.sequences):
                self.forget(sequence)
        return None


def request_number(sequence: Sequence) -> int:
    return sequence.request_id
