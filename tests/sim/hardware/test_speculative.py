"""The time and the memory of drafts, against arithmetic and vLLM's own capture sizes."""

from __future__ import annotations

import json
from typing import get_args

import pytest
from places import DATA

import servecast
from servecast.sim.engine.kv_groups import token_bytes
from servecast.sim.hardware.drafter import Drafter, Passes, eagle_shape, mtp_shape
from servecast.sim.hardware.gpu import find_gpu
from servecast.sim.hardware.model_shape import ModelShape
from servecast.sim.hardware.shard import Shard, cudagraph_capture_sizes
from servecast.sim.hardware.step_time.physical import Efficiencies, PhysicalStepTime
from servecast.sim.hardware.step_time.speculative import PASS_S, SpeculativeStepTime
from servecast.sim.inputs.errors import InputError
from servecast.sim.metrics.binding import StepRow
from servecast.sim.plan.break_even import OFF
from servecast.sim.run.simulate import simulate
from servecast.sim.scenario.deployment import Deployment
from servecast.sim.scenario.scenario import shipped_folder

H100 = find_gpu("H100")
GRID = (1, 2, 4, *range(8, 256, 8), *range(256, 513, 16))
EAGLE = {"method": "eagle3", "model": "owner/EAGLE3", "num_speculative_tokens": 3}


def shape(name: str) -> ModelShape:
    return ModelShape.from_config(shipped_folder() / "models" / f"{name}.json")


def scenario(speculative: dict[str, object], gpu: str = "H100", **engine: object) -> servecast.Scenario:
    base = servecast.load("what-if-llama-3.1-70b")
    changes: dict[str, object] = {
        "model.config": "Llama-3.1-8B-Instruct",
        "gpu.name": gpu,
        "engine": {"version": "0.32", "max_num_seqs": 32, "max_model_len": 4096, **engine}
        | {"speculative_config": speculative},
        "acceptance": 0.7,
        "workload": {
            "arrivals": {"kind": "closed_loop", "concurrency": 6},
            "num_requests": 24,
            "prompt_tokens": {"kind": "uniform", "tokens": 700, "range_ratio": 0.5},
            "output_tokens": {"kind": "fixed", "tokens": 40},
        },
        "plan": None,
        "sweep": None,
    }
    return base.changed({key: value for key, value in changes.items()})


@pytest.mark.parametrize(
    ("seqs", "drafts", "sizes"),
    [  # VllmConfig._set_cudagraph_sizes of vLLM 0.32, run on these
        (12, (3,), (1, 2, 4, *range(8, 97, 8))),
        (24, (2,), (1, 2, 3, 4, 6, *range(8, 9), 12, 16, *range(24, 145, 8))),
        (24, (1, 4), (1, 2, 4, 5, 8, 10, 16, 20, *range(24, 241, 8))),
        (64, (3,), GRID),
        (256, (2,), tuple(sorted({*GRID, 3, 6, 12, 264, 312, 360, 408, 456, 504}))),
    ],
)
def test_capture_sizes_are_vllms(seqs: int, drafts: tuple[int, ...], sizes: tuple[int, ...]) -> None:
    assert cudagraph_capture_sizes(seqs, 8192, version="0.32", capability=(9, 0), drafts=drafts) == sizes


def test_before_029_all_sizes_are_multiples_of_what_a_request_has() -> None:
    """compilation.py, adjust_cudagraph_sizes_for_spec_decode: 1, 2, 4, 8, 16 become 3, 6, 9, 18."""
    sizes = cudagraph_capture_sizes(12, 2048, version="0.24", capability=(9, 0), drafts=(2,))
    assert sizes[:4] == (3, 6, 9, 18)
    assert all(size % 3 == 0 for size in sizes)
    assert sizes[-1] <= 72


def test_a_uniform_batch_takes_the_next_multiple_of_its_tokens() -> None:
    """cudagraph_utils.py rounds each captured size up: 32 to 33 for three tokens a request; none beyond."""
    shard = Shard(shape("Llama-3.1-8B-Instruct"), H100, 1, cudagraph_sizes=(1, 2, 4, 8, 16, 24, 32, 40, 48))
    assert shard.padded(27, 9) == 33
    assert shard.padded(27) == 32
    assert shard.padded(24, 8) == 24
    assert shard.padded(48, 16) == 48
    assert shard.padded(51, 17) == 51
    assert shard.padded(30, 0) == 32


def test_verifying_is_the_arithmetic_of_its_tokens() -> None:
    """16 requests with three drafts: 64 tokens through all products, 64 rows of logits, each context read
    once, and every token's pairs with it."""
    model = shape("Llama-3.1-8B-Instruct")
    step = StepRow((), 16, 16 * 1000, 64, drafts=48)
    time = PhysicalStepTime(Shard(model, H100, 1))
    linear = 2.0 * 64 * (model.shared_weights(1)) / H100.bf16_flops
    logits = 2.0 * 64 * model.hidden_size * model.vocab_size / H100.bf16_flops
    pairs = 4.0 * 64 * 1000 * model.heads * model.head_dim * model.layers / H100.bf16_flops
    weights = 2 * (model.shared_weights(1) + model.hidden_size * model.vocab_size)
    kv = 16 * 1000 * 131072
    memory = (weights + kv) / H100.bandwidth
    assert time.roofline_seconds(step) == pytest.approx(max(linear + logits + pairs, memory), rel=1e-12)
    assert time.seconds(step) > time.roofline_seconds(step)


def test_drafting_is_one_pass_over_the_step_and_one_for_each_further_draft() -> None:
    model = shape("Llama-3.1-8B-Instruct")
    target = PhysicalStepTime(Shard(model, H100, 1))
    drafter = Drafter("eagle3", eagle_shape("eagle3", model, None))
    time = SpeculativeStepTime(target, drafter, target.efficiencies, skips=False)
    step = StepRow((), 8, 8 * 500, 32, drafts=24, drafters=8, draft_length=3)
    one = StepRow((), 8, 8 * 500, 32, drafts=24, drafters=8, draft_length=1)
    assert time.later is not None
    each = time.later.seconds(StepRow((), 8, 8 * 500, 8))
    assert each > PASS_S
    assert time.drafting(step) - time.drafting(one) == pytest.approx(2 * each)
    assert time.seconds(step) == pytest.approx(target.seconds(step) + time.drafting(step))
    assert sum(time.breakdown(step).values()) == pytest.approx(time.seconds(step))
    none = StepRow(((512, 0),), 0, 0, 0, drafters=0, draft_length=3)
    skipping = SpeculativeStepTime(target, drafter, target.efficiencies, skips=True)
    assert skipping.drafting(none) < time.drafting(none)


@pytest.mark.parametrize("gpu", ["H100", "L40S"])
@pytest.mark.parametrize("passes", get_args(Passes))
def test_never_faster_than_the_roofline(gpu: str, passes: Passes) -> None:
    model, card = shape("Qwen3-8B"), find_gpu(gpu)
    slots = 0 if passes == "one by one" else 4
    drafter = Drafter("eagle3", eagle_shape("eagle3", model, None), 1, passes, slots)
    best = Efficiencies(
        **dict.fromkeys(Efficiencies.SHARES, 1.0), overlap_exponent=1e6, kernel_s=0, host_fixed_s=0
    )
    time = SpeculativeStepTime(PhysicalStepTime(Shard(model, card, 1), best), drafter, best, skips=False)
    for decodes in (1, 7, 64, 400):
        for chunks in ((), ((300, 0), (64, 2000))):
            step = StepRow(chunks, decodes, decodes * 900, 5 * decodes, 4 * decodes, decodes, 4)
            assert time.seconds(step) >= time.roofline_seconds(step) > time.target.roofline_seconds(step)


CONFIGS = {
    "eagle3": EAGLE,
    "at once": EAGLE | {"parallel_drafting": True},
    "draft model": {"method": "draft_model", "model": "Llama-3.2-3B-Instruct", "num_speculative_tokens": 2},
    "by batch": EAGLE | {"num_speculative_tokens_per_batch_size": [[1, 3, 3], [4, 5, 1], [6, 64, 0]]},
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("gpu", ["H100", "L40S"])
def test_the_engines_core_adds_up_the_same(name: str, gpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit: a run with what the core adds up equals one in which each step is asked for."""
    deployment = Deployment.of(scenario(CONFIGS[name], gpu))
    fast = simulate(deployment)
    monkeypatch.setattr(SpeculativeStepTime, "costs", lambda self: None)
    assert simulate(deployment).steps.equals(fast.steps)
    assert fast.steps["drafts"].sum() > 0


def test_looked_up_drafts_in_the_core(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = scenario({"method": "ngram", "num_speculative_tokens": 4}).changed(
        {"acceptance": {"rate": 0.6, "proposed": 0.5}}
    )
    deployment = Deployment.of(asked)
    fast = simulate(deployment)
    monkeypatch.setattr(SpeculativeStepTime, "costs", lambda self: None)
    assert simulate(deployment).steps.equals(fast.steps)


def test_an_eagle_layer_shares_the_pool() -> None:
    """One layer as the 32 of the target: each block has 33/32 of the bytes, and the pool fewer of them."""
    with_drafts = Deployment.of(scenario(EAGLE)).memory
    plain = Deployment.of(scenario(EAGLE).changed(OFF)).memory
    assert with_drafts.bytes_per_block * 32 == plain.bytes_per_block * 33
    model = shape("Llama-3.1-8B-Instruct")
    hidden, width = model.hidden_size, model.intermediate_size
    attention = 2 * hidden * hidden + 2 * hidden * 1024
    more = 3 * hidden * hidden + hidden * (hidden + 2 * 1024)  # fc, a second input
    weights = 2 * (
        attention + 3 * hidden * width + more + (2 + 1 + 2) * hidden
    )  # norms of a layer, last, own
    (line,) = [line for line in with_drafts.lines if line.name == "drafter"]
    assert -line.bytes == weights


def test_a_draft_model_brings_all_of_its_weights_and_layers() -> None:
    deployment = Deployment.of(scenario(CONFIGS["draft model"]))
    (line,) = [line for line in deployment.memory.lines if line.name == "drafter"]
    assert -line.bytes == 2 * shape("Llama-3.2-3B-Instruct").parameters
    assert deployment.memory.bytes_per_block == 16 * (131072 + 114688)


def test_a_drafter_on_one_rank_keeps_all_heads_on_each() -> None:
    target = Shard(shape("Llama-3.1-70B-Instruct"), H100, 4)
    small = shape("Llama-3.1-8B-Instruct")
    whole = Drafter("draft_model", small, 1, own_embeddings=True, own_head=True)
    split = Drafter("draft_model", small, 4, own_embeddings=True, own_head=True)
    assert whole.kv_bytes_per_token(target) == 131072 == 4 * split.kv_bytes_per_token(target)
    assert whole.weight_bytes(target) == 2 * small.parameters
    assert split.weight_bytes(target) < whole.weight_bytes(target) / 3.9
    (layer,) = split.cache_layers(target)
    assert token_bytes(layer, 4, 2) == 2 * 2 * 128 * 2


@pytest.mark.parametrize("name", ["DeepSeek-V3", "GLM-5", "GLM-4.7-Flash"])
def test_mtp_is_the_last_layer_and_a_product(name: str) -> None:
    """The parameters of the checkpoint's module beside its embeddings and head, which are the target's:
    DeepSeek-V3's come to the 11.5 billion that its README tells (14 with both)."""
    configs = json.loads((DATA / "model_configs" / "configs.json").read_text())
    target = ModelShape.from_config(configs[name]["config"], name)
    layer = mtp_shape(target)
    tables = layer.vocab_size * layer.hidden_size * 2
    assert layer.parameters - tables == target.mtp_parameters
    drafter = Drafter("mtp", layer)
    assert (len(drafter.cache_layers(Shard(target, H100, 1))), layer.layers) == (len(target.cache_layers), 1)
    if name == "DeepSeek-V3":
        assert 11.4e9 < target.mtp_parameters < 11.7e9


def test_without_such_a_layer_it_is_refused() -> None:
    with pytest.raises(InputError, match="no layers for multi-token prediction"):
        mtp_shape(shape("Qwen3-8B"))
