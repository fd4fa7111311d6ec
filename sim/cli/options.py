"""Options that commands share: which what-if to make of a scenario, and under which load."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import yaml
from cyclopts import Group, Parameter

from servecast.sim.inputs.errors import InputError
from servecast.sim.inputs.files import file_or_name
from servecast.sim.scenario.hub import is_hub_id
from servecast.sim.scenario.scenario import Scenario, load

WHAT_IF = Group("What-if", sort_key=10)
LOAD = Group("Load", sort_key=11)

_TEXT = ("engine.version", "name", "profile", "model.config", "gpu.name")  # 0.10 is a version, no number


@Parameter(name="*", group=WHAT_IF)
@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """What to change in a scenario.

    Attributes:
        set: a field of the scenario by its dotted path, as engine.max_num_seqs=128. Can be repeated.
        seed: of the traffic and of the noise.
        model_config: another model: a shipped config's name, a config.json or its folder, a Hugging Face id.
        profile: another profile: a shipped one's name, or its path.
        engine_version: another vLLM version.
    """

    set: list[str] | None = None
    seed: int | None = None
    model_config: str | None = None
    profile: str | None = None
    engine_version: str | None = None

    def changes(self) -> dict[str, Any]:
        """Dotted field paths and values; ``--set`` wins over the other flags.

        Raises:
            InputError: a ``--set`` is not of the form FIELD=VALUE.
        """
        given = {field: value for field, value in self._flags().items() if value is not None}
        return given | dict(assignment(text) for text in self.set or ())

    def _flags(self) -> dict[str, Any]:
        model = self.model_config
        return {
            "seed": self.seed,
            "model.config": model if model and is_hub_id(model) else file_or_name(model),
            "profile": file_or_name(self.profile),
            "engine.version": self.engine_version,
        }

    def load(self, scenario: str) -> Scenario:
        """The scenario with these changes."""
        return load(scenario, self.changes())


@Parameter(name="*", group=WHAT_IF)
@dataclass(frozen=True, kw_only=True, slots=True)
class WhatIf(Change):
    """What to change in a scenario.

    Attributes:
        gpu: another GPU, by its name, or the file that describes it.
        tensor_parallel_size: GPUs of an engine core.
        data_parallel_size: engine cores of a replica.
        max_num_seqs: sequences that may run together.
        replicas: engines behind the router.
        router: routing policy, as least_outstanding, or the file of an EndpointPickerConfig.
    """

    gpu: str | None = None
    tensor_parallel_size: int | None = None
    data_parallel_size: int | None = None
    max_num_seqs: int | None = None
    replicas: int | None = None
    router: str | None = None

    def _flags(self) -> dict[str, Any]:
        return Change._flags(self) | {
            "gpu": None if self.gpu is None else _gpu(self.gpu),
            "engine.tensor_parallel_size": self.tensor_parallel_size,
            "engine.data_parallel_size": self.data_parallel_size,
            "engine.max_num_seqs": self.max_num_seqs,
            "fleet.replicas": self.replicas,
            "fleet.router": file_or_name(self.router),
        }


@Parameter(name="*", group=LOAD)
@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """Open-loop traffic instead of the scenario's own workload.

    Attributes:
        request_rate: requests a second, of the traffic that plan probes.
        num_requests: how many requests at that rate, 1000 without it.
    """

    request_rate: float | None = None
    num_requests: int | None = None

    @property
    def count(self) -> int:
        """How many requests at the rate."""
        return requests_at(self.request_rate, self.num_requests, "--request-rate")


def requests_at(rate: float | str | None, num_requests: int | None, flag: str) -> int:
    """How many requests at the rate, which ``flag`` gives: 1000, unless ``num_requests`` says otherwise.

    Raises:
        InputError: a number without a rate, which would change nothing.
    """
    if num_requests is not None and rate is None:
        what = f"{num_requests} requests at no rate: the scenario's own workload has its own number"
        fix = f"Give {flag} with it, or --set workload.num_requests=..."
        raise InputError(what, where="--num-requests", fix=fix)
    return 1000 if num_requests is None else num_requests


def assignment(text: str, *, where: str = "--set") -> tuple[str, Any]:
    """The field and the value of "engine.max_num_seqs=128"; values are read as in a scenario's YAML.

    Raises:
        InputError: it is not of that form, or the value is no YAML.
    """
    field, value = _split(text, where)
    return field, value if _is_text(field, value) else _read(value, where)


def assignments(text: str) -> tuple[str, list[Any]]:
    """The same for the field and the values of --vary, as "engine.max_num_seqs=64,128"."""
    field, values = _split(text, "--vary")
    if _is_text(field, values):
        return field, values.split(",")
    return field, list(_read(f"[{values}]", "--vary"))


def numbers(text: str, *, where: str) -> list[float]:
    """Positive numbers separated by commas."""
    try:
        found = [float(word) for word in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 < number < float("inf") for number in found):
        what = f"{text!r} is no list of numbers above 0"
        raise InputError(what, where=where, fix="Separate them by commas.")
    return found


def check_jobs(jobs: int) -> None:
    """Refuse a number of processes that is none."""
    if jobs == 0 or jobs < -1:
        raise InputError(f"{jobs} processes", where="--jobs", fix="Give at least 1, or -1 for all cores.")


def _split(text: str, where: str) -> tuple[str, str]:
    field, _, value = text.partition("=")
    if not value or not all(field.split(".")):
        fix = "Write for example engine.max_num_seqs=128."
        raise InputError(f"{text!r} is not of the form FIELD=VALUE", where=where, fix=fix)
    return field, value


def _is_text(field: str, value: str) -> bool:
    return field in _TEXT and value not in ("null", "~")


def _read(value: str, where: str) -> Any:
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError:
        raise InputError(f"{value!r} is not a value", where=where, fix="Write it as in a scenario.") from None


def _gpu(name: str) -> dict[str, str]:
    file = file_or_name(name)
    return {"name": name} if file == name else {"file": str(file)}
