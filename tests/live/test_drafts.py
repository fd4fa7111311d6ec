"""A real vLLM that drafts, around steps that last what a known law says: acceptance is read from what a first
load came to, request by request, and the same load is predicted with it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from live_setup import PYTHON, SCENARIO, Calibrated, metronome
from metronome_setup import ROOFLINE, metronome_model
from timing import Machine, until_right

from servecast.sim.scenario.acceptance import read_counts
from servecast.sim.scenario.deployment import Deployment
from servecast.sim.scenario.scenario import load
from servecast.validate.compare.tolerances import Tolerances
from servecast.validate.live.own_server import started
from servecast.validate.live.result import document
from servecast.validate.live.result import judge as judge_loads
from servecast.validate.live.session import Session
from servecast.validate.parity.vllm_process import ENVIRONMENT

pytestmark = [
    pytest.mark.live,
    pytest.mark.skipif(not ENVIRONMENT.exists(), reason="needs vLLM: run tools/install_vllm.sh"),
]
DRAFTS = '{"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 2}'
LEVEL = 12  # clients: with more, what they and the API server take of this machine's cores counts, too
BENCH = f"first/concurrency-{LEVEL}/bench.json"
# Looking drafts up and verifying them on a CPU takes some of what no law knows, on each machine another part.
WITHIN = {"output_throughput": 0.12, "mean_itl_ms": 0.12, "mean_tpot_ms": 0.12}


def test_throughput_and_token_times_with_the_servers_own_acceptance(
    calibrated: Calibrated, tmp_path: Path
) -> None:
    model = metronome_model(tmp_path / "metronome")
    settings = model / "generation_config.json"  # else the CPU's sampler accepts no draft
    settings.write_text('{"temperature": 0.0}')
    own, file = metronome(model, ROOFLINE), replace(calibrated, model=model).scenario(tmp_path, SCENARIO)
    file.write_text(
        f"{SCENARIO}acceptance: {{metrics: {BENCH}}}\n".replace(
            "enforce", f"speculative_config: {DRAFTS}, enforce", 1
        )
    )
    limits = Tolerances.load()
    talking = replace(own, env={**own.env, "METRONOME_TEXT": "1"}, recorder=False)
    guess = load(file, {"acceptance": {"rate": 0.5, "proposed": 0.5}})
    with started(talking, guess.engine, {}, tmp_path) as server:
        first = Session(
            guess,
            server.target,
            tmp_path / "first",
            kinds=("concurrency",),
            concurrency=(LEVEL,),
            python=PYTHON,
        )
        first.run()
        counts = read_counts(tmp_path / BENCH)
        scenario = load(file)
        law = Deployment.of(scenario).speculating.law  # type: ignore[union-attr]
        assert law.kinds is not None
        print(law.note, law.mean, law.kinds.from_tokens)
        assert 0.1 * counts.draft_tokens < counts.accepted < 0.9 * counts.draft_tokens

        def serve(again: int) -> tuple[str, bool, bool]:
            machine, out = Machine(), tmp_path / f"second-{again}"
            second = Session(
                scenario, server.target, out, kinds=("concurrency",), concurrency=(LEVEL,), python=PYTHON
            )
            second.run()
            quiet = machine.quiet() and not calibrated.disturbed
            (found,) = document(second, judge_loads(second, limits), tolerances=limits)["loads"]
            errors = {row["metric"]: row["error"] for row in found["rows"] if row["metric"] in WITHIN}
            print(what := ", ".join(f"{metric} is {error:+.1%} off" for metric, error in errors.items()))
            right = all(abs(error) < WITHIN[metric] for metric, error in errors.items())
            return what, right and len(errors) == len(WITHIN), quiet

        until_right(serve)
