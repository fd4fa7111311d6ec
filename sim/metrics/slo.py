"""Service level objectives: a percentile of a latency, or the share of requests that meet all limits."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from servecast.sim.inputs.errors import InputError
from servecast.sim.inputs.schema import did_you_mean

METRICS = ("ttft", "tpot", "itl", "e2el")
_ALIASES = {"e2e": "e2el"}


def _metric(word: str, text: str, known: Sequence[str], where: str) -> str:
    metric = _ALIASES.get(word.lower(), word.lower())
    if metric not in known:
        hint = did_you_mean(metric, known) or f"Known are {', '.join(known)}."
        raise InputError(f"{word!r} in {text!r} is not a latency", where=where, fix=hint)
    return metric


def _limit_ms(word: str, text: str, where: str) -> float:
    try:
        limit = float(word)
    except ValueError:
        limit = -1.0
    if not 0 < limit < float("inf"):
        seconds = re.fullmatch(r"([\d.]+)\s*(ms|s)", word)
        fix = "Limits are positive numbers of milliseconds, without the unit."
        if seconds:
            fix += f" Write {float(seconds[1]) * (1000 if seconds[2] == 's' else 1):g}."
        raise InputError(f"{word!r} in {text!r} is not a limit", where=where, fix=fix)
    return limit


@dataclass(frozen=True, slots=True)
class SLO:
    """A limit on a statistic of a latency.

    Attributes:
        metric: "ttft", "tpot", "itl" or "e2el".
        percentile: 50 up to 99.9, or None for the mean.
        limit_ms: milliseconds; the SLO holds at or below it.
    """

    metric: str
    percentile: float | None
    limit_ms: float

    @classmethod
    def parse(cls, text: str, *, where: str = "--slo") -> SLO:
        """From "ttft:p95:500": latency, statistic ("p50" to "p99.9" or "mean"), milliseconds.

        Raises:
            InputError: it is not of that form.
        """
        parts = text.strip().split(":")
        if len(parts) != 3:
            fix = "Write metric:statistic:milliseconds, for example ttft:p95:500."
            raise InputError(f"{text!r} is not an SLO", where=where, fix=fix)
        metric = _metric(parts[0], text, METRICS, where)
        percentile = None
        if parts[1].lower() != "mean":
            match = re.fullmatch(r"[pP](\d{1,2}(?:\.\d+)?)", parts[1])
            percentile = float(match[1]) if match else 0.0
            if not 50 <= percentile <= 99.9:
                fix = "Write mean, or a percentile from p50 to p99.9."
                raise InputError(f"{parts[1]!r} in {text!r} is not a statistic", where=where, fix=fix)
        return cls(metric, percentile, _limit_ms(parts[2], text, where))

    @property
    def statistic(self) -> str:
        """ "p95", "p99.9" or "mean"."""
        return "mean" if self.percentile is None else f"p{self.percentile:g}"

    def __str__(self) -> str:
        return f"{self.metric}:{self.statistic}:{self.limit_ms:g}"


@dataclass(frozen=True, slots=True)
class Goodput:
    """Limits that a good request meets all: ((metric, milliseconds), ...), metrics ttft, tpot and e2el."""

    limits_ms: tuple[tuple[str, float], ...]

    @classmethod
    def parse(cls, text: str, *, where: str = "--goodput") -> Goodput:
        """From "ttft:500 tpot:50", as ``vllm bench serve --goodput`` takes it.

        Raises:
            InputError: it is not of that form, or names a latency twice.
        """
        limits: dict[str, float] = {}
        for word in text.split():
            parts = word.split(":")
            if len(parts) != 2:
                fix = "Write metric:milliseconds, for example ttft:500 tpot:50."
                raise InputError(f"{word!r} is not a goodput limit", where=where, fix=fix)
            metric = _metric(parts[0], word, ("ttft", "tpot", "e2el"), where)
            if metric in limits:
                raise InputError(f"{metric} has two limits", where=where, fix="Give one.")
            limits[metric] = _limit_ms(parts[1], word, where)
        if not limits:
            raise InputError("no limits", where=where, fix="Write for example ttft:500 tpot:50.")
        return cls(tuple(limits.items()))

    def __str__(self) -> str:
        return " ".join(f"{metric}:{limit:g}" for metric, limit in self.limits_ms)
