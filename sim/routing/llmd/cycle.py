"""One scheduling cycle, and what plugins may use in it.

A plugin hears of what it has a method for: ``connect(backends)`` listens to the servers' KV events,
``picked(cycle, backend)`` is told where a request goes, ``answered(request, index)`` that its first token has
come, and ``ended(request, index)`` that it has ended.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from servecast.sim.engine.request import Request
from servecast.sim.routing.backends import Backend, Backends, Columns
from servecast.sim.routing.llmd.release import EppRelease


class PrefixMatch:
    """Leading blocks of a prompt that servers have.

    Attributes:
        counts: by a server's number, those with none left out. total: how many the prompt has.
        block_tokens: length of a block.
    """

    __slots__ = ("_numbers", "_of", "_shares", "block_tokens", "counts", "total")

    def __init__(self, counts: dict[int, int], total: int, block_tokens: float) -> None:
        self.counts, self.total, self.block_tokens = counts, total, block_tokens
        self._numbers: NDArray[np.int64] | None = None  # whose columns are kept

    def of(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Counts of these replicas, 0 where one has none. Not to be changed: they are kept."""
        if numbers is not self._numbers:
            self._keep(numbers)
        return self._of

    def shares(self, numbers: NDArray[np.int64]) -> NDArray[np.float64]:
        """Those as shares of the prompt's. Not to be changed, either."""
        if numbers is not self._numbers:
            self._keep(numbers)
        return self._shares

    def _keep(self, numbers: NDArray[np.int64]) -> None:
        counts, n = self.counts, len(numbers)
        if counts and numbers[-1] != n - 1:  # some replicas are missing
            found = np.array([counts.get(number, 0) for number in numbers.tolist()])
        else:
            found = np.zeros(n, np.int64)
            for number, count in counts.items():
                if number < n:
                    found[number] = count
        self._numbers, self._of, self._shares = numbers, found, found / (self.total or 1)


@dataclass(slots=True)
class Cycle:
    """A request, its candidates and one snapshot of what is known of them, which all plugins see. matches: by
    the name of the producer, what it found."""

    request: Request
    backends: Sequence[Backend]
    known: Columns
    matches: dict[str, PrefixMatch] = field(default_factory=dict)

    @classmethod
    def among(cls, request: Request, backends: Sequence[Backend]) -> Cycle:
        """With these candidates."""
        return cls(request, backends, Backends.of(backends).columns())

    def of(self, positions: Sequence[int]) -> Cycle:
        """The same with some of the candidates."""
        return replace(
            self,
            backends=[self.backends[position] for position in positions],
            known=self.known.at(positions),
        )


class PrefixProducer(Protocol):
    """Tells what servers have of a prompt.

    Attributes:
        stretched: its counts are stretched over the holders to 0..1, not taken as shares of the prompt.
    """

    stretched: bool

    def match(self, cycle: Cycle) -> PrefixMatch:
        """What the servers have, looked up once a cycle."""
        ...


class LoadProducer(Protocol):
    """Tells what of this router is in flight."""

    def requests(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Requests, of each of these replicas."""
        ...

    def tokens(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Tokens that are not computed yet, of each of these replicas."""
        ...

    def uncached(self, cycle: Cycle) -> NDArray[np.int64]:
        """Tokens that each candidate would have to compute for the cycle's request."""
        ...


@dataclass(frozen=True, slots=True)
class Setting:
    """What plugins may use. clock: simulated seconds. prefixes, loads: producers by name.

    exact_tokens: prompts are tokenized; without, they have a token for each four characters.
    """

    release: EppRelease
    bytes_per_token: float
    rng: np.random.Generator
    clock: Callable[[], float]
    exact_tokens: bool = False
    prefixes: dict[str, PrefixProducer] = field(default_factory=dict)
    loads: dict[str, LoadProducer] = field(default_factory=dict)

    def prompt_tokens(self, request: Request) -> int:
        """Length of a prompt, as the picker knows it."""
        if self.exact_tokens:
            return request.prompt_tokens
        return int(request.prompt_tokens * self.bytes_per_token) // CHARACTERS


CHARACTERS = 4  # of a token, to the picker
