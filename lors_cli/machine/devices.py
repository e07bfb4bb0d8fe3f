"""Processors and their memory: what this machine has, and what of it is free."""

from __future__ import annotations

import os
import platform
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from lors_cli.errors import UsageError
from lors_cli.machine import processes
from lors_cli.machine.memory import available_memory

if TYPE_CHECKING:
    import torch


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


@cache
def processor_features() -> str:
    """The processor's instruction sets in the system's words, empty where it does not list them."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    return next((line for line in lines if line.partition(":")[0].strip() in ("flags", "Features")), "")


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


def threads_of_each(num_processes: int) -> dict[str, str]:
    """OMP_NUM_THREADS for processes that are to have the cores together, unless the user has set it."""
    if num_processes == 1 or "OMP_NUM_THREADS" in os.environ:
        return {}
    return {"OMP_NUM_THREADS": str(max(1, usable_cores() // num_processes))}


def free_memory(device: str) -> int:
    """Bytes that are free where `device` (auto, cpu, cuda, …) computes."""
    import torch

    found = resolve_device(device)
    return torch.cuda.mem_get_info(found)[0] if found.type == "cuda" else available_memory()


def resolve_device(name: str) -> torch.device:
    """The torch device for a config's `device`; a numbered GPU becomes the current one, where Triton launches.

    Raises:
        UsageError: the device is not on this machine.
    """
    import torch

    if processes.num_processes() > 1 and name.startswith("cuda:"):
        raise UsageError(
            f"device: several processes would share {name}.", "Leave --device out: each takes its own GPU."
        )
    if name in ("auto", "cuda") and torch.cuda.is_available():
        if processes.local_index() >= torch.cuda.device_count():
            raise UsageError(f"{torch.cuda.device_count()} GPUs are not enough for as many processes as were started.")
        return torch.device("cuda", processes.local_index()) if processes.num_processes() > 1 else torch.device("cuda")
    if name == "auto":
        return torch.device("cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError(f"device: {name} was asked for, but torch sees no GPU here.", "Use --device cpu.")
    if name == "mps" and not torch.backends.mps.is_available():
        raise UsageError("device: mps was asked for, but torch sees no Apple GPU here.", "Use --device cpu.")
    device = torch.device(name)
    if device.index is not None:
        if device.index >= torch.cuda.device_count():
            raise UsageError(f"device: there is no {name} here, torch sees {torch.cuda.device_count()} GPUs.")
        torch.cuda.set_device(device)
    return device


def cpu_has_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 in hardware (AVX512-BF16, AMX or Arm BF16)."""
    import torch

    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16", "arm_bf16", "sve_bf16"))


def set_seed(seed: int) -> None:
    """Seed Python's, NumPy's and torch's generators."""
    from transformers import set_seed as seed_all

    seed_all(seed)
