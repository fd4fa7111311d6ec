"""Images, videos and audio in prompts: how many, of what sizes, and which come again."""

from __future__ import annotations

import ast
import math
import zlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BeforeValidator, Field, PrivateAttr, model_validator

from servecast.sim.engine.request import Content, MediaItem, Requests, media_column
from servecast.sim.inputs.schema import Amount, Count, Model, NonNegative, invalid
from servecast.sim.traffic.content import ContentIds

Kind = Literal["image", "video"]
Shape = tuple[MediaItem, int, int]  # at offset 0, and the model's marks before and behind it


class MediaSize(Model):
    """Items of one size."""

    width: Count | None = None
    """Pixels."""
    height: Count | None = None
    """Pixels."""
    frames: Count = 1
    """Of a video that the model gets to see; 1 is an image."""
    tokens: Count | None = None
    """Embeddings of an item, which makes nothing of its pixels. Default, by the model's own rule."""
    patches: Count | None = None
    """What the encoder computes for it, beside ``tokens``. Default, as many as the model joins to these."""
    share: NonNegative = 1.0
    """Of the items that have this size."""

    @property
    def modality(self) -> Kind:
        return "video" if self.frames > 1 else "image"

    @model_validator(mode="after")
    def _one_size(self) -> MediaSize:
        sides = (self.width is not None) + (self.height is not None)
        if sides == 1 or (sides == 0 and self.tokens is None):
            raise invalid("an item without a size", "Give width and height, or tokens.")
        if self.patches is not None and self.tokens is None:
            raise invalid("patches without tokens", "Give tokens, too.", at="patches")
        return self


def _buckets(given: Any) -> Any:
    """``--random-mm-bucket-config``: (height, width, frames) -> probability."""
    if not isinstance(given, dict):
        return given
    found = []
    for key, share in given.items():
        try:
            height, width, frames = ast.literal_eval(key) if isinstance(key, str) else key
        except (ValueError, SyntaxError, TypeError):
            raise invalid(f"{key!r} is no size", "Give (height, width, frames).") from None
        found.append({"height": height, "width": width, "frames": frames, "share": share})
    return found


def _most() -> dict[Kind, int]:
    return {"image": 255, "video": 1}


class MediaSpec(Model):
    """What prompts carry beside text. The defaults are those of ``vllm bench serve --dataset-name
    random-mm``."""

    items: Annotated[tuple[MediaSize, ...], BeforeValidator(_buckets), Field(min_length=1)] = (
        MediaSize(width=256, height=256, share=0.5),
        MediaSize(width=1280, height=720, share=0.5),
    )
    """Sizes and their shares; or as ``--random-mm-bucket-config``, a mapping of (height, width, frames)."""
    items_per_request: Amount = 1
    """As ``--random-mm-base-items-per-request``."""
    range_ratio: Annotated[NonNegative, Field(le=1)] = 0.0
    """As ``--random-mm-num-mm-items-range-ratio``: so much fewer or more, evenly."""
    limit_per_prompt: dict[Kind, Amount] = Field(default_factory=_most)
    """As ``--random-mm-limit-mm-per-prompt``."""
    repeat_share: Annotated[NonNegative, Field(lt=1)] = 0.0
    """Of the items that were sent before, each as likely."""
    place: Literal["behind", "front"] = "behind"
    """Behind the text, as ``vllm bench serve`` puts them, or in front of it (and behind a shared prefix),
    where the prefix cache finds items that come again."""

    _shapes: tuple[Shape, ...] | None = PrivateAttr(default=None)

    def of_model(self, shapes: Sequence[Shape]) -> MediaSpec:
        """The same, for a model that makes this of each of ``items``."""
        known = self.model_copy()
        known._shapes = tuple(shapes)
        return known

    @property
    def most_items(self) -> int:
        """Of one request, before any limit."""
        return math.ceil(self.items_per_request * (1 + self.range_ratio))

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """What the model makes of each size."""
        assert self._shapes is not None, "the scenario says what its model makes of items"
        return self._shapes


def carry(
    requests: Requests, spec: MediaSpec, behind: int, ids: ContentIds, seed: int, stream: str
) -> Requests:
    """The requests of a stream with their items, drawn by the run's seed and the stream's name alone.

    Args:
        behind: tokens at the end of each prompt that stay there.
    """
    rng = np.random.default_rng([seed, zlib.crc32(f"media {stream}".encode())])
    most = sum(spec.limit_per_prompt.get(size.modality, 0) for size in _by_modality(spec.items))
    low, high = math.floor(spec.items_per_request * (1 - spec.range_ratio)), min(spec.most_items, most)
    counts = rng.integers(min(low, high), high + 1, len(requests)).tolist()
    first, sent = ids.first("media", stream), list[tuple[int, int]]()  # (content, size) of each item
    chains: dict[tuple[int, ...], int] = {}
    chain_ids = ids.first("prefixes of media", stream)
    prompts, places = requests.prompt_tokens.copy(), requests.content.copy()
    contents, known = list(requests.contents), dict[Content, int]()
    media: list[tuple[MediaItem, ...]] = []
    for row, count in enumerate(counts):
        parts, own = requests.contents[requests.content[row]], list[MediaItem]()
        shared = parts[-1][1] if parts else 0
        at = shared if spec.place == "front" else int(prompts[row]) - behind
        start, chain = at, tuple(part for part, _ in parts)
        for size in _sizes(spec, count, rng):
            content = len(sent)
            again = [each for each, of in sent if of == size] if spec.repeat_share else []
            if again and rng.random() < spec.repeat_share:
                content = again[int(rng.integers(len(again)))]
            sent.append((content, size))
            item, before, after = spec.shapes[size]
            own.append(item._replace(content=first + content, offset=at + before))
            at += before + item.length + after
            if spec.place == "front" and spec.repeat_share:
                chain = (*chain, content)
                parts = (*parts, (chain_ids + chains.setdefault(chain, len(chains)), at))
        prompts[row] += at - start
        if parts is not requests.contents[requests.content[row]]:
            if parts not in known:
                known[parts] = len(contents)
                contents.append(parts)
            places[row] = known[parts]
        media.append(tuple(own))
    return replace(
        requests, prompt_tokens=prompts, content=places, contents=contents, media=media_column(media)
    )


def _by_modality(sizes: Sequence[MediaSize]) -> list[MediaSize]:
    return list({size.modality: size for size in sizes if size.share}.values())


def _sizes(spec: MediaSpec, count: int, rng: np.random.Generator) -> list[int]:
    """The sizes of a prompt's items: by their shares, without those of a modality that has its limit
    (RandomMultiModalDataset.get_mm_item_iterator)."""
    shares = np.array([size.share for size in spec.items])
    found, left = list[int](), dict(spec.limit_per_prompt)
    while len(found) < count and shares.any():
        size = int(rng.choice(len(shares), p=shares / shares.sum()))
        modality = spec.items[size].modality
        if left.get(modality, 0) > 0:
            left[modality] -= 1
            found.append(size)
        else:
            shares[[each.modality == modality for each in spec.items]] = 0.0
    return found
