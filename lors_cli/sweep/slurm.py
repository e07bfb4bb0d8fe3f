"""`--executor slurm`: a sweep's stages as jobs of a cluster, through submitit.

All jobs are submitted at once, with the stages that they read as dependencies (afterok), and go on without the command
that submitted them. Another command on the same sweep finds what is in the queue and waits for it, or submits what is
missing there.
"""

from __future__ import annotations

import contextlib
import getpass
import importlib.util
import math
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lors_cli.errors import MissingError, UsageError
from lors_cli.files import hashes, locks
from lors_cli.output import console
from lors_cli.sweep.job_folder import JobFolder
from lors_cli.sweep.jobs import Job, start
from lors_cli.sweep.spread import Told

POLL_S = 5.0
SETTLE_S = 60.0
"""How late a network file system may show what a job has written."""
SIGNAL_DELAY_S = 120
"""Seconds before the end of its time that a job is told to save what it has."""
NO_LIMIT = 1_000_000
"""How often a job may run out of time, be saved and go back into the queue."""
NAME = "slurm"
_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<parts>\d+(?::\d\d){0,2})")


@dataclass(frozen=True)
class Slurm:
    """What every job asks for; at most `jobs` of them run at once, where that is given."""

    minutes: int
    partition: str | None = None
    gpus: int = 0
    jobs: int | None = None
    more: Mapping[str, str] = field(default_factory=dict)
    """Other options of sbatch, by their long names."""

    @classmethod
    def of(
        cls, partition: str | None, gpus: str | None, jobs: int | None, time_limit: str | None, more: Sequence[str]
    ) -> Slurm:
        """From the command line.

        Raises:
            UsageError: a value that sbatch would not understand.
            MissingError: submitit or Slurm's commands are not here.
        """
        if gpus not in (None, "0", "1"):
            raise UsageError(f"--gpus {gpus}: a stage of a sweep uses one GPU; give 1, or 0 for none.")
        pairs = [option.partition("=") for option in more]
        for name, sign, _ in pairs:
            if not sign or not re.fullmatch(r"[a-z][a-z-]*", name):
                raise UsageError(f"--sbatch {name}: give an option of sbatch and its value, such as account=mine.")
            if reason := _ours(jobs).get(name):
                raise UsageError(f"--sbatch {name}: lors gives it itself: {reason}.", "Leave it out.")
        if time_limit is None:
            raise UsageError("--executor slurm needs --time, the limit of a job, such as 04:00:00.",
                             "A job that runs out of it is saved and goes on later.")  # fmt: skip
        options = {name.replace("-", "_"): value for name, _, value in pairs}
        found = cls(minutes(time_limit), partition, int(gpus or 0), jobs, options)
        if importlib.util.find_spec("submitit") is None:
            raise MissingError("--executor slurm needs the package submitit, which is not installed.",
                               "pip install 'lors-cli[slurm]'")  # fmt: skip
        lacking = [name for name in ("sbatch", "srun", "squeue", "scontrol") if shutil.which(name) is None]
        if lacking:
            raise MissingError(
                f"--executor slurm needs Slurm's commands, and here is no {' nor '.join(lacking)}.",
                "Start it on a machine of the cluster; for this machine alone: --executor local",
            )
        return found

    def run(self, jobs: Sequence[Job], folder: JobFolder, told: Told) -> None:
        """Have all jobs done but those whose results others lack; what fails is noted in `folder`."""
        with locks.hold(folder.folder, wait_s=0.2):
            ids = self._submit(jobs, folder)
        by_name = {job.name: job for job in jobs}
        left, seen, gone = dict(by_name), set[str](), dict[str, float]()
        while left:
            queue = queued()
            for name, job in list(left.items()):
                state = queue.get(ids[name])
                if state == "RUNNING" and name not in seen:
                    seen.add(name)
                    told(job, "started")
                newer = folder.submission(name) if state is None else None  # another command's
                if newer is not None and newer["id"] != ids[name]:
                    ids[name], state = newer["id"], "SUBMITTED"
                is_finished = state is None and job.is_finished()
                if state is not None or (not is_finished and self._goes_on(job, left)):
                    gone.pop(name, None)
                    continue
                if not is_finished and not self._is_settled(job, gone.setdefault(name, time.monotonic()), folder):
                    continue
                del left[name]
                if is_finished:
                    told(job, "done")
                elif all(by_name[other].is_finished() for other in job.after):
                    _note_silence(job, ids[name], folder)
                    told(job, "failed")
            folder.update_index()
            if left:
                time.sleep(POLL_S)

    def _goes_on(self, job: Job, left: Mapping[str, Job]) -> bool:
        """Whether another command is at work on a stage whose job is gone, or on one that it reads."""
        return locks.holder(job.plan.folder) is not None or any(name in left for name in job.after)

    def _is_settled(self, job: Job, since: float, folder: JobFolder) -> bool:
        """Whether a job that left the queue then, and of which no result is seen, has left none."""
        if any(folder.failure(name) is not None for name in (job.name, *job.after)):
            return True
        if job.plan.folder.is_dir():
            list(job.plan.folder.iterdir())  # has NFS look again
        return time.monotonic() - since > SETTLE_S

    def _submit(self, jobs: Sequence[Job], folder: JobFolder) -> dict[str, str]:
        """Cluster's job ids by name; those that are in the queue stay there."""
        queue, ids, new, until = queued(), dict[str, str](), 0, time.monotonic() + SETTLE_S
        known = {job.name: folder.submission(job.name) for job in jobs}
        while time.monotonic() < until and any(
            queue.get(asked["id"]) == "COMPLETING" for asked in known.values() if asked is not None
        ):  # it leaves the queue, or goes back into it
            time.sleep(POLL_S)
            queue = queued()
        lanes = lanes_of(jobs, self.jobs) if self.jobs else {}
        for job in jobs:
            after = [ids[name] for name in job.after]
            asked = known[job.name]
            if asked is not None and asked["id"] in queue:
                if set(after) <= set(asked["after"]):  # a stage that it waited for may be finished by now
                    ids[job.name] = asked["id"]
                    continue
                subprocess.run(["scancel", asked["id"]], check=False)  # it waits for a job that failed
            ids[job.name] = self._submit_one(job, lanes.get(job.name), after, folder)
            folder.note_submission(job.name, {"id": ids[job.name], "after": after})
            new += 1
        kept = len(jobs) - new
        console.info(f"{new} jobs submitted{f', {kept} were in the queue' if kept else ''}; they go on without this "
                     "command, and the same command follows them again.")  # fmt: skip
        return ids

    def _submit_one(self, job: Job, lane: int | None, after: Sequence[str], folder: JobFolder) -> str:
        import submitit
        from submitit.core.utils import FailedJobError, FailedSubmissionError

        waits = [f"afterok:{':'.join(after)}"] if after else []
        waits += [] if lane is None else ["singleton"]  # of one name one at a time
        options: dict[str, Any] = {"kill_on_invalid_dep": "yes", "requeue": True, **self.more}
        if waits:
            options["dependency"] = ",".join(waits)
        cpus = options.get("cpus_per_task")  # srun takes it of itself in some releases of Slurm only
        given = {"partition": self.partition, "gpus_per_node": self.gpus or None,
                 "srun_args": [f"--cpus-per-task={cpus}"] if cpus else None}  # fmt: skip
        place = hashes.digits(str(folder.out.resolve()), 6)  # sweeps of one name are two
        executor = submitit.SlurmExecutor(folder=folder.folder / "submitit", max_num_timeout=NO_LIMIT)
        executor.update_parameters(
            job_name=f"lors-{folder.out.name}-{place}-{job.name if lane is None else lane}", time=self.minutes,
            signal_delay_s=SIGNAL_DELAY_S, additional_parameters=options,
            **{name: value for name, value in given.items() if value is not None},
        )  # fmt: skip
        process = StageProcess(job.name, job.cell, folder.out, folder.text)  # in this folder: sbatch keeps it
        try:
            return str(executor.submit(process).job_id)
        except (FailedJobError, FailedSubmissionError) as error:
            said = [line for line in str(error).splitlines() if line.startswith("sbatch: ")]
            raise UsageError(f"the cluster refused a job: {' '.join(said) or error}") from error


def _ours(jobs: int | None) -> dict[str, str]:
    """Options of sbatch that are not the user's to give, and why."""
    lanes = {"job-name": f"--jobs {jobs} is so many names, of which Slurm runs one job each"} if jobs else {}
    return {"dependency": "a stage waits for those that it reads", **lanes}


def lanes_of(jobs: Sequence[Job], number: int) -> dict[str, int]:
    """Each job's lane, of so many, in which one runs after the other: where it can start first, by the work of each."""
    free, lanes, ends = [0.0] * number, dict[str, int](), dict[str, float]()
    for job in jobs:
        ready = max((ends[name] for name in job.after), default=0.0)
        lane = min(range(number), key=lambda lane: (max(free[lane], ready), -free[lane]))
        lanes[job.name], free[lane] = lane, max(free[lane], ready) + job.work
        ends[job.name] = free[lane]
    return lanes


def minutes(text: str) -> int:
    """Slurm's way to write a time (30, 90:00, 4:00:00, 1-12, 1-12:30:00) as minutes, rounded up."""
    found = _TIME.fullmatch(text)
    if found is None:
        raise UsageError(f"--time {text}: give minutes, or a time such as 04:00:00 or 1-12:00:00.")
    parts = [int(part) for part in found["parts"].split(":")]
    if found["days"] is not None:  # hours[:minutes[:seconds]]
        seconds = 86400 * int(found["days"]) + sum(n * unit for n, unit in zip(parts, (3600, 60, 1), strict=False))
    else:  # minutes, minutes:seconds, hours:minutes:seconds
        units = {1: (60,), 2: (60, 1), 3: (3600, 60, 1)}[len(parts)]
        seconds = sum(n * unit for n, unit in zip(parts, units, strict=True))
    if not seconds:
        raise UsageError(f"--time {text}: give a time above 0.")
    return math.ceil(seconds / 60)


def queued() -> dict[str, str]:
    """State by id of the user's jobs that the cluster has in its queue, running ones too.

    Raises:
        MissingError: the cluster does not answer.
    """
    command = ["squeue", "--noheader", "--user", getpass.getuser(), "--format", "%i %T"]
    for pause_s in (1, 5, 20, 60, None):  # a controller that is started again
        done = subprocess.run([*command], capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return dict(line.split(None, 1) for line in done.stdout.splitlines())
        if pause_s is None:
            break
        time.sleep(pause_s)
    raise MissingError(f"the cluster does not answer: {done.stderr.strip()}",
                       "Jobs that were submitted go on; the same command follows them again.")  # fmt: skip


def _note_silence(job: Job, number: str, folder: JobFolder) -> None:
    """Keep that a job is gone from the queue, where its process did not say why."""
    if folder.failure(job.name) is None:
        last = folder.last_line(job.name)
        folder.note_failure(
            job.name, f"job {number} ended without a word (killed, cancelled, or its machine failed)"
            f"{f'; the last line of {folder.log(job.name)}: {last}' if last else ''}", 4,
        )  # fmt: skip


@dataclass
class StageProcess:
    """What a job of the cluster runs: the stage's process; submitit pickles it, and asks for `checkpoint` in time."""

    name: str
    cell: str
    out: Path
    text: Path
    _process: Any = None

    def __call__(self) -> None:
        """Do the stage."""
        jobs = JobFolder(self.out, self.text)
        ours = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})  # Slurm sends it to all processes of a job
        self._process = start(self.name, self.cell, jobs)
        signal.pthread_sigmask(signal.SIG_SETMASK, ours)
        while self._process.poll() is None:
            time.sleep(0.2)
        code = self._process.returncode
        if code:
            raise RuntimeError(f"{self.name} ended with exit code {code}: {jobs.last_line(self.name)}")

    def checkpoint(self) -> Any:
        """The job's time is nearly up: let the stage save what it has; the job then goes back into the queue."""
        from submitit.helpers import DelayedSubmission

        process, self._process = self._process, None
        if process is not None and process.returncode is None:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):  # it has just ended by itself
                os.kill(process.pid, signal.SIGUSR1)
                os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # not by Popen, which this may interrupt
        return DelayedSubmission(self)
