"""What a deployment's step times rest on where its scenario leaves that open.

In this order: the profile, or the file of a GPU's constants, that the scenario names; the constants of its
GPU's kernels, as timed; those of the nearest GPU that was timed, scaled by peaks and bandwidth; typical
efficiencies, if asked for or if nothing near was timed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType

from servecast.sim.engine.config import EngineConfig
from servecast.sim.hardware.error_band import transfer
from servecast.sim.hardware.gpu import GPU, find_gpu
from servecast.sim.hardware.gpu_constants import GpuConstants, compute_factor, nearest_timed
from servecast.sim.hardware.profile import Profile, build_step_time
from servecast.sim.hardware.shard import Shard
from servecast.sim.hardware.step_time.physical import StepTime
from servecast.sim.inputs.errors import InputError
from servecast.sim.metrics.binding import StepRow
from servecast.sim.scenario.scenario import KERNELS, Scenario, shipped_folder

NEAR = 2.0  # doublings of the weights, up or down, within which another model's profile is worth a word
_DECODES = StepRow(chunks=(), decodes=32, decode_context=32 * 1024, samples=32)
_PROMPT = StepRow(chunks=((1024, 0),), decodes=0, decode_context=0, samples=1)


def timed_gpus() -> dict[GPU, Path]:
    """The GPUs whose kernels were timed, with the files of their constants."""
    return {find_gpu(file.stem): file for file in sorted((shipped_folder() / "gpus").glob("*.json"))}


def constants_of(gpu: GPU) -> GpuConstants:
    """A GPU's constants, or those of the nearest that was timed, with what this one's power makes of them.

    Raises:
        InputError: none near it was timed.
    """
    timed = timed_gpus()
    nearest = nearest_timed(gpu, timed)
    if nearest is None:
        raise InputError(
            f"no kernels of a {gpu.name} were timed, nor of a GPU near it",
            where="profile",
            fix=f"Timed are {', '.join(each.name for each in timed)}. Leave profile out for typical values.",
        )
    return constants_from(timed[nearest], gpu)


def constants_from(file: Path, gpu: GPU) -> GpuConstants:
    """A file's constants, with what a GPU's power makes of them where it is not theirs.

    Raises:
        InputError: the file cannot be read, or is of a GPU that the catalogue does not know.
    """
    found = GpuConstants.load(file)
    timed = find_gpu(found.gpu, where=f"{file}: gpu")
    product = found.products.get("bf16")
    return found if product is None else found.scaled(compute_factor(gpu, timed, product.compute))


def profile_of(scenario: Scenario, shard: Shard, config: EngineConfig) -> Profile:
    """What the step times of a scenario's server rest on.

    Raises:
        InputError: the profile that it names cannot be read, or it asks for kernel timings and none are near.
    """
    release, kind = scenario.engine.version, scenario.server.step_times
    path = scenario.profile_file()
    if kind == "physical" and scenario.profile in (None, KERNELS):
        try:
            constants = constants_of(shard.gpu)
            return Profile.of_kernels(constants, shard, release, async_scheduling=config.async_scheduling)
        except InputError:
            if scenario.profile == KERNELS:
                raise
    if path is not None and GpuConstants.are_in(path):
        constants = constants_from(path, shard.gpu)
        return Profile.of_kernels(constants, shard, release, async_scheduling=config.async_scheduling)
    if path is not None:
        return Profile.load(path)
    return Profile.typical(
        shard.gpu.name, shard.model.name, release, servecast_version=version("servecast"), kind=kind
    )


def why_typical(shard: Shard) -> str | None:
    """Why there are no kernel timings for a deployment; None if there are."""
    try:
        constants_of(shard.gpu).efficiencies(shard)
    except InputError as error:
        return f"{error.what}: typical efficiencies stand in"
    return None


@dataclass(frozen=True, slots=True)
class Fitted:
    """A shipped profile that was fitted end to end on a deployment's GPU.

    Attributes:
        name: what ``profile`` may name. profile: what it says.
        decodes, prompt: how long it takes a step of 32 decodes at 1,024 tokens of context, and a prompt of
            1,024 tokens, relative to the deployment's own step times.
    """

    name: str
    profile: Profile
    decodes: float
    prompt: float

    @property
    def note(self) -> str:
        """What it is and what it would change."""
        profile = self.profile
        of = [profile.model, f"tensor_parallel_size {profile.tensor_parallel_size}", profile.server]
        flags = [name for name, value in profile.flags.items() if value is True]
        return (
            f"profile {self.name} was fitted to a server on this GPU ({', '.join(of + flags)}): with it 32 "
            f"decodes take {self.decodes:.2f} and a prompt of 1,024 tokens {self.prompt:.2f} times as long"
        )


@cache
def shipped_profiles() -> Mapping[str, Profile]:
    """What a scenario's ``profile`` may name, by name."""
    files = sorted((shipped_folder() / "profiles").glob("*.json"))
    return MappingProxyType({file.stem: Profile.load(file) for file in files})


def fitted_profiles(shard: Shard, step_time: StepTime) -> list[Fitted]:
    """The shipped profiles of a deployment's GPU and of models near its own, the nearest first."""
    found = []
    for name, profile in shipped_profiles().items():
        if profile.gpu != shard.gpu.name or profile.kind != "physical":
            continue
        away = abs(transfer(profile, shard).model_doublings)
        if away <= NEAR:
            other = build_step_time(profile, shard)
            ratios = [other.seconds(step) / step_time.seconds(step) for step in (_DECODES, _PROMPT)]
            found.append((away, Fitted(name, profile, *ratios)))
    return [each for _, each in sorted(found, key=lambda pair: pair[0])]
