"""``vllm serve``'s flags of images and videos, and what a model makes of a workload's items."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from servecast.sim.engine.config import EngineConfig
from servecast.sim.engine.held_costs import MediaProcessor
from servecast.sim.engine.request import MediaItem
from servecast.sim.hardware.encoder import MODALITIES, EncoderBudget, EncoderRun, encoder_budget, encoder_run
from servecast.sim.hardware.model_shape import ModelShape
from servecast.sim.hardware.shard import Shard
from servecast.sim.hardware.vision_tower import VisionTower
from servecast.sim.inputs.errors import InputError
from servecast.sim.scenario.engine_flags import EngineFlags
from servecast.sim.traffic.media import MediaSize, MediaSpec, Shape
from servecast.sim.traffic.spec import StreamSpec, Workload

_DTYPE_BYTES = 2  # of a pixel value in the processor's cache, which has the model's dtype


def media_of(workload: Workload) -> list[MediaSpec]:
    """What its streams carry."""
    streams = [stream for stage in workload.stages for stream in stage.streams]
    return [stream.media for stream in streams if stream.media is not None]


def with_shapes(workload: Workload, config: Path, flags: EngineFlags) -> Workload:
    """The workload, with what the model of a config.json makes of each item."""
    if not media_of(workload):
        return workload
    tower = tower_of(ModelShape.from_config(config, overrides=flags.hf_overrides), flags)

    def known(stream: StreamSpec) -> StreamSpec:
        if stream.media is None:
            return stream
        shapes = [_shape(size, tower) for size in stream.media.items]
        return stream.model_copy(update={"media": stream.media.of_model(shapes)})

    stages = tuple(
        stage.model_copy(update={"streams": tuple(known(stream) for stream in stage.streams)})
        for stage in workload.stages
    )
    return Workload(stages=stages)


def tower_of(model: ModelShape, flags: EngineFlags) -> VisionTower:
    """The tower of a model whose prompts carry images.

    Raises:
        InputError: it has none, one that is not known, or the flags leave it out.
    """
    if model.tower is None:
        raise InputError(
            f"the prompts carry images, and no vision tower of {model.name} is known",
            where="workload.media",
            fix="Remove it, or use a Qwen-VL, Gemma 3 or Mistral 3 model.",
        )
    if not in_use(flags):
        raise InputError(
            "the prompts carry images, and the server takes text only",
            where="workload.media",
            fix="Remove it, or language_model_only and limit_mm_per_prompt.",
        )
    return model.tower.with_kwargs(flags.mm_processor_kwargs or {})


def limits(flags: EngineFlags) -> dict[str, int]:
    """Items of each modality in one prompt, at most, where ``--limit-mm-per-prompt`` says it.

    Raises:
        InputError: it is no number.
    """
    found = {}
    for modality, limit in (flags.limit_mm_per_prompt or {}).items():
        count = limit.get("count") if isinstance(limit, Mapping) else limit
        if not isinstance(count, int) or count < 0:
            raise InputError(
                f"{limit!r} of {modality}",
                where="engine.limit_mm_per_prompt",
                fix="Give the number of items in one prompt.",
            )
        found[modality] = count
    return dict.fromkeys(MODALITIES, 0) if flags.language_model_only else found


def in_use(flags: EngineFlags) -> bool:
    """Whether the server loads its vision tower."""
    given = limits(flags)
    return any(given.get(modality, 1) for modality in MODALITIES)


def _shape(size: MediaSize, tower: VisionTower) -> Shape:
    pixels = (size.width or 0) * (size.height or 0) * size.frames
    if size.tokens is not None:
        patches = size.patches or size.tokens * tower.merge**2
        item = MediaItem(0, 0, size.tokens, patches=patches, segments=size.frames, pixels=pixels)
        return item, *tower.around
    assert size.width is not None
    assert size.height is not None
    seen = tower.picture(size.width, size.height, size.frames)
    length = seen.lead + seen.embeds + seen.between + seen.tail
    item = MediaItem(0, 0, length, seen.lead, seen.tail, seen.between, seen.patches, seen.segments, pixels)
    return item, *seen.around


def budget_of(flags: EngineFlags, config: EngineConfig, model: ModelShape) -> EncoderBudget | None:
    """What a step may encode; None where the server has no vision tower."""
    if model.tower is None or not in_use(flags):
        return None
    return encoder_budget(
        model.tower.with_kwargs(flags.mm_processor_kwargs or {}),
        limits(flags),
        config.max_num_batched_tokens,
        config.max_model_len,
        disable_chunked_mm_input=flags.disable_chunked_mm_input,
    )


def run_of(flags: EngineFlags, config: EngineConfig, shard: Shard) -> EncoderRun | None:
    """Memory of the vision tower on one rank; None where the server has none."""
    budget = budget_of(flags, config, shard.model)
    if budget is None:
        return None
    assert shard.model.tower is not None
    return encoder_run(
        shard.model.tower,
        budget,
        shard,
        whole=flags.mm_encoder_tp_mode == "data",
        profiled=not flags.skip_mm_profiling,
    )


def processor(flags: EngineFlags, tower: VisionTower) -> MediaProcessor:
    """A server's processor of images."""
    patch_bytes = 3 * tower.frames_per_patch * tower.patch**2 * _DTYPE_BYTES
    cache = flags.mm_processor_cache_gb * (1 << 30)
    return MediaProcessor(flags.mm_item_s, flags.mm_pixel_s, cache, patch_bytes)


def check_limits(flags: EngineFlags, workload: Workload, source: str) -> tuple[str, ...]:
    """What a result should say of the workload's images.

    Raises:
        InputError: prompts may carry more of them than the server takes.
    """
    specs, given = media_of(workload), limits(flags)
    for spec in specs:
        for modality in sorted({size.modality for size in spec.items if size.share}):
            most = spec.limit_per_prompt.get(modality, 0)
            sent = min(most, spec.most_items)
            if modality in given and sent > given[modality]:
                raise InputError(
                    f"prompts may carry {sent} items of {modality}, and the server takes {given[modality]}",
                    where=f"{source}: workload.media",
                    fix="Raise engine.limit_mm_per_prompt, or lower media.limit_per_prompt.",
                )
    if not specs:
        return ()
    return (
        "images: the vision tower's time is computed, by the efficiencies of the text model's profile; "
        f"{flags.mm_item_s * 1e3:g} ms an item and {flags.mm_pixel_s * 1e9:g} ms a megapixel of "
        "processing in the API server, unless given, are assumed",
    )
