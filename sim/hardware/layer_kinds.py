"""How the layers of a model mix tokens: attention of several kinds, and states of fixed size.

A ``Mixer`` says it for layers that are alike; the matrices that it is made of, how ranks split them, and what
it keeps of a sequence follow from its sizes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from servecast.sim.engine.cache_layers import CacheLayer
from servecast.sim.inputs.errors import InputError

MixerKind = Literal["full", "sliding", "chunked", "mla", "sparse_mla", "compressed", "mamba2", "gdn", "kda"]
WORDS: dict[MixerKind, str] = {
    "full": "full attention",
    "sliding": "attention over a sliding window",
    "chunked": "attention inside chunks",
    "mla": "multi-head latent attention",
    "sparse_mla": "sparse multi-head latent attention",
    "compressed": "attention to compressed tokens",
    "mamba2": "Mamba-2 layers",
    "gdn": "gated delta (linear attention) layers",
    "kda": "Kimi delta (linear attention) layers",
}
STATES = ("mamba2", "gdn", "kda")  # keep a state of fixed size, no keys and values


@dataclass(frozen=True, slots=True)
class Linear:
    """One matrix of a layer, ``inputs`` x ``outputs``.

    Attributes:
        module: its name in the checkpoint, inside the layer.
        split: what ranks divide: its inputs (their sums are then reduced), its outputs, or nothing. heads:
            of keys, if they are the outputs, which are divided until one is left and then repeated.
        joined: multiplied together with the matrix before it, so that its input is read once.
    """

    module: str
    inputs: int
    outputs: int
    split: Literal["", "in", "out"] = ""
    heads: int = 0
    joined: bool = False

    def on(self, ranks: int) -> tuple[int, int]:
        """Inputs and outputs on one rank."""
        if self.heads:
            return self.inputs, self.outputs // self.heads * max(1, self.heads // ranks)
        inputs = self.inputs // ranks if self.split == "in" else self.inputs
        return inputs, self.outputs // ranks if self.split == "out" else self.outputs

    def weights(self, ranks: int) -> int:
        """Its numbers on one rank."""
        inputs, outputs = self.on(ranks)
        return inputs * outputs

    def moved(self, ranks: int) -> int:
        """Numbers of activations that it reads and writes for one token, on one rank."""
        inputs, outputs = self.on(ranks)
        return outputs if self.joined else inputs + outputs


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixer:
    """``count`` layers that mix tokens alike. All numbers are of the whole model.

    Attributes:
        kind: ``full``, ``sliding`` and ``chunked`` are grouped-query attention; ``mla`` attends to latents,
            ``sparse_mla`` to those that an indexer chooses (DeepSeek V3.2), ``compressed`` to tokens that are
            merged by several rates (DeepSeek V4); ``mamba2``, ``gdn`` (gated delta net) and ``kda`` (Kimi's)
            keep a state.
        count: layers.
        heads: of queries; of a state's values. kv_heads: of keys and values; of a gdn's keys; groups of a
            mamba2. 1 for a latent.
        head_dim: of a query and key, the rotary part included; of a state's keys (a mamba2's state size).
            value_dim: of a value.
        window: tokens of the sliding window, or of a chunk.
        gated: queries come with a gate of their size for the output (Qwen3-Next).
        query_rank, kv_rank, rope_dim: of a latent attention: ranks of the low-rank projections (0: queries
            have none), and the rotary part of head_dim, which all heads share.
        index_heads, index_dim, index_topk: of the indexer, and how many tokens it lets a query attend to.
        conv: kernel of the convolution before a state. state_bytes: of a number of the state where the model
            says it.
        extra: matrices that its sizes do not say. other_weights: small ones of one layer,
            beyond those that its sizes and a ``ModelShape`` say.
    """

    kind: MixerKind
    count: int
    heads: int
    kv_heads: int = 1
    head_dim: int
    value_dim: int
    window: int = 0
    gated: bool = False
    query_rank: int = 0
    kv_rank: int = 0
    rope_dim: int = 0
    index_heads: int = 0
    index_dim: int = 0
    index_topk: int = 0
    conv: int = 0
    state_bytes: int | None = None
    extra: tuple[Linear, ...] = ()
    other_weights: int = 0

    @property
    def attends(self) -> bool:
        """Whether it is grouped-query attention."""
        return self.kind in ("full", "sliding", "chunked")

    @property
    def conv_channels(self) -> int:
        """Channels of the convolution before a state."""
        return self.heads * self.value_dim + 2 * self.kv_heads * self.head_dim

    @property
    def small_weights(self) -> int:
        """Norms, convolutions and biases of one layer that its sizes imply."""
        heads, values = self.heads, self.heads * self.value_dim
        convolution = self.conv_channels * self.conv
        return self.other_weights + {
            "mla": self.query_rank + self.kv_rank,
            "sparse_mla": self.query_rank + self.kv_rank + 2 * self.index_dim,
            "mamba2": convolution + 3 * heads + values,
            "gdn": convolution + 2 * heads + self.value_dim,
            "kda": convolution + values + heads + self.value_dim,
        }.get(self.kind, 0)

    def cache_layers(self) -> tuple[CacheLayer, ...]:
        """What these layers keep of a sequence.

        Raises:
            InputError: vLLM's layout of it is not modelled.
        """
        if self.kind == "compressed":
            raise InputError(
                f"the KV cache of {WORDS[self.kind]} is not modelled",
                where="model",
                fix="Use a model of other layers.",
            )
        if self.kind in STATES:
            group_conv = (self.conv - 1) * 2 * self.head_dim if self.kind == "mamba2" else 0
            return (
                CacheLayer(
                    kind="mamba",
                    count=self.count,
                    state=self.kind,  # type: ignore[arg-type]
                    conv=(self.conv - 1) * self.conv_channels - self.kv_heads * group_conv,
                    group_conv=group_conv,
                    groups=self.kv_heads if group_conv else 0,
                    conv_rows=self.conv - 1,
                    recurrent=self.heads * self.value_dim * self.head_dim,
                    recurrent_bytes=self.state_bytes,
                ),
            )
        if self.kind in ("mla", "sparse_mla"):
            latent = CacheLayer(kind=self.kind, count=self.count, head_size=self.kv_rank + self.rope_dim)
            index = CacheLayer(kind="indexer", count=self.count, head_size=self.index_dim)
            return (latent, index) if self.index_heads else (latent,)
        return (
            CacheLayer(
                kind=self.kind,  # type: ignore[arg-type]  # what is left are these three
                count=self.count,
                kv_heads=self.kv_heads,
                head_size=self.head_dim,
                value_size=None if self.value_dim == self.head_dim else self.value_dim,
                window=self.window,
            ),
        )

    def linears(self, hidden: int) -> tuple[Linear, ...]:
        """The matrices of one layer, in the order in which they are multiplied."""
        heads, values = self.heads, self.heads * self.value_dim
        keys = self.kv_heads * self.head_dim
        if self.attends:
            return (
                Linear("self_attn.q_proj", hidden, heads * self.head_dim * (1 + self.gated), "out"),
                Linear("self_attn.k_proj", hidden, keys, "out", self.kv_heads, joined=True),
                Linear(
                    "self_attn.v_proj",
                    hidden,
                    self.kv_heads * self.value_dim,
                    "out",
                    self.kv_heads,
                    joined=True,
                ),
                Linear("self_attn.o_proj", values, hidden, "in"),
                *self.extra,
            )
        if self.kind in ("mla", "sparse_mla"):
            return (*self._latent(hidden), *self.extra)
        if self.kind == "mamba2":
            return (
                Linear("mixer.in_proj", hidden, 2 * values + 2 * keys + heads, "out"),
                Linear("mixer.out_proj", values, hidden, "in"),
            )
        if self.kind == "gdn":
            return (
                Linear("linear_attn.in_proj_qkvz", hidden, 2 * keys + 2 * values, "out"),
                Linear("linear_attn.in_proj_ba", hidden, 2 * heads, "out"),
                Linear("linear_attn.out_proj", values, hidden, "in"),
            )
        if self.kind == "kda":
            narrow = self.head_dim
            return (
                Linear("self_attn.q_proj", hidden, keys, "out"),
                Linear("self_attn.k_proj", hidden, keys, "out", joined=True),
                Linear("self_attn.v_proj", hidden, values, "out", joined=True),
                Linear("self_attn.f_a_proj", hidden, narrow),
                Linear("self_attn.f_b_proj", narrow, values, "out"),
                Linear("self_attn.b_proj", hidden, heads, "out"),
                Linear("self_attn.g_a_proj", hidden, narrow),
                Linear("self_attn.g_b_proj", narrow, values, "out"),
                Linear("self_attn.o_proj", values, hidden, "in"),
            )
        return self.extra

    def _latent(self, hidden: int) -> tuple[Linear, ...]:
        """Queries, latents and output of a latent attention, and the indexer's."""
        at, rank = "self_attn.", self.query_rank
        queries = self.heads * self.head_dim
        latent = self.kv_rank + self.rope_dim
        up = self.heads * (self.head_dim - self.rope_dim + self.value_dim)
        query: tuple[Linear, ...] = (Linear(f"{at}q_proj", hidden, queries, "out"),)
        down = Linear(f"{at}kv_a_proj_with_mqa", hidden, latent, joined=bool(rank))
        if rank:
            query = (
                Linear(f"{at}q_a_proj", hidden, rank),
                down,
                Linear(f"{at}q_b_proj", rank, queries, "out"),
            )
        else:
            query = (*query, down)
        index: tuple[Linear, ...] = ()
        if self.index_heads:
            index = (
                Linear(f"{at}indexer.wq_b", rank or hidden, self.index_heads * self.index_dim),
                Linear(f"{at}indexer.wk", hidden, self.index_dim),
                Linear(f"{at}indexer.weights_proj", hidden, self.index_heads, joined=True),
            )
        return (
            *query,
            *index,
            Linear(f"{at}kv_b_proj", self.kv_rank, up, "out"),
            Linear(f"{at}o_proj", self.heads * self.value_dim, hidden, "in"),
        )
