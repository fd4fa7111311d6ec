"""How routed experts lie on the ranks of a server, and what passes between the ranks in a layer of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

BACKENDS = ("allgather_reducescatter", "deepep_high_throughput", "deepep_low_latency")
"""Of ``--all2all-backend`` those whose times are known."""
FALLS_BACK = {"naive": BACKENDS[0], "pplx": BACKENDS[0]}
"""What vLLM has no more, and takes instead (ParallelConfig)."""
BLOCK = 128  # rows to which DeepGEMM's contiguous layout pads each expert's tokens
Kernel = Literal["triton", "deep_gemm", "cutlass", "marlin"]  # CUTLASS is FlashInfer's
TOP_K_BYTES = 8  # a weight in fp32 and an id in int32 for each expert that a token is sent to


@dataclass(frozen=True, slots=True)
class ExpertRanks:
    """The ranks of the routed experts: all of a server, tensor-parallel times data-parallel ones.

    FusedMoEParallelConfig.make: without ``--enable-expert-parallel`` each expert is split over all of them,
    with it each rank has whole ones.

    Attributes:
        tensor, data: ranks of one engine core, and engine cores.
        whole: whole experts on each rank.
        backend: of ``BACKENDS``, where cores exchange tokens.
        redundant: copies of experts more, on all ranks together (EPLB).
        rebalanced_every: steps from one rearrangement of EPLB to the next; 0: no EPLB.
        rebalanced_behind: the weights move while steps run.
        padded_alike: without a CUDA graph, too, all cores compute as many tokens as the one with most.
        kernel: that multiplies fp8 experts with scales of blocks on Hopper; if Marlin, all others, too.
    """

    tensor: int = 1
    data: int = 1
    whole: bool = False
    backend: str = BACKENDS[0]
    redundant: int = 0
    rebalanced_every: int = 0
    rebalanced_behind: bool = True
    padded_alike: bool = False
    kernel: Kernel = "triton"

    @property
    def ranks(self) -> int:
        """All of them."""
        return self.tensor * self.data

    @property
    def split(self) -> int:
        """Parts of each expert."""
        return 1 if self.whole else self.ranks

    def held(self, experts: int) -> int:
        """Experts, or parts of so many, on the rank that has most: what its memory holds."""
        return -(-(experts + self.redundant) // self.ranks) if self.whole else experts

    def block_rows(self, experts: int, chosen: int) -> int:
        """Rows of so many choices in whole blocks: every expert of the rank has one more than it may fill
        (deep_gemm_utils.compute_aligned_M). vLLM knows on the host only how many there may be, so it computes
        all, whatever experts have tokens."""
        return -(-(chosen + self.held(experts) * (BLOCK - 1)) // BLOCK) * BLOCK

    @property
    def sequence_parallel(self) -> bool:
        """Each tensor-parallel rank sends its part of the tokens, so that none goes twice
        (ParallelConfig.use_sequence_parallel_moe)."""
        return self.whole and self.tensor > 1 and self.data > 1

    @property
    def exchanging(self) -> int:
        """Ranks between which tokens pass in a layer; 1: none do."""
        return self.ranks if self.sequence_parallel else self.data
