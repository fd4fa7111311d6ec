"""Which engine core an API server picks, against vLLM's own code; what the coordinator tells it, by hand."""

from __future__ import annotations

import ast
import random
import sys
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
from places import REPOSITORY

from servecast.sim.engine.data_parallel import DataParallel, balancing_of, sync_interval_of
from servecast.sim.engine.rules import RELEASES
from servecast.sim.fleet.balance import INTERVAL_PS, Balance, Balancer

VLLM = REPOSITORY / ".venv-vllm"
UNPACKED = {
    *("0.20", "0.23", "0.32", "0.33"),  # by `make vllm`; the others by `make parity-ladder`
    *(folder.name.removeprefix("vllm-") for folder in VLLM.glob("vllm-0.*")),
}
MS = 10**9


def theirs(release: str) -> Any:
    """``DPLBAsyncMPClient.get_core_engine_for_request`` of a release, from its source, as a function."""
    packages = VLLM / f"vllm-{release}"
    if not packages.is_dir():
        (installed,) = VLLM.glob(f"lib/python3*/site-packages/vllm-{release}.*.dist-info")
        packages = installed.parent
    source = (packages / "vllm" / "v1" / "engine" / "core_client.py").read_text()
    classes = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
    client = next(node for node in classes if node.name == "DPLBAsyncMPClient")
    method = next(
        node
        for node in client.body
        if isinstance(node, ast.FunctionDef) and node.name == "get_core_engine_for_request"
    )
    method.returns, method.args.args[1].annotation = None, None
    known = {"sys": sys, "get_late_interaction_engine_index": lambda *_: None}
    exec(compile(ast.Module([method], []), "core_client.py", "exec"), known)
    return known["get_core_engine_for_request"]


@pytest.mark.vllm
@pytest.mark.parametrize("release", [release for release in RELEASES if release in UNPACKED])
def test_random_states_get_the_core_that_vllm_picks(release: str) -> None:
    """2,000 requests, snapshots and ends in random order, on 2 to 16 cores and up to 4 API servers."""
    pick, rng = theirs(release), random.Random(release)
    for _ in range(20):
        cores, count = rng.randint(2, 16), rng.randint(1, 4)
        index = rng.randrange(count)
        ours = Balancer(balancing_of(release), cores, index, count)
        engines = [bytes([core]) for core in range(cores)]
        client = SimpleNamespace(
            client_count=count,
            reqs_in_flight={},
            engine_inflight=Counter(),
            core_engines=engines,
            eng_start_index=cores * index // count,
            lb_engines=[list(counts) for counts in ours.counts],
            streaming_reqs=set(),
        )
        if balancing_of(release) != "in_flight":
            client.lb_engines = [counts[:2] for counts in client.lb_engines]
        sent: list[tuple[str, int]] = []
        for number in range(100):
            what = rng.random()
            if what < 0.15:
                snapshot = [
                    [rng.choice((0, 0, rng.randint(0, 9))), rng.randint(0, 30), rng.random()] for _ in engines
                ]
                ours.counts = [list(counts) for counts in snapshot]
                width = 3 if balancing_of(release) == "in_flight" else 2
                client.lb_engines = [counts[:width] for counts in snapshot]
            elif what < 0.4 and sent:
                name, core = sent.pop(rng.randrange(len(sent)))
                ours.in_flight[core] -= 1
                client.engine_inflight[client.reqs_in_flight.pop(name)] -= 1
            request = SimpleNamespace(
                request_id=str(number), data_parallel_rank=None, pooling_params=None, resumable=False
            )
            core = ours.pick()
            assert engines[core] == pick(client, request)
            sent.append((str(number), core))


def test_rules_by_release() -> None:
    """core_client.py: eng_start_index moves from 0.25 on, engine_inflight came with 0.27; core.py: the
    interval is 32 until 0.29, then a flag of 16 by default."""
    assert [balancing_of(release) for release in ("0.20", "0.24", "0.25", "0.26", "0.27", "0.33")] == [
        *("queues", "queues", "queues_in_turn", "queues_in_turn", "in_flight", "in_flight")
    ]
    assert [sync_interval_of(release) for release in ("0.20", "0.29", "0.30", "0.33")] == [
        *((32, False), (32, False), (16, True), (16, True))
    ]


def test_queues_count_four_times_and_a_snapshot_replaces_what_was_counted() -> None:
    """0.23: 4 waiting + running, from the first core on. One waiting (4) is more than three running."""
    server = Balancer("queues", 2, 0, 1)
    server.counts = [[1, 0, 0.0], [0, 3, 0.0]]
    assert [server.pick(), server.pick()] == [1, 0]  # 4 against 3; then 4 against 7
    server.counts = [[0, 0, 0.0], [0, 0, 0.0]]
    assert server.pick() == 0


def test_a_burst_goes_round_by_what_is_in_flight() -> None:
    server = Balancer("in_flight", 4, 0, 1)
    assert [server.pick() for _ in range(8)] == [0, 1, 2, 3, 0, 1, 2, 3]
    assert server.in_flight == [2, 2, 2, 2]


def test_a_queue_on_a_full_cache_counts_more() -> None:
    """Core 0 has 2 waiting at 75 % of its KV cache: 2 + 2 x 6 x 0.25 = 5; core 1 four running."""
    server = Balancer("in_flight", 2, 0, 1)
    server.counts = [[2, 0, 0.75], [0, 4, 0.9]]
    assert server.pick() == 1
    server = Balancer("in_flight", 2, 0, 1)
    server.counts = [[2, 0, 0.5], [0, 4, 0.9]]
    assert server.pick() == 0


def test_the_coordinator_publishes_every_100_ms_while_something_changes() -> None:
    cores = DataParallel(size=2, local=2, api_servers=2, lockstep=False)
    balance = Balance(cores)
    assert [server.start for server in balance.servers] == [0, 1]  # cores * index // servers
    assert INTERVAL_PS == 100 * MS
    assert balance.due(5 * MS) == 5 * MS  # nothing was published for longer
    assert balance.due(6 * MS) == -1  # one is awaited
    assert balance.publish(5 * MS, [(1, 2, 0.5), (0, 0, 0.0)], busy=True) == 105 * MS
    assert [server.counts for server in balance.servers] == [[[1, 2, 0.5], [0, 0, 0.0]]] * 2
    assert balance.publish(105 * MS, [(0, 0, 0.0), (0, 0, 0.0)], busy=False) == -1
    assert balance.due(110 * MS) == 205 * MS
