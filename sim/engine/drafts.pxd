# What is fixed of drafts.py where it is compiled.
cimport cython
from servecast.sim.engine.sequence cimport Sequence

@cython.final
cdef class Drafts:
    cdef readonly int k
    cdef readonly int seats  # requests at most that the drafter takes in one pass
    cdef readonly int slots  # input slots that come off a step's budget with each request
    cdef readonly int budget  # tokens of a step, the first request's slots taken off
    cdef readonly bint hashes_at_update
    cdef readonly bint uncounts_cut
    cdef bint is_async
    cdef int max_model_len
    cdef bint pads
    cdef bint pads_the_first
    cdef bint waits_at_the_end
    cdef bint misses
    cdef int[::1] by_requests
    cdef double[::1] acceptance
    cdef double[::1] proposed
    cdef int[::1] from_tokens
    cdef int kinds
    cdef unsigned long long seed
    cdef public object told
    cdef readonly long long num_drafts
    cdef readonly long long num_draft_tokens
    cdef readonly long long num_accepted_tokens
    cdef long long[::1] accepted_at

    cdef int length(self, int requests) noexcept
    cdef int padding(self, int computed, int budget, bint together, bint prefills) noexcept
    cpdef int accept(self, Sequence sequence, int verified) except -1
    cpdef int propose(self, Sequence sequence, int most) except -1
    cdef Py_ssize_t kind(self, Sequence sequence) noexcept
    cdef int listed(self, Sequence sequence, int which, long long number) except -1

cdef unsigned long long mixed(unsigned long long bits) noexcept
cpdef double drawn(unsigned long long seed, unsigned long long request_id, unsigned long long number) noexcept
