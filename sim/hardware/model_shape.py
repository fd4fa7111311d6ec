"""A transformer's sizes, from its ``config.json``, and how many weights and KV tokens they make.

Only what moves time and memory is kept. Bytes and FLOPs depend on how the model is deployed: see ``Shard``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from servecast.sim.engine.cache_layers import CacheLayer
from servecast.sim.hardware.layer_kinds import STATES, WORDS, Linear, Mixer
from servecast.sim.hardware.model_config import shape_fields
from servecast.sim.hardware.vision_tower import VisionTower
from servecast.sim.inputs.errors import InputError

_NO_TIME = (  # fields that take no time in a step
    "name",
    "max_position_embeddings",
    "yarn_positions",
    "default_positions",
    "model_type",
    "weight_block",
    "kv_bytes_each",
    "sliding_first",
    "mtp_layers",
    "least_capability",
    "order",
    "notes",
    "tower",
)
_BESIDE = "hf_quant_config.json"
KERNELS_DENSE = 10  # 2 norms, 4 matrix products, rotary, KV write, attention, activation
_KERNELS_MOE = 5  # router, top-k, alignment and the second grouped product's sum, beyond a dense layer's


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes of a decoder-only transformer. ``weight_bytes_each`` is a linear weight's, scales included (1
    when
    it is fp8); embeddings, LM head, norms and activations have ``dtype_bytes``. ``experts`` is 0 for a dense
    model, ``moe_layers`` counts the layers that have experts. ``sliding_layers`` attend only to the last
    ``sliding_window`` tokens.

    Attributes:
        layers: blocks of the model; each mixes tokens, has an MLP or experts, or both.
        mixers: how the layers mix tokens, where that is not grouped-query attention of ``heads``,
            ``kv_heads`` and ``head_dim`` in all of them; ``layer_kinds`` says it of every model.
            sliding_first: the first layer is a sliding one.
        mlp_layers: layers with a dense MLP; None: all without experts. expert_input_size: what experts take
            in where that is a projection of the hidden states (Nemotron 3's latent experts); 0: those.
        attention_bytes_each, expert_bytes_each: of a weight of the mixers, and of the routed experts; None:
            as ``weight_bytes_each``. What stays in 16 bits of a part is averaged in.
        linear_format, expert_format: dtype of most of the weights that every token passes, and of the routed
            experts, by the names of ``gpu_constants.WeightDtype``; "": follows from the bytes. See
            ``Shard.linear_kernel`` for how a GPU multiplies them.
        mtp_layers: layers that predict further tokens, which are loaded for speculation only
            (``mtp_parameters``) and are in no other number.
        tower: of a model that also takes images, where its family is known; in no other number.
        expert_skew: how unevenly tokens choose experts (``expert_use``); 0: evenly. expert_loads: instead,
            how often each is chosen, relative to the others.
        least_capability: compute capability times ten that vLLM asks for with these weights; 0: any.
        quant_method: how they were quantised, as the config names it.
        max_position_embeddings: longest context; ``longest_context`` says what vLLM makes of it, of
            ``yarn_positions`` and of ``default_positions``.
        qk_norm_over_ranks: q and k are normed over all heads together, so that ranks tell each other sums.
        mlp_products: 3 with a gate, 2 without. shared_expert_size: width of what all tokens pass in a layer
            with experts.
        other_weights: small ones of all layers, beyond those that the fields above imply.
        weight_block: columns of a block of quantised weights that share a scale; 0 for none.
        kv_bytes_each: of a number in the KV cache, as the checkpoint asks for.
        order: of every layer, where layers differ: the place of its mixer among ``layer_kinds`` (-1: it has
            none), and whether it has experts and a dense MLP.
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
    weight_bytes_each: int | float = 2
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
    weight_block: int = 0
    kv_bytes_each: int = 2
    mixers: tuple[Mixer, ...] = ()
    sliding_first: bool = True
    mlp_layers: int | None = None
    expert_input_size: int = 0
    attention_bytes_each: int | float | None = None
    expert_bytes_each: int | float | None = None
    linear_format: str = ""
    expert_format: str = ""
    mtp_layers: int = 0
    least_capability: int = 0
    quant_method: str = ""
    expert_skew: float = 0.0
    expert_loads: tuple[float, ...] = ()
    order: tuple[tuple[int, bool, bool], ...] = ()
    notes: tuple[str, ...] = ()
    tower: VisionTower | None = None

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
            if path.parent.parent.name == "snapshots":  # of the Hub's cache: models--owner--name
                usual = path.parents[2].name.removeprefix("models--").replace("--", "/")
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

    # -- layers ----------------------------------------------------------------------------------

    @property
    def layer_kinds(self) -> tuple[Mixer, ...]:
        """How the layers mix tokens, by kind, in the order in which the first of each kind stands."""
        if self.mixers:
            return self.mixers
        full = Mixer(
            kind="full",
            count=self.layers - self.sliding_layers,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            value_dim=self.head_dim,
        )
        sliding = replace(full, kind="sliding", count=self.sliding_layers, window=self.sliding_window)
        ordered = (sliding, full) if self.sliding_first else (full, sliding)
        return tuple(mixer for mixer in ordered if mixer.count)

    def stage(self, first: int, last: int) -> ModelShape:
        """The model that the layers from ``first`` to before ``last`` make."""
        count = last - first
        small = round(self.other_weights * count / self.layers)
        if not self.order:
            cut = self.layers - count
            return replace(
                self,
                layers=count,
                moe_layers=self.moe_layers and count,
                sliding_layers=self.sliding_layers and count,
                mixers=tuple(replace(mixer, count=mixer.count - cut) for mixer in self.mixers),
                other_weights=small,
            )
        own = self.order[first:last]
        counts = [sum(place == number for place, _, _ in own) for number in range(len(self.layer_kinds))]
        sliding = [
            count for mixer, count in zip(self.layer_kinds, counts, strict=True) if mixer.kind == "sliding"
        ]
        mixers = (
            replace(mixer, count=count) for mixer, count in zip(self.mixers, counts, strict=False) if count
        )
        return replace(
            self,
            layers=count,
            moe_layers=sum(experts for _, experts, _ in own),
            mlp_layers=None if self.mlp_layers is None else sum(dense for _, _, dense in own),
            sliding_layers=sum(sliding),
            mixers=tuple(mixers),
            other_weights=small,
            order=own,
        )

    @property
    def cache_layers(self) -> tuple[CacheLayer, ...]:
        """What the layers keep of a sequence.

        Raises:
            InputError: the layout of a kind is not modelled.
        """
        return tuple(layer for mixer in self.layer_kinds for layer in mixer.cache_layers())

    @property
    def keeps_states(self) -> bool:
        """Whether some layers keep a state of fixed size."""
        return any(mixer.kind in STATES for mixer in self.layer_kinds)

    @property
    def dense_layers(self) -> int:
        """Layers with a dense MLP."""
        return self.layers - self.moe_layers if self.mlp_layers is None else self.mlp_layers

    @property
    def quantised(self) -> str:
        """The dtype of most weights that every token passes, as in ``gpu_constants.WeightDtype``."""
        return self.linear_format or ("fp8" if self.weight_bytes_each == 1 else "bf16")

    def mlp(self, module: str, width: int) -> tuple[Linear, ...]:
        """The matrices of an MLP of that width on the hidden states."""
        hidden = self.hidden_size
        gate = (Linear(f"{module}gate_proj", hidden, width, "out"),) if self.mlp_products == 3 else ()
        return (
            *gate,
            Linear(f"{module}up_proj", hidden, width, "out", joined=bool(gate)),
            Linear(f"{module}down_proj", width, hidden, "in"),
        )

    def mlps(self) -> tuple[tuple[int, tuple[Linear, ...]], ...]:
        """(layers, their matrices) of what every token passes beside mixers: dense MLPs, shared experts, and
        the projections in front of latent experts and behind them."""
        found = [(self.dense_layers, self.mlp("mlp.", self.intermediate_size))]
        if self.shared_expert_size:
            found.append((self.moe_layers, self.mlp("mlp.shared_experts.", self.shared_expert_size)))
        if self.expert_input_size:
            latent = (
                Linear("mlp.fc1_latent_proj", self.hidden_size, self.expert_input_size),
                Linear("mlp.fc2_latent_proj", self.expert_input_size, self.hidden_size),
            )
            found.append((self.moe_layers, latent))
        return tuple(found)

    def linears(self) -> tuple[tuple[int, Linear], ...]:
        """(layers, matrix) of all that every token passes: all but routed experts and routers."""
        kinds = tuple((mixer.count, mixer.linears(self.hidden_size)) for mixer in self.layer_kinds)
        return tuple((count, each) for count, linears in (*kinds, *self.mlps()) for each in linears)

    @property
    def grouped(self) -> bool:
        """Whether all layers attend by grouped queries."""
        return all(mixer.attends for mixer in self.layer_kinds)

    @property
    def untimed(self) -> str | None:
        """The kinds of layers that no step time knows, in words; None if there are none."""
        return ", ".join(WORDS[each.kind] for each in self.layer_kinds if each.kind == "compressed") or None

    # -- weights ---------------------------------------------------------------------------------

    def kv_heads_of(self, ranks: int) -> int:
        """KV heads of one rank: divided until one is left, then repeated."""
        return max(1, self.kv_heads // ranks)

    def mixer_weights(self, ranks: int) -> int:
        """Weights of what mixes tokens, on one rank."""
        return sum(
            mixer.count * each.weights(ranks)
            for mixer in self.layer_kinds
            for each in mixer.linears(self.hidden_size)
        )

    def mlp_weights(self, ranks: int) -> int:
        """Weights of dense MLPs and shared experts, on one rank."""
        return sum(count * each.weights(ranks) for count, linears in self.mlps() for each in linears)

    def shared_weights(self, ranks: int) -> int:
        """Weights of the linear layers that every token passes, on one rank: all but experts and router."""
        return self.mixer_weights(ranks) + self.mlp_weights(ranks)

    def expert_weights(self, ranks: int) -> int:
        """Weights of one expert of one layer, on one rank."""
        inputs = self.expert_input_size or self.hidden_size
        return self.mlp_products * inputs * self.expert_intermediate_size // ranks

    @property
    def router_weights(self) -> int:
        """Weights of the router of one layer, which every rank has."""
        return self.hidden_size * self.experts

    @property
    def small_weights(self) -> int:
        """Norms, biases and routers of all layers, which stay in ``dtype_bytes`` and on every rank."""
        total = (self.layers * self.norms_per_layer + 1) * self.hidden_size
        for mixer in self.layer_kinds:
            each = mixer.small_weights
            if mixer.attends:
                key, value = mixer.kv_heads * mixer.head_dim, mixer.kv_heads * mixer.value_dim
                each += 2 * mixer.head_dim if self.qk_norm else 0
                each += mixer.heads * mixer.head_dim + key + value if self.qkv_bias else 0
                each += self.hidden_size if self.out_bias else 0
            total += mixer.count * each
        if self.mlp_bias:
            total += self.layers * (2 * self.intermediate_size + self.hidden_size)
        return total + self.moe_layers * self.router_weights + self.other_weights

    @property
    def parameters(self) -> int:
        """All parameters, tied embeddings once."""
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2)
        experts = self.moe_layers * self.experts * self.expert_weights(1)
        return embeddings + self.shared_weights(1) + experts + self.small_weights

    @property
    def mtp_parameters(self) -> int:
        """Parameters of the layers that predict further tokens: each a layer as the last, two norms and a
        product
        that join a token with the hidden states, and a norm; embeddings and LM head are the model's."""
        hidden, last = self.hidden_size, self.layer_kinds[-1]
        mixer = last.small_weights + sum(each.weights(1) for each in last.linears(hidden))
        mlp = sum(each.weights(1) for each in self.mlp("", self.shared_expert_size or self.intermediate_size))
        if self.moe_layers:
            mlp = mlp if self.shared_expert_size else 0
            mlp += self.experts * self.expert_weights(1) + self.router_weights
        return self.mtp_layers * (mixer + mlp + (3 + self.norms_per_layer) * hidden + 2 * hidden * hidden)

    @property
    def active_parameters(self) -> int:
        """Parameters that one token uses: of the experts only those it is routed to."""
        idle = self.moe_layers * (self.experts - self.experts_per_token) * self.expert_weights(1)
        return self.parameters - idle

    @property
    def products(self) -> int:
        """Matrix products of one forward pass beside routed experts and LM head: query, key and value in one,
        output, gate and up in one, down; the router of a layer with experts. Shared experts are launched on a
        stream of their own, behind the routed ones (vLLM's ``SharedExperts``)."""
        beside = 2 * self.moe_layers if self.shared_expert_size else 0
        return self.moe_layers + sum(count for count, each in self.linears() if not each.joined) - beside

    @property
    def small_kernels(self) -> int:
        """Kernels of one forward pass that are neither products, attention nor experts: norms, rotary,
        activation, q and k norms."""
        extra = 2 if self.qk_norm else 0
        inside = sum(mixer.count for mixer in self.layer_kinds if not mixer.attends)  # their rotary
        return self.layers * (self.norms_per_layer + 2 + extra) - self.moe_layers - inside

    @property
    def kernels(self) -> int:
        """GPU kernels of one forward pass: about ten a layer, more with q/k norms, extra norms or experts."""
        extra = (2 if self.qk_norm else 0) + self.norms_per_layer - 2
        return self.layers * (KERNELS_DENSE + extra) + self.moe_layers * _KERNELS_MOE


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
