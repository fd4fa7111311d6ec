"""An engine with a KV connector in simulated time, as literal timelines: steps last a second, polls a
millisecond (EngineCore._process_engine_step sleeps 1 ms after a step without tokens)."""

from __future__ import annotations

from itertools import repeat

import numpy as np
import pytest
from small_fleet import OneSecondSteps, config, one_stream, times
from timed_store import Plan, TimedStore

from servecast.sim.engine.request import Request
from servecast.sim.engine.scheduler import Scheduler
from servecast.sim.fleet.client import Client
from servecast.sim.fleet.fleet import Fleet
from servecast.sim.fleet.replica import Replica
from servecast.sim.hardware.front_end_costs import FrontEndCosts
from servecast.sim.metrics.records import Run
from servecast.sim.routing.options import RouterOptions
from servecast.sim.routing.routers import ROUTERS


def run(requests: list[Request], store: TimedStore, *, host_waits: bool = False, **engine: object) -> Run:
    costs, rng, law = FrontEndCosts(), np.random.default_rng(0), OneSecondSteps()

    def make(index: int, client: Client) -> Replica:
        scheduler = Scheduler(config(**engine), store)
        replica = Replica(index, scheduler, law, repeat(1.0), costs, rng, client)
        replica.loops[0].host_waits = host_waits  # type: ignore[union-attr]
        return replica

    router = ROUTERS["round_robin"](RouterOptions(), rng)
    return Fleet(make, 1, router, Client(costs), rng).run(one_stream(requests))


@pytest.mark.parametrize(("is_async", "first_token"), [(False, 3.002), (True, 3.003)])
def test_an_idle_engine_polls(is_async: bool, first_token: float) -> None:
    """A load of 2.0005 s is reported by the poll at 2.001. Sync, the next one schedules its last token;
    async, that one reads the report, and the one after it does. What lies between is not polled."""
    store = TimedStore({0: Plan(remote=10, load_s=2.0005)})
    result = run([Request(0, 0.0, 10, 1, 1)], store, async_scheduling=is_async)
    assert times(result, "first_token") == [first_token]
    assert result.requests["cached_tokens"].tolist() == [10]
    assert store.polls < 12


@pytest.mark.parametrize(("host_waits", "first_token"), [(False, 4.0), (True, 3.0)])
def test_a_busy_engine_hears_of_a_load_by_its_steps(host_waits: bool, first_token: float) -> None:
    """Steps start at 0, 1, 2, 3; the load is done at 1.5. On a GPU the step launched at 2 reports it when it
    ends, so that it runs from 3 on; where the host waits for the step, that of 1 does."""
    requests = [Request(0, 0.0, 10, 6, 6), Request(1, 0.0, 10, 1, 1)]
    store = TimedStore({1: Plan(remote=10, load_s=1.5)})
    result = run(requests, store, host_waits=host_waits)
    assert times(result, "first_token") == [1.0, first_token]
    assert times(result, "finish")[0] == 6.0


def test_a_load_within_the_step_makes_it_longer() -> None:
    store = TimedStore({0: Plan(remote=8, load_s=0.25, sync=True)})
    result = run([Request(0, 0.0, 10, 2, 2)], store)
    assert times(result, "first_token") == [1.25]
    assert times(result, "finish") == [2.25]
    assert result.steps["duration"].tolist()[0] == 1.25


def test_a_load_within_a_step_runs_beside_the_step_before() -> None:
    """Async, step 1 is launched when step 0 starts: of its load of 1.25 s it waits 0.25."""
    requests = [Request(0, 0.0, 10, 2, 2), Request(1, 0.0, 10, 1, 1)]
    store = TimedStore({1: Plan(remote=8, load_s=1.25, sync=True)})
    result = run(requests, store, async_scheduling=True, max_num_batched_tokens=10, max_num_seqs=2)
    assert times(result, "first_token") == [1.0, 2.25]


def test_an_arrival_wakes_a_polling_engine() -> None:
    """It is taken by the first poll after it, at 1.235; the load is reported at 30, and acted upon by the
    next poll."""
    requests = [Request(0, 0.0, 10, 1, 1), Request(1, 1.2345, 10, 1, 1)]
    store = TimedStore({0: Plan(remote=10, load_s=30.0)})
    result = run(requests, store)
    assert times(result, "scheduled")[1] == 1.235
    assert times(result, "first_token") == [31.001, 2.235]


def test_a_producers_request_ends_for_its_client_while_its_blocks_stay() -> None:
    """Blocks for one prompt: the second request waits until those of the first have been read, 3 s after the
    empty step that tells the workers of its end."""
    requests = [Request(0, 0.0, 160, 1, 1), Request(1, 0.0, 160, 1, 1)]
    store = TimedStore({0: Plan(hold_s=3.0)}, role="kv_producer")
    changes = {"num_gpu_blocks": 12, "max_num_batched_tokens": 256, "enable_prefix_caching": False}
    result = run(requests, store, **changes)
    assert times(result, "finish")[0] == 1.0
    assert times(result, "scheduled")[1] == 4.001
    assert result.requests["status"].tolist() == ["finished", "finished"]


def test_a_failed_load_ends_its_request() -> None:
    requests = [Request(0, 0.0, 10, 2, 2), Request(1, 2.0, 10, 1, 1)]
    result = run(requests, TimedStore({0: Plan(remote=10, load_s=0.5, fails=True)}))
    assert result.requests["status"].tolist() == ["failed", "finished"]
    assert times(result, "first_token")[1] == 3.0


def test_or_its_prompt_is_computed() -> None:
    """The poll at 0.5 reports it; the next one asks again, and the connector has nothing any more."""
    store = TimedStore({0: Plan(remote=10, load_s=0.5, fails=True)}, policy="recompute")
    result = run([Request(0, 0.0, 10, 2, 2)], store)
    assert times(result, "first_token") == [1.501]
    assert result.requests["status"].tolist() == ["finished"]


def test_a_client_that_goes_away_while_its_load_runs() -> None:
    """Its blocks stay until the load is over; the engine has none for the second request before."""
    requests = [Request(0, 0.0, 160, 1, 1, abort_after_s=1.0), Request(1, 0.0, 160, 1, 1)]
    store = TimedStore({0: Plan(remote=160, load_s=5.0)})
    changes = {"num_gpu_blocks": 12, "max_num_batched_tokens": 256, "enable_prefix_caching": False}
    result = run(requests, store, **changes)
    assert result.requests["status"].tolist() == ["aborted", "finished"]
    assert 5.0 <= times(result, "scheduled")[1] <= 5.002
