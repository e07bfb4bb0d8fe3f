"""`jobs/` of a sweep's folder: what is known of its stages' processes beside their results."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lors_cli.files import atomic, hashes, locks
from lors_cli.output import console
from lors_cli.output.redaction import redact
from lors_cli.sweep.cells import Sweep
from lors_cli.sweep.index import update_index

JOBS_NAME = "jobs"
INDEX_WAIT_S, INDEX_PATIENCE_S = 0.1, 30.0
TAIL_BYTES = 8192


@dataclass(frozen=True)
class JobFolder:
    """`jobs/` of a sweep's folder: by stage a log, why it failed, and what a cluster calls its job.

    `text` is the sweep's own text, for its jobs to read; named by its content, so that other settings are another's.
    """

    out: Path
    text: Path

    @classmethod
    def of(cls, out: Path, sweep: Sweep) -> JobFolder:
        """That of a sweep; nothing is written."""
        return cls(out, out / JOBS_NAME / f"sweep-{hashes.digits(sweep.text, 12)}.yaml")

    @property
    def folder(self) -> Path:
        """Where everything lies."""
        return self.out / JOBS_NAME

    def log(self, name: str) -> Path:
        """What a stage's processes said, one after the other."""
        return self.folder / f"{name}.log"

    def last_line(self, name: str) -> str:
        """The end of a stage's log."""
        path = self.log(name)
        if not path.is_file():
            return ""
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL_BYTES))
            lines = file.read().decode("utf-8", "replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "")

    def failure(self, name: str) -> dict[str, Any] | None:
        """Message and exit code of a stage that failed."""
        return atomic.read_json(self.folder / f"{name}.failed.json")

    def note_failure(self, name: str, message: str, exit_code: int) -> None:
        """Keep why a stage failed until it is tried again."""
        atomic.write_json(self.folder / f"{name}.failed.json", {"message": redact(message), "exit_code": exit_code})

    def clear_failure(self, name: str) -> None:
        """It is tried again."""
        (self.folder / f"{name}.failed.json").unlink(missing_ok=True)

    def submission(self, name: str) -> dict[str, Any] | None:
        """What a cluster's scheduler was last asked for a stage."""
        return atomic.read_json(self.folder / f"{name}.job.json")

    def note_submission(self, name: str, content: Mapping[str, Any]) -> None:
        """Keep it."""
        atomic.write_json(self.folder / f"{name}.job.json", dict(content))

    def update_index(self) -> None:
        """Bring the sweep's index up to date, unless another command keeps the folder: then that one does it."""

        def message(name: str) -> str | None:
            failed = self.failure(name)
            return None if failed is None else str(failed["message"])

        try:
            with locks.hold(self.out, wait_s=INDEX_WAIT_S, patience_s=INDEX_PATIENCE_S):
                update_index(self.out, message)
        except locks.InUseError as error:
            console.detail(f"  the index is left as it is: {error.message}")
