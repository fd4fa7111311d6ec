"""What KV connectors make of the hybrid KV cache manager, as VllmConfig.__post_init__ and connectors' classes
(SupportsHMA) have it in each release."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from places import DATA

from servecast.sim.inputs.errors import InputError
from servecast.sim.inputs.schema import parse
from servecast.sim.scenario.deployment import Deployment
from servecast.sim.scenario.scenario import Scenario

NIXL = {"kv_connector": "NixlConnector", "kv_role": "kv_both"}
POOLS = {"prefill": 1, "decode": 1}
OFF = "disable_hybrid_kv_cache_manager"


def deployment(release: str, model: str = "gpt-oss-120b", *, pools: bool = True, **flags: Any) -> Deployment:
    document = {
        "schema_version": 1,
        "name": "groups",
        "model": {"config": model},
        "gpu": {"name": "h200"},
        "engine": {"version": release, "max_model_len": 16384, **flags},
        "workload": {
            "arrivals": {"kind": "poisson", "request_rate": 1},
            "num_requests": 2,
            "prompt_tokens": 1000,
            "output_tokens": 10,
        },
        "fleet": POOLS if pools else {},
    }
    return Deployment.of(parse(Scenario, document, source="groups.yaml"))


@pytest.mark.parametrize(
    ("release", "flags", "kept"),
    [
        ("0.32", {}, True),  # NixlConnector subclasses SupportsHMA, and is asked since 0.23
        ("0.23", {}, True),
        ("0.22", {}, False),  # "turn HMA off for connector unless specifically enabled"
        ("0.32", {OFF: True}, False),
        ("0.32", {"kv_transfer_config": {**NIXL, "kv_connector": "ExampleConnector"}}, False),
    ],
)
def test_which_connectors_keep_layers_apart(release: str, flags: dict[str, Any], kept: bool) -> None:
    made = deployment(release, **({"kv_transfer_config": NIXL} | flags))
    assert [spec.kind for spec in made.config.kv_groups] == (["sliding", "full"] if kept else [])
    said = next(note for note in made.notes if "hybrid KV cache manager" in note)
    assert ("is on" in said) == kept


def test_what_keeping_windows_whole_costs() -> None:
    """18 of 36 layers have a window of 128 tokens: the answer says what the pool would hold without."""
    whole = deployment("0.32", kv_transfer_config=NIXL, disable_hybrid_kv_cache_manager=True)
    apart = deployment("0.32", kv_transfer_config=NIXL)
    assert f"holds {whole.memory.logged_tokens:,} tokens" in "".join(whole.notes)
    assert f"it could hold {apart.memory.logged_tokens:,}" in "".join(whole.notes)
    assert apart.memory.bytes_per_block * 2 == whole.memory.bytes_per_block


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        ({"version": "0.22", "kv_transfer_config": NIXL, OFF: False}, "are modelled from vLLM 0.23 on"),
        (
            {"kv_transfer_config": {**NIXL, "kv_connector": "ExampleConnector"}, OFF: False},
            "ExampleConnector does not support the hybrid KV cache manager",
        ),
        ({"pools": False, "kv_offloading_size": 10}, "offloading is modelled where all layers"),
        ({"model": "granite-4.0-h-tiny"}, "layers that keep states"),
        (
            {"model": "Llama-4-Scout text", OFF: False, "tensor_parallel_size": 4},
            "does not support the hybrid KV cache manager with chunked attention",
        ),
    ],
)
def test_what_is_refused(flags: dict[str, Any], what: str, tmp_path: Path) -> None:
    flags = {"version": "0.32"} | flags
    release = flags.pop("version")
    configs = json.loads((DATA / "model_configs" / "configs.json").read_text())
    if (model := flags.get("model")) is not None:
        flags["model"] = str(tmp_path / "config.json")
        (tmp_path / "config.json").write_text(json.dumps(configs[model]["config"]))
    with pytest.raises(InputError, match=what):
        deployment(release, **flags)
