# What is fixed of remote_kv.py where it is compiled.
cimport cython
from servecast.sim.engine.kv_cache cimport KVCache
from servecast.sim.engine.sequence cimport FINISHED, LOADING, PREEMPTED, WAITING, Sequence

@cython.final
cdef class RemoteKV:
    cdef readonly object connector
    cdef KVCache kv
    cdef int lists  # of blocks a sequence, where layers do not all keep the same; else 0
    cdef bint recomputes  # a failed load; else its request ends
    cdef bint defers
    cdef bint spares
    cdef bint drops
    cdef int draft_tokens
    cdef object pending_work  # whether transfers are under way that the engine goes on for, or None
    cdef bint forgets
    cdef bint caches_processed
    cdef bint skewed
    cdef bint reserves
    cdef bint steps_while_sending
    cdef dict prefills
    cdef set received
    cdef set failed
    cdef set cut_now
    cdef list deferred
    cdef long long processed
    cdef long long last_step
    cdef readonly int held
    cdef readonly long long queries
    cdef readonly long long hits

    cdef object match(self, Sequence sequence, int cached)
    cdef object allocated(self, Sequence sequence, bint asked, int cached, int external)
    cdef int reserved_blocks(self) except -1
    cdef bint arrived(self, Sequence sequence) except? -1
    cdef bint may_free(self, Sequence sequence, long long tick)
    cdef bint may_preempt(self, Sequence sequence, long long tick)
    cdef object free(self, Sequence sequence, long long tick)
    cdef object step_over(self, long long tick)
    cdef bint keeps(self, Sequence sequence, object ending) except? -1
    cdef int processed_tokens(self, Sequence sequence, long long tick)
    cdef list cut(self, list sequences, object invalid, long long tick, object evicted)
    cdef list fail(self, object report, list waiting, list running, long long tick)
    cdef list told(self, object transfers, dict sequences)
