"""Ends a process together with all that it started, in process groups of their own too; SIGTERM as Ctrl-C."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

GRACE_S = 25.0  # from SIGINT to SIGKILL: a vLLM server that the process started gets 15 s to end


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process that leads a group of its own: it is asked first, as by Ctrl-C."""
    started = descendants(process.pid)
    with suppress(ProcessLookupError):
        process.send_signal(signal.SIGINT)
    with suppress(subprocess.TimeoutExpired):
        process.wait(GRACE_S)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    kill(started)
    process.wait()


@contextmanager
def sigterm_as_ctrl_c() -> Iterator[None]:
    """A time limit set from outside ends us as Ctrl-C does while the block lasts (in the main thread)."""
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def kill(started: Mapping[int, str]) -> None:
    """Kill the processes with these ids that were born then; harmless where they are gone."""
    for pid, born in started.items():
        if _born(pid) == born:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def descendants(pid: int) -> dict[int, str]:
    """Processes that one started, directly or not, with when they were born; empty without a /proc."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        if (fields := _stat(int(folder.name))) is not None:
            children.setdefault(int(fields[1]), []).append(int(folder.name))
    found, todo = {}, [pid]
    while todo:
        for child in children.get(todo.pop(), []):
            found[child] = _born(child)
            todo.append(child)
    return {child: born for child, born in found.items() if born is not None}


def _born(pid: int) -> str | None:
    fields = _stat(pid)
    return None if fields is None else fields[19]


def _stat(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat behind the command's name: state, parent, ..."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
