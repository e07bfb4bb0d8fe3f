"""The memory of this process: how much it has, and giving back what it has freed."""

from __future__ import annotations

import ctypes
import gc
import sys


def memory_in_use() -> int:
    """Bytes of memory that this process has."""
    import psutil

    return psutil.Process().memory_info().rss


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
