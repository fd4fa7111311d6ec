"""Files that are written whole or not at all, and how a path is told from a name."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from servecast.sim.inputs.errors import InputError


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
        raise InputError(
            f"cannot be written: {error.strerror}", where=str(path), fix="Give another path."
        ) from None


def file_or_name(name: str | None) -> str | None:
    """A name as it is; a path absolute, since scenarios read paths relative to their own folder."""
    if name is None or not ("/" in name or Path(name).suffix in (".json", ".yaml", ".yml")):
        return name
    return str(Path(name).absolute())
