"""What the scheduler knows of requests whose KV cache comes from a connector, or is kept for one."""

from __future__ import annotations

from typing import Any

import cython

from servecast.sim.engine.kv_cache import KVCache
from servecast.sim.engine.remote_rules import refuse_groups, remote_rules_for
from servecast.sim.engine.sequence import Sequence
from servecast.sim.inputs.errors import InputError

if not cython.compiled:
    from servecast.sim.engine.sequence import FINISHED, LOADING, PREEMPTED, WAITING


class RemoteKV:
    """Loads under way, blocks that are kept or freed later, and failures (vLLM's Scheduler, where it has a
    connector).

    Args:
        connector: see ``servecast.sim.engine.connector``. kv: of the scheduler. config: its flags.

    Attributes:
        queries, hits: tokens asked of the connector, and those it had (external_prefix_cache_queries, _hits).
        prefills: who still prefills or loads, for what they still need. received, failed: whose load is over,
            and went wrong. cut_now: running ones that lost computed tokens and were not scheduled since.
        held: requests that have ended and keep their blocks, how many.
        deferred: (tick, holder of blocks) to be freed when the step of that tick is over.
        skewed: somebody's output in flight is counted too high, for a step whose output was void, and what is
        processed counts instead. processed, last_step: ticks of the newest step with tokens that is complete,
        and that was decided.
    """

    def __init__(self, connector: Any, kv: KVCache, config: Any) -> None:
        refuse_groups(config)
        self.lists = len(config.kv_groups)
        rules: Any = remote_rules_for(config.version)
        self.connector, self.kv = connector, kv
        self.recomputes = connector.load_failure_policy == "recompute"
        self.defers = rules.defers_frees and config.async_scheduling and connector.role != "kv_producer"
        self.spares = rules.spares_deferred
        self.drops = rules.drops_undelivered and connector.requires_kv_delivery
        self.reserves, self.steps_while_sending = rules.reserves_for_prefills, rules.steps_while_sending
        self.forgets, self.caches_processed = rules.forgets_in_flight, rules.caches_processed
        self.skewed = False
        self.draft_tokens = 0
        drafts: Any = config.speculation
        if drafts is not None and rules.reserves_for_drafts:
            self.draft_tokens = 1 + drafts.num_tokens + drafts.lookahead
        pending: Any = getattr(connector, "has_pending_push_work", None)
        self.pending_work = pending if rules.goes_on_for_transfers else None
        self.prefills, self.received, self.failed, self.cut_now = {}, set(), set(), set()
        self.deferred = []
        self.processed = self.last_step = -1
        self.held = self.queries = self.hits = 0

    # ---- admission

    def match(self, sequence: Sequence, cached: cython.int) -> Any:
        """What the connector has beyond ``cached`` tokens, and whether it loads them aside; None: later."""
        return self.connector.get_num_new_matched_tokens(sequence, cached)

    def allocated(
        self, sequence: Sequence, asked: cython.bint, cached: cython.int, external: cython.int
    ) -> None:
        """It has its blocks; ``asked``: the connector was, behind ``cached`` tokens."""
        self.connector.update_state_after_alloc(sequence, external)
        if asked and not sequence.preemptions:
            self.queries += sequence.num_tokens - cached
            self.hits += external

    def reserved_blocks(self) -> cython.int:
        """Blocks that those who prefill or load still need (_inflight_prefill_reserved_blocks)."""
        sequence: Sequence
        blocks: cython.int = self.kv.blocks_of(self.draft_tokens)
        if self.reserves:
            for sequence in self.prefills:
                blocks += max(0, self.kv.missing_blocks(sequence, self.draft_tokens))
        return blocks

    def arrived(self, sequence: Sequence) -> cython.bint:
        """Whether a request that loads may go on: its blocks can be found from now on, and its last token is
        computed here (_update_waiting_for_remote_kv)."""
        if sequence not in self.received:
            return False
        self.received.remove(sequence)
        if sequence in self.failed and not sequence.computed:
            self.kv.free(sequence)  # it asks again for all
        else:
            self.kv.cache_blocks(sequence, sequence.computed)
        self.failed.discard(sequence)
        if sequence.computed == sequence.num_tokens:
            sequence.computed -= 1
        sequence.status = PREEMPTED if sequence.preemptions else WAITING
        return True

    # ---- blocks that go later

    def may_free(self, sequence: Sequence, tick: cython.longlong) -> cython.bint:
        """Whether no step in flight, before ``tick``, may write its blocks (_request_blocks_can_be_freed)."""
        last: cython.longlong = sequence.scheduled_tick
        if last == tick:
            last = sequence.previous_tick
        return not self.defers or last <= self.processed

    def may_preempt(self, sequence: Sequence, tick: cython.longlong) -> cython.bint:
        """Whether that would give blocks to somebody now (Scheduler.schedule, before it preempts)."""
        return not self.spares or self.may_free(sequence, tick)

    def free(self, sequence: Sequence, tick: cython.longlong) -> None:
        """Give its blocks back, as soon as may be (_free_request_blocks)."""
        holder: Sequence = sequence
        if self.may_free(sequence, tick):
            self.kv.free(sequence)
            return
        holder = Sequence(sequence.request_id, 0, 0)
        holder.slot, holder.blocks_end = sequence.slot, sequence.blocks_end
        sequence.slot = -1
        sequence.blocks_end = sequence.cached_end = 0
        self.deferred.append((self.last_step, holder))

    def step_over(self, tick: cython.longlong) -> None:
        """A step with tokens is over, and no longer writes."""
        self.processed = tick
        while self.deferred and self.deferred[0][0] <= tick:
            self.kv.free_later(self.deferred.pop(0)[1])

    def keeps(self, sequence: Sequence, ending: Any) -> cython.bint:
        """A request ends: whether its blocks are kept for now (Scheduler._free_request)."""
        loading: cython.bint = False
        if sequence.status == LOADING:
            loading = sequence not in self.received
            self.received.discard(sequence)
            self.failed.discard(sequence)
        self.prefills.pop(sequence, None)
        self.cut_now.discard(sequence)
        if sequence.slot >= 0:
            self.kv.trim(sequence)
        sequence.status = FINISHED
        kept: cython.bint = self.connector.request_finished(sequence, ending)
        self.held += kept or loading
        return kept or loading

    def processed_tokens(self, sequence: Sequence, tick: cython.longlong) -> cython.int:
        """Computed tokens, without those of steps after the one of ``tick``, which is over."""
        return sequence.computed - (sequence.scheduled_tokens if sequence.scheduled_tick > tick else 0)

    # ---- failures

    def cut(self, sequences: list, invalid: Any, tick: cython.longlong, evicted: Any) -> list:
        """Those of ``sequences`` that count on blocks which have failed to load; what they have computed ends
        there (Scheduler._update_requests_with_invalid_blocks). A block that several count on is computed
        again by the first alone. ``evicted`` takes the blocks from there on; None where they were not hashed
        yet. ``tick``: of the step whose output says it."""
        sequence: Sequence
        before: cython.int
        i: cython.int
        found: list = []
        marked: set = set()
        for sequence in sequences:
            before = sequence.computed
            if sequence.scheduled_tick == tick:
                before -= sequence.scheduled_tokens
            elif sequence.previous_tick == tick:
                before -= sequence.previous_tokens
            blocks: list = self.kv.block_ids(sequence)
            if self.lists:
                blocks = blocks[0]
            affected: cython.bint = False
            cut: cython.bint = False
            for i in range(min((before + self.kv.block_size - 1) // self.kv.block_size, len(blocks))):
                if blocks[i] not in invalid:
                    continue
                affected = True
                if blocks[i] not in marked:
                    marked.add(blocks[i])
                    if not cut:
                        cut = True
                        sequence.computed = i * self.kv.block_size
                        if evicted is not None:
                            evicted.update(blocks[i:])
            if affected:
                sequence.catch_up = sequence.num_tokens + sequence.placeholders  # computed once more
                if not cut:
                    sequence.computed = before
                found.append(sequence)
        return found

    def fail(self, report: Any, waiting: list, running: list, tick: cython.longlong) -> list:
        """Loads have failed: those whose output of this step is void (Scheduler._handle_invalid_blocks,
        _handle_failed_recving). Where failures end requests, all of them are to end."""
        sequence: Sequence
        transfers: Any = report
        loads: list = [sequence for sequence in waiting if sequence.status == LOADING]
        lost: list = [sequence for sequence in loads if sequence.request_id in transfers.failed_recving]
        evicted: set = set()
        aside: list = []
        inside: list = []
        if self.recomputes:
            for sequence in lost:
                sequence.computed = 0
                self.failed.add(sequence)
        if transfers.invalid_block_ids:
            if self.lists > 1:
                raise InputError(
                    "blocks failed to load, for which vLLM's engine ends with several KV cache groups",
                    where="kv_transfer_config",
                    fix="Set disable_hybrid_kv_cache_manager.",
                )
            aside = self.cut(loads, transfers.invalid_block_ids, tick, None)
            inside = self.cut(running, transfers.invalid_block_ids, tick, evicted)
        if self.recomputes:
            self.failed.update(aside)
            self.skewed |= self.caches_processed and len(inside) > 0
            self.cut_now.update(inside)
            return inside
        for block in evicted:
            self.kv.pool.forget(block)
        return [*lost, *(s for s in aside if s not in lost), *inside]

    def told(self, transfers: Any, sequences: dict) -> list:
        """What has been received and sent; whose blocks go now (Scheduler._update_from_kv_xfer_finished)."""
        sequence: Sequence
        report: Any = transfers
        gone: list = []
        self.connector.update_connector_output(report)
        for request_id in report.finished_recving:
            sequence = sequences[request_id]
            if sequence.status == LOADING:
                self.received.add(sequence)
            else:
                gone.append(sequence)
        for request_id in report.finished_sending:
            gone.append(sequences[request_id])
        self.held -= len(gone)
        return gone
