"""How vLLM's API servers share requests out among the engine cores behind them.

Each API server is a process with a view of its own (``DPLBAsyncMPClient.get_core_engine_for_request``): the
last snapshot of all cores that the coordinator published, to which it adds what it has sent since, and, by
the rule "in_flight", its own unfinished requests. The coordinator (``DPCoordinatorProc``) publishes what the
cores reported at most every 100 ms, and then replaces what the servers had counted.
"""

from __future__ import annotations

from collections.abc import Sequence

from servecast.sim.engine.data_parallel import Balancing, DataParallel

INTERVAL_PS = 100 * 10**9  # DPCoordinator, min_stats_update_interval_ms
KV_PENALTY = 6.0  # of a waiting request and each share of the KV cache in use beyond a half


class Balancer:
    """One API server's choice.

    Args:
        rule: see ``DataParallel.balancing``. cores: behind it. index, count: its place among the API servers.

    Attributes:
        counts: waiting, running and the KV cache in use, of each core, as this server has them. in_flight:
            its own unfinished requests there. start: the core that its scan begins with.
    """

    def __init__(self, rule: Balancing, cores: int, index: int, count: int) -> None:
        self.rule, self.count = rule, count
        self.counts: list[list[float]] = [[0, 0, 0.0] for _ in range(cores)]
        self.in_flight = [0] * cores
        self.start = cores * index // count

    def pick(self) -> int:
        """The core of the next request: the first with the lowest score."""
        cores, chosen, least = len(self.counts), 0, float("inf")
        for step in range(cores):
            core = (self.start + step) % cores
            score = self._score(core)
            if score < least:
                chosen, least = core, score
        self.counts[chosen][0] += self.count  # the others send about as many, which it does not see
        self.in_flight[chosen] += 1
        if self.rule != "queues":
            self.start = (self.start + 1) % cores
        return chosen

    def _score(self, core: int) -> float:
        waiting, running, usage = self.counts[core]
        if self.rule != "in_flight":
            return 4 * waiting + running
        score = max(self.count * self.in_flight[core], waiting + running)
        return score + waiting * KV_PENALTY * max(0.0, usage - 0.5) if waiting else score


class Balance:
    """The API servers of one group of cores, and the coordinator behind them."""

    def __init__(self, cores: DataParallel) -> None:
        count = cores.api_servers
        self.servers = [Balancer(cores.balancing, cores.local, index, count) for index in range(count)]
        self._published, self._awaited = -INTERVAL_PS, False

    def pick(self, server: int) -> int:
        """The core that an API server sends its next request to."""
        return self.servers[server].pick()

    def ended(self, server: int, core: int) -> None:
        """A request has left the core that an API server had sent it to."""
        self.servers[server].in_flight[core] -= 1

    def due(self, now: int) -> int:
        """When the next snapshot comes, in picoseconds; -1 if that is known, or nothing has changed."""
        if self._awaited:
            return -1
        self._awaited = True
        return max(now, self._published + INTERVAL_PS)

    def publish(self, now: int, reported: Sequence[tuple[int, int, float]], *, busy: bool) -> int:
        """A snapshot of what the cores reported last reaches all API servers. Returns as ``due``; ``busy``:
        some core has work."""
        for server in self.servers:
            server.counts = [list(counts) for counts in reported]
        self._published, self._awaited = now, False
        return self.due(now) if busy else -1
