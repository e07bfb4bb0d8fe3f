"""`--executor local`: a sweep's stages as processes of this machine, so many at once, each with a GPU of its own."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from lors_cli.errors import INTERRUPTED, UsageError
from lors_cli.files import locks
from lors_cli.machine.devices import threads_of_each
from lors_cli.sweep.job_folder import JobFolder
from lors_cli.sweep.jobs import Job, start
from lors_cli.sweep.spread import Told

POLL_S = 0.2
GRACE_S = 60.0
"""How long processes have to save what they have, when the sweep is interrupted."""


@dataclass(frozen=True)
class Local:
    """So many processes at once; `gpus` are numbers as in CUDA_VISIBLE_DEVICES, empty: no process is given one."""

    jobs: int
    gpus: tuple[str, ...] = ()

    @classmethod
    def of(cls, jobs: int | None, gpus: str | None) -> Local:
        """From the command line: a process a GPU, unless `jobs` says otherwise."""
        names = tuple(name.strip() for name in gpus.split(",")) if gpus is not None else ()
        if not all(name.isdecimal() for name in names) or len(set(names)) < len(names):
            raise UsageError(f"--gpus {gpus}: give the numbers of this machine's GPUs, such as 0,1,2,3.")
        jobs = jobs or len(names) or 1
        if names and jobs > len(names):
            raise UsageError(f"--jobs {jobs}: there are {len(names)} GPUs, and each process has one of its own.")
        return cls(jobs, names)

    def run(self, jobs: Sequence[Job], folder: JobFolder, told: Told) -> None:
        """Do all jobs but those whose results others lack; what fails is noted in `folder`."""
        waiting, over = list(jobs), dict[str, bool]()
        with _processes() as running:
            while waiting or running:
                for slot, (job, process) in list(running.items()):
                    if process.poll() is not None:
                        del running[slot]
                        over[job.name] = _settle(job, process.returncode, folder)
                        told(job, "done" if over[job.name] else "failed")
                for job in list(waiting):
                    if any(over.get(name) is False for name in job.after):
                        over[job.name] = False
                    elif not all(over.get(name) for name in job.after):
                        continue
                    elif len(running) < self.jobs and locks.holder(job.plan.folder) is None:
                        slot = next(slot for slot in range(self.jobs) if slot not in running)
                        running[slot] = (job, start(job.name, job.cell, folder, **self._environment(slot)))
                        told(job, "started")
                    else:
                        continue
                    waiting.remove(job)
                time.sleep(POLL_S)

    def _environment(self, slot: int) -> dict[str, str]:
        """What a process is to see of the machine; threads so that all have the cores together."""
        return {**threads_of_each(self.jobs), **({"CUDA_VISIBLE_DEVICES": self.gpus[slot]} if self.gpus else {})}


@contextmanager
def _processes() -> Iterator[dict[int, tuple[Job, subprocess.Popen[bytes]]]]:
    """Running processes by their slot; those that run at an error or a Ctrl-C save what they have and end."""
    running: dict[int, tuple[Job, subprocess.Popen[bytes]]] = {}
    try:
        yield running
    finally:
        for _, process in running.values():
            process.send_signal(signal.SIGTERM)
        until = time.monotonic() + GRACE_S
        for _, process in running.values():
            try:
                process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _settle(job: Job, code: int, folder: JobFolder) -> bool:
    """Whether a stage is finished; a process that could not say why it ended is noted."""
    if code == 0:
        return True
    if code in (INTERRUPTED, -signal.SIGTERM):
        folder.note_failure(job.name, "it was stopped; what was finished is kept.", INTERRUPTED)
    elif folder.failure(job.name) is None:
        killed = code == -signal.SIGKILL
        how = f"was killed by signal {-code}{'; is memory short?' if killed else ''}" if code < 0 else "ended"
        folder.note_failure(job.name, f"its process {how} without a word; see {folder.log(job.name)}",
                            4 if killed else 1)  # fmt: skip
    return False
