"""Calibration recovers the law of a real vLLM engine whose steps last what that law says."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from live_setup import LEVELS, Calibrated, measure_steps
from metronome_law import Law
from metronome_setup import NO_MACHINE, ROOFLINE, SIZES, STAIRCASE, metronome_gpu
from timing import judge

from servecast.__main__ import main
from servecast.calibrate.fit.folder import fit_folder
from servecast.calibrate.fit.measurements import Overhead, Step, read_folder
from servecast.calibrate.fit.noise import fit_front_end
from servecast.calibrate.fit.physical import PhysicalFit, joined
from servecast.calibrate.measure.folder import read_rows
from servecast.sim.scenario.vllm_server import preparation_round

pytestmark = pytest.mark.live  # a metronome keeps time where it is not held up
LAWS = {"roofline": ROOFLINE, "staircase": STAIRCASE}
WITHIN = 0.05


@pytest.fixture(scope="module")
def folders(calibrated: Calibrated, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Law -> measurements; one after the other, since those of long runs want the machine for themselves."""
    out, model = tmp_path_factory.mktemp("measured"), calibrated.model
    staircase = measure_steps(model, out / "staircase", STAIRCASE)
    file = staircase / "engine.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[0]["flags"]["cudagraph_capture_sizes"] = SIZES  # a GPU's engine says to what it pads, a CPU's not
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "roofline": calibrated.measured,
        "staircase": staircase,
        "no machine": measure_steps(model, out / "none", NO_MACHINE, "decode", "prefill", "mixed"),
    }


def _lasts(law: dict[str, Any], steps: Sequence[Step]) -> np.ndarray[Any, np.dtype[np.float64]]:
    known = Law(json.dumps(law))
    return np.array([known.seconds(step.chunks, step.decodes, step.decode_context) for step in steps])


@pytest.mark.parametrize("name", ["roofline", "staircase"])
def test_the_law_is_recovered_in_every_region_even_if_it_was_not_measured(
    folders: dict[str, Path], calibrated: Calibrated, name: str
) -> None:
    law, gpu = LAWS[name], metronome_gpu(LAWS[name], calibrated.model)
    measured = read_folder(folders[name])
    steps = joined(measured.steps)
    regions = {step.region for step in steps}
    assert regions == {"decode", "decode_ragged", "prefill", "prefill_context", "mixed", "long_run"}
    everything = PhysicalFit(gpu).fit(measured.engines, steps)
    quiet = not _lost_time(law, measured.steps)
    for region in sorted(regions):
        inside = [step for step in steps if step.region == region]
        others = [step for step in steps if step.region != region]
        unseen = PhysicalFit(gpu).fit(measured.engines, others)
        truth = _lasts(law, inside)
        for kind, fit in (("fitted", everything), ("held out", unseen)):
            errors = np.abs(fit.predict(measured.engines, inside) / truth - 1)
            print(
                f"{name} {region} {kind}: mean {errors.mean():.3f} 90 % under {np.quantile(errors, 0.9):.3f}"
            )
            what = f"{name}, {region} {kind}: 90 % are under {np.quantile(errors, 0.9):.3f}"
            judge(what, np.quantile(errors, 0.9) < WITHIN, quiet=quiet)


@pytest.mark.parametrize("name", ["roofline", "staircase"])
def test_the_profile_predicts_steps_that_were_never_run(
    folders: dict[str, Path], calibrated: Calibrated, name: str
) -> None:
    law = LAWS[name]
    found = fit_folder(folders[name], gpu=metronome_gpu(law, calibrated.model))
    measured = read_folder(folders[name])
    quiet = not _lost_time(law, measured.steps)
    judge(f"{name}: a bad fit, {found.summary.reasons}", found.good, quiet=quiet)
    engine = measured.engines[0]
    step_time = engine.step_time(found.gpu, found.profile.efficiencies)
    rng = np.random.default_rng(5)
    steps = [_random_step(rng) for _ in range(200)]
    noise = found.profile.noise  # what stalls of this machine add to a mean is not the law's
    over = np.sqrt(1 + noise.cv**2) * (1 + noise.stall_probability * (noise.stall_factor - 1))
    predicted = np.array([step_time.seconds(step) / over for step in steps])
    errors = np.abs(predicted / _lasts(law, steps) - 1)
    print(f"{name}: {noise}, mean {errors.mean():.3f} 95 % under {np.quantile(errors, 0.95):.3f}")
    judge(f"{name}: off by {errors.mean():.3f} on average", errors.mean() < WITHIN, quiet=quiet)


def _lost_time(law: dict[str, Any], steps: Sequence[Step]) -> bool:
    """Whether this machine was too busy for a metronome: in some region its own steps were not those of the
    law, and a verdict on them says nothing about the fit."""
    late = np.abs(np.array([step.median_s for step in steps]) / _lasts(law, steps) - 1)
    regions = np.array([step.region for step in steps])
    lost = {region: late[regions == region].mean() for region in set(regions.tolist())}
    print(f"metronome off by {lost}")
    return max(lost.values()) > WITHIN


def _random_step(rng: np.random.Generator) -> Step:
    decodes = int(rng.integers(0, 49))
    chunks = [(int(rng.integers(16, 150)), int(rng.integers(0, 2000))) for _ in range(rng.integers(0, 4))]
    chunks = chunks if chunks or decodes else [(100, 0)]
    context = decodes * int(rng.integers(64, 1400))
    return Step(
        row="step",
        case="new",
        times_s=(1.0,),
        model="metronome",
        region="new",
        chunks=tuple(chunks),
        decodes=decodes,
        decode_context=context,
        samples=decodes + len(chunks),
    )


def test_a_law_of_no_machine_is_a_bad_fit(
    folders: dict[str, Path], calibrated: Calibrated, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu, profile = tmp_path / "metronome.yaml", tmp_path / "profile.json"
    metronome_gpu(ROOFLINE, calibrated.model).save(gpu)
    code = main(["calibrate", "fit", str(folders["no machine"]), "--gpu", str(gpu), "--output", str(profile)])
    assert code == 1
    assert not profile.exists()
    said = capsys.readouterr().out
    assert "bad fit" in said
    assert "decode" in said


def test_overheads_of_a_served_model(calibrated: Calibrated) -> None:
    rows = [row for row in read_rows(calibrated.measured / "engine.jsonl") if row["row"] == "overhead"]
    measured = [Overhead.model_validate(row) for row in rows]
    overheads = [row for row in measured if not row.more_tokens]
    assert {row.concurrency for row in overheads} == set(LEVELS)
    longer = [row for row in measured if row.more_tokens]
    assert {(row.kind, row.concurrency) for row in longer} == {("request_in", 1)}
    for level in LEVELS:
        requests = max(12, 3 * level)
        alike = [row for row in overheads if row.concurrency == level]
        into = [seconds for row in alike if row.kind == "request_in" for seconds in row.times_s]
        turns = {row.turn for row in alike}
        assert len(into) == requests * len(turns) >= 2 * requests
        later = [
            row
            for row in rows
            if row["kind"] == "token_out" and not row["first"] and row["concurrency"] == level
        ]
        assert max(row["burst"] for row in later) == level
        count = sum(len(row["times_s"]) for row in later)  # of streams whose tokens came one by one
        what = f"{count} later tokens of {level} at once in {len(turns)} turns"
        judge(what, count > requests * 40 * len(turns), quiet=not calibrated.disturbed)
    costs, told = fit_front_end(measured, preparation_round("0.32"))
    print(costs)
    assert "prompt_token_s" in told
