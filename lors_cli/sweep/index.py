"""`sweep.json`, the index of a sweep's folder: cells, their state, and where their stages and scores lie.

Several processes may write it: each reads, changes and writes it while it holds the sweep's folder.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lors_cli.files import atomic, hashes, locks, records
from lors_cli.report.results import INDEX_NAME, UNFINISHED
from lors_cli.sweep.cells import Sweep
from lors_cli.sweep.stages import CellPlan

TEXT_NAME = "sweep.yaml"


def index(sweep: Sweep, plans: Sequence[CellPlan], out: Path) -> dict[str, Any]:
    """What `sweep.json` says before anything is run: cells that are finished, or failed earlier, stay so."""
    known = atomic.read_json(out / INDEX_NAME)
    earlier = {entry["name"]: entry.get(UNFINISHED, entry) for entry in known["cells"]} if known else {}
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


def write_index(out: Path, content: dict[str, Any], text: str) -> None:
    """Write `sweep.json`, and `sweep.yaml`, where they would change; the caller holds the folder.

    A cell that other settings finished earlier stays there until these settings have finished it too; what they have
    of it stands within it.
    """
    known = atomic.read_json(out / INDEX_NAME)
    standing = {entry["name"]: entry for entry in known["cells"] if entry["status"] == "done"} if known else {}
    cells = [_beside(standing.get(entry["name"]), entry) for entry in content["cells"]]
    if not any(UNFINISHED in entry for entry in cells):
        path = out / TEXT_NAME
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            atomic.write_text(path, text)
    written = {**content, "cells": cells}
    if known != written:
        atomic.write_json(out / INDEX_NAME, written)


def _beside(before: dict[str, Any] | None, now: dict[str, Any]) -> dict[str, Any]:
    """A cell as it is written; `before` is the cell as other settings have finished it."""
    is_same = before is not None and all(before[key] == now[key] for key in ("stages", "models"))
    return now if before is None or is_same or now["status"] == "done" else {**before, UNFINISHED: now}


def update_index(out: Path, failures: Callable[[str], str | None]) -> None:
    """Bring the state of the cells in `sweep.json` up to date with what lies on disk; the caller holds the folder.

    Args:
        out: the sweep's folder.
        failures: from a stage folder's name to why it failed, None where it has not.
    """
    content = atomic.read_json(out / INDEX_NAME)
    if content is None:
        return
    before = json.dumps(content)
    for place, known in enumerate(content["cells"]):
        entry = known.get(UNFINISHED, known)
        folders = [out / path for path in {**entry["stages"], **entry["models"]}.values()]
        left = [folder for folder in folders if records.read_record(folder) is None]
        held = [folder for folder in left if locks.holder(folder) is not None]  # one that failed may be tried again
        errors = [error for folder in left if folder not in held and (error := failures(folder.name)) is not None]
        status = "done" if not left else "failed" if errors else "running" if held else "pending"
        entry.update(status=status, error=errors[0] if errors else None)
        if status == "done":
            content["cells"][place] = entry
    if json.dumps(content) != before:
        atomic.write_json(out / INDEX_NAME, content)
