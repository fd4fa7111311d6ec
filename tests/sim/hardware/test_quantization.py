"""What checkpoints say of their precision: weights, blocks, exceptions and KV cache."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from model_shapes import config
from places import DATA

from servecast.sim.hardware.expert_ranks import ExpertRanks
from servecast.sim.hardware.gpu import find_gpu
from servecast.sim.hardware.model_shape import ModelShape
from servecast.sim.hardware.quantization import read_quantization
from servecast.sim.hardware.shard import Shard
from servecast.sim.inputs.errors import InputError

GIB = 1 << 30
CONFIGS = DATA / "model_configs" / "configs.json"
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
    Shard(model, H200, 4, experts=ExpertRanks(4, whole=True))
    with pytest.raises(InputError, match=r"has 192 columns.*128 of a block.*enable-expert-parallel"):
        Shard(model, H200, 4)
    block = {"weights": {"num_bits": 8, "type": "float", "block_structure": [128, 128]}}
    said = {"quant_method": "compressed-tensors", "config_groups": {"g": block}}
    with pytest.raises(InputError, match="has 192 columns"):
        Shard(ModelShape.from_config(config("Qwen3-30B-A3B", quantization_config=said)), H200, 4)
    dense = ModelShape.from_config(config("Qwen3-4B", quantization_config=said))
    with pytest.raises(InputError, match=r"the MLP of .* has 1216 columns"):
        Shard(dense, H200, 8)


INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, "symmetric": True}
FP4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
DYNAMIC = {"num_bits": 8, "type": "float", "dynamic": True}


def compressed(weights: dict[str, Any], inputs: dict[str, Any] | None = None) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}, "ignore": ["lm_head"]}


@pytest.mark.parametrize(
    ("said", "bits", "on_h200", "on_b200", "on_a100"),
    [  # bits of a weight: its own, and a share of a scale (and a zero) of its group
        ({"quant_method": "fp8"}, 8, "fp8", "fp8", "bf16"),
        ({"quant_method": "fbgemm_fp8"}, 8, "fp8", "fp8", "bf16"),
        (
            {"quant_method": "fp8", "weight_block_size": [128, 128]},
            8 + 32 / 128**2,
            "fp8_block",
            "fp8_block",
            "bf16",
        ),
        (
            {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True},
            4 + 20 / 128,
            *["int4"] * 3,
        ),
        ({"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True}, 4 + 16 / 32, *["int4"] * 3),
        ({"quant_method": "gptq", "bits": 8, "group_size": -1, "sym": True}, 8, *["int8"] * 3),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, 4 + 32 / 64, *["int4"] * 3),
        (MODELOPT | {"quant_algo": "NVFP4"}, 4 + 8 / 16, "int4", "nvfp4", "int4"),
        (MODELOPT | {"quant_algo": "FP8_PB_WO"}, 8 + 32 / 128**2, "fp8_block", "fp8_block", "bf16"),
        (compressed(INT4), 4 + 16 / 128, *["int4"] * 3),
        (compressed(FP4, DYNAMIC), 4 + 8 / 16, "int4", "nvfp4", "int4"),
        (compressed({"num_bits": 8, "type": "float"}, DYNAMIC), 8, "fp8", "fp8", "bf16"),
        (compressed({"num_bits": 8, "type": "int"}, DYNAMIC), 8, *["int8"] * 3),
    ],
)
def test_bytes_and_kernels_of_a_format(
    said: dict[str, Any], bits: float, on_h200: str, on_b200: str, on_a100: str
) -> None:
    """Marlin multiplies what a GPU has no units for in 16 bits: fp8 on an A100, nvfp4 before Blackwell."""
    model = ModelShape.from_config({**LLAMA, "quantization_config": said})
    linear = 32 * (2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 4096 * 14336)
    plain = Shard(ModelShape.from_config(LLAMA), H200, 1).weight_bytes - 2 * linear
    assert Shard(model, H200, 1).weight_bytes == round(linear * bits / 8) + plain
    kernels = [Shard(model, find_gpu(name), 1).linear_kernel for name in ("H200", "B200", "A100")]
    assert kernels == [on_h200, on_b200, on_a100]
    assert Shard(model, find_gpu("A100"), 1).linear_peak == 312e12


def test_gpt_oss_quantises_its_experts() -> None:
    """The model card: checkpoints of 60.8 and 12.8 GiB; fp4 with a byte of scale for 32. vLLM gives them
    16-bit activations on Hopper and Blackwell."""
    said = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    configs = json.loads(CONFIGS.read_text())
    for name, card in (("gpt-oss-120b", 60.8), ("gpt-oss-20b", 12.8)):
        model = ModelShape.from_config(configs[name]["config"] | {"quantization_config": said})
        shard = Shard(model, H200, 1)
        assert round(shard.weight_bytes / GIB, 1) == card
        assert (shard.linear_kernel, shard.expert_kernel) == ("bf16", "mxfp4")
        assert Shard(model, find_gpu("B200"), 1).expert_kernel == "mxfp4"
        # padded: 360 columns a rank to 384 on Hopper; 2,880 to 2,944 columns of 3,072 on Blackwell
        read = Shard(replace(model, expert_format=""), H200, 8).expert_bytes(1 << 20)
        assert Shard(model, H200, 8).expert_bytes(1 << 20) == pytest.approx(read * 384 / 360)
        read = Shard(replace(model, expert_format=""), H200, 1).expert_bytes(1 << 20)
        padded = Shard(model, find_gpu("B200"), 1).expert_bytes(1 << 20)
        assert padded == pytest.approx(read * 2944 * 3072 / 2880**2)


def test_parts_of_several_precisions() -> None:
    """Kimi-K2.5: experts of four bits by groups of 32, all else in 16 (its quantization_config's ignore)."""
    ignore = [
        "lm_head",
        "re:.*self_attn.*",
        "re:.*shared_experts.*",
        "re:.*mlp\\.(gate|up|gate_up|down)_proj.*",
    ]
    said = compressed(INT4 | {"group_size": 32}) | {"ignore": ignore}
    kimi = json.loads(CONFIGS.read_text())["Kimi-K2"]["config"]
    model = ModelShape.from_config(kimi | {"quantization_config": said})
    experts = 60 * 384 * 3 * 7168 * 2048
    assert (model.weight_bytes_each, model.expert_bytes_each) == (2, 0.5 + 2 / 32)
    shard = Shard(model, H200, 8)
    assert (shard.linear_kernel, shard.expert_kernel) == ("bf16", "int4")
    whole = shard.whole.weight_bytes
    assert whole == 2 * (model.parameters - experts) + experts * 9 // 16
    # DeepSeek-V4's experts are of fp4 among weights of fp8 (expert_dtype), with fp8 activations on Blackwell
    flash = json.loads(CONFIGS.read_text())["DeepSeek-V4-Flash"]["config"]
    fp8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    shard = Shard(ModelShape.from_config(flash | {"quantization_config": fp8}), find_gpu("B200"), 1)
    assert (shard.linear_kernel, shard.expert_kernel) == ("fp8_block", "mxfp4_mxfp8")


def test_latent_attention_keeps_a_copy_in_sixteen_bits() -> None:
    """DeepSeek-V3 in fp8: a byte a linear weight and its share of a scale, and kv_b_proj, 512 x 128 x 256 of
    61 layers, once more in two bytes."""
    deepseek = json.loads(CONFIGS.read_text())["DeepSeek-V3"]["config"]
    fp8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    shard = Shard(ModelShape.from_config(deepseek | {"quantization_config": fp8}), H200, 1)
    model = shard.model
    linear = model.shared_weights(1) + 58 * 256 * 3 * 7168 * 2048
    up = 61 * 512 * 128 * 256
    assert shard.weight_bytes == round(linear * (1 + 4 / 128**2)) + 2 * (model.parameters - linear + up)
    plain = Shard(ModelShape.from_config(deepseek), H200, 1)
    assert plain.weight_bytes == 2 * plain.model.parameters


def test_names_of_modules_in_other_checkpoints() -> None:
    """Mixtral's block_sparse_moe, Nemotron-H's backbone and mixer, Qwen's shared_expert and in_proj_ba."""
    said = MODELOPT | {"exclude_modules": ["*mixer.in_proj", "model.layers.0.block_sparse_moe*"]}
    found = read_quantization({"quantization_config": said}, "here")
    assert found.keeps("layers.3.mixer.in_proj")
    assert not found.keeps("layers.3.mixer.out_proj")
    assert found.keeps("layers.0.mlp.experts.0.up_proj")
    assert not found.keeps("layers.1.mlp.experts.0.up_proj")
    mixed = {
        "quant_method": "modelopt",
        "quant_algo": "MIXED_PRECISION",
        "quantized_layers": {
            "backbone.layers.1.mixer.experts.0.up_proj": {"quant_algo": "W4A16_NVFP4", "group_size": 16},
            "backbone.layers.0.mixer.in_proj": {"quant_algo": "FP8"},
        },
    }
    found = read_quantization({"quantization_config": mixed}, "here")
    assert found.format_of("layers.1.mlp.experts.0.up_proj").dtype == "int4"
    assert found.format_of("layers.0.mixer.in_proj").dtype == "fp8"
    assert found.keeps("layers.0.mixer.out_proj")


@pytest.mark.parametrize(
    ("said", "gpu", "fits"),
    [  # vLLM's get_min_capability: 7.5 for fp8 and AWQ, 8.0 for ModelOpt's fp8 and mxfp4
        ({"quant_method": "fp8"}, "T4", True),
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, "T4", True),
        (MODELOPT, "T4", False),
        ({"quant_method": "fbgemm_fp8"}, "T4", False),
        ({"quant_method": "mxfp4"}, "T4", False),
        (MODELOPT, "A100", True),
    ],
)
def test_gpus_that_vllm_has_no_kernel_for(said: dict[str, Any], gpu: str, fits: bool) -> None:
    model = ModelShape.from_config({**LLAMA, "quantization_config": said})
    if fits:
        Shard(model, find_gpu(gpu), 1)
        return
    with pytest.raises(InputError, match=r"from compute capability 8 on, and T4 has 7\.5"):
        Shard(model, find_gpu(gpu), 1)


def test_groups_of_four_bits_are_not_cut() -> None:
    """vLLM has no kernel for a part of a group of inputs: 4,752 / 4 columns are 9.3 groups of 128."""
    said = {"quant_method": "awq", "bits": 4, "group_size": 128}
    qwen = ModelShape.from_config(config("Qwen2.5-7B-Instruct", quantization_config=said))
    Shard(qwen, H200, 4)
    cut = config("Qwen2.5-7B-Instruct", quantization_config=said, intermediate_size=4752)
    with pytest.raises(InputError, match=r"the MLP of .* has 1188 columns, no multiple of the 128"):
        Shard(ModelShape.from_config(cut), H200, 4)


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
