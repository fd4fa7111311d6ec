"""Whether a scenario and its profile are of the server that they are to predict."""

from __future__ import annotations

import json
from pathlib import Path

from servecast.sim.deployment import Deployment
from servecast.sim.errors import InputError
from servecast.sim.gpu import find_gpu
from servecast.sim.scenario import Scenario
from servecast.validate.live_server import Truth

_SIZES = ("hidden_size", "num_hidden_layers", "intermediate_size", "num_key_value_heads", "vocab_size")


def refuse_misfit(truth: Truth, scenario: Scenario, deployment: Deployment, model: Path | None) -> list[str]:
    """Refuse to predict a server with what is not its own; say what could not be compared.

    Args:
        deployment: of the scenario. model: folder of the served model, if it is at hand.

    Raises:
        InputError: the profile is of another GPU than the server's, or the scenario of another model.
    """
    notes = _compare_gpu(truth, scenario, deployment)
    if model is None or not (model / "config.json").is_file():
        notes.append("the served model's config.json was not at hand to compare")
    else:
        served, ours = (
            json.loads(file.read_text(encoding="utf-8"))
            for file in (model / "config.json", scenario.config_file())
        )
        other = [name for name in _SIZES if served.get(name) != ours.get(name)]
        if other:
            raise InputError(
                f"differs from the served model's config.json in {', '.join(other)}",
                where=f"{scenario.source}: model.config",
                fix="Name the model that is served.",
            )
    if truth.num_gpu_blocks is None:
        notes.append("the server does not say how many KV blocks it has: the scenario's are taken")
    if truth.version is None:
        notes.append(f"the server does not say its version: {scenario.engine.version} is taken")
    if "max_num_seqs" not in truth.flags:
        notes.append(
            "the server does not say its scheduler's flags (one with VLLM_SERVER_DEV_MODE=1 does): "
            "the scenario's are taken"
        )
    return notes


def _compare_gpu(truth: Truth, scenario: Scenario, deployment: Deployment) -> list[str]:
    if truth.gpu is None:
        return ["the server runs on another machine: its GPU was not compared with the profile's"]
    if scenario.gpu.file is not None:
        return [f"the server's GPU ({truth.gpu}) is taken to be what {scenario.gpu.file.name} describes"]
    try:
        found = find_gpu(truth.gpu, where="the server's GPU").name
    except InputError:
        found = truth.gpu
    for what, gpu in (("profile", deployment.profile.gpu), ("gpu", deployment.gpu.name)):
        if found != gpu:
            raise InputError(
                f"is of {gpu}, the server runs on {truth.gpu}",
                where=f"{scenario.source}: {what}",
                fix="Calibrate this machine (servecast calibrate measure, then fit) and name its profile.",
            )
    return []


def replaced(truth: Truth, scenario: Scenario) -> list[str]:
    """Where the server's own word differs from what the scenario says in so many words."""
    engine = scenario.engine
    said = {**truth.flags, "num_gpu_blocks_override": truth.num_gpu_blocks}
    return [
        f"the server's {name} is {value}, the scenario says {getattr(engine, name)}: the server's was taken"
        for name, value in said.items()
        if name in engine.model_fields_set and value is not None and getattr(engine, name) != value
    ]
