"""A multimodal model's vision tower: its sizes, and how many patches and tokens an image or a video becomes.

Read from ``vision_config`` of ``config.json`` for the families of ``_FAMILIES``; of sizes that only
``preprocessor_config.json`` has, the published models' values are taken, which ``--mm-processor-kwargs`` may
replace. Rules of resizing are those of Transformers' processors and of vLLM's ``model_executor/models``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from servecast.sim.inputs.errors import InputError

Modality = Literal["image", "video"]


@dataclass(frozen=True, slots=True)
class Picture:
    """An image or a video as the model sees it: patches that the tower computes, in ``segments`` that attend
    to themselves alone (frames), and tokens of the prompt: ``embeds`` embeddings, the model's own marks in
    front of, behind and between them inside of the item, and ``around``: before and behind it."""

    embeds: int
    patches: int
    segments: int = 1
    lead: int = 0
    tail: int = 0
    between: int = 0
    around: tuple[int, int] = (0, 0)


@dataclass(frozen=True, slots=True)
class VisionTower:
    """Sizes of a tower of attention blocks on patches, and what joins its output to the text model.

    Attributes:
        rule: how an image becomes patches: ``grid`` (any size, between ``min_pixels`` and ``max_pixels``, as
            Qwen-VL's), ``rows`` (any size up to ``longest_edge``, a mark behind each row, as Pixtral's) or
            ``fixed`` (each image is resized to ``longest_edge``, as Gemma 3's).
        merge: patches of a token's side. frames_per_patch: of a video, that one patch has of each place.
        mlp_products: 2, or 3 where it is gated. full_layers: attend to all patches of a segment, the others
            to ``window`` patches.
        joining_weights: of mergers and projections, used once a token (or, of gemma, a patch).
        other_weights: patch embedding and positions. text_size: of an embedding.
        tokens_per_image: where fixed. video_pixels: of a pair of frames, where videos have bounds of their
            own (and timestamps, so that only what the largest takes is known); 0: those of images.
    """

    rule: Literal["grid", "rows", "fixed"]
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    mlp_products: int
    patch: int
    merge: int
    text_size: int
    joining_weights: int
    other_weights: int
    full_layers: int
    window: int = 0
    frames_per_patch: int = 1
    min_pixels: int = 0
    max_pixels: int = 0
    longest_edge: int = 0
    tokens_per_image: int = 0
    around: tuple[int, int] = (0, 0)
    video_pixels: int = 0

    @property
    def layer_weights(self) -> int:
        """Weights of one block."""
        return 4 * self.hidden_size**2 + self.mlp_products * self.hidden_size * self.intermediate_size

    @property
    def parameters(self) -> int:
        """All, norms and biases of the blocks among them."""
        gated = self.mlp_products == 3  # then norms are of one weight, else of two
        small = (7 if gated else 9) * self.hidden_size + (1 + gated) * self.intermediate_size
        return self.layers * (self.layer_weights + small) + self.joining_weights + self.other_weights

    def picture(self, width: int, height: int, frames: int = 1) -> Picture:
        """What an image, or a video of several frames, becomes.

        Raises:
            InputError: the model takes no such thing.
        """
        if frames > 1 and (self.rule != "grid" or self.video_pixels):
            raise InputError(
                "how many tokens this model makes of a video is not known",
                where="workload.media.items",
                fix="Give tokens in place of width and height, or leave frames out.",
            )
        if self.rule == "fixed":
            patches = (self.longest_edge // self.patch) ** 2
            return Picture(self.tokens_per_image, patches, 1, 2, 2)
        unit = self.patch * self.merge
        if self.rule == "rows":  # PixtralHFEncoderInfo.get_patch_grid_size
            ratio = max(width / self.longest_edge, height / self.longest_edge, 1.0)
            width, height = math.floor(width / ratio), math.floor(height / ratio)
            columns, rows = -(-width // unit), -(-height // unit)
            return Picture(columns * rows, columns * rows * self.merge**2, 1, 0, 1, rows - 1)
        height, width = self._resized(height, width, unit)
        segments = -(-frames // self.frames_per_patch)
        grid = (height // self.patch) * (width // self.patch)
        patches = segments * grid
        return Picture(patches // self.merge**2, patches, segments, around=self.around)

    def _resized(self, height: int, width: int, unit: int) -> tuple[int, int]:
        """Height and width in whole units, within the bounds of pixels (``smart_resize``)."""
        if max(height, width) > 200 * min(height, width):
            raise InputError(
                f"an image of {width} x {height} is too long for its width",
                where="workload.media.items",
                fix="Keep one side below 200 times the other: the model's processor refuses it.",
            )
        rows, columns = round(height / unit) * unit, round(width / unit) * unit
        if rows * columns > self.max_pixels:
            scale = math.sqrt(height * width / self.max_pixels)
            rows = max(unit, math.floor(height / scale / unit) * unit)
            columns = max(unit, math.floor(width / scale / unit) * unit)
        elif rows * columns < self.min_pixels:
            scale = math.sqrt(self.min_pixels / (height * width))
            rows = math.ceil(height * scale / unit) * unit
            columns = math.ceil(width * scale / unit) * unit
        return rows, columns

    def largest(self, modality: Modality, max_model_len: int) -> Picture | None:
        """The item of most tokens, as vLLM profiles it; None where the model has none of that kind
        (get_image_size_with_most_features, get_num_frames_with_most_features)."""
        if self.rule == "fixed":
            return self.picture(1, 1) if modality == "image" else None
        if self.rule == "rows":
            return self.picture(self.longest_edge, self.longest_edge) if modality == "image" else None
        if modality == "video" and self.video_pixels:
            own = replace(self, max_pixels=self.video_pixels, video_pixels=0)
            return own.largest("image", max_model_len)
        unit = self.patch * self.merge
        for tokens in range(self.max_pixels // unit**2, 0, -1):
            side = next(each for each in range(math.isqrt(tokens), 0, -1) if tokens % each == 0)
            if tokens // side <= 200 * side:
                break
        size = unit * (tokens // side), unit * side
        if modality == "image":
            return self.picture(*size)
        frames = 1
        while frames < _MOST_FRAMES and self.picture(*size, frames=frames + 1).embeds <= max_model_len:
            frames += 1
        return self.picture(*size, frames=frames)

    def with_kwargs(self, kwargs: Mapping[str, Any]) -> VisionTower:
        """With the bounds of ``--mm-processor-kwargs``.

        Raises:
            InputError: another of them, which is not modelled.
        """
        known = {name: kwargs[name] for name in ("min_pixels", "max_pixels") if name in kwargs}
        others = sorted(kwargs.keys() - known.keys() - {"use_fast"})
        if others or (known and self.rule != "grid"):
            raise InputError(
                f"mm_processor_kwargs {', '.join(others or known)} are not modelled for this model",
                where="engine.mm_processor_kwargs",
                fix="Give min_pixels and max_pixels of a Qwen-VL model, or leave them out.",
            )
        return replace(self, **known)


_MOST_FRAMES = 14  # _MAX_FRAMES_PER_VIDEO of vLLM's qwen2_vl.py


def vision_tower(config: Mapping[str, Any]) -> VisionTower | None:
    """The tower of a multimodal model's config; None where it has none, or not all sizes of a family that is
    known."""
    read = _FAMILIES.get(str(config.get("model_type")))
    vision = config.get("vision_config")
    if read is None or not isinstance(vision, Mapping):
        return None
    text = config.get("text_config")
    text_size = int((text if isinstance(text, Mapping) else config).get("hidden_size") or 0)
    try:
        return read(config, vision, text_size)
    except KeyError:  # one of its sizes is missing
        return None


def _qwen2(config: Mapping[str, Any], vision: Mapping[str, Any], text: int) -> VisionTower:
    hidden = int(vision.get("embed_dim", 1280))
    return _grid(
        vision, hidden, text, intermediate=int(hidden * vision.get("mlp_ratio", 4)), layers=vision["depth"]
    )


def _qwen25(config: Mapping[str, Any], vision: Mapping[str, Any], text: int) -> VisionTower:
    tower = _grid(
        vision,
        vision["hidden_size"],
        vision.get("out_hidden_size", text),
        intermediate=vision["intermediate_size"],
        layers=vision.get("depth", 32),
        products=3,
    )
    full = len(vision.get("fullatt_block_indexes", (7, 15, 23, 31)))
    side = vision.get("window_size", 112) // tower.patch
    return replace(tower, full_layers=full, window=side**2)


def _qwen3(config: Mapping[str, Any], vision: Mapping[str, Any], text: int) -> VisionTower:
    hidden, positions = vision["hidden_size"], vision.get("num_position_embeddings", 2304)
    tower = _grid(
        vision,
        hidden,
        vision.get("out_hidden_size", text),
        intermediate=vision["intermediate_size"],
        layers=vision["depth"],
        mergers=1 + len(vision.get("deepstack_visual_indexes", (8, 16, 24))),
    )
    return replace(
        tower,
        min_pixels=65_536,
        max_pixels=16_777_216,
        video_pixels=12_582_912,
        other_weights=tower.other_weights + positions * hidden,
    )


def _grid(
    vision: Mapping[str, Any],
    hidden: int,
    text: int,
    *,
    intermediate: int,
    layers: int,
    products: int = 2,
    mergers: int = 1,
) -> VisionTower:
    """Of Qwen-VL models: a merger joins the patches of a square."""
    patch, merge = vision.get("patch_size", 14), vision.get("spatial_merge_size", 2)
    frames = vision.get("temporal_patch_size", 2)
    joined = hidden * merge**2
    return VisionTower(
        rule="grid",
        hidden_size=hidden,
        intermediate_size=intermediate,
        layers=layers,
        heads=vision.get("num_heads", 16),
        mlp_products=products,
        patch=patch,
        merge=merge,
        text_size=text,
        joining_weights=mergers * (joined**2 + joined * text),
        other_weights=3 * frames * patch**2 * hidden + mergers * (hidden + joined + text),
        full_layers=layers,
        frames_per_patch=frames,
        min_pixels=3_136,
        max_pixels=12_845_056,
        around=(1, 1),
    )


def _even_blocks(vision: Mapping[str, Any], text: int) -> dict[str, Any]:
    """Of towers whose blocks are all alike and attend to all, under the names of most configs."""
    return {
        "hidden_size": vision["hidden_size"],
        "intermediate_size": vision["intermediate_size"],
        "layers": vision["num_hidden_layers"],
        "full_layers": vision["num_hidden_layers"],
        "heads": vision["num_attention_heads"],
        "patch": vision["patch_size"],
        "longest_edge": vision["image_size"],
        "text_size": text,
    }


def _gemma3(config: Mapping[str, Any], vision: Mapping[str, Any], text: int) -> VisionTower:
    hidden, patch, edge = vision["hidden_size"], vision["patch_size"], vision["image_size"]
    tokens = int(config.get("mm_tokens_per_image", 256))
    return VisionTower(
        rule="fixed",
        **_even_blocks(vision, text),
        mlp_products=2,
        merge=edge // patch // math.isqrt(tokens),
        joining_weights=hidden * text,
        other_weights=(3 * patch**2 + (edge // patch) ** 2) * hidden,
        tokens_per_image=tokens,
    )


def _mistral3(config: Mapping[str, Any], vision: Mapping[str, Any], text: int) -> VisionTower:
    hidden, patch = vision["hidden_size"], vision["patch_size"]
    merge = int(config.get("spatial_merge_size", 2))
    return VisionTower(
        rule="rows",
        **_even_blocks(vision, text),
        mlp_products=3,
        merge=merge,
        joining_weights=hidden * merge**2 * hidden + hidden * text + text**2,
        other_weights=3 * patch**2 * hidden,
    )


_FAMILIES = {
    "qwen2_vl": _qwen2,
    "qwen2_5_vl": _qwen25,
    "qwen3_vl": _qwen3,
    "qwen3_vl_moe": _qwen3,
    "gemma3": _gemma3,
    "mistral3": _mistral3,
}
