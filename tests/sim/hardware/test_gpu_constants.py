"""Whose kernels stand for a GPU that was not timed, and what its power makes of them."""

from __future__ import annotations

import pytest

from servecast.sim.hardware.gpu import CATALOGUE, find_gpu
from servecast.sim.hardware.gpu_constants import GpuConstants, compute_factor, nearest_timed
from servecast.sim.scenario.basis import constants_of, timed_gpus


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
