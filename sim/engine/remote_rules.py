"""What differs between vLLM releases where a KV connector is there; ``rules`` has the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from servecast.sim.engine.rules import since
from servecast.sim.inputs.errors import InputError


@dataclass(frozen=True, slots=True)
class RemoteRules:
    """Rules of KV connectors that changed between releases. The functions are those of
    ``vllm/v1/core/sched/scheduler.py``.

    Attributes:
        holders_wait_apart: of those who wait, who holds blocks comes first, and who was passed over goes back
            to the front of its queue (kv_holding_waiting); before, whoever was passed over comes before all
            others, or, by priority, in turn with them (skipped_waiting).
        steps_while_sending: the engine goes on while blocks are kept for a connector (has_finished_requests).
        reserves_for_prefills: an asynchronous load leaves the blocks that prefills and other loads still need
            (_inflight_prefill_reserved_blocks).
        reserves_for_drafts: and those of a step that verifies drafts (_spec_decode_step_blocks).
        defers_frees: where steps overlap and the connector consumes, blocks that a step in flight may write
            are free only when that is over (defer_block_free).
        spares_deferred: who has such blocks is not preempted, and the loop over the running ends there
            (_request_blocks_can_be_freed).
        drops_undelivered: a request preempted with output in flight drops it where the connector requires
            delivery (requires_kv_delivery).
        goes_on_for_transfers: the engine goes on while its connector has transfers under way
            (has_pending_push_work).
        forgets_in_flight: a preempted request forgets how much of its output is in flight
            (num_output_placeholders), which a failed load has left too high.
        caches_processed: with overlapping steps, blocks are found from when the steps that fill them are over
            (update_from_output: num_in_flight_tokens); before, as far as no output is in flight.
    """

    holders_wait_apart: bool
    steps_while_sending: bool
    reserves_for_prefills: bool
    reserves_for_drafts: bool
    defers_frees: bool
    spares_deferred: bool
    drops_undelivered: bool
    goes_on_for_transfers: bool
    forgets_in_flight: bool
    caches_processed: bool


REMOTE_RULE_SINCE = {
    "holders_wait_apart": "0.31",
    "steps_while_sending": "0.22",
    "reserves_for_prefills": "0.23",
    "reserves_for_drafts": "0.31",
    "defers_frees": "0.24",
    "spares_deferred": "0.30",
    "drops_undelivered": "0.27",
    "goes_on_for_transfers": "0.26",
    "forgets_in_flight": "0.27",
    "caches_processed": "0.33",
}
"""The first release that has a rule."""


GROUPS_SINCE = "0.23"
"""From when on connectors on KV cache groups are step-exact."""

WHOLE_LOADS_FAIL_SINCE = "0.30"
"""From when on a connector can say that all of a load failed (KVConnectorOutput.failed_recving)."""


def refuse_groups(config: Any) -> None:
    """Raises: InputError: no KV connector is modelled beside the KV cache groups of an engine."""
    states = any(spec.kind == "mamba" for spec in config.kv_groups)
    if states or (config.kv_groups and not since(config.version, GROUPS_SINCE)):
        off = "set disable_hybrid_kv_cache_manager"
        raise InputError(
            "KV connectors for layers that keep states (Mamba, linear attention) are not modelled"
            if states
            else f"KV connectors on several KV cache groups are modelled from vLLM {GROUPS_SINCE} on",
            where="engine.kv_transfer_config",
            fix="Leave the connector and the pools out." if states else f"Take a newer release, or {off}.",
        )


def remote_rules_for(version: str) -> RemoteRules:
    """Those of a release in ``RELEASES``, or of its patches."""
    return RemoteRules(**{name: since(version, first) for name, first in REMOTE_RULE_SINCE.items()})
