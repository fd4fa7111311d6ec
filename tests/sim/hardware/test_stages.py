"""Pipeline stages of a model: their layers, weights, KV blocks and times."""

from __future__ import annotations

from dataclasses import replace

import pytest
from model_shapes import load

from servecast.sim.engine.config import EngineConfig
from servecast.sim.hardware.gpu import find_gpu
from servecast.sim.hardware.memory import kv_memory
from servecast.sim.hardware.shard import Shard, layers_of_stages
from servecast.sim.hardware.step_time.physical import PhysicalStepTime
from servecast.sim.hardware.step_time.pipeline import PipelinedStepTime
from servecast.sim.metrics.binding import StepRow

LLAMA, HIDDEN, VOCABULARY = "Llama-3.1-70B-Instruct", 8192, 128256
LAYER = HIDDEN * (2 * HIDDEN + 2 * 1024) + 3 * HIDDEN * 28672 + 2 * HIDDEN  # of its config.json
TOKENS = 256


def staged(stages: int, *, tensor: int = 1, model: str = LLAMA) -> Shard:
    shape = load(model)
    return Shard(shape, find_gpu("h100"), tensor, pipeline=layers_of_stages(shape.layers, stages))


@pytest.mark.parametrize(
    ("layers", "stages", "split"),
    # vllm.distributed.utils.get_pp_indices, called for each rank
    [(80, 4, (20, 20, 20, 20)), (61, 4, (15, 15, 16, 15)), (62, 4, (15, 16, 16, 15)), (32, 3, (11, 11, 10))],
)
def test_layers_are_shared_out_as_by_vllm(layers: int, stages: int, split: tuple[int, ...]) -> None:
    assert layers_of_stages(layers, stages) == split


def test_weights_of_stages() -> None:
    """Embeddings in the first stage, the LM head in the last, layers alike in all."""
    first, middle, _, last = staged(4).stages
    table = VOCABULARY * HIDDEN
    assert middle.weight_bytes == 2 * (20 * LAYER + HIDDEN)
    assert first.weight_bytes == last.weight_bytes == middle.weight_bytes + 2 * table


def test_tied_embeddings_are_in_both_ends() -> None:
    """Llama's __init__: "is_first_rank or (tie_word_embeddings and is_last_rank)"."""
    first, middle, last = staged(3, model="Qwen2.5-0.5B-Instruct").stages
    table = 2 * 151936 * 896
    assert first.weight_bytes - middle.weight_bytes == last.weight_bytes - middle.weight_bytes == table


def test_layers_that_differ_stay_where_they_stand() -> None:
    """Kimi-K2.5: 61 layers, the first of which has a dense MLP."""
    stages = [shard.model for shard in staged(4, model="Kimi-K2.5").stages]
    assert [(stage.layers, stage.moe_layers, stage.dense_layers) for stage in stages] == [
        (15, 14, 1),
        (15, 15, 0),
        (16, 16, 0),
        (15, 15, 0),
    ]
    # gpt-oss: every other layer has a window, 36 in three stages
    windows = [shard.model.sliding_layers for shard in staged(3, model="gpt-oss-120b").stages]
    assert windows == [6, 6, 6]


def test_the_pool_is_that_of_the_stage_with_the_fewest_blocks() -> None:
    """A token takes as many bytes as its layers; the last stage has logits and their sampler beside."""
    config = EngineConfig("0.32", 256, 2048, 8192)
    shard = staged(4)
    whole = kv_memory(shard, config, version="0.32")
    alone = [kv_memory(stage, config, version="0.32") for stage in shard.stages]
    assert whole.num_gpu_blocks == min(memory.num_gpu_blocks for memory in alone)
    assert {memory.bytes_per_block for memory in alone} == {16 * 20 * 2 * 8 * 128 * 2}
    assert alone[1].num_gpu_blocks > alone[3].num_gpu_blocks
    assert any("pipeline stage" in line.note for line in whole.lines)


def times(shard: Shard, *, per_node: int = 8) -> PipelinedStepTime:
    return PipelinedStepTime(tuple(PhysicalStepTime(each) for each in shard.stages), 50e9, per_node)


@pytest.mark.parametrize("tensor", [1, 2])
def test_activations_go_from_stage_to_stage(tensor: int) -> None:
    """Hidden states and residual in 16 bits: each rank sends its part over NVLink (450 GB/s) or, to another
    node, over its own port, and the ranks behind gather the parts; at 80 % of the link as all exchanges."""
    shard = staged(4, tensor=tensor)
    link = shard.gpu.link_bandwidth
    assert link is not None
    size = 2 * TOKENS * HIDDEN * 2
    gathered = 2 * (10e-6 + size / 4 / (0.8 * link)) if tensor == 2 else 0.0
    inside, beyond = (times(shard, per_node=each).hand_over(0, TOKENS) for each in (8, 1))
    assert inside == pytest.approx(10e-6 + size / tensor / (0.8 * link) + gathered)
    assert beyond == pytest.approx(20e-6 + size / tensor / (0.8 * 50e9) + gathered)


def test_stages_share_out_the_work_of_one_server() -> None:
    """Two stages do what one server with all layers does, but for what each step costs on every stage: the
    host, and activations on their way."""
    step = StepRow([(TOKENS, 0)], 16, 16 * 500, 17)
    shard = staged(2)
    parts = times(shard).breakdown(step)
    whole = PhysicalStepTime(replace(shard, pipeline=())).breakdown(step)
    for name in (
        "linear",
        "elementwise",
        "attention_prefill",
        "attention_decode",
        "lm_head",
        "sampler",
        "kernels",
    ):
        assert parts[name] == pytest.approx(whole[name], rel=1e-9), name
    assert parts["host"] == pytest.approx(2 * whole["host"])
    assert sum(parts.values()) == pytest.approx(times(shard).seconds(step))
