"""Files: read, or refused in one message; written whole or not at all; how a path is told from a name."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from servecast.sim.inputs.errors import InputError, reason


def read_text(path: Path, *, fix: str, where: str | None = None) -> str:
    """A file's text, which is UTF-8.

    Raises:
        InputError: it cannot be read; ``where`` in place of its path.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot be read: {reason(error)}", where=where or str(path), fix=fix) from None


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a file beside ``path``, which then takes its place. Missing folders are made.

    Raises:
        InputError: the file cannot be written; what stood there stays.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(partial)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        what = f"cannot be written: {error.strerror}"
        raise InputError(what, where=str(path), fix="Give another path.") from None


def file_or_name(name: str | None) -> str | None:
    """A name as it is; a path absolute, since scenarios read paths relative to their own folder."""
    if name is None or not ("/" in name or Path(name).suffix in (".json", ".yaml", ".yml")):
        return name
    return str(Path(name).absolute())
