"""Whose peaks a fit is relative to: the catalogue's GPU, one described in a file, or what was measured."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

from servecast.calibrate.fit.measurements import Measurements
from servecast.calibrate.fit.rows import Copy, Gemm, Kernel
from servecast.sim.hardware.gpu import GPU, find_gpu
from servecast.sim.hardware.step_time.physical import Efficiencies
from servecast.sim.inputs.errors import InputError

COMPUTE_BOUND_ROWS = 128  # of a matrix product whose rate may stand for the peak
_REPEATS = 3  # of a step, before its rate may
_UNBOUNDED = 1e30  # a rate that no step can need


def gpu_of(measured: Measurements, given: GPU | None = None) -> GPU:
    """The GPU of a folder: ``given``, or the catalogue's of that name, or one made of measured peaks.

    Raises:
        InputError: it is not in the catalogue, and no matrix products and copies say its peaks.
    """
    if given is not None:
        return given
    name = str(measured.facts["gpu"])
    try:
        return find_gpu(name)
    except InputError:
        return measured_peaks(measured)


def measured_peaks(measured: Measurements) -> GPU:
    """A GPU whose peaks are the best rates that its kernels or whole steps reached, for what no datasheet
    describes. Steps count since a small model's weights may stay in a cache that copies go past.

    The rate of host-to-device copies stands for the link to other GPUs, or that of memory where there are
    none (a CPU's ranks share it).

    Raises:
        InputError: no copies, no matrix products of ``COMPUTE_BOUND_ROWS`` rows, or no size of the memory.
    """
    facts = measured.facts
    large = [row for row in measured.kernels if not isinstance(row, Gemm) or row.m >= COMPUTE_BOUND_ROWS]
    flops = matmul_rate(large, "bf16", "fp16") or matmul_rate(large, "fp32")
    bandwidth = copy_rate(large, "copy")
    memory = facts.get("memory_bytes")
    if not flops or not bandwidth or not memory:
        products = f"gemm rows with m from {COMPUTE_BOUND_ROWS} on"
        needed = ((products, flops), ("copy rows", bandwidth), ("memory_bytes in facts.json", memory))
        raise InputError(
            f"GPU {facts['gpu']!r} is not in the catalogue, and its peaks cannot be derived: "
            f"no {' and no '.join(what for what, there in needed if not there)}",
            where=str(measured.folder),
            fix="Describe it in a file and give that as --gpu, or measure kernels into the folder.",
        )
    gpu = GPU(
        name=str(facts["gpu"]),
        memory_bytes=int(memory),
        bandwidth=bandwidth,
        bf16_flops=flops,
        fp8_flops=matmul_rate(large, "fp8") or None,
        link_bandwidth=copy_rate(large, "host_to_device") or bandwidth,
        capability=(0, 0),
        source=f"measured: best rates of {len(measured.kernels)} kernel rows, {len(measured.steps)} steps",
        memory_source="measured",
    )
    faster = _over_roofline(measured, replace(gpu, bandwidth=_UNBOUNDED))
    wider = _over_roofline(measured, replace(gpu, bf16_flops=_UNBOUNDED, fp8_flops=None))
    return replace(
        gpu,
        bf16_flops=flops * faster,
        fp8_flops=None if gpu.fp8_flops is None else gpu.fp8_flops * faster,
        bandwidth=bandwidth * wider,
    )


def _over_roofline(measured: Measurements, gpu: GPU) -> float:
    """How many times the peaks the best step reached that was repeated; 1 where all stayed below."""
    models = [engine.step_time(gpu, Efficiencies()) for engine in measured.engines]
    ratios = [
        models[step.engine].roofline_seconds(step) / step.median_s
        for step in measured.steps
        if len(step.times_s) >= _REPEATS
    ]
    return max([1.0, *ratios])


def beyond_the_datasheet(measured: Measurements, gpu: GPU) -> tuple[str, ...]:
    """What was measured faster than the peaks, in words. Efficiencies stay at most 1 all the same."""
    kernels = measured.kernels
    rates = (
        ("16-bit matrix products", "FLOP/s", gpu.bf16_flops, matmul_rate(kernels, "bf16", "fp16")),
        ("fp8 matrix products", "FLOP/s", gpu.fp8_flops or math.inf, matmul_rate(kernels, "fp8")),
        ("copies", "B/s", gpu.bandwidth, copy_rate(kernels, "copy")),
    )
    return tuple(
        f"{what} reach {rate:.4g} {unit}, {gpu.name} is stated with {peak:.4g}: clipped to that"
        for what, unit, peak, rate in rates
        if rate > peak
    )


def matmul_rate(kernels: Iterable[Kernel], *dtypes: str) -> float:
    """The best FLOP/s of matrix products in these dtypes, 0 if there are none."""
    products = (row for row in kernels if isinstance(row, Gemm) and row.dtype in dtypes)
    return max((2.0 * row.m * row.n * row.k / row.median_s for row in products), default=0.0)


def copy_rate(kernels: Iterable[Kernel], kind: str) -> float:
    """The best bytes/s moved by copies of that kind ("copy", "host_to_device"), 0 if there are none."""
    copies = (row for row in kernels if isinstance(row, Copy) and row.row == kind)
    return max((row.moved_bytes / row.median_s for row in copies), default=0.0)
