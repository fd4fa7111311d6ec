"""When requests arrive. Each law draws a stream's arrival times, in seconds from the start of its stage.

The laws of the load generators are kept, not their random number streams: the same seed gives other
times here than in ``vllm bench serve``, with the same distribution.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from servecast.sim.inputs.schema import Count, Model, NonNegative, Positive, invalid

Times = npt.NDArray[np.float64]
Draw = Callable[[int], Times]


@dataclass(frozen=True, slots=True)
class Extent:
    """How much a stream sends: a number of requests, or all that arrive before ``duration_s``, or both.
    closed_loop: requests to draw where only the duration ends a closed loop."""

    num_requests: int | None
    duration_s: float | None
    closed_loop: int = 0

    def count(self, rate: float) -> int:
        """The number of requests of a law that fixes it in advance: int(rate x duration_s), at least 1."""
        in_time = None if self.duration_s is None else max(1, int(rate * self.duration_s))
        given = [n for n in (self.num_requests, in_time) if n is not None]
        return min(given)


def _renewal(extent: Extent, rate: float, gaps: Draw) -> Times:
    """Cumulated gaps of mean ``1 / rate``. ``gaps`` draws at unit rate, so that another rate scales time."""
    if extent.num_requests is not None:
        times = np.cumsum(gaps(extent.num_requests)) / rate
    else:
        assert extent.duration_s is not None
        expected = rate * extent.duration_s
        size = int(expected + 4 * math.sqrt(expected)) + 16
        times = np.cumsum(gaps(size)) / rate
        while times[-1] < extent.duration_s:
            times = np.concatenate([times, times[-1] + np.cumsum(gaps(size)) / rate])
    return times if extent.duration_s is None else times[times < extent.duration_s]


def _gamma(rng: np.random.Generator, burstiness: float) -> Draw:
    """Gaps of mean 1 and squared coefficient of variation ``1 / burstiness``; 1 is exponential."""
    if burstiness == 1:
        return rng.standard_exponential
    if math.isinf(burstiness):
        return np.ones
    return lambda n: rng.standard_gamma(burstiness, n) / burstiness


class Poisson(Model):
    """A Poisson process."""

    kind: Literal["poisson"]
    request_rate: Positive
    """Requests a second."""

    def times(self, extent: Extent, rng: np.random.Generator) -> Times:
        """Arrival times, rising."""
        return _renewal(extent, self.request_rate, rng.standard_exponential)


class Gamma(Model):
    """Independent gamma gaps."""

    kind: Literal["gamma"]
    request_rate: Positive
    """Requests a second."""
    burstiness: Positive = 1.0
    """Shape of the gaps: 1 is Poisson, below 1 burstier."""

    def times(self, extent: Extent, rng: np.random.Generator) -> Times:
        """Arrival times, rising."""
        return _renewal(extent, self.request_rate, _gamma(rng, self.burstiness))


class Constant(Model):
    """Equal gaps, the first request at once."""

    kind: Literal["constant"]
    request_rate: Positive
    """Requests a second."""

    def times(self, extent: Extent, rng: np.random.Generator) -> Times:
        """Arrival times, rising."""
        return _renewal(extent, self.request_rate, lambda n: np.concatenate([[0.0], np.ones(n - 1)]))


class VllmBench(Model):
    """The law of ``vllm bench serve`` (its ``get_request``): gamma gaps, the first one waited, all times
    rescaled so that the last of n requests comes at n / rate. With a ramp-up the rate goes from
    ``ramp_up_start_rps`` to ``ramp_up_end_rps`` by request index and nothing is rescaled.
    ``request_rate: .inf`` sends everything at once; ``burstiness: .inf`` makes equal gaps.
    """

    kind: Literal["vllm_bench"]
    request_rate: Annotated[float, Field(strict=True, gt=0, allow_inf_nan=True)] = math.inf
    """Requests a second; ``.inf`` sends all at once."""
    burstiness: Annotated[float, Field(strict=True, gt=0, allow_inf_nan=True)] = 1.0
    """Shape of the gaps; ``.inf`` makes them equal."""
    ramp_up_strategy: Literal["linear", "exponential"] | None = None
    """How the rate rises."""
    ramp_up_start_rps: Positive | None = None
    """Rate at the first request."""
    ramp_up_end_rps: Positive | None = None
    """Rate at the last request."""

    @model_validator(mode="after")
    def _ramp(self) -> VllmBench:
        ends = (self.ramp_up_start_rps, self.ramp_up_end_rps)
        if (self.ramp_up_strategy is None) != (ends == (None, None)) or (
            None in ends and ends != (None, None)
        ):
            what = "an incomplete ramp-up"
            raise invalid(what, "Give ramp_up_strategy, ramp_up_start_rps and ramp_up_end_rps.")
        if self.ramp_up_strategy is not None and not math.isinf(self.request_rate):
            raise invalid("a ramp-up with a request_rate", "Leave request_rate out, as vllm bench does.")
        return self

    def times(self, extent: Extent, rng: np.random.Generator) -> Times:
        """Arrival times, rising."""
        start, end = self.ramp_up_start_rps, self.ramp_up_end_rps
        if start is not None and end is not None:
            assert extent.num_requests is not None
            n = extent.num_requests
            progress = np.arange(n) / max(n - 1, 1)
            linear = self.ramp_up_strategy == "linear"
            rates = start + (end - start) * progress if linear else start * (end / start) ** progress
            ramped: Times = np.cumsum(_gamma(rng, self.burstiness)(n) / rates)
            return ramped
        if math.isinf(self.request_rate):
            assert extent.num_requests is not None
            return np.zeros(extent.num_requests)
        n = extent.count(self.request_rate)
        unit = np.cumsum(_gamma(rng, self.burstiness)(n))
        rescaled: Times = unit * (n / unit[-1] / self.request_rate)
        return rescaled


class InferencePerf(Model):
    """The law of inference-perf: ``load: constant`` is a Poisson process conditioned on int(rate x duration)
    requests with the last at the end; ``load: poisson`` draws a Poisson number for each second, whose last
    request comes at its end."""

    kind: Literal["inference_perf"]
    request_rate: Positive
    """Requests a second."""
    load: Literal["constant", "poisson"] = "constant"
    """inference-perf's ``load.type``."""
    start_delay_s: NonNegative = 1.0
    """Pause before the first request."""

    def times(self, extent: Extent, rng: np.random.Generator) -> Times:
        """Arrival times, rising."""
        n = extent.count(self.request_rate)
        if self.load == "constant":
            whole = extent.num_requests is None and extent.duration_s is not None
            duration_s = extent.duration_s if whole else n / self.request_rate
            unit = np.cumsum(rng.standard_exponential(n))
            times: Times = self.start_delay_s + unit * (duration_s / unit[-1])
            return times
        counts_rng, gaps_rng = rng.spawn(2)
        counts = counts_rng.poisson(self.request_rate, int(n / self.request_rate) + 64)
        while counts.sum() < n:
            counts = np.concatenate([counts, counts_rng.poisson(self.request_rate, len(counts))])
        seconds = np.repeat(np.arange(len(counts)), counts)
        unit = np.cumsum(gaps_rng.standard_exponential(len(seconds)))
        at_second = np.concatenate([[0.0], unit])[np.concatenate([[0], np.cumsum(counts)])]
        within = (unit - at_second[seconds]) / np.diff(at_second)[seconds]
        by_second: Times = self.start_delay_s + seconds + within
        return by_second[:n]


class Timestamps(Model):
    """Given times, replayed."""

    kind: Literal["timestamps"]
    times_s: Annotated[tuple[NonNegative, ...], Field(min_length=1)]
    """Arrival times in seconds, rising."""
    request_rate: Positive | None = None
    """Stretch the times to this mean rate (n / last time)."""

    @model_validator(mode="after")
    def _rising(self) -> Timestamps:
        for i, (a, b) in enumerate(zip(self.times_s, self.times_s[1:], strict=False), start=1):
            if b < a:
                raise invalid(f"time {b} comes after {a}", "Sort the times.", at=f"times_s.{i}")
        return self

    def times(self, extent: Extent, rng: np.random.Generator) -> Times:
        """Arrival times, rising."""
        return replay(np.array(self.times_s), self.request_rate, extent)


class Profile(Model):
    """A rate that changes with time, as over a day: Poisson (or burstier) arrivals at one rate in each
    period, and from the beginning again where the stream lasts longer."""

    kind: Literal["profile"]
    rates: Annotated[tuple[NonNegative, ...], Field(min_length=1)]
    """Requests a second in each period."""
    period_s: Positive = 3600.0
    """How long a period is."""
    burstiness: Positive = 1.0
    """Shape of the gaps, in numbers of requests that are expected between: 1 is Poisson, below 1 burstier."""
    request_rate: Positive | None = None
    """Stretch the rates to this mean."""

    @model_validator(mode="after")
    def _some(self) -> Profile:
        if not sum(self.rates):
            raise invalid("all rates are 0", "Give at least one above 0.", at="rates")
        return self

    @property
    def span_s(self) -> float:
        """How long the profile is."""
        return len(self.rates) * self.period_s

    def times(self, extent: Extent, rng: np.random.Generator) -> Times:
        """Arrival times, rising: a renewal process at rate 1, in the time in which one request is
        expected."""
        rates = np.array(self.rates)
        if self.request_rate is not None:
            rates = rates * (self.request_rate / np.mean(rates))
        edges = np.arange(len(rates) + 1) * self.period_s
        expected = np.concatenate([[0.0], np.cumsum(rates) * self.period_s])
        end = extent.duration_s
        if end is None and extent.num_requests is None:
            end = self.span_s
        until = None
        if end is not None:
            whole, last = divmod(end, self.span_s)
            until = whole * float(expected[-1]) + float(np.interp(last, edges, expected))
        unit = _renewal(Extent(extent.num_requests, until), 1.0, _gamma(rng, self.burstiness))
        rounds, rest = np.divmod(unit, expected[-1])
        times: Times = rounds * self.span_s + np.interp(rest, expected, edges)
        return times


def replay(times: Times, request_rate: float | None, extent: Extent) -> Times:
    """Recorded times, cut to the extent and stretched to ``request_rate`` (n / last time) if given."""
    times = times[: extent.num_requests]
    if request_rate is not None and times[-1] > 0:
        times = times * (len(times) / times[-1] / request_rate)
    return times if extent.duration_s is None else times[times < extent.duration_s]


class ClosedLoop(Model):
    """Clients that each send their next request when the last one is done."""

    kind: Literal["closed_loop"]
    concurrency: Count
    """Clients."""

    def times(self, extent: Extent, rng: np.random.Generator) -> Times:
        """Zeros: the stream's ``max_concurrency`` does the rest."""
        return np.zeros(extent.num_requests or max(extent.closed_loop, self.concurrency))


Arrivals = Annotated[
    Poisson | Gamma | Constant | VllmBench | InferencePerf | Timestamps | Profile | ClosedLoop,
    Field(discriminator="kind"),
]
