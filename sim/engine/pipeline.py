"""Pipeline stages: when a step that goes through all of them starts and ends."""

from __future__ import annotations

from typing import Any

import cython

from servecast.sim.engine.step import Step
from servecast.sim.engine.step_costs import StepCosts

if cython.compiled:
    from cython.cimports.libc.math import rint
else:
    rint = round

PICOSECONDS = cython.declare(cython.double, 1e12)


class Pipeline:
    """Stages of layers that a step passes one after the other; each computes one step at a time, in order.

    Args:
        stages: what a step costs on each. hand_over: called for the seconds that the
            activations of so many tokens take from one stage to the next, one for each but the last.
        stride: steps from one token of a request to its next; a step with decodes starts when the step so
            many before it has sampled. 0: the engine waits for tokens itself.
    """

    def __init__(self, stages: tuple[StepCosts, ...], hand_over: tuple[Any, ...], stride: cython.int) -> None:
        self.stages, self.hand_over, self.stride = stages, hand_over, stride
        self.free = [0] * len(stages)
        self.ends = [0] * (stride + 1)
        self.last_end = 0

    def run(self, step: Step, now: cython.longlong, factor: cython.double, caches: Any) -> cython.longlong:
        """Put a step into the first stage at ``now`` or later, and say in it when it starts there and when it
        leaves the last. ``factor``: on all times but those in which a stage loads adapters into its own of
        ``caches``. Returns the latter."""
        at: cython.longlong = max(now, self.free[0])
        stage: cython.Py_ssize_t
        costs: StepCosts
        seconds: cython.double
        if self.stride and step.decodes and step.tick >= self.stride:
            at = max(at, self.ends[(step.tick - self.stride) % (self.stride + 1)])
        step.start = at
        for stage in range(len(self.stages)):
            if stage:
                seconds = self.hand_over[stage - 1](step.total_tokens)
                at += cython.cast(cython.longlong, rint(seconds * factor * PICOSECONDS))
                at = max(at, self.free[stage])
            costs = self.stages[stage]
            seconds = costs.seconds(step)
            at += cython.cast(cython.longlong, rint(seconds * factor * PICOSECONDS))
            if caches is not None and step.adapters is not None:
                seconds = caches[stage].load(step.adapters)
                at += cython.cast(cython.longlong, rint(seconds * PICOSECONDS))
            self.free[stage] = at
        self.note(step, at)
        return step.end

    def note(self, step: Step, end: cython.longlong) -> cython.int:
        """The step leaves the last stage; one without tokens with the step before it."""
        self.last_end = step.end = max(end, self.last_end)
        self.ends[step.tick % (self.stride + 1)] = step.end
        return 0
