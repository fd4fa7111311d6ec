"""Fleets whose replicas differ, start late, drain and fail, and what the router knew when it chose."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from small_epp import EPP
from small_fleet import OneSecondSteps, config, one_stream, times
from small_scenarios import open_loop, small

from servecast.sim.engine.request import Request, Stage
from servecast.sim.engine.scheduler import Scheduler
from servecast.sim.fleet.client import Client
from servecast.sim.fleet.fleet import Fleet
from servecast.sim.fleet.replica import Replica
from servecast.sim.fleet.spec import Life
from servecast.sim.hardware.front_end_costs import FrontEndCosts
from servecast.sim.inputs.errors import InputError
from servecast.sim.metrics.metrics import summary
from servecast.sim.metrics.records import Run
from servecast.sim.routing.gauges import Gauges
from servecast.sim.routing.options import RouterOptions
from servecast.sim.routing.routers import ROUTERS, Backend, Router
from servecast.sim.run.simulate import simulate
from servecast.sim.scenario.scenario import Scenario


def run(
    stages: list[Stage],
    lives: Sequence[Life],
    *,
    router: Router | None = None,
    options: RouterOptions | None = None,
    detection_s: float = 0.0,
    **engine: object,
) -> tuple[Run, dict[str, int]]:
    """A fleet of engines whose steps take a second, and why requests failed."""
    rng = np.random.default_rng(0)
    steps = OneSecondSteps()
    costs = FrontEndCosts()

    def make(index: int, client: Client) -> Replica:
        factors = iter(lambda: 1.0, None)
        scheduler = Scheduler(config(**engine))
        return Replica(index, scheduler, steps, factors, costs, rng, client)

    fleet = Fleet(
        make,
        lives,
        router or ROUTERS["round_robin"](RouterOptions(), rng),
        Client(costs),
        rng,
        options=options,
        detection_s=detection_s,
    )
    return fleet.run(stages), dict(fleet.failures)


def requests(*arrivals: float, output: int = 2) -> list[Stage]:
    return one_stream([Request(i, at, 10, output, output) for i, at in enumerate(arrivals)])


def column(result: Run, name: str) -> list[Any]:
    return [None if pd.isna(value) else value for value in result.requests[name].tolist()]


# ---- replicas come and go ---------------------------------------------------------------------------


def test_a_replica_that_starts_late_gets_requests_from_then_on() -> None:
    """In turn over two, the second ready at 2.5: 0, 1, 2 have no choice; turns 3 and 4 fall on 1 and 0."""
    result, failures = run(requests(0.0, 1.0, 2.0, 3.0, 4.0), [Life(), Life(start_s=2.5)])
    assert column(result, "replica") == [0, 0, 0, 1, 0]
    assert failures == {}


def test_a_draining_replica_finishes_what_it_has() -> None:
    """Replica 0 drains at 1.5: its request of five steps runs from 0 to 5, and later ones go to 1."""
    result, _ = run(requests(0.0, 1.0, 2.0, 3.0, output=5), [Life(drain_s=1.5), Life()])
    assert column(result, "replica") == [0, 1, 1, 1]
    assert column(result, "status") == ["finished"] * 4
    assert times(result, "finish")[0] == 5.0


def test_requests_on_a_replica_that_fails_are_lost() -> None:
    """Replica 0 fails at 2.5: requests 0 and 2 (five steps each) with it; the one that ended before stands.
    They count as failed and have no finish; the engine takes no step after that of 2.0."""
    stages = one_stream(
        [
            Request(0, 0.0, 10, 5, 5),
            Request(1, 0.0, 10, 5, 5),
            Request(2, 1.0, 10, 5, 5),
            Request(3, 3.0, 10, 1, 1),
        ]
    )
    result, failures = run(stages, [Life(fail_s=2.5), Life()])
    assert column(result, "status") == ["failed", "finished", "failed", "finished"]
    assert column(result, "replica") == [0, 1, 0, 1]
    assert column(result, "finish")[0] is None
    assert failures == {"in flight on a replica that failed": 2}
    assert result.steps.loc[result.steps["replica"] == 0, "start"].max() == 2.0
    assert (summary(result)["completed"], summary(result)["failed"]) == (2, 2)


def test_the_router_sends_to_a_failed_replica_until_it_knows() -> None:
    """Replica 0 fails at 1.5 and is known to have at 3.5: of those at 2 and 3, in turn, one is refused."""
    result, failures = run(requests(0.0, 1.0, 2.0, 3.0, 4.0), [Life(fail_s=1.5), Life()], detection_s=2.0)
    assert column(result, "replica") == [0, 1, 0, 1, 1]
    assert column(result, "status") == ["failed", "finished", "failed", "finished", "finished"]
    assert failures == {
        "in flight on a replica that failed": 1,
        "sent to a replica that had failed before the router knew": 1,
    }


def test_without_a_ready_replica_requests_fail_as_503() -> None:
    """Nobody is ready before 2.5: the first two requests fail without a replica, also where the client waits
    for each before the next, or would give up later."""
    result, failures = run(requests(0.0, 1.0, 3.0), [Life(start_s=2.5)])
    assert column(result, "status") == ["failed", "failed", "finished"]
    assert column(result, "replica") == [None, None, 0]
    assert failures == {"no replica was ready (503)": 2}
    closed = one_stream(
        [Request(i, 0.0, 10, 2, 2, abort_after_s=5.0) for i in range(2000)], max_concurrency=1
    )
    result, failures = run(closed, [Life(start_s=2.5)])
    assert failures == {"no replica was ready (503)": 2000}
    assert set(column(result, "status")) == {"failed"}


def test_a_request_in_preparation_fails_with_its_server() -> None:
    """The API server fails while it prepares: nothing reaches the engine later."""
    rng, steps, costs = np.random.default_rng(0), OneSecondSteps(), FrontEndCosts(request_s=1.0)

    def make(index: int, client: Client) -> Replica:
        factors = iter(lambda: 1.0, None)
        return Replica(index, Scheduler(config()), steps, factors, costs, rng, client)

    router = ROUTERS["round_robin"](RouterOptions(), rng)
    fleet = Fleet(make, [Life(fail_s=0.5)], router, Client(FrontEndCosts()), rng)
    result = fleet.run(requests(0.0, 1.0))
    assert column(result, "status") == ["failed", "failed"]
    assert len(result.steps) == 0


# ---- what the router knew ---------------------------------------------------------------------------


class Diary:
    """Sends everything to the first replica, and notes what it was told of it."""

    def __init__(self) -> None:
        self.log: list[Gauges] = []

    def connect(self, backends: Sequence[Backend]) -> None:
        for backend in backends:
            backend.scrape()

    def pick(self, request: Request, backends: Sequence[Backend]) -> int:
        self.log.append(backends[0].gauges)
        return 0

    def ended(self, request: Request, index: int) -> None: ...


def test_gauges_are_those_of_the_last_step_at_the_last_scrape() -> None:
    """Room for two; steps end at 1, 2, 3. Requests 0, 1, 2 at 0 see nothing. At 1.5 the first step has ended
    with two running, one waiting. Request 3, sent at 1.5, enters the engine between the steps at 2: the step
    that ended then did not have it, the one that ends at 3 does. With a delay of 1 s what is known at 2.5 is
    what was at 1.5. With scrapes far apart none was taken yet."""
    arrivals = (0.0, 0.0, 0.0, 1.5, 2.5, 3.5)
    for interval, delay, expected in (
        (0.0, 0.0, [(0, 0), (0, 0), (0, 0), (1, 2), (1, 2), (2, 2)]),
        (0.0, 1.0, [(0, 0), (0, 0), (0, 0), (0, 0), (1, 2), (1, 2)]),
        (1000.0, 0.0, [(0, 0)] * 6),
    ):
        diary = Diary()
        options = RouterOptions(scrape_interval_s=interval, scrape_delay_s=delay)
        run(requests(*arrivals, output=9), [Life()], router=diary, options=options, max_num_seqs=2)
        assert [(gauges.waiting, gauges.running) for gauges in diary.log] == expected


def test_arrivals_between_two_scrapes_see_the_same() -> None:
    """Forty requests within a step of a second, scraped every 0.25 s: what is told changes at most with the
    scrapes, so it has at most 4 values a second and each is seen by several."""
    diary = Diary()
    arrivals = [0.1 * i for i in range(40)]
    run(
        requests(*arrivals, output=2),
        [Life()],
        router=diary,
        options=RouterOptions(scrape_interval_s=0.25),
        max_num_seqs=2,
    )
    changes = sum(a != b for a, b in zip(diary.log, diary.log[1:], strict=False))
    assert 2 <= changes <= 4


class Listener(Diary):
    """Notes how many KV events have arrived since the last request."""

    def __init__(self) -> None:
        self.heard: list[int] = []

    def connect(self, backends: Sequence[Backend]) -> None:
        backends[0].subscribe()

    def pick(self, request: Request, backends: Sequence[Backend]) -> int:
        self.heard.append(len(list(backends[0].take_events())))
        return 0


def test_kv_events_are_known_after_their_lag() -> None:
    """A request of 40 tokens at 0 is scheduled at once: its two full blocks are stored at 0, known at 0.3."""
    listener = Listener()
    first = Request(0, 0.0, 40, 1, 1, ((1, 40),))
    later = [Request(i, at, 10, 1, 1) for i, at in enumerate((0.1, 0.299, 0.3, 0.5), start=1)]
    run(one_stream([first, *later]), [Life()], router=listener, options=RouterOptions(event_lag_s=0.3))
    assert listener.heard == [0, 0, 0, 1, 0]


# ---- scenarios --------------------------------------------------------------------------------------

WORKLOAD = open_loop(10, 100, 300, 60)
MIXED = {
    "name": "mixed",
    "model": {"config": "Llama-3.1-8B-Instruct"},
    "gpu": {"name": "l40s"},
    "engine": {"version": "0.32", "max_model_len": 4096, "max_num_seqs": 32},
    "workload": WORKLOAD,
}


def scenario(folder: Path, fleet: dict[str, Any], **changes: Any) -> Scenario:
    return small(folder, **MIXED | changes, fleet=fleet)


def test_replicas_may_differ_in_gpu_and_flags(tmp_path: Path) -> None:
    """An H100 beside two L40S with fewer sequences: its steps are shorter, theirs hold at most 4 requests."""
    mixed = scenario(
        tmp_path,
        {"replicas": [{"gpu": {"name": "h100"}}, {"count": 2, "engine": {"max_num_seqs": 4}}]},
    )
    result = simulate(mixed)
    steps = result.steps.groupby("replica")
    assert steps["running"].max()[1:].tolist() == [4, 4]
    decode = steps.apply(lambda s: s.loc[s["prefill_tokens"] == 0, "duration"].median(), include_groups=False)
    assert decode[0] < 0.6 * decode[1]
    assert result.requests["replica"].value_counts().tolist() == [34, 33, 33]


def test_a_list_of_like_replicas_is_the_count(tmp_path: Path) -> None:
    """The same run, to the last bit."""
    runs = [simulate(scenario(tmp_path, {"replicas": r})) for r in (3, [{}, {"count": 2}])]
    assert runs[0].requests.equals(runs[1].requests)
    assert runs[0].steps.equals(runs[1].steps)


@pytest.mark.parametrize("plugin", ["prefix-cache-scorer", "precise-prefix-cache-scorer"])
def test_an_epp_keeps_groups_together(plugin: str, tmp_path: Path) -> None:
    """Twelve prefixes of 1,600 tokens on 4 replicas: in turn each replica computes most of them; with a
    prefix scorer a group stays where it is cached, and prompts hit more."""
    (tmp_path / "epp.yaml").write_text(EPP.replace("PREFIX", plugin), "utf-8")
    workload = {**WORKLOAD, "content": {"kind": "shared_prefix", "groups": 12, "prefix_tokens": 1600}}
    hits = {}
    for router in ("round_robin", "epp.yaml"):
        result = simulate(scenario(tmp_path, {"replicas": 4, "router": router}, workload=workload))
        hits[router] = result.requests["cached_tokens"].sum() / result.requests["prompt_tokens"].sum()
    assert hits["epp.yaml"] > 1.3 * hits["round_robin"]


def test_routers_see_the_same_traffic_and_seeds_repeat(tmp_path: Path) -> None:
    runs = {
        name: simulate(scenario(tmp_path, {"replicas": 3, "router": name}))
        for name in ("random", "power-of-two", "consistent_hashing")
    }
    arrivals = [result.requests["arrival"].tolist() for result in runs.values()]
    assert arrivals[0] == arrivals[1] == arrivals[2]
    again = simulate(scenario(tmp_path, {"replicas": 3, "router": "random"}))
    assert again.requests.equals(runs["random"].requests)


def test_failures_are_told_in_the_result(tmp_path: Path) -> None:
    result = simulate(scenario(tmp_path, {"replicas": [{}, {"fail_s": 3.0}], "failure_detection_s": 0.5}))
    lost = (result.requests["status"] == "failed").sum()
    assert lost > 0
    assert sum(result.meta["failures"].values()) == lost


BAD = {
    "no replicas": ({"replicas": []}, "fleet.replicas", "the fleet has no replicas"),
    "wrong order": (
        {"replicas": [{}, {"start_s": 5.0, "fail_s": 4.0}]},
        "fleet.replicas.1.fail_s",
        "fail_s 4 does not come after start_s 5",
    ),
    "a flag that does not exist": (
        {"replicas": [{"engine": {"max_num_seq": 4}}]},
        "fleet.replicas.0.engine.max_num_seq",
        "unknown field 'max_num_seq'",
    ),
    "no such file": ({"router": "nowhere.yaml"}, "fleet.router", "there is no file"),
    "an unknown release": (
        {"router_options": {"epp_release": "v0.6"}},
        "fleet.router_options.epp_release",
        "there is no release 'v0.6' of the endpoint picker",
    ),
    "a load factor below 1": (
        {"router_options": {"load_factor": 0.9}},
        "fleet.router_options.load_factor",
        "load_factor should be greater than or equal to 1, not 0.9",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_fleets_are_refused_with_their_field(name: str, tmp_path: Path) -> None:
    fleet, field, what = BAD[name]
    with pytest.raises(InputError) as caught:
        scenario(tmp_path, fleet)
    assert caught.value.where == f"{tmp_path / 'mixed.yaml'}: {field}"
    assert caught.value.what.startswith(what)


def test_a_fleet_that_is_never_ready_is_refused(tmp_path: Path) -> None:
    """Requests come for about 10 s, the only replica is ready after an hour."""
    late = scenario(tmp_path, {"replicas": [{"start_s": 3600.0}]})
    with pytest.raises(InputError, match=r"fleet.replicas: no replica was ready for any of the 100 requests"):
        simulate(late)


def test_a_bad_epp_is_refused_with_its_file(tmp_path: Path) -> None:
    (tmp_path / "epp.yaml").write_text(EPP.replace("PREFIX", "prefix-scorer"), "utf-8")
    with pytest.raises(InputError, match=r"epp.yaml: plugins.1.type: unknown plugin 'prefix-scorer'"):
        simulate(scenario(tmp_path, {"router": "epp.yaml"}))
