"""vLLM's real scheduler, in its own process and under its own Python."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from pathlib import Path

from servecast.sim.inputs.errors import InputError
from servecast.validate.parity.scenarios import Scenario

HERE = Path(__file__).resolve().parent
ENVIRONMENT = HERE.parents[1] / ".venv-vllm"  # where install_vllm.sh puts vLLM for the tests


def release(version: str) -> str:
    """ "0.32" of "0.32.0"."""
    return ".".join(version.split(".")[:2])


class VllmProcess:
    """Answers scenarios with what vLLM's scheduler decides. A context manager: leaving it ends the process.

    Args:
        python: interpreter of an environment with vllm and torch.
        sources: folder of vLLM sources to use instead of the installed ones, or None.

    Attributes:
        version: of the vLLM that answers, like "0.32.0".

    Raises:
        InputError: it does not start; the message ends with what it said.
    """

    def __init__(self, python: Path, sources: Path | None = None) -> None:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        if sources is not None:
            environment["PYTHONPATH"] = str(sources)
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the process
        try:
            self._process = subprocess.Popen(
                [str(python), str(HERE / "vllm_scheduler.py")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._said,
                text=True,
                env=environment,
            )
        except OSError as error:
            raise InputError(
                f"cannot start {python}: {error.strerror}",
                where="--vllm-python",
                fix="Give the Python of an environment that has vLLM.",
            ) from error
        self.version: str = json.loads(self._read_line())["vllm"]

    @staticmethod
    def installed(version: str) -> VllmProcess | None:
        """The vLLM of that version ("0.32") that tools/install_vllm.sh installed; None if it did not."""
        sources = ENVIRONMENT / f"vllm-{release(version)}"
        python = ENVIRONMENT / "bin" / "python"
        if not python.exists():
            return None
        if sources.is_dir():
            return VllmProcess(python, sources)
        packages = ENVIRONMENT.glob(f"lib/python*/site-packages/vllm-{release(version)}.*.dist-info")
        return VllmProcess(python) if any(packages) else None

    def decide(self, scenario: Scenario) -> str:
        """The answer to one scenario, as validate/parity/vllm_scheduler.py writes it: a line of JSON.

        Raises:
            InputError: the process has ended; the message ends with what it said.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(scenario.to_json() + "\n")
            self._process.stdin.flush()
        except OSError:
            raise self._ended() from None
        return self._read_line()

    def _read_line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._ended()
        return line

    def _ended(self) -> InputError:
        self._process.wait()
        self._said.seek(0)
        last = " ".join(self._said.read().strip().splitlines()[-3:])
        return InputError(
            f"vLLM's process ended with code {self._process.returncode}: {last}",
            where="--vllm-python",
            fix="Give the Python of an environment where `import vllm` works.",
        )

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()
        self._said.close()

    def __enter__(self) -> VllmProcess:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()
