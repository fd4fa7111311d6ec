"""Replicas as a router sees them: one by one, and all of them as columns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol, overload

import numpy as np
from numpy.typing import NDArray

from servecast.sim.engine.kv_events import KVEvent
from servecast.sim.routing.gauges import Gauges


class Backend(Protocol):
    """What a router may know of a replica.

    Attributes:
        index: its number in the fleet.
        block_size, num_gpu_blocks: of its KV cache (vllm:cache_config_info).
        max_loras: slots of LoRA adapters; 0: it has none.
        role: prefill or decode, empty where it does both (the label llm-d.ai/role).
    """

    index: int
    block_size: int
    num_gpu_blocks: int
    max_loras: int
    role: str

    @property
    def outstanding(self) -> int:
        """Requests sent to it and not ended."""
        ...

    @property
    def gauges(self) -> Gauges:
        """Its gauges as last scraped; all zero unless ``scrape`` was called."""
        ...

    def scrape(self) -> None:
        """Scrape its gauges from now on."""
        ...

    def subscribe(self) -> None:
        """Listen to its KV events from now on, which is before its first request."""
        ...

    def take_events(self) -> Iterable[KVEvent]:
        """The KV events that have arrived since the last call, in their order."""
        ...


class Columns:
    """What is known of some replicas, an entry each, in their order.

    Attributes:
        numbers: of the replicas. waiting, running, kv_usage: see ``Gauges``.
    """

    __slots__ = ("kv_usage", "numbers", "running", "waiting")

    def __init__(
        self,
        numbers: NDArray[np.int64],
        waiting: NDArray[np.int64],
        running: NDArray[np.int64],
        kv_usage: NDArray[np.float64],
    ) -> None:
        self.numbers, self.waiting, self.running, self.kv_usage = numbers, waiting, running, kv_usage

    def __len__(self) -> int:
        return len(self.numbers)

    def at(self, positions: Sequence[int] | NDArray[np.int64] | slice) -> Columns:
        """Those of some of them."""
        return Columns(
            self.numbers[positions],
            self.waiting[positions],
            self.running[positions],
            self.kv_usage[positions],
        )


class Backends(Sequence[Backend]):
    """Replicas, one by one and as columns. A fleet keeps the columns up to date, this class asks each."""

    def __init__(self, members: Sequence[Backend]) -> None:
        self.members = members

    @classmethod
    def of(cls, members: Sequence[Backend]) -> Backends:
        """The same replicas."""
        return members if isinstance(members, Backends) else cls(members)

    @overload
    def __getitem__(self, position: int) -> Backend: ...
    @overload
    def __getitem__(self, position: slice) -> Sequence[Backend]: ...
    def __getitem__(self, position: int | slice) -> Backend | Sequence[Backend]:
        return self.members[position]

    def __len__(self) -> int:
        return len(self.members)

    @property
    def numbers(self) -> NDArray[np.int64]:
        """Of each; the same array until replicas come or go."""
        return np.array([each.index for each in self.members])

    @property
    def outstanding(self) -> NDArray[np.int64]:
        """Requests sent to each and not ended."""
        return np.array([each.outstanding for each in self.members])

    def position(self, number: int) -> int | None:
        """Where a replica stands, None if it is not there."""
        return next((i for i, each in enumerate(self.members) if each.index == number), None)

    def columns(self) -> Columns:
        """Their gauges; the same object until something in it changes."""
        gauges = [each.gauges for each in self.members]
        waiting, running, usage = ([each[i] for each in gauges] for i in range(3))
        return Columns(self.numbers, np.array(waiting), np.array(running), np.array(usage))

    def telling(self) -> Iterable[Backend]:
        """Those that may have KV events to take."""
        return self.members
