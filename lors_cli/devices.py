"""Processors and their memory: what this machine has, and what of it is free."""

from __future__ import annotations

import os
import platform
from functools import cache
from pathlib import Path


@cache
def processor() -> str:
    """The processor's model, as the system calls it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "Model", "cpu model"):
            return value.strip()
    return platform.processor() or platform.machine()


def usable_processors() -> int:
    """Logical processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def usable_cores() -> int:
    """Cores that this process may compute on: of its affinity and its container, hyperthreads counted once."""
    import psutil

    logical = usable_processors()
    cores = min(logical, psutil.cpu_count(logical=False) or logical)
    quota = Path("/sys/fs/cgroup/cpu.max")
    limit, _, period = (quota.read_text(encoding="ascii") if quota.is_file() else "max").strip().partition(" ")
    return max(1, min(cores, int(limit) // int(period))) if limit.isdecimal() and period.isdecimal() else cores


def free_memory(device: str) -> int:
    """Bytes that are free where `device` (auto, cpu, cuda, …) computes."""
    import psutil
    import torch

    from lors_cli.models import resolve_device

    found = resolve_device(device)
    return torch.cuda.mem_get_info(found)[0] if found.type == "cuda" else psutil.virtual_memory().available
