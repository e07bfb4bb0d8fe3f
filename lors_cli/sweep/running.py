"""`run_sweep`: cell by cell, each stage once; what is finished is skipped, what fails is noted and the rest is run.

`sweep.json` is the index of the folder: cells, their state, and where their stages and scores lie.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lors_cli.errors import LorsError, UsageError, translate
from lors_cli.files import atomic, hashes
from lors_cli.machine import processes
from lors_cli.machine.determinism import determinism
from lors_cli.machine.memory import collect_garbage
from lors_cli.output import console, progress
from lors_cli.pipeline.folders import claim, guard_out, tidy
from lors_cli.pipeline.plans import StagePlan, describe
from lors_cli.pipeline.resources import free_disk
from lors_cli.pipeline.running import run_stage
from lors_cli.report.results import INDEX_NAME
from lors_cli.sweep.cells import Cell, Sweep
from lors_cli.sweep.costs import disk_needed
from lors_cli.sweep.stages import STAGES_NAME, CellPlan, distinct, plan_cells

TEXT_NAME = "sweep.yaml"


def run_sweep(sweep: Sweep, out: Path, chosen: Sequence[Cell]) -> dict[str, Any]:
    """Run the chosen cells of a sweep; a second call resumes where the first stopped.

    Returns:
        The sweep's summary: its index, with each cell's scores; the stages that were done; the report's files.

    Raises:
        LorsError: before anything is run, when some cell cannot work.
    """
    from lors_cli.report.sweep import write_sweep_report

    if processes.num_processes() > 1:
        raise UsageError(
            f"`lors sweep` runs in one process, and torchrun started {processes.num_processes()}.",
            "Several processes can run a recipe: lors run RECIPE --nproc N",
        )
    guard_out(out, "sweep")
    plans = plan_cells(sweep.cells, out)
    names = {cell.name for cell in chosen}
    _warn_of_disk(plans, names, out)
    with claim(out):
        work = _Work(out, index(sweep, plans, out), plans, names, sweep.text)
        work.write_index()
        for cell_plan in plans:
            if cell_plan.cell.name in names:
                with determinism(cell_plan.cell.recipe.deterministic):
                    work.run(cell_plan)
        reports = write_sweep_report(out)
    cells = [{**entry, "results": scores(out, entry)} for entry in work.index["cells"]]
    failed = {name: {"message": error.message, "exit_code": error.exit_code} for name, error in work.failed.items()}
    return {"sweep": str(out), **work.index, "cells": cells, "done": work.log, "failed": failed,
            "report": [str(path) for path in reports]}  # fmt: skip


def index(sweep: Sweep, plans: Sequence[CellPlan], out: Path) -> dict[str, Any]:
    """What `sweep.json` says before anything is run: cells that are finished, or failed earlier, stay so."""
    known = atomic.read_json(out / INDEX_NAME)
    earlier = {entry["name"]: entry for entry in known["cells"]} if known else {}
    entries = []
    for plan in plans:
        cell = plan.cell
        entry: dict[str, Any] = {
            "name": cell.name, "recipe": cell.base, "values": cell.values, "overrides": cell.overrides,
            "status": "done" if plan.is_done else "pending", "error": None,
            "stages": {stage: folder.relative_to(out).as_posix() for stage, folder in plan.stages.items()},
            "models": {role: folder.relative_to(out).as_posix() for role, folder in plan.models.items()},
        }  # fmt: skip
        before = earlier.get(cell.name, {})
        same = all(before.get(key) == entry[key] for key in ("stages", "models"))
        if same and before.get("status") == "failed" and not plan.is_done:
            entry.update(status="failed", error=before["error"])
        entries.append(entry)
    return {"name": sweep.name, "axes": sweep.axes, "cells": hashes.plain(entries)}


def scores(out: Path, entry: dict[str, Any]) -> dict[str, Any]:
    """A cell's results by role, as far as they are there; `entry` is the cell's in `sweep.json`."""
    found = {role: atomic.read_json(out / folder / f"{role}.json") for role, folder in entry["models"].items()}
    return {role: content for role, content in found.items() if content is not None}


@dataclass
class _Work:
    """A sweep under way: its index, what was done and what failed."""

    out: Path
    index: dict[str, Any]
    plans: list[CellPlan]
    names: set[str]
    text: str
    log: list[dict[str, Any]] = field(default_factory=list)
    failed: dict[str, LorsError] = field(default_factory=dict)
    """By cell."""
    _finished: set[Path] = field(default_factory=set)
    _standing: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Entries of cells that are done in the index that was there."""
    _broken: dict[Path, LorsError] = field(default_factory=dict)
    """By stage folder."""

    def __post_init__(self) -> None:
        mine = distinct(plan for plan in self.plans if plan.cell.name in self.names)
        self._finished = {folder for folder, (plan, _) in mine.items() if plan.status == "done"}
        self._total = len(mine) - len(self._finished)
        known = atomic.read_json(self.out / INDEX_NAME)
        self._standing = (
            {entry["name"]: entry for entry in known["cells"] if entry["status"] == "done"} if known else {}
        )

    def write_index(self) -> None:
        """Write `sweep.json`, and `sweep.yaml`, where they would change.

        A cell that other settings finished earlier stays so there until these settings have finished it too.
        """
        cells = [entry if entry["status"] == "done" else self._standing.get(entry["name"], entry)
                 for entry in self.index["cells"]]  # fmt: skip
        if all(entry in self.index["cells"] for entry in cells):
            _write_text(self.out, self.text)
        written = {**self.index, "cells": cells}
        if atomic.read_json(self.out / INDEX_NAME) != written:
            atomic.write_json(self.out / INDEX_NAME, written)

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
            entry.update(status=status, error=error)
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
        started = time.monotonic()
        number = len(self._broken) + len(self.log) + 1
        console.heading(f"[{number}/{self._total}] {cell_plan.cell.name} · {plan.stage}: {describe(plan)}")
        try:
            with claim(plan.folder):  # against the same stage run on its own
                if plan.stage == "eval":
                    self._take_over(plan, cell_plan.data_dir)
                run_stage(plan, cell_plan.data_dir)
        except Exception as error:
            known = translate(error)
            if known is None:
                raise
            self._broken[plan.folder] = type(known)(known.message, known.hint)  # without the frames of its traceback
        else:
            elapsed_s = time.monotonic() - started
            self._finished.add(plan.folder)
            self.log.append({"stage": plan.stage, "cell": cell_plan.cell.name, "folder": str(plan.folder),
                             "elapsed_s": round(elapsed_s, 2)})  # fmt: skip
            console.info(f"  {plan.stage} took {progress.duration(elapsed_s)}")
        collect_garbage()
        return self._broken.get(plan.folder)

    def _take_over(self, plan: StagePlan, data_dir: Path | None) -> None:
        """Copy measurements of the same model that earlier settings of the sweep have left."""
        from lors_cli.evaluation.pieces import take_over
        from lors_cli.evaluation.texts import take_over_texts
        from lors_cli.models.sources import model_fingerprint
        from lors_cli.recipe.schema import EvalConfig

        assert isinstance(plan.config, EvalConfig)
        fingerprints = {role: model_fingerprint(plan.models[role]) for role in plan.models}
        others = sorted((self.out / STAGES_NAME).glob("eval-*"))
        taken = take_over(plan.config, fingerprints, plan.folder, others, data_dir)
        take_over_texts(plan.config, fingerprints, plan.folder, others)
        if taken:
            console.info(f"  {taken} measured earlier in this sweep")


def _warn_of_disk(plans: Sequence[CellPlan], names: set[str], out: Path) -> None:
    needed = disk_needed([plan for plan, _ in distinct(plan for plan in plans if plan.cell.name in names).values()])
    free = free_disk(out)
    if needed is not None and needed > free:
        console.warn(
            f"all stages together need about {console.gib(needed)} of disk in {out}; {console.gib(free)} are free."
        )


def _write_text(out: Path, text: str) -> None:
    path = out / TEXT_NAME
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        atomic.write_text(path, text)
