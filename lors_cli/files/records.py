"""Records of finished stages, and how a stage's results are put into place.

A stage's results are prepared in `<stage>/.staging`, its resumable state in
`<stage>/.work`; `publish` renames the results into place and writes `stage.json` last.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lors_cli.files import locks
from lors_cli.files.atomic import read_json, sync_file, sync_folder, to_json, write_json
from lors_cli.files.hashes import cached_sha256, file_sha256, plain

RECORD_NAME = "stage.json"
STAGING_NAME = ".staging"
WORK_NAME = ".work"
JOURNAL_NAME = ".publishing.json"
CARD_NAME = "README.md"
"""The model card, which is for people to edit."""
FINGERPRINT_NAME, MADE_NAME, DTYPE_NAME = "fingerprint.json", "made.json", "dtype.json"
"""In the work folder: whose work it is, the settings and inputs that it is done with, and the number format."""


@dataclass(frozen=True)
class StageRecord:
    """What `stage.json` says of a finished stage."""

    stage: str
    fingerprint: str
    config: dict[str, Any]
    inputs: dict[str, Any]
    metrics: dict[str, Any]
    environment: dict[str, Any]
    elapsed_s: float
    files: dict[str, str]

    @property
    def mark(self) -> str:
        """What the fingerprint of a model begins with that this stage has made; its number format follows."""
        return f"{self.stage}:{self.fingerprint}:"

    def __repr__(self) -> str:
        """Without what is long: settings, environment, files, and the metrics that are lists and dicts."""
        metrics = {name: value for name, value in self.metrics.items() if not isinstance(value, (list, dict))}
        return f"StageRecord(stage={self.stage!r}, fingerprint={self.fingerprint!r}, metrics={metrics!r}, …)"


_RECORD_TYPES: dict[str, Any] = {
    "stage": str, "fingerprint": str, "config": dict, "inputs": dict, "metrics": dict, "environment": dict,
    "elapsed_s": (int, float), "files": dict,
}  # fmt: skip


def read_record(folder: Path) -> StageRecord | None:
    """The record of the stage in `folder`, or None when it is not finished."""
    content = read_json(folder / RECORD_NAME)
    if not isinstance(content, dict) or content.keys() != _RECORD_TYPES.keys():
        return None
    if not all(isinstance(content[key], kind) for key, kind in _RECORD_TYPES.items()):
        return None
    files = content["files"]
    if inner_names(list(files)) is None or not all(isinstance(digest, str) for digest in files.values()):
        return None
    return StageRecord(**content)


def inner_names(names: Any) -> list[str] | None:
    """`names`, which anyone may have written, if all are of files below a folder, None where one leads out of it."""
    if not isinstance(names, list) or not all(isinstance(name, str) and name and "\0" not in name for name in names):
        return None
    return None if any(Path(name).is_absolute() or ".." in Path(name).parts for name in names) else names


def is_finished(folder: Path, expected_fingerprint: str) -> bool:
    """Whether `folder` holds the whole result of exactly this stage: its record and every file, as written.

    The model card may be another one by now, or gone.
    """
    record = read_record(folder)
    if record is None or record.fingerprint != expected_fingerprint:
        return False
    return all((folder / name).is_file() and cached_sha256(folder / name) == digest
               for name, digest in record.files.items() if name != CARD_NAME)  # fmt: skip


def work_dir(folder: Path, expected_fingerprint: str, made: dict[str, Any] | None = None) -> Path:
    """The folder for a stage's resumable state; state of another fingerprint is thrown away.

    Args:
        made: the stage's `config` and `inputs`, noted there.
    """
    work = folder / WORK_NAME
    if read_json(work / FINGERPRINT_NAME) != expected_fingerprint:
        if work.exists():
            shutil.rmtree(work)
        write_json(work / FINGERPRINT_NAME, expected_fingerprint)
        if made is not None:
            write_json(work / MADE_NAME, plain(made))
    return work


def is_made(value: Any) -> bool:
    """Whether what lies in the work folder says of its work what `work_dir` notes."""
    known = isinstance(value, dict) and value.keys() == {"config", "inputs"}
    return known and all(isinstance(part, dict) for part in value.values())


def has_work(folder: Path) -> bool:
    """Whether the work folder holds more than what it is begun with."""
    work = folder / WORK_NAME
    begun = (FINGERPRINT_NAME, MADE_NAME, DTYPE_NAME)
    return work.is_dir() and any(path.name not in begun for path in work.iterdir())


def staging_dir(folder: Path) -> Path:
    """An empty folder to prepare the stage's results in."""
    staging = folder / STAGING_NAME
    if staging.exists():
        shutil.rmtree(staging)
    staging.mkdir(parents=True)
    return staging


def publish(folder: Path, record: StageRecord) -> StageRecord:
    """Move what is staged into place and declare the stage finished.

    The old record goes first and the new one comes last, so a kill in between leaves an unfinished stage; a journal
    of every name that may be there lets the next call remove what it has not.

    Args:
        record: its `files` are filled in here.

    Raises:
        UsageError: another process has taken the folder over.
    """
    locks.check(folder)
    to_json(plain(record))  # what cannot be written is found out while the old result is there
    staging = folder / STAGING_NAME
    names = sorted(str(path.relative_to(staging)) for path in staging.rglob("*") if path.is_file())
    umask = os.umask(0)
    os.umask(umask)
    for name in names:
        os.chmod(staging / name, 0o666 & ~umask)  # safetensors writes files that only their owner can read
        sync_file(staging / name)
    earlier = earlier_files(folder)
    write_json(folder / JOURNAL_NAME, sorted({*earlier, *names}))
    (folder / RECORD_NAME).unlink(missing_ok=True)
    sync_folder(folder)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(staging / name, folder / name)
    for stale in sorted(earlier - set(names)):
        (folder / stale).unlink(missing_ok=True)
    from lors_cli.output import progress

    with progress.busy("hashing the results"):
        files = {name: file_sha256(folder / name) for name in names}
    finished = replace(record, files=files)
    locks.check(folder)
    write_json(folder / RECORD_NAME, plain(finished))
    (folder / JOURNAL_NAME).unlink()
    shutil.rmtree(staging)
    shutil.rmtree(folder / WORK_NAME, ignore_errors=True)
    return finished


def earlier_files(folder: Path) -> set[str]:
    """Names that earlier results may have left in `folder`: those of its record, and of a journal."""
    old = read_record(folder)
    return {*(old.files if old else ()), *(inner_names(read_json(folder / JOURNAL_NAME)) or ())}


def undo(folder: Path) -> None:
    """Declare a stage unfinished; its files stay, noted in a journal, until the next result takes their place."""
    if earlier := earlier_files(folder):
        write_json(folder / JOURNAL_NAME, sorted(earlier))
    (folder / RECORD_NAME).unlink(missing_ok=True)


def leftovers(folder: Path) -> list[Path]:
    """What a kill after the last step of `publish` has left; work of other settings begun there is not among it."""
    record = read_record(folder)
    assert record is not None, folder
    left = [folder / STAGING_NAME, folder / JOURNAL_NAME]
    if read_json(folder / WORK_NAME / FINGERPRINT_NAME) in (None, record.fingerprint):
        left.append(folder / WORK_NAME)
    return [path for path in left if path.exists()]
