"""A transformer's sizes, from its ``config.json``, and how many weights and KV tokens they make.

Only what moves time and memory is kept. Bytes and FLOPs depend on how the model is deployed: see ``Shard``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from servecast.sim.hardware.model_config import shape_fields
from servecast.sim.inputs.errors import InputError

_NO_TIME = (  # fields that take no time in a step
    "name",
    "max_position_embeddings",
    "yarn_positions",
    "default_positions",
    "model_type",
    "weight_block",
    "kv_bytes_each",
    "notes",
)
_BESIDE = "hf_quant_config.json"
KERNELS_DENSE = 10  # 2 norms, 4 matrix products, rotary, KV write, attention, activation
_KERNELS_MOE = 5  # router, top-k, alignment and the second grouped product's sum, beyond a dense layer's


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes of a decoder-only transformer. ``weight_bytes_each`` is a linear weight's (1 when it is fp8);
    embeddings, LM head, norms and activations have ``dtype_bytes``. ``experts`` is 0 for a dense model,
    ``moe_layers`` counts the layers that have experts. ``sliding_layers`` attend only to the last
    ``sliding_window`` tokens.

    Attributes:
        max_position_embeddings: longest context; ``longest_context`` says what vLLM makes of it, of
            ``yarn_positions`` and of ``default_positions``.
        qk_norm_over_ranks: q and k are normed over all heads together, so that ranks tell each other sums.
        mlp_products: 3 with a gate, 2 without. shared_expert_size: width of what all tokens pass in a layer
            with experts.
        other_weights: small ones of all layers, beyond those that the fields above imply.
        kept_weights: linear weights that stay in ``dtype_bytes`` although the others are quantised.
        weight_block: columns of a block of quantised weights that share a scale; 0 for none.
        kv_bytes_each: of a number in the KV cache, as the checkpoint asks for.
        notes: what a reader should know of how the config was read.
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
    qk_norm_over_ranks: bool = False
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
    yarn_positions: int | None = None
    default_positions: int | None = None
    model_type: str = ""
    mlp_products: int = 3
    shared_expert_size: int = 0
    other_weights: int = 0
    kept_weights: int = 0
    weight_block: int = 0
    kv_bytes_each: int = 2
    notes: tuple[str, ...] = ()

    @classmethod
    def from_config(
        cls,
        config: Mapping[str, Any] | str | Path,
        name: str | None = None,
        *,
        overrides: Mapping[str, Any] | None = None,
    ) -> ModelShape:
        """Read a Hugging Face config.json, given as a mapping or as the path of the file, and beside a file
        what ModelOpt says of its quantisation.

        Args:
            overrides: fields in place of the file's, as ``--hf-overrides``.

        Raises:
            InputError: file unreadable, field missing or not a positive integer, architecture or
                quantisation that this model of time does not cover.
        """
        path, loaded = (None, config) if isinstance(config, Mapping) else (Path(config), {})
        if path is not None:
            loaded = _load(path)
            beside = path.with_name(_BESIDE)
            if not loaded.get("quantization_config") and path.name == "config.json" and beside.is_file():
                loaded = {**loaded, "quantization_config": _load(beside)}
        for field, value in (overrides or {}).items():
            inside = loaded.get(field) if field.endswith("_config") else None
            merged = {**inside, **value} if isinstance(inside, dict) and isinstance(value, Mapping) else value
            loaded = {**loaded, field: merged}
        usual = "model"
        if path is not None:
            usual = path.resolve().parent.name if path.name == "config.json" else path.stem
        named = name or str(loaded.get("_name_or_path") or usual)
        where = "config.json" if path is None else str(path)
        try:
            return cls(named, **shape_fields(loaded, where))
        except (TypeError, AttributeError, ArithmeticError) as error:
            fix = "Take the file from the model's repository."
            raise InputError(f"a field is not of its kind ({error})", where=where, fix=fix) from None

    def alike(self, other: ModelShape, *but: str) -> list[str]:
        """The fields, all but those that take no time in a step and ``but``, in which two models differ."""
        return [
            field.name
            for field in fields(self)
            if field.name not in (*_NO_TIME, *but) and getattr(self, field.name) != getattr(other, field.name)
        ]

    def longest_context(self, release: tuple[int, int]) -> int | None:
        """Tokens of the longest context that a vLLM release takes the model to have; None if nothing says
        it."""
        if self.yarn_positions is not None and release < (0, 32):
            return self.yarn_positions
        return self.max_position_embeddings

    # -- weights ---------------------------------------------------------------------------------

    def kv_heads_of(self, ranks: int) -> int:
        """KV heads of one rank: divided until one is left, then repeated."""
        return max(1, self.kv_heads // ranks)

    def shared_weights(self, ranks: int) -> int:
        """Weights of the linear layers that every token passes, on one rank: all but experts and router."""
        query, key = self.heads // ranks * self.head_dim, self.kv_heads_of(ranks) * self.head_dim
        attention = self.hidden_size * (2 * query + 2 * key)
        dense = (self.layers - self.moe_layers) * self.intermediate_size
        width = dense + self.moe_layers * self.shared_expert_size
        return self.layers * attention + self.mlp_products * self.hidden_size * width // ranks

    def expert_weights(self, ranks: int) -> int:
        """Weights of one expert of one layer, on one rank."""
        return self.mlp_products * self.hidden_size * self.expert_intermediate_size // ranks

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
        total = self.layers * per_layer + self.moe_layers * self.router_weights + self.hidden_size
        return total + self.other_weights

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
        return self.layers * 4 - self.moe_layers + (2 * self.moe_layers if self.shared_expert_size else 0)

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
        return self.layers * (KERNELS_DENSE + extra) + self.moe_layers * _KERNELS_MOE

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


def _load(path: Path) -> dict[str, Any]:
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
    return loaded
