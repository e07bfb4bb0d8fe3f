"""Moments of a `lors` process at which it can be killed or fail, told without a line in the package itself.

What is watched are the file operations below one folder: audit events for every library, a few functions wrapped for
what has no event. Each leaves a line in the trace before it happens; so does every finished unit of work.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import re
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

WRITING = os.O_WRONLY | os.O_RDWR
EVENTS = {"os.rename": "before rename", "os.remove": "before remove", "os.rmdir": "before rmdir",
          "os.mkdir": "before mkdir", "open": "before open"}  # fmt: skip


class Watch:
    """The moments of this process so far.

    Args:
        folder: what lies elsewhere is not watched.
        trace: where lines are added, outside of `folder`.
        moment: {"key", "count"}: kill the process group at that moment, the count-th of its key.
        faults: {part of a key: errno's name} for moments that raise this OSError instead, "remove FOLDER", or a
            signal's name for one that it comes at.
    """

    def __init__(self, folder: Path, trace: Path, moment: dict[str, Any] | None, faults: dict[str, str]) -> None:
        self.root = str(folder.resolve()) + "/"
        self.trace = os.open(trace, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.key, self.count = (moment["key"], moment["count"]) if moment else ("", 0)
        self.faults = faults
        self.seen: Counter[str] = Counter()

    def note(self, kind: str, what: str) -> None:
        """Add a line."""
        os.write(self.trace, f"{kind}\t{what}\n".encode())

    def reach(self, kind: str, path: Any, folder_descriptor: int = -1) -> bool:
        """Come to a moment; whether its file is one that is watched."""
        name = self.name(path, folder_descriptor)
        if name is None:
            return False
        key = f"{kind} {name}"
        self.seen[key] += 1
        self.note("moment", key)
        if self.is_next(key):
            self.kill(key)
        for part in [part for part in self.faults if part in key]:
            self.fail(key, self.faults[part], part)
        return True

    def fail(self, key: str, fault: str, part: str) -> None:
        """Let an operation fail from now on; or, once, remove a folder or send a signal."""
        self.note("fault", f"{fault} {key}")
        if fault.startswith("remove "):
            del self.faults[part]
            shutil.rmtree(self.root + fault.removeprefix("remove "))
            return
        if fault.startswith("SIG"):
            del self.faults[part]
            os.kill(os.getpid(), signal.Signals[fault])
            return
        number = getattr(errno, fault)
        raise OSError(number, os.strerror(number), self.root + key.split(" ", 2)[2])

    def is_next(self, key: str) -> bool:
        """Whether the process is to be killed here."""
        return key == self.key and self.seen[key] == self.count

    def kill(self, key: str) -> None:
        """End the process and all that it started."""
        self.note("kill", key)
        os.killpg(0, signal.SIGKILL)

    def name(self, path: Any, folder_descriptor: int = -1) -> str | None:
        """A path relative to the watched folder, None for others."""
        if isinstance(path, int):
            text = os.readlink(f"/proc/self/fd/{path}")
        else:
            text = os.fsdecode(path)
            if not os.path.isabs(text):
                base = os.readlink(f"/proc/self/fd/{folder_descriptor}") if folder_descriptor >= 0 else os.getcwd()
                text = os.path.join(base, text)
        text = re.sub(r"\.[0-9a-f]{8}-\d+-[0-9a-f]{8}\.partial$", ".partial", os.path.normpath(text))
        return text[len(self.root) :] if text.startswith(self.root) else None


def install(folder: Path, trace: Path, moment: dict[str, Any] | None, faults: dict[str, str]) -> None:
    """Watch this process from now on.

    Args:
        folder: that the command works in.
        trace: file of lines.
        moment: to be killed at.
        faults: operations that fail.
    """
    watch = Watch(folder, trace, moment, faults)
    _audit(watch)
    _wrap_renames(watch)
    _wrap_writes(watch)
    _count_work(watch)


def _audit(watch: Watch) -> None:
    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        kind = EVENTS.get(event)
        if kind is None:
            return
        if event == "open":
            path, _mode, flags = arguments
            if isinstance(path, int) or not isinstance(flags, int) or not flags & WRITING:
                return
            watch.reach(kind, path)
        elif event == "os.rename":
            watch.reach(kind, arguments[1], arguments[3])
        else:
            watch.reach(kind, arguments[0], arguments[-1])

    sys.addaudithook(hook)


def _wrap_renames(watch: Watch) -> None:
    def after(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(source: Any, target: Any, **options: Any) -> None:
            real(source, target, **options)
            watch.reach("after rename", target)

        return call

    real_fsync = os.fsync

    def fsync(descriptor: int) -> None:
        watch.reach("before fsync", descriptor)
        real_fsync(descriptor)

    os.replace, os.rename, os.fsync = after(os.replace), after(os.rename), fsync


class HalfWriter:
    """A file that may be killed with half of a `write` on the disk."""

    def __init__(self, file: Any, path: Any, watch: Watch) -> None:
        self._file, self._path, self._watch = file, path, watch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> HalfWriter:
        self._file.__enter__()
        return self

    def __exit__(self, *error: Any) -> Any:
        return self._file.__exit__(*error)

    def write(self, data: Any) -> int:
        """Both halves, with a moment between them."""
        half = len(data) // 2
        self._file.write(data[:half])
        self._file.flush()
        self._watch.reach("within bytes", self._path)
        self._file.write(data[half:])
        return len(data)


def _wrap_writes(watch: Watch) -> None:
    import torch
    import transformers.modeling_utils as saving

    from lors_cli.files import atomic
    from lors_cli.models import loading, tensor_files
    from lors_cli.tuning.training import step_log

    def opened(path: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
        file = builtins.open(path, mode, *args, **options)  # noqa: SIM115 - its reader closes it
        is_watched = mode[0] in "wa" and "+" not in mode and watch.name(path) is not None
        return HalfWriter(file, path, watch) if is_watched else file

    for module in (atomic, tensor_files, step_log):
        module.open = opened  # type: ignore[attr-defined]

    real_save = torch.save

    def save(content: Any, target: Any, *args: Any, **options: Any) -> None:
        if not isinstance(target, (str, os.PathLike)):
            real_save(content, target, *args, **options)
            return
        whole = io.BytesIO()
        real_save(content, whole, *args, **options)
        with opened(target, "wb") as file:
            file.write(whole.getvalue())

    torch.save = save  # type: ignore[assignment]
    real_tensors = saving.safe_save_file

    def save_file(tensors: Any, target: Any, *args: Any, **options: Any) -> None:
        """Its bytes are written where nothing can be wrapped: on the way to death the file is cut in half."""
        real_tensors(tensors, target, *args, **options)
        key = f"within bytes {watch.name(target)}"
        if key == watch.key and watch.seen[key] + 1 == watch.count:
            os.truncate(target, os.path.getsize(target) // 2)
        watch.reach("within bytes", target)

    saving.safe_save_file = save_file
    loading.MAX_SHARD_SIZE = "400KB"  # so that there are shards


def _count_work(watch: Watch) -> None:
    """A line for every block, step and piece that was computed, kept or not."""
    from lors_cli.evaluation import stage
    from lors_cli.pruning.walk import driver
    from lors_cli.tuning import initialization
    from lors_cli.tuning.training.step_log import StepLog

    def told(owner: Any, name: str, unit: Callable[..., str]) -> None:
        real = getattr(owner, name)

        def call(*args: Any, **options: Any) -> Any:
            result = real(*args, **options)
            watch.note("work", unit(*args))
            return result

        setattr(owner, name, call)

    told(driver, "prune_block", lambda block, walk, *_: f"block {watch.name(walk.states.folder.parent)} {block.index}")
    told(
        StepLog, "append", lambda self, row: f"step {watch.name(self.path.parent).replace('/.work', '')} {row['step']}"
    )
    told(initialization, "gradient_directions", lambda *_: "start")
    told(stage, "_score_task", lambda *args: f"piece {watch.name(args[3].path)}")
    told(stage, "_score_text", lambda *args: f"piece {watch.name(args[4].path)}")
