# What is fixed of alone.py where it is compiled.
cimport cython
from servecast.sim.engine.engine_loop cimport ENDED, EngineLoop
from servecast.sim.engine.sequence cimport Sequence

@cython.final
cdef class Alone:
    cdef EngineLoop loop
    cdef object send
    cdef double latency_s
    cdef double request_s
    cdef double prompt_token_s
    cdef long long tokenizer_free
    cdef Py_ssize_t most
    cdef object variation
    cdef Py_ssize_t limit
    cdef list requests
    cdef long long[::1] times
    cdef long long[::1] sent
    cdef list heap  # (time, order, what, request)
    cdef long long order
    cdef Py_ssize_t ready  # requests that have arrived and those that were sent, from the first on
    cdef Py_ssize_t started
    cdef Py_ssize_t in_flight
    cdef long long busy_until
    cdef list rounds  # ends of rounds of preparation, and who is in each

    cdef int push(self, long long time, int what, Py_ssize_t request) except -1
    cdef int arrive(self, long long now) except -1
    cdef int start(self, long long now) except -1
    cdef long long varied(self, double seconds) except *
    cdef int accept(self, long long now, Py_ssize_t request) except -1
    cdef int prepare(self, long long now, Py_ssize_t request) except -1
    cdef int encode(self, long long now, Py_ssize_t request) except -1
    cdef int put(self, long long now, Py_ssize_t request) except -1
    cdef int end_round(self, long long now) except -1
