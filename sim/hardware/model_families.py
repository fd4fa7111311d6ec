"""The model families that can be read: what the class of a ``model_type`` adds to its config.json.

A table of facts, one family an entry; model_config.py reads a file by it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Experts:
    """The mixture of a family: names of the fields that say how many experts there are, how many a token
    uses, and how wide they and the shared ones are.

    Attributes:
        shared: field with the width of the shared expert, or with how many shared ones of ``width`` there are
            (``shared_count``). shared_gate: it has a gate of its own.
        router_bias: a bias, or a correction, for each expert of a layer. bias: of the experts' products.
        layers: which have experts: "steps" (every ``decoder_sparse_step``-th), "behind" (all but the first
            ``first_k_dense_replace``), "interleaved" (every ``interleave_moe_layer_step``-th), "interval"
            (ERNIE's), "all".
    """

    count: tuple[str, ...] = ("num_experts", "num_local_experts")
    active: tuple[str, ...] = ("num_experts_per_tok",)
    width: tuple[str, ...] = ("intermediate_size",)
    dense_width: str = "intermediate_size"
    shared: str = ""
    shared_count: tuple[str, ...] = ()
    shared_gate: bool = False
    router_bias: bool = False
    bias: bool = False
    layers: Literal["all", "steps", "behind", "interleaved", "interval", "named"] = "all"


@dataclass(frozen=True, slots=True)
class Family:
    """What a ``model_type`` implies. A text names the field of the file that says it.

    Attributes:
        qk_norm: of query and key: on each head with the same weights ("head") or with its own ("heads"), or
            on all heads together, about which ranks tell each other ("all"). norms: in a layer.
        tied: when tie_word_embeddings is absent. gated: gate and up projections, not one.
        sliding: which layers slide where there are no layer_types: "no", "all" (if there is a
            sliding_window), "qwen" (use_sliding_window), or all but every n-th.
        sinks: a learned sink for each head. latent: full attention is multi-head latent attention, sparse
            where
            the file has an indexer. chunked: the layers that would slide attend inside chunks. linear: what
            linear_attention is. compressed: DeepSeek V4's attention.
        rename: gives the file's fields their usual names.
    """

    qkv_bias: bool | str = "attention_bias"
    out_bias: bool | str = "attention_bias"
    mlp_bias: bool | str = False
    qk_norm: Literal["no", "head", "heads", "all"] = "no"
    qk_norm_field: str = ""
    norms: int | str = 2
    norm_bias: bool = False
    final_norm: bool = True
    tied: bool = False
    gated: bool = True
    head_bias: bool = False
    sliding: Literal["no", "all", "qwen"] | int = "no"
    sinks: bool = False
    experts: Experts | None = None
    latent: bool = False
    chunked: bool = False
    linear: Literal["", "gdn", "kda", "mamba2"] = ""
    compressed: bool = False
    rename: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict

    @property
    def attention(self) -> str:
        """How its layers mix tokens, in words."""
        windows = "chunked" if self.chunked else "sliding window"
        kinds = ["compressed" if self.compressed else "latent" if self.latent else "grouped-query"]
        kinds += [windows] if self.sliding != "no" else []
        kinds += (
            [{"gdn": "gated delta", "kda": "Kimi delta", "mamba2": "Mamba-2"}[self.linear]]
            if self.linear
            else []
        )
        return ", ".join(kinds)

    @property
    def left_out(self) -> str:
        """What is not modelled of it, in words."""
        return "KV cache, step times" if self.compressed else ""


def _falcon(config: Mapping[str, Any]) -> Mapping[str, Any]:
    two = config.get("new_decoder_architecture")
    heads = config.get("num_attention_heads")
    grouped = config.get("num_kv_heads") if two else 1 if config.get("multi_query", True) else heads
    hidden = config.get("hidden_size")
    return {
        "intermediate_size": config.get("ffn_hidden_size") or (4 * hidden if isinstance(hidden, int) else 0),
        "max_position_embeddings": 2048,
        **config,
        "num_key_value_heads": grouped,
        "norms": 2 if two or not config.get("parallel_attn", True) else 1,
    }


def _gpt_bigcode(config: Mapping[str, Any]) -> Mapping[str, Any]:
    names = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}
    names |= {"max_position_embeddings": "n_positions"}
    found = {name: config.get(theirs) for name, theirs in names.items()}
    hidden = found["hidden_size"]
    return {
        **found,
        "intermediate_size": config.get("n_inner") or (4 * hidden if isinstance(hidden, int) else 0),
        "num_key_value_heads": 1 if config.get("multi_query", True) else found["num_attention_heads"],
        "learned_positions": True,
        **config,
    }


def _gated(config: Mapping[str, Any]) -> Mapping[str, Any]:
    return {"attn_output_gate": True, "linear_conv_kernel_dim": 4, **config}


def _granite_hybrid(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Without experts the shared MLP is the dense one."""
    wide = (
        {}
        if config.get("num_local_experts")
        else {"intermediate_size": config.get("shared_intermediate_size")}
    )
    return {**config, **wide}


def _nemotron_h(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """vLLM keeps states in 32 bits where the file does not say otherwise."""
    named = {"mamba_ssm_cache_dtype": "float32", "head_dim": config.get("attention_head_dim")}
    return {**named, **{name: value for name, value in config.items() if value is not None}}


def _mimo_v2(config: Mapping[str, Any]) -> Mapping[str, Any]:
    heads = config.get("num_key_value_heads")
    twice = {"swa_num_key_value_heads": 2 * heads} if isinstance(heads, int) else {}
    return {**twice, "add_swa_attention_sink_bias": True, **config}


def _deepseek_v4(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """A router's correction is left out of the first layers, which choose by token: their tables are no
    parameters. Hyper-connections end in a head of their own."""
    return {"intermediate_size": config.get("moe_intermediate_size"), **config}


_PLAIN = Family(qkv_bias=False, out_bias=False)
_QWEN2 = Family(qkv_bias=True, out_bias=False, sliding="qwen")
_QWEN3 = Family(qk_norm="head", sliding="qwen")
_QWEN3_EXPERTS = Experts(width=("moe_intermediate_size",), layers="steps")
_QWEN3_SHARED = replace(_QWEN3_EXPERTS, shared="shared_expert_intermediate_size", shared_gate=True)
_GEMMA = Family(tied=True)
_OLMO2 = Family(qk_norm="all")
_BEHIND = Experts(
    count=("n_routed_experts",),
    width=("moe_intermediate_size",),
    shared_count=("n_shared_experts", "num_shared_experts"),
    router_bias=True,
    layers="behind",
)
_LATENT = Family(qkv_bias=False, out_bias=False, latent=True, experts=_BEHIND)

FAMILIES: Mapping[str, Family] = {
    "llama": Family(mlp_bias="mlp_bias"),
    "llama4_text": Family(
        experts=Experts(
            dense_width="intermediate_size_mlp", shared="intermediate_size", layers="interleaved"
        ),
        sliding=4,
        chunked=True,
    ),
    "mistral": Family(qkv_bias=False, out_bias=False, sliding="all"),
    "ministral": Family(qkv_bias=False, out_bias=False, sliding="all"),
    "ministral3": _PLAIN,
    "mixtral": Family(qkv_bias=False, out_bias=False, sliding="all", experts=Experts()),
    "qwen2": _QWEN2,
    "qwen2_moe": Family(
        qkv_bias=True,
        out_bias=False,
        sliding="qwen",
        experts=Experts(
            width=("moe_intermediate_size",),
            shared="shared_expert_intermediate_size",
            shared_gate=True,
            layers="steps",
        ),
    ),
    "mimo": _QWEN2,
    "mimo_v2_flash": Family(
        out_bias=False,
        sliding=6,
        experts=replace(_BEHIND, shared_count=()),
        rename=_mimo_v2,
    ),
    "qwen3": _QWEN3,
    "qwen3_moe": Family(qk_norm="head", sliding="qwen", experts=_QWEN3_EXPERTS),
    "qwen3_next": Family(qk_norm="head", linear="gdn", experts=_QWEN3_SHARED, rename=_gated),
    "qwen3_5_text": Family(qk_norm="head", linear="gdn", rename=_gated),
    "qwen3_5_moe_text": Family(
        qk_norm="head", linear="gdn", experts=replace(_QWEN3_SHARED, layers="all"), rename=_gated
    ),
    "gemma": _GEMMA,
    "gemma2": Family(norms=4, tied=True, sliding=2),
    "gemma3_text": Family(qk_norm="head", norms=4, tied=True, sliding=6),
    "phi3": Family(qkv_bias=False, out_bias=False, sliding="all"),
    "phimoe": Family(norm_bias=True, head_bias=True, sliding="all", experts=Experts()),
    "granite": Family(mlp_bias="mlp_bias"),
    "granitemoe": Family(experts=Experts()),
    "granitemoeshared": Family(experts=Experts(shared="shared_intermediate_size")),
    "granitemoehybrid": Family(
        linear="mamba2", experts=Experts(shared="shared_intermediate_size"), rename=_granite_hybrid
    ),
    "nemotron_h": Family(
        linear="mamba2",
        rename=_nemotron_h,
        norms=1,
        gated=False,
        experts=Experts(
            count=("n_routed_experts",),
            width=("moe_intermediate_size",),
            shared="moe_shared_expert_intermediate_size",
            router_bias=True,
            layers="named",
        ),
    ),
    "olmo": Family(norms=0, final_norm=False),
    "olmo2": _OLMO2,
    "olmo3": Family(qk_norm="all", sliding=4),
    "olmoe": Family(qk_norm="all", experts=Experts()),
    "starcoder2": Family(
        qkv_bias="use_bias",
        out_bias="use_bias",
        mlp_bias="use_bias",
        norm_bias=True,
        tied=True,
        gated=False,
        sliding="all",
    ),
    "cohere": Family(qk_norm="heads", qk_norm_field="use_qk_norm", norms=1, tied=True),
    "cohere2": Family(norms=1, tied=True, sliding=4),
    "glm": Family(out_bias=False),
    "glm4": Family(out_bias=False, norms=4),
    "glm4_moe": Family(
        out_bias=False,
        qk_norm="head",
        qk_norm_field="use_qk_norm",
        experts=_BEHIND,
    ),
    "dots1": Family(qk_norm="head", experts=_BEHIND),
    "solar_open": Family(experts=_BEHIND),
    "deepseek": Family(experts=replace(_BEHIND, router_bias=False)),
    "deepseek_v2": replace(_LATENT, experts=replace(_BEHIND, router_bias=False)),
    "deepseek_v3": _LATENT,
    "deepseek_v32": _LATENT,
    "deepseek_v4": Family(
        qkv_bias=False,
        out_bias=False,
        compressed=True,
        experts=replace(_BEHIND, layers="all"),
        rename=_deepseek_v4,
    ),
    "kimi_k2": _LATENT,
    "kimi_linear": replace(
        _LATENT,
        linear="kda",
        experts=replace(
            _BEHIND, count=("num_experts",), active=("num_experts_per_token", "num_experts_per_tok")
        ),
    ),
    "glm4_moe_lite": _LATENT,
    "glm_moe_dsa": _LATENT,
    "ernie4_5": Family(qkv_bias="use_bias", out_bias="use_bias", mlp_bias="use_bias", tied=True),
    "ernie4_5_moe": Family(
        qkv_bias="use_bias",
        out_bias="use_bias",
        tied=True,
        experts=Experts(
            count=("moe_num_experts",),
            active=("moe_k",),
            width=("moe_intermediate_size",),
            shared_count=("moe_num_shared_experts",),
            router_bias=True,
            layers="interval",
        ),
    ),
    "exaone_moe": Family(
        qkv_bias=False,
        out_bias=False,
        qk_norm="head",
        sliding=4,
        experts=replace(_BEHIND, count=("num_experts",)),
    ),
    "minimax_m2": Family(qkv_bias=False, out_bias=False, qk_norm="all", experts=Experts(router_bias=True)),
    "seed_oss": Family(out_bias="attention_out_bias", mlp_bias="mlp_bias"),
    "smollm3": Family(mlp_bias="mlp_bias", tied=True),
    "hunyuan_v1_dense": Family(qk_norm="head"),
    "exaone4": Family(qkv_bias=False, out_bias=False, qk_norm="head", sliding=4),
    "nemotron": Family(mlp_bias="mlp_bias", norm_bias=True, gated=False),
    "gpt_oss": Family(
        qkv_bias=True, out_bias=True, sliding=2, sinks=True, experts=Experts(router_bias=True, bias=True)
    ),
    "gpt_bigcode": Family(
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        norm_bias=True,
        tied=True,
        gated=False,
        rename=_gpt_bigcode,
    ),
    "falcon": Family(
        qkv_bias="bias",
        out_bias="bias",
        mlp_bias="bias",
        norms="norms",
        norm_bias=True,
        tied=True,
        gated=False,
        rename=_falcon,
    ),
    "stablelm": Family(qkv_bias="use_qkv_bias", out_bias=False, norm_bias=True),
    "exaone": _PLAIN,
    "internlm2": Family(qkv_bias="bias", out_bias="bias"),
    "internlm3": Family(qkv_bias="qkv_bias", out_bias="bias", mlp_bias="bias"),
    "minicpm": Family(qkv_bias=False, out_bias=False, tied=True),
    "baichuan": _PLAIN,
    "cwm": Family(qkv_bias=False, out_bias=False, sliding=4),
    "arcee": Family(mlp_bias="mlp_bias", gated=False),
}
ALIASES = {  # text parts of multimodal models, and other names of the same layers
    "llama4": "llama4_text",
    "gemma3": "gemma3_text",
    "kimi_k25": "deepseek_v3",
    "mimo_v2": "mimo_v2_flash",
    "qwen3_5": "qwen3_5_text",
    "qwen3_5_moe": "qwen3_5_moe_text",
    "glm4v_text": "glm4",
    "glm4v_moe_text": "glm4_moe",
    "phi4mm": "phi3",
    "qwen2_vl": "qwen2",
    "qwen2_vl_text": "qwen2",
    "qwen2_5_vl": "qwen2",
    "qwen2_5_vl_text": "qwen2",
    "qwen3_vl_text": "qwen3",
    "qwen3_vl_moe_text": "qwen3_moe",
}

_ENCODER = "an encoder, which generates no text"
_BOTH = "an encoder and a decoder"
_SEEING = "a vision tower without a text model"
_STATES = "state-space layers alone"
NOT_MODELLED = {
    **dict.fromkeys(
        ("bert", "roberta", "xlm-roberta", "modernbert", "deberta", "deberta-v2", "distilbert"), _ENCODER
    ),
    **dict.fromkeys(
        ("t5", "mt5", "umt5", "bart", "mbart", "pegasus", "marian", "whisper", "t5gemma", "m2m_100"), _BOTH
    ),
    **dict.fromkeys(
        ("clip", "siglip", "siglip2", "vit", "dinov2", "dinov3_vit", "swin", "clip_vision_model"), _SEEING
    ),
    **dict.fromkeys(("mamba", "mamba2", "falcon_mamba", "rwkv", "rwkv7"), _STATES),
    **dict.fromkeys(
        ("jamba", "bamba", "zamba", "zamba2"), "Mamba layers in front of attention of another form"
    ),
    **dict.fromkeys(("falcon_h1", "hymba"), "attention and Mamba side by side in a layer"),
    **dict.fromkeys(("lfm2", "lfm2_moe"), "short convolutions in place of attention"),
    **dict.fromkeys(("gemma3n", "gemma3n_text"), "embeddings of every layer, and layers that share a cache"),
    **dict.fromkeys(("gemma4", "gemma4_text"), "full attention of other sizes than sliding attention"),
    **dict.fromkeys(
        ("minimax", "minimax_text_01", "minimax_m3", "minimax_m3_vl"), "lightning or block-sparse attention"
    ),
    **dict.fromkeys(("nemotron-nas", "deci"), "layers of different sizes"),
    "mllama": "cross-attention to images",
    "recurrent_gemma": "recurrent layers",
    "kimi_k3": "experts behind projections, and attention with residuals of its own",
}
