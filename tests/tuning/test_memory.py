"""Memory stays flat over many optimiser steps, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from lors_cli.recipe.schema import ModelConfig, TuneConfig
from lors_cli.tuning.stage import tune
from lors_cli.tuning.training import trainer

WATCHED = """
import dataclasses, gc, json, resource, sys, tracemalloc
from pathlib import Path
import torch
from lors_cli.output import console
from lors_cli.recipe.schema import ModelConfig, TuneConfig, TuneDataConfig
from lors_cli.tuning.stage import tune
from lors_cli.tuning.training import step_log

model, rows, out, steps = sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])
leak, leaked, seen = json.loads(sys.argv[5]), [], {}
original = step_log.StepLog.append

def append(self, row):
    original(self, row)
    step = row["step"]
    if leak == "tensor":
        leaked.append(torch.zeros(1))
    if leak == "object":
        leaked.append({"step": step, "loss": 1.5 * step})
    if step in (steps // 4, steps):
        gc.collect()
        tensors = sum(isinstance(value, torch.Tensor) for value in gc.get_objects())
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        seen[step] = [tensors, tracemalloc.get_traced_memory()[0], peak * 1024]

step_log.StepLog.append = append
console.configure(verbosity=-1)
config = TuneConfig(
    rank=4, init="kaiming", max_steps=steps, batch_size=1, per_device_batch_size=1, save_steps=steps // 8,
    max_bad_steps=3, spike_factor=1e6, data=TuneDataConfig(dataset=rows, max_length=320),
)
tracemalloc.start()
tune(config, ModelConfig(path=model), out)
print(json.dumps([seen[steps // 4], seen[steps]]))
"""
"""Counts at a quarter of the steps and at the last one: live tensors, bytes of Python objects, peak resident bytes."""
TENSORS = 16
"""How many may come and go: a step more or less of the epoch's last batches."""
OBJECTS = 32 << 10
"""Bytes of Python objects that may come and go; a dict a step takes twice that in 240 steps."""
RESIDENT = 48 << 20
"""Bytes by which the heap may settle."""


def watched(model: Path, rows: Path, out: Path, steps: int, leak: str | None = None) -> tuple[int, int, int]:
    """What was added between a quarter of the steps and the last one."""
    command = [sys.executable, "-c", WATCHED, str(model), str(rows), str(out), str(steps), json.dumps(leak)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    first, last = json.loads(done.stdout)
    tensors, objects, resident = (b - a for a, b in zip(first, last, strict=True))
    print(f"{steps} steps: {tensors} tensors, {objects} bytes of objects, {resident} bytes resident")
    return tensors, objects, resident


@pytest.mark.parametrize("steps", [320, pytest.param(2000, marks=pytest.mark.long)])
def test_memory_stays_flat(sparse_checkpoint: Path, instructions: Path, tmp_path: Path, steps: int) -> None:
    tensors, objects, resident = watched(sparse_checkpoint, instructions, tmp_path / "tune", steps)
    assert tensors <= TENSORS
    assert objects < OBJECTS
    assert resident < RESIDENT


@pytest.mark.long
def test_leaks_would_be_seen(sparse_checkpoint: Path, instructions: Path, tmp_path: Path) -> None:
    tensors, *_ = watched(sparse_checkpoint, instructions, tmp_path / "first", 320, "tensor")
    assert tensors > TENSORS
    _, objects, _ = watched(sparse_checkpoint, instructions, tmp_path / "second", 320, "object")
    assert objects > OBJECTS


def test_freed_memory_is_given_back_after_every_step(
    sparse_checkpoint: Path, config: TuneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setattr(trainer, "give_back_memory", lambda: calls.append(1))
    tune(replace(config, init="kaiming", max_steps=3), ModelConfig(path=str(sparse_checkpoint)), tmp_path / "tune")
    assert len(calls) == 3
