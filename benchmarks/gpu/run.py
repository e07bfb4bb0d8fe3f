"""Everything that only a GPU can show, in nine minutes: steps in order of worth, a process and a time box for each.

python benchmarks/gpu/run.py --out DIR --minutes 9      on a GPU; needs torch, transformers, triton, peft, typer, rich,
                                                        pyyaml, safetensors and pydantic, and no network
python benchmarks/gpu/run.py --out DIR --rehearse       the same at tiny shapes on a CPU (so too where there is no CUDA)

A step that fails, hangs or breaks the GPU's state loses only itself. DIR/STEP.json is written after every item,
DIR/run.json after every step, DIR/summary.txt at the end: it is what is printed. README.md beside this file says what
is expected.
"""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from common import software
from gpu.box import Box
from gpu.summary import summary

from lors_cli.files import atomic

SHARES = {"right": 0.22, "steps": 0.45, "kernel": 0.25, "decode": 0.3, "pruning": 0.45, "chain": 1.0}
"""Of the time that is left when a step begins, so that what one does not need goes to those after it."""
GRACE_S = 10
"""After its box a step may end the item it is at, so long; then it is killed."""


def run_step(name: str, seconds: float, out: Path, rehearse: bool, cpu: bool) -> None:
    """One step, in this process."""
    box = Box(out / f"{name}.json", time.monotonic() + seconds, rehearse, cpu)
    importlib.import_module(f"gpu.{name}").run(box)


def spawn(name: str, seconds: float, out: Path, rehearse: bool, cpu: bool) -> dict[str, Any]:
    """A step in a process of its own, and how it ended."""
    command = [sys.executable, __file__, "--out", str(out), "--step", name, "--seconds", str(seconds)]
    environment = {**os.environ, "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "HF_HUB_OFFLINE": "1"}
    if cpu:
        command.append("--cpu")
    elif rehearse:
        command.append("--rehearse")
        environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    started = time.monotonic()
    with (out / f"{name}.log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            code = process.wait(seconds + GRACE_S)
            ended = "finished" if code == 0 else f"failed (exit {code}): {_last_line(out / f'{name}.log')}"
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            ended = "killed at the end of its time"
    return {"ended": ended, "elapsed_s": round(time.monotonic() - started, 1), "box_s": round(seconds, 1)}


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1][:200] if lines else "it said nothing"


def run_all(out: Path, minutes: float, rehearse: bool, cpu: bool, names: list[str]) -> str:
    """All steps; the summary."""
    ends = time.monotonic() + 60 * minutes
    device = "CPU (rehearsal)" if rehearse else "CPU" if cpu else torch.cuda.get_device_name()
    document: dict[str, Any] = {**software(), "device": device, "minutes": minutes, "steps": {}}
    for name in names:  # an earlier run's figures are not this one's
        (out / f"{name}.json").unlink(missing_ok=True)
    for name in names:
        seconds = SHARES[name] * (ends - time.monotonic()) - GRACE_S
        if seconds < GRACE_S:
            document["steps"][name] = {"ended": "no time was left", "elapsed_s": 0.0, "box_s": 0.0}
            continue
        print(f"{name}: at most {seconds:.0f} s", flush=True)
        document["steps"][name] = spawn(name, seconds, out, rehearse, cpu)
        atomic.write_json(out / "run.json", document)
    text = summary(document, {name: atomic.read_json(out / f"{name}.json") or {} for name in names})
    atomic.write_text(out / "summary.txt", text + "\n")
    return text


def main() -> None:
    """Read the command line; run all steps, or the one that a parent process names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--cpu", action="store_true", help="the chain on the CPU, for figures to compare with")
    parser.add_argument("--only", nargs="+", choices=list(SHARES), default=list(SHARES))
    parser.add_argument("--step", choices=list(SHARES), help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    cpu: bool = options.cpu
    rehearse = options.rehearse or not (cpu or torch.cuda.is_available())
    options.out.mkdir(parents=True, exist_ok=True)
    if options.step:
        run_step(options.step, options.seconds, options.out, rehearse, cpu)
    else:
        print(run_all(options.out, options.minutes, rehearse, cpu, options.only))


if __name__ == "__main__":
    main()
