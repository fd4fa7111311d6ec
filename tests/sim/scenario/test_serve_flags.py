"""The flags of an answer: all that are set, in words that ``vllm serve`` reads."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any, get_args

import pytest
from small_scenarios import scenario_file

from servecast.sim.run.simulation import simulate
from servecast.sim.scenario.deployment import Deployment
from servecast.sim.scenario.engine_flags import EngineFlags
from servecast.sim.scenario.scenario import load
from servecast.sim.scenario.serve_flags import resolved_flags, set_flags
from servecast.sim.scenario.vllm_flags import TAKEN, parse_serve_command

DRAFTS = {"method": "eagle3", "model": "org/head", "num_speculative_tokens": 3}
OTHERS: dict[Any, Any] = {int: 7, float: 0.5, str: "other", bool: True}


def another(name: str) -> Any:
    """A value of a flag that is not its default."""
    field = EngineFlags.model_fields[name]
    default, known = field.default, get_args(field.annotation)
    if known and all(isinstance(each, str) for each in known):
        return next(each for each in known if each != default)
    if isinstance(default, bool):
        return not default
    words = {"max_model_len": "4096", "max_num_batched_tokens": "4096", "kv_cache_memory_bytes": "4096"}
    read = TAKEN[name]
    return read(words[name]) if name in words else OTHERS.get(read, DRAFTS)


@pytest.mark.parametrize("name", TAKEN)
def test_every_flag_that_is_set_is_told_and_reads_back(name: str) -> None:
    value = ["sql", "chat"] if name == "lora_modules" else another(name)
    flags = EngineFlags.model_construct(version="0.33", **{name: value})
    words = set_flags(flags)
    assert words[0] in (f"--{name.replace('_', '-')}", f"--no-{name.replace('_', '-')}")
    assert parse_serve_command(shlex.join(["vllm", "serve", "m", *words])).flags == {name: value}
    assert not set_flags(EngineFlags(version="0.33"))


def test_an_answer_tells_what_its_server_was_started_with(tmp_path: Path) -> None:
    """The command of a speculating, offloading server, as its ``Flags:`` say it."""
    changes = {
        "model.config": "Llama-3.1-8B-Instruct",
        "gpu": {"name": "h100"},
        "engine": {"version": "0.32", "speculative_config": DRAFTS, "max_num_active_seqs": 9},
        "acceptance": 0.7,
        "profile": None,
    }
    drafting = load(scenario_file(tmp_path), changes)
    line = next(each for each in simulate(drafting).to_text().splitlines() if each.startswith("Flags: "))
    assert f"--speculative-config {shlex.quote(json.dumps(DRAFTS))}" in line
    assert "--max-num-active-seqs 9" in line
    offloading = {"version": "0.32", "kv_offloading_size": 8, "pipeline_parallel_size": 1}
    words = resolved_flags(
        Deployment.of(load(scenario_file(tmp_path), changes | {"engine": offloading, "acceptance": None}))
    )
    assert words[words.index("--kv-offloading-size") + 1] == "8.0"


def test_layers_of_stages_are_told_as_their_variable(tmp_path: Path) -> None:
    engine = {"version": "0.32", "pipeline_parallel_size": 2, "pp_layer_partition": [10, 14]}
    made = load(scenario_file(tmp_path), {"model.config": "Qwen2.5-0.5B-Instruct", "engine": engine})
    assert resolved_flags(Deployment.of(made))[0] == "VLLM_PP_LAYER_PARTITION=10,14"
