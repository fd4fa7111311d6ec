"""A ``vllm serve`` of our own: started, waited for, and ended with everything that it started."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from http.client import HTTPConnection, HTTPException
from pathlib import Path

from ..errors import MeasureError
from .ending import group_exists, last_lines, signal_group, start

HOST = "127.0.0.1"
GRACE_S = 15.0  # from SIGTERM to SIGKILL
_KEYS = ("OPENAI_API_KEY", "VLLM_API_KEY")  # that vLLM's client sends to any server, and its server asks for


def free_port() -> int:
    """A TCP port that nobody listens on now."""
    with socket.socket() as sock:
        sock.bind((HOST, 0))
        port: int = sock.getsockname()[1]
        return port


class VllmServer:
    """Serves a model over HTTP for as long as the ``with`` block lasts.

    Args:
        model: folder of the model, or its name on the Hugging Face hub.
        args: further flags of ``vllm serve``, without host and port.
        log: file for all that the server says.
        python: interpreter of the environment that has vllm. env: variables set on top of our own.
        start_up_s: how long it may take to become healthy.

    Attributes:
        base_url: like "http://127.0.0.1:8000". pid: of the API server, None before it starts.

    Raises:
        MeasureError: on entering, it does not come up; the message ends with the log's last lines.
    """

    def __init__(
        self,
        model: str | Path,
        args: Sequence[str] = (),
        *,
        log: Path,
        python: str | Path = sys.executable,
        env: Mapping[str, str] | None = None,
        start_up_s: float = 600.0,
    ) -> None:
        self.model, self.log, self.port = str(model), log, free_port()
        self.base_url = f"http://{HOST}:{self.port}"
        self.command = [
            *(str(python), "-m", "vllm.entrypoints.cli.main", "serve", self.model, *args),
            *("--host", HOST, "--port", str(self.port)),
        ]
        self._env = vllm_environment(env, offline=Path(model).is_dir())
        self._start_up_s = start_up_s
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    @property
    def alive(self) -> bool:
        """Whether the API server's process runs. It ends by itself soon after its engine died."""
        return self._process is not None and self._process.poll() is None

    def healthy(self) -> bool:
        """Whether GET /health answers 200."""
        connection = HTTPConnection(HOST, self.port, timeout=5)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except (OSError, HTTPException):
            return False
        finally:
            connection.close()

    def __enter__(self) -> VllmServer:
        with self.log.open("wb") as out:
            streams = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": subprocess.STDOUT}
            self._process = start(self.command, env=self._env, **streams)
        try:
            self._wait_until_healthy()
        except BaseException:
            self.stop()
            raise
        return self

    def _wait_until_healthy(self) -> None:
        deadline = time.monotonic() + self._start_up_s
        while time.monotonic() < deadline:
            if not self.alive:
                raise self._failure("the server ended before it was up")
            if self.healthy():
                return
            time.sleep(0.25)
        raise self._failure(f"the server was not up after {self._start_up_s:g} s")

    def _failure(self, what: str) -> MeasureError:
        what = f"{what}; its last words:\n{last_lines(self.log.read_bytes())}\n"
        return MeasureError(what, f"vllm serve {self.model}", f"The whole log is {self.log}.")

    def stop(self) -> None:
        """End the server and every process that it started. Harmless if it is not running."""
        if self._process is None:
            return
        group = self._process.pid
        signal_group(group, signal.SIGTERM)
        deadline = time.monotonic() + GRACE_S
        while time.monotonic() < deadline and group_exists(group, self._process):
            time.sleep(0.05)
        signal_group(group, signal.SIGKILL)
        self._process.wait()

    def __exit__(self, *_error: object) -> None:
        self.stop()


def recording(file: Path) -> tuple[list[str], dict[str, str]]:
    """Flags and variables that make a server write its scheduler's decisions to ``file``.

    The format is that of recording_scheduler; the file grows while the server runs.
    """
    path = [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")]
    return (
        ["--scheduler-cls", "measure.vllm.recording_scheduler.Recording"],
        {"SERVECAST_RECORDING": str(file), "PYTHONPATH": os.pathsep.join(filter(None, path))},
    )


def vllm_environment(env: Mapping[str, str] | None = None, *, offline: bool = True) -> dict[str, str]:
    """Our environment variables for a vLLM process, without the user's own keys, with ``env`` on top.

    Args:
        offline: nothing is to be downloaded.
    """
    return (
        {name: value for name, value in os.environ.items() if name not in _KEYS}
        | {"VLLM_NO_USAGE_STATS": "1", "PYTHONUNBUFFERED": "1"}
        | ({"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"} if offline else {})
        | dict(env or {})
    )
