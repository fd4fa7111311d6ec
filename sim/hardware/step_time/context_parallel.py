"""Decode context parallelism: what ranks that share a sequence's KV out exchange in each layer.

Each rank attends with the query heads of all of them to its part of the tokens. So queries are gathered
before, and behind that outputs are put together by their log-sum-exps (``cp_lse_ag_out_rs``,
``dcp_a2a_lse_reduce``). Latent attention does so for decodes; of prompts it gathers the older latents of all
ranks, as it expands them (``_compute_prefill_context``). Grouped-query attention does so for all tokens of a
step whose requests have KV, and computes those of the step among themselves apart (``_forward_with_dcp``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from servecast.sim.hardware.shard import Shard

_LSE_BYTES = 4  # fp32, a head and token
_LATENT_KERNELS, _GROUPED_KERNELS = 1, 2  # that scale outputs; and that merge them with the step's own tokens


@dataclass(frozen=True, slots=True)
class ContextExchange:
    """Bytes of one layer's exchange, for each token that is exchanged.

    Attributes:
        decodes_only: the tokens of decodes, not all of a step.
        query, sums, output: bytes of the gathered queries of all ranks, of their log-sum-exps, and of one
            rank's outputs of all heads. kernels: small ones more in a layer; again: whether attention runs
            once more.
        older: bytes of an older token of a prompt that ranks gather.
    """

    decodes_only: bool
    query: float
    sums: float
    output: float
    kernels: int
    again: bool
    older: float = 0.0

    @classmethod
    def of(cls, shard: Shard) -> ContextExchange | None:
        """Of a rank's model; None where its ranks share nothing out."""
        if shard.context_ranks == 1:
            return None
        mixer, each = shard.model.layer_kinds[0], shard.model.dtype_bytes
        heads = mixer.heads / shard.tensor_parallel_size * shard.context_ranks
        sums = heads * shard.context_ranks * _LSE_BYTES
        if mixer.kv_rank:
            latent = mixer.kv_rank + mixer.rope_dim
            query, output = heads * latent * each, heads * mixer.kv_rank * each
            return cls(True, query, sums, output, _LATENT_KERNELS, False, latent * each)
        query, output = heads * mixer.head_dim * each, heads * mixer.value_dim * each
        return cls(False, query, sums, output, _GROUPED_KERNELS, True)

    def tokens(self, chunks: Sequence[tuple[int, int]], decodes: int) -> int:
        """Tokens of a step that are exchanged."""
        if self.decodes_only:
            return decodes
        seen = decodes or any(before for _, before in chunks)
        return decodes + sum(new for new, _ in chunks) if seen else 0
