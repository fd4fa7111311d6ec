# What is fixed of lockstep.py where it is compiled.
cimport cython
from servecast.sim.engine.engine_loop cimport ABORTS, BUSY, ENDED, IDLE, EngineLoop
from servecast.sim.engine.step cimport Step
from servecast.sim.engine.step_costs cimport StepCosts

@cython.final
cdef class Lockstep:
    cdef public long long now
    cdef readonly long long wake
    cdef readonly list loops
    cdef readonly long long counter
    cdef readonly bint running
    cdef readonly long long waves
    cdef readonly list dummies
    cdef readonly list dummy_s
    cdef object shared
    cdef tuple passes
    cdef long long interval
    cdef bint sync_first
    cdef long long throttled
    cdef long long gpu_free
    cdef list first  # steps by core, None for a dummy
    cdef list second
    cdef long long first_end
    cdef long long second_end
    cdef bint executing
    cdef Step empty
    cdef long long least  # tokens of a dummy step

    cpdef int advance(self, long long until) except? -1
    cdef bint has_work(self) except? -1
    cdef bint works(self, EngineLoop loop) except? -1
    cdef bint unfinished(self, EngineLoop loop) except? -1
    cdef long long next_arrival(self) except *
    cdef bint complete(self) except? -1
    cdef bint launch(self) except? -1
    cdef int count(self) except -1
    cdef int execute(self, list steps) except -1
    cdef double drafting(self, list steps, list tokens) except? -1
