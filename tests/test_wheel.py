"""What ``pip install`` brings is the whole tree.

A folder that pyproject.toml forgets imports well when the install is editable, and is silently absent from
the wheel.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from importlib.metadata import distributions
from pathlib import Path

import pytest
from places import REPOSITORY

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))
COMPILED = ["servecast/sim/engine/memoryviews"]  # what the others share of Cython
COMPILED += [
    f"servecast/{path.relative_to(REPOSITORY).with_suffix('')}"
    for path in (REPOSITORY / "sim").glob("*/*.py")
    if "\nimport cython\n" in path.read_text("utf-8")
]
FOLDERS: dict[str, str] = PROJECT["tool"]["setuptools"]["package-dir"]  # package: folder
COMPILER = shutil.which(os.environ.get("CC", "cc").split()[0]) is not None
BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
IMPORT_ALL = """
import importlib, json, sys
for name in json.load(sys.stdin):
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name.partition(".")[0] not in ("torch", "vllm"):
            raise
"""
NAMES = """
import servecast
print(servecast.__file__)
for name in getattr(servecast, "__all__", ()):
    getattr(servecast, name)
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree, so that no earlier build can lend a file."""
    source = tmp_path_factory.mktemp("source")
    for file in REPOSITORY.iterdir():
        if file.is_file():
            shutil.copy(file, source)
    for folder in FOLDERS.values():
        ignored = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(REPOSITORY / folder, source / folder, ignore=ignored)
    build = source / "setup.py"
    build.write_text(build.read_text("utf-8").replace('"-O2"', '"-O0"'))  # the quickest to compile
    return source


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from that copy."""
    out = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-c", BUILD, str(out), cwd=source)
    (path,) = out.iterdir()
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with the wheel; what servecast depends on is that of the running one."""
    home = tmp_path_factory.mktemp("installed")
    venv.create(home)
    (packages,) = home.glob("lib/python*/site-packages")
    with zipfile.ZipFile(wheel) as archive:  # as pip does it, which takes seconds to bring in
        archive.extractall(packages)
    ((command,),) = (each.entry_points for each in distributions(name="servecast", path=[str(packages)]))
    program = f"#!{home}/bin/python\nimport sys\nfrom {command.module} import {command.attr}\n"
    (home / "bin" / command.name).write_text(f"{program}sys.exit({command.attr}())\n")
    (home / "bin" / command.name).chmod(0o755)
    shared = [path for path in sys.path if path.endswith("-packages")]
    (packages / "shared.pth").write_text(
        "\n".join(shared)
    )  # its own .pth files, an editable install, stay out
    return home


def run(program: str | Path, *arguments: str, cwd: Path, given: str | None = None, **env: str) -> str:
    """What a program prints."""
    done = subprocess.run(
        [str(program), *arguments],
        cwd=cwd,
        input=given,
        env=os.environ | env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def files_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def test_the_wheel_has_every_file_of_the_tree_and_no_other(wheel: Path) -> None:
    tree = {
        "/".join((*package.split("."), *path.relative_to(REPOSITORY / folder).parts))
        for package, folder in FOLDERS.items()
        for path in (REPOSITORY / folder).rglob("*")
        if path.is_file() and path.suffix not in (".pyc", ".md", ".so")
    }
    compiled = {name for name in files_in(wheel) if name.endswith(".so")}
    assert files_in(wheel) - compiled == tree
    assert sorted(name.partition(".")[0] for name in compiled) == sorted(COMPILED) * COMPILER


@pytest.mark.usefixtures("wheel")  # which has translated the engine to C
def test_without_a_compiler_it_is_built_without_the_engine(source: Path, tmp_path: Path) -> None:
    told = run(
        sys.executable, "setup.py", "build_ext", "-b", str(tmp_path), "-f", cwd=source, CC="/no/such/cc"
    )
    assert "/no/such/cc" in told
    assert not list(tmp_path.rglob("*.so"))


def test_the_wheel_brings_its_licence_and_those_of_its_data(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name.rpartition("/")[2] for name in archive.namelist() if ".dist-info/licenses/" in name}
    assert names == {"LICENSE", "NOTICE"}


def test_every_module_imports_without_the_source_tree(wheel: Path, installed: Path) -> None:
    modules = [
        name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for name in sorted(files_in(wheel))
        if name.endswith(".py") and not name.endswith("__main__.py")
    ]
    run(installed / "bin" / "python", "-c", IMPORT_ALL, cwd=installed, given=json.dumps(modules))


def test_the_public_names_are_those_of_the_wheel(installed: Path) -> None:
    where = run(installed / "bin" / "python", "-c", NAMES, cwd=installed)
    assert Path(where.strip()).is_relative_to(installed)


def test_the_installed_command_plans_a_shipped_scenario(installed: Path) -> None:
    command = installed / "bin" / "servecast"
    version = PROJECT["project"]["version"]
    told = "engine compiled" if COMPILER else "engine interpreted: slower"
    assert run(command, "--version", cwd=installed).strip() == f"{version} ({told})"
    coarse = ("--max-num-requests", "200", "--tolerance", "0.5", "--jobs", "1")
    text = run(
        command,
        "plan",
        "l4-qwen2.5-0.5b",
        "--slo",
        "tpot:p95:50",
        "--report",
        "plan.html",
        *coarse,
        cwd=installed,
    )
    assert "Largest request rate" in text
    assert (installed / "plan.html").stat().st_size > 10_000
