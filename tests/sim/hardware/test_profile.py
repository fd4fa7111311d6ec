"""Profiles: written and read back, checked, and asked where they hold."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from model_shapes import load

from servecast.sim.hardware.front_end_costs import FrontEndCosts
from servecast.sim.hardware.gpu import find_gpu
from servecast.sim.hardware.noise import StepNoise
from servecast.sim.hardware.profile import Domain, Profile, Provenance, build_step_time
from servecast.sim.hardware.shard import Shard
from servecast.sim.hardware.step_time.physical import Efficiencies, PhysicalStepTime
from servecast.sim.inputs.errors import InputError


@dataclass
class Step:
    chunks: tuple[tuple[int, int], ...] = ()
    decodes: int = 0
    decode_context: int = 0
    samples: int = 0


FITTED = Profile(
    servecast_version="0.1.0",
    gpu="A6000",
    model="Qwen2.5-7B-Instruct",
    engine_version="0.23.0",
    flags={"max_num_seqs": 256, "enforce_eager": False},
    efficiencies=Efficiencies(compute=0.7),
    noise=StepNoise(0.05, 0.001, 4.0),
    front_end=FrontEndCosts(request_s=2e-3, token_s=2e-5),
    domain=Domain(tokens=(1, 512), batch=(1, 256), context=(1, 128)),
    error_band=0.08,
    provenance=(
        Provenance(parameter="efficiencies.compute", origin="fitted", note="two rows"),
        Provenance(parameter="efficiencies.overlap_exponent", origin="assumed"),
    ),
    fitted_rows=("8", "128"),
    raw_data_sha256="0" * 64,
)


def written(tmp_path: Path, **changes: Any) -> Path:
    data = json.loads(FITTED.model_dump_json())
    data.update(changes)
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(data))
    return path


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    FITTED.save(path)
    assert Profile.load(path) == FITTED
    assert json.loads(path.read_text())["schema_version"] == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["profile.json"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema_version": 2}, "schema_version: schema version 2, this servecast reads 1"),
        ({"schema_version": None}, "schema version None"),
        ({"efficiencies": {"compute": 1.2}}, "efficiencies: efficiencies.compute: compute is 1.2"),
        ({"efficiencies": {"warp": 1.0}}, "unknown parameter warp; known are compute, bandwidth"),
        ({"noise": {"cv": -1}}, "cv is -1"),
        ({"front_end": {"token_s": -1e-5}}, "front_end.token_s: token_s is -1e-05"),
        ({"front_end": {"tokens_s": 0}}, "unknown parameter tokens_s"),
        ({"domain": {"batch": [8, 2]}}, "domain.batch: needs 0 <= lowest <= highest"),
        ({"colour": "red"}, "colour: Extra inputs are not permitted"),
        ({"kind": "table"}, "kind: Input should be 'physical'"),
        ({"provenance": [{"parameter": "x", "origin": "guessed"}]}, "provenance.0.origin"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = written(tmp_path, **changes)
    with pytest.raises(InputError) as caught:
        Profile.load(path)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.json: no such profile"):
        Profile.load(tmp_path / "absent.json")
    (tmp_path / "cut.json").write_text('{"schema_version": 1')
    with pytest.raises(InputError, match=r"cut\.json: cannot read it as JSON"):
        Profile.load(tmp_path / "cut.json")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(InputError, match="is not a JSON object"):
        Profile.load(tmp_path / "list.json")


def test_steps_beyond_the_fit_are_named() -> None:
    assert FITTED.outside(Step(decodes=256, decode_context=256 * 100, samples=256)) is None
    assert FITTED.outside(Step()) is None
    beyond = FITTED.outside(Step(chunks=((600, 0),), decodes=4, decode_context=400, samples=5))
    assert beyond == "extrapolated: tokens 604-604 (fitted on 1-512), context 100-600 (fitted on 1-128)"
    assert FITTED.outside_ranges(batch=(1, 300)) == "extrapolated: batch 1-300 (fitted on 1-256)"
    assert FITTED.model_copy(update={"domain": Domain()}).outside_ranges(batch=(1, 9999)) is None


def test_a_profile_serves_another_model() -> None:
    model, gpu = load("Qwen2.5-32B-Instruct"), find_gpu("A6000")
    built = build_step_time(FITTED, Shard(model, gpu, 2, cudagraph_sizes=(1, 2, 4)))
    assert isinstance(built, PhysicalStepTime)
    assert (built.shard.model, built.efficiencies, built.shard.tensor_parallel_size) == (
        model,
        FITTED.efficiencies,
        2,
    )
    step = Step(decodes=3, decode_context=300, samples=3)
    assert built.seconds(step) > built.roofline_seconds(step) > 0
