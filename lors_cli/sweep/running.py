"""`run_sweep`: cell by cell in this process, each stage once; what is finished is skipped, what fails is noted and the
rest is run."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lors_cli.errors import LorsError, UsageError, translate
from lors_cli.machine import processes
from lors_cli.machine.determinism import determinism
from lors_cli.machine.memory import collect_garbage
from lors_cli.output import console, progress
from lors_cli.output.redaction import redact
from lors_cli.pipeline.folders import claim, guard_out, tidy
from lors_cli.pipeline.plans import StagePlan, describe
from lors_cli.pipeline.resources import free_disk
from lors_cli.pipeline.running import run_stage
from lors_cli.sweep.cells import Cell, Sweep
from lors_cli.sweep.costs import disk_needed
from lors_cli.sweep.index import index, scores, write_index
from lors_cli.sweep.job_folder import JobFolder
from lors_cli.sweep.stages import STAGES_NAME, CellPlan, distinct, plan_cells


def run_sweep(sweep: Sweep, out: Path, chosen: Sequence[Cell]) -> dict[str, Any]:
    """Run the chosen cells of a sweep; a second call resumes where the first stopped.

    Returns:
        The sweep's summary: its index, with each cell's scores; the stages that were done; the report's files.

    Raises:
        LorsError: before anything is run, when some cell cannot work.
    """
    from lors_cli.report.sweep import write_sweep_report

    one_process()
    guard_out(out, "sweep")
    plans = plan_cells(sweep.cells, out)
    names = {cell.name for cell in chosen}
    warn_of_disk(plans, names, out)
    with claim(out):
        work = _Work(out, index(sweep, plans, out), plans, names, sweep.text, JobFolder.of(out, sweep))
        work.write_index()
        for cell_plan in plans:
            if cell_plan.cell.name in names:
                with determinism(cell_plan.cell.recipe.deterministic):
                    work.run(cell_plan)
        reports = write_sweep_report(out)
    failed = {name: {"message": error.message, "exit_code": error.exit_code} for name, error in work.failed.items()}
    return summary(out, work.index, work.log, failed, reports)


def summary(
    out: Path, content: dict[str, Any], done: list[dict[str, Any]], failed: dict[str, Any], reports: Sequence[Path]
) -> dict[str, Any]:
    """What a call did: the index, with each cell's scores; the stages that were done; the report's files."""
    cells = [{**entry, "results": scores(out, entry)} for entry in content["cells"]]
    return {"sweep": str(out), **content, "cells": cells, "done": done, "failed": failed,
            "report": [str(path) for path in reports]}  # fmt: skip


def one_process() -> None:
    """Refuse to be one of several processes that torchrun has started."""
    if processes.num_processes() > 1:
        raise UsageError(
            f"`lors sweep` runs in one process, and torchrun started {processes.num_processes()}.",
            "Several processes can run a recipe: lors run RECIPE --nproc N",
        )


@dataclass
class _Work:
    """A sweep under way: its index, what was done and what failed."""

    out: Path
    index: dict[str, Any]
    plans: list[CellPlan]
    names: set[str]
    text: str
    jobs: JobFolder
    log: list[dict[str, Any]] = field(default_factory=list)
    failed: dict[str, LorsError] = field(default_factory=dict)
    """By cell."""
    _finished: set[Path] = field(default_factory=set)
    _broken: dict[Path, LorsError] = field(default_factory=dict)
    """By stage folder."""

    def __post_init__(self) -> None:
        mine = distinct(plan for plan in self.plans if plan.cell.name in self.names)
        self._finished = {folder for folder, (plan, _) in mine.items() if plan.status == "done"}
        self._total = len(mine) - len(self._finished)

    def write_index(self) -> None:
        """Write the index as it is now."""
        write_index(self.out, self.index, self.text)

    def run(self, cell_plan: CellPlan) -> None:
        """Do what a cell lacks; a LorsError ends the cell, not the sweep."""
        name = cell_plan.cell.name
        missing = [plan for plan in cell_plan.plans if plan.folder not in self._finished]
        for plan in cell_plan.plans:
            if plan not in missing:
                tidy(plan.folder)
        with self._marked(name):
            for plan in missing:
                error = self._broken.get(plan.folder) or self._run_stage(plan, cell_plan)
                if error is not None:
                    self.failed[name] = error
                    raise error

    @contextmanager
    def _marked(self, name: str) -> Iterator[None]:
        """Keep the cell's state in the index: running, then done, failed, or pending again after an interruption."""
        entry = next(entry for entry in self.index["cells"] if entry["name"] == name)

        def mark(status: str, error: str | None = None) -> None:
            entry.update(status=status, error=None if error is None else redact(error))
            self.write_index()

        if entry["status"] == "done":
            yield
            return
        mark("running")
        try:
            yield
        except LorsError as error:
            mark("failed", error.message)
            console.error(f"{name}: {error.message}", error.hint)
        except Exception as error:
            mark("failed", f"{type(error).__name__}: {error}")
            raise
        except BaseException:
            mark("pending")
            raise
        else:
            mark("done")

    def _run_stage(self, plan: StagePlan, cell_plan: CellPlan) -> LorsError | None:
        """Do a stage for all cells that need it; its error when it failed."""
        started, name = time.monotonic(), plan.folder.name
        number = len(self._broken) + len(self.log) + 1
        console.heading(f"[{number}/{self._total}] {cell_plan.cell.name} · {plan.stage}: {describe(plan)}")
        self.jobs.clear_failure(name)
        try:
            with claim(plan.folder):  # against the same stage run on its own
                do_stage(plan, cell_plan.data_dir, self.out)
        except Exception as error:
            known = translate(error)
            if known is None:
                self.jobs.note_failure(name, f"{type(error).__name__}: {error}", 1)
                raise
            self.jobs.note_failure(name, known.message, known.exit_code)
            self._broken[plan.folder] = type(known)(known.message, known.hint)  # without the frames of its traceback
        else:
            elapsed_s = time.monotonic() - started
            self._finished.add(plan.folder)
            self.log.append({"stage": plan.stage, "cell": cell_plan.cell.name, "folder": str(plan.folder),
                             "elapsed_s": round(elapsed_s, 2)})  # fmt: skip
            console.info(f"  {plan.stage} took {progress.duration(elapsed_s)}")
        collect_garbage()
        return self._broken.get(plan.folder)


def do_stage(plan: StagePlan, data_dir: Path | None, out: Path) -> None:
    """Do a stage of a sweep, whose folder this process holds; earlier measurements of the sweep are taken over."""
    if plan.stage == "eval":
        _take_over(plan, data_dir, out)
    run_stage(plan, data_dir)


def _take_over(plan: StagePlan, data_dir: Path | None, out: Path) -> None:
    """Copy measurements of the same model that earlier settings of the sweep have left."""
    from lors_cli.evaluation.pieces import take_over
    from lors_cli.evaluation.texts import take_over_texts
    from lors_cli.models.sources import model_fingerprint
    from lors_cli.recipe.schema import EvalConfig

    assert isinstance(plan.config, EvalConfig)
    fingerprints = {role: model_fingerprint(plan.models[role]) for role in plan.models}
    others = sorted((out / STAGES_NAME).glob("eval-*"))
    taken = take_over(plan.config, fingerprints, plan.folder, others, data_dir)
    take_over_texts(plan.config, fingerprints, plan.folder, others)
    if taken:
        console.info(f"  {taken} measured earlier in this sweep")


def warn_of_disk(plans: Sequence[CellPlan], names: set[str], out: Path) -> None:
    """Say where the stages of the named cells need more disk than is free."""
    needed = disk_needed([plan for plan, _ in distinct(plan for plan in plans if plan.cell.name in names).values()])
    free = free_disk(out)
    if needed is not None and needed > free:
        console.warn(
            f"all stages together need about {console.gib(needed)} of disk in {out}; {console.gib(free)} are free."
        )
