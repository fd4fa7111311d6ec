"""What checkpoints say of their precision: weights, blocks, exceptions and KV cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from model_shapes import config

from servecast.sim.hardware.gpu import find_gpu
from servecast.sim.hardware.model_shape import ModelShape
from servecast.sim.hardware.shard import Shard
from servecast.sim.inputs.errors import InputError

GIB = 1 << 30
H200 = find_gpu("H200")
LLAMA = config("Llama-3.1-8B-Instruct")
EIGHT_BITS = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float"}}
MODELOPT = {"quant_method": "modelopt", "quant_algo": "FP8", "exclude_modules": ["lm_head"]}
COMPRESSED = {
    "quant_method": "compressed-tensors",
    "config_groups": {"group_0": EIGHT_BITS},
    "ignore": ["lm_head"],
}


def quantised(said: dict[str, Any], base: dict[str, Any] = LLAMA) -> Shard:
    model = ModelShape.from_config({**base, "quantization_config": said})
    return Shard(model, H200, 1, kv_dtype_bytes=model.kv_bytes_each)


def gib(shard: Shard) -> float:
    return round(shard.weight_bytes / GIB, 2)


def test_modelopt_beside_the_config(tmp_path: Path) -> None:
    """8.46 GiB: 6.98e9 linear weights of a byte and embeddings of two; 65,536 bytes of fp8 KV a token."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    said = {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps({"quantization": said}))
    model = ModelShape.from_config(tmp_path / "config.json")
    shard = Shard(model, H200, 1, kv_dtype_bytes=model.kv_bytes_each)
    assert (gib(shard), shard.kv_bytes_per_token) == (8.46, 65_536)
    (tmp_path / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "INT3"}}')
    with pytest.raises(InputError, match="quantisation 'INT3' is not modelled"):
        ModelShape.from_config(tmp_path / "config.json")


def test_modelopt_inside_the_config() -> None:
    shard = quantised(MODELOPT)
    assert (gib(shard), shard.kv_bytes_per_token) == (8.46, 131_072)


def test_a_kv_cache_scheme_asks_for_eight_bits() -> None:
    """vLLM's attention layer takes kv_cache_dtype auto as fp8 where the checkpoint has a scheme."""
    assert quantised(COMPRESSED).kv_bytes_per_token == 131_072
    scheme = {"kv_cache_scheme": {"num_bits": 8, "type": "float", "dynamic": False}}
    assert quantised(COMPRESSED | scheme).kv_bytes_per_token == 65_536


@pytest.mark.parametrize(
    ("exception", "weights"),  # how many linear weights stay in 16 bits
    [
        ("re:.*lm_head", 0),
        ("re:.*self_attn.*", 32 * (2 * 4096 * 4096 + 2 * 1024 * 4096)),
        ("*mlp.down_proj", 32 * 4096 * 14336),
        ("model.layers.0.mlp.up_proj", 4096 * 14336),
        ("model.layers.31", 2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 4096 * 14336),
    ],
)
def test_exceptions_stay_in_sixteen_bits(exception: str, weights: int) -> None:
    plain, excepted = quantised(MODELOPT), quantised(MODELOPT | {"exclude_modules": [exception]})
    assert excepted.weight_bytes - plain.weight_bytes == weights
    assert excepted.linear_bytes(1) - plain.linear_bytes(1) == weights


def test_blocks_are_not_cut() -> None:
    """768 / 4 and 1,536 / 8 columns are 192: vLLM raises, and splits experts whole where it is told to."""
    said = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    model = ModelShape.from_config(config("Qwen3-30B-A3B", quantization_config=said))
    Shard(model, H200, 2)
    Shard(model, H200, 4, expert_parallel=True)
    with pytest.raises(InputError, match=r"has 192 columns.*128 of a block.*enable-expert-parallel"):
        Shard(model, H200, 4)
    block = {"weights": {"num_bits": 8, "type": "float", "block_structure": [128, 128]}}
    said = {"quant_method": "compressed-tensors", "config_groups": {"g": block}}
    with pytest.raises(InputError, match="has 192 columns"):
        Shard(ModelShape.from_config(config("Qwen3-30B-A3B", quantization_config=said)), H200, 4)
    dense = ModelShape.from_config(config("Qwen3-4B", quantization_config=said))
    with pytest.raises(InputError, match=r"the MLP of .* has 1216 columns"):
        Shard(dense, H200, 8)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"quant_method": "quark"}, "quantisation 'quark' is not modelled"),
        ({"quant_method": "awq", "bits": 5}, "awq of 5 bits"),
        (MODELOPT | {"quant_algo": "INT3"}, "quantisation 'INT3' is not modelled"),
        (MODELOPT | {"kv_cache_quant_algo": "NVFP4"}, "quantisation 'NVFP4' is not modelled"),
        ({"quant_method": "compressed-tensors"}, "quantisation 'compressed-tensors'"),
        (
            COMPRESSED | {"config_groups": {"g": {"weights": {"num_bits": 3, "type": "int"}}}},
            "config_groups",
        ),
        ("fp8", "quantization_config"),
    ],
)
def test_what_is_not_modelled_is_named(said: Any, message: str) -> None:
    with pytest.raises(InputError) as caught:
        quantised(said)
    assert message in str(caught.value)
