"""Requests that differ in what is accepted of their drafts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from servecast.sim.engine.drafts import drawn
from servecast.sim.engine.speculation import Kind
from servecast.sim.inputs.errors import InputError
from servecast.sim.run.simulate import simulate
from servecast.sim.scenario.acceptance import Acceptance, Law, counts_of_result, geometric
from servecast.sim.scenario.acceptance_spread import always_proposed, extra, of_beta, of_records, scaled
from servecast.sim.scenario.deployment import Deployment
from servecast.sim.scenario.scenario import load

LOOKED_UP = (0.6, 0.3, 0.1), (0.5, 0.1, 0.1, 0.3)
ALWAYS: Kind = ((0.6, 0.3, 0.1), ())


def law_of(**given: Any) -> Law:
    return Acceptance.model_validate(given).law(3, Path(), "acceptance")


def test_accepted_drafts_of_a_step() -> None:
    """0.6 + 0.3 + 0.1 of three; 0.1 x 0.6 + 0.1 x 0.9 + 0.3 x 1.0 where they are looked up."""
    assert extra(ALWAYS) == pytest.approx(1.0)
    assert extra(LOOKED_UP) == pytest.approx(0.06 + 0.09 + 0.30)


@pytest.mark.parametrize("kind", [ALWAYS, LOOKED_UP])
@pytest.mark.parametrize("factor", [0.0, 0.4, 1.0, 1.9, 2.6])
def test_a_law_scaled_accepts_that_many_times_as_many(kind: Kind, factor: float) -> None:
    rates, proposed = scaled(kind, factor)
    assert extra((rates, proposed)) == pytest.approx(factor * extra(kind), abs=1e-9)
    assert list(rates) == sorted(rates, reverse=True)
    assert sum(proposed) == pytest.approx(1.0 if kind[1] else 0.0)


def test_no_step_accepts_more_than_is_proposed() -> None:
    assert scaled(ALWAYS, 9.0)[0] == pytest.approx((1.0, 1.0, 1.0), abs=1e-6)


def test_a_beta_distribution_of_rates() -> None:
    """Its mean, and its standard deviation but for what lies inside of the parts that it is cut into."""
    rates = of_beta(0.7, 0.15)
    assert np.mean(rates) == pytest.approx(0.7)
    assert np.std(rates) == pytest.approx(0.15, rel=0.02)
    law = law_of(rate=0.7, spread=0.15)
    assert law.kinds is not None
    assert law.kinds.laws[0] == (geometric(rates[0], 3), ())


def test_rates_of_single_requests_with_what_is_proposed() -> None:
    law = law_of(requests=[0.2, 0.8], proposed=0.5)
    assert law.kinds is not None
    assert law.kinds.laws == tuple((geometric(rate, 3), (0.5, 0.0, 0.0, 0.5)) for rate in (0.2, 0.8))
    slow, fast = (1.0 + 0.5 * sum(geometric(rate, 3)) for rate in (0.2, 0.8))
    share = fast / (slow + fast)  # of the slow ones' steps, with as many tokens
    assert law.rates[1] == pytest.approx(share * 0.2**2 + (1.0 - share) * 0.8**2)


def test_all_requests_together_bring_the_tokens_of_their_steps() -> None:
    """A token a step and four: 8 tokens of 5 steps."""
    assert law_of(requests=[0.0, 1.0]).length == pytest.approx(8 / 5)


@pytest.mark.parametrize("given", [{"rate": 0.5, "spread": 0.5}, {"rates": [0.5] * 3, "spread": 0.1}])
def test_a_spread_that_cannot_be_is_refused(tmp_path: Path, given: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="a spread of"):
        drafting(tmp_path, given)


def test_requests_as_they_were_served() -> None:
    """40 tokens after the first took 10 steps of half of the requests, 40 of the others: 0.25 and 1 steps a
    token, 0.625 on average. All or none of 3 drafts accepted at a rate of 0.2 bring 1.6 tokens a step with
    variance 9 x 0.2 x 0.8 = 1.44: by chance a request's steps a token vary by 1.44 x 0.625^3 / 40, which is
    0.0088 of the 0.1406 that they do, so that both keep sqrt(1 - 0.0625) of their distance."""
    kinds = of_records(((0.2, 0.2, 0.2), ()), [41] * 60, [10, 40] * 30)
    assert kinds is not None
    assert kinds.from_tokens == (0,)
    paces = sorted({round(1.0 / (1.0 + extra(law)), 6) for law in kinds.laws})
    assert paces == pytest.approx([0.625 - 0.375 * 0.9375**0.5, 0.625 + 0.375 * 0.9375**0.5], abs=1e-5)


def test_long_outputs_of_their_own() -> None:
    """Outputs of 11 tokens took a step a token, those of 101 half a step, without any other difference: 3,300
    tokens in 1,800 steps, which accepted 5/6 of a draft."""
    kinds = of_records(((0.5, 1 / 3), ()), [11] * 30 + [101] * 30, [10] * 30 + [50] * 30)
    assert kinds is not None
    assert kinds.from_tokens == (0, 101)
    assert {round(extra(law), 6) for law in kinds.laws[: len(kinds.laws) // 2]} == {0.0}
    assert {round(extra(law), 6) for law in kinds.laws[len(kinds.laws) // 2 :]} == {1.0}


def test_what_says_nothing_of_single_requests() -> None:
    """Too few of them, all alike, or no more different than drawing makes them."""
    law: Kind = ((0.5,), ())
    assert of_records(law, [41] * 10, [10, 40] * 5) is None
    assert of_records(law, [41] * 60, [25] * 60) is None
    rng = np.random.default_rng(0)
    steps = [int(np.argmax(np.cumsum(1 + (rng.random(400) < 0.5)) >= 400)) + 1 for _ in range(200)]
    kinds = of_records(law, [401] * 200, steps)
    paces = [1.5 / (1.0 + extra(each)) for each in kinds.laws] if kinds else [1.0]
    assert np.std(paces) < 0.5 * np.std(np.array(steps) * 1.5 / 400)


def test_drafts_that_always_come_differ_as_much() -> None:
    kinds = of_records(LOOKED_UP, [41] * 60, [20, 40] * 30)
    there = always_proposed(kinds, LOOKED_UP)
    assert kinds is not None
    assert there is not None
    for each, always in zip(kinds.laws, there.laws, strict=True):
        assert not always[1]
        assert extra(always) / extra(ALWAYS) == pytest.approx(extra(each) / extra(LOOKED_UP), abs=1e-9)


# ---- in a simulation

SCENARIO = """
schema_version: 1
name: drafts
model: {config: Llama-3.1-8B-Instruct}
gpu: {name: H100}
profile: physics
engine: {version: "0.32", max_num_seqs: 16, max_model_len: 4096,
  speculative_config: {method: eagle3, model: owner/EAGLE3-head, num_speculative_tokens: 3}}
workload: {arrivals: {kind: closed_loop, concurrency: 8}, num_requests: 200,
  prompt_tokens: {kind: fixed, tokens: 64}, output_tokens: {kind: fixed, tokens: 121}}
"""


def drafting(folder: Path, acceptance: dict[str, Any]) -> Deployment:
    file = folder / "scenario.yaml"
    file.write_text(f"{SCENARIO}acceptance: {json.dumps(acceptance)}\n")
    return Deployment.of(load(file))


def test_a_mean_over_requests_is_longer_where_they_differ(tmp_path: Path) -> None:
    """Some of the requests take 1 step a token and some 1/4, about half of them each; with one law for all,
    whose rate is their mean, 1 / 2.5."""

    def tpot(acceptance: dict[str, Any]) -> pd.Series:
        found = simulate(drafting(tmp_path, acceptance)).requests.set_index("request_id")
        return (found["finish"] - found["first_token"]) / 120

    plain, found = tpot({"rates": [0.0, 0.0, 0.0]}).mean(), tpot({"requests": [0.0, 1.0]})
    slow = np.array([drawn(0, number, 1 << 62) < 0.5 for number in found.index])
    assert 0.4 < slow.mean() < 0.6
    assert found[slow].mean() / plain == pytest.approx(1.0, rel=0.02)
    assert found[~slow].mean() / plain == pytest.approx(0.25, rel=0.02)
    assert tpot({"rates": [0.5, 0.5, 0.5]}).mean() / plain == pytest.approx(0.4, rel=0.03)


def test_a_saved_benchmark_tells_requests_apart(tmp_path: Path) -> None:
    """The counters are those of all: 60 requests of 41 tokens in 10 or 40 steps."""
    result = {
        "completed": 60,
        "total_output_tokens": 60 * 41,
        "spec_decode_num_drafts": 1500,
        "spec_decode_draft_tokens": 4500,
        "spec_decode_accepted_tokens": 900,
        "spec_decode_per_position_acceptance_rates": [0.2, 0.2, 0.2],
        "output_lens": [41] * 60,
        "itls": [[0.02] * steps for steps in [10, 40] * 30],
    }
    counts = counts_of_result(result)
    assert counts is not None
    law = counts.law(3, "acceptance from it")
    assert law.rates == pytest.approx((0.2, 0.2, 0.2))
    assert law.kinds == of_records(law.mean, [41] * 60, [10, 40] * 30)
    assert "60 requests" in law.note
    (tmp_path / "bench.json").write_text(json.dumps(result))
    found = drafting(tmp_path, {"metrics": "bench.json"}).speculating
    assert found is not None
    assert found.config.kinds == law.kinds
