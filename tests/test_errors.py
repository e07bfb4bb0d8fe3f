"""Which foreign exceptions are the user's, and what they are told."""

from __future__ import annotations

import errno
import importlib
from pathlib import Path

import pytest
import torch
from huggingface_hub import errors as hub
from safetensors import SafetensorError

from lors_cli.errors import (
    LorsError,
    MissingError,
    ResourceError,
    SparsityError,
    UsageError,
    first_line,
    nearest,
    require_file,
    translate,
)

# The HTTP client of the installed hub library: httpx in 1.x, httpx2 from 2.x.
httpx = importlib.import_module(hub.HfHubHTTPError.__mro__[1].__module__.partition(".")[0])
RESPONSE = httpx.Response(403, request=httpx.Request("GET", "https://huggingface.co/x"))


@pytest.mark.parametrize(
    ("kind", "code"), [(LorsError, 2), (UsageError, 2), (MissingError, 3), (ResourceError, 4), (SparsityError, 5)]
)
def test_exit_codes(kind: type[LorsError], code: int) -> None:
    assert kind("m").exit_code == code


def test_text() -> None:
    assert str(UsageError("what")) == "what"
    assert str(UsageError("what", "do this")) == "what\n  do this"


def wrapped(inner: BaseException, *, explicit: bool) -> BaseException:
    """A RuntimeError that was raised while, or because, `inner` was handled."""
    try:
        try:
            raise inner
        except BaseException as error:
            if explicit:
                raise RuntimeError("outer") from error
            raise RuntimeError("outer")  # noqa: B904
    except RuntimeError as error:
        return error


FOREIGN: list[tuple[BaseException, type[LorsError], str]] = [
    (RuntimeError("Dataset scripts are no longer supported, but found logiqa.py"), MissingError,
     "needs a loading script, which datasets ≥ 4 does not run: logiqa.py"),
    (OSError(errno.ENOSPC, "No space left on device", "/out/x"), ResourceError, "disk is full writing /out/x"),
    (OSError("Not enough disk space. Needed: 9 TiB (download: 1 TiB)"), ResourceError, "disk is full: Not enough"),
    (OSError(errno.EDQUOT, "Disk quota exceeded"), ResourceError, "disk is full"),
    (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), ResourceError,
     "disk is full"),
    (OSError(errno.EFBIG, "File too large", "/out/y"), ResourceError, "so large writing /out/y"),
    (OSError(errno.EMFILE, "Too many open files", "/out/z"), ResourceError, "Too many open files"),
    (OSError(errno.EIO, "Input/output error", "/out/z"), ResourceError, "disk failed writing /out/z"),
    (OSError(errno.ESTALE, "Stale file handle", "/out/z"), ResourceError, "disk failed"),
    (OSError(errno.ENOMEM, "Cannot allocate memory"), ResourceError, "Not enough memory"),
    (RuntimeError("can't start new thread"), ResourceError, "Not enough memory"),
    (ImportError("libx.so: failed to map segment from shared object"), ResourceError, "Not enough memory"),
    (SafetensorError("Error while deserializing: Cannot allocate memory (os error 12)"), ResourceError, "Not enough"),
    (SafetensorError('IoError(Os { code: 30, kind: ReadOnlyFilesystem, message: "Read-only file system" })'),
     UsageError, "Read-only"),
    (SafetensorError("I/O error: Permission denied (os error 13)"), UsageError, "Permission denied"),
    (PermissionError(errno.EACCES, "Permission denied", "/out/x"), UsageError, "/out/x"),
    (OSError(errno.EROFS, "Read-only file system", "/x"), UsageError, "Read-only"),
    (MemoryError(), ResourceError, "Not enough memory"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore"), ResourceError, "Tried to allocate"),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), ResourceError, "Not enough memory"),
    (hub.RepositoryNotFoundError("404 no such repo", response=RESPONSE), MissingError, "no such repo"),
    (hub.GatedRepoError("403 gated", response=RESPONSE), MissingError, "gated"),
    (hub.RevisionNotFoundError("404 revision", response=RESPONSE), MissingError, "revision"),
    (hub.HfHubHTTPError("500 server", response=RESPONSE), MissingError, "server"),
    (hub.LocalEntryNotFoundError("not cached"), MissingError, "not cached"),
    (hub.OfflineModeIsEnabled("offline"), MissingError, "offline"),
    (httpx.ConnectError("name resolution failed"), MissingError, "name resolution"),
    (httpx.ReadTimeout("slow"), MissingError, "slow"),
    (ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"), MissingError, "refused"),
    (OSError("x/y is not a local folder and is not a valid model identifier"), MissingError, "x/y"),
    (ModuleNotFoundError("No module named 'gguf'", name="gguf"), MissingError, "'gguf' is not installed"),
    (NotADirectoryError(errno.ENOTDIR, "Not a directory", "/a"), UsageError, "/a"),
    (IsADirectoryError(errno.EISDIR, "Is a directory", "/b"), UsageError, "/b"),
    (FileExistsError(errno.EEXIST, "File exists", "/c"), UsageError, "/c"),
]  # fmt: skip


@pytest.mark.parametrize(("error", "kind", "text"), FOREIGN, ids=lambda value: type(value).__name__)
def test_foreign_exceptions(error: BaseException, kind: type[LorsError], text: str) -> None:
    for thrown in (error, wrapped(error, explicit=True), wrapped(error, explicit=False)):
        found = translate(thrown)
        assert type(found) is kind
        assert text in found.message
        assert "\n" not in found.message


@pytest.mark.parametrize(
    "error",
    [
        ValueError("a bug"),
        KeyError("x"),
        AssertionError(),
        RuntimeError("shape mismatch"),
        FileNotFoundError(errno.ENOENT, "No such file", "/x"),
        BrokenPipeError(errno.EPIPE, "Broken pipe"),
        ModuleNotFoundError("No module named 'lors_cli.nothing'", name="lors_cli.nothing"),
        KeyboardInterrupt(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_everything_else_is_a_bug(error: BaseException) -> None:
    assert translate(error) is None
    assert translate(wrapped(error, explicit=True)) is None


def test_our_own_errors_pass_through() -> None:
    ours = SparsityError("broken")
    assert translate(ours) is ours
    assert translate(wrapped(ours, explicit=True)) is ours


def test_the_first_line_of_an_exception_that_says_nothing_is_its_kind() -> None:
    """Such as a model's bare NotImplementedError, whose scoring then ended in an IndexError."""
    assert first_line(NotImplementedError()) == "NotImplementedError"
    assert first_line(RuntimeError("\n one\ntwo")) == "one"


def test_a_suppressed_context_is_not_the_cause() -> None:
    error = ValueError("a bug")
    error.__context__ = MemoryError()
    assert isinstance(translate(error), ResourceError)
    error.__suppress_context__ = True  # raised `from None`
    assert translate(error) is None


def test_a_ring_of_causes_ends() -> None:
    first, second = ValueError("a"), ValueError("b")
    first.__cause__, second.__cause__ = second, first
    assert translate(first) is None


def test_require_file(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    assert require_file(tmp_path / "a", "adapter weights") == tmp_path / "a"
    for missing in (tmp_path / "b", tmp_path):
        with pytest.raises(MissingError, match="No adapter weights at "):
            require_file(missing, "adapter weights")


def test_the_hint_says_that_the_hub_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    from lors_cli.errors import offline_hint

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE is set" in offline_hint()
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert "hf auth login" in offline_hint()


@pytest.mark.parametrize("number", [errno.ENAMETOOLONG, errno.ELOOP])
def test_a_path_that_no_file_can_have_is_the_users(number: int) -> None:
    found = translate(OSError(number, "x" * 5000, "y"))
    assert isinstance(found, UsageError)
    assert len(found.message) < 300


@pytest.mark.parametrize(
    ("word", "meant"), [("wnda", "wanda"), ("sparsegtp", "sparsegpt"), ("zzz", None), ("", None), ("w" * 10_000, None)]
)
def test_nearest(word: str, meant: str | None) -> None:
    assert nearest(word, ("wanda", "sparsegpt")) == meant
    assert nearest("wax", ("wanda",)) is None
    assert nearest("wax", ("wanda",), cutoff=0.5) == "wanda"
