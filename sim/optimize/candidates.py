"""What may be deployed: every combination of GPUs, ranks, flags, variants of the model, and routers."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from servecast.sim.hardware.gpu import GPU, find_gpu
from servecast.sim.inputs.errors import InputError
from servecast.sim.inputs.files import file_or_name
from servecast.sim.scenario.scenario import Scenario

_FIELDS = {
    "tensor_parallel": "engine.tensor_parallel_size",
    "pipeline_parallel": "engine.pipeline_parallel_size",
    "decode_context_parallel": "engine.decode_context_parallel_size",
    "data_parallel": "engine.data_parallel_size",
    "expert_parallel": "engine.enable_expert_parallel",
    "replicas": "fleet.replicas",
    "max_num_seqs": "engine.max_num_seqs",
    "max_num_batched_tokens": "engine.max_num_batched_tokens",
    "kv_offloading_size": "engine.kv_offloading_size",
    "routers": "fleet.router",
    "prefill": "fleet.prefill.0.count",
    "prefill_tensor_parallel": "fleet.prefill.0.engine.tensor_parallel_size",
    "decode": "fleet.decode.0.count",
    "decode_tensor_parallel": "fleet.decode.0.engine.tensor_parallel_size",
}
_POOLS = ("prefill", "decode")
_SHOWN = {"gpus": "gpu", "variants": "variant", "routers": "router"}  # in place of the plural


@dataclass(frozen=True, slots=True)
class Candidate:
    """label: what was chosen, by the names that people see. scenario: with that put in."""

    label: Mapping[str, str | int]
    scenario: Scenario

    @property
    def gpu(self) -> str:
        """The name of its GPU."""
        spec = self.scenario.gpu
        if spec.file is not None:
            return GPU.from_file(spec.file).name
        return find_gpu(spec.name or "", where=f"{self.scenario.source}: gpu.name").name

    def __str__(self) -> str:
        pools = {"prefill": "{}P", "decode": "{}D", **{f"{pool}_tensor_parallel": "TP{}" for pool in _POOLS}}
        names = {"tensor_parallel": "TP{}", "pipeline_parallel": "PP{}", "data_parallel": "DP{}"}
        names["decode_context_parallel"] = "DCP{}"
        names |= {**dict.fromkeys(_SHOWN.values(), "{}"), **pools}
        return " ".join(names.get(name, name + "={}").format(value) for name, value in self.label.items())


@dataclass(frozen=True, slots=True)
class Choices:
    """What to choose from; without an entry the scenario's own.

    Attributes:
        gpus: names of the catalogue, or files that describe one. A single choice need not be in a list.
        tensor_parallel: GPUs of an engine core, or of each of its stages. pipeline_parallel: stages.
            decode_context_parallel: of the GPUs those that share out KV. data_parallel: engine cores of a
            replica, which then has as many times the GPUs.
            expert_parallel: "on" and "off".
        replicas: replicas that are simulated together behind the router, and bought together.
        max_num_seqs, max_num_batched_tokens: values of the flags.
        kv_offloading_size: GiB of host memory for KV cache of a replica; 0 is none.
        variants: of the model, for instance of another precision: names to model configs (a shipped one's
            name, or the path of a config.json), or to changes of the scenario by dotted field paths.
        routers: policies by name, or files of an EndpointPickerConfig.
        prefill, decode: servers of each pool, of a scenario that has pools. prefill_tensor_parallel,
            decode_tensor_parallel: GPUs of one of their servers.
        prices: file of what GPUs cost, instead of the one that is shipped.
    """

    gpus: str | Sequence[str] = ()
    tensor_parallel: int | Sequence[int] = ()
    pipeline_parallel: int | Sequence[int] = ()
    decode_context_parallel: int | Sequence[int] = ()
    data_parallel: int | Sequence[int] = ()
    expert_parallel: str | Sequence[str] = ()
    replicas: int | Sequence[int] = ()
    max_num_seqs: int | Sequence[int] = ()
    max_num_batched_tokens: int | Sequence[int] = ()
    kv_offloading_size: int | Sequence[int] = ()
    variants: Mapping[str, str | Mapping[str, Any]] | None = None
    routers: str | Sequence[str] = ()
    prefill: int | Sequence[int] = ()
    prefill_tensor_parallel: int | Sequence[int] = ()
    decode: int | Sequence[int] = ()
    decode_tensor_parallel: int | Sequence[int] = ()
    prices: Path | str | None = None

    def of(self, scenario: Scenario) -> list[Candidate]:
        """Every combination, the first kind of choice changing slowest.

        Raises:
            InputError: a GPU, model config or router is not known, a value does not fit its field, or comes
                twice.
        """
        pooled = [name for name, at in _FIELDS.items() if at.startswith(("fleet.prefill", "fleet.decode"))]
        if not scenario.fleet.prefill and any(getattr(self, name) for name in pooled):
            where, fix = f"{scenario.source}: fleet", "Add fleet: {prefill: 1, decode: 1}."
            raise InputError("the scenario has no prefill and decode servers to vary", where, fix)
        kinds = [field.name for field in fields(self) if field.name != "prices" and getattr(self, field.name)]
        axes = [self._axis(kind, scenario) for kind in kinds]
        found = []
        for picked in itertools.product(*axes):
            label = {name: value for name, value, _ in picked}
            changes = {field: value for _, _, changes in picked for field, value in changes.items()}
            candidate = Candidate(label, scenario.changed(changes) if changes else scenario)
            candidate.scenario.config_file()
            candidate.scenario.fleet.check()
            found.append(candidate)
        return found

    def _axis(self, kind: str, scenario: Scenario) -> list[tuple[str, str | int, dict[str, Any]]]:
        """(name, value, changes) of each choice of a kind."""
        given, name = getattr(self, kind), _SHOWN.get(kind, kind)
        chosen: Any = (given,) if isinstance(given, str | int) else given
        axis: list[tuple[str, str | int, dict[str, Any]]]
        if kind == "gpus":
            axis = [(name, *_gpu(each, scenario)) for each in chosen]
        elif kind == "variants":
            axis = [
                (name, each, {"model.config": value} if isinstance(value, str) else dict(value))
                for each, value in chosen.items()
            ]
        elif kind == "expert_parallel":
            if not set(chosen) <= {"on", "off"}:
                what = f"expert parallelism is on or off, not {', '.join(map(str, chosen))}"
                raise InputError(what, where="--expert-parallel", fix="Write on,off.")
            axis = [(name, each, {_FIELDS[kind]: each == "on"}) for each in chosen]
        else:
            axis = [(name, each, {_FIELDS[kind]: each}) for each in chosen]
        counts = Counter(str(value).casefold() for _, value, _ in axis)
        for _, value, _ in axis:
            if counts[str(value).casefold()] > 1:
                what = f"{value} comes twice"
                raise InputError(what, where=f"--{kind.replace('_', '-')}", fix="Name each choice once.")
        return axis


def _gpu(name: str, scenario: Scenario) -> tuple[str, dict[str, Any]]:
    """What a GPU is called, and the changes that it takes; the scenario's own keeps what is said of it."""
    file = file_or_name(name)
    if file != name:
        return str(name), {"gpu": {"file": str(file)}}
    own = scenario.gpu.name
    gpu = find_gpu(name, where="--gpus")
    if own is not None and find_gpu(own, where=f"{scenario.source}: gpu.name") == gpu:
        return gpu.name, {}
    return gpu.name, {"gpu": {"name": name}}
