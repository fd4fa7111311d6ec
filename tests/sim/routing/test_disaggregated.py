"""llm-d's handlers of prefill and decode, as its own example configurations have them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml
from llmd_pods import Clock, Pod, request

from servecast.sim.inputs.errors import InputError
from servecast.sim.routing.gauges import Gauges
from servecast.sim.routing.llmd.config import parse_epp, read_epp
from servecast.sim.routing.llmd.disaggregated import DisaggregatedPicker
from servecast.sim.routing.llmd.plugin import EppConfig
from servecast.sim.routing.llmd.release import NEWEST
from servecast.sim.routing.options import RouterOptions
from servecast.sim.routing.pools import Pools
from servecast.sim.routing.routers import LeastOutstanding, RoundRobin

TESTS = Path(__file__).parents[2]
EXAMPLE = TESTS / "data" / "llmd" / "pd-epp-config.yaml"  # deploy/config of the llm-d router
GUIDE = TESTS.parent / "scenarios" / "llmd" / "pd-disaggregation.yaml"  # llm-d's guide
OLD, TODAY = "inference.networking.x-k8s.io/v1alpha1", "llm-d.ai/v1alpha1"


def fleet(prefill: int, decode: int, **gauges: int) -> list[Pod]:
    roles = ["prefill"] * prefill + ["decode"] * decode
    return [Pod(i, Gauges(gauges.get(f"p{i}", 0), 0, 0.0), role=role) for i, role in enumerate(roles)]


def picker(config: EppConfig, release: str = NEWEST, clock: Clock | None = None) -> DisaggregatedPicker:
    options = RouterOptions(epp_release=release)
    return DisaggregatedPicker(config, options, np.random.default_rng(0), clock or Clock())


def configured(handler: str, rest: str = "", release: str = NEWEST, group: str = TODAY) -> EppConfig:
    text = f"""
apiVersion: {group}
kind: EndpointPickerConfig
plugins:
- {handler}
{rest}
- {{type: prefix-cache-scorer}}
- {{type: prefill-filter}}
- {{type: decode-filter}}
- {{type: max-score-picker}}
schedulingProfiles:
- name: prefill
  plugins: [{{pluginRef: prefill-filter}}, {{pluginRef: prefix-cache-scorer, weight: 1}}, {{pluginRef:
  max-score-picker}}]
- name: decode
  plugins: [{{pluginRef: decode-filter}}, {{pluginRef: prefix-cache-scorer, weight: 1}}, {{pluginRef:
  max-score-picker}}]
"""
    return parse_epp(yaml.safe_load(text), release, source="epp.yaml")


def test_the_routers_own_example_loads_and_splits_by_what_is_uncached() -> None:
    """nonCachedTokens 16: a prompt of fewer tokens decodes where it is; a repeated one has nothing
    uncached."""
    epp = picker(read_epp(EXAMPLE, NEWEST))
    pods = fleet(2, 2)
    epp.connect(pods)
    assert epp.split(request(0, 15), pods) in ((2, None), (3, None))
    long = epp.split(request(1, 640, (7, 640)), pods)
    assert long is not None
    assert long[0] in (2, 3)
    assert long[1] in (0, 1)
    again = epp.split(request(2, 640, (7, 640)), pods)
    assert again == (long[0], None)  # the server that decoded it is known to have all of it


def test_a_prompt_of_which_the_threshold_is_uncached_goes_to_a_prefill_server() -> None:
    """Blocks of the approximate index have 64 tokens: of 655 tokens with 640 known 15 are uncached, of 656
    16."""
    for tokens, splits in ((655, False), (656, True)):
        epp, pods = picker(read_epp(EXAMPLE, NEWEST)), fleet(1, 1)
        epp.split(request(0, 640, (7, 640)), pods)
        found = epp.split(request(1, tokens, (7, 640)), pods)
        assert found == (1, 0 if splits else None)


def test_the_guides_configuration_sends_every_prompt_to_the_prefill_server_with_the_least_tokens() -> None:
    """always-disagg-pd-decider, token-load-scorer on prefill, active-request-scorer on decode."""
    epp, pods = picker(read_epp(GUIDE, NEWEST)), fleet(2, 2)
    first, second = (epp.split(request(number, 5000), pods) for number in range(2))
    assert first is not None
    assert second is not None
    assert {first[1], second[1]} == {0, 1}
    assert {first[0], second[0]} == {2, 3}


def test_the_first_token_frees_the_prefill_server_and_the_last_the_other() -> None:
    """inflightload/producer.go, ResponseBody: the prefill entry is released at the start of the stream."""
    epp, pods = picker(read_epp(GUIDE, NEWEST)), fleet(1, 1)
    (load,) = epp._decode.setting.loads.values()
    asked = request(0, 5120)  # 80 blocks of 64
    epp.split(asked, pods)
    both = np.array([0, 1])
    assert load.requests(both).tolist() == [1, 1]
    assert load.tokens(both).tolist() == [5120, 5120]
    epp.answered(asked, 1)
    assert load.requests(both).tolist() == [0, 1]
    assert load.tokens(both).tolist() == [0, 0]
    epp.ended(asked, 1)
    assert load.requests(both).tolist() == [0, 0]


def test_without_a_prefill_server_that_passes_the_other_computes_the_prompt() -> None:
    epp = picker(configured("{type: disagg-profile-handler, parameters: {deciders: {prefill: d}}}",
                            "- {type: always-disagg-pd-decider, name: d}"))  # fmt: skip
    assert epp.split(request(0, 5000), fleet(0, 1)) == (0, None)


def test_without_one_that_decodes_the_request_is_refused() -> None:
    assert picker(read_epp(GUIDE, NEWEST)).split(request(0, 5000), fleet(1, 0)) is None


def test_prefill_first_takes_no_decider() -> None:
    first = "{type: disagg-profile-handler, parameters: {stageOrder: prefill-first%s}}"
    config = configured(first % "")
    assert picker(config).split(request(0, 9), fleet(1, 1)) == (1, 0)
    with pytest.raises(InputError, match="prefill-first takes no prefill decider"):
        configured(first % ", deciders: {prefill: d}", "- {type: always-disagg-pd-decider, name: d}")


@pytest.mark.parametrize("handler", ["disagg-profile-handler", "pd-profile-handler"])
def test_the_older_flat_parameters_mean_the_same(handler: str) -> None:
    config = configured(
        f"{{type: {handler}, parameters: {{deciderPluginName: d}}}}",
        "- {type: prefix-based-pd-decider, name: d, parameters: {nonCachedTokens: 100}}",
    )
    epp = picker(config)
    assert [epp.split(request(n, tokens), fleet(1, 1)) for n, tokens in enumerate((99, 100))] == [
        (1, None),
        (1, 0),
    ]


def test_both_forms_in_one_handler_are_refused() -> None:
    """DisaggProfileHandlerConfigParser: neither schema parses."""
    handler = "{type: disagg-profile-handler, parameters: {deciders: {prefill: d}, prefillProfile: p}}"
    with pytest.raises(InputError, match="deciders and the older prefillProfile"):
        configured(handler, "- {type: always-disagg-pd-decider, name: d}")


def test_nobody_is_sent_to_a_prefill_server_with_a_decider_of_zero_tokens() -> None:
    """NonCachedTokens 0 disables disaggregation."""
    handler = "{type: disagg-profile-handler, parameters: {deciders: {prefill: prefix-based-pd-decider}}}"
    epp = picker(configured(handler, "- {type: prefix-based-pd-decider}"))
    assert epp.split(request(0, 50_000), fleet(1, 1)) == (1, None)


def test_up_to_v1_3_the_threshold_is_of_characters() -> None:
    """threshold 100 at 4 characters a token: 24 tokens are 96 characters, 25 are 100."""
    config = configured("{type: pd-profile-handler, parameters: {threshold: 100}}", release="v1.3", group=OLD)
    epp = picker(config, "v1.3")
    assert [epp.split(request(n, tokens), fleet(1, 1)) for n, tokens in enumerate((24, 25))] == [
        (1, None),
        (1, 0),
    ]


def test_a_handler_without_its_decider_is_refused() -> None:
    with pytest.raises(InputError, match="there is no decider named 'prefix-based-pd-decider'"):
        configured("{type: pd-profile-handler}")


def test_selectors_of_the_role_choose_the_pool() -> None:
    """label-selector-filter on llm-d.ai/role, as matchLabels and as matchExpressions."""
    text = f"""
apiVersion: {TODAY}
kind: EndpointPickerConfig
plugins:
- {{type: disagg-profile-handler, parameters: {{deciders: {{prefill: always-disagg-pd-decider}}}}}}
- type: always-disagg-pd-decider
- {{type: label-selector-filter, name: p, parameters: {{matchLabels: {{llm-d.ai/role: prefill}}}}}}
- type: label-selector-filter
  name: d
  parameters: {{matchExpressions: [{{key: llm-d.ai/role, operator: NotIn, values: [prefill]}}]}}
schedulingProfiles:
- {{name: prefill, plugins: [{{pluginRef: p}}]}}
- {{name: decode, plugins: [{{pluginRef: d}}]}}
"""
    config = parse_epp(yaml.safe_load(text), NEWEST, source="epp.yaml")
    assert picker(config).split(request(0, 9), fleet(1, 1)) == (1, 0)


def test_a_policy_by_name_has_a_turn_in_each_pool() -> None:
    """vLLM's toy proxy goes round the servers of each pool, and picks the second when the first has
    answered."""
    pools = Pools(RoundRobin(), RoundRobin())
    pods = fleet(2, 3)
    assert [pools.split(request(n, 9), pods) for n in range(3)] == [(None, 0), (None, 1), (None, 0)]
    assert [pools.pick_decode(request(n, 9), pods) for n in range(4)] == [2, 3, 4, 2]


def test_short_prompts_go_straight_to_a_decode_server() -> None:
    pools, pods = Pools(LeastOutstanding(), LeastOutstanding(), 100, late=False), fleet(1, 2)
    pods[1].outstanding = 5
    assert pools.split(request(0, 99), pods) == (2, None)
    assert pools.split(request(1, 100), pods) == (2, 0)
