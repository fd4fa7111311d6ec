"""What mixing tokens takes in a step, by kind of layer: constants of kernels turned into seconds a token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

from servecast.sim.hardware.layer_kinds import STATES, Mixer
from servecast.sim.hardware.mixing import (
    attended_numbers,
    decode_pair_flops,
    head_padding,
    index_bytes,
    index_flops,
    kv_numbers,
    prompt_pair_flops,
    state_bytes,
)
from servecast.sim.hardware.shard import Shard
from servecast.sim.inputs.errors import InputError

_SHARES = ("prompt_compute", "compute", "bandwidth", "index_compute", "index_bandwidth")
_TILE = 64  # query rows of one thread block of FlashAttention 2 at head_dim 128, to which it pads decodes


@dataclass(frozen=True, slots=True)
class MixerCosts:
    """Costs of one kind of layer that mixes tokens.

    Attributes:
        prompt_compute: share of the 16-bit peak in attention over prompts. passes: how often what a prompt
            token's attention is made of is moved at full bandwidth.
        compute, bandwidth: shares of the peaks when decodes read KV, or read and write a state. sequence_s: a
            decode and layer, s. floor_s: of one layer, s.
        index_compute, index_bandwidth: of an indexer, shares of the fp8 peak in prompts, of bandwidth in
            decodes.
        serial_s: for each token of the longest prompt, whose blocks wait for each other, s. prompt_s: a
            prompt.
    """

    prompt_compute: float
    bandwidth: float
    compute: float = 1.0
    passes: float = 0.0
    sequence_s: float = 0.0
    floor_s: float = 0.0
    index_compute: float = 1.0
    index_bandwidth: float = 1.0
    serial_s: float = 0.0
    prompt_s: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not (0.0 < value <= 1.0 if field.name in _SHARES else 0.0 <= value < math.inf):
                rule = "above 0 and at most 1" if field.name in _SHARES else "0 or more"
                where = f"efficiencies.by_kernel.mixers.{field.name}"
                raise InputError(f"{field.name} is {value}", where=where, fix=f"Make it {rule}.")


IDEAL = MixerCosts(prompt_compute=1.0, bandwidth=1.0)  # the datasheet's rates


@dataclass(frozen=True, slots=True)
class Attention:
    """Attention of layers that are alike, on one rank; seconds for one of them.

    Attributes:
        layers: how many. window: KV tokens that a token attends to at most, 0: all. chunked: only those of
            its own chunk of so many.
        pair_s: a pair of query and key token of a prompt. read_s: reading a KV token. expand_s: making keys
            and values of an older token's latent, for a prompt chunk.
        decode_pair_s: a pair of a decode. rows: query rows that a decode beside prompt chunks is padded to.
        block_s: a KV token of the longest context before a chunk, in all layers, on the few thread blocks of
            one sequence.
        least: pair_s, decode_pair_s and read_s at the datasheet's rates.
    """

    layers: int
    window: int = 0
    chunked: bool = False
    pair_s: float = 0.0
    read_s: float = 0.0
    expand_s: float = 0.0
    decode_pair_s: float = 0.0
    rows: int = 1
    block_s: float = 0.0
    least: tuple[float, float, float] = (0.0, 0.0, 0.0)

    def decode_s(self, *, mixed: bool, queries: float = 1.0) -> float:
        """A KV token that a decode reads, in a step with or without prompt chunks; ``queries``: tokens that
        attend to it, with drafts more than one, which are padded as beside chunks."""
        if queries > 1.0:
            return max(self.read_s, max(float(self.rows), queries) * self.decode_pair_s)
        return max(self.read_s, (self.rows if mixed else 1) * self.decode_pair_s)

    def pairs(self, tokens: int, context: int) -> int:
        """Pairs of query and key token in one layer, of ``tokens`` new tokens behind ``context`` older
        ones."""
        return self._reached(context + tokens) - self._reached(context)

    def _reached(self, tokens: int) -> int:
        """KV tokens that the first so many tokens of a sequence attend to, summed."""
        window = self.window
        if not window or tokens <= window:
            return tokens * (tokens + 1) // 2
        whole = window * (window + 1) // 2
        if not self.chunked:
            return whole + (tokens - window) * window
        rest = tokens % window
        return tokens // window * whole + rest * (rest + 1) // 2

    def before(self, context: int) -> int:
        """Of ``context`` KV tokens before a prompt chunk those that it attends to."""
        if self.chunked:
            return context % self.window
        return min(context, self.window) if self.window else context

    def seen(self, context: int, sequences: int, windowed: int | None) -> int:
        """KV tokens that the newest tokens of ``sequences`` attend to, themselves included, whose contexts
        come to ``context``: ``windowed`` of a layer with a window; at most that where nothing says it."""
        if not self.window:
            return context
        return min(context, sequences * self.window) if windowed is None else windowed


@dataclass(frozen=True, slots=True)
class Mixing:
    """All layers of a model that mix tokens, on one rank.

    Attributes:
        attention: of each kind. floor_s: of all layers. decode_s: a decode. chunk_token_s: a prompt token.
        chunk_s: a prompt chunk. serial_s: a token of the longest chunk.
    """

    attention: tuple[Attention, ...]
    floor_s: float
    decode_s: float
    chunk_token_s: float
    chunk_s: float
    serial_s: float

    @property
    def window(self) -> tuple[int, bool]:
        """The window of the layers that have one, and whether it is a chunk; 0 if none has."""
        found = [(each.window, each.chunked) for each in self.attention if each.window]
        return found[0] if found else (0, False)


def mixing_of(shard: Shard, costs: Sequence[MixerCosts]) -> Mixing:
    """All layers of a shard's model that mix tokens; ``costs`` of each of its ``layer_kinds``."""
    bandwidth, ranks = shard.gpu.bandwidth, shard.tensor_parallel_size
    attention: list[Attention] = []
    floor_s = decode_s = chunk_token_s = chunk_s = serial_s = 0.0
    for mixer, cost in zip(shard.model.layer_kinds, costs, strict=True):
        floor_s += mixer.count * cost.floor_s
        decode_s += mixer.count * cost.sequence_s
        moved = mixer.count * attended_numbers(mixer, ranks) * shard.model.dtype_bytes
        chunk_token_s += moved * cost.passes / bandwidth
        chunk_s += mixer.count * cost.prompt_s
        serial_s += mixer.count * cost.serial_s
        if mixer.kind in STATES:
            state_s = mixer.count * 2 * state_bytes(mixer, ranks) / (bandwidth * cost.bandwidth)
            decode_s += state_s
            chunk_s += state_s
        else:
            attention.append(_attention(mixer, cost, shard))
        if mixer.index_heads:
            attention.append(_indexer(mixer, cost, shard))
    return Mixing(tuple(attention), floor_s, decode_s, chunk_token_s, chunk_s, serial_s)


def _attention(mixer: Mixer, costs: MixerCosts, shard: Shard) -> Attention:
    gpu, ranks = shard.gpu, shard.tensor_parallel_size
    rate = gpu.bf16_flops * costs.prompt_compute
    pair, decode = prompt_pair_flops(mixer, ranks), decode_pair_flops(mixer, ranks)
    kv = kv_numbers(mixer, ranks) * shard.kv_dtype_bytes / shard.context_ranks
    block_s = expand_s = 0.0
    if gpu.sms is not None and mixer.attends:
        block_s = 4.0 * _TILE * mixer.head_dim * mixer.count * gpu.sms / rate / shard.context_ranks
    if mixer.kind == "mla":  # kv_b_proj of all older tokens, in each chunk
        up = mixer.kv_rank * mixer.heads / ranks * (mixer.head_dim - mixer.rope_dim + mixer.value_dim)
        expand_s = 2.0 * up / (shard.linear_peak * costs.prompt_compute)
    return Attention(
        layers=mixer.count,
        window=mixer.index_topk or mixer.window,
        chunked=mixer.kind == "chunked",
        pair_s=pair * head_padding(mixer, ranks, gpu) / rate,
        read_s=kv / (gpu.bandwidth * costs.bandwidth),
        expand_s=expand_s,
        decode_pair_s=decode / (gpu.bf16_flops * costs.compute if mixer.kv_rank else rate),
        rows=_TILE if mixer.attends and gpu.capability[0] in (8, 12) else 1,
        block_s=block_s,
        least=(pair / gpu.bf16_flops, decode / gpu.bf16_flops, kv / gpu.bandwidth),
    )


def _indexer(mixer: Mixer, costs: MixerCosts, shard: Shard) -> Attention:
    gpu = shard.gpu
    peak, read_s = gpu.fp8_flops or gpu.bf16_flops, index_bytes(mixer) / gpu.bandwidth
    return Attention(
        layers=mixer.count,
        pair_s=index_flops(mixer) / (peak * costs.index_compute),
        read_s=read_s / costs.index_bandwidth,
        least=(index_flops(mixer) / peak, 0.0, 0.0),
    )
