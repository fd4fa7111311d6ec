"""Builds the compiled engine; where that fails, the one of sim/engine/scheduler.py runs in its place."""

from Cython.Build import cythonize
from setuptools import Extension, setup

CORE = Extension(
    "servecast.sim.engine.core",
    ["sim/engine/core.py"],
    # Sums keep their order and their roundings: no fused multiply and add, no -ffast-math.
    extra_compile_args=["-O2", "-g0", "-ffp-contract=off"],
    optional=True,
)
setup(ext_modules=cythonize([CORE], build_dir="build"))
