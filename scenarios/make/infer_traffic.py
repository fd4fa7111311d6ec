"""The traffic of the ``infer`` server's benchmark, pinned by a seed of Python's own generator.

Four of its five workloads; the fifth, ``baseline``, sends equal requests one by one, and draws nothing that
matters. The benchmark draws two requests more than it measures, sends those two one by one as a warm-up, and
gives the others the arrival times that they were drawn with. Prompts are English text of four characters a
nominal token, of which a tokenizer makes about 0.785 tokens.

``python -m servecast.scenarios.make.infer_traffic FOLDER`` writes the four traces, infer_WORKLOAD.jsonl.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
from cyclopts import App

from servecast.sim.traffic.traces import Trace

SEED = 42  # of the published runs
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


def draw(workload: str, *, seed: int = SEED, tokens_per_nominal: float = TOKENS_PER_NOMINAL) -> Trace:
    """The requests that the benchmark measures."""
    requests, count = WORKLOADS[workload]
    drawn = requests(WARMUP + count, random.Random(seed))[WARMUP:]
    times, prompts, outputs = zip(*drawn, strict=True)
    tokens = np.maximum(1, np.rint(np.array(prompts) * tokens_per_nominal)).astype(np.int64)
    return Trace(np.array(times), tokens, np.array(outputs, dtype=np.int64))


def timed_trace(trace: Trace) -> str:
    """As JSONL of vLLM's timed_trace, times in s. There are no hash ids: these servers share no prompts."""
    rows = zip(*(c.tolist() for c in (trace.times_s, trace.prompt_tokens, trace.output_tokens)), strict=True)
    names = ("timestamp", "input_length", "output_length")
    return "".join(json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in rows)


app = App(help="Write the traces of the infer server's benchmark.")


@app.default
def main(folder: Path) -> None:
    """Write infer_WORKLOAD.jsonl of each workload.

    Args:
        folder: where they are written.
    """
    for workload in WORKLOADS:
        (folder / f"infer_{workload}.jsonl").write_text(timed_trace(draw(workload)), encoding="utf-8")


if __name__ == "__main__":
    app()
