"""What differs between releases of llm-d's endpoint picker (EPP).

They are named by the release of the Gateway API Inference Extension (GIE) that holds the EPP's frame; the
llm-d inference scheduler that adds plugins to it was built on v0.5 (scheduler v0.2), v1.0 (v0.3) and v1.2
(v0.4).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EppRelease:
    """Differences that change where requests go, or which configurations load.

    Attributes:
        fills_in: a missing profile handler, picker, profile or weight has a default; without, it is an error.
        fractional_weights: weights may have a fraction.
        clamps: scores are cut to 0..1 before they are weighted.
        model_entry: the approximate prefix index counts the model's name as a block of its own.
        auto_tune: the approximate index takes block and LRU sizes from the servers, unless told not to.
        tokenizes_later: a prompt is scored on what was tokenized before it came; without, a prompt of which
            less than 0.8 is known is tokenized at once.
        saturation_block: the configuration may hold saturationDetector and featureGates.
    """

    fills_in: bool = True
    fractional_weights: bool = False
    clamps: bool = True
    model_entry: bool = False
    auto_tune: bool = False
    tokenizes_later: bool = False
    saturation_block: bool = False


EPP_RELEASES = {
    "v0.5": EppRelease(fills_in=False, clamps=False, model_entry=True, tokenizes_later=True),
    "v1.0": EppRelease(),
    "v1.1": EppRelease(saturation_block=True),
    "v1.2": EppRelease(saturation_block=True, auto_tune=True),
    "v1.3": EppRelease(saturation_block=True, auto_tune=True),
    "v1.4": EppRelease(saturation_block=True, auto_tune=True, fractional_weights=True),
}
