"""The GPUs: what their makers state, and the memory that CUDA reports.

Rates are dense (without sparsity) and with fp32 accumulation, at the clocks of the datasheet. What a kernel
reaches of them is an efficiency and belongs in a profile.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from importlib import resources
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


_PCIE_GB_S: Mapping[str, float] = {"PCIe 3": 16, "PCIe 4": 32, "PCIe 5": 64}  # 16 lanes, each way


def _catalogue() -> Iterator[tuple[GPU, list[str]]]:
    """The GPUs of ``gpus.csv``, with the other names of each."""

    def peak(text: str) -> float | None:
        return float(text) * 1e12 if text else None

    table = resources.files("servecast.sim.hardware").joinpath("gpus.csv").read_text("utf-8")
    for row in csv.DictReader(table.splitlines()):
        link, (major, minor) = row["link"], row["capability"].split(".")
        gpu = GPU(
            name=row["name"],
            memory_bytes=int(float(row["memory_gib"]) * (1 << 30)),
            bandwidth=float(row["bandwidth_gb_s"]) * 1e9,
            bf16_flops=float(row["bf16_tflops"]) * 1e12,
            fp8_flops=peak(row["fp8_tflops"]),
            fp4_flops=peak(row["fp4_tflops"]),
            link_bandwidth=1e9 * (_PCIE_GB_S[link] if link in _PCIE_GB_S else float(link)),
            capability=(int(major), int(minor)),
            sms=int(row["sms"]),
            power=float(row["power_w"]),
            peer_to_peer=link not in _PCIE_GB_S,
            source=row["source"],
            memory_source=row["memory_source"],
        )
        yield gpu, row["aliases"].split()


_BY_KEY: Mapping[str, GPU] = {
    key: gpu for gpu, aliases in _catalogue() for key in (gpu.name.lower().replace(" ", ""), *aliases)
}
CATALOGUE: tuple[GPU, ...] = tuple(dict.fromkeys(_BY_KEY.values()))


def find_gpu(name: str, where: str = "gpu") -> GPU:
    """The catalogue's GPU of that name: case, spaces, dashes and the maker's words do not matter
    ("NVIDIA GeForce RTX 4090", "rtx-4090" and "4090" are one).

    Raises:
        InputError: not in the catalogue; lists what is.
    """
    key = "".join(character for character in name.lower() if character.isalnum())
    for word in ("nvidia", "geforce", "tensorcore", "amd", "instinct"):
        key = key.replace(word, "")
    if key in _BY_KEY:
        return _BY_KEY[key]
    raise InputError(
        f"GPU {name!r} is not in the catalogue",
        where=where,
        fix=f"Use {', '.join(gpu.name for gpu in CATALOGUE)}, or describe yours in a file.",
    )
