"""Model families: parameters to the digit, KV bytes and sliding layers of hand-written configs.

The parameters in configs.json are those of Transformers' own classes, built without memory, and of routers'
corrections, which are buffers there; four families that it does not have are as published, less MTP layers.
"""

from __future__ import annotations

import contextlib
import json
import random
import subprocess
from typing import Any

import pytest
from places import REPOSITORY, VLLM

from servecast.sim.hardware.gpu import find_gpu
from servecast.sim.hardware.model_config import LEFT_OUT
from servecast.sim.hardware.model_families import ALIASES, FAMILIES, NOT_MODELLED
from servecast.sim.hardware.model_shape import ModelShape
from servecast.sim.hardware.profile import build_step_time
from servecast.sim.hardware.shard import Shard
from servecast.sim.inputs.errors import InputError
from servecast.sim.scenario.basis import shipped_profiles

FILE = REPOSITORY / "tests" / "data" / "model_configs" / "configs.json"
MODELS: dict[str, dict[str, Any]] = json.loads(FILE.read_text())
H200 = find_gpu("H200")
LLAMA = MODELS["Llama-3.2-1B"]["config"]

COUNT = """
import json, sys, torch
from transformers import AutoConfig, AutoModelForCausalLM

found = {}
for name, model in json.load(open(sys.argv[1])).items():
    if "published" in model:
        continue
    given = dict(model["config"])
    given["pad_token_id"] = 0
    kind = given.pop("model_type")  # of Kimi K2 Transformers has a model under the name of DeepSeek V3 only
    kind = "deepseek_v3" if kind == "kimi_k2" else kind
    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **given))
    corrections = (each for name, each in made.named_buffers() if "e_score_correction_bias" in name)
    found[name] = sum(each.numel() for each in [*made.parameters(), *corrections])
print(json.dumps(found))
"""


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_right_to_the_digit(name: str) -> None:
    config = MODELS[name]["config"]
    model = ModelShape.from_config(config)
    assert model.parameters == MODELS[name]["parameters"]
    assert ModelShape.from_config(config | {"expert_dtype": None}).weight_bytes_each == 2
    shard = Shard(model, H200, 1)
    if config["model_type"] != "deepseek_v4":  # has experts of four bits, and a cache that is not modelled
        assert shard.weight_bytes == 2 * model.parameters
    if not model.mixers:
        assert shard.kv_bytes_per_token == 4 * model.layers * model.kv_heads * model.head_dim


@pytest.mark.vllm
def test_transformers_counts_as_many() -> None:
    command = [str(VLLM / "bin" / "python"), "-c", COUNT, str(FILE)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts == {name: MODELS[name]["parameters"] for name in counts}
    assert len(counts) > 120


def test_every_family_is_counted() -> None:
    covered = {model["config"]["model_type"] for model in MODELS.values()}
    shipped = {"qwen2", "qwen3"}  # tests/helpers/model_shapes.py
    alike = {"ministral": "mistral", "internlm3": "internlm2", "minicpm": "llama", "baichuan": "llama"}
    covered = {ALIASES.get(model_type, model_type) for model_type in covered}
    assert set(FAMILIES) - covered - shipped == set(alike)
    assert set(ALIASES.values()) <= set(FAMILIES)
    assert not set(NOT_MODELLED) & (set(FAMILIES) | set(ALIASES))
    for name, other in alike.items():
        config = MODELS["internlm2_5-7b" if other == "internlm2" else "Llama-2-7b"]["config"]
        same = ModelShape.from_config(config | {"model_type": other})
        assert ModelShape.from_config(config | {"model_type": name}).alike(same) == []


@pytest.mark.parametrize(
    ("name", "sliding", "window"),
    [  # layer_types of Transformers' configuration classes
        ("Mistral-7B-v0.1", 32, 4096),
        ("Ministral-8B-2410", 0, 0),  # the window is no shorter than the context
        ("gemma-2-9b", 21, 4096),
        ("gemma-3-27b text", 52, 1024),
        ("OLMo-3-7B", 24, 4096),
        ("c4ai-command-r7b", 24, 4096),
        ("EXAONE-4.0-32B", 48, 4096),
        ("gpt-oss-20b", 12, 128),
        ("Llama-4-Scout text", 0, 0),
    ],
)
def test_sliding_layers(name: str, sliding: int, window: int) -> None:
    model = ModelShape.from_config(MODELS[name]["config"])
    assert (model.sliding_layers, model.sliding_window) == (sliding, window)


@pytest.mark.parametrize(
    ("name", "kinds"),
    [  # Transformers' layer_types and Nemotron-H's pattern; DeepSeek V4's compress_ratios of 0, 4 and 128
        ("DeepSeek-V3", {"mla": 61}),
        ("DeepSeek-V3.2", {"sparse_mla": 61}),
        ("DeepSeek-V4-Flash", {"compressed": 43}),
        ("Kimi-Linear-48B-A3B", {"kda": 20, "mla": 7}),
        ("Qwen3-Next-80B-A3B", {"gdn": 36, "full": 12}),
        ("Llama-4-Scout text", {"chunked": 36, "full": 12}),
        ("granite-4.0-h-small", {"mamba2": 36, "full": 4}),
        ("Nemotron-3-Nano-30B-A3B", {"mamba2": 23, "full": 6}),
        ("MiMo-V2-Flash", {"full": 9, "sliding": 39}),
        ("gpt-oss-20b", {"sliding": 12, "full": 12}),
    ],
)
def test_kinds_of_layers_in_their_order(name: str, kinds: dict[str, int]) -> None:
    model = ModelShape.from_config(MODELS[name]["config"])
    counted: dict[str, int] = {}
    for mixer in model.layer_kinds:
        counted[mixer.kind] = counted.get(mixer.kind, 0) + mixer.count
    assert list(counted.items()) == list(kinds.items())


@pytest.mark.parametrize(
    ("name", "kv_dtype_bytes", "ranks", "expected"),
    [  # 512 + 64 numbers of a latent; V3.2's indexer adds 128 bytes and a scale; states take nothing
        ("DeepSeek-V3", 2, 8, 61 * 576 * 2),
        ("DeepSeek-V3", 1, 1, 61 * 576),
        ("DeepSeek-V3.2", 2, 1, 61 * (576 * 2 + 132)),
        ("GLM-5.2", 2, 1, 78 * 576 * 2 + 21 * 132),  # 57 layers have no indexer of their own
        ("Qwen3-Next-80B-A3B", 2, 1, 12 * 2 * 2 * 256 * 2),
        ("Qwen3-Next-80B-A3B", 2, 4, 12 * 2 * 1 * 256 * 2),
        ("Kimi-Linear-48B-A3B", 2, 1, 7 * 576 * 2),
        ("Nemotron-3-Nano-30B-A3B", 1, 1, 6 * 2 * 2 * 128),
        ("MiMo-V2-Flash", 2, 1, (9 * 4 + 39 * 8) * (192 + 128) * 2),
    ],
)
def test_kv_bytes_a_token(name: str, kv_dtype_bytes: int, ranks: int, expected: int) -> None:
    model = ModelShape.from_config(MODELS[name]["config"])
    assert Shard(model, H200, ranks, kv_dtype_bytes=kv_dtype_bytes).kv_bytes_per_token == expected


def test_states_have_vllms_size() -> None:
    """Qwen3-Next on four ranks: 274,432 bytes with a state in 16 bits, 536,576 with one in 32 (vLLM 0.32)."""
    state, _ = ModelShape.from_config(MODELS["Qwen3-Next-80B-A3B"]["config"]).cache_layers
    assert state.conv // 4 * 2 + state.recurrent // 4 * 2 == 274_432
    assert state.conv // 4 * 2 + state.recurrent // 4 * 4 == 536_576
    mamba = ModelShape.from_config(MODELS["Nemotron-3-Nano-30B-A3B"]["config"]).cache_layers[0]
    assert (mamba.conv + mamba.groups * mamba.group_conv, mamba.recurrent) == (
        3 * (64 * 64 + 2 * 8 * 128),
        64 * 64 * 128,
    )
    assert mamba.recurrent_bytes == 4


def test_layers_for_further_tokens_are_not_loaded() -> None:
    """DeepSeek-V3's README_WEIGHTS: 671B of the model, and 11.5B of its own in the layer that predicts one
    token more."""
    model = ModelShape.from_config(MODELS["DeepSeek-V3"]["config"])
    assert round(model.parameters / 1e9) == 671
    assert model.mtp_layers == 1
    assert model.mtp_parameters / 1e9 == pytest.approx(11.5, abs=0.2)
    assert Shard(model, H200, 1).weight_bytes == 2 * model.parameters


def test_compressed_attention_is_counted_and_not_timed() -> None:
    """Its weights are known: 284B parameters, as the model's card says."""
    model = ModelShape.from_config(MODELS["DeepSeek-V4-Flash"]["config"], "V4")
    assert round(model.parameters / 1e9) == 284
    with pytest.raises(InputError, match=r"the KV cache of attention to compressed tokens is not modelled"):
        _ = model.cache_layers
    with pytest.raises(InputError, match=r"V4 has attention to compressed tokens"):
        build_step_time(shipped_profiles()["l4-qwen2.5-0.5b"], Shard(model, H200, 1))


@pytest.mark.parametrize(
    ("name", "active", "embeddings"),
    [  # billions, as the models' cards say them: gpt-oss's without the table of embeddings
        ("Mixtral-8x7B", 12.88, 0),
        ("gpt-oss-20b", 3.61, 201_088 * 2880),
        ("DeepSeek-V3", 37.55, 0),  # "37B activated"
        ("Kimi-K2", 32.86, 0),  # "32B"
        ("Qwen3-Next-80B-A3B", 3.87, 0),
    ],
)
def test_active_parameters(name: str, active: float, embeddings: int) -> None:
    model = ModelShape.from_config(MODELS[name]["config"])
    assert round((model.active_parameters - embeddings) / 1e9, 2) == active


def test_a_shared_expert_is_passed_by_every_token() -> None:
    model = ModelShape.from_config(MODELS["GLM-4.5-Air"]["config"])
    without = ModelShape.from_config(MODELS["GLM-4.5-Air"]["config"] | {"n_shared_experts": 0})
    shared = 45 * 3 * 4096 * 1408
    assert model.parameters - without.parameters == shared
    one, other = Shard(model, H200, 1), Shard(without, H200, 1)
    assert one.linear_flops_per_token - other.linear_flops_per_token == 2 * shared
    assert one.linear_bytes(1) - other.linear_bytes(1) == 2 * shared


def test_the_text_of_a_multimodal_model() -> None:
    whole = {
        "model_type": "mistral3",
        "dtype": "bfloat16",
        "text_config": LLAMA,
        "vision_config": {"depth": 2},
    }
    model = ModelShape.from_config(whole)
    assert model.parameters == MODELS["Llama-3.2-1B"]["parameters"]
    assert model.notes == (LEFT_OUT,)
    flat = LLAMA | {"model_type": "qwen2_5_vl", "vision_config": {"depth": 2}}
    assert ModelShape.from_config(flat).notes == (LEFT_OUT,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "qwen3_moee"}, "Did you mean 'qwen3_moe'?"),
        ({"model_type": "mamba2"}, "state-space layers alone"),
        ({"model_type": "siglip"}, "a vision tower without a text model"),
        ({"model_type": "bert"}, "an encoder, which generates no text"),
        ({"model_type": "t5"}, "an encoder and a decoder"),
        ({"model_type": "llama", "is_encoder_decoder": True}, "an encoder and a decoder"),
        ({"model_type": "llama", "block_configs": [{}]}, "layers of different sizes"),
        (
            {"model_type": "kimi_k3", "text_config": {"model_type": "kimi_linear"}},
            "experts behind projections",
        ),
        ({"rope_scaling": {"type": "linear", "factor": "two"}}, "factor is 'two'"),
        ({"model_type": "mixtral", "num_experts_per_tok": 2}, "but not how many experts there are"),
        (
            {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 9},
            "a token cannot use 9 of 8 experts",
        ),
        ({"model_type": "nemotron_h"}, "nothing says which layers attend and which keep a state"),
        (
            {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128]}},
            "fp8 by blocks of [128]",
        ),
        (
            {"quantization_config": {"quant_method": "fp8", "modules_to_not_convert": 5}},
            "modules_to_not_convert = 5, which is no list",
        ),
    ],
)
def test_what_is_not_modelled_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        ModelShape.from_config(LLAMA | changes)
    assert message in str(caught.value)


WRONG = [None, "x", -1, 0, 1.5, True, [], {}, [1], {"a": 1}, 10**30, "", float("nan"), {"model_type": 3}]
SAID = [
    {"quant_method": "fp8", "weight_block_size": [128, 128], "ignored_layers": ["re:("]},
    {"quant_method": "modelopt", "quant_algo": "FP8", "exclude_modules": ["*", "lm_head"]},
    {"rope_type": "yarn", "factor": 4.0},
]
FIELDS = ["quantization_config", "rope_scaling", "text_config", "layer_types", "sliding_window_pattern"]
FIELDS += ["mlp_only_layers", "head_dim", "torch_dtype", "first_k_dense_replace", "moe_layers", "model_type"]


@pytest.mark.parametrize("seed", range(8))
def test_any_wrong_value_is_told_as_such(seed: int) -> None:
    """A hundred configs with values of other kinds in up to three fields: an answer or an InputError."""
    draw = random.Random(seed)
    for _ in range(100):
        config = dict(draw.choice(list(MODELS.values()))["config"])
        for _ in range(draw.randint(1, 3)):
            config[draw.choice([*config, *FIELDS])] = draw.choice([*WRONG, *SAID])
        with contextlib.suppress(InputError):
            assert ModelShape.from_config(config).parameters > 0
