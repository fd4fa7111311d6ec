"""What steps cost on a GPU, in numbers that ``servecast.sim.hardware.step_time.physical`` fills in."""

from __future__ import annotations

from array import array
from typing import Any

import cython
import numpy as np

from servecast.sim.engine.step import NOBODY, Step


class StepCosts:
    """What steps cost, in the numbers of ``servecast.sim.hardware.step_time.physical``, which fills it.

    by_tokens, by_rows, by_uniform: called for the seconds that a number of computed tokens, of sampled rows,
    or of tokens of requests that have equally many of them decides; each is asked for once.
    first, later: of a drafter's first and of each further pass; None without one.
    """

    def __init__(self, numbers: dict[str, Any], by_tokens: Any, by_rows: Any, by_uniform: Any) -> None:
        rows: list[tuple[Any, ...]] = numbers["attention"]
        self.shapes = np.array([row[:2] for row in rows], dtype=np.int64).reshape(len(rows), 2)
        self.attention = np.array([row[2:] for row in rows], dtype=np.float64).reshape(len(rows), 11)
        self.window, self.chunked = numbers["window"], numbers["chunked"]
        self.decode_s, self.chunk_token_s = numbers["decode_s"], numbers["chunk_token_s"]
        self.chunk_s, self.serial_s = numbers["chunk_s"], numbers["serial_s"]
        self.request_s, self.prompt_tile = numbers["request_s"], numbers["prompt_tile"]
        self.eager_s, self.graphed = numbers["eager_s"], numbers["graphed"]
        self.lora_s, self.lora_adapter_s, self.lora_token_s = numbers["lora"]
        self.by_tokens, self.by_rows, self.by_uniform = by_tokens, by_rows, by_uniform
        self.slots = numbers["slots"]
        self.by_exchanged = numbers.get("exchange")
        self.exchanges_decodes = numbers.get("exchanges_decodes", True)
        self.exchanged_s: dict[int, float] = {}
        self.least_tokens, self.least_rows, self.bandwidth = numbers["least"]
        self.least_tokens_s, self.read = array("d", [-1.0]) * 64, array("d", [0.0]) * 64
        self.least_rows_s, self.read_rows = array("d", [-1.0]) * 64, array("d", [0.0]) * 64
        self.uniform_s: dict[int, float] = {}
        self.drafting, self.skips, self.infills, self.at_once = False, False, False, False
        self.step_s = self.lookup_request_s = self.lookup_token_s = 0.0
        self.first = self.later = None
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

    def of_exchange(self, chunks: list, decodes: cython.longlong) -> cython.double:
        """ContextExchange.tokens, and their seconds."""
        tokens: cython.longlong = decodes
        seen: cython.bint = decodes > 0
        i: cython.Py_ssize_t
        chunk: tuple
        if not self.exchanges_decodes:
            for i in range(len(chunks)):
                chunk = chunks[i]
                tokens += cython.cast(cython.longlong, chunk[0])
                seen = seen or cython.cast(cython.longlong, chunk[1]) > 0
        if not seen:
            return 0.0
        if tokens not in self.exchanged_s:
            self.exchanged_s[tokens] = self.by_exchanged(tokens)
        return self.exchanged_s[tokens]

    def of_adapters(self, adapters: dict) -> cython.double:
        """PhysicalStepTime._lora."""
        tokens: cython.longlong = sum(adapters.values())
        return self.lora_s + len(adapters) * self.lora_adapter_s + tokens * self.lora_token_s

    def with_drafts(self, numbers: dict[str, Any], first: StepCosts | None, later: StepCosts | None) -> Any:
        """The same with what drafting takes (``step_time.speculative``); None, None: drafts are looked up."""
        self.drafting, self.first, self.later = True, first, later
        self.skips, self.infills = numbers["skips"], numbers["infills"]
        self.at_once = numbers["at_once"]
        self.step_s, self.lookup_request_s = numbers["step_s"], numbers["request_s"]
        self.lookup_token_s = numbers["token_s"]
        return self

    def of_uniform(self, tokens: cython.longlong, requests: cython.longlong) -> cython.double:
        """Of requests that have equally many tokens, drafts among them."""
        key: cython.longlong = tokens * 1048576 + requests
        if key not in self.uniform_s:
            self.uniform_s[key] = self.by_uniform(tokens, requests)
        return self.uniform_s[key]

    def of_draft(self, step: Step) -> cython.double:
        """SpeculativeStepTime.drafting, its sums in the same order."""
        requests: cython.longlong = step.decodes + len(step.chunks)
        context: cython.longlong = step.decode_context
        length: cython.longlong = step.draft_length
        windowed: cython.longlong
        total: cython.double
        chunk: tuple
        i: cython.Py_ssize_t
        first: StepCosts
        later: StepCosts
        for i in range(len(step.chunks)):
            chunk = step.chunks[i]
            context += cython.cast(cython.longlong, chunk[0]) + cython.cast(cython.longlong, chunk[1])
        if self.first is None:
            return self.step_s + requests * self.lookup_request_s + context * self.lookup_token_s
        if self.skips and not step.drafters:
            length = 0
        first, later = self.first, self.later
        if self.infills:
            windowed = min(context, requests * first.window)
            return first.of(requests, NOBODY, requests, 0, context, windowed, length * requests, 0.0)
        total = first.of(
            step.total_tokens,
            step.chunks,
            step.decodes,
            step.drafts,
            step.decode_context,
            min(step.decode_context, step.decodes * first.window),
            requests * length if self.at_once else requests,
            0.0,
        )
        if length > 1 and not self.at_once:
            windowed = min(context, requests * later.window)
            total += (length - 1) * later.of(requests, NOBODY, requests, 0, context, windowed, requests, 0.0)
        return total

    def seconds(self, step: Step) -> cython.double:
        """PhysicalStepTime.seconds, its sums in the same order, and what drafting takes."""
        total: cython.double = self.of(
            step.total_tokens,
            step.chunks,
            step.decodes,
            step.drafts,
            step.decode_context,
            step.windowed,
            len(step.samplers) + step.drafts,
            0.0 if step.adapters is None else self.of_adapters(step.adapters),
        )
        if self.drafting and (step.decodes or step.chunks):
            total = total + self.of_draft(step)
        return total

    def of(
        self,
        tokens: cython.longlong,
        chunks: list,
        decodes: cython.longlong,
        drafts: cython.longlong,
        context: cython.longlong,
        windowed: cython.longlong,
        rows: cython.longlong,
        adapters_s: cython.double,
    ) -> cython.double:
        """Of a step: its tokens, prompt chunks, decodes and their drafts, KV tokens that these read, rows of
        logits, and seconds of its adapters."""
        total: cython.double
        requests: cython.longlong = decodes + len(chunks)
        tokens += self.slots * requests
        if not requests:
            return 0.0
        total = self.attending(chunks, decodes, drafts, context, windowed)
        if tokens > requests and not chunks:
            total += self.of_uniform(tokens, requests) + self.of_rows(rows) + requests * self.request_s
        else:
            total += self.of_tokens(tokens) + self.of_rows(rows) + requests * self.request_s
        total += adapters_s
        if self.by_exchanged is not None:
            total += self.of_exchange(chunks, decodes)
        return total if tokens <= self.graphed or total > self.eager_s else self.eager_s

    def attending(
        self,
        chunks: list,
        decodes: cython.longlong,
        drafts: cython.longlong,
        context: cython.longlong,
        windowed: cython.longlong,
    ) -> cython.double:
        """Of attention in a step; see ``of``."""
        total: cython.double = 0.0
        decoding: cython.double
        queries: cython.double = 1.0
        each_s: cython.double
        seen: cython.longlong
        kind: cython.Py_ssize_t
        if chunks:
            total = self.of_chunks(chunks)
        if drafts:
            queries = 1.0 + cython.cast(cython.double, drafts) / decodes
        if decodes:
            decoding = decodes * self.decode_s
            for kind in range(self.shapes.shape[0]):
                seen = windowed if self.shapes[kind, 1] else context
                if queries > 1.0:
                    each_s = max(self.attention[kind, 7], queries) * self.attention[kind, 6]
                    each_s = max(self.attention[kind, 1], each_s)
                else:
                    each_s = self.attention[kind, 4 if chunks else 3]
                decoding += self.shapes[kind, 0] * seen * each_s
            total += decoding
        return total

    def least(self, step: Step) -> cython.double:
        """PhysicalStepTime.roofline_seconds, its sums in the same order."""
        tokens: cython.longlong = step.total_tokens
        rows: cython.longlong = len(step.samplers) + step.drafts
        compute: cython.double
        memory: cython.double
        queries: cython.double = 1.0
        new: cython.longlong
        context: cython.longlong
        layers: cython.longlong
        window: cython.longlong
        seen: cython.longlong
        kind: cython.Py_ssize_t
        i: cython.Py_ssize_t
        chunk: tuple
        if tokens >= len(self.read):
            self.least_tokens_s, self.read = (
                longer(self.least_tokens_s, tokens + 1),
                longer(self.read, tokens + 1),
            )
        if rows >= len(self.read_rows):
            self.least_rows_s, self.read_rows = (
                longer(self.least_rows_s, rows + 1),
                longer(self.read_rows, rows + 1),
            )
        if self.least_tokens_s[tokens] < 0.0:
            self.least_tokens_s[tokens], self.read[tokens] = self.least_tokens(tokens)
        if self.least_rows_s[rows] < 0.0:
            self.least_rows_s[rows], self.read_rows[rows] = self.least_rows(rows)
        compute = self.least_tokens_s[tokens] + self.least_rows_s[rows]
        memory = (self.read[tokens] + self.read_rows[rows]) / self.bandwidth
        if step.drafts:
            queries = 1.0 + cython.cast(cython.double, step.drafts) / step.decodes
        for kind in range(self.shapes.shape[0]):
            layers, window = self.shapes[kind, 0], self.shapes[kind, 1]
            seen = step.windowed if window else step.decode_context
            compute += layers * seen * self.attention[kind, 9] * queries
            memory += layers * seen * self.attention[kind, 10]
            for i in range(len(step.chunks)):
                chunk = step.chunks[i]
                new, context = chunk[0], chunk[1]
                seen = self.reached(context + new, window) - self.reached(context, window)
                compute += layers * seen * self.attention[kind, 8]
                memory += layers * self.before(context, window) * self.attention[kind, 10]
        return max(compute, memory)

    def at(self, step: Step, tokens: cython.longlong) -> cython.double:
        """The same of one of several engine cores, where so many tokens are computed, without what launches
        outside graphs take, and without drafting."""
        requests: cython.longlong = step.decodes + len(step.chunks)
        rows: cython.longlong = len(step.samplers) + step.drafts
        total: cython.double = self.attending(
            step.chunks, step.decodes, step.drafts, step.decode_context, step.windowed
        )
        total += self.of_tokens(tokens) + self.of_rows(rows) + requests * self.request_s
        if step.adapters is not None:
            total += self.of_adapters(step.adapters)
        if self.by_exchanged is not None:
            total += self.of_exchange(step.chunks, step.decodes)
        return total

    def pass_at(
        self, step: Step, tokens: cython.longlong, rows: cython.longlong, later: cython.bint
    ) -> cython.double:
        """A pass of a drafter behind a step of one of several engine cores: the first over its tokens, each
        later one over a token of each request."""
        requests: cython.longlong = step.decodes + len(step.chunks)
        context: cython.longlong = step.decode_context
        windowed: cython.longlong = min(context, step.decodes * self.window)
        total: cython.double
        i: cython.Py_ssize_t
        chunk: tuple
        if not later:
            total = self.attending(step.chunks, step.decodes, step.drafts, context, windowed)
            return total + self.of_tokens(tokens) + self.of_rows(rows)
        for i in range(len(step.chunks)):
            chunk = step.chunks[i]
            context += cython.cast(cython.longlong, chunk[0]) + cython.cast(cython.longlong, chunk[1])
        windowed = min(context, requests * self.window)
        total = self.attending(NOBODY, requests, 0, context, windowed)
        return total + self.of_tokens(tokens) + self.of_rows(rows)


def longer(values: cython.double[::1], least: cython.Py_ssize_t) -> Any:
    """The same with room for twice as many, at least ``least``; new places hold -1."""
    grown = np.full(max(2 * len(values), least), -1.0)
    grown[: len(values)] = values
    return grown
