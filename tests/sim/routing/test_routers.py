"""Routers without a configuration, what they see of the servers, and when."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest

from servecast.sim.engine.config import EngineConfig
from servecast.sim.engine.kv_events import (
    BLOCKS_PER_CONTENT,
    BlockRemoved,
    BlockStored,
    KVEvent,
    publish_kv_events,
)
from servecast.sim.engine.request import Request
from servecast.sim.engine.scheduler import Scheduler
from servecast.sim.routing.gauges import Gauges, Scrape
from servecast.sim.routing.options import RouterOptions
from servecast.sim.routing.routers import ROUTERS, ConsistentHashing, Router, leading


@dataclass
class Pod:
    index: int
    outstanding: int = 0
    block_size: int = 16
    num_gpu_blocks: int = 1001

    @property
    def gauges(self) -> Gauges:
        return Gauges()

    def scrape(self) -> None: ...

    def subscribe(self) -> None: ...

    def take_events(self) -> list[KVEvent]:
        return []


def pods(*outstanding: int) -> list[Pod]:
    return [Pod(index, count) for index, count in enumerate(outstanding)]


def router(name: str, **options: object) -> Router:
    return ROUTERS[name](RouterOptions(**options), np.random.default_rng(0))  # type: ignore[arg-type]


def request(number: int, *content: tuple[int, int], group: int | None = None) -> Request:
    return Request(number, 0.0, 100, 1, 1, content, group=group)


# ---- policies ---------------------------------------------------------------------------------------


def test_random_gives_equal_chances() -> None:
    """4,000 picks of 4: 1,000 each, give or take 3 standard deviations of 27."""
    policy = router("random")
    picks = [policy.pick(request(i), pods(0, 9, 0, 9)) for i in range(4000)]
    assert np.bincount(picks).tolist() == pytest.approx([1000] * 4, abs=82)


def test_power_of_two_takes_the_less_loaded_of_a_pair() -> None:
    """Loads 0, 1, 2: a pair is any of three with equal chances, and the busiest never wins: pod 0 wins
    the two pairs that it is in, pod 1 the third."""
    policy = router("power_of_two")
    picks = [policy.pick(request(i), pods(0, 1, 2)) for i in range(3000)]
    assert np.bincount(picks, minlength=3).tolist() == pytest.approx([2000, 1000, 0], abs=80)
    assert policy.pick(request(0), pods(5)) == 0


def test_session_affinity_stays_until_the_home_is_gone() -> None:
    """Session 1 starts on the least loaded, pod 1, and stays although it fills up; with pod 1 gone it moves
    to the least loaded of the rest. Requests without a session go to the least loaded."""
    policy = router("session_affinity")
    assert policy.pick(request(0, group=1), pods(2, 0, 1)) == 1
    assert policy.pick(request(1, group=1), pods(2, 9, 1)) == 1
    assert policy.pick(request(2), pods(2, 9, 1)) == 2
    left = [Pod(0, 2), Pod(2, 1)]
    assert policy.pick(request(3, group=1), left) == 1
    assert policy.pick(request(4, group=1), pods(0, 0, 9)) == 2


def test_prefix_affinity_keeps_equal_leading_tokens_together() -> None:
    """The first 50 tokens decide: those of content 7 (up to token 60) are equal, those of 8 are others. A
    prompt whose own tokens begin at 40 is like no other."""
    policy = router("prefix_affinity", prefix_tokens=50)
    assert policy.pick(request(0, (7, 60)), pods(1, 0)) == 1
    assert policy.pick(request(1, (7, 60), (9, 80)), pods(0, 5)) == 1
    assert policy.pick(request(2, (8, 60)), pods(0, 5)) == 0
    assert policy.pick(request(3, (7, 40)), pods(0, 5)) == 0
    assert leading(request(3, (7, 40)), 50) == ("request", 3)
    assert leading(request(3, (7, 40)), 40) == ("content", 7)


def test_consistent_hashing_moves_only_the_keys_of_a_pod_that_left() -> None:
    policy = ConsistentHashing(load_factor=1e9, prefix_tokens=10)
    keys = [request(i, (i, 50)) for i in range(300)]
    before = [policy.pick(key, pods(0, 0, 0, 0)) for key in keys]
    left = [Pod(0), Pod(1), Pod(3)]
    after = [left[policy.pick(key, left)].index for key in keys]
    moved = [b for a, b in zip(after, before, strict=True) if a != b]
    assert set(moved) == {2}
    assert len(moved) == before.count(2)
    assert min(before.count(pod) for pod in range(4)) > 40


def test_bounded_load_passes_a_full_pod_over() -> None:
    """Load factor 1.25 on 2 pods. With (2, 1) in flight the new request makes 4: room for ceil(1.25 * 4 / 2)
    = 3, so the pod with 2 takes it. With (3, 1) it makes 5: room for ceil(3.125) = 4: it is taken again.
    With (4, 1): ceil(3.75) = 4, so it is full and the other takes it."""
    policy = ConsistentHashing(load_factor=1.25, prefix_tokens=10)
    key = next(each for each in (request(i, (i, 50)) for i in range(50)) if not policy.pick(each, pods(0, 0)))
    assert [policy.pick(key, pods(busy, 1)) for busy in (2, 3, 4)] == [0, 0, 1]


# ---- what they see ----------------------------------------------------------------------------------


def test_a_scrape_is_the_last_tick_less_the_delay() -> None:
    """Scrapes at 7, 17, 27, ..., known 3 later. The queue is 1 from 5, 2 from 12, 3 from 15 and 4 from 18
    on. At 9 nothing is known, at 10 the reading of 7, at 19 still, at 20 that of 17 (3; 2 was never read), at
    30 that of 27."""
    scrape = Scrape(interval=10, delay=3, first=7)
    log = []
    for now, waiting in ((5, 1), (9, None), (10, None), (12, 2), (15, 3), (18, 4)):
        if waiting is None:
            log.append((now, scrape.get(now).waiting))
        else:
            scrape.put(now, Gauges(waiting))
    log += [(now, scrape.get(now).waiting) for now in (19, 20, 29, 30)]
    assert log == [(9, 0), (10, 1), (19, 1), (20, 3), (29, 3), (30, 4)]


def test_scrapes_equal_a_process_that_ticks() -> None:
    """Random changes and reads against a plain loop over all ticks."""
    rng = np.random.default_rng(3)
    for interval, delay, first in ((10, 0, 4), (10, 23, 0), (1, 1, 5), (0, 7, 0)):
        scrape, changes = Scrape(interval, delay, first), [(-1, 0)]
        for now in np.sort(rng.integers(0, 500, 300)).tolist():
            if rng.random() < 0.5:
                changes.append((now, len(changes)))
                scrape.put(now, Gauges(len(changes) - 1))
                continue
            if interval:
                ticks = [t for t in range(first, now - delay + 1, interval)]
                tick = ticks[-1] if ticks else -1
            else:
                tick = now - delay
            assert scrape.get(now).waiting == max(n for at, n in changes if at <= tick or at == -1)


def shared(content_id: int, *blocks: int) -> tuple[int, ...]:
    return tuple(2 * content_id * BLOCKS_PER_CONTENT + block for block in blocks)


def test_blocks_are_stored_when_their_step_is_scheduled_and_removed_when_reused() -> None:
    """A pool of 4 usable blocks of 16. A (40 tokens, 32 of them shared) fills blocks 0 and 1 of content 1 in
    its first step, and leaves them evictable. B (64 shared tokens, 4 blocks) takes the two others first
    (its own third block of A's was never full), then A's: the last one first."""
    engine = Scheduler(_config(5))
    log: list[KVEvent] = []
    publish_kv_events(engine, log.append)
    engine.add(Request(0, 0.0, 40, 1, 1, ((1, 32),)), 0)
    step = engine.schedule()
    assert log == [BlockStored(shared(1, 0, 1))]
    engine.complete(step)
    engine.add(Request(1, 0.0, 63, 1, 1, ((2, 63),)), 1)
    engine.complete(engine.schedule())
    assert log[1:] == [
        BlockRemoved(shared(1, 1)[0]),
        BlockRemoved(shared(1, 0)[0]),
        BlockStored(shared(2, 0, 1, 2)),
    ]


def _config(num_gpu_blocks: int) -> EngineConfig:
    return EngineConfig(
        version="0.32",
        max_num_seqs=8,
        max_num_batched_tokens=256,
        max_model_len=128,
        num_gpu_blocks=num_gpu_blocks,
        async_scheduling=False,
    )


def drive(engine: Scheduler, requests: list[Request], see: Callable[[], None]) -> list[object]:
    """Run requests, two new ones a step. Returns every step's decisions."""
    steps: list[object] = []
    queue = list(requests)
    while queue or engine.has_requests:
        for _ in range(min(2, len(queue))):
            engine.add(queue.pop(0), len(queue))
        step = engine.schedule()
        engine.complete(step)
        steps.append((step.total_tokens, step.admitted, step.preempted, step.finished, engine.free_list(9)))
        see()
    return steps


def test_publishing_changes_no_decision_and_the_events_tell_what_is_cached() -> None:
    """Forty requests of five shared prompts in a pool of 20 blocks, with and without a listener. Contents
    that were stored, and not removed since, are what another such prompt finds, up to the first that is
    missing: at least, since another block may hold what was removed."""
    requests = [Request(i, 0.0, 50 + i % 5, 4, 4, ((i % 5, 48),)) for i in range(40)]
    plain = drive(Scheduler(_config(20)), requests, lambda: None)
    engine, told = Scheduler(_config(20)), set[int]()

    def hear(event: KVEvent) -> None:
        if isinstance(event, BlockStored):
            told.update(event.keys)
        else:
            told.discard(event.key)

    publish_kv_events(engine, hear)
    assert drive(engine, requests, lambda: None) == plain
    found = 0
    for content_id in range(5):
        known = [key in told for key in (*shared(content_id, 0, 1, 2), -1)].index(False)
        engine.add(Request(100 + content_id, 0.0, 49, 1, 1, ((content_id, 48),)), 100)
        step = engine.schedule()
        engine.complete(step)
        assert step.cached_tokens[100 + content_id] >= 16 * known
        found += known
    assert found > 5


def test_without_a_listener_the_cache_tells_nobody() -> None:
    pool = Scheduler(_config(20)).kv.pool
    assert pool.on_store is None
    assert pool.on_evict is None
