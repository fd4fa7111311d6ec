"""inference-perf's report of a stage or of the whole run: statistics alone."""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import Field, model_validator

from servecast.sim.inputs.schema import invalid
from servecast.validate.readers.reading import Part, Requests, Slots, Statistics

NEAR_ZERO = 0.1  # a gap below this share of the mean is that of an empty line
_MANY_TOKENS = 50  # from here on half of the gaps are those of empty lines, but for 1 %
_AGREES = 0.25  # how far the sum of the gaps may be from the latency after the first token


class _Latency(Part):
    request_latency: Statistics | None = None
    time_to_first_token: Statistics | None = None
    time_per_output_token: Statistics | None = None
    inter_token_latency: Statistics | None = None


class _Throughput(Part):
    output_tokens_per_sec: float
    total_tokens_per_sec: float
    requests_per_sec: float


class _Lengths(Part):
    mean: float | None = None  # null of no request


class _Successes(Part):
    count: Requests
    latency: _Latency
    throughput: _Throughput
    output_len: _Lengths | None = None
    prompt_len: _Lengths | None = None  # until 0.4
    prompt_tokens: _Lengths | None = None

    @model_validator(mode="after")
    def _summed_up(self) -> _Successes:
        if self.count and (self.latency.request_latency is None or math.isnan(self.tokens)):
            raise invalid("request_latency or output_len is missing", "Save it again.")
        return self

    @property
    def tokens(self) -> float:
        """Mean output tokens of a request, NaN of none."""
        mean = None if self.output_len is None else self.output_len.mean
        return math.nan if mean is None else mean


class _Failures(Part):
    count: Requests


class Load(Part):
    count: Requests
    requested_rate: Annotated[float, Field(ge=0)] | None = None
    concurrency: Slots | None = None


class Stage(Part):
    load_summary: Load
    successes: _Successes
    failures: _Failures

    @property
    def halved(self) -> bool:
        """Whether an old version wrote it, most gaps are about zero, and all 2 n + 1 of them add up to the
        latency after the first token (see ``reported``)."""
        done, latency = self.successes, self.successes.latency
        e2el, ttft = latency.request_latency, latency.time_to_first_token
        tpot, itl = latency.time_per_output_token, latency.inter_token_latency
        old = done.prompt_len is not None and done.prompt_tokens is None
        if not old or e2el is None or ttft is None or tpot is None or itl is None or itl.median is None:
            return False
        gaps, after_first = tpot.mean * (2 * done.tokens + 1), e2el.mean - ttft.mean
        return itl.median < NEAR_ZERO * itl.mean and abs(gaps - after_first) < _AGREES * after_first

    def reported(self) -> dict[str, float]:
        """The tool's figures, the halved ones put right.

        Of 2 n + 1 gaps between 2 (n + 1) timestamps (n tokens and the end marker), n - 1 lie between
        tokens and the others are about zero: means grow by (2 n + 1) / (n - 1), a reported p75 is
        about the p50 and a p95 the p90, and no p95 or p99 can be told.
        """
        done, latency = self.successes, self.successes.latency
        found = {
            "completed": float(done.count),
            "failed": float(self.failures.count),
            "request_throughput": done.throughput.requests_per_sec,
            "output_throughput": done.throughput.output_tokens_per_sec,
            "total_token_throughput": done.throughput.total_tokens_per_sec,
            **_named("e2el", latency.request_latency),
            **_named("ttft", latency.time_to_first_token),
        }
        prompt = done.prompt_tokens or done.prompt_len
        for key, lengths in (("total_output_tokens", done.output_len), ("total_input_tokens", prompt)):
            if lengths is not None and lengths.mean is not None:
                found[key] = lengths.mean * done.count
        tpot, itl = _named("tpot", latency.time_per_output_token), _named("itl", latency.inter_token_latency)
        if not self.halved:
            return found | tpot | itl
        if done.tokens <= 1:
            return found
        factor = (2 * done.tokens + 1) / (done.tokens - 1)
        found |= {key: value * factor for key, value in tpot.items()}
        found["mean_itl_ms"] = itl["mean_itl_ms"] * factor
        if done.tokens >= _MANY_TOKENS:
            ranks = {"median_itl_ms": "p75_itl_ms", "p90_itl_ms": "p95_itl_ms"}
            found |= {key: itl[theirs] for key, theirs in ranks.items() if theirs in itl}
        return found


def _named(metric: str, statistics: Statistics | None) -> dict[str, float]:
    return {} if statistics is None else statistics.named(metric)
