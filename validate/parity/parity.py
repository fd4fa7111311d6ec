"""Step-exact comparison of the simulator's scheduler with vLLM's own.

Both are driven by the same loop (engine_core) through the same scenario; vLLM's runs in another process,
under another Python, so that nothing here can import vLLM. What is compared after every schedule() and
every complete(), all of it in order: scheduled tokens per request, admitted, resumed and preempted
requests, cached tokens at admission, block ids, running and waiting requests, free blocks and the head of
their list, cached blocks, KV usage, finished requests, delivered tokens, prefix-cache counters.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from servecast.sim.engine.request import Request, content_of_adapter
from servecast.sim.engine.rules import RULES
from servecast.sim.engine.scheduler import Scheduler
from servecast.validate.parity.engine_core import decisions, draft_counts
from servecast.validate.parity.remote import Connected
from servecast.validate.parity.scenarios import Scenario
from servecast.validate.parity.vllm_process import VllmProcess, release

Event = dict[str, Any]  # what engine_core.decisions yields
MakeScheduler = Callable[..., Any]  # an engine's class, or a mutation of it

ENDS = "vLLM's engine ends"  # what our engine says of a state that vLLM does not survive
EVENTS_SHOWN = 3  # up to and including the first difference


@dataclass(frozen=True)
class Mismatch:
    """The first difference in one scenario. Events are None past the end of the shorter side.

    Attributes:
        fields: what differs, of the event's keys; "raised" when an engine failed, "end" when one went on.
        ours, theirs: the events up to the difference, which is the last one.
    """

    scenario: Scenario
    fields: tuple[str, ...]
    ours: tuple[Event | None, ...]
    theirs: tuple[Event | None, ...]

    def __str__(self) -> str:
        lines = [f"{self.scenario.name}: {', '.join(self.fields)}"]
        for ours, theirs in zip(self.ours, self.theirs, strict=True):
            event = theirs or ours or {}
            lines.append("  " + next((f"{kind}({n})" for kind, n in event.items()), "nothing"))
            for key in dict.fromkeys([*(theirs or {}), *(ours or {})]):
                left, right = (theirs or {}).get(key), (ours or {}).get(key)
                if left == right:
                    lines.append(f"      {key} = {left}")
                else:
                    lines += [f"    ! {key}", f"        vLLM {left}", f"        ours {right}"]
        return "\n".join(lines)


@dataclass(frozen=True)
class Recorded:
    """A scenario and vLLM's answer to it."""

    scenario: Scenario
    answer: str

    def events(self) -> list[Event]:
        """vLLM's decisions; the last one is ``{"raised": ...}`` where it ended, or refused the scenario."""
        events: list[Event] = json.loads(self.answer)
        return events


@dataclass
class ParityResult:
    """What a comparison covered, and every scenario in which the two differ."""

    vllm: str
    rules: str
    scenarios: int = 0
    steps: int = 0
    requests: int = 0
    preemptions: int = 0
    prefix_hit_tokens: int = 0
    aborts: int = 0
    async_scenarios: int = 0
    drafts_verified: int = 0
    priority_scenarios: int = 0
    mismatches: list[Mismatch] = field(default_factory=list)

    def add(self, recorded: Recorded, mismatch: Mismatch | None) -> None:
        """Count one scenario."""
        scenario = recorded.scenario
        self.scenarios += 1
        self.requests += len(scenario.arrivals)
        self.aborts += len(scenario.aborts)
        self.async_scenarios += scenario.config.async_scheduling
        self.priority_scenarios += scenario.config.scheduling_policy == "priority"
        for event in recorded.events():
            if "schedule" in event:
                self.steps += 1
                self.preemptions += len(event["preempted"])
                self.drafts_verified += event["drafts"]
                self.prefix_hit_tokens += sum(tokens for _, tokens in event["cached_tokens"])
        if mismatch is not None:
            self.mismatches.append(mismatch)

    @property
    def known(self) -> bool:
        """Whether there are rules for that vLLM."""
        return release(self.vllm) in RULES

    @property
    def exit_code(self) -> int:
        """0 the same, 1 not, 3 without rules of its own."""
        return (1 if self.mismatches else 0) if self.known else 3

    def differences(self) -> dict[str, int]:
        """What differs first, and in how many scenarios; the most frequent one first."""
        return dict(Counter(mismatch.fields[0] for mismatch in self.mismatches).most_common())

    def notes(self) -> list[str]:
        """What there is to say besides the counts."""
        notes = []
        if not self.known:
            compared = f"; compared under those of {self.rules}"
            done = compared if self.scenarios else ", and it is not installed"
            notes.append(f"There are no rules for vLLM {self.vllm}{done}.")
        if found := ", ".join(f"{field} in {count}" for field, count in self.differences().items()):
            notes.append(f"First difference of a scenario: {found}.")
        return notes

    def counts(self) -> dict[str, Any]:
        """The figures, with ``mismatches`` as a number."""
        data = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return data | {"mismatches": len(self.mismatches)}


def record(vllm: VllmProcess, scenarios: Iterable[Scenario]) -> Iterator[Recorded]:
    """vLLM's decisions on each scenario; it works on the next one while the caller looks at this one."""
    with ThreadPoolExecutor(1) as pool:
        before = None
        for scenario in scenarios:
            answer = pool.submit(vllm.decide, scenario)
            if before is not None:
                yield Recorded(before[0], before[1].result())
            before = scenario, answer
        if before is not None:
            yield Recorded(before[0], before[1].result())


def compare(recorded: Recorded, rules: str, make_scheduler: MakeScheduler = Scheduler) -> Mismatch | None:
    """The first difference between vLLM's decisions and ours under the rule set ``rules``.

    Our engine runs twice: read out completely after every step, and left alone as in a forecast, where
    it may put off bookkeeping. Both must decide as vLLM did.
    """
    theirs = recorded.events()
    for observed in (True, False):
        mismatch = _first_difference(recorded.scenario, theirs, rules, make_scheduler, observed=observed)
        if mismatch is not None:
            return mismatch
    return None


def _first_difference(
    scenario: Scenario, theirs: list[Event], rules: str, make_scheduler: MakeScheduler, *, observed: bool
) -> Mismatch | None:
    ours: list[Event | None] = []

    def differ(*fields: str) -> Mismatch:
        start, end = max(len(ours) - EVENTS_SHOWN, 0), len(ours)
        shown = [theirs[i] if i < len(theirs) else None for i in range(start, end)]
        return Mismatch(scenario, fields, tuple(ours[start:end]), tuple(shown))

    try:
        for event in our_decisions(scenario, rules, make_scheduler, observed=observed):
            index = len(ours)
            ours.append(event)
            if index == len(theirs):
                return differ("end")
            fields = _differences(event, theirs[index])
            if fields:
                return differ(*fields)
    except Exception as error:  # whatever breaks in our engine is a difference, but where vLLM's ends
        if ENDS in str(error) and len(ours) < len(theirs) and "raised" in theirs[len(ours)]:
            return None
        ours.append({"raised": f"{type(error).__name__}: {error}"})
        return differ("raised")
    if len(ours) < len(theirs):
        ours.append(None)
        return differ("end")
    return None


def _differences(ours: Event, theirs: Event) -> list[str]:
    """Keys that differ. What one side has not read (or a live recording does not hold) is not compared."""
    kinds = {"schedule", "complete", "raised"}
    missing = kinds & (ours.keys() ^ theirs.keys())
    return [*sorted(missing), *(key for key in ours if key in theirs and ours[key] != theirs[key])]


def our_decisions(
    scenario: Scenario, rules: str, make_scheduler: MakeScheduler = Scheduler, *, observed: bool = True
) -> Iterator[Event]:
    """The simulator's decisions, under the rule set of vLLM ``rules``."""
    config = dataclasses.replace(scenario.config, version=rules)
    engine = make_scheduler(config, trace=True) if observed else make_scheduler(config)
    if scenario.remote is not None:
        engine = Connected(make_scheduler, config, scenario.remote, trace=observed)
    as_dict = _as_dict(scenario)
    if as_dict["config"]["speculation"]:
        requests = (arrival.request.request_id for arrival in scenario.arrivals)
        engine.drafts.told = {name: draft_counts(as_dict["config"]["speculation"], name) for name in requests}
    return decisions(engine, as_dict, observed=observed)


def _as_dict(scenario: Scenario) -> dict[str, Any]:
    return {
        "config": {
            "async_scheduling": scenario.config.async_scheduling,
            "kv_groups": [dataclasses.asdict(spec) for spec in scenario.config.kv_groups],
            "speculation": scenario.config.speculation and dataclasses.asdict(scenario.config.speculation),
        },
        **scenario.loop,
        "arrivals": [
            {"step": a.step, "arrival": a.arrival, "request": _of_adapter(a.request)}
            for a in scenario.arrivals
        ],
        "aborts": [dataclasses.asdict(abort) for abort in scenario.aborts],
        "max_steps": scenario.max_steps,
        "remote": scenario.remote,
    }


def _of_adapter(request: Request) -> Request:
    content = content_of_adapter(request.content, request.adapter)
    return dataclasses.replace(request, content=content)


def parity(
    version: str,
    recorded: Iterable[Recorded],
    *,
    rules: str | None = None,
    make_scheduler: MakeScheduler = Scheduler,
    progress: Callable[[ParityResult], None] | None = None,
) -> ParityResult:
    """Compare our engine with vLLM's scheduler over scenarios.

    Args:
        version: of the vLLM that answered.
        recorded: its answers, as ``record`` gives them.
        rules: rule set of our engine; None is the one of ``version``.
        progress: called after each scenario.
    """
    result = ParityResult(version, rules or release(version))
    for one in recorded:
        result.add(one, compare(one, result.rules, make_scheduler))
        if progress is not None:
            progress(result)
    return result


def nearest_rules(version: str) -> str:
    """The rule set whose version is closest to one that has none."""

    def minor(text: str) -> int:
        major, minor = (int(part) for part in release(text).split("."))
        return 1000 * major + minor

    return min(RULES, key=lambda known: abs(minor(known) - minor(version)))
