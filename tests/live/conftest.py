"""What the live tests of several files stand on."""

from __future__ import annotations

import pytest
from live_setup import LEVELS, Calibrated, calibrate, measure, measure_steps
from metronome_setup import ROOFLINE, metronome_gpu, metronome_model

from servecast.validate.parity.vllm_process import ENVIRONMENT


@pytest.fixture(scope="session")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Calibrated:
    """The metronome of ``SCENARIO``, measured as a GPU is: its steps, then what stands before a server's."""
    if not ENVIRONMENT.exists():
        pytest.skip("needs vLLM: run tools/install_vllm.sh")
    folder = tmp_path_factory.mktemp("calibrated")
    model = metronome_model(folder / "metronome")
    measured = measure_steps(model, folder / "measured", ROOFLINE)
    measure("served", model, measured, ROOFLINE, "--resume", "--concurrency", *map(str, LEVELS))
    found = Calibrated(model, metronome_gpu(ROOFLINE, model), measured, folder / "profile.json")
    fit = calibrate(measured, found.gpu, found.profile)
    found.disturbed.extend(fit.summary.reasons)
    found.disturbed.extend(note for note in fit.summary.notes if "disturbed" in note)
    print(fit.profile.front_end, found.disturbed)
    return found
