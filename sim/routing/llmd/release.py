"""What differs between releases of llm-d's endpoint picker (EPP).

Up to v1.5 they are named by the release of the Gateway API Inference Extension (GIE) that holds the EPP's
frame; the llm-d inference scheduler that adds plugins to it was built on v0.5 (scheduler v0.2), v1.0 (v0.3),
v1.2 (v0.4), v1.3 (v0.5), v1.4 (v0.7) and v1.5 (v0.8). From then on frame and plugins are one, the llm-d
router, and are named by its release.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

_FIRST = ("apiVersion", "kind", "plugins", "schedulingProfiles")
_SINCE_1_1 = (*_FIRST, "featureGates", "saturationDetector")
_SINCE_1_4 = (*_SINCE_1_1, "data", "dataLayer", "flowControl", "requestHandler", "parser")


@dataclass(frozen=True, slots=True)
class EppRelease:
    """Differences that change where requests go, or which configurations load.

    Attributes:
        fields: what a configuration may hold.
        fills_in: a missing profile handler, picker, profile or weight has a default; without, it is an error.
        fractional_weights: weights may have a fraction.
        clamps: scores are cut to 0..1 before they are weighted.
        model_entry: the approximate prefix index counts the model's name as a block of its own.
        auto_tune: the approximate index takes block and LRU sizes from the servers, unless told not to.
        block_parameter: what its block size is called; blockSizeTokens counts tokens of 4 characters, the
            others characters.
        default_block: of the approximate index, in the unit of block_parameter. least_block: smaller ones,
            the servers' too, are raised to it.
        prefix_tokens: so many leading tokens are looked at, where nothing else is said; 0, blocks count.
        tokens: prompts are tokens to it, and the part of a block at a prompt's end counts as one.
        tokenizes_later: a prompt is scored on what was tokenized before it came; without, a prompt of which
            less than 0.8 is known is tokenized at once.
        processor_beside: the precise index reads tokenProcessorConfig beside indexerConfig, not inside it.
        producers: indexes and counts of requests in flight are plugins of their own, which scorers and
            filters name. Active requests do not time out, precise matches are shares of the prompt, not
            stretched over their holders, and the servers' KV blocks may have another size than the index.
        strict: an unknown parameter is an error; without, it is ignored.
        today: takes what any release from v1.4 on can be told, where its meaning is the same.
    """

    fields: tuple[str, ...] = _SINCE_1_4
    fills_in: bool = True
    fractional_weights: bool = False
    clamps: bool = True
    model_entry: bool = False
    auto_tune: bool = True
    block_parameter: Literal["hashBlockSize", "blockSize", "blockSizeTokens"] = "blockSizeTokens"
    default_block: int = 64
    least_block: int = 1
    prefix_tokens: int = 0
    tokens: bool = False
    tokenizes_later: bool = False
    processor_beside: bool = True
    producers: bool = False
    strict: bool = False
    today: bool = False


_OLD = EppRelease(fields=_FIRST, auto_tune=False, block_parameter="hashBlockSize", processor_beside=False)
_1_1 = EppRelease(fields=_SINCE_1_1, auto_tune=False, block_parameter="blockSize", processor_beside=False)
_ROUTER = EppRelease(
    fractional_weights=True,
    default_block=16,
    least_block=64,
    prefix_tokens=131_072,
    tokens=True,
    producers=True,
    strict=True,
    today=True,
)

EPP_RELEASES = {  # oldest first
    "v0.5": EppRelease(
        fields=_FIRST,
        fills_in=False,
        clamps=False,
        model_entry=True,
        auto_tune=False,
        block_parameter="hashBlockSize",
        tokenizes_later=True,
        processor_beside=False,
    ),
    "v1.0": _OLD,
    "v1.1": _1_1,
    "v1.2": EppRelease(fields=_SINCE_1_1, block_parameter="blockSize", processor_beside=False),
    "v1.3": EppRelease(fields=(*_SINCE_1_1, "data"), block_parameter="blockSize"),
    "v1.4": EppRelease(fractional_weights=True, default_block=16, today=True),
    "v1.5": EppRelease(fractional_weights=True, default_block=16, today=True),
    "router-v0.9": _ROUTER,
    "router-v0.10": _ROUTER,
}
NEWEST = next(reversed(EPP_RELEASES))
