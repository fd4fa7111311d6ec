"""The physical step time: never faster than its roofline, monotone, and the sum of its parts."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from step_cases import DEPLOYMENTS, SHAPES, Step, decode, efficiencies, steps

from servecast.sim.hardware.gpu import find_gpu
from servecast.sim.hardware.shard import Shard, cudagraph_capture_sizes
from servecast.sim.hardware.step_time.physical import (
    Efficiencies,
    PhysicalStepTime,
    smooth_maximum,
)
from servecast.sim.inputs.errors import InputError

SIZES = cudagraph_capture_sizes(256, 2048, version="0.23", capability=(8, 9))
TENSOR_PARALLEL = {
    name: [
        tp
        for tp in (1, 2, 4, 8)
        if shape.heads % tp == 0
        and (shape.kv_heads % tp == 0 or tp % shape.kv_heads == 0)
        and not (shape.weight_block and shape.expert_intermediate_size // tp % shape.weight_block)
    ]
    for name, shape in SHAPES.items()
}


IDEAL = Efficiencies(1, 1, 1, 1, 1e6, 0, 0, 0, 0, 1, 0)  # full rates, no fixed costs


@st.composite
def models(draw: st.DrawFn) -> PhysicalStepTime:
    name, gpu = draw(st.sampled_from(DEPLOYMENTS))
    return PhysicalStepTime(
        Shard(
            SHAPES[name],
            gpu,
            tensor_parallel_size=draw(st.sampled_from(TENSOR_PARALLEL[name])),
            cudagraph_sizes=draw(st.sampled_from(((), SIZES))),
            kv_dtype_bytes=draw(st.sampled_from((1, 2))),
        ),
        draw(efficiencies | st.just(IDEAL)),
    )


@settings(max_examples=400, deadline=None)
@given(models(), steps())
def test_never_faster_than_the_roofline(model: PhysicalStepTime, step: Step) -> None:
    assert model.seconds(step) >= model.roofline_seconds(step) * (1 - 1e-12)
    assert (model.roofline_seconds(step) > 0) == bool(step.chunks or step.decodes)


@settings(max_examples=200, deadline=None)
@given(models(), steps(), st.integers(1, 4096), st.integers(0, 3))
def test_more_work_never_takes_less(model: PhysicalStepTime, step: Step, more: int, which: int) -> None:
    if which == 0 and step.decodes:
        larger = replace(step, decode_context=step.decode_context + more)
    elif which == 1 and step.chunks:
        (tokens, context), *rest = step.chunks
        larger = replace(step, chunks=((tokens + more, context), *rest))
    elif which == 2 and step.chunks:
        (tokens, context), *rest = step.chunks
        larger = replace(step, chunks=((tokens, context + more), *rest))
    else:
        larger = replace(
            step,
            decodes=step.decodes + 1,
            decode_context=step.decode_context + more,
            samples=step.samples + 1,
        )
    assert model.seconds(larger) >= model.seconds(step) * (1 - 1e-12)
    assert model.roofline_seconds(larger) >= model.roofline_seconds(step) * (1 - 1e-12)


@settings(max_examples=100, deadline=None)
@given(models(), steps())
def test_the_parts_add_up(model: PhysicalStepTime, step: Step) -> None:
    parts = model.breakdown(step)
    assert sum(parts.values()) == pytest.approx(model.seconds(step), rel=1e-12)
    assert all(seconds >= 0 for seconds in parts.values())


@settings(max_examples=50, deadline=None)
@given(st.lists(steps(), min_size=2, max_size=5))
@example([decode(8), Step(chunks=((8, 0),), samples=1), decode(1)])
def test_earlier_steps_do_not_change_later_ones(sequence: list[Step]) -> None:
    used = PhysicalStepTime(Shard(SHAPES["Qwen3-4B"], find_gpu("L4"), 1, cudagraph_sizes=SIZES))
    for step in [*sequence, *sequence]:
        fresh = PhysicalStepTime(Shard(SHAPES["Qwen3-4B"], find_gpu("L4"), 1, cudagraph_sizes=SIZES))
        assert used.seconds(step) == fresh.seconds(step)


def test_at_full_efficiency_a_decode_step_is_its_roofline() -> None:
    model = PhysicalStepTime(Shard(SHAPES["Llama-3.1-8B-Instruct"], find_gpu("A100"), 1), IDEAL)
    step = decode(1)
    weights = model.shard.linear_bytes(1) + model.shard.lm_head_bytes
    expected = (weights + 500 * 131_072) / 2039e9
    assert model.roofline_seconds(step) == pytest.approx(expected, rel=1e-12)
    assert model.seconds(step) == pytest.approx(expected, rel=5e-3)  # elementwise and sampler traffic on top


def test_an_idle_step_takes_no_time() -> None:
    model = PhysicalStepTime(Shard(SHAPES["Qwen3-4B"], find_gpu("L4"), 1))
    assert model.seconds(Step()) == model.roofline_seconds(Step()) == 0.0
    assert model.breakdown(Step()) == {}


def test_a6000_decode_bend() -> None:
    """Reported TPOT of Qwen2.5-7B: flat at 22 ms to a batch of 8, then a bend from bandwidth to compute. The
    typical constants know nothing of that table: they must be right while weights bind, and bend."""
    model = PhysicalStepTime(
        Shard(SHAPES["Qwen2.5-7B-Instruct"], find_gpu("A6000"), 1, cudagraph_sizes=SIZES)
    )
    at = {batch: 1e3 * model.seconds(decode(batch, 66)) for batch in (2, 4, 8, 64, 128, 256)}
    assert at[2] == pytest.approx(22.0, rel=0.03)
    assert at[8] == pytest.approx(22.3, rel=0.03)
    assert at[256] - at[128] > 2 * (at[128] - at[64]) > 0
    assert [model.binding(decode(batch, 66)) for batch in (8, 256)] == ["memory_bandwidth", "compute"]


def test_what_binds() -> None:
    small = PhysicalStepTime(
        Shard(SHAPES["Qwen2.5-0.5B-Instruct"], find_gpu("H200"), 1), Efficiencies(host_fixed_s=5e-3)
    )
    assert small.binding(decode(1)) == "host"
    split = PhysicalStepTime(
        Shard(SHAPES["Qwen2.5-7B-Instruct"], find_gpu("L4"), 2), Efficiencies(allreduce_s=1e-3)
    )
    assert split.binding(decode(1)) == "interconnect"
    large = PhysicalStepTime(Shard(SHAPES["Qwen2.5-7B-Instruct"], find_gpu("A100"), 1))
    assert large.binding(Step(chunks=((2048, 0),), samples=1)) == "compute"
    assert large.binding(decode(64, 8000)) == "memory_bandwidth"


def test_steps_are_padded_to_cuda_graphs() -> None:
    graphs = PhysicalStepTime(
        Shard(SHAPES["Qwen2.5-7B-Instruct"], find_gpu("A6000"), 1, cudagraph_sizes=SIZES)
    )
    eager = PhysicalStepTime(Shard(SHAPES["Qwen2.5-7B-Instruct"], find_gpu("A6000"), 1))
    for padded, exact in (((9, 16)), (250, 256), (257, 272), (500, 512)):
        shown = graphs.breakdown(Step(decodes=padded, decode_context=0, samples=padded))["linear"]
        assert shown == eager.breakdown(Step(decodes=exact, decode_context=0, samples=exact))["linear"]
    beyond = Step(chunks=((513, 0),), samples=1)
    assert graphs.seconds(beyond) == eager.seconds(beyond)


def test_capture_sizes() -> None:
    assert len(SIZES) == 51
    assert SIZES[:6] == (1, 2, 4, 8, 16, 24)
    assert SIZES[-2:] == (496, 512)
    assert cudagraph_capture_sizes(12, 2048, version="0.23", capability=(9, 0)) == (1, 2, 4, 8, 16, 24)
    assert cudagraph_capture_sizes(12, 2048, version="0.32", capability=(9, 0)) == (1, 2, 4, 8, 12, 16, 24)
    assert cudagraph_capture_sizes(1024, 8192, version="0.32", capability=(10, 0))[-1] == 1024
    assert cudagraph_capture_sizes(1024, 100, version="0.23", capability=(10, 0))[-2:] == (96, 100)
    assert cudagraph_capture_sizes(256, 2048, version="0.23", capability=(8, 9), max_capture_size=4) == (
        1,
        2,
        4,
    )
    with pytest.raises(InputError, match="'latest' is no vLLM version"):
        cudagraph_capture_sizes(1, 1, version="latest", capability=(9, 0))


def test_only_sampled_rows_pay_for_the_vocabulary() -> None:
    model = PhysicalStepTime(Shard(SHAPES["gemma-3-1b-it"], find_gpu("L4"), 1))
    middle, last = Step(chunks=((512, 0),)), Step(chunks=((512, 0),), samples=1)
    assert "lm_head" not in model.breakdown(middle)
    head = 262_144 * 1152 * 2 / 300e9
    assert model.seconds(last) - model.seconds(middle) > head


def test_flash_attention_2_pads_decodes_beside_chunks() -> None:
    for name, pays in (("A6000", True), ("RTX 5080", True), ("H100", False)):
        model = PhysicalStepTime(Shard(SHAPES["Llama-3.1-8B-Instruct"], find_gpu(name), 1))
        alone = model.breakdown(decode(64, 4096))["attention_decode"]
        beside = model.breakdown(replace(decode(64, 4096), chunks=((16, 0),)))["attention_decode"]
        assert (beside > 1.3 * alone) == pays


def test_one_short_chunk_on_a_long_context_is_bound_by_its_thread_blocks() -> None:
    model = PhysicalStepTime(Shard(SHAPES["Llama-3.1-8B-Instruct"], find_gpu("RTX 4090"), 1))
    seconds = [model.breakdown(Step(chunks=((n, 16_384),)))["attention_prefill"] for n in (16, 64, 128)]
    assert seconds[0] == seconds[1] == seconds[2]
    assert seconds[0] / 32 == pytest.approx(520e-6, rel=0.15)  # measured per layer


def test_many_short_chunks_read_their_older_kv() -> None:
    model = PhysicalStepTime(Shard(SHAPES["Llama-3.1-8B-Instruct"], find_gpu("A100"), 1), IDEAL)
    step = Step(chunks=((1, 10_000),) * 64, samples=64)
    read = 64 * 10_000 * 131_072 / 2039e9
    assert model.breakdown(step)["attention_prefill"] == pytest.approx(read, rel=1e-3)


def test_tensor_parallel_ranks_pay_for_all_reduces() -> None:
    model = PhysicalStepTime(Shard(SHAPES["Llama-3.1-70B-Instruct"], find_gpu("H100"), 4))
    parts = model.breakdown(decode(8))
    assert parts["all_reduce"] == pytest.approx(161 * 10e-6, rel=0.2)
    assert parts["linear"] == pytest.approx(137e9 / 4 / (3350e9 * 0.88), rel=0.05)


def test_smooth_maximum() -> None:
    assert smooth_maximum(3.0, 4.0, 2.0) == pytest.approx(5.0)
    assert smooth_maximum(3.0, 4.0, 1e6) == 4.0
    assert smooth_maximum(0.0, 0.0, 2.0) == 0.0
    assert smooth_maximum(0.0, 2.0, 1.0) == 2.0


@pytest.mark.parametrize("name", Efficiencies.parameters())
@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
def test_impossible_efficiencies_are_refused(name: str, value: float) -> None:
    with pytest.raises(InputError, match=f"efficiencies.{name}"):
        Efficiencies(**{name: value})


def test_nothing_beats_the_datasheet() -> None:
    with pytest.raises(InputError, match=r"compute is 1\.01.*nothing beats the datasheet"):
        Efficiencies(compute=1.01)


def test_a_prompt_outside_the_graphs_is_never_faster_than_the_host_launches_its_kernels() -> None:
    """24 layers of 1 ms each: 24 ms for 600 tokens, of which the GPU's part is shorter; a step of 8 decodes,
    in a graph of 8, is not bound by it."""
    shard = Shard(SHAPES["Qwen2.5-0.5B-Instruct"], find_gpu("H100"), 1, cudagraph_sizes=(1, 2, 4, 8))
    free, bound = (PhysicalStepTime(shard, Efficiencies(eager_layer_s=each)) for each in (0.0, 1e-3))
    prompt = Step(chunks=((600, 0),), samples=1)
    assert free.seconds(prompt) < 24e-3
    assert bound.seconds(prompt) == pytest.approx(24e-3)
    assert sum(bound.breakdown(prompt).values()) == pytest.approx(24e-3)
    assert bound.binding(prompt) == "host"
    assert bound.seconds(decode(8)) == free.seconds(decode(8))
    without = PhysicalStepTime(replace(shard, cudagraph_sizes=()), Efficiencies(eager_layer_s=1e-3))
    assert without.seconds(decode(8)) == pytest.approx(24e-3)  # --enforce-eager
    experts = Shard(SHAPES["Qwen3-30B-A3B"], find_gpu("H100"), 1, cudagraph_sizes=(1, 2, 4, 8))
    launched = PhysicalStepTime(experts, Efficiencies(eager_layer_s=1e-3)).seconds(prompt)
    assert launched == pytest.approx(48 * 1.7e-3)  # 17 kernels a layer, with q and k norms and experts


def test_norms_over_all_heads_cost_a_small_all_reduce_a_layer() -> None:
    """62 layers; 8 bytes a token, so little more than the latency."""
    together, efficiencies = SHAPES["MiniMax-M2.5"], Efficiencies(allreduce_s=10e-6)
    apart = replace(together, qk_norm_over_ranks=False)
    seconds = [
        PhysicalStepTime(Shard(shape, find_gpu("H200"), 4), efficiencies).seconds(decode(8))
        for shape in (together, apart)
    ]
    assert seconds[0] - seconds[1] == pytest.approx(62 * 10e-6, rel=0.02)
