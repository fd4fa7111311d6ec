"""Clients, API server and engine loop in simulated time, as literal timelines."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import repeat

import numpy as np
import pytest
from small_fleet import OneSecondSteps, config, one_stream, times

from servecast.sim.engine.config import EngineConfig
from servecast.sim.engine.request import Request, Stage, Stream
from servecast.sim.engine.scheduler import Scheduler
from servecast.sim.fleet.client import Client
from servecast.sim.fleet.fleet import Fleet
from servecast.sim.fleet.replica import Replica
from servecast.sim.hardware.front_end_costs import FrontEndCosts
from servecast.sim.inputs.errors import InputError
from servecast.sim.metrics.records import Run
from servecast.sim.routing.options import RouterOptions
from servecast.sim.routing.routers import ROUTERS


def run(
    stages: list[Stage],
    engine: EngineConfig,
    costs: FrontEndCosts | None = None,
    *,
    replicas: int = 1,
    router: str = "round_robin",
    noise: Iterator[float] | None = None,
) -> Run:
    costs = costs or FrontEndCosts()
    rng = np.random.default_rng(0)
    step_time = OneSecondSteps()

    def make(index: int, client: Client) -> Replica:
        factors = noise or repeat(1.0)
        return Replica(index, Scheduler(engine), step_time, factors, costs, rng, client)

    policy = ROUTERS[router](RouterOptions(), rng)
    return Fleet(make, replicas, policy, Client(costs), rng).run(stages)


def test_sync_engine_takes_an_arrival_into_the_next_step() -> None:
    """Steps end at 1, 2, 3, ...; the second request arrives at 0.5, inside step 0, and runs from 1 on."""
    result = run(one_stream([Request(0, 0.0, 10, 3, 3), Request(1, 0.5, 10, 2, 2)]), config())
    assert times(result, "scheduled") == [0.0, 1.0]
    assert times(result, "first_token") == [1.0, 2.0]
    assert times(result, "finish") == [3.0, 3.0]
    assert result.steps["decodes"].tolist() == [0, 1, 2]


def test_async_engine_takes_an_arrival_one_step_later() -> None:
    """Step 1 is composed when step 0 starts, step 2 when it ends at 1: an arrival at 0.5 runs from 2 on."""
    result = run(
        one_stream([Request(0, 0.0, 10, 4, 4), Request(1, 0.5, 10, 2, 2)]), config(async_scheduling=True)
    )
    assert times(result, "scheduled") == [0.0, 2.0]
    assert times(result, "first_token") == [1.0, 3.0]
    assert times(result, "finish") == [4.0, 4.0]


def test_an_arrival_at_the_start_of_a_step_is_in_it() -> None:
    result = run(one_stream([Request(0, 0.0, 10, 2, 2), Request(1, 1.0, 10, 1, 1)]), config())
    assert times(result, "scheduled") == [0.0, 1.0]


def test_a_closed_loop_sends_when_a_request_ends() -> None:
    """Two at a time, two steps each: the third leaves the client's semaphore at 2."""
    requests = [Request(i, 0.0, 10, 2, 2) for i in range(3)]
    result = run(one_stream(requests, max_concurrency=2), config())
    assert times(result, "arrival") == [0.0, 0.0, 0.0]
    assert times(result, "sent") == [0.0, 0.0, 2.0]
    assert times(result, "finish") == [2.0, 2.0, 4.0]


def test_a_stage_waits_for_the_last_one_to_drain_or_not() -> None:
    """Each request takes three steps; without drain the second stage starts after its second."""

    def stages(*, drain: bool) -> list[Stage]:
        first = Stage("a", [Stream("s", [Request(0, 0.0, 10, 3, 3)])], drain, None if drain else 1.0)
        return [first, Stage("b", [Stream("s", [Request(1, 0.0, 10, 3, 3)])])]

    assert times(run(stages(drain=True), config()), "sent") == [0.0, 3.0]
    assert times(run(stages(drain=False), config()), "sent") == [0.0, 1.0]


def test_a_background_stream_stops_with_the_others() -> None:
    """The background would send ten requests one after the other, but the foreground is done at 2."""
    background = Stream("b", [Request(i, 0.0, 10, 2, 2) for i in range(1, 11)], 1, background=True)
    result = run([Stage("all", [Stream("f", [Request(0, 0.0, 10, 2, 2)]), background])], config())
    assert result.requests["request_id"].tolist() == [0, 1, 2]
    assert result.requests["status"].tolist() == ["finished", "finished", "unfinished"]


def test_a_client_that_goes_away_frees_its_slot() -> None:
    """Request 0 is given up at 1.5; the engine sees it before the step at 2, which request 1 is in."""
    requests = [Request(0, 0.0, 10, 50, 50, abort_after_s=1.5), Request(1, 0.0, 10, 1, 1)]
    result = run(one_stream(requests), config(max_num_seqs=1))
    assert result.requests["status"].tolist() == ["aborted", "finished"]
    assert times(result, "scheduled") == [0.0, 2.0]


def test_a_burst_is_prepared_in_one_round() -> None:
    """Three requests of 0.1 s each arrive together and are all ready at 0.3, in one engine step."""
    result = run(
        one_stream([Request(i, 0.0, 10, 1, 1) for i in range(3)]), config(), FrontEndCosts(request_s=0.1)
    )
    assert times(result, "queued") == [0.3, 0.3, 0.3]
    assert times(result, "first_token") == [1.3, 1.3, 1.3]


def test_preparation_joins_what_overlaps_and_no_more() -> None:
    """0 and 40 overlap (0-50, then 40-90 joins: ready at 100); 200 is alone."""
    requests = [Request(i, at, 10, 1, 1) for i, at in enumerate((0.0, 40.0, 200.0))]
    result = run(one_stream(requests), config(), FrontEndCosts(request_s=50.0))
    assert times(result, "queued") == [100.0, 100.0, 250.0]


def test_a_full_round_does_not_wait_for_the_next() -> None:
    """33 requests of 1: the first 32 are ready at 32, the last at 33."""
    requests = [Request(i, 0.0, 10, 1, 1) for i in range(33)]
    result = run(one_stream(requests), config(), FrontEndCosts(request_s=1.0))
    assert times(result, "queued") == [32.0] * 32 + [33.0]


def test_without_micro_batches_preparation_is_first_come_first_served() -> None:
    """vLLM 0.32 has one thread for it (renderer_num_workers 1): three requests of 0.1 s each are ready one
    after the other."""
    costs = FrontEndCosts(request_s=0.1)
    requests = [Request(i, 0.0, 10, 1, 1) for i in range(3)]
    result = run(one_stream(requests), config(preparation_round=1), costs)
    assert times(result, "queued") == pytest.approx([0.1, 0.2, 0.3])


def test_a_long_prompt_takes_longer_to_prepare() -> None:
    """1 ms a prompt token: 100 tokens are ready at 0.1, and 150 more behind them at 0.25."""
    costs = FrontEndCosts(prompt_token_s=1e-3)
    requests = [Request(0, 0.0, 100, 1, 1), Request(1, 0.0, 150, 1, 1)]
    result = run(one_stream(requests), config(preparation_round=1), costs)
    assert times(result, "queued") == pytest.approx([0.1, 0.25])


def test_the_network_delays_what_the_client_sees_and_the_next_request_of_a_closed_loop() -> None:
    """A step of 1.0 a request, one at a time, 0.25 there and back: first tokens at 1.25, 2.5 and 3.75."""
    costs = FrontEndCosts().over_network(0.25)
    requests = [Request(i, 0.0, 10, 1, 1) for i in range(3)]
    result = run(one_stream(requests, max_concurrency=1), config(), costs)
    assert times(result, "first_token") == [1.25, 2.5, 3.75]


def test_latency_delays_and_costs_vary_with_mean_one() -> None:
    requests = [Request(i, 0.0, 10, 1, 1) for i in range(4000)]
    result = run(one_stream(requests), config(), FrontEndCosts(latency_s=1.0, cv=0.3))
    seconds = result.requests["queued"]
    assert seconds.mean() == pytest.approx(1.0, abs=0.02)
    assert seconds.std() == pytest.approx(0.3, abs=0.02)


def test_tokens_are_streamed_one_after_the_other() -> None:
    """Two first tokens of one step at 1.0: the server needs 0.1 each, the client 0.2 each, in a pipeline."""
    costs = FrontEndCosts(token_s=0.1, client_token_s=0.2)
    result = run(one_stream([Request(i, 0.0, 10, 1, 1) for i in range(2)]), config(), costs)
    assert times(result, "first_token") == [1.3, 1.5]


def test_tokens_are_delivered_late_and_requests_are_not() -> None:
    """A step of 1.0; its token is on its way for 0.25, and the engine, free at 1.0, does not wait for it."""
    result = run(one_stream([Request(0, 0.0, 10, 2, 2)]), config(), FrontEndCosts(delivery_s=0.25))
    assert times(result, "first_token") == [1.25]
    assert times(result, "finish") == [2.25]
    assert times(result, "ended") == [2.0]


def test_a_server_that_lags_sends_a_stream_s_tokens_together() -> None:
    """Steps of 1.0 with two tokens that take 0.8 each to send. Those of the last, at 4.0, are read from 4.9
    to 5.7 (one round later), not until 7.5 (eight times 0.8 after the first step)."""
    costs = FrontEndCosts(token_s=0.8, client_token_s=0.1)
    result = run(one_stream([Request(i, 0.0, 10, 4, 4) for i in range(2)]), config(), costs)
    assert times(result, "finish") == pytest.approx([5.1, 5.5])  # spread over the batch


def test_gaps_count_every_token_but_the_first() -> None:
    requests = [Request(i, 0.3 * i, 12, 5, 5) for i in range(6)]
    for asynchronous in (False, True):
        result = run(one_stream(requests), config(max_num_seqs=3, async_scheduling=asynchronous))
        assert result.itl["weight"].sum() == 6 * 4
        assert (result.itl["gap"] > 0).all()


def test_preempted_requests_have_one_long_gap() -> None:
    """Two requests of 47 tokens share four blocks: the second is preempted at its block border and
    comes back when the first is done; all its tokens still count, and one gap is long."""
    requests = [Request(i, 0.0, 17, 30, 30) for i in range(2)]
    result = run(one_stream(requests), config(num_gpu_blocks=5))
    assert result.requests["preemptions"].tolist() == [0, 1]
    assert result.itl["weight"].sum() == 2 * 29
    assert result.itl["gap"].max() == pytest.approx(15.0, abs=2.0)


def test_round_robin_and_least_outstanding() -> None:
    """Request 0 is long: in turn, request 2 joins it; by load, request 2 goes where request 1 has ended."""
    requests = [Request(0, 0.0, 10, 50, 50), Request(1, 0.0, 10, 1, 1), Request(2, 5.0, 10, 1, 1)]
    replicas = {
        name: run(one_stream(requests), config(), replicas=2, router=name).requests["replica"].tolist()
        for name in ("round_robin", "least_outstanding")
    }
    assert replicas == {"round_robin": [0, 1, 0], "least_outstanding": [0, 1, 1]}


def test_noise_does_not_undercut_the_roofline() -> None:
    result = run(one_stream([Request(0, 0.0, 10, 4, 4)]), config(), noise=iter([0.5, 0.95, 1.5, 1.0]))
    assert result.steps["duration"].tolist() == [0.9, 0.95, 1.5, 1.0]


def test_two_fleets_in_one_process_do_not_touch_each_other() -> None:
    requests = [Request(i, 0.1 * i, 20, 5, 5) for i in range(20)]
    alone = run(one_stream(requests), config())
    run(one_stream(requests[:7]), config(max_num_seqs=2))
    again = run(one_stream(requests), config())
    assert alone.requests.equals(again.requests)
    assert alone.steps.equals(again.steps)


def test_what_can_never_be_admitted_is_refused() -> None:
    engine = config(enable_chunked_prefill=False, max_num_batched_tokens=32)
    with pytest.raises(InputError, match="never admitted"):
        run(one_stream([Request(0, 0.0, 40, 1, 1)]), engine)


def test_a_negative_cost_is_refused() -> None:
    with pytest.raises(InputError, match=r"front_end.token_s: token_s is -0.1"):
        FrontEndCosts(token_s=-0.1)


def test_a_client_may_go_away_before_the_engine_has_its_request() -> None:
    """Given up at 0.5: on the way, in preparation, and in the client, each of which takes until 1."""
    requests = [Request(0, 0.0, 10, 2, 2), Request(1, 0.0, 10, 2, 2, abort_after_s=0.5)]
    for costs in (
        FrontEndCosts(latency_s=1.0),
        FrontEndCosts(request_s=1.0),
        FrontEndCosts(client_request_s=1.0),
    ):
        result = run(one_stream(requests), config(), costs)
        assert result.requests["status"].tolist() == ["finished", "aborted"]
        assert result.steps["prefill_requests"].sum() == 1


def test_a_background_stream_stops_without_drain_too() -> None:
    """The foreground ends at 2, the stage at 5: the background, a request each 2 s, sends nothing after 2."""
    background = Stream("b", [Request(i, 0.0, 10, 2, 2) for i in range(1, 40)], 1, background=True)
    first = Stage("a", [Stream("f", [Request(0, 0.0, 10, 2, 2)]), background], drain=False, duration_s=5.0)
    result = run([first, Stage("b", [Stream("f", [Request(50, 0.0, 10, 2, 2)])])], config())
    assert result.requests["request_id"].tolist() == [0, 1, 2, 50]
