"""The ``fleet`` of a scenario: its replicas, and what routes between them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Discriminator,
    Field,
    Tag,
    ValidationInfo,
    model_validator,
)

from servecast.sim.fleet.autoscaler import AutoscalerSpec
from servecast.sim.fleet.disaggregation import KVLink, Proxy
from servecast.sim.inputs.schema import Count, InputFile, Model, NonNegative, Positive, did_you_mean, invalid
from servecast.sim.routing.llmd.config import read_document, read_epp
from servecast.sim.routing.llmd.disaggregated import DisaggregatedPicker
from servecast.sim.routing.llmd.endpoint_picker import EndpointPicker
from servecast.sim.routing.options import RouterOptions
from servecast.sim.routing.routers import ROUTERS


@dataclass(frozen=True, slots=True)
class Life:
    """When a replica is there, in seconds from the start of the run; None is never.

    start_s: it is ready. drain_s: it gets no new requests, and finishes those that it has. fail_s: it is
    gone, and its requests fail.
    """

    start_s: float = 0.0
    drain_s: float | None = None
    fail_s: float | None = None


class GpuSpec(Model):
    """The GPU, by its name or by a file."""

    name: str | None = None
    """Name in the catalogue (``servecast gpus``)."""
    file: InputFile | None = None
    """YAML or JSON file that describes a GPU of your own."""
    per_node: Count = 8
    """GPUs that are linked with each other: the most ranks that a model can be split over."""
    peer_to_peer: bool | None = None
    """Whether they read each other's memory. Default, over NVLink only: most servers do not let them over
    PCIe."""
    link_share: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of the link's bandwidth that all-reduces reach, in place of the profile's."""
    network_gb_per_s: Positive | None = None
    """GB/s each way of one GPU's own port to other nodes, over which pipeline stages hand on. Default, 50
    (400 Gbit/s)."""
    allreduce_latency_us: NonNegative | None = None
    """Latency of one small all-reduce, in place of the profile's."""

    @model_validator(mode="after")
    def _one(self) -> GpuSpec:
        if (self.name is None) == (self.file is None):
            raise invalid("a GPU needs one of name and file", "Give the name, for example a6000.")
        return self


class ReplicaSpec(Model):
    """Replicas that are alike."""

    count: Count = 1
    """Replicas that are like this."""
    gpu: GpuSpec | None = None
    """Their GPU. Default, the scenario's."""
    profile: str | None = None
    """Their profile. Default, the scenario's."""
    engine: dict[str, bool | int | float | str | dict[str, Any]] = Field(default_factory=dict)
    """Their engine flags, where not the scenario's; those of a ``command`` among them, too."""
    start_s: NonNegative = 0.0
    """When they are ready."""
    drain_s: Positive | None = None
    """From when they get no new requests. Default, never."""
    fail_s: Positive | None = None
    """When they fail, with the requests that they have. Default, never."""

    @model_validator(mode="after")
    def _in_order(self) -> ReplicaSpec:
        times = [("start_s", self.start_s), ("drain_s", self.drain_s), ("fail_s", self.fail_s)]
        given = [(name, time) for name, time in times if time is not None]
        for (earlier, start), (later, end) in pairwise(given):
            if end <= start:
                raise invalid(
                    f"{later} {end:g} does not come after {earlier} {start:g}",
                    "A replica starts, then drains, then fails.",
                    at=later,
                )
        return self

    @property
    def life(self) -> Life:
        """When the replica is there."""
        return Life(self.start_s, self.drain_s, self.fail_s)

    @property
    def as_in_scenario(self) -> bool:
        """Whether it is the engine, on the GPU, that the scenario describes."""
        return self.gpu is None and self.profile is None and not self.engine


def _router(name: str | Path, info: ValidationInfo) -> str | Path:
    """A policy by its name (in llm-d's spelling, too), or the path of an EndpointPickerConfig."""
    if isinstance(name, Path):
        return name
    if name.endswith((".yaml", ".yml")):
        folder = (info.context or {}).get("folder")
        path = Path(name) if folder is None else Path(folder) / name
        if not path.is_file():
            raise invalid(f"there is no file {str(path)!r}", "Paths are relative to the scenario's folder.")
        return path
    known = name.replace("-", "_")
    if known not in ROUTERS:
        raise invalid(
            f"router cannot be {name!r}",
            f"{did_you_mean(known, ROUTERS)} Known: {', '.join(ROUTERS)}, and the path of an "
            "EndpointPickerConfig (.yaml).".lstrip(),
        )
    return known


RouterName = Annotated[str | Path, AfterValidator(_router)]


def _is_list(value: Any) -> str:
    return "list" if isinstance(value, list | tuple) else "count"


def _as_pool(value: Any) -> Any:
    """A pool by its size, by what its servers are, or as a list of those."""
    if isinstance(value, int) and not isinstance(value, bool):
        value = {"count": value}
    return [value] if isinstance(value, Mapping | ReplicaSpec) else value


Pool = Annotated[tuple[ReplicaSpec, ...], BeforeValidator(_as_pool)]


class Fleet(Model):
    """Replicas of the engine behind a router."""

    replicas: Annotated[
        Annotated[Count, Tag("count")] | Annotated[tuple[ReplicaSpec, ...], Tag("list")],
        Discriminator(_is_list),
    ] = 1
    """Engines, each on its own GPUs; how many, or a list of what they are."""
    prefill: Pool = ()
    """Servers that compute prompts and hand their KV blocks on: how many, what they are (as an entry of
    ``replicas``), or a list of that. With ``decode``, instead of ``replicas``."""
    decode: Pool = ()
    """Servers that fetch the KV blocks of a prompt and answer; the same."""
    proxy: Proxy = Proxy()
    """What sends requests to a prefill and to a decode server."""
    kv_link: KVLink = KVLink()
    """Over what KV blocks go from one to the other."""
    router: RouterName = "round_robin"
    """How the next replica is picked; a policy's name, or the file of llm-d's EndpointPickerConfig."""
    router_options: RouterOptions = RouterOptions()
    """What the router knows when, and how it is set."""
    autoscaler: AutoscalerSpec | None = None
    """What lets replicas come and go; ``replicas`` is then how many there are at the start."""
    failure_detection_s: NonNegative = 1.0
    """For so long after a replica has failed the router still sends requests to it."""
    cold_start_s: NonNegative = 0.0
    """What the host of each replica does once, in its first step, before the GPU starts on it. Default 0,
    a warm server."""

    @model_validator(mode="after")
    def _some(self) -> Fleet:
        if self.size == 0:
            raise invalid("the fleet has no replicas", "List at least one.", at="replicas")
        self._pools_fit()
        if self.autoscaler is not None and not isinstance(self.replicas, int):
            raise invalid("an autoscaler of replicas that differ", "Give their number.", at="replicas")
        return self

    def _pools_fit(self) -> None:
        """Refuse half of a disaggregated fleet, or what goes with none."""
        if bool(self.prefill) != bool(self.decode):
            missing = "decode" if self.prefill else "prefill"
            raise invalid(f"the fleet has no {missing} servers", f"Give {missing} as well.", at=missing)
        if self.prefill and "replicas" in self.model_fields_set:
            raise invalid("replicas beside prefill and decode servers", "Leave replicas out.", at="replicas")
        if self.prefill and self.autoscaler is not None:
            raise invalid(
                "an autoscaler of prefill and decode servers is not modelled",
                "Give their numbers, and compare several.",
                at="autoscaler",
            )
        if not self.prefill and self.model_fields_set & {"proxy", "kv_link"}:
            name = "proxy" if "proxy" in self.model_fields_set else "kv_link"
            raise invalid(
                f"{name} without prefill and decode servers", "Give both, or leave it out.", at=name
            )
        if self.epp is not None and self.proxy.direct_below:
            raise invalid(
                "direct_below beside an EndpointPickerConfig",
                "Its prefix-based-pd-decider says which prompts are short.",
                at="proxy.direct_below",
            )

    @property
    def specs(self) -> tuple[ReplicaSpec, ...]:
        """What each replica is, one by one, those that prefill first."""
        if self.prefill:
            return tuple(spec for spec in (*self.prefill, *self.decode) for _ in range(spec.count))
        if isinstance(self.replicas, int):
            return (ReplicaSpec(),) * self.replicas
        return tuple(spec for spec in self.replicas for _ in range(spec.count))

    @property
    def roles(self) -> tuple[str, ...]:
        """Of each replica ``prefill`` or ``decode``; empty where it does both."""
        if not self.prefill:
            return ("",) * self.size
        pools = {"prefill": self.prefill, "decode": self.decode}
        return tuple(role for role, pool in pools.items() for spec in pool for _ in range(spec.count))

    @property
    def size(self) -> int:
        """How many replicas there are."""
        return len(self.specs)

    @property
    def epp(self) -> Path | None:
        """The EndpointPickerConfig, where the router is one."""
        return self.router if isinstance(self.router, Path) else None

    @property
    def router_name(self) -> str:
        """What messages call the router."""
        return self.router if isinstance(self.router, str) else self.router.name

    @property
    def asks_sessions(self) -> bool:
        """Whether the router looks at a request's session. Raises InputError if it does not load."""
        if self.epp is None:
            return self.router in ("session_affinity", "session_hashing")
        config = read_epp(self.epp, self.router_options.epp_release)
        plugins = (*config.filters, *(scorer for scorer, _weight in config.scorers))
        return any(plugin.type.startswith("session-affinity") for plugin in plugins)

    def check(self) -> None:
        """Read the EndpointPickerConfig, if any. Raises InputError if it does not load."""
        if self.epp is not None:
            config = read_epp(self.epp, self.router_options.epp_release)
            if self.prefill and config.split is not None:
                DisaggregatedPicker(config, self.router_options, np.random.default_rng(0), lambda: 0.0)
            EndpointPicker(config, self.router_options, np.random.default_rng(0), lambda: 0.0)

    @property
    def notes(self) -> tuple[str, ...]:
        """What of the router has no effect here. Raises InputError if it does not load."""
        if self.epp is None:
            return ()
        config = read_epp(self.epp, self.router_options.epp_release)
        found = list(config.notes)
        if config.split is not None and not self.prefill:
            found.append("its prefill profile (the fleet has no prefill servers)")
        return (f"{self.epp.name}: without effect here: {'; '.join(found)}",) if found else ()

    def facts(self) -> Mapping[str, Any]:
        """What a result says of it: all that is not a default, always how many behind what, and what the
        EndpointPickerConfig held."""
        replicas = self.size if self.prefill else self.replicas
        facts: dict[str, Any] = {"replicas": replicas, "router": self.router}
        facts |= self.model_dump(mode="json", exclude_defaults=True)
        return facts if self.epp is None else facts | {"endpoint_picker_config": read_document(self.epp)}
