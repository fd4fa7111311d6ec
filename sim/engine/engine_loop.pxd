# What is fixed of engine_loop.py where it is compiled.
cimport cython
from servecast.sim.engine.pipeline cimport Pipeline
from servecast.sim.engine.scheduler cimport Scheduler
from servecast.sim.engine.sequence cimport Sequence
from servecast.sim.engine.step cimport Step
from servecast.sim.engine.step_costs cimport StepCosts

cpdef enum:  # what ``EngineLoop.advance`` came to
    IDLE = 0
    BUSY = 1
    ENDED = 2
    ABORTS = 3
    POLLING = 4

@cython.final
cdef class EngineLoop:
    cdef public long long now
    cdef readonly long long wake
    cdef public bint tell_ends
    cdef public bint reports
    cdef int told_waiting
    cdef int told_running
    cdef double told_usage
    cdef public int aborts
    cdef public int stage
    cdef public object after_step
    cdef public object on_first
    cdef public Pipeline pipeline
    cdef public object adapter_cache
    cdef public object grammars
    cdef object adapters  # by row
    cdef object formats
    cdef object media
    cdef public object encode_seconds
    cdef readonly long long encoded
    cdef readonly double encoding_s
    cdef long long before  # the end of the step before, where steps overlap
    cdef list later  # steps in flight behind the second
    cdef int depth
    cdef bint fills
    cdef readonly list inbox
    cdef long long[::1] request_ids
    cdef long long[::1] prompts
    cdef long long[::1] outputs
    cdef long long[::1] most
    cdef long long[::1] priorities
    cdef bint prioritized
    cdef list contents
    cdef int[::1] content
    cdef long long[:, ::1] outcomes
    cdef public list ended
    cdef public list lost
    cdef readonly object connector
    cdef object saves
    cdef public bint host_waits
    cdef public long long horizon
    cdef long long napped  # when the nap began
    cdef int still  # empty steps in turn that had nothing to report
    cdef bint napping
    cdef bint executed  # whether the newest step has tokens
    cdef Scheduler scheduler
    cdef StepCosts costs
    cdef object step_seconds
    cdef object floor
    cdef object noise
    cdef object read
    cdef int index
    cdef bint is_async
    cdef bint executing
    cdef Step first
    cdef Step second
    cdef Step pending
    cdef long long resume
    cdef long long cold_start
    cdef long long gpu_free
    cdef long long sent
    cdef long long token_ps
    cdef long long delivery_ps
    cdef long long arrivals
    cdef long long[::1] seen
    cdef Py_ssize_t num_seen
    cdef long long[:, ::1] steps
    cdef double[:, ::1] step_floats
    cdef Py_ssize_t num_steps
    cdef Py_ssize_t dropped  # rows of steps before the first one that is kept
    cdef double[:, ::1] gaps
    cdef Py_ssize_t num_gaps

    cpdef object use(self, Pipeline pipeline)
    cpdef int take(self, Py_ssize_t row, long long time) except -1
    cpdef int advance(self, long long until) except? -1
    cdef int advance_connected(self, long long until) except? -1
    cdef int launch_connected(self, Step step) except -1
    cdef long long next_poll(self) except *
    cdef int refuse_stuck(self) except -1
    cdef int room_for_steps(self, Py_ssize_t count) except -1
    cdef int room_for_gaps(self, Py_ssize_t count) except -1
    cdef long long next_arrival(self) except *
    cdef int drain(self) except -1
    cdef int report(self) except -1
    cdef int finish(self, Step step) except -1
    cdef int note_step(self, Step step, double seconds) except -1
    cdef bint launch(self, Step step) except? -1
    cdef bint one_more(self, Step step) except? -1
    cdef int execute(self, Step step) except -1
    cdef double with_host(self, Step step, double seconds) except? -1
    cdef int refuse(self) except -1
    cdef int deliver(self, Step step) except -1
    cdef int book(self, Sequence sequence) except -1
    cdef int lose(self, Step step) except -1
    cdef int note_seen(self, long long time) except -1
    cdef int note_gap(self, long long gap, long long tokens, double spread) except -1

cdef double in_seconds(long long ps) except? -1
