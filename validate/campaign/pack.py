"""What a campaign left, as one compressed archive in parts that are small enough to be carried."""

from __future__ import annotations

import json
import tarfile
import time
import zlib
from io import BytesIO
from lzma import LZMAFile
from pathlib import Path
from typing import IO, Any, cast

from servecast.sim.inputs.errors import InputError
from servecast.validate.campaign.campaign import MANIFEST

PART_BYTES = 15 << 20
MOST_PARTS = 4  # the manifest lies beside them, as it is
PACK_S = 30.0  # it takes no longer
NAME = "campaign.tar.xz"
_BULKY = ("recording.jsonl", ".log")  # ends of names of what is packed last
_NEVER = ("tokenizer.json",)  # made again from the plan
_PRESET, _BYTES_A_SECOND = 1, 10e6  # of xz; the pace is a slow machine's
_TIMES = ("ttfts", "itls", "start_times")
_PLACES = 6  # decimals: a clock tells microseconds


class _Parts:
    """A file that goes on in the next part when one is full. Written to, not read."""

    def __init__(self, folder: Path, part_bytes: int) -> None:
        self._folder, self._part_bytes = folder, part_bytes
        self._file: IO[bytes] | None = None
        self._room = 0
        self.files: list[Path] = []

    def write(self, data: bytes) -> int:
        view = memoryview(data)
        while view:
            if not self._room:
                self.close()
                self.files.append(self._folder / f"{NAME}.{len(self.files):02}")
                self._file, self._room = self.files[-1].open("wb"), self._part_bytes
            assert self._file is not None
            taken = view[: self._room]
            self._file.write(taken)
            self._room -= len(taken)
            view = view[len(taken) :]
        return len(data)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def pack(
    out: Path,
    folder: Path,
    *,
    part_bytes: int = PART_BYTES,
    most_parts: int = MOST_PARTS,
    seconds: float = PACK_S,
) -> tuple[list[Path], list[str]]:
    """Pack a campaign's folder into ``folder``: parts that ``cat PARTS | tar xJ`` unpacks, and the manifest.

    The campaign may be running. Results of ``vllm bench serve`` are packed without the texts that were
    generated, and with times to the microsecond. Recordings and logs come last; what would go beyond the
    parts or the seconds is left out.

    Returns:
        the files, and the paths that were left out.

    Raises:
        InputError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob(f"{NAME}.*"):
            old.unlink()
        return _pack(out, folder, part_bytes * most_parts, _Parts(folder, part_bytes), seconds)
    except OSError as error:
        raise InputError(
            f"cannot be written: {error.strerror}", where=f"--pack {folder}", fix="Give another folder."
        ) from None


def _pack(
    out: Path, folder: Path, most_bytes: int, parts: _Parts, seconds: float
) -> tuple[list[Path], list[str]]:
    paths = [path for path in out.rglob("*") if path.is_file() and path.name not in _NEVER]
    paths.sort(key=lambda path: (path.name.endswith(_BULKY), path.name.endswith(".csv"), str(path)))
    room, left_out, until = most_bytes - (1 << 16), list[str](), time.monotonic() + seconds
    with (
        LZMAFile(cast(IO[bytes], parts), "wb", preset=_PRESET) as packed,
        tarfile.open(fileobj=packed, mode="w|") as archive,
    ):
        for path in paths:
            try:
                content, modified = _content(path), path.stat().st_mtime
            except FileNotFoundError:  # the campaign goes on
                continue
            late = time.monotonic() + len(content) / _BYTES_A_SECOND > until
            needed = len(zlib.compress(content, 1)) + 512  # xz needs less than that
            name = str(path.relative_to(out))
            if late or needed > room:
                left_out.append(name)
                continue
            room -= needed
            entry = tarfile.TarInfo(name)
            entry.size, entry.mtime = len(content), int(modified)
            archive.addfile(entry, BytesIO(content))
    parts.close()
    files = list(parts.files)
    if (out / MANIFEST).exists():
        files.append(folder / MANIFEST)
        files[-1].write_bytes((out / MANIFEST).read_bytes())
    return files, left_out


def _content(path: Path) -> bytes:
    content = path.read_bytes()
    if path.name != "bench.json":
        return content
    try:
        result: dict[str, Any] = json.loads(content)
        result.pop("generated_texts", None)
        for name in _TIMES:
            if name in result:
                result[name] = _rounded(result[name])
    except (ValueError, AttributeError, TypeError):  # half written: as it is
        return content
    return json.dumps(result, separators=(",", ":")).encode()


def _rounded(value: Any) -> Any:
    return [_rounded(each) for each in value] if isinstance(value, list) else round(value, _PLACES)
