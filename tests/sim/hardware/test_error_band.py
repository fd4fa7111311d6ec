"""What a prediction rests on, and a band that widens with the distance from what was measured."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
from model_shapes import load as shape

from servecast.sim.hardware.error_band import GPU_BAND, MODEL_BAND, PER_RANK_DOUBLING, TYPICAL_BAND, transfer
from servecast.sim.hardware.fit_summary import FitSummary, RegionError
from servecast.sim.hardware.gpu import find_gpu
from servecast.sim.hardware.profile import Profile, Provenance
from servecast.sim.hardware.shard import Shard
from servecast.sim.inputs.errors import InputError
from servecast.sim.metrics.binding import StepRow
from servecast.sim.scenario.deployment import Deployment
from servecast.sim.scenario.scenario import load

SEVEN = shape("Qwen2.5-7B-Instruct")
A6000, H200 = find_gpu("a6000"), find_gpu("h200")
MEASURED = Profile(
    servecast_version="0.1.0",
    gpu="A6000",
    model=SEVEN.name,
    models=(SEVEN,),
    engine_version="0.23",
    error_band=0.06,
    provenance=(Provenance(parameter="efficiencies.compute", origin="fitted"),),
)


def test_at_home_the_band_is_the_fit_s_own() -> None:
    found = transfer(MEASURED, Shard(SEVEN, A6000, 1))
    assert (found.basis, found.error_band, found.distance) == ("measured here", 0.06, ())
    to_report = MEASURED.model_copy(update={"fitted_rows": ("8",)})
    assert transfer(to_report, Shard(SEVEN, A6000, 1)).basis == "fitted to a report"


def test_a_profile_of_typical_values_is_physics_only() -> None:
    typical = Profile.typical("A6000", SEVEN.name, "0.23", servecast_version="0.1.0")
    found = transfer(typical, Shard(SEVEN, A6000, 1))
    assert (found.basis, found.error_band) == ("physics only", TYPICAL_BAND)
    assert found.distance == ("nothing was measured",)


def test_each_step_away_widens_the_band() -> None:
    """Model, larger model, ranks, GPU: each more than the one before."""
    larger, largest = shape("Qwen2.5-32B-Instruct"), shape("Llama-3.1-70B-Instruct")
    steps = [
        transfer(MEASURED, Shard(SEVEN, A6000, 1)),
        transfer(MEASURED, Shard(larger, A6000, 1)),
        transfer(MEASURED, Shard(largest, A6000, 1)),
        transfer(MEASURED, Shard(largest, A6000, 4)),
        transfer(MEASURED, Shard(largest, H200, 4)),
    ]
    bands = [step.error_band for step in steps]
    assert bands == sorted(bands)
    assert len(set(bands)) == len(bands)
    assert {step.basis for step in steps[1:]} == {"scaled from a measured reference"}
    assert steps[1].error_band is not None
    assert steps[1].error_band > MODEL_BAND
    assert steps[-1].error_band is not None
    assert steps[-1].error_band > GPU_BAND
    assert steps[-1].distance == (
        "another model, 9.3 times the weights",
        "4 times the ranks",
        "another GPU, 6.3 times the bandwidth",
    )


def test_ranks_alone_are_a_distance() -> None:
    found = transfer(MEASURED, Shard(SEVEN, A6000, 4))
    assert found.error_band == pytest.approx(1.5 * 0.06 + 2 * PER_RANK_DOUBLING)
    assert found.distance == ("4 times the ranks",)


def test_what_leaving_a_model_out_showed_takes_the_place_of_the_assumed_width() -> None:
    left_out = RegionError(region="m", rows=40, error=0.02, bias=0.0, noise=0.01, held_out_p90=0.11)
    tested = MEASURED.model_copy(update={"fit": FitSummary(transfer=(left_out,))})
    other = shape("Llama-3.1-8B-Instruct")
    known, assumed = transfer(tested, Shard(other, A6000, 1)), transfer(MEASURED, Shard(other, A6000, 1))
    assert known.error_band is not None
    assert assumed.error_band is not None
    assert 0.11 <= known.error_band < 0.13
    assert assumed.error_band - known.error_band == pytest.approx(MODEL_BAND - 0.11)


def test_the_nearest_of_several_models_counts() -> None:
    two = MEASURED.model_copy(update={"models": (SEVEN, shape("Qwen2.5-0.5B-Instruct"))})
    other = shape("Llama-3.1-8B-Instruct")
    assert transfer(two, Shard(other, A6000, 1)).model_doublings == pytest.approx(
        math.log2(8.03 / 7.62), abs=0.02
    )
    assert transfer(two, Shard(shape("Qwen2.5-0.5B-Instruct"), A6000, 1)).basis == "measured here"


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model.config": "Qwen2.5-32B-Instruct", "engine.tensor_parallel_size": 2},
        {"gpu.name": "h200"},
        {"engine.tensor_parallel_size": 8},
    ],
)
def test_the_shipped_what_if_says_what_it_rests_on(changes: dict[str, Any]) -> None:
    deployment = Deployment.of(load("what-if-llama-3.1-70b", changes))
    rests = json.loads(json.dumps(deployment.provenance()))
    assert rests["basis"] == "scaled from a measured reference"
    assert rests["profile"] == "Qwen/Qwen2.5-7B-Instruct on A6000, vLLM 0.23"
    assert rests["distance"]
    assert rests["error_band"] == deployment.error_band
    assert rests["error_bands"]["ttft"] > rests["error_bands"]["tpot"] == rests["error_band"]
    assert "max_rate" in rests["error_bands"]["guessed"]
    assert deployment.error_band is not None
    assert deployment.error_band > 0.2
    assert deployment.config.num_gpu_blocks > 500


def test_kernels_are_the_basis_where_no_profile_is_named() -> None:
    """Of the GPU itself, of the nearest of its compute capability, or, where none is near, physics."""
    scenario = load("what-if-llama-3.1-70b", {"profile": None, "engine.tensor_parallel_size": 8})
    for gpu, basis in (
        ("h100", "measured kernels of the H100"),
        ("a6000", "kernels of the L40S scaled to the A6000 by peak and bandwidth"),
    ):
        made = Deployment.of(scenario.changed({"gpu.name": gpu}))
        assert made.transfer.basis == basis
        assert "kernels were timed, no server" in made.transfer.distance
    asked = Deployment.of(scenario.changed({"gpu.name": "h100", "profile": "physics"}))
    assert asked.transfer.basis == "physics only"
    assert not asked.notes


def test_a_gpu_that_none_is_near_is_physics_and_says_why(tmp_path: Any) -> None:
    replace(H200, name="mine", capability=(3, 5)).save(tmp_path / "gpu.json")
    scenario = load(
        "what-if-llama-3.1-70b",
        {"profile": None, "engine.tensor_parallel_size": 8, "engine.dtype": "float16"},
    )
    own = scenario.changed({"gpu": {"file": str(tmp_path / "gpu.json")}})
    made = Deployment.of(own)
    assert made.transfer.basis == "physics only"
    assert made.notes == (
        "no kernels of a mine were timed, nor of a GPU near it: typical efficiencies stand in",
    )
    with pytest.raises(InputError, match="no kernels of a mine were timed"):
        Deployment.of(own.changed(profile="kernels"))


def test_a_profile_of_the_same_gpu_is_named_with_what_it_would_change() -> None:
    """Efficiencies of both are known: a decode step of the fitted profile over the kernels' own."""
    scenario = load("llmd-4x-llama-3.1-70b-tp4-h100")
    fitted, kernels = Deployment.of(scenario), Deployment.of(scenario.changed(profile=None))
    (note,) = [note for note in kernels.notes if note.startswith("profile ")]
    assert note.startswith("profile llmd-4x-llama-3.1-70b-tp4-h100 was fitted to a server on this GPU")
    assert "tensor_parallel_size 4, vLLM 0.10, enforce_eager" in note
    step = StepRow(chunks=(), decodes=32, decode_context=32 * 1024, samples=32)
    ratio = fitted.step_time.seconds(step) / kernels.step_time.seconds(step)
    assert f"32 decodes take {ratio:.2f} and a prompt" in note
    assert not any(note.startswith("profile ") for note in fitted.notes)


def test_a_pool_that_the_scenario_gives_has_no_band() -> None:
    """It is known; and of a server other than vLLM nothing is known of its pool."""
    given = Deployment.of(load("what-if-llama-3.1-70b", {"engine.num_gpu_blocks_override": 4000}))
    assert given.bands.kv_tokens == 0.0
    assert Deployment.of(load("infer-rtx5080-static")).bands.kv_tokens is None
