# What is fixed of pipeline.py where it is compiled.
cimport cython
from servecast.sim.engine.step cimport Step
from servecast.sim.engine.step_costs cimport StepCosts

@cython.final
cdef class Pipeline:
    cdef readonly tuple stages
    cdef readonly tuple hand_over
    cdef int stride
    cdef list free
    cdef list ends
    cdef long long last_end

    cdef long long run(self, Step step, long long now, double factor, object caches) except *
    cdef int note(self, Step step, long long end) except -1
