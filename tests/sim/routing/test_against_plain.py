"""Routers against plain loops over all replicas, which ask each at each request, in random states."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import yaml
from llmd_pods import Clock, Pod, request, stored
from small_fleet import OneSecondSteps, config, one_stream

from servecast.sim.engine.kv_events import BlockRemoved, BlockStored
from servecast.sim.engine.request import Request
from servecast.sim.engine.scheduler import Scheduler
from servecast.sim.fleet.client import Client
from servecast.sim.fleet.fleet import Fleet
from servecast.sim.fleet.replica import Replica
from servecast.sim.fleet.spec import Life
from servecast.sim.hardware.front_end_costs import FrontEndCosts
from servecast.sim.routing.backends import Backend, Backends
from servecast.sim.routing.gauges import Gauges
from servecast.sim.routing.llmd.config import parse_epp
from servecast.sim.routing.llmd.endpoint_picker import EndpointPicker
from servecast.sim.routing.options import RouterOptions
from servecast.sim.routing.prefix_index import PreciseIndex
from servecast.sim.routing.routers import ROUTERS

EPP = """
apiVersion: inference.networking.x-k8s.io/v1alpha1
kind: EndpointPickerConfig
plugins:
- {type: queue-scorer}
- {type: running-requests-size-scorer}
- {type: kv-cache-utilization-scorer}
- {type: load-aware-scorer}
- {type: active-request-scorer}
- {type: lora-affinity-scorer}
- type: precise-prefix-cache-scorer
  parameters: {indexerConfig: {tokenProcessorConfig: {blockSize: 16}}}
- {type: max-score-picker}
- {type: single-profile-handler}
schedulingProfiles:
- name: default
  plugins:
  - {pluginRef: queue-scorer, weight: 2}
  - {pluginRef: precise-prefix-cache-scorer, weight: 3}
  - {pluginRef: running-requests-size-scorer, weight: 1}
  - {pluginRef: kv-cache-utilization-scorer, weight: 2}
  - {pluginRef: load-aware-scorer, weight: 1}
  - {pluginRef: active-request-scorer, weight: 1}
  - {pluginRef: lora-affinity-scorer, weight: 2}
  - pluginRef: max-score-picker
"""


def fewest_best(values: list[int]) -> list[float]:
    least, most = min(values), max(values)
    return [1.0 if least == most else (most - value) / (most - least) for value in values]


def affinity(pod: Pod, adapter: int) -> float:
    """llm-d's switch, with vLLM's two lists, which both name every adapter of an unfinished request."""
    active = waiting = pod.gauges.adapters
    if adapter in active:
        return 1.0
    if len(active) + len(waiting) < pod.max_loras:
        return 0.8
    return 0.6 if adapter in waiting else 0.0


def plain_totals(
    pods: list[Pod], held: dict[int, int], blocks: int, sent: dict[int, int], adapter: int
) -> list[float]:
    """The sums of the README of each scorer, in the order of the profile."""
    gauges = [pod.gauges for pod in pods]
    counts = [sent.get(pod.index, 0) for pod in pods]
    most = max(counts)
    scores = (
        (2, fewest_best([each.waiting for each in gauges])),
        (3, [held.get(pod.index, 0) / (blocks or 1) for pod in pods]),
        (1, fewest_best([each.running for each in gauges])),
        (2, [1.0 - each.kv_usage for each in gauges]),
        (1, [0.5 * (1.0 - min(each.waiting, 128) / 128) for each in gauges]),
        (1, [(most - count) / most if count else 1.0 for count in counts]),
        (2, [affinity(pod, adapter) for pod in pods]),
    )
    totals = [0.0] * len(pods)
    for weight, values in scores:
        for position, value in enumerate(values):
            totals[position] += value * weight
    return totals


@pytest.mark.parametrize("replicas", [1, 4, 64])
def test_the_picker_takes_whom_a_plain_loop_takes(replicas: int) -> None:
    """Gauges of few values, so that totals are often equal, replicas that come and go, prompts of eight
    prefixes: the same replica each time, with the same random draws."""
    rng, draws, own_draws = (np.random.default_rng(seed) for seed in (1, 2, 2))
    options = RouterOptions()
    parsed = parse_epp(yaml.safe_load(EPP), options.epp_release, source="epp.yaml")
    picker = EndpointPicker(parsed, options, draws, Clock())
    pods = [Pod(index, max_loras=4) for index in range(replicas)]
    picker.connect(pods)
    prefixes = [request(0, 200, (content, 160)) for content in range(8)]
    holders: dict[tuple[int, int], dict[int, None]] = {}  # prefix, block -> the ten that stored it last
    sent: dict[int, int] = {}
    flying: list[tuple[Request, int]] = []
    coming: dict[int, list[tuple[int, int]]] = {}  # replica -> prefixes and blocks that it will tell
    for number in range(400):
        for pod in rng.choice(pods, 2):
            adapters = frozenset(int(each) for each in rng.integers(1, 5, rng.integers(4)))
            usage = float(rng.integers(3)) / 2
            pod.gauges = Gauges(int(rng.integers(3)), int(rng.integers(3)), usage, adapters)
            content, blocks = int(rng.integers(8)), int(rng.integers(1, 11))
            pod.events.append(stored(prefixes[content], blocks))
            coming.setdefault(pod.index, []).append((content, blocks))
        for index in sorted(coming):
            for content, blocks in coming.pop(index):
                for block in range(blocks):
                    of = holders.setdefault((content, block), {})
                    of.pop(index, None)
                    of[index] = None
                    if len(of) > 10:
                        del of[next(iter(of))]
        ready = [pod for pod in pods if rng.random() < 0.9] or pods
        content = int(rng.integers(8))
        asked = request(number, 200, (content, 160), adapter=int(rng.integers(5)))
        has = {pod.index: [pod.index in holders.get((content, i), {}) for i in range(11)] for pod in pods}
        known = {index: each.index(False) for index, each in has.items()}
        totals = plain_totals(ready, known, 12, sent, asked.adapter)
        equals = [position for position, total in enumerate(totals) if total == max(totals)]
        expected = equals[0] if len(equals) == 1 else equals[int(own_draws.integers(len(equals)))]
        picked = picker.pick(asked, ready)
        assert picked == expected
        index = ready[expected].index
        sent[index] = sent.get(index, 0) + 1
        flying.append((asked, index))
        if rng.random() < 0.8:
            gone, where = flying.pop(int(rng.integers(len(flying))))
            picker.ended(gone, where)
            sent[where] -= 1


def test_what_an_index_remembers_is_what_it_would_count() -> None:
    """Blocks of five contents come, go and are expected on six servers, of which an index keeps three a
    block: each answer is that of a count from the first block on, however often it was asked before."""
    rng = np.random.default_rng(3)
    index, plain = PreciseIndex(pods=3), dict[int, dict[int, None]]()
    chains = [[2 * content * (1 << 24) + i for i in range(6)] for content in range(5)]
    for _ in range(3000):
        server, key = int(rng.integers(6)), int(rng.choice(chains[int(rng.integers(5))]))
        if rng.random() < 0.5:
            index.apply(server, BlockStored((key,)))
            holders = plain.setdefault(key, {})
            holders.pop(server, None)
            holders[server] = None
            if len(holders) > 3:
                del holders[next(iter(holders))]
        else:
            index.apply(server, BlockRemoved(key))
            plain.get(key, {}).pop(server, None)
        chain, limit = chains[int(rng.integers(5))], int(rng.integers(7))
        counted = {}
        for server in range(6):
            blocks = [server in plain.get(key, {}) for key in chain[:limit]]
            if blocks and blocks[0]:
                counted[server] = [*blocks, False].index(False)
        assert index.match(chain, limit) == counted


class Nosy:
    """Checks what a fleet keeps of its replicas against each of them, and spreads requests at random."""

    def __init__(self, routers: list[str]) -> None:
        self._rng = np.random.default_rng(4)
        self._indexed = [ROUTERS[name](RouterOptions(), np.random.default_rng(5)) for name in routers]
        self._plain = [ROUTERS[name](RouterOptions(), np.random.default_rng(5)) for name in routers]
        self._everyone: Sequence[Backend] = ()
        self.picks = self.events = 0

    def connect(self, backends: Sequence[Backend]) -> None:
        self._everyone = backends
        for backend in backends:
            backend.scrape()
            backend.subscribe()

    def pick(self, request: Request, backends: Sequence[Backend]) -> int:
        assert isinstance(backends, Backends)
        assert isinstance(self._everyone, Backends)
        asked = Backends(list(backends))
        kept, columns = backends.columns(), asked.columns()
        for name in ("numbers", "waiting", "running", "kv_usage"):
            assert getattr(kept, name).tolist() == getattr(columns, name).tolist()
        assert backends.outstanding.tolist() == asked.outstanding.tolist()
        assert [backends.position(i) for i in range(9)] == [asked.position(i) for i in range(9)]
        telling = {backend.index for backend in self._everyone.telling()}
        told = {backend.index: list(backend.take_events()) for backend in self._everyone}
        assert telling == {index for index, events in told.items() if events}
        for indexed, plain in zip(self._indexed, self._plain, strict=True):
            assert indexed.pick(request, backends) == plain.pick(request, list(backends))
        self.picks += 1
        self.events += sum(map(len, told.values()))
        return int(self._rng.integers(len(backends)))

    def ended(self, request: Request, index: int) -> None: ...


def test_what_a_fleet_keeps_is_what_each_replica_says() -> None:
    """Eight replicas of one-second steps that start late, drain and fail, scraped every 0.3 s, 400 requests
    of six prefixes, some given up: columns, events and the picks of five routers at each of them."""
    names = ["least_outstanding", "power_of_two", "session_affinity", "prefix_affinity", "consistent_hashing"]
    nosy, rng, costs, steps = Nosy(names), np.random.default_rng(6), FrontEndCosts(), OneSecondSteps()

    def make(index: int, client: Client) -> Replica:
        engine = Scheduler(config(num_gpu_blocks=40))
        return Replica(index, engine, steps, iter(lambda: 1.0, None), costs, rng, client)

    requests = [
        Request(i, 0.1 * i, 60, 5, 5, ((i % 6, 48),), 0, 3.3 if i % 5 == 0 else None, i % 7)
        for i in range(400)
    ]
    lives = [Life(), Life(), Life(start_s=5.0), Life(drain_s=20.0), Life(fail_s=15.0), Life(), Life(), Life()]
    options = RouterOptions(scrape_interval_s=0.3, event_lag_s=0.25)
    fleet = Fleet(make, lives, nosy, Client(costs), rng, options=options, detection_s=1.0)
    statuses = set(fleet.run(one_stream(requests)).requests["status"])
    assert statuses == {"finished", "aborted", "failed"}
    assert nosy.picks == 400
    assert nosy.events > 50
