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
from lors_cli.files import locks, records
from lors_cli.files.locks import LOCK_NAME, hold
from lors_cli.files.owners import Owner

HOLDER = """
import sys, time
from pathlib import Path
from lors_cli.files.locks import hold
with hold(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""
ELSEWHERE = """
import socket, sys
from pathlib import Path
from lors_cli.errors import UsageError
from lors_cli.files import locks, owners, records
from lors_cli.output import progress
socket.gethostname, owners._boot = lambda: "node17", lambda: "0f9d2b1c-3a53-4c63-b4a5-000000000000"
folder, how = Path(sys.argv[1]), sys.argv[2]
try:
    with locks.hold(folder), progress.progress("work", 9, "steps") as task:
        (records.staging_dir(folder) / "result").write_text("of node17")
        print("held", flush=True)
        input()
        if how == "step":
            task.advance()
        else:
            records.publish(folder, records.StageRecord("prune", "f", {}, {}, {}, {}, 1.0, {}))
except UsageError as error:
    print("lost:", error.message, flush=True)
else:
    print("done", flush=True)
"""
"""A process that takes itself for one on node17; it goes on when it is told to."""
LEASE_S = 2.0


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


@contextmanager
def elsewhere(folder: Path, how: str = "publish", lease_s: float = LEASE_S) -> Iterator[subprocess.Popen[str]]:
    """A process of another machine that holds `folder`."""
    process = subprocess.Popen(
        [sys.executable, "-c", ELSEWHERE, str(folder), how], cwd=Path(locks.__file__).parents[2], text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, "LORS_LEASE_S": str(lease_s)},
    )  # fmt: skip
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def goes_on(process: subprocess.Popen[str]) -> str:
    """What a process of another machine says at its end."""
    return process.communicate("\n", timeout=60)[0]


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
    assert list((tmp_path / "run").iterdir()) == []


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


def test_a_file_that_says_more_is_read(tmp_path: Path) -> None:
    owner = replace(Owner.this_process(), pid=4, host="node17", boot=another_boot(), since="2026-01-02 03:04:05 UTC")
    (tmp_path / LOCK_NAME).write_text(json.dumps({**asdict(owner), "started": 1767323045.5}))
    with pytest.raises(UsageError, match="in use by pid 4 on node17 since 2026-01-02 03:04:05 UTC"):
        with hold(tmp_path):
            pass


@pytest.mark.parametrize("torn", ["", '{"pid": 12', "pid 12 on host\n", "[1]", '{"pid": 12}'])
def test_a_torn_file_holds_nothing(tmp_path: Path, torn: str) -> None:
    (tmp_path / LOCK_NAME).write_text(torn)
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


# Leases ---------------------------------------------------------------------------------------------------------


def test_another_machine_that_is_alive_is_not_taken_over(tmp_path: Path) -> None:
    with elsewhere(tmp_path) as process:
        until = time.monotonic() + 2 * LEASE_S
        while time.monotonic() < until:
            with pytest.raises(UsageError, match=f"in use by pid {process.pid} on node17 since") as refused:
                with hold(tmp_path):
                    pass
            time.sleep(0.2)
        assert "last sign of life is" in str(refused.value.hint)
        assert "done" in goes_on(process)
    assert records.read_record(tmp_path) is not None
    with hold(tmp_path):
        pass


def test_one_that_was_killed_is_taken_over_when_its_lease_has_run_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with elsewhere(tmp_path) as process:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        killed = time.monotonic()
        with pytest.raises(UsageError, match="on node17"):
            with hold(tmp_path):
                pass
        with hold(tmp_path, wait_s=0.05):
            waited_s = time.monotonic() - killed
        assert LEASE_S * (1 - 1 / locks.SIGNS) - 0.1 < waited_s < LEASE_S + 1
    said = " ".join(capsys.readouterr().err.split())
    assert f"taken over from pid {process.pid} on node17" in said
    assert "which has given no sign of life for 2 s" in said


@pytest.mark.parametrize("how", ["publish", "step"])
def test_one_that_was_stopped_finds_out_that_it_lost_the_folder(tmp_path: Path, how: str) -> None:
    """It holds the kernel's lock all the while, as with a file server that has not noticed."""
    with elsewhere(tmp_path, how) as process:
        os.kill(process.pid, signal.SIGSTOP)
        with hold(tmp_path, wait_s=0.05):
            (records.staging_dir(tmp_path) / "result").write_text("of this one")
            if how == "publish":
                records.publish(tmp_path, records.StageRecord("prune", "f", {}, {}, {}, {}, 1.0, {}))
            os.kill(process.pid, signal.SIGCONT)
            said = goes_on(process)
            assert f"lost: {tmp_path} is no longer held by this process" in said
            assert f"pid {os.getpid()} on {os.uname().nodename} since" in said
            locks.check(tmp_path)  # still ours, and so is what we wrote
        if how == "publish":
            assert (tmp_path / "result").read_text() == "of this one"
            assert records.is_finished(tmp_path, "f")
    assert not (tmp_path / LOCK_NAME).exists()


def test_one_that_finds_the_folder_released_by_another_has_lost_it_too(tmp_path: Path) -> None:
    with elsewhere(tmp_path) as process:
        os.kill(process.pid, signal.SIGSTOP)
        with hold(tmp_path, wait_s=0.05):
            pass
        os.kill(process.pid, signal.SIGCONT)
        assert "another process has taken it over" in goes_on(process)
    assert records.read_record(tmp_path) is None


def test_one_that_was_stopped_for_less_than_its_lease_goes_on(tmp_path: Path) -> None:
    with elsewhere(tmp_path) as process:
        os.kill(process.pid, signal.SIGSTOP)
        time.sleep(LEASE_S / 2)
        os.kill(process.pid, signal.SIGCONT)
        assert "done" in goes_on(process)


def test_the_lease_is_measured_by_the_file_systems_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with elsewhere(tmp_path):
        monkeypatch.setattr(time, "time", lambda: 9e9)  # this machine's clock is set wrong
        monkeypatch.setattr(time, "gmtime", lambda *_: (2255, 3, 14, 16, 0, 0, 0, 73, 0))
        with pytest.raises(UsageError, match="on node17"):
            with hold(tmp_path):
                pass


def test_a_stopped_process_of_this_machine_keeps_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel knows that it lives: a person may have stopped it with Ctrl-Z."""
    monkeypatch.setenv("LORS_LEASE_S", "0.2")
    with held(tmp_path) as holder:
        os.kill(holder.pid, signal.SIGSTOP)
        time.sleep(0.5)
        with pytest.raises(UsageError, match=f"in use by pid {holder.pid} "):
            with hold(tmp_path):
                pass


def test_of_many_that_wait_for_a_dead_one_each_gets_the_folder_alone(tmp_path: Path) -> None:
    """Also where the kernel's locks are each machine's own."""
    leave(tmp_path, host="node17", boot=another_boot(), lease_s=0.5)
    racers = [
        subprocess.Popen([sys.executable, "-c", RACER, str(tmp_path), str(number)], cwd=Path(locks.__file__).parents[2])
        for number in range(4)
    ]
    assert [racer.wait(60) for racer in racers] == [0] * 4
    assert len((tmp_path / "seen").read_text().split()) == 4 * 25


RACER = """
import contextlib, fcntl, socket, sys
from pathlib import Path
from lors_cli.files import locks, owners
folder, number = Path(sys.argv[1]), sys.argv[2]
socket.gethostname, owners._boot = lambda: f"node{number}", lambda: number
fcntl.flock = lambda *_: None  # another machine's locks are not seen here
for _ in range(25):
    with locks.hold(folder, wait_s=0.001):
        with open(folder / "inside", "x"):
            (folder / "seen").open("a").write("x\\n")
        locks.check(folder)
        (folder / "inside").unlink()
"""


def test_a_lease_that_is_no_number_of_seconds_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORS_LEASE_S", "-3")
    with pytest.raises(UsageError, match=r"\$LORS_LEASE_S is -3; it must be a number of seconds above 0"):
        with hold(tmp_path):
            pass
