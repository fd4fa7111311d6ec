"""Costs outside the engine: what is typical, and what a client sends from where."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_scenarios import small

from servecast.sim.hardware.front_end_costs import FrontEndCosts
from servecast.sim.inputs.errors import InputError
from servecast.sim.run.simulate import simulate
from servecast.sim.scenario.deployment import Deployment
from servecast.sim.scenario.vllm_server import preparation_round


def test_token_ids_are_not_encoded_and_random_text_takes_longer() -> None:
    """2.5 us a token of random text and 1.35 of English, 0.2 of JSON with both: 1.75 times as long."""
    typical = FrontEndCosts.typical()
    assert typical.of_prompts("token_ids").prompt_token_s == 0
    assert typical.of_prompts("text") == typical
    ratio = typical.of_prompts("random_text").prompt_token_s / typical.prompt_token_s
    assert ratio == pytest.approx((2.5 + 0.2) / (1.35 + 0.2), rel=0.01)


def test_typical_latency_is_that_of_three_sets_of_servers() -> None:
    """Prompts of 250 to 1,000 tokens came back 7.5 to 10.5 ms later than from their engines."""
    costs = FrontEndCosts.typical()
    for tokens in (250, 1000):
        alone = costs.latency_s + costs.request_s + tokens * costs.prompt_token_s
        assert 7.5e-3 <= alone <= 10.5e-3


def test_micro_batches_end_with_the_release_that_lost_them() -> None:
    """AsyncMicrobatchTokenizer: batches of at most 32, removed in June 2026, after 0.23."""
    assert [preparation_round(version) for version in ("0.11.2", "0.23", "0.32.1")] == [32, 32, 1]
    assert preparation_round(None) == preparation_round("main") == 1


def test_a_scenario_says_what_its_clients_send_and_from_where(tmp_path: Path) -> None:
    near = Deployment.of(small(tmp_path))
    far = Deployment.of(small(tmp_path, prompts="token_ids", network_round_trip_s=0.05))
    assert near.front_end.prompt_token_s > far.front_end.prompt_token_s == 0
    assert far.front_end.delivery_s == 0.05
    ttft = [(run["first_token"] - run["sent"]).min() for run in (simulate(d).requests for d in (near, far))]
    assert ttft[1] - ttft[0] == pytest.approx(0.05, abs=0.01)


def test_other_prompts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="prompts"):
        small(tmp_path, prompts="tokens")
