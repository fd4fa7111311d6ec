"""Builds the compiled engine; where that fails, its source runs interpreted."""

from Cython.Build import cythonize
from setuptools import Extension, setup

COMPILED = [
    Extension(
        f"servecast.{path.replace('/', '.')}",
        [f"{path}.py"],
        # Sums keep their order and their roundings: no fused multiply and add, no -ffast-math.
        extra_compile_args=["-O2", "-g0", "-ffp-contract=off"],
    )
    for path in ("sim/engine/core", "sim/fleet/flow")
]
built = cythonize(COMPILED, build_dir="build")
for each in built:
    each.optional = True  # of the extensions that cythonize makes, which do not take this over
setup(ext_modules=built)
