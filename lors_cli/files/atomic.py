"""Files that are whole or absent: writes that readers see before or after, never in between."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import socket
import uuid
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

_PARTIAL = re.compile(r"\..+\.([0-9a-f]{8})-(\d+)-[0-9a-f]{8}\.partial")
"""Whose processes it is one of, its number and chance: every writer has a file of its own."""


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file, its folder too, so that readers see the old content or the new, never a part; of several processes
    that write it at once one is the last."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path.parent.absolute())
    partial = path.with_name(f".{path.name}.{_neighbours()}-{os.getpid()}-{uuid.uuid4().hex[:8]}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def is_partial(path: Path) -> bool:
    """Whether a name is that of a file that a killed `write_bytes` has left."""
    return path.name.startswith(".") and path.name.endswith(".partial")


@lru_cache(maxsize=1024)
def _sweep(folder: Path) -> None:
    """Remove what killed processes have left in a folder, before this one first writes there."""
    for path in folder.iterdir():
        found = _PARTIAL.fullmatch(path.name)
        if found is not None and found[1] == _neighbours():
            import psutil

            if not psutil.pid_exists(int(found[2])):
                with contextlib.suppress(OSError):  # another's by now, or another user's
                    path.unlink()


@lru_cache(maxsize=1)
def _neighbours() -> str:
    """What names the processes whose numbers mean something here: this machine's or container's."""
    names = Path("/proc/self/ns/pid")
    place = f"{socket.gethostname()} {os.readlink(names) if names.is_symlink() else ''}"
    return hashlib.sha256(place.encode()).hexdigest()[:8]


def write_text(path: Path, text: str) -> None:
    """`write_bytes` in UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """`write_text` of `to_json`."""
    write_text(path, to_json(value))


def to_json(value: Any) -> str:
    """Indented JSON; NaN and infinities are refused."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Make a file's content survive a power cut."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def read_json(path: Path) -> Any | None:
    """The file's JSON, or None when it is absent (also as something below a file) or not whole."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):  # or nested without end
        return None


def remove(paths: Iterable[Path]) -> None:
    """Remove files and folders."""
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
