"""A transformer's sizes, from its ``config.json``: weights, FLOPs, and KV bytes.

Only what moves time and memory is kept. FLOPs count a multiply-add as two. "A rank" is one GPU of a
tensor-parallel group, split as vLLM splits it: heads, the MLP's intermediate size (every expert's too) and
the vocabulary are divided, KV heads are divided until one is left and then repeated, norms and the router
are repeated.
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
        return _parse(loaded, name or str(loaded.get("_name_or_path") or usual), str(path))

    # -- weights ---------------------------------------------------------------------------------

    def check_tensor_parallel(self, tensor_parallel_size: int) -> None:
        """Raise InputError unless vLLM could split this model over that many ranks."""
        tp = tensor_parallel_size
        if tp < 1 or self.heads % tp or (self.kv_heads % tp and tp % self.kv_heads):
            raise InputError(
                f"{self.name} with {self.heads} heads and {self.kv_heads} KV heads cannot be split {tp} ways",
                where="tensor_parallel_size",
                fix="Use a size that divides the heads.",
            )

    def _kv_heads_per_rank(self, tp: int) -> int:
        return max(1, self.kv_heads // tp)

    def _attention_weights(self, tp: int = 1) -> int:
        """Elements of the query, key, value and output projections of one layer on one rank."""
        query = self.heads // tp * self.head_dim
        return self.hidden_size * (2 * query + 2 * self._kv_heads_per_rank(tp) * self.head_dim)

    def _mlp_weights(self, tp: int = 1) -> int:
        return 3 * self.hidden_size * self.intermediate_size // tp

    def _expert_weights(self, tp: int = 1) -> int:
        return 3 * self.hidden_size * self.expert_intermediate_size // tp

    def _router_weights(self) -> int:
        return self.hidden_size * self.experts

    def _shared_linear_weights(self, tp: int = 1) -> int:
        """Elements of the linear layers that every token passes, on one rank: all but experts and router."""
        return self.layers * self._attention_weights(tp) + (
            self.layers - self.moe_layers
        ) * self._mlp_weights(tp)

    def _small_weights(self) -> int:
        """Norms, biases and routers of all layers, which stay in ``dtype_bytes`` and on every rank."""
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        per_layer = self.norms_per_layer * self.hidden_size
        per_layer += 2 * self.head_dim if self.qk_norm else 0
        per_layer += query + 2 * key if self.qkv_bias else 0
        per_layer += self.hidden_size if self.out_bias else 0
        per_layer += 2 * self.intermediate_size + self.hidden_size if self.mlp_bias else 0
        return self.layers * per_layer + self.moe_layers * self._router_weights() + self.hidden_size

    @property
    def parameters(self) -> int:
        """All parameters, tied embeddings once."""
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2)
        experts = self.moe_layers * self.experts * self._expert_weights()
        return embeddings + self._shared_linear_weights() + experts + self._small_weights()

    @property
    def active_parameters(self) -> int:
        """Parameters that one token uses: of the experts only those it is routed to."""
        idle = self.moe_layers * (self.experts - self.experts_per_token) * self._expert_weights()
        return self.parameters - idle

    def weight_bytes(self, tensor_parallel_size: int = 1) -> int:
        """Bytes of weights that one rank holds."""
        tp = tensor_parallel_size
        linear = self._shared_linear_weights(tp) + self.moe_layers * self.experts * self._expert_weights(tp)
        embeddings = self.vocab_size * self.hidden_size // tp * (1 if self.tied_embeddings else 2)
        return linear * self.weight_bytes_each + (embeddings + self._small_weights()) * self.dtype_bytes

    # -- linear layers and LM head -----------------------------------------------------------------

    def linear_flops_per_token(self, tensor_parallel_size: int = 1) -> float:
        """FLOPs of all linear layers for one token on one rank, the LM head left out."""
        tp = tensor_parallel_size
        routed = self.moe_layers * (
            self.experts_per_token * self._expert_weights(tp) + self._router_weights()
        )
        return 2.0 * (self._shared_linear_weights(tp) + routed)

    def linear_bytes(self, tokens: int, tensor_parallel_size: int = 1) -> float:
        """Weight bytes that a step of ``tokens`` tokens reads on one rank, the LM head left out.

        Of E experts, T tokens that each pick k of them, evenly and independently, touch
        E (1 - (1 - k/E)^T): an expectation; a skewed router touches fewer.
        """
        tp = tensor_parallel_size
        read = self._shared_linear_weights(tp) * self.weight_bytes_each
        if not self.moe_layers:
            return float(read)
        touched = self.experts * (1.0 - (1.0 - self.experts_per_token / self.experts) ** tokens)
        experts = touched * self._expert_weights(tp) * self.weight_bytes_each
        return read + self.moe_layers * (experts + self._router_weights() * self.dtype_bytes)

    def lm_head_flops(self, rows: int = 1, tensor_parallel_size: int = 1) -> float:
        """FLOPs of the logits of ``rows`` sampled tokens on one rank."""
        return 2.0 * rows * self.hidden_size * self.vocab_size / tensor_parallel_size

    def lm_head_bytes(self, tensor_parallel_size: int = 1) -> float:
        """Weight bytes of the LM head on one rank, read once a step that samples."""
        return self.hidden_size * self.vocab_size * self.dtype_bytes / tensor_parallel_size

    def elementwise_bytes_per_token(self, tensor_parallel_size: int = 1) -> float:
        """Bytes a token that the kernels between the matrix products move on one rank: each norm reads
        activation and residual and writes both; rotary reads and writes q and k; the activation reads the
        gate and up halves and writes their product; the KV write reads and writes k and v."""
        tp = tensor_parallel_size
        query, key = self.heads // tp * self.head_dim, self._kv_heads_per_rank(tp) * self.head_dim
        per_layer = 4 * self.norms_per_layer * self.hidden_size + 2 * (query + key) + 4 * key
        per_layer += 2 * (query + key) if self.qk_norm else 0
        dense = (self.layers - self.moe_layers) * self.intermediate_size
        routed = self.moe_layers * self.experts_per_token * self.expert_intermediate_size
        return (self.layers * per_layer + 3 * (dense + routed) / tp) * self.dtype_bytes

    @property
    def kernels(self) -> int:
        """GPU kernels of one forward pass: about ten a layer, more with q/k norms, extra norms or experts."""
        extra = (2 if self.qk_norm else 0) + self.norms_per_layer - 2
        return self.layers * (_KERNELS_DENSE + extra) + self.moe_layers * _KERNELS_MOE

    # -- attention and KV cache --------------------------------------------------------------------

    def attention_pairs(self, tokens: int, context: int) -> float:
        """Pairs of query and key token over all layers, for ``tokens`` new tokens behind ``context`` older
        ones: token i attends to context + i keys, at most to the window in sliding layers."""
        pairs = (self.layers - self.sliding_layers) * tokens * (context + 0.5 * (tokens + 1))
        if self.sliding_layers:
            free = max(0, min(tokens, self.sliding_window - context))
            seen = free * (context + 0.5 * (free + 1)) + (tokens - free) * self.sliding_window
            pairs += self.sliding_layers * seen
        return pairs

    def attention_flops_per_pair(self, tensor_parallel_size: int = 1) -> float:
        """FLOPs of a pair on one rank: two products of head_dim multiply-adds in every head."""
        return 4.0 * self.heads / tensor_parallel_size * self.head_dim

    def attention_flops(self, tokens: int, context: int, tensor_parallel_size: int = 1) -> float:
        """FLOPs of causal attention of a prompt chunk on one rank, all layers."""
        return self.attention_flops_per_pair(tensor_parallel_size) * self.attention_pairs(tokens, context)

    def kv_bytes_per_token_and_layer(self, tensor_parallel_size: int = 1, kv_dtype_bytes: int = 2) -> int:
        """Bytes of one token's keys and values in one layer on one rank."""
        return 2 * self._kv_heads_per_rank(tensor_parallel_size) * self.head_dim * kv_dtype_bytes

    def kv_bytes_per_token(self, tensor_parallel_size: int = 1, kv_dtype_bytes: int = 2) -> int:
        """Bytes of one token's keys and values in all layers on one rank."""
        return self.layers * self.kv_bytes_per_token_and_layer(tensor_parallel_size, kv_dtype_bytes)

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
