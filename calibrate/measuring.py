"""``servecast calibrate measure``: the measuring package, run by a Python that has torch and vllm."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Annotated

from cyclopts import Parameter

from servecast.sim.errors import InputError


def measure(
    *arguments: Annotated[str, Parameter(allow_leading_hyphen=True)], python: Path = Path(sys.executable)
) -> int:
    """Measure the machine at hand into a folder: measure engine --model FOLDER --out DIR.

    The same as ``python -m measure`` beside a copy of the folder calibrate/measure on a machine without
    servecast; ``measure engine --help`` lists the flags, and those that it does not know go to vLLM.

    Args:
        arguments: what to measure, and its flags.
        python: of the environment that has vllm and torch, where servecast's own has not.
    """
    path = [str(Path(__file__).resolve().parent), os.environ.get("PYTHONPATH", "")]
    try:
        process = subprocess.Popen(
            [str(python), "-m", "measure", *(arguments or ("--help",))],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path))},
            start_new_session=True,  # so that a Ctrl-C reaches it once, from us
        )
    except OSError as error:
        raise InputError(
            f"cannot start {python}: {error.strerror}",
            where="--python",
            fix="Give the Python of an environment that has vLLM.",
        ) from error
    try:
        with _sigterm_as_ctrl_c():
            return process.wait()
    except KeyboardInterrupt:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT)  # it, and the benchmark that it may be waiting for
        process.wait()
        raise


@contextmanager
def _sigterm_as_ctrl_c() -> Iterator[None]:
    """A time limit set from outside ends what we started too."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
