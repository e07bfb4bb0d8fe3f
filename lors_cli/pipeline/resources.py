"""Whether memory and disk suffice for a stage, before anything is loaded."""

from __future__ import annotations

import shutil
from pathlib import Path

from lors_cli.errors import LorsError, ResourceError
from lors_cli.models.needs import Estimate
from lors_cli.models.size import model_size, try_size
from lors_cli.output import console
from lors_cli.pipeline.folders import UNFINISHED
from lors_cli.pipeline.plans import StagePlan
from lors_cli.pipeline.stages import STAGES


def try_estimate(plan: StagePlan) -> tuple[Estimate | None, str]:
    """A stage's needs where the model's shape is known and the settings fit it, else why not."""
    try:
        size = model_size(plan.origin)
        if size is None:
            return None, "size unknown until the model's config.json is downloaded"
        return STAGES[plan.stage].needs(plan.config, size, plan.num_processes), ""
    except LorsError as error:
        return None, error.message


def check_disk(plan: StagePlan) -> None:
    """Refuse a stage whose results don't fit on the disk.

    Raises:
        ResourceError: naming what is free and what is needed.
    """
    needed, _ = try_estimate(plan)
    if needed is not None:
        require_disk(plan.stage, plan.folder, needed.disk)


def require_disk(stage: str, folder: Path, num_bytes: int) -> None:
    """Refuse what is to write so many bytes where they are not free.

    Raises:
        ResourceError: naming what is free and what is needed.
    """
    free = free_disk(folder)
    if num_bytes - occupied(folder) > free:
        raise ResourceError(
            f"{stage} needs about {console.gib(num_bytes)} of disk in {folder}; {console.gib(free)} are free.",
            "Free some space or choose another --out; what was finished before is intact.",
        )


def occupied(folder: Path) -> int:
    """Bytes of the unfinished work in a stage's folder, with which the next call goes on."""
    return sum(file.lstat().st_size for name in UNFINISHED for file in (folder / name).rglob("*") if file.is_file())


def free_disk(folder: Path) -> int:
    """Bytes that are free where a folder is, or would be made."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def check_memory(plan: StagePlan) -> None:
    """Refuse a stage that is to run and cannot fit in the memory that is free here.

    Raises:
        ResourceError: naming what is needed, what is free, and which settings would fit.
    """
    shortage = STAGES[plan.stage].shortage
    size = try_size(plan.origin) if plan.status != "done" else None
    if shortage is None or size is None:
        return
    if found := shortage(plan.config, plan.origin, size, plan.num_processes):
        raise ResourceError(*found)
