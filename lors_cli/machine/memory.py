"""The memory of this process: how much it has, and giving back what it has freed."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

CGROUPS, MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def memory_in_use() -> int:
    """Bytes of memory that this process has."""
    import psutil

    return psutil.Process().memory_info().rss


def available_memory() -> int:
    """Bytes that this machine has free, or that its container may still take, if those are fewer."""
    import psutil

    return min([psutil.virtual_memory().available, *(limit - used for limit, used in container_memory())])


def container_memory() -> Iterator[tuple[int, int]]:
    """Of every control group that this process is in and that has a limit: what it may take and has, in bytes.

    Cached files are left out of what it has: the kernel lets go of them.
    """
    own = next((line[3:] for line in _lines(MEMBERSHIP) if line.startswith("0::")), "/")
    within = PurePosixPath(own.lstrip("/"))
    for folder in (CGROUPS / part for part in (within, *within.parents)):
        limit, used = ("".join(_lines(folder / name)) for name in ("memory.max", "memory.current"))
        if limit.isdecimal() and used.isdecimal():
            cached = sum(int(line.split()[1]) for line in _lines(folder / "memory.stat")
                         if line.startswith(("active_file ", "inactive_file ")))  # fmt: skip
            yield int(limit), int(used) - cached


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1] if path.is_file() else []


def gpu_memory_in_use() -> int:
    """Bytes that torch holds on its GPU; 0 without one."""
    torch = sys.modules.get("torch")
    return torch.cuda.memory_reserved() if torch is not None and torch.cuda.is_initialized() else 0


def give_back_memory() -> None:
    """Return freed memory to the system: glibc keeps what was taken for tensors below 32 MB, in pieces."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)


def collect_garbage() -> None:
    """Free what nothing refers to any more, such as a model that was let go, on the GPU as well."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
