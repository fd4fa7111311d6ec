"""Noise of step times: real steps vary and now and then stall, and the tails of ITL come from that."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import repeat

import numpy as np

from servecast.sim.inputs.errors import InputError

_BUFFER = 4096


@dataclass(frozen=True, slots=True)
class StepNoise:
    """Factors of mean 1 on step times: lognormal with coefficient of variation ``cv``, and with
    ``stall_probability`` a step is ``stall_factor`` times as long on top.

    Mean 1 holds with stalls too, so noise moves tails and not the mean.
    """

    cv: float = 0.0
    stall_probability: float = 0.0
    stall_factor: float = 1.0

    def __post_init__(self) -> None:
        for name, good, rule in (
            ("cv", 0.0 <= self.cv < math.inf, "at least 0"),
            ("stall_probability", 0.0 <= self.stall_probability < 1.0, "in [0, 1)"),
            ("stall_factor", 1.0 <= self.stall_factor < math.inf, "at least 1"),
        ):
            if not good:
                raise InputError(
                    f"{name} is {getattr(self, name)}", where=f"noise.{name}", fix=f"Make it {rule}."
                )

    def factors(self, rng: np.random.Generator) -> Iterator[float]:
        """Factors by step index, without end. The generator must be this replica's own noise stream, so
        that the n-th step of two what-ifs draws the same factor."""
        if self.cv == 0.0 and (self.stall_probability == 0.0 or self.stall_factor == 1.0):
            return repeat(1.0)
        return self._draw(rng)

    def _draw(self, rng: np.random.Generator) -> Iterator[float]:
        sigma = math.sqrt(math.log1p(self.cv * self.cv))
        mean_stall = 1.0 + self.stall_probability * (self.stall_factor - 1.0)
        while True:
            factors = rng.lognormal(-0.5 * sigma * sigma, sigma, _BUFFER) / mean_stall
            stalled = rng.random(_BUFFER) < self.stall_probability
            yield from np.where(stalled, factors * self.stall_factor, factors).tolist()
