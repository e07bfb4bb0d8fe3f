"""A sweep's stages as jobs: each a process of its own, here or on a cluster. What they leave lies in `jobs/`.

State is what lies on disk: a job that finds its stage finished has nothing to do, one that finds it at work elsewhere
waits, and one that goes on after another's end resumes.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lors_cli.errors import UsageError, translate
from lors_cli.files import records
from lors_cli.machine.determinism import determinism
from lors_cli.machine.processes import LAUNCHER, own_command
from lors_cli.output import console
from lors_cli.pipeline.folders import claim, tidy
from lors_cli.pipeline.plans import StagePlan, describe
from lors_cli.sweep.cells import load_sweep, select_cells
from lors_cli.sweep.costs import operations
from lors_cli.sweep.job_folder import JobFolder
from lors_cli.sweep.running import do_stage
from lors_cli.sweep.stages import CellPlan, distinct, plan_cells

COMMAND = "sweep-stage"
"""The hidden command that does one stage."""
STAGE_WAIT_S = 1.0


@dataclass(frozen=True)
class Job:
    """A stage that is to be done, for the cell that needs it first."""

    plan: StagePlan
    cell: str
    after: tuple[str, ...]
    """Names of the jobs whose results it reads."""
    work: float
    """Floating-point operations; 1 where they are not known."""

    @property
    def name(self) -> str:
        """That of the stage's folder."""
        return self.plan.folder.name

    @property
    def label(self) -> str:
        """For people."""
        return f"{self.cell} · {self.plan.label}"

    def is_finished(self) -> bool:
        """Whether the stage's record is there."""
        record = records.read_record(self.plan.folder)
        return record is not None and record.fingerprint == self.plan.fingerprint


def jobs_of(plans: Sequence[CellPlan], names: set[str]) -> list[Job]:
    """What the named cells lack, in an order in which it can be done."""
    mine = distinct(plan for plan in plans if plan.cell.name in names)
    left = {folder: entry for folder, entry in mine.items() if entry[0].status != "done"}
    data_dirs = {stage.folder: plan.data_dir for plan in plans for stage in plan.plans}
    read = {folder: {Path(model.path) for model in plan.models.values()} for folder, (plan, _) in left.items()}
    return [
        Job(
            plan,
            cells[0],
            tuple(other.name for other in left if other in read[folder]),
            operations(plan, data_dirs[folder]) or 1.0,
        )
        for folder, (plan, cells) in left.items()
    ]


def start(name: str, cell: str, jobs: JobFolder, **environment: str) -> subprocess.Popen[bytes]:
    """A process that does a stage; it writes to the stage's log, and ends when this one does."""
    command = own_command("lors_cli", COMMAND, str(jobs.text), cell, name, "--out", str(jobs.out))
    with open(jobs.log(name), "ab") as log:
        return subprocess.Popen(
            [*command], stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            env={**os.environ, **environment, LAUNCHER: str(os.getpid())},
        )  # fmt: skip


def run_job(text: Path, cell: str, name: str, out: Path) -> None:
    """Do one stage of a sweep in this process.

    Args:
        text: the sweep's.
        cell: one that needs it.
        name: of the stage's folder.
        out: the sweep's folder.
    """
    jobs = JobFolder(out, text)
    jobs.clear_failure(name)
    try:
        folder = _plan(out, name, cell, text)[0].folder
        with claim(folder, wait_s=STAGE_WAIT_S):
            plan, cell_plan = _plan(out, name, cell, text)  # another may have done it meanwhile
            if plan.status == "done":
                console.heading(f"{plan.stage}: finished earlier, nothing to do")
            else:
                jobs.update_index()
                console.heading(f"{cell} · {plan.stage}: {describe(plan)}")
                with determinism(cell_plan.cell.recipe.deterministic):
                    do_stage(plan, cell_plan.data_dir, out)
        tidy(folder)
    except Exception as error:
        known = translate(error)
        message = f"{type(error).__name__}: {error}" if known is None else known.message
        jobs.note_failure(name, message, 1 if known is None else known.exit_code)
        raise
    finally:
        jobs.update_index()


def _plan(out: Path, name: str, cell: str, text: Path) -> tuple[StagePlan, CellPlan]:
    """What a job is to do, from the sweep's text."""
    (cell_plan,) = plan_cells(select_cells(load_sweep(text), [cell]), out)
    plan = next((plan for plan in cell_plan.plans if plan.folder.name == name), None)
    if plan is None:
        raise UsageError(
            f"{name} is no longer a stage of cell {cell}: its model, data or settings have changed since it was "
            "submitted.", "Start the sweep again."
        )  # fmt: skip
    return plan, cell_plan
