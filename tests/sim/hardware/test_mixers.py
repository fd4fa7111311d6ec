"""What layers that mix tokens take: windows, latents, sparse attention, states, and unevenly used experts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from model_shapes import load
from small_scenarios import small
from step_cases import Step

from servecast.sim.hardware.expert_ranks import ExpertRanks
from servecast.sim.hardware.expert_use import fullest_rank, touched
from servecast.sim.hardware.gpu import find_gpu
from servecast.sim.hardware.layer_kinds import Mixer
from servecast.sim.hardware.model_shape import ModelShape
from servecast.sim.hardware.shard import Shard
from servecast.sim.hardware.step_time.mixers import IDEAL, Attention, MixerCosts, mixing_of
from servecast.sim.hardware.step_time.physical import Efficiencies, PhysicalStepTime
from servecast.sim.inputs.errors import InputError
from servecast.sim.run.simulate import simulate
from servecast.sim.scenario.basis import constants_of
from servecast.sim.scenario.deployment import Deployment

H200, A100 = find_gpu("H200"), find_gpu("A100")
QWEN = load("Qwen2.5-0.5B-Instruct")
LATENT = Mixer(
    kind="mla", count=61, heads=128, head_dim=192, value_dim=128, query_rank=1536, kv_rank=512, rope_dim=64
)
SPARSE = replace(LATENT, kind="sparse_mla", index_heads=64, index_dim=128, index_topk=2048)
STATE = Mixer(kind="gdn", count=36, heads=32, kv_heads=16, head_dim=128, value_dim=128, conv=4, state_bytes=4)


@dataclass(frozen=True)
class WindowedStep(Step):
    decode_windowed: int | None = None


def shape(*mixers: Mixer) -> ModelShape:
    """Those layers in a model of DeepSeek-V3's hidden size, with next to no MLP."""
    sizes = {"hidden_size": 7168, "intermediate_size": 16, "layers": sum(mixer.count for mixer in mixers)}
    return replace(QWEN, heads=128, kv_heads=1, mixers=mixers, qkv_bias=False, **sizes)


def keys(position: int, window: int, chunked: bool) -> int:
    """Those that the token at a position attends to, itself included, counted one by one."""
    first = position // window * window if chunked else max(0, position + 1 - window)
    return len(range(first if window else 0, position + 1))


@given(st.integers(0, 300), st.integers(0, 300), st.integers(0, 70), st.booleans())
def test_pairs_are_those_counted_one_by_one(tokens: int, context: int, window: int, chunked: bool) -> None:
    attention = Attention(layers=1, window=window, chunked=chunked and window > 0)
    by_hand = sum(keys(context + i, window, attention.chunked) for i in range(tokens))
    assert attention.pairs(tokens, context) == by_hand
    assert attention.before(context) == min(context, keys(context, window, attention.chunked) - 1) or window


def test_a_step_without_its_windows_is_taken_at_their_bound() -> None:
    """Two decodes with 3,000 tokens together: at most two windows of 1,024; of 100 and 2,900 it is 1,124."""
    attention = Attention(layers=1, window=1024)
    assert attention.seen(3000, 2, None) == 2048
    assert attention.seen(3000, 2, 100 + 1024) == 1124
    assert Attention(layers=1).seen(3000, 2, 5) == 3000


def test_decodes_read_latents_once_for_all_heads() -> None:
    """576 numbers of two bytes a token and layer, whatever the ranks; 2 x (2 x 512 + 64) FLOPs a head."""
    for ranks in (1, 8):
        (attention,) = mixing_of(Shard(shape(LATENT), H200, ranks), [IDEAL]).attention
        assert attention.least[2] == pytest.approx(576 * 2 / 4.8e12)
        assert attention.least[1] == pytest.approx(128 / ranks * 2 * (2 * 512 + 64) / 989e12)
        assert attention.least[0] == pytest.approx(128 / ranks * 2 * (192 + 128) / 989e12)
    assert attention.decode_s(mixed=True) == max(attention.least[1:])


@pytest.mark.parametrize(
    ("batch", "context", "microseconds"), [(1, 1024, 87), (16, 4096, 117), (64, 4096, 179), (256, 1024, 200)]
)
def test_blocks_of_latent_attention_take_what_nvidia_timed(
    batch: int, context: int, microseconds: float
) -> None:
    """DeepSeek-V3's block with 8 heads on an H200, bf16: projections, absorbed attention, launches; a row of
    ``mla_generation_module_perf`` each."""
    shard = Shard(shape(replace(LATENT, count=1)), H200, 16)
    model = PhysicalStepTime(shard, constants_of(H200).efficiencies(shard))
    parts = model.breakdown(Step(decodes=batch, decode_context=batch * context))
    costs = model.efficiencies.by_kernel
    assert costs is not None
    others = 2 * costs.product_s + shard.model.small_kernels * 2e-6  # launches of the MLP and the norms
    block = parts["kernels"] - others + parts["linear"] + parts["attention_decode"]
    assert block == pytest.approx(microseconds * 1e-6, rel=0.12)


def test_sparse_attention_reads_what_the_indexer_chose() -> None:
    """With 100,000 tokens of context a decode reads 2,048 latents, and 140 bytes of each token to choose
    them."""
    shard = Shard(shape(replace(SPARSE, count=1)), H200, 8)
    attention, indexer = mixing_of(shard, [IDEAL]).attention
    assert (attention.window, indexer.window) == (2048, 0)
    assert indexer.read_s == pytest.approx((128 + 4 + 8) / 4.8e12)
    model = PhysicalStepTime(shard, constants_of(H200).efficiencies(shard))
    far, near = (
        model.breakdown(Step(decodes=1, decode_context=context))["attention_decode"]
        for context in (100_000, 50_000)
    )
    bandwidth = constants_of(H200).indexers["bf16"].bandwidth
    assert far - near == pytest.approx(50_000 * 140 / (4.8e12 * bandwidth))


def test_states_are_read_and_written_whatever_the_context() -> None:
    """32 heads of 128 x 128 numbers in fp32, read and written: 4.2 MB a decode and layer."""
    shard = Shard(shape(STATE), H200, 1)
    model = PhysicalStepTime(shard, constants_of(H200).efficiencies(shard))
    state = constants_of(H200).state_decodes["gdn"]
    found = [
        model.breakdown(Step(decodes=4, decode_context=context))["attention_decode"]
        for context in (4, 400_000)
    ]
    expected = 4 * 36 * (2 * 32 * 128 * 128 * 4 / (4.8e12 * state.bandwidth) + state.sequence_s)
    assert found == pytest.approx([expected, expected])


def test_what_was_not_timed_is_told() -> None:
    """There are tables of latent attention and states on Hopper, none on an A100, of Mamba-2 nowhere."""
    model = shape(replace(LATENT, count=2), replace(STATE, kind="mamba2", count=2))
    assert constants_of(H200).stand_ins(Shard(model, H200, 1)) == ["mamba2 layers as gdn"]
    assert constants_of(A100).stand_ins(Shard(model, A100, 1)) == [
        "mla layers by grouped-query attention's kernels",
        "mamba2 layers by their bytes, with the H200's launches",
    ]
    four_bits = Shard(replace(load("Llama-3.1-8B-Instruct"), linear_format="int4"), H200, 1)
    assert constants_of(H200).stand_ins(four_bits) == ["products of int4 as those of bf16"]


def test_shares_of_a_mixer_are_shares() -> None:
    with pytest.raises(InputError, match=r"by_kernel\.mixers\.bandwidth"):
        MixerCosts(prompt_compute=0.5, bandwidth=1.5)
    assert Efficiencies().mixer("mla").bandwidth == Efficiencies().kv_bandwidth


def test_ten_tokens_touch_so_many_experts() -> None:
    """128 experts, eight a token: evenly 128 (1 - (15/16)^10) = 60.9. By a power of 1.2 every token chooses
    the first ones; one token always touches eight."""
    assert touched(128, 8, 10) == pytest.approx(60.87, abs=0.01)
    assert touched(128, 8, 1, 1.2) == pytest.approx(8)
    assert 30 < touched(128, 8, 10, 1.2) < 40
    assert touched(4, 2, 1, 4.0) == pytest.approx(2)


def test_the_fullest_rank_is_waited_for() -> None:
    """NVIDIA's tables: 256 experts on eight ranks, 8,192 tokens by a power law: 1.15 and 1.63 times as long
    as evenly, with two kernels."""
    assert fullest_rank(256, 8, 8, 0.0) == fullest_rank(256, 8, 1, 1.0) == 1.0
    assert 1.15 < fullest_rank(256, 8, 8, 0.5) < fullest_rank(256, 8, 8, 0.8) < 1.63
    uneven = replace(load("MiniMax-M2.5"), expert_skew=0.8)
    split = Shard(uneven, H200, 4)
    whole = replace(split, experts=ExpertRanks(4, whole=True))
    many = 10**9  # tokens, of which as many as their mean fall on each rank
    assert whole.expert_flops(many) == pytest.approx(
        fullest_rank(256, 8, 4, 0.8) * split.expert_flops(many), rel=1e-4
    )


def test_constants_of_another_gpu_keep_latents_and_states() -> None:
    scaled = constants_of(H200)
    half = scaled.scaled(0.5)
    assert half.latent_prompts["bf16"].compute == pytest.approx(scaled.latent_prompts["bf16"].compute / 2)
    assert half.latent_decodes == scaled.latent_decodes


@pytest.mark.parametrize(("window", "chunked"), [(512, False), (450, True)])
def test_the_engine_counts_the_window_of_each_sequence(window: int, chunked: bool, tmp_path: Path) -> None:
    """Two prompts of different lengths, decoded side by side: each step takes what their own windows come to,
    not a bound of it."""
    mixers = (
        Mixer(kind="full", count=4, heads=14, kv_heads=2, head_dim=64, value_dim=64),
        Mixer(
            kind="chunked" if chunked else "sliding",
            count=20,
            heads=14,
            kv_heads=2,
            head_dim=64,
            value_dim=64,
            window=window,
        ),
    )
    workload = {
        "arrivals": {"kind": "closed_loop", "concurrency": 2},
        "num_requests": 2,
        "prompt_tokens": {"kind": "uniform", "tokens": 700, "range_ratio": 0.9},
        "output_tokens": 400,
    }
    made = Deployment.of(small(tmp_path, gpu={"name": "h100"}, workload=workload, prompts="token_ids"))
    shard = replace(made.shard, model=replace(made.model, mixers=mixers))
    step_time = PhysicalStepTime(shard, replace(made.profile.efficiencies, kv_bandwidth=0.01))
    run = simulate(replace(made, shard=shard, step_time=step_time), seed=3)
    lengths = [int(tokens) for tokens in run.requests.prompt_tokens]
    assert min(lengths) < window < max(lengths)
    together = run.steps[(run.steps.decodes == 2) & (run.steps.prefill_tokens == 0)]
    assert len(together) > 300
    ahead = (together.decode_context - sum(lengths)) % 2  # where one of them is a token ahead of the other
    for row in together[ahead == 0].itertuples():
        decoded = (row.decode_context - sum(lengths)) // 2
        contexts = [length + decoded for length in lengths]
        seen = [(c - 1) % window + 1 if chunked else min(c, window) for c in contexts]
        expected = step_time.seconds(
            WindowedStep(decodes=2, decode_context=sum(contexts), samples=2, decode_windowed=sum(seen))
        )
        assert row.duration == pytest.approx(expected, rel=1e-9)


def test_a_router_in_fp32_takes_its_time() -> None:
    """MiniMax-M2.5: 2 x 3,072 x 256 FLOPs a token in each of 62 layers, at 1/15 of the H200's 16-bit peak: 12
    ms for 8,192 tokens at the datasheet's rate."""
    model = load("MiniMax-M2.5")
    with_fp32, without = Shard(model, H200, 4), Shard(replace(model, model_type=""), H200, 4)
    more = (with_fp32.linear_flops_per_token - without.linear_flops_per_token) / with_fp32.linear_peak
    router = 62 * 2 * 3072 * 256
    assert more == pytest.approx(router * (15 / 989e12 - 1 / 1979e12))
    assert 8192 * more == pytest.approx(11.7e-3, rel=0.01)
