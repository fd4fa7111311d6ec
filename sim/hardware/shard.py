"""A model on a GPU, split over ranks: what one rank holds, reads and computes.

A rank is one GPU of a tensor-parallel group, split as vLLM splits it: heads, the MLP's intermediate size
(every expert's too) and the vocabulary are divided, KV heads are divided until one is left and then repeated,
norms and the router are repeated. ``ModelShape`` counts weights; what they come to on a rank, in bytes and in
FLOPs (a multiply-add as two), is counted here, with all that a deployment's flags change about it.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, replace

from servecast.sim.hardware.gpu import GPU
from servecast.sim.hardware.model_shape import ModelShape
from servecast.sim.inputs.errors import InputError


@dataclass(frozen=True, slots=True)
class Shard:
    """One rank of a model on GPUs. All that is derived from it is of one rank, too.

    Attributes:
        model, gpu: sizes and peaks.
        tensor_parallel_size: ranks that the model is split over. There is no default.
        kv_dtype_bytes: of a number in the KV cache: 2, or 1 for ``--kv-cache-dtype fp8``.
        expert_parallel: each rank has whole experts, instead of a part of each. Evenly used ones take the
            same memory and time.
        cudagraph_sizes: rising, from ``cudagraph_capture_sizes``; empty for ``--enforce-eager``.

    Raises:
        InputError: vLLM could not split the model over that many ranks.
    """

    model: ModelShape
    gpu: GPU
    tensor_parallel_size: int
    kv_dtype_bytes: int = 2
    expert_parallel: bool = False
    cudagraph_sizes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        model, ranks = self.model, self.tensor_parallel_size
        if ranks < 1 or model.heads % ranks or (model.kv_heads % ranks and ranks % model.kv_heads):
            raise InputError(
                f"{model.name} with {model.heads} heads and {model.kv_heads} KV heads "
                f"cannot be split {ranks} ways",
                where="tensor_parallel_size",
                fix="Use a size that divides the heads.",
            )
        if model.weight_block and ranks > 1:
            self._refuse_cut_blocks()

    def _refuse_cut_blocks(self) -> None:
        """Weights that are quantised by blocks are split between blocks only."""
        model, ranks = self.model, self.tensor_parallel_size
        widths = {
            "an expert": 0 if self.expert_parallel else model.expert_intermediate_size // ranks,
            "the shared expert": model.shared_expert_size // ranks,
            "the MLP": model.intermediate_size // ranks if model.moe_layers < model.layers else 0,
            "the queries": model.heads // ranks * model.head_dim,
            "the keys": model.kv_heads_of(ranks) * model.head_dim,
        }
        for what, width in widths.items():
            if width % model.weight_block:
                more = "--enable-expert-parallel, or " if what == "an expert" else ""
                raise InputError(
                    f"split {ranks} ways, {what} of {model.name} has {width} columns, no multiple of the "
                    f"{model.weight_block} of a block of its quantised weights: vLLM refuses it",
                    where="tensor_parallel_size",
                    fix=f"Use {more}fewer ranks.",
                )

    @property
    def whole(self) -> Shard:
        """The whole model on one rank: what all ranks do together, without what they repeat."""
        return replace(self, tensor_parallel_size=1)

    def padded(self, tokens: int) -> int:
        """The tokens that a step of so many computes: the next CUDA-graph size while there is one."""
        at = bisect_left(self.cudagraph_sizes, tokens)
        return self.cudagraph_sizes[at] if at < len(self.cudagraph_sizes) else tokens

    # -- weights -----------------------------------------------------------------------------------

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights, tied embeddings once."""
        model, ranks = self.model, self.tensor_parallel_size
        linear = model.shared_weights(ranks) + model.moe_layers * model.experts * model.expert_weights(ranks)
        embeddings = model.vocab_size * model.hidden_size // ranks * (1 if model.tied_embeddings else 2)
        small = (embeddings + model.small_weights) * model.dtype_bytes
        return linear * model.weight_bytes_each + self._kept_bytes + small

    # -- linear layers -----------------------------------------------------------------------------

    @property
    def linear_peak(self) -> float:
        """Peak of the linear layers' matrix products, FLOP/s."""
        return self.gpu.linear_flops(self.model.weight_bytes_each)

    @property
    def linear_flops_per_token(self) -> float:
        """FLOPs of all linear layers for one token, the LM head left out."""
        model, ranks = self.model, self.tensor_parallel_size
        routed = model.moe_layers * (
            model.experts_per_token * model.expert_weights(ranks) + model.router_weights
        )
        return 2.0 * (model.shared_weights(ranks) + routed)

    def linear_bytes(self, tokens: int) -> float:
        """Weight bytes that a step of ``tokens`` tokens reads, the LM head left out. Experts count as
        ``expert_bytes`` says."""
        model, ranks = self.model, self.tensor_parallel_size
        read = model.shared_weights(ranks) * model.weight_bytes_each + self._kept_bytes
        if not model.moe_layers:
            return float(read)
        return read + self.expert_bytes(tokens) + model.moe_layers * model.router_weights * model.dtype_bytes

    @property
    def _kept_bytes(self) -> int:
        """What linear weights take more because a part of them is not quantised."""
        model = self.model
        return model.kept_weights // self.tensor_parallel_size * (model.dtype_bytes - model.weight_bytes_each)

    @property
    def product_bytes_per_token(self) -> float:
        """Bytes of activations a token that the linear layers read and write, routed experts and the LM head
        left out."""
        model, ranks = self.model, self.tensor_parallel_size
        query, key = model.heads // ranks * model.head_dim, model.kv_heads_of(ranks) * model.head_dim
        attention = 2 * model.hidden_size + 2 * query + 2 * key
        dense = model.layers - model.moe_layers
        mlp = dense * (2 * model.hidden_size + model.mlp_products * model.intermediate_size / ranks)
        if model.shared_expert_size:
            shared = 2 * model.hidden_size + model.mlp_products * model.shared_expert_size / ranks
            mlp += model.moe_layers * shared
        return (model.layers * attention + mlp) * model.dtype_bytes

    # -- routed experts ----------------------------------------------------------------------------

    @property
    def expert_flops_per_token(self) -> float:
        """FLOPs of the experts that one token is sent to, all layers."""
        model = self.model
        sent = model.moe_layers * model.experts_per_token
        return 2.0 * sent * model.expert_weights(self.tensor_parallel_size)

    def expert_bytes(self, tokens: int) -> float:
        """Weight bytes of the experts that a step of ``tokens`` tokens touches, all layers.

        Of E experts, T tokens that each pick k of them, evenly and independently, touch
        E (1 - (1 - k/E)^T): an expectation; a skewed router touches fewer.
        """
        model = self.model
        if not model.moe_layers:
            return 0.0
        touched = model.experts * (1.0 - (1.0 - model.experts_per_token / model.experts) ** tokens)
        weights = touched * model.expert_weights(self.tensor_parallel_size)
        return model.moe_layers * (weights * model.weight_bytes_each)

    @property
    def expert_bytes_per_token(self) -> float:
        """Bytes of activations a token that the experts it is sent to read and write, all layers."""
        model, ranks = self.model, self.tensor_parallel_size
        sent = model.moe_layers * model.experts_per_token
        width = 2 * model.hidden_size + model.mlp_products * model.expert_intermediate_size / ranks
        return sent * width * model.dtype_bytes

    # -- LM head -----------------------------------------------------------------------------------

    def lm_head_flops(self, rows: int) -> float:
        """FLOPs of the logits of ``rows`` sampled tokens."""
        return 2.0 * rows * self.model.hidden_size * self.model.vocab_size / self.tensor_parallel_size

    @property
    def lm_head_bytes(self) -> float:
        """Weight bytes of the LM head, read once a step that samples."""
        model = self.model
        return model.hidden_size * model.vocab_size * model.dtype_bytes / self.tensor_parallel_size

    @property
    def elementwise_bytes_per_token(self) -> float:
        """Bytes a token that the kernels between the matrix products move: each norm reads activation and
        residual and writes both; rotary reads and writes q and k; the activation reads the gate and up halves
        and writes their product; the KV write reads and writes k and v."""
        model, ranks = self.model, self.tensor_parallel_size
        query, key = model.heads // ranks * model.head_dim, model.kv_heads_of(ranks) * model.head_dim
        per_layer = 4 * model.norms_per_layer * model.hidden_size + 2 * (query + key) + 4 * key
        per_layer += 2 * (query + key) if model.qk_norm else 0
        dense = (model.layers - model.moe_layers) * model.intermediate_size
        routed = model.moe_layers * model.experts_per_token * model.expert_intermediate_size
        shared = model.moe_layers * model.shared_expert_size
        widths = model.mlp_products * (dense + routed + shared) / ranks
        return (model.layers * per_layer + widths) * model.dtype_bytes

    # -- attention and KV cache --------------------------------------------------------------------

    @property
    def attention_flops_per_pair(self) -> float:
        """FLOPs of a pair of query and key token: two products of head_dim multiply-adds in every head."""
        return 4.0 * self.model.heads / self.tensor_parallel_size * self.model.head_dim

    @property
    def attention_bytes_per_token(self) -> float:
        """Bytes of a prompt token's q, k, v and o, all layers."""
        model, ranks = self.model, self.tensor_parallel_size
        heads = model.heads // ranks + model.kv_heads_of(ranks)
        return 2.0 * model.layers * heads * model.head_dim * model.dtype_bytes

    @property
    def kv_bytes_per_token_and_layer(self) -> int:
        """Bytes of one token's keys and values in one layer."""
        model = self.model
        return 2 * model.kv_heads_of(self.tensor_parallel_size) * model.head_dim * self.kv_dtype_bytes

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of one token's keys and values in all layers."""
        return self.model.layers * self.kv_bytes_per_token_and_layer


def release(version: str) -> tuple[int, int]:
    """(0, 32) of vLLM's "0.32" or "v0.32.1"; InputError if it is no version."""
    try:
        major, minor = version.removeprefix("v").split(".")[:2]
        return int(major), int(minor)
    except ValueError as error:
        raise InputError(
            f"{version!r} is no vLLM version", where="engine.version", fix='Write it as "0.32".'
        ) from error


def cudagraph_capture_sizes(
    max_num_seqs: int,
    max_num_batched_tokens: int,
    *,
    version: str,
    capability: tuple[int, int],
    max_capture_size: int | None = None,
) -> tuple[int, ...]:
    """Token counts that vLLM captures CUDA graphs for, rising: 1, 2, 4, then by 8 to 248, then by 16.

    They end at ``max_capture_size`` (``--max-cudagraph-capture-size``), by default 2 max_num_seqs and at most
    512 (from 0.28 on 1,024 on compute capability 10), and at the token budget. The budget itself, and from
    0.29 on max_num_seqs, are added if they are not beyond that end.
    """
    since = release(version)
    usual = min(2 * max_num_seqs, 1024 if since >= (0, 28) and capability[0] == 10 else 512)
    limit = min(usual if max_capture_size is None else max_capture_size, max_num_batched_tokens)
    sizes = {1, 2, 4, *range(8, 256, 8), *range(256, limit + 1, 16), max_num_batched_tokens}
    if since >= (0, 29):
        sizes.add(max_num_seqs)
    return tuple(sorted(size for size in sizes if size <= limit))
