"""Builds the compiled engine; where that fails, its source runs interpreted."""

from Cython.Build import cythonize
from setuptools import Extension, setup

CORE = Extension(
    "servecast.sim.engine.core",
    ["sim/engine/core.py"],
    # Sums keep their order and their roundings: no fused multiply and add, no -ffast-math.
    extra_compile_args=["-O2", "-g0", "-ffp-contract=off"],
)
(BUILT,) = cythonize([CORE], build_dir="build")
BUILT.optional = True  # of the extension that cythonize makes of CORE, which does not take this over
setup(ext_modules=[BUILT])
