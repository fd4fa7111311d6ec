"""The host of GPUs: the link to its memory, and how much memory it has."""

from __future__ import annotations

from dataclasses import dataclass

from servecast.sim.hardware.gpu import GPU

GIB = 1 << 30
_PCIE = (((9, 0), 5), ((8, 0), 4), ((0, 0), 3))  # generation by compute capability, SXM parts' too
_LANES_16 = {3: 15.75e9, 4: 31.5e9, 5: 63.0e9}  # bytes/s each way, after encoding
REACHED = 0.79  # of it: 50 GB/s, one way, between an H100 and its host
_C2C = 450e9  # NVLink-C2C each way, of Grace and its GPUs
_C2C_REACHED = 0.83
BLOCK_S = 2.7e-6  # of a block, beside its bytes
_SOURCE = (
    "vLLM's developers copied blocks of 2 MB between an H100 and its host (PCIe 5) at about 50 GB/s one way, "
    "and at 83 GB/s both ways at once"
)
_HOST_GIB = {  # of the maker's own server, and its GPUs
    "A100": (2048, 8),
    "A100 40GB": (1024, 8),
    "H100": (2048, 8),
    "H200": (2048, 8),
    "B200": (4096, 8),
    "B300": (4096, 8),
    "GB200": (960, 4),
    "GB300": (960, 4),
}


@dataclass(frozen=True, slots=True)
class HostLink:
    """Between one GPU and its host, each way.

    Attributes:
        bandwidth: bytes/s of large copies. band: how much slower and faster it may be. block_s: what a copied
            block takes beside its bytes. origin: of the bandwidth, in words.
    """

    bandwidth: float
    band: tuple[float, float]
    block_s: float
    origin: str


def host_link(gpu: GPU) -> HostLink:
    """The link of a GPU of the catalogue, or of one's own by its compute capability."""
    if gpu.name.startswith("GB"):
        return HostLink(
            _C2C_REACHED * _C2C,
            (0.5, 1.1),
            BLOCK_S,
            f"assumed: {_C2C_REACHED:g} of NVLink-C2C's {_C2C / 1e9:g} GB/s",
        )
    generation = next(number for least, number in _PCIE if gpu.capability >= least)
    seen = gpu.name in ("H100", "H200", "H100 PCIe", "H100 NVL")
    return HostLink(
        REACHED * _LANES_16[generation],
        (0.8, 1.1) if seen else (0.6, 1.15),
        BLOCK_S,
        f"{'measured' if seen else 'assumed'}: {REACHED:g} of 16 lanes of PCIe {generation}; {_SOURCE}",
    )


def host_memory(gpu: GPU) -> tuple[int, int] | None:
    """Bytes of host memory in the maker's own server, and its GPUs; None where it makes none."""
    found = _HOST_GIB.get(gpu.name)
    return None if found is None else (found[0] * GIB, found[1])
