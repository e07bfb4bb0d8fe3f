"""What a container leaves of the machine's memory."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from lors_cli.machine import memory
from lors_cli.machine.devices import free_memory

MIB = 1 << 20


def group(folder: Path, limit: str, used: int, cached: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\nactive_file {cached // 2}\ninactive_file {cached // 2}\n")


def test_the_tightest_group_that_the_process_is_in_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "CGROUPS", tmp_path / "cgroups")
    monkeypatch.setattr(memory, "MEMBERSHIP", tmp_path / "membership")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 900 * MIB}))
    assert memory.available_memory() == free_memory("cpu") == 900 * MIB  # no groups here
    (tmp_path / "membership").write_text("1:cpu:/other\n0::/slurm/job_7\n")
    group(tmp_path / "cgroups/slurm/job_7", "max", 400 * MIB, 0)
    group(tmp_path / "cgroups/slurm", str(800 * MIB), 500 * MIB, 100 * MIB)
    group(tmp_path / "cgroups/other", str(MIB), 0, 0)
    assert list(memory.container_memory()) == [(800 * MIB, 400 * MIB)]
    assert memory.available_memory() == free_memory("cpu") == 400 * MIB
    (tmp_path / "membership").write_text("0::/\n")  # a container sees itself as the root
    group(tmp_path / "cgroups", str(300 * MIB), 100 * MIB, 0)
    assert memory.available_memory() == 200 * MIB
