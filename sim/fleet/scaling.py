"""Replicas that come and go as an autoscaler says."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass

import simpy

from servecast.sim.fleet.autoscaler import AutoscalerSpec, Observed
from servecast.sim.fleet.endpoint import Endpoint
from servecast.sim.fleet.flow import Flow
from servecast.sim.inputs.units import to_ps, to_seconds

_MAX_WINDOW_S = 60.0  # of max_waiting and max_kv_usage


@dataclass(slots=True)
class PaidLife:
    """One replica's, in seconds; None is never. ordered_s: from when it is paid for. ready_s: it takes
    requests. drain_s: it takes no more; without ready_s it was called off. replica: its number, once it is
    ready."""

    ordered_s: float
    ready_s: float | None
    drain_s: float | None = None
    replica: int | None = None


class Scaling:
    """Scrapes the replicas that are ready, and starts and drains them.

    A new one begins with nothing cached. To go, those are chosen that are not ready yet, then the newest
    (Kubernetes' ReplicaSet); they finish the requests that they have.

    Args:
        flow: whose ``ready`` changes. spec: the autoscaler's. make: a new replica's endpoint, with its router
        told.
    """

    def __init__(
        self, env: simpy.Environment, flow: Flow, spec: AutoscalerSpec, make: Callable[[], Endpoint]
    ) -> None:
        self.lives = [PaidLife(0.0, 0.0, None, endpoint.index) for endpoint in flow.ready]
        self._env, self._flow, self._spec, self._make = env, flow, spec, make
        self._policy = spec.policy(len(flow.ready))
        self._asked = len(flow.ready)
        self._scrapes: deque[tuple[float, dict[int, dict[str, float]]]] = deque()
        self._sent: deque[tuple[float, int]] = deque([(0.0, 0)])
        env.process(self._scrape())
        env.process(self._decide())

    @property
    def _now_s(self) -> float:
        return to_seconds(int(self._env.now))

    def _scrape(self) -> Generator[simpy.Event, None, None]:
        window = getattr(self._spec, "rate_window_s", 0.0)
        while True:
            yield self._env.timeout(to_ps(self._spec.scrape_interval_s))
            now, pods = self._now_s, dict[int, dict[str, float]]()
            self._sent.append((now, self._flow.sent))
            while len(self._sent) > 2 and self._sent[1][0] <= now - window:
                self._sent.popleft()
            began, before = self._sent[0]
            rate = (self._flow.sent - before) / (now - began) / max(len(self._flow.ready), 1)
            for endpoint in self._flow.ready:
                waiting, running, usage = map(float, endpoint.replica.gauges()[:3])
                pods[endpoint.index] = {
                    "waiting": waiting,
                    "running": running,
                    "in_flight": waiting + running,
                    "kv_usage": usage,
                    "request_rate": rate,
                }
            self._scrapes.append((now, pods))
            while self._scrapes[0][0] <= now - max(_MAX_WINDOW_S, self._spec.scrape_interval_s):
                self._scrapes.popleft()

    def _observed(self) -> Observed:
        known = self._scrapes[-1][1] if self._scrapes else {}
        pods = []
        for index in (endpoint.index for endpoint in self._flow.ready if endpoint.index in known):
            lately = [each[index] for _, each in self._scrapes if index in each]
            most = {f"max_{name}": max(each[name] for each in lately) for name in ("waiting", "kv_usage")}
            pods.append(known[index] | most)
        return Observed(self._asked, self._asked - len(pods), pods)

    def _decide(self) -> Generator[simpy.Event, None, None]:
        while True:
            yield self._env.timeout(to_ps(self._policy.period_s))
            wanted = self._policy.desired(self._now_s, self._observed())
            for _ in range(wanted - self._asked):
                self.lives.append(PaidLife(self._now_s, None))
                self._env.process(self._start(self.lives[-1]))
            for _ in range(self._asked - wanted):
                self._remove()
            self._asked = wanted

    def _start(self, life: PaidLife) -> Generator[simpy.Event, None, None]:
        yield self._env.timeout(to_ps(self._spec.startup_s))
        if life.drain_s is None:
            endpoint = self._make()
            life.ready_s, life.replica = self._now_s, endpoint.index
            self._flow.ready.add(endpoint)

    def _remove(self) -> None:
        going = [life for life in self.lives if life.drain_s is None]
        life = max(going, key=lambda each: (each.ready_s is None, each.ready_s or 0.0, each.ordered_s))
        life.drain_s = self._now_s
        for endpoint in [each for each in self._flow.ready if each.index == life.replica]:
            self._flow.ready.remove(endpoint)
