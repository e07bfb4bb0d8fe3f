"""Where a result comes from: the machine, the code's commit, the models and the texts that went in."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

from lors_cli.machine.devices import processor, processor_features, usable_processors

GIT_TIMEOUT_S = 20


def hardware() -> dict[str, Any]:
    """Processor, cores and threads; GPUs and their libraries where torch is loaded already."""
    found: dict[str, Any] = {"processor": processor(), "processors": os.cpu_count()}
    found["usable_processors"] = usable_processors()
    torch = sys.modules.get("torch")  # a look at the GPU is not worth importing it
    if torch is None:
        return found
    found["threads"] = torch.get_num_threads()
    found["instructions"] = torch.backends.cpu.get_cpu_capability()
    found["amx"] = "amx_bf16" in processor_features().split()  # which bfloat16 is then multiplied by, in another order
    found["deterministic"] = torch.are_deterministic_algorithms_enabled()
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
        found["gpus"] = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        found["cuda"] = torch.version.cuda
        found["cudnn"] = torch.backends.cudnn.version()
    return found


@cache
def code_version(folder: Path | None = None) -> dict[str, Any] | None:
    """The commit of the checkout that the code runs from, None where it is installed without one or git is absent.

    Returns:
        {"commit", "dirty"}: the commit's hash, None before the first one; whether the package's files differ from it.
    """
    folder = folder or Path(__file__).parents[1]
    if not (folder.parent / ".git").exists():
        return None
    try:
        found = subprocess.run(
            ["git", "-C", str(folder), "status", "--porcelain=v2", "--branch", "--", "."],
            capture_output=True, text=True, timeout=GIT_TIMEOUT_S, check=True, stdin=subprocess.DEVNULL,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    lines = found.stdout.splitlines()
    commit = next(line.split()[-1] for line in lines if line.startswith("# branch.oid"))
    changed = any(not line.startswith("#") for line in lines)
    return {"commit": None if commit == "(initial)" else commit, "dirty": changed}


def environment() -> dict[str, Any]:
    """Versions and hardware that a result was made with."""
    from importlib.metadata import PackageNotFoundError, version

    import psutil

    versions = {}
    for name in ("lors-cli", "torch", "transformers", "accelerate", "datasets", "lm-eval", "numpy"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "absent"
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        **hardware(),
        "packages": versions,
        "code": code_version(),
    }
