"""A transformer's sizes, from its ``config.json``, and how many weights and KV tokens they make.

Only what moves time and memory is kept. Bytes and FLOPs depend on how the model is deployed: see ``Shard``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from servecast.sim.inputs.errors import InputError


@dataclass(frozen=True, slots=True)
class _Family:
    """What a ``model_type`` implies and its config.json does not say."""

    qkv_bias: bool | None  # None: the field attention_bias says
    qk_norm: bool
    norms: int  # per layer, of width hidden_size
    tied: bool  # when tie_word_embeddings is absent


_FAMILIES: Mapping[str, _Family] = {
    "llama": _Family(qkv_bias=None, qk_norm=False, norms=2, tied=False),
    "mistral": _Family(qkv_bias=False, qk_norm=False, norms=2, tied=False),
    "qwen2": _Family(qkv_bias=True, qk_norm=False, norms=2, tied=False),
    "qwen3": _Family(qkv_bias=None, qk_norm=True, norms=2, tied=False),
    "qwen3_moe": _Family(qkv_bias=None, qk_norm=True, norms=2, tied=False),
    "gemma3_text": _Family(qkv_bias=None, qk_norm=True, norms=4, tied=True),
}
_DTYPES = ("bfloat16", "float16", "float32")
_NOT_MODELLED = (
    "kv_lora_rank",
    "text_config",
    "num_local_experts",
    "n_routed_experts",
    "shared_expert_intermediate_size",
)
_KERNELS_DENSE = 10  # 2 norms, 4 matrix products, rotary, KV write, attention, activation
_KERNELS_MOE = 5  # router, top-k, alignment and the second grouped product's sum, beyond a dense layer's


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes of a decoder-only transformer. ``weight_bytes_each`` is a linear weight's (1 when it is fp8);
    embeddings, LM head, norms and activations have ``dtype_bytes``. ``experts`` is 0 for a dense model,
    ``moe_layers`` counts the layers that have experts. ``sliding_layers`` attend only to the last
    ``sliding_window`` tokens.
    """

    name: str
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    tied_embeddings: bool
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    norms_per_layer: int = 2
    dtype_bytes: int = 2
    weight_bytes_each: int = 2
    experts: int = 0
    experts_per_token: int = 0
    expert_intermediate_size: int = 0
    moe_layers: int = 0
    sliding_window: int = 0
    sliding_layers: int = 0
    max_position_embeddings: int | None = None

    @classmethod
    def from_config(cls, config: Mapping[str, Any] | str | Path, name: str | None = None) -> ModelShape:
        """Read a Hugging Face config.json, given as a mapping or as the path of the file.

        Raises:
            InputError: file unreadable, field missing or not a positive integer, architecture or
                quantisation that this model of time does not cover.
        """
        if isinstance(config, Mapping):
            return _parse(config, name or str(config.get("_name_or_path") or "model"), "config.json")
        path = Path(config)
        try:
            loaded = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(
                f"cannot read it as JSON ({error})",
                where=str(path),
                fix="Give the path of a model's config.json.",
            ) from error
        if not isinstance(loaded, dict):
            raise InputError("is not a JSON object", where=str(path), fix="Give a model's config.json.")
        usual = path.resolve().parent.name if path.name == "config.json" else path.stem
        try:
            return _parse(loaded, name or str(loaded.get("_name_or_path") or usual), str(path))
        except (TypeError, AttributeError, ArithmeticError) as error:
            raise InputError(
                f"a field is not of its kind ({error})", where=str(path), fix="Give a model's config.json."
            ) from None

    # -- weights ---------------------------------------------------------------------------------

    def kv_heads_of(self, ranks: int) -> int:
        """KV heads of one rank: divided until one is left, then repeated."""
        return max(1, self.kv_heads // ranks)

    def shared_weights(self, ranks: int) -> int:
        """Weights of the linear layers that every token passes, on one rank: all but experts and router."""
        query, key = self.heads // ranks * self.head_dim, self.kv_heads_of(ranks) * self.head_dim
        attention = self.hidden_size * (2 * query + 2 * key)
        mlp = 3 * self.hidden_size * self.intermediate_size // ranks
        return self.layers * attention + (self.layers - self.moe_layers) * mlp

    def expert_weights(self, ranks: int) -> int:
        """Weights of one expert of one layer, on one rank."""
        return 3 * self.hidden_size * self.expert_intermediate_size // ranks

    @property
    def router_weights(self) -> int:
        """Weights of the router of one layer, which every rank has."""
        return self.hidden_size * self.experts

    @property
    def small_weights(self) -> int:
        """Norms, biases and routers of all layers, which stay in ``dtype_bytes`` and on every rank."""
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        per_layer = self.norms_per_layer * self.hidden_size
        per_layer += 2 * self.head_dim if self.qk_norm else 0
        per_layer += query + 2 * key if self.qkv_bias else 0
        per_layer += self.hidden_size if self.out_bias else 0
        per_layer += 2 * self.intermediate_size + self.hidden_size if self.mlp_bias else 0
        return self.layers * per_layer + self.moe_layers * self.router_weights + self.hidden_size

    @property
    def parameters(self) -> int:
        """All parameters, tied embeddings once."""
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2)
        experts = self.moe_layers * self.experts * self.expert_weights(1)
        return embeddings + self.shared_weights(1) + experts + self.small_weights

    @property
    def active_parameters(self) -> int:
        """Parameters that one token uses: of the experts only those it is routed to."""
        idle = self.moe_layers * (self.experts - self.experts_per_token) * self.expert_weights(1)
        return self.parameters - idle

    @property
    def products(self) -> int:
        """Matrix products of one forward pass beside routed experts and LM head: query, key and value in one,
        output, gate and up in one, down; the router of a layer with experts."""
        return self.layers * 4 - self.moe_layers

    @property
    def small_kernels(self) -> int:
        """Kernels of one forward pass that are neither products, attention nor experts: norms, rotary,
        activation, q and k norms."""
        extra = 2 if self.qk_norm else 0
        return self.layers * (self.norms_per_layer + 2 + extra) - self.moe_layers

    @property
    def kernels(self) -> int:
        """GPU kernels of one forward pass: about ten a layer, more with q/k norms, extra norms or experts."""
        extra = (2 if self.qk_norm else 0) + self.norms_per_layer - 2
        return self.layers * (_KERNELS_DENSE + extra) + self.moe_layers * _KERNELS_MOE

    # -- attention ---------------------------------------------------------------------------------

    def attention_pairs(self, tokens: int, context: int) -> float:
        """Pairs of query and key token over all layers, for ``tokens`` new tokens behind ``context`` older
        ones: token i attends to context + i keys, at most to the window in sliding layers."""
        pairs = (self.layers - self.sliding_layers) * tokens * (context + 0.5 * (tokens + 1))
        if self.sliding_layers:
            free = max(0, min(tokens, self.sliding_window - context))
            seen = free * (context + 0.5 * (free + 1)) + (tokens - free) * self.sliding_window
            pairs += self.sliding_layers * seen
        return pairs

    def kv_token_layers(self, context: int, sequences: int = 1) -> int:
        """Token-layers of KV that one new token each of ``sequences`` reads, with ``context`` tokens in
        total: all of them in full layers, at most a window a sequence in sliding ones (an upper bound
        where lengths differ)."""
        if not self.sliding_layers:
            return self.layers * context
        seen = min(context, sequences * self.sliding_window)
        return (self.layers - self.sliding_layers) * context + self.sliding_layers * seen


def _parse(config: Mapping[str, Any], name: str, where: str) -> ModelShape:
    model_type = config.get("model_type")
    family = _FAMILIES.get(str(model_type))
    for field in _NOT_MODELLED:
        if config.get(field):
            raise InputError(
                f"{field} = {_short(config[field])} belongs to an architecture that is not modelled",
                where=f"{where}: {field}",
                fix=f"Use a text model of one of the types {', '.join(_FAMILIES)}.",
            )
    if family is None:
        raise InputError(
            f"model_type {model_type!r} is not modelled" if model_type else "model_type is missing",
            where=f"{where}: model_type",
            fix=f"Use one of {', '.join(_FAMILIES)}.",
        )

    def count(field: str, default: int | None = None) -> int:
        value = config.get(field, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            problem = "is missing" if value is None else f"is {_short(value)}, not a positive integer"
            raise InputError(
                f"{field} {problem}",
                where=f"{where}: {field}",
                fix="Take the file from the model's repository.",
            )
        return value

    layers, heads = count("num_hidden_layers"), count("num_attention_heads")
    attention_bias = bool(config.get("attention_bias", False))
    dtype_bytes = _dtype_bytes(config, where)
    moe_layers = _moe_layers(config, layers) if model_type == "qwen3_moe" else 0
    sliding_layers = _sliding_layers(config, str(model_type), layers, where)
    return ModelShape(
        name=name,
        hidden_size=count("hidden_size"),
        intermediate_size=count("intermediate_size"),
        layers=layers,
        heads=heads,
        kv_heads=count("num_key_value_heads", heads),
        head_dim=count("head_dim", count("hidden_size") // heads),
        vocab_size=count("vocab_size"),
        tied_embeddings=bool(config.get("tie_word_embeddings", family.tied)),
        qkv_bias=attention_bias if family.qkv_bias is None else family.qkv_bias,
        out_bias=attention_bias if family.qkv_bias is None else False,
        mlp_bias=bool(config.get("mlp_bias", False)),
        qk_norm=family.qk_norm,
        norms_per_layer=family.norms,
        dtype_bytes=dtype_bytes,
        weight_bytes_each=_linear_weight_bytes(config, dtype_bytes, where),
        experts=count("num_experts") if moe_layers else 0,
        experts_per_token=count("num_experts_per_tok") if moe_layers else 0,
        expert_intermediate_size=count("moe_intermediate_size") if moe_layers else 0,
        moe_layers=moe_layers,
        sliding_window=count("sliding_window") if sliding_layers else 0,
        sliding_layers=sliding_layers,
        max_position_embeddings=count("max_position_embeddings")
        if "max_position_embeddings" in config
        else None,
    )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _dtype_bytes(config: Mapping[str, Any], where: str) -> int:
    dtype = config.get("torch_dtype", config.get("dtype", "bfloat16"))
    if dtype not in _DTYPES:
        raise InputError(
            f"torch_dtype {dtype!r} is not known",
            where=f"{where}: torch_dtype",
            fix=f"Use {', '.join(_DTYPES)}.",
        )
    return 2  # vLLM's --dtype auto casts float32 weights down to half precision


def _linear_weight_bytes(config: Mapping[str, Any], dtype_bytes: int, where: str) -> int:
    quantization = config.get("quantization_config")
    if not quantization:
        return dtype_bytes
    method = quantization.get("quant_method")
    groups = (quantization.get("config_groups") or {}).values()
    weights = [group.get("weights") or {} for group in groups]
    is_fp8 = method == "fp8" or (
        method == "compressed-tensors"
        and bool(weights)
        and all(entry.get("num_bits") == 8 and entry.get("type") == "float" for entry in weights)
    )
    if not is_fp8:
        raise InputError(
            f"quantisation {_short(method)} is not modelled",
            where=f"{where}: quantization_config.quant_method",
            fix="Use fp8 weights (quant_method fp8, or compressed-tensors with 8-bit floats) or none.",
        )
    return 1


def _moe_layers(config: Mapping[str, Any], layers: int) -> int:
    """Qwen3-MoE: layer i has experts unless listed as dense, and every ``decoder_sparse_step``-th only."""
    dense = config.get("mlp_only_layers") or []
    step = int(config.get("decoder_sparse_step") or 1)
    return sum(layer not in dense and (layer + 1) % step == 0 for layer in range(layers))


def _sliding_layers(config: Mapping[str, Any], model_type: str, layers: int, where: str) -> int:
    types = config.get("layer_types")
    if types is not None:
        unknown = [kind for kind in types if kind not in ("full_attention", "sliding_attention")]
        if unknown or len(types) != layers:
            raise InputError(
                f"{len(types)} entries, the unknown among them {unknown[:3]}, for {layers} layers",
                where=f"{where}: layer_types",
                fix="Only full_attention and sliding_attention, one a layer, are modelled.",
            )
        return sum(kind == "sliding_attention" for kind in types)
    if model_type == "gemma3_text":
        pattern = int(config.get("sliding_window_pattern") or 6)
        return layers - layers // pattern  # every pattern-th layer is full
    if model_type == "mistral":
        return layers if config.get("sliding_window") else 0
    if config.get("use_sliding_window"):
        return max(0, layers - int(config.get("max_window_layers") or 0))
    return 0
