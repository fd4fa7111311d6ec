"""Times pieces of work on a GPU by its own events, and on a CPU by its clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

Work = Callable[[], Any]

_INNER_S = 2e-4  # calls that share one measurement take at least this long together
_LEAST_S = 0.02  # of repeats
_WARM_UP = 3  # that do not count


class DeviceTimer:
    """Repeats work until its median is steady.

    On a GPU the calls are captured into a CUDA graph, as vLLM runs them, and timed by events around its
    replay, so that the time to launch a kernel is not in them; work that cannot be captured is launched
    one by one.

    Args:
        device: "cuda" or "cpu".
        repeats: measurements that are kept at least.
    """

    def __init__(self, device: str, *, repeats: int = 7) -> None:
        self.device, self._repeats = device, repeats

    def times(self, works: Sequence[Work], *, graph: bool = True) -> list[float]:
        """Seconds of one call, once for each repeat.

        Args:
            works: the same work on different inputs, run in turn, so that none finds its inputs in a cache.
            graph: capture the calls, on a GPU.
        """
        for work in works:
            work()
        once = min(self._seconds(lambda: _all(works)) for _ in range(2))
        rounds = max(1, round(_INNER_S / max(once, 1e-9)))
        calls = [*works] * rounds
        run = self._captured(calls) if graph and self.device == "cuda" else None
        launch: Work = run if run is not None else lambda: _all(calls)
        for _ in range(_WARM_UP):
            launch()
        found: list[float] = []
        while len(found) < self._repeats or (sum(found) < _LEAST_S and len(found) < 8 * self._repeats):
            found.append(self._seconds(launch))
        return [seconds / len(calls) for seconds in found]

    def _seconds(self, work: Work) -> float:
        if self.device != "cuda":
            start = time.perf_counter()
            work()
            return time.perf_counter() - start
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        before.record()
        work()
        after.record()
        after.synchronize()
        return float(before.elapsed_time(after)) / 1e3

    def _captured(self, calls: Sequence[Work]) -> Work | None:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                _all(calls)
        except RuntimeError:  # the work waits for the host, or its kernel cannot be captured
            torch.cuda.synchronize()
            return None
        replay: Work = graph.replay
        return replay


def _all(works: Sequence[Work]) -> None:
    for work in works:
        work()
