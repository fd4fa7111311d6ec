"""llm-d's endpoint picker with a profile for prefill and one for decode."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from servecast.sim.engine.request import Request
from servecast.sim.routing.backends import Backend
from servecast.sim.routing.llmd.cycle import Cycle, PrefixProducer, Setting
from servecast.sim.routing.llmd.endpoint_picker import EndpointPicker
from servecast.sim.routing.llmd.plugin import APPROXIMATE, EppConfig, Plugin
from servecast.sim.routing.options import RouterOptions


class Decider(Protocol):
    """Whether a prompt goes to a server of its own."""

    def splits(self, cycle: Cycle, decode: Backend) -> bool:
        """``decode`` is the server that would have the request otherwise."""
        ...


class Always:
    """Every prompt."""

    def __init__(self, plugin: Plugin, setting: Setting, prefixes: PrefixProducer | None) -> None:
        pass

    def splits(self, cycle: Cycle, decode: Backend) -> bool:
        return True


class PrefixBased:
    """Prompts of promptTokens or more of which nonCachedTokens or more are not cached where they would
    decode, by the approximate index; none, where nonCachedTokens is 0 or there is no such index."""

    def __init__(self, plugin: Plugin, setting: Setting, prefixes: PrefixProducer | None) -> None:
        parameters = plugin.parameters
        self._setting, self._prefixes = setting, prefixes
        self._uncached = parameters.amount("nonCachedTokens", 0)
        self._prompt = parameters.amount("promptTokens", 0)
        for name, value in (("nonCachedTokens", self._uncached), ("promptTokens", self._prompt)):
            if value < 0:
                raise parameters.error(f"{name} is {value}", name, "Give 0 or more.")

    def splits(self, cycle: Cycle, decode: Backend) -> bool:
        tokens = self._setting.prompt_tokens(cycle.request)
        if not self._uncached or self._prefixes is None or tokens < max(self._prompt, self._uncached):
            return False
        match = self._prefixes.match(cycle)
        return tokens - match.counts.get(decode.index, 0) * match.block_tokens >= self._uncached


class ByCharacters:
    """Prompts of which ``threshold`` characters or more are not cached where they would decode; 0 is all. A
    block of the index counts as hashBlockSize characters, and the first as the model's name."""

    def __init__(self, plugin: Plugin, setting: Setting, prefixes: PrefixProducer | None) -> None:
        self._setting, self._prefixes = setting, prefixes
        self._threshold = plugin.parameters.amount("threshold", 0)
        self._block = plugin.parameters.whole("hashBlockSize", 64)
        if self._threshold < 0:
            raise plugin.parameters.error(f"threshold is {self._threshold}", "threshold", "Give 0 or more.")

    def splits(self, cycle: Cycle, decode: Backend) -> bool:
        if not self._threshold:
            return True
        blocks = 0 if self._prefixes is None else self._prefixes.match(cycle).counts.get(decode.index, 0)
        characters = int(cycle.request.prompt_tokens * self._setting.bytes_per_token)
        return characters - max(blocks - 1, 0) * self._block >= self._threshold


DECIDERS: dict[str, Callable[[Plugin, Setting, PrefixProducer | None], Decider]] = {
    "always-disagg-pd-decider": Always,
    "prefix-based-pd-decider": PrefixBased,
    "pd-profile-handler": ByCharacters,
}


class DisaggregatedPicker:
    """Picks a server to decode, asks the decider whether the prompt goes to another one, and picks that; or,
    prefill first, the other way round. Plugins of both profiles are the same, and hear of both picks.

    Args:
        config: with a ``split``. rng: for the pickers. clock: simulated seconds.
    """

    def __init__(
        self, config: EppConfig, options: RouterOptions, rng: np.random.Generator, clock: Callable[[], float]
    ) -> None:
        split = config.split
        assert split is not None
        self._decode = EndpointPicker(config, options, rng, clock)
        self._prefill = EndpointPicker(split.prefill, options, rng, clock, beside=self._decode)
        self._first, self._decider = split.prefill_first, None
        if split.decider is not None:
            prefixes = self._decode.setting.prefixes
            index = next((each.name for each in config.producers if each.type == APPROXIMATE), None)
            found = None if index is None else prefixes[index]
            self._decider = DECIDERS[split.decider.type](split.decider, self._decode.setting, found)

    def connect(self, backends: Sequence[Backend]) -> None:
        self._decode.connect(backends)
        self._prefill.connect(backends)

    def split(self, request: Request, backends: Sequence[Backend]) -> tuple[int, int | None] | None:
        """Positions of the servers that decode and that compute the prompt, None where that is the same; None
        refuses the request."""
        cycle = Cycle.among(request, backends)
        prefill = self._prefill.choose(cycle) if self._first else None
        decode = self._decode.choose(cycle)
        if decode is None:
            return None
        if self._decider is not None and self._decider.splits(cycle, backends[decode]):
            prefill = self._prefill.choose(cycle)
        for position in (decode,) if prefill is None else (decode, prefill):
            self._decode.tell(cycle, backends[position])
            self._prefill.tell(cycle, backends[position])
        return decode, prefill

    def pick_decode(self, request: Request, backends: Sequence[Backend]) -> int | None:
        raise AssertionError("it was picked with the prompt's server")

    def answered(self, request: Request, index: int) -> None:
        self._decode.answered(request, index)
        self._prefill.answered(request, index)

    def ended(self, request: Request, index: int) -> None:
        self._decode.ended(request, index)
        self._prefill.ended(request, index)
