"""`lors sweep --executor local`: stages as processes; kills, failures, a second command; and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import types
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from chains import compare, results
from forking import Forked, command, forked, wait_for
from typer.testing import Result

from lors_cli.errors import MissingError, UsageError
from lors_cli.files import atomic, locks
from lors_cli.files.records import RECORD_NAME, StageRecord
from lors_cli.machine import devices
from lors_cli.machine.processes import LAUNCHER
from lors_cli.sweep import local, slurm
from lors_cli.sweep.cells import load_sweep
from lors_cli.sweep.index import update_index, write_index
from lors_cli.sweep.job_folder import JobFolder
from lors_cli.sweep.jobs import COMMAND, Job, jobs_of
from lors_cli.sweep.local import Local
from lors_cli.sweep.slurm import Slurm
from lors_cli.sweep.stages import plan_cells

Lors = Callable[..., Result]
PAIR = """\
name: pair
recipe: tiny.yaml
set: {tune.max_steps: 40, eval.tasks: [], eval.perplexity_windows: 2, prune.method: magnitude}
grid: {tune.method: [lors, sqft]}
"""
OUT = Path("sweeps/pair")
LOCAL = ("sweep", "pair.yaml", "--executor", "local", "--jobs", "2")


@pytest.fixture
def at_pair(at_workshop: Path) -> Path:
    """The current folder is a fresh copy of the workshop with a sweep of two cells and six stages."""
    Path("pair.yaml").write_text(PAIR)
    return at_workshop


@pytest.fixture(scope="session")
def serial(workshop: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the plain command leaves."""
    folder = tmp_path_factory.mktemp("serial") / "workshop"
    shutil.copytree(workshop, folder)
    (folder / "pair.yaml").write_text(PAIR)
    done = forked("sweep", "pair.yaml", first=lambda: os.chdir(folder)).completed()
    assert done.returncode == 0, done.stderr
    return left_by(folder)


def left_by(folder: Path) -> dict[str, Any]:
    """What a sweep has left but what its jobs said."""
    found = results(folder / OUT)
    return {name: content for name, content in found.items() if not name.startswith(("jobs/", "report.", "figures/"))}


def forked_job(name: str, cell: str, folder: JobFolder, **environment: str) -> Forked:
    """As `jobs.start`, without what every process imports."""
    environment[LAUNCHER] = str(os.getpid())
    return forked(COMMAND, str(folder.text), cell, name, "--out", str(folder.out), said=folder.log(name), **environment)


def tuning() -> psutil.Process | None:
    """A process of this folder's sweep that has saved a step of tuning, and goes on."""
    for place in OUT.glob("stages/tune-*"):
        owner = locks.holder(place)
        if owner is not None and any(place.glob("checkpoints/*")):
            return psutil.Process(owner.pid)
    return None


def logs() -> dict[str, str]:
    return {path.stem: path.read_text() for path in sorted(OUT.glob("jobs/*.log"))}


def test_it_ends_in_what_the_plain_command_leaves(
    at_pair: Path, lors: Lors, serial: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:  # but for the last one
        patch.setattr(local, "start", forked_job)
        result = lors(*LOCAL)
    assert result.exit_code == 0, result.output
    assert compare(serial, left_by(at_pair)) == []
    said = logs()
    assert len(said) == 7
    assert all(text.count("took") + text.count("resum") <= 1 and "error" not in text for text in said.values())
    document = json.loads(lors("sweep", "pair.yaml", "--status", "--json").stdout)
    assert [cell["status"] for cell in document["cells"]] == ["done", "done"]
    before = {path: path.stat().st_mtime_ns for path in OUT.rglob("*") if path.is_file()}
    again = lors(*LOCAL)
    assert "Nothing was left to do." in again.stdout
    assert {path: path.stat().st_mtime_ns for path in OUT.rglob("*") if path.is_file()} == before
    (place,) = OUT.glob("stages/prune-*")
    (place / "model.safetensors").unlink()  # its record still says that it is done
    assert lors(*LOCAL).exit_code == 0
    assert compare(serial, left_by(at_pair)) == []


@pytest.mark.long
def test_a_killed_stage_is_told_and_the_next_call_goes_on(at_pair: Path, lors: Lors, serial: dict[str, Any]) -> None:
    first = command(*LOCAL, "--json")
    wait_for(tuning).kill()
    stdout, stderr = first.communicate(timeout=300)
    assert first.returncode == 4, stderr
    document = json.loads(stdout)
    (failed,) = document["failed"].values()
    assert "was killed by signal 9; is memory short?" in failed["message"]
    assert sorted(cell["status"] for cell in document["cells"]) == ["done", "failed"]
    status = json.loads(lors("sweep", "pair.yaml", "--status", "--json").stdout)
    states = {
        stage["stage"]: stage for cell in status["cells"] for stage in cell["stages"] if cell["status"] == "failed"
    }
    assert (states["tune"]["status"], states["eval tuned"]["status"]) == ("failed", "waiting")
    assert "killed by signal 9" in states["tune"]["detail"]
    result = lors(*LOCAL)
    assert result.exit_code == 0, result.output
    assert compare(serial, left_by(at_pair)) == []


@pytest.mark.long
def test_a_stopped_command_stops_its_stages_which_save(at_pair: Path, lors: Lors, serial: dict[str, Any]) -> None:
    first = command(*LOCAL)
    process = wait_for(tuning)
    first.send_signal(signal.SIGTERM)
    _, stderr = first.communicate(timeout=300)
    assert first.returncode == 130, stderr
    assert not process.is_running()
    assert any("stopped by SIGTERM" in text for text in logs().values())
    assert all(cell["status"] == "pending" for cell in json.loads((OUT / "sweep.json").read_text())["cells"])
    result = lors("sweep", "pair.yaml")  # the plain command goes on where they stopped
    assert result.exit_code == 0, result.output
    assert compare(serial, left_by(at_pair)) == []


@pytest.mark.long
def test_a_killed_command_takes_its_stages_with_it(at_pair: Path, lors: Lors, serial: dict[str, Any]) -> None:
    first = command(*LOCAL)
    process = wait_for(tuning)
    first.kill()
    first.communicate(timeout=60)
    process.wait(60)
    assert lors(*LOCAL).exit_code == 0
    assert compare(serial, left_by(at_pair)) == []


@pytest.mark.long
def test_two_commands_at_once_share_the_stages(at_pair: Path, serial: dict[str, Any]) -> None:
    both = [command(*LOCAL, "--json") for _ in range(2)]
    answers = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], answers
    assert compare(serial, left_by(at_pair)) == []
    did = [
        text.count("· tune:") + text.count("· prune:") for name, text in logs().items() if not name.startswith("eval")
    ]
    assert did == [1, 1, 1]  # in all, though both may have started a process for it


@pytest.mark.long
def test_a_failed_stage_fails_its_cells_as_in_the_plain_command(at_pair: Path, lors: Lors) -> None:
    rows = Path("rows.jsonl").read_text().splitlines()
    Path("broken.jsonl").write_text(f"{rows[0]}\n{{}}\n")
    Path("pair.yaml").write_text(PAIR.replace("grid: {", "grid: {tune.data.dataset: [broken.jsonl, rows.jsonl], ")
                                 .replace("[lors, sqft]", "[lors]"))  # fmt: skip
    plain = lors("sweep", "pair.yaml", "--out", "plain")
    result = lors(*LOCAL)
    assert (plain.exit_code, result.exit_code) == (2, 2)
    assert (OUT / "sweep.json").read_bytes() == Path("plain/sweep.json").read_bytes()
    assert "tune: broken.jsonl" in " ".join(result.stderr.split()) or "broken.jsonl" in result.stderr
    shown = lors("sweep", "pair.yaml", "--status").stdout
    assert "1 done, 1 failed" in shown
    assert "broken.jsonl" in shown


# Without processes of ours ---------------------------------------------------------------------------------------


@pytest.fixture
def jobs(at_pair: Path) -> tuple[list[Job], JobFolder]:
    sweep = load_sweep(Path("pair.yaml"))
    return jobs_of(plan_cells(sweep.cells, OUT), {"lors", "sqft"}), JobFolder.of(OUT, sweep)


def test_jobs_wait_for_what_they_read(jobs: tuple[list[Job], JobFolder]) -> None:
    stages = {job.name: job.plan.stage for job in jobs[0]}
    order = list(stages)
    assert sorted(stages.values()) == ["eval"] * 4 + ["prune"] + ["tune"] * 2
    for job in jobs[0]:
        expected = {("eval", "dense"): [], ("prune", "dense"): [], ("eval", "pruned"): ["prune"],
                    ("tune", "pruned"): ["prune"], ("eval", "tuned"): ["tune"]}[
            (job.plan.stage, next(iter(job.plan.models)))]  # fmt: skip
        assert [stages[name] for name in job.after] == expected
        assert all(order.index(name) < order.index(job.name) for name in job.after)


def test_lanes_keep_all_processes_busy(jobs: tuple[list[Job], JobFolder]) -> None:
    work = {"eval": 1.0, "prune": 1.0, "tune": 100.0}
    timed = [replace(job, work=work[job.plan.stage]) for job in jobs[0]]
    lanes = slurm.lanes_of(timed, 2)
    stages = [f"{job.plan.stage} {next(iter(job.plan.models))}" for job in jobs[0]]
    assert stages == [
        "eval dense", "prune dense", "eval pruned", "tune pruned", "eval tuned", "tune pruned", "eval tuned",
    ]  # fmt: skip
    assert list(lanes.values()) == [0, 1, 0, 1, 1, 0, 0]  # a tuning each
    assert all(job.work > 1e4 for job in jobs[0])
    assert set(slurm.lanes_of(jobs[0], 1).values()) == {0}


def test_each_process_has_a_gpu_of_its_own_and_no_more_run_at_once(
    jobs: tuple[list[Job], JobFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    at_work, most, seen, names = dict[str, str](), list[int](), list[str](), list[str]()

    class Process:
        def __init__(self, name: str, gpu: str) -> None:
            assert gpu not in at_work.values()
            self.name, self.left, self.returncode = name, 3, None
            at_work[name] = gpu
            seen.append(gpu)
            most.append(len(at_work))

        def poll(self) -> int | None:
            self.left -= 1
            if self.left <= 0 and self.returncode is None:
                del at_work[self.name]
                self.returncode = 0  # type: ignore[assignment]
            return self.returncode

    def start(name: str, cell: str, folder: JobFolder, **environment: str) -> Process:
        assert environment["OMP_NUM_THREADS"] == "4"
        names.append(name)
        return Process(name, environment["CUDA_VISIBLE_DEVICES"])

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(devices, "usable_cores", lambda: 8)
    monkeypatch.setattr(local, "start", start)
    monkeypatch.setattr(local, "POLL_S", 0.0)
    Local.of(None, "3,5").run(*jobs, lambda job, state: None)
    assert max(most) == 2
    assert set(seen) == {"3", "5"}
    assert sorted(names) == sorted(job.name for job in jobs[0])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--jobs", "2"], "--jobs has no effect without --executor local or slurm"),
        (["--executor", "ray"], "--executor ray: there is local"),
        (["--executor", "local", "--partition", "gpu"], "--partition has no effect without --executor slurm"),
        (["--executor", "local", "--gpus", "two"], "--gpus two: give the numbers"),
        (["--executor", "local", "--gpus", "0,0"], "--gpus 0,0: give the numbers"),
        (["--executor", "local", "--gpus", "0,1", "--jobs", "3"], "--jobs 3: there are 2 GPUs"),
        (["--executor", "slurm", "--gpus", "4"], "--gpus 4: a stage of a sweep uses one GPU"),
        (["--executor", "slurm", "--time", "soon"], "--time soon"),
        (["--executor", "slurm"], "--executor slurm needs --time"),
        (["--executor", "slurm", "--sbatch", "account"], "--sbatch account: give an option of sbatch and its value"),
        (["--executor", "slurm", "--sbatch", "dependency=singleton"], "dependency: lors gives it itself: a stage"),
        (["--executor", "slurm", "--jobs", "4", "--sbatch", "job-name=x"], "--jobs 4 is so many names, of which Slurm"),
        (["--status", "--dry-run"], "Use one of the two"),
        (["--executor", "local", "model.device=cuda:1"], "cuda:1 would be every process's"),
    ],
)
def test_what_cannot_be_meant_is_refused(at_pair: Path, lors: Lors, arguments: list[str], said: str) -> None:
    result = lors("sweep", "pair.yaml", *arguments)
    assert result.exit_code == 2
    assert said in " ".join(result.stderr.split())
    assert not OUT.exists()


def test_without_submitit_or_slurm_nothing_is_begun(at_pair: Path, lors: Lors, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm.importlib.util, "find_spec", lambda name: None)
    result = lors("sweep", "pair.yaml", "--executor", "slurm", "--time", "30")
    assert (result.exit_code, "pip install 'lors-cli[slurm]'" in result.stderr) == (3, True)
    monkeypatch.setattr(slurm.importlib.util, "find_spec", lambda name: "there")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(MissingError, match="here is no sbatch nor srun nor squeue"):
        Slurm.of(None, None, None, "30", [])
    assert not OUT.exists()


@pytest.fixture
def submitted(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What submitit is asked for, a dict a job; their ids are 1, 2 and so on, and `squeue` knows none."""
    asked: list[dict[str, Any]] = []

    class SlurmExecutor:
        def __init__(self, **given: Any) -> None: ...

        def update_parameters(self, **given: Any) -> None:
            asked.append(given)

        def submit(self, process: slurm.StageProcess) -> Any:
            return types.SimpleNamespace(job_id=len(asked))

    errors = {"FailedJobError": RuntimeError, "FailedSubmissionError": RuntimeError}
    for name, content in (("submitit", {"SlurmExecutor": SlurmExecutor}), ("submitit.core", {}),
                          ("submitit.core.utils", errors)):  # fmt: skip
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(slurm, "queued", dict)
    return asked


def test_what_a_job_asks_for(jobs: tuple[list[Job], JobFolder], submitted: list[dict[str, Any]]) -> None:
    mine = Slurm(30, jobs=2, more={"cpus_per_task": "8", "account": "mine"})
    mine._submit(*jobs)
    assert len(submitted) == len(jobs[0])
    for asked in submitted:
        assert asked["srun_args"] == ["--cpus-per-task=8"]
        assert asked["additional_parameters"]["cpus_per_task"] == "8"
        assert "singleton" in asked["additional_parameters"]["dependency"]
    names = {asked["job_name"] for asked in submitted}
    assert len(names) == 2
    elsewhere = JobFolder(Path("other") / OUT.name, jobs[1].text)
    mine._submit(jobs[0], elsewhere)  # a sweep of the same name
    assert not names & {asked["job_name"] for asked in submitted[len(jobs[0]) :]}
    Slurm(30)._submit(*jobs)
    assert "srun_args" not in submitted[-1]


def finish(job: Job) -> None:
    """Leave a stage's record."""
    record = StageRecord(job.plan.stage, job.plan.fingerprint, {}, {}, {}, {}, 1.0, {})
    atomic.write_json(job.plan.folder / RECORD_NAME, asdict(record))


def test_a_stage_that_another_command_is_at_work_on_has_not_failed(
    jobs: tuple[list[Job], JobFolder], submitted: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm, "SETTLE_S", 0.0)
    monkeypatch.setattr(slurm, "POLL_S", 0.0)
    first = jobs[0][1]
    second = next(job for job in jobs[0] if job.after == (first.name,))
    told, turns, holding = list[tuple[str, str]](), 0, ExitStack()

    def queued() -> dict[str, str]:
        """Job 1 is gone and another command holds its folder; job 2 is gone, and job 9 has taken its place."""
        nonlocal turns
        turns += 1
        if turns == 2:
            holding.enter_context(locks.hold(first.plan.folder))
        if turns == 6:
            finish(first)
            holding.close()
            jobs[1].note_submission(second.name, {"id": "9", "after": []})
        if turns == 8:
            finish(second)
        return {"9": "RUNNING"} if turns == 7 else {}

    monkeypatch.setattr(slurm, "queued", queued)
    Slurm(30).run([first, second], jobs[1], lambda job, state: told.append((job.name, state)))
    assert told == [(first.name, "done"), (second.name, "started"), (second.name, "done")]
    assert jobs[1].failure(second.name) is None


def test_a_job_that_is_ending_is_no_job_in_the_queue(
    jobs: tuple[list[Job], JobFolder], submitted: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm, "POLL_S", 0.0)
    ended, again = jobs[0][:2]
    jobs[1].note_submission(ended.name, {"id": "7", "after": []})
    jobs[1].note_submission(again.name, {"id": "8", "after": []})
    states = iter([{"7": "COMPLETING", "8": "COMPLETING"}, {"7": "COMPLETING", "8": "PENDING"}, {"8": "PENDING"}])
    monkeypatch.setattr(slurm, "queued", lambda: next(states))
    assert Slurm(30)._submit([ended, again], jobs[1]) == {ended.name: "1", again.name: "8"}


def test_a_stage_that_failed_and_is_at_work_again_is_running(tmp_path: Path) -> None:
    cell = {"name": "c", "status": "failed", "error": "x", "stages": {"tune": "stages/tune-1"}, "models": {}}
    (tmp_path / "sweep.json").write_text(json.dumps({"name": "s", "cells": [cell]}))
    with locks.hold(tmp_path / "stages/tune-1"):
        update_index(tmp_path, {"tune-1": "an earlier word"}.get)
        found = json.loads((tmp_path / "sweep.json").read_text())["cells"][0]
    assert (found["status"], found["error"]) == ("running", None)


def test_a_cell_that_earlier_settings_have_finished_is_theirs_until_the_last_have_too(tmp_path: Path) -> None:
    entry = {"name": "c", "status": "done", "error": None, "stages": {}, "models": {"tuned": "stages/eval-1"}}
    later = {**entry, "status": "pending", "models": {"tuned": "stages/eval-2"}}
    write_index(tmp_path, {"name": "s", "cells": [entry]}, "name: s\n")
    write_index(tmp_path, {"name": "s", "cells": [later]}, "name: s\nset: {}\n")
    assert (tmp_path / "sweep.yaml").read_text() == "name: s\n"

    def cell() -> dict[str, Any]:
        (found,) = json.loads((tmp_path / "sweep.json").read_text())["cells"]
        return found  # type: ignore[no-any-return]

    assert cell() == {**entry, "unfinished": later}
    update_index(tmp_path, {"eval-2": "no room"}.get)
    assert cell() == {**entry, "unfinished": {**later, "status": "failed", "error": "no room"}}
    record = StageRecord("eval", "f", {}, {}, {}, {}, 1.0, {})
    atomic.write_json(tmp_path / "stages/eval-2" / RECORD_NAME, asdict(record))
    update_index(tmp_path, {}.get)
    assert cell() == {**later, "status": "done"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [("30", 30), ("90:30", 91), ("04:00:00", 240), ("1-12", 2160), ("2-01:30", 2970), ("1-00:00:01", 1441)],
)
def test_times_are_slurms(text: str, expected: int) -> None:
    assert slurm.minutes(text) == expected


@pytest.mark.parametrize("text", ["", "0", "1h", "1:2:3:4", "-5"])
def test_other_times_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--time"):
        slurm.minutes(text)


WRITER = """
import sys
from pathlib import Path
from lors_cli.files import atomic, locks
from lors_cli.files.records import RECORD_NAME, StageRecord
from lors_cli.sweep.index import update_index, write_index
out, name = Path(sys.argv[1]), sys.argv[2]
for turn in range(40):
    with locks.hold(out, wait_s=0.001):
        update_index(out, {name: f"turn {turn} of {name}"}.get)
"""


def test_the_index_is_whole_while_several_processes_write_it(tmp_path: Path) -> None:
    names = [f"tune-{number}" for number in range(3)]
    cells = [
        {"name": name, "status": "pending", "error": None, "stages": {"tune": f"stages/{name}"}, "models": {}}
        for name in names
    ]
    (tmp_path / "sweep.json").write_text(json.dumps({"name": "s", "cells": cells}))
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), name]) for name in names]
    while any(writer.poll() is None for writer in writers):
        assert len(json.loads((tmp_path / "sweep.json").read_text())["cells"]) == 3  # whole at any time
    assert [writer.returncode for writer in writers] == [0] * 3
    update_index(tmp_path, {"tune-1": "the last word"}.get)
    found = json.loads((tmp_path / "sweep.json").read_text())["cells"]
    assert [(cell["status"], cell["error"]) for cell in found] == [
        ("pending", None), ("failed", "the last word"), ("pending", None),
    ]  # fmt: skip
