"""Published models, as shapes."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

from servecast.sim.hardware.model_shape import ModelShape

MODELS = Path(str(files("servecast.scenarios"))) / "models"


PUBLISHED = {  # billions of parameters, KV bytes a token
    "Qwen2.5-0.5B-Instruct": (0.494, 12_288),
    "Qwen2.5-7B-Instruct": (7.616, 57_344),
    "Qwen2.5-VL-7B-Instruct": (7.616, 57_344),  # without its vision tower
    "Qwen2.5-32B-Instruct": (32.76, 262_144),
    "Llama-3.2-3B-Instruct": (3.21, 114_688),
    "Llama-3.1-8B-Instruct": (8.03, 131_072),
    "Llama-3.1-70B-Instruct": (70.55, 327_680),
    "Llama-3.1-405B-Instruct": (405.85, 516_096),
    "Qwen2.5-72B-Instruct": (72.71, 327_680),
    "CodeLlama-7b-hf": (6.74, 524_288),
    "Qwen3-0.6B": (0.596, 114_688),
    "Qwen3-4B": (4.02, 147_456),
    "Qwen3-8B": (8.19, 147_456),
    "Qwen3-14B": (14.77, 163_840),
    "Qwen3-32B": (32.76, 262_144),
    "Qwen3-30B-A3B": (30.53, 98_304),
    "Qwen3-235B-A22B": (235.09, 192_512),
    "Qwen3-235B-A22B-FP8": (235.09, 192_512),
    "MiniMax-M2.5": (228.69, 253_952),
    "gemma-3-1b-it": (1.00, 26_624),
    "gpt-oss-120b": (116.83, 73_728),
    "Kimi-K2.5": (1026.41, 70_272),
}


def load(name: str) -> ModelShape:
    return ModelShape.from_config(MODELS / f"{name}.json")


def config(name: str = "Qwen2.5-0.5B-Instruct", **changes: object) -> dict[str, object]:
    data = json.loads((MODELS / f"{name}.json").read_text())
    return {key: value for key, value in {**data, **changes}.items() if value != "drop"}
