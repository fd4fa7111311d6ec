# What is fixed of encoder_cache.py where it is compiled.
cimport cython
from servecast.sim.engine.sequence cimport FINISHED, Sequence
from servecast.sim.engine.step cimport Step, own

@cython.final
cdef class EncoderCache:
    cdef bint refers_by_item
    cdef bint frees_behind_placeholders
    cdef bint holds_until_last
    cdef bint counts_repeats
    cdef bint keeps_whole
    cdef bint keeps_whole_first
    cdef bint keeps_whole_at_start
    cdef bint passes_over
    cdef int budget_of_step
    cdef int budget  # left in this step
    cdef int left  # if the chunk of the last ``fit`` is scheduled
    cdef readonly int size
    cdef readonly int free_slots
    cdef readonly int free_able
    cdef dict cached  # content -> ids of the requests that refer to it
    cdef dict let_go  # content -> embeddings, of those that nobody refers to
    cdef list chosen
    cdef list repeated

    cdef int admit(self, Sequence sequence, tuple media) except -1
    cdef int fit(self, Sequence sequence, int computed, int tokens) except -1
    cdef int accept(self, Sequence sequence, Step step) except -1
    cdef int withdraw(self, Sequence sequence, Step step) except -1
    cdef bint refer(self, Sequence sequence, int place) except? -1
    cdef bint make_room(self, int size) except? -1
    cdef list places(self, Sequence sequence)
    cdef int release(self, Sequence sequence, int place) except -1
    cdef int free(self, Sequence sequence) except -1
    cdef int step_done(self, Step step) except -1
