"""inference-perf's report of a stage or of the whole run: statistics alone."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from servecast.sim.inputs.schema import invalid
from servecast.validate.readers.reading import Part, Requests, Slots, Statistics, at

NEAR_ZERO = 0.1  # a gap below this share of the mean is that of an empty line
_MANY_TOKENS = 50  # from here on half of the gaps are those of empty lines, but for 1 %
_AGREES = 0.25  # how far the sum of the gaps may be from the latency after the first token


class Load(Part):
    count: Requests
    requested_rate: Annotated[float, Field(ge=0)] | None = None
    concurrency: Slots | None = None


class Stage(Part):
    load_summary: Load
    count: Requests = at("successes.count", default=...)
    failed: Requests = at("failures.count", default=...)
    e2el: Statistics | None = at("successes.latency.request_latency")
    ttft: Statistics | None = at("successes.latency.time_to_first_token")
    tpot: Statistics | None = at("successes.latency.time_per_output_token")
    itl: Statistics | None = at("successes.latency.inter_token_latency")
    output_tokens_per_sec: float = at("successes.throughput.output_tokens_per_sec", default=...)
    total_tokens_per_sec: float = at("successes.throughput.total_tokens_per_sec", default=...)
    requests_per_sec: float = at("successes.throughput.requests_per_sec", default=...)
    output_tokens: float | None = at("successes.output_len.mean")  # of a request; None of no request
    prompt_tokens: float | None = at("successes.prompt_tokens.mean", "successes.prompt_len.mean")
    today: Any = at("successes.prompt_tokens")
    until_0_4: Any = at("successes.prompt_len")

    @model_validator(mode="after")
    def _summed_up(self) -> Stage:
        if self.count and (self.e2el is None or self.output_tokens is None):
            raise invalid("request_latency or output_len is missing", "Save it again.")
        return self

    @property
    def halved(self) -> bool:
        """Whether an old version wrote it, most gaps are about zero, and all 2 n + 1 of them add up to the
        latency after the first token (see ``reported``)."""
        e2el, ttft, tpot, itl, tokens = self.e2el, self.ttft, self.tpot, self.itl, self.output_tokens
        old = self.until_0_4 is not None and self.today is None
        if not old or e2el is None or ttft is None or tpot is None or itl is None or itl.median is None:
            return False
        if tokens is None:
            return False
        gaps, after_first = tpot.mean * (2 * tokens + 1), e2el.mean - ttft.mean
        return itl.median < NEAR_ZERO * itl.mean and abs(gaps - after_first) < _AGREES * after_first

    def reported(self) -> dict[str, float]:
        """The tool's figures, the halved ones put right.

        Of 2 n + 1 gaps between 2 (n + 1) timestamps (n tokens and the end marker), n - 1 lie between
        tokens and the others are about zero: means grow by (2 n + 1) / (n - 1), a reported p75 is
        about the p50 and a p95 the p90, and no p95 or p99 can be told.
        """
        found = {
            "completed": float(self.count),
            "failed": float(self.failed),
            "request_throughput": self.requests_per_sec,
            "output_throughput": self.output_tokens_per_sec,
            "total_token_throughput": self.total_tokens_per_sec,
            **_named("e2el", self.e2el),
            **_named("ttft", self.ttft),
        }
        means = {"total_output_tokens": self.output_tokens, "total_input_tokens": self.prompt_tokens}
        found |= {key: mean * self.count for key, mean in means.items() if mean is not None}
        tpot, itl, tokens = _named("tpot", self.tpot), _named("itl", self.itl), self.output_tokens
        if not self.halved:
            return found | tpot | itl
        if tokens is None or tokens <= 1:
            return found
        factor = (2 * tokens + 1) / (tokens - 1)
        found |= {key: value * factor for key, value in tpot.items()}
        found["mean_itl_ms"] = itl["mean_itl_ms"] * factor
        if tokens >= _MANY_TOKENS:
            ranks = {"median_itl_ms": "p75_itl_ms", "p90_itl_ms": "p95_itl_ms"}
            found |= {key: itl[theirs] for key, theirs in ranks.items() if theirs in itl}
        return found


def _named(metric: str, statistics: Statistics | None) -> dict[str, float]:
    return {} if statistics is None else statistics.named(metric)
