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
        self.pair_s, self.kv_read_s = numbers["pair_s"], numbers["kv_read_s"]
        self.decode_kv_s, self.mixed_decode_kv_s = numbers["decode_kv_s"], numbers["mixed_decode_kv_s"]
        self.decode_s, self.block_s = numbers["decode_s"], numbers["block_s"]
        self.chunk_token_s, self.request_s = numbers["chunk_token_s"], numbers["request_s"]
        self.eager_s, self.graphed = numbers["eager_s"], numbers["graphed"]
        self.prompt_tile, self.layers = numbers["prompt_tile"], numbers["layers"]
        self.sliding_layers = numbers["sliding_layers"]
        self.sliding_window = numbers["sliding_window"]
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

    def kv_token_layers(self, context: cython.longlong, sequences: cython.longlong) -> cython.longlong:
        """ModelShape.kv_token_layers."""
        seen: cython.longlong
        if not self.sliding_layers:
            return self.layers * context
        seen = min(context, sequences * self.sliding_window)
        return (self.layers - self.sliding_layers) * context + self.sliding_layers * seen

    def attention_pairs(self, tokens: cython.longlong, context: cython.longlong) -> cython.double:
        """ModelShape.attention_pairs."""
        free: cython.longlong
        seen: cython.double
        pairs: cython.double = (self.layers - self.sliding_layers) * tokens * (context + 0.5 * (tokens + 1))
        if self.sliding_layers:
            free = min(tokens, self.sliding_window - context)
            if free < 0:
                free = 0
            seen = free * (context + 0.5 * (free + 1)) + (tokens - free) * self.sliding_window
            pairs += self.sliding_layers * seen
        return pairs

    def seconds(self, step: Step) -> cython.double:
        """PhysicalStepTime.seconds, its sums in the same order."""
        total: cython.double = 0.0
        tokens: cython.longlong = step.decodes
        requests: cython.longlong = step.decodes
        pairs: cython.double = 0.0
        moved: cython.double = 0.0
        older: cython.longlong = 0
        longest: cython.longlong = 0
        new: cython.longlong
        context: cython.longlong
        i: cython.Py_ssize_t
        chunk: tuple
        if step.chunks:
            requests += len(step.chunks)
            for i in range(len(step.chunks)):
                chunk = step.chunks[i]
                new = chunk[0]
                context = chunk[1]
                tokens += new
                if self.prompt_tile:
                    moved += new * self.chunk_token_s
                    new = (new + self.prompt_tile - 1) // self.prompt_tile * self.prompt_tile
                pairs += self.attention_pairs(new, context)
                if context:
                    older += self.kv_token_layers(context, 1)
                    longest = max(longest, context)
            total = moved + max(pairs * self.pair_s, older * self.kv_read_s, longest * self.block_s)
        elif not step.decodes:
            return 0.0
        if step.decodes:
            total += (
                self.kv_token_layers(step.decode_context, step.decodes)
                * (self.mixed_decode_kv_s if step.chunks else self.decode_kv_s)
                + step.decodes * self.decode_s
            )
        total += self.of_tokens(tokens) + self.of_rows(len(step.samplers)) + requests * self.request_s
        return total if tokens <= self.graphed or total > self.eager_s else self.eager_s


def longer(values: cython.double[::1], least: cython.Py_ssize_t) -> Any:
    """The same with room for twice as many, at least ``least``; new places hold -1."""
    grown = np.full(max(2 * len(values), least), -1.0)
    grown[: len(values)] = values
    return grown
