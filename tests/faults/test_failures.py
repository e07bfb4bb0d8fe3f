"""A disk that fills, fails or is read-only, memory that ends, folders that vanish: at every stage of a run.

Each is one message with its exit code, keeps what was finished, and the same command then resumes.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from chains import Process, Server, compare, copied, results

RUN = ("run", "chain.yaml")
SWEEP = ("sweep", "grid.yaml", "eval.tasks=[]")
ABORTED = re.compile(r"memory allocation of \d+ bytes failed")
"""What the tokenizer's library, in Rust, says before it ends the process."""


def check_told(process: Process, code: int, said: str, errors: int = 1) -> None:
    """One message (in a sweep one a cell), no traceback, the right exit code."""
    assert process.code == code, process.output
    assert process.of("fault"), "the fault was not met"
    told = [line for line in process.output.splitlines() if line.startswith("error: ")]
    assert len(told) == errors, process.output
    assert "Traceback" not in process.output, process.output
    assert said in " ".join(process.output.split()), process.output


@pytest.fixture(scope="module")
def whole(server: Server, bench: Path) -> Path:
    """Where the chain has run to its end."""
    folder = copied(bench / "start", bench / "whole")
    process = server.run(folder, RUN)
    assert process.code == 0, process.output
    return folder


FAILURES = [
    ("within bytes runs/chain/.recipe.yaml", "ENOSPC", 4, "The disk is full"),
    ("before open runs/chain/prune/.lock", "EROFS", 2, "Cannot write or read there"),
    ("within bytes runs/chain/prune/.work/.inputs_0002", "ENOSPC", 4, "The disk is full"),
    ("before fsync runs/chain/prune/.work/.block_0003", "EIO", 4, "The disk failed"),
    ("within bytes runs/chain/prune/.staging/.model-00002", "EDQUOT", 4, "The disk is full"),
    ("before rename runs/chain/prune/config.json", "EACCES", 2, "Cannot write or read there"),
    ("within bytes runs/chain/tune/log.jsonl", "ENOSPC", 4, "The disk is full"),
    ("within bytes runs/chain/tune/checkpoints/.partial/checkpoint-2/optimizer.pt", "ENOSPC", 4, "The disk is full"),
    ("before fsync runs/chain/tune/checkpoints/.partial/checkpoint-4", "ESTALE", 4, "The disk failed"),
    ("before rename runs/chain/tune/checkpoints/checkpoint-6", "remove runs/chain/tune", 3, "was removed"),
    ("within bytes runs/chain/tune/.staging/adapter", "ENOSPC", 4, "The disk is full"),
    ("within bytes runs/chain/tune/.stage.json", "ENOSPC", 4, "The disk is full"),
    ("before open runs/chain/eval/.pieces", "EMFILE", 4, "Too many open files"),
    ("within bytes runs/chain/eval/samples/pruned/.arc_easy", "ENOSPC", 4, "The disk is full"),
    ("before fsync runs/chain/eval/.pieces/pruned", "EROFS", 2, "Cannot write or read there"),
    ("before rename runs/chain/eval/samples/tuned", "remove runs/chain/eval", 3, "was removed"),
    ("within bytes runs/chain/.manifest.json", "ENOSPC", 4, "The disk is full"),
    ("before open runs/chain/figures", "ENOSPC", 4, "The disk is full"),
    ("within bytes runs/chain/.report.md", "ENOSPC", 4, "The disk is full"),
]


def test_a_run_goes_on_after_every_failure(server: Server, bench: Path, whole: Path) -> None:
    folder = copied(bench / "start", bench / "failing")
    finished: dict[str, int] = {}
    for moment, fault, code, said in FAILURES:
        process = server.run(folder, RUN, faults={moment: fault})
        check_told(process, code, said)
        now = {path.parent.name: path.stat().st_mtime_ns for path in folder.glob("runs/chain/*/stage.json")}
        if not fault.startswith("remove"):
            assert {stage: now[stage] for stage in finished} == finished, moment
        finished = now
    process = server.run(folder, RUN)
    assert process.code == 0, process.output
    assert compare(results(whole), results(folder)) == []


@pytest.mark.long
def test_a_spot_machine_is_taken_away_in_every_stage(server: Server, bench: Path, whole: Path) -> None:
    """SIGTERM; each time another process with the same folder goes on."""
    folder = copied(bench / "start", bench / "spot")
    stages = {
        "prune": "before rename runs/chain/prune/.work/block_0002",
        "tune": "before rename runs/chain/tune/checkpoints/checkpoint-4",
        "pack": "before rename runs/chain/pack/",
        "eval": "before rename runs/chain/eval/samples/pruned",
    }
    for number, (stage, moment) in enumerate(stages.items()):
        process = server.run(folder, RUN, faults={moment: "SIGTERM"})
        check_told(process, 130, "stopped by SIGTERM; what was finished is kept. The same command resumes from there.")
        finished = {path.parent.name for path in folder.glob("runs/chain/*/stage.json")}
        assert finished == set(list(stages)[:number]), stage
    process = server.run(folder, RUN)
    assert process.code == 0, process.output
    assert compare(results(whole), results(folder)) == []


def test_a_stage_that_vanishes_between_stages_is_made_again(server: Server, bench: Path, whole: Path) -> None:
    folder = copied(bench / "start", bench / "vanishing")
    process = server.run(folder, RUN, faults={"before mkdir runs/chain/tune": "remove runs/chain/prune"})
    check_told(process, 3, "runs/chain/prune")
    process = server.run(folder, RUN)
    assert process.code == 0, process.output
    assert compare(results(whole), results(folder)) == []


def test_a_sweep_notes_a_failure_and_goes_on(server: Server, bench: Path) -> None:
    reference, folder = copied(bench / "start", bench / "swept"), copied(bench / "start", bench / "sweeping")
    assert server.run(reference, SWEEP).code == 0
    for moment, fault, code, said, errors in (
        ("within bytes sweeps/grid/.sweep.json", "ENOSPC", 4, "The disk is full", 1),
        ("before fsync sweeps/grid/stages/prune", "ENOSPC", 4, "The disk is full", 2),
        ("before rename sweeps/grid/report.md", "EROFS", 2, "Cannot write or read there", 1),
    ):
        check_told(server.run(folder, SWEEP, faults={moment: fault}), code, said, errors)
    process = server.run(folder, SWEEP)
    assert process.code == 0, process.output
    assert compare(results(reference), results(folder)) == []


def test_too_little_memory_is_told(server: Server, bench: Path, whole: Path) -> None:
    folder = copied(bench / "start", bench / "small")
    codes = []
    for mib in (16, 48, 96, 192):
        process = server.run(folder, RUN, memory_mib=mib)
        if "cannot allocate memory for thread-local data" in process.output or ABORTED.search(process.output):
            continue  # where a thread finds no room for itself, glibc ends the process; Rust does where there is none
        codes.append(process.code)
        assert process.code in (0, 4), process.output
        assert "Traceback" not in process.output, process.output
        if process.code == 4:
            assert "Not enough memory" in process.output
            assert "the same command resumes" in process.output
    assert 4 in codes
    process = server.run(folder, RUN)
    assert process.code == 0, process.output
    assert compare(results(whole), results(folder)) == []
