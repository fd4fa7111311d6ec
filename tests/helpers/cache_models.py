"""Models as vLLM's KV cache sees them, by the sizes of their published configurations.

Each has layers, in the order in which the first of each sort stands in the model, and the flags under which
its pool is sized. Beside a layer with states stand the arguments of vLLM's own calculator of their shapes.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from servecast.sim.engine.cache_layers import CacheLayer

GIB = 1 << 30


@dataclass(frozen=True)
class CacheModel:
    """``sizes`` are a state's, by the layer's index; ``kv_bytes``, ``block_size`` and the rest are flags."""

    name: str
    layers: tuple[CacheLayer, ...]
    max_model_len: int
    gib: tuple[float, float, float]
    ranks: int = 1
    context_ranks: int = 1
    kv_bytes: int = 2
    recurrent_bytes: int | None = None
    block_size: int | None = None
    mode: str = "align"
    hybrid: bool = True
    asynchronous: bool = True
    budget: int = 8192
    drafts: int = 0
    sizes: tuple[dict[str, int], ...] = ()
    only_since: str = "0.23"  # older releases refuse it, or have states there that are not modelled

    def case(self, release: str, default_block: int) -> dict[str, Any]:
        """As tests/helpers/vllm_pools.py reads it."""
        layers = [asdict(layer) for layer in self.layers]
        sizes = iter(self.sizes)
        for layer in layers:
            if layer["kind"] == "mamba":
                layer["sizes"] = next(sizes)
        return {
            "layers": layers,
            "ranks": self.ranks,
            "context_ranks": self.context_ranks,
            "kv_bytes": self.kv_bytes,
            "recurrent_bytes": self.recurrent_bytes,
            "max_model_len": self.max_model_len,
            "budget": self.budget,
            "asynchronous": self.asynchronous,
            "block_size": self.block_size or default_block,
            "mode": self.mode,
            "drafts": self.drafts,
            "hybrid": self.hybrid,
            "saves_inside": release >= "0.32",
            "available": [int(gib * GIB) for gib in self.gib],
        }


def attention(kind: Any, count: int, kv_heads: int, head_size: int, **more: int) -> CacheLayer:
    return CacheLayer(kind=kind, count=count, kv_heads=kv_heads, head_size=head_size, **more)


def gdn(count: int, key_heads: int, value_heads: int, size: int = 128, kernel: int = 4) -> CacheLayer:
    return CacheLayer(
        kind="mamba",
        count=count,
        state="gdn",
        conv=(kernel - 1) * size * (2 * key_heads + value_heads),
        conv_rows=kernel - 1,
        recurrent=value_heads * size * size,
    )


def gdn_sizes(key_heads: int, value_heads: int) -> dict[str, int]:
    sizes = {"num_k_heads": key_heads, "num_v_heads": value_heads, "head_k_dim": 128, "head_v_dim": 128}
    return sizes | {"conv_kernel_size": 4}


def mamba2(count: int, sizes: dict[str, int], recurrent_bytes: int | None = None) -> CacheLayer:
    rows = sizes["conv_kernel"] - 1
    return CacheLayer(
        kind="mamba",
        count=count,
        state="mamba2",
        conv=rows * sizes["intermediate_size"],
        group_conv=rows * 2 * sizes["state_size"],
        groups=sizes["n_groups"],
        conv_rows=rows,
        recurrent=sizes["num_heads"] * sizes["head_dim"] * sizes["state_size"],
        recurrent_bytes=recurrent_bytes,
    )


def mamba2_sizes(inner: int, groups: int, heads: int, head: int, state: int) -> dict[str, int]:
    sizes = {"intermediate_size": inner, "n_groups": groups, "num_heads": heads, "head_dim": head}
    return sizes | {"state_size": state, "conv_kernel": 4}


GRANITE = mamba2_sizes(8192, 1, 128, 64, 128)
NEMOTRON = mamba2_sizes(10240, 8, 128, 80, 128)
FALCON = mamba2_sizes(4096, 1, 32, 128, 256)
GEMMA = (attention("sliding", 52, 16, 128, window=1024), attention("full", 10, 16, 128))
GPT_OSS = (attention("sliding", 12, 8, 64, window=128), attention("full", 12, 8, 64))
QWEN_NEXT = (gdn(36, 16, 32), attention("full", 12, 2, 256))
LLAMA4 = (attention("chunked", 36, 8, 128, window=8192), attention("full", 12, 8, 128))

MODELS = (
    CacheModel("llama-3.1-8b", (attention("full", 32, 8, 128),), 131_072, (12, 17, 55.5)),
    CacheModel("gemma-3-27b", GEMMA, 32_768, (8, 15, 60)),
    CacheModel("gemma-3-27b fp8", GEMMA, 32_768, (4, 15, 60), kv_bytes=1),
    CacheModel("gemma-3-27b as full", GEMMA, 32_768, (15, 20, 60), hybrid=False),
    CacheModel(
        "gemma-3-1b",
        (attention("sliding", 22, 1, 256, window=512), attention("full", 4, 1, 256)),
        32_768,
        (0.4, 10, 60),
    ),
    CacheModel("gpt-oss-20b", GPT_OSS, 131_072, (3, 55, 120.25)),
    CacheModel("gpt-oss-20b, not async", GPT_OSS, 131_072, (3, 55, 120.25), asynchronous=False, budget=2048),
    CacheModel(
        "gpt-oss-120b TP8",
        (attention("sliding", 18, 8, 64, window=128), attention("full", 18, 8, 64)),
        131_072,
        (0.5, 30, 60),
        ranks=8,
    ),
    CacheModel(
        "gpt-oss-20b and a drafter",
        (*GPT_OSS[:1], attention("full", 13, 8, 64)),
        131_072,
        (3, 55, 120),
    ),
    CacheModel("mistral-7b-v0.1", (attention("sliding", 32, 8, 128, window=4096),), 32_768, (2, 15, 50)),
    CacheModel("qwen3-next-80b TP4", QWEN_NEXT, 262_144, (2, 20, 100), ranks=4, sizes=(gdn_sizes(16, 32),)),
    CacheModel(
        "qwen3-next-80b, 32-bit states",
        QWEN_NEXT,
        262_144,
        (5, 20, 60),
        recurrent_bytes=4,
        ranks=2,
        sizes=(gdn_sizes(16, 32),),
    ),
    CacheModel(
        "qwen3-next-80b, no caching",
        QWEN_NEXT,
        262_144,
        (5, 20, 60),
        ranks=4,
        mode="none",
        sizes=(gdn_sizes(16, 32),),
    ),
    CacheModel(
        "qwen3-next-80b, 2 drafts",
        QWEN_NEXT,
        262_144,
        (2, 20, 100),
        ranks=4,
        drafts=2,
        sizes=(gdn_sizes(16, 32),),
    ),
    CacheModel(
        "qwen3-next-80b, 3 drafts, no caching",
        QWEN_NEXT,
        262_144,
        (2, 20, 100),
        ranks=4,
        mode="none",
        drafts=3,
        sizes=(gdn_sizes(16, 32),),
    ),
    CacheModel(
        "granite-4.0-h-small",
        (mamba2(36, GRANITE), attention("full", 4, 8, 128)),
        131_072,
        (1, 20, 60),
        sizes=(GRANITE,),
    ),
    CacheModel(
        "nemotron-nano-9b-v2 TP2",
        (mamba2(27, NEMOTRON, recurrent_bytes=4), attention("full", 4, 8, 128)),
        131_072,
        (1, 8, 55),
        ranks=2,
        sizes=(NEMOTRON,),
    ),
    CacheModel(
        "falcon-h1-34b TP2",
        (mamba2(72, FALCON), attention("full", 72, 4, 128)),
        65_536,
        (2, 20, 60),
        ranks=2,
        sizes=(FALCON,),
    ),
    CacheModel(
        "kimi-linear-48b",
        (
            CacheLayer(
                kind="mamba",
                count=20,
                state="kda",
                conv=3 * 3 * 32 * 128,
                conv_rows=3,
                recurrent=32 * 128 * 128,
                recurrent_bytes=4,
            ),
            CacheLayer(kind="mla", count=7, head_size=576),
        ),
        1_048_576,
        (2, 10, 60),
        sizes=({"num_heads": 32, "head_dim": 128, "conv_kernel_size": 4},),
        only_since="0.32",
    ),
    CacheModel(
        "minimax-text-01 TP8",
        (
            CacheLayer(kind="mamba", count=70, state="linear", recurrent=64 * 128 * 128, recurrent_bytes=4),
            attention("full", 10, 8, 128),
        ),
        1_000_000,
        (3, 9, 30),
        ranks=8,
        sizes=({"num_heads": 64, "head_dim": 128},),
    ),
    CacheModel(
        "deepseek-v3 fp8 TP8",
        (CacheLayer(kind="mla", count=61, head_size=576),),
        131_072,
        (4, 8, 40),
        ranks=8,
        kv_bytes=1,
    ),
    CacheModel(
        "deepseek-v3 TP8, DCP8",
        (CacheLayer(kind="mla", count=61, head_size=576),),
        131_001,
        (1, 8, 40),
        ranks=8,
        context_ranks=8,
    ),
    CacheModel(
        "qwen3-235b TP8, DCP2",
        (attention("full", 94, 4, 128),),
        40_960,
        (0.5, 8, 40),
        ranks=8,
        context_ranks=2,
    ),
    CacheModel(
        "deepseek-v3.2",
        (
            CacheLayer(kind="sparse_mla", count=61, head_size=576),
            CacheLayer(kind="indexer", count=61, head_size=128),
        ),
        131_072,
        (4, 8, 40),
        ranks=8,
        kv_bytes=1,
    ),
    CacheModel("llama-4-scout TP8", LLAMA4, 131_072, (1, 10, 40), ranks=8, hybrid=False),
    CacheModel("llama-4-scout by kind", LLAMA4, 131_072, (1, 10, 40), ranks=8),
    CacheModel(
        "mimo-v2-flash TP2",
        (
            attention("full", 9, 4, 192, value_size=128),
            attention("sliding", 39, 8, 192, value_size=128, window=128),
        ),
        131_072,
        (2, 10, 40),
        ranks=2,
    ),
    CacheModel(
        "full layers of two sizes",
        (attention("full", 20, 8, 128), attention("full", 12, 2, 128)),
        32_768,
        (2, 10, 40),
    ),
    CacheModel(
        "windows whose pages do not divide",
        (attention("sliding", 20, 6, 128, window=1024), attention("full", 10, 4, 128)),
        32_768,
        (2, 10, 40),
        only_since="0.32",
    ),
    CacheModel(
        "a latent and a window",
        (CacheLayer(kind="mla", count=20, head_size=576), attention("sliding", 5, 4, 128, window=512)),
        32_768,
        (1, 10, 40),
        only_since="0.32",
    ),
)
