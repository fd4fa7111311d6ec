"""What the live tests of several files stand on."""

from __future__ import annotations

import pytest
from live_setup import SCENARIO, Calibrated, calibrate, measure_overheads, measure_steps, metronome
from metronome_setup import ROOFLINE, metronome_gpu, metronome_model

from servecast.sim.scenario.scenario import load
from servecast.validate.live.own_server import started
from servecast.validate.parity.vllm_process import ENVIRONMENT


@pytest.fixture(scope="session")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Calibrated:
    """The metronome of ``SCENARIO``, measured as a GPU is: its steps, then what stands before a server's."""
    if not ENVIRONMENT.exists():
        pytest.skip("needs vLLM: run tools/install_vllm.sh")
    folder = tmp_path_factory.mktemp("calibrated")
    model = metronome_model(folder / "metronome")
    found = Calibrated(model, metronome_gpu(ROOFLINE, model), folder / "profile.json")
    measured = measure_steps(model, folder / "measured", ROOFLINE)
    engine = load(found.scenario(folder, SCENARIO), {"profile": None}).engine
    with started(metronome(model, ROOFLINE), engine, {}, folder) as server:
        assert server.recording is not None
        measure_overheads(server.target, server.recording, measured, (2, 12))
    fit = calibrate(measured, found.gpu, found.profile)
    found.disturbed.extend(fit.summary.reasons)
    found.disturbed.extend(note for note in fit.summary.notes if "disturbed" in note)
    print(fit.profile.front_end, found.disturbed)
    return found
