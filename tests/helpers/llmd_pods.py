"""Replicas whose gauges and events a test sets, and requests to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from servecast.sim.engine.kv_events import BlockStored, KVEvent
from servecast.sim.engine.request import Request
from servecast.sim.routing.gauges import Gauges
from servecast.sim.routing.llmd.cycle import Cycle
from servecast.sim.routing.llmd.endpoint_picker import EndpointPicker
from servecast.sim.routing.prompt_blocks import PromptBlocks


@dataclass
class Pod:
    """A replica with the gauges that a test gives it."""

    index: int
    gauges: Gauges = field(default_factory=Gauges)
    outstanding: int = 0
    block_size: int = 16
    num_gpu_blocks: int = 1001
    max_loras: int = 0
    role: str = ""
    events: list[KVEvent] = field(default_factory=list)
    scraped: bool = False

    def scrape(self) -> None:
        self.scraped = True

    def subscribe(self) -> None:
        pass

    def take_events(self) -> list[KVEvent]:
        events, self.events = self.events, []
        return events


def pods(*gauges: tuple[int, float]) -> list[Pod]:
    """Pods with these waiting requests and KV usages."""
    return [Pod(i, Gauges(waiting, 0, usage)) for i, (waiting, usage) in enumerate(gauges)]


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def request(
    number: int, tokens: int, *content: tuple[int, int], group: int | None = None, adapter: int = 0
) -> Request:
    return Request(number, 0.0, tokens, 1, 1, tuple(content), group=group, adapter=adapter)


def totals(epp: EndpointPicker, backends: Sequence[Pod], asked: Request | None = None) -> list[float]:
    asked = asked or request(0, 100)
    return list(epp.totals(Cycle.among(asked, backends)))


def stored(asked: Request, blocks: int, *, size: int = 16) -> BlockStored:
    return BlockStored(tuple(PromptBlocks(size).shared(asked)[:blocks]))


def shares(epp: EndpointPicker, backends: list[Pod], n: int = 4000) -> list[float]:
    picks = [epp.pick(request(number, 10), backends) for number in range(n)]
    return [picks.count(position) / n for position in range(len(backends))]
