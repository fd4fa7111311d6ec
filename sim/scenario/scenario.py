"""A scenario: model, GPU, engine, fleet, traffic, objectives, and what was reported of a real run.

``load("a6000-qwen2.5-7b", {"engine.max_num_seqs": 128})`` reads a shipped scenario or a YAML file. The JSON
schema of the file, for editors: ``python -m servecast.sim.scenario.scenario``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PrivateAttr, model_validator
from pydantic_core import PydanticCustomError

from servecast.sim.fleet.spec import Fleet, GpuSpec, ReplicaSpec
from servecast.sim.hardware.front_end_costs import Prompts
from servecast.sim.inputs.errors import InputError
from servecast.sim.inputs.schema import (
    Amount,
    Count,
    Model,
    NonNegative,
    did_you_mean,
    invalid,
    parse,
    within,
)
from servecast.sim.inputs.yaml_file import override, read_yaml
from servecast.sim.metrics import slo as objectives
from servecast.sim.scenario.acceptance import Acceptance
from servecast.sim.scenario.engine_flags import EngineFlags
from servecast.sim.scenario.hub import hub_config, hub_folder, is_hub_id
from servecast.sim.scenario.kv_offload import KVOffload
from servecast.sim.scenario.media import media_of, with_shapes
from servecast.sim.scenario.reported import Reported
from servecast.sim.scenario.servers import SERVERS, Server, checked
from servecast.sim.scenario.vllm_flags import parse_serve_command
from servecast.sim.traffic.arrivals import ClosedLoop
from servecast.sim.traffic.forms import WorkloadSpec, expand
from servecast.sim.traffic.inference_perf.workload import InferencePerfWorkload
from servecast.sim.traffic.spec import PlanSpec, StageSpec, StreamSpec, Sweep, Workload

SCHEMA_VERSION = 1
KERNELS = "kernels"  # the profile that stands for timings of the GPU's kernels
PHYSICS = "physics"  # the one that stands for typical efficiencies


def shipped_folder() -> Path:
    """Where the shipped scenarios, tables, model configs and profiles are."""
    return Path(str(resources.files("servecast.scenarios")))


def shipped_scenarios() -> list[str]:
    """The names of the shipped scenarios."""
    return sorted(path.stem for path in shipped_folder().glob("*.yaml"))


def _readable(parse: Callable[[str], object], text: str) -> str:
    """A text that ``parse`` takes."""
    try:
        parse(text)
    except InputError as error:
        raise invalid(error.what, error.fix) from None
    return text


def _version(value: Any) -> Any:
    if value != SCHEMA_VERSION:
        raise invalid(
            f"the scenario has schema version {value!r}, this servecast reads {SCHEMA_VERSION}",
            "Update the file, or use the servecast that it was written for.",
        )
    return value


class ModelSpec(Model):
    """The model, by its config."""

    config: str
    """Name of a shipped config (``servecast models``), the path of a Hugging Face ``config.json`` or of a
    folder with one, or the id of a model whose config lies in the cache of the Hub on this machine."""
    expert_skew: float = Field(default=0.0, ge=0, le=4)
    """How unevenly tokens choose routed experts: the i-th most used one gets them in proportion to i to the
    power of minus this. 0 is even; fit it to counts of a router's choices."""
    expert_loads: tuple[NonNegative, ...] = ()
    """Instead, how often each expert is chosen, relative to the others, in their order."""


class RunContext(Model):
    """What must be recorded beside a benchmark's numbers for them to mean something."""

    commit: str
    """Commit of the benchmark's harness."""
    gpu: str
    """GPU, its memory, and how many."""
    machine: str
    """Machine and CPU."""
    driver_cuda: str
    """Driver and CUDA version."""
    model: str
    """The model's name."""
    dtype: str
    """Weights and activations."""
    vllm_version: str
    """Version of the engine."""
    server_args: str
    """The server's arguments."""
    request_shape: str
    """Lengths and sampling."""
    load_pattern: str
    """How the load was made."""
    notes: str | None = None
    """Anything else."""


class Assumption(Model):
    """A constant that the source did not state."""

    name: str
    """What it is."""
    value: float | str
    """The value that is assumed."""
    origin: str
    """Where it comes from."""
    field: str | None = None
    """Dotted path of the scenario's field that holds it; ``plan --sensitivity`` varies it."""


def _engine_of(engine: EngineFlags, spec: ReplicaSpec) -> EngineFlags:
    """The engine's flags with those of a replica in their place."""
    written, own = engine.model_dump(exclude_unset=True), dict(spec.engine)
    try:
        if isinstance(command := own.get("command"), str):  # its flags count before the scenario's
            version = str(own.get("version", engine.version))
            own = parse_serve_command(command, version=version).flags | own
        return checked(parse(EngineFlags, written | own, source="engine"))
    except InputError as error:
        raise invalid(error.what, error.fix, at=error.where.removeprefix("engine: ")) from None


class Scenario(Model):
    """The file."""

    schema_version: Annotated[Literal[1], BeforeValidator(_version)]
    """Version of this format."""
    name: str
    """What results call the scenario."""
    description: str = ""
    """For people."""
    model: ModelSpec
    """The model."""
    gpu: GpuSpec
    """The GPU of one rank."""
    profile: str | None = None
    """Name of a shipped profile (``servecast profiles``), or the path of one or of a GPU's constants. Without
    it, and with ``kernels``, timings of vLLM's own kernels on this GPU, or on the nearest that was timed,
    scaled by peaks and bandwidth; ``physics`` for typical efficiencies. Results say which."""
    engine: Annotated[EngineFlags, AfterValidator(checked)]
    """The engine's flags."""
    fleet: Fleet = Fleet()
    """How many engines, behind which router."""
    workload: WorkloadSpec
    """The traffic, one stream or several stages."""
    prompts: Prompts = "text"
    """What clients send: ``text``, ``random_text`` (of random token ids, as benchmarks draw, which takes the
    tokenizer longer), or ``token_ids``, which it need not encode."""
    kv_offload: KVOffload = KVOffload()
    """What KV cache outside of GPUs lies in, where the engine's flags ask for such."""
    network_round_trip_s: NonNegative = 0.0
    """There and back between client and server, beyond what the profile's front end has of it. It is part of
    every TTFT, and delays the next request of a closed loop."""
    sweep: Sweep | None = None
    """Levels of the workload's stream, run one after the other."""
    plan: PlanSpec | None = None
    """The open-loop traffic that ``plan`` probes, where it differs from the workload."""
    slo: tuple[Annotated[str, AfterValidator(partial(_readable, objectives.SLO.parse))], ...] = ()
    """Objectives such as ``ttft:p95:500``, in milliseconds."""
    goodput: Annotated[str, AfterValidator(partial(_readable, objectives.Goodput.parse))] | None = None
    """What a good request meets, such as ``ttft:500 tpot:50``, in milliseconds."""
    gpu_hour_cost: NonNegative | None = None
    """Price of one GPU for an hour, in your currency."""
    reported: tuple[Reported, ...] = ()
    """Tables that a benchmark published, for ``reproduce``."""
    run_context: RunContext | None = None
    """What was recorded beside the benchmark's numbers."""
    assumptions: tuple[Assumption, ...] = ()
    """Constants that the source did not state."""
    acceptance: Acceptance | None = None
    """How many drafts are accepted, with ``engine.speculative_config``: a rate, a list by position,
    ``{length: 2.5}``, ``{golden: NAME}`` or ``{metrics: FILE}``. See [Speculation](speculation.md)."""
    seed: Amount = 0
    """Seed of traffic and noise."""
    replications: Count = 8
    """How many seeds ``reproduce`` runs, from ``seed`` on."""

    _source: Path | None = PrivateAttr(default=None)
    _changes: dict[str, Any] = PrivateAttr(default_factory=dict)

    @model_validator(mode="after")
    def _fits_together(self) -> Scenario:
        expand(self.workload, self.sweep)
        names = [table.name for table in self.reported]
        if len(set(names)) < len(names):
            raise invalid("two reported tables of one name", "Give each its own name.", at="reported")
        for index, table in enumerate(self.reported):
            try:
                table.own_workload()
            except PydanticCustomError as error:
                context = error.context or {}
                at = f"reported.{index}.{context.get('at') or 'workload'}"
                raise invalid(context["what"], context["fix"], at=at) from None
        listed = () if isinstance(self.fleet.replicas, int) else self.fleet.replicas
        pools = {"replicas": listed, "prefill": self.fleet.prefill, "decode": self.fleet.decode}
        for pool, specs in pools.items():
            for number, spec in enumerate(specs):
                with within(f"fleet.{pool}.{number}.engine"):
                    _engine_of(self.engine, spec)
        return self

    def of_replica(self, spec: ReplicaSpec) -> Scenario:
        """The scenario with the GPU, profile and engine flags of one of its replicas."""
        changes: dict[str, Any] = {
            "engine": _engine_of(self.engine, spec),
            "gpu": spec.gpu,
            "profile": spec.profile,
        }
        changes |= {"fleet": Fleet()} if self.fleet.prefill else {}
        return self.model_copy(update={name: value for name, value in changes.items() if value is not None})

    @property
    def source(self) -> str:
        """What messages call the scenario: its file, or its name."""
        return self.name if self._source is None else str(self._source)

    @property
    def server(self) -> Server:
        """The server that its engine is a part of."""
        return SERVERS[self.engine.policy]

    @property
    def notes(self) -> tuple[str, ...]:
        """What a result should say about the engine's configuration, the router's and the workload's."""
        said = self.workload.notes() if isinstance(self.workload, InferencePerfWorkload) else ()
        dear = self.gpu_hour_cost is not None and self.gpu_price is None
        price = (
            f"gpu_hour_cost {self.gpu_hour_cost:g} is not the other GPU's: set it for what that costs"
            if dear
            else ""
        )
        return tuple(filter(None, (*self.server.notes(self.engine), *self.fleet.notes, *said, price)))

    @property
    def gpu_price(self) -> float | None:
        """``gpu_hour_cost``; None where a what-if takes another GPU and does not say what that costs."""
        replaced = {"gpu", "gpu.name", "gpu.file"} & self._changes.keys()
        return None if replaced and "gpu_hour_cost" not in self._changes else self.gpu_hour_cost

    @property
    def changes(self) -> dict[str, Any]:
        """What ``load`` and ``changed`` put in the place of what the file says, by dotted field paths."""
        return dict(self._changes)

    @property
    def slos(self) -> tuple[objectives.SLO, ...]:
        """The SLOs, parsed."""
        return tuple(objectives.SLO.parse(text) for text in self.slo)

    @property
    def goodput_limits(self) -> objectives.Goodput | None:
        """The goodput limits, parsed."""
        return None if self.goodput is None else objectives.Goodput.parse(self.goodput)

    def stages(self) -> Workload:
        """The workload with its sweep expanded: what ``simulate`` and ``reproduce`` run."""
        return self._with_shapes(expand(self.workload, self.sweep))

    def _with_shapes(self, workload: Workload) -> Workload:
        """With what the model makes of the images in its prompts."""
        if not media_of(workload):
            return workload
        return with_shapes(workload, self.config_file(), self.engine)

    def workload_of(self, reported: Reported) -> Workload:
        """The workload that a reported table was measured with."""
        return reported.own_workload() or self.stages()

    def behind(self, router: str | Path) -> Scenario:
        """The scenario with another router (a name, or the path of an EndpointPickerConfig)."""
        return self.model_copy(update={"fleet": self.fleet.model_copy(update={"router": router})})

    def changed(self, overrides: Mapping[str, Any] | None = None, /, **fields: Any) -> Scenario:
        """A what-if: the scenario with other values in some fields.

        Args:
            overrides: by dotted paths, as {"engine.max_num_seqs": 128, "sweep.levels.0.num_requests": 40}.
            fields: the same for names without a dot, as ``seed=3``.

        Raises:
            InputError: as ``load``.
        """
        given = {**(overrides or {}), **fields}
        names = list(dict.fromkeys(field.split(".")[0] for field in given))
        data = {name: getattr(self, name) for name in self.model_fields_set}
        data |= self.model_dump(include=set(names), exclude_unset=True)
        for field, value in given.items():
            data = override(data, field, value, where=self.source)
        folder = None if self._source is None else self._source.parent.absolute()
        other = parse(Scenario, data, source=self.source, folder=folder)
        changed = self.model_copy(update={name: getattr(other, name) for name in names})
        changed._changes = self._changes | given
        return changed

    def open_loop(self) -> Workload:
        """The one-stage workload that ``plan`` probes, at a rate of its own: the workload itself if it is
        open-loop and has one stage, otherwise its first stream made open-loop by the ``plan`` block.

        Raises:
            InputError: the workload has several stages and there is no plan block, or it is of sessions.
        """
        if any(stream.talks for stage in self.stages().stages for stream in stage.streams):
            raise InputError(
                "sessions have no rate of requests to probe: each sends the next when it has an answer",
                where=f"{self.source}: workload",
                fix="Use simulate, or sweep --vary workload.arrivals.concurrency=8,16,32.",
            )
        written = self.workload if isinstance(self.workload, StreamSpec) else self.stages()
        if self.plan is None and self.sweep is None and isinstance(written, Workload):
            if len(written.stages) > 1:
                raise InputError(
                    "a workload of several stages has no single request rate",
                    where=f"{self.source}: workload.stages",
                    fix="Add a plan block: the open-loop traffic to probe.",
                )
            return written
        stream = written
        if isinstance(stream, Workload):
            stream = next(s for s in stream.stages[0].streams if not s.background)
        if self.plan is not None or self.sweep is not None or isinstance(stream.arrivals, ClosedLoop):
            several = isinstance(written, Workload) and len(written.stages) > 1
            stream = (self.plan or PlanSpec()).of(stream, swept=several or self.sweep is not None)
        return self._with_shapes(Workload(stages=(StageSpec(streams=(stream,)),)))

    def config_file(self, name: str | None = None, field: str = "model.config") -> Path:
        """The model's ``config.json``: a shipped one by its name, a file or a folder with one, or that of a
        Hugging Face id whose config lies in the cache of this machine; of another ``name`` that ``field``
        gives.

        Raises:
            InputError: there is none of that name or path.
        """
        name = self.model.config if name is None else name
        folder = (self._source.parent if self._source else Path()) / name
        if (folder / "config.json").is_file():
            return folder / "config.json"
        cached = hub_config(name)
        return cached or self._named_file(name, "models", field)

    def profile_file(self) -> Path | None:
        """The profile's file, or None without one.

        Raises:
            InputError: there is none of that name or path.
        """
        given = None if self.profile in (KERNELS, PHYSICS) else self.profile
        return None if given is None else self._named_file(given, "profiles", "profile")

    def _named_file(self, name: str, kind: str, field: str) -> Path:
        """A shipped file by its name (in any case), or a path relative to the scenario's folder."""
        if name.endswith(".json") or "/" in name:
            path = (self._source.parent if self._source else Path()) / name
            if path.is_file():
                return path
            known: dict[str, Path] = {}
        else:
            known = {path.stem.lower(): path for path in sorted((shipped_folder() / kind).glob("*.json"))}
            if name.lower() in known:
                return known[name.lower()]
        names = [path.stem for path in known.values()]
        usual = "Give the path of a JSON file."
        if kind == "models" and is_hub_id(name):
            usual = (
                f"Fetch it with: hf download {name} config.json (into {hub_folder()}), "
                "or give the path of a JSON file."
            )
        raise InputError(
            f"there is no {kind[:-1]} {name!r}",
            where=f"{self.source}: {field}",
            fix=did_you_mean(name.lower(), names) or (f"Shipped are {', '.join(names)}." if names else usual),
        )


def load(name_or_path: str | Path, overrides: Mapping[str, Any] | None = None) -> Scenario:
    """Read a scenario.

    Args:
        name_or_path: a shipped scenario's name, or a YAML file.
        overrides: what to change in it at once, as ``Scenario.changed`` does later.

    Raises:
        InputError: about the first mistake: what, in which file and field, and what to do.
    """
    path = _find(str(name_or_path))
    data = read_yaml(path)
    for field, value in (overrides or {}).items():
        data = override(data, field, value, where=str(path))
    scenario = parse(Scenario, data, source=str(path), folder=path.parent.absolute())
    scenario._source = path
    scenario._changes = dict(overrides or {})
    return scenario


def _find(name: str) -> Path:
    path = Path(name)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        if path.is_file():
            return path
        raise InputError("there is no such file", where=name, fix="Check the path.")
    shipped = shipped_folder() / f"{name}.yaml"
    if path.name != name or not shipped.is_file():
        names = shipped_scenarios()
        fix = did_you_mean(name, names) or f"Shipped are {', '.join(names)}; or give a .yaml file."
        raise InputError(f"there is no scenario {name!r}", where="SCENARIO", fix=fix)
    return shipped


if __name__ == "__main__":
    print(json.dumps(Scenario.model_json_schema(), indent=2))
