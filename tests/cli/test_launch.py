"""`--nproc`: what the launcher starts, passes on, shows and leaves behind."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from typer.testing import Result

from lors_cli.cli import launch as module
from lors_cli.cli.launch import launch, together
from lors_cli.errors import UsageError
from lors_cli.machine import devices


def python(*lines: str) -> list[str]:
    """A command that runs these lines; `rank` is its number."""
    return [sys.executable, "-c", "\n".join(["import os, sys, time", "rank = int(os.environ['RANK'])", *lines])]


def wait_for(path: Path) -> str:
    """The text of a file, once it is there."""
    while not path.is_file() or not path.read_text():
        time.sleep(0.05)
    return path.read_text()


def test_every_process_knows_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(devices, "usable_cores", lambda: 8)
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")
    write = "import json; open(sys.argv[1] + f'/{rank}', 'w').write(json.dumps(dict(os.environ)))"
    assert launch([*python(write), str(tmp_path)], 3) == 0
    found = [[json.loads((tmp_path / str(rank)).read_text())[name] for name in names] for rank in range(3)]
    port = found[0][5]
    assert found == [[str(rank), str(rank), "3", "3", "127.0.0.1", port, "2"] for rank in range(3)]
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert module._environment(0, 3, 1)["OMP_NUM_THREADS"] == "5"


def test_the_first_process_alone_is_heard(capfd: pytest.CaptureFixture[str]) -> None:
    assert launch(python("print('out', rank)", "print('err', rank, file=sys.stderr)"), 2) == 0
    assert capfd.readouterr() == ("out 0\n", "err 0\n")


def test_a_failure_ends_the_others_and_is_heard(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(module.GRACE_S, False, 0.0)
    fails = ("if rank == 1:", "    sys.stderr.write('no model\\n')", "    sys.exit(3)", "time.sleep(600)")
    assert launch(python(*fails), 2) == 3
    assert capfd.readouterr().err == "no model\n"


def test_a_killed_process_is_named(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(module.GRACE_S, False, 0.0)
    assert launch(python("if rank == 1:", "    os.kill(os.getpid(), 9)", "time.sleep(600)"), 2) == 4
    assert "process 1 was killed by signal 9; is memory short?" in capfd.readouterr().err


def launcher_of(command: list[str]) -> subprocess.Popen[bytes]:
    """A process of its own that launches a command twice."""
    code = "import sys, json; from lors_cli.cli.launch import launch; sys.exit(launch(json.loads(sys.argv[1]), 2))"
    return subprocess.Popen([sys.executable, "-c", code, json.dumps(command)])


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_an_interrupt_reaches_every_process_once(tmp_path: Path, sent: signal.Signals) -> None:
    waits = (
        "import signal", "count = 0", "def note(*_):", "    global count; count += 1",
        f"signal.signal({int(sent)}, note)",
        "open(sys.argv[1] + f'/started-{rank}', 'w').write('yes')",
        "while not count: time.sleep(0.05)", "time.sleep(0.3)",
        "open(sys.argv[1] + f'/{rank}', 'w').write(str(count))", "sys.exit(130)",
    )  # fmt: skip
    with launcher_of([*python(*waits), str(tmp_path)]) as launcher:
        for rank in (0, 1):
            wait_for(tmp_path / f"started-{rank}")
        launcher.send_signal(sent)
        assert launcher.wait() == 130
    assert [(tmp_path / str(rank)).read_text() for rank in (0, 1)] == ["1", "1"]


@pytest.mark.skipif(sys.platform != "linux", reason="a process learns of its parent's death on Linux")
def test_no_process_outlives_a_killed_launcher(tmp_path: Path) -> None:
    lives = (
        "from lors_cli.cli.launch import die_with_launcher", "die_with_launcher()",
        "open(sys.argv[1] + f'/{rank}', 'w').write(str(os.getpid()))", "time.sleep(600)",
    )  # fmt: skip
    with launcher_of([*python(*lives), str(tmp_path)]) as launcher:
        pids = [int(wait_for(tmp_path / str(rank))) for rank in (0, 1)]
        launcher.kill()
    for pid in pids:
        while _lives(pid):
            time.sleep(0.05)


def _lives(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def test_a_failure_of_one_process_is_the_failure_of_all(capfd: pytest.CaptureFixture[str]) -> None:
    code = """
import os
from lors_cli.machine import processes as parallel
from lors_cli.cli.framework import guarded
from lors_cli.errors import SparsityError

def work():
    with parallel.joined():
        assert parallel.gather(parallel.process_index()) == [0, 1]
        if parallel.process_index() == 1:
            raise SparsityError("known to one alone", "a hint")
        parallel.wait_for_all()

guarded(work)()
"""
    assert launch([sys.executable, "-c", code], 2) == 5
    assert capfd.readouterr().err == "error: known to one alone\n  a hint\n"


def test_what_nproc_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[int] = []
    monkeypatch.setattr(module, "launch", lambda command, number: started.append(number) or 7)
    together(None)
    together(1)
    assert started == []
    with pytest.raises(typer.Exit) as left:
        together(2)
    assert (started, left.value.exit_code) == ([2], 7)
    with pytest.raises(UsageError, match="give 1 or more"):
        together(0)
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match="torchrun has started some"):
        together(2)
    monkeypatch.setenv(module.LAUNCHER, "1")
    together(2)  # one of those that were started
    assert started == [2]


def test_a_recipe_runs_in_two_processes(
    finished_workshop: Path, at_workshop: Path, lors: Callable[..., Result]
) -> None:
    asked = ["run", "tiny.yaml", "prune.calibration.batch_size=4", "pack={}", "--json"]
    command = [sys.executable, "-m", "lors_cli", *asked, "--nproc", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert [stage["status"] for stage in json.loads(done.stdout)["stages"]] == ["done"] * 4
    one, two = (folder / "runs" / "tiny" for folder in (finished_workshop, at_workshop))
    for name in ("dense.json", "samples/dense/pydoc_choice.jsonl"):
        assert (two / "eval" / name).read_bytes() == (one / "eval" / name).read_bytes()
    again = lors(*asked)  # in one process
    assert [stage["status"] for stage in json.loads(again.stdout)["stages"]] == ["skipped"] * 4
