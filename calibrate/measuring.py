"""``servecast calibrate measure``: the measuring package, run by a Python that has torch and vllm."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from servecast.calibrate.ending import sigterm_as_ctrl_c
from servecast.sim.inputs.errors import InputError


def measure(
    *arguments: Annotated[str, Parameter(allow_leading_hyphen=True)], python: Path | None = None
) -> int:
    """Measure the machine at hand into a folder: measure engine --model FOLDER --out DIR.

    The same as ``python -m measure`` beside a copy of the folder calibrate/measure on a machine without
    servecast; ``measure engine --help`` lists the flags, and those that it does not know go to vLLM.

    Args:
        arguments: what to measure, and its flags.
        python: of the environment that has vllm and torch; the one that runs this without it.
    """
    python = python or Path(sys.executable)
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
        with sigterm_as_ctrl_c():
            return process.wait()
    except KeyboardInterrupt:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT)  # it, and the benchmark that it may be waiting for
        process.wait()
        raise
