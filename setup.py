"""Compiles the modules of sim that import cython. Where that fails, they run interpreted."""

from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup

DIRECTIVES = {
    "language_level": 3,
    "boundscheck": False,
    "wraparound": False,
    "initializedcheck": False,
    "cdivision": True,
    "auto_pickle": False,  # no object of the engine is pickled, and that code takes long to compile
}
# Sums keep their order and their roundings: no fused multiply and add, no -ffast-math.
ARGUMENTS = ["-O2", "-g0", "-ffp-contract=off"]
PACKAGES = Path("build/packages")  # where Cython finds servecast.sim.engine, which has no such folder here

(PACKAGES / "servecast").mkdir(parents=True, exist_ok=True)
if not (PACKAGES / "servecast" / "sim").is_symlink():
    (PACKAGES / "servecast" / "sim").symlink_to(Path("sim").resolve())
sources = [at for at in sorted(Path("sim").glob("*/*.py")) if "\nimport cython\n" in at.read_text("utf-8")]
names = ["servecast." + ".".join(source.with_suffix("").parts) for source in sources]
modules = [
    Extension(name, [str(source)], extra_compile_args=ARGUMENTS)
    for name, source in zip(names, sources, strict=True)
]
SHARED = "servecast.sim.engine.memoryviews"  # what all of them need of Cython's, compiled once
modules.append(Extension(SHARED, ["sim/engine/memoryviews.c"], extra_compile_args=ARGUMENTS))
built = cythonize(
    modules,
    include_path=[str(PACKAGES)],
    compiler_directives=DIRECTIVES,
    build_dir="build",
    shared_utility_qualified_name=SHARED,
)
for module in built:
    module.optional = True  # of the extension that cythonize makes of ours, which does not take this over
setup(ext_modules=built)
