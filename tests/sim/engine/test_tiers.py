"""Tiers and their links against theory: a link as a queue, an LRU under known patterns, what is conserved."""

from __future__ import annotations

import itertools
from collections import OrderedDict

import numpy as np
import pytest

from servecast.sim.engine.chunk_cache import Accesses, ChunkCache, Policy
from servecast.sim.engine.offloading_rules import offloading_rules_for
from servecast.sim.engine.pipe import Pipe
from servecast.sim.engine.tiers import Hierarchy, Tier
from servecast.sim.inputs.units import PICOSECONDS, to_ps


def test_a_link_is_a_server_of_bytes_over_bandwidth() -> None:
    """10 MB at 1 GB/s take 10 ms, and 1 ms of latency; the second waits for the first."""
    link = Pipe(1e9, latency_s=1e-3)
    assert link.send(10_000_000, 0) == to_ps(0.011)
    assert link.send(5_000_000, to_ps(0.005)) == to_ps(0.017)
    assert link.send(1_000_000, to_ps(1.0)) == to_ps(1.002)  # it stood idle
    assert (link.bytes, link.transfers, link.busy_ps) == (16_000_000, 3, to_ps(0.019))


@pytest.mark.parametrize("load", [0.5, 0.8])
def test_loads_that_come_by_themselves_wait_as_in_m_d_1(load: float) -> None:
    """Equal transfers, Poisson arrivals: mean wait rho / (2 (1 - rho)) of a service (Pollaczek-Khinchine)."""
    link, service, count = Pipe(1e9), 2e-3, 200_000
    rng = np.random.default_rng(7)
    arrivals = np.cumsum(rng.exponential(service / load, count))
    waits = [
        (link.send(2_000_000, to_ps(time)) - to_ps(time)) / PICOSECONDS - service
        for time in arrivals.tolist()
    ]
    expected = load / (2 * (1 - load)) * service
    assert np.mean(waits) == pytest.approx(expected, rel=0.04)
    assert link.busy_ps / PICOSECONDS == pytest.approx(count * service)


def hierarchy(*tiers: Tier) -> Hierarchy:
    return Hierarchy(tiers, Pipe(1e9), Pipe(1e9), chunk_tokens=256, chunk_bytes=1_000_000, copies=2)


def lru_hits(keys: list[int], capacity: int) -> int:
    """Counted by an LRU of its own."""
    cache: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for key in keys:
        hits += key in cache
        cache[key] = None
        cache.move_to_end(key)
        while len(cache) > capacity:
            cache.popitem(last=False)
    return hits


@pytest.mark.parametrize("groups", [10, 11])
def test_a_cycle_hits_always_or_never(groups: int) -> None:
    """Round and round: an LRU of 10 chunks holds 10 and finds all of them, of 11 it finds none."""
    tier = Tier("cpu", 10)
    tiers, hits = hierarchy(tier), 0
    for key in itertools.islice(itertools.cycle(range(groups)), 50 * groups):
        hits += tiers.lookup([key], 0)
        tier.touch([key])
        tiers.store([key], 0)
        for each in tier._ready:
            tier._ready[each] = 0  # the copy is over
    assert hits == (49 * groups if groups == 10 else 0)


@pytest.mark.parametrize("policy", ["lru", "arc"])
def test_hits_of_zipf_keys_are_those_of_an_lru(policy: Policy) -> None:
    """One request a chunk, one after the other: then vLLM is a plain LRU, and ARC does not fall behind."""
    rng = np.random.default_rng(3)
    keys = (rng.zipf(1.3, 4000) % 400).tolist()
    cache, hits = ChunkCache(40, policy, offloading_rules_for("0.32")), 0
    for key in keys:
        accesses = Accesses({key: 0})
        hits += cache.lookup(key) is True
        stored = cache.prepare_store([key], accesses)
        assert stored is not None
        cache.complete_store(stored)
        cache.on_request_finished(accesses)
    expected = lru_hits(keys, 40)
    assert hits == expected if policy == "lru" else hits >= 0.95 * expected
    assert cache.evictions == len(keys) - hits - 40  # what came in, less what is there


def test_a_store_that_finds_no_room_is_dropped_whole() -> None:
    """Two chunks are being loaded and two are free: three do not fit, and none of them is stored."""
    places = {key: key for key in range(10)}
    cache, accesses = ChunkCache(4, "lru", offloading_rules_for("0.32")), Accesses(places)
    cache.complete_store(cache.prepare_store([0, 1], accesses) or [])
    cache.prepare_load([0, 1], accesses)
    assert cache.prepare_store([2, 3, 4], Accesses(places)) is None
    cache.complete_load([0, 1])
    cache.on_request_finished(accesses)
    assert cache.prepare_store([2, 3, 4], Accesses(places)) == [2, 3, 4]
    assert cache.lookup(1) is False  # of the two the tail of the prompt goes first
    assert cache.lookup(0) is True


def test_what_lies_below_comes_through_host_memory() -> None:
    """2 chunks of 2 x 1 MB from a disk at 4 GB/s with 0.1 ms take 1.1 ms, and 2 ms more to the GPUs."""
    host, disk = Tier("cpu", 1), Tier("disk", 8, Pipe(4e9, 1e-4), Pipe(4e9, 1e-4))
    tiers = hierarchy(host, disk)
    end = tiers.store([1, 2], 0)
    assert end == to_ps(0.002)
    assert [key in host for key in (1, 2)] == [False, True]  # which holds one
    later = to_ps(1.0)
    assert tiers.lookup([1, 2, 3], later) == 2
    there = tiers.fetch([1, 2], later)
    assert there == later + to_ps(0.0001 + 2e6 / 4e9)  # the other was in host memory
    assert tiers.to_gpus([1, 2], there) == there + to_ps(0.002)
    assert dict(tiers.loaded) == {"disk": 1, "cpu": 1}
    assert tiers.to_gpu.bytes == tiers.to_host.bytes == 2_000_000  # on one rank
    assert disk.read is not None
    assert disk.read.bytes == 2_000_000  # one chunk of both ranks


def test_a_pinned_chunk_stays() -> None:
    tier = Tier("cpu", 2)
    tier.add(1, 0)
    tier.add(2, 0)
    tier.pin([1])
    tier.add(3, 0)
    assert [key in tier for key in (1, 2, 3)] == [True, False, True]
    tier.pin([3])
    assert not tier.add(4, 0)
    tier.unpin([1])
    assert tier.add(4, 0)
    assert 1 not in tier
