"""Which steps to measure, in order of value: what bends the step time first, then what lies between."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import product

STEPS_AHEAD = 64  # tokens of room that a decode gets for the steps it is measured in, at least


@dataclass(frozen=True, slots=True)
class Limits:
    """What one engine can do.

    Attributes:
        max_num_seqs, max_num_batched_tokens, max_model_len: as the flags. kv_tokens: KV tokens of the pool.
        block_size: KV tokens of a block.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    kv_tokens: int
    block_size: int


@dataclass(frozen=True, slots=True)
class Case:
    """One composition of a step, to be measured several times.

    Attributes:
        region: decode, decode_ragged, prefill, prefill_context, mixed or long_run.
        contexts: KV tokens of each decode at the start. chunks: (tokens, context) of each prompt chunk.
        traffic: for long_run, (prompt, output) tokens of requests that are all there at the start, of which
            ``running`` run at a time, with real prefill.
    """

    region: str
    contexts: tuple[int, ...] = ()
    chunks: tuple[tuple[int, int], ...] = ()
    traffic: tuple[tuple[int, int], ...] = field(default=(), repr=False)
    running: int = 0

    @property
    def key(self) -> str:
        """Unique in a grid, and readable: "mixed/64x1024/512+0"."""
        parts = [self.region]
        if self.contexts:
            parts.append(f"{len(self.contexts)}x{sum(self.contexts) // len(self.contexts)}")
        if self.chunks:
            tokens, context = self.chunks[0]
            times = f"{len(self.chunks)}x" if len(self.chunks) > 1 else ""
            parts.append(f"{times}{tokens}+{context}")
        if self.traffic:
            parts.append(f"{len(self.traffic)}-requests-{self.running}-running")
        return "/".join(parts)

    def too_much(self, limits: Limits) -> str | None:
        """Why this case does not fit an engine with these limits; None if it does."""
        tokens = len(self.contexts) + sum(tokens for tokens, _ in self.chunks)
        seqs = max(len(self.contexts) + len(self.chunks), self.running)
        longest = [context + STEPS_AHEAD for context in self.contexts]
        longest += [tokens + context for tokens, context in self.chunks]
        longest += [prompt + output for prompt, output in self.traffic]
        # two rounds of chunks hold blocks at a time: with async scheduling one is in flight
        held = longest[: len(self.contexts)] + 2 * longest[len(self.contexts) :]
        if self.traffic:
            held = sorted(longest)[-self.running :]
        blocks = sum(-(-length // limits.block_size) for length in held)
        if seqs > limits.max_num_seqs:
            return f"{seqs} requests at a time, max_num_seqs is {limits.max_num_seqs}"
        if tokens > limits.max_num_batched_tokens:
            return f"{tokens} tokens a step, max_num_batched_tokens is {limits.max_num_batched_tokens}"
        if max(longest) >= limits.max_model_len:
            return f"{max(longest)} tokens in a request, max_model_len is {limits.max_model_len}"
        if blocks * limits.block_size > 0.95 * limits.kv_tokens:
            return f"{blocks * limits.block_size} KV tokens, the pool has {limits.kv_tokens}"
        return None


BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)  # CUDA-graph sizes, as far as those go
BETWEEN = (3, 6, 12, 20, 44, 90, 180, 300, 400, 500, 640, 896)
LARGE = (768, 1024)  # batches beyond CUDA graphs
CONTEXTS = (128, 512, 1024, 2048, 4096, 8192, 16384)
LENGTHS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
LENGTHS_BETWEEN = (24, 48, 96, 192, 384, 768, 1536, 3072, 6144)


def grid(limits: Limits) -> tuple[list[Case], dict[str, str]]:
    """The cases that these limits allow, most valuable first, and case -> reason for those they do not.

    First a coarse cross: decodes over the batch at one context and over the context at two batches,
    prefill over the length, prefill over the context, mixed steps, and two long runs, one of as many requests
    as may run. Then the full products, and sizes between those that CUDA graphs are captured for. Sizes are
    cut to the limits, so that the largest that fits is always measured.
    """
    rng = random.Random(0)
    cases: dict[str, Case] = {}
    skipped: dict[str, str] = {}
    for case in (*_coarse(limits, rng), *_fine(limits, rng)):
        reason = case.too_much(limits)
        if reason is None:
            cases.setdefault(case.key, case)
        else:
            skipped.setdefault(case.key, reason)
    return list(cases.values()), skipped


def _coarse(limits: Limits, rng: random.Random) -> Iterator[Case]:
    batches = _cut((1, 8, 32, 64, 128, 256, 512), limits.max_num_seqs)
    contexts = _cut((128, 1024, 4096, 16384), limits.max_model_len - STEPS_AHEAD - 1)
    lengths = _cut((16, 128, 512, 2048, 8192), _longest_chunk(limits))
    usual = min(1024, contexts[-1])
    for batch in batches:
        yield _decode(batch, _most_context(limits, batch, usual))
    for batch in LARGE:
        if batch <= limits.max_num_seqs:
            yield _decode(batch, _most_context(limits, batch, min(512, usual)))
    for length in lengths:
        yield _prefill(length, 0)
    for batch, context in product((1, min(64, batches[-1])), contexts):
        yield _decode(batch, _most_context(limits, batch, context))
    for length, context in product((min(512, lengths[-1]),), contexts[1:]):
        yield _prefill(length, min(context, limits.max_model_len - length - 1))
    for batch, length in product((8, min(64, batches[-1])), (128, min(512, lengths[-1]))):
        yield _mixed(batch, usual, length, 0, limits)
    yield _ragged(min(64, batches[-1]), usual, limits, rng)
    yield _long_run(limits, rng, running=min(32, limits.max_num_seqs))
    yield _long_run(limits, rng, running=limits.max_num_seqs)


def _fine(limits: Limits, rng: random.Random) -> Iterator[Case]:
    batches = _cut(BATCHES, limits.max_num_seqs)
    contexts = _cut(CONTEXTS, limits.max_model_len - STEPS_AHEAD - 1)
    lengths = _cut(LENGTHS, _longest_chunk(limits))
    usual = min(1024, contexts[-1])
    for length in (*lengths, *(n for n in LENGTHS_BETWEEN if n < lengths[-1])):
        yield _prefill(length, 0)
    for batch in BETWEEN:
        yield _decode(batch, _most_context(limits, batch, usual))
    for batch, context in product(batches[::2], contexts):
        yield _decode(batch, _most_context(limits, batch, context))
    for batch, context in product(batches[2::2], contexts[1::2]):
        yield _ragged(batch, _most_context(limits, batch, context) // 2 + 1, limits, rng)
    for batch, length, context in product(batches[1::2], lengths[1::2], (0, contexts[-1] // 2)):
        yield _mixed(batch, usual, length, context, limits)
    for length, context in product(lengths[::2], contexts[1::2]):
        yield _prefill(length, min(context, limits.max_model_len - length - 1))
    for count, length in product((2, 4, 16), lengths[::2]):
        yield Case("prefill", chunks=((length, 0),) * count)
    yield _long_run(limits, rng, running=min(8, limits.max_num_seqs))


def _cut(sizes: tuple[int, ...], limit: int) -> tuple[int, ...]:
    """The sizes up to the limit, and the limit itself in place of the first beyond it."""
    below = tuple(size for size in sizes if size <= limit)
    return below if len(below) == len(sizes) or limit in below else (*below, limit)


def _longest_chunk(limits: Limits) -> int:
    return min(limits.max_num_batched_tokens, limits.max_model_len - 1)


def _most_context(limits: Limits, batch: int, context: int) -> int:
    """That context, or the longest that so many requests find room for, in whole blocks less one token."""
    room = int(0.95 * limits.kv_tokens) // batch // limits.block_size * limits.block_size - STEPS_AHEAD - 1
    return max(1, min(context, room))


def _decode(batch: int, context: int) -> Case:
    return Case("decode", contexts=(context,) * batch)


def _prefill(length: int, context: int) -> Case:
    return Case("prefill_context" if context else "prefill", chunks=((length, context),))


def _mixed(batch: int, context: int, length: int, chunk_context: int, limits: Limits) -> Case:
    """With room for the chunk: one request less, or a shorter chunk, at the limits."""
    batch = min(batch, limits.max_num_seqs - 1)
    length = min(length, limits.max_num_batched_tokens - batch)
    chunk_context = min(chunk_context, limits.max_model_len - length - 1)
    return Case("mixed", contexts=(context,) * batch, chunks=((length, chunk_context),))


def _ragged(batch: int, mean: int, limits: Limits, rng: random.Random) -> Case:
    """Contexts from an exponential distribution: most are short, a few are long."""
    longest = limits.max_model_len - STEPS_AHEAD - 1
    draw: Callable[[], int] = lambda: max(1, min(longest, round(rng.expovariate(1 / mean))))  # noqa: E731
    return Case("decode_ragged", contexts=tuple(draw() for _ in range(batch)))


def _long_run(limits: Limits, rng: random.Random, *, running: int) -> Case:
    """Requests of any length up to a quarter of what one may have, three times as many as run at a time."""
    most = min(limits.max_model_len // 4, int(0.9 * limits.kv_tokens) // running // 2, 2048)
    traffic = tuple(
        (round(most ** rng.uniform(0.4, 1.0)), round(min(most, 256) ** rng.uniform(0.4, 1.0)))
        for _ in range(3 * running)
    )
    return Case("long_run", traffic=traffic, running=running)
