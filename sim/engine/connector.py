"""KV connectors: KV cache that comes from, or is kept for, somewhere outside of the engine.

A ``Connector`` is what vLLM's KVConnectorBase_V1 is: its scheduler half answers the scheduler, step by step;
its worker half is asked by the engine's loop what transfers take and when they are done. ``Scheduler(config,
connector)`` takes one, and ``EngineLoop`` finds it there. One connector belongs to one engine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from servecast.sim.engine.scheduler import Scheduler
    from servecast.sim.engine.sequence import Sequence
    from servecast.sim.engine.step import Step

Role = Literal["kv_producer", "kv_consumer", "kv_both"]
FailurePolicy = Literal["fail", "recompute"]
Ending = Literal["finished", "aborted", "error"]

NEVER = 1 << 62  # ps


@dataclass(frozen=True, slots=True)
class Transfers:
    """What the worker half reports with the output of a step (vLLM's KVConnectorOutput), by request id.

    finished_recving: their asynchronous loads are over, failed or not; also of requests aborted meanwhile.
    finished_sending: the blocks that were kept for them at their end may go.
    invalid_block_ids: blocks whose load, synchronous or not, has failed; report them together with
    ``finished_recving`` where the load is asynchronous.
    failed_recving: asynchronous loads of which nothing is valid; named in ``finished_recving``, too.
    jobs: what is the connector's own business (its worker metadata), for ``update_connector_output``.
    """

    finished_recving: tuple[int, ...] = ()
    finished_sending: tuple[int, ...] = ()
    invalid_block_ids: frozenset[int] = frozenset()
    failed_recving: tuple[int, ...] = ()
    jobs: tuple[int, ...] = ()


class Connector(Protocol):
    """vLLM's KV connector, in its words. Tokens are counts, times picoseconds of the simulation.

    Attributes:
        role: ``kv_role``. One that consumes (kv_consumer, kv_both) makes an engine with steps in flight defer
            frees of blocks that those may write, and refuse to preempt whom they belong to.
        load_failure_policy: ``kv_load_failure_policy``: requests of a failed load end with an error, or
            compute what is missing.
        requires_kv_delivery: whether a request preempted with output in flight drops it (vLLM: by default,
            connectors that produce; the offloading connector not).
        now: set by the engine's loop, to the time of the calls of the scheduler half that follow.

    Of a ``sequence`` these are readable: request_id, prompt_tokens, num_tokens (with outputs so far),
    computed, limit (prompt and max_tokens), preemptions. Its blocks are ``scheduler.block_ids(request_id)``,
    their contents ``scheduler.block_keys(sequence, blocks)``.
    """

    @property
    def role(self) -> Role: ...

    @property
    def load_failure_policy(self) -> FailurePolicy: ...

    @property
    def requires_kv_delivery(self) -> bool: ...

    # ---- the scheduler half: called by the scheduler

    def bind(self, scheduler: Scheduler) -> None:
        """The scheduler that it belongs to, once, before all other calls."""

    def on_new_request(self, sequence: Sequence) -> None:
        """A request joins the queue."""

    def get_num_new_matched_tokens(
        self, sequence: Sequence, num_computed_tokens: int
    ) -> tuple[int, bool] | None:
        """How many tokens it has beyond the local hit of ``num_computed_tokens`` (whole blocks), and whether
        they are loaded asynchronously; None: ask again in the next step.

        Asked at every look-up of a request without computed tokens, also where its admission then fails for
        lack of blocks: it must leave no trace. At most num_tokens - num_computed_tokens; (0, False) is none.
        A synchronous load leaves at least one token to compute.
        """
        ...

    def update_state_after_alloc(self, sequence: Sequence, num_external_tokens: int) -> None:
        """It has its blocks, and ``num_external_tokens`` of its computed tokens are to be loaded: those of
        ``get_num_new_matched_tokens``, 0 where there were none, and 0 again when a request is admitted whose
        asynchronous load is over. The load fills the blocks from ``num_computed_tokens`` // block_size to
        ceil((num_computed_tokens + num_external_tokens) / block_size)."""

    def build_connector_meta(self, step: Step) -> Any:
        """A step is decided, be it empty: what the worker half is to do with it, for ``start_load_kv``."""

    def request_finished(self, sequence: Sequence, ending: Ending) -> bool:
        """A request ends; it still has its blocks. True: they are kept until ``finished_sending`` names
        it."""
        ...

    def update_connector_output(self, transfers: Transfers) -> None:
        """The worker half's report has reached the scheduler, before it acts on it."""

    # A connector may also have ``has_pending_push_work() -> bool``: whether the engine goes on for transfers
    # that no request waits for; and ``wait_for_save(meta, now) -> float``, which is called with the end of
    # each step with tokens and says for how many seconds more the step goes on.

    # ---- the worker half: called by the engine's loop

    def start_load_kv(self, meta: Any, now: int) -> float:
        """The step of ``build_connector_meta`` starts at ``now``, and with it its transfers.

        Returns:
            Seconds that its forward waits for them: synchronous loads, and stores that must be over first.
        """
        ...

    def get_finished(self, now: int) -> Transfers | None:
        """What has ended by ``now`` and was not reported yet; None is nothing. Asked once a step, and about
        once a millisecond while the engine has requests and nothing to compute."""
        ...

    def next_event(self, now: int) -> int:
        """When, after ``now``, an answer or a report will be another one, by what is known now; ``NEVER``:
        not by itself. What changes it from outside has to wake the engine's server (``Flow.wake_server``)."""
        ...
