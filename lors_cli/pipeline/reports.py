"""`lors report`: which kind of report belongs to a folder, and the comparison of several."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from lors_cli.errors import LorsError, MissingError, UsageError
from lors_cli.files.records import RECORD_NAME
from lors_cli.pipeline.folders import MARKS
from lors_cli.pipeline.standing import RECIPE_NAME, standing_stages
from lors_cli.report.compare import write_comparison
from lors_cli.report.results import INDEX_NAME, Results, read_run, read_stage, read_sweep
from lors_cli.report.run import write_run_report, write_stage_report
from lors_cli.report.sweep import write_sweep_report

_KINDS = {INDEX_NAME: "sweep", RECIPE_NAME: "run", RECORD_NAME: "stage"}


def write_reports(folders: Sequence[Path], formats: Sequence[str], out: Path | None) -> list[Path]:
    """Write the report of one folder, or the comparison of several, and return its files.

    Args:
        folders: of runs, sweeps, or single stages.
        out: where it goes, None for the folder itself, of several for a new one beside the first.

    Raises:
        MissingError: a folder is none of these.
        UsageError: a folder twice, or an `out` that is another's.
    """
    kinds = [kind_of(folder) for folder in folders]
    labels = _labels(folders)
    if len(folders) > 1:
        first = folders[0] if folders[0].name not in ("", "..") else folders[0].resolve()
        out = out or first.parent / _comparison_name(labels)
    if out is not None:
        _guard(out, folders)
    if len(folders) > 1:
        found = {folder: (label, _read(folder, kind))
                 for folder, kind, label in zip(folders, kinds, labels, strict=True)}  # fmt: skip
        return write_comparison(found, formats, out)  # type: ignore[arg-type]
    (folder,), (kind,) = folders, kinds
    if kind == "sweep":
        return write_sweep_report(folder, formats, out)
    if kind == "run":
        return write_run_report(folder, standing_stages(folder), formats, out)
    return write_stage_report(folder, formats, out)


def kind_of(folder: Path) -> str:
    """`sweep`, `run` or `stage`.

    Raises:
        MissingError: none of them.
    """
    for name, kind in _KINDS.items():
        if (folder / name).is_file():
            return kind
    raise _no_folder_of_ours(folder)


def _no_folder_of_ours(folder: Path) -> LorsError:
    if not folder.is_dir():
        what = "is a file, no folder" if folder.exists() else "is not there"
        return MissingError(f"{folder} {what}.", "Give a folder that lors wrote, such as runs/quickstart.")
    if any((folder / name).exists() for name in MARKS["stage"]):
        return MissingError(f"The stage in {folder} is not finished: it has no {RECORD_NAME} yet.",
                            "The same command again ends it.")  # fmt: skip
    inside = sorted(path for path in folder.iterdir() if any((path / name).is_file() for name in _KINDS))
    hint = f"Give folders in it: lors report {' '.join(map(str, inside[:3]))}" if inside else None
    return MissingError(
        f"{folder} is no run folder, no sweep folder and no stage's folder: it has neither {RECIPE_NAME} (lors run) "
        f"nor {INDEX_NAME} (lors sweep) nor {RECORD_NAME} (lors prune, tune, merge, pack and eval with --out).",
        hint or "Give the folder that one of them wrote, such as runs/quickstart.",
    )


def _read(folder: Path, kind: str) -> Results:
    if kind == "sweep":
        return read_sweep(folder)
    return read_run(folder, standing_stages(folder)) if kind == "run" else read_stage(folder)


def _labels(folders: Sequence[Path]) -> list[str]:
    """Names that tell the folders apart: their paths below the folder that they share."""
    whole = [folder.resolve() for folder in folders]
    twice = [str(folder) for folder, path in zip(folders, whole, strict=True) if whole.count(path) > 1]
    if twice:
        raise UsageError(f"The same folder is named twice: {' and '.join(twice)}.")
    shared = Path(os.path.commonpath([path.parent for path in whole]))
    return [path.relative_to(shared).as_posix() for path in whole]


def _comparison_name(labels: Sequence[str]) -> str:
    names = [label.replace("/", "-") for label in labels]
    more = f"-and-{len(names) - 3}-more" if len(names) > 3 else ""
    return f"compare-{'-'.join(name[:60] for name in names[:3])}{more}"


def _guard(out: Path, folders: Sequence[Path]) -> None:
    """Refuse a folder whose own report would be overwritten."""
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out} is a file; reports go to a folder.")
    own = len(folders) == 1 and out.exists() and out.samefile(folders[0])
    if not own and any((out / name).is_file() for name in _KINDS):
        raise UsageError(f"--out {out} has a report of its own, which would be overwritten.", "Choose another --out.")
