"""One process a folder: who is refused, what a killed one leaves, what another machine's says."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from lors_cli.errors import UsageError
from lors_cli.files import locks
from lors_cli.files.locks import LOCK_NAME, Owner, hold

HOLDER = """
import sys, time
from pathlib import Path
from lors_cli.files.locks import hold
with hold(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@contextmanager
def held(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds `folder`; at the end it is killed."""
    root = Path(locks.__file__).parents[2]
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], cwd=root, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def leave(folder: Path, **changes: Any) -> Owner:
    """The lock file of a process that was killed: this one with changes."""
    owner = replace(Owner.this_process(), **changes)
    (folder / LOCK_NAME).write_text(json.dumps(asdict(owner)))
    return owner


def utc(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))


def another_boot() -> str:
    return "0f9d2b1c-3a53-4c63-b4a5-000000000000"


def test_a_second_process_is_refused_until_the_first_is_killed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with held(tmp_path / "run") as holder:
        written = json.loads((tmp_path / "run" / LOCK_NAME).read_text())
        assert (written["pid"], written["host"]) == (holder.pid, os.uname().nodename)
        with pytest.raises(UsageError, match=rf"run is in use by pid {holder.pid} on \S+ since 20\d\d-\d\d-\d\d "):
            with hold(tmp_path / "run"):
                pass
        with hold(tmp_path / "another"):
            pass
    assert "taken over" not in capsys.readouterr().err
    with hold(tmp_path / "run"):
        said = " ".join(capsys.readouterr().err.split())
        assert f"run: taken over from pid {holder.pid} on " in said
        assert json.loads((tmp_path / "run" / LOCK_NAME).read_text())["pid"] == os.getpid()
    assert (tmp_path / "run" / LOCK_NAME).read_text() == ""


def test_it_is_free_after_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="mine"):
        with hold(tmp_path):
            raise ValueError("mine")
    with hold(tmp_path):
        with pytest.raises(UsageError, match="is in use"):
            with hold(tmp_path):
                pass
    assert "taken over" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes",
    [
        {"pid": 2**22 + 1},  # no such process
        {"pid": os.getppid(), "since": "1970-01-01 00:00:01 UTC"},  # a number that was used again
        {"boot": another_boot(), "pid": os.getppid()},  # the machine was started again
        {"host": "container-7f3a"},  # a container of this machine, that is gone
    ],
)
def test_what_a_dead_process_left_is_taken_over(
    tmp_path: Path, changes: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    owner = leave(tmp_path, **changes)
    with hold(tmp_path):
        pass
    assert f"taken over from pid {owner.pid} on {owner.host}" in " ".join(capsys.readouterr().err.split())


def test_an_earlier_versions_file_is_read(tmp_path: Path) -> None:
    """It had the process's start too."""
    owner = Owner(4, "node17", another_boot(), "2026-01-02 03:04:05 UTC")
    (tmp_path / LOCK_NAME).write_text(json.dumps({**asdict(owner), "started": 1767323045.5}))
    with pytest.raises(UsageError, match="in use by pid 4 on node17 since 2026-01-02 03:04:05 UTC"):
        with hold(tmp_path):
            pass


@pytest.mark.parametrize("torn", ["", '{"pid": 12', "pid 12 on host\n", "[1]", '{"pid": 12}'])
def test_a_torn_file_holds_nothing(tmp_path: Path, torn: str) -> None:
    (tmp_path / LOCK_NAME).write_text(torn)
    with hold(tmp_path):
        pass


def test_another_machines_lock_is_respected(tmp_path: Path) -> None:
    leave(tmp_path, host="node17", boot=another_boot(), pid=4)
    before = (tmp_path / LOCK_NAME).read_bytes()
    for _ in range(2):
        with pytest.raises(UsageError, match="in use by pid 4 on node17 since") as refused:
            with hold(tmp_path):
                pass
        assert f"remove {tmp_path / LOCK_NAME}" in str(refused.value.hint)
        assert (tmp_path / LOCK_NAME).read_bytes() == before
    (tmp_path / LOCK_NAME).unlink()
    with hold(tmp_path):
        pass


def without_locks(number: int) -> Callable[..., None]:
    def flock(*arguments: Any) -> None:
        raise OSError(number, os.strerror(number))

    return flock


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK])
def test_where_the_kernel_cannot_lock_the_owners_process_is_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fcntl, "flock", without_locks(number))
    parent = psutil.Process(os.getppid())
    leave(tmp_path, pid=parent.pid)
    with pytest.raises(UsageError, match=f"in use by pid {parent.pid} "):
        with hold(tmp_path):
            pass
    leave(tmp_path, pid=parent.pid, since=utc(parent.create_time() - 3600))  # a number that was used again
    with hold(tmp_path):
        pass
    leave(tmp_path, pid=2**22 + 1)
    with hold(tmp_path):
        pass
    assert "no locks" in capsys.readouterr().err


def test_other_failures_of_locking_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", without_locks(errno.EIO))
    with pytest.raises(OSError, match="Input/output"):
        with hold(tmp_path):
            pass


def test_a_folder_that_is_removed_while_it_is_opened_is_locked_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    real, removed = fcntl.flock, list[Path]()

    def flock(file: Any, operation: int) -> None:
        if not removed:
            removed.append(folder)
            shutil.rmtree(folder)
        real(file, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with hold(folder):
        monkeypatch.undo()
        with pytest.raises(UsageError, match=f"pid {os.getpid()} "):
            with hold(folder):
                pass
