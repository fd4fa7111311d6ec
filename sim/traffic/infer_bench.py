"""The traffic of the ``infer`` server's benchmark, pinned by a seed of Python's own generator.

Four of its five workloads; the fifth, ``baseline``, sends equal requests one by one, and draws nothing that
matters. The benchmark draws two requests more than it measures, sends those two one by one as a warm-up, and
gives the others the arrival times that they were drawn with. Prompts are English text of four characters a
nominal token, of which a tokenizer makes about 0.785 tokens.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Literal

import numpy as np

from servecast.sim.inputs.schema import Amount, Model, Positive
from servecast.sim.traffic.traces import Trace

WARMUP = 2
TOKENS_PER_NOMINAL = 0.785  # 0.77 to 0.8 in the server's counts

Drawn = tuple[float, int, int]  # arrival in s, nominal prompt tokens, max_tokens


def _continuous_batching(count: int, rng: random.Random) -> list[Drawn]:
    return [(i / 4.0, *_lengths(rng, (64, 512), (64, 256))) for i in range(count)]


def _paged_attention(count: int, rng: random.Random) -> list[Drawn]:
    return [(0.0, *_lengths(rng, (128, 384), (128, 256))) for _ in range(count)]


def _chunked_prefill(count: int, rng: random.Random) -> list[Drawn]:
    arrivals, now = [], 0.0
    for _ in range(count):
        arrivals.append(now)
        now += rng.expovariate(6.0)
    return [
        (arrival, *_lengths(rng, (1024, 2048) if rng.random() < 0.75 else (64, 128), (64, 256)))
        for arrival in arrivals
    ]


def _prefix_caching(count: int, rng: random.Random) -> list[Drawn]:
    drawn = []
    for i in range(count):
        suffix = rng.randint(32, 128)
        _prompt_seed(rng)
        drawn.append((i / 8.0, 1024 + suffix, 256))
    return drawn


def _lengths(rng: random.Random, prompt: tuple[int, int], output: tuple[int, int]) -> tuple[int, int]:
    lengths = rng.randint(*prompt), rng.randint(*output)
    _prompt_seed(rng)
    return lengths


def _prompt_seed(rng: random.Random) -> None:
    """The benchmark draws a seed for each prompt's words."""
    rng.randint(0, 2**31)


WORKLOADS: dict[str, tuple[Callable[[int, random.Random], list[Drawn]], int]] = {  # and its requests
    "continuous_batching": (_continuous_batching, 32),
    "paged_attention": (_paged_attention, 48),
    "chunked_prefill": (_chunked_prefill, 48),
    "prefix_caching": (_prefix_caching, 48),
}


class InferBench(Model):
    """One workload of that benchmark as a trace. ``seed`` is its own (the published runs have 42),
    independent of the scenario's; ``request_rate`` stretches the arrivals to that mean rate."""

    format: Literal["infer_bench"]
    """The ``infer`` server's benchmark, drawn by its own recipe."""
    workload: Literal["continuous_batching", "paged_attention", "chunked_prefill", "prefix_caching"]
    """Which of its workloads. ``baseline`` needs no trace, its requests are equal."""
    seed: Amount = 42
    """Seed of the recipe, 42 in the published runs; the scenario's seed does not change it."""
    tokens_per_nominal: Positive = TOKENS_PER_NOMINAL
    """Tokens of a prompt for each one that was asked for."""
    request_rate: Positive | None = None
    """Stretch the times to this mean rate."""

    @property
    def path(self) -> str:
        """What messages call it."""
        return f"infer_bench {self.workload}"

    def read(self, num_requests: int | None = None) -> Trace:
        """The trace, of as many requests as the benchmark measures unless more or fewer are wanted."""
        draw, count = WORKLOADS[self.workload]
        drawn = draw(WARMUP + (num_requests or count), random.Random(self.seed))[WARMUP:]
        times, prompts, outputs = zip(*drawn, strict=True)
        tokens = np.maximum(1, np.rint(np.array(prompts) * self.tokens_per_nominal)).astype(np.int64)
        return Trace(np.array(times), tokens, np.array(outputs, dtype=np.int64))
