"""Whether a scenario and its profile are of the server that they are to predict."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from servecast.calibrate.measure.engine.measure import model_config
from servecast.sim.hardware.gpu import find_gpu
from servecast.sim.hardware.model_shape import ModelShape
from servecast.sim.inputs.errors import InputError
from servecast.sim.scenario.deployment import Deployment
from servecast.sim.scenario.scenario import Scenario
from servecast.validate.live.truth import Truth


def refuse_misfit(truth: Truth, deployment: Deployment, model: Path | None) -> list[str]:
    """Refuse to predict a server with what is not its own; say what could not be compared.

    Args:
        deployment: of the server's scenario. model: folder of the served model, if it is at hand.

    Raises:
        InputError: the profile is of another GPU than the server's, the scenario of another model, or the
            server does what is not modelled.
    """
    if truth.not_modelled:
        said = ", ".join(f"{name} {value}" for name, value in truth.not_modelled.items())
        raise InputError(
            f"runs with {said}, which is not modelled", where="the server", fix="Start it without."
        )
    _compare_drafts(truth, deployment)
    notes = _compare_gpu(truth, deployment)
    if model is None or not (model / "config.json").is_file():
        notes.append("the served model's config.json was not at hand to compare")
    else:
        notes += _compare_model(model / "config.json", deployment)
    if truth.num_gpu_blocks is None:
        notes.append("the server does not say how many KV blocks it has: the scenario's are taken")
    if truth.version is None:
        notes.append(f"the server does not say its version: {deployment.scenario.engine.version} is taken")
    if "max_num_seqs" not in truth.flags:
        notes.append(
            "the server does not say its scheduler's flags (one with VLLM_SERVER_DEV_MODE=1 does): "
            "the scenario's are taken"
        )
    return notes


def _compare_drafts(truth: Truth, deployment: Deployment) -> None:
    """Whether the server drafts as the scenario says."""
    found = deployment.speculating
    ours = {}
    if found is not None:
        ours = {"method": found.config.method, "num_speculative_tokens": found.config.num_tokens}
    if truth.drafts is not None and dict(truth.drafts) != ours:
        raise InputError(
            f"the server drafts with {dict(truth.drafts) or 'nothing'}, the scenario {ours or 'not at all'}",
            where=f"{deployment.scenario.source}: engine.speculative_config",
            fix="Give what the server was started with.",
        )


def _compare_model(file: Path, deployment: Deployment) -> list[str]:
    scenario = deployment.scenario
    served, ours = model_config(file), model_config(scenario.config_file())
    notes = []
    if isinstance(text := served.get("text_config"), dict):
        served = {**ours, "quantization_config": served.get("quantization_config"), **text}
        notes.append("the served model's text_config was compared, and what it leaves out taken for the same")
    try:
        shape = ModelShape.from_config(served)
    except InputError as error:
        try:
            shape = ModelShape.from_config(served | {"model_type": ours.get("model_type")})
        except InputError:
            raise InputError(error.what, where=str(file), fix="Serve a model that is modelled.") from None
        notes.append(f"the served model was compared as the scenario's model_type: {error.what}")
    if scenario.engine.quantization == "fp8":
        shape = replace(shape, weight_bytes_each=1)
    mine = deployment.model
    other = [f"{name} ({getattr(mine, name)}, not {getattr(shape, name)})" for name in mine.alike(shape)]
    if other:
        raise InputError(
            f"differs from the served model's config.json in {', '.join(other)}",
            where=f"{scenario.source}: model.config",
            fix="Name the model that is served.",
        )
    return notes


def _compare_gpu(truth: Truth, deployment: Deployment) -> list[str]:
    scenario = deployment.scenario
    if scenario.gpu.file is not None:
        told = truth.gpu or "not known here"
        return [f"the server's GPU ({told}) is taken to be what {scenario.gpu.file.name} describes"]
    if truth.gpu is None:
        return [f"the server's GPU (not known here) is taken to be the scenario's, {deployment.gpu.name}"]
    try:
        found = find_gpu(truth.gpu, where="the server's GPU").name
    except InputError:
        found = truth.gpu
    profile = deployment.profile
    of = deployment.gpu.name if profile.of_kernel_timings else profile.gpu
    for what, gpu in (("profile", of), ("gpu", deployment.gpu.name)):
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
    said = dict(truth.flags)
    if truth.num_gpu_blocks is not None:
        said["num_gpu_blocks_override"] = truth.num_gpu_blocks
    return [
        f"the server's {name} is {value}, the scenario says {getattr(engine, name)}: the server's was taken"
        for name, value in said.items()
        if name in engine.model_fields_set and getattr(engine, name) not in (value, "auto")
    ]
