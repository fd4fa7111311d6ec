"""A smaller scenario in which two schedulers still differ, found by hypothesis.

A random scenario is a list of choices (parity_scenarios.recorded_picks); hypothesis is given that list as
a stored example of the same strategy, and shrinks it.
"""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import HealthCheck, Phase, find, settings
from hypothesis import strategies as st
from hypothesis.database import InMemoryExampleDatabase, choices_to_bytes
from hypothesis.errors import NoSuchExample

from servecast.validate.parity_scenarios import Scenario, draw_scenario, recorded_picks

KEY = b"parity"


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
        if calls > tries or not differs(scenario):
            return False
        best = min(best, scenario, key=_size)
        return True

    database = InMemoryExampleDatabase()
    database.save(KEY + b".secondary", choices_to_bytes(picks))  # the primary ones count as shrunk
    try:
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
    except NoSuchExample:
        pass  # it no longer differs, or the tries are used up: keep the best
    return best


def _size(scenario: Scenario) -> tuple[int, int]:
    tokens = sum(a.request.prompt_tokens + a.request.output_tokens for a in scenario.arrivals)
    return len(scenario.arrivals) + len(scenario.aborts), tokens
