"""Writes a trace as vLLM replays it, and makes the trace of a simulated workload."""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import count
from pathlib import Path

import numpy as np

from servecast.sim.engine.request import Request
from servecast.sim.traffic.traces import HashIds, Trace

_BLOCK_TOKENS = 16  # of a trace that is made here


def write_timed_trace(trace: Trace, path: Path) -> None:
    """Write vLLM's timed_trace JSONL, times in seconds.

    vLLM builds the prompts from the hash ids alone, so where the trace has none each block gets its own.
    Replay with ``--timed-trace-chunk-hash-size`` set to the trace's ``block_tokens``.
    """
    fresh = count()
    with path.open("w", encoding="utf-8") as file:
        for row, time in enumerate(trace.times_s.tolist()):
            prompt = int(trace.prompt_tokens[row])
            if trace.hash_ids is None:
                ids = [next(fresh) for _ in range(-(-prompt // trace.block_tokens))]
            else:
                ids = list(trace.hash_ids[row])
            output = int(trace.output_tokens[row])
            record = {"timestamp": time, "input_length": prompt, "output_length": output, "hash_ids": ids}
            file.write(json.dumps(record) + "\n")


def from_requests(requests: Iterable[Request]) -> Trace:
    """The trace of a stream's requests, so that a live server can be sent the same traffic.

    Blocks get equal hash ids exactly where the requests' contents are equal up to the block's last token;
    what belongs to one request alone gets ids of its own.
    """
    known: dict[tuple[int, int], int] = {}
    fresh = count()
    hash_ids: HashIds = []
    requests = list(requests)
    for request in requests:
        parts, ids, part = request.content, [], 0
        for block in range(-(-request.prompt_tokens // _BLOCK_TOKENS)):
            last = min((block + 1) * _BLOCK_TOKENS, request.prompt_tokens)
            while part < len(parts) and parts[part][1] < last:
                part += 1
            if part < len(parts):
                key = (parts[part][0], last)
                if key not in known:
                    known[key] = next(fresh)
                ids.append(known[key])
            else:
                ids.append(next(fresh))
        hash_ids.append(tuple(ids))
    return Trace(
        np.array([r.arrival_s for r in requests], dtype=np.float64),
        np.array([r.prompt_tokens for r in requests], dtype=np.int64),
        np.array([r.output_tokens for r in requests], dtype=np.int64),
        hash_ids,
        _BLOCK_TOKENS,
    )
