"""Thousands of random cases, step by step: the engine as installed, traced and not, and its source
interpreted decide as the plain model does. Not a test of every run: ``make identity-long``, or with a number
of cases and a seed as arguments. Ends with what was covered, or with the first difference, shrunk.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

sys.path += [str(Path(__file__).resolve().parents[up] / name) for up, name in ((0, ""), (2, "helpers"))]

from cores import interpreted
from engine_log import in_python, installed
from hypothesis import given, seed, settings
from plain_engine import PlainEngine
from test_against_plain import Case, cases, connected, drafting, first_difference, random_cases

from servecast.sim.engine.scheduler import Scheduler
from servecast.validate.parity.parity import compare as first_mismatch


def compare(number: int, start: int) -> Counter[str]:
    """Compare ``number`` cases, a half of them under contention and a fourth with a KV connector, and count
    what happened in them."""
    seen: Counter[str] = Counter()

    @seed(start)
    @settings(random_cases(number - number // 4), derandomize=False, database=None)
    @given(cases() | cases(contend=True) | drafting())
    def all_decide_alike(case: Case) -> None:
        plain = case.run(PlainEngine(case.config))
        assert first_difference(case.run(installed(case.config)), plain) == "", "as installed"
        assert first_difference(case.run(in_python(case.config)), plain) == "", "interpreted"
        seen.update(
            cases=1,
            steps=len(plain),
            preemptions=sum(len(step.preempted) for step in plain),
            prefix_hit_tokens=sum(sum(step.cached_tokens.values()) for step in plain),
            aborts=sum(len(step.aborted) for step in plain),
            asynchronous=case.config.async_scheduling,
            drafts_verified=sum(step.drafts for step in plain),
            by_priority=case.config.scheduling_policy == "priority",
        )
        for step in plain:
            step.scheduled = []
        assert first_difference(case.run(Scheduler(case.config), trace=False), plain) == "", "not traced"

    all_decide_alike()
    for index in range(number // 4):
        one = connected(index, start)
        for make in (Scheduler, interpreted()["scheduler"].Scheduler):
            mismatch = first_mismatch(one, one.scenario.config.version, make)
            assert mismatch is None, str(mismatch)
        seen.update(
            cases=1,
            with_connector=1,
            steps=sum("schedule" in event for event in one.events()),
            loading=sum(bool(event.get("waiting_blocks")) for event in one.events()),
        )
    return seen


if __name__ == "__main__":
    arguments = [int(argument) for argument in sys.argv[1:]]
    print(f"{dict(compare(*arguments, *(20_000, 1)[len(arguments) :]))}: all alike")
