"""A sweep as a person and as a program reads it: what would be done, and what came out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lors_cli.evaluation.summary import LOST_IN_ERROR
from lors_cli.files import hashes
from lors_cli.output import console, progress
from lors_cli.pipeline.plans import describe
from lors_cli.pipeline.resources import free_disk
from lors_cli.report.scores import INSIDE_ERROR, by_cell
from lors_cli.sweep.cells import Cell, Sweep
from lors_cli.sweep.costs import assumption, costs, disk_needed
from lors_cli.sweep.index import index
from lors_cli.sweep.stages import CellPlan, distinct, plan_cells


def plan_document(sweep: Sweep, out: Path, chosen: Sequence[Cell], tflops: float | None = None) -> dict[str, Any]:
    """A dry run's JSON document; `chosen` are the cells that are to run."""
    plans = plan_cells(sweep.cells, out)
    names = {cell.name for cell in chosen}
    mine = [plan for plan in plans if plan.cell.name in names]
    known = index(sweep, plans, out)
    cells = [
        {**entry, "to_run": [stage.label for stage in plan.plans if stage.status != "done"]}
        for plan, entry in zip(plans, known["cells"], strict=True)
        if plan.cell.name in names
    ]
    stages = _stages(plans, mine, tflops)
    to_run = [stage for stage in stages if stage["status"] != "done"]
    every = [plan for plan, _ in distinct(mine).values()]
    return hashes.plain({
        "name": sweep.name, "sweep": str(out), "dry_run": True, "axes": sweep.axes,
        "num_cells": len(sweep.cells), "cells": cells, "stages": stages,
        "estimate": {
            "hours": _hours([stage["seconds"] for stage in to_run]),
            "disk_bytes": disk_needed(every),
            "peak_memory_bytes": max((stage["peak_memory_bytes"] or 0 for stage in to_run), default=0) or None,
            "assumption": assumption(every, tflops) if to_run else "",
        },
    })  # fmt: skip


def _stages(plans: Sequence[CellPlan], mine: Sequence[CellPlan], tflops: float | None) -> list[dict[str, Any]]:
    """Every stage that the chosen cells need, once; the pace of finished ones of all cells counts."""
    everything = distinct(plans)
    data_dirs = {stage.folder: plan.data_dir for plan in plans for stage in plan.plans}
    needs = dict(zip(everything, costs([plan for plan, _ in everything.values()], data_dirs, tflops), strict=True))
    found = []
    for folder, (plan, names) in distinct(mine).items():
        cost = needs[folder]
        found.append({
            "stage": plan.stage, "status": plan.status, "what": describe(plan), "cells": names, "folder": str(folder),
            "fingerprint": plan.fingerprint, "models": {role: model.path for role, model in plan.models.items()},
            "operations": cost.operations, "seconds": cost.seconds, "peak_memory_bytes": cost.memory,
            "disk_bytes": cost.disk,
        })  # fmt: skip
    return found


def _hours(seconds: list[float | None]) -> float | None:
    known = [value for value in seconds if value is not None]
    return None if len(known) < len(seconds) else sum(known) / 3600


def show_plan(document: dict[str, Any]) -> None:
    """A dry run on the terminal, and as JSON with --json."""
    axes = " × ".join(f"{axis} ({len(values)})" for axis, values in document["axes"].items())
    console.result(f"{document['name']} → {document['sweep']} (dry run: nothing is written)")
    console.result(f"{len(document['cells'])} of {document['num_cells']} cells of {axes or 'one recipe'}\n")
    rows = [[cell["name"], cell["status"], ", ".join(cell["to_run"]) or "nothing"] for cell in document["cells"]]
    console.table(["cell", "state", "left to do"], rows, prose=True)
    to_run = [stage for stage in document["stages"] if stage["status"] != "done"]
    console.result()
    if to_run:
        rows = [
            [Path(stage["folder"]).name, str(len(stage["cells"])), _gib(stage["disk_bytes"]), _time(stage["seconds"]),
             stage["what"]]
            for stage in to_run
        ]  # fmt: skip
        console.table(["stage", "cells", "disk", "about", "what"], rows, prose=True)
        console.result()
    _show_estimate(document, len(to_run))
    console.document(document)


def _show_estimate(document: dict[str, Any], num_to_run: int) -> None:
    needs = document["estimate"]
    done = len(document["stages"]) - num_to_run
    console.result(f"{num_to_run} stages to run{f', {done} are finished' if done else ''}.")
    if not num_to_run:
        return
    console.result(f"disk    {_gib(needs['disk_bytes'])}, {console.gib(free_disk(Path(document['sweep'])))} are free")
    console.result(f"memory  at most {_gib(needs['peak_memory_bytes'])}")
    console.result(f"time    {_time(None if needs['hours'] is None else 3600 * needs['hours'])}: {needs['assumption']}")


def _gib(num_bytes: int | None) -> str:
    return "unknown" if num_bytes is None else console.gib(num_bytes)


def _time(seconds: float | None) -> str:
    return "unknown" if seconds is None else progress.duration(seconds)


def show_status(document: dict[str, Any]) -> None:
    """How far a sweep is: a row a cell with its stages, and what is to be said of those that run or failed."""
    labels = list(dict.fromkeys(stage["stage"] for cell in document["cells"] for stage in cell["stages"]))
    rows, told = [], dict[str, list[str]]()
    for cell in document["cells"]:
        states = {stage["stage"]: stage["status"] for stage in cell["stages"]}
        rows.append([cell["name"], cell["status"], *(states.get(label, "") for label in labels)])
        for stage in cell["stages"]:
            if stage["detail"]:
                told.setdefault(stage["folder"], [Path(stage["folder"]).name, stage["status"], stage["detail"]])
    console.tables(["cell", "state", *labels], rows)
    if told:
        console.result()
        console.table(["stage", "state", "what"], list(told.values()), prose=True)
    console.result()
    found = [cell["status"] for cell in document["cells"]]
    counts = [f"{found.count(state)} {state}" for state in ("done", "running", "waiting", "failed") if state in found]
    console.result(f"{console.counted(len(found), 'cell')}: {', '.join(counts)}.")
    console.document(document)


# Results --------------------------------------------------------------------------------------------------------


def show_sweep(summary: dict[str, Any]) -> None:
    """What `lors sweep` did: a row a cell, and where everything is."""
    columns, rows, bold, unlike = by_cell(summary["cells"])
    console.tables(columns, rows, bold=bold)
    if unlike:
        console.result(unlike)
    if any(INSIDE_ERROR in row for row in rows):
        console.result(LOST_IN_ERROR)
    console.result()
    states = [cell["status"] for cell in summary["cells"]]
    counts = ", ".join(f"{states.count(state)} {state}" for state in ("done", "failed", "pending") if state in states)
    nothing = "" if summary["done"] or summary["failed"] else " Nothing was left to do."
    console.result(f"{len(states)} cells: {counts}.{nothing}")
    console.result(f"sweep  {summary['sweep']}")
    for path in summary["report"]:
        console.result(f"report {path}")
    console.document(summary)
