"""A link that serves transfers one after the other, each way by itself."""

from __future__ import annotations

from servecast.sim.inputs.units import PICOSECONDS


class Pipe:
    """One direction of a link: transfers queue, and each has all of it.

    Args:
        bandwidth: bytes a second. latency_s: of a transfer, beside its bytes.

    Attributes:
        free: when the last of those that were given to it ends, ps. bytes, transfers, busy_ps: served so far.
    """

    def __init__(self, bandwidth: float, latency_s: float = 0.0) -> None:
        self.bandwidth, self.latency_s = bandwidth, latency_s
        self.free = self.bytes = self.transfers = self.busy_ps = 0

    def send(self, num_bytes: int, now: int) -> int:
        """Queue a transfer at ``now``; when it ends, both in ps. Calls come in the order of their times."""
        service = round((self.latency_s + num_bytes / self.bandwidth) * PICOSECONDS)
        self.free = max(self.free, now) + service
        self.bytes += num_bytes
        self.transfers += 1
        self.busy_ps += service
        return self.free
