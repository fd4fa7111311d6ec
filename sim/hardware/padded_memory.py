"""GPU memory of a server of padded batches: weights, KV pool, and what a joint prefill needs on top.

Such a server reserves its KV pool without a trial run, so nothing keeps the activations of a large prefill
within what is left. On the RTX 5080 the ``infer`` server then went on at a fraction of its speed, without an
error. Where exactly cannot be derived: the account below does not separate the slow runs from all healthy
ones. So it gives a risk and predicts no number.
"""

from __future__ import annotations

from dataclasses import dataclass

from servecast.sim.hardware.memory import CONTEXT_BYTES, KVMemory, MemoryLine
from servecast.sim.hardware.model_shape import ModelShape
from servecast.sim.hardware.shard import Shard
from servecast.sim.inputs.errors import InputError

_GIB = 1 << 30
_LAYER_COPIES = 4  # hidden states of a layer alive at once: residual, input, output, one temporary
RISK_SHARE = 0.92  # of the GPU's memory; scenarios/README.md counts the runs below and beyond it


def padded_memory(
    shard: Shard,
    *,
    max_num_seqs: int,
    max_model_len: int,
    block_size: int = 16,
    num_gpu_blocks: int | None = None,
) -> KVMemory:
    """The KV pool: ``num_gpu_blocks`` blocks, or a slot of ``max_model_len`` tokens for each row.

    Raises:
        InputError: weights and pool do not fit.
    """
    blocks = num_gpu_blocks or max_num_seqs * -(-max_model_len // block_size)
    bytes_per_block = block_size * shard.kv_bytes_per_token
    gpu, weights, pool = shard.gpu, shard.weight_bytes, blocks * bytes_per_block
    if weights + pool + CONTEXT_BYTES > gpu.memory_bytes:
        raise InputError(
            f"{weights / _GIB:.1f} GiB of weights and {pool / _GIB:.1f} GiB of KV do not fit into the "
            f"{gpu.memory_bytes / _GIB:.1f} GiB of one {gpu.name}",
            where="engine",
            fix="Lower max_num_seqs, max_model_len or num_gpu_blocks_override, or use a larger GPU.",
        )
    given = num_gpu_blocks is not None
    lines = (
        MemoryLine("device", gpu.memory_bytes, "device", gpu.memory_source),
        MemoryLine("weights", -weights, "computed", f"{shard.model.parameters / 1e9:.3f} B parameters"),
        MemoryLine("KV pool", -pool, "given" if given else "computed", f"{blocks} blocks of {block_size}"),
        MemoryLine("CUDA context", -CONTEXT_BYTES, "assumed", "and library handles"),
    )
    return KVMemory(
        num_gpu_blocks=blocks,
        block_size=block_size,
        bytes_per_block=bytes_per_block,
        max_model_len=max_model_len,
        memory_used_bytes=weights + pool + CONTEXT_BYTES,
        lines=lines,
        sequence_blocks=-(-max_model_len // block_size),
    )


def prefill_bytes(model: ModelShape, rows: int, tokens: int) -> int:
    """Activations of a joint prefill of ``rows`` prompts padded to ``tokens``, an estimate: the logits of all
    positions, and the hidden states and the MLP's three products of one layer."""
    a_token = model.vocab_size + _LAYER_COPIES * model.hidden_size + 3 * model.intermediate_size
    return rows * tokens * a_token * model.dtype_bytes


@dataclass(frozen=True, slots=True)
class MemoryRisk:
    """What may be needed at once, in bytes: ``resident`` (weights, KV pool, context) and the activations of
    ``rows`` prompts of ``tokens`` tokens prefilled together."""

    resident: int
    activations: int
    device: int
    rows: int
    tokens: int

    @classmethod
    def of(cls, shard: Shard, memory: KVMemory, *, max_num_seqs: int, tokens: int) -> MemoryRisk:
        """All rows prefilled together. tokens: the longest prompt, or prompt chunk."""
        activations = prefill_bytes(shard.model, max_num_seqs, tokens)
        return cls(memory.memory_used_bytes, activations, shard.gpu.memory_bytes, max_num_seqs, tokens)

    @property
    def share(self) -> float:
        """Of the GPU's memory; beyond 1 it does not fit."""
        return (self.resident + self.activations) / self.device

    @property
    def warning(self) -> str | None:
        """The risk in words; None below ``RISK_SHARE``."""
        if self.share < RISK_SHARE:
            return None
        return (
            f"memory risk: {self.rows} prompts of {self.tokens} tokens prefilled together need about "
            f"{self.activations / _GIB:.1f} GiB beside {self.resident / _GIB:.1f} GiB of weights, KV pool "
            f"and context, {self.share:.0%} of the GPU's {self.device / _GIB:.1f} GiB. So near its end "
            "such a server can fall to a fraction of its speed, and the prediction knows nothing of it"
        )
