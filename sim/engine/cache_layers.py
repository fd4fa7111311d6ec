"""What the layers of a model keep of a sequence, as far as it decides about KV cache blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

CacheKind = Literal["full", "sliding", "chunked", "mla", "sparse_mla", "indexer", "mamba"]
StateKind = Literal["mamba1", "mamba2", "gdn", "kda", "linear", "short_conv"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheLayer:
    """``count`` layers that keep the same, wherever they stand in the model; numbers are of the whole model,
    before ranks divide it. A model has one of these for each sort of layer, in the order in which the first
    of each stands: vLLM's groups come in that order.

    Attributes:
        kind: ``mla`` is a latent in place of keys and values, ``sparse_mla`` one that sparse attention reads
            (DeepSeek V3.2), ``indexer`` the keys by which that chooses; ``mamba`` is any state of fixed size.
        count: layers; those that read another layer's cache are left out.
        kv_heads: heads of keys; 1 for a latent or an indexer, which every rank holds whole.
        head_size: numbers of a head's key, or of the latent with its rotary part (512 + 64), or of an
            indexer's key (128). value_size: of a head's value; None: as many as of its key.
        window: tokens of the sliding window, or of a chunk.
        fixed_bytes: bytes of a number whatever ``--kv-cache-dtype`` says; None: as that says.
        state: whose state a mamba layer keeps.
        conv: numbers of the convolution's state, (kernel - 1) x channels, which ranks divide. group_conv:
            those of one group of Mamba2, (kernel - 1) x 2 x state size, left out of ``conv``. groups: of
            those; ranks that they do not divide by hold copies. conv_rows: kernel - 1; each draft of a step
            adds one.
        recurrent: numbers of the recurrent state. recurrent_bytes: of one of them where the model says it;
            None: as the convolution's.
    """

    kind: CacheKind
    count: int
    kv_heads: int = 1
    head_size: int = 0
    value_size: int | None = None
    window: int = 0
    fixed_bytes: int | None = None
    state: StateKind | None = None
    conv: int = 0
    group_conv: int = 0
    groups: int = 0
    conv_rows: int = 0
    recurrent: int = 0
    recurrent_bytes: int | None = None
