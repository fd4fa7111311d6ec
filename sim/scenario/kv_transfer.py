"""``--kv-transfer-config``: which connectors are modelled, and what of their settings matters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from servecast.sim.inputs.schema import did_you_mean, invalid

Role = Literal["kv_producer", "kv_consumer", "kv_both"]
Way = Literal["pull", "storage"]

_ROLES: tuple[Role, ...] = ("kv_producer", "kv_consumer", "kv_both")
_FIELDS = (
    "kv_connector", "kv_role", "kv_load_failure_policy", "kv_buffer_device", "kv_connector_extra_config",
    "kv_connector_module_path", "engine_id", "kv_ip", "kv_port", "kv_rank", "kv_parallel_size",
    "kv_buffer_size", "enable_permute_local_kv",
)  # fmt: skip
_WAYS: dict[str, Way] = {
    "NixlConnector": "pull",
    "NixlPullConnector": "pull",
    "NixlPushConnector": "pull",
    "MooncakeConnector": "pull",
    "ExampleConnector": "storage",
    "SharedStorageConnector": "storage",
}
_NOT_MODELLED = (
    "P2pNcclConnector", "LMCacheConnectorV1", "LMCacheMPConnector", "MultiConnector", "MoRIIOConnector",
    "OffloadingConnector", "DecodeBenchConnector", "MooncakeStoreConnector", "FlexKVConnectorV1",
    "SimpleCPUOffloadConnector", "HF3FSConnector", "HiSparseConnector", "ExampleHiddenStatesConnector",
)  # fmt: skip
_EXTRA = {  # settings without effect here, and why
    "backends": "kv_link says how fast the transport is",
    "num_threads": "kv_link says how fast the transport is",
    "mooncake_protocol": "kv_link says how fast the transport is",
    "enforce_handshake_compat": "both sides are of one model",
    "shared_storage_path": "kv_link says how fast it is",
}


@dataclass(frozen=True, slots=True)
class KVTransfer:
    """A connector's settings.

    Attributes:
        way: how KV blocks go: pulled by the decode server's GPUs, or over a file system within a step.
        role: None where the command gives none, or there is no command.
        lease_s: how long a prefill server keeps blocks that nobody asks for.
        buffer_device: cpu copies through the host on both sides.
        notes: what has no effect here, and why.
    """

    connector: str = "NixlConnector"
    way: Way = "pull"
    role: Role | None = None
    load_failure_policy: Literal["fail", "recompute"] = "fail"
    lease_s: float = 30.0
    buffer_device: Literal["cuda", "cpu"] = "cuda"
    notes: tuple[str, ...] = field(default=(), compare=False)


def kv_transfer(config: Mapping[str, Any] | None) -> KVTransfer:
    """Reads ``--kv-transfer-config``; None is what a disaggregated fleet has without it.

    Raises:
        as validators do: it is malformed, or asks for what is not modelled.
    """
    if config is None:
        return KVTransfer()
    for name in config:
        if name not in _FIELDS:
            fix = did_you_mean(str(name), _FIELDS) or f"Known are {', '.join(_FIELDS)}."
            raise invalid(f"kv_transfer_config has no field {name!r}", fix)
    connector = config.get("kv_connector")
    if connector not in _WAYS or config.get("kv_connector_module_path"):
        known = f"Modelled are {', '.join(_WAYS)}."
        if connector in _NOT_MODELLED or config.get("kv_connector_module_path"):
            raise invalid(f"the connector {connector} is not modelled", f"Paste it without. {known}")
        raise invalid(f"there is no connector {connector!r}", did_you_mean(str(connector), _WAYS) or known)
    notes = []
    role = _one_of(config, "kv_role", _ROLES, None)
    policy = _one_of(config, "kv_load_failure_policy", ("fail", "recompute"), "fail")
    device = _one_of(config, "kv_buffer_device", ("cuda", "cpu", "xpu"), "cuda")
    extra = config.get("kv_connector_extra_config") or {}
    if not isinstance(extra, Mapping):
        raise invalid("kv_connector_extra_config is no mapping", "Write names and values.")
    lease = 480.0 if connector == "MooncakeConnector" else 30.0
    for name, value in extra.items():
        if name == "kv_lease_duration":
            if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
                raise invalid(f"kv_lease_duration is {value!r}", "Give seconds.")
            lease = float(value)
        elif name == "bidirectional_kv_xfer" and value:
            raise invalid("bidirectional_kv_xfer is not modelled", "Paste it without.")
        else:
            notes.append(f"kv_connector_extra_config.{name} ({_EXTRA.get(str(name), 'it is not modelled')})")
    if connector == "NixlPushConnector":
        notes.append("NixlPushConnector (timed as a pull: its write starts when both sides are ready)")
    if connector == "MooncakeConnector":
        notes.append("MooncakeConnector (timed as NIXL's pull)")
    return KVTransfer(
        str(connector), _WAYS[str(connector)], role, policy, lease, "cpu" if device == "cpu" else "cuda",
        tuple(notes),
    )  # fmt: skip


def _one_of(config: Mapping[str, Any], name: str, known: tuple[str, ...], default: Any) -> Any:
    value = config.get(name)
    if value is None:
        return default
    if value not in known:
        fix = did_you_mean(str(value), known) or f"Known are {', '.join(known)}."
        raise invalid(f"{name} cannot be {value!r}", fix)
    return value
