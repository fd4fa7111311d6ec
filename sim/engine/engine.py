"""The engine: what a replica asks of a server's scheduler."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from servecast.sim.engine.config import EngineConfig
from servecast.sim.engine.padded.batch import Pool
from servecast.sim.engine.request import Request


class StepShape(Protocol):
    """What a step-time model may know about a step (a Step has these).

    chunks: (tokens, context) of every prompt chunk: tokens computed now, KV tokens already there.
    decodes: requests that decode, each with one token and its drafts. drafts: draft tokens that they verify,
    summed: ``decodes + drafts`` tokens are decoding ones. decode_context: KV tokens that those requests read,
    each request's context once, summed: what its last row attends to, all its new tokens included; row i of
    1 + d sees d - i fewer. Async scheduling counts drafts in flight as accepted.
    samples: rows of logits: 1 + d of a request that decodes, 1 of a chunk that ends its prompt.
    drafters: requests that propose drafts after the step; draft_length: how many each, at most. A step
    without speculation may leave these two and ``drafts`` out.
    """

    @property
    def chunks(self) -> Sequence[tuple[int, int]]: ...

    @property
    def decodes(self) -> int: ...

    @property
    def decode_context(self) -> int: ...

    @property
    def samples(self) -> int: ...


class Step(StepShape, Protocol):
    """What a replica reads of a step that was decided, and once it is complete of what came of it.

    Attributes:
        total_tokens: tokens computed.
        admitted, preempted: request ids, in order (victims in the order they fell).
        cached_tokens: request id -> computed tokens at admission, for those admitted and resumed.
        idle_s: seconds that pass in a step without work, because the engine waits for more requests.
        first_tokens, finished: ids of requests that got their first or last token from this step.
        gaps: ticks of the steps that delivered the previous token of those whose tokens do not come from
            successive steps. steady: requests that got tokens, and the ones before from the step before.
        emitted: tokens delivered. outputs: requests that they go to, each in one message.
    """

    @property
    def tick(self) -> int: ...

    @property
    def total_tokens(self) -> int: ...

    @property
    def admitted(self) -> Sequence[int]: ...

    @property
    def preempted(self) -> Sequence[int]: ...

    @property
    def cached_tokens(self) -> Mapping[int, int]: ...

    @property
    def idle_s(self) -> float: ...

    @property
    def first_tokens(self) -> Sequence[int]: ...

    @property
    def finished(self) -> Sequence[int]: ...

    @property
    def gaps(self) -> Sequence[int]: ...

    @property
    def steady(self) -> int: ...

    @property
    def emitted(self) -> int: ...


class Engine(Protocol):
    """Decides step by step who computes what. ``add``, then ``schedule`` and ``complete`` in turn."""

    @property
    def config(self) -> EngineConfig: ...

    @property
    def has_requests(self) -> bool:
        """Whether there is a step to decide."""
        ...

    @property
    def num_running(self) -> int: ...

    @property
    def num_waiting(self) -> int: ...

    @property
    def waiting(self) -> Sequence[int]:
        """Request ids, next one first."""
        ...

    @property
    def kv(self) -> Pool: ...

    def add(self, request: Request, arrival: int) -> Any:
        """Queue a request; ``arrival`` rises from call to call. InputError if it could never run."""
        ...

    def abort(self, request_id: int) -> None:
        """Drop a request wherever it stands; an unknown or finished one is ignored."""
        ...

    def schedule(self) -> Any:
        """Decide the next step, a ``Step``."""
        ...

    def complete(self, step: Any) -> None:
        """The step has run: say in it who got a first, a further, or the last token."""
        ...
