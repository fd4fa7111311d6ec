"""The core gives the kept tables built with checks of bounds, overflow and None, or interpreted."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from cores import SOURCE
from golden import WORKLOADS
from places import HELPERS

CHECKS = "boundscheck=True, overflowcheck=True, nonecheck=True, initializedcheck=True, wraparound=False"
BUILD = """
import sys
from Cython.Build import cythonize
from setuptools import Extension, setup
core = Extension("core_checked", ["core_checked.py"], extra_compile_args=["-ffp-contract=off"])
setup(name="checked", ext_modules=cythonize([core], language_level=3))
"""
RUN = """
import importlib, json, sys, tempfile
from pathlib import Path
import servecast.sim.engine
sys.path[:0] = sys.argv[1:]
core = importlib.import_module("core_checked")
assert core.COMPILED == (sys.argv[2] == "compiled")
sys.modules["servecast.sim.engine.core"] = servecast.sim.engine.core = core
import servecast.sim.engine.vllm_scheduler as chosen
chosen.VllmScheduler = core.Scheduler
from golden import KEPT, WORKLOADS, digests, scenario
from servecast.sim.run.simulate import simulate
kept = json.loads(KEPT.read_text("utf-8"))
with tempfile.TemporaryDirectory() as home:
    for name in WORKLOADS:
        if digests(simulate(scenario(Path(home), name))) == kept[name]:
            print(name)
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["compiled", "interpreted"])
def test_the_tables_are_those_that_were_kept(how: str, tmp_path: Path) -> None:
    first, _, rest = SOURCE.read_text("utf-8").partition("\n")
    assert first.startswith("# cython: ")
    (tmp_path / "core_checked.py").write_text(f"# cython: {CHECKS}\n{rest}", "utf-8")
    if how == "compiled":
        build = [sys.executable, "-c", BUILD, "build_ext", "--inplace"]
        subprocess.run(build, cwd=tmp_path, check=True, capture_output=True)
    run = [sys.executable, "-c", RUN, str(tmp_path), how, str(HELPERS)]
    done = subprocess.run(run, check=True, capture_output=True, text=True)
    assert done.stdout.splitlines() == list(WORKLOADS)
