"""Measures the committed results of live runs that need no GPU anew: docs/results/live-NAME.json.

    make live-results

Each is what ``servecast validate live`` writes: a server is calibrated, all loads are predicted, then driven.
Takes about twenty minutes on a machine that does nothing else, and keeps no result of one that does.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from live_setup import PYTHON, calibrate, measure_overheads, measure_steps, metronome, write_scenario
from live_setup import SCENARIO as METRONOME
from metronome_setup import ROOFLINE, metronome_gpu, metronome_model
from timing import Machine

from servecast.__main__ import main
from servecast.sim.scenario.scenario import load
from servecast.validate.live.own_server import started

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"


def measure_metronome(folder: Path) -> Path:
    """vLLM around steps that last what a known law says: all plans."""
    model = metronome_model(folder / "metronome")
    gpu = metronome_gpu(ROOFLINE, model)
    file = write_scenario(folder, METRONOME, model, gpu)
    measured = measure_steps(model, folder / "measured", ROOFLINE)
    own = metronome(model, ROOFLINE)
    with started(own, load(file, {"profile": None}).engine, {}, folder) as server:
        assert server.recording is not None
        measure_overheads(server.target, server.recording, measured, (1, 4, 12))
    fit = calibrate(measured, gpu, folder / "profile.json")
    if disturbed := [*fit.summary.reasons, *(note for note in fit.summary.notes if "disturbed" in note)]:
        sys.exit(f"nothing is kept: {'; '.join(disturbed)}")
    arguments = [str(file), "--serve", str(model), "--vllm-python", PYTHON, "--out", str(folder / "out")]
    plans = ["--plan", "rate,slo,knee,concurrency,prefix,mixed,kv", "--duration", "35", "--recorder"]
    os.environ.update(own.env)
    machine = Machine()
    main(["validate", "live", *arguments, *plans, "--", *own.args])
    if not machine.quiet():
        sys.exit("nothing is kept: other programs ran beside the loads")
    return folder / "out" / "result.json"


def compact(document: dict[str, Any]) -> str:
    """As JSON, a line a load."""
    loads = document.pop("loads")
    head = json.dumps(document)[:-1]
    return head + ', "loads": [\n' + ",\n".join(json.dumps(load) for load in loads) + "\n]}\n"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        for name, measure in {"metronome": measure_metronome}.items():
            if name in (sys.argv[1:] or [name]):
                (folder := Path(temporary) / name).mkdir()
                document = json.loads(measure(folder).read_text("utf-8"))
                (RESULTS / f"live-{name}.json").write_text(compact(document), "utf-8")
