"""Real vLLM on the CPU: two tiny models are measured and fitted, and a third one is predicted.

A step on a shared CPU takes 1.15 to 1.4 times its own median, and 1.3 times as long minutes later. So the
three take turns at every composition, which leaves what slows the machine down in none of their ratios; of
two passes over the grid the faster time of a composition counts, since a busy machine only ever adds; and the
band is as wide as that. On two cores with six other processes the third model was off by 1.16 in the median.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from timing import Machine, judge

from servecast.calibrate.fit.folder import FolderFit, fit_folder
from servecast.calibrate.fit.measurements import Measurements, Step, read_folder
from servecast.calibrate.measure.folder import Row, read_rows
from servecast.calibrate.measure.vllm.tiny_model import write_tiny_model
from servecast.sim.hardware.gpu import GPU
from servecast.validate.parity.vllm_process import ENVIRONMENT

pytestmark = pytest.mark.vllm

PASSES = 2
SIZES = {  # layers, hidden, intermediate
    "small": (2, 256, 1024),
    "large": (6, 512, 1024),
    "third": (4, 384, 1536),
}
CPU = GPU(  # two cores: peaks that they stay under
    name="cpu",
    memory_bytes=1 << 34,
    bandwidth=2e10,
    bf16_flops=2e11,
    link_bandwidth=1e9,
    capability=(0, 0),
)
BAND = 1.5  # factor between predicted and measured, median over compositions
GRID = (
    *("--passes", str(PASSES), "--case-seconds", "0.1", "--steps", "8", "--least-steps", "5"),
    *("--regions", "decode", "prefill", "prefill_context", "mixed", "--largest", "8000"),
    *(
        "--enforce-eager",
        "--max-model-len",
        "2048",
        "--max-num-seqs",
        "32",
        "--max-num-batched-tokens",
        "512",
    ),
)


@pytest.fixture(scope="module")
def machine() -> Machine:
    """Since before anything was measured."""
    return Machine()


@pytest.fixture(scope="module")
def measured(machine: Machine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders "fitted", of two models, and "third"."""
    home = tmp_path_factory.mktemp("cpu")
    models = [
        write_tiny_model(
            home / "models" / name,
            layers=layers,
            hidden_size=hidden,
            intermediate_size=intermediate,
            kv_heads=2,
            max_position_embeddings=2048,
        )
        for name, (layers, hidden, intermediate) in SIZES.items()
    ]
    subprocess.run(
        [
            *(str(Path(sys.executable).with_name("servecast")), "calibrate", "measure", "engine"),
            *("--python", str(ENVIRONMENT / "bin" / "python"), "--out", str(home / "all")),
            *("--model", *map(str, models), *GRID),
        ],
        env=os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1"},
        check=True,
        capture_output=True,
    )
    rows = _faster_pass(read_rows(home / "all" / "engine.jsonl"))
    for folder, names in (("fitted", ("small", "large")), ("third", ("third",))):
        (home / folder).mkdir()
        shutil.copy(home / "all" / "facts.json", home / folder)
        kept = [json.dumps(row) + "\n" for row in rows if row["model"] in names]
        (home / folder / "engine.jsonl").write_text("".join(kept))
    return home


def _faster_pass(rows: list[Row]) -> list[Row]:
    """One row of each composition that was measured in each pass: beside other work one may be missed."""
    times: dict[str, list[float]] = {}
    for row in rows:
        if row["row"] == "step":
            times.setdefault(_composition(row), []).append(float(np.median(row["times_s"])))
    seen = {key: passes for key, passes in times.items() if len(passes) == PASSES}
    assert len(seen) > 0.8 * len(times)
    ratios = [max(passes) / min(passes) for passes in seen.values()]
    print(f"the passes disagree by {np.median(ratios):.2f} in the median")
    return [
        row
        for row in rows
        if row["row"] == "engine" or np.median(row["times_s"]) == min(seen.get(_composition(row), [0.0]))
    ]


def _composition(row: Row) -> str:
    return str(row["case"]).split("#")[0]


@pytest.fixture(scope="module")
def fit(measured: Path) -> FolderFit:
    return fit_folder(measured / "fitted", gpu=CPU)


def _ratios(
    fit: FolderFit, measurements: Measurements, steps: list[Step]
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Predicted over measured times of the steps."""
    models = [engine.step_time(fit.gpu, fit.profile.efficiencies) for engine in measurements.engines]
    return np.array([models[step.engine].seconds(step) / step.median_s for step in steps])


def test_a_third_model_is_predicted(machine: Machine, measured: Path, fit: FolderFit) -> None:
    third = read_folder(measured / "third")
    ratios = _ratios(fit, third, list(third.steps))
    typical = math.exp(np.median(np.abs(np.log(ratios))))
    print(f"third model: off by {typical:.2f} in the median, predicted/measured {np.median(ratios):.2f}")
    judge(f"a third model is off by {typical:.2f} in the median", typical < BAND, quiet=machine.quiet())


def test_its_larger_steps_are_told_from_its_smaller_ones(measured: Path, fit: FolderFit) -> None:
    """The times differ by an order of magnitude, which no machine's noise hides."""
    third = read_folder(measured / "third")
    steps = list(third.steps)
    times = np.array([step.median_s for step in steps])
    predicted = _ratios(fit, third, steps) * times
    slow, fast = times >= np.quantile(times, 0.8), times <= np.quantile(times, 0.2)
    spread = np.median(times[slow]) / np.median(times[fast])
    told = np.median(predicted[slow]) / np.median(predicted[fast])
    print(f"slow steps take {spread:.1f} times as long, predicted {told:.1f}")
    assert told > math.sqrt(spread)


def test_the_report_says_what_transfer_costs(fit: FolderFit) -> None:
    assert {region.region for region in fit.summary.transfer} == {"small", "large"}
    assert all(region.held_out is not None for region in fit.summary.transfer)
    assert fit.profile.error_band is not None


def test_no_step_is_predicted_under_its_roofline(measured: Path, fit: FolderFit) -> None:
    for name in ("fitted", "third"):
        measurements = read_folder(measured / name)
        for step in measurements.steps:
            engine = measurements.engines[step.engine]
            model = engine.step_time(fit.gpu, fit.profile.efficiencies)
            assert model.seconds(step) >= model.roofline_seconds(step)
            larger = replace(engine.model, layers=4 * engine.model.layers)
            slower = replace(engine, model=larger).step_time(fit.gpu, fit.profile.efficiencies)
            assert slower.seconds(step) > model.seconds(step)
