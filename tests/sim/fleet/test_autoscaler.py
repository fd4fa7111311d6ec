"""Autoscalers as logs worked by hand from Kubernetes' and llm-d's rules, and a fleet that follows one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from pydantic import TypeAdapter
from small_fleet import OneSecondSteps, config, one_stream, times
from small_scenarios import small

from servecast.sim.engine.request import Request
from servecast.sim.engine.scheduler import Scheduler
from servecast.sim.fleet.autoscaler import Autoscaler, AutoscalerSpec, Observed
from servecast.sim.fleet.client import Client
from servecast.sim.fleet.fleet import Fleet
from servecast.sim.fleet.replica import Replica
from servecast.sim.hardware.front_end_costs import FrontEndCosts
from servecast.sim.inputs.errors import InputError
from servecast.sim.routing.options import RouterOptions
from servecast.sim.routing.routers import ROUTERS
from servecast.sim.run.simulate import simulate


def spec(kind: str, **fields: Any) -> Any:
    known = {
        "hpa": {"metric": "running", "target": 10},
        "keda": {"metric": "waiting", "threshold": 10},
        "wva": {},
    }
    return TypeAdapter(AutoscalerSpec).validate_python(
        {"kind": kind, "max_replicas": 20, **known[kind], **fields}
    )


def log(scaler: Autoscaler, replicas: int, ticks: Sequence[tuple[float, Sequence[float]]]) -> list[int]:
    """Replicas after each tick, at which so many pods show a metric."""
    found = []
    for now, values in ticks:
        pods = [{"running": value, "waiting": value} for value in values]
        replicas = scaler.desired(now, Observed(replicas, replicas - len(pods), pods))
        found.append(replicas)
    return found


def test_a_log_of_kubernetes_decisions() -> None:
    """Target 10, tolerance 0.1, at most 4 pods or 100 % more in 15 s, the highest of 60 s on the way down.

    at   pods             what happens
    15   10.5, 11         10.75 / 10 is within the tolerance
    30   30, 30           3 x 2 = 6 pods; 2 + 4 = 6 may be there
    45   30, 30           the four that start count as 0: (60 / 6) / 10 = 1
    60   40, 40           80 / 6 / 10 = 1.33, x 6 = 8
    75   4 each           0.4 x 8 = 3.2: 4, but 8 was recommended at 60
    105  4 each           8 was recommended less than 60 s ago
    120  4 each           only 4 were, since: 8 - 100 % allows them
    135  0 each           0, but one must be
    """
    scaler = spec("hpa", scale_down={"stabilization_window_s": 60}).policy(2)
    ticks = [(15, [10.5, 11]), (30, [30, 30]), (45, [30, 30]), (60, [40, 40])]
    assert log(scaler, 2, ticks) == [2, 6, 6, 8]
    quiet = [(float(at), [4.0] * 8) for at in (75, 90, 105, 120)]
    assert log(scaler, 8, quiet) == [8, 8, 8, 4]
    assert log(scaler, 4, [(float(at), [0.0] * 4) for at in (135, 150, 165)]) == [4, 4, 4]
    assert log(scaler, 4, [(180.0, [0.0] * 4)]) == [1]


def test_a_burst_is_bounded_by_the_policies_and_by_the_maximum() -> None:
    """1 pod: 1 + 4; 5 a sync later: 5 + 100 % = 10; 10: 20, the maximum too. All are ready at once."""
    scaler = spec("hpa").policy(1)
    assert log(scaler, 1, [(15, [900]), (30, [900] * 5), (45, [900] * 10), (60, [900] * 20)]) == [
        5,
        10,
        20,
        20,
    ]


def test_policies_count_what_has_changed_in_their_period() -> None:
    """One pod in 60 s: 4 to 3 at 15, and no further until 75 is more than 60 s after it."""
    down = {"policies": [{"type": "pods", "value": 1, "period_s": 60}]}
    scaler = spec("hpa", scale_down=down).policy(1)
    ticks = [(float(at), [1.0] * pods) for at, pods in ((15, 4), (30, 3), (60, 3), (75, 3), (90, 2))]
    assert log(scaler, 4, ticks) == [3, 3, 3, 2, 2]


@pytest.mark.parametrize(
    ("select", "found"),
    [("max", 10), ("min", 12), ("disabled", 20)],
)
def test_the_policy_that_is_selected(select: str, found: int) -> None:
    """20 pods that want to be 1: 8 fewer, or 50 %."""
    policies = [{"type": "pods", "value": 8}, {"type": "percent", "value": 50}]
    scaler = spec("hpa", scale_down={"policies": policies, "select_policy": select}).policy(1)
    assert log(scaler, 20, [(15, [0.0] * 20)]) == [found]


def test_pods_without_a_metric_do_not_turn_the_direction() -> None:
    """One pod at 5 of 10 would halve; the one that starts counts as at its target: 15 / 20 x 2 = 1.5: 2 stay.
    At 15 it would grow, which the other at 0 turns: 15 / 20."""
    assert log(spec("hpa", scale_down={}).policy(2), 2, [(15, [5])]) == [2]
    assert log(spec("hpa").policy(2), 2, [(15, [15])]) == [2]


def test_keda_asks_for_a_share_of_the_sum() -> None:
    """35 over 3 x 10: 3.5, so 4; 32 are within a tenth; what starts counts among the replicas."""
    assert log(spec("keda").policy(3), 3, [(15, [20, 15, 0]), (30, [30, 5])]) == [4, 4]
    assert log(spec("keda").policy(3), 3, [(15, [16, 16, 0])]) == [3]


def saturated(*pods: tuple[float, float], asked: int | None = None) -> int:
    seen = [{"max_kv_usage": usage, "max_waiting": waiting} for usage, waiting in pods]
    count = asked or len(pods)
    return int(
        spec("wva", max_replicas=9).policy(count).desired(15.0, Observed(count, count - len(pods), seen))
    )


def test_the_variant_autoscaler_keeps_some_capacity_to_spare() -> None:
    assert saturated((0.75, 2), (0.76, 2)) == 3  # 0.045 to spare of the KV cache, and 0.1 is asked for
    assert saturated((0.5, 3), (0.5, 2)) == 3  # 2.5 of the queue, and 3 are asked for
    assert saturated((0.9, 0), (0.6, 0)) == 2  # the saturated one is left out: 0.2
    assert saturated((0.9, 0), (0.85, 0)) == 3  # nothing to spare where all are
    assert saturated((0.2, 0), (0.2, 0)) == 1  # 0.4 in one, and 0.4 to spare
    assert saturated((0.4, 0), (0.4, 0)) == 2  # 0.8 in one: none to spare
    assert saturated((0.0, 0)) == 1
    assert saturated((0.79, 4), asked=2) == 2  # not while one starts


def test_a_fleet_follows_its_autoscaler() -> None:
    """Eight run at a time, in steps of a second. 20 requests at 0, of 100 tokens. Scraped and decided at 15:
    20 / 5 = 4 replicas, which take requests from 20 on. At 30, 20 / 4 / 5 = 1 changes nothing."""
    sent = [Request(i, 0.0, 4, 100, 100) for i in range(20)] + [
        Request(20 + i, 19.0 + i, 4, 2, 2) for i in range(3)
    ]
    free, rng = FrontEndCosts(), np.random.default_rng(0)

    def make(index: int, client: Client) -> Replica:
        engine, law = Scheduler(config()), OneSecondSteps()
        return Replica(index, engine, law, iter(lambda: 1.0, None), free, rng, client)

    scaler = spec("hpa", metric="in_flight", target=5, startup_s=5)
    router = ROUTERS["least_outstanding"](RouterOptions(), rng)
    fleet = Fleet(make, 1, router, Client(free), rng, autoscaler=scaler)
    run = fleet.run(one_stream(sent))
    assert run.requests["replica"].tolist() == [0] * 21 + [1, 2]
    assert times(run, "finish")[20:] == [202.0, 22.0, 23.0]  # the first behind three batches of eight
    assert fleet.scaling is not None
    first = [(each.ordered_s, each.ready_s, each.replica) for each in fleet.scaling.lives[:4]]
    assert first == [(0.0, 0.0, 0), (15.0, 20.0, 1), (15.0, 20.0, 2), (15.0, 20.0, 3)]


@pytest.mark.parametrize("router", ["round_robin", "session_affinity", "consistent_hashing"])
def test_the_same_seed_scales_in_the_same_way(tmp_path: Any, router: str) -> None:
    scaler = {"kind": "keda", "metric": "in_flight", "threshold": 4, "max_replicas": 6, "startup_s": 1}
    workload = {
        "arrivals": {"kind": "poisson", "request_rate": 40},
        "num_requests": 3000,
        "prompt_tokens": 300,
        "output_tokens": 40,
    }
    fleet = {"replicas": 1, "router": router, "autoscaler": scaler}
    runs = [simulate(small(tmp_path, fleet=fleet, workload=workload)) for _ in range(2)]
    assert runs[0].requests.equals(runs[1].requests)
    assert len(runs[0].meta["lives"]) > 1
    assert (runs[0].requests["status"] == "finished").all()
    for life in runs[0].meta["lives"]:
        own = runs[0].requests[runs[0].requests["replica"] == life.replica]
        assert not len(own) or own["sent"].min() >= life.ready_s
        assert not len(own) or life.drain_s is None or own["sent"].max() <= life.drain_s


@pytest.mark.parametrize(
    ("fleet", "what"),
    [
        ({"autoscaler": {"kind": "hpa", "max_replicas": 3}}, "metric"),
        ({"autoscaler": {"kind": "vpa", "max_replicas": 3}}, "'vpa' is not a known kind"),
        ({"autoscaler": {"kind": "wva", "max_replicas": 3, "min_replicas": 4}}, "min_replicas 4 is above"),
        (
            {"autoscaler": {"kind": "hpa", "metric": "kv_usage", "target": 80, "max_replicas": 3}},
            "kv_usage never is 80: it is a share",
        ),
        (
            {"autoscaler": {"kind": "hpa", "metric": "cpu", "target": 1, "max_replicas": 3}},
            "metric cannot be 'cpu'",
        ),
        (
            {"autoscaler": {"kind": "wva", "max_replicas": 3}, "replicas": [{"count": 2}]},
            "replicas that differ",
        ),
        ({"autoscaler": {"kind": "wva", "max_replicas": 3, "scale_up": {"policies": []}}}, "policies"),
    ],
)
def test_what_cannot_scale_is_refused(tmp_path: Any, fleet: dict[str, Any], what: str) -> None:
    with pytest.raises(InputError) as error:
        small(tmp_path, fleet=fleet)
    assert what in str(error.value)
