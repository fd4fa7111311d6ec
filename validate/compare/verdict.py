"""Pass, fail or inconclusive: what a comparison comes to under given tolerances."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import model_validator

from servecast.sim.inputs.errors import InputError
from servecast.sim.inputs.schema import Count, Model, NonNegative, Positive, did_you_mean, invalid, parse
from servecast.validate.compare.samples import LATENCIES, STATISTICS

COUNTS = (
    "request_throughput",
    "output_throughput",
    "kv_cache_usage_peak",
    "max_num_running",
    "max_num_waiting",
    "num_preemptions",
    "prefix_cache_hit_rate",
)
OF_SWEEPS = ("knee", "max_request_rate")
FIGURES = (  # that can be judged
    *COUNTS,
    *(f"{name}_{metric}_ms" for metric in LATENCIES for name in STATISTICS),
    "mean_queue_time_ms",
    *OF_SWEEPS,
)
State = Literal["pass", "fail", "inconclusive"]
EXIT_CODES: dict[State, int] = {"pass": 0, "fail": 1, "inconclusive": 3}


class Tolerance(Model):
    """How far a prediction may lie from its measurement: the wider of the two."""

    relative: NonNegative = 0.0
    absolute: NonNegative = 0.0

    @model_validator(mode="after")
    def _some(self) -> Tolerance:
        if not self.relative and not self.absolute:
            raise invalid("the tolerance is nothing", "Give relative, absolute or both.")
        return self

    def allowed(self, measured: float) -> float:
        """The largest difference, in the measured value's unit."""
        return max(self.relative * abs(measured), self.absolute)


class Tolerances(Model):
    """See the shipped tolerances.yaml, which also says what each limit means."""

    rows: Mapping[str, Tolerance]
    client_lag_ms: Positive = 20.0
    min_requests: Count = 20
    max_failed_share: NonNegative = 0.01
    max_length_difference: NonNegative = 0.05

    @model_validator(mode="after")
    def _known(self) -> Tolerances:
        for name in self.rows:
            if name not in FIGURES:
                fix = did_you_mean(name, FIGURES) or f"Known are {', '.join(FIGURES)}."
                raise invalid(f"there is no figure {name!r} to judge", fix)
        return self

    @classmethod
    def load(cls, path: Path | None = None) -> Tolerances:
        """From a YAML file; the shipped ones without.

        Raises:
            InputError: it cannot be read, or something in it is not a tolerance.
        """
        if path is None:
            text = (
                resources.files("servecast.validate.compare").joinpath("tolerances.yaml").read_text("utf-8")
            )
        else:
            try:
                text = path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise InputError(
                    f"cannot be read: {error}", where=str(path), fix="Give a YAML file of tolerances."
                ) from None
        source = "tolerances.yaml" if path is None else str(path)
        try:
            data: Any = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise InputError(f"is not YAML: {error}", where=source, fix="Correct it.") from None
        return parse(cls, data, source=source)


@dataclass(frozen=True, slots=True)
class Verdict:
    """The state, and why: every miss, or every reason for which nothing can be said."""

    state: State
    reasons: tuple[str, ...] = ()

    @property
    def exit_code(self) -> int:
        """0 pass, 1 fail, 3 inconclusive."""
        return EXIT_CODES[self.state]


def judge_row(difference: float, low: float, high: float, allowed: float) -> State:
    """One row, from its difference and that difference's interval (NaN: none).

    It passes within the tolerance. Beyond, it fails if the whole interval lies beyond on that side, and
    is inconclusive if chance may have put it there.
    """
    if abs(difference) <= allowed:
        return "pass"
    if math.isnan(low) or math.isnan(high):
        return "fail"
    beyond = low > allowed if difference > 0 else high < -allowed
    return "fail" if beyond else "inconclusive"


def verdict_of(states: Sequence[tuple[State, str]], problems: Sequence[str]) -> Verdict:
    """The verdict over judged rows (state, reason), and what makes the whole say nothing."""
    if problems:
        return Verdict("inconclusive", tuple(problems))
    if not states:
        return Verdict("inconclusive", ("nothing that has a tolerance was measured",))
    for state in ("fail", "inconclusive"):
        reasons = tuple(reason for each, reason in states if each == state)
        if reasons:
            return Verdict(state, reasons)
    return Verdict("pass")
