"""The profile: what was learned about a GPU and an engine, where it holds, and where it comes from.

A profile is one JSON file. It is fitted on one model and GPU but holds only what carries over (efficiencies,
host times, noise, the front end's costs); FLOPs and bytes come from the model and the GPU at hand.
"""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from servecast.sim.engine.engine import StepShape
from servecast.sim.hardware.fit_summary import FitSummary
from servecast.sim.hardware.front_end_costs import FrontEndCosts
from servecast.sim.hardware.gpu_constants import GpuConstants
from servecast.sim.hardware.model_shape import ModelShape
from servecast.sim.hardware.noise import StepNoise
from servecast.sim.hardware.shard import Shard
from servecast.sim.hardware.step_time.grid import Grid, GridStepTime
from servecast.sim.hardware.step_time.layers import LayeredStepTime, LayerTables
from servecast.sim.hardware.step_time.padded import PaddedCosts, PaddedStepTime
from servecast.sim.hardware.step_time.physical import Efficiencies, PhysicalStepTime, StepTime
from servecast.sim.hardware.step_time.pipeline import PipelinedStepTime
from servecast.sim.inputs.errors import InputError
from servecast.sim.inputs.files import write_whole

SCHEMA_VERSION: Literal[1] = 1

Range = tuple[float, float]
Origin = Literal["measured", "fitted", "kernels", "assumed", "given", "computed"]
LINK = ("link", "allreduce_s")  # the efficiencies that tell of all-reduces


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Domain(_Strict):
    """Ranges that the fit saw, (lowest, highest): tokens a step, requests a step (batch), and KV tokens a
    request. None is "not restricted by the data"."""

    tokens: Range | None = None
    batch: Range | None = None
    context: Range | None = None

    @field_validator("tokens", "batch", "context")
    @classmethod
    def _ordered(cls, value: Range | None) -> Range | None:
        if value is not None and not 0 <= value[0] <= value[1] < math.inf:
            raise ValueError("needs 0 <= lowest <= highest")
        return value


class Provenance(_Strict):
    """Where one parameter comes from: "efficiencies.compute", "front_end.request_s", ..."""

    parameter: str
    origin: Origin
    note: str = ""

    @classmethod
    def of(cls, parameters: Iterable[str], origin: Origin, note: str) -> tuple[Provenance, ...]:
        """Several that come from one place."""
        return tuple(cls(parameter=name, origin=origin, note=note) for name in parameters)


_PARAMETERS: Mapping[str, type[Efficiencies | StepNoise | FrontEndCosts | PaddedCosts]] = {
    "efficiencies": Efficiencies,
    "noise": StepNoise,
    "front_end": FrontEndCosts,
    "padded": PaddedCosts,
}


class Profile(_Strict):
    """What ``servecast calibrate fit`` writes. ``error_band`` is relative (0.1 is +-10 %), None if not known;
    ``error_bands`` are those of metrics where rows that were left out tell them.

    ``fitted_rows`` names the rows of a reported table that the fit used; a reproduction must not count
    them as predicted. ``kind`` "padded" takes step times from ``padded`` and leaves the efficiencies aside.

    ``models`` are the shapes that it was fitted to, ``intervals`` the 90 % intervals of fitted parameters by
    their names in ``provenance``, ``grid`` and ``layers`` the times of a profile of that kind, and ``fit``
    how well it describes what was measured.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    servecast_version: str
    kind: Literal["physical", "padded", "grid", "layers"] = "physical"
    gpu: str
    model: str
    engine_version: str
    dtype: str = "bfloat16"
    tensor_parallel_size: int = Field(default=1, ge=1)
    flags: dict[str, str | int | float | bool | None] = {}
    date: datetime.date | None = None
    efficiencies: Efficiencies = Efficiencies()
    noise: StepNoise = StepNoise()
    front_end: FrontEndCosts = FrontEndCosts()
    padded: PaddedCosts = PaddedCosts()
    domain: Domain = Domain()
    error_band: float | None = Field(default=None, ge=0)
    error_bands: dict[Literal["tpot", "ttft", "throughput"], float] = {}
    provenance: tuple[Provenance, ...] = ()
    fitted_rows: tuple[str, ...] = ()
    raw_data_sha256: str | None = None
    driver: str | None = None
    torch: str | None = None
    models: tuple[ModelShape, ...] = ()
    intervals: dict[str, Range] = {}
    grid: Grid | None = None
    layers: LayerTables | None = None
    fit: FitSummary | None = None

    @field_validator("efficiencies", "noise", "front_end", "padded", mode="before")
    @classmethod
    def _no_unknown_parameters(cls, value: Any, info: ValidationInfo) -> Any:
        known = [field.name for field in fields(_PARAMETERS[str(info.field_name)])]
        unknown = sorted(set(value) - set(known)) if isinstance(value, dict) else []
        if unknown:
            raise ValueError(f"unknown parameter {', '.join(unknown)}; known are {', '.join(known)}")
        return value

    @classmethod
    def of_kernels(
        cls, constants: GpuConstants, shard: Shard, engine_version: str, *, async_scheduling: bool
    ) -> Profile:
        """A profile from timings of single kernels: no step, server or model was measured.

        The host's times and the front end's are assumed. Without async scheduling the GPU waits while the
        host prepares a step, about 1.5 ms and 25 us a request. Launching a layer's dozen kernels takes the
        host about 0.5 ms, which short prompts outside CUDA graphs are bound by.

        Raises:
            InputError: the kernels of this model's weights were not timed.
        """
        efficiencies = replace(constants.efficiencies(shard), eager_layer_s=0.5e-3)
        if not async_scheduling:
            efficiencies = replace(efficiencies, host_fixed_s=1.5e-3, host_per_seq_s=25e-6)
        note = f"kernel timings on {constants.gpu}, {constants.release}"
        if constants.gpu != shard.gpu.name:
            note += ", scaled by peak and bandwidth"
        if constants.compute_factor != 1.0:
            note += f", compute times {constants.compute_factor:.2f} for its power"
        if stand_ins := constants.stand_ins(shard):
            note += f"; {', '.join(stand_ins)}"
        link = constants.link_note(shard)
        assumed = [f"efficiencies.{name}" for name in ("host_fixed_s", "host_per_seq_s", "eager_layer_s")]
        assumed += [f"front_end.{field.name}" for field in fields(FrontEndCosts)]
        links = [f"efficiencies.{name}" for name in LINK if link is not None]
        own = [f"efficiencies.{name}" for name in (*Efficiencies.parameters(), "by_kernel")]
        return cls(
            servecast_version=version("servecast"),
            gpu=constants.gpu,
            model=shard.model.name,
            engine_version=engine_version,
            tensor_parallel_size=shard.tensor_parallel_size,
            efficiencies=efficiencies,
            front_end=FrontEndCosts.typical(),
            provenance=(
                *Provenance.of((name for name in own if name not in (*assumed, *links)), "kernels", note),
                *Provenance.of(links, "assumed", link or ""),
                *Provenance.of(assumed, "assumed", "typical value"),
            ),
        )

    @classmethod
    def typical(
        cls,
        gpu: str,
        model: str,
        engine_version: str,
        *,
        servecast_version: str,
        kind: Literal["physical", "padded"] = "physical",
    ) -> Profile:
        """A profile that nobody measured: typical values, all of them assumed. What stands in front of an
        engine of padded batches is not known, and left out."""
        front_end = FrontEndCosts()
        if kind == "physical":
            front_end = FrontEndCosts.typical()
            names = [f"efficiencies.{name}" for name in Efficiencies.parameters()]
            names += [f"front_end.{field.name}" for field in fields(FrontEndCosts)]
        else:
            names = [f"padded.{field.name}" for field in fields(PaddedCosts)]
        return cls(
            servecast_version=servecast_version,
            kind=kind,
            gpu=gpu,
            model=model,
            engine_version=engine_version,
            front_end=front_end,
            provenance=Provenance.of(names, "assumed", "typical value"),
        )

    def parameters(self) -> tuple[str, ...]:
        """The names of the numbers that its kind of profile uses, as in ``provenance``."""
        padded = self.kind == "padded"
        groups = [name for name in _PARAMETERS if (name == "padded") == padded or name == "noise"]
        return tuple(
            f"{group}.{field.name}"
            for group in groups
            for field in fields(_PARAMETERS[group])
            if isinstance(getattr(getattr(self, group), field.name), int | float)
        )

    @property
    def of_kernel_timings(self) -> bool:
        """Whether it comes from timings of single kernels: no server was measured."""
        return any(entry.origin == "kernels" for entry in self.provenance)

    @property
    def title(self) -> str:
        """What it is of, in words."""
        if self.of_kernel_timings:
            return next(entry.note for entry in self.provenance if entry.origin == "kernels")
        return f"{self.model} on {self.gpu}, {self.server}"

    @property
    def server(self) -> str:
        """The engine and its version, in words."""
        return f"{'padded batches,' if self.kind == 'padded' else 'vLLM'} {self.engine_version}"

    @classmethod
    def load(cls, path: str | Path) -> Profile:
        """Read a profile.

        Raises:
            InputError: no such file, not JSON, another schema version, or a field that is wrong.
        """
        path = Path(path)
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise InputError(
                "no such profile",
                where=str(path),
                fix="Name an existing profile or run servecast calibrate fit.",
            ) from error
        except (OSError, ValueError) as error:
            raise InputError(
                f"cannot read it as JSON ({error})",
                where=str(path),
                fix="Write it again with servecast calibrate fit.",
            ) from error
        return cls.parse(data, str(path))

    @classmethod
    def parse(cls, data: object, where: str) -> Profile:
        """Check a profile given as JSON data; ``where`` is named in the InputError."""
        if not isinstance(data, dict):
            raise InputError("is not a JSON object", where=where, fix="Give a profile.")
        version = data.get("schema_version")
        if version != SCHEMA_VERSION:
            raise InputError(
                f"schema version {version!r}, this servecast reads {SCHEMA_VERSION}",
                where=f"{where}: schema_version",
                fix="Fit the profile again with this version of servecast.",
            )
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"])
            raise InputError(
                first["msg"].removeprefix("Value error, "),
                where=f"{where}: {field}" if field else where,
                fix="Correct the field or fit the profile again.",
            ) from error

    def save(self, path: str | Path) -> None:
        """Write the profile, whole or not at all."""
        text = self.model_dump_json(indent=2) + "\n"
        write_whole(Path(path), lambda partial: partial.write_text(text, encoding="utf-8"))

    def outside(self, step: StepShape) -> str | None:
        """What of a step lies beyond the data of the fit, in words; None inside. A request's context is the
        mean of the decodes', or a chunk's."""
        requests = step.decodes + len(step.chunks)
        if not requests:
            return None
        contexts = [tokens + context for tokens, context in step.chunks]
        if step.decodes:
            contexts.append(round(step.decode_context / step.decodes))
        tokens = step.decodes + sum(tokens for tokens, _ in step.chunks)
        return self.outside_ranges(
            tokens=(tokens, tokens), batch=(requests, requests), context=(min(contexts), max(contexts))
        )

    def outside_ranges(
        self, *, tokens: Range | None = None, batch: Range | None = None, context: Range | None = None
    ) -> str | None:
        """The same for ranges, (lowest, highest), of a whole run."""
        beyond = []
        for name, asked in (("tokens", tokens), ("batch", batch), ("context", context)):
            fitted: Range | None = getattr(self.domain, name)
            if fitted is not None and asked is not None and (asked[0] < fitted[0] or asked[1] > fitted[1]):
                beyond.append(f"{name} {asked[0]:g}-{asked[1]:g} (fitted on {fitted[0]:g}-{fitted[1]:g})")
        return f"extrapolated: {', '.join(beyond)}" if beyond else None


def build_step_time(profile: Profile, shard: Shard) -> StepTime:
    """The step-time model of a profile's kind, for a model and a GPU that need not be those of the fit.

    Raises:
        InputError: the profile lacks its times, they are not of this model and GPU, or the model has layers
        of a kind that no step time knows.
    """
    if shard.model.untimed:
        raise InputError(
            f"{shard.model.name} has {shard.model.untimed}, whose time is not modelled",
            where="model",
            fix="Use a model of other layers.",
        )
    if profile.kind in ("padded", "layers") and not shard.model.grouped:
        raise InputError(
            f"a profile of kind {profile.kind} is of grouped-query attention; not all layers of "
            f"{shard.model.name} have it",
            where="profile",
            fix="Use a profile of kind physical, or none.",
        )
    if shard.context_ranks > 1 and profile.kind != "physical":
        raise InputError(
            f"a profile of kind {profile.kind} has no times of decode context parallelism",
            where="profile",
            fix="Use a profile of kind physical, or none.",
        )
    if shard.pipeline:
        if profile.kind != "physical":
            raise InputError(
                f"a profile of kind {profile.kind} does not tell apart the layers that pipeline stages share",
                where="profile",
                fix="Use a profile of kind physical, or none.",
            )
        stages = tuple(PhysicalStepTime(each, profile.efficiencies) for each in shard.stages)
        return PipelinedStepTime(stages, shard.network, shard.stages_per_node)
    match profile.kind:
        case "physical":
            return PhysicalStepTime(shard, profile.efficiencies)
        case "padded":
            return PaddedStepTime(shard, profile.padded)
        case "grid" if profile.grid is not None:
            return GridStepTime(profile.grid, shard)
        case "layers" if profile.layers is not None:
            return LayeredStepTime(profile.layers, shard, profile.efficiencies)
    missing = "there is no grid" if profile.kind == "grid" else "there are none"
    raise InputError(
        f"kind is {profile.kind}, but {missing}",
        where=f"profile: {profile.kind}",
        fix="Fit the profile again.",
    )
