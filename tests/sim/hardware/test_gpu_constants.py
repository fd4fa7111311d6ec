"""Whose kernels stand for a GPU that was not timed, and what its power makes of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from model_shapes import load as load_shape
from small_scenarios import small

from servecast.sim.hardware.gpu import CATALOGUE, find_gpu
from servecast.sim.hardware.gpu_constants import GpuConstants, compute_factor, nearest_timed
from servecast.sim.hardware.shard import Shard
from servecast.sim.inputs.errors import InputError
from servecast.sim.metrics.binding import StepRow
from servecast.sim.scenario.basis import constants_of, timed_gpus
from servecast.sim.scenario.deployment import Deployment
from servecast.sim.scenario.scenario import load


@pytest.mark.parametrize(
    ("gpu", "timed"),
    [
        ("h100", "H100"),
        ("h100-pcie", "H100"),
        ("h100-nvl", "H100"),
        ("h20", "H100"),
        ("a100-pcie", "A100"),
        ("l4", "L40S"),
        ("a10g", "L40S"),
        ("rtx-5090", "RTX PRO 6000"),
        ("mi300x", "H200"),
        ("t4", "L40S"),
    ],
)
def test_the_nearest_is_of_the_same_generation(gpu: str, timed: str) -> None:
    found = nearest_timed(find_gpu(gpu), timed_gpus())
    assert found is not None
    assert found.name == timed


def test_every_gpu_of_the_catalogue_has_constants() -> None:
    for gpu in CATALOGUE:
        found = constants_of(gpu)
        shares = [each.compute for kind in (found.products, found.prompts) for each in kind.values()]
        assert 0.25 < min(shares) <= max(shares) <= 1


@pytest.mark.parametrize(
    ("gpu", "reached", "within"),
    [
        ("h100-nvl", 0.60, 0.1),  # a bf16 product on one, whose peak takes 0.68 of an SXM's watts a FLOP/s
        ("rtx-4090", 0.96, 0.02),  # fitted to the layer times of Llama-3.1-8B: the shipped profile
        ("a6000", 0.57, 0.02),  # fitted to a report: the shipped profile
        ("mi300x", 0.45, 0.01),
    ],
)
def test_compute_goes_by_power(gpu: str, reached: float, within: float) -> None:
    assert constants_of(find_gpu(gpu)).products["bf16"].compute == pytest.approx(reached, rel=within)


def test_what_was_timed_stays_as_it_was_measured() -> None:
    for gpu, file in timed_gpus().items():
        assert constants_of(gpu) == GpuConstants.load(file)
        assert compute_factor(gpu, gpu, 0.8) == 1


def all_reduce(gpu: dict[str, Any], ranks: int = 2) -> tuple[float, Deployment]:
    """Seconds of one of the all-reduces of a decode step of 32 layers, and the deployment."""
    overrides = {"profile": None, "gpu": gpu, "engine.tensor_parallel_size": ranks}
    made = Deployment.of(load("what-if-llama-3.1-70b", overrides | {"model.config": "Llama-3.1-8B-Instruct"}))
    rows = made.shard.padded(32)
    parts = made.step_time.breakdown(StepRow(chunks=(), decodes=rows, decode_context=rows * 9, samples=0))
    return parts["all_reduce"] / (2 * 32), made


def test_pcie_without_peers_goes_through_the_host() -> None:
    """16 GB/s and 20 us between two RTX PRO 6000; half of a 4,096 x 2 byte row is sent twice."""
    seconds, made = all_reduce({"name": "rtx-pro-6000"})
    size = made.shard.padded(32) * 4096 * 2
    assert seconds == pytest.approx(20e-6 + size / 16e9, rel=1e-6)
    origins = {entry.parameter: (entry.origin, entry.note) for entry in made.profile.provenance}
    assert origins["efficiencies.link"] == ("assumed", "PCIe without peer-to-peer")
    peers, made = all_reduce({"name": "rtx-pro-6000", "peer_to_peer": True})
    timed = GpuConstants.load(timed_gpus()[find_gpu("rtx-pro-6000")]).all_reduce[2]
    assert peers == pytest.approx(timed.by_size[size], rel=1e-6)
    origins = {entry.parameter: (entry.origin, entry.note) for entry in made.profile.provenance}
    assert origins["efficiencies.link"][0] == "kernels"


@pytest.mark.parametrize(("tokens", "microseconds"), [(32, 11.99), (48, (11.99 + 14.97) / 2), (64, 14.97)])
def test_all_reduces_take_what_was_timed_at_their_size(tokens: int, microseconds: float) -> None:
    """NVIDIA's table, eight H100: 11.99 us of 512 KiB, 14.97 of 1 MiB, where 32 to 64 tokens of Llama-70B
    lie; a straight line through all sizes says 9 and 12."""
    overrides = {"profile": None, "gpu.name": "h100", "engine.tensor_parallel_size": 8}
    made = Deployment.of(load("what-if-llama-3.1-70b", overrides))
    parts = made.step_time.breakdown(StepRow(chunks=(), decodes=tokens, decode_context=tokens * 9, samples=0))
    assert parts["all_reduce"] / (2 * 80) == pytest.approx(microseconds * 1e-6, rel=0.01)


def test_a_slower_link_stretches_what_is_more_than_the_latency() -> None:
    """H20 from the H100's timings: both have 450 GB/s; at half of it 14.97 us become 5.6 + 2 x 9.4."""
    constants = GpuConstants.load(timed_gpus()[find_gpu("h100")])
    half = replace(find_gpu("h20"), link_bandwidth=225e9)
    costs = constants.efficiencies(Shard(load_shape("Llama-3.1-70B-Instruct"), half, 8)).by_kernel
    assert costs is not None
    timed = constants.all_reduce[8].by_size
    assert dict(costs.all_reduce)[1 << 20] == pytest.approx(2 * timed[1 << 20] - timed[4096])


def test_a_scenario_may_say_what_the_link_gives() -> None:
    gpu = {"name": "h100", "link_share": 0.5, "allreduce_latency_us": 7}
    seconds, made = all_reduce(gpu)
    assert seconds == pytest.approx(7e-6 + made.shard.padded(32) * 4096 * 2 / (450e9 * 0.5), rel=1e-6)
    given = [entry.parameter for entry in made.profile.provenance if entry.origin == "given"]
    assert given == ["efficiencies.allreduce_s", "efficiencies.link"]


def test_ranks_beyond_a_node_are_refused_with_the_reason() -> None:
    with pytest.raises(InputError, match="16 ranks are more than the 8 GPUs that are linked") as caught:
        all_reduce({"name": "gb200"}, 16)
    assert "all-reduces between nodes are not modelled" in str(caught.value)
    _, made = all_reduce({"name": "gb200", "per_node": 72}, 16)
    assert made.shard.tensor_parallel_size == 16


def test_constants_of_ones_own_are_a_profile(tmp_path: Path) -> None:
    data = json.loads(timed_gpus()[find_gpu("h100")].read_text())
    data["products"]["bf16"]["compute"] = 0.5
    (tmp_path / "own.json").write_text(json.dumps(data))
    scenario = small(tmp_path, gpu={"name": "h100"}, profile="own.json")
    made = Deployment.of(scenario)
    assert made.profile.efficiencies.compute == 0.5
    assert made.transfer.basis == "measured kernels of the H100"
    away = Deployment.of(scenario.changed({"gpu.name": "h200"}))
    assert away.transfer.basis == "kernels of the H100 scaled to the H200 by peak and bandwidth"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"decodes": {}},
            "own.json: is no file of a GPU's constants (.*decodes of a bf16 KV cache are missing",
        ),
        ({"gpu": "H900"}, "own.json: gpu: GPU 'H900' is not in the catalogue"),
        (
            {"products": {"bf16": {"compute": 2}}},
            "products.bf16.compute: Input should be less than or equal to 1",
        ),
        ({"speed": 3}, "speed: Extra inputs are not permitted"),
    ],
)
def test_a_file_of_constants_that_is_wrong_is_told_in_one_message(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    data = json.loads(timed_gpus()[find_gpu("h100")].read_text()) | change
    (tmp_path / "own.json").write_text(json.dumps(data))
    with pytest.raises(InputError, match=message.replace("(", r"\(")):
        Deployment.of(small(tmp_path, gpu={"name": "h100"}, profile="own.json"))
