"""Images in prompts: traffic, flags, the encoder's time and memory, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_scenarios import open_loop, small

from servecast.sim.engine.held_costs import MediaProcessor
from servecast.sim.engine.request import MediaItem
from servecast.sim.hardware.gpu import find_gpu
from servecast.sim.inputs.errors import InputError
from servecast.sim.metrics.binding import sampled, step_shares
from servecast.sim.run.simulate import simulate
from servecast.sim.scenario.deployment import Deployment
from servecast.sim.scenario.scenario import Scenario
from servecast.sim.scenario.vllm_flags import parse_serve_command
from servecast.sim.traffic.draw import draw
from servecast.validate.live.loads import Loads

MODEL = {"config": "Qwen2.5-VL-7B-Instruct"}
HD = "(720, 1280, 1)"  # 26 x 46 tokens of 28 pixels, 4 patches each, and two marks
TOKENS, PATCHES = 26 * 46, 4 * 26 * 46
GIB = 1 << 30


def seeing(folder: Path, engine: dict[str, Any] | None = None, **media: Any) -> Scenario:
    """A small scenario whose prompts carry images."""
    flags = {"version": "0.32", "max_model_len": 32768, "limit_mm_per_prompt": {"video": 0}} | (engine or {})
    workload = open_loop(20, 60, 64, 8) | {"media": {"items": {HD: 1.0}} | media}
    return small(folder, model=MODEL, gpu={"name": "H100"}, engine=flags, workload=workload)


def items(scenario: Scenario) -> list[tuple[MediaItem, ...]]:
    return [request.media for request in draw(scenario.stages(), 0)[0].streams[0].requests]


def test_flags_of_a_command() -> None:
    words = """--limit-mm-per-prompt '{"image": 4}' --mm-processor-cache-gb 0 --mm-encoder-tp-mode data
        --disable-chunked-mm-input --skip-mm-profiling --language-model-only"""
    assert parse_serve_command(f"vllm serve m {words}", version="0.32").flags == {
        "limit_mm_per_prompt": {"image": 4},
        "mm_processor_cache_gb": 0.0,
        "mm_encoder_tp_mode": "data",
        "disable_chunked_mm_input": True,
        "skip_mm_profiling": True,
        "language_model_only": True,
    }


def test_prompts_carry_images_behind_their_text(tmp_path: Path) -> None:
    plain = draw(small(tmp_path, workload=open_loop(20, 60, 64, 8)).stages(), 0)[0].streams[0].requests
    found = draw(seeing(tmp_path, items_per_request=2).stages(), 0)[0].streams[0].requests
    for before, after in zip(plain, found, strict=True):
        first, second = after.media
        assert after.prompt_tokens == before.prompt_tokens + 2 * (TOKENS + 2)
        assert (first.offset, second.offset) == (before.prompt_tokens + 1, first.offset + TOKENS + 2)
        assert (first.embeds, first.patches, first.pixels) == (TOKENS, PATCHES, 720 * 1280)


def test_numbers_and_sizes_are_drawn_as_by_random_mm(tmp_path: Path) -> None:
    """Between floor(3 x 0.5) and ceil(3 x 1.5) items, one video at most, and sizes by their shares."""
    sizes = {"(256, 256, 1)": 0.5, HD: 0.25, "(256, 256, 4)": 0.25}
    engine = {"limit_mm_per_prompt": None, "max_model_len": 128_000}
    drawn = items(seeing(tmp_path, engine, items=sizes, items_per_request=3, range_ratio=0.5))
    counts = [len(each) for each in drawn]
    assert set(counts) == {1, 2, 3, 4, 5}
    assert all(sum(item.segments > 1 for item in each) <= 1 for each in drawn)
    small_ones = [item.embeds == 81 for each in drawn for item in each]
    assert np.mean(small_ones) == pytest.approx(0.57, abs=0.06)  # 2/3 of images once the video is there


def test_what_comes_again_in_front_is_a_shared_prefix(tmp_path: Path) -> None:
    requests = draw(seeing(tmp_path, repeat_share=0.5, place="front").stages(), 0)[0].streams[0].requests
    by_item: dict[int, set[tuple[tuple[int, int], ...]]] = {}
    for request in requests:
        assert request.media[0].offset == 1
        by_item.setdefault(request.media[0].content, set()).add(request.content)
    assert len(by_item) == pytest.approx(0.5 * len(requests), abs=0.1 * len(requests))
    assert all(len(contents) == 1 for contents in by_item.values())
    assert all(end == TOKENS + 2 for contents in by_item.values() for ((_, end),) in contents)


def test_an_item_is_encoded_once_and_processed_once(tmp_path: Path) -> None:
    """All requests carry one image: vLLM's caches have it after the first."""
    scenario = seeing(tmp_path, repeat_share=0.999999)
    run = simulate(Deployment.of(scenario), seed=0)
    count = len(run.requests)
    deployment = Deployment.of(scenario)
    assert deployment.encoder is not None
    (one,) = {item.content: item for each in items(scenario) for item in each}.values()
    assert run.meta["mm"] == {
        "mm_cache_queries": count,
        "mm_cache_hits": count - 1,
        "encoder_items": 1,
        "encoder_time": deployment.encoder.seconds([one]),
    }


def test_the_tower_has_its_share_of_the_steps(tmp_path: Path) -> None:
    deployment = Deployment.of(seeing(tmp_path))
    run = simulate(deployment, seed=0)
    _, parts = step_shares(sampled(run.steps), deployment.limits)
    share = run.meta["mm"]["encoder_time"] / run.steps["duration"].sum()
    assert parts["vision_tower"] == pytest.approx(share, abs=0.1)


def test_a_live_server_is_sent_text_alone(tmp_path: Path) -> None:
    loads = Loads(Deployment.of(seeing(tmp_path)), max_rate=1.0)
    with pytest.raises(InputError, match="sent text alone"):
        loads.at_rate(1.0, "rate")


def test_the_encoder_is_never_faster_than_its_flops(tmp_path: Path) -> None:
    """Two operations a weight and patch, and four a number of a head and pair of patches that see each other:
    all pairs in 4 layers, those of a window of 64 in 28."""
    encoder = Deployment.of(seeing(tmp_path)).encoder
    assert encoder is not None
    gpu, block = find_gpu("H100"), 4 * 1280**2 + 3 * 1280 * 3420
    linear = 2 * PATCHES * 32 * block + 2 * TOKENS * (5120**2 + 5120 * 3584)
    pairs = 4 * 1280 * (4 * PATCHES**2 + 28 * PATCHES * 64)
    least = (linear + pairs) / gpu.bf16_flops
    taken = encoder.seconds([MediaItem(0, 0, TOKENS, patches=PATCHES)])
    assert least < taken < 40e-3
    assert encoder.seconds([MediaItem(0, 0, TOKENS, patches=PATCHES, segments=4)]) < taken


def test_each_gpu_encodes_some_items_or_a_part_of_each(tmp_path: Path) -> None:
    pair = [MediaItem(each, 0, TOKENS, patches=PATCHES) for each in range(2)]
    alone = Deployment.of(seeing(tmp_path)).encoder
    both = Deployment.of(seeing(tmp_path, {"tensor_parallel_size": 2, "mm_encoder_tp_mode": "data"}))
    assert alone is not None
    assert both.encoder is not None
    assert both.encoder.seconds(pair) == both.encoder.seconds(pair[:1]) == alone.seconds(pair[:1])
    parts = Deployment.of(seeing(tmp_path, {"tensor_parallel_size": 2}))
    towers = [_line(each, "vision tower") for each in (both, parts)]
    assert towers[0] == 676_550_144 * 2
    assert towers[1] == pytest.approx(676_550_144, rel=0.01)


def _line(deployment: Deployment, name: str) -> int:
    return sum(-line.bytes for line in deployment.memory.lines if line.name == name)


def test_memory_has_the_largest_items(tmp_path: Path) -> None:
    """14 frames of 16,384 tokens in pairs, of 3,584 numbers of two bytes, are kept while the text model is
    profiled; without videos it is one image; without a vision tower nothing."""
    longest = {"max_model_len": 128_000}
    videos = Deployment.of(seeing(tmp_path, longest | {"limit_mm_per_prompt": None}))
    assert _line(videos, "encoding") >= 114_688 * 3584 * 2
    assert videos.config.encoder_cache_size == videos.config.max_num_encoder_input_tokens == 114_688
    images = Deployment.of(seeing(tmp_path))
    assert images.config.encoder_cache_size == 16_384
    assert _line(images, "encoding") < _line(videos, "encoding")
    assert _line(Deployment.of(seeing(tmp_path, {"skip_mm_profiling": True})), "encoding") == 0
    text = small(
        tmp_path,
        model=MODEL,
        gpu={"name": "H100"},
        engine={"version": "0.32", "max_model_len": 4096, "language_model_only": True},
    )
    assert _line(Deployment.of(text), "vision tower") == 0


def test_the_processor_forgets_what_was_used_least_recently() -> None:
    processor = MediaProcessor(1.0, 0.5, cache_bytes=20, patch_bytes=1)
    first, second, third = (MediaItem(each, 0, 1, patches=10, pixels=2) for each in range(3))
    assert processor.seconds([first, second]) == 4.0
    assert processor.seconds([first]) == 0.0
    assert processor.seconds([third, first]) == 2.0  # for the second
    assert processor.seconds([second]) == 2.0
    assert (processor.queries, processor.hits) == (6, 2)
    assert processor.seconds([MediaItem(9, 0, 1, patches=30)] * 2) == 2.0  # larger than the cache


@pytest.mark.parametrize(
    ("engine", "media", "message"),
    [
        ({"language_model_only": True}, {}, "takes text only"),
        (
            {"limit_mm_per_prompt": {"image": 1, "video": 0}},
            {"items_per_request": 2},
            "carry 2 items of image",
        ),
        ({"limit_mm_per_prompt": {"image": "x"}}, {}, "'x' of image"),
        ({"disable_chunked_mm_input": True, "max_num_batched_tokens": 8192}, {}, "may have 16384 tokens"),
        ({"tensor_parallel_size": 1, "pipeline_parallel_size": 2}, {}, "pipeline stages are not modelled"),
        ({"mm_processor_kwargs": {"fps": 2}}, {}, "mm_processor_kwargs fps"),
        (
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 4}},
            {},
            "images with drafts",
        ),
        ({"kv_offloading_size": 8}, {}, "images with KV connectors"),
    ],
)
def test_what_is_refused(tmp_path: Path, engine: dict[str, Any], media: dict[str, Any], message: str) -> None:
    more = {"acceptance": 0.5} if "speculative_config" in engine else {}
    with pytest.raises(InputError, match=message):
        Deployment.of(seeing(tmp_path, engine, **media).changed(more))


def test_a_model_without_a_known_tower_is_refused(tmp_path: Path) -> None:
    scenario = small(tmp_path, workload=open_loop(20, 60, 64, 8) | {"media": {"items": {HD: 1.0}}})
    with pytest.raises(InputError, match="no vision tower of"):
        Deployment.of(scenario)


@pytest.mark.parametrize(
    ("media", "message"),
    [
        ({"items": [{"width": 10}]}, "without a size"),
        ({"items": {"(1, 2)": 1}}, "is no size"),
        ({"items": [{"width": 10, "height": 10, "patches": 3}]}, "patches without tokens"),
    ],
)
def test_items_have_a_size(tmp_path: Path, media: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        small(tmp_path, model=MODEL, workload=open_loop(20, 60, 64, 8) | {"media": media})
