"""A measured grid, from the steps of one engine."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Self

import numpy as np

from servecast.calibrate.fit.check import HeldOut
from servecast.calibrate.fit.measurements import Engine
from servecast.calibrate.fit.noise import Floats, Scatter
from servecast.calibrate.fit.rows import Kernel, Step
from servecast.sim.hardware.gpu import GPU
from servecast.sim.hardware.noise import StepNoise
from servecast.sim.hardware.shard import Shard
from servecast.sim.hardware.step_time.grid import Grid, GridStepTime, Point
from servecast.sim.inputs.errors import InputError

_SAME_CONTEXT = 1.05  # contexts within this ratio are one
_NO_NODES = ("decode_ragged", "long_run")  # contexts that differ within a step, or that were timed once


class GridFit:
    """Takes the steps of one engine as they are: pure decodes and single chunks become nodes of a ``Grid``,
    and the other steps tell how far those that are composed from nodes are off.

    Args:
        gpu: that was measured. scatter: of the measured times; none by default.

    Attributes:
        grid_: the nodes. shard_: of the engine that was measured. told_: empty: a grid has no parameters.
    """

    grid_: Grid
    shard_: Shard
    told_: tuple[str, ...] = ()

    def __init__(self, gpu: GPU, scatter: Scatter | None = None) -> None:
        self.gpu, self.scatter = gpu, scatter or Scatter(StepNoise())

    def fit(self, engines: Sequence[Engine], steps: Sequence[Step], kernels: Sequence[Kernel] = ()) -> Self:
        """Kernels are not used.

        Raises:
            InputError: steps of several models, or no decodes, or no prompts without context.
        """
        shards = {engines[number].shard(self.gpu) for number in {step.engine for step in steps}}
        if len(shards) != 1:
            raise InputError(
                f"a grid holds for one engine, and {len(shards)} were measured",
                where="measurements",
                fix="Fit the physical kind, or keep each engine's measurements in a folder of its own.",
            )
        self.shard_ = shard = shards.pop()
        decode = self._nodes(step for step in steps if _is_decode(step))
        prefill = self._nodes(step for step in steps if _is_prefill(step))
        if not decode or not any(context == 0 for _, context, _ in prefill):
            raise InputError(
                f"a grid needs decode steps and prompts without context; there are {len(decode)} and "
                f"{sum(context == 0 for _, context, _ in prefill)}",
                where="measurements",
                fix="Measure the regions decode and prefill.",
            )
        self.grid_ = Grid(
            gpu=self.gpu.name,
            shape=shard.model,
            tensor_parallel_size=shard.tensor_parallel_size,
            kv_dtype_bytes=shard.kv_dtype_bytes,
            cudagraph_sizes=shard.cudagraph_sizes,
            decode=decode,
            prefill=prefill,
        )
        composed = self.inside(step for step in steps if step.chunks and step.batch > 1)
        if composed:
            ratios = np.log(self.scatter.means(composed) / self.predict(engines, composed))
            factor = math.exp(float(np.median(ratios)))
            self.grid_ = self.grid_.model_copy(update={"mixed_factor": factor})
        return self

    def predict(self, engines: Sequence[Engine], steps: Sequence[Step]) -> Floats:
        """Seconds of steps, all inside of the grid."""
        model = self._step_time()
        return np.array([model.seconds(step) for step in steps])

    def inside(self, steps: Iterable[Step]) -> list[Step]:
        """The steps that lie inside of the grid."""
        model = self._step_time()
        return [step for step in steps if _covers(model, step)]

    def leave_nodes_out(self, engines: Sequence[Engine], steps: Sequence[Step]) -> HeldOut:
        """Predict each node from the others; NaN for those at the grid's rim, which nothing but themselves
        tells. Other steps are no nodes, and are predicted by the whole grid."""
        seconds = self.predict(engines, steps)
        for at, step in enumerate(steps):
            if _is_decode(step) or _is_prefill(step):
                try:
                    without = GridFit(self.gpu, self.scatter).fit(engines, [*steps[:at], *steps[at + 1 :]])
                    seconds[at] = without._step_time().seconds(step)
                except InputError:
                    seconds[at] = np.nan
        return HeldOut(seconds, {})

    def _step_time(self) -> GridStepTime:
        return GridStepTime(self.grid_, self.shard_)

    def _nodes(self, steps: Iterable[Step]) -> tuple[Point, ...]:
        """Nodes in order; steps of one size whose contexts are nearly the same become one."""
        steps = list(steps)
        groups: list[list[Point]] = []
        for point in sorted(
            (*_place(step), seconds)
            for step, seconds in zip(steps, self.scatter.means(steps).tolist(), strict=True)
        ):
            if groups and groups[-1][0][0] == point[0] and point[1] <= _SAME_CONTEXT * groups[-1][0][1]:
                groups[-1].append(point)
            else:
                groups.append([point])
        return tuple(
            (group[0][0], float(np.mean([c for _, c, _ in group])), float(np.mean([s for _, _, s in group])))
            for group in groups
        )


def _place(step: Step) -> tuple[int, float]:
    """Size and context of a node."""
    if step.decodes:
        return step.decodes, step.decode_context / step.decodes
    tokens, context = step.chunks[0]
    return tokens, float(context)


def _covers(model: GridStepTime, step: Step) -> bool:
    try:
        model.seconds(step)
    except InputError:
        return False
    return True


def _is_decode(step: Step) -> bool:
    return not step.chunks and step.region not in _NO_NODES


def _is_prefill(step: Step) -> bool:
    return not step.decodes and len(step.chunks) == 1 and step.region not in _NO_NODES
