"""llm-d's plugins: which are modelled, which change nothing here, which are refused, by parameter.

A parameter is in ``reads`` of its plugin's kind, or in ``idle`` with the reason why it has no effect, or in
``refused`` with the reason why it is not modelled. Names are dotted paths, and stand for all beneath them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Role = Literal["handler", "decider", "filter", "scorer", "picker", "producer", "idle", "refused"]


@dataclass(frozen=True, slots=True)
class Kind:
    """A type of plugin.

    Attributes:
        role: what it is in the model; ``idle`` changes nothing in where requests go, ``refused`` is not
            modelled.
        why: of an idle or refused one.
        takes_all: it reads none of its parameters, whatever they are.
        in_profile: it matters only where a profile names it.
    """

    role: Role
    why: str = ""
    reads: tuple[str, ...] = ()
    idle: Mapping[str, str] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    takes_all: bool = False
    in_profile: bool = False


_ONE = {"maxNumOfEndpoints": "the request goes to the first of several"}
_BLOCKS = ("autoTune", "hashBlockSize", "blockSize", "blockSizeTokens", "maxPrefixBlocksToMatch")
_INDEX = (*_BLOCKS, "maxPrefixTokensToMatch", "lruCapacityPerServer")
_SHIFTED = "blocks are compared by their content, not by hashes"
_EVENTS = "events arrive event_lag_s after they happen, over whatever way"
_PRECISE = Kind(
    "producer",
    reads=(
        "tokenProcessorConfig.blockSize",
        "tokenProcessorConfig.blockSizeTokens",
        "indexerConfig.tokenProcessorConfig.blockSize",
        "indexerConfig.tokenProcessorConfig.blockSizeTokens",
        "indexerConfig.kvBlockIndexConfig.inMemoryConfig",
        "indexerConfig.prefixStoreConfig",
        "speculativeIndexing",
        "speculativeTTL",
    ),
    idle={
        "tokenProcessorConfig.hashSeed": _SHIFTED,
        "tokenProcessorConfig.hashAlgorithm": _SHIFTED,
        "indexerConfig.tokenProcessorConfig.hashSeed": _SHIFTED,
        "indexerConfig.kvBlockIndexConfig.enableMetrics": "metrics are not exported",
        "indexerConfig.kvBlockIndexConfig.metricsLoggingInterval": "metrics are not exported",
        "indexerConfig.kvBlockIndexConfig.maxPrefixBlocksToMatch": "no release reads it",
        "indexerConfig.tokenizersPoolConfig": "tokenizing takes no time",
        "indexerConfig.speculativeIndexing": "no release reads it inside indexerConfig",
        "kvEventsConfig": _EVENTS,
        "kvCacheRedisAddr": "the index is in memory",
        "mode": "it named this plugin",
    },
    refused={
        "indexerConfig.kvBlockIndexConfig.redisConfig": "an index in Redis is not modelled",
        "indexerConfig.kvBlockIndexConfig.costAwareMemoryConfig": "its size is not modelled",
        "indexerConfig.kvCacheBackendConfigs": "KV blocks outside the GPU are not modelled",
    },
)
_SESSION = Kind(
    "scorer",
    reads=("strategy", "sessionIdConfig.evictionTtlSeconds"),
    idle={
        "headerName": "the session is the request's group",
        "encodedEndpointHeaderConfig": "the session is the request's group",
        "sessionIdConfig": "the session is the request's group",
        "profileName": "sessions stay on the server that decodes",
    },
)
_SCRAPE = {
    name: "scraping takes router_options.scrape_delay_s, however it is done"
    for name in (
        "scheme", "path", "port", "insecureSkipVerify", "caCertPath", "clientCertPath", "clientKeyPath"
    )
}  # fmt: skip
_PEERS = "KV blocks that one prefill server fetches from another are not modelled"
_SPLITS = Kind(
    "handler",
    reads=("decodeProfile", "prefillProfile", "deciderPluginName", "threshold", "hashBlockSize"),
    idle={
        "primaryPort": "a replica is an endpoint, whatever its port",
        "prefixPluginType": "the decider reads the approximate index",
        "prefixPluginName": "the decider reads the approximate index",
        "prefixMatchInfoProducerName": "the decider reads the approximate index",
    },
)
_PREDICTOR = "it asks a latency predictor that is trained while it serves"
_SELECTS = ("label", "validValues", "allowsNoLabel", "matchLabels", "matchExpressions")
_LABELS = "replicas have no labels here"
_CLUSTERS = "clusters as endpoints are not modelled"
_MEDIA = "multimodal inputs are not modelled"
_TEST = "it is a plugin of the picker's own tests"
_PARSES = "prompts are known without parsing"
_FLOW = "nothing queues in the picker without flow control"
_SHEDS = "only requests of negative priority are shed"


_SCHEDULES = re.compile(r"-(filter|scorer)$|^context-length-aware$")


def _idle(why: str, *names: str) -> dict[str, Kind]:
    return {name: Kind("idle", why, takes_all=True) for name in names}


def _refused(why: str, *names: str) -> dict[str, Kind]:
    return {name: Kind("refused", why, in_profile=_SCHEDULES.search(name) is not None) for name in names}


KINDS: dict[str, Kind] = {
    "single-profile-handler": Kind("handler", takes_all=True),
    "data-parallel-profile-handler": Kind(
        "handler", idle={"primaryPort": "a replica is an endpoint, whatever its port"}
    ),
    "max-score-picker": Kind("picker", idle=_ONE),
    "random-picker": Kind("picker", idle=_ONE),
    "weighted-random-picker": Kind("picker", idle=_ONE),
    "queue-scorer": Kind("scorer", takes_all=True),
    "kv-cache-utilization-scorer": Kind("scorer", takes_all=True),
    "running-requests-size-scorer": Kind("scorer", takes_all=True),
    "lora-affinity-scorer": Kind("scorer", takes_all=True),
    "load-aware-scorer": Kind("scorer", reads=("threshold",)),
    "active-request-scorer": Kind(
        "scorer", reads=("requestTimeout", "idleThreshold", "maxBusyScore", "inFlightLoadProducerName")
    ),
    "token-load-scorer": Kind("scorer", reads=("queueThresholdTokens", "inFlightLoadProducerName")),
    "prefix-cache-scorer": Kind(
        "scorer",
        reads=(*_INDEX, "prefixMatchInfoProducerName", "matchLengthWeight", "matchLengthScaleTokens"),
        idle={"mode": "it names the approximate index"},
    ),
    "precise-prefix-cache-scorer": Kind("scorer", "", _PRECISE.reads, _PRECISE.idle, _PRECISE.refused),
    "session-affinity-scorer": _SESSION,
    "no-hit-lru-scorer": Kind(
        "scorer",
        reads=("prefixPluginName", "lruSize", "prefixMatchInfoProducerName"),
        idle={"prefixPluginType": "the plugin is found by its name"},
    ),
    "disagg-profile-handler": Kind(
        "handler",
        reads=(*_SPLITS.reads[:3], "profiles", "deciders", "stageOrder", "prefillDeciderPluginName"),
        idle=dict.fromkeys(("encodeProfile", "encodeDeciderPluginName"), "prompts are text"),
    ),
    "pd-profile-handler": _SPLITS,
    "always-disagg-pd-decider": Kind("decider", takes_all=True),
    "prefix-based-pd-decider": Kind("decider", reads=("nonCachedTokens", "promptTokens")),
    "decode-filter": Kind("filter", takes_all=True),
    "prefill-filter": Kind("filter", takes_all=True),
    **{
        name: Kind("filter", reads=_SELECTS)
        for name in ("by-label", "by-label-selector", "label-selector-filter")
    },
    "prefix-cache-affinity-filter": Kind(
        "filter",
        reads=(
            "affinityThreshold",
            "explorationProbability",
            "maxTTFTPenaltyMs",
            "maxTokensInFlightPenalty",
            "ttftSource",
            "peakPrefillThroughput",
            "prefixMatchInfoProducerName",
            "inFlightLoadProducerName",
        ),
        idle={"latencyPredictionInfoProducerName": "its ttftSource is not the latency predictor"},
        refused={"prefillCalibrationFile": "write its rate as peakPrefillThroughput"},
    ),
    "utilization-filter": Kind("filter", reads=("conditions", "fallbackOnEmpty", "inFlightLoadProducerName")),
    "session-affinity-filter": Kind("filter", "", _SESSION.reads, _SESSION.idle),
    "approx-prefix-cache-producer": Kind("producer", reads=_INDEX),
    "precise-prefix-cache-producer": _PRECISE,
    "inflight-load-producer": Kind(
        "producer",
        reads=(
            "addEstimatedOutputTokens",
            "outputRatio",
            "maxEstimatedOutputTokens",
            "prefixMatchInfoProducerName",
        ),
        idle={"syncCrossReplicaState": "there is one picker"},
    ),
    **_idle("tokenizing takes no time", "token-producer", "tokenizer"),
    "metrics-data-source": Kind(
        "idle",
        "gauges are scraped as router_options say",
        idle=_SCRAPE,
        refused={"interval": "write it as router_options.scrape_interval_s"},
    ),
    **_idle(
        "gauges are scraped as router_options say", "core-metrics-extractor", "model-server-protocol-metrics"
    ),
    **_idle(
        "nothing that is modelled reads it",
        "models-data-source",
        "models-data-extractor",
        "model-server-protocol-models",
        "dcgm-data-source",
        "dcgm-extractor",
        "topology-extractor",
        "session-id-producer",
        "mm-embeddings-cache-producer",
        "request-attribute-reporter",
        "agent-identity",
    ),
    **_idle(
        "the endpoints are the fleet's replicas",
        "endpoint-notification-source",
        "k8s-notification-source",
        "file-discovery",
    ),
    **_idle(
        _PARSES,
        "openai-parser",
        "anthropic-parser",
        "vllmhttp-parser",
        "vllmgrpc-parser",
        "sglanghttp-parser",
        "vertexai-parser",
        "passthrough-parser",
    ),
    **_idle(
        _FLOW,
        "global-strict-fairness-policy",
        "round-robin-fairness-policy",
        "program-aware-fairness",
        "fcfs-ordering-policy",
        "edf-ordering-policy",
        "slo-deadline-ordering-policy",
        "static-usage-limit-policy",
        "priority-holdback-policy",
        "soft-reflective-ceiling-policy",
        "sheddable-eviction-filter",
        "priority-then-time-eviction-order-policy",
        "concurrency-detector",
    ),
    **_idle(_SHEDS, "utilization-detector", "probabilistic-admitter"),
    **_idle(
        "the way to the prompt's server is known without headers",
        "disagg-headers-handler",
        "prefill-header-handler",
    ),
    **_idle("prompts are text", "always-disagg-multimodal-decider"),
    **_refused("encoders on servers of their own are not modelled", "encode-filter"),
    **_refused(_PEERS, "p2p-source-producer"),
    **_refused(
        _PREDICTOR,
        "predicted-latency-producer",
        "predicted-latency-scorer",
        "latency-scorer",
        "latency-slo-admitter",
        "slo-headroom-tier-filter",
        "slo-aware-routing",
        "slo-aware-profile-handler",
    ),
    **_refused(
        _LABELS,
        "context-length-aware",
        "header-label-affinity-scorer",
        "topology-affinity-filter",
        "topology-affinity-scorer",
        "disaggregatedset-rollout-screener",
    ),
    **_refused("requests have no headers here", "header-profile-handler"),
    **_refused(_MEDIA, "mm-embeddings-cache-scorer"),
    **_refused(
        "the GPU's own metrics are not modelled", "endpoint-attribute-filter", "endpoint-attribute-scorer"
    ),
    **_refused(
        "holding requests back to route them as a batch is not modelled", "burst-prefix-cache-producer"
    ),
    **_refused(
        _CLUSTERS,
        "multicluster-approx-prefix-cache-producer",
        "multicluster-file-discovery",
        "multicluster-kv-cache-utilization-scorer",
        "multicluster-metrics-data-source",
        "multicluster-metrics-extractor",
        "multicluster-prefix-cache-scorer",
        "multicluster-queue-scorer",
        "multicluster-session-affinity-filter",
    ),
    **_refused(
        "filters of the first releases are not modelled",
        "decision-tree-filter",
        "least-queue-filter",
        "least-kv-cache-filter",
        "low-queue-filter",
        "lora-affinity-filter",
    ),
    **_refused(_TEST, "header-based-testing-filter", "destination-endpoint-served-verifier"),
}
BEFORE_1_4 = frozenset(  # of those that are modelled; the others came with v1.4 or later
    {
        *(name for name, kind in KINDS.items() if kind.role in ("handler", "picker", "scorer", "refused")),
        "by-label",
        "by-label-selector",
        "decode-filter",
        "prefill-filter",
        "prefill-header-handler",
        "metrics-data-source",
        "model-server-protocol-metrics",
    }
    - {"token-load-scorer", "disagg-profile-handler"}
)
ALIASES = {"kv-cache-scorer": "kv-cache-utilization-scorer"}
GATES = {  # feature gate -> why it has no effect, None where it is not modelled
    "dataLayer": "gauges are scraped as router_options say",
    "prepareDataPlugins": "prompts are hashed at no cost in time",
    "enableLegacyMetrics": "metrics are not exported",
    "haPopulateNonLeaderDatastore": "there is one picker",
    "flowControl": None,
}
