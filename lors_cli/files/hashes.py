"""Hashes of files and of settings: what identifies a result."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from lors_cli.errors import UsageError
from lors_cli.files.remembered import Remembered

_known = Remembered("sha256", "file hashes", most=5000)
REMEMBERED_FROM = 1 << 20
"""Bytes of a file whose hash takes longer to make than to look up."""


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's content, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def cached_sha256(path: Path) -> str:
    """`file_sha256`, of a large file remembered per user by path, size and modification time.

    Raises:
        UsageError: as `check_name`.
    """
    stat, place = path.stat(), path.resolve()
    check_name(place)
    if stat.st_size < REMEMBERED_FROM:
        return file_sha256(path)
    key = f"{place}|{stat.st_size}|{stat.st_mtime_ns}|{stat.st_ino}"
    if isinstance(known := _known.get(key), str):
        return known
    digest = file_sha256(path)
    if time.time() - stat.st_mtime >= 5:  # a file still being written could change within the clock's grain
        _known.keep(key, digest)
    return digest


def check_name(path: Path) -> None:
    """Refuse a path that no record could say, before anything is made of it.

    Raises:
        UsageError: its bytes are not UTF-8.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError:
        shown = os.fsencode(path).decode("utf-8", "backslashreplace")
        raise UsageError(f"{shown}: the name is not UTF-8.", "Give the file or folder another name.") from None


def digits(text: str, number: int) -> str:
    """So many hexadecimal digits of a text's SHA-256: what tells it from others in a name."""
    return hashlib.sha256(text.encode()).hexdigest()[:number]


def plain(value: Any) -> Any:
    """Dataclasses, tuples and paths as plain JSON values."""
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return value


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys, after a prefix, and values of settings with settings in them."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def fingerprint(stage: str, version: int, config: Any, inputs: dict[str, Any]) -> str:
    """A short hash, 32 hexadecimal digits, of everything that a stage's result depends on.

    Args:
        version: raised when the stage's code changes its results.
        inputs: fingerprints of the model and of the data it reads.
    """
    content = json.dumps(plain([stage, version, config, inputs]), sort_keys=True, ensure_ascii=False)
    return digits(content, 32)
