"""What of the settings of connectors that move KV cache from prefill to decode servers matters."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from servecast.sim.engine.connector import FailurePolicy, Role
from servecast.sim.inputs.schema import invalid
from servecast.sim.scenario.kv_transfer import KVTransfer

Way = Literal["pull", "storage"]

WAYS: dict[str, Way] = {
    "NixlConnector": "pull",
    "NixlPullConnector": "pull",
    "NixlPushConnector": "pull",
    "MooncakeConnector": "pull",
    "ExampleConnector": "storage",
    "SharedStorageConnector": "storage",
}
_EXTRA = {  # settings without effect here, and why
    "backends": "kv_link says how fast the transport is",
    "num_threads": "kv_link says how fast the transport is",
    "mooncake_protocol": "kv_link says how fast the transport is",
    "shared_storage_path": "kv_link says how fast it is",
}


@dataclass(frozen=True, slots=True)
class PullSettings:
    """A connector's settings.

    Attributes:
        way: how KV blocks go: pulled by the decode server's GPUs, or over a file system within a step.
        role: None where there is no configuration.
        lease_s: how long a prefill server keeps blocks that nobody asks for.
        buffer_device: cpu copies through the host on both sides.
        compares: whether it refuses a server of another release, or with other flags.
        notes: what has no effect here, and why.
    """

    connector: str = "NixlConnector"
    way: Way = "pull"
    role: Role | None = None
    load_failure_policy: FailurePolicy = "fail"
    lease_s: float = 30.0
    buffer_device: Literal["cuda", "cpu"] = "cuda"
    compares: bool = True
    notes: tuple[str, ...] = field(default=(), compare=False)


def pull_settings(transfer: KVTransfer | None) -> PullSettings:
    """Those of a configured connector; without one, or of another kind, what a disaggregated fleet has.

    Raises:
        as validators do: it asks for what is not modelled.
    """
    if transfer is None or transfer.connector not in WAYS:
        return PullSettings()
    connector, notes, compares = transfer.connector, [], True
    device = transfer.buffer_device or "cuda"
    if device not in ("cuda", "cpu", "xpu"):
        raise invalid(f"kv_buffer_device cannot be {device!r}", "Known are cuda, cpu, xpu.")
    lease = 480.0 if connector == "MooncakeConnector" else 30.0
    for name, value in transfer.extra.items():
        if name == "kv_lease_duration":
            if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
                raise invalid(f"kv_lease_duration is {value!r}", "Give seconds.")
            lease = float(value)
        elif name == "enforce_handshake_compat":
            compares = bool(value)
        elif name == "bidirectional_kv_xfer" and value:
            raise invalid("bidirectional_kv_xfer is not modelled", "Paste it without.")
        else:
            notes.append(f"kv_connector_extra_config.{name} ({_EXTRA.get(str(name), 'it is not modelled')})")
    if connector == "NixlPushConnector":
        notes.append("NixlPushConnector (timed as a pull: its write starts when both sides are ready)")
    if connector == "MooncakeConnector":
        notes.append("MooncakeConnector (timed as NIXL's pull)")
    return PullSettings(
        connector,
        WAYS[connector],
        transfer.role,
        transfer.load_failure_policy,
        lease,
        "cpu" if device == "cpu" else "cuda",
        compares,
        tuple(notes),
    )
