# What is fixed of sequence.py where it is compiled.
cimport cython

cdef enum:
    WAITING = 0
    RUNNING = 1
    PREEMPTED = 2
    FINISHED = 3
    LOADING = 4  # waits for remote KV

@cython.final
cdef class Sequence:
    # what every step looks at, side by side
    cdef readonly int computed
    cdef int catch_up
    cdef int decodes_until
    cdef int kv_due
    cdef readonly int num_tokens
    cdef int placeholders
    cdef int status
    cdef int final_tokens
    cdef long long token_tick
    # and the rest
    cdef int drafts
    cdef int junction
    cdef readonly int limit
    cdef int blocks_end
    cdef int cached_end
    cdef int slot
    cdef readonly long long scheduled_tick
    cdef int scheduled_tokens
    cdef long long previous_tick
    cdef int previous_tokens
    cdef long long drops_before
    cdef bint aside
    cdef bint passed
    cdef readonly long long arrival
    cdef long long serial
    cdef Py_ssize_t row
    cdef list shared_keys
    cdef readonly long long priority
    cdef readonly int prompt_tokens
    cdef readonly long long request_id
    cdef readonly int preemptions
    cdef public long long samplings
    cdef readonly int cached_tokens
    cdef readonly long long queued
    cdef readonly long long scheduled
    cdef readonly long long ended
    cdef readonly long long first_token
    cdef readonly long long finish
    # of stages, adapters and grammars
    cdef long long eligible
    cdef long long stale_tick
    cdef long long ready
    cdef int adapter
    cdef bint constrained
    cdef tuple media
    cdef set held
    cdef int media_end
