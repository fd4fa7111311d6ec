"""Step time composed from measured kernels of one layer: the third kind of step-time model."""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right

import numpy as np
import numpy.typing as npt
from pydantic import model_validator

from servecast.sim.engine.engine import StepShape
from servecast.sim.hardware.model_shape import ModelShape
from servecast.sim.hardware.shard import Shard
from servecast.sim.hardware.step_time.physical import Binding, Efficiencies, PhysicalStepTime
from servecast.sim.inputs.errors import InputError
from servecast.sim.inputs.schema import Model, invalid

Floats = tuple[float, ...]
Axis = tuple[int, ...]
_AXES = {  # of attention, in words
    "chunk": "prompt tokens a step",
    "context": "KV tokens before a chunk",
    "decodes": "decodes a step",
    "decode_context": "KV tokens a decode",
}


class LayerTables(Model):
    """Measured kernel times, in seconds, of one layer and of what a step does once, in bf16 on one rank.

    Attributes:
        gpu: its name. shape: the model that was measured; its number of layers does not matter.
        tensor_parallel_size: ranks that it was split over. All-reduces are not in the tables.
        tokens: (t,) rising. linear, elementwise: (t,) matrix products, and all other kernels of one layer
            without attention. once: (t,) embedding and last norm.
        sequences: (s,) rising. lm_head, sampler: (s,).
        chunk, context, decodes, decode_context: rising axes of attention: tokens of one prompt chunk, KV
            tokens before it, decodes, KV tokens of each. They start at 0: no chunk, no context, no decodes.
        attention: of one layer, by the four axes, the last running fastest; None where not measured.
        keys: whether ``context`` counts the chunk, too.
        expert_tokens, experts: rising axes of ``expert_times``, the routed experts of one layer with their
            router: tokens, and experts that they touch; empty of a dense model.
    """

    gpu: str
    shape: ModelShape
    tensor_parallel_size: int = 1
    tokens: Axis
    linear: Floats
    elementwise: Floats
    once: Floats
    sequences: Axis
    lm_head: Floats
    sampler: Floats
    chunk: Axis
    context: Axis
    decodes: Axis
    decode_context: Axis
    attention: tuple[float | None, ...]
    keys: bool = False
    expert_tokens: Axis = ()
    experts: Axis = ()
    expert_times: tuple[float | None, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> LayerTables:
        for name in ("tokens", "sequences", *_AXES):
            axis = getattr(self, name)
            if len(axis) < 2 or list(axis) != sorted(set(axis)) or axis[0] < 0:
                raise invalid(f"{name} does not rise from 0 or more", "Fit the profile again.", at=name)
        points = math.prod(len(getattr(self, name)) for name in _AXES)
        sizes = dict.fromkeys(("linear", "elementwise", "once"), len(self.tokens))
        sizes |= dict.fromkeys(("lm_head", "sampler"), len(self.sequences)) | {"attention": points}
        sizes["expert_times"] = len(self.expert_tokens) * len(self.experts)
        for name, size in sizes.items():
            values = getattr(self, name)
            if len(values) != size:
                what = f"{name} has {len(values)} times for {size} points"
                raise invalid(what, "Fit the profile again.", at=name)
            if any(value is not None and value < 0.0 for value in values):
                raise invalid(f"{name} has a negative time", "Fit the profile again.", at=name)
        return self


class LayeredStepTime:
    """Step time: layers x (linear + elementwise + attention) + once + lm_head + sampler + host.

    Between the tables' points it interpolates linearly in every coordinate; tokens are padded to CUDA-graph
    sizes as in ``PhysicalStepTime``. Attention was measured for one prompt chunk beside decodes of one
    context: decodes count with their mean context, and several chunks as one of as many tokens and as many
    query-key pairs (of fewer tokens, if even without context so many would have more pairs). Prompts and
    decodes that were not measured together are taken to add up, and a context that was not measured with a
    chunk, or a number of decodes, to cost what the next shorter one does, by its query-key pairs. All-reduces
    are the physical model's. Never under ``roofline_seconds``.

    Args:
        tables: the measured times. shard: as measured. efficiencies: its host and link costs are used.
        measured_only: refuse what would have to be put together so.

    Raises:
        InputError: the tables are of another GPU, of a model of other sizes, or this one is split otherwise
            or has a KV cache of another width; from ``seconds`` and ``breakdown``: the step is beyond what
            was measured.
    """

    def __init__(
        self, tables: LayerTables, shard: Shard, efficiencies: Efficiencies, *, measured_only: bool = False
    ) -> None:
        model = shard.model
        for what, measured, asked in (
            ("GPU", tables.gpu, shard.gpu.name),
            ("tensor_parallel_size", tables.tensor_parallel_size, shard.tensor_parallel_size),
            ("KV bytes", 2, shard.kv_dtype_bytes),
            ("model sizes", model.alike(tables.shape, "layers"), []),
        ):
            if measured != asked:
                which = f": {measured}, not {asked}" if what != "model sizes" else ""
                raise InputError(
                    f"the layers were measured with another {what}{which}",
                    where="profile: layers",
                    fix="Use a profile of kind physical, which carries over, or measure this deployment.",
                )
        self.tables, self.shard, self.efficiencies = tables, shard, efficiencies
        self.physical = PhysicalStepTime(shard, efficiencies)
        self._axes: list[Axis] = [getattr(tables, name) for name in _AXES]
        sizes = [len(axis) for axis in self._axes]
        self._strides = [math.prod(sizes[at + 1 :]) for at in range(4)]
        attention = _grid(tables.attention, sizes)
        self._attention_times = (attention if measured_only else _filled(tables, attention)).ravel().tolist()
        experts = _grid(tables.expert_times, [len(tables.expert_tokens), len(tables.experts)])
        self._expert_times = _extended(experts, np.array([tables.experts], dtype=float))
        self._experts_by_tokens: dict[int, float] = {}

    def seconds(self, step: StepShape) -> float:
        """Duration of the step in seconds. A step with nothing in it takes no time."""
        return sum(self.breakdown(step).values())

    def roofline_seconds(self, step: StepShape) -> float:
        """As ``PhysicalStepTime.roofline_seconds``."""
        return self.physical.roofline_seconds(step)

    def binding(self, step: StepShape) -> Binding:
        """What most of the step's time goes to, as the physical model sees it."""
        return self.physical.binding(step)

    def breakdown(self, step: StepShape) -> dict[str, float]:
        """Part -> seconds; they add up to ``seconds``. Measured kernels that are under the roofline (a clock
        beyond the datasheet's) are lengthened to it as a part of its own."""
        chunk_tokens = sum(tokens for tokens, _ in step.chunks)
        tokens = step.decodes + chunk_tokens
        if not tokens:
            return {}
        tables, layers = self.tables, self.shard.model.layers
        at, weight = _bracket(tables.tokens, self.shard.padded(tokens), "tokens a step")
        parts = {
            "host": self.efficiencies.host_fixed_s
            + (step.decodes + len(step.chunks)) * self.efficiencies.host_per_seq_s,
            "linear": layers * _between(tables.linear, at, weight),
            "elementwise": layers * _between(tables.elementwise, at, weight)
            + _between(tables.once, at, weight),
            "attention": layers * self._attention(step, chunk_tokens),
        }
        if tables.expert_tokens:
            padded = self.shard.padded(tokens)
            if padded not in self._experts_by_tokens:
                self._experts_by_tokens[padded] = self._experts(padded)
            parts["experts"] = self.shard.model.moe_layers * self._experts_by_tokens[padded]
        if tables.tensor_parallel_size > 1:
            parts["all_reduce"] = self.physical.breakdown(step)["all_reduce"]
        if step.samples:
            at, weight = _bracket(tables.sequences, step.samples, "sampled sequences a step")
            parts["lm_head"] = _between(tables.lm_head, at, weight)
            parts["sampler"] = _between(tables.sampler, at, weight)
        short = self.roofline_seconds(step) - sum(parts.values())
        if short > 0.0:
            parts["roofline"] = short * (1.0 + 1e-12)  # so that rounding of the sum leaves it above
        return parts

    def _attention(self, step: StepShape, chunk_tokens: int) -> float:
        """One layer's, in seconds."""
        tables = self.tables
        chunk, context = float(chunk_tokens), 0.0
        if chunk_tokens:
            pairs = sum(tokens * (context + 0.5 * tokens) for tokens, context in step.chunks)
            context = pairs / chunk_tokens - 0.5 * chunk_tokens
            if context < 0.0:
                chunk, context = math.sqrt(2.0 * pairs), 0.0
            chunk = max(chunk, tables.chunk[1])
            context += chunk if tables.keys else 0.0
        decode_context = 0.0
        if step.decodes:
            decode_context = max(step.decode_context / step.decodes, tables.decode_context[1])
        point = (chunk, context, step.decodes, decode_context)
        where = [
            _bracket(axis, at, name) for axis, at, name in zip(self._axes, point, _AXES.values(), strict=True)
        ]
        total = 0.0
        for corner in itertools.product((0, 1), repeat=4):
            share, place = 1.0, 0
            for (at, weight), side, stride in zip(where, corner, self._strides, strict=True):
                share *= weight if side else 1.0 - weight
                place += (at + side) * stride
            if share:
                value = self._attention_times[place]
                if math.isnan(value):
                    asked = zip(point, _AXES.values(), strict=True)
                    raise _beyond(", ".join(f"{at:g} {name}" for at, name in asked) + " were not measured")
                total += share * value
        return total

    def _experts(self, tokens: int) -> float:
        """The routed experts of one layer, in seconds: of as many as so many tokens touch."""
        tables, model = self.tables, self.shard.model
        row, down = _bracket(tables.expert_tokens, tokens, "tokens a step of the experts")
        touched = model.experts * (1.0 - (1.0 - model.experts_per_token / model.experts) ** tokens)
        touched = min(max(touched, tables.experts[0]), tables.experts[-1])
        column, right = _bracket(tables.experts, touched, "experts")
        corners = self._expert_times[row : row + 2, column : column + 2]
        weights = np.outer([1.0 - down, down], [1.0 - right, right])[: corners.shape[0], : corners.shape[1]]
        return float((corners * weights).sum())


def _grid(values: tuple[float | None, ...], sizes: list[int]) -> npt.NDArray[np.float64]:
    return np.array([math.nan if value is None else value for value in values]).reshape(sizes)


def _filled(tables: LayerTables, times: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Attention with what was not measured put together from what was; see ``LayeredStepTime``."""
    chunk, context = (np.array(axis, dtype=float) for axis in (tables.chunk, tables.context))
    after = (
        np.maximum(context, chunk[:, None]) - chunk[:, None] / 2
        if tables.keys
        else context + chunk[:, None] / 2
    )
    prompts = _extended(times[:, :, 0, 0], after)
    decodes = _extended(times[0, 0], np.array([tables.decode_context], dtype=float))
    prompts[0], decodes[0] = 0.0, 0.0
    return np.where(np.isnan(times), prompts[:, :, None, None] + decodes, times)


def _extended(times: npt.NDArray[np.float64], work: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Each row's gaps filled from the measured point before, or else after, in proportion to the work."""
    times, work = times.copy(), np.broadcast_to(work, times.shape)
    for row, of in zip(times, work, strict=True):
        measured = np.flatnonzero(~np.isnan(row))
        for at in np.flatnonzero(np.isnan(row)) if len(measured) else ():
            before = np.searchsorted(measured, at)
            near = measured[before - 1 if before else 0]
            row[at] = row[near] * (of[at] / of[near] if of[near] else 1.0)
    return times


def _bracket(axis: Axis, value: float, name: str) -> tuple[int, float]:
    """Index of the point at or below a value, and the weight of the next one."""
    if not axis[0] <= value <= axis[-1]:
        raise _beyond(f"{value:g} {name}, measured from {axis[0]} to {axis[-1]}")
    at = bisect_right(axis, value) - 1
    if at == len(axis) - 1:
        return at, 0.0
    return at, (value - axis[at]) / (axis[at + 1] - axis[at])


def _between(values: Floats, at: int, weight: float) -> float:
    return values[at] + weight * (values[at + 1] - values[at]) if weight else values[at]


def _beyond(what: str) -> InputError:
    return InputError(
        f"a step beyond the layer tables: {what}",
        where="profile: layers",
        fix="Measure the tables further, or use a profile of kind physical, which extrapolates.",
    )
