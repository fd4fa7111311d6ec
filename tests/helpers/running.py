"""Servers of tests that are processes of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar

from servecast.validate.live.telemetry import get

Server = TypeVar("Server")


@contextmanager
def together(servers: Iterable[AbstractContextManager[Server]]) -> Iterator[list[Server]]:
    """Servers that start side by side: most of a start is one process that imports."""
    with ExitStack() as stack, ThreadPoolExecutor() as threads:
        yield list(threads.map(stack.enter_context, servers))


@contextmanager
def running(command: list[str], *, url: str, log: Path, env: dict[str, str]) -> Iterator[None]:
    """A server of its own process group, from when it answers at ``url`` to the end of the block."""
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env=os.environ | env, start_new_session=True
        )
    try:
        wait_for(url, process, log)
        yield
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path, within_s: float = 900.0) -> None:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline and process.poll() is None:
        try:
            get(url)
        except OSError:
            time.sleep(0.2)
        else:
            return
    raise AssertionError(f"{url} does not answer: {log.read_text()[-2000:]}")
