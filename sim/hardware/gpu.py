"""The GPUs: what their makers state, and the memory that CUDA reports.

Rates are dense (without sparsity) and with fp32 accumulation, at the clocks of the datasheet. What a kernel
reaches of them is an efficiency and belongs in a profile.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from servecast.sim.inputs.errors import InputError
from servecast.sim.inputs.files import write_whole

_NUMBERS = (
    *("memory_bytes", "bandwidth", "bf16_flops", "fp8_flops", "fp4_flops"),
    *("link_bandwidth", "sms", "power"),
)


@dataclass(frozen=True, slots=True)
class GPU:
    """One GPU.

    Attributes:
        name: as in the catalogue.
        memory_bytes: total memory as CUDA reports it, which vLLM multiplies by ``gpu_memory_utilization``:
            about 0.5 GiB under nvidia-smi's figure, since the driver keeps some.
        bandwidth: device memory, bytes/s.
        bf16_flops, fp8_flops, fp4_flops: tensor-core peaks, FLOP/s; None where the GPU has no such products.
        link_bandwidth: to the other GPUs of its server, bytes/s each way; None if there are none.
        capability: CUDA compute capability, of AMD's the numbers of its gfx name; (0, 0) if not known.
        sms: streaming multiprocessors; None if not known (bounds the speed of one sequence's attention).
        power: board or module power, W; None if not known (bounds what share of the peaks is reached).
        peer_to_peer: whether the GPUs of a server read each other's memory. Over PCIe most servers do not let
            them, and GeForce cards cannot.
        source: where rates come from; memory_source: where the memory size comes from.
    """

    name: str
    memory_bytes: int
    bandwidth: float
    bf16_flops: float
    link_bandwidth: float | None = None
    capability: tuple[int, int] = (0, 0)
    fp8_flops: float | None = None
    fp4_flops: float | None = None
    sms: int | None = None
    power: float | None = None
    peer_to_peer: bool = True
    source: str = "given"
    memory_source: str = "given"

    def linear_flops(self, weight_bytes_each: int) -> float:
        """Peak of matrix products with weights of that width; fp8 weights run at bf16 without fp8 units."""
        return self.fp8_flops if weight_bytes_each == 1 and self.fp8_flops else self.bf16_flops

    def peak_flops(self, dtype: str) -> float | None:
        """Peak of matrix products with weights of that dtype, FLOP/s; None where there are no such products.

        Weight-only dtypes (int4, and mxfp4 without activations of eight bits) are multiplied in 16 bits.
        """
        return {
            "fp8": self.fp8_flops,
            "fp8_block": self.fp8_flops,
            "mxfp4_mxfp8": self.fp8_flops,
            "nvfp4": self.fp4_flops,
        }.get(dtype, self.bf16_flops)

    @classmethod
    def from_mapping(cls, data: Mapping[str, Any], where: str = "gpu") -> GPU:
        """A GPU of one's own: the fields above, of which ``name``, ``memory_bytes``, ``bandwidth`` and
        ``bf16_flops`` are needed. Without its compute capability nothing tells which timed GPU is near.

        Raises:
            InputError: a field is unknown, missing or not a positive number.
        """
        known = {field.name for field in fields(cls)}
        required = {field.name for field in fields(cls) if field.default is MISSING}
        for name in data:
            if name not in known:
                raise InputError(
                    f"unknown field {name!r}",
                    where=f"{where}: {name}",
                    fix=f"Use {', '.join(sorted(known))}.",
                )
        for name in sorted(required):
            if name not in data:
                raise InputError(
                    f"{name} is missing",
                    where=f"{where}: {name}",
                    fix="Give it, in bytes, FLOP/s or bytes/s.",
                )
        values = dict(data)
        for name in _NUMBERS:
            value = values.get(name)
            if value is None and name not in required:
                continue
            try:  # YAML reads 3.35e12 without a sign in the exponent as text
                number = float("nan" if isinstance(value, bool) or value is None else value)
            except (TypeError, ValueError, OverflowError):
                number = float("nan")
            if not 0 < number < float("inf"):
                raise InputError(
                    f"{name} is {value!r}, not a positive number",
                    where=f"{where}: {name}",
                    fix="Give it in bytes, FLOP/s or bytes/s.",
                )
            values[name] = int(number) if name in ("memory_bytes", "sms") else number
        if not isinstance(values.get("peer_to_peer", True), bool):
            raise InputError(
                f"peer_to_peer is {values['peer_to_peer']!r}",
                where=f"{where}: peer_to_peer",
                fix="Write true or false.",
            )
        capability = values.get("capability", (0, 0))
        try:
            major, minor = (int(part) for part in str(capability).strip("[]() ").replace(",", ".").split("."))
        except ValueError as error:
            raise InputError(
                f"capability is {capability!r}",
                where=f"{where}: capability",
                fix='Write it as "9.0".',
            ) from error
        values.update(name=str(values["name"]), capability=(major, minor))
        return cls(**values)

    @classmethod
    def from_file(cls, path: str | Path) -> GPU:
        """Read ``from_mapping``'s fields from a YAML or JSON file."""
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8")
            data = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise InputError(
                f"cannot read it ({error})",
                where=str(path),
                fix="Give a YAML or JSON file with a GPU's fields.",
            ) from error
        if not isinstance(data, Mapping):
            raise InputError("is not a mapping", where=str(path), fix="Give a GPU's fields as name: value.")
        return cls.from_mapping(data, str(path))

    def save(self, path: str | Path) -> None:
        """Write it as JSON that ``from_file`` reads, whole or not at all."""
        text = json.dumps(asdict(self) | {"capability": "{}.{}".format(*self.capability)}, indent=2) + "\n"
        write_whole(Path(path), lambda partial: partial.write_text(text, encoding="utf-8"))


_SMI = "0.5 GiB less than nvidia-smi's"
_REPORTED = "total capacity in PyTorch's out-of-memory messages"
_LIKE_6000 = "in proportion to the RTX PRO 6000's"
_PCIE: Mapping[str, float] = {"PCIe 3": 16, "PCIe 4": 32, "PCIe 5": 64}  # 16 lanes, GB/s each way
_NVIDIA = "https://www.nvidia.com/en-us"
_ADA = "https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf"
_GA102 = "https://www.nvidia.com/content/PDF/nvidia-ampere-ga-102-gpu-architecture-whitepaper-v2.pdf"
_BLACKWELL = (
    "https://images.nvidia.com/aem-dam/Solutions/geforce/blackwell/nvidia-rtx-blackwell-gpu-architecture.pdf"
)
_FOR_CHINA = "https://newsletter.semianalysis.com/p/nvidias-new-china-ai-chips-circumvent"
_PRO = f"{_NVIDIA}/products/workstations/professional-desktop-gpus"
_AMD = "https://www.amd.com/en/products/accelerators/instinct/mi300"
# fmt: off
_Entry = tuple[
    str, float, float, float, float | None, float | None, float | str, float, tuple[int, int], int, str, str
]
_TABLE: tuple[_Entry, ...] = (
    # name, GiB, GB/s, bf16, fp8, fp4 TFLOP/s, link GB/s, W, capability, SMs, source of rates, of memory
    ("T4", 14.58, 320, 65, None, None, "PCIe 3", 70, (7, 5), 40,
     f"NVIDIA T4 datasheet, {_NVIDIA}/data-center/tesla-t4/; its 16 bits are fp16", _REPORTED),
    ("L4", 22.03, 300, 121, 242, None, "PCIe 4", 72, (8, 9), 58,
     f"NVIDIA L4 datasheet, {_NVIDIA}/data-center/l4/", _REPORTED),
    ("A10G", 22.18, 600, 70, None, None, "PCIe 4", 300, (8, 6), 80,
     "NVIDIA A10G datasheet, https://d1.awsstatic.com/product-marketing/ec2/"
     "NVIDIA_AWS_A10G_DataSheet_FINAL_02_17_2022.pdf", _REPORTED),
    ("A6000", 47.40, 768, 154.8, None, None, "PCIe 4", 300, (8, 6), 84,
     f"NVIDIA RTX A6000 datasheet, {_GA102}", _REPORTED),
    ("RTX 3090", 23.68, 936, 71, None, None, "PCIe 4", 350, (8, 6), 82,
     f"NVIDIA GA102 whitepaper, {_GA102}", _REPORTED),
    ("RTX 4090", 23.516, 1008, 165.2, 330.3, None, "PCIe 4", 450, (8, 9), 128,
     f"NVIDIA Ada whitepaper, {_ADA}", "25,250,627,584 bytes in the run of LLMServingSim's RTX 4090 data"),
    ("RTX 5080", 15.47, 960, 112.6, 225.1, 900.6, "PCIe 5", 360, (12, 0), 84,
     f"NVIDIA RTX Blackwell whitepaper, {_BLACKWELL}", _REPORTED),
    ("RTX 5090", 31.36, 1792, 209.5, 419, 1676, "PCIe 5", 575, (12, 0), 170,
     f"NVIDIA RTX Blackwell whitepaper, {_BLACKWELL}", _REPORTED),
    ("RTX PRO 4500", 31.3, 896, 219.7, 439.5, 879, "PCIe 5", 200, (12, 0), 82,
     f"an eighth of the fp4 TOPS with sparsity, {_PRO}/rtx-pro-4500/", _LIKE_6000),
    ("RTX PRO 5000", 47.3, 1344, 267.8, 535.6, 1071, "PCIe 5", 300, (12, 0), 110,
     f"an eighth of the fp4 TOPS with sparsity, {_PRO}/rtx-pro-5000/", _LIKE_6000),
    ("RTX PRO 6000", 95.0, 1792, 467.8, 935.6, 1871.2, "PCIe 5", 600, (12, 0), 188,
     "NVIDIA RTX PRO 6000 Blackwell Server datasheet, at 2,430 MHz, "
     f"{_NVIDIA}/data-center/rtx-pro-6000-blackwell-server-edition/", f"{_SMI} 97,887 MiB"),
    ("L20", 44.53, 864, 119.5, 239, None, "PCIe 4", 275, (8, 9), 92,
     f"SemiAnalysis, {_FOR_CHINA}", _REPORTED),
    ("L40", 44.53, 864, 181, 362, None, "PCIe 4", 300, (8, 9), 142,
     f"NVIDIA L40 datasheet, {_NVIDIA}/data-center/l40/", "as an L20's, of as much"),
    ("L40S", 44.42, 864, 362, 733, None, "PCIe 4", 350, (8, 9), 142,
     f"NVIDIA L40S datasheet, {_NVIDIA}/data-center/l40s/", _REPORTED),
    ("A100", 79.25, 2039, 312, None, None, 300, 400, (8, 0), 108,
     f"NVIDIA A100 datasheet, SXM 80 GB, {_NVIDIA}/data-center/a100/", _REPORTED),
    ("A100 40GB", 39.49, 1555, 312, None, None, 300, 400, (8, 0), 108,
     f"NVIDIA A100 datasheet, SXM 40 GB, {_NVIDIA}/data-center/a100/", _REPORTED),
    ("A100 PCIe", 79.15, 1935, 312, None, None, "PCIe 4", 300, (8, 0), 108,
     f"NVIDIA A100 datasheet, PCIe 80 GB, {_NVIDIA}/data-center/a100/", _REPORTED),
    ("H20", 95.0, 4000, 148, 296, None, 450, 400, (9, 0), 78, f"SemiAnalysis, {_FOR_CHINA}", _REPORTED),
    ("H100 PCIe", 79.11, 2039, 756, 1513, None, "PCIe 5", 350, (9, 0), 114,
     "NVIDIA H100 PCIe product brief, "
     "https://www.nvidia.com/content/dam/en-zz/Solutions/gtcs22/data-center/h100/PB-11133-001_v01.pdf",
     _REPORTED),
    ("H100 NVL", 93.0, 3938, 835.5, 1671, None, 300, 400, (9, 0), 132,
     f"NVIDIA H100 datasheet, NVL, {_NVIDIA}/data-center/h100/", _REPORTED),
    ("H100", 79.18, 3350, 989, 1979, None, 450, 700, (9, 0), 132,
     f"NVIDIA H100 datasheet, SXM, {_NVIDIA}/data-center/h100/", _REPORTED),
    ("H200", 139.80, 4800, 989, 1979, None, 450, 700, (9, 0), 132,
     f"NVIDIA H200 datasheet, SXM, {_NVIDIA}/data-center/h200/", _REPORTED),
    ("B200", 178.35, 7700, 2250, 4500, 9000, 900, 1000, (10, 0), 148,
     f"NVIDIA HGX B200 datasheet, {_NVIDIA}/data-center/hgx/",
     "CUDA device query published with pytorch/ao's roofline utilities"),
    ("B300", 268.1, 7750, 2250, 4500, 14000, 900, 1100, (10, 3), 148,
     f"NVIDIA HGX B300 datasheet, {_NVIDIA}/data-center/hgx/", f"{_SMI} 275,040 MiB"),
    ("GB200", 184.5, 8000, 2500, 5000, 10000, 900, 1200, (10, 0), 148,
     f"NVIDIA GB200 NVL72 datasheet, {_NVIDIA}/data-center/gb200-nvl72/", f"{_SMI} 189,471 MiB"),
    ("GB300", 277.0, 8000, 2500, 5000, 15000, 900, 1400, (10, 3), 148,
     f"NVIDIA GB300 NVL72 datasheet, {_NVIDIA}/data-center/gb300-nvl72/", f"{_SMI} 284,208 MiB"),
    ("MI300X", 191.69, 5300, 1307.4, 2614.9, None, 448, 750, (9, 4), 304,
     f"AMD Instinct MI300X datasheet, {_AMD}/mi300x.html", _REPORTED),
    ("MI325X", 255.69, 6000, 1307.4, 2614.9, None, 448, 1000, (9, 4), 304,
     f"AMD Instinct MI325X datasheet, {_AMD}/mi325x.html", _REPORTED),
)
# fmt: on
CATALOGUE: tuple[GPU, ...] = tuple(
    GPU(
        name=name,
        memory_bytes=int(gib * (1 << 30)),
        bandwidth=bandwidth * 1e9,
        bf16_flops=bf16 * 1e12,
        fp8_flops=None if fp8 is None else fp8 * 1e12,
        fp4_flops=None if fp4 is None else fp4 * 1e12,
        link_bandwidth=1e9 * (_PCIE[link] if isinstance(link, str) else link),
        capability=capability,
        sms=sms,
        power=float(power),
        peer_to_peer=not isinstance(link, str),
        source=source,
        memory_source=memory_source,
    )
    for name, gib, bandwidth, bf16, fp8, fp4, link, power, capability, sms, source, memory_source in _TABLE
)
_ALIASES: Mapping[str, str] = {
    "teslat4": "t4",
    "rtxa6000": "a6000",
    "3090": "rtx3090",
    "5090": "rtx5090",
    "5080": "rtx5080",
    "4090": "rtx4090",
    "a10080gb": "a100",
    "a100sxm": "a100",
    "a100sxm480gb": "a100",
    "a100sxm440gb": "a10040gb",
    "a100pcie80gb": "a100pcie",
    "a10080gbpcie": "a100pcie",
    "h100sxm": "h100",
    "h10080gb": "h100",
    "h10080gbhbm3": "h100",
    "h100pcie80gb": "h100pcie",
    "h200sxm": "h200",
    "rtxpro6000blackwellserveredition": "rtxpro6000",
    "rtxpro6000blackwellworkstationedition": "rtxpro6000",
    "rtxpro5000blackwell": "rtxpro5000",
    "rtxpro4500blackwell": "rtxpro4500",
}


def find_gpu(name: str, where: str = "gpu") -> GPU:
    """The catalogue's GPU of that name: case, spaces, dashes and the maker's words do not matter
    ("NVIDIA GeForce RTX 4090", "rtx-4090" and "4090" are one).

    Raises:
        InputError: not in the catalogue; lists what is.
    """
    key = "".join(character for character in name.lower() if character.isalnum())
    for word in ("nvidia", "geforce", "tensorcore", "amd", "instinct"):
        key = key.replace(word, "")
    key = _ALIASES.get(key, key)
    for gpu in CATALOGUE:
        if key == gpu.name.lower().replace(" ", ""):
            return gpu
    raise InputError(
        f"GPU {name!r} is not in the catalogue",
        where=where,
        fix=f"Use {', '.join(gpu.name for gpu in CATALOGUE)}, or describe yours in a file.",
    )
