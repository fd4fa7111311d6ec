"""``--speculative-config`` and acceptance: what vLLM takes, refuses and defaults to, and laws."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import servecast
from servecast.sim.inputs.errors import InputError
from servecast.sim.run.simulate import simulate
from servecast.sim.scenario.acceptance import Law, falling, geometric, least_variance, rate_of, read_counts
from servecast.sim.scenario.deployment import Deployment
from servecast.sim.scenario.scenario import load
from servecast.sim.scenario.vllm_flags import parse_serve_command

SCENARIO = """
schema_version: 1
name: drafts
model: {config: Llama-3.1-8B-Instruct}
gpu: {name: H100}
profile: physics
engine: {version: "0.32", max_num_seqs: 16, max_model_len: 4096, speculative_config: DRAFTS}
ACCEPTANCE
workload:
  arrivals: {kind: closed_loop, concurrency: 4}
  num_requests: 40
  prompt_tokens: {kind: fixed, tokens: 256}
  output_tokens: {kind: fixed, tokens: 120}
"""
EAGLE = {"method": "eagle3", "model": "owner/EAGLE3-head", "num_speculative_tokens": 3}
NGRAM = {"method": "ngram", "num_speculative_tokens": 3}


def law_of(deployment: Deployment) -> Law:
    assert deployment.speculating is not None
    return deployment.speculating.law


def made(folder: Path, drafts: Any, acceptance: Any = 0.7, **changes: Any) -> Deployment:
    file = folder / "scenario.yaml"
    given = "" if acceptance is None else f"acceptance: {json.dumps(acceptance)}"
    file.write_text(SCENARIO.replace("DRAFTS", json.dumps(drafts)).replace("ACCEPTANCE", given))
    return Deployment.of(load(file, changes))


@pytest.mark.parametrize("rate", [0.0, 0.3, 0.7, 1.0])
def test_a_geometric_law_has_the_tokens_of_its_series(rate: float) -> None:
    """Leviathan et al. 2023, equation 1: (1 - a^(k+1)) / (1 - a)."""
    tokens = 1 + sum(geometric(rate, 5))
    assert tokens == pytest.approx(6.0 if rate == 1.0 else (1 - rate**6) / (1 - rate))
    assert rate_of(tokens, 5) == pytest.approx(rate, abs=1e-9)


def test_vllms_synthetic_length() -> None:
    """SpeculativeConfig._acceptance_length_to_rates: 2.5 of three drafts are one for sure and half of one."""
    assert least_variance(2.5, 3) == (1.0, 0.5, 0.0)
    assert least_variance(4.0, 3) == (1.0, 1.0, 1.0)
    assert least_variance(1.0, 2) == (0.0, 0.0)


def test_rates_that_rise_by_chance_are_pooled() -> None:
    assert falling([0.8, 0.5, 0.6, 0.1]) == pytest.approx((0.8, 0.55, 0.55, 0.1))


def test_a_golden_curve_gives_the_length_that_was_measured(tmp_path: Path) -> None:
    """MiniMax-M3's EAGLE-3 in InferenceX: 1.78, 2.38 and 2.83 tokens of 1, 2 and 3 drafts."""
    law = law_of(made(tmp_path, EAGLE, {"golden": "minimax-m3-eagle3/thinking_on"}))
    assert law.rates == pytest.approx((0.78, 0.60, 0.45))
    assert law.origin == "measured"
    longer = made(
        tmp_path, EAGLE | {"num_speculative_tokens": 7}, {"golden": "minimax-m3-eagle3/thinking_off"}
    )
    assert law_of(longer).length == pytest.approx(3.85)


METRICS = """# HELP vllm:spec_decode_num_drafts_total Number of spec decoding drafts.
vllm:spec_decode_num_drafts_total{engine="0",model_name="m"} 60.0
vllm:spec_decode_num_drafts_total{engine="1",model_name="m"} 40.0
vllm:spec_decode_num_draft_tokens_total{engine="0",model_name="m"} 150.0
vllm:spec_decode_num_draft_tokens_total{engine="1",model_name="m"} 100.0
vllm:spec_decode_num_accepted_tokens_total{engine="0",model_name="m"} 90.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="m",position="0"} 50.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="m",position="1"} 30.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="m",position="2"} 10.0
vllm:generation_tokens_total{engine="0",model_name="m"} 295.0
vllm:time_to_first_token_seconds_count{engine="0",model_name="m"} 5.0
"""


def test_a_servers_counters(tmp_path: Path) -> None:
    """295 tokens, of which 90 were accepted drafts and 5 first ones, are 200 steps, half of them with drafts,
    2.5 on average: a quarter of steps with two and a quarter with three. Third drafts were there in 50 steps,
    and 10 of them were accepted."""
    (tmp_path / "metrics.txt").write_text(METRICS)
    law = law_of(made(tmp_path, NGRAM, {"metrics": "metrics.txt"}))
    assert law.proposed == pytest.approx((0.5, 0.0, 0.25, 0.25))
    assert law.rates == pytest.approx((0.5, 0.3, 0.2))
    assert law.origin == "measured"
    counts = read_counts(tmp_path / "metrics.txt")
    tokens = 1 + sum(share * sum(law.rates[:length]) for length, share in enumerate(law.proposed))
    assert tokens == pytest.approx((295 - 5) / 200) == 1 + counts.accepted / 200


def test_what_bench_serve_saves(tmp_path: Path) -> None:
    result = {
        "completed": 10,
        "total_output_tokens": 1000,
        "spec_decode_num_drafts": 400,
        "spec_decode_draft_tokens": 1200,
        "spec_decode_accepted_tokens": 590,
        "spec_decode_per_position_acceptance_rates": [0.75, 0.45, 0.275],
    }
    (tmp_path / "bench.json").write_text(json.dumps(result))
    law = law_of(made(tmp_path, EAGLE, {"metrics": "bench.json"}))
    assert law.rates == pytest.approx((0.75, 0.45, 0.275))
    assert law.length == pytest.approx(1 + 590 / 400)


def test_a_run_counts_as_vllm_does(tmp_path: Path) -> None:
    """1 + the sum of the rates tokens come from a step; the counters tell the law again."""
    run = simulate(made(tmp_path, EAGLE, [0.8, 0.5, 0.2]), seed=1)
    counts = run.meta["spec_decode"]
    assert counts.draft_tokens <= 3 * counts.drafts
    rates = [each / counts.drafts for each in counts.by_position]
    assert rates == pytest.approx([0.8, 0.5, 0.2], abs=0.04)
    assert counts.accepted == sum(counts.by_position)
    tokens = 40 * 120
    assert tokens <= counts.drafts + counts.accepted + 40 <= tokens + 3 * 40  # counted before the end cuts


@pytest.mark.parametrize(
    ("method", "version", "is_async"),
    [  # VllmConfig.__post_init__ of these releases
        ("eagle3", "0.23", True),
        ("ngram", "0.32", False),
        ("ngram_gpu", "0.23", True),
        ("draft_model", "0.27", False),
        ("draft_model", "0.28", True),
    ],
)
def test_async_defaults(tmp_path: Path, method: str, version: str, is_async: bool) -> None:
    drafts = {"method": method, "num_speculative_tokens": 2}
    if method in ("eagle3", "draft_model"):
        drafts["model"] = "Llama-3.2-3B-Instruct"
    acceptance = {"rate": 0.5, "proposed": 0.5} if "ngram" in method else 0.5
    assert (
        made(tmp_path, drafts, acceptance, **{"engine.version": version}).config.async_scheduling == is_async
    )


@pytest.mark.parametrize(
    ("drafts", "changes", "said"),
    [
        (NGRAM, {"engine.async_scheduling": True}, "async scheduling with ngram drafts"),
        (
            EAGLE | {"disable_padded_drafter_batch": True},
            {"engine.async_scheduling": True},
            "unpadded drafter batches",
        ),
        ({"method": "medusa", "model": "m", "num_speculative_tokens": 2}, {}, "heads of medusa"),
        ({"method": "medusa", "model": "m"}, {"engine.version": "0.33"}, "no medusa any more"),
        ({"method": "custom_class", "model": "a.B"}, {}, "'custom_class' cannot be simulated"),
        ({"method": "eagel"}, {}, "'eagel' cannot be simulated"),
        (EAGLE | {"tensor_parallel_size": 2}, {}, "not the drafter's"),
        (EAGLE | {"draft_tensor_parallel_size": 3}, {}, "3 of 1 ranks"),
        ({"method": "mtp", "num_speculative_tokens": 2}, {}, "no layers for multi-token prediction"),
        (
            {"method": "draft_model", "model": "Qwen3-0.6B", "num_speculative_tokens": 2},
            {},
            "151936 tokens, meta-llama/Llama-3.1-8B-Instruct 128256",
        ),
        (EAGLE | {"synthetic_acceptance_length": 2.0}, {}, "synthetic acceptance"),
        (
            EAGLE | {"num_speculative_tokens_per_batch_size": [[2, 8, 3]]},
            {},
            "smallest batch has no drafts",
        ),
        (
            EAGLE | {"num_speculative_tokens_per_batch_size": [[1, 8, 3]]},
            {"engine.version": "0.23"},
            "0.23 has no",
        ),
        (EAGLE | {"enable_adaptive_verification": True}, {}, "adaptive verification"),
        ({"method": "eagle3", "num_speculative_tokens": 2}, {}, "eagle3 without a model"),
        (NGRAM | {"prompt_lookup_min": 4, "prompt_lookup_max": 3}, {}, "prompt_lookup_min 4 is above 3"),
        ({"method": "ngram"}, {}, "how many tokens are drafted"),
        (EAGLE | {"draft_tokens": 3}, {}, "unknown field 'draft_tokens'"),
        (EAGLE, {}, "drafts of eagle3 are always proposed"),
        (EAGLE, {"engine.policy": "static"}, "speculative_config is not modelled for the policy 'static'"),
    ],
)
def test_what_is_refused(tmp_path: Path, drafts: Any, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        made(tmp_path, drafts, {"rate": 0.5, "proposed": 0.5}, **changes)


@pytest.mark.parametrize(
    ("version", "rules"),
    [("0.10", "vLLM 0.10 is run under the rules of 0.23"), ("0.40", "assumed to behave as 0.33")],
)
def test_drafts_have_the_rules_that_the_release_is_run_under(
    tmp_path: Path, version: str, rules: str
) -> None:
    """As the note says; 0.23 hashes no next token, 0.33 does (DRAFT_RULE_IN)."""
    found = made(tmp_path, EAGLE, **{"engine.version": version})
    assert found.config.speculation is not None
    assert found.config.speculation.hash_lookahead == (version == "0.40")
    assert any(rules in note for note in found.scenario.server.notes(found.scenario.engine))


def test_without_acceptance_it_says_how_to_measure_it(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="accepted") as raised:
        made(tmp_path, EAGLE, None)
    assert "vllm bench serve" in raised.value.fix
    assert "acceptance" in raised.value.where


def test_what_is_assumed_is_said_and_widens_the_band(tmp_path: Path) -> None:
    given, assumed = made(tmp_path, EAGLE, 0.7), made(tmp_path, EAGLE, "assumed")
    assert assumed.bands.tpot == pytest.approx((given.bands.tpot or 0) + 0.25)
    assert any("assumed at 0.7" in note for note in assumed.notes)
    origins = {each["parameter"]: each["origin"] for each in assumed.provenance()["parameters"]}  # type: ignore[attr-defined]
    assert origins["acceptance"] == "assumed"
    with pytest.raises(InputError, match="how often ngram finds"):
        made(tmp_path, NGRAM, "assumed")


def test_acceptance_without_drafts_is_refused() -> None:
    with pytest.raises(InputError, match="nothing is drafted"):
        Deployment.of(servecast.load("l4-qwen2.5-0.5b").changed({"acceptance": 0.5}))


def test_synthetic_acceptance_needs_no_other(tmp_path: Path) -> None:
    drafts = EAGLE | {"rejection_sample_method": "synthetic", "synthetic_acceptance_length": 2.78}
    assert law_of(made(tmp_path, drafts, None)).rates == pytest.approx((1.0, 0.78, 0.0))


@pytest.mark.parametrize(
    "command",
    [
        """vllm serve m --speculative-config '{"method": "ngram", "num_speculative_tokens": 3}'""",
        "vllm serve m --speculative-config.method ngram --speculative-config.num_speculative_tokens 3",
        "vllm serve m -sc.method=ngram -sc.num_speculative_tokens=3",
        "vllm serve m --spec-method ngram --spec-tokens 3",
    ],
)
def test_commands(command: str) -> None:
    assert parse_serve_command(command, version="0.32").flags["speculative_config"] == NGRAM


def test_a_flag_and_its_field_together_are_refused() -> None:
    command = """vllm serve m --speculative-config '{"method": "ngram"}' --spec-method ngram"""
    with pytest.raises(InputError, match="say method"):
        parse_serve_command(command, version="0.32")


def test_a_field_beside_a_command_changes_its_drafts(tmp_path: Path) -> None:
    file = tmp_path / "scenario.yaml"
    command = "vllm serve m --speculative-config.method ngram --spec-tokens 3"
    text = SCENARIO.replace("speculative_config: DRAFTS", f"command: {command}")
    file.write_text(text.replace("ACCEPTANCE", "acceptance: {rate: 0.5, proposed: 0.5}"))
    more = load(file, {"engine.speculative_config.num_speculative_tokens": 5})
    assert Deployment.of(load(file)).config.speculation.num_tokens == 3  # type: ignore[union-attr]
    assert Deployment.of(more).config.speculation.num_tokens == 5  # type: ignore[union-attr]
    assert (
        Deployment.of(load(file, {"engine.speculative_config": None, "acceptance": None})).speculating is None
    )
