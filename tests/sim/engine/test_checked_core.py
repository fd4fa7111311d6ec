"""The engine gives the kept tables built with checks of bounds, overflow and None, or interpreted."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from golden import WORKLOADS
from places import HELPERS, REPOSITORY

CHECKS = "boundscheck=True, overflowcheck=True, nonecheck=True, initializedcheck=True, wraparound=False"
BUILD = """
from Cython.Build import cythonize
from setuptools import Extension, setup
name = "servecast.sim.engine.core"
core = Extension(name, ["servecast/sim/engine/core.py"], extra_compile_args=["-ffp-contract=off"])
setup(name="checked", ext_modules=cythonize([core], language_level=3))
"""
RUN = """
import json, sys, tempfile
from pathlib import Path
sys.path.append(sys.argv[1])
import servecast.sim.engine.core as core
assert Path(core.__file__).is_relative_to(Path.cwd()), core.__file__
assert core.COMPILED == (sys.argv[2] == "compiled")
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
    no_binaries = shutil.ignore_patterns("__pycache__", "*.so")
    shutil.copytree(REPOSITORY / "servecast", tmp_path / "servecast", ignore=no_binaries)
    for name in ("sim", "scenarios"):
        shutil.copytree(REPOSITORY / name, tmp_path / "servecast" / name, ignore=no_binaries)
    source = tmp_path / "servecast" / "sim" / "engine" / "core.py"
    first, _, rest = source.read_text("utf-8").partition("\n")
    assert first.startswith("# cython: ")
    source.write_text(f"# cython: {CHECKS}\n{rest}", "utf-8")
    if how == "compiled":
        build = [sys.executable, "-c", BUILD, "build_ext", "--inplace"]
        subprocess.run(build, cwd=tmp_path, check=True, capture_output=True)
    run = [sys.executable, "-c", RUN, str(HELPERS), how]
    here = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(run, cwd=tmp_path, env=here, check=True, capture_output=True, text=True)
    assert done.stdout.splitlines() == list(WORKLOADS)
