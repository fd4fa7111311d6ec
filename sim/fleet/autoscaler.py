"""How many replicas there should be: autoscalers behind one method.

Kubernetes' horizontal pod autoscaler follows kubernetes/pkg/controller/podautoscaler
(``replica_calculator.go`` and ``horizontal.go`` of 1.27 and later): tolerance, pods without metrics,
stabilization windows, scaling policies. KEDA feeds it an external metric. llm-d's workload variant autoscaler
(0.5 to 0.8, ``internal/saturation/analyzer.go``) decides on one replica more or less, which such an
autoscaler carries out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal, Protocol

from pydantic import Discriminator, Field, Tag, model_validator

from servecast.sim.inputs.schema import Count, Model, NonNegative, Positive, invalid

Metric = Literal["running", "waiting", "in_flight", "kv_usage", "request_rate"]


@dataclass(frozen=True, slots=True)
class Observed:
    """What was last scraped of a fleet.

    Attributes:
        replicas: that are asked for. starting: of them, those that do not answer yet.
        pods: of those that answer and are not draining, each metric by name: waiting and running requests,
            in_flight (both), kv_usage (0..1), request_rate (requests/s over ``rate_window_s``, of each its
            share), and max_waiting, max_kv_usage: the largest of the last minute.
    """

    replicas: int
    starting: int
    pods: Sequence[dict[str, float]]


class Autoscaler(Protocol):
    """Decides every ``period_s`` how many replicas are asked for."""

    period_s: float

    def desired(self, now_s: float, fleet: Observed) -> int:
        """Replicas from now on."""
        ...


class ScalingPolicy(Model):
    """One of the limits of a change."""

    type: Literal["pods", "percent"]
    """Of what ``value`` is."""
    value: Count
    """Most pods, or percent of them, that come or go in a period."""
    period_s: Positive = 15.0
    """The period."""


class ScalingRules(Model):
    """How fast replicas may change in one direction."""

    stabilization_window_s: NonNegative = 0.0
    """Of the recommendations of so long the most cautious counts."""
    select_policy: Literal["max", "min", "disabled"] = "max"
    """Which policy counts: the one that allows most, least, or no change at all."""
    policies: tuple[ScalingPolicy, ...] = Field(
        (
            ScalingPolicy(type="pods", value=4),
            ScalingPolicy(type="percent", value=100),
        ),
        min_length=1,
    )
    """The limits."""


_DOWN = ScalingRules(stabilization_window_s=300.0, policies=(ScalingPolicy(type="percent", value=100),))
_AT_ONCE = ScalingRules(policies=(ScalingPolicy(type="pods", value=10),))


class _Scaled(Model):
    min_replicas: Count = 1
    """Fewest."""
    max_replicas: Count
    """Most."""
    startup_s: NonNegative = 120.0
    """From the decision until a new replica takes requests: node, image, weights, warm-up. It is paid for."""
    scrape_interval_s: Positive = 15.0
    """Between two scrapes of the replicas' metrics."""
    sync_period_s: Positive = 15.0
    """Between two decisions of the horizontal pod autoscaler."""
    tolerance: NonNegative = 0.1
    """A metric this near to its target changes nothing."""
    scale_up: ScalingRules = ScalingRules()
    """How fast replicas come. Default, Kubernetes': 4 pods or 100 % in 15 s, whichever is more."""
    scale_down: ScalingRules = _DOWN
    """How fast they go. Default, Kubernetes': all in 15 s, by the highest recommendation of 300 s."""

    @model_validator(mode="after")
    def _in_order(self) -> _Scaled:
        if self.min_replicas > self.max_replicas:
            what = f"min_replicas {self.min_replicas} is above max_replicas {self.max_replicas}"
            raise invalid(what, "Swap or correct them.", at="min_replicas")
        return self


class HpaSpec(_Scaled):
    """Kubernetes' HorizontalPodAutoscaler on a metric of the pods, by its mean over them."""

    kind: Literal["hpa"]
    metric: Metric
    """``running``, ``waiting``, ``in_flight`` (both) requests, ``kv_usage`` (0..1) or ``request_rate``."""
    target: Positive
    """Its mean over the replicas that is aimed at."""
    rate_window_s: Positive = 60.0
    """Over what ``request_rate`` is taken."""

    @model_validator(mode="after")
    def _is_a_share(self) -> HpaSpec:
        if self.metric == "kv_usage" and self.target > 1:
            raise invalid(
                f"kv_usage never is {self.target:g}: it is a share", "Give 0.8 for 80 %.", at="target"
            )
        return self

    def policy(self, replicas: int) -> Autoscaler:
        """An autoscaler of a fleet that starts with so many."""
        return HorizontalPodAutoscaler(self, replicas, self._proposal)

    def _proposal(self, _now_s: float, fleet: Observed) -> int:
        values = [pod[self.metric] for pod in fleet.pods]
        return pods_proposal(values, fleet.starting, fleet.replicas, self.target, self.tolerance)


class KedaSpec(_Scaled):
    """KEDA's Prometheus scaler: the sum of a metric, as an external metric with an AverageValue."""

    kind: Literal["keda"]
    metric: Metric
    """Whose sum over the replicas is asked for."""
    threshold: Positive
    """What each replica should have of it."""
    rate_window_s: Positive = 60.0
    """Over what ``request_rate`` is taken."""

    def policy(self, replicas: int) -> Autoscaler:
        """An autoscaler of a fleet that starts with so many."""
        return HorizontalPodAutoscaler(self, replicas, self._proposal)

    def _proposal(self, _now_s: float, fleet: Observed) -> int:
        total = sum(pod[self.metric] for pod in fleet.pods)
        return external_proposal(total, fleet.replicas, self.threshold, self.tolerance)


class WvaSpec(_Scaled):
    """llm-d's workload variant autoscaler with one variant: its percentage-based saturation analyzer, whose
    ``wva_desired_replicas`` an HPA follows (its sample's, at once)."""

    kind: Literal["wva"]
    kv_cache_threshold: Annotated[Positive, Field(le=1)] = 0.8
    """A replica is saturated from this KV usage on."""
    queue_length_threshold: Positive = 5.0
    """Or from so many waiting requests on."""
    kv_spare_trigger: NonNegative = 0.1
    """One replica more, where those that are not saturated have less than this below the threshold, in the
    mean."""
    queue_spare_trigger: NonNegative = 3.0
    """The same of waiting requests."""
    reconcile_interval_s: Positive = 60.0
    """Between two analyses."""
    scale_up: ScalingRules = _AT_ONCE
    """How fast replicas come. Default, that of its sample: 10 pods in 15 s."""
    scale_down: ScalingRules = _AT_ONCE
    """How fast they go. Default, the same."""

    def policy(self, replicas: int) -> Autoscaler:
        """An autoscaler of a fleet that starts with so many."""
        return HorizontalPodAutoscaler(self, replicas, SaturationAnalyzer(self, replicas))


AutoscalerSpec = Annotated[
    Annotated[HpaSpec, Tag("hpa")] | Annotated[KedaSpec, Tag("keda")] | Annotated[WvaSpec, Tag("wva")],
    Discriminator(lambda data: data.get("kind") if isinstance(data, dict) else getattr(data, "kind", None)),
]


def pods_proposal(
    values: Sequence[float], missing: int, replicas: int, target: float, tolerance: float
) -> int:
    """What a metric of the pods asks for. Pods without one count as at the target where the rest would have
    fewer, as at 0 where they would have more, and must not turn the direction (calcPlainMetricReplicas)."""
    if not values:
        return replicas
    ratio = sum(values) / len(values) / target
    if not missing:
        return replicas if abs(ratio - 1) <= tolerance else math.ceil(_whole(ratio * len(values)))
    filled = [*values, *[target if ratio < 1 else 0.0] * missing]
    again = sum(filled) / len(filled) / target
    if abs(again - 1) <= tolerance or (ratio < 1 < again) or (again < 1 < ratio):
        return replicas
    found = math.ceil(_whole(again * len(filled)))
    turned = (again < 1 and found > replicas) or (again > 1 and found < replicas)
    return replicas if turned else found


def external_proposal(total: float, replicas: int, average: float, tolerance: float) -> int:
    """What an external metric with an AverageValue asks for (GetExternalPerPodMetricReplicas)."""
    ratio = total / (average * replicas)
    return replicas if abs(ratio - 1) <= tolerance else math.ceil(_whole(total / average))


def _whole(number: float) -> float:
    """Kubernetes counts in thousandths: what a float has beyond them is not there."""
    return round(number, 6)


@dataclass(slots=True)
class HorizontalPodAutoscaler:
    """Kubernetes' controller around what a metric asks for: first the stabilization windows, then the
    policies, then the bounds (normalizeDesiredReplicasWithBehaviors).

    Args:
        spec: its settings. replicas: that there are. proposal: what the metric asks for.
    """

    spec: _Scaled
    replicas: int
    proposal: Callable[[float, Observed], int]
    period_s: float = 0.0
    _recommended: list[tuple[float, int]] = field(default_factory=list)
    _changes: list[tuple[float, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.period_s = self.spec.sync_period_s
        self._recommended.append((0.0, self.replicas))  # the controller begins with what it finds

    def desired(self, now_s: float, fleet: Observed) -> int:
        """Replicas from now on."""
        now, spec = fleet.replicas, self.spec
        if now > spec.max_replicas:
            found = spec.max_replicas
        elif now < spec.min_replicas:
            found = spec.min_replicas
        else:
            found = self._bounded(now_s, now, self._stabilized(now_s, now, self.proposal(now_s, fleet)))
        if found != now:
            self._changes.append((now_s, found - now))
        return found

    def _stabilized(self, now_s: float, replicas: int, asked: int) -> int:
        up, down = self.spec.scale_up.stabilization_window_s, self.spec.scale_down.stabilization_window_s
        self._recommended = [each for each in self._recommended if each[0] > now_s - max(up, down)]
        low = min([asked, *(found for at, found in self._recommended if at > now_s - up)])
        high = max([asked, *(found for at, found in self._recommended if at > now_s - down)])
        self._recommended.append((now_s, asked))
        return min(max(replicas, low), high)

    def _bounded(self, now_s: float, replicas: int, wanted: int) -> int:
        spec = self.spec
        if wanted > replicas:
            limit = max(self._limit(now_s, replicas, spec.scale_up, up=True), replicas)
            return min(wanted, spec.max_replicas, limit)
        if wanted < replicas:
            limit = min(self._limit(now_s, replicas, spec.scale_down, up=False), replicas)
            return max(wanted, spec.min_replicas, limit)
        return wanted

    def _limit(self, now_s: float, replicas: int, rules: ScalingRules, *, up: bool) -> int:
        """How far the policies let the replicas go, counted from those at the start of each period."""
        if rules.select_policy == "disabled":
            return replicas
        limits = []
        for policy in rules.policies:
            began = replicas - sum(change for at, change in self._changes if at > now_s - policy.period_s)
            share = policy.value / 100
            if policy.type == "pods":
                limits.append(began + policy.value if up else began - policy.value)
            else:
                limits.append(
                    math.ceil(_whole(began * (1 + share))) if up else int(_whole(began * (1 - share)))
                )
        farthest = max if up == (rules.select_policy == "max") else min
        return farthest(limits)


@dataclass(slots=True)
class SaturationAnalyzer:
    """``wva_desired_replicas``, which stays between two analyses: one replica more or less, and none while
    what was asked for is not there yet."""

    spec: WvaSpec
    replicas: int
    _next_s: float = 0.0

    def __call__(self, now_s: float, fleet: Observed) -> int:
        """What an HPA follows: its AverageValue of 1 a replica."""
        if now_s >= self._next_s:
            self._next_s = now_s + self.spec.reconcile_interval_s
            self.replicas = self.analyze(fleet)
        return external_proposal(self.replicas, fleet.replicas, 1.0, self.spec.tolerance)

    def analyze(self, fleet: Observed) -> int:
        """AnalyzeModelSaturation and CalculateSaturationTargets, with one variant."""
        spec, count = self.spec, len(fleet.pods)
        if not count or fleet.starting or self.replicas != fleet.replicas:
            return self.replicas
        spare = [
            (spec.kv_cache_threshold - pod["max_kv_usage"], spec.queue_length_threshold - pod["max_waiting"])
            for pod in fleet.pods
        ]
        free = [(kv, queue) for kv, queue in spare if kv > 0 and queue > 0]
        kv = sum(each for each, _ in free) / max(len(free), 1)
        queue = sum(each for _, each in free) / max(len(free), 1)
        if kv < spec.kv_spare_trigger or queue < spec.queue_spare_trigger:
            return count + 1
        if len(free) < 2 or count <= 1:
            return count
        more = len(free) / (len(free) - 1)
        kv_left = spec.kv_cache_threshold - (spec.kv_cache_threshold - kv) * more
        queue_left = spec.queue_length_threshold - (spec.queue_length_threshold - queue) * more
        return count - (kv_left >= spec.kv_spare_trigger and queue_left >= spec.queue_spare_trigger)
