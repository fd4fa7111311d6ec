"""``--kv-transfer-config`` against vLLM's KVTransferConfig and its table of connectors."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic_core import PydanticCustomError

from servecast.sim.scenario.kv_transfer import parse_kv_transfer

NATIVE = {
    "kv_connector": "OffloadingConnector",
    "kv_role": "kv_both",
    "kv_connector_extra_config": {"cpu_bytes_to_use": 1 << 30, "block_size": 48},
}


def test_a_connector_with_its_role_and_options() -> None:
    found = parse_kv_transfer(NATIVE, "0.32")
    assert found is not None
    assert (found.connector, found.role, found.load_failure_policy) == (
        "OffloadingConnector",
        "kv_both",
        "fail",
    )
    assert found.extra == {"cpu_bytes_to_use": 1 << 30, "block_size": 48}
    assert parse_kv_transfer({"kv_port": 14579}, "0.32") is None  # KVTransferConfig.is_kv_transfer_instance


def test_connectors_of_a_multi_connector_keep_their_order() -> None:
    lmcache = {"kv_connector": "LMCacheConnectorV1", "kv_role": "kv_both"}
    given = {"kv_connector": "MultiConnector", "kv_role": "kv_both"}
    found = parse_kv_transfer(
        {**given, "kv_connector_extra_config": {"connectors": [lmcache, NATIVE]}}, "0.32"
    )
    assert found is not None
    assert [each.connector for each in found.all()] == ["LMCacheConnectorV1", "OffloadingConnector"]
    assert found.of("OffloadingConnector") == parse_kv_transfer(NATIVE, "0.32")
    assert found.of("NixlConnector") is None


@pytest.mark.parametrize(
    ("changes", "release", "what"),
    [
        ({"kv_role": None}, "0.32", "has no kv_role"),  # KVTransferConfig.__post_init__
        ({"kv_role": "both"}, "0.32", "kv_role is 'both'"),
        ({"kv_load_failure_policy": "retry"}, "0.32", "kv_load_failure_policy is 'retry'"),
        ({"kv_connector": "OffloadConnector"}, "0.32", "no connector 'OffloadConnector'"),
        ({"kv_connector": "P2pNcclConnector"}, "0.32", "0.32 has no P2pNcclConnector"),
        ({"kv_connector": "HiSparseConnector"}, "0.29", "0.29 has no HiSparseConnector"),
        ({"kv_connector": "MoRIIOConnector"}, "0.32", "MoRIIOConnector is not modelled"),
        ({"kv_connector_module_path": "mine"}, "0.32", "connector of your own"),
        ({"kv_rank": 0}, "0.32", "0.32 has no kv_rank"),
        ({"kv_roles": "kv_both"}, "0.32", "no 'kv_roles'"),
        ({"kv_connector_extra_config": {"cpu_bytes": 1}}, "0.32", "'cpu_bytes' of OffloadingConnector"),
        ({"kv_connector": "MultiConnector", "kv_connector_extra_config": {}}, "0.32", "list of connectors"),
    ],
)
def test_what_vllm_or_the_model_refuses(changes: dict[str, Any], release: str, what: str) -> None:
    with pytest.raises(PydanticCustomError) as caught:
        parse_kv_transfer(NATIVE | changes, release)
    assert what in (caught.value.context or {})["what"]


def test_fields_of_older_releases_are_read_there() -> None:
    assert parse_kv_transfer(NATIVE | {"kv_rank": 0, "kv_buffer_size": 1e9}, "0.31") is not None
