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

INTERRUPTED = 130
"""The exit code after Ctrl-C, or a signal that asks to end."""
SURROGATE = re.compile("[\ud800-\udfff]")
"""Half a surrogate pair: no character, and what Python makes of a byte that is not UTF-8."""


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
_NETWORK_HINT = "Check the network; the same command resumes from what is there. Or use a local folder."
_HUB_ERRORS = {
    "HfHubHTTPError", "EntryNotFoundError", "OfflineModeIsEnabled", "HFValidationError", "DatasetNotFoundError",
    "DataFilesNotFoundError", "EmptyDatasetError",
}  # fmt: skip
_CONNECTION_ERRORS = {
    ("builtins", "ConnectionError"), ("socket", "gaierror"), ("httpx", "TransportError"), ("httpx2", "TransportError"),
    ("requests", "RequestException"), ("urllib3", "HTTPError"), ("aiohttp", "ClientError"), ("http", "IncompleteRead"),
    ("huggingface_hub", "XetDownloadError"), ("hf_xet", "XetAuthenticationError"), ("hf_xet", "XetObjectNotFoundError"),
}  # fmt: skip
"""Package and class whose children mean that a connection failed or broke."""
_XET = re.compile(r"\b(CAS (service|client)|[Rr]eqwest|xet)\b")
"""What hf_xet says, whose errors are RuntimeErrors."""
_REASONS = {
    "GatedRepoError": ("is gated", "Accept its licence on the hub's page of it, then log in: hf auth login"),
    "DisabledRepoError": ("is disabled on the hub", "Look for another copy of it."),
    "RevisionNotFoundError": ("has no such branch, tag or commit", "Look at its page on the hub."),
    "RepositoryNotFoundError": (
        "is not on the hub, or not shown without a token", "Check the name; for a private one: hf auth login"
    ),
    "RemoteEntryNotFoundError": ("has no such file", "Look at its page on the hub."),
}  # fmt: skip
"""Of huggingface_hub's errors: what is so of the repository, and what to do."""


_SCRIPT = re.compile(r"Dataset scripts are no longer supported, but found (\S+)")
"""What datasets 4 and 5 say."""


def offline_hint() -> str:
    """What to do when something cannot be had from the hub."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return "HF_HUB_OFFLINE is set, so the hub is not asked: unset it, or use a local folder."
    return _OFFLINE_HINT


def translate(error: BaseException) -> LorsError | None:
    """The user's error behind an exception that reached the command line, or None when it is a bug of ours."""
    chain = _causes(error)
    for place, link in enumerate(chain):
        if isinstance(link, LorsError):
            return link
        found = _translate_one(link)
        if isinstance(found, MissingError):  # the libraries wrap: the reason is farther in
            return next((reason for inner in reversed(chain[place:]) if (reason := _hub_reason(inner))), found)
        if found is not None:
            return found
    return None


def is_connection_failure(error: BaseException) -> bool:
    """Whether a connection failed or broke, or none is to be made; an answer of the hub is none, whatever it says."""
    return any(
        (kind.__module__.partition(".")[0], kind.__name__) in _CONNECTION_ERRORS for kind in type(error).__mro__
    ) or (isinstance(error, (RuntimeError, OSError)) and _XET.search(str(error)) is not None)


def is_passing(error: BaseException) -> bool:
    """Whether the hub answers that it is busy (429) or not well (5xx)."""
    status = getattr(getattr(error, "response", None), "status_code", 0)
    return status == 429 or status >= 500


def _hub_reason(error: BaseException) -> MissingError | None:
    """Why something cannot be had from the hub, where this exception tells."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    text = str(error).strip() or type(error).__name__
    line = text.splitlines()[0]
    name = next((name for name in _REASONS if name in kinds), None)
    repo = getattr(error, "repo_id", None)
    if name is not None:
        what, hint = _REASONS[name]
        if name == "GatedRepoError" and getattr(getattr(error, "response", None), "status_code", 0) == 403:
            what, hint = "is gated, and this token has no access to it", "Ask for access on the hub's page of it."
        return MissingError(f"{repo or 'The repository'} {what}: {line}", hint)
    if "Invalid credentials" in text:
        return MissingError(
            "The hub refuses the token: it is wrong or has expired.",
            "`hf auth login` writes a new one; $HF_TOKEN, where it is set, goes before that.",
        )
    if "HfHubHTTPError" in kinds and is_passing(error):
        return MissingError(
            f"The hub cannot answer now: {line}", "Wait a little; the same command resumes from what is there."
        )
    if "OfflineModeIsEnabled" in kinds:
        return MissingError(f"It is not in the cache here, and the hub is not asked: {line}", offline_hint())
    if is_connection_failure(error) and not isinstance(error, BrokenPipeError):
        return MissingError(f"The connection to the hub failed: {line}", _NETWORK_HINT)
    return None


def innermost(error: BaseException) -> str:
    """What the innermost cause of an exception says, on one line."""
    return first_line(_causes(error)[-1])


def first_line(error: BaseException) -> str:
    """The first line of what an exception says, its kind's name where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


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
    line = first_line(error)
    limit = _limit(error, text)
    if limit is not None:
        return limit
    if "gloo/transport" in text or name in ("DistNetworkError", "DistBackendError"):
        return PeerError(
            f"Another process of this job is gone: {line}",
            "Look for its own message; if it has none, the system may have ended it for its memory.",
        )
    if _number(error, text) in (errno.EACCES, errno.EPERM, errno.EROFS):
        return UsageError(f"Cannot write or read there: {line}", "Choose a folder you may write to.")
    if getattr(error, "errno", None) in (errno.ENAMETOOLONG, errno.ELOOP):
        return UsageError(f"No such file: {line[:200]}", "Check the path that was given.")
    if isinstance(error, BrokenPipeError):  # a ConnectionError, but of our own output
        return None
    if is_connection_failure(error) or any(base.__name__ in _HUB_ERRORS for base in type(error).__mro__):
        return _hub_reason(error) or MissingError(f"Not to be had from the hub: {line}", offline_hint())
    script = _SCRIPT.search(text)
    if script:
        return MissingError(
            f"The dataset needs a loading script, which datasets ≥ 4 does not run: {script[1]}",
            "Use a copy of it that is plain data files (Parquet, JSON lines), or leave it out.",
        )
    if isinstance(error, OSError) and "is not a local folder" in text:
        return MissingError(line, offline_hint())
    if isinstance(error, FileNotFoundError) and "on the Hugging Face Hub either: " in text:  # what datasets says
        return MissingError(line.partition("either: ")[2], offline_hint())
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("lors_cli"):
        return MissingError(f"The package {error.name!r} is not installed.", f"pip install {error.name}")
    if isinstance(error, (NotADirectoryError, IsADirectoryError, FileExistsError)):
        return UsageError(f"A file stands where a folder should be, or the reverse: {line}")
    return None


_MEMORY_HINT = (
    "Use fewer or shorter samples, a smaller per_device_batch_size, or bfloat16 weights; the same command resumes from "
    "what is finished."
)
_DISK_HINT = (
    "Free some space or choose another --out; what was finished before is intact, and the same command resumes."
)
_DEVICE_HINT = "Look at the disk or its network (dmesg, df); what was finished before is intact."
_MEMORY_SIGNS = ("DefaultCPUAllocator", "failed to map segment", "can't start new thread", "std::bad_alloc")
_DISK_SIGNS = ("No space left on device", "Not enough disk space. Needed: ")
"""The second is what datasets says before it downloads."""


def _limit(error: BaseException, text: str) -> ResourceError | None:
    """The machine's limit that was met, if it was one."""
    line = getattr(error, "strerror", None) or text.splitlines()[0]
    number = _number(error, text)
    if (
        isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or number == errno.ENOMEM
        or (isinstance(error, (RuntimeError, ImportError)) and any(sign in text for sign in _MEMORY_SIGNS))
    ):  # fmt: skip
        return ResourceError(f"Not enough memory: {line}", _MEMORY_HINT)
    path = getattr(error, "filename", None)
    where = f" writing {path}" if path else ""
    writer_broke = isinstance(error, RuntimeError) and "inline_container.cc" in text  # torch.save on a full disk
    is_full = any(sign in text for sign in _DISK_SIGNS) or number in (errno.ENOSPC, errno.EDQUOT)
    if is_full or writer_broke:
        return ResourceError(f"The disk is full{where}: {line}", _DISK_HINT)
    if number == errno.EFBIG:
        return ResourceError(f"No file may be so large{where}: {line}", "Raise the limit: ulimit -f")
    if number in (errno.EMFILE, errno.ENFILE):
        return ResourceError(f"{line}{where}.", "Raise the limit: ulimit -n")
    if number in (errno.EIO, errno.ESTALE):
        return ResourceError(f"The disk failed{where}: {line}", _DEVICE_HINT)
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


def did_you_mean(word: str, names: Iterable[str], cutoff: float = 0.6) -> str | None:
    """A hint with the name of `nearest`, None where there is none."""
    close = nearest(word, names, cutoff)
    return f"Did you mean {close}?" if close else None


def require_file(path: Path, what: str) -> Path:
    """`path`, or a MissingError that names its role (`what`: “adapter weights”)."""
    if not path.is_file():
        raise MissingError(f"No {what} at {path}.")
    return path


def shorten(text: str, length: int = 60) -> str:
    """`text` on one line of at most `length` characters."""
    line = text if text.isprintable() else repr(text)[1:-1]
    return line if len(line) <= length else line[: length - 1] + "…"
