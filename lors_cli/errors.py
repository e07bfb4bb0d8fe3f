"""The few kinds of error a user can meet, and the one map from foreign exceptions to them.

Exit codes: 0 ok, 1 bug, 2 usage or recipe, 3 a model, dataset or package is missing, offline or
gated, 4 not enough memory or disk, 5 sparsity broken, 130 interrupted.
"""

from __future__ import annotations

import difflib
import errno
import os
import re
from collections.abc import Iterable
from pathlib import Path


class LorsError(Exception):
    """A user's mistake or the machine's limit: a message (what is wrong, and where) and a hint (what to do now)."""

    exit_code = 2

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  {self.hint}" if self.hint else self.message


class UsageError(LorsError):
    """A wrong argument, recipe or input file."""

    exit_code = 2


class MissingError(LorsError):
    """A model, dataset or package that is not here and cannot be fetched."""

    exit_code = 3


class ResourceError(LorsError):
    """Not enough memory or disk."""

    exit_code = 4


class PeerError(ResourceError):
    """Another process of the same job is gone."""


class SparsityError(LorsError):
    """A weight that breaks the promised sparsity pattern."""

    exit_code = 5


_OFFLINE_HINT = (
    "Check the name and the network, or use a local folder. For gated repositories accept the licence on "
    "the hub and run `hf auth login`."
)
_HUB_ERRORS = (
    "RepositoryNotFoundError", "GatedRepoError", "RevisionNotFoundError", "EntryNotFoundError",
    "LocalEntryNotFoundError", "OfflineModeIsEnabled", "HfHubHTTPError", "HFValidationError",
    "DatasetNotFoundError", "DataFilesNotFoundError", "ConnectionError", "ConnectError", "ConnectTimeout",
    "ReadTimeout", "ProxyError", "MaxRetryError", "NameResolutionError",
)  # fmt: skip
_SCRIPT = re.compile(r"Dataset scripts are no longer supported, but found (\S+)")
"""What datasets 4 and 5 say."""


def offline_hint() -> str:
    """What to do when something cannot be had from the hub."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return "HF_HUB_OFFLINE is set, so the hub is not asked: unset it, or use a local folder."
    return _OFFLINE_HINT


def translate(error: BaseException) -> LorsError | None:
    """The user's error behind an exception that reached the command line, or None when it is a bug of ours."""
    for link in _causes(error):
        if isinstance(link, LorsError):
            return link
        found = _translate_one(link)
        if found is not None:
            return found
    return None


def innermost(error: BaseException) -> str:
    """What the innermost cause of an exception says, on one line."""
    cause = _causes(error)[-1]
    return (str(cause).strip() or type(cause).__name__).splitlines()[0]


def _causes(error: BaseException) -> list[BaseException]:
    """The exception and everything it was raised from, outermost first."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
    return chain


def _translate_one(error: BaseException) -> LorsError | None:
    name = type(error).__name__
    text = str(error).strip() or name
    first_line = text.splitlines()[0]
    limit = _limit(error, text)
    if limit is not None:
        return limit
    if "gloo/transport" in text or name in ("DistNetworkError", "DistBackendError"):
        return PeerError(
            f"Another process of this job is gone: {first_line}",
            "Look for its own message; if it has none, the system may have ended it for its memory.",
        )
    if _number(error, text) in (errno.EACCES, errno.EPERM, errno.EROFS):
        return UsageError(f"Cannot write or read there: {first_line}", "Choose a folder you may write to.")
    if getattr(error, "errno", None) in (errno.ENAMETOOLONG, errno.ELOOP):
        return UsageError(f"No such file: {first_line[:200]}", "Check the path that was given.")
    if isinstance(error, BrokenPipeError):  # a ConnectionError, but of our own output
        return None
    if name in _HUB_ERRORS or any(base.__name__ in _HUB_ERRORS for base in type(error).__mro__):
        return MissingError(f"Not reachable: {first_line}", offline_hint())
    script = _SCRIPT.search(text)
    if script:
        return MissingError(
            f"The dataset needs a loading script, which datasets ≥ 4 does not run: {script[1]}",
            "Use a copy of it that is plain data files (Parquet, JSON lines), or leave it out.",
        )
    if isinstance(error, OSError) and "is not a local folder" in text:
        return MissingError(first_line, offline_hint())
    if isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith("lors_cli"):
        return MissingError(f"The package {error.name!r} is not installed.", f"pip install {error.name}")
    if isinstance(error, (NotADirectoryError, IsADirectoryError, FileExistsError)):
        return UsageError(f"A file stands where a folder should be, or the reverse: {first_line}")
    return None


_MEMORY_HINT = (
    "Use fewer or shorter samples, a smaller per_device_batch_size, or bfloat16 weights; the same command goes on from "
    "what is finished."
)
_DISK_HINT = (
    "Free some space or choose another --out; what was finished before is intact, and the same command goes on."
)
_DEVICE_HINT = "Look at the disk or its network (dmesg, df); what was finished before is intact."
_MEMORY_SIGNS = ("DefaultCPUAllocator", "failed to map segment", "can't start new thread", "std::bad_alloc")


def _limit(error: BaseException, text: str) -> ResourceError | None:
    """The machine's limit that was met, if it was one."""
    first_line = getattr(error, "strerror", None) or text.splitlines()[0]
    number = _number(error, text)
    if (
        isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or number == errno.ENOMEM
        or (isinstance(error, (RuntimeError, ImportError)) and any(sign in text for sign in _MEMORY_SIGNS))
    ):  # fmt: skip
        return ResourceError(f"Not enough memory: {first_line}", _MEMORY_HINT)
    path = getattr(error, "filename", None)
    where = f" writing {path}" if path else ""
    writer_broke = isinstance(error, RuntimeError) and "inline_container.cc" in text  # torch.save on a full disk
    if "No space left on device" in text or writer_broke or number in (errno.ENOSPC, errno.EDQUOT):
        return ResourceError(f"The disk is full{where}: {first_line}", _DISK_HINT)
    if number == errno.EFBIG:
        return ResourceError(f"No file may be so large{where}: {first_line}", "Raise the limit: ulimit -f")
    if number in (errno.EMFILE, errno.ENFILE):
        return ResourceError(f"{first_line}{where}.", "Raise the limit: ulimit -n")
    if number in (errno.EIO, errno.ESTALE):
        return ResourceError(f"The disk failed{where}: {first_line}", _DEVICE_HINT)
    return None


def _number(error: BaseException, text: str) -> int | None:
    """The operating system's number for an error, also where a Rust library has it in its text only."""
    number = getattr(error, "errno", None)
    if isinstance(number, int):
        return number
    found = re.search(r"\bos error (\d+)|\bOs \{ code: (\d+)", text)
    return int(found[1] or found[2]) if found else None


def nearest(word: str, names: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The name that was perhaps meant by `word`; None when none is at least as much alike as `cutoff` (0 to 1)."""
    close = difflib.get_close_matches(word[:100], list(names), n=1, cutoff=cutoff)
    return close[0] if close else None


def require_file(path: Path, what: str) -> Path:
    """`path`, or a MissingError that names its role (`what`: “adapter weights”)."""
    if not path.is_file():
        raise MissingError(f"No {what} at {path}.")
    return path


def shorten(text: str, length: int = 60) -> str:
    """`text` on one line of at most `length` characters."""
    line = text if text.isprintable() else repr(text)[1:-1]
    return line if len(line) <= length else line[: length - 1] + "…"
