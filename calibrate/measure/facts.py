"""What machine this is: read once, written beside every measurement."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

CLOCK_FIELDS = {  # of nvidia-smi -> their names here
    "clocks.sm": "sm_mhz",
    "clocks.mem": "mem_mhz",
    "temperature.gpu": "celsius",
    "power.draw": "power_w",
}
GPU_FIELDS = ("name", "memory.total", "driver_version", *CLOCK_FIELDS)


def collect() -> dict[str, Any]:
    """The facts of facts.json. What cannot be read is None."""
    said = _nvidia_smi(f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader,nounits") or ""
    rows = [[cell.strip() for cell in line.split(",")] for line in said.splitlines() if line.strip()]
    gpus = [dict(zip(GPU_FIELDS, row, strict=False)) for row in rows]
    first = gpus[0] if gpus else {}
    mebibytes = _number(first.get("memory.total"))
    host_memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "schema_version": 1,
        "gpu": first.get("name", "cpu"),
        "gpu_count": len(gpus),
        "memory_bytes": host_memory if mebibytes is None else int(mebibytes * 2**20),
        "driver": first.get("driver_version"),
        "torch": installed("torch"),
        "cuda": _cuda(),
        "vllm": installed("vllm"),
        "python": platform.python_version(),
        "host_cpu": _host_cpu(),
        "date": datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
        "clocks": {name: _number(first.get(field)) for field, name in CLOCK_FIELDS.items()} if gpus else None,
        "command": sys.argv,
    }


def nvidia_smi() -> str | None:
    """All that the driver says of this process's GPUs now (clocks, power, limits, ...); None without one."""
    return _nvidia_smi("-q")


def installed(package: str) -> str | None:
    """Version of an installed package, without its build ("0.32.0" of "0.32.0+cpu"); None if it is not."""
    try:
        return version(package).split("+")[0]
    except PackageNotFoundError:
        return None


def _nvidia_smi(*arguments: str) -> str | None:
    """What it says of the GPUs that this process may use; CUDA stays untouched."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    chosen = [] if visible is None else ["-i", visible]
    try:
        command = ["nvidia-smi", *arguments, *chosen]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return None if done.returncode else done.stdout


def _number(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:  # "[N/A]"
        return None


def _cuda() -> str | None:
    """The CUDA version that torch was built for."""
    try:
        import torch  # where it is installed: a served model needs none here
    except ImportError:
        return None
    return None if torch.version.cuda is None else str(torch.version.cuda)


def _host_cpu() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or None
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {os.cpu_count()} cores" if names else None
