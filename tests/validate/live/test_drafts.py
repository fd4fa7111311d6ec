"""A server that drafts: the flags that it is started with, and what it says of itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from servecast.sim.inputs.errors import InputError
from servecast.sim.scenario.deployment import Deployment
from servecast.sim.scenario.scenario import load
from servecast.validate.live.misfit import refuse_misfit
from servecast.validate.live.own_server import serve_flags
from servecast.validate.live.truth import Truth

NGRAM = {"method": "ngram", "num_speculative_tokens": 3}


def test_flags_and_truth_of_a_server_that_drafts(tmp_path: Path) -> None:
    file = tmp_path / "scenario.yaml"
    file.write_text(
        "schema_version: 1\nname: drafts\nmodel: {config: Qwen3-0.6B}\ngpu: {name: l4}\nprofile: physics\n"
        f"engine: {{version: '0.32', max_model_len: 2048, speculative_config: {json.dumps(NGRAM)}}}\n"
        "acceptance: {rate: 0.5, proposed: 0.5}\n"
        "workload: {arrivals: {kind: closed_loop, concurrency: 1}, num_requests: 2,\n"
        "  prompt_tokens: {kind: fixed, tokens: 10}, output_tokens: {kind: fixed, tokens: 10}}\n"
    )
    scenario = load(file)
    flags = serve_flags(scenario.engine)
    assert json.loads(flags[flags.index("--speculative-config") + 1]) == NGRAM
    deployment = Deployment.of(scenario)

    def truth(drafts: dict[str, object] | None) -> Truth:
        return Truth("0.32.0", 1000, {"max_num_seqs": 256}, "l4", "m", drafts=drafts)

    assert refuse_misfit(truth(NGRAM), deployment, None) == refuse_misfit(truth(None), deployment, None)
    for other in ({}, NGRAM | {"num_speculative_tokens": 5}):
        with pytest.raises(InputError, match="the server drafts with"):
            refuse_misfit(truth(other), deployment, None)
