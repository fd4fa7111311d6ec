"""Vision towers: their parameters, and what an image becomes, against the published models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from servecast.sim.hardware.model_shape import ModelShape
from servecast.sim.hardware.vision_tower import VisionTower, vision_tower
from servecast.sim.inputs.errors import InputError

MODELS = Path("scenarios/models")
QWEN2 = {
    "model_type": "qwen2_vl",
    "hidden_size": 3584,
    "vision_config": {
        "depth": 32,
        "embed_dim": 1280,
        "mlp_ratio": 4,
        "num_heads": 16,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    },
}
QWEN3 = {
    "depth": 27,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_heads": 16,
    "out_hidden_size": 4096,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "num_position_embeddings": 2304,
    "deepstack_visual_indexes": [8, 16, 24],
}
GEMMA = {
    "model_type": "gemma3",
    "mm_tokens_per_image": 256,
    "text_config": {"hidden_size": 2560},
    "vision_config": {
        "hidden_size": 1152,
        "image_size": 896,
        "intermediate_size": 4304,
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
        "patch_size": 14,
    },
}
MISTRAL = {
    "model_type": "mistral3",
    "spatial_merge_size": 2,
    "text_config": {"hidden_size": 5120},
    "vision_config": {
        "hidden_size": 1024,
        "image_size": 1540,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
    },
}


def tower(config: dict[str, Any]) -> VisionTower:
    found = vision_tower(config)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def qwen25() -> VisionTower:
    return tower(json.loads((MODELS / "Qwen2.5-VL-7B-Instruct.json").read_text()))


def test_parameters_are_those_of_the_published_towers(qwen25: VisionTower) -> None:
    """As Transformers' classes count them, built without memory from the published configs; that of
    Qwen2.5-VL-7B to the digit, by its modules."""
    block = 1280 * 3840 + 3840 + 1280 * 1280 + 1280 + 3 * 1280 * 3420 + 2 * 3420 + 1280 + 2 * 1280
    merger = 1280 + 5120 * 5120 + 5120 + 5120 * 3584 + 3584
    assert qwen25.parameters == 32 * block + merger + 3 * 2 * 14 * 14 * 1280 == 676_550_144
    qwen3 = tower({**QWEN2, "model_type": "qwen3_vl", "vision_config": QWEN3})
    gemma, mistral = tower(GEMMA), tower(MISTRAL)
    for found, counted in (
        (tower(QWEN2).parameters, 675_759_104),
        (qwen3.parameters, 576_388_336),
        (gemma.parameters - gemma.joining_weights, 416_866_032),
        (mistral.parameters - mistral.joining_weights, 403_305_472),
    ):
        assert found == pytest.approx(counted, rel=0.001)


@pytest.mark.parametrize(
    ("size", "tokens"),
    [
        ((1280, 720), 46 * 26),  # sides rounded to multiples of 28
        ((256, 256), 9 * 9),
        ((10, 10), 2 * 2),  # enlarged to 56 x 56
        ((8000, 6000), 147 * 110),  # reduced by 1.933 to below 12,845,056 pixels
    ],
)
def test_an_image_of_any_size(qwen25: VisionTower, size: tuple[int, int], tokens: int) -> None:
    found = qwen25.picture(*size)
    assert (found.embeds, found.patches, found.around) == (tokens, 4 * tokens, (1, 1))


def test_a_video_joins_two_frames_in_a_patch(qwen25: VisionTower) -> None:
    found = qwen25.picture(1280, 720, frames=16)
    assert (found.embeds, found.segments) == (8 * 46 * 26, 8)


def test_rows_have_marks(qwen25: VisionTower) -> None:
    """Pixtral: 1,540 pixels are 110 patches a side, 55 after merging, and a mark follows each row."""
    found = tower(MISTRAL).picture(1540, 1540)
    assert found.embeds + found.between + found.tail == 55 * 56
    assert tower(MISTRAL).picture(3080, 3080) == found
    assert tower(GEMMA).picture(100, 3000).embeds == 256


def test_the_largest_item_is_a_video(qwen25: VisionTower) -> None:
    """vLLM logs "a budget of 114688 tokens, and profiled with 1 video items" for this model: 14 frames."""
    image, video = qwen25.largest("image", 128_000), qwen25.largest("video", 128_000)
    assert image is not None
    assert video is not None
    assert (image.embeds, video.embeds) == (16_384, 114_688)
    assert tower(GEMMA).largest("video", 128_000) is None
    qwen3 = tower({**QWEN2, "model_type": "qwen3_vl", "vision_config": QWEN3})
    sizes = [qwen3.largest(modality, 32_768) for modality in ("image", "video")]
    assert [size.embeds for size in sizes if size is not None] == [16_384, 12_288]  # of 32 pixels a side


def test_what_a_processor_refuses_is_refused(qwen25: VisionTower) -> None:
    with pytest.raises(InputError, match="too long for its width"):
        qwen25.picture(10_000, 20)
    with pytest.raises(InputError, match="of a video is not known"):
        tower(GEMMA).picture(100, 100, frames=2)
    assert qwen25.with_kwargs({"max_pixels": 200_704}).picture(1280, 720).embeds <= 256
    with pytest.raises(InputError, match="fps"):
        qwen25.with_kwargs({"fps": 1})


def test_a_model_has_its_tower_or_says_that_it_is_left_out() -> None:
    known = ModelShape.from_config(MODELS / "Qwen2.5-VL-7B-Instruct.json")
    assert known.tower is not None
    assert known.notes == ()
    assert 2 * (known.parameters + known.tower.parameters) == 16_584_333_312  # bytes of its safetensors
    other = ModelShape.from_config(MODELS / "Kimi-K2.5.json")
    assert other.tower is None
