"""LMCache's connectors: the cache inside the engine (LMCacheConnectorV1), and the one in a server of its own
(LMCacheMPConnector).

Followed: ``vllm/distributed/kv_transfer/kv_connector/v1`` (lmcache_integration/vllm_v1_adapter.py and
lmcache_mp_connector.py), and of LMCache itself its storage manager and GPU connector.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from servecast.sim.engine.connector import NEVER, Ending, FailurePolicy, Role, Transfers
from servecast.sim.engine.pipe import Pipe
from servecast.sim.engine.sequence import Sequence
from servecast.sim.engine.step import Step
from servecast.sim.engine.tiers import Hierarchy, chunk_keys
from servecast.sim.inputs.units import to_seconds


@dataclass(slots=True)
class Work:
    """What a step's workers do: loads, by request, and the chunks to store, by request."""

    loads: list[tuple[int, list[int]]] = field(default_factory=list)
    stores: list[tuple[int, list[int]]] = field(default_factory=list)


class _Chunks:
    """What both have in common: chunks of prompts, stored as they are computed.

    Args:
        tiers: where chunks are. role, load_failure_policy: see ``Connector``. replica: its number.

    Attributes:
        now: the time of the scheduler's calls, ps.
    """

    requires_kv_delivery: bool

    def __init__(
        self, tiers: Hierarchy, role: Role, load_failure_policy: FailurePolicy, replica: int = 0
    ) -> None:
        self.tiers, self.role, self.load_failure_policy = tiers, role, load_failure_policy
        self.requires_kv_delivery = role != "kv_consumer"
        self.replica, self.now = replica, 0
        self.scheduler: Any = None
        self._work = Work()
        self._saved: dict[int, int] = {}  # request -> its chunks that are stored, or were found

    @property
    def links(self) -> dict[str, Pipe]:
        """What it moves KV cache over."""
        found = {"host_to_gpu": self.tiers.to_gpu, "gpu_to_host": self.tiers.to_host}
        for tier in self.tiers.tiers:
            if tier.read is not None and tier.write is not None:
                found |= {f"from_{tier.name}": tier.read, f"to_{tier.name}": tier.write}
        return found

    @property
    def loaded_tokens(self) -> dict[str, int]:
        """By the tier that they came from."""
        return {name: count * self.tiers.chunk_tokens for name, count in self.tiers.loaded.items()}

    @property
    def evictions(self) -> int:
        """Chunks that made room, in all tiers."""
        return sum(tier.evictions for tier in self.tiers.tiers)

    def bind(self, scheduler: Any) -> None:
        """See ``Connector``."""
        self.scheduler = scheduler

    def on_new_request(self, sequence: Sequence) -> None:
        """See ``Connector``."""

    def keys(self, sequence: Sequence, tokens: int) -> list[int]:
        """Those of the whole chunks among its first tokens."""
        return chunk_keys(self.scheduler, sequence, self.tiers.chunk_tokens, tokens, self.replica)

    def _store(self, sequence: Sequence, tokens: int) -> None:
        """Whole chunks of its first ``tokens`` that are not stored yet are, with this step."""
        done, end = self._saved.get(sequence.request_id, 0), tokens // self.tiers.chunk_tokens
        if end > done and self.role != "kv_consumer":
            self._saved[sequence.request_id] = end
            self._work.stores.append((sequence.request_id, self.keys(sequence, tokens)[done:]))

    def build_connector_meta(self, step: Step) -> Work:
        """See ``Connector``."""
        for (tokens, context), sequence in zip(step.chunks, step.prefilling, strict=True):
            self._store(sequence, min(context + tokens, sequence.prompt_tokens))
        work, self._work = self._work, Work()
        return work

    def update_connector_output(self, transfers: Transfers) -> None:
        """See ``Connector``."""


class LMCacheConnectorV1(_Chunks):
    """LMCache in the engine's process: a load is part of the step that needs it, and so is the copy of what
    the step has computed to host memory (``wait_for_save``: the GPU connector waits for its stream)."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._found: dict[int, list[int]] = {}

    def get_num_new_matched_tokens(
        self, sequence: Sequence, num_computed_tokens: int
    ) -> tuple[int, bool] | None:
        """See ``Connector``: whole chunks of the prompt; of one that is there whole, the last token is
        computed."""
        if self.role == "kv_producer":
            return 0, False
        keys = self.keys(sequence, sequence.prompt_tokens)
        count = self.tiers.lookup(keys, self.now)
        self._found[sequence.request_id] = keys[:count]
        found = count * self.tiers.chunk_tokens
        need = found - num_computed_tokens - (found == sequence.num_tokens)
        return (need, False) if need > 0 else (0, False)

    def update_state_after_alloc(self, sequence: Sequence, num_external_tokens: int) -> None:
        """See ``Connector``."""
        keys = self._found.pop(sequence.request_id, [])
        chunk = self.tiers.chunk_tokens
        self._saved[sequence.request_id] = max(len(keys), self._saved.get(sequence.request_id, 0))
        if num_external_tokens:
            end = len(keys) * chunk - (len(keys) * chunk == sequence.num_tokens)
            keys = keys[(end - num_external_tokens) // chunk :]
            self.tiers.pin(keys)
            self._work.loads.append((sequence.request_id, keys))

    def request_finished(self, sequence: Sequence, ending: Ending) -> bool:
        """See ``Connector``."""
        self._found.pop(sequence.request_id, None)
        self._saved.pop(sequence.request_id, None)
        return False

    def start_load_kv(self, meta: Work, now: int) -> float:
        """See ``Connector``."""
        end = now
        for _, keys in meta.loads:
            end = self.tiers.to_gpus(keys, self.tiers.fetch(keys, end))
            self.tiers.unpin(keys)
        return to_seconds(end - now)

    def wait_for_save(self, meta: Work, now: int) -> float:
        """See ``Connector``."""
        end = now
        for _, keys in meta.stores:
            end = self.tiers.store(keys, end)
        return to_seconds(end - now)

    def get_finished(self, now: int) -> Transfers | None:
        """See ``Connector``."""
        return None

    def next_event(self, now: int) -> int:
        """See ``Connector``."""
        return NEVER


@dataclass(slots=True)
class _Lookup:
    """When the server answers, and the chunks that it has and keeps for the request."""

    answer: int
    keys: list[int]


class LMCacheMPConnector(_Chunks):
    """LMCache in a server of its own: it answers a look-up when what is below host memory has been fetched,
    loads and stores beside the steps, and the blocks of a request stay until its stores are over.

    What is computed behind the prompt is stored when the request ends.

    Args:
        lookup_s: until the server answers, fetching apart.
    """

    def __init__(self, *args: Any, lookup_s: float = 0.0) -> None:
        super().__init__(*args)
        self.lookup_ps = round(lookup_s * 1e12)
        self._lookups: dict[int, _Lookup] = {}
        self._loading: dict[int, tuple[int, list[int]]] = {}  # request -> end, chunks
        self._storing: dict[int, int] = {}  # request -> end of its last store
        self._ended: set[int] = set()

    def get_num_new_matched_tokens(
        self, sequence: Sequence, num_computed_tokens: int
    ) -> tuple[int, bool] | None:
        """See ``Connector``. Nothing is loaded for requests that were preempted."""
        if sequence.preemptions or self.role == "kv_producer":
            return 0, False
        lookup = self._lookups.get(sequence.request_id)
        if lookup is None:
            keys = self.keys(sequence, sequence.num_tokens)
            keys = keys[: self.tiers.lookup(keys, self.now)]
            self.tiers.pin(keys)
            answer = max(self.now + self.lookup_ps, self.tiers.fetch(keys, self.now))
            self._lookups[sequence.request_id] = _Lookup(answer, keys)
            return None
        if lookup.answer > self.now:
            return None
        need = len(lookup.keys) * self.tiers.chunk_tokens - num_computed_tokens
        return (need, True) if need > 0 else (0, False)

    def update_state_after_alloc(self, sequence: Sequence, num_external_tokens: int) -> None:
        """See ``Connector``."""
        lookup = self._lookups.pop(sequence.request_id, None)
        if lookup is None:
            return
        keys = lookup.keys
        self._saved[sequence.request_id] = len(keys)
        if not num_external_tokens:
            self.tiers.unpin(keys)
            return
        first = (len(keys) * self.tiers.chunk_tokens - num_external_tokens) // self.tiers.chunk_tokens
        self.tiers.unpin(keys[:first])
        self._work.loads.append((sequence.request_id, keys[first:]))

    def request_finished(self, sequence: Sequence, ending: Ending) -> bool:
        """See ``Connector``."""
        lookup = self._lookups.pop(sequence.request_id, None)
        if lookup is not None:
            self.tiers.unpin(lookup.keys)
        if ending == "finished":
            self._store(sequence, sequence.num_tokens - 1)  # the last is never computed
        self._saved.pop(sequence.request_id, None)
        self._ended.add(sequence.request_id)
        return True

    def start_load_kv(self, meta: Work, now: int) -> float:
        """See ``Connector``."""
        for request_id, keys in meta.loads:
            self._loading[request_id] = self.tiers.to_gpus(keys, now), keys
        for request_id, keys in meta.stores:
            self._storing[request_id] = self.tiers.store(keys, now)
        return 0.0

    def get_finished(self, now: int) -> Transfers | None:
        """See ``Connector``."""
        loaded = [request_id for request_id, (end, _) in self._loading.items() if end <= now]
        for request_id in loaded:
            self.tiers.unpin(self._loading.pop(request_id)[1])
        queued = {request_id for request_id, _ in self._work.stores}
        sent = sorted(
            request_id
            for request_id in self._ended
            if request_id not in queued and self._storing.get(request_id, now) <= now
        )
        for request_id in sent:
            self._ended.discard(request_id)
            self._storing.pop(request_id, None)
        return Transfers(tuple(loaded), tuple(sent)) if loaded or sent else None

    def next_event(self, now: int) -> int:
        """See ``Connector``."""
        times = [lookup.answer for lookup in self._lookups.values()]
        times += [end for end, _ in self._loading.values()]
        times += [self._storing.get(request_id, now + 1) for request_id in self._ended]
        return min((time for time in times if time > now), default=NEVER)
