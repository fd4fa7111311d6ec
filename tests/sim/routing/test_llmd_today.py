"""llm-d's router of today: what its configurations say, as peers' own examples do, and where requests go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from llmd_pods import Clock, Pod, pods, request, stored, totals
from small_scenarios import open_loop, small

from servecast.sim.compare.compare import compare
from servecast.sim.engine.request import Request
from servecast.sim.inputs.errors import InputError
from servecast.sim.routing.gauges import Gauges
from servecast.sim.routing.llmd.config import parse_epp, read_document, read_epp
from servecast.sim.routing.llmd.cycle import Cycle
from servecast.sim.routing.llmd.endpoint_picker import EndpointPicker
from servecast.sim.routing.llmd.plugin import EppConfig
from servecast.sim.routing.llmd.release import EPP_RELEASES, NEWEST
from servecast.sim.routing.options import RouterOptions
from servecast.sim.routing.prompt_blocks import PromptBlocks
from servecast.sim.run.simulate import simulate

OLD, TODAY = "inference.networking.x-k8s.io/v1alpha1", "llm-d.ai/v1alpha1"


def parsed(text: str, release: str = NEWEST, group: str = TODAY) -> EppConfig:
    head = f"apiVersion: {group}\nkind: EndpointPickerConfig\n"
    return parse_epp(yaml.safe_load(head + text), release, source="epp.yaml")


def picking(text: str, release: str = NEWEST, clock: Clock | None = None) -> EndpointPicker:
    options = RouterOptions(epp_release=release)
    return EndpointPicker(parsed(text, release), options, np.random.default_rng(0), clock or Clock())


def refusal(text: str, release: str = NEWEST, group: str = TODAY) -> str:
    with pytest.raises(InputError) as caught:
        parsed(text, release, group)
    return str(caught.value)


# ---- what loads -------------------------------------------------------------------------------------

BASELINE = """
plugins:
- type: queue-scorer
- type: prefix-cache-scorer
schedulingProfiles:
- name: default
  plugins:
  - {pluginRef: queue-scorer, weight: 2}
  - {pluginRef: prefix-cache-scorer, weight: 3}
"""
PRECISE = """
plugins:
- type: token-producer
  parameters: {modelName: some/model, vllm: {url: "http://render:8000"}}
- type: endpoint-notification-source
- type: metrics-data-source
- type: core-metrics-extractor
- type: decode-filter
- type: precise-prefix-cache-producer
  parameters:
    tokenProcessorConfig: {blockSize: 64, hashSeed: "42"}
    indexerConfig: {kvBlockIndexConfig: {enableMetrics: true}}
    kvEventsConfig: {topicFilter: "kv@", concurrency: 8, discoverPods: true}
- type: prefix-cache-scorer
  parameters: {prefixMatchInfoProducerName: precise-prefix-cache-producer}
- type: queue-scorer
dataLayer:
  sources:
  - pluginRef: metrics-data-source
    extractors: [{pluginRef: core-metrics-extractor}]
  - pluginRef: endpoint-notification-source
    extractors: [{pluginRef: precise-prefix-cache-producer}]
schedulingProfiles:
- name: default
  plugins:
  - pluginRef: decode-filter
  - {pluginRef: prefix-cache-scorer, weight: 3.0}
  - {pluginRef: queue-scorer, weight: 2.0}
"""
TOKENS = """
plugins:
- type: token-load-scorer
- type: inflight-load-producer
- type: approx-prefix-cache-producer
  parameters: {maxPrefixTokensToMatch: 40960}
- type: prefix-cache-affinity-filter
  parameters: {affinityThreshold: 0.80, maxTokensInFlightPenalty: 286720, maxTTFTPenaltyMs: 0}
schedulingProfiles:
- name: default
  plugins: [{pluginRef: prefix-cache-affinity-filter}, {pluginRef: token-load-scorer}]
"""
TIERS = """
plugins:
- type: no-hit-lru-scorer
- {type: approx-prefix-cache-producer, name: gpu}
- {type: approx-prefix-cache-producer, name: cpu, parameters: {autoTune: false, lruCapacityPerServer: 10000}}
- {type: prefix-cache-scorer, name: on-gpu, parameters: {prefixMatchInfoProducerName: gpu}}
- {type: prefix-cache-scorer, name: on-cpu, parameters: {prefixMatchInfoProducerName: cpu}}
schedulingProfiles:
- name: default
  plugins: [{pluginRef: on-gpu}, {pluginRef: on-cpu}, {pluginRef: no-hit-lru-scorer}]
"""


@pytest.mark.parametrize(
    "text", [BASELINE, PRECISE, TOKENS, TIERS], ids=["base", "precise", "tokens", "tiers"]
)
@pytest.mark.parametrize("release", ["v1.4", "v1.5", "router-v0.9", "router-v0.10"])
def test_configurations_of_today_load_as_written(text: str, release: str) -> None:
    """Handler and picker are defaults; the request goes somewhere."""
    epp = picking(text, release)
    assert parsed(text, release).picker.type == "max-score-picker"
    backends = [Pod(0, block_size=64), Pod(1, block_size=64)]
    epp.connect(backends)
    assert epp.pick(request(0, 640, (1, 640)), backends) in (0, 1)


def test_the_newest_release_is_the_default() -> None:
    assert RouterOptions().epp_release == NEWEST == "router-v0.10"
    assert next(iter(EPP_RELEASES)) == "v0.5"


def test_what_has_no_effect_is_listed_with_its_reason() -> None:
    notes = parsed(PRECISE).notes
    assert "token-producer (tokenizing takes no time)" in notes
    assert (
        "precise-prefix-cache-producer.kvEventsConfig "
        "(events arrive event_lag_s after they happen, over whatever way)"
    ) in notes
    assert (
        "precise-prefix-cache-producer.tokenProcessorConfig.hashSeed "
        "(blocks are compared by their content, not by hashes)"
    ) in notes
    assert not [note for note in notes if "blockSize" in note]


def test_what_another_parameter_overrides_is_told() -> None:
    """autoTune, on by default, takes the servers' sizes; the token limit, 131,072 by default, comes before
    that of blocks."""
    text = """
plugins:
- type: approx-prefix-cache-producer
  parameters: {blockSizeTokens: 64, lruCapacityPerServer: 9, maxPrefixBlocksToMatch: 256}
- type: prefix-cache-scorer
"""
    assert parsed(text).notes == (
        "approx-prefix-cache-producer.blockSizeTokens (autoTune takes the servers' sizes)",
        "approx-prefix-cache-producer.lruCapacityPerServer (autoTune takes the servers' sizes)",
        "approx-prefix-cache-producer.maxPrefixBlocksToMatch (maxPrefixTokensToMatch, 131,072, counts)",
    )


def test_helm_values_hold_a_configuration(tmp_path: Path) -> None:
    """llm-d's guides ship it as text under router.epp, earlier ones under inferenceExtension."""
    text = f"apiVersion: {TODAY}\nkind: EndpointPickerConfig\n{BASELINE}"
    chart = {"pluginsConfigFile": "b.yaml", "pluginsCustomConfig": {"a.yaml": "x", "b.yaml": text}}
    for values in ({"router": {"epp": chart}}, {"inferenceExtension": chart}):
        path = tmp_path / "values.yaml"
        path.write_text(yaml.safe_dump(values))
        assert read_document(path)["kind"] == "EndpointPickerConfig"
        assert [weight for _scorer, weight in read_epp(path, NEWEST).scorers] == [2.0, 3.0]


REFUSED = {
    "encoders": (
        "plugins: [{type: encode-filter}]",
        "schedulingProfiles.0.plugins.0.pluginRef: plugin 'encode-filter': encoders on servers of their own",
    ),
    "flow control": (
        f"featureGates: [flowControl]\n{BASELINE}",
        "featureGates.0: flow control is not modelled: it holds requests in the picker",
    ),
    "unknown gate": (f"featureGates: [dataLayers]\n{BASELINE}", "no feature gate 'dataLayers'. Did you mean"),
    "predictor": (
        "plugins: [{type: latency-scorer}]",
        "schedulingProfiles.0.plugins.0.pluginRef: plugin 'latency-scorer': it asks a latency predictor",
    ),
    "labels": ("plugins: [{type: topology-affinity-scorer}]", "replicas have no labels here"),
    "GPU metrics": ("plugins: [{type: endpoint-attribute-filter}]", "the GPU's own metrics are not modelled"),
    "Redis": (
        "plugins: [{type: precise-prefix-cache-producer, parameters: "
        "{indexerConfig: {kvBlockIndexConfig: {redisConfig: {address: a}}}}}]",
        "indexerConfig.kvBlockIndexConfig.redisConfig.address: an index in Redis is not modelled",
    ),
    "scrape interval": (
        "plugins: [{type: metrics-data-source, parameters: {interval: 1s}}]",
        "interval: write it as router_options.scrape_interval_s",
    ),
    "no metrics": (
        f"dataLayer: {{injectDefaults: false}}\n{BASELINE}",
        "a picker without metrics is not modelled",
    ),
    "no prompts": (
        f"requestHandler: {{parsers: [{{pluginRef: passthrough-parser}}]}}\n{BASELINE}",
        "requestHandler.parsers: a picker that does not see the prompts, but scores them",
    ),
    "latency predictor as source": (
        "plugins: [{type: prefix-cache-affinity-filter, parameters: {ttftSource: latencyPredictor}}]",
        "ttftSource latencyPredictor asks a predictor",
    ),
    "misspelt parameter": (
        "plugins: [{type: load-aware-scorer, parameters: {treshold: 9}}]",
        "load-aware-scorer has no parameter 'treshold'. Did you mean 'threshold'?",
    ),
    "a plugin of one's own": ("plugins: [{type: my-plugin}]", "Plugins of your own are not modelled."),
    "unnamed producer": (
        "plugins: [{type: prefix-cache-scorer, parameters: {prefixMatchInfoProducerName: x}}]",
        "there is no producer named 'x'",
    ),
    "reference to nothing": (
        f"dataLayer: {{sources: [{{pluginRef: metrics-source}}]}}\n{BASELINE}",
        "dataLayer.sources.0.pluginRef: there is no plugin named 'metrics-source'",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_the_message_names_the_first_true_obstacle(name: str) -> None:
    text, message = REFUSED[name]
    with pytest.raises(InputError) as caught:
        picking(text)
    assert message in str(caught.value)
    assert "epp_release" not in str(caught.value)


def test_the_obstacle_is_not_the_release_where_no_release_takes_it() -> None:
    """v0.5 knows neither the group nor the plugin; what stands in the way is the plugin."""
    assert "the GPU's own metrics are not" in refusal("plugins: [{type: endpoint-attribute-filter}]", "v0.5")


@pytest.mark.parametrize(
    ("text", "release", "group", "message"),
    [
        (
            BASELINE,
            "v0.5",
            TODAY,
            "apiVersion is 'llm-d.ai/v1alpha1'. Write inference.networking.x-k8s.io/v1",
        ),
        (
            TOKENS,
            "v1.3",
            OLD,
            "unknown plugin 'token-load-scorer'. Endpoint picker v1.3 has none of this type.",
        ),
        (PRECISE, "v1.0", OLD, "unknown field 'dataLayer'"),
    ],
)
def test_a_later_release_that_takes_it_is_named(text: str, release: str, group: str, message: str) -> None:
    said = refusal(text, release, group)
    assert message in said
    assert said.endswith("epp_release router-v0.10 takes it as written.")


@pytest.mark.parametrize(
    ("name", "release"), [("hashBlockSize", "v1.0"), ("autoTune", "v1.4"), ("lruCapacityPerServer", "v1.1")]
)
def test_an_earlier_release_that_takes_it_is_named(name: str, release: str) -> None:
    """The prefix scorer had an index of its own up to v1.4; the newest where the parameter has an effect."""
    value = "false" if name == "autoTune" else "64"
    said = refusal(f"plugins: [{{type: prefix-cache-scorer, parameters: {{{name}: {value}}}}}]", group=OLD)
    assert f"{name} is a parameter of approx-prefix-cache-producer, not of prefix-cache-scorer" in said
    assert said.endswith(f"epp_release {release} takes it as written.")


def test_a_plugin_that_no_profile_names_is_no_obstacle() -> None:
    text = """
plugins: [{type: prefill-filter}, {type: by-label, parameters: {label: role, validValues: [decode]}},
          {type: queue-scorer}]
schedulingProfiles: [{name: x, plugins: [{pluginRef: queue-scorer}]}]
"""
    assert [plugin.type for plugin, _weight in parsed(text).scorers] == ["queue-scorer"]


def test_a_selector_of_pods_lets_the_whole_fleet_pass() -> None:
    """A fleet is of the replicas that it selects, and it is told."""
    text = "plugins: [{type: label-selector-filter, parameters: {matchLabels: {role: leader}}}]"
    assert kept(picking(text), request(0, 10), pods((0, 0), (0, 0))) == [0, 1]
    assert parsed(text).notes == (
        "label-selector-filter.matchLabels (all pass: the fleet is of those that are selected)",
    )


@pytest.mark.parametrize(
    "gate", ["dataLayer", "prepareDataPlugins", "enableLegacyMetrics", "flowControl=false"]
)
def test_gates_without_effect_load(gate: str) -> None:
    (note,) = parsed(f"featureGates: [{gate}]\nplugins: [{{type: queue-scorer}}]").notes
    assert note.startswith(f"feature gate {gate.partition('=')[0]} (")


# ---- the same router, written in other ways ---------------------------------------------------------


def compared(folder: Path, release: str, **configurations: str) -> list[float]:
    """Mean TTFT behind each, in ms, on a small fleet of blocks of 64."""
    fleet = {"replicas": 3, "router_options": {"epp_release": release}}
    scenario = small(
        folder,
        name="fleet",
        engine={"version": "0.32", "num_gpu_blocks_override": 300, "block_size": 64, "max_model_len": 2048},
        fleet=fleet,
        workload={
            **open_loop(30, 60, 100, 8),
            "content": {"kind": "shared_prefix", "groups": 12, "prefix_tokens": 1000},
        },
    )
    for name, text in configurations.items():
        (folder / f"{name}.yaml").write_text(text)
    routers = [str(folder / f"{name}.yaml") for name in configurations]
    answer = compare(scenario, routers=routers, seeds=1, jobs=1)
    return [side.results[0]["mean_ttft_ms"] for side in answer.sides]


def precise(group: str, parameters: dict[str, Any], weights: tuple[float, float] = (3.0, 2.0)) -> str:
    return yaml.safe_dump(
        {
            "apiVersion": group,
            "kind": "EndpointPickerConfig",
            "plugins": [
                {"type": "precise-prefix-cache-scorer", "parameters": parameters},
                {"type": "queue-scorer"},
            ],
            "schedulingProfiles": [
                {
                    "name": "default",
                    "plugins": [
                        {"pluginRef": "precise-prefix-cache-scorer", "weight": weights[0]},
                        {"pluginRef": "queue-scorer", "weight": weights[1]},
                    ],
                }
            ],
        }
    )


@pytest.mark.parametrize("release", ["v1.3", "v1.4", "router-v0.10"])
def test_the_place_of_the_block_size_and_the_producer_change_nothing(tmp_path: Path, release: str) -> None:
    """Beside indexerConfig, where it stands since scheduler v0.5, inside it as before, or at a producer of
    its own; and not at all, which is 16 and matches none of the servers' blocks up to v1.5."""
    of = {"tokenProcessorConfig": {"blockSize": 64}}
    texts = {
        "beside": precise(OLD, of),
        "inside": precise(OLD, {"indexerConfig": of}),
        "none": precise(OLD, {}),
    }
    if EPP_RELEASES[release].today:
        texts["producer"] = f"apiVersion: {TODAY}\nkind: EndpointPickerConfig\n{PRECISE}"
    beside, inside, none, *producer = compared(tmp_path, release, **texts)
    assert inside == beside
    assert producer in ([], [beside])
    assert (none == beside) == (release == "router-v0.10")


def test_block_sizes_in_tokens_and_in_characters_are_the_same(tmp_path: Path) -> None:
    """64 tokens of 4 characters, under v1.4; one in tokens of which 16 are a block is another."""
    texts = {
        name: yaml.safe_dump(
            {
                "apiVersion": OLD,
                "kind": "EndpointPickerConfig",
                "plugins": [
                    {"type": "prefix-cache-scorer", "parameters": {"autoTune": False, **parameters}},
                    {"type": "running-requests-size-scorer"},
                ],
            }
        )
        for name, parameters in (
            ("tokens", {"blockSizeTokens": 256}),
            ("characters", {"blockSize": 1024}),
            ("small", {"blockSizeTokens": 16}),
        )
    }
    tokens, characters, _small = compared(tmp_path, "v1.4", **texts)
    assert tokens == characters


# ---- scorers, filters, producers --------------------------------------------------------------------


def test_active_requests_of_today_have_an_idle_threshold_and_a_most_busy_score() -> None:
    """Three in flight at pod 0, one at pod 1, none at 2: (3-3)/3 and (3-1)/3 of 0.5; 1 for one or fewer. They
    never time out."""
    clock = Clock()
    for idle, expected in ((0, [0.0, 1 / 3, 1.0]), (1, [0.0, 1.0, 1.0])):
        parameters = f"{{idleThreshold: {idle}, maxBusyScore: 0.5}}"
        text = f"plugins: [{{type: active-request-scorer, parameters: {parameters}}}]"
        epp = picking(text, clock=clock)
        backends = pods((0, 0), (0, 0), (0, 0))
        for number in range(3):
            epp.pick(request(number, 10), backends[:1])
        epp.pick(request(3, 10), backends[1:2])
        clock.now += 1000.0
        assert totals(epp, backends) == pytest.approx(expected)


def test_token_load_counts_what_is_not_cached_until_the_first_token() -> None:
    """Of 1,000 tokens that fill the score, 640 of a prompt wait at pod 0. A prompt of 320 that nobody has:
    1 - 960/1000 and 1 - 320/1000. The same prompt again is cached on pod 0: 1 - 640/1000 there. With the
    first token the 640 are gone; the request stays until its end."""
    text = """
plugins: [{type: token-load-scorer, parameters: {queueThresholdTokens: 1000}}, {type: inflight-load-producer},
          {type: approx-prefix-cache-producer}, {type: active-request-scorer}]
schedulingProfiles: [{name: x, plugins: [{pluginRef: token-load-scorer}]}]
"""
    epp, backends = picking(text), pods((0, 0), (0, 0))
    first = request(0, 640, (1, 640))
    assert epp.pick(first, backends[:1]) == 0
    assert totals(epp, backends, request(1, 320, (2, 320))) == pytest.approx([0.04, 0.68])
    assert totals(epp, backends, request(2, 640, (1, 640))) == pytest.approx([0.36, 0.36])
    epp.answered(first, 0)
    assert totals(epp, backends, request(3, 320, (3, 320))) == pytest.approx([0.68, 0.68])
    epp.ended(first, 0)
    assert totals(epp, backends, request(4, 320, (4, 320))) == pytest.approx([0.68, 0.68])


def test_output_tokens_may_be_estimated() -> None:
    """1.5 times the prompt, at most max_tokens (1 in these requests): 320 + 1 of 1,000, until the end."""
    text = """
plugins: [{type: token-load-scorer, parameters: {queueThresholdTokens: 1000}},
          {type: inflight-load-producer, parameters: {addEstimatedOutputTokens: true}}]
schedulingProfiles: [{name: x, plugins: [{pluginRef: token-load-scorer}]}]
"""
    epp, backends = picking(text), pods((0, 0), (0, 0))
    first = request(0, 320)
    epp.pick(first, backends[:1])
    epp.answered(first, 0)
    assert totals(epp, backends, request(1, 320)) == pytest.approx([1 - 0.642, 1 - 0.321])
    epp.ended(first, 0)
    assert totals(epp, backends, request(2, 320)) == pytest.approx([1 - 0.321] * 2)


AFFINITY = """
plugins: [{type: prefix-cache-affinity-filter, parameters: PARAMETERS}, {type: random-picker},
          {type: inflight-load-producer}, {type: approx-prefix-cache-producer}]
"""


@pytest.mark.parametrize(
    ("parameters", "sticks"),
    [
        ("{maxTTFTPenaltyMs: 0}", True),
        ("{}", True),
        ("{maxTTFTPenaltyMs: 100, peakPrefillThroughput: 6000}", False),
        ("{maxTTFTPenaltyMs: 110, peakPrefillThroughput: 6000}", True),
        ("{maxTTFTPenaltyMs: 0, maxTokensInFlightPenalty: 639}", False),
        ("{maxTTFTPenaltyMs: 0, maxTokensInFlightPenalty: 640}", True),
    ],
)
def test_a_prefix_sticks_until_the_wait_is_too_long(parameters: str, sticks: bool) -> None:
    """A prompt of 640 tokens waits at pod 0: 106.7 ms at 6,000 tokens a second. The same again goes there,
    unless that is more than the penalty, or 640 more than the most tokens. Another prompt goes anywhere."""
    epp, backends = picking(AFFINITY.replace("PARAMETERS", parameters)), pods((0, 0), (0, 0))
    epp.pick(request(0, 640, (1, 640)), backends[:1])
    assert [kept(epp, request(2, 640, (text, 640)), backends) for text in (1, 3)] == [
        [0] if sticks else [0, 1],
        [0, 1],
    ]


def kept(epp: EndpointPicker, asked: Request, backends: list[Pod]) -> list[int]:
    """What the first filter leaves."""
    (each, *_rest) = epp._filters
    return list(each.keep(Cycle.among(asked, backends)))


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        ("{metric: waiting-queue, maxValue: 3}", [0, 2]),
        ("{metric: running-requests, maxValue: 10}", [0, 1]),
        ("{metric: kv-cache-utilization, maxValue: 0.5}", [0]),
        ("{metric: active-requests, maxValue: 0}", [1, 2]),
    ],
)
def test_utilization_filter_keeps_those_within_all_limits(condition: str, expected: list[int]) -> None:
    """Waiting 0, 9, 3; running 5, 10, 11; KV 0.5, 0.6, 0.7; a request of its own in flight at pod 0."""
    text = f"""
plugins: [{{type: utilization-filter, parameters: {{conditions: [{condition}]}}}}, {{type: random-picker}}]
"""
    epp = picking(text)
    values = ((0, 5, 0.5), (9, 10, 0.6), (3, 11, 0.7))
    backends = [Pod(i, Gauges(*each)) for i, each in enumerate(values)]
    idle = [Pod(0, Gauges()), *backends[1:]]
    epp.pick(request(0, 10), idle[:1])
    assert kept(epp, request(1, 10), backends) == expected
    nobody = [Pod(3, Gauges(99, 99, 0.99))]
    assert kept(epp, request(1, 10), nobody) == ([0] if "active" in condition else [])
    fallback = picking(text.replace("conditions", "fallbackOnEmpty: true, conditions"))
    assert kept(fallback, request(1, 10), nobody) == [0]


def test_a_request_that_no_replica_may_take_has_failed(tmp_path: Path) -> None:
    (tmp_path / "epp.yaml").write_text(
        f"apiVersion: {TODAY}\nkind: EndpointPickerConfig\nplugins: [{{type: utilization-filter, parameters: "
        "{conditions: [{metric: active-requests, maxValue: 0}]}}]\n"
    )
    scenario = small(
        tmp_path, fleet={"replicas": 2, "router": "epp.yaml"}, workload=open_loop(1000, 10, 64, 8)
    )
    run = simulate(scenario)
    assert run.requests["status"].value_counts().to_dict() == {"failed": 8, "finished": 2}
    assert run.meta["failures"] == {"the router let no replica pass (503)": 8}


def test_session_affinity_filter_pins_a_session_while_its_home_is_there() -> None:
    """By its answer, or by its first request with session_id, which forgets after evictionTtlSeconds."""
    backends = pods((0, 0), (0, 0))
    epp = picking("plugins: [{type: session-affinity-filter}, {type: random-picker}]")
    epp.ended(request(0, 10, group=7), 1)
    assert {epp.pick(request(1, 10, group=7), backends) for _ in range(20)} == {1}
    assert {epp.pick(request(1, 10, group=7), backends[:1]) for _ in range(5)} == {0}
    assert {epp.pick(request(2, 10, group=8), backends) for _ in range(50)} == {0, 1}
    clock = Clock()
    text = """
plugins: [{type: session-affinity-filter, parameters: {strategy: session_id,
           sessionIdConfig: {evictionTtlSeconds: 60}}}, {type: random-picker}]
"""
    epp = picking(text, clock=clock)
    home = epp.pick(request(0, 10, group=7), backends)
    assert {epp.pick(request(1, 10, group=7), backends) for _ in range(20)} == {home}
    clock.now = 61.0
    homes = set()
    for number in range(20):
        homes.add(epp.pick(request(number, 10, group=7), backends))
        clock.now += 61.0
    assert homes == {0, 1}


def test_precise_scores_of_today_are_shares_of_the_prompt() -> None:
    """Of 10 blocks pods hold 8, 10 and none: 0.8, 1 and 0. Up to v1.5 the weakest holder counts like none. A
    server with blocks of 32 tokens that holds 4 of its 5 holds 8 of 16."""
    text = """
plugins: [{type: precise-prefix-cache-producer, name: mine},
          {type: prefix-cache-scorer, parameters: {prefixMatchInfoProducerName: mine}}]
"""
    asked = request(0, 160, (1, 160))
    for release, expected in (("router-v0.10", [0.8, 1.0, 0.0, 0.8]), ("v1.5", [0.0, 1.0, 0.0, 0.0])):
        backends = [*pods((0, 0), (0, 0), (0, 0)), Pod(3, block_size=32)]
        epp = picking(text, release)
        epp.connect(backends)
        backends[0].events, backends[1].events = [stored(asked, 8)], [stored(asked, 10)]
        backends[3].events = [stored(asked, 4, size=32)]
        assert totals(epp, backends, asked) == pytest.approx(expected)


def test_a_prompt_counts_as_cached_where_it_was_sent_for_two_seconds() -> None:
    """speculativeIndexing; what the server says it has stored stays."""
    text = """
plugins: [{type: precise-prefix-cache-scorer, parameters: {speculativeIndexing: true}}]
"""
    clock, backends, asked = Clock(), pods((0, 0), (0, 0)), request(0, 160, (1, 160))
    epp = picking(text, clock=clock)
    epp.connect(backends)
    assert epp.pick(asked, backends[:1]) == 0
    assert totals(epp, backends, asked) == [1.0, 0.0]
    clock.now = 2.0
    assert totals(epp, backends, asked) == [0.0, 0.0]
    epp.pick(asked, backends[1:])
    backends[1].events = [stored(asked, 5)]
    assert totals(epp, backends, asked) == [0.0, 1.0]
    clock.now = 4.0
    assert totals(epp, backends, asked) == [0.0, 0.5]


def test_the_length_of_a_match_may_count() -> None:
    """Half by length: 1,024 of 8,192 tokens are 1/8, squared 1/64; all of the prompt is a ratio of 1."""
    text = """
plugins: [{type: prefix-cache-scorer, parameters: {matchLengthWeight: 0.5}}]
"""
    epp, backends, asked = picking(text), pods((0, 0), (0, 0)), request(0, 1024, (1, 1024))
    epp.pick(asked, backends[:1])
    assert totals(epp, backends, asked) == pytest.approx([0.5 / 64 + 0.5, 0.0])


def test_blocks_of_today_are_64_tokens_or_more_and_the_last_may_be_partial() -> None:
    """A prompt of 100 tokens is a block of 64 and one of 36. One of 64 + 136 tokens shares the first of its 4
    (64, 64, 64, 8) with it. The same prompt of 100 matches both."""
    epp, backends = picking("plugins: [{type: prefix-cache-scorer}]"), pods((0, 0), (0, 0))
    assert epp.pick(request(0, 100, (1, 64), (2, 100)), backends[:1]) == 0
    assert totals(epp, backends, request(1, 100, (1, 64), (2, 100))) == [1.0, 0.0]
    assert totals(epp, backends, request(2, 200, (1, 64))) == [0.25, 0.0]
    assert [len(PromptBlocks(64, 1.0, limit, partial=True).all(request(3, 100))) for limit in (None, 1)] == [
        2,
        1,
    ]


def test_no_hit_lru_of_today_asks_a_producer_by_its_name() -> None:
    """It spreads requests that hit nothing, wherever it stands; a warm one is 0.5 for all."""
    text = """
plugins: [{type: no-hit-lru-scorer, parameters: {prefixMatchInfoProducerName: mine}},
          {type: approx-prefix-cache-producer, name: mine}]
schedulingProfiles: [{name: x, plugins: [{pluginRef: no-hit-lru-scorer}]}]
"""
    epp, backends = picking(text), pods((0, 0), (0, 0))
    assert [epp.pick(request(number, 64, (number, 64)), backends) for number in range(3)] == [0, 1, 0]
    assert totals(epp, backends, request(9, 64, (1, 64))) == [0.5, 0.5]
