"""What the physical model says of single kernels, so that they can tell its efficiencies."""

from __future__ import annotations

from collections.abc import Sequence

from servecast.calibrate.fit.rows import (
    Copy,
    DecodeAttention,
    Elementwise,
    Gemm,
    Kernel,
    Launch,
    PrefillAttention,
)
from servecast.sim.hardware.gpu import GPU
from servecast.sim.hardware.model_shape import ModelShape
from servecast.sim.hardware.shard import Shard
from servecast.sim.hardware.step_time.physical import Efficiencies, PhysicalStepTime, smooth_maximum
from servecast.sim.metrics.binding import StepRow

BYTES = {"bf16": 2, "fp16": 2, "fp8": 1, "fp32": 4}


def told_by(kernels: Sequence[Kernel], gpu: GPU) -> list[Kernel]:
    """The kernels that the physical model has an equation for: matrix products in the dtypes that serve
    (fp32 only where there is no other, as on a CPU), device copies, attention, elementwise kernels, and
    launches from a graph (one by one where no graph was measured)."""
    dtypes = {row.dtype for row in kernels if isinstance(row, Gemm)}
    served = dtypes & ({"bf16", "fp16"} | ({"fp8"} if gpu.fp8_flops else set())) or dtypes & {"fp32"}
    modes = {row.mode for row in kernels if isinstance(row, Launch)}
    mode = "graph" if "graph" in modes else "eager"
    return [
        row
        for row in kernels
        if (isinstance(row, Gemm) and row.dtype in served)
        or (isinstance(row, Copy) and row.row == "copy")
        or isinstance(row, PrefillAttention | DecodeAttention | Elementwise)
        or (isinstance(row, Launch) and row.mode == mode)
    ]


def kernel_seconds(row: Kernel, gpu: GPU, efficiencies: Efficiencies) -> float:
    """Seconds of a kernel of ``told_by``, by the equations of ``PhysicalStepTime``: a matrix product reads
    its weights once; attention is that of a model of one layer."""
    eff = efficiencies
    if isinstance(row, Gemm):
        width = BYTES[row.dtype]
        compute = 2.0 * row.m * row.n * row.k / (gpu.linear_flops(width) * eff.compute)
        memory = row.n * row.k * width / (gpu.bandwidth * eff.bandwidth)
        return eff.kernel_s + smooth_maximum(compute, memory, eff.overlap_exponent)
    if isinstance(row, Copy | Elementwise):
        moved = row.moved_bytes if isinstance(row, Copy) else row.bytes
        return eff.kernel_s + moved / (gpu.bandwidth * eff.bandwidth)
    if isinstance(row, PrefillAttention):
        step = StepRow(((row.chunk, row.context),), 0, 0, 0)
        return eff.kernel_s + _attention(row, gpu, eff).breakdown(step)["attention_prefill"]
    if isinstance(row, DecodeAttention):
        step = StepRow((), row.batch, row.batch * row.context, 0)
        return eff.kernel_s + _attention(row, gpu, eff).breakdown(step)["attention_decode"]
    assert isinstance(row, Launch)
    return row.kernels * eff.kernel_s


def _attention(row: PrefillAttention | DecodeAttention, gpu: GPU, eff: Efficiencies) -> PhysicalStepTime:
    width = row.q_heads * row.head_dim
    layer = ModelShape(
        name="attention",
        hidden_size=width,
        intermediate_size=width,
        layers=1,
        heads=row.q_heads,
        kv_heads=row.kv_heads,
        head_dim=row.head_dim,
        vocab_size=1,
        tied_embeddings=True,
    )
    return PhysicalStepTime(Shard(layer, gpu, 1, kv_dtype_bytes=BYTES[row.dtype]), eff)
