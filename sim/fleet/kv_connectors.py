"""KV connectors of prefill and decode servers: blocks that wait to be read, reads over the link, and their
failures, as vLLM's NixlConnector has them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from servecast.sim.engine.connector import NEVER, Ending, FailurePolicy, Role, Transfers
from servecast.sim.engine.remote_rules import WHOLE_LOADS_FAIL_SINCE
from servecast.sim.engine.rules import since
from servecast.sim.fleet.disaggregation import Link
from servecast.sim.fleet.kv_ports import Ports, runs
from servecast.sim.inputs.units import to_ps

_EXTENDS, _BEATS = 2 / 3, 6  # of a lease: what a heartbeat extends it by, and how many come in one


@dataclass(slots=True)
class Held:
    """KV blocks of a computed prompt, by KV cache group. until: from when they may go, NEVER while somebody
    beats for them. gone: with their server, or freed, so that a read of them fails."""

    prefill: int
    blocks: Sequence[Sequence[int]]
    since: int
    until: int
    received: int = -1
    gone: bool = False


@dataclass(slots=True)
class Read:
    """A transfer, for the records. start: it was posted; end: all ranks have it, or it failed."""

    prefill: int
    decode: int
    start: int
    end: int
    bytes: int
    failed: bool = False


class Exchange:
    """What connectors of a fleet share: who holds what for whom, and the ports between them.

    Args:
        ports: of the sites, which are the engine cores of all servers. lease_s: how long blocks are kept that
            nobody asks for. rng: for transfers that fail.

    Attributes:
        held, reads: by request id.
        wake: called with a server's number and a time at which something becomes known there.
    """

    def __init__(self, link: Link, ports: Ports, lease_s: float, rng: np.random.Generator) -> None:
        self.link, self.ports, self.lease = link, ports, to_ps(lease_s)
        self._rng = rng
        self.held: dict[int, Held] = {}
        self.reads: dict[int, Read] = {}
        self.wake: Callable[[int, int], None] = lambda server, time: None
        self._met: dict[tuple[int, int], int] = {}  # prefill, decode -> when they know each other
        self._down: set[int] = set()
        self.connectors: dict[int, NixlConnector] = {}

    def received(self, request_id: int, now: int) -> None:
        """A decode server has the request, and beats for its blocks from now on."""
        held = self.held.get(request_id)
        if held is not None:
            held.gone |= held.until <= now
            if not held.gone:
                held.received, held.until = now, NEVER

    def free(self, request_id: int, time: int) -> None:
        """The blocks have been read, or nobody wants them any more."""
        held = self.held.get(request_id)
        if held is not None and not held.gone:
            held.until = time
            self.wake(self.ports.servers[held.prefill], time)

    def read(self, decode: int, request_id: int, blocks: Sequence[Sequence[int]], now: int) -> Read:
        """A decode server fetches the last blocks of a prompt, of each KV cache group."""
        held = self.held[request_id]
        pair = held.prefill, decode
        start = max(now, self._met.setdefault(pair, now + to_ps(self.link.handshake_s)))
        here = [block for group in blocks for block in group]
        fails = held.gone or held.prefill in self._down
        fails = fails or (self.link.failure_share > 0 and self._rng.random() < self.link.failure_share)
        if held.gone or held.prefill in self._down:
            found = Read(*pair, start, start + to_ps(self.link.latency_s), 0, True)
        else:
            pairs = zip(held.blocks, blocks, strict=True)
            there = [block for its, own in pairs for block in its[max(0, len(its) - len(own)) :]]
            end, size = self.ports.send(*pair, len(here), runs(here, there), start)
            found = Read(*pair, start, end, size, fails)
            if fails:  # nobody says that it was read
                self._last_beat(request_id, end)
            else:
                self.free(request_id, end + to_ps(self.link.latency_s))
        self.reads[request_id] = found
        return found

    def fail(self, server: int, now: int) -> None:
        """A server is gone, with the blocks that it held, and those that it beat for go when their lease
        ends."""
        gone = [site for site, of in enumerate(self.ports.servers) if of == server]
        self._down.update(gone)
        for held in self.held.values():
            held.gone |= held.prefill in gone
        for request_id, read in self.reads.items():
            if read.prefill in gone and read.end > now:
                read.end, read.failed = now, True
                self.wake(self.ports.servers[read.decode], now)
            elif read.decode in gone and read.end > now:
                self._last_beat(request_id, now)
        for site in gone:
            for request_id in self.connectors[site].waiting:
                self._last_beat(request_id, now)

    def _last_beat(self, request_id: int, now: int) -> None:
        """Nobody beats for its blocks from now on."""
        held = self.held[request_id]
        if held.received >= 0 and not held.gone:
            beat = self.lease // _BEATS
            last = held.received + (now - held.received) // beat * beat
            self.free(request_id, max(held.since + self.lease, last + round(_EXTENDS * self.lease)))


class NixlConnector:
    """Of a server that computes prompts, whose blocks stay until they were read or their lease ends, or of
    one that fetches those blocks and goes on from there.

    Attributes:
        waiting: requests that have come and whose blocks were not asked for yet.
        clock: up to when the engine has run, ps.
    """

    def __init__(
        self, exchange: Exchange, index: int, role: Role, policy: FailurePolicy, *, prefills: bool
    ) -> None:
        self.role, self.load_failure_policy = role, policy
        self.requires_kv_delivery = role != "kv_consumer"
        self.clock: Callable[[], int] = lambda: 0
        self.waiting: dict[int, None] = {}
        self._exchange, self._index, self._prefills = exchange, index, prefills
        self._scheduler: Any = None
        self._held: dict[int, Held] = {}
        self._asked: list[tuple[int, list[list[int]]]] = []
        self._loads: dict[int, tuple[Read, list[list[int]]]] = {}
        exchange.connectors[index] = self

    def bind(self, scheduler: Any) -> None:
        self._scheduler = scheduler

    def on_new_request(self, sequence: Any) -> None:
        if not self._prefills and sequence.request_id in self._exchange.held:
            self.waiting[sequence.request_id] = None
            self._exchange.received(sequence.request_id, self.clock())

    def get_num_new_matched_tokens(self, sequence: Any, num_computed_tokens: int) -> tuple[int, bool] | None:
        count = sequence.prompt_tokens - num_computed_tokens
        return (count, True) if sequence.request_id in self.waiting and count > 0 else (0, False)

    def update_state_after_alloc(self, sequence: Any, num_external_tokens: int) -> None:
        request_id = sequence.request_id
        if request_id not in self.waiting:
            return
        if num_external_tokens:
            del self.waiting[request_id]
            local = sequence.prompt_tokens - num_external_tokens
            self._asked.append((request_id, self._moving(request_id, local, sequence.prompt_tokens)))
        else:
            self._give_back(request_id)

    def _moving(self, request_id: int, first: int, last: int) -> list[list[int]]:
        """Blocks with tokens from ``first`` to ``last``, of each KV cache group; of a sliding window no more
        than it reaches, and one (get_exchange_clipped_blocks)."""
        config, blocks = self._scheduler.config, self._scheduler.block_ids(request_id)
        if not config.kv_groups:
            return [blocks[first // config.block_size : -(-last // config.block_size)]]
        found = []
        for spec, held in zip(config.kv_groups, blocks, strict=True):
            most = -(-spec.window // spec.block_size) + 1 if spec.kind == "sliding" else len(held)
            part = held[first // spec.block_size : -(-last // spec.block_size)]
            found.append([block for block in part if block][-most:])
        return found

    def _give_back(self, request_id: int) -> None:
        """Nothing is to be read: the prefill server hears of it."""
        del self.waiting[request_id]
        self._exchange.free(request_id, self.clock() + to_ps(self._exchange.link.latency_s))

    def build_connector_meta(self, step: Any) -> Any:
        asked, self._asked = self._asked, []
        return asked

    def start_load_kv(self, meta: Any, now: int) -> float:
        for request_id, blocks in meta:
            self._loads[request_id] = self._exchange.read(self._index, request_id, blocks, now), blocks
        return 0.0

    def request_finished(self, sequence: Any, ending: Ending) -> bool:
        request_id = sequence.request_id
        if request_id in self.waiting:  # given up before its blocks were asked for
            self._give_back(request_id)
        if not self._prefills or ending != "finished":
            return False
        now, blocks = self.clock(), self._moving(request_id, 0, sequence.prompt_tokens)
        held = Held(self._index, blocks, now, now + self._exchange.lease)
        self._held[request_id] = self._exchange.held[request_id] = held
        return True

    def update_connector_output(self, transfers: Transfers) -> None:
        pass

    def get_finished(self, now: int) -> Transfers | None:
        sent = tuple(request_id for request_id, held in self._held.items() if held.until <= now)
        over = [(request_id, *load) for request_id, load in self._loads.items() if load[0].end <= now]
        for request_id in sent:
            held = self._held.pop(request_id)
            held.gone, held.blocks = True, ()
        for request_id, _, _ in over:
            del self._loads[request_id]
        if not sent and not over:
            return None
        received = tuple(request_id for request_id, *_ in over)
        failed = [each for each in over if each[1].failed]
        config = self._scheduler.config
        if not config.kv_groups:
            return Transfers(received, sent, frozenset(block for *_, groups in failed for block in groups[0]))
        if not since(config.version, WHOLE_LOADS_FAIL_SINCE):  # before, the request goes on as if it had them
            return Transfers(received, sent)
        return Transfers(received, sent, failed_recving=tuple(request_id for request_id, *_ in failed))

    def next_event(self, now: int) -> int:
        times = [held.until for held in self._held.values()] + [read.end for read, _ in self._loads.values()]
        return min((time for time in times if time > now), default=NEVER)


class ExampleConnector:
    """Of servers that share a file system: who computes a prompt writes it within its step, who finds it
    there reads it within its own (example_connector.py). Prompts are told apart by request.

    Args:
        stored: requests whose prompts are in the file system, shared by all servers.
        bytes_per_token: on all ranks.
    """

    requires_kv_delivery = False

    def __init__(
        self, link: Link, stored: set[int], bytes_per_token: int, role: Role, policy: FailurePolicy
    ) -> None:
        self.role, self.load_failure_policy = role, policy
        self.clock: Callable[[], int] = lambda: 0
        self._link, self._stored, self._bytes = link, stored, bytes_per_token
        self._block_size = 1
        self._moves: list[tuple[int, int]] = []  # request to be stored, or -1; tokens

    def bind(self, scheduler: Any) -> None:
        self._block_size = scheduler.config.block_size

    def on_new_request(self, sequence: Any) -> None:
        pass

    def _whole(self, tokens: int) -> int:
        """Tokens of whole blocks, at least one token left."""
        return (tokens - 1) // self._block_size * self._block_size

    def _found(self, sequence: Any) -> bool:
        """What was written has as many blocks as what is looked for, which is one token shorter."""
        prompt = sequence.prompt_tokens
        return sequence.request_id in self._stored and self._whole(prompt) == self._whole(prompt - 1)

    def get_num_new_matched_tokens(self, sequence: Any, num_computed_tokens: int) -> tuple[int, bool] | None:
        if not self._found(sequence):
            return 0, False
        return max(0, self._whole(sequence.prompt_tokens - 1) - num_computed_tokens), False

    def update_state_after_alloc(self, sequence: Any, num_external_tokens: int) -> None:
        if num_external_tokens:
            self._moves.append((-1, self._whole(sequence.prompt_tokens - 1)))
        elif not self._found(sequence) and not sequence.preemptions:
            self._moves.append((sequence.request_id, self._whole(sequence.prompt_tokens)))

    def build_connector_meta(self, step: Any) -> Any:
        moves, self._moves = self._moves, []
        return moves

    def start_load_kv(self, meta: Any, now: int) -> float:
        seconds = 0.0
        for request_id, tokens in meta:
            seconds += self._link.latency_s + tokens * self._bytes / self._link.bandwidth
            if request_id >= 0:
                self._stored.add(request_id)
        return seconds

    def request_finished(self, sequence: Any, ending: Ending) -> bool:
        return False

    def update_connector_output(self, transfers: Transfers) -> None:
        pass

    def get_finished(self, now: int) -> Transfers | None:
        return None

    def next_event(self, now: int) -> int:
        return NEVER
