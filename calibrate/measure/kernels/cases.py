"""The kernels that a model is made of, on inputs of its shapes: what ``measure kernels`` times.

A case says its row and how many bytes its inputs take; ``works`` makes the inputs (random, never zeros,
several copies) and returns the calls on them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as functional

from .device_timer import Work

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp8": torch.float8_e4m3fn}
TOKENS = (
    *(1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768),
    *(1024, 1536, 2048, 3072, 4096, 6144, 8192, 16384),
)
_FIRST_TOKENS = (1, 16, 64, 256, 1024, 4096)
_CACHE_BYTES = {"cuda": 256 << 20, "cpu": 64 << 20}  # copies of the inputs go beyond what a cache holds
_MOST_COPIES = 64
BLOCK = 16  # tokens of a KV block
LAUNCHES = 100


@dataclass(frozen=True, slots=True)
class Case:
    """One row of kernels.jsonl.

    Attributes:
        stage: 0 is measured first; it alone is a usable set. fields: of the row ("row", sizes, ...).
        bytes: of one copy of the inputs and outputs. make: one copy's call; it draws its own inputs.
        graph: whether its calls may be captured into a CUDA graph.
    """

    stage: int
    fields: dict[str, Any]
    bytes: int
    make: Callable[[], Work]
    graph: bool = True

    @property
    def key(self) -> str:
        return "/".join(str(value) for value in self.fields.values())

    def works(self, device: str) -> list[Work]:
        """Calls on copies of the inputs that together do not fit a cache."""
        copies = min(max(1, math.ceil(_CACHE_BYTES[device] / max(self.bytes, 1))), _MOST_COPIES)
        return [self.make() for _ in range(copies)]


@dataclass(frozen=True, slots=True)
class Shape:
    """What of a model's config.json the kernels depend on."""

    hidden: int
    intermediate: int
    q_heads: int
    kv_heads: int
    head_dim: int
    vocab: int

    @classmethod
    def of(cls, config: dict[str, Any]) -> Shape:
        """Of a config.json in the names of transformers; a multimodal model's text part. KeyError: a size
        is missing."""
        config = config.get("text_config", config)
        hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
        return cls(
            hidden,
            int(config["intermediate_size"]),
            heads,
            int(config.get("num_key_value_heads") or heads),
            int(config.get("head_dim") or hidden // heads),
            int(config["vocab_size"]),
        )

    @property
    def products(self) -> tuple[tuple[int, int], ...]:
        """(n, k) of the matrix products of a layer, as vLLM fuses them, without the LM head's."""
        q, kv = self.q_heads * self.head_dim, self.kv_heads * self.head_dim
        return (
            (q + 2 * kv, self.hidden),
            (self.hidden, q),
            (2 * self.intermediate, self.hidden),
            (self.hidden, self.intermediate),
        )


# Qwen2.5-0.5B, Qwen2.5-7B, Llama-3.1-8B, Qwen2.5-32B, Llama-3.1-70B on four GPUs: their config.json files
TYPICAL_SHAPES = (
    Shape(896, 4864, 14, 2, 64, 151936),
    Shape(3584, 18944, 28, 4, 128, 152064),
    Shape(4096, 14336, 32, 8, 128, 128256),
    Shape(5120, 27648, 40, 8, 128, 152064),
    Shape(8192, 7168, 16, 2, 128, 32064),
)


def cases(device: str, shapes: Sequence[Shape], dtypes: Sequence[str], *, max_tokens: int) -> list[Case]:
    """All cases, the most useful first.

    Args:
        dtypes: names of DTYPES; the first is that of everything but matrix products.
        max_tokens: most tokens of a step, and of KV that one call reads.
    """
    kernels = Kernels(device, torch.Generator(device).manual_seed(0))
    found: dict[str, Case] = {}
    for case in _all_cases(kernels, shapes, dtypes, max_tokens):
        known = found.get(case.key)
        if known is None or case.stage < known.stage:
            found[case.key] = case
    return sorted(found.values(), key=lambda case: case.stage)


def _all_cases(
    kernels: Kernels, shapes: Sequence[Shape], dtypes: Sequence[str], max_tokens: int
) -> Iterator[Case]:
    main = dtypes[0]
    for stage, mebibytes in ((0, 512), (1, 64), (1, 8), (1, 1)):
        yield kernels.copy(stage, mebibytes << 20)
        yield kernels.host_to_device(stage, mebibytes << 20)
    for mode in ("eager", "graph"):
        yield kernels.launch(0, mode)
    counts = [count for count in TOKENS if count <= max_tokens]
    for shape in shapes:
        for count in counts:
            stage = 0 if count in _FIRST_TOKENS else 1
            for dtype in dtypes:
                for n, k in shape.products:
                    yield kernels.gemm(stage if dtype == main else stage + 1, dtype, count, n, k)
            if count <= 1024:
                yield kernels.gemm(stage, main, count, shape.vocab, shape.hidden)
                yield kernels.sampler(stage, count, shape.vocab)
            for op, width in (("rms_norm", shape.hidden), ("silu_mul", shape.intermediate)):
                yield kernels.elementwise(stage, main, op, count, width)
        heads = (main, shape.q_heads, shape.kv_heads, shape.head_dim)
        for batch in (1, 8, 32, 128, 256, 512):
            for context in (128, 512, 1024, 4096, 16384):
                if batch * context <= 32 * max_tokens:
                    stage = 0 if batch in (1, 32, 256) and context in (128, 1024, 4096) else 1
                    yield kernels.attention(stage, "attention_decode", batch, 1, context - 1, *heads)
        for chunk in (16, 64, 256, 1024, 2048, 4096, 8192):
            for context in (0, 1024, 4096, 16384):
                if chunk + context <= max_tokens:
                    stage = 0 if chunk in (64, 256, 2048) and context in (0, 4096) else 1
                    yield kernels.attention(stage, "attention_prefill", 1, chunk, context, *heads)


class Kernels:
    """Makes the cases of one device.

    Args:
        device: "cuda" or "cpu". generator: of the inputs, on that device.
    """

    def __init__(self, device: str, generator: torch.Generator) -> None:
        self._device, self._generator = device, generator
        self._flash = flash_attention() if device == "cuda" else None

    def _random(self, *sizes: int, dtype: str) -> torch.Tensor:
        kind = DTYPES[dtype]
        draw = torch.bfloat16 if dtype == "fp8" else kind
        values = torch.randn(*sizes, device=self._device, dtype=draw, generator=self._generator)
        return values.to(kind)

    def copy(self, stage: int, size: int) -> Case:
        """Device memory to device memory: each byte is read and written."""

        def make() -> Work:
            source = self._random(size // 4, dtype="fp32")
            target = torch.empty_like(source)
            return lambda: target.copy_(source)

        return Case(stage, {"row": "copy", "bytes": size}, 2 * size, make)

    def host_to_device(self, stage: int, size: int) -> Case:
        """Pinned host memory to the device's."""

        def make() -> Work:
            source = torch.randint(1, 127, (size,), dtype=torch.int8)
            source = source.pin_memory() if self._device == "cuda" else source
            target = torch.empty(size, dtype=torch.int8, device=self._device)
            return lambda: target.copy_(source, non_blocking=True)

        return Case(stage, {"row": "host_to_device", "bytes": size}, 2 * size, make, graph=False)

    def launch(self, stage: int, mode: str) -> Case:
        """Tiny kernels one after the other, launched one by one or replayed as one CUDA graph."""

        def make() -> Work:
            value = self._random(64, dtype="fp32")

            def run() -> None:
                for _ in range(LAUNCHES):
                    value.mul_(1.0)

            return run

        fields = {"row": "launch", "mode": mode, "kernels": LAUNCHES}
        return Case(stage, fields, 256, make, graph=mode == "graph")

    def gemm(self, stage: int, dtype: str, m: int, n: int, k: int) -> Case:
        """Activations (m, k) times weights (n, k), transposed."""
        each = DTYPES[dtype].itemsize

        def make() -> Work:
            activations, weights = self._random(m, k, dtype=dtype), self._random(n, k, dtype=dtype)
            if dtype != "fp8":
                return lambda: functional.linear(activations, weights)
            one = torch.ones((), device=self._device)
            return lambda: torch._scaled_mm(
                activations, weights.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16
            )

        fields = {"row": "gemm", "dtype": dtype, "m": m, "n": n, "k": k}
        return Case(stage, fields, (m * k + n * k) * each + 2 * m * n, make)

    def elementwise(self, stage: int, dtype: str, op: str, tokens: int, width: int) -> Case:
        """A norm (reads and writes the width), or the gated activation (reads it twice, writes it once)."""
        reads = 2 if op == "silu_mul" else 1
        size = tokens * width * (reads + 1) * DTYPES[dtype].itemsize

        def make() -> Work:
            values = self._random(tokens, reads * width, dtype=dtype)
            if op == "silu_mul":
                gate, up = values.chunk(2, dim=1)
                return lambda: functional.silu(gate) * up
            weight = self._random(width, dtype=dtype)
            return lambda: functional.rms_norm(values, (width,), weight)

        fields = {"row": "elementwise", "op": op, "tokens": tokens, "width": width, "bytes": size}
        return Case(stage, fields, size, make)

    def sampler(self, stage: int, rows: int, vocab: int) -> Case:
        """A token drawn from each row of logits: softmax, divided by exponential noise, argmax."""

        def make() -> Work:
            logits = self._random(rows, vocab, dtype="fp32")
            noise = self._random(rows, vocab, dtype="fp32").abs_().add_(1e-3)
            return lambda: (logits.softmax(dim=-1) / noise).argmax(dim=-1)

        return Case(stage, {"row": "sampler", "rows": rows, "vocab": vocab}, 12 * rows * vocab, make)

    def attention(
        self,
        stage: int,
        row: str,
        batch: int,
        chunk: int,
        context: int,
        dtype: str,
        q_heads: int,
        kv_heads: int,
        head_dim: int,
    ) -> Case:
        """``chunk`` new tokens of each of ``batch`` requests over ``context`` older ones and themselves."""
        total = context + chunk
        kv_bytes = 2 * batch * total * kv_heads * head_dim * DTYPES[dtype].itemsize
        q_bytes = 2 * batch * chunk * q_heads * head_dim * DTYPES[dtype].itemsize
        size = {"batch": batch, "context": total} if chunk == 1 else {"chunk": chunk, "context": context}
        fields = {
            **{"row": row, **size, "q_heads": q_heads, "kv_heads": kv_heads, "head_dim": head_dim},
            "backend": "flash_attn" if self._flash else "sdpa",
            "dtype": dtype,
        }

        def make() -> Work:
            if self._flash:
                return self._paged(self._flash, batch, chunk, total, dtype, (q_heads, kv_heads, head_dim))
            query = self._random(batch, q_heads, chunk, head_dim, dtype=dtype)
            key, value = (self._random(batch, kv_heads, total, head_dim, dtype=dtype) for _ in range(2))
            mask = None
            if chunk > 1 and context:
                mask = torch.ones(chunk, total, dtype=torch.bool, device=self._device).tril(diagonal=context)
            causal = chunk > 1 and not context
            return lambda: functional.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, is_causal=causal, enable_gqa=q_heads != kv_heads
            )

        return Case(stage, fields, kv_bytes + q_bytes, make)

    def _paged(
        self,
        flash: Callable[..., Any],
        batch: int,
        chunk: int,
        total: int,
        dtype: str,
        heads: tuple[int, int, int],
    ) -> Work:
        """vLLM's own FlashAttention over a paged KV cache whose blocks lie in random order."""
        q_heads, kv_heads, head_dim = heads
        blocks = math.ceil(total / BLOCK)
        query = self._random(batch * chunk, q_heads, head_dim, dtype=dtype)
        key, value = (self._random(batch * blocks, BLOCK, kv_heads, head_dim, dtype=dtype) for _ in range(2))
        order = torch.randperm(batch * blocks, device=self._device, generator=self._generator)
        table = order.to(torch.int32).view(batch, blocks)
        starts = torch.arange(0, batch * chunk + 1, chunk, dtype=torch.int32, device=self._device)
        lengths = torch.full((batch,), total, dtype=torch.int32, device=self._device)
        return lambda: flash(
            q=query,
            k=key,
            v=value,
            max_seqlen_q=chunk,
            cu_seqlens_q=starts,
            max_seqlen_k=total,
            seqused_k=lengths,
            causal=True,
            block_table=table,
        )


def flash_attention() -> Callable[..., Any] | None:
    """vLLM's FlashAttention, of the version that it picks for this GPU; None where it is not installed."""
    try:  # kernels are timed with torch alone where there is no vLLM
        from vllm.vllm_flash_attn import flash_attn_varlen_func
        from vllm.vllm_flash_attn.flash_attn_interface import is_fa_version_supported
    except (ImportError, OSError):
        return None
    hopper = torch.cuda.get_device_capability()[0] == 9
    version = 3 if hopper and is_fa_version_supported(3) else 2
    return partial(flash_attn_varlen_func, fa_version=version) if is_fa_version_supported(version) else None
