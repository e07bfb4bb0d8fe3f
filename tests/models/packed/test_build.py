"""The C library: built once and whole, by whoever comes first, and the reason in words where it cannot be."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lors_cli.models.packed.kernels import build, ops

pytestmark = pytest.mark.skipif(os.name != "posix", reason="folders' modes")
QUICK = ("-std=gnu11", "-O0", "-shared", "-fPIC")
SEE = f"from lors_cli.models.packed.kernels import build; build.FLAGS = {QUICK}; print(build.library().instructions())"


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Nothing is built yet, and it is built quickly."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(build, "FLAGS", QUICK)
    forget()
    yield
    forget()


def forget() -> None:
    for remembering in (build.library, ops._why_no_library, ops._function, ops._largest_batch):
        remembering.cache_clear()


def libraries(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "lors" / "kernels").iterdir())


def test_it_is_built_once_and_only_the_user_may_write_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ops.available(torch.bfloat16) is None
    (path,) = libraries(tmp_path)
    assert path.parent.stat().st_mode & 0o777 == 0o700
    before = path.stat().st_mtime_ns
    forget()
    monkeypatch.setenv("PATH", "")  # no compiler is needed any more
    assert ops.available(torch.bfloat16) is None
    assert path.stat().st_mtime_ns == before
    assert ops.available(torch.float64) == "there is none for float64"


def test_a_library_built_under_a_lax_umask_is_ours_all_the_same(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        assert ops.available(torch.bfloat16) is None
        (path,) = libraries(tmp_path)
        assert (path.stat().st_mode | path.parent.stat().st_mode) & 0o777 == 0o700
        forget()
        assert ops.available(torch.bfloat16) is None
    finally:
        os.umask(before)


def test_other_sources_flags_and_processors_have_libraries_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    key = build._key(QUICK)
    assert build._key((*QUICK, "-DX=1")) != key
    monkeypatch.setattr(build, "processor_features", lambda: "flags : fpu")
    assert build._key(QUICK) != key
    monkeypatch.undo()
    monkeypatch.setattr(build, "SOURCES", build.SOURCES[:-1])
    assert build._key(QUICK) != key


def test_no_compiler_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", "")
    assert ops.available(torch.bfloat16) == "there is no C compiler (cc, gcc, clang) on the PATH"
    assert libraries(tmp_path) == []


@pytest.mark.parametrize(("command", "reason"), [
    ("{folder}/missing", "No such file"), ("{folder}/broken", r"broken.*failed: it broke"), (" ", None),
    ("{cc} -DUNROLL=1 -Werror", "redefined"),
])  # fmt: skip
def test_a_compiler_that_fails_is_quoted(
    command: str, reason: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = tmp_path / "broken"
    script.write_text("#!/bin/sh\necho it broke >&2\nexit 3\n")
    script.chmod(0o755)
    monkeypatch.setenv("CC", command.format(folder=tmp_path, cc="cc"))
    if reason is None:
        assert ops.available(torch.bfloat16) is None
        return
    with pytest.raises(build.NoKernels, match=reason):
        build.library()
    assert ops.available(torch.bfloat16)
    assert libraries(tmp_path) == []


def test_a_broken_library_is_built_anew(tmp_path: Path) -> None:
    assert ops.available(torch.float32) is None
    (path,) = libraries(tmp_path)
    whole = path.read_bytes()
    for content in (whole[:5000], whole[:-1] + bytes([whole[-1] ^ 1]), b"", b"no library"):
        path.unlink()  # a file that is loaded may not change
        path.write_bytes(content)
        forget()
        assert ops.available(torch.float32) is None
        assert len(path.read_bytes()) == len(whole)


@pytest.mark.parametrize("part", ["folder", "file"])
def test_what_others_may_write_is_not_loaded(part: str, tmp_path: Path) -> None:
    assert ops.available(torch.float32) is None
    (path,) = libraries(tmp_path)
    (path.parent if part == "folder" else path).chmod(0o777)
    forget()
    reason = ops.available(torch.float32)
    assert reason is not None
    assert "others may write" in reason
    assert str(path if part == "file" else path.parent) in reason


def test_a_cache_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    reason = ops.available(torch.float32)
    assert reason is not None
    assert "cannot be kept or loaded" in reason


def test_an_older_torch_does_not_lend_its_threads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(build.ctypes, "CDLL", lambda path: object())
    with pytest.raises(build.NoKernels, match="does not lend its threads"):
        build._torch_threads()


def test_plain_c_is_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "instructions", lambda: "plain C")
    assert "neither AVX2 nor NEON" in str(ops.available(torch.float32))


def test_two_processes_may_build_at_once(tmp_path: Path) -> None:
    both = [subprocess.Popen([sys.executable, "-c", SEE], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    answers = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert answers[0] == answers[1] != ""
    assert len(libraries(tmp_path)) == 1
