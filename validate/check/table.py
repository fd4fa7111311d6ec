"""A benchmark's report as `servecast check` sees it: levels of load, their reported values, their context.

Three forms come to one: a scenario with its reported tables, a bare CSV table whose columns have well-known
names, and result JSON of ``servecast simulate`` or ``vllm bench serve``. Values are in seconds, tokens/s,
requests/s, bytes and shares, each with half a unit of its last printed digit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from servecast.sim.hardware.gpu import GPU
from servecast.sim.hardware.shard import Shard
from servecast.sim.hardware.step_time.physical import PhysicalStepTime
from servecast.sim.metrics.binding import StepRow
from servecast.sim.scenario.scenario import Scenario
from servecast.sim.traffic.spec import Row

LATENCIES = ("ttft", "tpot", "itl", "ntpot", "e2el")
PercentileLaw = Literal["linear", "exclusive"]
_MOST_PROMPTS = 4096  # of one step in a bound: fewer than there were keep it a bound


@dataclass(frozen=True, slots=True)
class Span:
    """A quantity known to lie between two numbers."""

    low: float
    high: float

    @property
    def mid(self) -> float:
        return (self.low + self.high) / 2

    def __mul__(self, other: Span) -> Span:
        """Product of two quantities that are not negative."""
        return Span(self.low * other.low, self.high * other.high)

    def __truediv__(self, other: Span) -> Span:
        """Quotient of two quantities that are not negative; infinite where the divisor may be 0."""
        return Span(
            self.low / other.high if other.high else math.inf,
            self.high / other.low if other.low > 0 else math.inf,
        )

    def __add__(self, other: Span) -> Span:
        return Span(self.low + other.low, self.high + other.high)

    def less(self, number: float) -> Span:
        """The quantity less a number, not under 0."""
        return Span(max(0.0, self.low - number), max(0.0, self.high - number))


def exactly(number: float) -> Span:
    """A quantity that is known."""
    return Span(number, number)


@dataclass(frozen=True, slots=True)
class Value:
    """One reported number.

    column: its name in the report. metric, statistic: as in a reported table's columns ("ttft", "p95");
    statistic is None for rates and shares. value: in SI. half: half a unit of its last printed digit.
    """

    column: str
    metric: str
    statistic: str | None
    value: float
    half: float = 0.0

    @property
    def span(self) -> Span:
        """What was measured, before it was rounded."""
        return Span(max(0.0, self.value - self.half), self.value + self.half)

    @property
    def rank(self) -> float | None:
        """95 of a "p95", None for what is no percentile."""
        name = self.statistic or ""
        return float(name[1:]) if name.startswith("p") else None


@dataclass(frozen=True, slots=True)
class Lengths:
    """Lengths of a level's prompts or outputs, tokens: their mean, and whether all are equal."""

    mean: Span
    fixed: bool


@dataclass(frozen=True, slots=True)
class Hardware:
    """Model and GPUs, for bounds that hold whatever the engine, and what is known of the memory.

    kv_tokens: tokens that the KV pool of one replica holds, an estimate. memory_bytes: what a monitor should
    show as used on one GPU. prefix_caching: whether the engine keeps prompts.
    """

    shard: Shard
    replicas: int = 1
    kv_tokens: int | None = None
    memory_bytes: int | None = None
    prefix_caching: bool = True

    @property
    def gpu(self) -> GPU:
        """One of the GPUs."""
        return self.shard.gpu

    def roofline_s(self, *, prompts: int = 0, tokens: int = 0, decodes: int = 0, context: int = 0) -> float:
        """The least time for one step: ``prompts`` fresh prompts of ``tokens`` tokens each, and ``decodes``
        tokens over ``context`` tokens of KV in total."""
        prompts = min(prompts, _MOST_PROMPTS)
        step = StepRow(((tokens, 0),) * prompts, decodes, max(context, decodes), prompts + decodes)
        return PhysicalStepTime(self.shard).roofline_seconds(step)

    @property
    def flops(self) -> float:
        """Peak of all GPUs in the linear layers, FLOP/s."""
        return self.shard.linear_peak * self.shard.tensor_parallel_size * self.replicas


@dataclass(frozen=True, slots=True)
class Level:
    """One row of a report: what was measured under one load.

    Attributes:
        table: which of the report's tables. keys: what names the row there.
        series: rows of one series differ in their load only.
        values: by (metric, statistic).
        concurrency: of a closed loop, or the cap on requests in flight. request_rate: of an open loop,
            requests/s. num_requests: how many were sent. failed: how many failed, None if not known.
        output, prompt: lengths, None if not known.
        repeated: share of the requests whose whole prompt had been sent before, by this or an earlier row.
        law: how percentiles were interpolated. whole_run: the row is about the whole run, not one load.
        hardware: what it was measured on, None if not known.
        records: reported values, each with what comes out of the requests' own records.
        duration_s: of the run, as it says itself.
        halved: each token was stamped twice, and the values are put right.
    """

    table: str
    keys: Row
    series: tuple[str, ...]
    values: Mapping[tuple[str, str | None], Value]
    concurrency: int | None = None
    request_rate: float | None = None
    num_requests: int | None = None
    failed: float | None = None
    output: Lengths | None = None
    prompt: Lengths | None = None
    repeated: float | None = None
    law: PercentileLaw = "linear"
    whole_run: bool = False
    hardware: Hardware | None = None
    records: tuple[tuple[Value, float], ...] = ()
    duration_s: float | None = None
    halved: bool = False

    @property
    def label(self) -> str:
        """What messages call the row."""
        return " ".join(f"{key}={value}" for key, value in self.keys.items()) or "the run"

    @property
    def gaps(self) -> Span | None:
        """Gaps between tokens of a request, on average; None where outputs are of one token or not known."""
        if self.output is None or self.output.mean.low <= 1:
            return None
        return self.output.mean.less(1)

    @property
    def load(self) -> float:
        """The rate of an open loop, the slots of a closed one."""
        return self.request_rate or self.concurrency or 0

    @property
    def open_loop(self) -> bool:
        """Whether requests are said to arrive at a rate of their own."""
        return self.request_rate is not None

    @property
    def prompt_tokens(self) -> int | None:
        """The length of every prompt, None where they differ or it is not known."""
        return int(self.prompt.mean.low) if self.prompt is not None and self.prompt.fixed else None

    @property
    def equal_outputs(self) -> bool:
        """Whether all outputs are known to be of one length."""
        return self.output is not None and self.output.fixed

    def past(self, value: Value) -> bool:
        """Whether the exclusive law, which puts rank q of n values at place q (n + 1), takes a percentile
        from past the largest of them."""
        count, share = self.num_requests, (value.rank or 0) / 100
        return self.law == "exclusive" and count is not None and share * (count + 1) > count

    @property
    def all_answered(self) -> bool:
        """Nothing in the report speaks of failures."""
        success = self.get("success")
        return not self.failed and (success is None or success.span.high >= 1.0)

    def get(self, metric: str, *statistics: str | None) -> Value | None:
        """The first of the statistics that is reported; without any, the metric's plain value."""
        for statistic in statistics or (None,):
            value = self.values.get((metric, statistic))
            if value is not None:
                return value
        return None

    def of(self, *metrics: str) -> list[Value]:
        """All values of these metrics, in the report's order."""
        return [value for value in self.values.values() if value.metric in metrics]

    def percentiles(self, metric: str) -> list[Value]:
        """The metric's percentiles by rising rank."""
        return sorted((v for v in self.of(metric) if v.rank is not None), key=lambda v: v.rank or 0.0)


@dataclass(frozen=True, slots=True)
class Report:
    """What is checked. scenario: for a prediction. notes: what was left out or put right, in words."""

    source: str
    levels: tuple[Level, ...]
    scenario: Scenario | None = None
    notes: tuple[str, ...] = ()

    def series(self) -> list[list[Level]]:
        """Levels that differ in their load only, each list by rising load."""
        found: dict[tuple[str, ...], list[Level]] = {}
        for level in self.levels:
            if not level.whole_run and (level.concurrency is not None or level.request_rate is not None):
                kind = "rate" if level.open_loop else "concurrency"
                found.setdefault((level.table, *level.series, kind), []).append(level)
        return [sorted(levels, key=lambda level: level.load) for levels in found.values()]
