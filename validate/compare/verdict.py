"""Pass, fail or inconclusive: what a comparison comes to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

State = Literal["pass", "fail", "inconclusive"]
EXIT_CODES: dict[State, int] = {"pass": 0, "fail": 1, "inconclusive": 3}


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
