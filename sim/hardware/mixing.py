"""What a layer that mixes tokens computes and moves on one rank: FLOPs of a pair of tokens, bytes of one."""

from __future__ import annotations

from servecast.sim.hardware.gpu import GPU
from servecast.sim.hardware.layer_kinds import STATES, Mixer


def prompt_pair_flops(mixer: Mixer, ranks: int) -> float:
    """FLOPs of a pair of query and key token in a prompt: a product with the key and one with the value in
    every head. Sparse attention does it on latents, as decodes do."""
    if mixer.kind == "sparse_mla":
        return decode_pair_flops(mixer, ranks)
    return 2.0 * mixer.heads / ranks * (mixer.head_dim + mixer.value_dim)


def head_padding(mixer: Mixer, ranks: int, gpu: GPU) -> float:
    """By how much the heads of a prompt are padded: FlashMLA's sparse kernel has 64, on Blackwell 128."""
    if mixer.kind != "sparse_mla":
        return 1.0
    return max(1.0, (64 if gpu.capability[0] < 10 else 128) * ranks / mixer.heads)


def decode_pair_flops(mixer: Mixer, ranks: int) -> float:
    """The same of a decode, where a latent stands for key and value: each head multiplies all of it."""
    if mixer.kv_rank:
        return 2.0 * mixer.heads / ranks * (2 * mixer.kv_rank + mixer.rope_dim)
    return 2.0 * mixer.heads / ranks * (mixer.head_dim + mixer.value_dim)


def kv_numbers(mixer: Mixer, ranks: int) -> int:
    """Numbers of a token in the KV cache that attention reads: keys and values, or a latent, which every rank
    holds whole."""
    if mixer.kv_rank:
        return mixer.kv_rank + mixer.rope_dim
    return max(1, mixer.kv_heads // ranks) * (mixer.head_dim + mixer.value_dim)


def attended_numbers(mixer: Mixer, ranks: int) -> float:
    """Numbers of a prompt token that attention moves: q, k, v and o, and what latent attention makes them
    of."""
    heads, dims = mixer.heads / ranks, mixer.head_dim + mixer.value_dim
    if mixer.kv_rank:
        made_of = mixer.query_rank + mixer.kv_rank + mixer.rope_dim
        if mixer.kind == "sparse_mla":
            return 2.0 * heads * (2 * mixer.kv_rank + mixer.rope_dim) + made_of
        return 2.0 * heads * dims + made_of
    if mixer.kind in STATES:
        return 2.0 * mixer.kv_heads / ranks * mixer.head_dim + 2.0 * heads * mixer.value_dim
    return (heads + max(1, mixer.kv_heads // ranks)) * dims


def index_flops(mixer: Mixer) -> float:
    """FLOPs of an indexer for a pair of tokens; every rank has all of its heads."""
    return 2.0 * mixer.index_heads * mixer.index_dim


def index_bytes(mixer: Mixer) -> int:
    """Bytes of a token that an indexer reads: its key in fp8 with a scale, and a score, written and read."""
    return mixer.index_dim + 4 + 8 if mixer.index_heads else 0


def state_bytes(mixer: Mixer, ranks: int) -> float:
    """Bytes of a sequence's state in one layer, which a step reads and writes."""
    return mixer.heads / ranks * mixer.head_dim * mixer.value_dim * (mixer.state_bytes or 2)
