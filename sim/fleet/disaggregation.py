"""What a scenario says of a fleet that computes prompts and answers on servers of their own: the proxy that
sends a request to both, and the link over which the KV cache goes from one to the other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from servecast.sim.hardware.gpu import GPU
from servecast.sim.inputs.errors import InputError
from servecast.sim.inputs.schema import Amount, Model, NonNegative, Positive

LinkKind = Literal["nvlink", "pcie", "infiniband", "roce", "tcp", "storage"]


class Proxy(Model):
    """What sends a request to a prefill server, waits for its whole answer, and sends it to a decode
    server."""

    kind: Literal["toy_proxy", "sidecar"] | None = None
    """vLLM's toy proxy, one process in front of all servers, or llm-d's sidecar in front of each decode
    server. Default, the sidecar where the router is an EndpointPickerConfig. They differ in ``hop_s``, and in
    that the toy proxy picks the decode server when the prompt is computed."""
    hop_s: NonNegative | None = None
    """From one side of the proxy to the other: a request on its way to the prefill server, its answer on the
    way to the decode server, and each token on its way back. Default, 2 ms of the toy proxy (Python), 0.3 ms
    of the sidecar (Go); both are assumed."""
    direct_below: Amount = 0
    """Prompts of fewer tokens go straight to a decode server, which computes them itself. An
    EndpointPickerConfig has a decider for that."""

    def hop(self, *, routed: bool) -> float:
        """Seconds of a hop; ``routed``: the router is an EndpointPickerConfig."""
        kind = self.kind or ("sidecar" if routed else "toy_proxy")
        return _HOPS[kind] if self.hop_s is None else self.hop_s


_HOPS = {"toy_proxy": 2e-3, "sidecar": 0.3e-3}


class KVLink(Model):
    """Over what KV blocks go from prefill to decode servers. Defaults by kind, with where they come from, are
    in [prefill and decode](disaggregation.md)."""

    kind: LinkKind | None = None
    """Default, ``nvlink`` where all GPUs of the fleet are in one node and have it, ``pcie`` where they are in
    one node and do not, else ``infiniband``. ``tcp`` and ``storage`` (a shared file system) are one port a
    server, the others one a GPU."""
    gb_per_s: Positive | None = None
    """Of one port and each way, in GB/s, as transfers of KV blocks reach it."""
    latency_us: NonNegative | None = None
    """Of a transfer, beside its bytes."""
    descriptor_us: NonNegative | None = None
    """What posting one descriptor takes: a run of neighbouring blocks in one layer's tensor."""
    handshake_s: NonNegative = 0.1
    """When a decode server meets a prefill server for the first time. Assumed."""
    failure_share: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of transfers that fail."""

    def resolved(self, gpu: GPU, gpus: int, per_node: int, *, where: str) -> Link:
        """With what is not given filled in.

        Args:
            gpu: of the decode servers. gpus: of the whole fleet. per_node: that are linked with each other.

        Raises:
            InputError: the GPUs have no such link.
        """
        together, nvlink = gpus <= per_node, gpu.link_bandwidth is not None and gpu.peer_to_peer
        kind = self.kind or ("infiniband" if not together else "nvlink" if nvlink else "pcie")
        default = _LINKS[kind]
        rate = default.gb_per_s * 1e9
        if kind == "nvlink":
            if gpu.link_bandwidth is None:
                raise InputError(
                    f"{gpu.name}s have no NVLink", where=f"{where}.kind", fix="Use pcie, infiniband or tcp."
                )
            if not together:
                raise InputError(
                    f"the fleet's {gpus} GPUs are more than the {per_node} that NVLink joins",
                    where=f"{where}.kind",
                    fix="Use infiniband, or set gpu.per_node where more share one NVLink.",
                )
            rate = default.gb_per_s * gpu.link_bandwidth
        low, high = default.band
        return Link(
            kind,
            rate if self.gb_per_s is None else self.gb_per_s * 1e9,
            1e-6 * (default.latency_us if self.latency_us is None else self.latency_us),
            1e-6 * (default.descriptor_us if self.descriptor_us is None else self.descriptor_us),
            self.handshake_s,
            kind in ("tcp", "storage"),
            self.failure_share,
            "given"
            if self.gb_per_s is not None
            else f"assumed, {low:g} to {high:g} times as fast: {default.source}",
        )


@dataclass(frozen=True, slots=True)
class Link:
    """A link, made concrete. bandwidth: bytes/s of one port each way. per_server: one port a server, not a
    GPU. origin: of the bandwidth, in words."""

    kind: LinkKind
    bandwidth: float
    latency_s: float
    descriptor_s: float
    handshake_s: float
    per_server: bool = False
    failure_share: float = 0.0
    origin: str = "given"


@dataclass(frozen=True, slots=True)
class _Default:
    """gb_per_s: of NVLink a share of the GPU's. band: how much slower and faster it may be."""

    gb_per_s: float
    latency_us: float
    descriptor_us: float
    band: tuple[float, float]
    source: str


_LINKS: dict[LinkKind, _Default] = {
    "nvlink": _Default(
        0.3, 20.0, 4.07, (0.05, 2.5),
        "NIXL over cuda_ipc moved 8 to 14 GB/s of scattered blocks, plain copies reach 0.75 of it",
    ),
    "pcie": _Default(
        12.0, 20.0, 4.07, (0.04, 4.0), "NIXL pulled 0.5 GB/s without RDMA, and pushed 49, on PCIe 5"
    ),
    "infiniband": _Default(
        42.5, 10.0, 0.204, (0.35, 1.15), "0.85 of 400 Gb/s a GPU; NIXL over InfiniBand moved 15 to 46 GB/s"
    ),
    "roce": _Default(
        42.5, 10.0, 0.352, (0.35, 1.15), "0.87 of 4 x 200 Gb/s and 0.48 of 8 x 400 Gb/s were reached"
    ),
    "tcp": _Default(
        4.0, 100.0, 0.352, (0.1, 2.5), "0.4 GB/s between pods, 10 GB/s and more with several connections"
    ),
    "storage": _Default(1.0, 1000.0, 0.0, (0.1, 5.0), "a file system"),
}  # fmt: skip
