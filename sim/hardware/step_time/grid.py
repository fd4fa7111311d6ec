"""A measured grid of steps, interpolated: the second kind of step-time model. It holds for one engine."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import replace
from statistics import linear_regression

from pydantic import Field

from servecast.sim.engine.engine import StepShape
from servecast.sim.hardware.model_shape import ModelShape
from servecast.sim.hardware.shard import Shard
from servecast.sim.hardware.step_time.physical import Binding, PhysicalStepTime
from servecast.sim.inputs.errors import InputError
from servecast.sim.inputs.schema import Model

Point = tuple[int, float, float]  # size, context, seconds
_Line = tuple[int, list[float], list[float]]  # size, contexts, seconds that they add
_ROUNDING = 1e-9


class Grid(Model):
    """Times of one engine's steps.

    Attributes:
        gpu: its name. shape, tensor_parallel_size, kv_dtype_bytes, cudagraph_sizes: of the engine.
        decode: (batch, mean context of a decode with its new token, s) of pure decode steps.
        prefill: (tokens, context, s) of steps of one prompt chunk.
        mixed_factor: measured over composed time of steps with several chunks, or chunks and decodes.
    """

    gpu: str
    shape: ModelShape
    tensor_parallel_size: int = Field(default=1, ge=1)
    kv_dtype_bytes: int = Field(default=2, ge=1)
    cudagraph_sizes: tuple[int, ...] = ()
    decode: tuple[Point, ...] = Field(min_length=1)
    prefill: tuple[Point, ...] = Field(min_length=1)
    mixed_factor: float = Field(default=1.0, gt=0)


class Surface:
    """Seconds over (size, context), measured at scattered points.

    Two parts: what a size costs without context, linear between the sizes; and what a context adds, linear in
    size x context (KV tokens) along each size that was measured at several contexts and between such sizes.
    The first goes by padded size, the second by the true one. Below the smallest such size a context adds
    what it adds there; above the largest, what as many KV tokens add there. Where no step without context
    was measured, the straight line through a size's contexts parts the two.

    Args:
        what: names of size and context, for messages. points: measured. padding: sizes that are padded up to.
    """

    def __init__(self, what: tuple[str, str], points: Sequence[Point], padding: Sequence[int]) -> None:
        self._what, self._padding = what, padding
        rows: dict[int, dict[float, float]] = {}
        for size, context, seconds in sorted(points):
            rows.setdefault(size, {})[context] = seconds
        self._lines: list[_Line] = []
        for size, row in rows.items():
            if len(row) > 1:
                contexts, times = list(row), list(row.values())
                start = times[0] if not contexts[0] else linear_regression(contexts, times).intercept
                self._lines.append((size, contexts, [seconds - start for seconds in times]))
        self._line_sizes = [size for size, _, _ in self._lines]
        contexts = [context for row in rows.values() for context in row]
        self.contexts = min(contexts), max(contexts)
        self.sizes = min(rows), max(rows)
        at_padded: dict[int, list[float]] = {}
        for size, row in rows.items():
            at_padded.setdefault(self._padded(size), []).extend(
                seconds - self._added(size, context) for context, seconds in row.items()
            )
        self._base_sizes = sorted(at_padded)
        self._base = [sum(at_padded[size]) / len(at_padded[size]) for size in self._base_sizes]

    def seconds(self, size: int, context: float) -> float:
        """Interpolated.

        Raises:
            InputError: outside of what was measured.
        """
        if not self.sizes[0] <= size <= self.sizes[1]:
            raise self._outside(0, size, *self.sizes)
        low, high = self.range(size)
        if not low * (1 - _ROUNDING) <= context <= high * (1 + _ROUNDING):
            raise self._outside(1, context, low, high, f" at {self._what[0]} {size}")
        base = _interpolated(self._base_sizes, self._base, self._padded(size))
        return base + self._added(size, context)

    def range(self, size: int) -> tuple[float, float]:
        """Lowest and highest context that was measured around a size. Where the KV cache ends, the highest
        falls as the size grows, so it is size x context that is linear between sizes."""
        if not self._lines:
            return self.contexts
        before, after, share = self._around(size)
        if before is after:
            return before[1][0], before[1][-1] * min(1.0, before[0] / size)
        low, high = (
            ((1 - share) * before[0] * before[1][end] + share * after[0] * after[1][end]) / size
            for end in (0, -1)
        )
        return low, high

    def _padded(self, size: int) -> int:
        at = bisect_left(self._padding, size)
        return self._padding[at] if at < len(self._padding) else size

    def _around(self, size: int) -> tuple[_Line, _Line, float]:
        """The lines below and above a size, and how far it is from one to the other; twice the same line
        below the first, above the last and on a line."""
        at = bisect_right(self._line_sizes, size)
        before, after = self._lines[max(at - 1, 0)], self._lines[min(at, len(self._lines) - 1)]
        if before is after or size == before[0]:
            return before, before, 0.0
        return before, after, (size - before[0]) / (after[0] - before[0])

    def _added(self, size: int, context: float) -> float:
        """What a context adds, s; that of the nearest measured beyond the range."""
        if not self._lines:
            return 0.0
        before, after, share = self._around(size)
        if before is after:
            return _interpolated(before[1], before[2], context * max(1.0, size / before[0]))
        low, high = self.range(size)
        place = min(max((context - low) / (high - low), 0.0), 1.0) if high > low else 0.0
        first, second = (
            _interpolated(contexts, added, contexts[0] + place * (contexts[-1] - contexts[0]))
            for _, contexts, added in (before, after)
        )
        return (1 - share) * first + share * second

    def _outside(self, which: int, value: float, low: float, high: float, more: str = "") -> InputError:
        return InputError(
            f"a step with {self._what[which]} {value:g}{more}; measured were {low:g} to {high:g}",
            where=f"profile: grid.{self._what[0].partition(' ')[0]}",
            fix="Measure the grid further, or use a profile of kind physical, which extrapolates.",
        )


def _interpolated(at: Sequence[float], values: Sequence[float], where: float) -> float:
    right = min(max(bisect_left(at, where), 1), len(at) - 1)
    if right == 0:  # a single point
        return values[0]
    left, width = right - 1, at[right] - at[right - 1]
    share = min(max((where - at[left]) / width, 0.0), 1.0)
    return (1 - share) * values[left] + share * values[right]


class GridStepTime:
    """Step time by interpolation in a measured ``Grid``, never under the roofline.

    Pure decode steps and steps of one chunk are interpolated. All others are composed: all tokens as one
    chunk without context, plus what each chunk's context adds, plus what the decodes' contexts add to the
    shortest measured; at least the longest of the parts alone; times the grid's ``mixed_factor``.
    Where the shortest prompt measured is longer than the smallest batch, as many prompt tokens as that are
    taken to cost what it costs at its shortest context.

    Args:
        shard: of the deployment, as in the grid (the model may have another name); its CUDA-graph sizes are
            the grid's.

    Raises:
        InputError: they are not; and by ``seconds`` for a step outside of the grid.
    """

    def __init__(self, grid: Grid, shard: Shard) -> None:
        model = shard.model
        for name, measured, asked in (
            ("GPU", grid.gpu, shard.gpu.name),
            ("model", replace(grid.shape, name=model.name), model),
            ("tensor_parallel_size", grid.tensor_parallel_size, shard.tensor_parallel_size),
            ("KV bytes", grid.kv_dtype_bytes, shard.kv_dtype_bytes),
        ):
            if measured != asked:
                raise InputError(
                    f"the grid was measured with another {name}: {_named(measured)}, not {_named(asked)}",
                    where="profile: grid",
                    fix="Use a profile of kind physical, which carries over, or measure this deployment.",
                )
        self.grid = grid
        self._physical = PhysicalStepTime(replace(shard, cudagraph_sizes=grid.cudagraph_sizes))
        self.decode = Surface(("decode batch", "context"), grid.decode, grid.cudagraph_sizes)
        smallest, prefill = self.decode.sizes[0], list(grid.prefill)
        if smallest < min(size for size, _, _ in prefill):
            shortest = self.decode.range(smallest)[0]
            prefill.append((smallest, 0.0, self.decode.seconds(smallest, shortest)))
        self.prefill = Surface(("prefill tokens", "context"), prefill, grid.cudagraph_sizes)

    def seconds(self, step: StepShape) -> float:
        """Duration of the step in seconds."""
        if not step.chunks and not step.decodes:
            return 0.0
        return max(self._measured(step), self.roofline_seconds(step))

    def _measured(self, step: StepShape) -> float:
        n, chunks = step.decodes, step.chunks
        decode = self.decode.seconds(n, step.decode_context / n) if n else 0.0
        if not chunks:
            return decode
        each = [self.prefill.seconds(tokens, context) for tokens, context in chunks]
        if not n and len(each) == 1:
            return each[0]
        total = self.prefill.seconds(n + sum(tokens for tokens, _ in chunks), 0.0)
        total += sum(
            seconds - self.prefill.seconds(tokens, 0.0)
            for seconds, (tokens, context) in zip(each, chunks, strict=True)
            if context
        )
        if n:
            total += decode - self.decode.seconds(n, self.decode.range(n)[0])
        return max(total, decode, *each) * self.grid.mixed_factor

    def roofline_seconds(self, step: StepShape) -> float:
        """As ``PhysicalStepTime.roofline_seconds``."""
        return self._physical.roofline_seconds(step)

    def breakdown(self, step: StepShape) -> dict[str, float]:
        """Part -> seconds: the grid's time, shared out as a typical physical model has its parts."""
        parts = self._physical.breakdown(step)
        scale = self.seconds(step) / sum(parts.values()) if parts else 0.0
        return {name: scale * seconds for name, seconds in parts.items()}

    def binding(self, step: StepShape) -> Binding:
        """As a typical physical model has it."""
        return self._physical.binding(step)


def _named(value: object) -> str:
    if isinstance(value, ModelShape):
        return f"{value.layers} layers of {value.hidden_size}, {value.weight_bytes_each} bytes a weight"
    return str(value)
