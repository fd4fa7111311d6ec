"""A smaller scenario in which two schedulers still differ, found by hypothesis.

A random scenario is a list of choices (parity_scenarios.recorded_picks); hypothesis is given that list as
a stored example of the same strategy, and shrinks it. What is left is thinned out request by request.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable

from hypothesis import HealthCheck, Phase, find, settings
from hypothesis import strategies as st
from hypothesis.database import InMemoryExampleDatabase, choices_to_bytes
from hypothesis.errors import NoSuchExample

from servecast.validate.parity.scenarios import Scenario, draw_scenario, recorded_picks

KEY = b"parity"


class Enough(KeyboardInterrupt):
    """The tries are used up. Hypothesis lets nothing else through."""


def shrink(
    version: str, seed: int, index: int, differs: Callable[[Scenario], bool], *, tries: int = 400
) -> Scenario:
    """The smallest scenario found that still ``differs``, from random scenario ``index`` of ``seed``.

    Args:
        differs: whether a scenario shows the difference; called at most about ``tries`` times.
    """

    @st.composite
    def scenarios(draw: st.DrawFn) -> Scenario:
        def pick(low: int, high: int) -> int:
            return draw(st.integers(low, high)) if low < high else low

        return draw_scenario(pick, version, f"random-{version}-{seed}-{index}-shrunk")

    pick, picks = recorded_picks(seed, index)
    original = draw_scenario(pick, version, f"random-{version}-{seed}-{index}")
    best = original
    calls = 0

    def condition(scenario: Scenario) -> bool:
        nonlocal best, calls
        calls += 1
        if calls > tries:
            raise Enough
        if not differs(scenario):
            return False
        best = min(best, scenario, key=_size)
        return True

    database = InMemoryExampleDatabase()
    database.save(KEY + b".secondary", choices_to_bytes(picks))  # the primary ones count as shrunk
    with contextlib.suppress(Enough, NoSuchExample):
        find(
            scenarios(),
            condition,
            settings=settings(
                database=database,
                phases=(Phase.reuse, Phase.shrink),
                max_examples=tries,
                deadline=None,
                suppress_health_check=list(HealthCheck),
            ),
            database_key=KEY,
        )
    return thin_out(best, differs)


def thin_out(scenario: Scenario, differs: Callable[[Scenario], bool]) -> Scenario:
    """The scenario without the requests that the difference does not need."""
    share = len(scenario.arrivals)
    while share:
        for start in range(0, len(scenario.arrivals), share):
            kept = scenario.arrivals[:start] + scenario.arrivals[start + share :]
            ids = {arrival.request.request_id for arrival in kept}
            aborts = tuple(abort for abort in scenario.aborts if abort.request_id in ids)
            thinner = dataclasses.replace(scenario, arrivals=kept, aborts=aborts)
            if kept and differs(thinner):
                scenario = thinner
                break
        else:
            share //= 2
    return scenario


def _size(scenario: Scenario) -> tuple[int, int]:
    tokens = sum(a.request.prompt_tokens + a.request.output_tokens for a in scenario.arrivals)
    return len(scenario.arrivals) + len(scenario.aborts), tokens
