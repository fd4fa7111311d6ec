"""What steps cost on a GPU, in numbers that ``servecast.sim.hardware.step_time.physical`` fills in."""

from __future__ import annotations

from array import array
from typing import Any

import cython
import numpy as np

from servecast.sim.engine.step import Step


class StepCosts:
    """What steps cost, in the numbers of ``servecast.sim.hardware.step_time.physical``, which fills it.

    by_tokens, by_rows: called for the seconds that a number of computed tokens or of sampled rows decides;
    each number is asked for once.
    """

    def __init__(self, numbers: dict[str, Any], by_tokens: Any, by_rows: Any) -> None:
        rows: list[tuple[Any, ...]] = numbers["attention"]
        self.shapes = np.array([row[:2] for row in rows], dtype=np.int64).reshape(len(rows), 2)
        self.attention = np.array([row[2:] for row in rows], dtype=np.float64).reshape(len(rows), 6)
        self.window, self.chunked = numbers["window"], numbers["chunked"]
        self.decode_s, self.chunk_token_s = numbers["decode_s"], numbers["chunk_token_s"]
        self.chunk_s, self.serial_s = numbers["chunk_s"], numbers["serial_s"]
        self.request_s, self.prompt_tile = numbers["request_s"], numbers["prompt_tile"]
        self.eager_s, self.graphed = numbers["eager_s"], numbers["graphed"]
        self.lora_s, self.lora_adapter_s, self.lora_token_s = numbers.get("lora", (0.0, 0.0, 0.0))
        self.by_tokens, self.by_rows = by_tokens, by_rows
        self.tokens_s, self.rows_s = array("d", [-1.0]) * 64, array("d", [-1.0]) * 64

    def of_tokens(self, tokens: cython.longlong) -> cython.double:
        if tokens >= len(self.tokens_s):
            self.tokens_s = longer(self.tokens_s, tokens + 1)
        if self.tokens_s[tokens] < 0.0:
            self.tokens_s[tokens] = self.by_tokens(tokens)
        return self.tokens_s[tokens]

    def of_rows(self, rows: cython.longlong) -> cython.double:
        if rows >= len(self.rows_s):
            self.rows_s = longer(self.rows_s, rows + 1)
        if self.rows_s[rows] < 0.0:
            self.rows_s[rows] = self.by_rows(rows)
        return self.rows_s[rows]

    def reached(self, tokens: cython.longlong, window: cython.longlong) -> cython.longlong:
        """KV tokens that the first so many tokens of a sequence attend to, summed (mixers.Attention)."""
        whole: cython.longlong
        rest: cython.longlong
        if window == 0 or tokens <= window:
            return tokens * (tokens + 1) // 2
        whole = window * (window + 1) // 2
        if not self.chunked:
            return whole + (tokens - window) * window
        rest = tokens % window
        return tokens // window * whole + rest * (rest + 1) // 2

    def before(self, context: cython.longlong, window: cython.longlong) -> cython.longlong:
        """Of the KV tokens before a chunk those that it attends to (mixers.Attention)."""
        if window == 0 or (context < window and not self.chunked):
            return context
        return context % window if self.chunked else window

    def of_chunks(self, chunks: list) -> cython.double:
        """PhysicalStepTime._attention_prefill."""
        total: cython.double = 0.0
        most: cython.double
        new: cython.longlong
        context: cython.longlong
        window: cython.longlong
        layers: cython.longlong
        pairs: cython.longlong
        older: cython.longlong
        longest: cython.longlong = 0
        longest_new: cython.longlong = 0
        i: cython.Py_ssize_t
        kind: cython.Py_ssize_t
        chunk: tuple
        for i in range(len(chunks)):
            chunk = chunks[i]
            new, context = chunk[0], chunk[1]
            total += new * self.chunk_token_s
            longest, longest_new = max(longest, context), max(longest_new, new)
        total += len(chunks) * self.chunk_s + longest_new * self.serial_s
        for kind in range(self.shapes.shape[0]):
            layers, window = self.shapes[kind, 0], self.shapes[kind, 1]
            pairs = older = 0
            for i in range(len(chunks)):
                chunk = chunks[i]
                new, context = chunk[0], chunk[1]
                new = (new + self.prompt_tile - 1) // self.prompt_tile * self.prompt_tile
                pairs += self.reached(context + new, window) - self.reached(context, window)
                older += self.before(context, window)
            most = max(layers * pairs * self.attention[kind, 0], layers * older * self.attention[kind, 1])
            total += max(most, self.before(longest, window) * self.attention[kind, 5])
            total += layers * older * self.attention[kind, 2]
        return total

    def of_adapters(self, adapters: dict) -> cython.double:
        """PhysicalStepTime._lora."""
        tokens: cython.longlong = sum(adapters.values())
        return self.lora_s + len(adapters) * self.lora_adapter_s + tokens * self.lora_token_s

    def seconds(self, step: Step) -> cython.double:
        """PhysicalStepTime.seconds, its sums in the same order."""
        total: cython.double
        if not (step.chunks or step.decodes):
            return 0.0
        total = self.at(step, step.total_tokens)
        return total if step.total_tokens <= self.graphed or total > self.eager_s else self.eager_s

    def at(self, step: Step, tokens: cython.longlong) -> cython.double:
        """The same where so many tokens are computed, without what launches outside graphs take."""
        total: cython.double = 0.0
        decoding: cython.double
        requests: cython.longlong = step.decodes + len(step.chunks)
        seen: cython.longlong
        kind: cython.Py_ssize_t
        if step.chunks:
            total = self.of_chunks(step.chunks)
        if step.decodes:
            decoding = step.decodes * self.decode_s
            for kind in range(self.shapes.shape[0]):
                seen = step.windowed if self.shapes[kind, 1] else step.decode_context
                decoding += self.shapes[kind, 0] * seen * self.attention[kind, 4 if step.chunks else 3]
            total += decoding
        total += self.of_tokens(tokens) + self.of_rows(len(step.samplers)) + requests * self.request_s
        return total if step.adapters is None else total + self.of_adapters(step.adapters)


def longer(values: cython.double[::1], least: cython.Py_ssize_t) -> Any:
    """The same with room for twice as many, at least ``least``; new places hold -1."""
    grown = np.full(max(2 * len(values), least), -1.0)
    grown[: len(values)] = values
    return grown
