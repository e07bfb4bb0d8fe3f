"""`lors sweep --executor slurm` on a real Slurm: killed, failing, requeued and cancelled jobs, and the plain report.

`make slurm` sets Slurm up and runs this (tests/slurm/cluster.sh); $LORS_SLURM_KILLS (10) is for the last test.
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from chains import compare, results
from forking import command, wait_for

from lors_cli.files import locks

pytestmark = pytest.mark.slurm

CELLS = """\
name: six
recipe: tiny.yaml
set: {tune.max_steps: 60, eval.limit: 2, eval.perplexity_windows: 2}
grid:
  - {prune.method: [wanda, magnitude], tune.method: [lors, sqft]}
  - {prune.method: [magnitude], tune.method: [hira]}
  - {prune.method: [magnitude], tune.data.dataset: [broken.jsonl]}
"""
OUT = Path("sweeps/six")
SLURM = ("sweep", "six.yaml", "--executor", "slurm", "--partition", "test", "--jobs", "2", "--time", "00:30:00",
         "--sbatch", "cpus-per-task=1", "--json")  # fmt: skip


@pytest.fixture(scope="session", autouse=True)
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cluster of one node, for as long as the tests run."""
    script, folder = Path(__file__).with_name("cluster.sh"), tmp_path_factory.mktemp("cluster")
    folder.chmod(0o755)
    for above in folder.parents:
        if above.owner() == psutil.Process().username() and above != Path("/"):
            above.chmod(above.stat().st_mode | 0o011)  # munged is a user of its own
    subprocess.run([script, "start", folder], check=True)
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    yield
    subprocess.run([script, "stop", folder], check=True)


@pytest.fixture(scope="session")
def start(workshop: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workshop with the sweep's file, nothing run."""
    folder = tmp_path_factory.mktemp("start") / "workshop"
    shutil.copytree(workshop, folder)
    first = (folder / "rows.jsonl").read_text().splitlines()[0]
    (folder / "broken.jsonl").write_text(f"{first}\n{{}}\n")
    (folder / "six.yaml").write_text(CELLS)
    return folder


@pytest.fixture(scope="session")
def plain(start: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the plain command leaves, stage after stage in one process."""
    folder = tmp_path_factory.mktemp("plain") / "workshop"
    shutil.copytree(start, folder)
    done = subprocess.run(
        [sys.executable, "-m", "lors_cli", "sweep", "six.yaml"], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    assert "5 done, 1 failed" in done.stdout
    return folder


@pytest.fixture
def at_start(start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder is a fresh copy of `start`; no job is left in the queue at the end."""
    folder = tmp_path / "workshop"
    shutil.copytree(start, folder)
    monkeypatch.chdir(folder)
    yield folder
    subprocess.run(["scancel", "--user", "root"], check=False)
    wait_for(lambda: None if queue() else True)


def ended(process: subprocess.Popen[str], seconds: float = 600) -> tuple[int, dict[str, Any], str]:
    stdout, stderr = process.communicate(timeout=seconds)
    return process.returncode, json.loads(stdout), stderr


def queue(state: str = "all") -> list[str]:
    """Numbers of the jobs in the queue."""
    done = subprocess.run(["squeue", "--noheader", "--format", "%i %T"], capture_output=True, text=True, check=True)
    found = [line.split() for line in done.stdout.splitlines()]
    return [number for number, now in found if state in ("all", now)]


def tuning(other_than: str = "") -> Path | None:
    """A stage that is at work in tuning and has saved a checkpoint."""
    places = [place for place in OUT.glob("stages/tune-*") if place.name != other_than]
    return next((place for place in places if any(place.glob("checkpoints/*")) and locks.holder(place)), None)


def job_of(place: Path) -> str:
    return str(json.loads((OUT / "jobs" / f"{place.name}.job.json").read_text())["id"])


def differences(plain: Path) -> list[str]:
    """How what lies here differs from what the plain command left, its report included, but for times."""
    mine = {name: content for name, content in results(OUT).items() if not name.startswith("jobs/")}
    found = compare(results(plain / OUT), mine)
    sides = [_rows(folder / "report.csv") for folder in (plain / OUT, OUT)]
    assert len(sides[0]) > 40
    return found + ([] if sides[0] == sides[1] else ["differs: report.csv"])


def _rows(path: Path) -> list[dict[str, str]]:
    """What a report says but of times and memory."""
    timed = ("elapsed", "tokens_per_s", "peak_memory")
    rows = list(csv.DictReader(path.read_text().splitlines()))
    return [row for row in rows if not row["measure"].startswith(timed)]


def logs() -> dict[str, str]:
    return {path.stem: path.read_text() for path in sorted(OUT.glob("jobs/*.log"))}


def test_six_cells_with_one_killed_one_failing_and_one_requeued(at_start: Path, plain: Path) -> None:
    first = command(*SLURM)
    killed = wait_for(tuning)
    owner = locks.holder(killed)
    assert owner is not None
    assert len(queue("RUNNING")) <= 2
    os.kill(owner.pid, signal.SIGKILL)
    saved = wait_for(lambda: tuning(killed.name))
    subprocess.run(["scancel", "--signal=USR2", job_of(saved)], check=True)  # as Slurm does before a job's time is up
    busiest = 0
    while first.poll() is None:
        busiest = max(busiest, len(queue("RUNNING")))
        time.sleep(0.5)
    code, document, stderr = ended(first)
    assert busiest == 2
    assert code in (2, 4), stderr  # of the first cell that failed
    assert [cell["status"] for cell in document["cells"]].count("failed") == 2
    assert {failed["exit_code"] for failed in document["failed"].values()} == {2, 4}
    assert queue() == []
    said = logs()[saved.name]
    assert "stopped by SIGUSR1" in said
    assert said.count("· tune:") == 2
    assert "resum" in said

    again = command(*SLURM)
    code, document, stderr = ended(again)
    assert code == 2, stderr
    assert [cell["status"] for cell in document["cells"]] == ["done"] * 5 + ["failed"]
    assert differences(plain) == []
    shown = subprocess.run(
        [sys.executable, "-m", "lors_cli", "sweep", "six.yaml", "--status"], capture_output=True, text=True, check=True
    ).stdout
    assert "5 done, 1 failed" in shown
    assert "broken.jsonl" in shown


def test_jobs_go_on_without_the_command_and_another_one_follows_them(at_start: Path, plain: Path) -> None:
    first = command(*SLURM)
    wait_for(lambda: True if len(list(OUT.glob("jobs/*.job.json"))) >= 15 and queue("RUNNING") else None)
    first.kill()
    first.communicate()
    before = {path.name: path.read_text() for path in OUT.glob("jobs/*.job.json")}
    both = [command(*SLURM) for _ in range(2)]
    answers = [ended(process) for process in both]
    assert [code for code, _, _ in answers] == [2, 2], answers
    after = {path.name: path.read_text() for path in OUT.glob("jobs/*.job.json")}
    (broken,) = (cell for cell in json.loads((OUT / "sweep.json").read_text())["cells"] if cell["status"] == "failed")
    again = {Path(place).name for place in (broken["stages"]["tune"], broken["models"]["tuned"])}
    assert {name.partition(".")[0] for name in before if after[name] != before[name]} <= again
    assert differences(plain) == []


def test_two_submissions_at_once_submit_every_stage_once(at_start: Path, plain: Path) -> None:
    both = [command(*SLURM) for _ in range(2)]
    answers = [ended(process) for process in both]
    assert [code for code, _, _ in answers] == [2, 2], answers
    numbers = [json.loads(path.read_text())["id"] for path in OUT.glob("jobs/*.job.json")]
    assert len(set(numbers)) == len(numbers) == len(list(OUT.glob("jobs/*.job.json")))
    assert all(text.count("nothing to do") == 0 for text in logs().values())
    assert differences(plain) == []


def test_killed_at_random_moments_it_ends_equal(at_start: Path, plain: Path) -> None:
    rng = random.Random(int(os.environ.get("LORS_SLURM_SEED", "0")))
    left = int(os.environ.get("LORS_SLURM_KILLS", "10"))
    while True:
        process = command(*SLURM)
        while left and process.poll() is None:
            time.sleep(rng.uniform(0.5, 8.0))
            at_work = {place: owner for place in OUT.glob("stages/*") if (owner := locks.holder(place))}
            if not at_work:
                continue
            place = rng.choice(sorted(at_work))
            what = rng.choice(["stage", "stage", "job", "signal", "command"])
            if what == "command":
                process.kill()
            elif what == "stage":
                with contextlib.suppress(ProcessLookupError):
                    os.kill(at_work[place].pid, signal.SIGKILL)
            else:
                subprocess.run(
                    ["scancel", *(["--signal=USR2"] if what == "signal" else []), job_of(place)], check=False
                )
            print(f"killed: {what} of {place.name}", flush=True)
            left -= 1
        stdout, stderr = process.communicate(timeout=600)
        assert process.returncode in (-9, 2, 4), stderr
        states = [cell["status"] for cell in json.loads(stdout)["cells"]] if process.returncode > 0 else []
        if not left and states.count("done") == 5:
            break
    assert differences(plain) == []
