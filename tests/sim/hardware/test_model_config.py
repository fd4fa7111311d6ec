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
from servecast.sim.hardware.model_families import FAMILIES
from servecast.sim.hardware.model_shape import ModelShape
from servecast.sim.hardware.shard import Shard
from servecast.sim.inputs.errors import InputError

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
    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(AutoConfig.for_model(given.pop("model_type"), **given))
    corrections = (each for name, each in made.named_buffers() if "e_score_correction_bias" in name)
    found[name] = sum(each.numel() for each in [*made.parameters(), *corrections])
print(json.dumps(found))
"""


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_right_to_the_digit(name: str) -> None:
    config = MODELS[name]["config"]
    model = ModelShape.from_config(config)
    assert model.parameters == MODELS[name]["parameters"]
    shard = Shard(model, H200, 1)
    assert shard.weight_bytes == 2 * model.parameters
    assert shard.kv_bytes_per_token == 4 * model.layers * model.kv_heads * model.head_dim


@pytest.mark.vllm
def test_transformers_counts_as_many() -> None:
    command = [str(VLLM / "bin" / "python"), "-c", COUNT, str(FILE)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts == {name: MODELS[name]["parameters"] for name in counts}
    assert len(counts) > 50


def test_every_family_is_counted() -> None:
    covered = {model["config"]["model_type"] for model in MODELS.values()}
    shipped = {"qwen2", "qwen3"}  # tests/helpers/model_shapes.py
    alike = {"ministral": "mistral", "internlm3": "internlm2", "minicpm": "llama", "baichuan": "llama"}
    assert set(FAMILIES) - covered - shipped == set(alike)
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
    ("name", "active", "embeddings"),
    [  # billions, as the models' cards say them: gpt-oss's without the table of embeddings
        ("Mixtral-8x7B", 12.88, 0),
        ("gpt-oss-20b", 3.61, 201_088 * 2880),
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
