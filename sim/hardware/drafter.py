"""What proposes drafts: the layers that it runs, on how many ranks, and in how many passes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from servecast.sim.engine.cache_layers import CacheLayer
from servecast.sim.engine.kv_groups import token_bytes
from servecast.sim.hardware.expert_ranks import ExpertRanks
from servecast.sim.hardware.layer_kinds import STATES, Linear
from servecast.sim.hardware.model_shape import ModelShape
from servecast.sim.hardware.shard import Shard
from servecast.sim.inputs.errors import InputError

Passes = Literal["one by one", "at once", "infill"]


@dataclass(frozen=True, slots=True)
class Lookup:
    """Drafts that are looked up in the text: seconds a step, a request, and a token of its context."""

    step_s: float
    request_s: float
    token_s: float


LOOKUPS: Mapping[str, Lookup] = {  # assumed; nothing here was timed on a GPU's host
    "ngram": Lookup(100e-6, 5e-6, 2e-9),  # one thread scans each request's tokens behind the sampled ones
    "suffix": Lookup(100e-6, 30e-6, 0.0),  # a walk down a tree, and the new tokens into it
    "ngram_gpu": Lookup(30e-6, 0.0, 0.05e-9),  # about ten kernels over the batch's token ids
}


@dataclass(frozen=True, slots=True)
class Drafter:
    """The drafter of a deployment.

    Attributes:
        method: of ``METHODS``. shape: its layers; None where drafts are looked up. ranks: that it is split
            over.
        passes: "one by one": one over the tokens of the step, and k - 1 over a token of each request; "at
            once": one over the tokens and the slots of all drafts; "infill": one over these slots alone.
        slots: tokens that its first pass has beyond the step's, a request.
        own_embeddings, own_head: what it loads of its own beside its layers.
        loaded: how many copies of its layers are loaded, each with a KV cache (modules of MTP).
        kv_bytes: of a number in its KV cache; None: as the target's.
        eager: it runs outside CUDA graphs.
    """

    method: str
    shape: ModelShape | None
    ranks: int = 1
    passes: Passes = "one by one"
    slots: int = 0
    own_embeddings: bool = False
    own_head: bool = False
    loaded: int = 1
    kv_bytes: int | None = None
    eager: bool = False

    @property
    def lookup(self) -> Lookup | None:
        """Of drafts that are looked up."""
        return LOOKUPS.get(self.method)

    def shard(self, target: Shard) -> Shard | None:
        """A rank of its layers, None where it has none.

        Raises:
            InputError: they cannot be split over so many.
        """
        if self.shape is None:
            return None
        spread, routed = target.expert_ranks, bool(self.shape.moe_layers)
        experts = ExpertRanks(self.ranks)
        if routed:  # shared by engine cores as the target's
            experts = ExpertRanks(self.ranks, spread.data, whole=spread.whole, backend=spread.backend)
        return Shard(
            self.shape,
            target.gpu,
            self.ranks,
            kv_dtype_bytes=self.kv_bytes or target.kv_dtype_bytes,
            experts=experts,
            cudagraph_sizes=() if self.eager else target.cudagraph_sizes,
        )

    def weight_bytes(self, target: Shard) -> int:
        """Bytes that it adds to the weights of one rank."""
        shard = self.shard(target)
        if shard is None:
            return 0
        model = shard.model
        table = model.vocab_size * model.hidden_size // self.ranks * model.dtype_bytes
        layers = shard.weight_bytes - table * (1 if model.tied_embeddings else 2)
        tied = model.tied_embeddings and self.own_embeddings
        own = self.own_embeddings + (self.own_head and not tied)
        return self.loaded * layers + own * table

    def cache_layers(self, target: Shard) -> tuple[CacheLayer, ...]:
        """What its layers keep of a sequence, as if ranks divided it as the target's."""
        if self.shape is None:
            return ()
        ranks = target.tensor_parallel_size
        more = 1 if self.ranks == ranks else ranks  # a drafter on one rank keeps all heads on each
        each = self.kv_bytes if self.kv_bytes not in (None, target.kv_dtype_bytes) else None
        return tuple(
            replace(
                layer,
                count=layer.count * self.loaded,
                kv_heads=layer.kv_heads * (more if layer.kind in ("full", "sliding", "chunked") else 1),
                fixed_bytes=layer.fixed_bytes if each is None else each,
            )
            for layer in self.shape.cache_layers
        )

    def kv_bytes_per_token(self, target: Shard) -> int:
        """Bytes that one token more takes in its layers, on one rank."""
        ranks, each = target.tensor_parallel_size, target.kv_dtype_bytes
        return sum(layer.count * token_bytes(layer, ranks, each) for layer in self.cache_layers(target))


def mtp_shape(target: ModelShape) -> ModelShape:
    """One layer that predicts a further token: as the target's last, behind two norms and the product that
    joins a token's embedding with the hidden states (``ModelShape.mtp_parameters``).

    Raises:
        InputError: the config has none.
    """
    if not target.mtp_layers:
        raise InputError(
            f"{target.name} has no layers for multi-token prediction",
            where="engine.speculative_config.method",
            fix="Use another method, or a config.json with num_nextn_predict_layers or "
            "mtp_num_hidden_layers.",
        )
    hidden = target.hidden_size
    return _one_layer(target, (Linear("eh_proj", 2 * hidden, hidden),), norms=2)


def _one_layer(model: ModelShape, extra: tuple[Linear, ...], *, norms: int) -> ModelShape:
    last = next((mixer for mixer in reversed(model.layer_kinds) if mixer.kind not in STATES), None)
    if last is None:
        raise InputError(
            f"the layers of {model.name} keep states alone, and a drafter as they are is not modelled",
            where="engine.speculative_config",
            fix="Use another method.",
        )
    return replace(
        model,
        name=f"{model.name} drafter",
        layers=1,
        moe_layers=1 if model.moe_layers else 0,
        mlp_layers=None,
        mixers=(replace(last, count=1, extra=extra),),
        sliding_layers=0,
        mtp_layers=0,
        other_weights=norms * model.hidden_size,
    )


def eagle_shape(method: str, target: ModelShape, head: ModelShape | None) -> ModelShape:
    """An EAGLE head: the layers of its config, and the product that joins a token's embedding with the
    target's hidden states, of one layer, or of three with EAGLE-3, whose attention reads both.

    Args:
        head: what its config says; None: one layer as the target's.

    Raises:
        InputError: there is no config, and the target's layers are not of the kind that such heads have.
    """
    model, hidden = head or target, target.hidden_size
    if head is None and (not target.grouped or target.moe_layers):
        raise InputError(
            f"the sizes of the drafter are not known: it has layers of another kind than {target.name}",
            where="engine.speculative_config.model",
            fix="Give the path of its config.json.",
        )
    main = model.layer_kinds[-1]
    if method == "eagle":
        extra: tuple[Linear, ...] = (Linear("fc", 2 * hidden, model.hidden_size),)
    else:
        both = main.heads * main.head_dim + main.kv_heads * (main.head_dim + main.value_dim)
        extra = (
            Linear("fc", 3 * hidden, model.hidden_size),
            Linear("self_attn.qkv_proj.hidden", model.hidden_size, both, "out", joined=True),
        )
    if head is None:  # of 16 bits, whatever the target's weights are
        plain: dict[str, Any] = {"attention_bytes_each": None, "linear_format": "", "weight_block": 0}
        return replace(
            _one_layer(target, extra, norms=2), weight_bytes_each=target.dtype_bytes, quant_method="", **plain
        )
    rest = (replace(main, count=main.count - 1),) if main.count > 1 else ()
    kinds = (*model.layer_kinds[:-1], *rest, replace(main, count=1, extra=extra))
    return replace(model, mixers=kinds, sliding_layers=0)
