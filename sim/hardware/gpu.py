"""The GPUs: what their makers state, and the memory that CUDA reports.

Rates are dense (without sparsity) and with fp32 accumulation, at the clocks of the datasheet. What a kernel
reaches of them is an efficiency and belongs in a profile.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from servecast.sim.inputs.errors import InputError
from servecast.sim.inputs.files import write_whole


@dataclass(frozen=True, slots=True)
class GPU:
    """One GPU.

    Attributes:
        name: as in the catalogue.
        memory_bytes: total memory as CUDA reports it, which vLLM multiplies by ``gpu_memory_utilization``:
            about 0.5 GiB under nvidia-smi's figure, since the driver keeps some.
        bandwidth: device memory, bytes/s.
        bf16_flops, fp8_flops, fp4_flops: tensor-core peaks, FLOP/s; None where the GPU has no such products.
        link_bandwidth: to the other GPUs, bytes/s each way.
        sms: streaming multiprocessors; None if not known (bounds the speed of one sequence's attention).
        capability: CUDA compute capability.
        source: where rates come from; memory_source: where the memory size comes from.
    """

    name: str
    memory_bytes: int
    bandwidth: float
    bf16_flops: float
    link_bandwidth: float
    capability: tuple[int, int]
    fp8_flops: float | None = None
    fp4_flops: float | None = None
    sms: int | None = None
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
        """A GPU of one's own: the fields above; ``source``, ``memory_source`` and ``sms`` may be left out.

        Raises:
            InputError: a field is unknown, missing or not a positive number.
        """
        known = {field.name for field in fields(cls)}
        required = known - {"source", "memory_source", "sms", "fp8_flops", "fp4_flops"}
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
        for name in (
            "memory_bytes",
            "bandwidth",
            "bf16_flops",
            "fp8_flops",
            "fp4_flops",
            "link_bandwidth",
            "sms",
        ):
            value = values.get(name)
            if value is None and name not in required:
                continue
            try:  # YAML reads 3.35e12 without a sign in the exponent as text
                number = float("nan" if isinstance(value, bool) or value is None else value)
            except (TypeError, ValueError):
                number = float("nan")
            if not 0 < number < float("inf"):
                raise InputError(
                    f"{name} is {value!r}, not a positive number",
                    where=f"{where}: {name}",
                    fix="Give it in bytes, FLOP/s or bytes/s.",
                )
            values[name] = int(number) if name in ("memory_bytes", "sms") else number
        try:
            major, minor = (
                int(part) for part in str(values["capability"]).strip("[]() ").replace(",", ".").split(".")
            )
        except ValueError as error:
            raise InputError(
                f"capability is {values['capability']!r}",
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
# fmt: off
_Entry = tuple[
    str, float, float, float, float | None, float | None, float, tuple[int, int], int, str, str
]
_TABLE: tuple[_Entry, ...] = (
    # name, GiB, GB/s, bf16, fp8, fp4 TFLOP/s, link GB/s, capability, SMs, source of rates, of memory
    ("L4", 22.03, 300, 121, 242, None, 32, (8, 9), 58, "NVIDIA L4 datasheet", _REPORTED),
    ("A6000", 47.40, 768, 154.8, None, None, 32, (8, 6), 84, "NVIDIA RTX A6000 datasheet", _REPORTED),
    ("RTX 5080", 15.47, 960, 112.6, 225.1, 900.6, 64, (12, 0), 84, "NVIDIA RTX Blackwell whitepaper",
     _REPORTED),
    ("RTX 4090", 23.516, 1008, 165.2, 330.3, None, 32, (8, 9), 128, "NVIDIA Ada whitepaper",
     "25,250,627,584 bytes in the run of LLMServingSim's RTX 4090 data"),
    ("L40S", 44.42, 864, 362, 733, None, 32, (8, 9), 142, "NVIDIA L40S datasheet", _REPORTED),
    ("A100", 79.25, 2039, 312, None, None, 300, (8, 0), 108, "NVIDIA A100 datasheet, SXM 80 GB", _REPORTED),
    ("H100", 79.18, 3350, 989, 1979, None, 450, (9, 0), 132, "NVIDIA H100 datasheet, SXM", _REPORTED),
    ("H200", 139.80, 4800, 989, 1979, None, 450, (9, 0), 132, "NVIDIA H200 datasheet, SXM", _REPORTED),
    ("B200", 178.35, 7700, 2250, 4500, 9000, 900, (10, 0), 148, "NVIDIA HGX B200 datasheet",
     "CUDA device query published with pytorch/ao's roofline utilities"),
    ("B300", 268.1, 7750, 2250, 4500, 14000, 900, (10, 3), 148, "NVIDIA HGX B300 datasheet",
     f"{_SMI} 275,040 MiB"),
    ("GB200", 184.5, 8000, 2500, 5000, 10000, 900, (10, 0), 148, "NVIDIA GB200 NVL72 datasheet",
     f"{_SMI} 189,471 MiB"),
    ("GB300", 277.0, 8000, 2500, 5000, 15000, 900, (10, 3), 148, "NVIDIA GB300 NVL72 datasheet",
     f"{_SMI} 284,208 MiB"),
    ("RTX PRO 6000", 95.0, 1792, 467.8, 935.6, 1871.2, 64, (12, 0), 188,
     "NVIDIA RTX PRO 6000 Blackwell Server datasheet, at 2,430 MHz", f"{_SMI} 97,887 MiB"),
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
        link_bandwidth=link * 1e9,
        capability=capability,
        sms=sms,
        source=source,
        memory_source=memory_source,
    )
    for name, gib, bandwidth, bf16, fp8, fp4, link, capability, sms, source, memory_source in _TABLE
)
_ALIASES: Mapping[str, str] = {
    "rtxa6000": "a6000",
    "5080": "rtx5080",
    "4090": "rtx4090",
    "a10080gb": "a100",
    "a100sxm": "a100",
    "a100sxm480gb": "a100",
    "h100sxm": "h100",
    "h10080gb": "h100",
    "h10080gbhbm3": "h100",
    "h200sxm": "h200",
}


def find_gpu(name: str, where: str = "gpu") -> GPU:
    """The catalogue's GPU of that name: case, spaces, dashes and the maker's words do not matter
    ("NVIDIA GeForce RTX 4090", "rtx-4090" and "4090" are one).

    Raises:
        InputError: not in the catalogue; lists what is.
    """
    key = "".join(character for character in name.lower() if character.isalnum())
    for word in ("nvidia", "geforce", "tensorcore"):
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
