"""Which requests use a LoRA adapter, and which follow a grammar."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any

import numpy as np
from pydantic import AfterValidator, BeforeValidator, Field

from servecast.sim.engine.request import Content, Requests
from servecast.sim.inputs.schema import Count, Model, NonNegative, invalid
from servecast.sim.traffic.content import ContentIds


class StructuredOutputs(Model):
    """Requests whose output has to follow a grammar: a JSON schema, a regular expression, a choice."""

    share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the requests."""
    grammars: Count = 1
    """Different grammars, each as likely; a server compiles each once."""


def _split(given: Any) -> Any:
    """inference-perf's list of ``name`` and ``split``, as a mapping."""
    if isinstance(given, list | tuple) and all(isinstance(each, Mapping) for each in given):
        return {each.get("name"): each.get("split") for each in given}
    return given


def _whole(split: dict[str, float]) -> dict[str, float]:
    total = sum(split.values())
    if total > 1 + 1e-9 or not total:
        raise invalid(f"shares of adapters that add up to {total:g}", "Make it more than 0, and 1 at most.")
    return split


LoraTrafficSplit = Annotated[dict[str, NonNegative], BeforeValidator(_split), AfterValidator(_whole)]


def choose(
    requests: Requests,
    split: Mapping[str, float],
    numbers: dict[str, int],
    structured: StructuredOutputs | None,
    ids: ContentIds,
    stream: tuple[int, str],
) -> Requests:
    """The requests of a stream with their adapters and grammars.

    Args:
        split: share of each adapter; what is left uses none. numbers: of adapters by name, which new ones
            join.
        stream: the run's seed and the stream's name, which decide who has what, and nothing else.
    """
    seed, name = stream
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    count = len(requests)
    if split:
        own = [numbers.setdefault(adapter, len(numbers) + 1) for adapter in split]
        shares = [*split.values(), max(0.0, 1.0 - sum(split.values()))]
        chances = np.array(shares) / sum(shares)
        adapter = np.array([*own, 0], np.int64)[rng.choice(len(shares), count, p=chances)]
        requests = _apart(replace(requests, adapter=adapter), ids)
    if structured is not None:
        drawn = rng.integers(1, structured.grammars + 1, count)
        requests = replace(requests, grammar=np.where(rng.random(count) < structured.share, drawn, 0))
    return requests


def _apart(requests: Requests, ids: ContentIds) -> Requests:
    """Prompts of different adapters share nothing: block hashes include the adapter's name."""
    assert requests.adapter is not None
    places: dict[tuple[int, int], int] = {}
    contents: list[Content] = []
    place = np.empty(len(requests), np.int32)
    for row, pair in enumerate(zip(requests.content.tolist(), requests.adapter.tolist(), strict=True)):
        at = places.get(pair)
        if at is None:
            at = places[pair] = len(contents)
            own, adapter = requests.contents[pair[0]], pair[1]
            contents.append(
                tuple((ids.of_adapter(part, adapter), end) for part, end in own) if adapter else own
            )
        place[row] = at
    return replace(requests, content=place, contents=contents)
