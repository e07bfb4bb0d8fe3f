"""Long steps: what a file, a terminal and -q get to see of them."""

from __future__ import annotations

import threading

import pytest

from lors_cli.errors import UsageError
from lors_cli.machine import memory as heap
from lors_cli.output import console, progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, to be set by the test; memory is always the same."""
    now = [0.0]
    monkeypatch.setattr(heap, "memory_in_use", lambda: 3 << 29)
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


Capture = pytest.CaptureFixture[str]


def test_progress_in_a_file_is_a_line_now_and_then(capsys: Capture, clock: list[float]) -> None:
    with progress.progress("prune", 4, "blocks") as task:
        for now in (3.0, 10.0, 15.0, 70.0):
            clock[0] = now
            task.advance(note=f"at {now:g}")
    assert capsys.readouterr().err.splitlines() == [
        "  prune: 2/4 blocks · 10 s elapsed · about 10 s left · at 10 · memory 1.5 GiB",
        "  prune: 4/4 blocks · 1 min 10 s elapsed · about 0 s left · at 70 · memory 1.5 GiB",
        "  prune: done, 4 blocks in 1 min 10 s",
    ]


def test_the_interval_is_the_users(capsys: Capture, clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORS_HEARTBEAT_S", "2.5")
    monkeypatch.setattr(heap, "gpu_memory_in_use", lambda: 2 << 30)
    with progress.progress("prune", 4, "blocks") as task:
        for now in (2.0, 3.0, 5.0, 6.0):
            clock[0] = now
            task.beat()
    assert capsys.readouterr().err.splitlines() == [
        "  prune: 0/4 blocks · 3 s elapsed · memory 1.5 GiB · GPU 2.0 GiB",
        "  prune: 0/4 blocks · 6 s elapsed · memory 1.5 GiB · GPU 2.0 GiB",
    ]
    for text in ("soon", "0", "-1", "nan", "inf"):
        monkeypatch.setenv("LORS_HEARTBEAT_S", text)
        with pytest.raises(UsageError, match="must be a number of seconds above 0"), progress.progress("prune", 4):
            pass


def test_work_that_does_not_advance_shows_a_sign_of_life(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setenv("LORS_HEARTBEAT_S", "0.01")
    seen, show = threading.Event(), console.info
    lines: list[str] = []

    def info(message: str) -> None:
        show(message)
        lines.append(message)
        if len(lines) == 3:
            seen.set()

    monkeypatch.setattr(console, "info", info)
    with progress.progress("tune", 100, "steps") as task:
        task.update(7, "loss 2.000")
        assert seen.wait(60)
    assert all(line.startswith("  tune: 7/100 steps · 0 s elapsed · ") for line in lines[1:3])
    assert "loss 2.000 · memory " in capsys.readouterr().err
    assert not [thread for thread in threading.enumerate() if thread.name == "heartbeat"]
    console.configure(verbosity=-1)
    with progress.progress("tune", 100, "steps"):
        assert not [thread for thread in threading.enumerate() if thread.name == "heartbeat"]


def test_earlier_work_does_not_count_for_the_time_left(capsys: Capture, clock: list[float]) -> None:
    with progress.progress("tune", 100, "steps") as task:
        task.skip(90)
        clock[0] = 20.0
        task.advance(5)
        assert "95/100 steps · 20 s elapsed · about 20 s left" in capsys.readouterr().err


def test_progress_without_a_total(capsys: Capture, clock: list[float]) -> None:
    with progress.progress("read", None, "rows") as task:
        clock[0] = 11.0
        task.advance(7)
    assert capsys.readouterr().err.splitlines()[0] == "  read: 7 rows · 11 s elapsed · memory 1.5 GiB"


def test_quiet_hides_progress(capsys: Capture, clock: list[float]) -> None:
    console.configure(verbosity=-1)
    with progress.progress("prune", 4, "blocks") as task:
        clock[0] = 60.0
        task.advance()
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    console.configure()
    with progress.progress("prune [x]", 4, "blocks") as task:
        assert task.bar is not None
        task.update(4, "note [y]")
    shown = capsys.readouterr().err
    assert "4/4" in shown


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-1, "0 s"), (0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (185, "3 min 05 s"), (7800, "2 h 10 min")],
)
def test_durations(seconds: float, text: str) -> None:
    assert progress.duration(seconds) == text


def test_busy_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("COLUMNS", "40")
    console.configure()
    with progress.busy("reading"):
        pass
    shown = capsys.readouterr().err
    assert "reading" in shown
    assert shown.endswith("\x1b[2K")  # the line is erased


def test_busy_is_silent_in_a_file(capsys: Capture) -> None:
    with progress.busy("reading"):
        pass
    assert capsys.readouterr().err == ""
