# What is fixed of scheduler.py where it is compiled.
cimport cython
from servecast.sim.engine.drafts cimport Drafts
from servecast.sim.engine.encoder_cache cimport EncoderCache
from servecast.sim.engine.kv_cache cimport KVCache
from servecast.sim.engine.remote_kv cimport RemoteKV
from servecast.sim.engine.sequence cimport FINISHED, LOADING, PREEMPTED, RUNNING, WAITING, Sequence
from servecast.sim.engine.step cimport Step, own

@cython.final
cdef class Scheduler:
    cdef readonly object config
    cdef readonly object rules
    cdef readonly KVCache kv
    cdef readonly long long tick  # number of schedule() calls so far
    cdef readonly long long prefix_queries  # tokens, as in vLLM's counters
    cdef readonly long long prefix_hits
    cdef readonly int num_waiting
    cdef int num_passed  # of those: passed over when they were last looked at
    cdef bint holders_wait_apart
    cdef bint names_chunks
    cdef RemoteKV remote
    cdef readonly EncoderCache encoder
    cdef object beside  # the queue of those who wait beside it
    cdef bint lone_request_ignores_threshold
    cdef bint cursor_follows_victim
    cdef bint count_admitted_lookups
    cdef bint loop_goes_on_after_own_preemption
    cdef public object cadence
    cdef bint prefix_caching
    cdef bint chunked_prefill
    cdef bint is_async
    cdef int least  # placeholders of who has nothing else to be looked at
    cdef bint adaptive
    cdef bint priority
    cdef bint trace
    cdef bint notes  # what was scheduled, request by request
    cdef bint marks  # on a sequence, when it was scheduled last
    cdef bint pipelined
    cdef readonly int stride  # steps from one token of a request to the next
    cdef bint staggers  # decodes, by that
    cdef bint stales  # a preempted request waits for what is in flight of it
    cdef int max_loras
    cdef bint counts_running_loras
    cdef public long long clock  # by which grammars are ready
    cdef bint holds_back  # something may be passed over without a connector
    cdef bint singly  # decoding requests are scheduled one by one, as all others
    cdef bint speculates
    cdef readonly Drafts drafts  # None: one token a step
    cdef int draft_slots  # that each request takes off the budget
    cdef int prompt_lookahead
    cdef int budget  # tokens of a step
    cdef int max_tokens
    cdef int max_running
    cdef int max_model_len
    cdef int long_prefill_threshold
    cdef int watermark
    cdef long long window  # of layers that attend to no more tokens, which a step counts by ``windowed``; or 0
    cdef bint chunked  # the window is a chunk
    cdef bint finished_unsent
    cdef long long added
    cdef readonly dict sequences
    cdef list runners  # in the order of admission
    cdef bint lent  # the list
    cdef object queue

    cpdef Sequence add(self, object request, long long arrival)
    cdef Sequence enter(
        self, long long request_id, int prompt, int output, int most, tuple content, long long priority, long long arrival
    )
    cpdef int carry(self, Sequence sequence, tuple media) except -1
    cpdef object abort(self, object request_id)
    cdef list own_runners(self)
    cdef bint goes_on(self) except? -1
    cdef int drop(self, Sequence sequence, object ending) except -1
    cdef int unqueue(self, Sequence sequence) except -1
    cdef int end(self, Sequence sequence, object ending) except -1
    cdef int forget(self, Sequence sequence) except -1
    cpdef Step schedule(self)
    cdef bint somebody_decodes(self) except? -1
    cdef bint in_prefill(self, Sequence sequence) except -1
    cdef bint counts_prefills(self, Step step) except -1
    cdef int chunk_limit(self) except -1
    cdef int schedule_running(self, Step step, int threshold, bint defer) except? -1
    cdef int spare_lookahead(self, Sequence sequence, int computed, int tokens) except -1
    cdef Py_ssize_t pick_victim(self) except? -1
    cdef int withdraw(self, Step step, Sequence victim) except? -1
    cdef int preempt(self, Step step, Sequence sequence, Py_ssize_t position) except -1
    cdef int schedule_waiting(self, Step step, int budget, int threshold, bint defer) except -1
    cdef bint held_back(self, Sequence sequence, object adapters) except? -1
    cdef object adapters_in(self, Step step)
    cpdef object grammar_ready(self, object request_id)
    cpdef int wait_for_grammar(self, Sequence sequence, long long ready) except -1
    cdef object next_queue(self)
    cdef int put_back(self, list passed) except -1
    cdef int count_lookup(self, Sequence sequence, int hit_tokens) except -1
    cdef void advance(self, Step step, Sequence sequence, int tokens, bint padded) noexcept
    cdef int note_drafters(self, Step step) except -1
    cdef int drop_finished(self) except -1
    cdef int complete_drafts(self, Step step, list delivering) except -1
    cdef long long in_window(self, long long tokens) noexcept
    cdef void note_chunk(self, Step step, Sequence sequence, int tokens) noexcept
    cdef void note_scheduled(self, Step step, Sequence sequence, int tokens) noexcept
    cpdef object complete(self, Step step)
    cdef list count_reports(self, Step step)
    cdef object follow_reports(self, Step step)
