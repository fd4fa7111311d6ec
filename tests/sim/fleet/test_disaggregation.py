"""Prefill and decode servers: the way of one request, worked out by hand, and what befalls it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import repeat
from typing import Any

import numpy as np
import pytest
from small_fleet import OneSecondSteps, config, one_stream

from servecast.sim.engine.request import Request
from servecast.sim.engine.scheduler import Scheduler
from servecast.sim.fleet.client import Client
from servecast.sim.fleet.disaggregation import Link
from servecast.sim.fleet.fleet import Fleet
from servecast.sim.fleet.kv_connectors import Exchange, NixlConnector
from servecast.sim.fleet.kv_ports import KVSide, Ports, runs, sources
from servecast.sim.fleet.legs import Disaggregation
from servecast.sim.fleet.replica import Replica
from servecast.sim.fleet.spec import Life
from servecast.sim.hardware.front_end_costs import FrontEndCosts
from servecast.sim.inputs.schema import parse
from servecast.sim.metrics.records import Run
from servecast.sim.routing.pools import Pools
from servecast.sim.routing.routers import RoundRobin
from servecast.sim.run.disaggregated import kv_side
from servecast.sim.scenario.deployment import Deployment
from servecast.sim.scenario.scenario import Scenario

BLOCK = 16
SIDE = KVSide(ranks=1, heads=8, block_size=BLOCK, bytes_per_block=1000, tensors=1)


def link(**changes: Any) -> Link:
    """A block takes 0.1 s, and nothing else any time."""
    settings: dict[str, Any] = {"kind": "infiniband", "bandwidth": 1e4, "latency_s": 0.0, "descriptor_s": 0.0}
    return Link(**settings | {"handshake_s": 0.0} | changes)


def run(
    requests: Sequence[Request],
    *,
    prefill: int = 1,
    decode: int = 1,
    hop_s: float = 0.25,
    policy: Any = "fail",
    lease_s: float = 30.0,
    lives: dict[int, Life] | None = None,
    over: Link | None = None,
    direct_below: int = 0,
    **flags: Any,
) -> tuple[Run, Fleet, Exchange]:
    """Servers whose steps last a second, without front end; prefill servers have the first numbers."""
    wire, count = over or link(), prefill + decode
    exchange = Exchange(wire, Ports(wire, [SIDE] * count), lease_s, np.random.default_rng(0))

    def make(index: int, client: Client) -> Replica:
        prefills = index < prefill
        role = "prefill" if prefills else "decode"
        connector = NixlConnector(
            exchange, index, "kv_producer" if prefills else "kv_consumer", policy, prefills=prefills
        )
        steps = OneSecondSteps()
        scheduler = Scheduler(config(block_size=BLOCK, **flags), connector)
        made = Replica(
            index, scheduler, steps, repeat(1.0), FrontEndCosts(),
            np.random.default_rng(0), client, role=role,
        )  # fmt: skip
        connector.clock = lambda: made.now
        return made

    router = Pools(RoundRobin(), RoundRobin(), direct_below)
    fleet = Fleet(
        make, [(lives or {}).get(index, Life()) for index in range(count)], router,
        Client(FrontEndCosts()), np.random.default_rng(0),
        disaggregation=Disaggregation(router, hop_s, exchange),
    )  # fmt: skip
    return fleet.run(one_stream(list(requests))), fleet, exchange


def request(number: int, prompt: int = 64, output: int = 3, at: float = 0.0, **more: Any) -> Request:
    return Request(number, at, prompt, output, output, (), **more)


def test_one_request_by_hand() -> None:
    """P computes 64 tokens from 0 to 1, the proxy takes 0.25, and D's first, empty step at 1.25 asks for 4
    blocks, which take 4 x 1000 bytes / 1e4 = 0.4 s: they are there at 1.65. D looks once a millisecond; the
    step that sees it computes nothing, and the one after it the last token of the prompt."""
    found, _, exchange = run([request(0)])
    row = found.requests.iloc[0]
    assert row["prefill_replica"] == 0
    assert row["replica"] == 1
    assert [row[name] for name in ("prefill_scheduled", "prefill_ended")] == [0.0, 1.0]
    assert row["queued"] == 1.25
    assert row["kv_transfer_start"] == pytest.approx(1.25)
    assert row["kv_transfer_end"] == pytest.approx(1.65)
    assert row["kv_transfer_bytes"] == 4000
    assert row["scheduled"] == pytest.approx(1.65, abs=0.0021)
    assert row["first_token"] == pytest.approx(row["scheduled"] + 1)
    assert row["finish"] == pytest.approx(row["scheduled"] + 3)
    steps = found.steps
    assert steps[steps["replica"] == 0][["prefill_tokens", "decodes"]].to_numpy().tolist() == [[64, 0]]
    assert steps[steps["replica"] == 1]["prefill_tokens"].tolist() == [1, 0, 0]
    assert exchange.held[0].gone


def test_a_prefill_server_keeps_its_blocks_until_they_were_read() -> None:
    """Of 5 usable blocks a prompt of 64 tokens takes 4, so that the next is admitted when the first was read,
    at 1.65, and not when it was computed, at 1."""
    found, _, _ = run([request(0), request(1)], num_gpu_blocks=6, decode=2)
    second = found.requests.iloc[1]
    assert second["prefill_scheduled"] == pytest.approx(1.65, abs=0.0021)


def test_what_a_decode_server_has_cached_is_not_sent_again() -> None:
    """Two prompts of the same 64 tokens and 16 of their own: of the second 1 of 5 blocks goes, and of a third
    that is the second again none: (80 - 80 is nothing, as vLLM asks for what lies behind whole local
    blocks)."""
    asked = [
        Request(0, 0.0, 80, 2, 2, ((7, 64),)),
        Request(1, 10.0, 80, 2, 2, ((7, 64),)),
        Request(2, 20.0, 96, 2, 2, ((7, 64),)),
    ]
    found, _, _ = run(asked)
    assert found.requests["kv_transfer_bytes"].tolist() == [5000, 1000, 2000]


def test_a_short_prompt_goes_straight_to_a_decode_server() -> None:
    found, _, _ = run([request(0, 15), request(1, 16)], direct_below=16)
    assert found.requests["prefill_replica"].isna().tolist() == [True, False]
    assert np.isnan(found.requests["kv_transfer_start"].iloc[0])
    assert found.requests["first_token"].iloc[0] == 1.0


def test_the_handshake_of_a_pair_delays_its_first_transfer_alone() -> None:
    found, _, _ = run([request(0), request(1, at=10.0)], over=link(handshake_s=0.5))
    took = found.requests["kv_transfer_end"] - found.requests["queued"]
    assert took.tolist() == pytest.approx([0.9, 0.4])


def test_transfers_through_one_port_follow_each_other() -> None:
    """Two prompts are ready at one time for two decode servers: the second leaves when the first has."""
    found, _, _ = run([request(0, 32), request(1, 32)], decode=2)
    assert found.requests["kv_transfer_end"].tolist() == pytest.approx([1.45, 1.65])


def test_a_failed_transfer_ends_its_request_or_is_computed_again() -> None:
    """kv_load_failure_policy: fail by default; recompute computes the prompt where it decodes."""
    broken = link(failure_share=1.0)
    failed, fleet, _ = run([request(0)], over=broken)
    assert failed.requests["status"].tolist() == ["failed"]
    assert fleet.failures == {"its KV cache could not be loaded": 1}
    again, _, exchange = run([request(0)], over=broken, policy="recompute")
    assert exchange.held[0].until == 31 * 10**12  # nobody said that it was read: 1 s and a lease
    assert again.requests["status"].tolist() == ["finished"]
    steps = again.steps[again.steps["replica"] == 1]
    assert steps["prefill_tokens"].tolist() == [64, 0, 0]


def test_a_prefill_server_that_fails_takes_its_prompts_with_it() -> None:
    """It fails at 1.4, while D reads; the next request finds it gone, and fails, too."""
    found, fleet, _ = run([request(0), request(1, at=5.0)], prefill=2, lives={0: Life(fail_s=1.4)})
    assert found.requests["status"].tolist() == ["failed", "finished"]
    assert fleet.failures == {"its KV cache could not be loaded": 1}


def test_a_prompt_that_is_lost_with_its_server_has_failed() -> None:
    found, fleet, _ = run([request(0)], lives={0: Life(fail_s=0.5)})
    assert found.requests["status"].tolist() == ["failed"]
    assert fleet.failures == {"in flight on a replica that failed": 1}


def test_a_client_that_goes_between_the_servers_leaves_blocks_until_their_lease_ends() -> None:
    """It gives up at 1.1, between P's answer at 1 and D at 1.25: P frees at 1 + 5 s, and admits the next
    then."""
    asked = [request(0, abort_after_s=1.1), request(1, at=1.2)]
    found, _, exchange = run(asked, num_gpu_blocks=6, lease_s=5.0)
    assert found.requests["status"].tolist() == ["aborted", "finished"]
    assert exchange.held[0].until == 6 * 10**12
    assert found.requests["prefill_scheduled"].iloc[1] == pytest.approx(6.0, abs=0.0021)


def test_a_client_that_goes_while_its_request_waits_to_load_frees_both_sides() -> None:
    """D's pool is full with the first until it has ended; the second gives up while it waits there."""
    asked = [request(0, output=10), request(1, output=10, abort_after_s=4.0)]
    found, _, exchange = run(asked, prefill=2, num_gpu_blocks=7, lease_s=1000.0)
    assert found.requests["status"].tolist() == ["finished", "aborted"]
    assert exchange.held[1].gone


def test_a_decode_server_that_fails_lets_the_lease_run_out() -> None:
    """Its last heartbeat, at its receipt of the request, extends the lease to two thirds of it from then."""
    found, _, exchange = run([request(0)], lives={1: Life(fail_s=1.5)}, over=link(bandwidth=1e3), lease_s=3.0)
    assert found.requests["status"].tolist() == ["failed"]
    assert exchange.held[0].until == pytest.approx(4 * 10**12)  # 1 + 3 s, later than 1.25 + 2 s


# ---- who reads what -----------------------------------------------------------------------------------


def side(ranks: int, heads: int = 8) -> KVSide:
    return KVSide(ranks, heads, BLOCK, 1000, 1)


@pytest.mark.parametrize(
    ("prefill", "decode", "expected"),
    [
        (side(4), side(4), [(0,), (1,), (2,), (3,)]),  # one to one
        (side(2), side(4), [(0,), (0,), (1,), (1,)]),  # several read their heads of one
        (side(4), side(2), [(0, 1), (2, 3)]),  # one reads from several
        (side(8, 4), side(2, 4), [(0, 2), (4, 6)]),  # each head once, although two ranks have it
        (side(4, 1), side(2, 1), [(0,), (2,)]),  # latents are everywhere
        (side(1, 1), side(4, 1), [(0,), (0,), (0,), (0,)]),
    ],
)
def test_who_reads_from_whom(prefill: KVSide, decode: KVSide, expected: list[tuple[int, ...]]) -> None:
    """compute_tp_mapping of vLLM 0.32 (nixl/tp_mapping.py)."""
    assert [tuple(sources(prefill, decode, rank)) for rank in range(decode.ranks)] == expected


def test_ranks_have_ports_of_their_own() -> None:
    """Four ranks move 10 blocks of 1000 bytes in the time of one; from two ports it takes twice that."""
    same = Ports(link(), [side(4), side(4)])
    assert same.send(0, 1, 10, 1, 0) == (10**12, 40_000)
    fewer = Ports(link(), [side(2), side(4)])
    assert fewer.send(0, 1, 10, 1, 0) == (2 * 10**12, 40_000)


def test_one_port_a_server_is_shared_by_its_ranks() -> None:
    ports = Ports(link(kind="tcp", per_server=True), [side(4), side(4)])
    assert ports.send(0, 1, 10, 1, 0) == (4 * 10**12, 40_000)


def test_runs_of_blocks_that_neighbour_on_both_sides_are_one_descriptor() -> None:
    assert runs([1, 2, 3, 4], [7, 8, 9, 10]) == 1
    assert runs([1, 2, 3, 4], [7, 8, 10, 11]) == 2
    assert runs([1, 3, 4], [7, 8, 10]) == 3


def test_descriptors_take_their_time_before_the_wire() -> None:
    """10 descriptors a tensor, 2 tensors, 1 ms each: 20 ms, and 1 s on the wire."""
    ports = Ports(link(descriptor_s=1e-3), [KVSide(1, 8, BLOCK, 1000, 2)] * 2)
    assert ports.send(0, 1, 10, 10, 0)[0] == pytest.approx(1.02e12)


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
def test_a_port_is_an_m_d_1_queue(load: float) -> None:
    """Poisson arrivals, one size: the mean wait is load x service / 2 (1 - load) (Pollaczek, Khinchine)."""
    rng, service, count = np.random.default_rng(1), 0.1, 200_000
    ports = Ports(link(), [SIDE] * 65)
    times = np.cumsum(rng.exponential(service / load, count))
    to = rng.integers(1, 65, count)  # so many that none of them is the bottleneck
    waits = [
        ports.send(0, int(server), 1, 1, int(time * 1e12))[0] / 1e12 - time - service
        for time, server in zip(times.tolist(), to, strict=True)
    ]
    parts = np.array(waits).reshape(50, -1).mean(axis=1)
    error = 3.5 * parts.std(ddof=1) / np.sqrt(len(parts))
    assert abs(parts.mean() - load * service / (2 * (1 - load))) < error


def test_the_bytes_of_a_known_model() -> None:
    """Llama-3.1-8B keeps 32 layers x 2 x 8 heads x 128 x 2 bytes = 131,072 bytes a token; of Llama-3.1-70B
    with 80 layers, on 4 ranks, 81,920 bytes a token are on each."""
    small = Deployment.of(scenario("Llama-3.1-8B-Instruct", 1))
    assert kv_side(small) == KVSide(1, 8, 16, 16 * 131_072, 64)
    large = Deployment.of(scenario("Llama-3.1-70B-Instruct", 4))
    assert kv_side(large) == KVSide(4, 8, 16, 16 * 81_920, 160)


def scenario(model: str, ranks: int, **fields: Any) -> Scenario:
    document = {
        "schema_version": 1,
        "name": "pools",
        "model": {"config": model},
        "gpu": {"name": "h100"},
        "engine": {"version": "0.32", "tensor_parallel_size": ranks, "max_model_len": 8192},
        "workload": {
            "arrivals": {"kind": "poisson", "request_rate": 4},
            "prompt_tokens": 1000,
            "output_tokens": 20,
            "num_requests": 20,
        },
    }
    return parse(Scenario, document | fields, source="pools.yaml")
