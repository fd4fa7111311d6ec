"""Counts by replica."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


class Tally:
    """A count for each replica, 0 at first."""

    def __init__(self) -> None:
        self.values = np.zeros(16, np.int64)

    def add(self, number: int, amount: int) -> None:
        """Add to that of one replica."""
        self._reach(number)
        self.values[number] += amount

    def of(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Those of some replicas, whose numbers rise."""
        self._reach(int(numbers[-1]))
        if numbers[-1] == len(numbers) - 1:
            return self.values[: len(numbers)]
        return self.values[numbers]

    def _reach(self, number: int) -> None:
        while number >= len(self.values):
            self.values = np.concatenate((self.values, np.zeros_like(self.values)))
