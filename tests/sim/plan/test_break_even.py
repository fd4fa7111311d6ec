"""When speculation pays: the table agrees with the step times that it is made of, and with runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from servecast.sim.metrics.binding import StepRow
from servecast.sim.plan.break_even import OFF, break_even, draw_break_even
from servecast.sim.report.drawing import picture
from servecast.sim.run.simulate import simulate
from servecast.sim.scenario.deployment import Deployment
from servecast.sim.scenario.scenario import Scenario, load

SCENARIO = """
schema_version: 1
name: drafts
model: {config: Llama-3.1-8B-Instruct}
gpu: {name: l40s}
profile: physics
engine:
  version: "0.32"
  max_num_seqs: 256
  max_model_len: 2048
  speculative_config: {method: eagle3, model: owner/EAGLE3, num_speculative_tokens: 3}
acceptance: 0.6
workload:
  arrivals: {kind: closed_loop, concurrency: 1}
  num_requests: 6
  prompt_tokens: {kind: fixed, tokens: 200}
  output_tokens: {kind: fixed, tokens: 400}
"""


@pytest.fixture
def scenario(tmp_path: Path) -> Scenario:
    file = tmp_path / "drafts.yaml"
    file.write_text(SCENARIO)
    return load(file)


def test_a_step_has_to_bring_as_many_times_the_tokens_as_it_lasts_longer(scenario: Scenario) -> None:
    """2.176 = 1 + 0.6 + 0.36 + 0.216 tokens a step."""
    deployment = Deployment.of(scenario)
    found = break_even(deployment, 400)
    assert found is not None
    plain = Deployment.of(scenario.changed(OFF)).step_time.seconds(StepRow((), 8, 3200, 8))
    step = deployment.step_time.seconds(StepRow((), 8, 3200, 32, 24, 8, 3))
    level = next(each for each in found.levels if each.requests == 8)
    assert level.tokens == pytest.approx(2.176)
    assert level.least_tokens == pytest.approx(step / plain)
    assert level.gain == pytest.approx(2.176 * plain / step)
    assert level.least_rate is not None
    needed = 1 + sum(level.least_rate**position for position in (1, 2, 3))
    assert needed == pytest.approx(level.least_tokens, abs=1e-6)


def test_it_stops_to_pay_where_the_gain_crosses_one(scenario: Scenario) -> None:
    found = break_even(Deployment.of(scenario.changed({"acceptance": 0.45})), 400)
    assert found is not None
    assert 1 < found.pays_up_to < found.most
    assert all((level.gain > 1) == (level.requests <= found.pays_up_to) for level in found.levels)
    assert "and costs beyond" in found.sentence
    assert str(found.pays_up_to) in found.sentence
    assert "<svg" in picture("drafts", "Drafts", 2, lambda axes: draw_break_even(found, axes))


def test_drafts_that_are_never_accepted_never_pay(scenario: Scenario) -> None:
    found = break_even(Deployment.of(scenario.changed({"acceptance": 0.0})), 400)
    assert found is not None
    assert found.pays_up_to == 0
    assert found.sentence.endswith("never pays here")
    assert break_even(Deployment.of(scenario.changed(OFF)), 400) is None


def test_a_run_of_one_request_has_the_tables_token_time(scenario: Scenario) -> None:
    """Alone in the server, a token takes what a step lasts over the tokens that it brings."""
    deployment = Deployment.of(scenario)
    found = break_even(deployment, 400)
    assert found is not None
    requests = simulate(deployment).requests
    tpot = ((requests["finish"] - requests["first_token"]) / 399).mean()
    assert tpot == pytest.approx(found.levels[0].tpot_s, rel=0.05)  # of 1,100 draws of acceptance
