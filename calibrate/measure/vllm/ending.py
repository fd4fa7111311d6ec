"""Processes in groups of their own: how they start and end, and our own, as by Ctrl-C."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from ..errors import MeasureError


@contextmanager
def sigterm_as_ctrl_c() -> Iterator[None]:
    """A time limit set from outside ends us as Ctrl-C does while the block lasts (in the main thread)."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def start(command: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
    """Start a Python's command in a process group of its own, with options of Popen.

    Raises:
        MeasureError: there is no such Python.
    """
    try:
        return subprocess.Popen(command, start_new_session=True, **options)
    except OSError as error:
        fix = "Give the Python of an environment that has vLLM."
        raise MeasureError(f"cannot start {command[0]}: {error.strerror}", "--python", fix) from error


def last_lines(said: bytes | None) -> str:
    """The end of what a process said."""
    return "\n".join((said or b"").decode(errors="replace").rstrip().splitlines()[-15:])


def signal_group(group: int, number: signal.Signals) -> None:
    """Send a signal to every process of a group, if there is one left."""
    with suppress(ProcessLookupError):
        os.killpg(group, number)


def group_exists(group: int, leader: subprocess.Popen[bytes]) -> bool:
    """Whether a process of the group is left."""
    leader.poll()  # reap it, or its group would exist for ever
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def heeds_ctrl_c() -> None:
    """For ``preexec_fn``: SIGINT ends a new process, whatever ours does. A shell without job control starts
    what it puts into the background deaf to it, and so all that that starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
