"""Which layer of a model mixes tokens how: a kind for each layer, and the sizes of each kind, as its file
says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from servecast.sim.hardware.config_file import ConfigFile, short
from servecast.sim.hardware.layer_kinds import Linear, Mixer, MixerKind
from servecast.sim.inputs.errors import InputError

if TYPE_CHECKING:
    from servecast.sim.hardware.model_families import Family

_TYPES: dict[str, MixerKind | None] = {  # of layer_types; None: no mixer, but an MLP or experts of its own
    "full_attention": "full",
    "attention": "full",
    "sliding_attention": "sliding",
    "chunked_attention": "chunked",
    "deepseek_sparse_attention": "sparse_mla",
    "shared_sparse_attention": "sparse_mla",  # chooses the tokens that an earlier layer's indexer chose
    "linear_attention": "gdn",
    "mamba": "mamba2",
    "mamba2": "mamba2",
    "mlp": None,
    "moe": None,
}
_PATTERN = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}  # of Nemotron-H


def number_of_layers(file: ConfigFile) -> int:
    """Layers, which Nemotron-H's files may list without a number."""
    listed = len(file.listed("layers_block_type")) or None
    layers = file.count("num_hidden_layers", "num_layers", "n_layers", default=listed)
    if layers > 4096:
        raise InputError(
            f"{layers} layers are no model's",
            where=f"{file.where}: num_hidden_layers",
            fix="Correct the file.",
        )
    return layers


def layer_names(file: ConfigFile, family: Family, layers: int) -> list[str]:
    """The type of every layer, in the words of ``layer_types``."""
    types = file.listed("layer_types") or file.listed("layers_block_type")
    pattern = file.config.get("hybrid_override_pattern")
    if not types and isinstance(pattern, str):
        types = [_PATTERN.get(each, each) for each in pattern]
    indexers = file.listed("indexer_types") if family.latent else []
    if indexers:
        own = {"shared": "shared_sparse_attention"}
        types = [own.get(str(each), "deepseek_sparse_attention") for each in indexers]
    if types:
        unknown = [kind for kind in types if kind not in _TYPES]
        if unknown or len(types) < layers:
            raise InputError(
                f"{len(types)} entries, the unknown among them {unknown[:3]}, for {layers} layers",
                where=f"{file.where}: layer_types",
                fix=f"Only {', '.join(_TYPES)}, one a layer, are modelled.",
            )
        return [str(each) for each in types[:layers]]
    flags = file.listed("hybrid_layer_pattern")  # MiMo V2: 1 slides
    if flags:
        return [
            "sliding_attention" if each else "full_attention" for each in [*flags, *[0] * layers][:layers]
        ]
    linear = file.config.get("linear_attn_config")
    if isinstance(linear, dict):  # Kimi: layers counted from 1
        full = linear.get("full_attn_layers") or []
        return ["full_attention" if at + 1 in full else "linear_attention" for at in range(layers)]
    if family.linear == "gdn":
        every = file.count("full_attention_interval", default=4)
        return ["full_attention" if (at + 1) % every == 0 else "linear_attention" for at in range(layers)]
    if family.linear in ("mamba2", "kda"):
        raise InputError(
            "nothing says which layers attend and which keep a state",
            where=f"{file.where}: layer_types",
            fix="Add the list, or hybrid_override_pattern, as published.",
        )
    window = (
        "chunked_attention"
        if "attention_chunk_size" in file.config and family.chunked
        else "sliding_attention"
    )
    return [window if each else "full_attention" for each in _sliding(file, family, layers)]


def _sliding(file: ConfigFile, family: Family, layers: int) -> list[bool]:
    """Which layers slide where no list says it."""
    config = file.config
    window = config.get("attention_chunk_size" if family.chunked else "sliding_window")
    if family.sliding == "all":
        positions = config.get("max_position_embeddings")
        slides = isinstance(window, int) and not (isinstance(positions, int) and window >= positions)
        return [slides] * layers
    if family.sliding == "qwen":
        first = file.amount("max_window_layers") if config.get("use_sliding_window") else layers
        return [at >= first for at in range(layers)]
    if isinstance(family.sliding, int) and window:
        pattern = config.get("sliding_window_pattern") or family.sliding
        if isinstance(pattern, str):
            return [pattern[at % len(pattern)] != "G" for at in range(layers)]
        every = file.count("sliding_window_pattern", default=family.sliding)
        return [(at + 1) % every != 0 for at in range(layers)]  # every n-th layer is full
    return [False] * layers


def mixers(file: ConfigFile, family: Family, names: list[str], hidden: int) -> list[Mixer | None]:
    """How each layer mixes tokens, each with a count of one; None: it does not."""
    known: dict[str, Mixer | None] = {}
    for name in names:
        if name not in known:
            kind = _TYPES[name]
            if kind == "gdn":
                kind = family.linear or "gdn"
            if kind == "full" and family.latent:
                kind = "mla"
            mixer = None if kind is None else _BUILD[kind](file, kind, hidden)
            if mixer and name == "shared_sparse_attention":
                mixer = replace(mixer, index_heads=0, index_dim=0)
            known[name] = mixer
    return [known[name] for name in names]


def _grouped(file: ConfigFile, kind: MixerKind, hidden: int) -> Mixer:
    """Grouped-query attention; sliding layers may have sizes of their own (MiMo V2)."""
    own = "swa_" if kind == "sliding" else ""

    def size(name: str, default: int) -> int:
        return file.count(f"{own}{name}", name, default=default)

    heads = size("num_attention_heads", 0)
    head_dim = size("head_dim", hidden // heads)
    window = "attention_chunk_size" if kind == "chunked" else "sliding_window"
    sinks = own and file.says("add_swa_attention_sink_bias")
    return Mixer(
        kind=kind,
        count=1,
        heads=heads,
        kv_heads=size("num_key_value_heads", heads),
        head_dim=head_dim,
        value_dim=size("v_head_dim", head_dim),
        window=0 if kind == "full" else file.count(window),
        gated=file.says("attn_output_gate"),
        other_weights=heads if sinks else 0,
    )


def _latent(file: ConfigFile, kind: MixerKind, hidden: int) -> Mixer:
    """DeepSeek's latent attention, with an indexer where the file has one."""
    rope = file.count("qk_rope_head_dim")
    index = file.amount("index_topk")
    rank = file.amount("q_lora_rank")
    return Mixer(
        kind="sparse_mla" if index else "mla",
        count=1,
        heads=file.count("num_attention_heads"),
        head_dim=file.count("qk_nope_head_dim") + rope,
        value_dim=file.count("v_head_dim"),
        query_rank=rank,
        kv_rank=file.count("kv_lora_rank"),
        rope_dim=rope,
        index_heads=file.count("index_n_heads") if index else 0,
        index_dim=file.count("index_head_dim") if index else 0,
        index_topk=index,
    )


def _state(file: ConfigFile, kind: MixerKind, hidden: int) -> Mixer:
    """Gated delta layers of Qwen."""
    return Mixer(
        kind=kind,
        count=1,
        heads=file.count("linear_num_value_heads"),
        kv_heads=file.count("linear_num_key_heads"),
        head_dim=file.count("linear_key_head_dim"),
        value_dim=file.count("linear_value_head_dim"),
        conv=file.count("linear_conv_kernel_dim"),
        state_bytes=4 if file.config.get("mamba_ssm_dtype") == "float32" else None,
    )


def _kimi(file: ConfigFile, kind: MixerKind, hidden: int) -> Mixer:
    """Kimi's delta layers: keys and values of one size, and a state of 32 bits."""
    linear = ConfigFile(file.config.get("linear_attn_config") or {}, f"{file.where}: linear_attn_config")
    heads, width = linear.count("num_heads"), linear.count("head_dim")
    conv = linear.count("short_conv_kernel_size")
    return Mixer(
        kind=kind,
        count=1,
        heads=heads,
        kv_heads=heads,
        head_dim=width,
        value_dim=width,
        conv=conv,
        state_bytes=4,
    )


def _mamba(file: ConfigFile, kind: MixerKind, hidden: int) -> Mixer:
    heads = file.count("mamba_num_heads", "mamba_n_heads")
    width = file.config.get("mamba_d_head")
    inner = file.count("mamba_expand", default=2) * hidden // heads
    dim = inner if width == "auto" else file.count("mamba_head_dim", "mamba_d_head", default=inner)
    groups = file.count("n_groups", "mamba_n_groups")
    state = file.count("ssm_state_size", "mamba_d_state")
    bias = file.says("use_conv_bias" if "use_conv_bias" in file.config else "mamba_conv_bias", default=True)
    projected = file.says("mamba_proj_bias") or file.says("use_bias")
    channels = heads * dim + 2 * groups * state
    other = (channels if bias else 0) + (channels + heads * dim + heads + hidden if projected else 0)
    return Mixer(
        kind=kind,
        count=1,
        heads=heads,
        kv_heads=groups,
        head_dim=state,
        value_dim=dim,
        conv=file.count("conv_kernel", "mamba_d_conv"),
        other_weights=other,
        state_bytes=4 if file.config.get("mamba_ssm_cache_dtype") == "float32" else None,
    )


_BUILD: dict[MixerKind, Callable[[ConfigFile, MixerKind, int], Mixer]] = {
    "full": _grouped,
    "sliding": _grouped,
    "chunked": _grouped,
    "mla": _latent,
    "sparse_mla": _latent,
    "gdn": _state,
    "kda": _kimi,
    "mamba2": _mamba,
}


def compressed(file: ConfigFile, layers: int, hidden: int) -> list[Mixer | None]:
    """DeepSeek V4: one latent a token for keys and values, of the last tokens as they are and of older ones
    merged by 4 (which an indexer chooses from) or by 128."""
    ratios = file.listed("compress_ratios")[:layers]
    if len(ratios) != layers or any(each not in (0, 4, 128) for each in ratios):
        raise InputError(
            f"compress_ratios = {short(ratios)} does not say 0, 4 or 128 for each of {layers} layers",
            where=f"{file.where}: compress_ratios",
            fix="Take the file from the model's repository.",
        )
    heads, dim, rank = file.count("num_attention_heads"), file.count("head_dim"), file.count("q_lora_rank")
    groups, low = file.count("o_groups"), file.count("o_lora_rank")
    index_heads, index_dim = file.count("index_n_heads"), file.count("index_head_dim")
    topk = file.count("index_topk")
    base: tuple[Linear, ...] = (
        Linear("self_attn.q_a_proj", hidden, rank),
        Linear("self_attn.kv_proj", hidden, dim, joined=True),
        Linear("self_attn.q_b_proj", rank, heads * dim, "out"),
        Linear("self_attn.o_a_proj", heads * dim // groups, groups * low, "out"),
        Linear("self_attn.o_b_proj", groups * low, hidden, "in"),
    )
    streams = file.count("hc_mult")
    mixed = (2 + streams) * streams
    small = (
        rank + dim + heads + 2 * (mixed * (streams * hidden + 1) + 3)
    )  # norms, sinks, two hyper-connections

    def of(ratio: int) -> Mixer:
        extra, other, chosen = base, small, ratio == 4
        if ratio:
            width = dim * (2 if chosen else 1)
            extra += (
                Linear("self_attn.compressor.kv_proj", hidden, width),
                Linear("self_attn.compressor.gate_proj", hidden, width, joined=True),
            )
            other += ratio * width + dim
        if chosen:
            extra += (
                Linear("self_attn.compressor.indexer.kv_proj", hidden, 2 * index_dim),
                Linear("self_attn.compressor.indexer.gate_proj", hidden, 2 * index_dim, joined=True),
                Linear("self_attn.compressor.indexer.q_b_proj", rank, index_heads * index_dim),
                Linear("self_attn.compressor.indexer.weights_proj", hidden, index_heads, joined=True),
            )
            other += ratio * 2 * index_dim + index_dim
        return Mixer(
            kind="compressed",
            count=1,
            heads=heads,
            head_dim=dim,
            value_dim=0,
            window=file.count("sliding_window"),
            query_rank=rank,
            kv_rank=dim,
            rope_dim=0,
            index_heads=index_heads if chosen else 0,
            index_dim=index_dim if chosen else 0,
            index_topk=topk if chosen else 0,
            extra=extra,
            other_weights=other,
        )

    known = {ratio: of(ratio) for ratio in dict.fromkeys(ratios)}
    return [known[ratio] for ratio in ratios]
