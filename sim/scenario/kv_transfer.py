"""``--kv-transfer-config`` as vLLM reads it: which connector, in which role, with what options.

One parser for all connectors. Each has its entry in ``MODELLED``; what it makes of ``extra`` is its owner's.
Followed: ``vllm/config/kv_transfer.py``, ``VllmConfig._post_init_kv_transfer_config`` and the connectors'
constructors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from servecast.sim.engine.connector import FailurePolicy, Role
from servecast.sim.engine.rules import since
from servecast.sim.inputs.schema import did_you_mean, invalid

AT = "kv_transfer_config"
GIB = 1 << 30

_EVER = ("0.10", None)
CONNECTORS: dict[str, tuple[str, str | None]] = {  # the first and the last release that registers it
    **dict.fromkeys(
        (
            "ExampleConnector",
            "ExampleHiddenStatesConnector",
            "LMCacheConnectorV1",
            "LMCacheMPConnector",
            "NixlConnector",
            "MultiConnector",
            "MoRIIOConnector",
            "OffloadingConnector",
            "DecodeBenchConnector",
            "MooncakeConnector",
            "FlexKVConnectorV1",
            "SimpleCPUOffloadConnector",
            "HF3FSKVConnector",
        ),
        _EVER,
    ),
    "SharedStorageConnector": ("0.10", "0.19"),  # ExampleConnector's older name
    "P2pNcclConnector": ("0.10", "0.23"),
    "MooncakeStoreConnector": ("0.21", None),
    "NixlPullConnector": ("0.24", None),
    "NixlPushConnector": ("0.24", None),
    "HiSparseConnector": ("0.30", None),
}
MODELLED: dict[str, frozenset[str] | None] = {
    "OffloadingConnector": frozenset(
        (
            "cpu_bytes_to_use",
            "block_size",
            "blocks_per_chunk",
            "eviction_policy",
            "store_threshold",
            "max_tracker_size",
            "offload_prompt_only",
            "spec_name",
            "self_describing_kv_events",
        )
    ),
    "LMCacheConnectorV1": None,
    "LMCacheMPConnector": None,
    "NixlConnector": None,
    "NixlPullConnector": None,
    "NixlPushConnector": None,
    "MooncakeConnector": None,
    "ExampleConnector": None,
    "SharedStorageConnector": None,
    "MultiConnector": frozenset(("connectors",)),
}
"""The connectors that can be simulated, with the keys of kv_connector_extra_config that are understood; None:
the connector reads them itself."""

_FIELDS = {  # of KVTransferConfig, with the last release that has them
    "kv_connector": None,
    "engine_id": None,
    "kv_buffer_device": None,
    "kv_buffer_size": "0.31",
    "kv_role": None,
    "kv_rank": "0.31",
    "kv_parallel_size": "0.31",
    "kv_ip": "0.31",
    "kv_port": None,
    "kv_connector_extra_config": None,
    "kv_connector_module_path": None,
    "enable_permute_local_kv": None,
    "kv_load_failure_policy": None,
}


@dataclass(frozen=True, slots=True)
class KVTransfer:
    """A connector as configured.

    Attributes:
        connector: its name in vLLM. role: ``kv_role``. load_failure_policy: ``kv_load_failure_policy``.
        extra: ``kv_connector_extra_config``. buffer_device: ``kv_buffer_device``, None for the GPU.
        connectors: those of a MultiConnector, in their order.
    """

    connector: str
    role: Role
    load_failure_policy: FailurePolicy = "fail"
    extra: Mapping[str, Any] = field(default_factory=dict)
    buffer_device: str | None = None
    connectors: tuple[KVTransfer, ...] = ()

    def all(self) -> tuple[KVTransfer, ...]:
        """The connector, or those that a MultiConnector is made of."""
        return self.connectors or (self,)

    def of(self, *names: str) -> KVTransfer | None:
        """The first of them with one of these names."""
        return next((each for each in self.all() if each.connector in names), None)


def parse_kv_transfer(given: Mapping[str, Any], release: str, *, at: str = AT) -> KVTransfer | None:
    """``--kv-transfer-config`` in a release of ``engine.rules.RELEASES``; None where it names no connector.

    Raises:
        InputError (as validators do): vLLM would refuse it, or it is not modelled.
    """
    for name in given:
        last = _FIELDS.get(name)
        if name not in _FIELDS:
            raise invalid(
                f"vLLM's KVTransferConfig has no {name!r}",
                did_you_mean(name, _FIELDS) or "Remove it.",
                at=at,
            )
        if last is not None and not since(last, release):
            raise invalid(f"vLLM {release} has no {name}", f"Remove it: {last} was the last.", at=at)
    connector, role = given.get("kv_connector"), given.get("kv_role")
    if role is not None and role not in get_args(Role):
        raise invalid(f"kv_role is {role!r}", f"vLLM has {', '.join(get_args(Role))}.", at=at)
    if connector is None:
        return None
    if role is None:
        raise invalid(
            f"{connector} has no kv_role",
            f"Give one of {', '.join(get_args(Role))}: vLLM refuses it without.",
            at=at,
        )
    if given.get("kv_connector_module_path"):
        raise invalid("a connector of your own is not modelled", "Leave kv_connector_module_path out.", at=at)
    policy = given.get("kv_load_failure_policy", "fail")
    if policy not in get_args(FailurePolicy):
        raise invalid(f"kv_load_failure_policy is {policy!r}", "vLLM has recompute and fail.", at=at)
    _check_name(connector, release, at)
    extra = given.get("kv_connector_extra_config") or {}
    if not isinstance(extra, Mapping):
        raise invalid("kv_connector_extra_config takes an object", "Correct the value.", at=at)
    known = MODELLED[connector]
    for name in extra:
        if known is not None and name not in known:
            raise invalid(
                f"{name!r} of {connector} is not modelled",
                did_you_mean(name, known) or "Leave it out.",
                at=f"{at}.kv_connector_extra_config",
            )
    children: tuple[KVTransfer, ...] = ()
    if connector == "MultiConnector":
        children = _children(given, extra, release, at)
    return KVTransfer(connector, role, policy, dict(extra), given.get("kv_buffer_device"), children)


def kv_transfer_of(
    given: Mapping[str, Any] | None, size: float | None, backend: str, release: str, ranks: int
) -> tuple[KVTransfer | None, str]:
    """The connector of ``--kv-transfer-config``, or that of ``--kv-offloading-size`` (GiB) and
    ``--kv-offloading-backend``, which takes the place of its connector and role
    (VllmConfig._post_init_kv_transfer_config). Beside it what that should be told.

    Raises:
        InputError: as ``parse_kv_transfer``.
    """
    given = dict(given or {})
    if size is None:
        return parse_kv_transfer(given, release), ""
    replaced = given.get("kv_connector")
    extra = dict(given.get("kv_connector_extra_config") or {})
    if backend == "native":
        given["kv_connector"] = "OffloadingConnector"
        extra["cpu_bytes_to_use"] = size * GIB
    elif since(release, "0.23"):
        given["kv_connector"] = "LMCacheMPConnector"
    else:
        given["kv_connector"] = "LMCacheConnectorV1"
        extra = {"lmcache.local_cpu": True, "lmcache.max_local_cpu_size": size / ranks}
    note = ""
    if replaced not in (None, given["kv_connector"]):
        note = f"kv_offloading_size takes the place of the {replaced} in kv_transfer_config, as in vLLM"
    given |= {"kv_role": "kv_both", "kv_connector_extra_config": extra}
    return parse_kv_transfer(given, release), note


def _check_name(connector: str, release: str, at: str) -> None:
    if connector not in CONNECTORS:
        known = (name for name, (first, _) in CONNECTORS.items() if since(release, first))
        raise invalid(
            f"vLLM has no connector {connector!r}",
            did_you_mean(connector, known) or f"Known: {', '.join(MODELLED)}.",
            at=at,
        )
    first, last = CONNECTORS[connector]
    if not since(release, first) or (last is not None and not since(last, release)):
        span = f"{first} to {last}" if last else f"{first} on"
        raise invalid(f"vLLM {release} has no {connector}", f"It is in {span}.", at=at)
    if connector not in MODELLED:
        raise invalid(f"{connector} is not modelled", f"Modelled: {', '.join(MODELLED)}.", at=at)


def _children(
    given: Mapping[str, Any], extra: Mapping[str, Any], release: str, at: str
) -> tuple[KVTransfer, ...]:
    """MultiConnector makes each with its own KVTransferConfig."""
    listed = extra.get("connectors")
    where = f"{at}.kv_connector_extra_config.connectors"
    if not isinstance(listed, list) or not listed or not all(isinstance(each, dict) for each in listed):
        raise invalid("a MultiConnector needs a list of connectors", "Give them as objects.", at=where)
    children = tuple(
        child
        for number, each in enumerate(listed)
        if (child := parse_kv_transfer(each, release, at=f"{where}.{number}")) is not None
    )
    if any(child.connectors for child in children):
        raise invalid("a MultiConnector in another is not modelled", "List its connectors.", at=where)
    policies = {child.load_failure_policy for child in children}
    own = given.get("kv_load_failure_policy", "fail")
    if policies - {own, "fail"}:
        raise invalid(
            "kv_load_failure_policy of a connector in a MultiConnector has no effect",
            "Give it beside kv_connector: vLLM reads that one.",
            at=where,
        )
    return children
