"""Which replica takes a request: a policy is a class with one method."""

from __future__ import annotations

import bisect
import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from servecast.sim.engine.request import Request
from servecast.sim.routing.backends import Backend, Backends
from servecast.sim.routing.options import RouterOptions


class Router(Protocol):
    """Picks the replica at the moment a request is sent."""

    def pick(self, request: Request, backends: Sequence[Backend]) -> int | None:
        """Position in ``backends``, which are the replicas that are ready (one or more), of the one that
        takes the request; None refuses it."""
        ...


@runtime_checkable
class Informed(Protocol):
    """A router that knows more than it did itself."""

    def connect(self, backends: Sequence[Backend]) -> None:
        """Replicas of the fleet, each once, before its first request."""
        ...

    def ended(self, request: Request, index: int) -> None:
        """A request that replica ``index`` took has ended, well or not."""
        ...


@runtime_checkable
class Answered(Protocol):
    """A router that learns when the first token of a request comes."""

    def answered(self, request: Request, index: int) -> None:
        """Replica ``index`` has sent the first token of a request."""
        ...


class RoundRobin:
    """In turn."""

    def __init__(self) -> None:
        self._next = 0

    def pick(self, request: Request, backends: Sequence[Backend]) -> int:
        index = self._next % len(backends)
        self._next = index + 1
        return index


class Random:
    """Any, with equal chances."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng

    def pick(self, request: Request, backends: Sequence[Backend]) -> int:
        return int(self._rng.integers(len(backends)))


class LeastOutstanding:
    """The one with the fewest requests in flight; the first of equals."""

    def pick(self, request: Request, backends: Sequence[Backend]) -> int:
        return int(Backends.of(backends).outstanding.argmin())


class PowerOfTwo:
    """Of two drawn at random the one with fewer requests in flight, the first drawn of equals
    (Mitzenmacher 2001)."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng

    def pick(self, request: Request, backends: Sequence[Backend]) -> int:
        if len(backends) == 1:
            return 0
        first = int(self._rng.integers(len(backends)))
        second = int(self._rng.integers(len(backends) - 1))
        second += second >= first
        return min(first, second, key=lambda index: backends[index].outstanding)


LOOKS_AT_NONE = (RoundRobin, Random, LeastOutstanding, PowerOfTwo)  # whatever the request


class Sticky:
    """Requests of one key stay on the replica that took the first of them, the one with the fewest requests
    in flight then; they move in the same way when it is no longer ready. Those without a key go there, too.
    """

    def __init__(self, key: Callable[[Request], object | None]) -> None:
        self._key = key
        self._home: dict[object, int] = {}  # key -> number of the replica
        self._least = LeastOutstanding()

    def pick(self, request: Request, backends: Sequence[Backend]) -> int:
        key = self._key(request)
        home = None if key is None else self._home.get(key)
        position = None if home is None else Backends.of(backends).position(home)
        if position is not None:
            return position
        position = self._least.pick(request, backends)
        if key is not None:
            self._home[key] = backends[position].index
        return position


class ConsistentHashing:
    """Consistent hashing with bounded loads (Mirrokni, Thorup, Zadimoghaddam 2018).

    Each replica has ``POINTS`` points on a ring. A request goes to the first replica clockwise from the hash
    of its leading tokens that has fewer than ``load_factor`` times the mean number of requests in flight,
    this one included, rounded up.

    Args:
        load_factor: >= 1; an infinite one is plain consistent hashing.
        prefix_tokens: how many leading tokens are hashed.
        by_session: the session is hashed instead, where a request has one, as vLLM's routers do.
    """

    POINTS = 100

    def __init__(self, load_factor: float, prefix_tokens: int, *, by_session: bool = False) -> None:
        self._load_factor, self._prefix_tokens, self._by_session = load_factor, prefix_tokens, by_session
        self._ring: list[tuple[int, int]] = []  # (place, number of the replica), rising
        self._numbers = np.empty(0, np.int64)

    def pick(self, request: Request, backends: Sequence[Backend]) -> int:
        known = Backends.of(backends)
        numbers, outstanding = known.numbers, known.outstanding
        if numbers is not self._numbers and not np.array_equal(numbers, self._numbers):
            points = ((number, point) for number in numbers.tolist() for point in range(self.POINTS))
            self._ring = sorted((_place("r", *each), each[0]) for each in points)
        self._numbers = numbers
        total = int(outstanding.sum()) + 1
        bound = self._load_factor * total / len(backends)
        most = bound if math.isinf(bound) else math.ceil(bound)
        key: tuple[str, int | None] = leading(request, self._prefix_tokens)
        if self._by_session and request.group is not None:
            key = "session", request.group
        start = bisect.bisect(self._ring, (_place("k", *key),))
        for step in range(len(self._ring)):
            position = known.position(self._ring[(start + step) % len(self._ring)][1])
            if position is not None and outstanding[position] < most:
                return position
        raise AssertionError("the mean is never below the least")


def leading(request: Request, tokens: int) -> tuple[str, int]:
    """What the first ``tokens`` tokens of a prompt are: equal where they are."""
    last = min(tokens, request.prompt_tokens)
    for content_id, end_token in request.content:
        if last <= end_token:
            return "content", content_id
    return "request", request.request_id


def _place(*parts: object) -> int:
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


ROUTERS: dict[str, Callable[[RouterOptions, np.random.Generator], Router]] = {
    "round_robin": lambda options, rng: RoundRobin(),
    "random": lambda options, rng: Random(rng),
    "least_outstanding": lambda options, rng: LeastOutstanding(),
    "power_of_two": lambda options, rng: PowerOfTwo(rng),
    "session_affinity": lambda options, rng: Sticky(lambda request: request.group),
    "prefix_affinity": lambda options, rng: Sticky(lambda request: leading(request, options.prefix_tokens)),
    "session_hashing": lambda options, rng: ConsistentHashing(
        math.inf, options.prefix_tokens, by_session=True
    ),
    "consistent_hashing": lambda options, rng: ConsistentHashing(options.load_factor, options.prefix_tokens),
}
