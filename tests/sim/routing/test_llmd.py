"""llm-d's endpoint picker, case by case: what its configuration says, and where requests go."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import yaml
from llmd_pods import Clock, Pod, pods, request, shares, stored, totals

from servecast.sim.engine.kv_events import BlockRemoved
from servecast.sim.inputs.errors import InputError
from servecast.sim.routing.gauges import Gauges
from servecast.sim.routing.llmd.config import parse_epp
from servecast.sim.routing.llmd.endpoint_picker import EndpointPicker
from servecast.sim.routing.options import RouterOptions
from servecast.sim.routing.prompt_blocks import PromptBlocks

HEAD = "apiVersion: inference.networking.x-k8s.io/v1alpha1\nkind: EndpointPickerConfig\n"


def picker(
    *scorers: tuple[str, float] | tuple[str, float, dict[str, Any]],
    pick: str = "max-score-picker",
    release: str = "v0.5",
    clock: Clock | None = None,
    seed: int = 0,
    bytes_per_token: float = 4.0,
) -> EndpointPicker:
    """An endpoint picker of these scorers: type, weight and parameters."""
    data = {
        "apiVersion": "inference.networking.x-k8s.io/v1alpha1",
        "kind": "EndpointPickerConfig",
        "plugins": [
            *({"type": kind, "parameters": (rest or [{}])[0]} for kind, _weight, *rest in scorers),
            {"type": pick},
            {"type": "single-profile-handler"},
        ],
        "schedulingProfiles": [
            {
                "name": "default",
                "plugins": [
                    *({"pluginRef": kind, "weight": weight} for kind, weight, *_rest in scorers),
                    {"pluginRef": pick},
                ],
            }
        ],
    }
    options = RouterOptions(epp_release=release, bytes_per_token=bytes_per_token)
    config = parse_epp(data, release, source="epp.yaml")
    return EndpointPicker(config, options, np.random.default_rng(seed), clock or Clock())


# ---- scorers ----------------------------------------------------------------------------------------


def test_queue_scorer_is_min_max() -> None:
    """Queues 5, 3, 4: (5-5)/2 = 0, (5-3)/2 = 1, (5-4)/2 = 0.5. A range of one is worth the whole score;
    equal queues give 1 to all."""
    epp = picker(("queue-scorer", 1))
    assert totals(epp, pods((5, 0), (3, 0), (4, 0))) == [0.0, 1.0, 0.5]
    assert totals(epp, pods((100, 0), (101, 0))) == [1.0, 0.0]
    assert totals(epp, pods((7, 0), (7, 0))) == [1.0, 1.0]


def test_kv_cache_scorer_is_absolute() -> None:
    """1 - usage, not stretched: 0.9 and 0.85 stay near each other. The old name means the same."""
    for name in ("kv-cache-scorer", "kv-cache-utilization-scorer"):
        assert totals(picker((name, 1)), pods((0, 0.1), (0, 0.15))) == pytest.approx([0.9, 0.85])


def test_running_requests_size_scorer_is_min_max_on_running() -> None:
    """Running 10, 20, 40: (40-10)/30 = 1, 20/30, 0."""
    backends = [Pod(i, Gauges(0, running, 0.0)) for i, running in enumerate((10, 20, 40))]
    assert totals(picker(("running-requests-size-scorer", 1)), backends) == pytest.approx([1, 2 / 3, 0])


def test_load_aware_scorer_falls_to_zero_at_its_threshold() -> None:
    """0 waiting: 0.5; 32 of 128: 0.5 * 0.75 = 0.375; 128 and 500: 0. With threshold 64, 32: 0.25."""
    backends = pods((0, 0), (32, 0), (128, 0), (500, 0))
    assert totals(picker(("load-aware-scorer", 1)), backends) == [0.5, 0.375, 0.0, 0.0]
    assert totals(picker(("load-aware-scorer", 1, {"threshold": 64})), backends)[1] == 0.25


def test_active_request_scorer_counts_its_own_requests_until_they_end_or_time_out() -> None:
    """Three requests to pod 0 at 0, one to pod 1 at 60: (3-3)/3 = 0, (3-1)/3, 1 for none. One of pod 0 ends:
    most is 2: 0, 1/2, 1. At 121 those of pod 0 have timed out (2m): most is 1: 1, 0, 1."""
    clock = Clock()
    epp = picker(("active-request-scorer", 1), clock=clock)
    backends = pods((0, 0), (0, 0), (0, 0))
    for number in range(3):
        epp.pick(request(number, 10), backends[:1])
    clock.now = 60.0
    epp.pick(request(3, 10), backends[1:2])
    assert totals(epp, backends) == pytest.approx([0, 2 / 3, 1])
    epp.ended(request(1, 10), 0)
    assert totals(epp, backends) == [0.0, 0.5, 1.0]
    clock.now = 121.0
    assert totals(epp, backends) == [1.0, 0.0, 1.0]


def test_weights_are_not_normalised_and_scores_are_clamped_only_later() -> None:
    """2 x queue + 1 x kv: 2*0 + 0.9 and 2*1 + 0.2. A usage of 1.2 (no server says so) gives -0.2 in v0.5,
    0 from v1.0 on."""
    assert totals(picker(("queue-scorer", 2), ("kv-cache-scorer", 1)), pods((1, 0.1), (0, 0.8))) == (
        pytest.approx([0.9, 2.2])
    )
    assert totals(picker(("kv-cache-scorer", 1)), pods((0, 1.2))) == pytest.approx([-0.2])
    assert totals(picker(("kv-cache-scorer", 1), release="v1.0"), pods((0, 1.2))) == [0.0]


def test_lora_affinity_goes_by_what_vllm_says_of_its_adapters() -> None:
    """Four slots: an adapter counts in both of vLLM's lists, so that two leave no room (2 + 2 < 4 is false)
    and one does (1 + 1 < 4); who has the adapter has 1, and without slots there is never room."""
    epp = picker(("lora-affinity-scorer", 1))
    active = (frozenset({1}), frozenset({2}), frozenset({2, 3}), frozenset(), frozenset())
    backends = [Pod(i, Gauges(adapters=each), max_loras=4 * (i < 4)) for i, each in enumerate(active)]
    assert totals(epp, backends, request(0, 100, adapter=1)) == [1.0, 0.8, 0.0, 0.8, 0.0]
    assert totals(epp, backends, request(1, 100, adapter=3)) == [0.8, 0.8, 1.0, 0.8, 0.0]
    assert totals(epp, backends, request(2, 100)) == [0.8, 0.8, 0.0, 0.8, 0.0]  # the base model is no adapter


def test_session_affinity_prefers_the_pod_that_answered() -> None:
    """Session 7 was answered by pod 1; session 8 and requests without one know nobody."""
    epp = picker(("session-affinity-scorer", 1))
    epp.ended(request(0, 10, group=7), 1)
    backends = pods((0, 0), (0, 0))
    assert totals(epp, backends, request(1, 10, group=7)) == [0.0, 1.0]
    assert totals(epp, backends, request(2, 10, group=8)) == [0.0, 0.0]
    assert totals(epp, backends, request(3, 10)) == [0.0, 0.0]


def test_no_hit_lru_spreads_cold_requests() -> None:
    """Three pods, all cold. Nobody used: 1, 1/2, 0 in order. The first goes to pod 0, and cold requests
    order 1, 2 (never used), 0: scores 0, 1, 1/2. The second goes to 1: order 2, 0, 1: 1/2, 0, 1.
    A request that the prefix index knows is warm: 0.5 for all, and leaves the order alone."""
    epp = picker(("prefix-cache-scorer", 0), ("no-hit-lru-scorer", 1), release="v1.0")
    backends = pods((0, 0), (0, 0), (0, 0))
    cold = [request(number, 64, (number, 64)) for number in range(3)]
    assert totals(epp, backends, cold[0]) == [1.0, 0.5, 0.0]
    assert epp.pick(cold[0], backends) == 0
    assert totals(epp, backends, cold[1]) == [0.0, 1.0, 0.5]
    assert epp.pick(cold[1], backends) == 1
    assert totals(epp, backends, cold[0]) == [0.5, 0.5, 0.5]
    epp.pick(cold[0], backends)
    assert totals(epp, backends, cold[2]) == [0.5, 0.0, 1.0]
    assert totals(epp, backends[:1], cold[2]) == [1.0]


def test_no_hit_lru_without_the_prefix_plugin_in_front_takes_all_as_cold() -> None:
    """Listed before the prefix scorer, or with another name to look for, it finds no state."""
    epp = picker(("no-hit-lru-scorer", 1), ("prefix-cache-scorer", 0), release="v1.0")
    backends, again = pods((0, 0), (0, 0)), request(0, 64, (0, 64))
    assert epp.pick(again, backends) == 0
    assert totals(epp, backends, again) == [0.0, 1.0]


# ---- the approximate prefix index -------------------------------------------------------------------


def test_prompt_blocks_are_shared_by_content_at_byte_granularity() -> None:
    """40 tokens of 4 bytes in blocks of 64 bytes: 160 bytes are 2 full blocks. The prefix of 20 tokens is
    80 bytes: block 0 is the group's, block 1 ends in the prompt's own tokens. At 2.5 bytes, 100 bytes: 1
    block; the prefix is 50 bytes, so it is the prompt's."""
    two = [request(0, 40, (7, 20)), request(1, 40, (7, 20))]
    ids = [PromptBlocks(64, 4.0).all(each) for each in two]
    assert [len(each) for each in ids] == [2, 2]
    assert ids[0][0] == ids[1][0]
    assert ids[0][1] != ids[1][1]
    ids = [PromptBlocks(64, 2.5).all(each) for each in two]
    assert [len(each) for each in ids] == [1, 1]
    assert ids[0] != ids[1]


def test_approximate_index_matches_leading_blocks_that_were_routed() -> None:
    """v1.0, blocks of 64 bytes = 16 tokens. A prompt of 64 tokens is 4 blocks, 2 of them the group's 32
    tokens. After request 0 went to pod 0, one of the group matches 2 of 4 there; request 0 again all."""
    epp = picker(("prefix-cache-scorer", 1), release="v1.0")
    backends = pods((0, 0), (0, 0))
    assert totals(epp, backends, request(0, 64, (1, 32), (2, 64))) == [0.0, 0.0]
    assert epp.pick(request(0, 64, (1, 32), (2, 64)), backends[:1]) == 0
    assert totals(epp, backends, request(1, 64, (1, 32), (3, 64))) == [0.5, 0.0]
    assert totals(epp, backends, request(2, 64, (1, 32), (2, 64))) == [1.0, 0.0]


def test_approximate_index_of_v05_counts_the_model_name() -> None:
    """As above with the model's name in front: 3 of 5, and a pod that served anything matches 1 of 5. A
    prompt below one block (15 tokens, 60 bytes) has no hashes: 0."""
    epp = picker(("prefix-cache-scorer", 1))
    backends = pods((0, 0), (0, 0))
    epp.pick(request(0, 64, (1, 32), (2, 64)), backends[:1])
    assert totals(epp, backends, request(1, 64, (1, 32), (3, 64))) == [0.6, 0.0]
    assert totals(epp, backends, request(2, 64, (9, 64))) == [0.2, 0.0]
    assert totals(epp, backends, request(3, 15, (1, 15))) == [0.0, 0.0]


def test_approximate_index_sees_16384_bytes() -> None:
    """9,400 tokens are 37,600 bytes, of which 256 blocks of 64 are seen: 4,096 tokens, all in the group's
    prefix of 8,355. Two questions of a group cannot be told apart: 257 of 257."""
    epp = picker(("prefix-cache-scorer", 1))
    backends = pods((0, 0), (0, 0))
    epp.pick(request(0, 9400, (1, 8355), (2, 9400)), backends[:1])
    assert totals(epp, backends, request(1, 9400, (1, 8355), (3, 9400))) == [1.0, 0.0]
    assert totals(epp, backends, request(2, 9400, (4, 8355))) == [1 / 257, 0.0]


def test_approximate_index_forgets_the_least_recently_routed_blocks_of_a_server() -> None:
    """Room for 4 blocks a server, prompts of 2 blocks, v1.0. After A, B, A, C on pod 0 the oldest are B's:
    A and C match, B does not. A look-up alone (B before C) renews nothing."""
    epp = picker(("prefix-cache-scorer", 1, {"lruCapacityPerServer": 4}), release="v1.0")
    backends = pods((0, 0))
    prompts = {name: request(number, 32, (number, 32)) for number, name in enumerate("ABC")}
    for name in "ABA":
        epp.pick(prompts[name], backends)
    totals(epp, backends, prompts["B"])
    epp.pick(prompts["C"], backends)
    assert [totals(epp, backends, prompts[name])[0] for name in "ABC"] == [1.0, 0.0, 1.0]


def test_approximate_index_stops_at_the_first_block_that_no_server_has() -> None:
    """Room for 3 blocks: a prompt of 4 blocks leaves its last 3. Block 0 is nobody's, so nothing matches."""
    epp = picker(("prefix-cache-scorer", 1, {"lruCapacityPerServer": 3}), release="v1.0")
    backends = pods((0, 0))
    epp.pick(request(0, 64, (0, 64)), backends)
    assert totals(epp, backends, request(1, 64, (0, 64))) == [0.0]


def test_auto_tune_takes_sizes_from_the_servers() -> None:
    """From v1.2 a block is 4 bytes times the server's block of 16 tokens: 64 bytes; hashBlockSize is not read
    any more. With autoTune off, blockSize is: 128 bytes make 2 blocks of 64 tokens, 1 of them shared."""
    backends = pods((0, 0))
    for parameters, expected in (
        ({"hashBlockSize": 256}, 0.5),
        ({"autoTune": False, "blockSize": 128}, 0.5),
        ({"autoTune": False, "blockSize": 256}, 0.0),
    ):
        epp = picker(("prefix-cache-scorer", 1, parameters), release="v1.2")
        epp.pick(request(0, 64, (1, 32), (2, 64)), backends)
        assert totals(epp, backends, request(1, 64, (1, 32), (3, 64))) == [expected]


# ---- the precise prefix index -----------------------------------------------------------------------

PRECISE = {"indexerConfig": {"tokenProcessorConfig": {"blockSize": 16, "hashSeed": "42"}}}


def precise(backends: list[Pod], release: str = "v1.0", **parameters: Any) -> EndpointPicker:
    epp = picker(("precise-prefix-cache-scorer", 1, PRECISE | parameters), release=release)
    epp.connect(backends)
    return epp


def test_precise_scores_are_min_max_over_the_holders() -> None:
    """A prompt of 160 tokens, 10 blocks. Pods hold 8, 10, 9 and none: 0, 1, 1/2 and 0: the weakest of
    several holders counts like none. A lone holder, and holders of as much, get 1."""
    asked = request(0, 160, (1, 160))
    for held, expected in (
        ((8, 10, 9, 0), [0.0, 1.0, 0.5, 0.0]),
        ((3, 0, 0, 0), [1.0, 0.0, 0.0, 0.0]),
        ((5, 5, 0, 0), [1.0, 1.0, 0.0, 0.0]),
        ((0, 0, 0, 0), [0.0, 0.0, 0.0, 0.0]),
    ):
        backends = pods(*[(0, 0.0)] * 4)
        epp = precise(backends)
        for backend, blocks in zip(backends, held, strict=True):
            backend.events = [stored(asked, blocks)] if blocks else []
        assert totals(epp, backends, asked) == expected


def test_precise_index_follows_removals_and_counts_without_gaps() -> None:
    """Pod 0 holds all 10 blocks and loses block 4: 4 count. Pod 1 holds 5: it has 1, pod 0 has 0. Pod 1 loses
    block 0: it has none, and pod 0 is the lone holder."""
    asked = request(0, 160, (1, 160))
    backends = pods((0, 0), (0, 0))
    epp = precise(backends)
    keys = PromptBlocks(16).shared(asked)
    backends[0].events = [stored(asked, 10), BlockRemoved(keys[4])]
    backends[1].events = [stored(asked, 5)]
    assert totals(epp, backends, asked) == [0.0, 1.0]
    backends[1].events = [BlockRemoved(keys[0])]
    assert totals(epp, backends, asked) == [1.0, 0.0]


def test_precise_index_keeps_ten_pods_a_block() -> None:
    """Twelve pods store the same blocks: those of the first two are forgotten."""
    asked = request(0, 160, (1, 160))
    backends = pods(*[(0, 0.0)] * 12)
    epp = precise(backends)
    for backend in backends:
        backend.events = [stored(asked, 10)]
    assert totals(epp, backends, asked) == [0.0, 0.0] + [1.0] * 10


def test_servers_with_another_block_size_never_match() -> None:
    backends = pods((0, 0))
    backends[0].block_size = 32
    epp = precise(backends)
    backends[0].events = [stored(request(0, 160, (1, 160)), 10)]
    assert totals(epp, backends, request(0, 160, (1, 160))) == [0.0]


def test_v05_scores_on_what_was_tokenized_before() -> None:
    """A chunk of 256 bytes is 64 tokens. Pod 0 holds the 20 blocks of a prompt of 320 tokens, 192 of them
    the group's, pod 1 its first 14. First sight of the group: nothing is tokenized, 0 for all. A second
    prompt of the group is scored on 192 tokens, 12 blocks, which both hold: 1 for both. The first again:
    20 against 14: 1 and 0."""
    first, second = request(0, 320, (1, 192), (2, 320)), request(1, 320, (1, 192), (3, 320))
    backends = pods((0, 0), (0, 0))
    epp = precise(backends, release="v0.5")
    backends[0].events, backends[1].events = [stored(first, 20)], [stored(first, 14)]
    assert totals(epp, backends, first) == [0.0, 0.0]
    assert totals(epp, backends, second) == [1.0, 1.0]
    assert totals(epp, backends, first) == [1.0, 0.0]


def test_v10_tokenizes_at_once_unless_most_is_known() -> None:
    """First sight: all 20 blocks count. A second prompt of the group, of which 192 of 320 tokens (0.6) are
    known, is tokenized, too: 16 blocks held against 14. With 320 of 384 tokens known (0.83) the rest stays
    unknown: on 320 tokens both hold 20."""
    first = request(0, 320, (1, 192), (2, 320))
    backends = pods((0, 0), (0, 0))
    epp = precise(backends)
    backends[0].events, backends[1].events = [stored(first, 20)], [stored(first, 14)]
    assert totals(epp, backends, first) == [1.0, 0.0]
    second = request(1, 320, (1, 192), (3, 320))
    backends[0].events = [stored(second, 16)]
    assert totals(epp, backends, second) == [1.0, 0.0]
    longer = request(2, 384, (1, 192), (2, 320), (4, 384))
    backends[0].events, backends[1].events = [stored(longer, 24)], [stored(longer, 20)]
    assert totals(epp, backends, longer) == [1.0, 1.0]


# ---- pickers ----------------------------------------------------------------------------------------


def test_max_score_picker_breaks_exact_ties_at_random() -> None:
    """Queues 0, 0, 3: a half each for the first two; 0.02 is 2.5 standard deviations at 4,000 picks."""
    epp = picker(("queue-scorer", 1))
    assert shares(epp, pods((0, 0), (0, 0), (3, 0))) == pytest.approx([0.5, 0.5, 0], abs=0.02)


def test_random_picker_ignores_scores() -> None:
    epp = picker(("queue-scorer", 1), pick="random-picker")
    assert shares(epp, pods((0, 0), (9, 0))) == pytest.approx([0.5, 0.5], abs=0.02)


def test_weighted_random_picker_draws_in_proportion() -> None:
    """KV scores 0.6, 0.3, 0: 2/3, 1/3 and never. All zero: a half each."""
    epp = picker(("kv-cache-scorer", 1), pick="weighted-random-picker", release="v1.0")
    assert shares(epp, pods((0, 0.4), (0, 0.7), (0, 1.0))) == pytest.approx([2 / 3, 1 / 3, 0], abs=0.02)
    assert shares(epp, pods((0, 1.0), (0, 1.0))) == pytest.approx([0.5, 0.5], abs=0.02)


def test_the_report_s_precise_weights() -> None:
    """Weights 2, 1, 1 for prefix, KV and queue. Pod 0 holds the prompt, has one request waiting and 50 % of
    its KV in use: 2*1 + 0.5 + 0 = 2.5. Pod 1 is empty: 0 + 1 + 1 = 2. The holder wins. Where pod 1 holds 8
    of the 10 blocks (its score is still 0), too; where both hold all, pod 1 wins 4 to 2.5."""
    asked = request(0, 160, (1, 160))
    for held, expected in ((0, [2.5, 2.0]), (8, [2.5, 2.0]), (10, [2.5, 4.0])):
        backends = pods((1, 0.5), (0, 0.0))
        epp = picker(
            ("precise-prefix-cache-scorer", 2, PRECISE),
            ("kv-cache-scorer", 1),
            ("queue-scorer", 1),
            release="v1.0",
        )
        epp.connect(backends)
        assert all(backend.scraped for backend in backends)
        backends[0].events = [stored(asked, 10)]
        backends[1].events = [stored(asked, held)] if held else []
        assert totals(epp, backends, asked) == expected


# ---- configuration ----------------------------------------------------------------------------------


def parse(text: str, release: str = "v0.5") -> Any:
    return parse_epp(yaml.safe_load(HEAD + text), release, source="epp.yaml")


def test_old_names_and_modes_mean_today_s_plugins() -> None:
    """The report's precise YAML, with 2.0 for a weight: an integer to the old loader, too."""
    config = parse("""
plugins:
- type: single-profile-handler
- type: prefix-cache-scorer
  parameters:
    mode: cache_tracking
    indexerConfig:
      tokenProcessorConfig: {blockSize: 64, hashSeed: "42"}
      kvBlockIndexConfig: {enableMetrics: true, metricsLoggingInterval: 60000000000}
- type: kv-cache-scorer
- type: max-score-picker
- type: decode-filter
schedulingProfiles:
- name: default
  plugins:
  - pluginRef: decode-filter
  - {pluginRef: prefix-cache-scorer, weight: 2.0}
  - {pluginRef: kv-cache-scorer, weight: 1.0}
  - pluginRef: max-score-picker
""")
    assert [(plugin.type, weight) for plugin, weight in config.scorers] == [
        ("precise-prefix-cache-scorer", 2.0),
        ("kv-cache-utilization-scorer", 1.0),
    ]
    assert [plugin.type for plugin in config.filters] == ["decode-filter"]
    assert config.picker.type == "max-score-picker"


def test_later_releases_fill_in_what_is_missing() -> None:
    """No handler, picker or weight: defaults from v1.0 on; no profile: one of all plugins."""
    for text in (
        "plugins: [{type: queue-scorer}]\n"
        "schedulingProfiles: [{name: x, plugins: [{pluginRef: queue-scorer}]}]",
        "plugins: [{type: queue-scorer}]",
    ):
        config = parse(text, "v1.0")
        assert [(plugin.type, weight) for plugin, weight in config.scorers] == [("queue-scorer", 1.0)]
        assert config.picker.type == "max-score-picker"
    assert parse("plugins: [{type: queue-scorer}]\nsaturationDetector: {queueDepthThreshold: 5}", "v1.1")


def test_a_plugin_that_no_profile_names_has_no_effect() -> None:
    config = parse("""
plugins:
- type: queue-scorer
- type: kv-cache-scorer
- type: random-picker
- type: single-profile-handler
schedulingProfiles: [{name: x, plugins: [{pluginRef: queue-scorer, weight: 3}, {pluginRef: random-picker}]}]
""")
    assert [plugin.type for plugin, _weight in config.scorers] == ["queue-scorer"]


HANDLER = "{type: single-profile-handler}"
BAD = {
    "unknown plugin": (
        f"plugins: [{{type: que-scorer}}, {HANDLER}]",
        "epp.yaml: plugins.0.type: unknown plugin 'que-scorer'. Did you mean 'queue-scorer'?",
    ),
    "missing picker": (
        f"plugins: [{{type: queue-scorer}}, {HANDLER}]\n"
        "schedulingProfiles: [{name: x, plugins: [{pluginRef: queue-scorer, weight: 1}]}]",
        "epp.yaml: schedulingProfiles.0.plugins: the profile has no picker. Add max-score-picker."
        " epp_release router-v0.10 takes it as written.",
    ),
    "two pickers": (
        f"plugins: [{{type: random-picker}}, {{type: max-score-picker}}, {HANDLER}]\n"
        "schedulingProfiles: "
        "[{name: x, plugins: [{pluginRef: random-picker}, {pluginRef: max-score-picker}]}]",
        "epp.yaml: schedulingProfiles.0.plugins: "
        "there are 2 pickers: random-picker, max-score-picker. Keep one.",
    ),
    "two handlers": (
        f"plugins: [{HANDLER}, {{type: single-profile-handler, name: again}}]",
        "epp.yaml: plugins: there are 2 profile handlers: single-profile-handler, again. Keep one.",
    ),
    "no handler": (
        "plugins: [{type: queue-scorer}]",
        "epp.yaml: plugins: there is no profile handler. Add - type: single-profile-handler."
        " epp_release router-v0.10 takes it as written.",
    ),
    "no profile": (
        f"plugins: [{{type: random-picker}}, {HANDLER}]",
        "epp.yaml: schedulingProfiles: there are 0 scheduling profiles. "
        "single-profile-handler runs exactly one. epp_release router-v0.10 takes it as written.",
    ),
    "fractional weight": (
        f"plugins: [{{type: queue-scorer}}, {{type: random-picker}}, {HANDLER}]\n"
        "schedulingProfiles: [{name: x, plugins: [{pluginRef: queue-scorer, weight: 1.5}]}]",
        "epp.yaml: schedulingProfiles.0.plugins.0.weight: weight 1.5 is a fraction, which endpoint picker "
        "v0.5 does not load. Multiply all weights to whole numbers. "
        "epp_release router-v0.10 takes it as written.",
    ),
    "scorer without a weight": (
        f"plugins: [{{type: queue-scorer}}, {{type: random-picker}}, {HANDLER}]\n"
        "schedulingProfiles: [{name: x, plugins: [{pluginRef: queue-scorer}]}]",
        "epp.yaml: schedulingProfiles.0.plugins.0.weight: "
        "scorer 'queue-scorer' has no weight. Add weight: 1. epp_release router-v0.10 takes it as written.",
    ),
    "reference to nothing": (
        f"plugins: [{{type: queue-scorer, name: queue}}, {HANDLER}]\n"
        "schedulingProfiles: [{name: x, plugins: [{pluginRef: queue-scorer, weight: 1}]}]",
        "epp.yaml: schedulingProfiles.0.plugins.0.pluginRef: there is no plugin named 'queue-scorer'. "
        "Named are queue, single-profile-handler.",
    ),
    "one name twice": (
        f"plugins: [{HANDLER}, {{type: queue-scorer}}, {{type: queue-scorer}}]",
        "epp.yaml: plugins.2.name: two plugins are named 'queue-scorer'. Give each its own name.",
    ),
    "unknown field": (
        "plugin: []",
        "epp.yaml: plugin: unknown field 'plugin'. Did you mean 'plugins'?",
    ),
    "a field of a later release": (
        "saturationDetector: {}",
        "epp.yaml: saturationDetector: unknown field 'saturationDetector'. "
        "Known are apiVersion, kind, plugins, schedulingProfiles.",
    ),
    "parameter of another kind": (
        f"plugins: [{{type: load-aware-scorer, parameters: {{threshold: many}}}}, {{type: random-picker}}, "
        f"{HANDLER}]\nschedulingProfiles: [{{name: x, plugins: [{{pluginRef: load-aware-scorer, weight: 1}}, "
        "{pluginRef: random-picker}]}]",
        "epp.yaml: plugins.0.parameters.threshold: threshold is not a whole number: 'many'. Correct it.",
    ),
    "unknown mode": (
        f"plugins: [{{type: prefix-cache-scorer, parameters: {{mode: exact}}}}, {HANDLER}]",
        "epp.yaml: plugins.0.parameters.mode: mode is 'exact'. Known are estimate and cache_tracking.",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_configurations_are_refused_with_their_place(name: str) -> None:
    text, message = BAD[name]
    with pytest.raises(InputError) as caught:
        EndpointPicker(parse(text), RouterOptions(), np.random.default_rng(0), Clock())
    assert str(caught.value) == message


def test_another_kind_of_file_is_refused() -> None:
    with pytest.raises(InputError, match=r"epp.yaml: kind: kind is 'Pod'. Write EndpointPickerConfig."):
        parse_epp(
            {"apiVersion": "inference.networking.x-k8s.io/v1alpha1", "kind": "Pod"}, "v1.4", source="epp.yaml"
        )


def test_fractional_weights_load_from_v14_on() -> None:
    config = parse(
        "plugins: [{type: queue-scorer}]\n"
        "schedulingProfiles: [{name: x, plugins: [{pluginRef: queue-scorer, weight: 1.5}]}]",
        "v1.4",
    )
    assert config.scorers[0][1] == 1.5
