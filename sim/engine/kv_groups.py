"""From the layers of a model to vLLM's KV cache groups, and from these to blocks and tokens.

Layers that keep the same form a group: one list of blocks a sequence for all of them. All groups take their
blocks from one pool, so a block has the bytes of the widest group. The rules are those of
``vllm/v1/core/kv_cache_utils.py`` (get_kv_cache_groups, get_kv_cache_configs) and of
``vllm/platforms/interface.py`` (_align_hybrid_block_size).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from servecast.sim.engine.cache_layers import CacheLayer
from servecast.sim.engine.group_rules import group_rules_for
from servecast.sim.engine.rules import since
from servecast.sim.inputs.errors import InputError

GroupKind = Literal["full", "sliding", "chunked", "mamba"]
CacheMode = Literal["none", "align", "all"]
MLA_KINDS = ("mla", "sparse_mla", "indexer")
_GROUP_KINDS: dict[str, GroupKind] = {
    "full": "full",
    "sliding": "sliding",
    "chunked": "chunked",
    **dict.fromkeys(MLA_KINDS, "full"),
}
_INDEXER_SCALES = 128  # numbers of an indexer's key that share a scale of 4 bytes
_SPARSE_FP8_BYTES = 656  # fp8_ds_mla: 512 numbers, 4 scales of 4 bytes, 64 rotary numbers of 2 bytes
_CHECKPOINTS_SINCE = {"mamba2": "0.32", "kda": "0.32"}  # states that a chunk can save inside itself


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheSpec:
    """How one layer keeps its cache on a rank; layers of equal specs share groups.

    Attributes:
        kind: how its blocks are kept. block_size: tokens a block. page_bytes: of a block in this layer.
        shape: tells specs apart that have equal bytes: heads and head sizes, or the sizes of a state.
        latent: MLA's, whose pages cannot be padded.
        window: tokens of the sliding window or of a chunk.
        mode: when a mamba layer keeps states. checkpoint: it can save a state inside a chunk, at multiples
            of this many tokens from its start; 0: it cannot.
        drafts: states that a mamba layer holds for the drafts of a step, a block each.
        noted_window: of a layer that is managed as full although it slides.
    """

    kind: GroupKind
    block_size: int
    page_bytes: int
    shape: tuple[object, ...] = ()
    latent: bool = False
    window: int = 0
    mode: CacheMode = "none"
    checkpoint: int = 0
    drafts: int = 0
    noted_window: int = 0


@dataclass(frozen=True, slots=True)
class KVGroup:
    """Layers with one list of blocks a sequence: what the first of them keeps, how many they are, and the
    bytes of a block in all of them."""

    spec: CacheSpec
    layers: int
    bytes: int

    @property
    def title(self) -> str:
        """For people: "12 sliding-128 (block 16)"."""
        spec = self.spec
        kind = f"{spec.kind}-{spec.window}" if spec.window else spec.kind
        return f"{self.layers} {kind} (block {spec.block_size:,})"


@dataclass(frozen=True, slots=True)
class CacheOptions:
    """What decides beside the layers. Bytes are of a number.

    Attributes:
        release: of vLLM. ranks: of tensor parallelism; context_ranks: of those, the ones that share a
            sequence's tokens out (``--decode-context-parallel-size``). kv_bytes: by ``--kv-cache-dtype``.
        dtype_bytes: of the model, which states have. block_size: ``--block-size``; None: the attention
            backend's.
        capability: of the GPU. mamba_block_size, mamba_mode, state_bytes, recurrent_bytes: the flags
            ``--mamba-block-size``, ``--mamba-cache-mode``, ``--mamba-cache-dtype`` and
            ``--mamba-ssm-cache-dtype``. chunk: tokens of a chunk of the model's scan (mode ``all``).
        drafts: tokens that are drafted a step: a state each.
        hybrid: whether layers are managed by kind; ``--disable-hybrid-kv-cache-manager``.
    """

    release: str
    ranks: int = 1
    context_ranks: int = 1
    kv_bytes: int = 2
    dtype_bytes: int = 2
    block_size: int | None = None
    capability: tuple[int, int] = (9, 0)
    max_model_len: int = 1
    mamba_mode: CacheMode = "align"
    mamba_block_size: int | None = None
    state_bytes: int | None = None
    recurrent_bytes: int | None = None
    chunk: int = 256
    drafts: int = 0
    hybrid: bool = True


def group_kind(layer: str) -> GroupKind:
    """Of the group of a layer's kind (``CacheLayer.kind``)."""
    return _GROUP_KINDS.get(layer, "mamba")


def _ceil(number: int, divisor: int) -> int:
    return -(-number // divisor)


def default_block_size(layers: Sequence[CacheLayer], options: CacheOptions) -> int:
    """Tokens a block where ``--block-size`` is not given: the preference of the attention backend that vLLM
    takes first on the GPU (platforms/cuda.py, _get_backend_priorities)."""
    kinds = {layer.kind for layer in layers}
    if "sparse_mla" in kinds or "indexer" in kinds:
        return 64
    if "mla" not in kinds:
        return 16
    if options.capability[0] == 10:
        return 32  # FlashInfer
    if options.capability[0] == 9 and options.kv_bytes < 2:
        return 64  # FlashMLA; FlashAttention reads no fp8 latents
    return 16


def token_bytes(layer: CacheLayer, ranks: int, kv_bytes: int) -> int:
    """Bytes of a token in one attention layer on a rank; ``kv_bytes``: of a number, by --kv-cache-dtype."""
    each = kv_bytes if layer.fixed_bytes is None else layer.fixed_bytes
    if layer.kind == "indexer":
        return layer.head_size + layer.head_size // _INDEXER_SCALES * 4
    if layer.kind == "sparse_mla" and each == 1:
        return _SPARSE_FP8_BYTES
    if layer.kind in MLA_KINDS:
        return layer.head_size * each
    value = layer.head_size if layer.value_size is None else layer.value_size
    return max(1, layer.kv_heads // ranks) * (layer.head_size + value) * each


def state_bytes(layer: CacheLayer, options: CacheOptions) -> int:
    """Bytes of a sequence's state in one mamba layer on a rank (mamba_utils.py)."""
    each = options.state_bytes or options.dtype_bytes
    recurrent = options.recurrent_bytes or layer.recurrent_bytes or each
    groups = layer.groups
    if groups % options.ranks:
        groups = options.ranks  # copies (extra_groups_for_head_shards)
    conv = (layer.conv + groups * layer.group_conv) // options.ranks
    if layer.conv_rows:
        conv += conv // layer.conv_rows * options.drafts
    return conv * each + layer.recurrent // options.ranks * recurrent


def hybrid_block_size(layers: Sequence[CacheLayer], block_size: int, options: CacheOptions) -> int:
    """Tokens a block beside mamba layers: enough that a page of attention holds a state."""
    attention = [layer for layer in layers if layer.kind != "mamba"]
    states = [state_bytes(layer, options) for layer in layers if layer.kind == "mamba"]
    if not attention or not states:
        return block_size
    mla = any(layer.kind in MLA_KINDS for layer in attention)
    kernel = default_block_size(attention, replace(options, block_size=None))
    step = max(kernel, block_size, 128 if mla and since(options.release, "0.32") else 0)
    token = token_bytes(attention[0], options.ranks, options.kv_bytes)
    if options.mamba_mode == "all":
        chunk = math.lcm(options.mamba_block_size or options.chunk, step)
        return max(block_size, chunk * _ceil(_ceil(max(states), token), chunk))
    needed = step * _ceil(max(states), step * token)
    if since(options.release, "0.32"):
        needed = kernel * _ceil(needed, kernel)
    return max(block_size, needed)


def specs(layers: Sequence[CacheLayer], options: CacheOptions) -> list[tuple[CacheSpec, int]]:
    """What each sort of layer keeps on a rank, and how many layers of it there are."""
    block_size = options.block_size or default_block_size(layers, options)
    block_size = hybrid_block_size(layers, block_size, options)
    attention = [layer for layer in layers if layer.kind != "mamba"]
    found: list[tuple[CacheSpec, int]] = []
    for layer in layers:
        if layer.kind == "mamba":
            found.append((_state_spec(layer, attention, block_size, options), layer.count))
            continue
        latent = layer.kind in MLA_KINDS
        heads = 1 if latent else max(1, layer.kv_heads // options.ranks)
        spec = CacheSpec(
            kind=_GROUP_KINDS[layer.kind],
            block_size=block_size * options.context_ranks,  # a block's tokens on all of them
            page_bytes=token_bytes(layer, options.ranks, options.kv_bytes) * block_size,
            shape=(heads, layer.head_size, layer.value_size, layer.fixed_bytes, latent and layer.kind),
            latent=latent,
            window=layer.window if layer.kind in ("sliding", "chunked") else 0,
        )
        found.append((spec, layer.count))
    return found


def _state_spec(
    layer: CacheLayer, attention: Sequence[CacheLayer], block_size: int, options: CacheOptions
) -> CacheSpec:
    state = state_bytes(layer, options)
    page = state
    if attention:
        page = max(state, block_size * token_bytes(attention[0], options.ranks, options.kv_bytes))
    first = _CHECKPOINTS_SINCE.get(layer.state or "")
    saves = options.mamba_mode == "align" and first is not None and since(options.release, first)
    return CacheSpec(
        kind="mamba",
        block_size=options.max_model_len if options.mamba_mode == "none" else block_size,
        page_bytes=page,
        shape=(layer.state, layer.conv, layer.group_conv, layer.groups, layer.recurrent, state),
        mode=options.mamba_mode,
        checkpoint=1 if saves else 0,
        drafts=options.drafts,
    )


def groups_of(
    found: Sequence[tuple[CacheSpec, int]], release: str, *, hybrid: bool = True
) -> tuple[KVGroup, ...]:
    """vLLM's groups of these layers, in its order (get_kv_cache_groups).

    Raises:
        InputError: this release cannot give them pages of one size.
    """
    found = list(found)
    if not found:
        return ()
    if not hybrid:
        found = _as_full(found, release)
    if len(_mergeable([spec for spec, _ in found])) == 1:
        spec, count = _merged([spec for spec, _ in found]), sum(count for _, count in found)
        return (KVGroup(spec, count, count * spec.page_bytes),)
    if _one_type([spec for spec, _ in found], release):
        total = sum(spec.page_bytes * count for spec, count in found)
        return (KVGroup(found[0][0], sum(count for _, count in found), total),)
    unified = _equal_pages(found, release)
    if unified is None:  # latents beside sliding windows: these are given all their tokens, too
        return groups_of(found, release, hybrid=False)
    return _by_pattern(unified, release)


def _mergeable(found: Sequence[CacheSpec], *, merge: bool = True) -> list[list[int]]:
    """Positions of specs that can be one, in buckets: equal ones, and full ones that only note windows."""
    buckets: list[list[int]] = []
    for index, spec in enumerate(found):
        for bucket in buckets:
            first = found[bucket[0]]
            if spec == first:
                break
            windows = {found[i].noted_window for i in [*bucket, index]} - {0}
            if merge and len(windows) < 2 and replace(spec, noted_window=0) == replace(first, noted_window=0):
                break
        else:
            buckets.append([index])
            continue
        bucket.append(index)
    return buckets


def _merged(found: Sequence[CacheSpec]) -> CacheSpec:
    return replace(found[0], noted_window=max(spec.noted_window for spec in found))


def _one_type(found: Sequence[CacheSpec], release: str) -> bool:
    """Whether all layers need the same token slots (UniformTypeKVCacheSpecs.is_uniform_type)."""
    first = found[0]
    same = {(spec.kind, spec.block_size, spec.window) for spec in found}
    if len(same) > 1:
        return False
    if first.kind != "mamba" or not since(release, "0.32"):
        return True
    return len({(spec.page_bytes, spec.checkpoint) for spec in found}) == 1


def _as_full(found: Sequence[tuple[CacheSpec, int]], release: str) -> list[tuple[CacheSpec, int]]:
    """Sliding and chunked layers beside full ones, managed as full ones (unify_hybrid_kv_cache_specs)."""
    kinds = {spec.kind for spec, _ in found}
    full = [
        (replace(spec, kind="full", window=0, noted_window=spec.window), count)
        if spec.kind in ("sliding", "chunked") and "full" in kinds
        else (spec, count)
        for spec, count in found
    ]
    if len(_mergeable([spec for spec, _ in full])) > 1 and not _one_type([spec for spec, _ in full], release):
        raise InputError(
            f"{' and '.join(sorted(kinds))} layers cannot be managed as one kind",
            where="engine.disable_hybrid_kv_cache_manager",
            fix="Leave it out: vLLM refuses this.",
        )
    return full


def _equal_pages(found: Sequence[tuple[CacheSpec, int]], release: str) -> list[tuple[CacheSpec, int]] | None:
    """All pages as large as the largest (unify_kv_cache_spec_page_size); None where they are treated as full
    layers instead."""
    largest = max(spec.page_bytes for spec, _ in found)
    pads = since(release, "0.32")
    unified = []
    for spec, count in found:
        if spec.page_bytes == largest:
            unified.append((spec, count))
        elif spec.kind == "mamba" and pads:
            unified.append((replace(spec, page_bytes=largest), count))
        elif largest % spec.page_bytes == 0:
            larger = spec.block_size * (largest // spec.page_bytes)
            unified.append((replace(spec, block_size=larger, page_bytes=largest), count))
        elif pads and not spec.latent:
            unified.append((replace(spec, page_bytes=largest), count))
        elif pads and any(spec.kind == "sliding" and not spec.latent for spec, _ in found):
            return None
        else:
            raise InputError(
                f"vLLM {release} cannot give pages of {spec.page_bytes:,} and {largest:,} bytes one size",
                where="engine.version",
                fix="Use vLLM 0.32 or newer, or another block_size.",
            )
    return unified


def _by_pattern(found: Sequence[tuple[CacheSpec, int]], release: str) -> tuple[KVGroup, ...]:
    """Groups of about as many layers each (_get_kv_cache_groups_uniform_page_size)."""
    buckets = _mergeable([spec for spec, _ in found], merge=since(release, "0.32"))
    counts = [sum(found[i][1] for i in bucket) for bucket in buckets]
    size = max(counts) if max(counts) < 1.5 * min(counts) else min(counts)
    groups = []
    for bucket, count in zip(buckets, counts, strict=True):
        spec = _merged([found[i][0] for i in bucket])
        number = _ceil(count, size)
        for i in range(number):
            layers = _ceil(count - i, number)
            groups.append(KVGroup(spec, layers, layers * spec.page_bytes))
    return tuple(groups)


def tells(groups: Sequence[KVGroup]) -> bool:
    """Whether the cache is more than one group of full attention."""
    return len(groups) > 1 or any(group.spec.kind != "full" for group in groups)


def block_bytes(groups: Sequence[KVGroup]) -> int:
    """Bytes of a block of the pool on one rank."""
    return max((group.bytes for group in groups), default=1)


def in_flight_tokens(release: str, max_num_batched_tokens: int, *, async_scheduling: bool) -> int:
    """Tokens of a sequence that may be computed, or about to be, beyond those that are known."""
    both = async_scheduling and group_rules_for(release).trims_what_is_processed
    return max_num_batched_tokens * (2 if both else 1)


def most_blocks(spec: CacheSpec, max_model_len: int, in_flight: int) -> int:
    """Blocks that a group needs for a sequence of ``max_model_len`` tokens (max_memory_usage_bytes)."""
    block = spec.block_size
    if spec.kind == "sliding":
        return _ceil(min(spec.window - 1 + in_flight, max_model_len), block) + 1
    if spec.kind == "chunked":
        return _ceil(min(spec.window + in_flight, max_model_len), block)
    if spec.kind == "mamba" and spec.mode != "all":
        return spec.drafts + (1 if spec.mode == "none" else 2 + (spec.checkpoint > 0))
    return _ceil(max_model_len, block) + spec.drafts


def blocks_per_sequence(groups: Sequence[KVGroup], max_model_len: int, in_flight: int) -> int:
    """Blocks of a sequence of ``max_model_len`` tokens, all groups."""
    return sum(most_blocks(group.spec, max_model_len, in_flight) for group in groups)


def longest_sequence(blocks: int, most: int, needed: Callable[[int], int]) -> int:
    """The longest sequence, up to ``most`` tokens, that ``blocks`` blocks hold; 0 if none does
    (_estimate_max_model_len_from_groups). needed: blocks for a number of tokens."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        if needed(middle) <= blocks:
            low = middle
        else:
            high = middle - 1
    return low


def scheduler_block(groups: Sequence[CacheSpec]) -> int:
    """Tokens that all groups' blocks divide (resolve_kv_cache_block_sizes)."""
    return math.lcm(*(spec.block_size for spec in groups))


def hash_block(groups: Sequence[CacheSpec], *, caching: bool) -> int:
    """Tokens a hash of the prefix cache covers."""
    sizes = [spec.block_size for spec in groups]
    states = any(spec.kind == "mamba" and spec.mode != "align" for spec in groups)
    if len(groups) == 1 or not caching or states:
        return math.lcm(*sizes)
    return math.gcd(*sizes)
