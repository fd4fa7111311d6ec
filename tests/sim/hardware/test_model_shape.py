"""Sizes read from config.json against the models' published totals."""

from __future__ import annotations

from pathlib import Path

import pytest
from model_shapes import MODELS, PUBLISHED, config, load

from servecast.sim.hardware.gpu import find_gpu
from servecast.sim.hardware.model_shape import ModelShape
from servecast.sim.hardware.shard import Shard
from servecast.sim.inputs.errors import InputError

H200 = find_gpu("H200")


def test_every_shipped_config_has_a_published_total() -> None:
    assert {path.stem for path in MODELS.glob("*.json")} == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_and_kv_bytes(name: str) -> None:
    billions, kv_bytes = PUBLISHED[name]
    model = load(name)
    digits = len(str(billions).split(".")[1])
    assert round(model.parameters / 1e9, max(2, digits)) == pytest.approx(billions, abs=1e-9)
    shard = Shard(model, H200, 1)
    assert shard.kv_bytes_per_token == kv_bytes
    if model.weight_bytes_each == 2 and not model.expert_format:
        assert shard.weight_bytes == 2 * model.parameters
    assert model.name.endswith(name)


def test_experts_count_once_a_token() -> None:
    model = load("Qwen3-30B-A3B")
    assert model.active_parameters / 1e9 == pytest.approx(3.35, abs=0.01)  # "3.3B activated"
    shard = Shard(model, H200, 1)
    one, many = shard.linear_bytes(1), shard.linear_bytes(4096)
    embeddings = 2 * model.vocab_size * model.hidden_size
    assert one == pytest.approx(2 * (model.active_parameters - embeddings), rel=1e-3)
    assert many == pytest.approx(2 * (model.parameters - embeddings), rel=1e-3)


def test_linear_flops_are_two_a_weight() -> None:
    model = load("Llama-3.1-8B-Instruct")
    shard = Shard(model, H200, 1)
    weights = (
        shard.linear_flops_per_token / 2 + shard.lm_head_flops(1) / 2 + model.vocab_size * model.hidden_size
    )
    assert weights == pytest.approx(model.parameters, rel=1e-4)  # all but the norms


def test_ranks_share_the_weights_and_the_kv_heads() -> None:
    model = load("Llama-3.1-70B-Instruct")
    one, four, eight, sixteen = (Shard(model, H200, ranks) for ranks in (1, 4, 8, 16))
    assert four.weight_bytes == pytest.approx(one.weight_bytes / 4, rel=1e-3)
    assert four.kv_bytes_per_token * 4 == one.kv_bytes_per_token
    assert sixteen.kv_bytes_per_token == eight.kv_bytes_per_token  # 8 KV heads are repeated, not split
    assert four.linear_flops_per_token == one.linear_flops_per_token / 4
    assert four.whole == one
    with pytest.raises(InputError, match="cannot be split 3 ways"):
        Shard(model, H200, 3)


def test_fp8_halves_the_linear_weights_only() -> None:
    for quantization in (
        {"quant_method": "fp8"},
        {
            "quant_method": "compressed-tensors",
            "config_groups": {"g": {"weights": {"num_bits": 8, "type": "float"}}},
        },
    ):
        model = ModelShape.from_config(config("Qwen3-32B", quantization_config=quantization))
        half, full = Shard(model, H200, 1), Shard(load("Qwen3-32B"), H200, 1)
        assert half.linear_bytes(1) * 2 == full.linear_bytes(1)
        assert half.lm_head_bytes == full.lm_head_bytes
        assert half.weight_bytes < full.weight_bytes * 0.53


def test_head_dim_and_attention_bias_come_from_the_file() -> None:
    plain = load("Qwen3-4B")
    assert plain.head_dim == 128 != plain.hidden_size // plain.heads
    biased = ModelShape.from_config(config("Qwen3-4B", attention_bias=True))
    per_layer = (32 + 2 * 8) * 128 + 2560
    assert biased.parameters - plain.parameters == 36 * per_layer


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": "drop"}, "config.json: hidden_size: hidden_size is missing"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0, not a positive integer"),
        ({"vocab_size": "many"}, "vocab_size is 'many', not a positive integer"),
        ({"model_type": "drop"}, "model_type is missing"),
        ({"model_type": "mamba2"}, "models of type 'mamba2' are not modelled: state-space layers alone"),
        ({"text_config": {"hidden_size": 1}}, "text_config"),
        ({"torch_dtype": "int3"}, "torch_dtype 'int3' is not known"),
        ({"quantization_config": {"quant_method": "quark"}}, "quantisation 'quark' is not modelled"),
        ({"layer_types": ["full_attention"]}, "1 entries"),
    ],
)
def test_what_is_wrong_is_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InputError) as caught:
        ModelShape.from_config(config(**changes))
    assert message in str(caught.value)


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.json"):
        ModelShape.from_config(tmp_path / "absent.json")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(InputError, match=r"broken\.json: cannot read it as JSON"):
        ModelShape.from_config(tmp_path / "broken.json")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(InputError, match="is not a JSON object"):
        ModelShape.from_config(tmp_path / "list.json")
