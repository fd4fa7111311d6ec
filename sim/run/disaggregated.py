"""A fleet of prefill and decode servers, made concrete: its routers, its link, and the connectors of its
engines."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from servecast.sim.engine.connector import Connector, Role
from servecast.sim.engine.kv_groups import MLA_KINDS
from servecast.sim.engine.rules import since
from servecast.sim.engine.scheduler import Scheduler
from servecast.sim.fleet.disaggregation import Link
from servecast.sim.fleet.kv_connectors import ExampleConnector, Exchange, NixlConnector
from servecast.sim.fleet.kv_ports import KVSide, Ports
from servecast.sim.fleet.legs import Disaggregation
from servecast.sim.hardware.front_end_costs import FrontEndCosts
from servecast.sim.inputs.errors import InputError
from servecast.sim.routing.llmd.config import read_epp
from servecast.sim.routing.llmd.disaggregated import DisaggregatedPicker
from servecast.sim.routing.pools import Pools, Splitting
from servecast.sim.routing.routers import ROUTERS
from servecast.sim.scenario.deployment import Deployment
from servecast.sim.scenario.hybrid_cache import by_kind
from servecast.sim.scenario.kv_pull import PullSettings, pull_settings
from servecast.sim.scenario.scenario import Scenario
from servecast.sim.scenario.serve_flags import resolved_flags

_HOST_COPY_S_PER_BYTE = 1 / 25e9  # assumed: PCIe 4 x16, each side one copy


class ServerPools:
    """What the servers of both pools have in common.

    Args:
        deployments: of each server, one by one.

    Raises:
        InputError: the two pools cannot exchange KV blocks, or a server is not vLLM's.
    """

    def __init__(
        self,
        scenario: Scenario,
        deployments: Sequence[Deployment],
        rng: np.random.Generator,
        clock: Callable[[], float],
    ) -> None:
        self.scenario, self.deployments = scenario, deployments
        self.roles = scenario.fleet.roles
        self.sides = [kv_side(each) for each in deployments]
        self._transfers = [self._transfer(index) for index in range(len(deployments))]
        self._agree()
        parallel = [each.config.data_parallel for each in deployments]
        self._cores = [1 if cores is None else cores.size for cores in parallel]
        self.link = link_of(scenario, deployments)
        picking, failing = rng.spawn(2)
        way, staged = self._transfers[0].way, any(each.buffer_device == "cpu" for each in self._transfers)
        self._stored: set[int] = set()
        exchange = None
        if way == "pull":
            servers = [index for index, count in enumerate(self._cores) for _ in range(count)]
            sides, copies = [self.sides[index] for index in servers], 2 * _HOST_COPY_S_PER_BYTE
            ports = Ports(self.link, sides, copies if staged else 0.0, servers)
            exchange = Exchange(self.link, ports, self._transfers[0].lease_s, failing)
        hop = scenario.fleet.proxy.hop(routed=scenario.fleet.epp is not None)
        self.disaggregation = Disaggregation(splitting_router(scenario, picking, clock), hop, exchange)

    def engines(self, index: int) -> list[tuple[Scheduler, NixlConnector | ExampleConnector]]:
        """The scheduler of each of a server's cores, with its connector."""
        first = sum(self._cores[:index])
        return [self._engine(index, first + core) for core in range(self._cores[index])]

    def _engine(self, index: int, core: int) -> tuple[Scheduler, NixlConnector | ExampleConnector]:
        transfer, exchange = self._transfers[index], self.disaggregation.exchange
        prefills, policy = self.roles[index] == "prefill", transfer.load_failure_policy
        role = self._role(index)
        connector: NixlConnector | ExampleConnector
        if exchange is not None:
            connector = NixlConnector(exchange, core, role, policy, prefills=prefills)
        else:
            side = self.sides[index]
            size = side.bytes_per_block * (1 if side.latent else side.ranks) // side.block_size
            connector = ExampleConnector(self.link, self._stored, size, role, policy)
        checked: Connector = connector
        return Scheduler(self.deployments[index].config, checked), connector

    def front_end(self, index: int) -> FrontEndCosts:
        """What stands in front of a server: the proxy on the way to a prompt's server, and on the way back
        from the one that answers. The network to the client is behind the latter."""
        its, hop = self.deployments[index], self.disaggregation.hop_s
        if self.roles[index] == "decode":
            return replace(its.front_end, delivery_s=its.front_end.delivery_s + hop)
        costs = its.profile.front_end.of_prompts(its.scenario.prompts)
        return replace(costs, latency_s=costs.latency_s + hop)

    def _role(self, index: int) -> Role:
        given, prefills = self._transfers[index].role, self.roles[index] == "prefill"
        if given is not None:
            return given
        if not since(self.deployments[index].config.version, "0.32"):
            return "kv_both"
        return "kv_producer" if prefills else "kv_consumer"

    def _transfer(self, index: int) -> PullSettings:
        own = self.deployments[index].scenario
        if own.engine.policy != "vllm":
            raise self._error(index, f"{own.engine.policy} has no KV connectors", "Use vLLM's engine.")
        found = pull_settings(own.engine.kv_transfer)
        wrong = "kv_consumer" if self.roles[index] == "prefill" else "kv_producer"
        if found.role == wrong:
            what = f"a {self.roles[index]} server that is {wrong}"
            raise self._error(index, what, "Give it the other role.")
        return found

    def _agree(self) -> None:
        """Both sides name one connector, and their blocks fit each other."""
        first, flags = self._transfers[0], self.deployments[0].scenario.engine
        mooncake = first.connector == "MooncakeConnector"
        hashed = any(
            each.connector.startswith("Nixl") and each.compares
            for each, role in zip(self._transfers, self.roles, strict=True)
            if role == "decode"
        )
        for index, (each, side) in enumerate(zip(self._transfers, self.sides, strict=True)):
            own = self.deployments[index].scenario.engine
            if each.way != first.way or (each.connector == "MooncakeConnector") != mooncake:
                what = f"{each.connector} beside {first.connector}"
                raise self._error(index, what, "Give all servers one connector.")
            if side.block_size != self.sides[0].block_size:
                what = f"KV blocks of {side.block_size} tokens beside some of {self.sides[0].block_size}"
                raise self._error(index, what, "Give all servers one block_size.")
            for name in ("kv_cache_dtype", "version")[: 1 + hashed]:  # compute_nixl_compatibility_hash
                its, theirs = getattr(own, name), getattr(flags, name)
                if its != theirs and (name != "version" or _whole(its) != _whole(theirs)):
                    fix = "Give all servers one: vLLM refuses the handshake."
                    raise self._error(index, f"{name} {its} beside {theirs}", fix)
            ours, others = (_by_kind(self.deployments[i]) for i in (index, 0))
            if hashed and ours != others:  # of the hash, too
                what = f"disable_hybrid_kv_cache_manager {not ours} beside {not others}"
                raise self._error(index, what, "Give all servers one: vLLM refuses the handshake.")
            big, small = max(side.ranks, self.sides[0].ranks), min(side.ranks, self.sides[0].ranks)
            if big % small:
                what = f"{big} ranks beside {small}"
                raise self._error(index, what, "Let one tensor_parallel_size divide the other.")
            if each.connector == "MooncakeConnector" and big != small:
                what = "MooncakeConnector between different numbers of ranks"
                raise self._error(index, what, "Use NixlConnector.")

    def _error(self, index: int, what: str, fix: str) -> InputError:
        return InputError(what, where=f"{self.scenario.source}: fleet.{self.roles[index]}", fix=fix)


def _by_kind(deployment: Deployment) -> bool:
    kinds = {layer.kind for layer in deployment.model.cache_layers}
    return by_kind(deployment.scenario.engine, kinds, deployment.config.version)


def _whole(release: str) -> list[str]:
    """Of three numbers: 0.32 is 0.32.0."""
    return [*release.removeprefix("v").split("."), "0", "0"][:3]


def kv_side(deployment: Deployment) -> KVSide:
    """The KV cache of a server, as its transfers see it."""
    layers = deployment.model.cache_layers
    latent = all(layer.kind in (*MLA_KINDS, "mamba") for layer in layers)
    heads = 1 if latent else max(layer.kv_heads for layer in layers)
    return KVSide(
        deployment.shard.tensor_parallel_size,
        heads,
        deployment.config.block_size,
        deployment.memory.bytes_per_block,
        max(group.layers for group in deployment.memory.groups) * (1 if latent else 2),
    )


def link_of(scenario: Scenario, deployments: Sequence[Deployment]) -> Link:
    """The KV link of a fleet."""
    storage = pull_settings(deployments[0].scenario.engine.kv_transfer).way == "storage"
    given, where = scenario.fleet.kv_link, f"{scenario.source}: fleet.kv_link"
    if storage != (given.kind == "storage") and (storage or given.kind == "storage"):
        what = "ExampleConnector and kv_link.kind storage go together"
        raise InputError(what, where=f"{where}.kind", fix="Give both or neither.")
    gpus = sum(each.scenario.engine.gpus for each in deployments)
    return given.resolved(deployments[-1].gpu, gpus, scenario.gpu.per_node, where=where)


def splitting_router(scenario: Scenario, rng: np.random.Generator, clock: Callable[[], float]) -> Splitting:
    """The router of a fleet with pools.

    Raises:
        InputError: its EndpointPickerConfig does not load, or knows no prefill servers.
    """
    fleet = scenario.fleet
    if fleet.epp is not None:
        config = read_epp(fleet.epp, fleet.router_options.epp_release)
        if config.split is None:
            fix = "Use disagg-profile-handler with a prefill decider, or a fleet without prefill servers."
            raise InputError("its handler sends no prompt to a prefill server", where=str(fleet.epp), fix=fix)
        return DisaggregatedPicker(config, fleet.router_options, rng, clock)
    assert isinstance(fleet.router, str)
    make = ROUTERS[fleet.router]
    prefill, decode = (make(fleet.router_options, each) for each in rng.spawn(2))
    return Pools(prefill, decode, fleet.proxy.direct_below, late=fleet.proxy.kind != "sidecar")


def pools_facts(deployment: Deployment) -> dict[str, Any]:
    """What a result says of both pools: their servers, flags and KV caches, and the link with its origin."""
    scenario = deployment.scenario
    fleet = scenario.fleet
    found: dict[str, Any] = {}
    made: list[Deployment] = []
    for role, pool in (("prefill", fleet.prefill), ("decode", fleet.decode)):
        servers = [Deployment.of(scenario.of_replica(each)) for each in pool]
        for spec, each in zip(pool, servers, strict=True):
            made += [each] * spec.count
        found[role] = [
            {
                "servers": spec.count,
                "gpu": each.gpu.name,
                "tensor_parallel_size": each.shard.tensor_parallel_size,
                "gpus": each.scenario.engine.gpus,
                "max_num_seqs": each.config.max_num_seqs,
                "max_num_batched_tokens": each.config.max_num_batched_tokens,
                "flags": resolved_flags(each),
                "kv_cache": each.memory.facts(),
            }
            for spec, each in zip(pool, servers, strict=True)
        ]
    link = link_of(scenario, made)
    return found | {"kv_link": asdict(link), "proxy_hop_s": fleet.proxy.hop(routed=fleet.epp is not None)}


def pools_lines(pools: Mapping[str, Any]) -> list[str]:
    """The same in lines: a pool each, and the link."""
    lines = []
    for role in ("prefill", "decode"):
        for each in pools[role]:
            size = f"KV cache {each['kv_cache']['tokens']:,} tokens"
            what = f"{each['servers']} x {each['gpus']} {each['gpu']}"
            lines.append(f"{role.capitalize()}: {what}, {size}, {shlex.join(each['flags'])}")
    link = pools["kv_link"]
    port = "server" if link["per_server"] else "GPU"
    return [*lines, f"KV link: {link['kind']}, {link['bandwidth'] / 1e9:g} GB/s a {port} ({link['origin']})"]
