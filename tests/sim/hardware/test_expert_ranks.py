"""Experts on ranks: memory by rank, and the fullest rank against draws of a router's choices."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from model_shapes import load

from servecast.sim.engine.engine import StepShape
from servecast.sim.hardware.expert_ranks import ExpertRanks
from servecast.sim.hardware.expert_use import fullest_rank, largest_of, most_touched, rebalanced
from servecast.sim.hardware.gpu import find_gpu
from servecast.sim.hardware.gpu_constants import DEEP_GEMM
from servecast.sim.hardware.shard import DEEP_GEMM_COLUMNS, Shard
from servecast.sim.hardware.step_time.physical import (
    Efficiencies,
    KernelCosts,
    PhysicalStepTime,
    smooth_maximum,
)
from servecast.sim.inputs.errors import InputError
from servecast.sim.metrics.binding import StepRow
from servecast.sim.scenario.basis import constants_of

H200 = find_gpu("H200")
QWEN = load("Qwen3-30B-A3B")
EXPERT = 3 * 2048 * 768 * 2  # bytes: three products of 2,048 by 768 in bf16
LAYERS, EXPERTS = 48, 128


def drawn(tokens: int, ranks: int, experts: int = 128, per_token: int = 8) -> np.ndarray:
    """Choices that fall on each rank, draw by draw, where every token picks different experts evenly."""
    rng = np.random.default_rng(1)
    keys = rng.random((400, tokens, experts))
    chosen = np.argpartition(keys, per_token, axis=2)[:, :, :per_token]
    rank = chosen // (experts // ranks)
    return np.stack([(rank == r).sum(axis=(1, 2)) for r in range(ranks)], axis=1)


@pytest.mark.parametrize(("tokens", "ranks"), [(8, 2), (8, 8), (64, 4), (64, 8)])
def test_the_fullest_rank_of_an_even_router_is_that_of_its_draws(tokens: int, ranks: int) -> None:
    loads = drawn(tokens, ranks)
    measured = loads.max(axis=1).mean() / loads.mean()
    assert fullest_rank(EXPERTS, 8, ranks, 0.0, tokens) == pytest.approx(measured, rel=0.04)


def test_two_ranks_against_the_exact_mean_difference() -> None:
    """Of two shares of a fixed sum the larger is by sqrt(2 / pi) = 0.798 standard deviations above the
    mean, which Blom's approximation gives as 0.833."""
    assert largest_of(2) == pytest.approx((2 / np.pi) ** 0.5, rel=0.05)
    assert largest_of(1) == 0.0


def test_more_tokens_fall_more_evenly() -> None:
    falls = [fullest_rank(EXPERTS, 8, 8, 0.0, tokens) for tokens in (1, 16, 256, 4096, 10**9)]
    assert falls == sorted(falls, reverse=True)
    assert falls[-1] == pytest.approx(1.0, abs=1e-3)
    excess = falls[2] - 1, falls[3] - 1
    assert excess[0] / excess[1] == pytest.approx(4.0)  # as the root of 16 times as many tokens


def test_given_loads_cost_what_their_fullest_rank_has() -> None:
    """Eight experts on four ranks, two each: loads 3+1, 1+1, 1+1, 1+1, of which a token takes two. The
    first expert has 3/10 of the choices, its rank 4/10 instead of a quarter: 1.6."""
    loads = (3.0, 1, 1, 1, 1, 1, 1, 1)
    assert fullest_rank(8, 2, 4, 0.0, loads=loads) == pytest.approx(1.6)


def test_eplb_flattens_given_loads() -> None:
    """The same with EPLB: alone it cannot split the first expert, 3 + 1 of 10; with four copies more its
    load is in parts of 1 or less, and no rank has more than 3 of 10."""
    loads = (3.0, 1, 1, 1, 1, 1, 1, 1)
    assert rebalanced(8, 2, 4, 0.0, loads, 0) == pytest.approx(1.6)
    assert rebalanced(8, 2, 4, 0.0, loads, 4) <= 1.2
    assert fullest_rank(8, 2, 4, 0.0, loads=loads, redundant=4) == rebalanced(8, 2, 4, 0.0, loads, 4)


def test_the_rank_with_most_touched_experts() -> None:
    """Sixteen tokens with eight of 128 experts each touch 82 of them; of 16 on each of eight ranks the most
    touched has 12.8 (drawn), the mean 10.3."""
    rng = np.random.default_rng(2)
    chosen = np.argpartition(rng.random((2000, 16, 128)), 8, axis=2)[:, :, :8].reshape(2000, -1)
    hit = np.zeros((2000, 128), bool)
    np.put_along_axis(hit, chosen, True, axis=1)
    measured = hit.reshape(2000, 8, 16).sum(axis=2).max(axis=1).mean()
    share = 1 - (1 - 8 / 128) ** 16
    assert most_touched(128, 8, share) == pytest.approx(measured, rel=0.04)


@pytest.mark.parametrize(
    ("tensor", "data", "whole"), [(1, 1, False), (4, 1, True), (1, 4, False), (1, 4, True), (2, 2, True)]
)
def test_ranks_hold_their_part_of_the_experts_and_attention_by_tensor_parallelism(
    tensor: int, data: int, whole: bool
) -> None:
    shard = Shard(QWEN, H200, tensor, experts=ExpertRanks(tensor, data, whole=whole))
    experts = LAYERS * EXPERTS * EXPERT
    alone = Shard(QWEN, H200, tensor)
    rest = alone.weight_bytes - experts // tensor
    assert shard.weight_bytes - rest == experts // (tensor * data)
    assert shard.kv_bytes_per_token == alone.kv_bytes_per_token


def test_redundant_experts_take_memory() -> None:
    plain = Shard(QWEN, H200, 1, experts=ExpertRanks(1, 4, whole=True))
    more = replace(plain, experts=ExpertRanks(1, 4, whole=True, redundant=8, rebalanced_every=3000))
    assert more.weight_bytes - plain.weight_bytes == LAYERS * 2 * EXPERT  # two on each rank


def test_blocks_of_quantised_experts_are_cut_by_all_ranks() -> None:
    """MiniMax-M2.5's experts have 1,536 columns: over 4 ranks 384, three blocks of 128, over 8 they are
    cut."""
    model = load("MiniMax-M2.5")
    Shard(model, H200, 2, experts=ExpertRanks(2, 2))
    with pytest.raises(InputError, match=r"split 8 ways, an expert of .* has 192 columns"):
        Shard(model, H200, 2, experts=ExpertRanks(2, 4))
    Shard(model, H200, 2, experts=ExpertRanks(2, 4, whole=True))


def decode(tokens: int) -> StepShape:
    return StepRow((), tokens, 1000 * tokens, tokens)


def kernels(spread: ExpertRanks) -> PhysicalStepTime:
    shard = Shard(QWEN, H200, spread.tensor, experts=spread)
    return PhysicalStepTime(shard, constants_of(H200).efficiencies(shard))


def test_an_exchange_takes_what_was_timed() -> None:
    """64 decodes on each of eight cores, 48 layers. All tokens together, 512 of 2,048 numbers and of eight
    weights and ids in 8 bytes: 2.13 MB gathered and 2.10 MB scattered, each about 23 us by NCCL's timings on
    eight H200."""
    step = kernels(ExpertRanks(1, 8, whole=True))
    parts = step.breakdown(decode(64))
    assert parts["all_to_all"] / LAYERS == pytest.approx(2 * 22e-6, rel=0.1)
    assert sum(parts.values()) == pytest.approx(step.seconds(decode(64)))


@pytest.mark.parametrize(
    ("tokens", "seconds"),
    [(16, 86.4e-6), (64, 142.9e-6), (256, 169.3e-6), (1024, 202.9e-6), (4096, 328.2e-6), (8192, 596.7e-6)],
)
def test_whole_experts_take_what_was_timed_on_eight_ranks(tokens: int, seconds: float) -> None:
    """NVIDIA's rows of MiniMax-M2.5's experts on an H200, one of eight ranks, evenly used: none of them is in
    a fit, whose rows all have one rank of experts."""
    shard = Shard(load("MiniMax-M2.5"), H200, 8, experts=ExpertRanks(8, whole=True))
    efficiencies = constants_of(H200).efficiencies(shard)
    assert efficiencies.by_kernel is not None
    step = PhysicalStepTime(shard, efficiencies)
    found = step._experts(tokens) / shard.model.moe_layers + efficiencies.by_kernel.expert_s
    assert found == pytest.approx(seconds, rel=0.12)


@pytest.mark.parametrize(
    ("backend", "tokens", "seconds"),
    [("deepep_low_latency", 64, 150.8e-6), ("deepep_high_throughput", 4096, 2637.9e-6)],
)
def test_deepep_takes_what_was_timed(backend: str, tokens: int, seconds: float) -> None:
    """NVIDIA's rows of an H200 at 7,168 numbers and 8 of 256 experts on 8 ranks: dispatch 80.0 us and combine
    70.9 us of 64 tokens, 1,127.6 and 1,510.3 us of 4,096 with the other kernels."""
    model = replace(QWEN, hidden_size=7168, experts=256)
    shard = Shard(model, H200, 1, experts=ExpertRanks(1, 8, whole=True, backend=backend))
    step = PhysicalStepTime(shard, constants_of(H200).efficiencies(shard))
    assert step.in_lockstep([tokens] * 8)[1] > 0
    found = step._exchange(8 * tokens, tokens) / LAYERS
    assert found == pytest.approx(seconds, rel=0.2)


def test_releases_before_0_17_pad_cores_without_a_graph_too() -> None:
    """allow_dp_padding: a prompt of 100 tokens on one of two cores is 100 on the other, whose graphs end at
    32; with --enforce-eager there is nothing to pad to."""
    spread, sizes = ExpertRanks(1, 2, padded_alike=True), (1, 2, 4, 8, 16, 24, 32)
    padded = PhysicalStepTime(Shard(QWEN, H200, 1, experts=spread, cudagraph_sizes=sizes), Efficiencies())
    assert padded.in_lockstep([3, 100])[0] == [100, 100]
    eager = PhysicalStepTime(Shard(QWEN, H200, 1, experts=spread), Efficiencies())
    assert eager.in_lockstep([3, 100])[0] == [3, 100]


def test_exchanges_of_unknown_times_are_refused() -> None:
    shard = Shard(QWEN, H200, 1, experts=ExpertRanks(1, 8, whole=True, backend="deepep_low_latency"))
    with pytest.raises(InputError, match="nothing is known of the times of deepep_low_latency"):
        PhysicalStepTime(shard, Efficiencies()).seconds(decode(8))


def test_cores_with_a_graph_all_compute_as_many_tokens_as_the_largest() -> None:
    """dp_utils: 3 and 17 tokens are 24 each with graphs up to 32; with 40 there is none, for nobody."""
    spread = ExpertRanks(1, 2, whole=True)
    shard = Shard(QWEN, H200, 1, experts=spread, cudagraph_sizes=(1, 2, 4, 8, 16, 24, 32))
    step = PhysicalStepTime(shard, Efficiencies())
    assert step.in_lockstep([3, 17])[::2] == ([24, 24], True)
    assert step.in_lockstep([3, 40])[::2] == ([3, 40], False)
    assert step.in_lockstep([24, 24])[1] == step.in_lockstep([3, 17])[1]


def test_eplb_costs_its_moves() -> None:
    """Synchronous: a rank's experts over the link, 7.25 GB of Qwen3-30B-A3B on eight ranks, once in 3,000
    steps."""
    spread = ExpertRanks(1, 8, whole=True, rebalanced_every=3000, rebalanced_behind=False)
    shard = Shard(QWEN, H200, 1, experts=spread)
    parts = PhysicalStepTime(shard, Efficiencies(link=0.5)).breakdown(decode(8))
    held = LAYERS * EXPERTS // 8 * EXPERT
    assert shard.held_expert_bytes == held == pytest.approx(7.25e9, rel=0.01)
    assert H200.link_bandwidth is not None
    assert parts["rebalancing"] == pytest.approx(held / (0.5 * H200.link_bandwidth) / 3000)


def test_a_floor_of_an_exchange_is_no_share() -> None:
    with pytest.raises(InputError, match="exchange_s"):
        KernelCosts(product_s=0, product_passes=0, attention_s=0, attention_passes=0, exchange_s=-1.0)


@pytest.mark.parametrize(
    ("groups", "rows", "columns", "inputs", "tera"),
    [
        (4, 8192, 4096, 7168, 1297),
        (4, 8192, 7168, 2048, 1099),
        (8, 4096, 4096, 7168, 1288),
        (8, 4096, 7168, 2048, 1093),
        (1, 1024, 4096, 7168, 1233),
        (1, 1024, 7168, 2048, 925),
        (2, 512, 4096, 7168, 1040),
        (2, 512, 7168, 2048, 916),
        (4, 256, 4096, 7168, 932),
        (4, 256, 7168, 2048, 815),
    ],
)
def test_deep_gemm_is_as_fast_as_its_own_table_says(
    groups: int, rows: int, columns: int, inputs: int, tera: float
) -> None:
    """TFLOP/s of grouped products on an H800, whose peak and bandwidth are an H100's (README of DeepGEMM)."""
    h100, flops = find_gpu("H100"), 2.0 * groups * rows * columns * inputs
    compute = flops * (1 + DEEP_GEMM_COLUMNS / inputs) / (h100.peak_flops("fp8_block") or 0)
    read = groups * columns * inputs / h100.bandwidth
    seconds = smooth_maximum(
        compute / DEEP_GEMM["expert_compute"],
        read / DEEP_GEMM["expert_bandwidth"],
        DEEP_GEMM["expert_overlap"],
    )
    assert seconds == pytest.approx(flops / (tera * 1e12), rel=0.09)


def test_deep_gemm_computes_a_block_for_every_expert() -> None:
    """compute_aligned_M: 16 tokens with 8 of 128 experts are 128 choices, and 128 x 127 rows more may be
    needed: 16,384. Of 64 whole experts on a rank half as many are. The products of 4,096 by 1,536 on two
    ranks: gate and up are 1,536 columns of them together, down 4,096 of 768."""
    assert ExpertRanks(2).block_rows(128, 16 * 8) == 128 * 128
    assert ExpertRanks(2, whole=True).block_rows(128, 16 * 8) == 128 + 64 * 127 + 64  # to a block of 128
    shard = Shard(load("Qwen3-235B-A22B-FP8"), H200, 2, experts=ExpertRanks(2, kernel="deep_gemm"))
    less, more = shard.expert_flops(16), shard.expert_flops(1)
    assert more == less  # 8 choices and 16,256 rows come to as many blocks
    columns = 1536 * (4096 + DEEP_GEMM_COLUMNS) + 4096 * (768 + DEEP_GEMM_COLUMNS)
    assert less == pytest.approx(2.0 * 94 * 16384 * columns)
    assert shard.expert_bytes(1) < shard.expert_bytes(16) / 8  # but reads those with tokens


def test_deep_gemm_is_for_fp8_in_blocks_on_hopper() -> None:
    for model, gpu, kernel in (
        ("Qwen3-235B-A22B-FP8", "H100", "deep_gemm"),
        ("Qwen3-235B-A22B-FP8", "B200", "triton"),
        ("Qwen3-30B-A3B", "H100", "triton"),
    ):
        shard = Shard(load(model), find_gpu(gpu), 2, experts=ExpertRanks(2, kernel="deep_gemm"))
        assert shard.routed_by == kernel


def test_marlin_multiplies_four_bits_in_sixteen() -> None:
    """vLLM pads mxfp4 for it (mxfp4.py, MARLIN) to 128 columns a rank and the hidden size to 256:
    gpt-oss-120b's 1,440 of 2,880 on two ranks to 1,536 of 3,072, and not to 1,472 of 2,880 as for Triton."""
    model, h100 = load("gpt-oss-120b"), find_gpu("H100")
    triton, marlin = (Shard(model, h100, 2, experts=ExpertRanks(2, kernel=by)) for by in ("triton", "marlin"))
    assert (triton.expert_kernel, marlin.expert_kernel) == ("mxfp4", "int4")
    assert marlin.expert_peak == h100.bf16_flops
    assert marlin.expert_bytes(8) / triton.expert_bytes(8) == pytest.approx(1536 * 3072 / (1472 * 2880))


@pytest.mark.parametrize(
    ("ranks", "seconds"), [(2, (473e-6, 571e-6, 2081e-6)), (8, (143e-6, 169e-6, 597e-6))]
)
def test_experts_by_cutlass_take_what_was_timed(ranks: int, seconds: tuple[float, ...]) -> None:
    """NVIDIA's rows of MiniMax-M2.5's experts on an H200 by FlashInfer's CUTLASS, evenly used: 64, 256 and
    8,192 tokens."""
    shard = Shard(load("MiniMax-M2.5"), H200, ranks, experts=ExpertRanks(ranks, whole=True, kernel="cutlass"))
    efficiencies = constants_of(H200).efficiencies(shard)
    assert efficiencies.by_kernel is not None
    step = PhysicalStepTime(shard, efficiencies)
    for tokens, measured in zip((64, 256, 8192), seconds, strict=True):
        found = step._experts(tokens) / shard.model.moe_layers + efficiencies.by_kernel.expert_s
        assert found == pytest.approx(measured, rel=0.15)
