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

BUILD = """
from pathlib import Path
from Cython.Build import cythonize
from setuptools import Extension, setup
checks = dict.fromkeys(("boundscheck", "overflowcheck", "nonecheck", "initializedcheck"), True)
files = Path("servecast/sim").glob("*/*.py")
sources = [file for file in files if "\\nimport cython\\n" in file.read_text("utf-8")]
exact = {"extra_compile_args": ["-ffp-contract=off"]}
modules = [Extension(".".join(source.with_suffix("").parts), [str(source)], **exact) for source in sources]
built = cythonize(modules, compiler_directives=checks | {"language_level": 3, "wraparound": False})
setup(name="checked", ext_modules=built)
"""
RUN = """
import json, sys, tempfile
from pathlib import Path
sys.path.append(sys.argv[1])
from importlib import import_module
for name in ("engine.block_pool", "engine.engine_loop", "engine.kv_cache", "engine.scheduler", "fleet.flow"):
    file = Path(import_module(f"servecast.sim.{name}").__file__)
    assert file.is_relative_to(Path.cwd()), file
    assert (file.suffix == ".so") == (sys.argv[2] == "compiled"), file
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
    if how == "compiled":
        build = [sys.executable, "-c", BUILD, "build_ext", "--inplace", "-ffp-contract=off"]
        subprocess.run(build, cwd=tmp_path, check=True, capture_output=True)
    run = [sys.executable, "-c", RUN, str(HELPERS), how]
    here = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(run, cwd=tmp_path, env=here, check=True, capture_output=True, text=True)
    assert done.stdout.splitlines() == list(WORKLOADS)
